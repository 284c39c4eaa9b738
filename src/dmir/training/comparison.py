"""Where, and how smooth, a training's loss compares the images."""

from __future__ import annotations

from collections.abc import Sequence

import torch

from dmir.fields import shifted_displacement, warp
from dmir.filters import gaussian, numbers
from dmir.training.settings import TrainingSettings


def compared(
    moving: torch.Tensor,
    fixed: torch.Tensor,
    displacement: torch.Tensor,
    settings: TrainingSettings,
    offset: Sequence[float] = (0.0, 0.0, 0.0),
) -> tuple[torch.Tensor, torch.Tensor]:
    """Return the fixed and the warped moving image as the loss is to compare them.

    Interpolation between voxels blurs, and with less noise images correlate better. At the voxels of the fixed image
    only the moving one is interpolated, so that a field of some tenths of a voxel everywhere gains more than a fresh
    network can find otherwise: it learns that first, and may stay there for long (the grid effect: Aganj et al. 2013).
    With ``sampling="random"`` both are interpolated, at points that lie a random part of a voxel beside the voxels, the
    same for all of them: in the mean no field blurs more than another.

    Parameters
    ----------
    moving, fixed
        (B, 1, D, H, W).
    displacement
        (B, 3, D, H, W) in voxels.
    settings
        ``warp``, ``sampling`` and ``smoothing`` count.
    offset
        Of the points from the voxels, in voxels, with ``sampling="random"``:
        :meth:`~dmir.training.settings.TrainingSettings.offset_at`.
    """
    if settings.smoothing:
        moving, fixed = (gaussian(image[:, 0], settings.smoothing)[:, None] for image in (moving, fixed))
    sampled = displacement if settings.warp == "exact" else shifted_displacement(displacement)
    if settings.sampling == "random":
        away = numbers(offset, displacement).view(1, 3, 1, 1, 1)
        sampled, fixed = sampled + away, warp(fixed, away.expand_as(displacement))
    return fixed, warp(moving, sampled)
