"""Swin transformer in three dimensions (Liu et al. 2021): attention in windows that every second block shifts.

Written down naively, shifted windows need a mask each, together as large as all the scores. But windows differ only in
where the cut of the shift and the padding run through them. Here windows alike are brought together, one mask serves
them all, and goes to ``scaled_dot_product_attention`` together with the relative position bias. Where the grid is
smaller than a window, so is the window. The result is the same.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from functools import lru_cache
from typing import Any

import torch
import torch.nn.functional as F
from torch import nn
from torch.autograd.function import once_differentiable

from dmir.errors import InputError
from dmir.networks.attention import merge_windows, never, window_division
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

PATCH = 4  # voxels on the edge of a token of the first stage
CORNERS = ((0, 0, 0), (1, 0, 0), (0, 1, 0), (0, 0, 1), (1, 1, 0), (0, 1, 1), (1, 0, 1), (1, 1, 1))  # as published
SCORES_AT_A_TIME = 2**20  # in the gradient of attention on CPUs (4 MB in float32: about what caches hold)


@dataclass(frozen=True)
class SwinSettings:
    """What all blocks of a Swin transformer have in common.

    Parameters
    ----------
    window
        (d, h, w) in tokens; every second block shifts its windows by half of that.
    mlp_ratio
        Width of the perceptron's hidden layer, in channels.
    query_bias, key_value_bias
        Whether the projections to queries, and to keys and values, have a bias.
    mask_padding
        Keys beyond the border of the grid get no weight. False: they are what the projections make of zeros, and
        draw weight, as in the published code.
    checkpointing
        Keep only the tokens between blocks in training, and compute the rest again for the gradient.
    """

    window: Sequence[int]
    mlp_ratio: float = 4.0
    query_bias: bool = False
    key_value_bias: bool = False
    mask_padding: bool = True
    checkpointing: bool = False


@dataclass(frozen=True)
class WindowLayout:
    """How a grid is cut into windows, and which windows are alike.

    Parameters
    ----------
    window
        The window, no larger than it need be.
    padded
        The grid, padded to a multiple of the window.
    roll
        How far the grid is rolled on each axis before it is cut.
    order, inverse
        Permutations of the windows: alike ones together, and back. None where all are alike.
    counts
        How many windows there are of each kind.
    masks
        What is added to the scores, (N, N) for each kind; None where nothing is.
    """

    window: tuple[int, ...]
    padded: tuple[int, ...]
    roll: tuple[int, ...]
    order: torch.Tensor | None
    inverse: torch.Tensor | None
    counts: list[int]
    masks: list[torch.Tensor | None]


@lru_cache(maxsize=64)
def window_layout(
    shape: tuple[int, ...],
    window: tuple[int, ...],
    shift: tuple[int, ...],
    mask_padding: bool,
    device: torch.device,
    dtype: torch.dtype,
) -> WindowLayout:
    """Lay windows over a grid, shifted or not.

    A query sees the keys of its window that are of its own region. There are three on each axis: what the roll brought
    round the border, what it did not, and, if it is masked, the padding. Along an axis of a single window the shift, as
    in the published code, moves nothing, and still keeps the first tokens apart from the others.

    Parameters
    ----------
    shape
        Grid (D, H, W) in tokens.
    window, shift
        In tokens; no shift is (0, 0, 0).
    mask_padding
        See :class:`SwinSettings`.
    device, dtype
        Of the masks.
    """
    edges = tuple(min(w, n) if mask_padding else w for w, n in zip(window, shape, strict=True))
    counts = [math.ceil(n / edge) for n, edge in zip(shape, edges, strict=True)]
    padded = tuple(count * edge for count, edge in zip(counts, edges, strict=True))
    roll = tuple(s if count > 1 else 0 for s, count in zip(shift, counts, strict=True))
    with torch.inference_mode(False):  # what is made within it cannot be kept for a gradient later
        kinds, of_window = [], torch.zeros(1, dtype=torch.long)
        for axis in range(3):
            position = torch.arange(padded[axis]).roll(-roll[axis])
            region = (position < shift[axis]).long()
            if mask_padding:
                region[position >= shape[axis]] = 2
            kind, index = torch.unique(region.view(counts[axis], edges[axis]), dim=0, return_inverse=True)
            kinds.append(kind)
            of_window = (of_window[:, None] * len(kind) + index).flatten()
        present, of_window, frequency = torch.unique(of_window, return_inverse=True, return_counts=True)
        masks = [_region_mask(kinds, int(number), dtype, device) for number in present]
        order = torch.argsort(of_window, stable=True)
        alike = len(present) == 1
        return WindowLayout(
            edges,
            padded,
            roll,
            None if alike else order.to(device),
            None if alike else torch.argsort(order).to(device),
            frequency.tolist(),
            masks,
        )


def _region_mask(
    kinds: Sequence[torch.Tensor], number: int, dtype: torch.dtype, device: torch.device
) -> torch.Tensor | None:
    """Return what keeps the regions of one kind of window apart, (N, N), if there are several."""
    region = torch.zeros(1, dtype=torch.long)
    sizes = [len(kind) for kind in kinds]
    indices = (number // (sizes[1] * sizes[2]), number // sizes[2] % sizes[1], number % sizes[2])
    for kind, index in zip(kinds, indices, strict=True):
        region = (region[:, None] * 3 + kind[index]).flatten()
    apart = region[:, None] != region
    return (apart.to(dtype) * never(dtype)).to(device) if apart.any() else None


def relative_position_index(window: Sequence[int]) -> torch.Tensor:
    """Return, for each query and key of a window, the row of the bias table that belongs to their offset: (N, N).

    The offset query - key runs from 1 - n to n - 1 on each axis; rows are in raster order of the offset.
    """
    index = torch.zeros(1, 1, dtype=torch.long)
    for edge in window:
        position = torch.arange(edge)
        offset = position[:, None] - position + edge - 1
        index = index[:, None, :, None] * (2 * edge - 1) + offset[None, :, None, :]
        index = index.flatten(2, 3).flatten(0, 1)
    return index


class WindowAttention(nn.Module):
    """Multi-head attention in windows, with a bias for each relative position: W-MSA and SW-MSA (equation 4).

    softmax(Q K^T / sqrt(d) + B) V in each window and head, then a linear projection. Keys and values can come from
    another image than the queries: cross attention.

    Parameters
    ----------
    channels, heads
        ``heads`` divides ``channels``; d = channels / heads.
    settings
        See :class:`SwinSettings`.
    shifted
        The windows are shifted by half a window on each axis.

    Raises
    ------
    InputError
        The heads do not divide the channels, or the window is none.
    """

    def __init__(self, channels: int, heads: int, settings: SwinSettings, shifted: bool) -> None:
        super().__init__()
        if heads < 1 or channels % heads:
            raise InputError("heads", found=f"{heads} for {channels} channels", expected="a divisor of the channels")
        if len(settings.window) != 3 or any(int(n) != n or n < 1 for n in settings.window):
            raise InputError("window", found=str(list(settings.window)), expected="three positive whole numbers")
        self.heads = heads
        self.window = tuple(int(n) for n in settings.window)
        self.shift = tuple(n // 2 if shifted else 0 for n in self.window)
        self.mask_padding = settings.mask_padding
        self.query = nn.Linear(channels, channels, bias=settings.query_bias)
        self.key_value = nn.Linear(channels, 2 * channels, bias=settings.key_value_bias)
        self.output = nn.Linear(channels, channels)
        self.position_bias = nn.Parameter(torch.empty(math.prod(2 * n - 1 for n in self.window), heads))
        nn.init.trunc_normal_(self.position_bias, std=0.02)

    def forward(self, tokens: torch.Tensor, context: torch.Tensor | None = None) -> torch.Tensor:
        """Let tokens look at their window, or at the same window of a context.

        Parameters
        ----------
        tokens, context
            (B, D, H, W, C); without a context, keys and values come from the tokens themselves.

        Returns
        -------
        torch.Tensor
            (B, D, H, W, C).
        """
        shape = tuple(tokens.shape[1:4])
        dtype = self._score_dtype(tokens)
        layout = window_layout(shape, self.window, self.shift, self.mask_padding, tokens.device, dtype)
        own = self._cut(tokens, layout)
        query = self._split_heads(self.query(own)).to(dtype)
        key_value = self.key_value(own if context is None else self._cut(context, layout))
        key, value = (self._split_heads(x).to(dtype) for x in key_value.chunk(2, dim=-1))
        bias = self._relative_bias(layout.window).to(dtype)
        batch = tokens.shape[0]
        parts = [x.split([count * batch for count in layout.counts]) for x in (query, key, value)]
        answers = [
            attend(q, k, v, bias if mask is None else bias + mask)
            for q, k, v, mask in zip(*parts, layout.masks, strict=True)
        ]
        answer = answers[0] if len(answers) == 1 else torch.cat(answers)
        answer = answer.transpose(1, 2).flatten(2).unflatten(0, (-1, batch))
        return self.output(self._paste(answer, shape, layout))

    @staticmethod
    def _score_dtype(tokens: torch.Tensor) -> torch.dtype:
        if torch.is_autocast_enabled(tokens.device.type) and tokens.device.type != "cpu":
            return torch.get_autocast_dtype(tokens.device.type)
        # on CPUs attention in bfloat16 is slow: its gradient takes five times as long
        return torch.promote_types(tokens.dtype, torch.float32) if tokens.device.type == "cpu" else tokens.dtype

    def _relative_bias(self, window: tuple[int, ...]) -> torch.Tensor:
        """Return the bias of each query and key of a window that may be smaller than the table's: (heads, N, N)."""
        index = _row_of_offset(window, self.window, self.position_bias.device)
        return F.embedding(index, self.position_bias).permute(2, 0, 1)

    @staticmethod
    def _cut(tokens: torch.Tensor, layout: WindowLayout) -> torch.Tensor:
        """(B, D, H, W, C) -> (windows, B, N, C), windows alike together."""
        missing = [p - n for p, n in zip(layout.padded, tokens.shape[1:4], strict=True)]
        if any(missing):
            tokens = F.pad(tokens, [0, 0, 0, missing[2], 0, missing[1], 0, missing[0]])
        if any(layout.roll):
            tokens = tokens.roll([-n for n in layout.roll], dims=(1, 2, 3))
        windows = window_division(tokens, layout.window)
        return windows if layout.order is None else windows[layout.order]

    @staticmethod
    def _paste(windows: torch.Tensor, shape: Sequence[int], layout: WindowLayout) -> torch.Tensor:
        """Undo :meth:`_cut`."""
        if layout.inverse is not None:
            windows = windows[layout.inverse]
        tokens = merge_windows(windows, layout.window, layout.padded)
        if any(layout.roll):
            tokens = tokens.roll(layout.roll, dims=(1, 2, 3))
        return tokens[:, : shape[0], : shape[1], : shape[2]]

    def _split_heads(self, windows: torch.Tensor) -> torch.Tensor:
        """(windows, B, N, C) -> (windows B, heads, N, d)."""
        return windows.flatten(0, 1).unflatten(2, (self.heads, -1)).transpose(1, 2)


@lru_cache(maxsize=64)
def _row_of_offset(window: tuple[int, ...], largest: tuple[int, ...], device: torch.device) -> torch.Tensor:
    """Return :func:`relative_position_index` of a window, as rows of the table of one that is at least as large."""
    with torch.inference_mode(False):
        index = relative_position_index(largest).view(*largest, *largest)
        d, h, w = window
        return index[:d, :h, :w, :d, :h, :w].reshape(d * h * w, -1).to(device)


def attend(query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, bias: torch.Tensor) -> torch.Tensor:
    """softmax(Q K^T / sqrt(d) + bias) V.

    Parameters
    ----------
    query, key, value
        (windows, heads, N, d).
    bias
        (heads, N, N).

    Returns
    -------
    torch.Tensor
        (windows, heads, N, d).
    """
    with torch.autocast(query.device.type, enabled=False):  # it would undo the promotion to float32 on CPUs
        if query.device.type == "cpu" and bias.requires_grad and torch.is_grad_enabled():
            return _BiasedAttention.apply(query, key, value, bias)
        return F.scaled_dot_product_attention(query, key, value, attn_mask=bias[None])


class _BiasedAttention(torch.autograd.Function):
    """Attention whose bias has a gradient.

    torch's fast attention on CPUs gives none, and what it falls back to keeps all scores. Here they are computed again
    for the gradient, so many windows at a time as stay in the cache.
    """

    @staticmethod
    def forward(
        ctx: Any, query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, bias: torch.Tensor
    ) -> torch.Tensor:
        # detached: whether the bias has a gradient decides, even here, how attention is computed
        answer = F.scaled_dot_product_attention(query, key, value, attn_mask=bias.detach()[None])
        ctx.save_for_backward(query, key, value, bias, answer)
        return answer

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, gradient: torch.Tensor) -> tuple[torch.Tensor, ...]:
        query, key, value, bias, answer = ctx.saved_tensors
        scale = 1.0 / math.sqrt(query.shape[-1])
        step = max(1, SCORES_AT_A_TIME // bias.numel())
        of_bias = torch.zeros_like(bias)
        parts = []
        for q, k, v, a, g in zip(*(x.split(step) for x in (query, key, value, answer, gradient)), strict=True):
            q = q * scale
            weight = torch.add(q @ k.mT, bias).softmax(dim=-1)
            of_value = weight.mT @ g
            of_score = (g @ v.mT).sub_((g * a).sum(dim=-1, keepdim=True)).mul_(weight)
            of_bias += of_score.sum(dim=0)
            parts.append(((of_score @ k).mul_(scale), of_score.mT @ q, of_value))
        return *(torch.cat(x) for x in zip(*parts, strict=True)), of_bias


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
