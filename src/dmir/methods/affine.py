"""No deformation: what the affine alignment of the preprocessing alone gives, the floor of every comparison."""

from __future__ import annotations

import numpy as np

from dmir.volumes import Volume

LIBRARIES = ()


def register(moving: Volume, fixed: Volume) -> np.ndarray:
    """Return the zero field, float32 (3, D, H, W), on the fixed grid."""
    return np.zeros((3, *fixed.shape), dtype=np.float32)
