"""What one scan or pair costs, as constants and formulas: known before anything runs, and without torch.

Measured on one core of an Intel Xeon, CPU seconds, unless it says otherwise. The plan of a configuration replaces the
methods' by short runs on the machine at hand; the sizes of jobs (:mod:`dmir.planning.shards`) must not depend on it.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from types import MappingProxyType
from typing import Any

from dmir.config import Config, Refinement

STARTUP = 6.0  # seconds until a process has loaded what it needs
SYN_VOXEL_ITERATION = (2.3e-6, 2.7e-7)  # a + b (2 radius + 1)^2 of metric CC, at 48^3 and 80^3 voxels; others take a
ELASTIX_SAMPLE = 6e-6  # an iteration and random sample
ELASTIX_ONCE = (2.0, 5e-6)  # a registration, and a voxel of it: pyramids, the field
NETWORK_VOXEL = 1e-7  # on a GPU: 0.7 s at 160x192x224, between VoxelMorph and the transformers; a CPU takes longer
REFINEMENT_VOXEL_STEP = 1.5e-8  # on a GPU: 0.1 s at 160x192x224
PREPROCESS_SCAN = 3.0  # reading, stripping by a mask, resampling, normalising, writing: a head of 1 mm
PREPROCESS_N4 = 4.0
PREPROCESS_AFFINE = 24.0  # divided by the square of affine_spacing: 6 s at 2 mm
SCORE_VOXEL = 3e-7  # a label interpolation, reading included: 4 s at 160x192x224 with both
WRITE_VOXEL = 3e-7
SYN_BYTES_A_VOXEL = 450  # its largest resident set at 1 mm, float64
FIELD_BYTES_A_VOXEL = 12  # three float32


def voxels_of(shape: Sequence[int]) -> int:
    """Return the number of voxels of a grid."""
    return math.prod(shape)


def voxel_iterations(shape: Sequence[int], iterations: Sequence[int]) -> float:
    """Return how many voxels SyN works on in all its iterations, if none of its levels converges early."""
    levels = len(iterations)
    return voxels_of(shape) * sum(count / 8 ** (levels - 1 - level) for level, count in enumerate(iterations))


def syn_voxel_iteration(parameters: dict[str, Any]) -> float:
    """Return the seconds of one voxel in one iteration of SyN."""
    by_radius = SYN_VOXEL_ITERATION[1] * (2 * parameters["radius"] + 1) ** 2
    return SYN_VOXEL_ITERATION[0] + (by_radius if parameters["metric"] == "CC" else 0.0)


def classical_seconds(
    algorithm: str,
    parameters: dict[str, Any],
    shape: Sequence[int],
    measured: Mapping[str, float] = MappingProxyType({}),
) -> float:
    """Return the seconds of one registration by ``affine``, ``syn`` or ``elastix``, its field not yet written.

    Parameters
    ----------
    algorithm, parameters
        As in the configuration.
    shape
        Of the grid, in voxels.
    measured
        Instead of the constants: ``voxel_iteration_s`` of SyN, ``iteration_s`` of Elastix.
    """
    if algorithm == "affine":
        return 0.0
    if algorithm == "syn":
        each = measured.get("voxel_iteration_s", syn_voxel_iteration(parameters))
        return each * voxel_iterations(shape, parameters["iterations"])
    each = measured.get("iteration_s", ELASTIX_SAMPLE * parameters["samples"])
    once = ELASTIX_ONCE[0] + ELASTIX_ONCE[1] * voxels_of(shape)
    return once + each * parameters["iterations"] * parameters["resolutions"]


def registration_seconds(configuration: Config, method: str) -> float:
    """Return the seconds of one registration and of writing its field, from the grid and the method's own settings.

    Networks are taken to run on a GPU.
    """
    shape = configuration.grid.shape
    settings = configuration.method(method)
    writing = WRITE_VOXEL * voxels_of(shape)
    if configuration.network_of(method) is None:
        return writing + classical_seconds(settings.algorithm, settings.model_dump(exclude={"algorithm"}), shape)
    steps = settings.steps if isinstance(settings, Refinement) else 0
    return writing + (NETWORK_VOXEL + steps * REFINEMENT_VOXEL_STEP) * voxels_of(shape)


def scoring_seconds(configuration: Config, interpolations: int = 2) -> float:
    """Return the seconds of scoring one pair with so many label interpolations."""
    return SCORE_VOXEL * interpolations * voxels_of(configuration.grid.shape)


def field_bytes(configuration: Config) -> int:
    """Return the size of one displacement field, uncompressed."""
    return FIELD_BYTES_A_VOXEL * voxels_of(configuration.grid.shape)
