"""Label maps resampled at x + u(x), every id kept: by the nearest voxel, or by the vote of eight neighbours."""

from __future__ import annotations

from collections.abc import Sequence

import torch
import torch.nn.functional as F

from dmir.fields.sampling import CORNERS, normalised, warp

PART_BITS = 24  # of an id that float32 holds exactly
VOTED = 2**17  # voxels of a label map resampled at a time on a CPU: what its cache holds


def warp_labels(labels: torch.Tensor, displacement: torch.Tensor, interpolation: str = "nearest") -> torch.Tensor:
    """Resample a label map at x + u(x).

    ``"linear"`` gives what one-hot encoding, linear warping of each channel and argmax give, without ever making the
    channels: of the eight neighbours of a sampling point, those of one label add their weights, and the heaviest
    label wins (the smallest id on a tie). Its cost does not depend on the number of structures.

    Parameters
    ----------
    labels
        (B, 1, D, H, W), any integer type, of which every id is kept; what lies outside is 0. It may have another shape
        than the field.
    displacement
        (B, 3, D, H, W) in voxels of the label map.

    Returns
    -------
    torch.Tensor
        (B, 1, D, H, W) of the type of ``labels``.
    """
    if interpolation == "nearest":
        return _whole(warp(_parts(labels), displacement, mode="nearest"), labels.dtype)
    if interpolation != "linear":
        raise ValueError(f"interpolation is 'nearest' or 'linear', not {interpolation!r}")
    warped = [_warp_labels(a[0], u, ["linear"])[0] for a, u in zip(labels, displacement, strict=True)]
    return torch.stack(warped)[:, None]


def _parts(labels: torch.Tensor) -> torch.Tensor:
    """Return ids (B, 1, ...) as float32 (B, parts, ...), the lowest 24 bits first: float32 holds no longer numbers."""
    # a GPU would be waited for to know how large they are
    small = labels.device.type == "cpu" and labels.numel() and labels.min() >= 0 and labels.max() < 2**PART_BITS
    if labels.element_size() < 4 or small:
        return labels.to(torch.float32)
    ids, count = labels.to(torch.int64), 2 if labels.element_size() == 4 else 3
    digits = [ids >> PART_BITS * part & 2**PART_BITS - 1 for part in range(count - 1)]
    return torch.cat([*digits, ids >> PART_BITS * (count - 1)], dim=1).to(torch.float32)


def _whole(parts: torch.Tensor, dtype: torch.dtype) -> torch.Tensor:
    """Return the ids (B, 1, ...) of their parts."""
    if parts.shape[1] == 1:
        return parts.round().to(dtype)
    whole = sum(parts[:, part : part + 1].round().to(torch.int64) << PART_BITS * part for part in range(parts.shape[1]))
    return whole.to(dtype)  # type: ignore[union-attr]


def warp_labels_each(
    labels: torch.Tensor, displacement: torch.Tensor, interpolations: Sequence[str]
) -> dict[str, torch.Tensor]:
    """Return :func:`warp_labels` by each interpolation; where both are wanted, points are found once for both."""
    if set(interpolations) == {"nearest", "linear"}:
        maps = [_warp_labels(a[0], u, interpolations) for a, u in zip(labels, displacement, strict=True)]
        return {name: torch.stack([each[k] for each in maps])[:, None] for k, name in enumerate(interpolations)}
    return {name: warp_labels(labels, displacement, name) for name in interpolations}


def _warp_labels(labels: torch.Tensor, displacement: torch.Tensor, interpolations: Sequence[str]) -> list[torch.Tensor]:
    """Return one label map (D, H, W) resampled by each; only points whose eight neighbours differ need a vote."""
    padded = F.pad(labels, (1,) * 6)  # a layer of what lies outside
    mixed, flat = _mixed_cells(padded).reshape(-1), padded.reshape(-1)
    counted = torch.int32 if len(flat) < 2**31 else torch.int64
    strides = (padded.shape[1] * padded.shape[2], padded.shape[2], 1)
    offsets = [sum(c * s for c, s in zip(corner, strides, strict=True)) for corner in CORNERS]
    depth, height, width = displacement.shape[1:]
    axes = [torch.arange(n, device=labels.device, dtype=torch.float32) for n in (depth, height, width)]
    planes = max(1, VOTED // (height * width)) if labels.device.type == "cpu" else depth
    image = _parts(labels[None, None]) if "nearest" in interpolations else labels
    results = [labels.new_empty(depth, height, width) for _ in interpolations]
    for start in range(0, depth, planes):
        part = slice(start, start + planes)
        grid = (axes[0][part, None, None], axes[1][None, :, None], axes[2][None, None])
        position = [u[part].to(torch.float32) + x for u, x in zip(displacement, grid, strict=True)]
        lower = [x.floor() for x in position]
        inside = torch.ones_like(lower[0], dtype=torch.bool)
        index = torch.full_like(inside, sum(strides), dtype=counted)  # of voxel 0 beneath its layer
        for low, size, stride in zip(lower, labels.shape, strides, strict=True):
            inside &= (low >= -1) & (low <= size - 1)
            index += low.to(counted) * stride
        index.masked_fill_(~inside, len(flat) - 1)  # a corner of the layer: 0, and the start of no cell
        index = index.reshape(-1)
        values = flat.index_select(0, index)
        voters = mixed.index_select(0, index).nonzero()[:, 0]
        first = index[voters]
        places = torch.stack([x.reshape(-1)[voters] for x in position])
        for interpolation, result in zip(interpolations, results, strict=True):
            if interpolation == "linear":
                neighbours = [flat[first + offset] for offset in offsets]
                winners = _heaviest(neighbours, places - places.floor())
            else:
                winners = _nearest(image, places, labels.dtype)
            result[part] = values.index_put((voters,), winners).view(-1, height, width)
    return results


def _nearest(parts: torch.Tensor, places: torch.Tensor, dtype: torch.dtype) -> torch.Tensor:
    """Return the ids (n,), given as parts (1, p, D, H, W), of the voxels nearest to places (3, n), as :func:`warp`."""
    grid = torch.stack([normalised(places[axis], parts.shape[axis + 2]) for axis in (2, 1, 0)], dim=-1)
    sampled = F.grid_sample(parts, grid[None, None, None], mode="nearest", align_corners=True)
    return _whole(sampled, dtype).reshape(-1)


def _mixed_cells(labels: torch.Tensor) -> torch.Tensor:
    """Return which voxels are the first of a cell of eight that holds more than one label, bool (D, H, W)."""
    first = tuple(slice(None, -1) for _ in range(3))
    mixed = torch.zeros_like(labels, dtype=torch.bool)
    cells = mixed[first]
    along = (
        labels[:, :, 1:] != labels[:, :, :-1]
    )  # pairs; then squares, in which two pairs or their first voxels differ
    across = along[:, 1:] | along[:, :-1] | (labels[:, 1:, :-1] != labels[:, :-1, :-1])
    cells |= across[1:] | across[:-1] | (labels[1:, :-1, :-1] != labels[first])
    return mixed


def _heaviest(neighbours: list[torch.Tensor], fraction: torch.Tensor) -> torch.Tensor:
    """Return the label (n,) whose corners of the cell, in the order of CORNERS, weigh most at a place (3, n) in it."""
    weights = []
    for corner in CORNERS:
        parts = [fraction[axis] if step else 1 - fraction[axis] for axis, step in enumerate(corner)]
        weights.append(parts[0] * parts[1] * parts[2])
    best, heaviest = neighbours[0], torch.full_like(weights[0], -1.0)
    for number, label in enumerate(neighbours):
        # a label's first corner gathers the weight of all; from a later one it weighs no more and wins nothing new
        total = weights[number].clone()
        for other, weight in zip(neighbours[number + 1 :], weights[number + 1 :], strict=True):
            total += weight * (other == label)
        wins = (total > heaviest) | ((total == heaviest) & (label < best))
        best, heaviest = torch.where(wins, label, best), torch.where(wins, total, heaviest)
    return best
