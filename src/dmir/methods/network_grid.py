"""The grid on which a network registers two scans that come on grids of their own, and the way back from it."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import numpy as np
import torch

from dmir.fields import onto_moving_grid, to_millimetres, to_voxels, warp
from dmir.volumes import Grid, Volume, same_grid


def network_grid(trained: Mapping[str, Any], brain: Volume) -> Grid:
    """Return the grid with a network's own axes and voxels whose middle is the middle of the fixed brain.

    It has the shape of the training, more along an axis where the brain would not fit: every network takes any shape.
    A fixed scan on the very grid of the training stays there; one with the same axes and voxels is copied, not blurred.

    Parameters
    ----------
    trained
        ``metadata["grid"]`` of a weights file: ``shape`` and ``affine``.
    brain
        Mask of the fixed brain, bool.
    """
    own = Grid(tuple(trained["shape"]), np.asarray(trained["affine"], dtype=np.float64))
    if same_grid(own, brain):
        return own
    # the brain's box, in voxels along the network's axes
    to_axes = np.linalg.inv(own.affine[:3, :3])
    steps = to_axes @ brain.affine[:3, :3]
    places = np.argwhere(brain.data) @ steps.T + to_axes @ brain.affine[:3, 3]
    half = np.abs(steps).sum(axis=1) / 2
    low, high = places.min(axis=0) - half, places.max(axis=0) + half
    least = np.ceil(high - low).astype(int) + 1  # one more: the grid may be shifted by half a voxel
    depth, height, width = (int(n) for n in np.maximum(own.shape, least))
    affine = own.affine.copy()
    affine[:3, 3] = affine[:3, :3] @ ((low + high) / 2 - (np.array([depth, height, width]) - 1) / 2)
    if np.allclose(brain.affine[:3, :3], affine[:3, :3], atol=1e-4):
        first = np.round(np.linalg.inv(brain.affine) @ affine[:, 3])
        affine[:, 3] = brain.affine @ first
    return Grid((depth, height, width), affine)


def field_on_grid(displacement: np.ndarray, affine: np.ndarray, grid: Grid) -> np.ndarray:
    """Resample a field onto another grid of the same world, linearly.

    Beyond its own grid it goes on as it is at the border, as a shift: nothing jumps there and nothing folds, and what
    lies there is background, because the field's grid holds the brain. Fading to zero would squeeze it instead.

    Parameters
    ----------
    displacement, affine
        (3, d, h, w) in voxels, and the 4x4 voxel-to-RAS matrix of their grid.
    grid
        Where the field is wanted; its matrix may shear.

    Returns
    -------
    numpy.ndarray
        float32 (3, D, H, W) in voxels of ``grid``.
    """
    depth, height, width = displacement.shape[1:]
    if same_grid(Grid((depth, height, width), affine), grid):
        return displacement
    millimetres = torch.from_numpy(to_millimetres(displacement, affine).astype(np.float32))[None]
    there = onto_moving_grid(np.zeros((3, *grid.shape), dtype=np.float32), grid.affine, affine)
    moved = warp(millimetres, torch.from_numpy(there)[None], padding="border")[0].numpy()
    return to_voxels(moved, grid.affine).astype(np.float32)
