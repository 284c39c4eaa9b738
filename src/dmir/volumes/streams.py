"""Files, plain or compressed, of which headers can read only so much, whatever they claim."""

from __future__ import annotations

import gzip
import io
from pathlib import Path
from typing import Any

BESIDE_VOXELS = 2**22  # bytes of a file that may be anything else: its header with extensions, and what follows them
CHUNK = 2**20  # bytes decompressed at a time
GZIP = b"\x1f\x8b"


class PlainStream(io.BufferedReader):
    """A file of which headers can read only so much, whatever length they claim for their parts."""

    def __init__(self, path: Path) -> None:
        super().__init__(io.FileIO(path))
        self._left = BESIDE_VOXELS

    def read(self, size: int | None = -1, /) -> bytes:
        self._left = _less(self._left, size)
        return super().read(size)


class CompressedStream(gzip.GzipFile):
    """As :class:`PlainStream`; voxels are decompressed into their place, without a second copy of them all."""

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


def open_stream(path: Path) -> PlainStream | CompressedStream:
    """Open a file by its content: names do not tell whether it is compressed."""
    with path.open("rb") as file:
        compressed = file.read(len(GZIP)) == GZIP
    return CompressedStream(path) if compressed else PlainStream(path)
