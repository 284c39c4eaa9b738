"""The true field of a simulated scan, on the grid where methods work."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path

import numpy as np
from scipy import ndimage

from dmir.volumes import Grid


def truth_on_grid(
    displacement: np.ndarray, affine_of_truth: np.ndarray, transform: np.ndarray, grid: Grid
) -> np.ndarray:
    """Return the field that a perfect method would give for a preprocessed simulated scan.

    The stored truth d takes an atlas point x to its place x + d(x) in the scanner's world; the preprocessed scan shows
    the scanner's point ``B y`` at y, B being the estimated affine. Hence u(x) = B^-1 (x + d(x)) - x.

    Parameters
    ----------
    displacement
        d: (3, d, h, w) in voxels of its own grid, as :func:`dmir.fields.load_field` gives it.
    affine_of_truth
        4x4 voxel-to-RAS matrix of that grid (atlas world, mm).
    transform
        B: 4x4, atlas world -> scanner world (RAS mm), as :func:`dmir.preprocess.estimate_affine` gives it.
    grid
        The atlas's grid.

    Returns
    -------
    numpy.ndarray
        u: float32 (3, D, H, W) in voxels of ``grid``, so that warped(x) = moving(x + u(x)).
    """
    from dmir.fields import to_millimetres, to_voxels

    millimetres = to_millimetres(displacement, affine_of_truth)
    linear, rest = _split(millimetres, affine_of_truth)
    point = _world(grid)
    coordinates = _apply(np.linalg.inv(affine_of_truth), point)
    # beyond the truth's own grid the linear part goes on and the rest stays what it is at the border
    residual = np.stack([ndimage.map_coordinates(c, coordinates, order=1, mode="nearest") for c in rest])
    place = point + _apply(linear, point) + residual
    return to_voxels(_apply(np.linalg.inv(transform), place) - point, grid.affine).astype(np.float32)


def truth_of_pair(truths: Mapping[str, str | Path], moving: str, fixed: str) -> np.ndarray | None:
    """Return the true field of a pair of preprocessed simulated scans, None where neither is simulated.

    A scan's truth t takes the template's point to the scan's. The pair's field goes from the fixed scan back to the
    template, then on to the moving scan: x + u(x) = (x + t_moving) o (x + t_fixed)^-1. The template has no truth.

    Parameters
    ----------
    truths
        File of the true field by scan.

    Returns
    -------
    numpy.ndarray or None
        float32 (3, D, H, W) in voxels; NaN where the fixed scan's truth has no inverse, which is logged.
    """
    import torch

    from dmir.fields import NO_INVERSE, compose, inverse_residual, invert, load_field

    given = {scan: torch.from_numpy(load_field(truths[scan])[0])[None] for scan in (moving, fixed) if scan in truths}
    if not given:
        return None
    forward = given.get(moving)
    if fixed not in given:
        return None if forward is None else forward[0].numpy()
    back = invert(given[fixed])
    unknown = inverse_residual(given[fixed], back) > NO_INVERSE
    pair = back if forward is None else compose(forward, back)
    return pair.masked_fill(unknown[:, None], float("nan"))[0].numpy()


def _world(grid: Grid) -> np.ndarray:
    """Return the world points of a grid's voxels, (3, D, H, W) in mm."""
    return _apply(grid.affine, np.stack(np.meshgrid(*(np.arange(n) for n in grid.shape), indexing="ij")))


def _apply(matrix: np.ndarray, points: np.ndarray) -> np.ndarray:
    """Apply the first three rows of a 4x4 matrix to points (3, D, H, W)."""
    return np.einsum("ij,jdhw->idhw", matrix[:3, :3], points) + matrix[:3, 3].reshape(3, 1, 1, 1)


def _split(millimetres: np.ndarray, affine: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Split d into its least-squares affine part (4x4, the pose in the main) and the rest (3, d, h, w), in mm."""
    step = (slice(None), *(slice(None, None, 4),) * 3)
    depth, height, width = millimetres.shape[1:]
    points = _world(Grid((depth, height, width), affine))
    sample = points[step].reshape(3, -1)
    design = np.vstack([sample, np.ones(sample.shape[1])]).T
    solution = np.linalg.lstsq(design, millimetres[step].reshape(3, -1).T, rcond=None)[0]
    linear = np.zeros((4, 4))
    linear[:3] = solution.T
    return linear, millimetres - _apply(linear, points)
