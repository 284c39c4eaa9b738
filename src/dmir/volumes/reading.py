"""Images, label maps and grids read from files, and checked."""

from __future__ import annotations

import warnings
from pathlib import Path

import numpy as np

from dmir.doubts import doubt
from dmir.errors import InputError
from dmir.volumes.grids import Grid, Volume, with_orientation
from dmir.volumes.stored import stored_array

FLOAT32_WHOLE = 2**24  # float32 has all whole numbers up to this one


def load_array(path: Path, key: str, orientation: str | None = None) -> tuple[np.ndarray, np.ndarray]:
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
    raw, affine = load_array(path, key, orientation)
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
    raw, affine = load_array(path, key, orientation)
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
