"""Cuts through a volume in anatomical planes, with sides named by the affine and not by the array's order."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

import numpy as np
from nibabel.orientations import apply_orientation, inv_ornt_aff, io_orientation
from scipy import ndimage

from dmir.errors import InputError, suggestion

MARGIN = 6.0  # mm left around the brain
AXES = {"sagittal": 0, "coronal": 1, "axial": 2}
SIDES = {"sagittal": ("P", "A"), "coronal": ("L", "R"), "axial": ("L", "R")}  # at the left and the right of the picture


@dataclass(frozen=True)
class Plane:
    """Where to cut, on a RAS grid.

    Attributes
    ----------
    name
        sagittal, coronal or axial.
    index
        Which slice along the plane's axis.
    window
        The part that is shown: (first, last + 1) along the horizontal and the vertical axis of the picture.
    spacing
        Millimetres a voxel along the horizontal and the vertical axis.
    position
        The cut in RAS millimetres along the plane's axis.
    """

    name: str
    index: int
    window: tuple[tuple[int, int], tuple[int, int]]
    spacing: tuple[float, float]
    position: float

    @property
    def axis(self) -> int:
        """The RAS axis that stands upright on the plane."""
        return AXES[self.name]

    @property
    def in_plane(self) -> tuple[int, int]:
        """The RAS axes that run to the right and upwards in the picture."""
        horizontal, vertical = (axis for axis in range(3) if axis != self.axis)
        return horizontal, vertical

    @property
    def size(self) -> tuple[float, float]:
        """Width and height of the picture in mm."""
        (left, right), (bottom, top) = self.window
        return (right - left) * self.spacing[0], (top - bottom) * self.spacing[1]

    @property
    def title(self) -> str:
        """The plane and its place, for instance ``coronal, y = -12 mm``."""
        return f"{self.name}, {'xyz'[self.axis]} = {self.position:.0f} mm".replace("-", "\N{MINUS SIGN}")

    def cut(self, volume: np.ndarray) -> np.ndarray:
        """Return the picture of a RAS volume (D, H, W): rows from bottom to top, for ``imshow(origin="lower")``."""
        (left, right), (bottom, top) = self.window
        picture: np.ndarray = np.take(volume, self.index, axis=self.axis)[left:right, bottom:top].T
        return picture


def scalar_to_ras(volume: np.ndarray, affine: np.ndarray) -> np.ndarray:
    """Flip and permute a volume (D, H, W) so that its axes run to the right, the front and the top."""
    ras: np.ndarray = apply_orientation(volume, io_orientation(affine))
    return ras


def field_to_ras(displacement: np.ndarray, affine: np.ndarray) -> np.ndarray:
    """Flip and permute a field (3, D, H, W) in voxels: its grid, and its components with it."""
    orientation = io_orientation(affine)
    ras = np.empty((3, *scalar_to_ras(displacement[0], affine).shape), dtype=displacement.dtype)
    for component, (axis, direction) in zip(displacement, orientation, strict=True):
        ras[int(axis)] = direction * scalar_to_ras(component, affine)
    return ras


def affine_to_ras(affine: np.ndarray, shape: tuple[int, ...]) -> np.ndarray:
    """Return the affine of what :func:`scalar_to_ras` returns for a volume of that shape."""
    ras: np.ndarray = affine @ inv_ornt_aff(io_orientation(affine), shape)
    return ras


def brain_of(image: np.ndarray) -> np.ndarray:
    """Return where a skull-stripped image shows brain: above zero, holes filled; the whole grid if nothing is zero."""
    filled: np.ndarray = ndimage.binary_fill_holes(image > 0)
    return filled


def window_of(mask: np.ndarray, spacing: np.ndarray, margin: float = MARGIN) -> tuple[slice, slice, slice]:
    """Return the smallest box around a mask with ``margin`` mm on every side, as far as there are voxels."""
    bounds = []
    for axis in range(3):
        inside = np.flatnonzero(mask.any(axis=tuple(other for other in range(3) if other != axis)))
        first, last = (int(inside[0]), int(inside[-1])) if len(inside) else (0, mask.shape[axis] - 1)
        pad = int(np.ceil(margin / spacing[axis]))
        bounds.append(slice(max(first - pad, 0), min(last + pad + 1, mask.shape[axis])))
    return bounds[0], bounds[1], bounds[2]


def choose_plane(
    name: str, brain: np.ndarray, affine: np.ndarray, index: Mapping[str, int] | None = None, margin: float = MARGIN
) -> Plane:
    """Choose a cut: through the brain's middle unless told otherwise, and no more of it than the brain needs.

    Parameters
    ----------
    name
        sagittal, coronal or axial.
    brain
        Mask (D, H, W) on a RAS grid.
    affine
        Its 4x4 voxel-to-RAS matrix, mm.
    index
        The RAS slice to cut by plane name.
    margin
        Millimetres left around the brain.

    Raises
    ------
    InputError
        There is no such plane or slice.
    """
    if name not in AXES:
        raise InputError("plane", found=f"'{name}'", expected="an anatomical plane", remedy=suggestion(name, AXES))
    axis = AXES[name]
    spacing = np.sqrt((affine[:3, :3] ** 2).sum(axis=0))
    bounds = [(part.start, part.stop) for part in window_of(brain, spacing, margin)]
    middle = round(float(ndimage.center_of_mass(brain)[axis])) if brain.any() else brain.shape[axis] // 2
    if name == "sagittal":
        # the very midline shows the fissure; a little beside it, ventricle, thalamus and brain stem
        middle = min(middle + round(8 / spacing[axis]), brain.shape[axis] - 1)
    chosen = (index or {}).get(name, middle)
    if not 0 <= chosen < brain.shape[axis]:
        raise InputError(f"index: {name}", found=str(chosen), expected=f"a slice from 0 to {brain.shape[axis] - 1}")
    horizontal, vertical = (other for other in range(3) if other != axis)
    centre = [(size - 1) / 2 for size in brain.shape]
    centre[axis] = chosen
    return Plane(
        name=name,
        index=int(chosen),
        window=(bounds[horizontal], bounds[vertical]),
        spacing=(float(spacing[horizontal]), float(spacing[vertical])),
        position=float((affine @ [*centre, 1.0])[axis]),
    )
