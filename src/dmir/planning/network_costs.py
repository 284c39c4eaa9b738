"""What networks cost: counted on the configuration's grid, measured on one that there is time for, and scaled."""

from __future__ import annotations

import logging
import os
from collections.abc import Sequence
from concurrent.futures import ProcessPoolExecutor
from dataclasses import dataclass

import torch

from dmir.config import Config, Network
from dmir.planning.device_speed import DeviceSpeed, roofline_seconds
from dmir.planning.trial import try_apart
from dmir.training.cost import Cost, StepCost, count_inference, count_objective, count_step, settings_of
from dmir.training.memory import PROCESS, Job, free_memory

log = logging.getLogger(__name__)

Shape = tuple[int, int, int]
REDUCTIONS = (1.0, 0.75, 0.5, 0.375, 0.25, 0.2, 0.15)  # edges of the grids that are tried, of the configuration's
SMALLEST_EDGE = 32
EXPECTED_SHARE = 0.15  # of the roofline's speed, when a grid is chosen that can be measured in time


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


def network_settings(configuration: Config, name: str) -> Network:
    settings = configuration.method(name)
    assert isinstance(settings, Network)
    return settings


def count_networks(jobs: Sequence[tuple[Network, Shape, str]]) -> list[NetworkCost]:
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


def measure_networks(
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
    smaller = iter(count_networks(asked))
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
