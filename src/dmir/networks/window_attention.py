"""Attention in windows, shifted or not, with a bias for each relative position (Liu et al. 2021).

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
from dmir.networks.attention import merge_windows, window_division
from dmir.networks.window_layout import WindowLayout, window_layout

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
