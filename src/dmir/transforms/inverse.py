"""The way back: the inverse of a field on another image's grid, and of points; with how far it is from one."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from dmir.fields import onto_moving_grid
from dmir.transforms.transform import Affine, Field, Transform, in_grid, through
from dmir.volumes import Grid

SAMPLES = 60  # along each axis of a field, at most, of which the one that lands nearest a point is its first guess


@dataclass(frozen=True)
class Inverse:
    """The inverse of a field.

    Attributes
    ----------
    field
        On the moving image's grid: from the moving world to the fixed world.
    residual
        (D, H, W) on that grid: how far there and back ends from the start, in voxels of the inverted field's grid.
    inside
        bool (D, H, W): which voxels come from within the inverted field's grid; of the others it says nothing, and
        its displacement at the border was taken.
    """

    field: Field
    residual: np.ndarray
    inside: np.ndarray

    @property
    def worst(self) -> float:
        """The largest residual of what comes from within the field's grid, voxels."""
        return float(self.residual[self.inside].max(initial=0.0))


def inverse_of(field: Field, grid: Grid | None = None) -> Inverse:
    """Invert a field.

    The field is taken apart into the affine that fits it best and what is left; that is inverted on its own grid, and
    every voxel of the moving grid goes on from there until there and back ends at the start.

    Parameters
    ----------
    field
        From the fixed to the moving world.
    grid
        On which the inverse is to lie, the moving image's; the field's own by default.
    """
    import torch  # who only reads a transform does not wait for it

    from dmir.fields import inverse_at, invert

    grid = field.grid if grid is None else grid
    affine = best_affine(field)
    rest = onto_moving_grid(field.displacement, np.linalg.inv(affine) @ field.affine, field.affine)
    back = Field(invert(torch.from_numpy(rest)[None], tell=False)[0].numpy(), field.affine)
    guess = np.zeros((3, *grid.shape), np.float32)
    for step in (Affine(np.linalg.inv(affine)), back):
        guess, _ = through(step, guess, grid.affine)
    # in voxels of the field's grid: where each moving voxel lies, and from where it is guessed to come
    zero = np.zeros((3, *grid.shape), np.float32)
    index = np.stack(np.meshgrid(*(np.arange(n, dtype=np.float32) for n in grid.shape), indexing="ij"))
    place = index + onto_moving_grid(zero, grid.affine, field.affine)
    start = index + onto_moving_grid(guess, grid.affine, field.affine)
    places, starts = (torch.from_numpy(one.reshape(3, -1)) for one in (place, start - place))
    found, left = inverse_at(torch.from_numpy(field.displacement), places, starts)
    source = place + found.numpy().reshape(3, *grid.shape)
    return Inverse(
        Field(onto_moving_grid(source - index, field.affine, grid.affine), np.asarray(grid.affine)),
        left.numpy().reshape(grid.shape),
        in_grid(source, field.grid),
    )


def best_affine(field: Field) -> np.ndarray:
    """Return the 4x4 matrix, RAS mm, that is nearest to a field in the least squares of its voxels."""
    step = tuple(slice(None, None, max(1, n // 16)) for n in field.grid.shape)
    index = np.stack(np.meshgrid(*(np.arange(n) for n in field.grid.shape), indexing="ij"))[(slice(None), *step)]
    start = index.reshape(3, -1).astype(np.float64)
    end = start + field.displacement[(slice(None), *step)].reshape(3, -1)
    affine, matrix = np.asarray(field.affine, dtype=np.float64), np.eye(4)
    design = np.vstack([start, np.ones(start.shape[1])]).T
    matrix[:3] = np.linalg.lstsq(design, end.T, rcond=None)[0].T
    if abs(np.linalg.det(matrix[:3, :3])) < 1e-3:
        return np.eye(4)  # whatever this is, its inverse will tell
    return affine @ matrix @ np.linalg.inv(affine)


def inverse_points(transform: Transform, points: np.ndarray) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Take points of the moving world to the fixed world: the way of a landmark with its image.

    An image is pulled back, so that its points move with the inverse.

    Parameters
    ----------
    points
        (n, 3) in RAS mm.

    Returns
    -------
    points, residual, inside
        (n, 3) in RAS mm; (n,), how far each ends from where it came when it is taken back, mm; bool (n,), which ones
        come from within the grids of all fields.
    """
    found, inside = np.asarray(points, dtype=np.float64).reshape(-1, 3), np.ones(len(points), bool)
    for step in reversed(transform.steps):
        if isinstance(step, Affine):
            back = np.linalg.inv(step.matrix)
            found = found @ back[:3, :3].T + back[:3, 3]
        else:
            found, within = _points_through(step, found)
            inside &= within
    return found, np.linalg.norm(transform.at(found) - points, axis=1), inside


def _points_through(field: Field, points: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    import torch
    from scipy.spatial import cKDTree

    from dmir.fields import inverse_at

    back = np.linalg.inv(field.affine)
    place = (points @ back[:3, :3].T + back[:3, 3]).T
    every = tuple(slice(None, None, -(-n // SAMPLES)) for n in field.grid.shape)
    index = np.stack(np.meshgrid(*(np.arange(n) for n in field.grid.shape), indexing="ij"))[(slice(None), *every)]
    ends = index + field.displacement[(slice(None), *every)]
    nearest = cKDTree(ends.reshape(3, -1).T).query(place.T)[1]
    start = index.reshape(3, -1)[:, nearest]
    u = torch.from_numpy(field.displacement).double()
    found, _ = inverse_at(u, torch.from_numpy(place), torch.from_numpy(start - place), tolerance=1e-6)
    source = place + found.numpy()
    inside = in_grid(source, field.grid)
    return source.T @ field.affine[:3, :3].T + field.affine[:3, 3], inside
