"""What a plan holds: a row a stage, and the hours of all of them together."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import asdict, dataclass, field

import pandas as pd

from dmir.planning.device_speed import DeviceSpeed
from dmir.planning.jobs import CohortSize


@dataclass(frozen=True)
class Stage:
    """One row of the plan.

    Attributes
    ----------
    stage, what
        Of the pipeline; the cohort, the method or both.
    jobs
        Of Snakemake.
    number, unit
        Scans, steps or pairs in all these jobs.
    cpu_s, cpu_basis
        Seconds each on this machine's CPU, and where from: ``"measured"``, ``"scaled"`` (measured on a smaller grid,
        scaled), ``"roofline"`` (a lower bound) or ``"constant"`` (of :mod:`dmir.planning.costs`). None: not done there.
    gpu_s, gpu_basis
        The same on a GPU: the one at hand, or a lower bound for a reference.
    memory_gb
        Of one job; None: not known.
    note
        What to mind.
    """

    stage: str
    what: str
    jobs: int
    number: int
    unit: str
    cpu_s: float | None
    cpu_basis: str
    gpu_s: float | None = None
    gpu_basis: str = ""
    memory_gb: float | None = None
    note: str = ""

    @property
    def units_a_job(self) -> float:
        """Scans, steps or pairs that one job works through, on average."""
        return self.number / self.jobs if self.jobs else 0.0

    @property
    def job_s(self) -> float | None:
        """Seconds of one job, its start not counted: on a GPU, where it is done on one."""
        each = self.cpu_s if self.gpu_s is None else self.gpu_s
        return None if each is None else each * self.units_a_job

    @property
    def cpu_hours(self) -> float | None:
        """Of all jobs, one after the other, on the CPU."""
        return None if self.cpu_s is None else self.cpu_s * self.number / 3600

    @property
    def gpu_hours(self) -> float | None:
        """Of all jobs, one after the other, on one GPU."""
        return None if self.gpu_s is None else self.gpu_s * self.number / 3600


@dataclass(frozen=True)
class Plan:
    """The plan of a configuration.

    Attributes
    ----------
    stages
        In the order of the pipeline.
    cohorts
        What there is of each.
    speed, gpu
        The device at hand, and the GPU that ``gpu_s`` is of.
    threads, gpus
        Threads of a job, and cards that share the jobs.
    disk
        What -> 10^9 bytes.
    notes
        What the user should know before starting.
    """

    stages: list[Stage]
    cohorts: dict[str, CohortSize]
    speed: DeviceSpeed
    gpu: DeviceSpeed
    threads: int
    gpus: int
    disk: dict[str, float]
    notes: list[str] = field(default_factory=list)

    def table(self) -> pd.DataFrame:
        """Return a row a stage."""
        computed = ("units_a_job", "job_s", "cpu_hours", "gpu_hours")
        rows = [{**asdict(stage), **{name: getattr(stage, name) for name in computed}} for stage in self.stages]
        first = ["stage", "what", "jobs", "number", "unit", "units_a_job", "job_s", "cpu_s", "cpu_hours", "cpu_basis"]
        return pd.DataFrame(rows)[[*first, "gpu_s", "gpu_hours", "gpu_basis", "memory_gb", "note"]]

    def jobs(self) -> dict[str, int]:
        """Return the number of jobs of each stage."""
        counts: dict[str, int] = {}
        for stage in self.stages:
            counts[stage.stage] = counts.get(stage.stage, 0) + stage.jobs
        return counts

    def cpu_hours(self, without_networks: bool = False) -> float:
        """Return the hours of all jobs on the CPU; with a GPU the networks' are not among them."""
        chosen = (stage for stage in self.stages if not (without_networks and stage.gpu_s is not None))
        return sum(stage.cpu_hours or 0.0 for stage in chosen)

    def gpu_wall_hours(self) -> float:
        """Return the hours until the cards are done: no job is divided, and the trainings come first."""
        waves = ("train", "register")
        return sum(_makespan(_job_hours(s for s in self.stages if s.stage == wave), self.gpus) for wave in waves)


def _job_hours(stages: Iterable[Stage]) -> list[float]:
    return [stage.gpu_hours / stage.jobs for stage in stages if stage.gpu_hours for _ in range(stage.jobs)]


def _makespan(hours: Sequence[float], cards: int) -> float:
    """Return when the last card is done, if each takes the longest job that is left (Graham 1969)."""
    busy = [0.0] * cards
    for job in sorted(hours, reverse=True):
        busy[busy.index(min(busy))] += job
    return max(busy)
