"""Boxes of voxels that hold what is looked at, and nothing that costs time besides."""

from __future__ import annotations

import numpy as np

Box = tuple[slice, slice, slice]


def bounding_box(occupied: np.ndarray) -> Box:
    """Return the smallest box of an array (D, H, W) that holds all that is not 0; there must be something."""
    lines = np.asarray(occupied.any(axis=2))
    found = [np.flatnonzero(x) for x in (lines.any(axis=1), lines.any(axis=0), occupied.any(axis=(0, 1)))]
    first, second, third = (slice(int(i[0]), int(i[-1]) + 1) for i in found)
    return first, second, third
