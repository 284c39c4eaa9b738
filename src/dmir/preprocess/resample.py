"""Resampling through an affine: the one place where a preprocessed scan is interpolated, and it is used once a scan."""

from __future__ import annotations

import numpy as np
from scipy import ndimage

from dmir.volumes import Grid, Volume

FWHM = 2 * np.sqrt(2 * np.log(2))  # full width at half maximum of a Gaussian of sigma 1


def resample(
    volume: Volume,
    grid: Grid,
    transform: np.ndarray | None = None,
    *,
    interpolation: str = "linear",
    antialias: bool = True,
) -> Volume:
    """Resample a volume onto a grid.

    Parameters
    ----------
    volume
        Data (D, H, W); what lies outside is 0.
    grid
        Where the result lies.
    transform
        4x4 matrix from the grid's world to the volume's world (RAS mm, pull-back); the identity when not given.
    interpolation
        ``"linear"`` for images; ``"nearest"`` or ``"generic_label"`` for label maps. The latter resamples the
        indicator of each label linearly and takes the largest (as ANTs' GenericLabel does).
    antialias
        Where the grid is coarser than the volume, first smooth by what is missing between the two voxel sizes
        (Cardoso et al. 2015, scale factor point spread function matching). Ignored for ``"nearest"``.

    Returns
    -------
    Volume
        float32 for ``"linear"``, else the type of ``volume``.
    """
    transform = np.eye(4) if transform is None else transform
    to_voxels = np.linalg.inv(volume.affine) @ transform @ grid.affine
    # how far one step of the grid goes along each axis of the volume, in its voxels
    step = np.sqrt((to_voxels[:3, :3] ** 2).sum(axis=1))
    sigma = np.sqrt(np.clip(step**2 - 1, 0, None)) / FWHM if antialias else np.zeros(3)
    if interpolation == "nearest":
        data = _pull(volume.data, to_voxels, grid.shape, order=0)
    elif interpolation == "linear":
        data = _pull(_smooth(volume.data.astype(np.float32), sigma), to_voxels, grid.shape, order=1)
    elif interpolation == "generic_label":
        data = _generic_label(volume.data, to_voxels, grid.shape, sigma)
    else:
        raise ValueError(f"interpolation is 'linear', 'nearest' or 'generic_label', not {interpolation!r}")
    return Volume(data, np.asarray(grid.affine))


def _smooth(data: np.ndarray, sigma: np.ndarray) -> np.ndarray:
    return ndimage.gaussian_filter(data, sigma, mode="constant", truncate=3) if sigma.max() > 0.1 else data


def _pull(data: np.ndarray, to_voxels: np.ndarray, shape: tuple[int, int, int], order: int) -> np.ndarray:
    return ndimage.affine_transform(
        data, to_voxels, output_shape=shape, order=order, mode="constant", cval=0, prefilter=False
    )


def _generic_label(
    data: np.ndarray, to_voxels: np.ndarray, shape: tuple[int, int, int], sigma: np.ndarray
) -> np.ndarray:
    best = np.zeros(shape, dtype=data.dtype)
    # background competes like any label; the smaller id wins a tie
    largest = _pull(_smooth((data == 0).astype(np.float32), sigma), to_voxels, shape, order=1)
    for label in np.unique(data[data != 0]):
        share = _pull(_smooth((data == label).astype(np.float32), sigma), to_voxels, shape, order=1)
        wins = share > largest
        best[wins] = label
        largest[wins] = share[wins]
    return best
