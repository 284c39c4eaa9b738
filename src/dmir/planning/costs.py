"""What one scan or pair costs, as constants and formulas: known before anything runs, and without torch.

Measured on one core of an Intel Xeon, CPU seconds, unless it says otherwise. The plan of a configuration replaces the
methods', which stand in their own modules, by short runs on the machine at hand; the sizes of jobs
(:mod:`dmir.planning.shards`) must not depend on it.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

from dmir import registry
from dmir.config import Config, Refinement
from dmir.methods.stages import voxel_steps

STARTUP = 6.0  # seconds until a process has loaded what it needs
NETWORK_VOXEL = 1e-7  # on a GPU: 0.7 s at 160x192x224, between VoxelMorph and the transformers; a CPU takes longer
DESCENT_GPU = 1e-9  # a voxel and step on a GPU: what it moves at 2 TB/s
PREPROCESS_SCAN = 3.0  # reading, stripping by a mask, resampling, normalising, writing: a head of 1 mm
PREPROCESS_N4 = 4.0
PREPROCESS_AFFINE = 24.0  # divided by the square of affine_spacing: 6 s at 2 mm
PREPROCESS_DEEPBET = 10.0
SCORE_VOXEL = 3e-7  # a label interpolation, reading included: 4 s at 160x192x224 with both
WRITE_VOXEL = 3e-7
FIELD_BYTES_A_VOXEL = 12  # three float32


def voxels_of(shape: Sequence[int]) -> int:
    """Return the number of voxels of a grid."""
    return math.prod(shape)


def preprocessing_seconds(configuration: Config, cohort: str) -> float:
    """Return the seconds that one scan of a cohort takes: they depend on the scan, hardly on the grid."""
    settings = configuration.preprocess_of(configuration.cohorts[cohort])
    steps = (
        (PREPROCESS_N4, settings.bias_correction),
        (PREPROCESS_AFFINE / settings.affine_spacing**2, settings.affine),
        (PREPROCESS_DEEPBET, settings.skull_strip == "deepbet"),
    )
    return PREPROCESS_SCAN + sum(seconds for seconds, done in steps if done)


def registration_seconds(configuration: Config, method: str) -> float:
    """Return the seconds of one registration and of writing its field, from the grid and the method's own settings.

    Networks are taken to run on a GPU.
    """
    shape = configuration.grid.shape
    settings = configuration.method(method)
    writing = WRITE_VOXEL * voxels_of(shape)
    if configuration.network_of(method) is None:
        parameters = configuration.parameters(method)
        return writing + registry.cost(settings.algorithm, parameters, shape, configuration.grid.spacing).seconds
    network = NETWORK_VOXEL * voxels_of(shape)
    if isinstance(settings, Refinement):
        stages = [stage.model_dump() for stage in settings.stages]
        network += DESCENT_GPU * voxel_steps(stages, shape, configuration.grid.spacing)
    return writing + network


def registration_memory_mb(configuration: Config, method: str) -> int:
    """Return the memory that a job is given which registers with a method without weights, 10^6 bytes."""
    limits = [part.get("memory_gb", 0.0) for part in _parts(configuration, method)]
    return max(2000 + voxels_of(configuration.grid.shape) // 1500, *(round(1000 * limit) + 1000 for limit in limits))


def _parts(configuration: Config, method: str) -> list[dict[str, Any]]:
    parameters = configuration.parameters(method)
    return [{"algorithm": configuration.method(method).algorithm, **parameters}, dict(parameters.get("of") or {})]


def scoring_seconds(configuration: Config, interpolations: int = 2) -> float:
    """Return the seconds of scoring one pair with so many label interpolations."""
    return SCORE_VOXEL * interpolations * voxels_of(configuration.grid.shape)


def field_bytes(configuration: Config) -> int:
    """Return the size of one displacement field, uncompressed."""
    return FIELD_BYTES_A_VOXEL * voxels_of(configuration.grid.shape)
