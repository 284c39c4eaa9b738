"""Scans read, checked and written into a pack."""

from __future__ import annotations

import contextlib
import json
import logging
import os
import shutil
import time
from collections import deque
from collections.abc import Callable, Iterable, Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import asdict, dataclass
from itertools import islice
from pathlib import Path
from typing import Any, BinaryIO, TypeVar

import numpy as np

from dmir.errors import DmirError, InputError, StorageError
from dmir.training.pack.opening import FORMAT, IMAGES, LABELS, RECORD, VERSION, Pack, Scan, SourceFile, open_pack
from dmir.training.pack.precision import PRECISIONS, quantise, require_precision
from dmir.volumes import Grid, atomic_path, read_image, read_labels, require_same_grid

log = logging.getLogger(__name__)

Item = TypeVar("Item")
Result = TypeVar("Result")


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
