"""Packs as they are opened: their scans, mapped read-only, and the files that these were read from."""

from __future__ import annotations

import hashlib
import json
import logging
import os
import weakref
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np

from dmir.errors import InputError, damaged, suggestion
from dmir.training.pack.precision import PRECISIONS
from dmir.volumes import Grid

log = logging.getLogger(__name__)

FORMAT, VERSION = "dmir pack of scans", 1
IMAGES, LABELS, RECORD = "images.npy", "labels.npy", "pack.json"
AGAIN = "Pack the scans again."


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
