"""From the cohort's grid back to a scan's own space: warped label maps, segmentations, images."""

from __future__ import annotations

from pathlib import Path

import numpy as np

from dmir.errors import InputError
from dmir.preprocess.affine import read_affine
from dmir.preprocess.resample import resample
from dmir.volumes import (
    Grid,
    Volume,
    read_image,
    read_labels,
    require_same_grid,
    stored_array,
    write_volume,
)


def to_native(volume: Volume, transform: np.ndarray, grid: Grid, interpolation: str = "nearest") -> Volume:
    """Bring a volume that lies in the atlas's world to the grid of a scan.

    Parameters
    ----------
    volume
        Data (D, H, W), as a rule on the cohort's grid.
    transform
        4x4, atlas world -> scan world (RAS mm), with which the scan was resampled; here its inverse is used.
    grid
        The scan's own.
    interpolation
        ``"nearest"`` or ``"generic_label"`` for label maps, ``"linear"`` for images; see
        :func:`dmir.preprocess.resample`.

    Returns
    -------
    Volume
        On ``grid``; what lies beyond the cohort's grid is 0.
    """
    return resample(volume, grid, np.linalg.inv(transform), interpolation=interpolation)


def native_files(
    out: str | Path,
    *,
    preprocessed: str | Path,
    volume: str | Path,
    like: str | Path,
    interpolation: str = "nearest",
    orientation: str | None = None,
) -> None:
    """Bring a file on the cohort's grid to a scan's own space.

    Parameters
    ----------
    out
        The file to write, on the grid of ``like``.
    preprocessed
        Folder of the preprocessed scan, which holds its ``image.nii.gz`` and ``affine.mat``.
    volume
        On the grid of that image. Whole numbers, unless the interpolation is ``"linear"``.
    like
        The scan as it came.
    interpolation
        As in :func:`to_native`.
    orientation
        Axis codes of the scan's array where its header is wrong, as the cohort was preprocessed with; the header
        of the result is that of ``like`` all the same.

    Raises
    ------
    InputError
        A file is unusable, the volume does not lie on the cohort's grid, or ``out`` is no NIfTI name.
    """
    if not str(out).endswith((".nii", ".nii.gz")):
        raise InputError("out", found=str(out), expected="a name that ends in .nii.gz or .nii")
    preprocessed = Path(preprocessed)
    transform = read_affine(preprocessed / "affine.mat")
    reference = preprocessed / "image.nii.gz"
    source = read_image(volume, "volume") if interpolation == "linear" else read_labels(volume, "volume")
    require_same_grid(read_image(reference, "preprocessed image"), source, reference, f"volume: {volume}")
    with stored_array(Path(like), "like", orientation) as stored:
        header = stored.affine
    scan = read_image(like, "like", orientation)
    write_volume(out, Volume(to_native(source, transform, scan.grid, interpolation).data, header))
