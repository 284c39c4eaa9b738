"""The preprocessed scans of a cohort in one file that every training of it opens in no time: :func:`pack_scans`.

A compressed volume of 160x192x224 voxels costs a fifth of a second of a core to read, each time a training starts; the
same voxels in a plain array cost a copy. So the scans are packed once, as ``images.npy`` and ``labels.npy``: plain
numpy files that anything can map into memory. All trainings that read them share one copy, the kernel's page cache.
"""

from __future__ import annotations

import contextlib
import hashlib
import json
import logging
import os
import shutil
import time
import weakref
from collections import deque
from collections.abc import Callable, Iterable, Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import asdict, dataclass, field
from itertools import islice
from pathlib import Path
from typing import Any, BinaryIO, TypeVar

import numpy as np

from dmir.errors import DmirError, InputError, StorageError, damaged, suggestion
from dmir.volumes import Grid, atomic_path, read_image, read_labels, require_same_grid

log = logging.getLogger(__name__)

FORMAT, VERSION = "dmir pack of scans", 1
IMAGES, LABELS, RECORD = "images.npy", "labels.npy", "pack.json"
PRECISIONS: dict[str, type[np.generic]] = {"float16": np.float16, "uint8": np.uint8, "float32": np.float32}
ROUNDING = 1 / 510  # half a step of uint8
AGAIN = "Pack the scans again."

Item = TypeVar("Item")
Result = TypeVar("Result")


@dataclass(frozen=True)
class Scan:
    """A preprocessed scan: its name, its image file, and its label map where there is one."""

    name: str
    image: Path
    labels: Path | None = None


@dataclass(frozen=True)
class SourceFile:
    """A file as it was when it was packed: its path as given, bytes, time of change in ns, and SHA-256."""

    path: str
    size: int
    modified: int
    sha256: str

    @classmethod
    def of(cls, path: Path) -> SourceFile:
        """Describe a file; InputError where it cannot be read."""
        try:
            status = path.stat()
            return cls(str(path), status.st_size, status.st_mtime_ns, _digest(path))
        except OSError as error:
            found = f"a file that cannot be read ({error.strerror})"
            raise InputError(path, found=found, expected="a preprocessed volume", remedy="Check the path.") from None

    def is_like(self, path: Path) -> bool:
        """Tell whether a file holds what was packed; it is read only where its time of change differs."""
        status = path.stat()
        if status.st_size != self.size:
            return False
        return status.st_mtime_ns == self.modified or _digest(path) == self.sha256


def _digest(path: Path) -> str:
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


@dataclass(frozen=True, eq=False)
class Pack:
    """Packed scans of one grid, mapped read-only.

    Attributes
    ----------
    names
        The scans, in the order of ``images``.
    precision
        ``"float16"``, ``"uint8"`` (255 stands for 1) or ``"float32"``.
    images
        (N, D, H, W) of that type.
    labels
        (M, D, H, W), the smallest unsigned type that holds the ids; None where no scan has labels.
    label_rows
        Which row of ``labels`` belongs to a scan, by name; only those that have labels.
    sources
        The files that were packed, by name: image, and label map or None.
    """

    folder: Path
    names: list[str]
    grid: Grid
    precision: str
    images: np.memmap
    labels: np.memmap | None
    label_rows: dict[str, int]
    sources: dict[str, tuple[SourceFile, SourceFile | None]]
    descriptor: int = field(repr=False)  # of images.npy, open as long as the pack is: a later packing replaces the file

    @property
    def file(self) -> Path:
        """The file of the images."""
        return self.folder / IMAGES

    def rows_of(self, names: Iterable[str]) -> list[int]:
        """Return the rows of these scans in ``images``; InputError for a scan that was not packed."""
        rows = {name: row for row, name in enumerate(self.names)}
        wanted = list(names)
        for name in wanted:
            if name not in rows:
                raise InputError(
                    f"{self.folder}: {name}",
                    found=f"no such scan among the {len(rows)} that are packed",
                    expected="every scan of the training",
                    remedy=f"{AGAIN} {suggestion(name, rows) if len(rows) < 20 else ''}".strip(),
                )
        return [rows[name] for name in wanted]

    def scan(self, name: str) -> Scan:
        """Return a scan that was packed, with the files that it was read from."""
        self.rows_of([name])
        image, labels = self.sources[name]
        return Scan(name, Path(image.path), None if labels is None else Path(labels.path))

    def labels_of(self, name: str) -> np.ndarray:
        """Return the label map (D, H, W) of a scan, mapped; InputError where it was packed without."""
        if self.labels is None or name not in self.label_rows:
            raise InputError(
                f"{self.folder}: {name}", found="no label map", expected="the scan packed with its labels", remedy=AGAIN
            )
        return self.labels[self.label_rows[name]]

    def read_images(self, rows: Sequence[int], out: np.ndarray) -> None:
        """Read images into ``out``, (B, D, H, W) of the pack's type.

        The file is read, not the map: the page cache is the same, it is no slower, and an error of the disk or the
        network comes as a message, where a map would end the process by SIGBUS.

        Raises
        ------
        InputError
            The file can no longer be read, or has become shorter.
        """
        for row, target in zip(rows, out, strict=True):
            room = target.reshape(-1).view(np.uint8)
            offset, done = self.images.offset + row * room.size, 0
            while done < room.size:
                try:
                    count = os.preadv(self.descriptor, [room[done:]], offset + done)
                except OSError as error:
                    count, why = 0, error.strerror or str(error)
                else:
                    why = f"its end after {offset + done} bytes"
                if not count:
                    raise InputError(
                        f"{self.file} ({self.names[row]})",
                        found=why,
                        expected="the file as it was when it was opened",
                        remedy=f"Check the disk. {AGAIN}",
                    )
                done += count

    def require_fresh(self, scans: Iterable[Scan]) -> None:
        """Refuse scans whose files changed after they were packed.

        A file that is gone cannot be compared; that is said in the log.

        Raises
        ------
        InputError
            A scan is not in the pack, or its image or label map is another one; the file is named.
        """
        scans, missing = list(scans), 0
        self.rows_of(scan.name for scan in scans)
        for scan in scans:
            for path, packed in zip((scan.image, scan.labels), self.sources[scan.name], strict=True):
                if path is None or packed is None:
                    continue
                if not path.is_file():
                    missing += 1
                elif not packed.is_like(path):
                    raise InputError(
                        path,
                        found=f"a file that is not the one packed in {self.folder}",
                        expected=f"{packed.size} bytes with the SHA-256 {packed.sha256[:12]}...",
                        remedy=AGAIN,
                    )
        if missing:
            log.warning("%d files of the scans packed in %s are gone: nothing to compare", missing, self.folder)


# --- packing ---


def quantise(image: np.ndarray, precision: str, where: str | Path) -> np.ndarray:
    """Return a float32 image in [0, 1] in the type in which it is kept.

    ``float16`` rounds: within [0, 1] by at most 2^-12 = 0.00024, half the distance of its numbers below 1. ``uint8``
    is round(255 x), at most 1/510 = 0.00196 away. ``float32`` is the image itself.

    Raises
    ------
    InputError
        The type cannot hold the values; the file ``where`` is named.
    """
    low, high = float(image.min()), float(image.max())
    limits = {"uint8": (-ROUNDING, 1 + ROUNDING), "float16": (-65504.0, 65504.0)}.get(precision)
    if limits and not limits[0] <= low <= high <= limits[1]:
        raise InputError(
            where,
            found=f"values from {low:g} to {high:g}",
            expected=f"grey values in [0, 1], to keep them as {precision}",
            remedy="Preprocess the scan, which normalises it, or keep images as float32.",
        )
    if precision == "uint8":
        return np.rint(image * np.float32(255)).clip(0, 255).astype(np.uint8)
    return np.ascontiguousarray(image, dtype=PRECISIONS[precision])


def require_precision(precision: str) -> None:
    """Refuse with InputError a precision that images cannot be kept in."""
    if precision not in PRECISIONS:
        expected, remedy = f"one of {', '.join(PRECISIONS)}", suggestion(precision, PRECISIONS)
        raise InputError("precision of the images", found=f"'{precision}'", expected=expected, remedy=remedy)


def pack_scans(folder: str | Path, scans: Sequence[Scan], *, precision: str = "float16", threads: int = 1) -> Pack:
    """Pack preprocessed scans of one grid into a folder, and open it.

    Writes ``images.npy``, ``labels.npy`` (where scans have label maps) and, last, ``pack.json``, without which the
    folder is no pack. A packing that is killed leaves none; the next one clears up after it. One packing at a time
    may write to a folder; those who read the one before are not disturbed.

    Parameters
    ----------
    scans
        Their images are in [0, 1]; their names differ.
    precision
        ``"float16"``, ``"uint8"`` or ``"float32"``; see :func:`quantise`.
    threads
        Scans read at the same time; two more are in memory.

    Raises
    ------
    InputError
        A file cannot be read or packed, or lies on another grid than the first one; the file is named.
    DmirError
        The disk is full.
    """
    require_precision(precision)
    folder, start = Path(folder), time.monotonic()
    _require_names(scans)
    first = read_image(scans[0].image)
    with_labels = [scan.name for scan in scans if scan.labels is not None]
    room = first.data.size * (len(scans) * np.dtype(PRECISIONS[precision]).itemsize + len(with_labels))

    def read(scan: Scan) -> PackedScan:
        return _read_scan(scan, first.grid, scans[0].image, precision)

    with _errors_of_writing(folder, room):
        folder.mkdir(parents=True, exist_ok=True)
        _clear(folder)
        if (free := shutil.disk_usage(folder).free) < room:
            raise OSError(None, f"{free / 1e9:.2f} GB are free")
        images, labels = (folder / name for name in (IMAGES, LABELS))
        with atomic_path(images) as a, atomic_path(labels) as b, _in_order(read, scans, threads) as packed:
            sources = _write(a, b, packed, (len(scans), len(with_labels)), first.shape, precision)
            (folder / RECORD).unlink(missing_ok=True)  # what it describes is replaced now
        if not with_labels:
            labels.unlink()
        sizes = {path.name: path.stat().st_size for path in (images, labels) if path.is_file()}
        record = {
            "format": FORMAT,
            "version": VERSION,
            "precision": precision,
            "grid": {"shape": list(first.shape), "affine": np.asarray(first.affine).tolist()},
            "bytes": sizes,
            "names": [scan.name for scan in scans],
            "names_with_labels": with_labels,
            "sources": sources,
        }
        with atomic_path(folder / RECORD) as temporary:
            temporary.write_text(json.dumps(record, indent=1) + "\n", encoding="utf-8")
    pack = open_pack(folder)
    seconds, gigabytes = time.monotonic() - start, sum(sizes.values()) / 1e9
    log.info("%d scans packed in %.1f s: %s (%.2f GB)", len(scans), seconds, folder, gigabytes)
    return pack


@dataclass(frozen=True)
class PackedScan:
    """What is written of a scan: its image, its label map (int32) and what is noted of their files."""

    image: np.ndarray
    labels: np.ndarray | None
    sources: dict[str, dict[str, Any] | None]


def _require_names(scans: Sequence[Scan]) -> None:
    if not scans:
        raise InputError("scans to pack", found="none", expected="at least 1")
    names = [scan.name for scan in scans]
    twice = sorted({name for name in names if names.count(name) > 1})
    if twice:
        raise InputError("scans to pack", found=f"'{twice[0]}' more than once", expected="every name once")


def _clear(folder: Path) -> None:
    """Remove what a killed packing left behind: it may be as large as the pack."""
    for name in (IMAGES, LABELS, RECORD):
        for path in folder.glob(f".writing-*-{name}"):
            path.unlink()


def _read_scan(scan: Scan, grid: Grid, first: Path, precision: str) -> PackedScan:
    # described before it is read: a file that changes in between is then found to be stale, not taken for fresh
    sources = [None if path is None else SourceFile.of(path) for path in (scan.image, scan.labels)]
    image = read_image(scan.image)
    require_same_grid(grid, image, first, scan.image)
    labels = None
    if scan.labels is not None:
        volume = read_labels(scan.labels)
        require_same_grid(grid, volume, first, scan.labels)
        labels = volume.data
        if labels.min() < 0:
            found = f"the id {labels.min()}"
            raise InputError(scan.labels, found=found, expected="ids of structures, which are not negative")
    noted = {key: asdict(source) if source else None for key, source in zip(("image", "labels"), sources, strict=True)}
    return PackedScan(quantise(image.data, precision, scan.image), labels, noted)


@contextlib.contextmanager
def _in_order(function: Callable[[Item], Result], items: Iterable[Item], threads: int) -> Iterator[Iterator[Result]]:
    """Yield an iterator over the function's results, in order, computed by threads that run at most as many ahead."""

    def results() -> Iterator[Result]:
        waiting: deque[Future[Result]] = deque(pool.submit(function, item) for item in islice(coming, threads + 1))
        while waiting:
            result = waiting.popleft().result()
            waiting.extend(pool.submit(function, item) for item in islice(coming, 1))
            yield result

    coming, threads = iter(items), max(1, threads)
    pool = ThreadPoolExecutor(max_workers=threads)
    try:
        yield results()
    finally:
        pool.shutdown(cancel_futures=True)


def _write(
    images: Path,
    labels: Path,
    scans: Iterable[PackedScan],
    counts: tuple[int, int],
    shape: tuple[int, int, int],
    precision: str,
) -> list[dict[str, Any]]:
    """Write the arrays of so many images and label maps volume by volume; return what is noted of their files.

    Written, not mapped: on a full disk a write fails, where a map would end the process by SIGBUS.
    """
    sources, label_type = [], np.dtype(np.uint8)
    with images.open("wb") as image_file, labels.open("w+b") as label_file:
        _write_header(image_file, (counts[0], *shape), np.dtype(PRECISIONS[precision]))
        _write_header(label_file, (counts[1], *shape), label_type)
        done = 0
        for scan in scans:
            image_file.write(scan.image.data)
            sources.append(scan.sources)
            if scan.labels is None:
                continue
            needed = np.min_scalar_type(int(scan.labels.max()))
            if needed.itemsize > label_type.itemsize:
                _widen(label_file, done, (counts[1], *shape), (label_type, needed))
                label_type = needed
            label_file.write(scan.labels.astype(label_type).data)
            done += 1
        for file in (image_file, label_file):
            file.flush()
            os.fsync(file.fileno())  # else, after a power cut, the record could stand beside files of zeros
    return sources


def _write_header(file: BinaryIO, shape: tuple[int, ...], kind: np.dtype) -> None:
    header = {"descr": np.lib.format.dtype_to_descr(kind), "fortran_order": False, "shape": shape}
    np.lib.format.write_array_header_1_0(file, header)


def _widen(file: BinaryIO, done: int, shape: tuple[int, ...], kinds: tuple[np.dtype, np.dtype]) -> None:
    """Rewrite the label maps that are already in a file in a wider type; from the last one, as each one grows."""
    narrow, wide = kinds
    voxels = int(np.prod(shape[1:]))
    file.seek(0)
    np.lib.format.read_magic(file)
    np.lib.format.read_array_header_1_0(file)
    start = file.tell()
    file.seek(0)
    _write_header(file, shape, wide)  # as long as before: u1, u2 and u4 are written alike
    for row in reversed(range(done)):
        file.seek(start + row * voxels * narrow.itemsize)
        volume = np.frombuffer(file.read(voxels * narrow.itemsize), narrow)
        file.seek(start + row * voxels * wide.itemsize)
        file.write(volume.astype(wide).data)
    file.seek(start + done * voxels * wide.itemsize)


@contextlib.contextmanager
def _errors_of_writing(folder: Path, room: int) -> Iterator[None]:
    try:
        yield
    except (OSError, StorageError) as error:
        cause = error.__cause__ if isinstance(error, StorageError) else error
        reason = cause.strerror if isinstance(cause, OSError) and cause.strerror else error
        raise DmirError(
            f"{folder}: the scans cannot be packed there ({reason}). The pack takes"
            f" {room / 1e9:.2f} GB; nothing of it was left behind. Make room, or choose another folder."
        ) from None


# --- opening ---


def open_pack(folder: str | Path) -> Pack:
    """Open a pack; nothing but its record is read.

    Raises
    ------
    InputError
        It is none, of another version, or one of its files is not the one that was written.
    """
    folder = Path(folder)
    record = _read_record(folder / RECORD)
    try:
        shape = tuple(int(n) for n in record["grid"]["shape"])
        grid = Grid((shape[0], shape[1], shape[2]), np.array(record["grid"]["affine"], dtype=np.float64).reshape(4, 4))
        names, with_labels = list(map(str, record["names"])), list(map(str, record["names_with_labels"]))
        precision = str(record["precision"])
        image_type, sizes = np.dtype(PRECISIONS[precision]), dict(record["bytes"])
        sources = {
            name: (SourceFile(**files["image"]), SourceFile(**files["labels"]) if files["labels"] else None)
            for name, files in zip(names, record["sources"], strict=True)
        }
    except (KeyError, TypeError, ValueError, IndexError, AttributeError) as error:
        raise _no_record(folder / RECORD, f"a record that is incomplete ({type(error).__name__}: {error})") from None
    images = _map(folder / IMAGES, sizes.get(IMAGES), (len(names), *grid.shape), [image_type])
    labels = None
    if with_labels:
        kinds = [np.dtype(kind) for kind in (np.uint8, np.uint16, np.uint32)]
        labels = _map(folder / LABELS, sizes.get(LABELS), (len(with_labels), *grid.shape), kinds)
    rows = {name: row for row, name in enumerate(with_labels)}
    descriptor = os.open(folder / IMAGES, os.O_RDONLY | os.O_CLOEXEC)
    pack = Pack(folder, names, grid, precision, images, labels, rows, sources, descriptor)
    weakref.finalize(pack, os.close, descriptor)
    return pack


def _read_record(path: Path) -> dict[str, Any]:
    if not path.is_file():
        raise _no_record(path, "no such file")
    try:
        record = json.loads(path.read_text(encoding="utf-8"))
        kind, version = record["format"], record["version"]
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise _no_record(path, f"a file that is none ({type(error).__name__})") from None
    if kind != FORMAT:
        raise _no_record(path, f"the format {kind!r}")
    if version != VERSION:
        raise InputError(path, found=f"version {version}", expected=f"version {VERSION} of the format", remedy=AGAIN)
    return record


def _no_record(path: Path, found: str) -> InputError:
    expected = "the record of a pack of scans, which is written last"
    return damaged(path, found=found, expected=expected, remedy=f"The packing may have been stopped. {AGAIN}")


def _map(path: Path, size: Any, shape: tuple[int, ...], kinds: Sequence[np.dtype]) -> np.memmap:
    """Map an array, or refuse it with InputError where it is not what the record says."""
    if not path.is_file():
        raise InputError(path, found="no such file", expected="the array of a pack", remedy=AGAIN)
    if (actual := path.stat().st_size) != size:
        remedy = f"The file was cut, or replaced. {AGAIN}"
        raise damaged(path, found=f"{actual} bytes", expected=f"{size} bytes", remedy=remedy)
    try:
        array = np.load(path, mmap_mode="r", allow_pickle=False)
    except (OSError, ValueError, EOFError) as error:
        raise damaged(path, found=f"no array ({error})", expected="an array in numpy's format", remedy=AGAIN) from None
    if array.shape != shape or array.dtype not in kinds or not array.flags.c_contiguous:
        found = f"{array.dtype} of shape {array.shape}"
        raise damaged(path, found=found, expected=f"{kinds[0]} of shape {shape}, in C order", remedy=AGAIN)
    return array
