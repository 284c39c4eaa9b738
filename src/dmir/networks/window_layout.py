"""How a grid is cut into windows, shifted or not, and which of the windows are alike."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from functools import lru_cache

import torch

from dmir.networks.attention import never


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
