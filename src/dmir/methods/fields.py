"""Fields that were registered elsewhere: their pairs are scored like all others, and nothing is registered."""

from __future__ import annotations

import glob
import math
import warnings
from collections.abc import Mapping, Sequence
from pathlib import Path
from types import MappingProxyType
from typing import Any, Literal

import numpy as np
from pydantic import field_validator

from dmir.doubts import Doubt
from dmir.errors import DmirError, InputError, suggestion
from dmir.methods.command import CONVENTIONS, read_displacement, read_transform
from dmir.settings import MethodSettings, PairCost
from dmir.volumes import Volume, describe_grid

TITLE = "Fields from elsewhere"
READ_VOXEL = 1e-6  # seconds of a field's voxel that is read


class Settings(MethodSettings):
    """Fields that were registered elsewhere, of the preprocessed images: they are scored like all others."""

    folder: str
    """Where they lie, from the working directory."""
    pattern: str = "{moving}__{fixed}.nii.gz"
    """Name of a pair's file in it: `{moving}` and `{fixed}` stand for scans, `{cohort}` for their cohort, `*` for
    anything, as in `shard*/{moving}__{fixed}.nii`."""
    field: str | None = None
    """Their convention, a name of `dmir field info`; none: what the files prove."""
    grid: Literal["fixed", "own"] = "fixed"
    """`fixed`: on that of the fixed image. `own`: on one that the file's header places in the same world, such as that
    of the same images in coarser voxels; the field is brought to the fixed image's, linearly in mm."""

    @field_validator("pattern")
    @classmethod
    def _of_pairs(cls, value: str) -> str:
        if "{moving}" not in value:
            raise ValueError(f"found '{value}'; expected {{moving}} in it, and {{fixed}} where there are several")
        if Path(value).is_absolute() or "**" in value:
            raise ValueError(f"found '{value}'; expected a name within the folder, and no ** in it")
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
    grid: str = "fixed",
    names: Mapping[str, str] = MappingProxyType({}),
    measured: dict[str, Any] | None = None,
) -> np.ndarray:
    """Return the field of a pair that lies in a folder.

    Parameters
    ----------
    folder, pattern, field, grid
        See :class:`Settings`.
    names
        What stands for the places in the pattern: ``moving``, ``fixed``, ``cohort``.
    measured
        Gets seconds and memory of NaN: nobody knows here what it took.

    Raises
    ------
    DmirError
        There is no such file, or more than one; or it is no field on the fixed grid, or ends within the fixed brain.
    """
    path = _file_of(folder, pattern, names)
    if measured is not None:
        measured |= {"seconds": math.nan, "peak_memory_mb": math.nan, "device": "elsewhere"}
    if grid == "own":
        return _brought(path, field, fixed)
    return read_displacement(path, field, fixed.grid, moving.grid, str(path))


def _file_of(folder: str, pattern: str, names: Mapping[str, str]) -> Path:
    """Return the one file of a pair."""
    name, asked = pattern, glob.escape(pattern).replace("[*]", "*")
    for place, value in names.items():
        name, asked = name.replace(f"{{{place}}}", value), asked.replace(f"{{{place}}}", glob.escape(value))
    files = sorted(path for path in Path(folder).glob(asked) if path.is_file())
    if len(files) > 1:
        raise DmirError(f"found {len(files)} fields {Path(folder, name)}; expected one ({files[0]}, {files[1]})")
    if not files:
        raise DmirError(f"found no field {Path(folder, name)}")
    return files[0]


def _brought(path: Path, convention: str | None, fixed: Volume) -> np.ndarray:
    """Return a field of another grid on the fixed image's; it must reach every voxel of the brain."""
    transform = read_transform(path, convention, str(path))
    own = transform.grid
    if own is None:
        raise InputError(str(path), found="no field", expected="a displacement field on a grid of its own")
    brain = np.argwhere(fixed.data > 0)
    to_own = np.linalg.inv(own.affine) @ fixed.affine
    places = brain @ to_own[:3, :3].T + to_own[:3, 3]
    # half a voxel beyond the last centre is still within that voxel
    beyond = int(((places < -0.5 - 1e-3) | (places > np.array(own.shape) - 0.5 + 1e-3)).any(axis=1).sum())
    if beyond:
        lost = f"{beyond:,} of the fixed brain's {len(brain):,} voxels"
        raise InputError(
            str(path),
            found=f"a field ({describe_grid(own)}) beyond which {lost} lie",
            expected="one that holds the brain, in the world of the preprocessed images",
        )
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", Doubt)  # of background beyond it, where its border goes on
        return np.asarray(transform.on(fixed.grid).displacement, dtype=np.float32)


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
