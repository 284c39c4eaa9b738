"""Distances in mm: to the truth, where it is known, and to where one started after there and back."""

from __future__ import annotations

import numpy as np
import torch

from dmir.fields import compose, to_millimetres


def endpoint_error(
    displacement: np.ndarray, truth: np.ndarray, affine: np.ndarray, mask: np.ndarray | None = None
) -> np.ndarray:
    """Return |u(x) - u_true(x)| in mm at each voxel of the mask where the truth is known, (n,); where nowhere, a NaN.

    Parameters
    ----------
    displacement, truth
        (3, D, H, W) in voxels of one grid; the truth may be NaN at some.
    affine
        Its 4x4 voxel-to-RAS matrix, mm.
    mask
        bool (D, H, W); all voxels by default.
    """
    inside = np.ones(displacement.shape[1:], bool) if mask is None else mask
    inside = inside & np.isfinite(truth).all(axis=0)
    if not inside.any():
        return np.array([np.nan])
    return _lengths(displacement[:, inside] - truth[:, inside], affine)


def inverse_consistency_error(
    displacement: np.ndarray, backward: np.ndarray, affine: np.ndarray, mask: np.ndarray | None = None
) -> np.ndarray:
    """Return |u(x) + v(x + u(x))| in mm at each voxel of the mask, (n,): how far there and back ends from the start.

    Christensen and Johnson 2001. It is no distance to the truth: a method that never moves anything has 0.

    Parameters
    ----------
    displacement, backward
        u of the pair and v of the same two scans with fixed and moving exchanged, (3, D, H, W) in voxels of one grid.
        Beyond the border v goes on as at the border.
    affine
        The grid's 4x4 voxel-to-RAS matrix, mm.
    mask
        bool (D, H, W); all voxels by default.
    """
    inside = np.ones(displacement.shape[1:], bool) if mask is None else mask
    there, back = (torch.from_numpy(np.ascontiguousarray(field))[None] for field in (displacement, backward))
    return _lengths(compose(back, there)[0].numpy()[:, inside], affine)


def _lengths(vectors: np.ndarray, affine: np.ndarray) -> np.ndarray:
    """Return the lengths in mm of vectors (3, n) in voxels."""
    millimetres = to_millimetres(vectors[:, :, None, None], affine)  # a field one voxel wide: those that count
    return np.sqrt((millimetres**2).sum(axis=(0, 2, 3)))
