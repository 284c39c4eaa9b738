"""What a file says of itself before its voxels: which format it is, in which unit it measures, where it lies.

Formats are told by their content, never by a name. Where a header leaves its place in the world open, or tells it twice
in different ways, it is read as ITK reads it, so that ANTs, 3D Slicer and ITK-SNAP find what is written beside it.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import nibabel as nib
import numpy as np
from nibabel.filebasedimages import ImageFileError
from nibabel.spatialimages import HeaderDataError

from dmir.doubts import doubt

# what nibabel reads besides (CIFTI, GIFTI, MINC, AFNI, PAR/REC) is no volume of a scan, and its parsers are not needed
SINGLE: tuple[Any, ...] = (nib.Nifti1Image, nib.Nifti2Image)
PAIRS: tuple[Any, ...] = (nib.Nifti1Pair, nib.Nifti2Pair, nib.Spm2AnalyzeImage)
BEGINNING = 1024  # bytes of a file by which its format is known
FLAG = slice(28, 30)  # of an MGH header: whether its place in the world was ever set
OTHER_FORMATS: tuple[tuple[slice, bytes, str, str], ...] = (
    (slice(0, 2), b"\x1f\x8b", "a gzip file within a gzip file", "Unpack it once"),
    (slice(0, 4), b"PK\3\4", "a zip archive", "Unpack it"),
    (slice(257, 262), b"ustar", "a tar archive", "Unpack it"),
    (slice(0, 3), b"BZh", "a bzip2 file", "Unpack it"),
    (slice(0, 6), b"\xfd7zXZ\0", "an xz file", "Unpack it"),
    (slice(0, 4), b"\x28\xb5\x2f\xfd", "a zstd file", "Unpack it"),
    (slice(128, 132), b"DICM", "a DICOM file", "Convert the series to NIfTI, for instance with dcm2niix"),
    (slice(0, 4), b"NRRD", "an NRRD file", "Convert it to NIfTI"),
    (slice(0, 10), b"ObjectType", "a MetaImage header", "Convert it to NIfTI"),
    (slice(0, 4), b"\x89HDF", "an HDF5 or MINC 2 file", "Convert it to NIfTI"),
    (slice(0, 3), b"CDF", "a MINC 1 file", "Convert it to NIfTI"),
    (slice(0, 19), b"version https://git", "a pointer of Git LFS", "Fetch the file itself: git lfs pull"),
    (slice(0, 9), b"/annex/ob", "a pointer of git-annex", "Fetch the file itself: git annex get, or datalad get"),
    (slice(0, 5), b"<html", "a web page", "Download the file itself"),
    (slice(0, 5), b"<!doc", "a web page", "Download the file itself"),
    (slice(0, 5), b"<?xml", "an XML file (GIFTI?)", "Give a volume"),
)
LARGEST_STEP = 1e6  # from a voxel to the next, in a header's unit
UNITS = {1: ("metres", 1e3), 2: ("millimetres", 1.0), 3: ("micrometres", 1e-3)}  # NIfTI's codes, and mm in one


class _MGHHeader(nib.freesurfer.mghformat.MGHHeader):
    """As nibabel's, which knows no intents: FreeSurfer's newer files have one in their version."""

    @staticmethod
    def chk_version(header: Any, fix: bool = False) -> tuple[Any, Any]:
        known = header.copy()
        known["version"] &= 255
        return header, nib.freesurfer.mghformat.MGHHeader.chk_version(known, fix)[1]


class _MGHImage(nib.MGHImage):
    header_class = _MGHHeader


def other_format(beginning: bytes) -> tuple[str, str] | None:
    """Return what a file is that is no volume, and what to do about it; None where that is not known."""
    if not beginning:
        return "an empty file", "Copy or download it again"
    lower = beginning.lower() if beginning[:1] == b"<" else beginning
    return next((told for place, magic, *told in OTHER_FORMATS if lower[place] == magic), None)  # type: ignore[return-value]


def format_of(beginning: bytes, header: Path, *, pair: bool) -> Any:
    """Return nibabel's class for a volume.

    Parameters
    ----------
    beginning
        Of the header, uncompressed.
    header
        The file that it begins.
    pair
        Whether voxels are in a file of their own.

    Raises
    ------
    ImageFileError
        It begins like no format of a volume.
    """
    # MGH has no magic number but its version, big-endian, of which two bytes are an intent
    if (
        not pair
        and beginning[:1] == b"\0"
        and beginning[3:4] == b"\1"
        and header.name.lower().endswith((".mgh", ".mgz", ".mgh.gz"))
    ):
        return _MGHImage
    kinds = PAIRS if pair else SINGLE
    found = next((kind for kind in kinds if kind.header_class.may_contain_header(beginning)), None)
    if found is None:
        raise ImageFileError(f"{header.name} is no header of a volume")
    beside = header.with_suffix(".mat")  # SPM's affine, which nibabel reads as a whole
    if found is nib.Spm2AnalyzeImage and beside.is_file() and beside.stat().st_size > 2**16:
        raise ImageFileError(f"{beside.name} beside it has more than an affine")
    return found


def millimetres(header: Any, where: str) -> float:
    """Return how many mm the unit of a header is; another one than the millimetre is told.

    A NIfTI that names no unit, as nearly all tools write it, is in mm like all other formats.
    """
    code = int(header["xyzt_units"]) & 7 if isinstance(header, nib.Nifti1Header) else 2
    name, factor = UNITS.get(code, UNITS[2])
    if factor != 1:
        doubt(where, found=f"lengths in {name}, as its header says", done="converted to millimetres")
    return factor


def placed(image: Any, beginning: bytes, where: str, stated: str | None = None) -> np.ndarray:
    """Return the 4x4 affine of an image, from voxel indices to the RAS world, in the unit of its header.

    Parameters
    ----------
    image
        As nibabel gives it.
    beginning
        Of its header.
    where
        The file, for what is told.
    stated
        The orientation that the user has stated, where the header is known to be wrong: then nothing is told.
    """
    found = "no place in the world"
    if isinstance(image, nib.MGHImage):
        known = beginning[FLAG] != b"\0\0"
        affine = np.asarray(image.affine, dtype=np.float64) if known else _coronal(image.shape)
        assumed = "coronal slices as FreeSurfer takes them, axes L, I and A, were assumed"
    elif isinstance(image, nib.Nifti1Pair):
        affine, known, found = _nifti(image.header)
        assumed = f"axes {_axes(affine)} were taken, as ITK does"
    else:
        affine, known = np.asarray(image.affine, dtype=np.float64), _has_matrix(image)
        assumed = f"axes {_axes(affine)}, this format's convention, were assumed"
    if not known and stated is None:
        doubt(where, found=found, done=f"{assumed}: look whether left lies left")
    return affine


def _nifti(header: Any) -> tuple[np.ndarray, bool, str]:
    """Return the affine of a NIfTI, whether there is no doubt about it, and if so, which."""
    codes = int(header["qform_code"]), int(header["sform_code"])
    if max(codes) <= 0:
        return _nowhere(header), False, "no place in the world (qform_code and sform_code are 0)"
    if min(codes) <= 0:
        affine = np.asarray(header.get_best_affine(), dtype=np.float64)
        return _with_its_spacing(affine, header) if codes[1] > 0 else (affine, True, "")
    sform = np.asarray(header.get_sform(), dtype=np.float64)
    try:
        qform = np.asarray(header.get_qform(), dtype=np.float64)
    except (HeaderDataError, ValueError, np.linalg.LinAlgError):
        return sform, False, "a qform that is none, beside an sform"
    reach = np.array([*(n - 1 for n in header.get_data_shape()[:3]), 1.0])
    apart = (np.abs(sform - qform) @ np.abs(reach))[:3].max()
    if apart <= 0.05 * np.sqrt((sform[:3, :3] ** 2).sum(axis=0)).min():
        return sform, True, ""
    # ITK takes the sform where it is the scanner's (1), else the qform
    chosen, name = (_with_its_spacing(sform, header)[0], "sform") if codes[1] == 1 else (qform, "qform")
    told = f"two places in the world, up to {apart:.3g} apart (qform_code {codes[0]}, sform_code {codes[1]})"
    return chosen, False, f"{told}, of which the {name} counts here"


def _with_its_spacing(sform: np.ndarray, header: Any) -> tuple[np.ndarray, bool, str]:
    """Return an sform with the spacing that the header tells beside it, as ITK takes it, where the two differ."""
    inside, beside = np.sqrt((sform[:3, :3] ** 2).sum(axis=0)), np.abs(header.get_zooms()[:3])
    possible = np.isfinite(sform).all() and min(*inside, *beside) > 0 and inside.max() < LARGEST_STEP
    if np.allclose(inside, beside, rtol=1e-2) or not possible:  # what is impossible is refused where it is read
        return sform, True, ""
    sizes = ["x".join(f"{step:.3g}" for step in steps) for steps in (inside, beside)]
    found = f"voxels of {sizes[0]} in its sform and of {sizes[1]} in its pixdim, which counts here"
    return sform @ np.diag([*(beside / inside), 1.0]), False, found


def _nowhere(header: Any) -> np.ndarray:
    """Return the affine that ITK gives a file without a place: axes L, P and S from the origin."""
    return np.diag([-1.0, -1.0, 1.0, 1.0]) @ np.diag([*(float(abs(step)) for step in header.get_zooms()[:3]), 1.0])


def _coronal(shape: tuple[int, ...]) -> np.ndarray:
    """Return what FreeSurfer takes for the affine of an MGH file that has none: 1 mm, centred, axes L, I and A."""
    affine = np.array([[-1.0, 0, 0, 0], [0, 0, 1, 0], [0, -1, 0, 0], [0, 0, 0, 1]])
    affine[:3, 3] = -affine[:3, :3] @ np.array(shape[:3]) / 2
    return affine


def _has_matrix(image: Any) -> bool:
    """Tell whether an Analyze image has the affine that SPM writes beside it."""
    holder = image.file_map.get("mat")
    return holder is not None and holder.filename is not None and Path(holder.filename).is_file()


def _axes(affine: np.ndarray) -> str:
    return "".join(code or "?" for code in nib.aff2axcodes(affine)) if np.isfinite(affine).all() else "?"
