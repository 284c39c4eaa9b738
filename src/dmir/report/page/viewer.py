"""Pairs to look at: volumes cut to the brain, as bytes that a browser unpacks when it shows them."""

from __future__ import annotations

import base64
import colorsys
import gzip
import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import matplotlib as mpl
import numpy as np
import torch

from dmir.errors import InputError
from dmir.fields import jacobian_determinant, warp_labels
from dmir.metrics import dice
from dmir.report.examples import Example, example_file, load_example
from dmir.report.names import method_name
from dmir.report.panels import FOLDED, JACOBIAN_COLOURS
from dmir.report.planes import affine_to_ras, brain_of, field_to_ras, scalar_to_ras, window_of
from dmir.structures import load_structures
from dmir.volumes import Grid, read_image, read_labels, require_same_grid

PACKED = 0.25  # of its bytes that a volume takes in the page, at the least: at 1 mm it was 0.29, base64 included
STEPS = 100  # of a Jacobian determinant between 0 and 1
HIGHEST = 253  # the code of every determinant from there on; 0 is a fold
OUTSIDE = 255  # the code of voxels outside the brain
OTHERS = 255  # the code of all structures for which no code is left

Pair = tuple[str, str, str]


@dataclass(frozen=True)
class Viewer:
    """What the page's viewer gets: facts for its script, and packed volumes by name.

    Attributes
    ----------
    facts
        JSON: pairs with their grids, structures and methods; colours; the factor of reduction.
    volumes
        Name -> base64 of the gzip of bytes, first axis (to the right) fastest.
    factor
        Edge of the blocks of voxels that were reduced to one.
    missing
        Sentences on pairs that cannot be shown.
    """

    facts: dict[str, Any]
    volumes: dict[str, str]
    factor: int
    missing: tuple[str, ...]

    @property
    def packed_bytes(self) -> int:
        return sum(map(len, self.volumes.values()))


def pack(volume: np.ndarray) -> str:
    """Return a uint8 volume (X, Y, Z) as base64 of gzip, X fastest; equal volumes give equal text."""
    return base64.b64encode(gzip.compress(volume.tobytes(order="F"), compresslevel=6, mtime=0)).decode("ascii")


def structure_colours() -> list[str]:
    """Return 256 colours, by code: neighbours in number are far apart in hue and lightness; 0 is never drawn."""
    colours = ["#000000"]
    for code in range(1, 256):
        hue = (code * 0.61803398875) % 1.0
        value, saturation = ((1.0, 0.55), (0.8, 0.85), (0.95, 0.95))[code % 3]
        colours.append(mpl.colors.to_hex(colorsys.hsv_to_rgb(hue, saturation, value)))
    return colours


def jacobian_colours() -> list[str]:
    """Return the colours of the codes of determinants: the figures' map around 1, and that of folds for 0."""
    codes = np.minimum(np.arange(256) / STEPS / 2, 1.0)
    return [FOLDED, *(mpl.colors.to_hex(JACOBIAN_COLOURS(value)) for value in codes[1:])]


def encode_jacobian(determinant: np.ndarray, brain: np.ndarray) -> np.ndarray:
    """Return determinants as codes: 0 for folds, a hundredth a step from 1 on, :data:`OUTSIDE` where no brain is."""
    codes = np.clip(np.round(determinant * STEPS), 1, HIGHEST)
    codes[determinant <= 0] = 0
    codes[~brain] = OUTSIDE
    return codes.astype(np.uint8)


def _blocks(volume: np.ndarray, factor: int) -> np.ndarray:
    """Return a volume as (X, Y, Z, factor^3): its blocks, the last ones filled up with their neighbours."""
    padding = [(0, -size % factor) for size in volume.shape]
    filled = np.pad(volume, padding, mode="edge")
    x, y, z = (size // factor for size in filled.shape)
    parts = filled.reshape(x, factor, y, factor, z, factor).transpose(0, 2, 4, 1, 3, 5)
    return parts.reshape(x, y, z, factor**3)


def reduce_image(image: np.ndarray, factor: int) -> np.ndarray:
    """Return the mean of each block of voxels."""
    return image if factor == 1 else _blocks(image, factor).mean(axis=-1)


def reduce_labels(labels: np.ndarray, factor: int) -> np.ndarray:
    """Return one voxel of each block, that in its middle."""
    if factor == 1:
        return labels
    middle = factor // 2
    return _blocks(labels, factor)[..., middle * (factor**2 + factor + 1)]


def reduce_jacobian(determinant: np.ndarray, brain: np.ndarray, factor: int) -> tuple[np.ndarray, np.ndarray]:
    """Return the mean over the brain in each block, but the lowest where a voxel folds; and where there is brain."""
    if factor == 1:
        return determinant, brain
    inside = _blocks(brain, factor)
    values = _blocks(determinant, factor)
    counts = inside.sum(axis=-1)
    mean = np.where(inside, values, 0).sum(axis=-1) / np.maximum(counts, 1)
    lowest = np.where(inside, values, np.inf).min(axis=-1)
    return np.where(lowest <= 0, lowest, mean), counts > 0


@dataclass(frozen=True)
class _Scans:
    """The two scans of a pair on the RAS grid, and what of it is shown.

    ``native`` is the affine of the files, ``affine`` that of the shown part, both 4x4, mm.
    """

    pair: Pair
    native: np.ndarray
    affine: np.ndarray
    window: tuple[slice, slice, slice]
    moving: np.ndarray
    fixed: np.ndarray
    moving_labels: np.ndarray
    fixed_labels: np.ndarray
    raw_moving_labels: np.ndarray
    brain: np.ndarray

    def cut(self, native: np.ndarray) -> np.ndarray:
        """Return the shown part of a volume that lies as the files do."""
        return scalar_to_ras(native, self.native)[self.window]


def _files(results: Path, pair: Pair) -> list[Path]:
    cohort, moving, fixed = pair
    folder = results / "preprocessed" / cohort
    return [folder / scan / f"{name}.nii.gz" for scan in (moving, fixed) for name in ("image", "labels")]


def read_scans(results: Path, pair: Pair) -> _Scans:
    """Read images and label maps of a pair and cut them to the brain of both."""
    paths = _files(results, pair)
    moving, fixed = read_image(paths[0]), read_image(paths[2])
    moving_labels, fixed_labels = read_labels(paths[1]), read_labels(paths[3])
    for path, volume in ((paths[0], moving), (paths[1], moving_labels), (paths[3], fixed_labels)):
        require_same_grid(fixed, volume, paths[2], path)
    native = fixed.affine
    ras = [scalar_to_ras(v.data, native) for v in (moving, fixed, moving_labels, fixed_labels)]
    affine = affine_to_ras(native, fixed.shape)
    brain = brain_of(ras[1])
    window = window_of(brain | brain_of(ras[0]), Grid(fixed.shape, affine).spacing)
    corner = np.array([*(part.start for part in window), 1.0])
    affine = affine.copy()
    affine[:3, 3] = (affine @ corner)[:3]
    cuts = [volume[window] for volume in (*ras, brain)]
    return _Scans(
        pair, native, affine, window, cuts[0], cuts[1], cuts[2], cuts[3], moving_labels.data, cuts[4].astype(bool)
    )


def compact_labels(*maps: np.ndarray) -> tuple[list[int], Callable[[np.ndarray], np.ndarray]]:
    """Return the ids that get codes 1, 2, ... and the function that gives a label map its codes.

    Where there are more than 254 ids the largest structures keep theirs and the others share :data:`OTHERS`.
    """
    ids, counts = np.unique(np.concatenate([labels.ravel() for labels in maps]), return_counts=True)
    structures = ids[ids > 0]
    if len(structures) > OTHERS - 1:
        largest = np.argsort(-counts[ids > 0], kind="stable")[: OTHERS - 1]
        structures = np.sort(structures[largest])
    codes = np.where(ids > 0, OTHERS, 0).astype(np.uint8)
    codes[np.isin(ids, structures)] = np.arange(1, len(structures) + 1, dtype=np.uint8)

    def encode(labels: np.ndarray) -> np.ndarray:
        encoded: np.ndarray = codes[np.searchsorted(ids, labels)]
        return encoded

    return [int(i) for i in structures], encode


def _structure_names(configuration: Mapping[str, Any], cohort: str) -> Mapping[int, str]:
    """Return the names of a cohort's structures, as far as there is a table of them."""
    settings = (configuration.get("cohorts") or {}).get(cohort) or {}
    try:
        return load_structures(str(settings["structures"])).names if settings.get("structures") else {}
    except InputError:
        return {}


def encode_grey(image: np.ndarray, low: float, high: float) -> np.ndarray:
    """Return grey values as 0 to 255 over the range of both scans of the pair."""
    return np.round(255 * (np.clip(image, low, high) - low) / (high - low)).astype(np.uint8)


@dataclass
class _Packing:
    """Volumes packed so far, named by number."""

    factor: int
    volumes: dict[str, str]

    def add(self, volume: np.ndarray) -> str:
        name = f"volume-{len(self.volumes)}"
        self.volumes[name] = pack(volume)
        return name


def _pack_pair(
    results: Path,
    pair: Pair,
    configuration: Mapping[str, Any],
    examples: Mapping[str, Path],
    interpolation: str,
    packing: _Packing,
) -> dict[str, Any]:
    scans, factor = read_scans(results, pair), packing.factor
    ids, encode = compact_labels(scans.raw_moving_labels, scans.moving_labels, scans.fixed_labels)
    low = min(float(scans.moving.min()), float(scans.fixed.min()))
    high = max(float(scans.moving.max()), float(scans.fixed.max()))

    def add_image(image: np.ndarray) -> str:
        return packing.add(encode_grey(reduce_image(image, factor), low, high))

    def add_labels(labels: np.ndarray) -> str:
        return packing.add(reduce_labels(encode(labels), factor))

    affine = scans.affine.copy()
    affine[:3, 3] += affine[:3, :3] @ np.full(3, (factor - 1) / 2)  # the middle of the first block
    affine[:3, :3] *= factor
    shape = [math.ceil(size / factor) for size in scans.fixed.shape]
    names = _structure_names(configuration, pair[0])
    facts: dict[str, Any] = {
        "cohort": pair[0],
        "moving": pair[1],
        "fixed": pair[2],
        "shape": shape,
        "spacing": [float(s) for s in Grid((1, 1, 1), affine).spacing],
        "affine": [[float(number) for number in line] for line in affine[:3]],
        "grey": [low, high],
        "structures": ["", *(names.get(i, f"label {i}") for i in ids)],
        "volumes": {
            "moving": add_image(scans.moving),
            "fixed": add_image(scans.fixed),
            "movingLabels": add_labels(scans.moving_labels),
            "fixedLabels": add_labels(scans.fixed_labels),
        },
        "methods": [],
    }
    for method, path in examples.items():
        entry: dict[str, Any] = {"method": method, "name": method_name(method, short=True), "state": state_of(path)}
        if entry["state"] == "ok":
            example = load_example(path)
            if example.warped.shape != scans.raw_moving_labels.shape:
                raise InputError(
                    path,
                    found=f"an example on a grid of {example.warped.shape}",
                    expected=f"the grid of the pair's scans, {scans.raw_moving_labels.shape}",
                    remedy="Make the example again.",
                )
            warped_labels = _warped_labels(scans, example, interpolation)
            determinant, brain = reduce_jacobian(_jacobian(scans, example), scans.brain, factor)
            entry["dice"] = _dice(scans, example, warped_labels, interpolation)
            entry["volumes"] = {
                "warped": add_image(scans.cut(example.warped)),
                "warpedLabels": add_labels(scans.cut(warped_labels)),
                "jacobian": packing.add(encode_jacobian(determinant, brain)),
            }
        facts["methods"].append(entry)
    return facts


def state_of(path: Path) -> str:
    """Return what an example's file says: ``ok``, ``failed`` where it is empty, ``missing`` where there is none."""
    if not path.is_file():
        return "missing"
    return "ok" if path.stat().st_size else "failed"


def _warped_labels(scans: _Scans, example: Example, interpolation: str) -> np.ndarray:
    labels = torch.from_numpy(scans.raw_moving_labels)[None, None]
    warped: np.ndarray = warp_labels(labels, torch.from_numpy(example.displacement)[None], interpolation)[0, 0].numpy()
    return warped


def _jacobian(scans: _Scans, example: Example) -> np.ndarray:
    """Return the determinant on the shown part: forward differences towards right, front and top, as in the figures."""
    displacement = torch.from_numpy(field_to_ras(example.displacement, scans.native))[None]
    determinant = jacobian_determinant(displacement, scheme="forward")[0].numpy()
    whole: np.ndarray = np.pad(determinant, [(0, 1)] * 3, mode="edge")[scans.window]
    return whole


def _dice(scans: _Scans, example: Example, warped_labels: np.ndarray, interpolation: str) -> float | None:
    """Return the pair's mean Dice: what the example kept, or with other labels than those of the example, computed."""
    if interpolation == "nearest" and not math.isnan(example.dice):
        return float(example.dice)
    fixed = scans.fixed_labels
    overlap = dice(scans.cut(warped_labels), fixed, [int(i) for i in np.unique(fixed) if i])
    values = [value for value in overlap.values() if not math.isnan(value)]
    return math.fsum(values) / len(values) if values else None


def _raw_bytes(results: Path, examples: Mapping[Pair, Mapping[str, Path]]) -> int:
    """Return how many bytes the volumes of all pairs have before they are packed."""
    total = 0
    for pair, paths in examples.items():
        shown = sum(state_of(path) == "ok" for path in paths.values())
        total += read_scans(results, pair).fixed.size * (4 + 3 * shown)
    return total


def _missing(results: Path, pairs: Sequence[Pair]) -> Iterator[tuple[Pair, str]]:
    for pair in pairs:
        absent = [path.relative_to(results).as_posix() for path in _files(results, pair) if not path.is_file()]
        if absent:
            yield pair, f"{pair[0]}: {pair[1]} → {pair[2]} cannot be shown: there is no {', '.join(absent)}."


def pack_pairs(
    results: Path,
    pairs: Sequence[Pair],
    methods: Sequence[str],
    examples: Sequence[Sequence[str | Path]],
    configuration: Mapping[str, Any],
    *,
    interpolation: str = "nearest",
    budget_bytes: int = 24_000_000,
) -> Viewer:
    """Pack the volumes of some pairs, in blocks of voxels where they are too many for the budget.

    Parameters
    ----------
    results
        The folder of results.
    pairs
        (cohort, moving, fixed).
    methods, examples
        The methods in their order, and of each pair their folders of examples (:mod:`dmir.report.examples`).
    configuration
        Tells which structure set a cohort has.
    interpolation
        Of the warped labels, ``nearest`` or ``linear``.
    budget_bytes
        Of all packed volumes inside the page. One method's field is in memory at a time.

    Raises
    ------
    InputError
        A file is damaged, or the files of a pair lie on different grids.
    """
    missing = dict(_missing(results, pairs))
    shown = {
        pair: {method: example_file(folder, *pair[1:]) for method, folder in zip(methods, folders, strict=True)}
        for pair, folders in zip(pairs, examples, strict=True)
        if pair not in missing
    }
    raw = _raw_bytes(results, shown)
    factor = max(1, math.ceil((raw * PACKED / budget_bytes) ** (1 / 3) - 1e-9))
    while True:
        packing = _Packing(factor, {})
        facts = {
            "pairs": [
                _pack_pair(results, pair, configuration, paths, interpolation, packing) for pair, paths in shown.items()
            ],
            "structureColours": structure_colours(),
            "jacobian": {"colours": jacobian_colours(), "steps": STEPS, "highest": HIGHEST, "outside": OUTSIDE},
            "factor": factor,
        }
        viewer = Viewer(facts, packing.volumes, factor, tuple(missing.values()))
        smallest = all(max(pair["shape"]) <= 2 for pair in facts["pairs"])
        if viewer.packed_bytes <= budget_bytes or smallest:
            return viewer
        factor += 1
