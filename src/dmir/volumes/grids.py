"""Volumes and the grids that they lie on: compared, described, turned."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import nibabel as nib
import numpy as np
from nibabel.orientations import aff2axcodes, axcodes2ornt, inv_ornt_aff, io_orientation, ornt_transform

from dmir.errors import InputError


@dataclass(frozen=True)
class Grid:
    """Where the voxels are: shape (D, H, W) and the 4x4 affine from voxel indices to RAS millimetres."""

    shape: tuple[int, int, int]
    affine: np.ndarray

    @property
    def spacing(self) -> np.ndarray:
        """Voxel size along each array axis in mm, shape (3,)."""
        return np.sqrt((np.asarray(self.affine)[:3, :3] ** 2).sum(axis=0))


@dataclass(frozen=True)
class Volume:
    """An image, label map or mask: data (D, H, W) and its 4x4 voxel-to-RAS affine in mm."""

    data: np.ndarray
    affine: np.ndarray

    @property
    def shape(self) -> tuple[int, int, int]:
        depth, height, width = self.data.shape
        return depth, height, width

    @property
    def grid(self) -> Grid:
        return Grid(self.shape, self.affine)

    @property
    def spacing(self) -> np.ndarray:
        """Voxel size along each array axis in mm, shape (3,)."""
        return self.grid.spacing

    @property
    def orientation(self) -> str:
        """Axis codes of the array axes, for instance ``"RAS"`` or ``"LIA"``."""
        return "".join(aff2axcodes(self.affine))


def reorient(volume: Volume, orientation: str = "RAS") -> Volume:
    """Flip and permute axes so that they run as asked; exact, no interpolation."""
    transform = ornt_transform(io_orientation(volume.affine), axcodes2ornt(tuple(orientation)))
    data = nib.orientations.apply_orientation(volume.data, transform)
    affine = volume.affine @ inv_ornt_aff(transform, volume.data.shape)
    return Volume(np.ascontiguousarray(data), affine)


def with_orientation(volume: Volume, orientation: str) -> Volume:
    """State anew where the array axes point, for a file whose header is wrong; data, spacing and centre stay.

    Parameters
    ----------
    orientation
        Axis codes of the array as it is stored, for instance ``"LPS"``.

    Raises
    ------
    InputError
        The codes do not name three different axes.
    """
    axes = {code: axis for axis, pair in enumerate(("RL", "AP", "SI")) for code in pair}
    if len(orientation) != 3 or {axes.get(code) for code in orientation} != {0, 1, 2}:
        raise InputError("orientation", found=f"'{orientation}'", expected="three axis codes, for instance 'LPS'")
    affine = np.eye(4)
    affine[:3, :3] = 0
    for column, (code, step) in enumerate(zip(orientation, volume.spacing, strict=True)):
        affine[axes[code], column] = step if code in "RAS" else -step
    middle = (np.array(volume.shape) - 1) / 2
    centre = volume.affine[:3, :3] @ middle + volume.affine[:3, 3]
    affine[:3, 3] = centre - affine[:3, :3] @ middle
    return Volume(volume.data, affine)


def before_planes(grid: Grid, planes: Sequence[np.ndarray | Sequence[float]]) -> np.ndarray | None:
    """Return where a grid lies on this side of all planes, bool (D, H, W), None where there are none.

    A plane is four numbers p: p . (x, y, z, 1) > 0, in RAS mm, is beyond it (by more than a thousandth of its scale).
    """
    if not len(planes):
        return None
    before = np.ones(grid.shape, dtype=bool)
    for plane in planes:
        numbers = np.asarray(plane) @ grid.affine
        along = [numbers[axis] * np.arange(n) for axis, n in enumerate(grid.shape)]
        before &= along[0][:, None, None] + along[1][:, None] + along[2] + numbers[3] <= 1e-3
    return before


def same_grid(a: Volume | Grid, b: Volume | Grid, tolerance: float = 1e-3) -> bool:
    """Tell whether two volumes have equal shapes and affines (mm, within the tolerance at the far corner)."""
    if tuple(a.shape) != tuple(b.shape):
        return False
    corner = np.array([*(n - 1 for n in a.shape), 1.0])
    difference = np.asarray(a.affine) - np.asarray(b.affine)
    return bool(np.abs(difference @ corner).max() <= tolerance and np.abs(difference[:3, 3]).max() <= tolerance)


def require_same_grid(a: Volume | Grid, b: Volume | Grid, path_a: str | Path, path_b: str | Path) -> None:
    """Refuse with InputError two volumes that should lie on one grid and do not (0.01 mm is forgiven)."""
    if same_grid(a, b, tolerance=1e-2):
        return
    raise InputError(
        path_b,
        found=f"a grid of {describe_grid(b)}",
        expected=f"the grid of {path_a}: {describe_grid(a)}",
        remedy="Resample it onto that image's grid (labels with nearest neighbours).",
    )


def describe_grid(volume: Volume | Grid) -> str:
    """Return shape, spacing, orientation and origin in one readable line."""
    spacing = "x".join(f"{s:.3g}" for s in volume.spacing)
    origin = ", ".join(f"{o:.1f}" for o in np.asarray(volume.affine)[:3, 3])
    axes = "".join(aff2axcodes(np.asarray(volume.affine)))
    return f"{'x'.join(map(str, volume.shape))} voxels of {spacing} mm, axes {axes}, origin ({origin})"
