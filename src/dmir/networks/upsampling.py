"""Convolutions of the baselines' decoders: of what is upsampled, which is never made.

Decoders are where the time of a registration network goes. Two things keep it short, and change no number:

- what is joined before a convolution is convolved apart and added: convolution is linear in its input channels;
- trilinear upsampling and the offsets of a kernel's planes commute with the mixing of channels. Along the first axis
  the kernel's three planes are applied at the coarse resolution, and one small matrix that holds both interpolation
  and offsets spreads what comes of it: half of the products. Where there are many channels this is done along all
  three axes: about an eighth. Nothing is ever upsampled as a whole.
"""

from __future__ import annotations

from collections.abc import Sequence
from functools import lru_cache
from typing import Any

import torch
import torch.nn.functional as F
from torch.autograd.function import once_differentiable

from dmir.networks.blocks import to_tokens, to_volume

SLAB_ELEMENTS = 2**21  # numbers upsampled at a time (8 MB in float32)


def add_upsampled_convolution(onto: torch.Tensor, coarse: torch.Tensor, weight: torch.Tensor) -> torch.Tensor:
    """Add to a volume, in place, the convolution 3x3x3 of a coarser one that is upsampled by two, trilinearly.

    Upsampling is that of ``F.interpolate(..., align_corners=False)``, cropped to the grid of ``onto``; the convolution
    pads what comes of it with zeros.

    Parameters
    ----------
    onto
        (B, out_channels, D, H, W), D <= 2d.
    coarse
        (B, in_channels, d, h, w).
    weight
        (out_channels, in_channels, 3, 3, 3).

    Returns
    -------
    torch.Tensor
        (B, out_channels, D, H, W), channels last.
    """
    onto = onto.contiguous(memory_format=torch.channels_last_3d)
    coarse = coarse.to(onto.dtype).contiguous(memory_format=torch.channels_last_3d)
    with torch.autocast(onto.device.type, enabled=False):
        return _AddUpsampledConvolution.apply(onto, coarse, weight.to(onto.dtype))


class _AddUpsampledConvolution(torch.autograd.Function):
    """See :func:`add_upsampled_convolution`: slab by slab of coarse planes, for the result and for the gradient."""

    @staticmethod
    def forward(ctx: Any, onto: torch.Tensor, coarse: torch.Tensor, weight: torch.Tensor) -> torch.Tensor:
        ctx.mark_dirty(onto)
        ctx.save_for_backward(coarse, weight)
        result = to_tokens(onto)
        for planes, rows, matrix in _slabs(coarse, weight, onto.shape):
            parts = _kernel_planes(coarse[:, :, planes], weight, onto.shape[3:])
            for of_image, part in zip(result, parts, strict=True):
                of_image[rows].flatten(1).addmm_(matrix, part.flatten(0, 1).flatten(1))
        return onto

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, gradient: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
        coarse, weight = ctx.saved_tensors
        tokens = to_tokens(gradient).contiguous()
        of_coarse, of_weight = torch.empty_like(coarse), torch.zeros_like(weight)
        for planes, rows, matrix in _slabs(coarse, weight, gradient.shape):
            of_parts = matrix.T @ tokens[:, rows].flatten(2)
            of_parts = of_parts.view(len(tokens), -1, 3, *tokens.shape[2:])
            of_slab, of_kernel = _kernel_planes_gradient(of_parts, coarse[:, :, planes], weight)
            of_coarse[:, :, planes] = of_slab
            of_weight += of_kernel
        return gradient, of_coarse, of_weight


def _slabs(coarse: torch.Tensor, weight: torch.Tensor, shape: Sequence[int]) -> list[tuple[slice, slice, torch.Tensor]]:
    """Cut the coarse planes into slabs: for each its planes, the fine planes they reach, and how much they do.

    Plane i is interpolated into the fine planes 2i - 1 to 2i + 2, and a convolution reaches one further.
    """
    depth, height, width = shape[2:]
    matrix = _spreading_matrix(coarse.shape[2], depth, coarse.device, coarse.dtype)
    channels = 7 * weight.shape[0] if _is_wide(coarse) else max(coarse.shape[1], 3 * weight.shape[0])  # of a fine plane
    step = max(1, SLAB_ELEMENTS // (coarse.shape[0] * channels * height * width))
    slabs = []
    for start in range(0, coarse.shape[2], step):
        planes = slice(start, min(start + step, coarse.shape[2]))
        rows = slice(max(2 * planes.start - 2, 0), min(2 * planes.stop + 2, depth))
        slabs.append((planes, rows, matrix[rows, planes].flatten(1)))
    return slabs


@lru_cache(maxsize=64)
def _spreading_matrix(coarse: int, fine: int, device: torch.device, dtype: torch.dtype) -> torch.Tensor:
    """Return what coarse plane i, convolved with kernel plane k, adds to fine plane j: (fine, coarse, 3).

    It is the weight that interpolation gives plane i in plane j + k - 1, and 0 where there is no such plane.
    """
    with torch.inference_mode(False):  # what is made within it cannot be kept for a gradient later
        interpolation = F.interpolate(torch.eye(coarse)[None], scale_factor=2, mode="linear", align_corners=False)
        padded = F.pad(interpolation[0, :, :fine].T, [0, 0, 1, 1])
        return torch.stack([padded[k : k + fine] for k in range(3)], dim=-1).to(device, dtype)


def _kernel_planes(slab: torch.Tensor, weight: torch.Tensor, shape: Sequence[int]) -> torch.Tensor:
    """Upsample the planes of a slab and convolve them with each plane of the kernel.

    (B, in_channels, n, h, w) and (out_channels, in_channels, 3, 3, 3) -> (B, n, 3, H, W, out_channels), contiguous.
    """
    batch, _, count, height, width = slab.shape
    if _is_wide(slab):
        # Mix the channels for each place of the kernel, then spread what comes of it along the third and second axis.
        mixed = to_tokens(slab).flatten(0, 3) @ _mixing_matrix(weight)
        along_width = _matrix(width, shape[1], slab).expand(batch * count * height, -1, -1)
        rows = along_width @ mixed.view(batch * count * height, width * 3, -1)
        rows = rows.view(batch * count, height, shape[1], 3, 3, -1).permute(0, 3, 1, 4, 2, 5)
        along_height = _matrix(height, shape[0], slab).expand(batch * count * 3, -1, -1)
        parts = along_height @ rows.reshape(batch * count * 3, height * 3, -1)
        return parts.view(batch, count, 3, *shape, -1)
    parts = F.conv2d(_upsampled_planes(slab, shape), weight.movedim(2, 0).flatten(0, 1), padding=1)
    parts = parts.movedim(1, -1).unflatten(-1, (3, -1)).movedim(3, 1)
    return parts.unflatten(0, (batch, count)).contiguous()


def _kernel_planes_gradient(
    gradient: torch.Tensor, slab: torch.Tensor, weight: torch.Tensor
) -> tuple[torch.Tensor, torch.Tensor]:
    """Return the gradients of slab and weight, given that of what :func:`_kernel_planes` returns."""
    batch, channels, count, height, width = slab.shape
    shape = gradient.shape[3:5]
    if _is_wide(slab):
        along_height = _matrix(height, shape[0], slab).T.expand(batch * count * 3, -1, -1)
        rows = along_height @ gradient.reshape(batch * count * 3, shape[0], -1)
        rows = rows.view(batch * count, 3, height, 3, shape[1], -1).permute(0, 2, 4, 1, 3, 5)
        along_width = _matrix(width, shape[1], slab).T.expand(batch * count * height, -1, -1)
        mixed = along_width @ rows.reshape(batch * count * height, shape[1], -1)
        mixed = mixed.view(batch * count * height * width, -1)
        of_weight = (to_tokens(slab).flatten(0, 3).T @ mixed).view(channels, 3, 3, 3, -1).permute(4, 0, 2, 3, 1)
        return to_volume((mixed @ _mixing_matrix(weight).T).view(batch, count, height, width, -1)), of_weight
    with torch.enable_grad():
        slab = slab.detach().requires_grad_()
        planes = _upsampled_planes(slab, shape)
    kernel = weight.movedim(2, 0).flatten(0, 1)
    of_parts = gradient.flatten(0, 1).movedim(1, 3).flatten(3, 4).movedim(-1, 1)
    of_planes, of_kernel, _ = torch.ops.aten.convolution_backward(
        of_parts, planes.detach(), kernel, None, [1, 1], [1, 1], [1, 1], False, [0, 0], 1, [True, True, False]
    )
    (of_slab,) = torch.autograd.grad(planes, slab, of_planes)
    return of_slab, of_kernel.unflatten(0, (3, -1)).movedim(0, 2)


def _is_wide(slab: torch.Tensor) -> bool:
    """Return whether mixing the channels before anything is upsampled saves products, in spite of the spreading."""
    return 81 * slab.shape[1] > 36 * slab.shape[3] + 54 * slab.shape[4]


def _mixing_matrix(weight: torch.Tensor) -> torch.Tensor:
    """(out_channels, in_channels, 3, 3, 3) -> (in_channels, 27 out_channels), the kernel's last axis first."""
    return weight.permute(1, 4, 2, 3, 0).flatten(1)


def _matrix(coarse: int, fine: int, like: torch.Tensor) -> torch.Tensor:
    """Return the spreading matrix of an axis, (fine, 3 coarse)."""
    return _spreading_matrix(coarse, fine, like.device, like.dtype).flatten(1)


def _upsampled_planes(slab: torch.Tensor, shape: Sequence[int]) -> torch.Tensor:
    """(B, C, n, h, w) -> (B n, C, H, W), upsampled on the last two axes only."""
    planes = to_tokens(slab).flatten(0, 1).movedim(-1, 1)
    planes = F.interpolate(planes, scale_factor=2, mode="bilinear", align_corners=False)
    return planes[..., : shape[0], : shape[1]]
