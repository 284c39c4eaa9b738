"""ANTs, imported such that its results repeat, and images as it wants them."""

from __future__ import annotations

import os
import sys
import warnings
from functools import lru_cache
from types import ModuleType
from typing import Any

import numpy as np

from dmir.volumes import Volume

FLIP = np.diag([-1.0, -1.0, 1.0, 1.0])  # RAS <-> LPS
THREADS = "ITK_GLOBAL_DEFAULT_NUMBER_OF_THREADS"


@lru_cache(maxsize=1)
def single_threaded_ants() -> ModuleType:
    """Import ANTs such that it uses one thread: its sums, and so its matrices, depend on their number.

    ITK reads the number once, when its first filter runs: that is here, unless somebody ran one before.
    """
    before = os.environ.get(THREADS)
    if "ants" in sys.modules and before != "1":
        warnings.warn(
            f"ANTs was imported before with {THREADS}={before or ''!r}; if it was used already, the affine is "
            "reproducible only with 1. Set it before the first import.",
            stacklevel=3,
        )
    os.environ[THREADS] = "1"
    try:
        import ants

        ants.smooth_image(ants.from_numpy(np.zeros((4, 4, 4), dtype=np.float32)), 1.0)  # now ITK has read it
    finally:
        if before is None:
            del os.environ[THREADS]
        else:
            os.environ[THREADS] = before
    return ants


def to_ants(volume: Volume) -> Any:
    """Return a volume as an ``ANTsImage`` in float32, in ITK's LPS world."""
    lps = FLIP @ volume.affine
    spacing = volume.spacing
    return single_threaded_ants().from_numpy(
        volume.data.astype(np.float32),
        origin=lps[:3, 3].tolist(),
        spacing=spacing.tolist(),
        direction=lps[:3, :3] / spacing,
    )
