"""The conventions of displacement fields: in which coordinates a vector is, and whether it is a place or a step.

Every one is a frame, coordinates that an image's header defines (LPS mm, RAS mm, FSL's mm, AFNI's, voxels), in which
either the place in the moving image is stored or the step to it from the fixed voxel. Hence one formula reads them all:
with E and M the 4x4 matrices that take the frame of the fixed and of the moving image to RAS mm, and A the fixed grid's
affine, a voxel i with the vector d goes to ``M d`` (absolute) or to ``M (E^-1 A i + d)`` (relative).
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import nibabel as nib
import numpy as np

from dmir.errors import InputError
from dmir.fields import transform_vectors
from dmir.volumes import Grid, describe_grid

LPS = np.diag([-1.0, -1.0, 1.0, 1.0])
AFNI_IDENTITY = "1 0 0 0 0 1 0 0 0 0 1 0"


def _lps(grid: Grid) -> np.ndarray:
    return LPS


def _ras(grid: Grid) -> np.ndarray:
    return np.eye(4)


def _voxels(grid: Grid) -> np.ndarray:
    return np.asarray(grid.affine, dtype=np.float64)


def _fsl(grid: Grid) -> np.ndarray:
    """FSL's millimetres: along the voxel axes from the first voxel's centre, the first axis turned if det > 0."""
    from nitransforms.io.fsl import FSLLinearTransform

    # of the identity in FSL's coordinates, from this image to one whose FSL coordinates are RAS: -1 mm along x
    plain = nib.Nifti1Image(np.zeros((1, 1, 1), np.uint8), np.diag([-1.0, 1.0, 1.0, 1.0]))
    identity = FSLLinearTransform.from_string("1 0 0 0\n0 1 0 0\n0 0 1 0\n0 0 0 1")
    to_plain = identity.to_ras(moving=plain, reference=empty_image(grid))
    return np.linalg.inv(to_plain) @ plain.affine


def _afni(grid: Grid) -> np.ndarray:
    """AFNI's coordinates: LPS mm of the grid as it lies when its obliqueness is left out."""
    from nitransforms.io.afni import AFNILinearTransform

    try:
        return AFNILinearTransform.from_string(AFNI_IDENTITY).to_ras(moving=empty_image(grid)) @ LPS
    except np.linalg.LinAlgError:
        raise InputError(
            "afni",
            found=f"a grid so oblique that two of its axes lie nearest to one of the world's: {describe_grid(grid)}",
            expected="one of which each axis is nearest to another of the world's: AFNI leaves obliqueness out",
            remedy="Resample the image onto a grid that is less oblique.",
        ) from None


@dataclass(frozen=True)
class Convention:
    """How a program stores a displacement field.

    Attributes
    ----------
    name
        As it is given to ``--from`` and ``--to``.
    title
        What it is and whose.
    frame
        From a grid to the 4x4 matrix that takes its vectors' coordinates to RAS mm.
    absolute
        Whether vectors are places in the moving image; else steps from the fixed voxel.
    of_images
        Whether the frame depends on the image, so that the moving image's grid must be known.
    """

    name: str
    title: str
    frame: Callable[[Grid], np.ndarray]
    absolute: bool = False
    of_images: bool = False


CONVENTIONS = {
    one.name: one
    for one in (
        Convention("itk", "steps in LPS mm (ITK, ANTs, greedy, elastix, FireANTs, Slicer, dmir)", _lps),
        Convention("lps-absolute", "places in LPS mm", _lps, absolute=True),
        Convention("ras", "steps in RAS mm (NiftyReg's displacement, FreeSurfer's disp-ras)", _ras),
        Convention("spm", "places in RAS mm (SPM's y_, NiftyReg's deformation, MRtrix, abs-ras)", _ras, absolute=True),
        Convention("fsl", "steps in FSL's scaled mm (FNIRT, convertwarp --relout)", _fsl, of_images=True),
        Convention(
            "fsl-absolute", "places in FSL's scaled mm (convertwarp --absout)", _fsl, absolute=True, of_images=True
        ),
        Convention("afni", "steps in LPS mm without obliqueness (3dQwarp)", _afni, of_images=True),
        Convention("voxels", "steps in voxels (VoxelMorph, ConvexAdam, disp-crs)", _voxels, of_images=True),
        Convention(
            "voxels-absolute", "places in voxels (FreeSurfer's abs-crs)", _voxels, absolute=True, of_images=True
        ),
        Convention("learn2reg", "steps in voxels at half resolution (Learn2Reg's .npz)", _voxels, of_images=True),
        Convention("npz", "dmir's .npz: displacement (3, D, H, W) in voxels, affine 4x4", _voxels),
    )
}
"""Every convention of a field by its name."""


def empty_image(grid: Grid) -> Any:
    """Return an image of nibabel's on a grid, whose voxels take no memory."""
    return nib.Nifti1Image(np.broadcast_to(np.uint8(0), grid.shape), np.asarray(grid.affine, dtype=np.float64))


def decoded(vectors: np.ndarray, convention: Convention, fixed: Grid, moving: Grid) -> np.ndarray:
    """Turn vectors (3, D, H, W) on the fixed grid from a convention into voxels of the fixed grid, float32."""
    return _mapped(vectors, *map_of(convention, fixed, moving))


def encoded(displacement: np.ndarray, convention: Convention, fixed: Grid, moving: Grid) -> np.ndarray:
    """Turn a field (3, D, H, W), voxels of the fixed grid, into a convention's vectors; undoes :func:`decoded`."""
    linear, slope, shift = map_of(convention, fixed, moving)
    inverse = np.linalg.inv(linear)
    return _mapped(displacement, inverse, -inverse @ slope, -inverse @ shift)


def map_of(convention: Convention, fixed: Grid, moving: Grid) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Return P, Q and q of ``u(i) = P d(i) + Q i + q``: a field in voxels, of a convention's vectors."""
    to_fixed = np.linalg.inv(fixed.affine)
    there = to_fixed @ convention.frame(moving)
    if convention.absolute:
        return there[:3, :3], -np.eye(3), there[:3, 3]
    if moving is fixed or not convention.of_images:
        return there[:3, :3], np.zeros((3, 3)), np.zeros(3)
    both = there @ np.linalg.inv(convention.frame(fixed)) @ fixed.affine
    return there[:3, :3], both[:3, :3] - np.eye(3), both[:3, 3]


def _mapped(vectors: np.ndarray, linear: np.ndarray, slope: np.ndarray, shift: np.ndarray) -> np.ndarray:
    """Return ``linear d(i) + slope i + shift``, float32 (3, D, H, W); computed in float64, a slice at a time."""
    result = np.empty(vectors.shape, dtype=np.float32)
    if not slope.any() and not shift.any():
        transform_vectors(linear, vectors, result)
        return result
    height, width = vectors.shape[2:]
    rest = np.stack(np.meshgrid(np.arange(height), np.arange(width), indexing="ij")).astype(np.float64)
    across = np.einsum("ij,jhw->ihw", slope[:, 1:], rest) + shift.reshape(3, 1, 1)
    for plane in range(vectors.shape[1]):
        mapped = np.einsum("ij,jhw->ihw", linear, vectors[:, plane].astype(np.float64))
        result[:, plane] = mapped + across + slope[:, :1, None] * plane
    return result


def is_oblique(grid: Grid) -> bool:
    """Tell whether AFNI's coordinates of a grid differ from the world's."""
    return not np.allclose(_afni(grid), LPS, atol=1e-6)
