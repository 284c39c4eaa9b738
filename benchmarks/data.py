"""The data of a training: seconds until the scans are ready with and without a pack, and how fast it streams.

    python benchmarks/data.py
    python benchmarks/data.py --folder results/preprocessed/oasis --precisions float16,uint8,float32

Without a folder so many synthetic brains of the grid are written first, compressed as preprocessing does. Each row is
a process of its own.

read_s
    Seconds to read all compressed scans, as a training without a pack does.
pack_s
    To pack them.
open_s
    To open the pack as a training does, with the label maps of two scans; on a GPU it is in the GPU's memory then.
cold_gb_s, warm_gb_s
    GB (10^9 bytes, as packed) a second through the prefetcher to float32 images on the device, with nothing of the
    file in memory (where the system follows that advice), and with all of it there.
pairs_s
    Pairs of images a second, warm.
waited_ms
    For images, in the mean of all steps but the first, warm, when every step computes for --step-ms.
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
from measuring import add_common_arguments, check_common, measure_apart, parse_shape, print_table, run_main, tell

from dmir.errors import InputError
from dmir.training.data import ImageBank, Scan, load_bank
from dmir.training.devices import choose_device, device_name
from dmir.training.pack import open_pack, pack_scans, require_precision
from dmir.volumes import Volume, write_volume

LABELS = 28  # structures of the synthetic brains


# --- one row, in this process ---


def measure_row(row: dict[str, Any]) -> dict[str, Any]:
    """Read, pack, open and stream the scans of a folder in one precision."""
    device, precision = choose_device(row["device"]), row["precision"]
    torch.set_num_threads(row["threads"])
    torch.zeros(1, device=device)  # starting CUDA is not the data's doing
    scans = scans_of(Path(row["folder"]))
    found: dict[str, Any] = {"device": device_name(device), "scans": len(scans)}
    parts = {"train": scans[:-2], "validation": scans[-2:-1], "atlases": scans[-1:], "device": device}
    found["read_s"], read = clock(lambda: load_bank(**parts, precision=precision, threads=row["threads"]))
    found["gb"], found["grid"] = read.nbytes / 1e9, "x".join(map(str, read.grid.shape))
    del read
    with tempfile.TemporaryDirectory(dir=row["scratch"]) as folder:
        found["pack_s"], _ = clock(lambda: pack_scans(folder, scans, precision=precision, threads=row["threads"]))
        found["open_s"], _ = clock(lambda: load_bank(**parts, pack=open_pack(folder)))
        pack = open_pack(folder)
        bank = ImageBank(pack.names, pack.grid, device, precision, pack=pack, rows=[*range(len(scans))])  # it streams
        found |= streaming(bank, row["repeats"], row["step_ms"])
    return found


def streaming(bank: ImageBank, repeats: int, step_ms: float) -> dict[str, float]:
    """Stream all scans in pairs: once with a cold file, so many times with a warm one, and beside a computation."""
    assert bank.pack is not None
    positions = list(range(len(bank.names)))
    pairs = [torch.tensor([pair]) for pair in zip(positions[::2], positions[1::2], strict=False)]
    pair_gb = 2 * bank.nbytes / len(positions) / 1e9
    os.posix_fadvise(bank.pack.descriptor, 0, 0, os.POSIX_FADV_DONTNEED)
    cold, _ = stream(bank, pairs)
    many = pairs * max(repeats, -(-24 // len(pairs)))
    warm, _ = stream(bank, many)
    _, waited = stream(bank, many[:24], step_ms / 1000)
    return {
        "cold_gb_s": len(pairs) * pair_gb / cold,
        "warm_gb_s": len(many) * pair_gb / warm,
        "pairs_s": len(many) / warm,
        "waited_ms": 1000 * waited / (len(many[:24]) - 1),
    }


def stream(bank: ImageBank, pairs: Sequence[torch.Tensor], step_s: float = 0.0) -> tuple[float, float]:
    """Return the seconds that all steps took, and those that all but the first waited for their images."""
    start = time.perf_counter()
    with bank.prefetch(pairs):
        for step, pair in enumerate(pairs):
            bank.pairs_of(pair)
            if step == 0:
                before = bank.waited_seconds
            time.sleep(step_s)  # as when a GPU computes: this process has nothing to do
        if bank.device.type == "cuda":
            torch.cuda.synchronize(bank.device)
    return time.perf_counter() - start, bank.waited_seconds - before


def clock(call: Any) -> tuple[float, Any]:
    start = time.perf_counter()
    result = call()
    if torch.cuda.is_initialized():
        torch.cuda.synchronize()
    return time.perf_counter() - start, result


def scans_of(folder: Path) -> list[Scan]:
    """Return the scans of a folder of preprocessed scans.

    Raises
    ------
    InputError
        There are not three of them.
    """
    places = sorted(path.parent for path in folder.glob("*/image.nii.gz"))
    if len(places) < 3:
        raise InputError(folder, found=f"{len(places)} files */image.nii.gz", expected="at least 3 preprocessed scans")
    labels = {place: place / "labels.nii.gz" for place in places}
    return [
        Scan(place.name, place / "image.nii.gz", labels[place] if labels[place].is_file() else None) for place in places
    ]


# --- what is asked ---


def write_brains(folder: Path, shape: tuple[int, int, int], count: int) -> None:
    """Write images of smoothed noise within an ellipsoid that fills half of the grid, and labels: its sectors."""
    axes = np.meshgrid(*(np.linspace(-1, 1, n, dtype=np.float32) for n in shape), indexing="ij")
    inside = sum(x**2 for x in axes) < 0.97
    sectors = np.where(inside, 1 + (np.arctan2(axes[0], axes[1]) / np.pi * 0.499 + 0.5) * LABELS, 0).astype(np.uint8)
    for number in range(count):
        noise = torch.from_numpy(np.random.default_rng(number).random((1, 1, *shape), dtype=np.float32))
        smooth = torch.nn.functional.avg_pool3d(noise, 3, 1, 1)[0, 0].numpy()
        place = folder / f"synthetic-{number}"
        image = np.where(inside, smooth, 0).clip(0, 1)
        write_volume(place / "image.nii.gz", Volume(image, np.eye(4)))
        write_volume(place / "labels.nii.gz", Volume(sectors, np.eye(4)))


def main(arguments: Sequence[str] | None = None) -> None:
    """Measure what the command line asks for, and print the table."""
    options = _parser().parse_args(arguments)
    if options.row:
        print(json.dumps(measure_row(json.loads(options.row))))
        return
    check_common(options)
    precisions = options.precisions.split(",")
    for precision in precisions:
        require_precision(precision)
    common = {key: getattr(options, key) for key in ("device", "threads", "repeats", "step_ms")}
    rows = []
    with tempfile.TemporaryDirectory(dir=options.scratch) as scratch:
        folder = options.folder
        if folder is None:
            folder = Path(scratch, "synthetic")
            write_brains(folder, parse_shape(options.grid), options.count)
            tell(f"{options.count} synthetic scans written")
        scans_of(folder)
        for precision in precisions:
            row = {**common, "folder": str(folder), "precision": precision, "scratch": scratch}
            found = measure_apart(__file__, row, options.threads, options.timeout)
            tell(f"{precision}: {found.get('failed', 'done')}")
            rows.append({"of": folder.name, "precision": precision, **found})
    print_table(pd.DataFrame(rows), options.out)


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter, allow_abbrev=False
    )
    parser.add_argument("--folder", type=Path, help="folder of preprocessed scans: */image.nii.gz, */labels.nii.gz")
    parser.add_argument("--grid", default="160x192x224", help="of the synthetic scans (default 160x192x224)")
    parser.add_argument("--count", type=int, default=4, help="of the synthetic scans (default 4)")
    parser.add_argument("--precisions", default="float16,uint8", help="of the pack (default float16,uint8)")
    parser.add_argument("--step-ms", type=float, default=50.0, help="computation beside which it streams (default 50)")
    parser.add_argument("--scratch", type=Path, help="folder for packs, on the disk to be measured (default: /tmp)")
    add_common_arguments(parser)
    return parser


if __name__ == "__main__":
    sys.exit(run_main(main))
