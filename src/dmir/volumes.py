"""Images in and out: the one place that reads and writes volumes.

A volume is an array with the affine that takes its voxel indices to RAS millimetres, as nibabel gives them. Whatever a
file may hold (another orientation, a trailing axis, gzip cut short, NaN), what leaves this module is checked.
"""

from __future__ import annotations

import contextlib
import os
import tempfile
import warnings
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import nibabel as nib
import numpy as np
from nibabel.filebasedimages import ImageFileError
from nibabel.fileholders import FileHolder
from nibabel.orientations import aff2axcodes, axcodes2ornt, inv_ornt_aff, io_orientation, ornt_transform

from dmir.errors import InputError

MAXIMUM_VOXELS = 2**31  # a header that claims more than this is damaged or hostile


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


def _first_line(error: Exception) -> str:
    lines = str(error).splitlines()
    return f"{type(error).__name__}: {lines[0]}" if lines else type(error).__name__


def _pair(path: Path, key: str) -> tuple[Path, Path] | None:
    """Return header and image where a volume is two files (.hdr with .img or .img.gz), else None.

    Either of the two may be named; InputError where the other is missing.
    """
    stem = next((path.name.removesuffix(end) for end in (".hdr", ".img", ".img.gz") if path.name.endswith(end)), None)
    if stem is None:
        return None
    header = path.with_name(f"{stem}.hdr")
    if not header.is_file() and header.with_suffix(".hdr.gz").is_file():
        return None  # nibabel opens two compressed files by itself
    images = [header.with_suffix(end) for end in (".img", ".img.gz")] if path == header else [path]
    image = next((file for file in images if file.is_file()), None)
    if image and header.is_file():
        return header, image
    raise InputError(
        f"{key}: {path}",
        found=f"no {header.name if image else ' or '.join(file.name for file in images)} beside it",
        expected="both files of the volume: the header (.hdr) and the image (.img or .img.gz)",
        remedy="Copy or download the other one too.",
    )


def _open_pair(header: Path, image: Path) -> Any:
    """Open header and image as nibabel does, which by itself wants both plain or both compressed."""
    for kind in nib.imageclasses.all_image_classes:
        if kind.path_maybe_image(header)[0]:
            files = kind.filespec_to_file_map(str(header))
            return kind.from_file_map({**files, "image": FileHolder(str(image))})
    raise ImageFileError(f"{header.name} is no header of a volume")


def _load(path: Path, key: str) -> tuple[np.ndarray, np.ndarray]:
    """Return the raw (D, H, W) array and the affine, or refuse the file."""
    if not path.is_file():
        raise InputError(
            f"{key}: {path}", found="no such file", expected="a NIfTI, MGH or Analyze volume", remedy="Check the path."
        )
    pair = _pair(path, key)
    where = f"{key}: {path}" + (f" ({pair[0].name} with {pair[1].name})" if pair else "")
    try:
        image: Any = _open_pair(*pair) if pair else nib.load(path)
        shape = image.shape
        if np.prod([float(n) for n in shape]) > MAXIMUM_VOXELS:
            raise InputError(
                where,
                found=f"a header that claims {shape} voxels",
                expected=f"at most {MAXIMUM_VOXELS} voxels",
                remedy="The file is damaged; fetch it again.",
            )
        data = np.asanyarray(image.dataobj)
        affine = np.asarray(image.affine, dtype=np.float64)
    except InputError:
        raise
    except Exception as error:  # nibabel, gzip and zlib raise a dozen unrelated kinds for a damaged file
        raise InputError(
            where,
            found=f"a file that cannot be read ({_first_line(error)})",
            expected="a complete NIfTI, MGH or Analyze volume",
            remedy="It may be truncated: copy or download it again.",
        ) from error
    while data.ndim > 3 and data.shape[-1] == 1:
        data = data[..., 0]
    if data.ndim != 3:
        what = f"{data.shape[3]} volumes in one file" if data.ndim == 4 else f"an array of shape {shape}"
        raise InputError(
            f"{key}: {path}",
            found=what,
            expected="one 3-D volume",
            remedy="Split the series and name one volume a scan.",
        )
    if min(data.shape) < 2:
        raise InputError(f"{key}: {path}", found=f"shape {data.shape}", expected="a 3-D volume, not a slice")
    if not np.isfinite(affine).all() or abs(np.linalg.det(affine[:3, :3])) < 1e-9:
        raise InputError(
            f"{key}: {path}",
            found="an affine that cannot be inverted",
            expected="a header with a valid qform or sform",
            remedy="Mend the header (for instance with nibabel or fslcpgeom).",
        )
    return data, affine


def read_image(path: str | Path, key: str = "image") -> Volume:
    """Read a grey-value image.

    Parameters
    ----------
    path
        A volume that nibabel reads; 3-D, or with trailing axes of length one.
    key
        What the file is to the user, for error messages.

    Returns
    -------
    Volume
        float32 data (D, H, W) in the file's own orientation.

    Raises
    ------
    InputError
        The file is missing, damaged, holds several volumes, NaN or Inf, or the same value everywhere.
    """
    path = Path(path)
    raw, affine = _load(path, key)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", RuntimeWarning)  # what overflows to Inf is refused below
        data = np.ascontiguousarray(raw, dtype=np.float32)
    bad = int(data.size - np.isfinite(data).sum())
    if bad:
        raise InputError(
            f"{key}: {path}",
            found=f"{bad} voxels that are NaN or infinite",
            expected="finite grey values",
            remedy="Replace them (usually by 0) and save the image again.",
        )
    if data.min() == data.max():
        raise InputError(
            f"{key}: {path}",
            found=f"a constant image (every voxel is {data.flat[0]:g})",
            expected="an image with contrast",
            remedy="Check that this is the scan itself, not an empty export.",
        )
    return Volume(data, affine)


def read_labels(path: str | Path, key: str = "labels") -> Volume:
    """Read a label map as int32 (D, H, W).

    Raises
    ------
    InputError
        As :func:`read_image`, and where values are not whole numbers or no voxel is labelled.
    """
    path = Path(path)
    raw, affine = _load(path, key)
    if raw.dtype.kind == "f":
        finite = np.isfinite(raw).all()
        if not finite or np.abs(raw - np.round(raw)).max() > 1e-3:
            raise InputError(
                f"{key}: {path}",
                found="values that are not whole numbers",
                expected="one integer id a voxel",
                remedy="Label maps must be resampled with nearest neighbours.",
            )
        raw = np.round(raw)
    data = np.ascontiguousarray(raw, dtype=np.int32)
    if not data.any():
        raise InputError(f"{key}: {path}", found="no labelled voxel", expected="at least one structure")
    return Volume(data, affine)


def read_mask(path: str | Path, key: str = "mask") -> Volume:
    """Read a mask as bool (D, H, W): everything above zero is inside. An empty mask is refused with InputError."""
    path = Path(path)
    raw, affine = _load(path, key)
    data = np.ascontiguousarray(raw > 0)
    if not data.any():
        raise InputError(
            f"{key}: {path}",
            found="an empty mask (no voxel above 0)",
            expected="a mask that covers the brain",
            remedy="Make the mask again, or leave it out and choose another skull_strip.",
        )
    return Volume(data, affine)


@contextlib.contextmanager
def atomic_path(path: str | Path) -> Iterator[Path]:
    """Yield a path beside ``path`` that replaces it on success and vanishes on failure.

    Nobody ever sees a half-written file under the real name. The temporary name keeps all suffixes, because writers
    choose the format by them.
    """
    path = Path(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    handle, name = tempfile.mkstemp(dir=path.parent, prefix=".writing-", suffix="-" + path.name)
    os.close(handle)
    temporary = Path(name)
    try:
        yield temporary
        umask = os.umask(0)
        os.umask(umask)
        temporary.chmod(0o666 & ~umask)  # mkstemp makes files private; results are to be shared
        temporary.replace(path)
    finally:
        temporary.unlink(missing_ok=True)


def write_volume(path: str | Path, volume: Volume, dtype: np.dtype | type | None = None) -> None:
    """Write a volume as NIfTI (``.nii`` or ``.nii.gz``), all at once; bool becomes uint8.

    The gzip level is low: it costs a quarter of the time of the usual level for a tenth more bytes.
    """
    data = volume.data.astype(np.uint8) if volume.data.dtype == bool else volume.data
    image = nib.Nifti1Image(data if dtype is None else data.astype(dtype), volume.affine)
    image.header.set_xyzt_units("mm")
    with atomic_path(path) as temporary:
        save_nifti(temporary, image)


def save_nifti(path: Path, image: nib.Nifti1Image) -> None:
    """Save with a fast gzip level and no time stamp, so that equal volumes are equal files."""
    if path.suffix == ".gz":
        import gzip

        with path.open("wb") as raw, gzip.GzipFile(filename="", fileobj=raw, mode="wb", compresslevel=1, mtime=0) as f:
            f.write(image.to_bytes())
    else:
        nib.save(image, path)


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
