"""What the run cost: the benchmark files of Snakemake, added up by rule."""

from __future__ import annotations

import csv
import json
import math
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from dmir.report.names import method_name
from dmir.report.products import rules

# data flow; rules that are not named follow in alphabetical order
RULES = (
    "make_scans", "list_scans", "preprocess_scans", "gather_quality", "pack_scans", "train",
    "register_classical", "register_descent", "register_network", "score_shard",
    "gather_scores", "gather_study_scores", "provenance", "study_provenance",
    *rules(),
)  # fmt: skip
OWN_RULE = "report_page"  # its file is of an earlier page


@dataclass(frozen=True)
class RuleTimes:
    """The jobs of one rule.

    Attributes
    ----------
    rule
        Its name.
    jobs
        Number of benchmark files.
    seconds, longest
        Wall time of all jobs together, and of the longest.
    cpu_seconds
        CPU time of all jobs together, as far as it was measured.
    peak_mb
        Highest resident memory of a job in MB; NaN where it was not measured.
    unmeasured
        Jobs without a CPU time or a memory: they end before Snakemake looks.
    """

    rule: str
    jobs: int
    seconds: float
    longest: float
    cpu_seconds: float
    peak_mb: float
    unmeasured: int


def _number(text: str | None) -> float:
    """Return a number of a benchmark file; NaN for ``-``, ``NA``, ``NaN`` and nothing."""
    try:
        value = float(text or "nan")
    except ValueError:
        return math.nan
    return value if math.isfinite(value) else math.nan


def _read_job(path: Path) -> tuple[float, float, float]:
    """Return wall seconds, CPU seconds and highest memory of a benchmark file; repeats of a job are added."""
    with path.open(encoding="utf-8", newline="") as file:
        rows = list(csv.DictReader(file, delimiter="\t"))
    wall, cpu, memory = ([_number(row.get(key)) for row in rows] for key in ("s", "cpu_time", "max_rss"))
    peak = max(_known(memory), default=math.nan)
    if not peak >= 1:  # no job does with less: it ended before Snakemake looked at it
        return math.fsum(_known(wall)), math.nan, math.nan
    return math.fsum(_known(wall)), math.fsum(cpu), peak


def _known(values: Iterable[float]) -> list[float]:
    return [value for value in values if not math.isnan(value)]


def _add_up(rule: str, jobs: Sequence[tuple[float, float, float]]) -> RuleTimes:
    walls, cpus, memories = zip(*jobs, strict=True)
    return RuleTimes(
        rule=rule,
        jobs=len(jobs),
        seconds=math.fsum(walls),
        longest=max(walls),
        cpu_seconds=math.fsum(_known(cpus)),
        peak_mb=max(_known(memories), default=math.nan),
        unmeasured=sum(math.isnan(cpu) or math.isnan(memory) for cpu, memory in zip(cpus, memories, strict=True)),
    )


def read_times(results: Path) -> list[RuleTimes]:
    """Return the times by rule in the order of the data flow, the total last; nothing where there are no files."""
    folder = results / "benchmarks"
    jobs: dict[str, list[tuple[float, float, float]]] = {}
    for path in sorted(folder.rglob("*.tsv")):
        rule = path.relative_to(folder).parts[0].removesuffix(".tsv")
        if rule != OWN_RULE:
            jobs.setdefault(rule, []).append(_read_job(path))
    order = [*(rule for rule in RULES if rule in jobs), *sorted(set(jobs) - set(RULES))]
    rows = [_add_up(rule, jobs[rule]) for rule in order]
    return [*rows, _add_up("total", [job for rule in order for job in jobs[rule]])] if rows else []


@dataclass(frozen=True)
class Training:
    """One model's training as ``training.json`` tells it; what it does not tell is None."""

    cohort: str
    method: str
    model: str
    parameters: int | None
    steps: int | None
    seconds: float | None
    memory_mb: float | None
    device: str


def read_trainings(results: Path, told: Sequence[str]) -> list[Training]:
    """Return the trainings of the cohorts for which no table tells them.

    Parameters
    ----------
    told
        Names of the tables on the page; ``trainings_<cohort>`` tells that cohort's.
    """
    trainings = []
    for path in sorted((results / "models").glob("*/*/*/training.json")):
        cohort, method, model = path.relative_to(results / "models").parts[:3]
        if f"trainings_{cohort}" in told and (results / "tables" / f"trainings_{cohort}.html").is_file():
            continue
        try:
            record: Any = json.loads(path.read_text(encoding="utf-8"))
        except ValueError:
            record = {}
        record = record if isinstance(record, dict) else {}
        trainings.append(
            Training(
                cohort=cohort,
                method=method_name(method),
                model=model,
                parameters=record.get("parameters"),
                steps=record.get("steps"),
                seconds=record.get("seconds"),
                memory_mb=record.get("peak_memory_mb"),
                device=str(record.get("device", "")),
            )
        )
    return trainings


def duration(seconds: float | None) -> str:
    """Return a time as people say it.

    Examples
    --------
    >>> duration(0.4), duration(72.3), duration(5000)
    ('0.4 s', '1 min 12 s', '1 h 23 min')
    """
    if seconds is None or math.isnan(seconds):
        return ""
    if seconds < 10:
        return f"{seconds:.1f} s"
    whole = round(seconds)
    if whole < 60:
        return f"{whole} s"
    if whole < 3600:
        return f"{whole // 60} min {whole % 60} s"
    minutes = round(seconds / 60)
    return f"{minutes // 60} h {minutes % 60} min"
