"""The rows of a plan, stage by stage: how many jobs, and how long each of them takes."""

from __future__ import annotations

import logging
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch

from dmir import registry
from dmir.config import Config
from dmir.methods import descent
from dmir.methods.stages import levels
from dmir.planning.batches import count_batches
from dmir.planning.costs import (
    PREPROCESS_DEEPBET,
    SCORE_VOXEL,
    WRITE_VOXEL,
    field_bytes,
    preprocessing_seconds,
    voxels_of,
)
from dmir.planning.device_speed import DeviceSpeed, roofline, roofline_seconds
from dmir.planning.jobs import CohortSize
from dmir.planning.network_costs import NetworkCost, NetworkSeconds, network_settings
from dmir.planning.quota import PACKED_VOXEL, disk_parts, registering_models
from dmir.planning.shards import shard_sizes
from dmir.planning.stages import Stage
from dmir.planning.trial import try_apart
from dmir.settings import PairCost
from dmir.training.cost import Cost
from dmir.training.memory import PROCESS

log = logging.getLogger(__name__)

CLASSICAL_GRID = (40, 40, 40)
SCORE_GRID = (48, 56, 48)
LAUNCH = 5e-6  # seconds of a kernel on a GPU at least, from its launch to the next


@dataclass
class Planner:
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
        """A job a batch of scans; how long it takes depends on the scans and not on the grid."""
        rows = []
        for name, size in self.sizes.items():
            seconds, notes = preprocessing_seconds(self.configuration, name), []
            if self.configuration.preprocess_of(self.configuration.cohorts[name]).skull_strip == "deepbet":
                notes.append(f"deepbet: a constant of {PREPROCESS_DEEPBET:.0f} s on the CPU")
            if self.configuration.cohorts[name].MADE is not None:
                notes.append("without making the scans")
            jobs = count_batches(self.configuration, name, size)
            rows.append(Stage("preprocess", name, jobs, size.total, "scan", seconds, "constant", note="; ".join(notes)))
        return rows

    def train(self) -> list[Stage]:
        """A job a network and seed."""
        rows = []
        images = (
            self.sizes[self.configuration.train_on].for_training * self.voxels * PACKED_VOXEL[self.configuration.packed]
        )
        for name, cost in self.costs.items():
            training = network_settings(self.configuration, name).training
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
        seconds = self._seconds(
            each, found.basis, moved, network_settings(self.configuration, of).training["precision"]
        )
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
