"""Grey values on a common scale."""

from __future__ import annotations

import numpy as np

from dmir.errors import InputError

FLOOR = 1e-3  # the darkest brain voxel stays above the background, so that a preprocessed image shows its own mask


def normalise(
    data: np.ndarray, mask: np.ndarray, *, lower: float = 0.5, upper: float = 99.5, where: str = "scan"
) -> np.ndarray:
    """Bring the brain's grey values to [0.001, 1] and everything else to 0.

    Parameters
    ----------
    data, mask
        Grey values and brain mask, (D, H, W).
    lower, upper
        The percentiles, within the mask, that become 0 and 1; what lies beyond is clipped.

    Returns
    -------
    numpy.ndarray
        float32; above 0 exactly inside the mask.

    Raises
    ------
    InputError
        The mask is empty, or the brain has the same value at both percentiles.
    """
    if not mask.any():
        raise InputError(
            f"{where}: brain mask",
            found="no voxel inside the grid",
            expected="a brain",
            remedy="Look at the alignment.",
        )
    low, high = np.percentile(data[mask], [lower, upper])
    if not high > low:
        raise InputError(
            f"{where}: image",
            found=f"the value {low:g} at both the {lower:g}th and the {upper:g}th percentile of the brain",
            expected="contrast inside the brain mask",
            remedy="Check that image and mask belong together.",
        )
    scaled = np.clip((data - low) / (high - low), FLOOR, 1)
    return np.where(mask, scaled, 0).astype(np.float32)


def match_histogram(
    data: np.ndarray, mask: np.ndarray, reference: np.ndarray, reference_mask: np.ndarray
) -> np.ndarray:
    """Give the brain the grey-value distribution of the reference's brain; zero outside. Shapes may differ."""
    from skimage.exposure import match_histograms

    matched = np.zeros(data.shape, dtype=np.float32)
    matched[mask] = np.maximum(match_histograms(data[mask], reference[reference_mask]), FLOOR)
    return matched
