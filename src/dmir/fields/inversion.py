"""The inverse of a field, and how far there and back ends from the start."""

from __future__ import annotations

import logging

import numpy as np
import torch
import torch.nn.functional as F

from dmir.fields.composition import compose
from dmir.fields.jacobian import folded_voxels
from dmir.fields.sampling import identity_grid, normalised, warp

log = logging.getLogger(__name__)

SWEEPS = 4  # iterations of an inversion over all voxels, before those over what has not arrived
LEAST_SHARE = 0.01  # of a step of an inversion, below which a voxel is given up
NO_INVERSE = 0.5  # voxels from the start: more is no inverse


def invert(
    displacement: torch.Tensor, iterations: int = 60, tolerance: float = 1e-3, *, tell: bool = True
) -> torch.Tensor:
    """Return v with v(x) = -u(x + v(x)), by fixed-point iteration (Chen et al. 2008) and Newton's method.

    A few iterations over all voxels bring nearly all of them there; those that have not arrived, where the field
    stretches or shears, go on by damped steps of Newton. Where a field folds there is no inverse: see
    :func:`inverse_residual`, and what is logged.

    Parameters
    ----------
    displacement
        (B, 3, D, H, W) in voxels.
    iterations
        At most.
    tolerance
        Length of v(x) + u(x + v(x)), voxels, at which a voxel has arrived.
    tell
        Log where there is no inverse; without it the caller tells, from :func:`inverse_residual`.
    """
    result = torch.stack([_inverted(one, iterations, tolerance) for one in displacement])
    if tell:
        _tell_of_what_is_not_inverted(displacement, inverse_residual(displacement, result))
    return result


def _inverted(displacement: torch.Tensor, iterations: int, tolerance: float) -> torch.Tensor:
    """Return the inverse of one field (3, D, H, W)."""
    u, inverse = displacement[None], -displacement[None]
    for _ in range(SWEEPS):
        inverse = -warp(u, inverse, padding="border")
    for again in (False, True):
        error = compose(u, inverse)[0].flatten(1)
        left = (error.square().sum(0) > tolerance**2).nonzero()[:, 0]
        if not len(left):
            break
        start = inverse[0].flatten(1)
        if again:  # what did not arrive sets out once more from where its neighbours arrived
            arrived = torch.ones_like(error[0]).index_fill_(0, left, 0.0).view(1, 1, *displacement.shape[1:])
            mean = F.avg_pool3d(inverse * arrived, 3, 1, 1) / F.avg_pool3d(arrived, 3, 1, 1).clamp(min=1e-3)
            guess = mean[0].flatten(1)[:, left]
        else:
            guess = start[:, left]
        shape = (u.shape[2], u.shape[3], u.shape[4])
        place = identity_grid(shape, u.device, u.dtype)[0].flatten(1)[:, left]
        found, reached = inverse_at(displacement, place, guess, iterations - SWEEPS, tolerance)
        better = reached < error[:, left].norm(dim=0)
        start[:, left] = torch.where(better, found, start[:, left])
        inverse = start.view_as(inverse)
    return inverse[0]


def inverse_at(
    displacement: torch.Tensor, place: torch.Tensor, guess: torch.Tensor, iterations: int = 60, tolerance: float = 1e-3
) -> tuple[torch.Tensor, torch.Tensor]:
    """Improve the inverse v of a field at some places, v(x) = -u(x + v(x)), by damped steps of Newton.

    Parameters
    ----------
    displacement
        u: (3, D, H, W) in voxels; beyond its border as at the border.
    place, guess
        x and a first v: (3, n) in voxels.
    iterations, tolerance
        As for :func:`invert`.

    Returns
    -------
    inverse, left
        v, (3, n), and the length of v(x) + u(x + v(x)), (n,): in voxels.
    """
    inverse = guess.clone()
    error = inverse + _sampled_at(displacement, place + inverse)
    going, share = (error.norm(dim=0) > tolerance).nonzero()[:, 0], torch.ones_like(error[0])
    for _ in range(iterations):
        if not len(going):
            break
        moved = inverse[:, going] - share[going] * _newton_step(
            displacement, place[:, going] + inverse[:, going], error[:, going]
        )
        after = moved + _sampled_at(displacement, place[:, going] + moved)
        better = after.square().sum(0) < error[:, going].square().sum(0)
        inverse[:, going] = torch.where(better, moved, inverse[:, going])
        error[:, going] = torch.where(better, after, error[:, going])
        share[going] = torch.where(better, (2 * share[going]).clamp(max=1), 0.5 * share[going])
        going = going[(error[:, going].norm(dim=0) > tolerance) & (share[going] > LEAST_SHARE)]
    return inverse, error.norm(dim=0)


def inverse_residual(displacement: torch.Tensor, inverse: torch.Tensor) -> torch.Tensor:
    """Return how far there and back ends from the start, |v(x) + u(x + v(x))| in voxels, (B, D, H, W)."""
    return compose(displacement, inverse).norm(dim=1)


def inverse_consistency(displacement: np.ndarray) -> dict[str, float]:
    """Return ``inverse_mean`` and ``inverse_worst`` of a field (3, D, H, W): :func:`inverse_residual`, in voxels."""
    with torch.inference_mode():
        field = torch.from_numpy(np.ascontiguousarray(displacement, np.float32))[None]
        residual = inverse_residual(field, invert(field))
    return {"inverse_mean": float(residual.mean()), "inverse_worst": float(residual.amax())}


def _newton_step(displacement: torch.Tensor, places: torch.Tensor, error: torch.Tensor) -> torch.Tensor:
    """Solve (I + du/dx) s = error at places (3, n) of a field (3, D, H, W)."""
    columns = []
    for axis in range(3):
        half = places.new_zeros(3, 1)
        half[axis] = 0.5
        columns.append(_sampled_at(displacement, places + half) - _sampled_at(displacement, places - half))
        columns[axis][axis] += 1
    a, b, c = columns
    normal = torch.linalg.cross(b, c, dim=0)
    determinant = (a * normal).sum(0)
    safe = torch.where(determinant.abs() < 1e-6, torch.full_like(determinant, 1e-6), determinant)
    parts = (normal, torch.linalg.cross(c, a, dim=0), torch.linalg.cross(a, b, dim=0))
    return torch.stack([(part * error).sum(0) for part in parts]) / safe


def _sampled_at(displacement: torch.Tensor, places: torch.Tensor) -> torch.Tensor:
    """Return a field (3, D, H, W) at places (3, n) in voxels, beyond its border as at the border: (3, n)."""
    grid = torch.stack([normalised(places[axis], displacement.shape[axis + 1]) for axis in (2, 1, 0)], dim=-1)
    sampled = F.grid_sample(displacement[None], grid[None, None, None], padding_mode="border", align_corners=True)
    return sampled[0, :, 0, 0]


def _tell_of_what_is_not_inverted(displacement: torch.Tensor, residual: torch.Tensor) -> None:
    """Warn of voxels whose inverse is no inverse, and of a field that has none because it folds."""
    wrong, folds = int((residual > NO_INVERSE).sum()), sum(folded_voxels(one) for one in displacement)
    if wrong:
        log.warning(
            "the field has no inverse at %d of %d voxels, where there and back ends up to %.3g voxels from the start:"
            " what is brought back there is wrong",
            wrong,
            residual.numel(),
            float(residual.amax()),
        )
    if folds:
        log.warning("the field folds at %d places: there it has no inverse, and what is brought back jumps", folds)
