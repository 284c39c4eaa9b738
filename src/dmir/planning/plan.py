"""The plan of a configuration: what each stage costs, and where each of its seconds is known from."""

from __future__ import annotations

import logging

import torch

from dmir.config import Config
from dmir.planning.costs import STARTUP
from dmir.planning.device_speed import REFERENCE_GPU, measure_speed
from dmir.planning.jobs import cohort_size, used_cohorts
from dmir.planning.network_costs import count_networks, measure_networks, network_settings
from dmir.planning.quota import disk_parts
from dmir.planning.rows import Planner
from dmir.planning.stages import Plan, Stage
from dmir.training.devices import choose_device

__all__ = ["Plan", "Stage", "disk_parts", "plan"]

log = logging.getLogger(__name__)


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
    settings = {name: network_settings(configuration, name) for name in names}
    log.info("counting %d networks on %s voxels", len(names), "x".join(map(str, shape)))
    costs = count_networks([(settings[name], shape, place.type) for name in names])
    budget = max(seconds / (len(names) + 3) - STARTUP, 1.0) if measured else 0.0  # the rest: two methods, the scores
    found = measure_networks(list(settings.values()), shape, costs, speed, place, threads, budget)
    gpu = speed if place.type == "cuda" else REFERENCE_GPU
    counted = dict(zip(names, costs, strict=True))
    seconds_of = dict(zip(names, found, strict=True))
    planner = Planner(configuration, sizes, counted, seconds_of, speed, gpu, place, threads, budget)
    stages = [*planner.preprocess(), *planner.train(), *planner.register(), *planner.score()]
    return Plan(stages, sizes, speed, gpu, threads, gpus, planner.disk(), planner.notes(stages))
