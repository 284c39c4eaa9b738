"""The proposed network: cross attention over multi-layers (CAML), residual skips (RBSC), a residual cascade (CARSC).

``docs/method.md`` sets out, choice by choice, what the paper says, what is done here, and why. The grid is halved from
level to level, n voxels to ceil(n / 2), so that any grid fits and each token holds at least one voxel of the image.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field

import torch
import torch.nn.functional as F
from torch import nn

from dmir.errors import InputError
from dmir.fields import compose, resize_displacement, warp
from dmir.networks.blocks import (
    AttentionGate,
    ConvolutionBlock,
    DisplacementHead,
    PatchExpanding,
    PatchMerging,
    ResidualBlock,
    UpsamplingBlock,
    drop_path_rates,
    require_drop_path,
    require_levels,
    require_pair,
    to_tokens,
    to_volume,
)
from dmir.networks.fusion import AttentionLevel, BlockSettings

PATCH = 4  # voxels on the edge of a token of the first attention level


@dataclass(frozen=True)
class StagePlan:
    """The sizes of a stage; see :class:`CAML` for the hyperparameters of the same names."""

    detail_channels: Sequence[int]
    channels: Sequence[int]
    depths: Sequence[int]
    heads: Sequence[int]
    drop_path: float
    caml: bool
    rbsc: bool
    field_downsampling: int
    settings: BlockSettings

    def level(self, index: int) -> AttentionLevel:
        """Build the cross attention blocks of a level; the rate of drop path rises linearly from block to block."""
        finer = [self.detail_channels[1], *self.channels][index] if self.caml else None
        rates = drop_path_rates(self.depths, self.drop_path)[index]
        return AttentionLevel(self.channels[index], self.heads[index], finer, self.settings, rates)

    def skip(self, width: int) -> nn.Module:
        """Build what a skip connection passes through: RBSC, or nothing."""
        return ResidualBlock(width) if self.rbsc else nn.Identity()


class CascadeAttention(nn.Module):
    """Lets in what the stage before knows, through a residual block and a gate that the stage's own tokens steer."""

    def __init__(self, channels: int) -> None:
        super().__init__()
        self.residual = ResidualBlock(channels)
        self.gate = AttentionGate(channels)

    def forward(self, tokens: torch.Tensor, earlier: torch.Tensor) -> torch.Tensor:
        """Own tokens and the earlier stage's, both (2B, D, H, W, channels) -> the same shape."""
        return tokens + self.gate(to_tokens(self.residual(to_volume(earlier))), tokens)


@dataclass
class Encoded:
    """What the encoder made of a pair, both images stacked along the batch (2B)."""

    full: torch.Tensor | None  # volume at 1
    half: torch.Tensor  # volume at 1/2
    tokens: list[torch.Tensor] = field(default_factory=list)  # at 1/4, 1/8, ...
    finer: list[torch.Tensor | None] = field(default_factory=list)  # for each, the finer level pooled to its grid


class Encoder(nn.Module):
    """Convolutions at 1 and 1/2, then patches of 4x4x4 voxels and levels of cross attention.

    Parameters
    ----------
    plan
        Its sizes.
    receives
        It has the cascade attention for what an earlier stage decoded.
    """

    def __init__(self, plan: StagePlan, receives: bool) -> None:
        super().__init__()
        full, half = plan.detail_channels
        self.caml = plan.caml
        self.detail_full = ConvolutionBlock(1, full) if plan.field_downsampling == 1 else None
        self.detail_half = ConvolutionBlock(1 if self.detail_full is None else full, half, stride=2)
        self.merging = nn.ModuleList(
            PatchMerging(finer, width) for finer, width in zip([half, *plan.channels], plan.channels, strict=False)
        )
        self.levels = nn.ModuleList(plan.level(index) for index in range(len(plan.channels)))
        self.cascade = nn.ModuleList(CascadeAttention(width) for width in plan.channels[:-1]) if receives else None

    def forward(self, images: torch.Tensor, earlier: Sequence[torch.Tensor] | None) -> Encoded:
        """Encode images (2B, 1, D, H, W), beside the tokens that the stage before decoded, if there is one."""
        full = None if self.detail_full is None else self.detail_full(images)
        volume = self.detail_half(images if full is None else full)
        encoded = Encoded(full, volume)
        for index, (merging, level) in enumerate(zip(self.merging, self.levels, strict=True)):
            finer = to_tokens(F.max_pool3d(volume, 2, ceil_mode=True)) if self.caml else None
            tokens = merging(volume)
            if earlier is not None and self.cascade is not None and index < len(self.cascade):
                tokens = self.cascade[index](tokens, earlier[index])
            tokens = level(tokens, finer)
            encoded.tokens.append(tokens)
            encoded.finer.append(finer)
            volume = to_volume(tokens)
        return encoded


class Decoder(nn.Module):
    """Back up the levels of cross attention, then the details of both images side by side, and the displacement."""

    def __init__(self, plan: StagePlan) -> None:
        super().__init__()
        full, half = plan.detail_channels
        widths = plan.channels[:-1]
        self.expanding = nn.ModuleList(
            PatchExpanding(coarse, width) for coarse, width in zip(plan.channels[1:], widths, strict=True)
        )
        self.skips = nn.ModuleList(plan.skip(width) for width in widths)
        self.joining = nn.ModuleList(nn.Linear(2 * width, width) for width in widths)
        self.levels = nn.ModuleList(plan.level(index) for index in range(len(widths)))
        self.half_skip = plan.skip(half)
        self.to_half = UpsamplingBlock(2 * plan.channels[0], 2 * half, 2 * half)
        if plan.field_downsampling == 1:
            self.full_skip = plan.skip(full)
            self.to_full = UpsamplingBlock(2 * half, 2 * full, 2 * full)
        self.head = DisplacementHead(2 * (full if plan.field_downsampling == 1 else half))

    def forward(self, encoded: Encoded) -> tuple[torch.Tensor, list[torch.Tensor]]:
        """Return the displacement (B, 3, ...), in voxels of its own grid, and the decoded tokens from 1/4 on."""
        tokens = encoded.tokens[-1]
        decoded: list[torch.Tensor] = []
        for index in reversed(range(len(self.levels))):
            skipped = to_tokens(self.skips[index](to_volume(encoded.tokens[index])))
            tokens = self.expanding[index](tokens, skipped.shape[1:4])
            tokens = self.joining[index](torch.cat([tokens, skipped], dim=-1))
            tokens = self.levels[index](tokens, encoded.finer[index])
            decoded.insert(0, tokens)
        volume = self.to_half(_side_by_side(to_volume(tokens)), _side_by_side(self.half_skip(encoded.half)))
        if encoded.full is not None:
            volume = self.to_full(volume, _side_by_side(self.full_skip(encoded.full)))
        return self.head(volume), decoded


class Stage(nn.Module):
    """One encoder and one decoder: by itself a complete registration network."""

    def __init__(self, plan: StagePlan, receives: bool) -> None:
        super().__init__()
        self.encoder = Encoder(plan, receives)
        self.decoder = Decoder(plan)

    def forward(
        self, moving: torch.Tensor, fixed: torch.Tensor, earlier: Sequence[torch.Tensor] | None = None
    ) -> tuple[torch.Tensor, list[torch.Tensor]]:
        """Return the displacement of two images (B, 1, D, H, W) on the grid of the decoder, and the decoded tokens."""
        return self.decoder(self.encoder(torch.cat([moving, fixed]), earlier))


class CAML(nn.Module):
    """The proposed network, with each of its three parts as a switch.

    Parameters
    ----------
    shape
        Grid (D, H, W) it is meant for; any other works too.
    caml
        Cross attention over multi-layers: each image also looks at the finer level of the other. Off: only at the
        same level.
    rbsc
        Residual blocks in the skip connections. Off: plain skips.
    carsc
        Cascade with attention and residual skips: two stages. Off: one.
    detail_channels
        Channels of the convolutions at 1 and 1/2, for each image.
    channels, depths, heads
        Of the attention levels at 1/4, 1/8, ...: channels, cross attention blocks, and heads, which divide the
        channels. The decoder mirrors the levels above the coarsest.
    window, search_factor
        Base window in tokens, and how many times as large the search window is on each axis.
    mask_padding
        Keys beyond the border get no weight.
    mlp_ratio
        Width of the perceptrons' hidden layers, in channels.
    drop_path
        Largest rate of stochastic depth; it rises linearly from 0 over the blocks.
    share_stages
        One set of weights for both stages.
    field_downsampling
        1: the field is computed at full resolution. 2: at half, without any convolution at full resolution, and
        resized: several times faster, and smoother.
    checkpointing
        In training, keep the tokens between blocks only: less memory, about a third more time.

    Raises
    ------
    InputError
        The hyperparameters make no network.
    """

    TITLE = "CAML+RBSC+CARSC (proposed)"
    SHORT_TITLE = "Proposed"
    PAPER = "the proposed network, docs/method.md"
    COLOUR, MARKER = "#d55e00", "o"

    def __init__(
        self,
        shape: tuple[int, int, int],
        *,
        caml: bool = True,
        rbsc: bool = True,
        carsc: bool = True,
        detail_channels: Sequence[int] = (8, 24),
        channels: Sequence[int] = (48, 96, 192, 384),
        depths: Sequence[int] = (2, 2, 6, 2),
        heads: Sequence[int] = (3, 6, 12, 24),
        window: Sequence[int] = (2, 2, 2),
        search_factor: Sequence[int] = (3, 3, 3),
        mask_padding: bool = True,
        mlp_ratio: float = 4.0,
        drop_path: float = 0.2,
        share_stages: bool = False,
        field_downsampling: int = 1,
        checkpointing: bool = False,
    ) -> None:
        super().__init__()
        settings = BlockSettings(window, search_factor, mask_padding, mlp_ratio, checkpointing)
        plan = StagePlan(detail_channels, channels, depths, heads, drop_path, caml, rbsc, field_downsampling, settings)
        _check(plan)
        self.first = Stage(plan, receives=carsc and share_stages)
        self.second = Stage(plan, receives=True) if carsc and not share_stages else None
        self.cascades = carsc

    def forward(self, moving: torch.Tensor, fixed: torch.Tensor) -> torch.Tensor:
        """Return the displacement (B, 3, D, H, W), float32, in voxels, of two images (B, 1, D, H, W).

        The second stage sees the moving image as the first one warps it. Its field is composed with the first,
        u(x) = u2(x) + u1(x + u2(x)), so that the moving image itself is resampled once.
        """
        require_pair(moving, fixed)
        shape = (moving.shape[2], moving.shape[3], moving.shape[4])
        displacement, decoded = self.first(moving, fixed)
        if self.cascades:
            first = resize_displacement(displacement, shape)
            stage = self.first if self.second is None else self.second
            second, _ = stage(warp(moving, first), fixed, _carried(decoded, first))
            displacement = compose(displacement, second)
        return resize_displacement(displacement, shape)


def _carried(decoded: Sequence[torch.Tensor], displacement: torch.Tensor) -> list[torch.Tensor]:
    """Warp the moving images' share of decoded tokens as the moving images are warped for the next stage."""
    carried = []
    for index, tokens in enumerate(decoded):
        moving, fixed = to_volume(tokens).chunk(2)
        warped = warp(moving, _coarsened(displacement, PATCH * 2**index))
        carried.append(to_tokens(torch.cat([warped.to(fixed.dtype), fixed])))
    return carried


def _coarsened(displacement: torch.Tensor, edge: int) -> torch.Tensor:
    """Return the mean displacement of each token of ``edge`` voxels cubed, in tokens."""
    missing = [-n % edge for n in displacement.shape[2:]]
    if any(missing):
        displacement = F.pad(displacement, [0, missing[2], 0, missing[1], 0, missing[0]], mode="replicate")
    for axis in (2, 4, 6):
        displacement = displacement.unflatten(axis, (-1, edge))
    return displacement.mean(dim=(3, 5, 7)) / edge


def _side_by_side(pair: torch.Tensor) -> torch.Tensor:
    """Turn stacked volumes (2B, C, D, H, W) into pairs (B, 2C, D, H, W), channels last in memory."""
    return to_volume(to_tokens(pair).unflatten(0, (2, -1)).movedim(0, -2).flatten(-2))


def _check(plan: StagePlan) -> None:
    require_levels(channels=plan.channels, depths=plan.depths, heads=plan.heads)
    require_levels(detail_channels=plan.detail_channels)
    if len(plan.detail_channels) != 2:
        raise InputError("detail_channels", found=str(list(plan.detail_channels)), expected="two: at 1 and at 1/2")
    if plan.field_downsampling not in (1, 2):
        raise InputError("field_downsampling", found=str(plan.field_downsampling), expected="1 or 2")
    require_drop_path(plan.drop_path)
