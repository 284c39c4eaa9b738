"""A matching pyramid: from coarse to fine, each fixed token looks for itself among a few moving ones, and a few steps
of descent on the pair itself follow, whose lengths are learnt.

Beyond the paper. ``docs/pyramid.md`` tells whose ideas its parts are, which are ours, and what was measured.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import nn

from dmir.errors import InputError
from dmir.fields import compose, integrate, resize_displacement, warp
from dmir.networks.blocks import (
    PaddedConvolution,
    ResidualBlock,
    fastest_layout,
    require_levels,
    require_pair,
    to_tokens,
    to_volume,
)
from dmir.networks.caml import CascadeAttention
from dmir.networks.matching import expected_offset
from dmir.networks.unrolled import UnrolledDescent, at_level

SLOPE = 0.1  # of LeakyReLU below zero
EPSILON = 1e-8  # of the variances: far below that of any image, so that contrast does not count
SHARPNESS = 2.0  # logarithm of the softmax's factor at the start


class NormalisedConvolution(nn.Module):
    """Convolution 3x3x3, instance normalisation (no grey value is absolute), LeakyReLU."""

    def __init__(self, in_channels: int, out_channels: int, stride: int = 1) -> None:
        super().__init__()
        # no bias: the normalisation would take it away again
        self.convolution = PaddedConvolution(in_channels, out_channels, stride, bias=False)

    def forward(self, volume: torch.Tensor) -> torch.Tensor:
        """(B, in_channels, D, H, W) -> (B, out_channels, D', H', W')."""
        volume = self.convolution(volume)
        # a group a channel is an instance normalisation, which torch refuses for a single voxel
        volume = torch.group_norm(volume, volume.shape[1], eps=EPSILON)
        return F.leaky_relu(volume, SLOPE, inplace=True)


class Level(nn.Module):
    """A level of the pyramid: its tokens, what they are matched with, and the displacement that comes of it.

    Parameters
    ----------
    channels
        Of the encoder at this level.
    finer
        Of the finer level, for matching across levels; None: only at the level itself.
    heads, head_channels, radius, integration_steps
        See :class:`Pyramid`.
    rbsc
        The features come to the level through a residual block.
    carsc
        The level matches twice; the second time the fixed tokens know, through a residual block and a gate, what the
        first one found.
    """

    def __init__(
        self,
        channels: int,
        finer: int | None,
        heads: int,
        head_channels: int,
        radius: int,
        integration_steps: int,
        rbsc: bool,
        carsc: bool,
    ) -> None:
        super().__init__()
        width = heads * head_channels
        self.radius, self.integration_steps = radius, integration_steps
        self.skip = ResidualBlock(channels) if rbsc else nn.Identity()
        self.tokens = PaddedConvolution(channels, width)
        self.finer_tokens = None if finer is None else nn.Conv3d(finer, width, 1)
        self.sharpness = nn.Parameter(torch.tensor(SHARPNESS))
        self.mixing = _mean_of_heads(heads if finer is None else 2 * heads)
        self.second = SecondPass(self.mixing.in_channels, width if finer is None else 2 * width) if carsc else None

    def forward(self, features: torch.Tensor, finer: torch.Tensor, displacement: torch.Tensor | None) -> torch.Tensor:
        """Match a level and add what comes of it to the field so far.

        Parameters
        ----------
        features
            (2B, channels, D, H, W), moving images first.
        finer
            The finer level's, which has twice the voxels along each axis, or as many.
        displacement
            (B, 3, D, H, W) in voxels of this level; None at the coarsest.
        """
        tokens = self.tokens(self.skip(features))
        if self.finer_tokens is not None:
            tokens = torch.cat([tokens, self.finer_tokens(_pooled(finer, tokens.shape[2:]))], dim=1)
        moving, fixed = tokens.contiguous().chunk(2)
        return self._matched(moving, fixed, displacement)

    def _matched(self, moving: torch.Tensor, fixed: torch.Tensor, displacement: torch.Tensor | None) -> torch.Tensor:
        """Match tokens (B, width, D, H, W), and once more if the level has a second pass; compose with the field."""
        offsets = self._offsets(moving, fixed, displacement)
        found = self._added(displacement, self.mixing(offsets))
        if self.second is None:
            return found
        fixed = self.second(fixed, offsets)
        return self._added(found, self.mixing(self._offsets(moving, fixed, found)))

    def _offsets(self, moving: torch.Tensor, fixed: torch.Tensor, displacement: torch.Tensor | None) -> torch.Tensor:
        """Return the expected offset of each head, (B, 3 heads, D, H, W)."""
        if displacement is not None:
            moving = warp(moving, displacement, padding="border")
        heads = self.mixing.in_channels // 3
        one, other = (F.normalize(t.unflatten(1, (heads, -1)), dim=2) for t in (fixed, moving))
        return expected_offset(one, other, self.sharpness.exp(), self.radius).flatten(1, 2)

    def _added(self, displacement: torch.Tensor | None, update: torch.Tensor) -> torch.Tensor:
        if self.integration_steps:
            update = integrate(update, self.integration_steps)
        return update if displacement is None else compose(displacement, update)


class SecondPass(nn.Module):
    """What a level's first match tells the fixed tokens of its second one, as a stage tells the next in the cascade."""

    def __init__(self, offsets: int, width: int) -> None:
        super().__init__()
        self.widen = nn.Conv3d(offsets, width, 1)
        self.attention = CascadeAttention(width)

    def forward(self, tokens: torch.Tensor, offsets: torch.Tensor) -> torch.Tensor:
        """(B, width, D, H, W) and (B, offsets, D, H, W) -> (B, width, D, H, W)."""
        told = self.attention(to_tokens(tokens), to_tokens(self.widen(offsets)))
        return to_volume(told).contiguous()


class Pyramid(nn.Module):
    """A matching pyramid, with the three parts of the proposed network as switches.

    Both images pass through one encoder. From the coarsest level on, the moving image's tokens are warped by the field
    so far, each fixed token is matched with those round it (:func:`~dmir.networks.matching.expected_offset`, by cosine
    similarity), the heads' offsets are mixed and composed with the field.

    Parameters
    ----------
    shape
        Grid (D, H, W) it is meant for; any other works too.
    caml
        Matching across levels: as many heads again match features of the next finer level, pooled.
    rbsc
        Features come to their level's tokens through a residual block.
    carsc
        Each level matches twice, the second time after warping by what the first one found, which a gate lets the
        tokens know.
    channels
        Of the encoder, from its finest level to its coarsest.
    heads
        Of the matching, one number a level of ``channels``; 0: the level's features are encoded, and matched nowhere.
        Without any, nothing is encoded either.
    head_channels
        Of each head's tokens.
    radius
        Of the neighbourhood: 1 is 27 neighbours, 2 is 125.
    integration_steps
        Squarings that make what a level adds a diffeomorphism (Dalca et al. 2019): fields that do not fold, composed,
        do not fold. 0: it is added as it was matched.
    field_downsampling
        1: the finest level, of the encoder and of the field, is at full resolution. 2: at half.
    descent_steps
        After each level's match, one number a level of ``channels``; nothing: none. See
        :class:`~dmir.networks.unrolled.UnrolledDescent`.
    descent_widths
        Of the Gaussians that smooth their directions, standard deviations in voxels of the level.

    Raises
    ------
    InputError
        The hyperparameters make no network.
    """

    TITLE = "Pyramid"
    PAPER = "beyond the paper, docs/pyramid.md"
    COLOUR, MARKER = "#5b3df4", "8"

    def __init__(
        self,
        shape: tuple[int, int, int],
        *,
        caml: bool = False,
        rbsc: bool = False,
        carsc: bool = False,
        channels: Sequence[int] = (16, 32, 48, 64),
        heads: Sequence[int] = (1, 2, 4, 8),
        head_channels: int = 6,
        radius: int = 1,
        integration_steps: int = 4,
        field_downsampling: int = 2,
        descent_steps: Sequence[int] = (),
        descent_widths: Sequence[float] = (1.5, 3.0),
    ) -> None:
        super().__init__()
        _check(channels, heads, head_channels, radius, integration_steps, field_downsampling)
        steps = _checked_steps(descent_steps, descent_widths, heads)
        widths = [1, *channels]
        self.strides = [field_downsampling, *(2 for _ in channels[1:])]
        self.encoder = nn.ModuleList(
            nn.Sequential(NormalisedConvolution(before, width, stride), NormalisedConvolution(width, width))
            for before, width, stride in zip(widths, channels if any(heads) else (), self.strides, strict=False)
        )
        # the finest level has the images themselves beyond it
        self.levels = nn.ModuleList(
            Level(width, finer if caml else None, number, head_channels, radius, integration_steps, rbsc, carsc)
            if number
            else nn.Identity()
            for width, finer, number in zip(channels, widths, heads, strict=False)
        )
        self.descents = nn.ModuleList(
            UnrolledDescent(number, descent_widths) if number else nn.Identity() for number in steps
        )

    def forward(self, moving: torch.Tensor, fixed: torch.Tensor) -> torch.Tensor:
        """Return the displacement (B, 3, D, H, W), float32, in voxels, of two images (B, 1, D, H, W)."""
        require_pair(moving, fixed)
        # never in bfloat16: a sharp softmax would make displacements of what is rounded off
        with torch.autocast(moving.device.type, enabled=False):
            return self._displacement(moving, fixed)

    def _displacement(self, moving: torch.Tensor, fixed: torch.Tensor) -> torch.Tensor:
        images = fastest_layout(torch.cat([moving, fixed]))
        features, grids = self._encoded(images), self._grids(images.shape[2:])
        displacement = None
        for place, (match, descend) in reversed(list(enumerate(zip(self.levels, self.descents, strict=True)))):
            if isinstance(match, nn.Identity) and isinstance(descend, nn.Identity):
                continue
            grid = grids[place]
            if displacement is not None:
                displacement = resize_displacement(displacement, grid)
            if not isinstance(match, nn.Identity):
                displacement = match(features[place + 1], features[place], displacement)
            if not isinstance(descend, nn.Identity):
                start = moving.new_zeros(len(moving), 3, *grid) if displacement is None else displacement
                displacement = descend(at_level(moving, grid), at_level(fixed, grid), start)
        assert displacement is not None
        return resize_displacement(displacement, (moving.shape[2], moving.shape[3], moving.shape[4]))

    def _encoded(self, volume: torch.Tensor) -> list[torch.Tensor]:
        """Return the images (2B, 1, D, H, W) and the features of each level."""
        features = [volume]
        for encode in self.encoder:
            features.append(encode(features[-1]))
        return features

    def _grids(self, grid: Sequence[int]) -> list[tuple[int, int, int]]:
        """Return the levels' grids."""
        grids = []
        for stride in self.strides:
            depth, height, width = (-(-size // stride) for size in grid)
            grids.append(grid := (depth, height, width))
        return grids


def _pooled(finer: torch.Tensor, grid: Sequence[int]) -> torch.Tensor:
    """Bring a finer level to a grid that halves it, n voxels to ceil(n / 2), or is its own."""
    return finer if finer.shape[2:] == tuple(grid) else F.max_pool3d(finer, 2, ceil_mode=True)


def _mean_of_heads(heads: int) -> nn.Conv3d:
    """Return a convolution 3x3x3 of the offsets (3 a head) that starts as nearly the mean over the heads."""
    mixing = PaddedConvolution(3 * heads, 3)
    assert mixing.bias is not None
    nn.init.normal_(mixing.weight, std=1e-3)
    nn.init.zeros_(mixing.bias)
    with torch.no_grad():
        for axis in range(3):
            mixing.weight[axis, axis::3, 1, 1, 1] += 1 / heads
    return mixing


def _checked_steps(steps: Sequence[int], widths: Sequence[float], heads: Sequence[int]) -> list[int]:
    """Return the steps of descent at each level."""
    found = list(steps) or [0] * len(heads)
    if len(found) != len(heads) or min(found) < 0:
        raise InputError(
            "descent_steps", found=str(list(steps)), expected=f"{len(heads)} numbers, 0 or more at each level"
        )
    if any(found) and (not widths or min(widths) <= 0):
        raise InputError("descent_widths", found=str(list(widths)), expected="one or more numbers above 0")
    if not any(heads) and not any(found):
        raise InputError("heads, descent_steps", found="a level of neither", expected="a number above 0 in one of them")
    return found


def _check(
    channels: Sequence[int],
    heads: Sequence[int],
    head_channels: int,
    radius: int,
    integration_steps: int,
    field_downsampling: int,
) -> None:
    require_levels(channels=channels, heads=[max(number, 1) for number in heads])
    if min(heads) < 0:
        raise InputError("heads", found=str(list(heads)), expected="0 or more at each level")
    if head_channels < 1 or radius < 1:
        raise InputError("head_channels, radius", found=f"{head_channels}, {radius}", expected="at least 1 each")
    if integration_steps < 0:
        raise InputError("integration_steps", found=str(integration_steps), expected="0 or more")
    if field_downsampling not in (1, 2):
        raise InputError("field_downsampling", found=str(field_downsampling), expected="1 or 2")
