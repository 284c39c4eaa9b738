"""Registration by descent on the pair itself: no training, no folds, and the inverse with it (docs/descent.md)."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict
from types import MappingProxyType
from typing import TYPE_CHECKING, Annotated, Any, Literal

import numpy as np
from pydantic import Field, field_validator

from dmir.methods import stages as descending_stages
from dmir.methods.stages import STAGES, Stage, Watch, levels, voxel_steps
from dmir.settings import MethodSettings, Model, PairCost, Positive
from dmir.volumes import Volume

if TYPE_CHECKING:
    import torch

TITLE = "Descent"
PAPER = "composed smooth steps, as greedy (Yushkevich et al. 2016) and FireANTs (Jena et al. 2024) take them"
COLOUR, MARKER = "#882255", "p"
LIBRARIES = ("dmir.methods.descending",)
INVERTIBLE = True

VOXEL_STEP = 9e-8  # CPU seconds, of the grid, at each stage's own resolution: what lies round both brains is left out
STEP = 5e-3  # a step, however small
ONCE = 3e-7  # a voxel: the inverse, whether it folds
BYTES_A_VOXEL = 140  # its largest resident set
MOVED = 2000  # bytes that a voxel of a step reads and writes, by its operations: for a GPU
KERNELS = 260  # a step


class StageSettings(Model):
    """One stretch of a descent, from coarse to fine; lengths in voxels are of this stage's own."""

    voxel: Positive
    """Edge of its voxels, mm; one finer than the grid's is done on the grid's own, once."""
    steps: Annotated[int, Field(ge=0)]
    """At most: it ends where the similarity has stopped growing."""
    window: Annotated[int, Field(ge=3)] = 5
    """Edge of the window of `lncc` in voxels, odd."""
    step: Annotated[float, Field(gt=0, le=1)] = 1.0
    """Longest displacement of one step, voxels."""
    update_smoothing: Annotated[float, Field(ge=0, le=20)] = 1.5
    """Standard deviation of the Gaussian that smooths each step, voxels (viscous)."""
    field_smoothing: Annotated[float, Field(ge=0, le=20)] = 0.5
    """Standard deviation of the Gaussian that smooths the whole field after each step, voxels (elastic)."""
    compression: Annotated[float, Field(gt=0, le=1)] = 1.0
    """Exponent of the forces' lengths; below 1, weak forces count for more and large parts move first."""
    momentum: Annotated[float, Field(ge=0, lt=1)] = 0.0
    """Share of the last step that is added to the next."""

    @field_validator("window")
    @classmethod
    def _odd(cls, value: int) -> int:
        if value % 2 == 0:
            raise ValueError(f"found {value}; expected an odd number")
        return value


def stage_settings(stages: Sequence[Stage]) -> list[StageSettings]:
    """Return stages as a configuration has them."""
    return [StageSettings.model_validate(asdict(stage)) for stage in stages]


class DescendingSettings(MethodSettings):
    """What descent and refinement have in common."""

    noise: Annotated[float, Field(ge=0, lt=1)] = 0.005
    """Standard deviation of grey values in [0, 1] below which a window of `lncc` is flat and says nothing."""
    tolerance: Annotated[float, Field(ge=0, lt=1)] = 5e-4
    """A stage ends when the similarity grows by less than this share of itself in `check_every` steps."""
    check_every: Annotated[int, Field(ge=1)] = 5
    """Steps between two looks at the similarity; where it has fallen, steps are halved."""
    pyramid_smoothing: Annotated[float, Field(gt=0, le=2)] = 0.3
    """Standard deviation of the Gaussian that images are sampled through for coarser voxels, in those."""
    margin: Annotated[float, Field(ge=0)] = 4.0
    """Round both brains, mm, in which the field is sought; beyond, it goes on as it is at that border."""


class Settings(DescendingSettings):
    """Descent on the pair itself by composed, smoothed steps (docs/descent.md): no training and no folds."""

    stages: list[StageSettings] = Field(stage_settings(descending_stages.STAGES))
    """From coarse to fine."""
    similarity: Literal["lncc", "mse", "mutual_information"] = "lncc"
    """What is made alike."""


def register(
    moving: Volume,
    fixed: Volume,
    device: str | torch.device | None = None,
    *,
    stages: Sequence[Stage | Mapping[str, Any]] = STAGES,
    similarity: str = "lncc",
    noise: float = 0.005,
    tolerance: float = 5e-4,
    check_every: int = 5,
    pyramid_smoothing: float = 0.3,
    margin: float = 4.0,
    start: np.ndarray | None = None,
    seen: tuple[np.ndarray | None, np.ndarray | None] = (None, None),
    watch: Watch | None = None,
) -> np.ndarray:
    """Return the field that takes the moving image to the fixed one.

    See :func:`~dmir.methods.descending.find_field` and :func:`~dmir.methods.descending.descend` for what is not told
    here.

    Parameters
    ----------
    moving, fixed
        Affinely aligned, skull-stripped; each on its own grid or both on one. Grey values of any range.
    device
        See :func:`~dmir.training.devices.choose_device`.
    stages
        Each as a :class:`~dmir.methods.stages.Stage` or a dictionary of its attributes.
    start
        Field (3, D, H, W) on the fixed grid to start from; where it folds it is smoothed until it does not.
    seen
        Of the moving image on its own grid and of the fixed image on its own: true where it was scanned.

    Returns
    -------
    numpy.ndarray
        float32 (3, D, H, W), voxels of the fixed grid: from a point of the fixed world to one of the moving world.

    Raises
    ------
    InputError
        An image says nothing (one value everywhere) or is not finite, or a parameter cannot be used.
    """
    from dmir.methods.descending import register_volumes  # torch: not for those who ask what there is

    return register_volumes(
        moving,
        fixed,
        device,
        start=start,
        seen=seen,
        stages=stages,
        similarity=similarity,
        noise=noise,
        tolerance=tolerance,
        check_every=check_every,
        pyramid_smoothing=pyramid_smoothing,
        margin=margin,
        watch=watch,
    )


def cost(
    parameters: Mapping[str, Any],
    shape: Sequence[int],
    spacing: Sequence[float],
    measured: Mapping[str, float] = MappingProxyType({}),
) -> PairCost:
    """Return what a pair costs, its inverse included; ``voxel_step_s`` may be measured."""
    stages, voxels = parameters["stages"], math.prod(shape)
    each = measured.get("voxel_step_s", VOXEL_STEP)
    steps, moved = sum(stage.steps for stage, _ in levels(stages, shape, spacing)), voxel_steps(stages, shape, spacing)
    return PairCost(
        each * moved + STEP * steps + ONCE * voxels,
        BYTES_A_VOXEL * voxels,
        "at most: stages may end before; on a CPU",
        MOVED * moved / 1e9,
        KERNELS * steps,
    )


def measure(
    parameters: Mapping[str, Any], seconds_of: Callable[[Mapping[str, Any]], float], shape: Sequence[int]
) -> dict[str, float]:
    """Return the seconds of one voxel in one step, tried with the last stage on voxels of 1 mm."""
    stages = [{**stage, "voxel": 1.0, "steps": 4} for stage in parameters["stages"]][-1:]
    if not stages:
        return {}
    taken = seconds_of({"stages": stages, "tolerance": 0.0, "device": "cpu"})
    return {"voxel_step_s": taken / voxel_steps(stages, shape, (1.0, 1.0, 1.0))}
