"""Swin transformer in three dimensions (Liu et al. 2021): attention in windows that every second block shifts."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import nn

from dmir.errors import InputError
from dmir.networks.blocks import (
    MultilayerPerceptron,
    drop_path_rates,
    pad_to_multiple,
    require_drop_path,
    stochastic_depth,
    through_blocks,
    to_tokens,
    to_volume,
)
from dmir.networks.fusion import exchange
from dmir.networks.window_attention import SwinSettings, WindowAttention, relative_position_index

__all__ = [
    "CornerMerging",
    "PatchEmbedding",
    "SwinBlock",
    "SwinEncoder",
    "SwinSettings",
    "SwinStage",
    "WindowAttention",
    "relative_position_index",
]

PATCH = 4  # voxels on the edge of a token of the first stage
CORNERS = ((0, 0, 0), (1, 0, 0), (0, 1, 0), (0, 0, 1), (1, 1, 0), (0, 1, 1), (1, 0, 1), (1, 1, 1))  # as published


class SwinBlock(nn.Module):
    """Windowed attention and a multilayer perceptron, each of normalised tokens and added to them (equation 3).

    Parameters
    ----------
    channels, heads, settings, shifted
        See :class:`WindowAttention`.
    drop_path
        Probability, in training, that an image skips what would be added (stochastic depth, Huang et al. 2016).
    cross
        The tokens are those of pairs, stacked along the batch, moving images first. Each image looks at the other one
        of its pair, both with the same weights and both at what the other was before the block.
    """

    def __init__(
        self,
        channels: int,
        heads: int,
        settings: SwinSettings,
        shifted: bool,
        drop_path: float = 0.0,
        cross: bool = False,
    ) -> None:
        super().__init__()
        self.attention_norm = nn.LayerNorm(channels)
        self.attention = WindowAttention(channels, heads, settings, shifted)
        self.perceptron_norm = nn.LayerNorm(channels)
        self.perceptron = MultilayerPerceptron(channels, settings.mlp_ratio)
        self.drop_path = drop_path
        self.cross = cross

    def forward(self, tokens: torch.Tensor) -> torch.Tensor:
        """Tokens (B, D, H, W, channels) -> the same shape."""
        own = self.attention_norm(tokens)
        tokens = tokens + self._dropped(self.attention(own, exchange(own) if self.cross else None))
        return tokens + self._dropped(self.perceptron(self.perceptron_norm(tokens)))

    def _dropped(self, update: torch.Tensor) -> torch.Tensor:
        if not self.training or self.drop_path == 0.0:
            return update
        return stochastic_depth(update, self.drop_path)


class SwinStage(nn.Module):
    """The blocks of one level, every second one shifted.

    Parameters
    ----------
    channels, heads, settings, cross
        See :class:`SwinBlock`.
    drop_paths
        A rate a block: their number is the level's depth.
    """

    def __init__(
        self, channels: int, heads: int, settings: SwinSettings, drop_paths: Sequence[float], cross: bool = False
    ) -> None:
        super().__init__()
        self.checkpointing = settings.checkpointing
        self.blocks = nn.ModuleList(
            SwinBlock(channels, heads, settings, index % 2 == 1, rate, cross) for index, rate in enumerate(drop_paths)
        )

    def forward(self, tokens: torch.Tensor) -> torch.Tensor:
        """Tokens (B, D, H, W, channels) -> the same shape."""
        return through_blocks(self.blocks, tokens, checkpointing=self.checkpointing)


class PatchEmbedding(nn.Module):
    """Each 4x4x4 voxels become one token, then layer normalisation."""

    def __init__(self, in_channels: int, channels: int) -> None:
        super().__init__()
        self.convolution = nn.Conv3d(in_channels, channels, PATCH, stride=PATCH)
        self.norm = nn.LayerNorm(channels)

    def forward(self, volume: torch.Tensor) -> torch.Tensor:
        """(B, in_channels, D, H, W) -> tokens (B, ceil(D/4), ceil(H/4), ceil(W/4), channels)."""
        return self.norm(to_tokens(self.convolution(pad_to_multiple(volume, PATCH))))


class CornerMerging(nn.Module):
    """Down a level: the 2x2x2 tokens of a cube side by side, layer normalisation, linear layer to twice the channels.

    The tokens stand in the published order, ``CORNERS``.
    """

    def __init__(self, channels: int) -> None:
        super().__init__()
        self.norm = nn.LayerNorm(8 * channels)
        self.reduction = nn.Linear(8 * channels, 2 * channels, bias=False)

    def forward(self, tokens: torch.Tensor) -> torch.Tensor:
        """Tokens (B, D, H, W, channels) -> tokens (B, ceil(D/2), ceil(H/2), ceil(W/2), 2 channels)."""
        tokens = to_tokens(pad_to_multiple(to_volume(tokens), 2))
        corners = [tokens[:, d::2, h::2, w::2] for d, h, w in CORNERS]
        return self.reduction(self.norm(torch.cat(corners, dim=-1)))


class SwinEncoder(nn.Module):
    """Patches of 4x4x4 voxels, then stages at 1/4, 1/8, ..., each of twice the channels of the one before.

    Parameters
    ----------
    in_channels
        Of the volume.
    embedding
        Channels at 1/4.
    depths, heads
        Blocks and heads of each stage.
    drop_path
        Largest rate of stochastic depth; it rises linearly from 0 over all blocks.
    settings
        Of the blocks.

    Raises
    ------
    InputError
        The hyperparameters make no encoder.
    """

    def __init__(
        self,
        in_channels: int,
        embedding: int,
        depths: Sequence[int],
        heads: Sequence[int],
        drop_path: float,
        settings: SwinSettings,
    ) -> None:
        super().__init__()
        _check(embedding, depths, heads, drop_path, settings)
        widths = [embedding * 2**level for level in range(len(depths))]
        self.embedding = PatchEmbedding(in_channels, embedding)
        self.stages = nn.ModuleList(
            SwinStage(width, count, settings, rates)
            for width, count, rates in zip(widths, heads, drop_path_rates(depths, drop_path), strict=True)
        )
        self.merging = nn.ModuleList(CornerMerging(width) for width in widths[:-1])
        self.norms = nn.ModuleList(nn.LayerNorm(width) for width in widths)

    def forward(self, volume: torch.Tensor) -> list[torch.Tensor]:
        """Return the normalised tokens of each level of a volume (B, in_channels, D, H, W).

        What goes on to the next level is not normalised.
        """
        tokens = self.embedding(volume)
        normalised = []
        for level, (stage, norm) in enumerate(zip(self.stages, self.norms, strict=True)):
            tokens = stage(tokens)
            normalised.append(norm(tokens))
            if level < len(self.merging):
                tokens = self.merging[level](tokens)
        return normalised


def _check(
    embedding: int, depths: Sequence[int], heads: Sequence[int], drop_path: float, settings: SwinSettings
) -> None:
    if not depths or len(depths) != len(heads) or min(*depths, *heads) < 1:
        raise InputError(
            "depths, heads", found=f"{list(depths)}, {list(heads)}", expected="one positive number a level in each"
        )
    if embedding < 2 or embedding % 2:
        raise InputError("embedding", found=str(embedding), expected="a positive even number of channels")
    require_drop_path(drop_path)
    if settings.mlp_ratio <= 0.0:
        raise InputError("mlp_ratio", found=str(settings.mlp_ratio), expected="a positive number")
