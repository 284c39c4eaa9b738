"""Bias field correction: N4 (Tustison et al. 2010) on a shrunk image, its field applied at full size."""

from __future__ import annotations

import numpy as np
from scipy import ndimage

from dmir.volumes import Volume


def correct_bias(image: Volume, mask: Volume, *, shrink: int = 4, iterations: tuple[int, ...] = (10, 10, 10)) -> Volume:
    """Divide an image by its smooth multiplicative field.

    Parameters
    ----------
    image, mask
        Grey values and brain mask on one grid. N4 sees the voxels of the mask that are above zero.
    shrink
        The field is smooth, so it is estimated on means over blocks of this many voxels along each axis.
    iterations
        The most iterations at each fitting level; each level doubles the field's control points.

    Returns
    -------
    Volume
        float32, same grid, with the same mean inside the mask.
    """
    inside = mask.data & (image.data > 0)
    box = ndimage.find_objects(inside.astype(np.uint8))[0]  # the field is of use nowhere else
    corrected = image.data.astype(np.float32)
    corrected[box] /= np.exp(_log_field(image.data[box], inside[box], shrink, iterations))
    corrected *= image.data[inside].mean() / corrected[inside].mean()
    return Volume(corrected, image.affine)


def _log_field(data: np.ndarray, inside: np.ndarray, shrink: int, iterations: tuple[int, ...]) -> np.ndarray:
    """Return log(field), float32 of the shape of ``data``."""
    import SimpleITK as sitk

    shrink = max(1, min(shrink, *(n // 8 for n in data.shape)))  # N4 needs some voxels along each axis
    weight = _block_mean(inside.astype(np.float32), shrink)
    mean = _block_mean(np.where(inside, data, 0), shrink) / np.maximum(weight, 1e-6)  # of the voxels inside alone
    corrector = sitk.N4BiasFieldCorrectionImageFilter()
    corrector.SetMaximumNumberOfIterations(list(iterations))
    small = sitk.GetImageFromArray(np.where(weight > 0.5, mean, 0).astype(np.float32))
    # the field depends on the number of threads, and the filters inside N4 follow the global number alone
    threads = sitk.ProcessObject.GetGlobalDefaultNumberOfThreads()
    sitk.ProcessObject.SetGlobalDefaultNumberOfThreads(1)
    try:
        corrector.Execute(small, sitk.GetImageFromArray((weight > 0.5).astype(np.uint8)))
        field = sitk.GetArrayFromImage(corrector.GetLogBiasFieldAsImage(small))
    finally:
        sitk.ProcessObject.SetGlobalDefaultNumberOfThreads(threads)
    # voxel i of the full image lies at (i - (shrink - 1) / 2) / shrink of the shrunk one
    offset = -(shrink - 1) / (2 * shrink)
    return ndimage.affine_transform(
        field, np.eye(3) / shrink, offset, output_shape=data.shape, order=1, mode="nearest", prefilter=False
    )


def _block_mean(data: np.ndarray, size: int) -> np.ndarray:
    """Return the means over blocks of size^3 voxels; an incomplete last block is filled with zeros."""
    padded = np.pad(data, [(0, -n % size) for n in data.shape])
    blocks = padded.reshape([m for n in padded.shape for m in (n // size, size)])
    return blocks.mean(axis=(1, 3, 5))
