"""Fields that were registered elsewhere: their pairs are scored like all others, and nothing is registered."""

from __future__ import annotations

import glob
import math
import warnings
from collections.abc import Mapping, Sequence
from pathlib import Path
from types import MappingProxyType
from typing import TYPE_CHECKING, Any

import numpy as np
from pydantic import field_validator

from dmir.doubts import Doubt
from dmir.errors import DmirError, InputError, suggestion
from dmir.methods.command import CONVENTIONS, read_displacement, read_transform
from dmir.settings import MethodSettings, PairCost
from dmir.volumes import Volume

if TYPE_CHECKING:
    from dmir.transforms import Transform

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
    preprocessed: str | None = None
    """The preprocessed images that they are of, where those are another run's: `results/other/preprocessed`. Fields
    lie on that run's grid then, and its affine alignments are reckoned with. None: on the grid of the fixed image."""

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
    preprocessed: str | None = None,
    names: Mapping[str, str] = MappingProxyType({}),
    paths: Mapping[str, str] = MappingProxyType({}),
    measured: dict[str, Any] | None = None,
) -> np.ndarray:
    """Return the field of a pair that lies in a folder.

    Parameters
    ----------
    folder, pattern, field, preprocessed
        See :class:`Settings`.
    names
        What stands for the places in the pattern: ``moving``, ``fixed``, ``cohort``.
    paths
        The files of the images, beside which their alignments lie: ``moving``, ``fixed``.
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
    if preprocessed is not None:
        return _brought(_of_another_run(path, field, Path(preprocessed), names, paths), fixed, path)
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


def _of_another_run(
    path: Path, convention: str | None, preprocessed: Path, names: Mapping[str, str], paths: Mapping[str, str]
) -> Transform:
    """Return a field between another run's images as a transform between these images of the same scans.

    Each run aligns a scan by an affine of its own, and two differ by tenths of a millimetre where the voxels do.
    """
    from dmir.preprocess import read_affine
    from dmir.transforms import Affine, Transform

    transform = read_transform(path, convention, str(path))
    ours = {side: Path(image).parent for side, image in paths.items()}
    theirs = {side: preprocessed / names["cohort"] / names[side] for side in ours}
    # from the preprocessed world to the scan's own
    from_ours, from_theirs = (
        {side: read_affine(folder / "affine.mat") for side, folder in folders.items()} for folders in (ours, theirs)
    )
    before = Affine(np.linalg.inv(from_theirs["fixed"]) @ from_ours["fixed"])
    after = Affine(np.linalg.inv(from_ours["moving"]) @ from_theirs["moving"])
    return Transform((before, *transform.steps, after))


def _brought(transform: Transform, fixed: Volume, path: Path) -> np.ndarray:
    """Return a transform as a field on the fixed image's grid; its own fields must hold the brain."""
    brain = np.argwhere(fixed.data > 0) @ fixed.affine[:3, :3].T + fixed.affine[:3, 3]
    beyond = int((~transform.within(brain)).sum())
    if transform.grid is None or beyond:
        lost = f"a field beyond which {beyond:,} of the fixed brain's {len(brain):,} voxels lie"
        expected = "a field of that run's preprocessed images, which holds the brain"
        raise InputError(str(path), found=lost if beyond else "an affine alone", expected=expected)
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
    """Return a hash of the names, sizes and times of the files in the folder, and of the alignments beside them."""
    from dmir.provenance import value_hash

    places = [(Path(parameters["folder"]), "**/*")]
    if parameters.get("preprocessed") is not None:
        places.append((Path(parameters["preprocessed"]), "*/*/affine.mat"))
    files = [(folder, path) for folder, pattern in places for path in sorted(folder.glob(pattern)) if path.is_file()]
    stats = ((path.relative_to(folder), path.stat()) for folder, path in files)
    return value_hash([[path.as_posix(), stat.st_size, stat.st_mtime_ns] for path, stat in stats])
