"""Fields in files, as ITK and ANTs write them."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING

import nibabel as nib
import numpy as np

from dmir.errors import InputError
from dmir.fields.coordinates import transform_vectors
from dmir.volumes import atomic_path, save_nifti

if TYPE_CHECKING:
    import torch

LPS = np.array([-1.0, -1.0, 1.0]).reshape(3, 1, 1, 1)  # RAS <-> LPS, its own inverse
MARK = "dmir: itk"  # the description in a field's header: LPS millimetres, and steps


def pair_field(folder: str | Path, moving: str, fixed: str) -> Path:
    """Return the file of a pair's field, ``<folder>/<moving>__<fixed>.nii``.

    It is not compressed: the lowest bits of a displacement are noise, so that gzip saves little and takes ten times
    as long. A compressed one that is there already, and no plain one, is found as well.
    """
    plain = Path(folder, f"{moving}__{fixed}.nii")
    compressed = plain.with_name(plain.name + ".gz")
    return compressed if compressed.is_file() and not plain.is_file() else plain


def save_field(path: str | Path, displacement: torch.Tensor | np.ndarray, affine: np.ndarray, remark: str = "") -> None:
    """Write a field as ITK and ANTs do: (D, H, W, 1, 3), intent vector, LPS millimetres, float32.

    Parameters
    ----------
    path
        ``.nii`` or ``.nii.gz``; written beside and renamed.
    displacement
        (3, D, H, W) in voxels.
    affine
        4x4 voxel-to-RAS matrix of the fixed grid, mm.
    remark
        What whoever reads the file should know, for the header's description (68 letters).
    """
    if not isinstance(displacement, np.ndarray):
        displacement = displacement.detach().cpu().numpy()
    if displacement.ndim != 4 or displacement.shape[0] != 3:
        raise ValueError(f"a field has shape (3, D, H, W), not {displacement.shape}")
    matrix = LPS.reshape(3, 1) * np.asarray(affine, dtype=np.float64)[:3, :3]
    # a file has its first axis fastest: written through the transpose, so that nothing is reordered a second time
    stored = np.empty((3, *displacement.shape[:0:-1]), dtype=np.float32)
    transform_vectors(matrix, displacement, stored.transpose(0, 3, 2, 1))
    image = nib.Nifti1Image(stored.T[..., None, :], np.asarray(affine))
    image.header.set_intent("vector")
    image.header.set_xyzt_units("mm")
    image.header["descrip"] = f"{MARK}; {remark}".encode("ascii", "replace") if remark else MARK.encode()
    with atomic_path(path) as temporary:
        save_nifti(temporary, image)


def load_field(path: str | Path) -> tuple[np.ndarray, np.ndarray]:
    """Read a field that ITK, ANTs or :func:`save_field` wrote; :func:`dmir.transforms.read` reads any other one.

    Returns
    -------
    displacement, affine
        float32 (3, D, H, W) in voxels, and the 4x4 voxel-to-RAS matrix of the fixed grid.

    Raises
    ------
    InputError
        The file is missing, damaged, not finite, or no field of ITK's: its header or its values say that it is another
        kind, or do not say what it is.
    """
    from dmir.transforms import read

    found = read(path)
    if found.convention != "itk":
        raise InputError(
            path,
            found=f"a field of another kind: {found.convention}, by {found.known_by}",
            expected="(D, H, W, 1, 3), a vector field as ITK and ANTs write it",
            remedy=f"Convert it: dmir field convert {path} --to itk --out FIELD.nii.gz",
        )
    field = found.on()
    return field.displacement, field.affine
