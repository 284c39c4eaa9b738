"""Distance to the truth, where it is known."""

from __future__ import annotations

import numpy as np

from dmir.fields import to_millimetres


def endpoint_error(
    displacement: np.ndarray, truth: np.ndarray, affine: np.ndarray, mask: np.ndarray | None = None
) -> np.ndarray:
    """Return |u(x) - u_true(x)| in mm at each voxel of the mask, (n,).

    Parameters
    ----------
    displacement, truth
        (3, D, H, W) in voxels of one grid.
    affine
        Its 4x4 voxel-to-RAS matrix, mm.
    mask
        bool (D, H, W); all voxels by default.
    """
    inside = np.ones(displacement.shape[1:], bool) if mask is None else mask
    difference = displacement[:, inside] - truth[:, inside]
    millimetres = to_millimetres(difference[:, :, None, None], affine)  # a field one voxel wide: those that count
    return np.sqrt((millimetres**2).sum(axis=(0, 2, 3)))
