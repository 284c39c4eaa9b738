"""Trying what a configuration names of somebody else's, before hours are spent: ``dmir check --try``.

Each network is built and given two small images; each method and program registers them, in a process of its own.
"""

from __future__ import annotations

import math
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np

from dmir import registry
from dmir.config import Config, Network
from dmir.errors import DmirError
from dmir.volumes import Volume, write_volume

LARGEST_EDGE = 64  # voxels, a multiple of what networks halve
SECONDS = 300.0


def what_runs(configuration: Config) -> dict[str, str]:
    """Return method -> what of somebody else's would run for it, of all methods that are compared or studied."""
    found = {}
    for name in configuration.every_method():
        settings = configuration.method(name)
        parameters = {} if isinstance(settings, Network) else configuration.parameters(name)
        told = registry.runs(settings.algorithm, parameters)
        if told:
            found[name] = told
    return found


def mistakes(configuration: Config) -> Iterator[str]:
    """Try all of it, and yield what goes wrong, ``settings.<method>: what`` each."""
    shape = small(configuration.grid.shape)
    for name in what_runs(configuration):
        settings = configuration.method(name)
        try:
            if isinstance(settings, Network):
                try_network(settings.algorithm, settings.network, shape)
            elif configuration.network_of(name) is None:
                limit = min(SECONDS, 60 * configuration.timeout_minutes)
                try_method(settings.algorithm, configuration.parameters(name), shape, limit)
        except DmirError as error:
            yield f"settings.{name}: {error}"


def small(shape: tuple[int, int, int]) -> tuple[int, int, int]:
    """Return a grid of the same kind on which nothing takes long."""
    d, h, w = (n if max(shape) <= LARGEST_EDGE else min(LARGEST_EDGE, 32 * math.ceil(n / 128)) for n in shape)
    return d, h, w


def balls(shape: tuple[int, int, int]) -> tuple[Volume, Volume]:
    """Return two shaded balls in [0, 1] on one grid, the second a voxel further along the first axis."""
    axes = np.meshgrid(*(np.linspace(-1.4, 1.4, n) for n in shape), indexing="ij")
    radius = np.sqrt(sum(x**2 for x in axes))
    ball = np.where(radius < 1, 0.4 + 0.3 * np.cos(5 * axes[0]) * np.cos(4 * axes[1] + axes[2]), 0).astype(np.float32)
    return Volume(ball, np.eye(4)), Volume(np.roll(ball, 1, axis=0), np.eye(4))


def try_network(algorithm: str, hyperparameters: dict[str, Any], shape: tuple[int, int, int]) -> None:
    """Build a network and register a small pair with it.

    Raises
    ------
    DmirError
        It cannot be built, fails, or gives no finite field.
    """
    import torch

    from dmir.networks import build
    from dmir.training.objective import displacement_of

    network = build(algorithm, shape, **hyperparameters).eval()
    moving, fixed = (torch.from_numpy(image.data)[None, None] for image in balls(shape))
    with torch.no_grad():
        try:
            displacement = displacement_of(network, moving, fixed, "float32")
        except DmirError:
            raise
        except Exception as error:  # anything at all can be in there
            told = f"{type(error).__name__}: {' '.join(str(error).split())}"
            raise DmirError(f"{algorithm} fails on two images of {'x'.join(map(str, shape))} voxels: {told}") from error
    if not displacement.isfinite().all():
        raise DmirError(f"{algorithm}: the field of two images has values that are NaN or infinite")


def try_method(algorithm: str, parameters: dict[str, Any], shape: tuple[int, int, int], seconds: float) -> None:
    """Register a small pair with a method without weights; DmirError where that fails."""
    from dmir.methods.isolated import register_isolated

    if algorithm == "fields":
        return
    with tempfile.TemporaryDirectory(prefix="try-") as name:
        moving, fixed = Path(name, "moving.nii"), Path(name, "fixed.nii")
        for path, volume in zip((moving, fixed), balls(shape), strict=True):
            write_volume(path, volume)
        record = register_isolated(moving, fixed, Path(name, "field.nii"), algorithm, parameters, timeout=seconds)
    if record["status"] != "ok":
        raise DmirError(f"{algorithm} fails on two images of {'x'.join(map(str, shape))} voxels: {record['reason']}")
