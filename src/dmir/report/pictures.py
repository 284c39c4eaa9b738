"""What one plane shows of a registered pair, as two-dimensional pictures."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import torch

from dmir.fields import jacobian_determinant, to_millimetres
from dmir.report.planes import Plane


@dataclass(frozen=True)
class Pictures:
    """One method's row of the figure; every picture (rows, columns) from bottom to top, masked outside the brain.

    Attributes
    ----------
    warped
        The warped moving image.
    displacement
        (2, rows, columns): the field's components to the right and upwards, in voxels, not masked.
    magnitude
        Length of the displacement in mm.
    error
        ``|warped - fixed|``, not masked.
    jacobian
        Determinant by forward differences.
    endpoint_error
        Distance to the true displacement in mm, or None.
    """

    warped: np.ndarray
    displacement: np.ndarray
    magnitude: np.ndarray
    error: np.ndarray
    jacobian: np.ndarray
    endpoint_error: np.ndarray | None


def make_pictures(
    plane: Plane,
    warped: np.ndarray,
    displacement: np.ndarray,
    fixed: np.ndarray,
    brain: np.ndarray,
    affine: np.ndarray,
    truth: np.ndarray | None = None,
) -> Pictures:
    """Cut everything that is shown of one registered pair; all arrays on one RAS grid.

    Parameters
    ----------
    warped, fixed
        Images (D, H, W).
    displacement, truth
        Fields (3, D, H, W) in voxels.
    brain
        Mask (D, H, W): where magnitude, Jacobian and endpoint error are shown.
    affine
        4x4 voxel-to-RAS matrix of that grid, mm.
    """
    outside = ~plane.cut(brain)
    horizontal, vertical = plane.in_plane

    def masked(picture: np.ndarray) -> np.ndarray:
        return np.ma.masked_array(picture, outside)

    return Pictures(
        warped=plane.cut(warped),
        displacement=np.stack([plane.cut(displacement[horizontal]), plane.cut(displacement[vertical])]),
        magnitude=masked(_length(plane, displacement, affine)),
        error=np.abs(plane.cut(warped) - plane.cut(fixed)),
        jacobian=masked(jacobian_picture(plane, displacement)),
        endpoint_error=None if truth is None else masked(_length(plane, displacement, affine, truth)),
    )


def _slab(plane: Plane, displacement: np.ndarray, first: int, count: int) -> np.ndarray:
    """Return some slices of a field around the cut, so that nothing is computed for a whole volume."""
    return np.take(displacement, range(first, first + count), axis=plane.axis + 1).astype(np.float32)


def _length(plane: Plane, displacement: np.ndarray, affine: np.ndarray, origin: np.ndarray | None = None) -> np.ndarray:
    difference = _slab(plane, displacement, plane.index, 1)
    if origin is not None:
        difference = difference - _slab(plane, origin, plane.index, 1)
    length = np.sqrt((to_millimetres(difference, affine) ** 2).sum(axis=0))
    return _window(plane, np.squeeze(length, axis=plane.axis))


def _window(plane: Plane, slice_: np.ndarray) -> np.ndarray:
    (left, right), (bottom, top) = plane.window
    return slice_[left:right, bottom:top].T


def jacobian_picture(plane: Plane, displacement: np.ndarray) -> np.ndarray:
    """Return det(I + grad u) on the plane, forward differences; the last row and column repeat their neighbours."""
    first = min(plane.index, displacement.shape[plane.axis + 1] - 2)
    slab = torch.from_numpy(_slab(plane, displacement, first, 2))[None]
    determinant = jacobian_determinant(slab, scheme="forward")[0].numpy()
    flat = np.squeeze(determinant, axis=plane.axis)
    return _window(plane, np.pad(flat, ((0, 1), (0, 1)), mode="edge"))
