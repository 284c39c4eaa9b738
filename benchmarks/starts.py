"""What a start is worth: descent from a network's field against descent from nothing, Dice against steps and seconds.

    python benchmarks/starts.py --results results/mine --cohort oasis --atlas o1000 --scans o1002 o1003
        --weights results/mine/models/oasis/caml/seed1/model.safetensors --out FOLDER

Descends the pairs of preprocessed scans (RESULTS/preprocessed/COHORT/SCAN) from both starts, with more and more of the
default stages, one thread, CPU seconds of the network and of the descent alone. Labels are warped to the nearest. The
tables are starts.csv and starts.md.
"""

from __future__ import annotations

import argparse
import sys
import time
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

import numpy as np
import pandas as pd
import torch

from dmir.fields import warp_labels
from dmir.methods.descending import find_field
from dmir.methods.network import register as register_with_network
from dmir.methods.stages import STAGES, Stage
from dmir.metrics import dice
from dmir.training.weights import load_weights
from dmir.volumes import Volume, atomic_path, read_image, read_labels

COUNTS = {15: (15,), 30: (5, 10, 20, 30), 40: (40,), 12: (4, 8, 12)}  # steps of a stage at which the descent is cut off


def cuts(first: int) -> Iterator[tuple[Stage, ...]]:
    """Yield the default stages from one of them on, cut off after more and more steps."""
    yield ()
    for last in range(first, len(STAGES)):
        for steps in COUNTS[STAGES[last].steps]:
            yield (*STAGES[first:last], replace(STAGES[last], steps=steps))


def told(stages: tuple[Stage, ...]) -> str:
    """Say stages in a few words."""
    return ", ".join(f"{stage.voxel:g} mm {stage.steps}" for stage in stages) or "none"


def of_pair(moving: Volume, fixed: Volume, labels: tuple[np.ndarray, np.ndarray], network: tuple) -> list[dict]:
    """Return one record a start and cut."""
    images = [torch.from_numpy(np.ascontiguousarray(image.data, np.float32))[None] for image in (moving, fixed)]
    begin = time.process_time()
    start = torch.from_numpy(register_with_network(moving, fixed, network, device="cpu"))
    inference = time.process_time() - begin
    finest = float(fixed.spacing.max())
    rows, ids = [], [label for label in np.unique(labels[1]) if label]
    plans = [("nothing", None, 0.0, 0), *((network[1]["network"], start, inference, first) for first in range(4))]
    for name, field, before, first in plans:
        for stages in cuts(first):
            if stages and stages[-1].voxel < finest:
                continue
            begin = time.process_time()
            found = torch.zeros_like(start) if field is None else field
            steps = 0
            if stages:
                descended = find_field(*images, fixed.spacing.tolist(), stages=stages, start=field)
                found, steps = descended.displacement, sum(descended.steps)
            seconds = before + time.process_time() - begin
            warped = warp_labels(torch.from_numpy(labels[0])[None, None], found[None])[0, 0].numpy()
            score = float(np.nanmean(list(dice(warped, labels[1], ids).values())))
            rows.append(
                {"start": name, "first": first, "stages": told(stages), "steps": steps, "cpu_s": seconds, "dice": score}
            )
    return rows


def table_of(records: pd.DataFrame) -> pd.DataFrame:
    """Return the mean of each start and cut; ``saved_s``: the seconds from nothing to the same Dice, less its own."""
    keys = ["start", "first", "stages"]
    table = records.groupby(keys, sort=False)[["steps", "cpu_s", "dice"]].mean().reset_index()
    nothing = table[table["start"] == "nothing"].sort_values("cpu_s")

    def saved(row: pd.Series) -> float:
        reached = nothing[nothing["dice"] >= row["dice"]]
        return float(reached["cpu_s"].iloc[0] - row["cpu_s"]) if len(reached) else float("nan")

    table["saved_s"] = [np.nan if row["start"] == "nothing" else saved(row) for _, row in table.iterrows()]
    return table.drop(columns="first")


def main(arguments: list[str] | None = None) -> int:
    """Run the benchmark."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--results", type=Path, required=True)
    parser.add_argument("--cohort", required=True)
    parser.add_argument("--atlas", required=True)
    parser.add_argument("--scans", nargs="+", required=True)
    parser.add_argument("--weights", type=Path, required=True)
    parser.add_argument("--out", type=Path, required=True)
    options = parser.parse_args(arguments)
    torch.set_num_threads(1)
    folder, network = options.results / "preprocessed" / options.cohort, load_weights(options.weights, device="cpu")
    fixed, rows = read_image(folder / options.atlas / "image.nii.gz"), []
    fixed_labels = read_labels(folder / options.atlas / "labels.nii.gz").data
    for scan in options.scans:
        moving = read_image(folder / scan / "image.nii.gz")
        labels = (read_labels(folder / scan / "labels.nii.gz").data, fixed_labels)
        rows += [{"moving": scan} | row for row in of_pair(moving, fixed, labels, network)]
        print(scan, file=sys.stderr)
    records = pd.DataFrame(rows)
    table = table_of(records)
    options.out.mkdir(parents=True, exist_ok=True)
    with atomic_path(options.out / "starts.csv") as path:
        records.round(5).to_csv(path, index=False)
    with atomic_path(options.out / "starts.md") as path:
        path.write_text(table.to_markdown(index=False, floatfmt=("", "", ".0f", ".1f", ".4f", ".1f")) + "\n")
    print(table.to_string(index=False, float_format="{:.4f}".format))
    return 0


if __name__ == "__main__":
    sys.exit(main())
