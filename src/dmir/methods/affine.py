"""No deformation: what the affine alignment of the preprocessing alone gives, the floor of every comparison."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from types import MappingProxyType
from typing import Any

import numpy as np

from dmir.settings import MethodSettings, PairCost
from dmir.volumes import Volume

TITLE = "Affine only"
COLOUR, MARKER = "#b3b3b3", "X"


class Settings(MethodSettings):
    """No deformation: what affine preprocessing alone gives."""


def register(moving: Volume, fixed: Volume) -> np.ndarray:
    """Return the zero field, float32 (3, D, H, W), on the fixed grid."""
    return np.zeros((3, *fixed.shape), dtype=np.float32)


def parts(parameters: Mapping[str, Any]) -> list[dict[str, Any]]:
    """Return what is worth measuring of a pair: nothing."""
    return []


def cost(
    parameters: Mapping[str, Any],
    shape: Sequence[int],
    spacing: Sequence[float],
    measured: Mapping[str, float] = MappingProxyType({}),
) -> PairCost:
    """Return what a pair costs: nothing."""
    return PairCost(0.0)
