"""The types that images are kept in, and how they are rounded to them."""

from __future__ import annotations

from pathlib import Path

import numpy as np

from dmir.errors import InputError, suggestion

PRECISIONS: dict[str, type[np.generic]] = {"float16": np.float16, "uint8": np.uint8, "float32": np.float32}
ROUNDING = 1 / 510  # half a step of uint8


def quantise(image: np.ndarray, precision: str, where: str | Path) -> np.ndarray:
    """Return a float32 image in [0, 1] in the type in which it is kept.

    ``float16`` rounds: within [0, 1] by at most 2^-12 = 0.00024, half the distance of its numbers below 1. ``uint8``
    is round(255 x), at most 1/510 = 0.00196 away. ``float32`` is the image itself.

    Raises
    ------
    InputError
        The type cannot hold the values; the file ``where`` is named.
    """
    low, high = float(image.min()), float(image.max())
    limits = {"uint8": (-ROUNDING, 1 + ROUNDING), "float16": (-65504.0, 65504.0)}.get(precision)
    if limits and not limits[0] <= low <= high <= limits[1]:
        raise InputError(
            where,
            found=f"values from {low:g} to {high:g}",
            expected=f"grey values in [0, 1], to keep them as {precision}",
            remedy="Preprocess the scan, which normalises it, or keep images as float32.",
        )
    if precision == "uint8":
        return np.rint(image * np.float32(255)).clip(0, 255).astype(np.uint8)
    return np.ascontiguousarray(image, dtype=PRECISIONS[precision])


def require_precision(precision: str) -> None:
    """Refuse with InputError a precision that images cannot be kept in."""
    if precision not in PRECISIONS:
        expected, remedy = f"one of {', '.join(PRECISIONS)}", suggestion(precision, PRECISIONS)
        raise InputError("precision of the images", found=f"'{precision}'", expected=expected, remedy=remedy)
