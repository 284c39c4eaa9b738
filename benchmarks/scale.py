"""How large a workflow may grow: seconds, memory and jobs of Snakemake's dry run, on empty files.

    python benchmarks/scale.py
    python benchmarks/scale.py --scans 450 --runs plain quota
    python benchmarks/scale.py --fake /tmp/scale                 # for `dmir plan /tmp/scale/data-5000/paper-5000.yaml`

The configuration is config/paper.yaml: every method, three seeds, LPBA40 as well. With 450 scans its own cohort is
faked, as neurite-OASIS lays it out; with any other number a table of that many scans stands for it, of which 70 % are
for training, 10 % for validation and the rest, but for four atlases, for the test. A row is one process:

cpu_s
    CPU seconds of `snakemake -n`, start and all; seconds on the wall are not given, as other work changes them more.
mb
    Its largest resident set.
jobs
    In all, and of the rules of which there are many.
"""

from __future__ import annotations

import argparse
import os
import re
import subprocess
import sys
import tempfile
import time
from collections import Counter
from pathlib import Path
from typing import Any

import pandas as pd
import yaml

ROOT = Path(__file__).parents[1]
RUNS = {"plain": [], "quiet": ["--quiet", "all"], "quota": ["--quiet", "rules", "--config", "disk_quota_gb=400"]}
MANY = ("preprocess_scans", "train", "register_classical", "register_descent", "register_network", "score_shard")


def fake_lpba40(folder: Path) -> None:
    """Lay out LPBA40's 40 scans, empty."""
    for number in range(1, 41):
        name = f"S{number:02d}"
        for kind in ("skullstripped", "structure.label"):
            _empty(folder / "delineation_space" / name / f"{name}.delineation.{kind}.nii.gz")


def fake_neurite_oasis(folder: Path, scans: int) -> None:
    """Lay out scans of neurite-OASIS, empty."""
    names = [f"OASIS_OAS1_{number:04d}_MR1" for number in range(1, scans + 1)]
    for name in names:
        for kind in ("aligned_norm", "aligned_seg35"):
            _empty(folder / name / f"{kind}.nii.gz")
    (folder / "subjects.txt").write_text("\n".join(names) + "\n")


def fake_table(folder: Path, scans: int) -> Path:
    """Write a table of scans, and their files, empty; return its path."""
    rows = []
    splits = ["train"] * int(0.7 * scans) + ["val"] * int(0.1 * scans) + ["atlas"] * 4
    for number in range(scans):
        name = f"scan-{number:05d}"
        row = {"scan": name, "subject": name, "image": f"{name}/image.nii.gz", "labels": f"{name}/labels.nii.gz"}
        for key in ("image", "labels"):
            _empty(folder / row[key])
        rows.append({**row, "split": splits[number] if number < len(splits) else "test"})
    pd.DataFrame(rows).to_csv(folder / "scans.csv", index=False)
    return folder / "scans.csv"


def _empty(path: Path) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.touch()


def paper_of(folder: Path, scans: int) -> Path:
    """Write the paper's configuration for so many scans, and their empty files; return its path."""
    values: dict[str, Any] = yaml.safe_load((ROOT / "config" / "paper.yaml").read_text())
    values |= {"root": str(folder), "results": "results/scale"}
    fake_lpba40(folder / "lpba40")
    if scans == 450:
        fake_neurite_oasis(folder / "oasis", scans)
    else:
        table = fake_table(folder / "scans", scans)
        common = {"structures": "oasis28", "label_map": "seg35_to_oasis28"}
        values["cohorts"]["oasis"] = {"source": "table", "table": str(table), **common}
    path = folder / f"paper-{scans}.yaml"
    path.write_text(yaml.safe_dump(values))
    return path


def dry_run(folder: Path, config: Path, *arguments: str) -> dict[str, Any]:
    """Return what one dry run in a folder of its own took, and its jobs by rule."""
    command = [str(Path(sys.executable).parent / "snakemake"), "--snakefile", str(ROOT / "Snakefile"), "-n"]
    log = folder / "dry-run.log"
    with log.open("w") as file:
        process = subprocess.Popen(
            [*command, "--cores", "8", "--configfile", str(config), *arguments],
            cwd=folder,
            stdout=file,
            stderr=file,
            env={**os.environ, "PYTHONPATH": "", "OMP_NUM_THREADS": "1"},
        )
        start = time.monotonic()
        _, status, usage = os.wait4(process.pid, 0)  # of this child alone
        process.returncode = os.waitstatus_to_exitcode(status)
    text = log.read_text()
    if process.returncode:
        raise RuntimeError(text[-3000:])
    jobs: Counter[str] = Counter()  # a batch of scans has a rule of its own
    stats = text.rpartition("Job stats:")[2]  # they stand there twice
    for rule, count in re.findall(r"^(\w+?)(?:_[a-z0-9]+_(?:reference|[a-z]+\d{3}))? +(\d+)$", stats, re.MULTILINE):
        jobs[rule] += int(count)
    return {
        "cpu_s": usage.ru_utime + usage.ru_stime,
        "wall_s": time.monotonic() - start,
        "mb": usage.ru_maxrss / 1024,
        "jobs": jobs,
    }


def main() -> None:
    """Print a row for each size and kind of run."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--scans", type=int, nargs="+", default=[450, 5000])
    parser.add_argument("--runs", nargs="+", choices=list(RUNS), default=["plain"])
    parser.add_argument("--fake", type=Path, metavar="FOLDER", help="write the data and configurations there, and end")
    options = parser.parse_args()
    if options.fake is not None:
        for scans in options.scans:
            print(paper_of(options.fake / f"data-{scans}", scans))
        return
    rows = []
    with tempfile.TemporaryDirectory(prefix="scale-") as temporary:
        for scans in options.scans:
            config = paper_of(Path(temporary) / f"data-{scans}", scans)
            for run in options.runs:
                found = dry_run(Path(temporary), config, *RUNS[run])
                jobs = found["jobs"]
                many = {name: jobs.get(name, 0) for name in MANY}
                measured = {"cpu_s": round(found["cpu_s"], 1), "mb": round(found["mb"])}
                rows.append({"scans": scans, "run": run, **measured, "jobs": jobs["total"], **many})
    print(pd.DataFrame(rows).to_markdown(index=False))


if __name__ == "__main__":
    main()
