"""Separable filters of volumes (C, D, H, W), some planes at a time: Gaussians and sums over cubes.

On a CPU a filter is a few additions for each voxel, and what takes the time is memory: so a volume is worked through in
slabs of planes that its caches hold, and shifted views are added, which is several times as fast as a convolution of
one channel, or as a product with a dense matrix. On a GPU a slab is the whole volume. Threads share slabs, and not
the operations within one: the results are the same bits with any number of them.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from functools import cache
from typing import TypeVar

import torch
from torch.utils._python_dispatch import _get_current_dispatch_mode

Result = TypeVar("Result")

SLAB = 2**16  # voxels that a thread of a CPU works on at a time, at most: what its second cache holds
WHOLE = 2**16  # voxels that are not divided
TRUNCATE = 2.5  # standard deviations at which a Gaussian ends


def slabs(volume: torch.Tensor) -> list[tuple[int, int]]:
    """Return the planes (first, last + 1) of a volume (C, D, H, W) that are worked on at a time."""
    _, depth, height, width = volume.shape
    voxels, count = depth * height * width, 1
    if volume.device.type == "cpu" and voxels > WHOLE:
        count = 2 * math.ceil(voxels / (2 * SLAB))  # an even number of equal ones: two threads have the same to do
    planes = math.ceil(depth / count)
    return [(start, min(depth, start + planes)) for start in range(0, depth, planes)]


def in_slabs(work: Callable[[int, int], Result], volume: torch.Tensor) -> list[Result]:
    """Call ``work(start, end)`` for each slab of a volume and return what it returns, in their order.

    On a CPU as many slabs at a time as torch has threads, each in one of them: the bits are those of one thread alone
    (torch's own threads share each operation, and where they part a row of numbers, some functions round otherwise),
    and none waits for another before the last slab, which matters where others want the cores too.
    """
    parts, threads = slabs(volume), torch.get_num_threads()
    inference, gradients = torch.is_inference_mode_enabled(), torch.is_grad_enabled()

    def alone(part: tuple[int, int]) -> Result:
        with torch.inference_mode(inference), torch.set_grad_enabled(gradients and not inference):  # each thread's own
            return work(*part)

    # who counts operations, or computes with shapes alone, sees those of the thread that it was asked in
    watched = _get_current_dispatch_mode() is not None
    if volume.device.type != "cpu" or threads == 1 or watched:
        return [work(*part) for part in parts]
    results = list(_workers(threads).map(alone, parts))
    torch.set_num_threads(threads)  # a worker's own number is that of every thread that begins later
    return results


@cache
def _workers(threads: int) -> ThreadPoolExecutor:
    """Return threads in which torch computes by itself."""
    return ThreadPoolExecutor(threads, "slab", initializer=lambda: torch.set_num_threads(1))


def numbers(values: Sequence[float], like: torch.Tensor) -> torch.Tensor:
    """Return numbers as a tensor (n,) of the type and on the device of another one, which writes them itself.

    A list that is copied to a GPU is waited for, and with it all that the GPU has still to do.
    """
    return torch.cat([like.new_full((1,), float(value)) for value in values])


def gaussian_weights(sigma: float) -> list[float]:
    """Return the weights of a Gaussian at 0, 1, ... voxels; those of both sides add up to 1. No width: one weight."""
    if sigma <= 0:
        return [1.0]
    weights = [math.exp(-0.5 * (place / sigma) ** 2) for place in range(max(1, math.ceil(TRUNCATE * sigma)) + 1)]
    total = weights[0] + 2 * sum(weights[1:])
    return [weight / total for weight in weights]


def gaussian(volume: torch.Tensor, sigma: float) -> torch.Tensor:
    """Smooth a volume (C, D, H, W) with a Gaussian of ``sigma`` voxels; beyond its border the border's values go on."""
    weights, half_done, smoothed = gaussian_weights(sigma), torch.empty_like(volume), torch.empty_like(volume)

    def within(start: int, end: int) -> None:
        half_done[:, start:end] = smooth_in_planes(volume[:, start:end], weights)

    def across(start: int, end: int) -> None:
        smoothed[:, start:end] = smooth_across_planes(half_done, weights, start, end)

    in_slabs(within, volume)
    in_slabs(across, volume)
    return smoothed


def smooth_in_planes(slab: torch.Tensor, weights: Sequence[float]) -> torch.Tensor:
    """Smooth a slab (C, d, H, W) along its last two axes with :func:`gaussian_weights`."""
    for axis in (2, 3):
        slab = _weighted(extended(slab, len(weights) - 1, axis), weights, axis)
    return slab


def smooth_across_planes(volume: torch.Tensor, weights: Sequence[float], start: int, end: int) -> torch.Tensor:
    """Return planes ``start`` to ``end`` of a volume (C, D, H, W), smoothed along its first axis of space."""
    return _weighted(planes(volume, start, end, len(weights) - 1), weights, 1)


def planes(volume: torch.Tensor, start: int, end: int, margin: int) -> torch.Tensor:
    """Return planes ``start - margin`` to ``end + margin`` of a volume (C, D, H, W), the border's beyond it."""
    depth = volume.shape[1]
    first, last = max(0, start - margin), min(depth, end + margin)
    inside = volume[:, first:last]
    if last - first == end - start + 2 * margin:
        return inside
    ends = []
    for missing, edge in ((first - start + margin, volume[:, :1]), (end + margin - last, volume[:, -1:])):
        shape = (volume.shape[0], missing, *volume.shape[2:])
        ends.append(edge.expand(shape))
    return torch.cat([ends[0], inside, ends[1]], dim=1)


def box_sums(volume: torch.Tensor, window: int) -> torch.Tensor:
    """Return the sums over those cubes of ``window`` voxels that lie in a volume (C, D, H, W).

    The result is shorter by ``window`` - 1 along each axis of space. Sums of two, four, ... neighbours are built from
    one another; nothing is a difference of large sums, so that nothing cancels.
    """
    for axis in (1, 2, 3):
        volume = _sums(volume, window, axis)
    return volume


def _sums(volume: torch.Tensor, window: int, axis: int) -> torch.Tensor:
    """Return sums of ``window`` neighbours along an axis, by doubling."""
    length = volume.shape[axis] - window + 1
    partial, size, place, left = volume, 1, 0, window
    total: torch.Tensor | None = None
    while True:
        if left & 1:
            piece = partial.narrow(axis, place, length)
            total = piece if total is None else total + piece
            place += size
        left >>= 1
        if not left:
            return total  # type: ignore[return-value]  # a window is at least one voxel
        shorter = partial.shape[axis] - size
        partial = partial.narrow(axis, 0, shorter) + partial.narrow(axis, size, shorter)
        size *= 2


def extended(volume: torch.Tensor, margin: int, axis: int) -> torch.Tensor:
    """Let the values at both ends of an axis go on for ``margin`` voxels."""
    if not margin:
        return volume
    shape = list(volume.shape)
    shape[axis] = margin
    first, last = (volume.narrow(axis, place, 1).expand(shape) for place in (0, volume.shape[axis] - 1))
    return torch.cat([first, volume, last], dim=axis)


def _weighted(volume: torch.Tensor, weights: Sequence[float], axis: int) -> torch.Tensor:
    """Return the symmetric weighted sums along an axis: as many voxels shorter at each end as there are neighbours."""
    radius = len(weights) - 1
    length = volume.shape[axis] - 2 * radius
    result = volume.narrow(axis, radius, length) * weights[0]
    for away in range(1, radius + 1):
        for place in (radius - away, radius + away):
            result.add_(volume.narrow(axis, place, length), alpha=weights[away])
    return result


def sampled(volume: torch.Tensor, places: Sequence[torch.Tensor], sigma: Sequence[float] | None = None) -> torch.Tensor:
    """Return a volume (C, D, H, W) at the crossings of places along each axis.

    Parameters
    ----------
    places
        Of each axis in voxels, (d,), (h,), (w,); beyond the border the border's values go on.
    sigma
        Standard deviation along each axis, voxels, of the Gaussian that each value is a mean by; none: linear.

    Returns
    -------
    torch.Tensor
        (C, d, h, w).
    """
    for axis, place in enumerate(places, start=1):
        volume = _sampled_along(volume, place, None if sigma is None else sigma[axis - 1], axis)
    return volume


def _sampled_along(volume: torch.Tensor, place: torch.Tensor, sigma: float | None, axis: int) -> torch.Tensor:
    length = volume.shape[axis]
    if sigma is None:
        first = place.floor()
        weights = [1 - (place - first), place - first]
    else:
        reach = max(1, math.ceil(TRUNCATE * sigma))
        first = place.floor() - reach
        away = [first + k - place for k in range(2 * reach + 2)]
        weights = [torch.exp(-0.5 * (x / max(sigma, 1e-6)) ** 2) for x in away]
        total = torch.stack(weights).sum(dim=0)
        weights = [weight / total for weight in weights]
    shape = [1, 1, 1, 1]
    shape[axis] = len(place)
    result: torch.Tensor | None = None
    for k, weight in enumerate(weights):
        neighbours = volume.index_select(axis, (first + k).clamp(0, length - 1).long())
        neighbours.mul_(weight.to(volume.dtype).view(shape))
        result = neighbours if result is None else result.add_(neighbours)
    return result  # type: ignore[return-value]  # there is always a weight
