"""What a transform is: affines and fields, one after the other, from the fixed image's world to the moving image's."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from dmir.doubts import doubt
from dmir.errors import InputError
from dmir.fields import onto_moving_grid
from dmir.volumes import Grid, same_grid


@dataclass(frozen=True)
class Affine:
    """A linear map: 4x4 ``matrix``, from the fixed world to the moving world, RAS mm (a pull-back)."""

    matrix: np.ndarray


@dataclass(frozen=True)
class Field:
    """A displacement field: float32 (3, D, H, W) in voxels of its own grid, and that grid's 4x4 voxel-to-RAS affine.

    It takes the place of voxel i to ``affine (i + displacement(i))``, as everywhere in :mod:`dmir.fields`.
    """

    displacement: np.ndarray
    affine: np.ndarray

    @property
    def grid(self) -> Grid:
        depth, height, width = self.displacement.shape[1:]
        return Grid((depth, height, width), self.affine)


@dataclass(frozen=True)
class Transform:
    """A map from the fixed world to the moving world, RAS mm.

    Attributes
    ----------
    steps
        In the order in which a point of the fixed image goes through them.
    convention
        Name of the convention that it was read in, see :data:`dmir.transforms.CONVENTIONS`.
    known_by
        How one knows that.
    assumed
        What was taken for granted, a line each.
    """

    steps: tuple[Affine | Field, ...]
    convention: str = ""
    known_by: str = ""
    assumed: tuple[str, ...] = ()

    @property
    def grid(self) -> Grid | None:
        """The grid of the first field; None where there are affines alone."""
        return next((step.grid for step in self.steps if isinstance(step, Field)), None)

    def on(self, grid: Grid | None = None) -> Field:
        """Return all steps as one displacement field.

        Beyond the border of a field its displacement is taken as at the border; how many voxels that concerns is
        told (:mod:`dmir.doubts`).

        Parameters
        ----------
        grid
            Of the fixed image; the first step's own, if that is a field, by default.

        Raises
        ------
        InputError
            No grid is known.
        """
        first = self.steps[0] if self.steps else None
        if isinstance(first, Field) and (grid is None or same_grid(first.grid, grid)):
            displacement, grid, rest = first.displacement, first.grid, self.steps[1:]
        elif grid is not None:
            displacement, rest = np.zeros((3, *grid.shape), np.float32), self.steps
        else:
            raise InputError(
                "transform",
                found="an affine at its beginning and no image",
                expected="the fixed image, on whose grid a field is to lie",
                remedy="Name it (fixed=, --fixed).",
            )
        beyond = 0
        for step in rest:
            displacement, left = through(step, displacement, grid.affine)
            beyond = max(beyond, left)
        if beyond:
            found = f"{beyond:,} of {displacement[0].size:,} voxels land beyond the grid of a field"
            doubt("composition", found=found, done="its displacement at the border was taken there")
        return Field(displacement, np.asarray(grid.affine, dtype=np.float64))

    def at(self, points: np.ndarray) -> np.ndarray:
        """Return where points (n, 3) of the fixed world, RAS mm, lie in the moving world."""
        column = np.asarray(points, dtype=np.float64).reshape(-1, 3).T
        grid = np.eye(4)
        # voxels of a line of points, on a grid of which voxel 0 is the world's origin: displacement = place - index
        displacement = column.reshape(3, 1, 1, -1) - _line(column.shape[1])
        for step in self.steps:
            displacement, _ = through(step, displacement, grid, dtype=np.float64)
        return (displacement + _line(column.shape[1])).reshape(3, -1).T

    def within(self, points: np.ndarray) -> np.ndarray:
        """Tell which points (n, 3) of the fixed world, RAS mm, stay within the grids of all fields, bool (n,)."""
        inside = np.ones(len(points), dtype=bool)
        for step in self.steps:
            if isinstance(step, Field):
                back = np.linalg.inv(step.affine)
                inside &= in_grid((points @ back[:3, :3].T + back[:3, 3]).T, step.grid)
            points = Transform((step,)).at(points)
        return inside


def in_grid(place: np.ndarray, grid: Grid) -> np.ndarray:
    """Tell which places (3, ...) in voxels lie within a grid, whose voxels reach half a voxel from their centre."""
    size = np.reshape(grid.shape, (3, *[1] * (place.ndim - 1)))
    return np.asarray(((place >= -0.5) & (place <= size - 0.5)).all(axis=0))


def _line(length: int) -> np.ndarray:
    """Return the indices of a line of voxels, (3, 1, 1, length)."""
    index = np.zeros((3, 1, 1, length))
    index[2, 0, 0] = np.arange(length)
    return index


def through(
    step: Affine | Field, displacement: np.ndarray, affine: np.ndarray, dtype: type[np.floating] = np.float32
) -> tuple[np.ndarray, int]:
    """Return a field on a grid with one more step behind it, and how many voxels land beyond that step's own grid."""
    if isinstance(step, Affine):
        return onto_moving_grid(displacement, step.matrix @ affine, affine, dtype=dtype), 0
    import torch  # one field read from a file needs no warp, and so not torch

    from dmir.fields import warp

    there = onto_moving_grid(displacement, affine, step.affine, dtype=dtype)
    own = np.ascontiguousarray(step.displacement, dtype=dtype)
    moved = there + warp(torch.from_numpy(own)[None], torch.from_numpy(there)[None], padding="border")[0].numpy()
    index = np.stack(np.meshgrid(*(np.arange(n, dtype=dtype) for n in there.shape[1:]), indexing="ij"))
    beyond = int((~in_grid(there + index, step.grid)).sum())
    return onto_moving_grid(moved, step.affine, affine, dtype=dtype), beyond


def compose(transforms: Sequence[Transform]) -> Transform:
    """Return all transforms as one, the first of them nearest to the fixed image.

    A point of the fixed image goes through the first, then the second, ...; it is the order in which
    antsApplyTransforms takes them (``-t warp -t affine`` is ``compose([warp, affine])``).
    """
    return Transform(
        steps=tuple(step for one in transforms for step in one.steps),
        convention="composed",
        known_by=", ".join(dict.fromkeys(one.convention for one in transforms)),
        assumed=tuple(dict.fromkeys(line for one in transforms for line in one.assumed)),
    )
