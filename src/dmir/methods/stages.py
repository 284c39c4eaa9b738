"""The stages of a descent: how far, how smoothly and on what voxels the field moves, from coarse to fine."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

FEWEST = 8  # voxels along an axis of a coarser level: fewer hold no anatomy
Factors = tuple[float, float, float]
Watch = Callable[[int, int, int, float], None]
"""Told (stage, step, steps of the stage, similarity) as the descent goes on; the similarity is NaN where not read."""


@dataclass(frozen=True)
class Stage:
    """One stretch of a descent (:mod:`dmir.methods.descent`); lengths in voxels are of this stage's own.

    Attributes
    ----------
    voxel
        Edge of the voxels on which it works, mm. One finer than the images' is done on theirs; of several such, which
        would work on the same voxels again, the coarsest alone.
    steps
        At most; it ends earlier where the similarity has stopped growing.
    window
        Edge of the cube of the local correlation, voxels, odd.
    step
        The longest displacement of one step, voxels, at most 1: half of the published tools' work at that.
    update_smoothing, field_smoothing
        Standard deviations of the Gaussians that smooth each step and, after it, the whole field, voxels: the first
        makes the flow viscous, the second the field elastic.
    compression
        Exponent of the forces' lengths: 1 leaves them, below 1 weak forces count for more, so that large parts move
        before sharp edges do.
    momentum
        Share of the last step that is added to the next.
    """

    voxel: float
    steps: int
    window: int = 5
    step: float = 1.0
    update_smoothing: float = 1.5
    field_smoothing: float = 0.5
    compression: float = 1.0
    momentum: float = 0.0


STAGES = (
    Stage(4, 40, update_smoothing=3.0, field_smoothing=0.7, compression=0.5),
    Stage(4, 40),
    Stage(2, 15, update_smoothing=2.5, compression=0.5),
    Stage(2, 30, field_smoothing=0.4, momentum=0.5),
    Stage(1, 12),
)
"""The default: tuned on LPBA40 S11 to S40 and on OASIS people of the training split, see docs/descent.md."""

REFINING = STAGES[1:]
"""The default of a refinement: what is to be found at large is found already."""


def stages_of(stages: Iterable[Stage | Mapping[str, Any]]) -> list[Stage]:
    """Return stages that are given as such or as dictionaries of their attributes."""
    return [stage if isinstance(stage, Stage) else Stage(**stage) for stage in stages]


def levels(
    stages: Iterable[Stage | Mapping[str, Any]], shape: Sequence[int], spacing: Sequence[float]
) -> list[tuple[Stage, Factors]]:
    """Return the stages that are done on a grid, and how many times larger their voxels are than its own, by axis."""
    kept: list[tuple[Stage, Factors]] = []
    for stage in stages_of(stages):
        d, h, w = (
            max(1.0, min(stage.voxel / size, (length - 1) / (FEWEST - 1)))
            for size, length in zip(spacing, shape, strict=True)
        )
        factors = (d, h, w)
        if all(factors != other or stage.voxel == before.voxel for before, other in kept) and stage.steps:
            kept.append((stage, factors))
    return kept


def voxel_steps(stages: Iterable[Stage | Mapping[str, Any]], shape: Sequence[int], spacing: Sequence[float]) -> float:
    """Return how many voxels a descent works on in all its steps, if no stage ends early."""
    return sum(stage.steps * math.prod(shape) / math.prod(factors) for stage, factors in levels(stages, shape, spacing))
