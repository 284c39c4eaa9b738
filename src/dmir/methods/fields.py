"""Fields that were registered elsewhere: their pairs are scored like all others, and nothing is registered."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from pathlib import Path
from types import MappingProxyType
from typing import Any

import numpy as np
from pydantic import field_validator

from dmir.errors import DmirError, suggestion
from dmir.methods.command import CONVENTIONS, read_displacement
from dmir.settings import MethodSettings, PairCost
from dmir.volumes import Volume

TITLE = "Fields from elsewhere"
READ_VOXEL = 1e-6  # seconds of a field's voxel that is read


class Settings(MethodSettings):
    """Fields that were registered elsewhere, of the preprocessed images: they are scored like all others."""

    folder: str
    """Where they lie, from the working directory."""
    pattern: str = "{moving}__{fixed}.nii.gz"
    """Name of a pair's file in it: `{moving}` and `{fixed}` stand for scans, `{cohort}` for their cohort."""
    field: str | None = None
    """Their convention, a name of `dmir field info`; none: what the files prove."""

    @field_validator("pattern")
    @classmethod
    def _of_pairs(cls, value: str) -> str:
        if "{moving}" not in value:
            raise ValueError(f"found '{value}'; expected {{moving}} in it, and {{fixed}} where there are several")
        return value

    @field_validator("field")
    @classmethod
    def _known_convention(cls, value: str | None) -> str | None:
        if value is not None and value not in CONVENTIONS:
            raise ValueError(f"found '{value}'; expected a convention. {suggestion(value, CONVENTIONS)}")
        return value


def register(
    moving: Volume,
    fixed: Volume,
    *,
    folder: str,
    pattern: str = "{moving}__{fixed}.nii.gz",
    field: str | None = None,
    names: Mapping[str, str] = MappingProxyType({}),
    measured: dict[str, Any] | None = None,
) -> np.ndarray:
    """Return the field of a pair that lies in a folder.

    Parameters
    ----------
    folder, pattern, field
        See :class:`Settings`.
    names
        What stands for the places in the pattern: ``moving``, ``fixed``, ``cohort``.
    measured
        Gets seconds and memory of NaN: nobody knows here what it took.

    Raises
    ------
    DmirError
        There is no such file, or it is no field on the fixed grid.
    """
    name = pattern
    for place, value in names.items():
        name = name.replace(f"{{{place}}}", value)
    path = Path(folder, name)
    if not path.is_file():
        raise DmirError(f"found no field {path}")
    if measured is not None:
        measured |= {"seconds": math.nan, "peak_memory_mb": math.nan, "device": "elsewhere"}
    return read_displacement(path, field, fixed.grid, moving.grid, str(path))


def cost(
    parameters: Mapping[str, Any],
    shape: Sequence[int],
    spacing: Sequence[float],
    measured: Mapping[str, float] = MappingProxyType({}),
) -> PairCost:
    """Return what reading a field costs."""
    return PairCost(READ_VOXEL * math.prod(shape))


def parts(parameters: Mapping[str, Any]) -> list[dict[str, Any]]:
    """Return what is measured for a plan: nothing."""
    return []


def state(parameters: Mapping[str, Any]) -> str:
    """Return a hash of the names, sizes and times of the files in the folder."""
    from dmir.provenance import value_hash

    folder = Path(parameters["folder"])
    files = sorted(path for path in folder.rglob("*") if path.is_file()) if folder.is_dir() else []
    stats = ((path, path.stat()) for path in files)
    return value_hash([[path.relative_to(folder).as_posix(), stat.st_size, stat.st_mtime_ns] for path, stat in stats])
