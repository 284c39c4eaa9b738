"""Images in and out: the one place that reads and writes volumes.

A volume is an array with the affine that takes its voxel indices to RAS millimetres, as nibabel gives them. Whatever a
file may hold (another orientation, a trailing axis, gzip cut short, NaN), what leaves this module is checked.

A header is a claim that anybody can write. Nothing is read because of it before the claim was held against the file:
how many voxels, of which type, where, and whether so many bytes can be there at all.
"""

from __future__ import annotations

import contextlib
import gzip
import io
import math
import os
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

from dmir.errors import InputError, damaged
from dmir.storage import temporary_beside, told_as_storage

MAXIMUM_VOXELS = 2**30  # 1024 along each axis; a header that claims more than this is damaged or hostile
BESIDE_VOXELS = 2**22  # bytes of a file that may be anything else: its header with extensions, and what follows them
DEFLATE = 1032  # bytes that one byte of a gzip file can become, at most
CHUNK = 2**20  # bytes decompressed at a time
# what nibabel reads besides (CIFTI, GIFTI, MINC, AFNI, PAR/REC) is no volume of a scan, and its parsers are not needed
KINDS: tuple[Any, ...] = (
    *(nib.Nifti1Pair, nib.Nifti1Image, nib.Nifti2Pair, nib.Nifti2Image),
    *(nib.Spm2AnalyzeImage, nib.Spm99AnalyzeImage, nib.AnalyzeImage, nib.MGHImage),
)
CONTENT = "a complete NIfTI, MGH or Analyze volume"


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


class _Plain(io.BufferedReader):
    """A file of which headers can read only so much, whatever length they claim for their parts."""

    def __init__(self, path: Path) -> None:
        super().__init__(io.FileIO(path))
        self._left = BESIDE_VOXELS

    def read(self, size: int | None = -1, /) -> bytes:
        self._left = _less(self._left, size)
        return super().read(size)


class _Compressed(gzip.GzipFile):
    """As :class:`_Plain`; voxels are decompressed into their place, without a second copy of them all."""

    def __init__(self, path: Path) -> None:
        super().__init__(path, "rb")
        self._left = BESIDE_VOXELS

    def read(self, size: int | None = -1) -> bytes:
        self._left = _less(self._left, size)
        return super().read(size)

    def readinto(self, buffer: Any) -> int:
        view, done = memoryview(buffer).cast("B"), 0
        while done < len(view) and (part := super().read(min(CHUNK, len(view) - done))):
            view[done : done + len(part)] = part
            done += len(part)
        return done

    def require_end(self) -> None:
        """Read on to the end, where gzip has its checksum; ValueError where there is much more than claimed."""
        beyond = 0
        while part := super().read(CHUNK):
            beyond += len(part)
            if beyond > BESIDE_VOXELS:
                raise ValueError("more than 4 MiB follow the voxels that the header claims")


def _less(left: int, size: int | None) -> int:
    if size is None or not 0 <= size <= left:
        raise ValueError("a header or extensions of more than 4 MiB")
    return left - size


def _stream(path: Path) -> _Plain | _Compressed:
    return _Compressed(path) if path.suffix in (".gz", ".mgz") else _Plain(path)


class StoredArray:
    """An array in a file, of which the header alone was read: ``shape`` and the 4x4 voxel-to-RAS ``affine``, mm."""

    def __init__(self, image: Any, where: str, path: Path, stream: _Plain | _Compressed) -> None:
        self.shape: tuple[int, ...] = tuple(int(n) for n in image.shape)
        self.affine = np.asarray(image.affine, dtype=np.float64)
        self._where, self._path, self._size = where, path, path.stat().st_size
        self._stream, self._proxy = stream, image.dataobj

    def read(self) -> np.ndarray:
        """Return the numbers; InputError where the header claims what no volume is, or what the file cannot hold."""
        self._check_claims()
        with _told_as_damaged(self._where, self._path), np.errstate(all="ignore"):
            data = np.asanyarray(self._proxy)
            if isinstance(self._stream, _Compressed):
                self._stream.require_end()
        return data

    def _check_claims(self) -> None:
        kind, offset = self._proxy.dtype, int(self._proxy.offset)
        needed = offset + math.prod(self.shape) * kind.itemsize
        most = self._size * (DEFLATE if isinstance(self._stream, _Compressed) else 1)
        axes = "x".join(map(str, self.shape))
        beyond = 0 if isinstance(self._stream, _Compressed) else self._size - needed
        faults = (
            (min(self.shape, default=0) < 1, f"a header that claims {axes} voxels"),
            (math.prod(self.shape) > MAXIMUM_VOXELS, f"a header that claims {self.shape} voxels"),
            (kind.kind not in "biuf" or kind.itemsize > 8, f"voxels of the type {kind}"),
            (not 0 <= offset <= BESIDE_VOXELS, f"voxels that begin at byte {offset}"),
            (needed > most, f"a header that claims {axes} voxels in a file of {self._size} bytes"),
            (beyond > BESIDE_VOXELS, f"{beyond} bytes behind the {axes} voxels that the header claims"),
            (not _invertible(self.affine), "an affine that cannot be inverted"),
        )
        for wrong, found in faults:
            if wrong:
                raise damaged(
                    self._where,
                    path=self._path,
                    found=found,
                    expected=f"{CONTENT} of at most {MAXIMUM_VOXELS} voxels, one number each, with a valid affine",
                    remedy="The file is truncated or its header is damaged: fetch it again, or mend the header (for "
                    "instance with nibabel or fslcpgeom).",
                )


def _invertible(affine: np.ndarray) -> bool:
    """Tell whether an affine is finite, of at least a micrometre a voxel, and its axes point in three directions."""
    matrix = affine[:3, :3]
    if not np.isfinite(affine).all() or np.abs(affine).max() > 1e6:
        return False
    spacing = np.sqrt((matrix**2).sum(axis=0))
    return bool(spacing.min() >= 1e-3 and abs(np.linalg.det(matrix / spacing)) > 1e-3)


@contextlib.contextmanager
def _told_as_damaged(where: str, path: Path) -> Iterator[None]:
    try:
        yield
    except InputError:
        raise
    except Exception as error:  # nibabel, gzip and zlib raise a dozen unrelated kinds for a damaged file
        raise damaged(
            where,
            path=path,
            found=f"a file that cannot be read ({_first_line(error)})",
            expected=CONTENT,
            remedy="It may be truncated: copy or download it again.",
        ) from error


@contextlib.contextmanager
def stored_array(path: Path, key: str) -> Iterator[StoredArray]:
    """Open an array in a file and read its header; the file is closed at the end.

    Parameters
    ----------
    path
        NIfTI, MGH or Analyze, plain or gzip; either file of a pair.
    key
        What the file is to the user, for error messages.

    Raises
    ------
    InputError
        The file is missing, or its header is none that nibabel reads.
    """
    if not path.is_file():
        raise InputError(
            f"{key}: {path}", found="no such file", expected="a NIfTI, MGH or Analyze volume", remedy="Check the path."
        )
    pair = _pair(path, key)
    where = f"{key}: {path}" + (f" ({pair[0].name} with {pair[1].name})" if pair else "")
    with contextlib.ExitStack() as opened:
        with _told_as_damaged(where, path), np.errstate(all="ignore"):
            header = pair[0] if pair else path
            kind = _kind(header)
            files = kind.filespec_to_file_map(str(header))
            # the two files of a volume are the same for most formats; nibabel by itself wants both plain or compressed
            names = {part: Path(holder.filename) for part, holder in files.items() if part != "mat"}
            names |= {"image": pair[1]} if pair else {}
            streams = {part: _stream(name) for part, name in names.items()}
            for stream in streams.values():
                opened.callback(stream.close)
            holders = {part: FileHolder(str(names[part]), stream) for part, stream in streams.items()}
            image = kind.from_file_map({**files, **holders})
            stored = StoredArray(image, where, names["image"], streams["image"])
        yield stored


def _kind(header: Path) -> Any:
    """Return nibabel's class for a file."""
    kind = next((kind for kind in KINDS if kind.path_maybe_image(header)[0]), None)
    if kind is None:
        raise ImageFileError(f"{header.name} is no header of a volume")
    beside = header.with_suffix(".mat")  # SPM's affine, which nibabel reads as a whole
    if ("mat", ".mat") in kind.files_types and beside.is_file() and beside.stat().st_size > 2**16:
        raise ImageFileError(f"{beside.name} beside it has more than an affine")
    return kind


def _load(path: Path, key: str) -> tuple[np.ndarray, np.ndarray]:
    """Return the raw (D, H, W) array and the affine, or refuse the file."""
    with stored_array(path, key) as stored:
        shape = stored.shape
        while len(shape) > 3 and shape[-1] == 1:
            shape = shape[:-1]
        _require_volume(f"{key}: {path}", shape)
        return stored.read().reshape(shape, order="F"), stored.affine


def _require_volume(where: str, shape: tuple[int, ...]) -> None:
    if len(shape) != 3:
        what = f"{shape[3]} volumes in one file" if len(shape) == 4 else f"an array of shape {shape}"
        raise InputError(
            where, found=what, expected="one 3-D volume", remedy="Split the series and name one volume a scan."
        )
    if min(shape) == 1:
        raise InputError(where, found=f"shape {shape}", expected="a 3-D volume, not a slice")


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
        As :func:`read_image`, and where values are not whole numbers from 0 on or no voxel is labelled.
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
    if raw.min() < 0 or raw.max() > np.iinfo(np.int32).max:
        raise InputError(
            f"{key}: {path}",
            found=f"ids from {raw.min():g} to {raw.max():g}",
            expected=f"ids from 0 (background) to {np.iinfo(np.int32).max}",
            remedy="Give the structures other ids.",
        )
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

    Nobody ever sees a half-written file under the real name, not even after a power cut: the content is on the disk
    before the name is. The temporary name keeps all suffixes, because writers choose the format by them.

    Raises
    ------
    StorageError
        The disk is full, read-only or broken, in whatever words the writer told it.
    """
    path = Path(path)
    with told_as_storage(path):
        path.parent.mkdir(parents=True, exist_ok=True)
        with temporary_beside(path) as temporary:
            yield temporary
            _make_durable(temporary)
            umask = os.umask(0)
            os.umask(umask)
            temporary.chmod(0o666 & ~umask)  # a temporary file is private; results are to be shared
            temporary.replace(path)


def _make_durable(path: Path) -> None:
    """Wait until a file's content is on the disk: a name that is there without it would be an empty result."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


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
