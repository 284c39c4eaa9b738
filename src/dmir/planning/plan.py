"""The plan of a configuration: what each stage costs, and where each of its seconds is known from."""

from __future__ import annotations

import logging
import os
import time
from collections.abc import Iterable, Mapping, Sequence
from concurrent.futures import ProcessPoolExecutor
from dataclasses import asdict, dataclass, field
from typing import Any

import pandas as pd
import torch

from dmir import registry
from dmir.config import Config, Network
from dmir.methods import descent
from dmir.methods.stages import levels
from dmir.planning.costs import (
    PREPROCESS_AFFINE,
    PREPROCESS_N4,
    PREPROCESS_SCAN,
    SCORE_VOXEL,
    STARTUP,
    WRITE_VOXEL,
    field_bytes,
    voxels_of,
)
from dmir.planning.device_speed import REFERENCE_GPU, DeviceSpeed, measure_speed, roofline, roofline_seconds
from dmir.planning.jobs import CohortSize, cohort_size, used_cohorts
from dmir.planning.quota import PACKED_VOXEL, field_shards, lanes, registering_models, room_for_fields, staying_bytes
from dmir.planning.shards import shard_sizes
from dmir.planning.trial import try_apart
from dmir.settings import PairCost
from dmir.training.cost import Cost, StepCost, count_inference, count_objective, count_step, settings_of
from dmir.training.devices import choose_device
from dmir.training.memory import PROCESS, Job, free_memory

log = logging.getLogger(__name__)

Shape = tuple[int, int, int]
REDUCTIONS = (1.0, 0.75, 0.5, 0.375, 0.25, 0.2, 0.15)  # edges of the grids that are tried, of the configuration's
SMALLEST_EDGE = 32
EXPECTED_SHARE = 0.15  # of the roofline's speed, when a grid is chosen that can be measured in time
CLASSICAL_GRID = (40, 40, 40)
SCORE_GRID = (48, 56, 48)
LAUNCH = 5e-6  # seconds of a kernel on a GPU at least, from its launch to the next


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
        scaled), ``"roofline"`` (a lower bound) or ``"constant"`` (stated in this module). None: not done there.
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


@dataclass(frozen=True)
class NetworkCost:
    """What is counted of a network on the configuration's grid."""

    step: StepCost
    inference: Cost
    objective: Cost


@dataclass(frozen=True)
class NetworkSeconds:
    """Seconds of a step and of an inference on one device, and where they are known from."""

    step: float
    inference: float
    objective: float
    basis: str


def plan(
    configuration: Config,
    *,
    device: str = "auto",
    threads: int = 1,
    seconds: float = 120.0,
    measured: bool = True,
    gpus: int = 1,
) -> Plan:
    """Plan a configuration.

    Parameters
    ----------
    device
        ``"auto"``, ``"cpu"`` or ``"cuda"``: what networks run on.
    threads
        Of torch, and of each job.
    seconds
        For all measurements together; counting comes on top.
    measured
        False: nothing is run but the measurement of the device's peaks, which takes three seconds.
    gpus
        Cards that share trainings and registrations.

    Raises
    ------
    InputError
        A GPU is asked for and there is none, or a network cannot be built.
    """
    place = choose_device(device)
    torch.set_num_threads(threads)
    log.info("measuring the peaks of the device")
    speed = measure_speed(place)
    sizes = {name: cohort_size(configuration, name) for name in used_cohorts(configuration)}
    names, shape = configuration.networks(), configuration.grid.shape
    settings = {name: _network(configuration, name) for name in names}
    log.info("counting %d networks on %s voxels", len(names), "x".join(map(str, shape)))
    costs = _count_all([(settings[name], shape, place.type) for name in names])
    budget = max(seconds / (len(names) + 3) - STARTUP, 1.0) if measured else 0.0  # the rest: two methods, the scores
    found = _measure_all(list(settings.values()), shape, costs, speed, place, threads, budget)
    gpu = speed if place.type == "cuda" else REFERENCE_GPU
    counted = dict(zip(names, costs, strict=True))
    seconds_of = dict(zip(names, found, strict=True))
    planner = _Planner(configuration, sizes, counted, seconds_of, speed, gpu, place, threads, budget)
    stages = [*planner.preprocess(), *planner.train(), *planner.register(), *planner.score()]
    return Plan(stages, sizes, speed, gpu, threads, gpus, planner.disk(), planner.notes(stages))


def _network(configuration: Config, name: str) -> Network:
    settings = configuration.method(name)
    assert isinstance(settings, Network)
    return settings


def _count_all(jobs: Sequence[tuple[Network, Shape, str]]) -> list[NetworkCost]:
    """Count networks, several at a time: it takes seconds each."""
    if not jobs or jobs[0][2] == "cuda":  # a process that has used a GPU cannot be divided
        return list(map(_count_one, jobs))
    with ProcessPoolExecutor(max_workers=max(1, min(len(jobs), os.cpu_count() or 1, 4))) as pool:
        return list(pool.map(_count_one, jobs))


def _count_one(job: tuple[Network, Shape, str]) -> NetworkCost:
    settings, shape, device_type = job
    torch.set_num_threads(1)
    training = settings.training
    batch = Job(settings.algorithm, settings.network, shape, training).batch_size
    return NetworkCost(
        count_step(settings.algorithm, settings.network, shape, training, batch, device_type=device_type),
        count_inference(settings.algorithm, settings.network, shape, training["precision"], device_type=device_type),
        count_objective(shape, training, device_type=device_type),
    )


def _measure_all(
    networks: Sequence[Network],
    shape: Shape,
    costs: Sequence[NetworkCost],
    speed: DeviceSpeed,
    place: torch.device,
    threads: int,
    budget: float,
) -> list[NetworkSeconds]:
    """Measure each network on a grid that there is time for, and scale; without a ``budget`` nothing is measured."""
    trials = [
        _try_network(settings, shape, cost, speed, place, threads, budget)
        for settings, cost in zip(networks, costs, strict=True)
    ]
    asked = [(settings, grid, place.type) for settings, (grid, _) in zip(networks, trials, strict=True) if grid]
    smaller = iter(_count_all(asked))
    return [
        _scaled(settings, cost, next(smaller) if grid else None, answer, speed, grid == shape)
        for settings, cost, (grid, answer) in zip(networks, costs, trials, strict=True)
    ]


def _try_network(
    settings: Network,
    shape: Shape,
    cost: NetworkCost,
    speed: DeviceSpeed,
    place: torch.device,
    threads: int,
    budget: float,
) -> tuple[Shape | None, dict[str, float]]:
    """Measure a network on the largest grid that there is time and memory for; None where there is none."""
    precision = settings_of(settings.training).precision
    least = roofline_seconds(cost.step, speed, precision) + roofline_seconds(cost.inference, speed, precision)
    grid = _grid_to_measure(shape, least, cost.step.peak_mb * 1e6, place, budget) if budget else None
    if grid is None:
        return None, {}
    log.info("measuring %s on %s voxels", settings.algorithm, "x".join(map(str, grid)))
    request = {
        "kind": "network",
        "algorithm": settings.algorithm,
        "hyperparameters": dict(settings.network),
        "shape": grid,
        "training": settings.training,
        "device": str(place),  # this very card: its lease is this process's
        "seconds": budget,
    }
    answer = try_apart(request, threads, timeout=3 * budget + 30)
    return (None, {}) if answer is None else (grid, answer)


def _scaled(
    settings: Network,
    cost: NetworkCost,
    small: NetworkCost | None,
    answer: dict[str, float],
    speed: DeviceSpeed,
    whole: bool,
) -> NetworkSeconds:
    """Scale what was measured by the roofline: a network reaches the same share of it on both grids."""
    precision = settings_of(settings.training).precision
    least = [roofline_seconds(part, speed, precision) for part in (cost.step, cost.inference, cost.objective)]
    if small is None:
        return NetworkSeconds(least[0], least[1], least[2], "roofline")
    step = least[0] * answer["step_s"] / roofline_seconds(small.step, speed, precision)
    inference = least[1] * answer["inference_s"] / roofline_seconds(small.inference, speed, precision)
    return NetworkSeconds(step, inference, least[2] * step / least[0], "measured" if whole else "scaled")


def _grid_to_measure(shape: Shape, least: float, peak: float, place: torch.device, budget: float) -> Shape | None:
    """Return the largest grid on which a few steps and inferences fit into the time, or the smallest of them.

    None where even that has no memory.
    """
    free = free_memory(place)
    for reduction in REDUCTIONS:
        edges = [min(n, max(SMALLEST_EDGE, round(n * reduction))) for n in shape]
        share = edges[0] * edges[1] * edges[2] / (shape[0] * shape[1] * shape[2])
        in_time = 4 * least * share / EXPECTED_SHARE <= budget or reduction == REDUCTIONS[-1]
        if in_time and peak * share + PROCESS <= 0.8 * free:
            return edges[0], edges[1], edges[2]
    return None


@dataclass
class _Planner:
    """Makes the rows of the plan, stage by stage."""

    configuration: Config
    sizes: dict[str, CohortSize]
    costs: dict[str, NetworkCost]
    seconds: dict[str, NetworkSeconds]
    speed: DeviceSpeed
    gpu: DeviceSpeed
    place: torch.device
    threads: int
    budget: float
    _tried: dict[str, dict[str, float] | None] = field(default_factory=dict)

    @property
    def voxels(self) -> int:
        return voxels_of(self.configuration.grid.shape)

    @property
    def runs(self) -> int:
        """Methods that register each pair, a network once a seed."""
        return registering_models(self.configuration)

    def preprocess(self) -> list[Stage]:
        """A job a scan; how long it takes depends on the scan and not on the grid."""
        rows = []
        for name, size in self.sizes.items():
            settings = self.configuration.preprocess_of(self.configuration.cohorts[name])
            seconds = PREPROCESS_SCAN
            seconds += PREPROCESS_N4 if settings.bias_correction else 0.0
            seconds += PREPROCESS_AFFINE / settings.affine_spacing**2 if settings.affine else 0.0
            notes = []
            if settings.skull_strip == "deepbet":
                seconds += 10.0
                notes.append("deepbet: a constant of 10 s on the CPU")
            if self.configuration.cohorts[name].MADE is not None:
                notes.append("without making the scans")
            rows.append(
                Stage("preprocess", name, size.total, size.total, "scan", seconds, "constant", note="; ".join(notes))
            )
        return rows

    def train(self) -> list[Stage]:
        """A job a network and seed."""
        rows = []
        images = (
            self.sizes[self.configuration.train_on].for_training * self.voxels * PACKED_VOXEL[self.configuration.packed]
        )
        for name, cost in self.costs.items():
            training = _network(self.configuration, name).training
            found, seeds = self.seconds[name], len(self.configuration.seeds_of(name))
            rows.append(
                Stage(
                    "train",
                    name,
                    seeds,
                    seeds * int(training["steps"]),
                    "step",
                    **self._seconds(found.step, found.basis, cost.step, training["precision"]),
                    memory_gb=(cost.step.peak_mb * 1e6 + PROCESS + images) / 1e9,
                    note=self._bound(cost.step, training["precision"]),
                )
            )
        return rows

    def register(self) -> list[Stage]:
        """A job a method, seed and shard of a cohort's pairs."""
        rows = []
        for method in self.configuration.methods:
            for cohort in self.configuration.test_on:
                size = self.sizes[cohort]
                of = self.configuration.network_of(method)
                if of is None:
                    rows.append(self._classical(method, cohort, size))
                    continue
                rows.append(self._learned(method, of, cohort, size))
        return rows

    def score(self) -> list[Stage]:
        """A job a shard of each method and seed."""
        rows = []
        interpolations = self.configuration.scores.label_interpolation
        for cohort in self.configuration.test_on:
            size = self.sizes[cohort]
            answer = self._try_scores(cohort)
            each = SCORE_VOXEL * len(interpolations) if answer is None else answer["score_s"]
            basis = "constant" if answer is None else "scaled"
            jobs = sum(
                self._shards(method, cohort) * len(self.configuration.models_of(method))
                for method in self.configuration.methods
            )
            rows.append(Stage("score", cohort, jobs, size.pairs * self.runs, "pair", each * self.voxels, basis))
        return rows

    def disk(self) -> dict[str, float]:
        """Return what lies on the disk at most, 10^9 bytes, before compression."""
        return {"one field": field_bytes(self.configuration) / 1e9} | disk_parts(self.configuration, self.sizes)

    def notes(self, stages: Sequence[Stage]) -> list[str]:
        """Return what the user should know before starting."""
        notes = []
        for name, size in self.sizes.items():
            if size.known_from == "split":
                notes.append(f"cohorts.{name}: no data there; its numbers are those of its split")
            elif size.known_from == "nothing":
                notes.append(f"cohorts.{name}: left out, as its scans cannot be listed: {size.problem}")
        limit = 60 * self.configuration.timeout_minutes
        for stage in stages:
            if stage.stage == "register" and stage.gpu_s is None and (stage.cpu_s or 0.0) > limit:
                notes.append(
                    f"{stage.what}: a pair may take {stage.cpu_s:,.0f} s, more than timeout_minutes"
                    f" ({self.configuration.timeout_minutes:g}) allows; its levels may converge before"
                )
        return notes

    def _classical(self, method: str, cohort: str, size: CohortSize) -> Stage:
        algorithm, parameters = self.configuration.method(method).algorithm, self.configuration.parameters(method)
        grid = self.configuration.grid
        answers = [self._try_part(part) for part in registry.parts(algorithm, parameters)]
        measured = {key: value for answer in answers if answer for key, value in answer.items()}
        cost = registry.cost(algorithm, parameters, grid.shape, grid.spacing, measured)
        basis = "scaled" if measured else "constant"
        seconds: dict[str, Any] = {"cpu_s": cost.seconds + self._writing(cohort), "cpu_basis": basis}
        if cost.gpu_moved_gb is not None:
            moved = _on_gpu(cost)
            least = max(roofline_seconds(moved, self.gpu, "float32"), moved.kernels * LAUNCH)
            seconds |= {"gpu_s": least + self._writing(cohort), "gpu_basis": "roofline"}
        memory = None if cost.memory_bytes is None else (cost.memory_bytes + PROCESS) / 1e9
        what, jobs = f"{method} on {cohort}", self._shards(method, cohort)
        return Stage("register", what, jobs, size.registrations, "pair", **seconds, memory_gb=memory, note=cost.note)

    def _try_part(self, part: Mapping[str, Any]) -> dict[str, float] | None:
        """Measure a method and its parameters."""
        parameters = dict(part)
        return self._try("method", algorithm=parameters.pop("algorithm"), parameters=parameters, shape=CLASSICAL_GRID)

    def _learned(self, method: str, of: str, cohort: str, size: CohortSize) -> Stage:
        cost, found, seeds = self.costs[of], self.seconds[of], len(self.configuration.seeds_of(of))
        each, moved, note = found.inference, cost.inference, ""
        if method != of:  # a refinement: a descent from the network's field
            stages, grid = self.configuration.parameters(method)["stages"], self.configuration.grid
            refining = descent.cost({"stages": stages}, grid.shape, grid.spacing)
            each += refining.seconds
            moved = _sum(cost.inference, _on_gpu(refining), 1)
            steps = sum(stage.steps for stage, _ in levels(stages, grid.shape, grid.spacing))
            note = f"{of}, then at most {steps} steps of descent"
        seconds = self._seconds(each, found.basis, moved, _network(self.configuration, of).training["precision"])
        for key in ("cpu_s", "gpu_s"):
            if seconds[key] is not None:
                seconds[key] += self._writing(cohort)
        return Stage(
            "register",
            f"{method} on {cohort}",
            self._shards(method, cohort) * seeds,
            size.registrations * seeds,
            "pair",
            **seconds,
            memory_gb=(moved.peak_mb * 1e6 + PROCESS) / 1e9,
            note=note,
        )

    def _seconds(self, found: float, basis: str, cost: Cost, precision: str) -> dict[str, Any]:
        """Return the seconds on the device at hand, and on a GPU where it is none."""
        if self.place.type == "cuda":
            return {"cpu_s": None, "cpu_basis": "", "gpu_s": found, "gpu_basis": basis}
        least = max(roofline_seconds(cost, self.gpu, precision), cost.kernels * LAUNCH)
        return {"cpu_s": found, "cpu_basis": basis, "gpu_s": least, "gpu_basis": "roofline"}

    def _shards(self, method: str, cohort: str) -> int:
        return len(shard_sizes(self.configuration, method, self.sizes[cohort].pairs))

    def _try_scores(self, cohort: str) -> dict[str, float] | None:
        return self._try(
            "score",
            structures=self.configuration.cohorts[cohort].structures,
            interpolations=list(self.configuration.scores.label_interpolation),
            shape=SCORE_GRID,
        )

    def _writing(self, cohort: str) -> float:
        """Return the seconds in which a field is written."""
        answer = self._try_scores(cohort)
        return (WRITE_VOXEL if answer is None else answer["write_s"]) * self.voxels

    def _bound(self, cost: Cost, precision: str) -> str:
        return f"bound by {roofline(cost, self.speed, precision).bound}"

    def _try(self, kind: str, **request: Any) -> dict[str, float] | None:
        """Measure a classical method or the scores, once for all cohorts that ask the same."""
        if not self.budget:
            return None
        key = repr((kind, sorted(request.items())))
        if key not in self._tried:
            log.info("measuring %s", request.get("algorithm", kind))
            start = time.monotonic()
            self._tried[key] = try_apart({"kind": kind, **request}, 1, timeout=self.budget + 30)
            log.debug("%s took %.1f s", kind, time.monotonic() - start)
        return self._tried[key]


def disk_parts(configuration: Config, sizes: Mapping[str, CohortSize], jobs: int = 8) -> dict[str, float]:
    """Return what stays on the disk and what fields come on top of it at their peak, 10^9 bytes, before compression.

    Parameters
    ----------
    jobs
        That run at once, of the three answers the second: fields are there from a registration's start to their
        scoring's end, and scoring goes before registering.
    """
    parts = {f"stays: {what}": size for what, size in staying_bytes(configuration, sizes).items()}
    parts["stays in all"] = sum(parts.values())
    if not configuration.keep_fields:
        shards = field_shards(configuration, configuration.methods, sizes)
        largest = sorted((shard.size for shard in shards), reverse=True)
        parts["fields on top while pairs are registered, all jobs at once (a cluster)"] = sum(largest)
        parts[f"with {jobs} jobs at once, at most"] = sum(largest[:jobs])
        room = room_for_fields(configuration, sizes)
        if room is not None:
            parts["under the quota, at most"] = lanes(shards, room).peak()
    return {what: size / 1e9 for what, size in parts.items()}


def _on_gpu(cost: PairCost) -> Cost:
    """Return what a pair costs on a GPU: memory that is moved, and launches."""
    return Cost(0.0, cost.gpu_moved_gb or 0.0, (cost.memory_bytes or 0.0) / 1e6, cost.gpu_kernels, 0)


def _sum(first: Cost, second: Cost, times: int) -> Cost:
    return Cost(
        first.gflop + times * second.gflop,
        first.moved_gb + times * second.moved_gb,
        max(first.peak_mb, second.peak_mb),
        first.kernels + times * second.kernels,
        first.parameters,
    )
