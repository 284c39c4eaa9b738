"""Cross attention between a pair of images: the feature fusion module, and the transformer block built on it.

The two images of a pair have the same weights. They are stacked along the batch, moving images first, so that each
layer runs once; what crosses between them is :func:`exchange`.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import nn

from dmir.networks.attention import WindowMultiheadCrossAttention
from dmir.networks.blocks import MultilayerPerceptron, stochastic_depth, through_blocks


@dataclass(frozen=True)
class BlockSettings:
    """What all cross attention blocks of a network have in common.

    Parameters
    ----------
    window, search_factor, mask_padding, key_bias, missing_neighbour
        See :class:`dmir.networks.attention.WindowMultiheadCrossAttention`.
    mlp_ratio
        Width of the perceptron's hidden layer, in channels.
    normalise_context
        Keys and values come of normalised tokens, as queries do. False: of the tokens as they are, as in XMorpher.
    checkpointing
        Keep only the tokens between blocks in training, and compute the rest again for the gradient.
    """

    window: Sequence[int] = (2, 2, 2)
    search_factor: Sequence[int] = (3, 3, 3)
    mask_padding: bool = True
    mlp_ratio: float = 4.0
    checkpointing: bool = False
    key_bias: bool | None = None
    missing_neighbour: bool = False
    normalise_context: bool = True


def exchange(pair: torch.Tensor) -> torch.Tensor:
    """Swap the halves of a batch (2B, ...): what belongs to the moving images and what belongs to the fixed ones."""
    return pair.roll(pair.shape[0] // 2, dims=0)


class FeatureFusionModule(nn.Module):
    """Cross attention between the images at one level, and across levels, with one set of weights.

    Four computations: moving <- fixed and fixed <- moving at the level itself, and each <- the other's finer level.
    The two answers that an image gets are fused by a linear layer.

    Parameters
    ----------
    channels, heads
        Of the level.
    finer_channels
        Of the finer level; None leaves the two computations at the level itself.
    settings
        Of the attention.
    """

    def __init__(self, channels: int, heads: int, finer_channels: int | None, settings: BlockSettings) -> None:
        super().__init__()
        self.norm = nn.LayerNorm(channels)
        self.attention = WindowMultiheadCrossAttention(
            channels,
            heads,
            settings.window,
            settings.search_factor,
            settings.mask_padding,
            settings.key_bias,
            settings.missing_neighbour,
        )
        self.normalise_context = settings.normalise_context
        if finer_channels is not None:
            self.projection = nn.Sequential(nn.LayerNorm(finer_channels), nn.Linear(finer_channels, channels))
            self.fusion = nn.Linear(2 * channels, channels)

    def forward(self, tokens: torch.Tensor, finer: torch.Tensor | None = None) -> torch.Tensor:
        """Return what is to be added to the tokens.

        Parameters
        ----------
        tokens
            (2B, D, H, W, channels).
        finer
            (2B, D, H, W, finer_channels), the finer level pooled to this grid; None where there is no finer level.
        """
        own = self.norm(tokens)
        other = exchange(own if self.normalise_context else tokens)
        if finer is None:
            return self.attention(own, other)[0]
        answers = self.attention(own, other, exchange(self.projection(finer)))
        return self.fusion(torch.cat(answers, dim=-1))


class CrossAttentionBlock(nn.Module):
    """Cross attention transformer: feature fusion and a multilayer perceptron, each added to the tokens.

    Parameters
    ----------
    channels, heads, finer_channels, settings
        See :class:`FeatureFusionModule`.
    drop_path
        Probability, in training, that a pair of images skips what would be added (stochastic depth, Huang et al.
        2016).
    """

    def __init__(
        self, channels: int, heads: int, finer_channels: int | None, settings: BlockSettings, drop_path: float
    ) -> None:
        super().__init__()
        self.feature_fusion = FeatureFusionModule(channels, heads, finer_channels, settings)
        self.norm = nn.LayerNorm(channels)
        self.perceptron = MultilayerPerceptron(channels, settings.mlp_ratio)
        self.drop_path = drop_path

    def forward(self, tokens: torch.Tensor, finer: torch.Tensor | None = None) -> torch.Tensor:
        """Tokens (2B, D, H, W, channels) -> the same shape."""
        tokens = tokens + self._dropped(self.feature_fusion(tokens, finer))
        return tokens + self._dropped(self.perceptron(self.norm(tokens)))

    def _dropped(self, update: torch.Tensor) -> torch.Tensor:
        if not self.training or self.drop_path == 0.0:
            return update
        return stochastic_depth(update, self.drop_path, together=2)  # both images of a pair, or neither


class AttentionLevel(nn.Module):
    """The cross attention blocks of one level, in the encoder or in the decoder.

    Parameters
    ----------
    channels, heads, finer_channels, settings
        See :class:`FeatureFusionModule`.
    drop_paths
        A rate a block: their number is the level's depth.
    """

    def __init__(
        self,
        channels: int,
        heads: int,
        finer_channels: int | None,
        settings: BlockSettings,
        drop_paths: Sequence[float],
    ) -> None:
        super().__init__()
        self.checkpointing = settings.checkpointing
        self.blocks = nn.ModuleList(
            CrossAttentionBlock(channels, heads, finer_channels, settings, rate) for rate in drop_paths
        )

    def forward(self, tokens: torch.Tensor, finer: torch.Tensor | None = None) -> torch.Tensor:
        """Tokens (2B, D, H, W, channels) -> the same shape."""
        return through_blocks(self.blocks, tokens, finer, checkpointing=self.checkpointing)
