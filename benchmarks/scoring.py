"""CPU seconds of every score of one pair, and beside them MONAI's for the same numbers where it is installed.

    python benchmarks/scoring.py
    python benchmarks/scoring.py --shape 80x96x112 --structures 20 --compare ""

The pair is synthetic and the same every time. An ellipsoid fills about a third of the grid; its structures are the
cells around random points (Voronoi), each split into a rind that is folded like a cortex and a core. The fixed labels
are the moving ones warped by a smooth field, and the field that is scored is that one with smooth noise on it, some of
which folds. Everything runs on one thread in one process, after one run that does not count; no file is read. A row:

s
    Median of the CPU seconds of the repeats.
monai_s, ratio
    CPU seconds of MONAI's DiceMetric or compute_hausdorff_distance, one structure at a time, and how many times ours
    that is. Its maps are made outside the clock, and it runs once. Goal: at least 10.
difference
    The largest difference of any structure's number from MONAI's, in its unit.

``score_pair`` is all of it: both label interpolations, with topology and its floor. Goal: at most 3 s.
"""

from __future__ import annotations

import argparse
import importlib.util
import statistics
import sys
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import torch
import torch.nn.functional as F
from measuring import OUT_SUFFIXES, parse_shape, print_table, run_main, tell

from dmir import metrics
from dmir.errors import InputError
from dmir.fields import warp_labels, warp_labels_each
from dmir.structures import StructureSet

COMPARED = ("dice", "hd95")
BOTH = ("nearest", "linear")


# --- the pair ---


def synthetic_pair(shape: tuple[int, int, int], count: int) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Return moving labels, fixed labels (D, H, W) and the field to score (3, D, H, W); ``count`` structures, even."""
    axes = np.meshgrid(*(np.linspace(-1, 1, n, dtype=np.float32) for n in shape), indexing="ij", sparse=True)
    radius = np.sqrt(sum((x / side) ** 2 for x, side in zip(axes, (0.85, 0.88, 0.85), strict=True)))
    points = np.random.default_rng(0).uniform(-0.6, 0.6, (count // 2, 3)).astype(np.float32)
    cells = np.stack([sum((x - c) ** 2 for x, c in zip(axes, point, strict=True)) for point in points]).argmin(axis=0)
    core = radius + 0.12 * smooth_noise(shape, 10, 1, 1)[0] < 0.75
    moving = np.where(radius < 1, 1 + cells + (count // 2) * core, 0).astype(np.int32)
    known = 2.0 * smooth_noise(shape, 16, 3, 3)
    fixed = warp_labels(torch.from_numpy(moving)[None, None], torch.from_numpy(known)[None], "linear")[0, 0].numpy()
    return moving, fixed, known + 0.6 * smooth_noise(shape, 6, 4, 3)


def smooth_noise(shape: Sequence[int], distance: int, seed: int, count: int) -> np.ndarray:
    """Return normal numbers ``distance`` voxels apart, interpolated, of standard deviation 1: (count, D, H, W)."""
    random = torch.Generator().manual_seed(seed)
    lattice = torch.randn(1, count, *(n // distance + 4 for n in shape), generator=random)
    noise = F.interpolate(lattice, size=tuple(shape), mode="trilinear", align_corners=True)[0].numpy()
    return noise / noise.std()


# --- what is measured ---


def scores_of(moving: np.ndarray, fixed: np.ndarray, field: np.ndarray, count: int) -> dict[str, Callable[[], Any]]:
    """Return a call by name for every row of the table."""
    ids = list(range(1, count + 1))
    small_moving, small_fixed = moving.astype(np.uint8), fixed.astype(np.uint8)
    labels, u = torch.from_numpy(small_moving)[None, None], torch.from_numpy(field)[None]
    warped = warp_labels(labels, u, "linear")[0, 0].numpy()
    structures = StructureSet("synthetic", pd.DataFrame([{"id": i, "name": f"structure {i}"} for i in ids]))
    judged = fixed > 0
    pair = (field, np.eye(4), moving, fixed, structures)
    return {
        "dice": lambda: metrics.dice(warped, small_fixed, ids),
        "hd95": lambda: metrics.hd95(warped, small_fixed, ids),
        "volume ratio": lambda: metrics.volume_ratio(warped, small_moving, ids),
        "betti numbers": lambda: metrics.betti_numbers(warped, ids),
        "folding and SDlogJ": lambda: metrics.measure_folding(field, judged),
        "labels warped, nearest": lambda: warp_labels(labels, u, "nearest"),
        "labels warped, linear": lambda: warp_labels(labels, u, "linear"),
        "labels warped, both": lambda: warp_labels_each(labels, u, BOTH),
        "fold-free field": lambda: metrics.fold_free_part(field),
        "score_pair without topology": lambda: metrics.score_pair(*pair, topology=False),
        "score_pair": lambda: metrics.score_pair(*pair),
    } | {"warped labels": lambda: warped}


def monai_of(name: str, warped: np.ndarray, fixed: np.ndarray, count: int) -> tuple[float, np.ndarray]:
    """Return the CPU seconds of MONAI for all structures, and its numbers (count,)."""
    from monai.metrics import DiceMetric, compute_hausdorff_distance

    options = {"include_background": True, "percentile": 95, "directed": False}
    metric = {
        "dice": DiceMetric(reduction="none"),
        "hd95": lambda *maps: compute_hausdorff_distance(*maps, **options),
    }[name]
    total, values = 0.0, []
    for label in range(1, count + 1):  # all at once would need a map of float of every structure
        maps = [torch.from_numpy(x == label)[None, None].float() for x in (warped, fixed)]
        seconds, found = clock(lambda maps=maps: metric(*maps))
        total += seconds
        values.append(float(found))
    return total, np.array(values)


def clock(call: Callable[[], Any]) -> tuple[float, Any]:
    """Return the CPU seconds of a call, and what it gave."""
    start = time.process_time()
    result = call()
    return time.process_time() - start, result


def main(arguments: Sequence[str] | None = None) -> None:
    """Measure what the command line asks for, and print the table."""
    options = _parser().parse_args(arguments)
    compared = [name for name in options.compare.split(",") if name]
    _check(options, compared)
    torch.set_num_threads(1)
    count = options.structures
    moving, fixed, field = synthetic_pair(parse_shape(options.shape), count)
    calls = scores_of(moving, fixed, field, count)
    warped = calls.pop("warped labels")()
    rows: list[dict[str, Any]] = []
    found = {}
    for name, call in calls.items():
        call()
        seconds, values = zip(*(clock(call) for _ in range(options.repeats)), strict=True)
        rows.append({"score": name, "s": statistics.median(seconds)})
        found[name] = values[0]
        tell(f"{name}: {rows[-1]['s']:.2f} s")
    for row in rows:  # afterwards: what MONAI leaves in memory is not to count for ours
        if row["score"] in compared:
            row["monai_s"], theirs = monai_of(row["score"], warped, fixed, count)
            row["ratio"] = row["monai_s"] / row["s"]
            row["difference"] = float(np.nanmax(np.abs(np.array([*found[row["score"]].values()]) - theirs)))
    print(f"{options.shape}, {count} structures, {100 * (fixed > 0).mean():.0f} % of the voxels labelled, one thread")
    print_table(pd.DataFrame(rows), options.out)
    print()
    print_table(pd.DataFrame(sorted(found["score_pair"][1].items()), columns=["the pair's", "value"]), None)


def _check(options: argparse.Namespace, compared: Sequence[str]) -> None:
    if unknown := [name for name in compared if name not in COMPARED]:
        raise InputError("--compare", found=", ".join(unknown), expected=f"some of {', '.join(COMPARED)}, or nothing")
    if options.repeats < 1 or options.structures < 2 or options.structures % 2 or options.structures > 254:
        found = f"{options.repeats}, {options.structures}"
        raise InputError("--repeats, --structures", found=found, expected="at least 1, and an even number up to 254")
    if options.out is not None and options.out.suffix not in OUT_SUFFIXES:
        raise InputError("--out", found=str(options.out), expected=f"a name in {' or '.join(OUT_SUFFIXES)}")
    if compared and importlib.util.find_spec("monai") is None:
        tell("MONAI is not installed: nothing to compare with")
        compared.clear()


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter, allow_abbrev=False
    )
    parser.add_argument("--shape", default="160x192x224", help="of the grid (default 160x192x224)")
    parser.add_argument("--structures", type=int, default=36, help="how many, an even number (default 36)")
    parser.add_argument("--repeats", type=int, default=3, help="warm runs, of which the median counts (default 3)")
    parser.add_argument(
        "--compare", default=",".join(COMPARED), help="what MONAI computes too (default dice,hd95; '' for nothing)"
    )
    parser.add_argument("--out", type=Path, help="write the table here too: .csv or .md")
    return parser


if __name__ == "__main__":
    sys.exit(run_main(main))
