"""The plan as text, as JSON and as a file."""

from __future__ import annotations

import json
import math
import os
from dataclasses import asdict
from pathlib import Path

import pandas as pd

from dmir.errors import InputError
from dmir.planning.plan import Plan
from dmir.volumes import atomic_path

SUFFIXES = (".csv", ".md")
TITLES = {
    "number": "n",
    "units_a_job": "n a job",
    "job_s": "s a job",
    "cpu_s": "CPU s each",
    "cpu_hours": "CPU h",
    "cpu_basis": "known from",
    "gpu_s": "GPU s each",
    "gpu_hours": "GPU h",
    "gpu_basis": "known from ",
    "memory_gb": "GB a job",
}
EXPLANATION = """\
measured: on this device; scaled: measured on a smaller grid; constant: on another machine;
roofline: the least that the device's peaks allow, which no program reaches."""


def check_options(out: Path | None, *, seconds: float, threads: int, gpus: int) -> None:
    """Refuse, before anything is measured, what could not be measured or written."""
    if out is not None and out.suffix not in SUFFIXES:
        raise InputError("--out", found=str(out), expected=f"a name in {' or '.join(SUFFIXES)}")
    for name, value in (("--seconds", seconds), ("--threads", threads), ("--gpus", gpus)):
        if not value > 0:
            raise InputError(name, found=str(value), expected="a number above 0")


def describe(plan: Plan) -> str:
    """Return the plan as text: the cohorts, the table, the totals, the disk, and what to mind."""
    lines = [
        f"cohorts.{name}: {', '.join(f'{n} {split}' for split, n in size.scans.items()) or 'no'} scans;"
        f" {size.pairs} pairs to register"
        for name, size in plan.cohorts.items()
    ]
    parts = ["\n".join(lines), _jobs_line(plan), _device_lines(plan), _table(plan).to_string(index=False), EXPLANATION]
    parts.append("\n".join(_totals(plan)))
    parts.append("\n".join(_disk_lines(plan)))
    if plan.notes:
        parts.append("\n".join(f"note: {note}" for note in plan.notes))
    return "\n\n".join(parts)


def to_json(plan: Plan) -> str:
    """Return everything in the plan as JSON."""
    content = {
        "stages": json.loads(plan.table().to_json(orient="records")),
        "cohorts": {name: asdict(size) for name, size in plan.cohorts.items()},
        "device": asdict(plan.speed),
        "gpu": asdict(plan.gpu),
        "threads": plan.threads,
        "gpus": plan.gpus,
        "jobs": plan.jobs(),
        "cpu_hours": plan.cpu_hours(),
        "gpu_wall_hours": plan.gpu_wall_hours(),
        "disk_gb": plan.disk,
        "notes": plan.notes,
    }
    return json.dumps(content, indent=2)


def write_table(plan: Plan, path: Path) -> None:
    """Write the table: in ``.csv`` every digit, in ``.md`` what the text shows, totals and notes included."""
    with atomic_path(path) as temporary:
        if path.suffix == ".csv":
            plan.table().to_csv(temporary, index=False)
            return
        told = [_jobs_line(plan), *_totals(plan), *_disk_lines(plan), *plan.notes]
        table = _table(plan).to_markdown(index=False, disable_numparse=True)
        text = f"{_device_lines(plan)}\n\n{table}\n\n{EXPLANATION}\n\n" + "".join(f"- {line}\n" for line in told)
        Path(temporary).write_text(text, encoding="utf-8")


def _device_lines(plan: Plan) -> str:
    lines = [f"device: {plan.speed.device}, {plan.threads} thread(s): {_peaks(plan)}"]
    if plan.gpu is not plan.speed:
        lines.append(f"GPU: none at hand; the GPU's columns are lower bounds for one {plan.gpu.device}")
    return "\n".join(lines)


def _jobs_line(plan: Plan) -> str:
    """Say how many jobs each stage has, as a dry run of Snakemake counts them."""
    counts = plan.jobs()
    told = ", ".join(f"{stage} {count:,}" for stage, count in counts.items())
    return f"jobs: {told}; {sum(counts.values()):,} in all, beside some dozens of tables and figures"


def _disk_lines(plan: Plan) -> list[str]:
    return ["disk in GB, before compression", *(f"  {what}: {_number(size)}" for what, size in plan.disk.items())]


def _peaks(plan: Plan) -> str:
    products = ", ".join(f"{name} {value:.3g}" for name, value in plan.speed.teraflops.items())
    return f"{products} TFLOP/s in matrix products, {plan.speed.bandwidth:.3g} GB/s in copies"


def _totals(plan: Plan) -> list[str]:
    cores = os.cpu_count() or 1
    jobs = max(1, cores // plan.threads)
    on_gpu = plan.gpu is plan.speed
    hours = plan.cpu_hours(without_networks=on_gpu)
    what = "without the networks" if on_gpu else "networks included"
    lines = [
        f"on the CPU, {what}: {_number(hours)} hours of jobs of {plan.threads} thread(s);"
        f" with {jobs} at a time on {cores} cores {_number(hours / jobs)} hours"
    ]
    of_gpu = sum(stage.gpu_hours or 0.0 for stage in plan.stages)
    lines.append(f"GPU-hours, trainings and registrations: {'' if on_gpu else 'at least '}{_number(of_gpu)}")
    cards = f"{plan.gpus} such cards" if plan.gpus > 1 else "one such card"
    least = "" if on_gpu else "at least "
    lines.append(f"networks on {cards}: {least}{_number(plan.gpu_wall_hours())} hours")
    if not on_gpu:
        rest = plan.cpu_hours(without_networks=True)
        lines.append(f"everything else on the CPU: {_number(rest)} hours of jobs")
    return [*lines, "tables, figures and the studies (ablation, lambda_study) are not in it"]


def _table(plan: Plan) -> pd.DataFrame:
    table = plan.table()
    for column in table.columns:
        if table[column].dtype.kind in "fi" or column in ("cpu_s", "gpu_s", "memory_gb"):
            table[column] = table[column].map(_number)
    return table.rename(columns=TITLES)


def _number(value: float | None) -> str:
    if value is None or math.isnan(value):
        return ""
    if value == 0 or float(value).is_integer() or value >= 1000:
        return f"{value:,.0f}"
    return f"{value:.3g}"
