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
    error = np.sqrt((to_millimetres(displacement - truth, affine) ** 2).sum(axis=0))
    return error.ravel() if mask is None else error[mask]
