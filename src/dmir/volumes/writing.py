"""Volumes written to files, and files that are there in whole or not at all."""

from __future__ import annotations

import contextlib
import gzip
import os
from collections.abc import Iterator
from pathlib import Path

import nibabel as nib
import numpy as np

from dmir.storage import temporary_beside, told_as_storage
from dmir.volumes.grids import Volume


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
