"""Where a volume lies, in the words of ITK, on which ANTs and elastix are built."""

from __future__ import annotations

from typing import NamedTuple

import numpy as np

from dmir.errors import InputError
from dmir.volumes import Volume

LPS = np.diag([-1.0, -1.0, 1.0])  # RAS -> LPS, its own inverse


class Geometry(NamedTuple):
    """Origin (mm, LPS), spacing (mm) and direction cosines (3x3, LPS) of a volume."""

    origin: list[float]
    spacing: list[float]
    direction: np.ndarray


def geometry(volume: Volume, name: str) -> Geometry:
    """Return origin, spacing and direction of a volume as ITK wants them.

    Raises
    ------
    InputError
        The axes are not at right angles: ITK has no word for such a grid.
    """
    spacing = volume.spacing
    direction = LPS @ np.asarray(volume.affine, dtype=np.float64)[:3, :3] / spacing
    if not np.allclose(direction.T @ direction, np.eye(3), atol=1e-3):
        raise InputError(
            name,
            found="a grid whose axes are not at right angles",
            expected="an affine without shear, which is all that ANTs and elastix know",
            remedy="Resample it onto a grid with right angles.",
        )
    return Geometry((LPS @ volume.affine[:3, 3]).tolist(), spacing.tolist(), direction)
