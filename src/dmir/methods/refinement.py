"""Refinement of a network's field on the one pair that it is for: some steps of Adam that start from it.

A network has learnt what is alike in many pairs; the pair at hand can be fitted better by minimising the loss of the
training over its field alone ("instance-specific optimization", Balakrishnan et al. 2019, section V-E). What is sought
is a correction v of the field on a coarser grid, smoothed before it is added (Siebert et al. 2021, ConvexAdam):

    u = u0 + upsample(smooth(v)),    v = 0 at the start

so that neighbours move together and nothing folds for the sake of a few voxels. Labels are never seen.
"""

from __future__ import annotations

import math
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import torch

from dmir.fields import warp
from dmir.methods.network import Loaded
from dmir.methods.network import register as register_with_network
from dmir.training.devices import choose_device
from dmir.training.objective import Objective
from dmir.training.weights import load_weights
from dmir.volumes import Volume


def refine(
    moving: torch.Tensor,
    fixed: torch.Tensor,
    displacement: torch.Tensor,
    *,
    steps: int = 20,
    learning_rate: float = 0.1,
    similarity: str = "lncc",
    window: int = 9,
    regularisation: float = 1.0,
    downsampling: int = 2,
    smoothing: float = 1.0,
) -> torch.Tensor:
    """Return a field of this pair with a lower loss than the one that is given, or that one.

    Parameters
    ----------
    moving, fixed
        float32 (1, 1, D, H, W), preprocessed, in [0, 1].
    displacement
        float32 (1, 3, D, H, W) in voxels: where it starts.
    steps
        Of Adam (Kingma and Ba 2015); 0 returns the field as it is, bit for bit.
    learning_rate
        Voxels a step, about: Adam's steps are of one length.
    similarity, window, regularisation
        Of the :class:`~dmir.training.objective.Objective`, as a rule those that the network was trained with.
    downsampling
        The correction has one vector in a cube of so many voxels.
    smoothing
        Standard deviation of the Gaussian that smooths the correction, in its own coarse voxels; 0: none.

    Returns
    -------
    torch.Tensor
        float32 (1, 3, D, H, W): of all steps' fields, the start among them, the one with the lowest loss. All is
        computed in float32. The same bits every time on a CPU.
    """
    if not steps:
        return displacement
    objective = Objective(similarity, window, regularisation)
    with torch.inference_mode(False), torch.enable_grad():
        # autograd refuses tensors that were made in inference mode
        moving, fixed, displacement = (t.clone() if t.is_inference() else t for t in (moving, fixed, displacement))
        spread = [_spreading(n, downsampling, smoothing).to(displacement.device) for n in displacement.shape[2:]]
        correction = displacement.new_zeros(1, 3, *(matrix.shape[1] for matrix in spread)).requires_grad_()
        optimiser = torch.optim.Adam([correction], lr=learning_rate)
        best, lowest = displacement, math.inf
        for step in range(steps + 1):
            refined = displacement + _upsampled(correction, spread)
            loss = objective(fixed, warp(moving, refined), refined)[0]
            if float(loss.detach()) < lowest:
                best, lowest = refined.detach() if step else displacement, float(loss.detach())
            if step < steps:  # the last one is only looked at
                optimiser.zero_grad()
                loss.backward()
                optimiser.step()
    return best


def _spreading(length: int, downsampling: int, smoothing: float) -> torch.Tensor:
    """Return what smooths a line of control points and interpolates it: (length, points), each row adds up to 1.

    As matrices of one axis each, both cost little and have gradients that are the same bits every time on a GPU too.
    """
    points = max(2, math.ceil(length / downsampling)) if length > 1 else 1
    place = np.arange(points)
    smooth = np.eye(points)
    if smoothing > 0:
        smooth = np.exp(-0.5 * ((place[:, None] - place) / smoothing) ** 2)
        smooth /= smooth.sum(axis=1, keepdims=True)  # at the border too: a shift stays a shift
    where = np.linspace(0, points - 1, length)
    interpolate = np.clip(1 - np.abs(where[:, None] - place), 0, None)
    return torch.from_numpy((interpolate @ smooth).astype(np.float32))


def _upsampled(correction: torch.Tensor, spread: list[torch.Tensor]) -> torch.Tensor:
    """Return a correction (1, 3, d, h, w) on the full grid, (1, 3, D, H, W), smoothed and interpolated linearly."""
    depth, height, width = spread
    field = torch.matmul(correction, width.T)
    field = torch.matmul(height, field)
    return torch.einsum("ai,bcijk->bcajk", depth, field)


def register(
    moving: Volume,
    fixed: Volume,
    weights: str | Path | Loaded,
    device: str | torch.device | None = None,
    *,
    steps: int = 20,
    learning_rate: float = 0.1,
    similarity: str | None = None,
    window: int | None = None,
    regularisation: float | None = None,
    downsampling: int = 2,
    smoothing: float = 1.0,
) -> np.ndarray:
    """Return the field of a network, refined on this pair.

    See :func:`refine` for its parameters and :func:`dmir.methods.network.register` for the others.

    Parameters
    ----------
    weights
        Of the network. What it was trained to minimise is minimised, unless ``similarity``, ``window`` or
        ``regularisation`` is given.
    """
    target = choose_device(device)
    loaded = weights if isinstance(weights, tuple) else load_weights(weights, device=target)
    trained = loaded[1].get("extra", {}).get("training", {})
    given = {"similarity": similarity, "window": window, "regularisation": regularisation}
    objective: dict[str, Any] = {key: trained.get(key) if value is None else value for key, value in given.items()}
    told = {key: value for key, value in objective.items() if value is not None}
    told |= {"steps": steps, "learning_rate": learning_rate, "downsampling": downsampling, "smoothing": smoothing}
    return register_with_network(moving, fixed, loaded, target, refine=partial(refine, **told))
