"""Transforms in: one function, whatever the file is."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import numpy as np

from dmir.errors import InputError, suggestion
from dmir.transforms import proof
from dmir.transforms.arrays import read_arrays
from dmir.transforms.conventions import CONVENTIONS
from dmir.transforms.itk import read_itk
from dmir.transforms.linear import AFFINES, read_afni, read_lta, read_matrix
from dmir.transforms.transform import Transform
from dmir.transforms.vectors import from_vectors
from dmir.volumes import Grid, Volume, stored_array

Image = str | Path | Grid | Volume
READERS: dict[str, Callable[..., Transform]] = {
    ".lta": read_lta,
    ".1d": read_afni,
    **dict.fromkeys((".npy", ".npz"), read_arrays),
    **dict.fromkeys((".tfm", ".h5", ".hdf5", ".hdf", ".nrrd", ".nhdr", ".mha", ".mhd"), read_itk),
    **dict.fromkeys((".mat", ".txt", ".xfm"), read_matrix),
}


def read(
    path: str | Path, convention: str | None = None, fixed: Image | None = None, moving: Image | None = None
) -> Transform:
    """Read an affine or a displacement field.

    Parameters
    ----------
    path
        A displacement field: NIfTI or MGH; NRRD or MetaImage as ITK writes it; ``.npz`` or ``.npy``. A linear
        transform: ITK's ``.mat``, ``.txt``, ``.tfm``; FSL's or a plain 4x4 matrix as text; FreeSurfer's ``.lta``;
        AFNI's ``.aff12.1D``. ITK's ``.h5``, which can hold both.
    convention
        A name of :data:`CONVENTIONS`, or for a matrix ``itk``, ``fsl``, ``ras`` or ``afni``; needed where header and
        values do not prove what it is.
    fixed, moving
        The images (a file, a volume or a grid) between which it maps; needed where numbers count in an image's own
        coordinates, and for a field in a file that has no place in the world.

    Returns
    -------
    Transform
        From the fixed world to the moving world, RAS mm; :meth:`Transform.on` makes one field of it.

    Raises
    ------
    InputError
        The file is missing, damaged or not finite; what it is, or where, is not known.
    """
    path = Path(path)
    known = sorted({*CONVENTIONS, *AFFINES})
    if convention is not None and convention not in known:
        raise InputError(
            f"--from {convention}",
            found="no convention of this name",
            expected=", ".join(known),
            remedy=suggestion(convention, known),
        )
    if not path.is_file():
        raise InputError(path, found="no such file", expected="a transform: an affine or a displacement field")
    grids = [None if image is None else grid_of(image, name) for name, image in (("fixed", fixed), ("moving", moving))]
    if path.suffix.lower() == ".m3z":
        raise InputError(
            path,
            found="FreeSurfer's own morph",
            expected="a displacement field",
            remedy="Convert it: mri_warp_convert --inm3z FILE --outitk FIELD.nii.gz",
        )
    return READERS.get(path.suffix.lower(), _read_image)(path, convention, *grids)


def grid_of(image: Image, name: str) -> Grid:
    """Return the grid of an image: a file (of which the header is read), a volume or a grid."""
    if isinstance(image, Grid):
        return image
    if isinstance(image, Volume):
        return image.grid
    with stored_array(Path(image), name) as stored:
        shape = stored.shape
        if len(shape) < 3 or min(shape[:3]) < 1:
            raise InputError(f"{name}: {image}", found=f"an array of shape {shape}", expected="a volume")
        depth, height, width = shape[:3]
        return Grid((depth, height, width), stored.affine)


def _read_image(path: Path, convention: str | None, fixed: Grid | None, moving: Grid | None) -> Transform:
    """Read a field that is a vector image: NIfTI or MGH."""
    with stored_array(path, "displacement field") as stored:
        claims, affine, shape = proof.Claims.of(stored), stored.affine, stored.shape
        axis = _vector_axis(path, shape)
        names, said = proof.candidates(claims, path, fifth=len(shape) == 5)
        vectors, unit = np.moveaxis(stored.read(), axis, 0), stored.unit
    vectors = vectors[..., 0] if len(shape) == 5 else vectors
    depth, height, width = vectors.shape[1:]
    own = Grid((depth, height, width), affine)
    if moving is None and claims.freesurfer is not None:
        moving = claims.freesurfer[1]
    return from_vectors(path, vectors, own, convention, names, said, fixed, moving, unit)


def _vector_axis(path: Path, shape: tuple[int, ...]) -> int:
    """Return the axis along which a vector's components lie."""
    if len(shape) == 5 and shape[3:] == (1, 3):
        return 4
    if len(shape) == 4 and (shape[3] == 3) != (shape[0] == 3):
        return 3 if shape[3] == 3 else 0
    known = {2: "a matrix", 3: "an image, no field", 4: "several volumes"}.get(len(shape), "an array")
    if len(shape) == 5 and shape[3:] == (3, 2):
        known = "DIPY's field there and back in one"
    raise InputError(
        path,
        found=f"{known}: an array of shape {shape}",
        expected="(D, H, W, 1, 3), a vector field as ITK and ANTs write it, or (D, H, W, 3)",
        remedy="Save one field, three components a voxel.",
    )
