"""The settings of a training: everything that changes its result, apart from the network and the scans."""

from __future__ import annotations

import math
from dataclasses import dataclass

import numpy as np

from dmir.errors import InputError, suggestion
from dmir.losses import SIMILARITIES
from dmir.training.objective import PRECISIONS, Objective

CHOICES = {
    "similarity": tuple(SIMILARITIES),
    "schedule": ("constant", "cosine", "polynomial"),
    "precision": PRECISIONS,
    "pairs": ("scan_to_atlas", "atlas_to_scan", "all"),
    "warp": ("exact", "shifted"),
    "sampling": ("voxels", "random"),
    "keep": ("best", "last"),
}
SAMPLING_STREAM = 3  # keeps these random numbers apart from those of :mod:`dmir.training.module` and ``session``


@dataclass(frozen=True)
class TrainingSettings:
    """How a network is trained.

    Parameters
    ----------
    steps, validate_every
        Optimiser steps in all, and between two validations (there is one before the first step, and one at the end).
    learning_rate, schedule
        Of Adam. ``"constant"``; ``"cosine"``: to zero along half a cosine (Loshchilov and Hutter 2017, no restarts);
        ``"polynomial"``: (1 - step / steps)^0.9, to zero almost linearly.
    similarity, window, regularisation
        Of the loss: see :class:`~dmir.training.objective.Objective`.
    batch_size
        Pairs a step.
    gradient_clip
        Largest norm of the gradient of all weights together; 0 does not clip.
    precision
        ``"float32"``, ``"tf32"`` or ``"bf16"``; loss, field and warp are float32 in all three.
    pairs
        ``"scan_to_atlas"``: each training scan to each atlas; ``"atlas_to_scan"``: the reverse; ``"all"``: all ordered
        pairs of training scans. Validation pairs are made of the validation scans in the same way.
    warp
        In the loss. ``"exact"``: no displacement is no change. ``"shifted"``: as the published code of XMorpher,
        TransMatch and TransMorph (OASIS), see :func:`~dmir.fields.shifted_displacement`; validation is exact.
    sampling
        Where the loss compares the images: at the ``"voxels"`` of the fixed one, or at those points moved by a
        ``"random"`` part of a voxel, another one each step; see :func:`~dmir.training.comparison.compared`.
    smoothing
        Standard deviation in voxels of a Gaussian by which both images are smoothed for the loss, and for it alone: the
        network sees them as they are. 0 does not smooth.
    keep
        ``"best"`` weights (by validation Dice; between equals, and without labels, by validation loss) or the
        ``"last"``.
    compile
        Let torch write kernels for the network (``torch.compile``): minutes before the first step. The result may
        differ in the last digits.
    seed
        Of the initial weights, the order of the pairs and all else that is random.
    deterministic
        See :func:`~dmir.training.objective.arithmetic`.

    Raises
    ------
    InputError
        A value makes no sense; the setting is named.
    """

    steps: int = 100_000
    validate_every: int = 1000
    learning_rate: float = 1e-4
    schedule: str = "constant"
    similarity: str = "lncc"
    window: int = 9
    regularisation: float = 1.0
    batch_size: int = 1
    gradient_clip: float = 0.0
    precision: str = "float32"
    pairs: str = "scan_to_atlas"
    warp: str = "exact"
    sampling: str = "voxels"
    smoothing: float = 0.0
    keep: str = "best"
    compile: bool = False
    seed: int = 1
    deterministic: bool = False

    def __post_init__(self) -> None:
        for name in ("steps", "validate_every", "batch_size", "learning_rate"):
            if not getattr(self, name) > 0:
                raise InputError(name, found=str(getattr(self, name)), expected="a number above 0")
        for name in ("regularisation", "gradient_clip", "smoothing"):
            if not getattr(self, name) >= 0:
                raise InputError(name, found=str(getattr(self, name)), expected="0 or more")
        for name, known in CHOICES.items():
            value = getattr(self, name)
            if value not in known:
                expected = " or ".join(map(repr, known))
                raise InputError(name, found=repr(value), expected=expected, remedy=suggestion(str(value), known))

    def objective(self) -> Objective:
        """Return the function to minimise."""
        return Objective(self.similarity, self.window, self.regularisation)

    def learning_rate_at(self, step: int) -> float:
        """Return the learning rate of a step (0 ... steps - 1)."""
        done = step / self.steps
        if self.schedule == "cosine":
            return self.learning_rate * 0.5 * (1.0 + math.cos(math.pi * done))
        if self.schedule == "polynomial":
            return self.learning_rate * (1.0 - done) ** 0.9
        return self.learning_rate

    def offset_at(self, step: int) -> tuple[float, float, float]:
        """Return how far from the voxels images are compared in a step (0 ... steps - 1), in voxels of each axis."""
        if self.sampling == "voxels":
            return (0.0, 0.0, 0.0)
        first, second, third = np.random.default_rng([self.seed, SAMPLING_STREAM, step]).uniform(-0.5, 0.5, 3).tolist()
        return (first, second, third)
