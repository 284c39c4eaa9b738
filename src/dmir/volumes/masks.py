"""Masks: read from files, and what counts as inside them."""

from __future__ import annotations

from pathlib import Path

import numpy as np

from dmir.doubts import doubt
from dmir.errors import InputError
from dmir.volumes.grids import Volume
from dmir.volumes.reading import load_array


def read_mask(path: str | Path, key: str = "mask", orientation: str | None = None) -> Volume:
    """Read a mask as bool (D, H, W), see :func:`decide_mask`. An empty mask is refused with InputError."""
    path = Path(path)
    raw, affine = load_array(path, key, orientation)
    return Volume(decide_mask(raw, f"{key}: {path}"), affine)


def decide_mask(values: np.ndarray, where: str) -> np.ndarray:
    """Return what counts as inside a mask, bool (D, H, W): what is above half of its range.

    A binary mask has two values, whatever scaling or rounding made of them; a probability lies within [0, 1]. Anything
    else is told: soft masks on another scale are decided at half too; of several whole numbers, as label maps and
    stripped images have, all that are not 0 are inside.

    Parameters
    ----------
    values
        Of any type, (D, H, W).
    where
        The file, for messages.

    Raises
    ------
    InputError
        Nothing is inside, or a value is NaN or infinite.
    """
    if values.dtype == bool:
        inside = values
    else:
        low, high = float(values.min()), float(values.max())
        if not np.isfinite([low, high]).all():
            raise InputError(
                where,
                found="values that are NaN or infinite",
                expected="a mask: 1 inside, 0 outside",
                remedy="Replace them by 0 and save the mask again.",
            )
        inside = values > (low + high) / 2 if high > low else values > 0
        if not _is_binary_or_probability(values, low, high):
            inside = _decide_other(values, low, high, inside, where)
    if not inside.any():
        raise InputError(
            where,
            found="an empty mask (no voxel above 0)",
            expected="a mask that covers the brain",
            remedy="Make the mask again, or leave it out and choose another skull_strip.",
        )
    return np.ascontiguousarray(inside)


def _is_binary_or_probability(values: np.ndarray, low: float, high: float) -> bool:
    near = 0.01 * (high - low)
    if -near <= low and high <= 1 + near:
        return True
    return bool(((values <= low + near) | (values >= high - near)).all())


def _decide_other(values: np.ndarray, low: float, high: float, half: np.ndarray, where: str) -> np.ndarray:
    """Return what is inside a mask that is neither binary nor a probability, and tell how that was decided."""
    scale = high in (100, 255) and (values[values > 0] >= 0.95 * high).mean() > 0.3  # a soft mask in percent or bytes
    several = low == 0 and not scale and bool((values == np.round(values)).all())
    inside = values > 0 if several else half
    by = "all that is not 0 counts as inside" if several else f"what is above {(low + high) / 2:.4g} counts as inside"
    if not (several and Path(where).name.startswith("brainmask.")):  # FreeSurfer's mask is a stripped image
        kind = "as a label map or a stripped image has them" if several else "neither binary nor a probability"
        doubt(
            where,
            found=f"more than two values from {low:.4g} to {high:.4g}, {kind}",
            done=f"{by}, {100 * inside.mean():.3g} % of the voxels",
        )
    return inside
