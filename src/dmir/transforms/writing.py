"""Fields out, in any convention."""

from __future__ import annotations

from pathlib import Path

import nibabel as nib
import numpy as np
from scipy.ndimage import zoom

from dmir.errors import InputError
from dmir.fields import save_field
from dmir.transforms.conventions import CONVENTIONS, encoded
from dmir.transforms.proof import AFNI, DISPVECT, FNIRT_FIELD, MARK, VECTOR
from dmir.transforms.transform import Field
from dmir.volumes import Grid, atomic_path, save_nifti

FOUR_AXES = ("fsl", "fsl-absolute", "voxels", "voxels-absolute")  # conventions whose programs want (D, H, W, 3)
# voxels have none: readers that know an intent take its vectors for millimetres
INTENTS = {
    **dict.fromkeys(("fsl", "fsl-absolute"), FNIRT_FIELD),
    "ras": DISPVECT,
    **dict.fromkeys(("voxels", "voxels-absolute"), 0),
}
# as AFNI keeps attributes in a NIfTI file; by it the frame of an oblique grid's vectors is known again
ATTRIBUTES = (
    b'<?xml version="1.0" ?>\n<AFNI_attributes ni_form="ni_group">\n'
    b'<AFNI_atr ni_type="String" ni_dimen="1" atr_name="HISTORY_NOTE">\n"dmir field convert"\n</AFNI_atr>\n'
    b"</AFNI_attributes>\n"
)


def write(
    path: str | Path, field: Field, convention: str = "itk", moving: Grid | None = None, remark: str = ""
) -> None:
    """Write a field.

    Parameters
    ----------
    path
        ``.nii`` or ``.nii.gz``; ``.npz`` for ``npz`` and ``learn2reg``. Written beside and renamed.
    field
        On the fixed grid.
    convention
        A name of :data:`CONVENTIONS`. ``learn2reg`` halves the resolution and keeps float16: what is read back differs.
    moving
        The moving image's grid, where the convention counts in its coordinates (``of_images``).
    remark
        As for :func:`dmir.fields.save_field`.

    Raises
    ------
    InputError
        The suffix or the shape does not fit the convention, or the moving grid is missing.
    """
    path = Path(path)
    arrays = convention in ("npz", "learn2reg")
    suffixes = (".npz",) if arrays else (".nii", ".nii.gz")
    if not path.name.lower().endswith(suffixes):
        raise InputError(path, found=f"this suffix for {convention}", expected=" or ".join(suffixes))
    kind = CONVENTIONS[convention]
    if kind.of_images and moving is None:
        raise InputError(
            f"--to {convention}",
            found="no moving image",
            expected="the moving image, in whose coordinates this convention counts",
            remedy="Name it: --moving IMAGE; where it lies on the fixed image's grid, the fixed image will do.",
        )
    if convention == "itk":
        save_field(path, field.displacement, field.affine, remark)
        return
    vectors = encoded(field.displacement, kind, field.grid, field.grid if moving is None else moving)
    if arrays:
        _write_arrays(path, field, vectors, convention)
        return
    stored = np.moveaxis(vectors, 0, -1)
    image = nib.Nifti1Image(stored if convention in FOUR_AXES else stored[..., None, :], np.asarray(field.affine))
    image.header["intent_code"] = INTENTS.get(convention, VECTOR)
    if convention == "afni":
        image.header.extensions.append(nib.nifti1.Nifti1Extension(AFNI, ATTRIBUTES))
    image.header["descrip"] = f"{MARK}{convention}{'; ' if remark else ''}{remark}".encode("ascii", "replace")
    image.header.set_xyzt_units("mm")
    with atomic_path(path) as temporary:
        save_nifti(temporary, image)


def _write_arrays(path: Path, field: Field, vectors: np.ndarray, convention: str) -> None:
    if convention == "npz":
        arrays = {"displacement": field.displacement, "affine": np.asarray(field.affine, dtype=np.float64)}
    else:
        if any(n % 2 for n in vectors.shape[1:]):
            raise InputError(
                path,
                found=f"a field of {'x'.join(map(str, vectors.shape[1:]))} voxels",
                expected="even numbers: the evaluation of Learn2Reg doubles the shape that it reads",
            )
        if np.abs(vectors).max() > np.finfo(np.float16).max:
            raise InputError(path, found="displacements beyond float16", expected="at most 65504 voxels")
        arrays = {"arr_0": np.stack([zoom(one, 0.5, order=2) for one in vectors]).astype(np.float16)}
    with atomic_path(path) as temporary, temporary.open("wb") as file:
        np.savez_compressed(file, **arrays)  # type: ignore[arg-type]
