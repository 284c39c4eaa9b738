"""Fields in other units, on other grids and along other axes: the same displacement in other numbers."""

from __future__ import annotations

import numpy as np

SLICES = 16  # of a field converted at a time: as many numbers as a line of the cache holds


def to_millimetres(displacement: np.ndarray, affine: np.ndarray) -> np.ndarray:
    """Turn a field (3, D, H, W) from voxels along the array axes into RAS millimetres."""
    return np.einsum("ij,jdhw->idhw", np.asarray(affine, dtype=np.float64)[:3, :3], displacement)


def to_voxels(displacement: np.ndarray, affine: np.ndarray) -> np.ndarray:
    """Turn a field (3, D, H, W) from RAS millimetres into voxels along the array axes."""
    return np.einsum("ij,jdhw->idhw", np.linalg.inv(np.asarray(affine, dtype=np.float64)[:3, :3]), displacement)


def onto_moving_grid(
    displacement: np.ndarray,
    fixed_affine: np.ndarray,
    moving_affine: np.ndarray,
    dtype: type | np.dtype = np.float32,
) -> np.ndarray:
    """Express a field for a moving image that lies on a grid of its own.

    A field takes a fixed point to a moving point in the same world; :func:`warp` counts in the moving image's voxels.
    Of ``v = onto_moving_grid(u, fixed, moving)``, ``warp(image, v)`` samples a moving image of any shape, spacing and
    orientation on the fixed grid, in one interpolation. With equal affines ``v`` is ``u``.

    Parameters
    ----------
    displacement
        (3, D, H, W) in voxels of the fixed grid.
    fixed_affine, moving_affine
        4x4 voxel-to-RAS matrices, mm.
    dtype
        Of the result.

    Returns
    -------
    numpy.ndarray
        (3, D, H, W) on the fixed grid, in voxels of the moving grid, relative to the fixed voxel's indices.
    """
    index = np.stack(np.meshgrid(*(np.arange(n, dtype=np.float64) for n in displacement.shape[1:]), indexing="ij"))
    matrix = np.linalg.inv(moving_affine) @ fixed_affine
    place = np.einsum("ij,jdhw->idhw", matrix[:3, :3], index + displacement) + matrix[:3, 3].reshape(3, 1, 1, 1)
    return (place - index).astype(dtype)


def transform_vectors(matrix: np.ndarray, vectors: np.ndarray, result: np.ndarray) -> None:
    """Put matrix @ vectors, (3, D, H, W) each, into ``result``; computed in float64, a few slices at a time."""
    for start in range(0, vectors.shape[1], SLICES):
        part = vectors[:, start : start + SLICES]
        for row, target in zip(matrix, result, strict=True):
            # most grids lie along the axes of the world: two of three products are with zero
            terms = [np.multiply(part[axis], row[axis], dtype=np.float64) for axis in range(3) if row[axis] != 0]
            target[start : start + SLICES] = sum(terms[1:], start=terms[0]).astype(np.float32)
