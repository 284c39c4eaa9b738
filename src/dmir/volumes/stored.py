"""Arrays in files: what a header claims, held against the file before anything is read because of it."""

from __future__ import annotations

import contextlib
import math
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
from nibabel.fileholders import FileHolder

from dmir import headers
from dmir.errors import DmirError, InputError, damaged
from dmir.volumes.streams import BESIDE_VOXELS, CompressedStream, PlainStream, open_stream

MAXIMUM_VOXELS = 2**30  # 1024 along each axis; a header that claims more than this is damaged or hostile
TAGS = 2**16  # bytes behind the voxels that are looked at
DEFLATE = 1032  # bytes that one byte of a gzip file can become, at most
HEADER, IMAGE = (".hdr", ".hdr.gz"), (".img", ".img.gz")  # the two files of a pair
PAIRED = (*HEADER, *IMAGE)
CONTENT = "a complete NIfTI, MGH or Analyze volume"


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
        self,
        image: Any,
        affine: np.ndarray,
        unit: float,
        where: str,
        path: Path,
        stream: PlainStream | CompressedStream,
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
            if isinstance(self._stream, CompressedStream):
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
        most = self._size * (DEFLATE if isinstance(self._stream, CompressedStream) else 1)
        axes = "x".join(map(str, self.shape))
        beyond = 0 if isinstance(self._stream, CompressedStream) else self._size - needed
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
            streams = {part: open_stream(name) for part, name in names.items()}
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
