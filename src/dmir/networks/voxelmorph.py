"""VoxelMorph (Balakrishnan et al. 2019; diffeomorphic: Dalca et al. 2019): a U-Net on the pair as two channels."""

from __future__ import annotations

from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import nn

from dmir.errors import InputError
from dmir.fields import integrate, resize_displacement
from dmir.networks.blocks import (
    ConvolutionBlock,
    DisplacementHead,
    UpsamplingBlock,
    crop,
    pad_to_multiple,
    require_pair,
)

DOWNSAMPLING = ("pool", "stride")


class VoxelMorph(nn.Module):
    """VoxelMorph with the widths, the two designs and the two kinds of field that were published.

    | | ``downsampling`` | ``encoder`` | ``decoder`` | parameters |
    |---|---|---|---|---|
    | the authors' code | pool | 16,32,32,32 | 32,32,32,32,32,16,16 | 327,331 |
    | VoxelMorph-2 of the TransMorph paper | stride | 16,32,32,32 | 32,32,32,32,32,16,16 | 301,411 |
    | VoxelMorph-1 of the TransMorph paper | stride | 8,32,32,32 | 32,32,32,32,32,8,8 | 274,387 |

    Parameters
    ----------
    shape
        Grid (D, H, W) it is meant for; any other works too: inside, the far ends are padded with zeros.
    encoder
        Channels of the convolutions on the way down, one a level.
    decoder
        Channels of the convolutions on the way up, one a level, and then of those at full resolution.
    downsampling
        ``"pool"``: the first convolution works at full resolution, and each is followed by a max-pooling.
        ``"stride"``: each convolution halves the grid itself, and the pair of images is what the last upsampling is
        joined with (the design of 2018); cheaper by a quarter.
    integration_steps
        0: the network gives the displacement. Otherwise it gives a stationary velocity field, which is integrated by
        so many squarings.
    integration_downsampling
        The velocity is integrated on a grid coarser by this factor (published: 2). Unused without integration.

    Raises
    ------
    InputError
        The widths make no network, or an unknown ``downsampling``.
    """

    TITLE = "VoxelMorph"
    PAPER = "Balakrishnan et al. 2019; diffeomorphic: Dalca et al. 2019"
    COLOUR, MARKER = "#56b4e9", "^"

    def __init__(
        self,
        shape: tuple[int, int, int],
        *,
        encoder: Sequence[int] = (16, 32, 32, 32),
        decoder: Sequence[int] = (32, 32, 32, 32, 32, 16, 16),
        downsampling: str = "pool",
        integration_steps: int = 7,
        integration_downsampling: int = 2,
    ) -> None:
        super().__init__()
        _check(encoder, decoder, downsampling, integration_steps, integration_downsampling)
        self.pools = downsampling == "pool"
        self.integration_steps = integration_steps
        self.integration_downsampling = integration_downsampling
        levels = len(encoder)
        widths = [2, *encoder]
        self.encoder = nn.ModuleList(
            ConvolutionBlock(before, after, stride=1 if self.pools else 2)
            for before, after in zip(widths, encoder, strict=False)
        )
        self.bottom = ConvolutionBlock(encoder[-1], decoder[0])
        # what each upsampling is joined with, from the coarsest: without pooling, the last is the pair itself
        beside = list(encoder[::-1]) if self.pools else [*encoder[-2::-1], 2]
        # the convolution after the last upsampling is the first one at full resolution
        self.upsampling = nn.ModuleList(
            UpsamplingBlock(coarse, fine, after)
            for coarse, fine, after in zip(decoder[:levels], beside, decoder[1 : levels + 1], strict=True)
        )
        self.full_resolution = nn.Sequential(
            *(ConvolutionBlock(*pair) for pair in zip(decoder[levels:-1], decoder[levels + 1 :], strict=True))
        )
        self.head = DisplacementHead(decoder[-1])

    def forward(self, moving: torch.Tensor, fixed: torch.Tensor) -> torch.Tensor:
        """Return the displacement (B, 3, D, H, W), float32, in voxels, of two images (B, 1, D, H, W)."""
        require_pair(moving, fixed)
        shape = (moving.shape[2], moving.shape[3], moving.shape[4])
        pair = pad_to_multiple(torch.cat([moving, fixed], dim=1), 2 ** len(self.encoder))
        field = crop(self._velocity(pair), shape)
        if not self.integration_steps:
            return field.contiguous()
        coarse = [max(n // self.integration_downsampling, 1) for n in shape]
        velocity = resize_displacement(field, (coarse[0], coarse[1], coarse[2]))
        return resize_displacement(integrate(velocity, self.integration_steps), shape)

    def _velocity(self, pair: torch.Tensor) -> torch.Tensor:
        """The U-Net: (B, 2, D, H, W) -> (B, 3, D, H, W)."""
        volume, beside = pair, []
        for convolution in self.encoder:
            if self.pools:
                volume = convolution(volume)
                beside.append(volume)
                volume = F.max_pool3d(volume, 2)
            else:
                beside.append(volume)
                volume = convolution(volume)
        volume = self.bottom(volume)
        for upsampling, fine in zip(self.upsampling, reversed(beside), strict=True):
            volume = upsampling(volume, fine)
        return self.head(self.full_resolution(volume))


def _check(
    encoder: Sequence[int], decoder: Sequence[int], downsampling: str, steps: int, integration_downsampling: int
) -> None:
    if downsampling not in DOWNSAMPLING:
        raise InputError("downsampling", found=repr(downsampling), expected=" or ".join(map(repr, DOWNSAMPLING)))
    if not encoder or len(decoder) <= len(encoder):
        raise InputError(
            "decoder",
            found=f"{len(decoder)} widths for {len(encoder)} levels of the encoder",
            expected="one width a level of the encoder, and at least one for full resolution",
        )
    if min(*encoder, *decoder) < 1:
        raise InputError("encoder, decoder", found=f"{list(encoder)}, {list(decoder)}", expected="positive widths")
    if steps < 0 or integration_downsampling < 1:
        raise InputError(
            "integration_steps, integration_downsampling",
            found=f"{steps}, {integration_downsampling}",
            expected="at least 0 and at least 1",
        )
