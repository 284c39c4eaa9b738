"""Denoising: non-local means (Buades et al. 2005; in 3-D Coupe et al. 2008), by scikit-image."""

from __future__ import annotations

import numpy as np
from scipy import ndimage

from dmir.volumes import Volume

PATCH, SEARCH = 3, 2  # voxels: edge of a patch, and how far similar patches are looked for
STRENGTH = 0.8  # of the noise's standard deviation: what scikit-image advises when that is known
MARGIN = PATCH + SEARCH  # voxels round the brain that the filter sees
TO_SIGMA = 1.4826  # median absolute deviation -> standard deviation of a Gaussian


def denoise(image: Volume, mask: Volume) -> Volume:
    """Average each voxel of the brain with those near it whose surroundings are alike.

    Within the brain a magnitude image's Rician noise is almost Gaussian. Its strength is estimated from the image.

    Parameters
    ----------
    image, mask
        Grey values and brain mask on one grid.

    Returns
    -------
    Volume
        float32, same grid; outside the mask as it was.
    """
    from skimage.restoration import denoise_nl_means

    brain = ndimage.find_objects(mask.data.astype(np.uint8))[0]
    box = tuple(slice(max(s.start - MARGIN, 0), s.stop + MARGIN) for s in brain)  # elsewhere it would be time wasted
    result = image.data.astype(np.float32)
    data, inside = result[box], mask.data[box]
    sigma = noise_level(data, inside)
    if sigma > 0:
        smooth = denoise_nl_means(data, patch_size=PATCH, patch_distance=SEARCH, h=STRENGTH * sigma, sigma=sigma)
        result[box] = np.where(inside, smooth, data)
    return Volume(result, image.affine)


def noise_level(data: np.ndarray, mask: np.ndarray) -> float:
    """Return the standard deviation of the noise inside a mask: of each voxel less its six neighbours' mean.

    sqrt(6/7) makes the variance of that difference the noise's own (Coupe et al. 2008, eq. 8); the median keeps edges
    out of it.
    """
    neighbours = ndimage.generate_binary_structure(3, 1).astype(np.float32)
    neighbours[1, 1, 1] = 0
    difference = data - ndimage.convolve(data, neighbours / 6)
    inside = difference[mask]
    return float(np.sqrt(6 / 7) * TO_SIGMA * np.median(np.abs(inside - np.median(inside))))
