"""Preprocessing: seconds of each step and memory of each scan, and the affine beside ANTs' own default.

    python benchmarks/preprocessing.py
    python benchmarks/preprocessing.py --source lpba40 --path data/lpba40 --structures lpba56 --scans S02,S03 --denoise
    python benchmarks/preprocessing.py --source table --path scans.csv --label-map aparc+aseg_to_oasis28 \\
        --structures oasis28 --ways ants,3

The reference is preprocessed first and gives the grid; then each scan, in a process of its own. The same scan, stripped
and with its bias field corrected, is then aligned to the reference in each way, in processes of their own again:

ants
    ``ants.registration(fixed, moving, type_of_transform="Affine")`` on the reference's grid at full resolution.
2, 3, 4, ... or any number
    ``dmir.preprocess.estimate_affine`` on voxels of so many mm.

mask_dice, label_dice
    Brain mask and structures (mean of all that both have) after resampling the scan with that matrix alone, nearest.
s, cpu_s
    Wall and CPU seconds; on a machine that does other things read the latter.
mb
    Peak over the idle process in 10^6 bytes; the images are in it.
"""

from __future__ import annotations

import argparse
import json
import os
import sys
import tempfile
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import torch
from measuring import idle_memory_mb, measure_apart, parse_shape, print_table, run_main, tell

from dmir.cohorts import default_orientation, simulated, source_table
from dmir.errors import InputError
from dmir.metrics import dice
from dmir.preprocess import brain_mask, correct_bias, estimate_affine, read_affine, read_preprocessed, resample
from dmir.preprocess.ants_images import THREADS, single_threaded_ants, to_ants
from dmir.preprocess.files import preprocess_files
from dmir.structures import load_label_map, load_structures, remap_labels
from dmir.training.devices import peak_memory_mb
from dmir.volumes import Volume, read_image, read_labels, read_mask, with_orientation, write_volume

CPU = torch.device("cpu")
STEPS = ("skull_strip", "denoise", "bias_field", "affine", "resample", "normalise", "quality")
SIMULATED = {"label_map": "aparc+aseg_to_oasis28", "structures": "oasis28", "reference": simulated.ATLAS}


# --- one row, in this process ---


def measure_steps(row: dict[str, Any]) -> dict[str, Any]:
    """Preprocess one scan, tell the seconds of its steps, and leave the scan ready to be aligned."""
    single_threaded_ants()
    idle = idle_memory_mb(CPU)
    files = {key: row["scan"][key] or None for key in ("image", "labels", "mask")}
    settings = {key: row[key] for key in ("label_map", "structures", "orientation", "shape", "spacing", "denoise")}
    settings["skull_strip"] = "mask" if files["mask"] else "none"
    start = time.perf_counter()
    preprocess_files(row["folder"], **files, atlas=row["atlas"], **settings)
    total = time.perf_counter() - start
    peak = peak_memory_mb(CPU) - idle
    steps = json.loads((Path(row["folder"]) / "quality.json").read_text())["seconds"]
    if row["atlas"] is not None:
        write_stripped(row)
    return {**{f"{step}_s": steps.get(step) for step in STEPS}, "with_files_s": total, "mb": peak}


def write_stripped(row: dict[str, Any]) -> None:
    """Write what the affine is estimated from: the scan without skull and bias field, its labels, its mask."""
    scan = row["scan"]

    def oriented(volume: Volume) -> Volume:
        return with_orientation(volume, row["orientation"]) if row["orientation"] else volume

    image = oriented(read_image(scan["image"]))
    given = oriented(read_mask(scan["mask"])) if scan["mask"] else None
    brain = brain_mask(image, given, method="none" if given is None else "mask", where=scan["scan"])
    labels = oriented(read_labels(scan["labels"]))
    if row["label_map"]:
        labels = Volume(remap_labels(labels.data, load_label_map(row["label_map"])), labels.affine)
    corrected = correct_bias(image, brain)
    stripped = Volume(np.where(brain.data, corrected.data, 0).astype(np.float32), image.affine)
    for name, volume in (("image", stripped), ("labels", labels), ("mask", brain)):
        write_volume(Path(row["folder"]) / "stripped" / f"{name}.nii.gz", volume)


def measure_affine(row: dict[str, Any]) -> dict[str, Any]:
    """Align one scan in one way; seconds, and what overlaps afterwards."""
    ants = single_threaded_ants() if row["threads"] == 1 else __import__("ants")
    idle = idle_memory_mb(CPU)
    folder = Path(row["folder"]) / "stripped"
    image, mask = read_image(folder / "image.nii.gz"), read_mask(folder / "mask.nii.gz")
    atlas = read_preprocessed(row["atlas"])
    start, cpu_start = time.perf_counter(), time.process_time()
    if row["way"] == "ants":
        matrix = ants_default(ants, image, atlas.image)
    else:
        matrix = estimate_affine(image, mask, atlas.image, spacing=float(row["way"]))
    spent = {"s": time.perf_counter() - start, "cpu_s": time.process_time() - cpu_start}
    peak = peak_memory_mb(CPU) - idle
    return {**spent, "mb": peak, **overlap(matrix, folder, row["structures"], atlas)}


def ants_default(ants: Any, image: Volume, atlas_image: Volume) -> np.ndarray:
    """Return the affine of ANTs' own default, 4x4, atlas world -> scan world."""
    ants.config._random_seed = 1  # so that it repeats
    with tempfile.TemporaryDirectory() as folder:
        found = ants.registration(
            to_ants(atlas_image), to_ants(image), type_of_transform="Affine", outprefix=f"{folder}/affine"
        )
        return read_affine(found["fwdtransforms"][0])


def overlap(matrix: np.ndarray, folder: Path, structures: str, atlas: Any) -> dict[str, float]:
    """Return the Dice of the brain masks, and the mean over the structures, with a scan resampled by a matrix."""
    mask, labels = (
        resample(read(folder / f"{name}.nii.gz"), atlas.image.grid, matrix, interpolation="nearest").data
        for name, read in (("mask", read_labels), ("labels", read_labels))
    )
    of_structures = dice(labels, atlas.labels.data, load_structures(structures).ids)
    of_mask = dice(mask, atlas.mask.data.astype(np.int32), [1])[1]
    return {"mask_dice": of_mask, "label_dice": float(np.nanmean(list(of_structures.values())))}


# --- what is asked ---


def main(arguments: Sequence[str] | None = None) -> None:
    """Measure what the command line asks for, and print both tables."""
    options = _parser().parse_args(arguments)
    if options.row:
        row = json.loads(options.row)
        print(json.dumps({"steps": measure_steps, "affine": measure_affine}[row["what"]](row)))
        return
    ways = parse_ways(options.ways)
    os.environ[THREADS] = str(options.threads)  # the processes of the rows inherit it
    with tempfile.TemporaryDirectory() as folder:
        reference, scans = chosen_scans(options, Path(folder))
        steps, affines = measure_scans(options, reference, scans, ways, Path(folder))
    for name, table in (("steps", steps), ("affine", affines), ("affine-means", means(affines))):
        out = options.out and options.out.with_stem(f"{options.out.stem}-{name}")
        print_table(table, out)
        print()


def measure_scans(
    options: argparse.Namespace,
    reference: dict[str, str],
    scans: list[dict[str, str]],
    ways: list[str],
    folder: Path,
) -> tuple[pd.DataFrame, pd.DataFrame]:
    """Return a row a scan of the steps, and a row a scan and way of the affine."""
    common = {
        **{key: getattr(options, key) for key in ("label_map", "structures", "denoise", "threads")},
        "shape": parse_shape(options.grid),
        "spacing": [options.spacing] * 3,
        "orientation": None if options.source == "simulated" else default_orientation(options.source),
    }
    atlas = str(folder / "preprocessed" / reference["scan"])
    steps, affines = [], []
    for scan in [reference, *scans]:
        place = str(folder / "preprocessed" / scan["scan"])
        row = {**common, "scan": scan, "folder": place, "atlas": None if scan is reference else atlas}
        found = measure_apart(__file__, {"what": "steps", **row}, options.threads, options.timeout)
        tell(f"{scan['scan']} preprocessed: {found.get('failed', 'done')}")
        steps.append({"scan": scan["scan"], **found})
        if "failed" in found and scan is reference:
            break
        for way in ways if scan is not reference and "failed" not in found else []:
            found = measure_apart(__file__, {"what": "affine", "way": way, **row}, options.threads, options.timeout)
            tell(f"{scan['scan']} affine {way}: {found.get('failed', 'done')}")
            affines.append({"scan": scan["scan"], "way": way, **found})
    return pd.DataFrame(steps), pd.DataFrame(affines)


def means(affines: pd.DataFrame) -> pd.DataFrame:
    """Return the means over the scans by way, in their order."""
    numbers = [name for name in ("s", "cpu_s", "mb", "mask_dice", "label_dice") if name in affines]
    if not numbers:
        return pd.DataFrame()
    grouped = affines.groupby("way", sort=False)
    return pd.concat([grouped.size().rename("scans"), grouped[numbers].mean()], axis=1).reset_index()


def chosen_scans(options: argparse.Namespace, folder: Path) -> tuple[dict[str, str], list[dict[str, str]]]:
    """Return the reference and the scans that are asked for, as rows of the source's table; simulated ones are made."""
    if options.source == "simulated":
        for key, value in SIMULATED.items():
            if getattr(options, key) is None:
                setattr(options, key, value)
        table = source_table("simulated", made=str(folder / "made"))
    else:
        if options.path is None:
            raise InputError("--path", found="nothing", expected=f"the folder or the table of {options.source}")
        table = source_table(options.source, **{"path" if options.source == "table" else "folder": options.path})
    if options.structures is None:
        raise InputError("--structures", found="nothing", expected="a table of structures, for instance lpba56")
    rows = {row["scan"]: row for row in table.fillna("").to_dict("records")}
    reference = options.reference or next(iter(rows))
    others = [name for name in rows if name != reference]
    names = others[: int(options.scans)] if options.scans.isdecimal() else options.scans.split(",")
    for name in [reference, *names]:
        if name not in rows:
            raise InputError("--reference, --scans", found=f"'{name}'", expected=f"scans of {options.source}")
        if options.source == "simulated":
            simulated.write_scan(name, folder / "made" / name)
    return rows[reference], [rows[name] for name in names]


def parse_ways(text: str) -> list[str]:
    """Return the ways to align; InputError for what is neither ants nor a size of voxels."""
    ways = list(dict.fromkeys(text.split(",")))
    for way in ways:
        if way != "ants" and not (way.replace(".", "", 1).isdecimal() and float(way) > 0):
            raise InputError("--ways", found=repr(way), expected="ants, or a size of voxels in mm")
    return ways


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter, allow_abbrev=False
    )
    parser.add_argument("--source", default="simulated", help="simulated (default), table, lpba40, ... (dmir scans)")
    parser.add_argument("--path", type=Path, help="the source's folder, or the table's file")
    parser.add_argument("--reference", help="scan that gives the grid (default: the template, or the first scan)")
    parser.add_argument("--scans", default="3", help="how many of the others, or their names (default 3)")
    parser.add_argument(
        "--label-map", help="from the labels' ids to structures, where they are not the structures' own"
    )
    parser.add_argument("--structures", help="table of structures, for instance lpba56")
    parser.add_argument("--grid", default="160x192x160", help="voxels (default 160x192x160)")
    parser.add_argument("--spacing", type=float, default=1.0, help="of the grid in mm (default 1)")
    parser.add_argument("--denoise", action="store_true", help="remove noise, too")
    parser.add_argument("--ways", default="ants,2,3,4", help="ways to align (default ants,2,3,4)")
    parser.add_argument("--threads", type=int, default=1, help="threads of ANTs' default; the affine itself uses one")
    parser.add_argument("--timeout", type=float, default=1800, help="seconds that a row may take (default 1800)")
    parser.add_argument("--out", type=Path, help="write the tables to NAME-steps, NAME-affine, ...: .csv or .md")
    parser.add_argument("--row", help=argparse.SUPPRESS)  # how the script calls itself for one row
    return parser


if __name__ == "__main__":
    sys.exit(run_main(main))
