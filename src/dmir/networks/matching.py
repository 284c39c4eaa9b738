"""Matching: where each token of the fixed image finds itself in a small neighbourhood of the moving one.

Nothing is regressed: the softmax of a token's similarities to its neighbours weights their offsets, and the expected
offset *is* the displacement (motion decomposition, Wang et al. 2023; differentiable correspondence, Heinrich 2019).

The similarities of all neighbours are one product of two views, slab by slab of planes, forwards and for the gradient:
neither is there a loop over neighbours, nor does a copy of the features a neighbour exist anywhere.
"""

from __future__ import annotations

from collections.abc import Iterator
from functools import lru_cache
from typing import Any

import torch
import torch.nn.functional as F
from torch.autograd.function import once_differentiable

SLAB_ELEMENTS = {"cpu": 2**19, "cuda": 2**25}
"""Products of features that exist at a time: on a CPU what its cache holds, on a GPU what keeps it busy."""


def expected_offset(fixed: torch.Tensor, moving: torch.Tensor, sharpness: torch.Tensor, radius: int) -> torch.Tensor:
    r"""Return for each fixed token the expected offset of its match among the moving tokens round it.

    .. math:: u(x) = \sum_{|o|_\infty \le r} o \,
        \operatorname{softmax}_o \left( \tau \langle f(x), m(x + o) \rangle \right)

    Parameters
    ----------
    fixed, moving
        Tokens (B, heads, C, D, H, W); what lies outside is the nearest token's.
    sharpness
        The factor :math:`\tau` of the similarities, a scalar.
    radius
        Of the neighbourhood, in tokens: (2 radius + 1)\ :sup:`3` neighbours.

    Returns
    -------
    torch.Tensor
        (B, heads, 3, D, H, W) in tokens, each component between -radius and radius; float32 at least.
    """
    dtype = torch.promote_types(fixed.dtype, torch.float32)
    with torch.autocast(fixed.device.type, enabled=False):
        around = F.pad(moving.to(dtype).flatten(1, 2), [radius] * 6, mode="replicate")
        around = around.unflatten(1, moving.shape[1:3])
        return _ExpectedOffset.apply(fixed.to(dtype), around, sharpness.to(dtype), radius)


class _ExpectedOffset(torch.autograd.Function):
    """See :func:`expected_offset`; ``around`` is the moving image's tokens, padded by the radius."""

    @staticmethod
    def forward(
        ctx: Any, fixed: torch.Tensor, around: torch.Tensor, sharpness: torch.Tensor, radius: int
    ) -> torch.Tensor:
        offsets = neighbours(radius, fixed.device, fixed.dtype)
        result = fixed.new_empty(*fixed.shape[:2], 3, *fixed.shape[3:])
        weights = fixed.new_empty(*fixed.shape[:2], len(offsets), *fixed.shape[3:])
        shifted = _shifted(around, radius)
        for planes in _slabs(fixed, radius):
            products = fixed[:, :, :, None, None, None, planes] * shifted[..., planes, :, :]
            scores = products.sum(dim=2).flatten(2, 4)
            weights[:, :, :, planes] = torch.softmax(scores.mul_(sharpness), dim=2)
        for image, of_image in zip(result, weights, strict=True):
            for head, of_head in zip(image, of_image, strict=True):
                torch.mm(offsets.T, of_head.flatten(1), out=head.view(3, -1))
        ctx.radius = radius
        ctx.save_for_backward(fixed, around, sharpness, weights)
        return result

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, gradient: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor, None]:
        fixed, around, sharpness, weights = ctx.saved_tensors
        radius = ctx.radius
        side = 2 * radius + 1
        offsets = neighbours(radius, fixed.device, fixed.dtype)
        of_weights = (offsets @ gradient.contiguous().flatten(3)).view_as(weights)
        of_scores = weights * (of_weights - (weights * of_weights).sum(dim=2, keepdim=True))
        of_scores = of_scores.unflatten(2, (side, side, side))
        of_fixed, shifted = torch.empty_like(fixed), _shifted(around, radius)
        for planes in _slabs(fixed, radius):
            products = of_scores[:, :, None, ..., planes, :, :] * shifted[..., planes, :, :]
            of_fixed[:, :, :, planes] = products.sum(dim=(3, 4, 5))
        # the similarities times their gradients, summed over neighbours, are features times theirs, over channels
        of_sharpness = (fixed * of_fixed).sum()
        of_around = torch.empty_like(around)
        # A moving token is asked by the fixed ones round it. Mirrored, all their shares lie a step further each, in
        # neighbour and place at once: another view.
        mirrored = F.pad(of_scores.flip(2, 3, 4), [2 * radius] * 6)
        strides = mirrored.stride()
        steps = [neighbour + place for neighbour, place in zip(strides[2:5], strides[5:8], strict=True)]
        size = (*mirrored.shape[:5], *around.shape[3:])
        shares = mirrored.as_strided(size, (*strides[:2], *steps, *strides[5:]))
        askers = _shifted(F.pad(fixed, [2 * radius] * 6), radius)
        for planes in _slabs(around, radius):
            products = shares[:, :, None, ..., planes, :, :] * askers[..., planes, :, :]
            of_around[:, :, :, planes] = products.sum(dim=(3, 4, 5))
        return of_fixed * sharpness, of_around * sharpness, of_sharpness, None


@lru_cache(maxsize=16)
def neighbours(radius: int, device: torch.device, dtype: torch.dtype) -> torch.Tensor:
    """Return the offsets of a neighbourhood, ((2 radius + 1)^3, 3), the last axis fastest."""
    with torch.inference_mode(False):  # what is made within it cannot be kept for a gradient later
        along = torch.arange(-radius, radius + 1, device=device, dtype=dtype)
        return torch.cartesian_prod(along, along, along)


def _shifted(padded: torch.Tensor, radius: int) -> torch.Tensor:
    """View (B, heads, C, D + 2r, H + 2r, W + 2r) as all its shifts, (B, heads, C, n, n, n, D, H, W), n = 2r + 1."""
    side = 2 * radius + 1
    places = [size - 2 * radius for size in padded.shape[3:]]
    strides = padded.stride()
    return padded.as_strided((*padded.shape[:3], side, side, side, *places), (*strides, *strides[3:]))


def _slabs(tokens: torch.Tensor, radius: int) -> Iterator[slice]:
    """Cut the planes of tokens (B, heads, C, D, H, W) into slabs with products for all neighbours of a limited size."""
    depth = tokens.shape[3]
    plane = tokens[:, :, :, 0].numel() * (2 * radius + 1) ** 3
    step = max(1, SLAB_ELEMENTS.get(tokens.device.type, 2**25) // plane)
    for start in range(0, depth, step):
        yield slice(start, min(start + step, depth))
