"""TransMorph (Chen et al. 2022, Medical Image Analysis 82): a Swin transformer on the pair, a convolutional decoder.

Normalisation and activation work in place, and the gradient of both needs nothing but their result; upsampling and
joining are :mod:`dmir.networks.upsampling`'s.
"""

from __future__ import annotations

from collections.abc import Sequence
from itertools import pairwise
from typing import Any

import torch
import torch.nn.functional as F
from torch import nn
from torch.autograd.function import once_differentiable

from dmir.errors import InputError
from dmir.networks.blocks import DisplacementHead, convolve, crop, require_pair, to_volume
from dmir.networks.swin import SwinEncoder, SwinSettings
from dmir.networks.upsampling import add_upsampled_convolution

SLOPE = 0.01  # of LeakyReLU below zero
EPSILON = 1e-5  # added to the variance of instance normalisation
CACHED_ELEMENTS = 2**18  # numbers normalised at a time (1 MB in float32)


class TransMorph(nn.Module):
    """TransMorph: 46,771,251 parameters as published, on any grid.

    With ``field_downsampling=2``, the version published for OASIS, there are 46,556,115. The published code has 864
    more: the weights of a convolution from 2 to 16 channels at full resolution, whose result nothing uses.

    No grid need be divisible: n voxels become ceil(n / 4) tokens, these ceil(n / 2) from level to level, and what is
    upsampled is cropped to the finer level.

    Parameters
    ----------
    shape
        Grid (D, H, W) it is meant for; any other works too.
    embedding
        Channels of the transformer at 1/4; twice as many from level to level. Half as many at 1/2.
    depths, heads
        Blocks and heads of the levels at 1/4, 1/8, ...
    window
        In tokens. Published for 160x192x224; it divides the levels of that grid.
    mlp_ratio
        Width of the perceptrons' hidden layers, in channels.
    qkv_bias
        The projections to queries, keys and values have a bias.
    drop_path
        Largest rate of stochastic depth; it rises linearly from 0 over the blocks.
    head_channels
        Of the convolutions at full resolution, from which the head makes the displacement.
    field_downsampling
        1: the field is computed at full resolution. 2: at half, and upsampled; its values are voxels of the full grid
        all the same.
    mask_padding
        Where a level is no multiple of the window, the padding gets no weight. False: it does, as in the published
        code (which pads the wrong axes unless all are padded alike).
    checkpointing
        In training, keep of the transformer the tokens between blocks only: less memory, and more time.

    Raises
    ------
    InputError
        The hyperparameters make no network.
    """

    TITLE = "TransMorph"
    PAPER = "Chen et al. 2022, Medical Image Analysis 82"
    COLOUR, MARKER = "#009e73", "<"

    def __init__(
        self,
        shape: tuple[int, int, int],
        *,
        embedding: int = 96,
        depths: Sequence[int] = (2, 2, 4, 2),
        heads: Sequence[int] = (4, 4, 8, 8),
        window: Sequence[int] = (5, 6, 7),
        mlp_ratio: float = 4.0,
        qkv_bias: bool = False,
        drop_path: float = 0.3,
        head_channels: int = 16,
        field_downsampling: int = 1,
        mask_padding: bool = True,
        checkpointing: bool = False,
    ) -> None:
        super().__init__()
        if field_downsampling not in (1, 2):
            raise InputError("field_downsampling", found=str(field_downsampling), expected="1 or 2")
        if head_channels < 1:
            raise InputError("head_channels", found=str(head_channels), expected="a positive number")
        settings = SwinSettings(window, mlp_ratio, qkv_bias, qkv_bias, mask_padding, checkpointing)
        self.encoder = SwinEncoder(2, embedding, depths, heads, drop_path, settings)
        widths = [embedding * 2**level for level in range(len(depths))]
        self.decoder = nn.ModuleList(
            DecoderBlock(coarse, fine, fine) for fine, coarse in reversed(list(pairwise(widths)))
        )
        half = embedding // 2
        self.half_skip = NormalisedConvolution(2, half)
        if field_downsampling == 1:
            self.to_half = DecoderBlock(embedding, half, half)
            self.full_skip = NormalisedConvolution(2, head_channels)
            self.to_full = DecoderBlock(half, head_channels, head_channels)
        else:
            self.to_half = DecoderBlock(embedding, half, head_channels)
        self.full_resolution = field_downsampling == 1
        self.head = DisplacementHead(head_channels)

    def forward(self, moving: torch.Tensor, fixed: torch.Tensor) -> torch.Tensor:
        """Return the displacement (B, 3, D, H, W), float32, in voxels, of two images (B, 1, D, H, W)."""
        require_pair(moving, fixed)
        pair = torch.cat([moving, fixed], dim=1)
        *finer, volume = (to_volume(tokens) for tokens in self.encoder(pair))
        for block, fine in zip(self.decoder, reversed(finer), strict=True):
            volume = block(volume, fine)
        volume = self.to_half(volume, self.half_skip(half_resolution(pair)))
        if self.full_resolution:
            return self.head(self.to_full(volume, self.full_skip(pair)))
        field = F.interpolate(self.head(volume), scale_factor=2, mode="trilinear", align_corners=False)
        return crop(field, pair.shape[2:]).contiguous()


def half_resolution(volume: torch.Tensor) -> torch.Tensor:
    """Average 3x3x3 voxels round every second one: (B, C, D, H, W) -> (B, C, ceil(D/2), ceil(H/2), ceil(W/2)).

    Beyond the border lie zeros that count, as in the published code.
    """
    return F.avg_pool3d(volume, 3, stride=2, padding=1)


class NormalisedConvolution(nn.Module):
    """Convolution 3x3x3 without bias, instance normalisation, LeakyReLU."""

    def __init__(self, in_channels: int, out_channels: int) -> None:
        super().__init__()
        self.convolution = nn.Conv3d(in_channels, out_channels, 3, padding=1, bias=False)

    def forward(self, volume: torch.Tensor) -> torch.Tensor:
        """(B, in_channels, D, H, W) -> (B, out_channels, D, H, W)."""
        return normalised_activation(convolve(volume, self.convolution.weight))


class DecoderBlock(nn.Module):
    """Up a level: trilinear upsampling by two, joining with a finer volume, and two normalised convolutions.

    Parameters
    ----------
    coarse_channels, fine_channels, out_channels
        Of the volume that is upsampled, of the finer one, and of the result.
    """

    def __init__(self, coarse_channels: int, fine_channels: int, out_channels: int) -> None:
        super().__init__()
        self.coarse_channels = coarse_channels
        self.joining = nn.Conv3d(coarse_channels + fine_channels, out_channels, 3, padding=1, bias=False)
        self.second = NormalisedConvolution(out_channels, out_channels)

    def forward(self, coarse: torch.Tensor, fine: torch.Tensor) -> torch.Tensor:
        """(B, coarse_channels, d, h, w) and (B, fine_channels, D, H, W), D <= 2d, -> (B, out_channels, D, H, W)."""
        of_coarse, of_fine = self.joining.weight.split([self.coarse_channels, fine.shape[1]], dim=1)
        volume = convolve(fine, of_fine.contiguous())  # without a layout of its own a weight would take the gradient's
        volume = add_upsampled_convolution(volume, coarse, of_coarse)
        return self.second(normalised_activation(volume))


def normalised_activation(volume: torch.Tensor) -> torch.Tensor:
    """Instance normalisation and LeakyReLU of a volume (B, C, D, H, W), in place."""
    return _NormalisedActivation.apply(volume)


class _NormalisedActivation(torch.autograd.Function):
    """Instance normalisation and LeakyReLU, both of which can be undone: the result is all that the gradient needs.

    The idea is that of in-place activated batch normalisation (Rota Bulo et al. 2018).
    """

    @staticmethod
    def forward(ctx: Any, volume: torch.Tensor) -> torch.Tensor:
        ctx.mark_dirty(volume)
        parts = volume.split(_layers_in_cache(volume), dim=2)
        mean = volume.mean(dim=(2, 3, 4), keepdim=True)
        variance = _mean([_sum(part.sub_(mean).square()) for part in parts], volume)
        rate = torch.rsqrt(variance + EPSILON).to(volume.dtype)
        for part in parts:
            F.leaky_relu_(part.mul_(rate), SLOPE)
        ctx.save_for_backward(volume, rate)
        return volume

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, gradient: torch.Tensor) -> torch.Tensor:
        volume, rate = ctx.saved_tensors
        of_normalised = torch.empty_like(volume)
        step = _layers_in_cache(volume)
        parts = list(zip(*(x.split(step, dim=2) for x in (volume, gradient, of_normalised)), strict=True))
        sums, products = [], []
        for result, of_result, of_input in parts:
            torch.ops.aten.leaky_relu_backward.grad_input(of_result, result, SLOPE, True, grad_input=of_input)
            sums.append(_sum(of_input))
            products.append(_sum(F.leaky_relu(result, 1.0 / SLOPE).mul_(of_input)))
        mean, slope = _mean(sums, volume).to(rate.dtype), _mean(products, volume).to(rate.dtype)
        for result, _, of_input in parts:
            normalised = F.leaky_relu(result, 1.0 / SLOPE)
            of_input.sub_(mean).sub_(normalised.mul_(slope)).mul_(rate)
        return of_normalised


def _layers_in_cache(volume: torch.Tensor) -> int:
    """Return how many layers along the first axis are worked on together."""
    return max(1, CACHED_ELEMENTS * volume.shape[2] // volume.numel())


def _sum(volume: torch.Tensor) -> torch.Tensor:
    """Sum each image and channel, in float32 at least: (B, C, 1, 1, 1)."""
    return volume.sum(dim=(2, 3, 4), keepdim=True, dtype=torch.promote_types(volume.dtype, torch.float32))


def _mean(sums: Sequence[torch.Tensor], volume: torch.Tensor) -> torch.Tensor:
    """Return what the sums over parts of a volume make a voxel."""
    return torch.stack(list(sums)).sum(dim=0) / volume[0, 0].numel()
