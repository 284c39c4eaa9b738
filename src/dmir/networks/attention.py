"""Windowed cross attention: window division, window area division, and multi-head attention between the two.

Each small *base* window of one image looks at the larger *search* window round it in the other image (XMorpher, Shi et
al. 2022). Written down naively this copies each key 27 times, projects every copy and stores every score. Here

- keys and values are projected once, on the dense grid, before any window is cut;
- several base windows are worked on together, as one *tile*: the search windows of neighbours overlap, so a tile of
  2x2x2 windows of 2x2x2 tokens copies each key 8 times and not 27. A mask keeps each query to its own search window;
- scores never exist as a whole: ``scaled_dot_product_attention`` makes and forgets them, slab by slab of tiles.

At 40x48x56 tokens of 48 channels this takes about a quarter of the time and of the memory; the result is the same.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import nn
from torch.autograd.function import once_differentiable
from torch.utils.checkpoint import checkpoint

from dmir.errors import InputError

TILE_EDGE = 4  # tokens: 64 queries a tile fill the matrix units, more would waste products on masked keys
MISSING_NEIGHBOUR = (2, 0, 2)  # of 3x3x3 windows: in raster order the 20th from 0, which XMorpher's code never fills
SLAB_ELEMENTS = 2**24  # numbers copied for keys and values at a time (64 MB in float32)


def window_division(tokens: torch.Tensor, size: Sequence[int]) -> torch.Tensor:
    """WD: cut tokens into windows that touch.

    Parameters
    ----------
    tokens
        (B, D, H, W, C); ``size`` divides D, H and W.
    size
        Window (d, h, w) in tokens.

    Returns
    -------
    torch.Tensor
        (windows, B, d * h * w, C), the windows in raster order.
    """
    return window_area_division(tokens, size, (0, 0, 0))


def window_area_division(tokens: torch.Tensor, size: Sequence[int], margin: Sequence[int]) -> torch.Tensor:
    """WAD: cut tokens into areas that overlap, each a window and a margin round it.

    Parameters
    ----------
    tokens
        (B, D, H, W, C), already padded by ``margin`` on both sides of each axis.
    size, margin
        Window (d, h, w), and what is added on each of its sides, in tokens.

    Returns
    -------
    torch.Tensor
        (windows, B, (d + 2 margin) * ..., C), the windows in raster order.
    """
    return _OverlappingAreas.apply(tokens, tuple(size), tuple(n + 2 * m for n, m in zip(size, margin, strict=True)))


def merge_windows(windows: torch.Tensor, size: Sequence[int], shape: Sequence[int]) -> torch.Tensor:
    """Undo :func:`window_division`: (windows, B, d * h * w, C) -> (B, *shape, C)."""
    batch, _, channels = windows.shape[1:]
    count = [n // edge for n, edge in zip(shape, size, strict=True)]
    tokens = windows.reshape(*count, batch, *size, channels).permute(3, 0, 4, 1, 5, 2, 6, 7)
    return tokens.reshape(batch, *shape, channels)


def slabs(tokens: torch.Tensor, step: int, overlap: int = 0) -> tuple[torch.Tensor, ...]:
    """Cut tokens along the first axis into views of ``step`` that reach ``overlap`` into the next."""
    return _OverlappingSlabs.apply(tokens, step, overlap)


class _OverlappingSlabs(torch.autograd.Function):
    """Slicing, but its gradient is not a tensor of zeros as large as the whole for each slice."""

    @staticmethod
    def forward(ctx: Any, tokens: torch.Tensor, step: int, overlap: int) -> tuple[torch.Tensor, ...]:
        ctx.shape, ctx.step = tokens.shape, step
        end = tokens.shape[1] - overlap
        return tuple(tokens.narrow(1, start, min(step, end - start) + overlap) for start in range(0, end, step))

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, *gradients: torch.Tensor) -> tuple[torch.Tensor, None, None]:
        if len(gradients) == 1:
            return gradients[0], None, None
        whole = gradients[0].new_zeros(ctx.shape)
        for index, gradient in enumerate(gradients):
            whole.narrow(1, index * ctx.step, gradient.shape[1]).add_(gradient)
        return whole, None, None


class _OverlappingAreas(torch.autograd.Function):
    """``Tensor.unfold`` along three axes and one copy: (B, D, H, W, C) -> (areas, B, d * h * w, C).

    The gradient of ``unfold`` itself sums overlaps number by number; whole runs of tokens are added here.
    """

    @staticmethod
    def forward(ctx: Any, tokens: torch.Tensor, size: tuple[int, ...], extent: tuple[int, ...]) -> torch.Tensor:
        areas = tokens
        for axis in range(3):
            areas = areas.unfold(axis + 1, extent[axis], size[axis])
        areas = areas.permute(1, 2, 3, 0, 5, 6, 7, 4)  # (nD, nH, nW, B, d, h, w, C)
        ctx.shape, ctx.size = areas.shape, size
        return areas.flatten(4, 6).flatten(0, 2)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, gradient: torch.Tensor) -> tuple[torch.Tensor, None, None]:
        gradient = gradient.reshape(ctx.shape).permute(0, 1, 3, 4, 5, 2, 6, 7)  # (nD, nH, B, d, h, nW, w, C)
        gradient = _add_overlaps(gradient, 5, ctx.size[2]).permute(0, 2, 3, 1, 4, 5, 6)  # (nD, B, d, nH, h, W, C)
        gradient = _add_overlaps(gradient, 3, ctx.size[1]).permute(1, 0, 2, 3, 4, 5)  # (B, nD, d, H, W, C)
        return _add_overlaps(gradient, 1, ctx.size[0]), None, None


def _add_overlaps(parts: torch.Tensor, axis: int, step: int) -> torch.Tensor:
    """Lay parts (..., n, k, ...) out ``step`` apart and add where they overlap: (..., (n - 1) step + k, ...)."""
    count, length = parts.shape[axis], parts.shape[axis + 1]
    line = parts.new_zeros(*parts.shape[:axis], count + -(-length // step) - 1, step, *parts.shape[axis + 2 :])
    for start in range(0, length, step):
        piece = parts.narrow(axis + 1, start, min(step, length - start))
        line.narrow(axis, start // step, count).narrow(axis + 1, 0, piece.shape[axis + 1]).add_(piece)
    return line.flatten(axis, axis + 1).narrow(axis, 0, (count - 1) * step + length)


def search_margin(window: Sequence[int], search_factor: Sequence[int]) -> tuple[int, ...]:
    """Return how many tokens a search window reaches beyond its base window on each side of each axis."""
    for name, values in (("window", window), ("search_factor", search_factor)):
        if len(values) != 3 or any(int(n) != n or n < 1 for n in values):
            raise InputError(name, found=str(list(values)), expected="three positive whole numbers")
    margin = []
    for edge, factor in zip(window, search_factor, strict=True):
        if edge * (factor - 1) % 2:
            raise InputError(
                "search_factor",
                found=f"{factor} for a window of {edge} tokens",
                expected="a search window that is centred on its base window",
                remedy="Take an odd factor, or an even window.",
            )
        margin.append(edge * (factor - 1) // 2)
    return tuple(margin)


class WindowMultiheadCrossAttention(nn.Module):
    """W-MCA: queries from base windows of one image, keys and values from search windows of another.

    softmax(Q K^T / sqrt(d)) V in each window and head, then a linear projection.

    Parameters
    ----------
    channels, heads
        ``heads`` divides ``channels``; d = channels / heads.
    window
        Base window in tokens.
    search_factor
        (alpha, beta, gamma): a search window is so many times as large as its base window on each axis, and centred
        on it.
    mask_padding
        Keys beyond the border of the grid get no weight. False: they are what the projections make of zeros, and
        draw weight, as in the published code of XMorpher.
    key_bias
        The projection of the keys has a bias. A bias adds the same to all scores of a query, which softmax forgets,
        if it is not all that padding is: by default there is one only where padding is not masked.
    missing_neighbour
        Of the 27 base windows of a search window, the one that :data:`MISSING_NEIGHBOUR` names is not seen, and zeros
        are in its place: a slip of XMorpher's published code. As other zeros they draw weight unless padding is
        masked. Needs search windows three times as large as base windows on each axis.

    Raises
    ------
    InputError
        The heads do not divide the channels, or the search window cannot be centred.
    """

    def __init__(
        self,
        channels: int,
        heads: int,
        window: Sequence[int] = (2, 2, 2),
        search_factor: Sequence[int] = (3, 3, 3),
        mask_padding: bool = True,
        key_bias: bool | None = None,
        missing_neighbour: bool = False,
    ) -> None:
        super().__init__()
        if heads < 1 or channels % heads:
            raise InputError("heads", found=f"{heads} for {channels} channels", expected="a divisor of the channels")
        if missing_neighbour and tuple(search_factor) != (3, 3, 3):
            raise InputError(
                "missing_neighbour",
                found=f"search_factor {list(search_factor)}",
                expected="[3, 3, 3], the 27 neighbours that it counts",
            )
        self.heads = heads
        self.margin = search_margin(window, search_factor)
        self.window = tuple(window)
        self.mask_padding = mask_padding
        self.missing_neighbour = missing_neighbour
        self.query = nn.Linear(channels, channels)
        self.key = nn.Linear(channels, channels, bias=not mask_padding if key_bias is None else key_bias)
        self.value = nn.Linear(channels, channels)
        self.output = nn.Linear(channels, channels)

    def forward(self, tokens: torch.Tensor, *contexts: torch.Tensor) -> list[torch.Tensor]:
        """Let the tokens of one image look at one or several others, with the same weights.

        Parameters
        ----------
        tokens
            (B, D, H, W, C), whence the queries.
        contexts
            Each (B, D, H, W, C), whence the keys and values.

        Returns
        -------
        list of torch.Tensor
            One (B, D, H, W, C) a context.
        """
        shape = tokens.shape[1:4]
        tile = self._tile(shape)
        query = self._pad_to_tiles(self.query(tokens), tile).repeat(len(contexts), 1, 1, 1, 1)
        context = torch.cat(contexts)
        key = self._project_with_margin(self.key, context, tile)
        value = self._project_with_margin(self.value, context, tile)
        query, key, value = self._split_heads(query), self._split_heads(key), self._split_heads(value)
        answers = self._join_heads(self._attend(query, key, value, shape, tile))
        return list(self.output(answers).chunk(len(contexts)))

    def _attend(
        self, query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, shape: torch.Size, tile: list[int]
    ) -> torch.Tensor:
        """Attention of (B heads, D, H, W, d), padded, -> (B heads, *shape, d)."""
        if query.device.type == "cpu":  # where attention in bfloat16 is slow: its gradient takes five times as long
            query, key, value = (x.to(torch.promote_types(x.dtype, torch.float32)) for x in (query, key, value))
        step, overlap = self._layers_a_slab(query, tile) * tile[0], 2 * self.margin[0]
        parts = list(
            zip(
                slabs(query, step),
                slabs(key, step, overlap),
                slabs(value, step, overlap),
                slabs(self._beyond_border(query, shape), step, overlap),
                strict=True,
            )
        )
        if len(parts) == 1 or not torch.is_grad_enabled():
            answers = [self._attend_slab(*part, tile) for part in parts]
        else:  # cutting windows is cheap and copies much: rather than kept for the gradient, it is done a second time
            answers = [
                checkpoint(self._attend_slab, *part, tile, use_reentrant=False, preserve_rng_state=False)
                for part in parts
            ]
        return torch.cat(answers, dim=1)[:, : shape[0], : shape[1], : shape[2]]

    def _attend_slab(
        self, query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, beyond: torch.Tensor, tile: list[int]
    ) -> torch.Tensor:
        # Images and heads stand in one place, so that a mask a tile, (tiles, 1, queries, keys), serves them all.
        mask = self._outside_search_window(tile, query) + window_area_division(beyond, tile, self.margin).mT
        key, value = window_area_division(key, tile, self.margin), window_area_division(value, tile, self.margin)
        if self.missing_neighbour and not self.mask_padding:
            key, value, mask = self._with_zeros(key, value, mask)
        with torch.autocast(query.device.type, enabled=False):  # it would undo the promotion to float32 on CPUs
            answer = F.scaled_dot_product_attention(window_division(query, tile), key, value, attn_mask=mask)
        return merge_windows(answer, tile, query.shape[1:4])

    def _with_zeros(
        self, key: torch.Tensor, value: torch.Tensor, mask: torch.Tensor
    ) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
        """Append what a window of zeros is after projection: one key, the bias, that counts as often as it has tokens.

        n times the weight exp(score) is exp(score + log n).
        """
        extended = []
        for areas, projection in ((key, self.key), (value, self.value)):
            zeros = areas.new_zeros(self.heads, areas.shape[3])
            if projection.bias is not None:
                zeros = zeros + projection.bias.to(areas.dtype).view_as(zeros)
            zeros = zeros.repeat(areas.shape[1] // self.heads, 1)[None, :, None]
            extended.append(torch.cat([areas, zeros.expand(areas.shape[0], -1, -1, -1)], dim=2))
        return extended[0], extended[1], F.pad(mask, [0, 1], value=math.log(math.prod(self.window)))

    def _beyond_border(self, query: torch.Tensor, shape: torch.Size) -> torch.Tensor:
        """Return what to add to the scores of each key, padded as keys are: (1, D, H, W, 1)."""
        outside = never(query.dtype) if self.mask_padding else 0.0
        beyond = query.new_full((1, *query.shape[1:4], 1), outside)
        beyond[:, : shape[0], : shape[1], : shape[2]] = 0.0
        return F.pad(beyond, _spatial_padding(self.margin, self.margin), value=outside)

    def _outside_search_window(self, tile: list[int], query: torch.Tensor) -> torch.Tensor:
        """Return what to add to the score of a query and a key of one tile's area: (queries, keys)."""
        # made on the device: a copy from the host would be waited for, a slab at a time
        inside, missing = query.new_ones(1, 1), query.new_full((1, 1), float(self.missing_neighbour))
        for edge, margin, extent, neighbour in zip(self.window, self.margin, tile, MISSING_NEIGHBOUR, strict=True):
            start = torch.arange(extent, device=query.device)[:, None] // edge * edge
            position = torch.arange(extent + 2 * margin, device=query.device)[None]
            reached = (position >= start) & (position < start + edge + 2 * margin)
            inside = torch.kron(inside, reached.to(query.dtype))
            missing = torch.kron(missing, ((position - start) // edge == neighbour).to(query.dtype))
        return (1.0 - inside + missing) * never(query.dtype)

    def _tile(self, shape: Sequence[int]) -> list[int]:
        """Return the edges of a tile: whole windows, about ``TILE_EDGE`` tokens, no more than the grid needs."""
        return [
            edge * min(math.ceil(TILE_EDGE / edge), math.ceil(extent / edge))
            for edge, extent in zip(self.window, shape, strict=True)
        ]

    @staticmethod
    def _pad_to_tiles(tokens: torch.Tensor, tile: list[int]) -> torch.Tensor:
        missing = [-n % t for n, t in zip(tokens.shape[1:4], tile, strict=True)]
        return F.pad(tokens, _spatial_padding((0, 0, 0), missing))

    def _project_with_margin(self, projection: nn.Linear, tokens: torch.Tensor, tile: list[int]) -> torch.Tensor:
        after = [m + -n % t for m, n, t in zip(self.margin, tokens.shape[1:4], tile, strict=True)]
        padding = _spatial_padding(self.margin, after)
        if self.mask_padding:
            return F.pad(projection(tokens), padding)
        projected = F.pad(F.linear(tokens, projection.weight), padding)
        return projected + projection.bias.to(projected.dtype)  # what a projection makes of zeros is its bias

    def _split_heads(self, tokens: torch.Tensor) -> torch.Tensor:
        return tokens.unflatten(4, (self.heads, -1)).permute(0, 4, 1, 2, 3, 5).flatten(0, 1)

    def _join_heads(self, tokens: torch.Tensor) -> torch.Tensor:
        return tokens.unflatten(0, (-1, self.heads)).permute(0, 2, 3, 4, 1, 5).flatten(4, 5)

    def _layers_a_slab(self, query: torch.Tensor, tile: list[int]) -> int:
        windows = (query.shape[2] // tile[1]) * (query.shape[3] // tile[2])
        area = math.prod(t + 2 * m for t, m in zip(tile, self.margin, strict=True))
        return max(1, SLAB_ELEMENTS // (2 * windows * area * query.shape[0] * query.shape[4]))


def never(dtype: torch.dtype) -> float:
    """Return a score that has no weight beside any other.

    Finite, because a row of nothing but -inf, as the padding's own queries may have, gives NaN gradients; a quarter of
    the lowest number, because two are added and kernels multiply scores by log2(e).
    """
    return torch.finfo(dtype).min / 4


def _spatial_padding(before: Sequence[int], after: Sequence[int]) -> list[int]:
    """Return the argument of ``F.pad`` for tokens (B, D, H, W, C)."""
    return [0, 0] + [n for axis in (2, 1, 0) for n in (before[axis], after[axis])]
