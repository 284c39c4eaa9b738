"""What can go wrong in preprocessing, in numbers, with the reasons in words."""

from __future__ import annotations

from collections.abc import Iterable
from pathlib import Path
from typing import Any

import numpy as np

from dmir.preprocess.cuts import find_cuts
from dmir.structures import StructureSet, positions
from dmir.tables import read_record
from dmir.volumes import Volume

LEAST_OVERLAP = 0.85  # Dice of the brain masks after the affine
BRAIN_VOLUME = (700.0, 2300.0)  # ml, in the scan's own space
SCALE = (0.6, 1.7)  # determinant of the affine
MOST_OUTSIDE = 1.0  # % of the brain beyond the grid
LEAST_CORRELATION = 0.3
CUT_OFF = "the brain is cut off at its"


def assess(
    native_mask: Volume,
    transform: np.ndarray,
    image: Volume,
    mask: Volume,
    atlas_image: Volume,
    atlas_mask: Volume,
    *,
    labels: Volume | None = None,
    structures: StructureSet | None = None,
) -> dict[str, Any]:
    """Describe a preprocessed scan.

    Parameters
    ----------
    native_mask
        Brain mask in the scan's own space, with axes that run to the right, the front and the top.
    transform
        4x4, atlas world -> scan world.
    image, mask, atlas_image, atlas_mask
        On the atlas's grid.
    labels, structures
        The label map there, and what it means.

    Returns
    -------
    dict
        ``brain_volume_ml``, ``affine_scale`` (determinant), ``mask_overlap`` (Dice with the atlas's brain),
        ``outside_percent`` (brain beyond the grid), ``correlation`` (with the atlas, inside both masks),
        ``intensity_mean`` and ``intensity_sd`` (inside the mask), ``structures_found`` and ``sides_swapped`` (with a
        label map: how many of the structures it has, and how many of those with two sides lie the wrong way round),
        ``cut_off`` (sides at which the brain ends because its scan does), ``flags`` (reasons to look at the scan) and
        ``ok`` (there are none). Ready for JSON.
    """
    both = mask.data & atlas_mask.data
    inside = image.data[mask.data]
    correlation = np.corrcoef(image.data[both], atlas_image.data[both])[0, 1] if both.sum() > 1 else np.nan
    numbers = {
        "brain_volume_ml": native_mask.data.sum() * abs(np.linalg.det(native_mask.affine[:3, :3])) / 1000,
        "affine_scale": np.linalg.det(transform[:3, :3]),
        "mask_overlap": 2 * both.sum() / (mask.data.sum() + atlas_mask.data.sum()),
        "outside_percent": _outside(native_mask, transform, mask),
        "correlation": correlation if np.isfinite(correlation) else 0.0,
        "intensity_mean": inside.mean(),
        "intensity_sd": inside.std(),
    }
    quality: dict[str, Any] = {key: round(float(value), 4) for key, value in numbers.items()}
    quality["cut_off"] = [cut.side for cut in find_cuts(native_mask.data)]
    quality["flags"] = _flags(quality)
    if labels is not None and structures is not None:
        quality["structures_found"] = int(np.isin(structures.ids, np.unique(labels.data)).sum())
        quality["sides_swapped"], paired = swapped_sides(labels, structures)
        if quality["sides_swapped"] > paired / 2:
            quality["flags"].append(
                f"{quality['sides_swapped']} of {paired} left structures lie on the right: the orientation in the "
                "file's header, or the label map, is wrong (the cohort's keys orientation and label_map)"
            )
    quality["ok"] = not quality["flags"]
    return quality


def swapped_sides(labels: Volume, structures: StructureSet) -> tuple[int, int]:
    """Return how many structures have their left part to the right of their right one, and how many have both parts."""
    number = positions(labels.data, structures.ids)
    steps = labels.affine[0, :3]  # of the world's axis to the right, along each axis of the array
    count, total = np.zeros(len(structures.ids) + 1), np.zeros(len(structures.ids) + 1)
    for axis, step in enumerate(steps):
        if axis == 0 or step:
            slabs = np.moveaxis(number, axis, 0)
            counts = np.stack([np.bincount(slab.ravel(), minlength=len(total)) for slab in slabs])
            count = counts.sum(axis=0)
            total += step * (np.arange(len(counts)) @ counts)
    right = dict(zip(structures.ids, (total / np.maximum(count, 1))[1:], strict=True))
    present = {name for name, voxels in zip(structures.ids, count[1:], strict=True) if voxels}
    columns = (structures.table[key] for key in ("id", "name", "hemisphere"))
    centre = {
        (side, name.removeprefix(f"{side} ")): right[number]
        for number, name, side in zip(*columns, strict=True)
        if side != "both" and number in present
    }
    names = [name for side, name in centre if side == "left" and ("right", name) in centre]
    return sum(bool(centre["left", name] > centre["right", name]) for name in names), len(names)


def flagged_scans(files: Iterable[str | Path]) -> dict[str, str]:
    """Return the flagged ones among some scans, with the reasons; the files are ``<scan>/quality.json``."""
    found = {Path(path).parent.name: read_record(path)["flags"] for path in files}
    return {scan: "; ".join(flags) for scan, flags in found.items() if flags}


def _outside(native_mask: Volume, transform: np.ndarray, mask: Volume) -> float:
    """Return the percentage of the brain that the grid does not hold, judged on every seventh voxel."""
    voxels = np.stack(np.unravel_index(np.flatnonzero(native_mask.data)[::7], native_mask.shape), axis=-1)
    to_grid = np.linalg.inv(transform @ mask.affine) @ native_mask.affine
    place = voxels @ to_grid[:3, :3].T + to_grid[:3, 3]
    beyond = ((place < -0.5) | (place > np.array(mask.shape) - 0.5)).any(axis=1)
    return 100 * float(beyond.mean())


def _flags(quality: dict[str, Any]) -> list[str]:
    """Return the reasons why a person should look at this scan."""
    flags = []
    low, high = BRAIN_VOLUME
    if not low <= quality["brain_volume_ml"] <= high:
        flags.append(f"brain volume {quality['brain_volume_ml']:.0f} ml is not within {low:.0f} to {high:.0f} ml")
    low, high = SCALE
    if not low <= quality["affine_scale"] <= high:
        flags.append(f"the affine scales volumes by {quality['affine_scale']:.2f}, not within {low} to {high}")
    if quality["mask_overlap"] < LEAST_OVERLAP:
        flags.append(f"brain masks overlap by a Dice of {quality['mask_overlap']:.2f}, below {LEAST_OVERLAP}")
    if quality["outside_percent"] > MOST_OUTSIDE:
        flags.append(f"{quality['outside_percent']:.1f} % of the brain lies outside the grid")
    if quality["correlation"] < LEAST_CORRELATION:
        flags.append(f"correlation with the atlas {quality['correlation']:.2f} is below {LEAST_CORRELATION}")
    flags += [f"{CUT_OFF} {side}" for side in quality["cut_off"]]
    return flags
