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
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import nibabel as nib
import numpy as np
from nibabel.fileholders import FileHolder
from nibabel.orientations import aff2axcodes, axcodes2ornt, inv_ornt_aff, io_orientation, ornt_transform

from dmir import headers
from dmir.doubts import doubt
from dmir.errors import DmirError, InputError, damaged
from dmir.storage import temporary_beside, told_as_storage

MAXIMUM_VOXELS = 2**30  # 1024 along each axis; a header that claims more than this is damaged or hostile
BESIDE_VOXELS = 2**22  # bytes of a file that may be anything else: its header with extensions, and what follows them
TAGS = 2**16  # bytes behind the voxels that are looked at
DEFLATE = 1032  # bytes that one byte of a gzip file can become, at most
CHUNK = 2**20  # bytes decompressed at a time
HEADER, IMAGE = (".hdr", ".hdr.gz"), (".img", ".img.gz")  # the two files of a pair
PAIRED = (*HEADER, *IMAGE)
FLOAT32_WHOLE = 2**24  # float32 has all whole numbers up to this one
GZIP = b"\x1f\x8b"
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
    """Return header and image where a volume is two files (.hdr with .img, either of them perhaps .gz), else None.

    Either of the two may be named, in small letters or capitals; InputError where the other is missing.
    """
    stem, end = next(((path.name[: -len(end)], end) for end in PAIRED if path.name.lower().endswith(end)), ("", ""))
    if not stem:
        return None
    ends = (HEADER, IMAGE) if end in IMAGE else (IMAGE, HEADER)
    capitals = path.name[len(stem) :].isupper()
    others = [path.with_name(stem + (other.upper() if capitals else other)) for other in ends[0]]
    other = next((file for file in others if file.is_file()), None)
    if other is None:
        raise InputError(
            f"{key}: {path}",
            found=f"no {' or '.join(file.name for file in others)} beside it",
            expected="both files of the volume: the header (.hdr) and the image (.img), each of them plain or .gz",
            remedy="Copy or download the other one too.",
        )
    return (other, path) if end in IMAGE else (path, other)


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
    """Open a file by its content: names do not tell whether it is compressed."""
    with path.open("rb") as file:
        compressed = file.read(len(GZIP)) == GZIP
    return _Compressed(path) if compressed else _Plain(path)


class StoredArray:
    """An array in a file, of which the header alone was read.

    Attributes
    ----------
    shape
        Of the array.
    affine
        4x4, voxel indices to RAS mm, whatever the header's unit.
    header
        As nibabel gives it.
    unit
        How many mm its unit is: numbers that are lengths are to be multiplied by it.
    """

    def __init__(
        self, image: Any, affine: np.ndarray, unit: float, where: str, path: Path, stream: _Plain | _Compressed
    ) -> None:
        self.shape: tuple[int, ...] = tuple(int(n) for n in image.shape)
        self.header = image.header
        self.unit, self.affine = unit, np.diag([unit, unit, unit, 1.0]) @ affine
        self._where, self._path, self._size = where, path, path.stat().st_size
        self._stream, self._proxy = stream, image.dataobj

    def read(self) -> np.ndarray:
        """Return the numbers; InputError where the header claims what no volume is, or what the file cannot hold."""
        self.check_claims()
        with _told_as_damaged(self._where, self._path), np.errstate(all="ignore"):
            data = np.asanyarray(self._proxy)
            if isinstance(self._stream, _Compressed):
                self._stream.require_end()
        return data

    def behind(self) -> bytes:
        """Return what follows the voxels, up to TAGS bytes: MGH files have tags there."""
        self.check_claims()
        with _told_as_damaged(self._where, self._path):
            self._stream.seek(int(self._proxy.offset) + math.prod(self.shape) * self._proxy.dtype.itemsize)
            return self._stream.read(TAGS)

    def check_claims(self) -> None:
        """Refuse with InputError what no volume is, and what the file cannot hold."""
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
    except DmirError:
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
def stored_array(path: Path, key: str, orientation: str | None = None) -> Iterator[StoredArray]:
    """Open an array in a file and read its header; the file is closed at the end.

    A header in another unit than the millimetre, and one that leaves its place in the world open, are told
    (:mod:`dmir.doubts`).

    Parameters
    ----------
    path
        NIfTI, MGH or Analyze, plain or gzip whatever its name; either file of a pair.
    key
        What the file is to the user, for messages.
    orientation
        What the user has stated of it, where the header is known to be wrong.

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
    names = dict(zip(("header", "image"), pair, strict=True)) if pair else {"image": path}
    with contextlib.ExitStack() as opened:
        with _told_as_damaged(where, path), np.errstate(all="ignore"):
            streams = {part: _stream(name) for part, name in names.items()}
            for stream in streams.values():
                opened.callback(stream.close)
            first = streams["header" if pair else "image"]
            beginning = first.read(headers.BEGINNING)
            first.seek(0)
            _require_volume_format(beginning, where)
            kind = headers.format_of(beginning, names.get("header", path), pair=pair is not None)
            holders = {part: FileHolder(str(names[part]), stream) for part, stream in streams.items()}
            if pair:
                holders["mat"] = FileHolder(str(_beside(pair[0], ".mat")))
            image = kind.from_file_map(holders)
            affine = headers.placed(image, beginning, where, orientation)
            unit = headers.millimetres(image.header, where)
            stored = StoredArray(image, affine, unit, where, names["image"], streams["image"])
        yield stored


def _beside(header: Path, suffix: str) -> Path:
    """Return the file beside a header (.hdr or .hdr.gz) that has another suffix."""
    return (header.with_suffix("") if header.suffix.lower() == ".gz" else header).with_suffix(suffix)


def _require_volume_format(beginning: bytes, where: str) -> None:
    """Refuse by its name a file that is known to be something else."""
    other = headers.other_format(beginning)
    if other is not None:
        raise InputError(where, found=other[0], expected=CONTENT, remedy=f"{other[1]}.")


def _load(path: Path, key: str, orientation: str | None = None) -> tuple[np.ndarray, np.ndarray]:
    """Return the raw (D, H, W) array and the affine, or refuse the file."""
    with stored_array(path, key, orientation) as stored:
        shape = _volume_shape(f"{key}: {path}", stored.shape)
        data = stored.read().reshape(shape, order="F")
        if orientation is None:
            return data, stored.affine
        return data, with_orientation(Volume(data, stored.affine), orientation).affine


def read_grid(path: str | Path, key: str = "image") -> Grid:
    """Read where a volume's voxels are: of the file the header alone, held against the file's size.

    Raises
    ------
    InputError
        As :func:`read_image`, as far as a header tells.
    """
    with stored_array(Path(path), key) as stored:
        shape = _volume_shape(f"{key}: {path}", stored.shape)
        stored.check_claims()
        return Grid(shape, stored.affine)


def _volume_shape(where: str, shape: tuple[int, ...]) -> tuple[int, int, int]:
    """Return the shape of a volume without trailing axes of length one, or refuse it."""
    while len(shape) > 3 and shape[-1] == 1:
        shape = shape[:-1]
    if len(shape) != 3:
        what = f"{shape[3]} volumes in one file" if len(shape) == 4 else f"an array of shape {shape}"
        raise InputError(
            where, found=what, expected="one 3-D volume", remedy="Split the series and name one volume a scan."
        )
    if min(shape) == 1:
        raise InputError(where, found=f"shape {shape}", expected="a 3-D volume, not a slice")
    return shape[0], shape[1], shape[2]


def read_image(path: str | Path, key: str = "image", orientation: str | None = None) -> Volume:
    """Read a grey-value image.

    Parameters
    ----------
    path
        A volume that nibabel reads; 3-D, or with trailing axes of length one.
    key
        What the file is to the user, for messages.
    orientation
        Axis codes of the array as it is stored, where its header is wrong, see :func:`with_orientation`.

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
    raw, affine = _load(path, key, orientation)
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


def read_labels(path: str | Path, key: str = "labels", orientation: str | None = None) -> Volume:
    """Read a label map as int32 (D, H, W): every id as it is in the file.

    Raises
    ------
    InputError
        As :func:`read_image`, and where values are not whole numbers from 0 on, an id is too large, or no voxel is
        labelled.
    """
    path = Path(path)
    raw, affine = _load(path, key, orientation)
    where, largest = f"{key}: {path}", np.iinfo(np.int32).max
    if raw.dtype.kind == "f":
        whole = np.round(raw)
        finite = np.isfinite(raw).all()
        if not finite or np.abs(raw - whole).max() > 1e-3:
            raise InputError(
                where,
                found="values that are not whole numbers",
                expected="one integer id a voxel",
                remedy="Label maps must be resampled with nearest neighbours.",
            )
        if raw.dtype.itemsize < 8 and largest >= whole.max() >= FLOAT32_WHOLE:
            doubt(
                where,
                found=f"ids up to {whole.max():.0f} as float32, which has not every whole number above {FLOAT32_WHOLE}",
                done="used as they are stored, perhaps not as they were meant",
            )
        raw = whole
    if raw.min() < 0 or raw.max() > largest:
        raise InputError(
            where,
            found=f"ids from {int(raw.min())} to {int(raw.max())}",
            expected=f"ids from 0 (background) to {largest}",
            remedy="Give the structures other ids.",
        )
    data = np.ascontiguousarray(raw, dtype=np.int32)
    if not data.any():
        raise InputError(where, found="no labelled voxel", expected="at least one structure")
    return Volume(data, affine)


def read_mask(path: str | Path, key: str = "mask", orientation: str | None = None) -> Volume:
    """Read a mask as bool (D, H, W), see :func:`decide_mask`. An empty mask is refused with InputError."""
    path = Path(path)
    raw, affine = _load(path, key, orientation)
    return Volume(decide_mask(raw, f"{key}: {path}"), affine)


def decide_mask(values: np.ndarray, where: str) -> np.ndarray:
    """Return what counts as inside a mask, bool (D, H, W): what is above half of its range.

    A binary mask has two values, whatever scaling or rounding made of them; a probability lies within [0, 1]. Anything
    else is told: soft masks on another scale are decided at half too; of several whole numbers, as label maps and
    stripped images have, all that are not 0 are inside.

    Parameters
    ----------
    values
        Of any type, (D, H, W).
    where
        The file, for messages.

    Raises
    ------
    InputError
        Nothing is inside, or a value is NaN or infinite.
    """
    if values.dtype == bool:
        inside = values
    else:
        low, high = float(values.min()), float(values.max())
        if not np.isfinite([low, high]).all():
            raise InputError(
                where,
                found="values that are NaN or infinite",
                expected="a mask: 1 inside, 0 outside",
                remedy="Replace them by 0 and save the mask again.",
            )
        inside = values > (low + high) / 2 if high > low else values > 0
        if not _is_binary_or_probability(values, low, high):
            inside = _decide_other(values, low, high, inside, where)
    if not inside.any():
        raise InputError(
            where,
            found="an empty mask (no voxel above 0)",
            expected="a mask that covers the brain",
            remedy="Make the mask again, or leave it out and choose another skull_strip.",
        )
    return np.ascontiguousarray(inside)


def _is_binary_or_probability(values: np.ndarray, low: float, high: float) -> bool:
    near = 0.01 * (high - low)
    if -near <= low and high <= 1 + near:
        return True
    return bool(((values <= low + near) | (values >= high - near)).all())


def _decide_other(values: np.ndarray, low: float, high: float, half: np.ndarray, where: str) -> np.ndarray:
    """Return what is inside a mask that is neither binary nor a probability, and tell how that was decided."""
    scale = high in (100, 255) and (values[values > 0] >= 0.95 * high).mean() > 0.3  # a soft mask in percent or bytes
    several = low == 0 and not scale and bool((values == np.round(values)).all())
    inside = values > 0 if several else half
    by = "all that is not 0 counts as inside" if several else f"what is above {(low + high) / 2:.4g} counts as inside"
    if not (several and Path(where).name.startswith("brainmask.")):  # FreeSurfer's mask is a stripped image
        kind = "as a label map or a stripped image has them" if several else "neither binary nor a probability"
        doubt(
            where,
            found=f"more than two values from {low:.4g} to {high:.4g}, {kind}",
            done=f"{by}, {100 * inside.mean():.3g} % of the voxels",
        )
    return inside


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


def write_labels(path: str | Path, labels: Volume) -> None:
    """Write a label map as :func:`write_volume` does: int16 where that holds all its ids, else int32."""
    write_volume(path, labels, np.int16 if labels.data.max(initial=0) <= np.iinfo(np.int16).max else np.int32)


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
