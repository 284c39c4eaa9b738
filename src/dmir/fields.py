"""The displacement field: the one interchange format of every method, and all that is done to it.

A field ``u`` lives on the fixed grid and pulls back: ``warped(x) = moving(x + u(x))``. In memory it is a float32 tensor
(B, 3, D, H, W) in voxels, component ``k`` along array axis ``k``. On disk it is what ITK and ANTs write: NIfTI, 5-D,
intent vector, LPS millimetres, so that antsApplyTransforms, ITK-SNAP and 3D Slicer read it.

Sampling follows ``align_corners=True`` everywhere: voxel centres are the integer coordinates, and warping by zero is
the identity.
"""

from __future__ import annotations

import logging
from collections.abc import Sequence
from itertools import product
from pathlib import Path

import nibabel as nib
import numpy as np
import torch
import torch.nn.functional as F

from dmir import filters
from dmir.errors import InputError
from dmir.volumes import atomic_path, save_nifti

log = logging.getLogger(__name__)

CORNERS = tuple(product((0, 1), repeat=3))  # of a cell of eight voxels
LPS = np.array([-1.0, -1.0, 1.0]).reshape(3, 1, 1, 1)  # RAS <-> LPS, its own inverse
PART_BITS = 24  # of an id that float32 holds exactly
VOTED = 2**17  # voxels of a label map resampled at a time on a CPU: what its cache holds
SWEEPS = 4  # iterations of an inversion over all voxels, before those over what has not arrived
LEAST_SHARE = 0.01  # of a step of an inversion, below which a voxel is given up
NO_INVERSE = 0.5  # voxels from the start: more is no inverse
MARK = "dmir: itk"  # the description in a field's header: LPS millimetres, and steps
SLICES = 16  # of a field converted at a time: as many numbers as a line of the cache holds


def identity_grid(
    shape: tuple[int, int, int], device: torch.device | str | None = None, dtype: torch.dtype = torch.float32
) -> torch.Tensor:
    """Return the voxel coordinates of every voxel, shape (1, 3, D, H, W)."""
    axes = [torch.arange(n, device=device, dtype=dtype) for n in shape]
    return torch.stack(torch.meshgrid(*axes, indexing="ij"))[None]


def _sampling_grid(displacement: torch.Tensor, shape: torch.Size) -> torch.Tensor:
    """Return x + u(x) as ``grid_sample`` wants it: (B, D, H, W, 3), in [-1, 1] over ``shape``, in W, H, D order."""
    components = []
    for axis in (2, 1, 0):
        view = [1, 1, 1, 1]
        view[axis + 1] = n = displacement.shape[axis + 2]
        coordinate = torch.arange(n, device=displacement.device, dtype=displacement.dtype).view(view)
        components.append(_normalised(coordinate + displacement[:, axis], shape[axis]))
    return torch.stack(components, dim=-1)


def _normalised(coordinate: torch.Tensor, size: int) -> torch.Tensor:
    return coordinate * (2.0 / max(size - 1, 1)) - 1.0


def warp(image: torch.Tensor, displacement: torch.Tensor, mode: str = "linear", padding: str = "zeros") -> torch.Tensor:
    """Resample an image at x + u(x) (Jaderberg et al. 2015, the spatial transformer).

    Parameters
    ----------
    image
        (B, C, D, H, W), any floating type; computed in float32 at least. It may have another shape than the field,
        see :func:`onto_moving_grid`.
    displacement
        (B, 3, D, H, W) in voxels of the image.
    mode
        ``"linear"`` or ``"nearest"``.
    padding
        What lies outside the image: ``"zeros"``, or ``"border"`` for the nearest voxel's value.

    Returns
    -------
    torch.Tensor
        (B, C, D, H, W).
    """
    if mode not in ("linear", "nearest"):
        raise ValueError(f"mode is 'linear' or 'nearest', not {mode!r}")
    with torch.autocast(device_type=displacement.device.type, enabled=False):
        dtype = torch.promote_types(torch.promote_types(image.dtype, displacement.dtype), torch.float32)
        image, grid = image.to(dtype), _sampling_grid(displacement.to(dtype), image.shape[2:])
        by_planes = _by_planes(image, grid)
        if by_planes:
            image, grid = image.expand(grid.shape[1], *image.shape[1:]), grid[0][:, None]
        sampled = F.grid_sample(
            image,
            grid,
            mode="bilinear" if mode == "linear" else "nearest",
            padding_mode=padding,
            align_corners=True,
        )
        return sampled[:, :, 0].transpose(0, 1)[None] if by_planes else sampled


def _by_planes(image: torch.Tensor, grid: torch.Tensor) -> bool:
    """Tell whether planes are to be sampled as a batch: on a CPU torch's threads share a batch and nothing else.

    The same numbers, and a fifth faster with one thread too. Not where a gradient is wanted: it would be that of a
    batch of images.
    """
    wanted = torch.is_grad_enabled() and (image.requires_grad or grid.requires_grad)
    return image.device.type == "cpu" and len(image) == 1 and not wanted


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
    grid = torch.stack([_normalised(places[axis], parts.shape[axis + 2]) for axis in (2, 1, 0)], dim=-1)
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


def shifted_displacement(displacement: torch.Tensor) -> torch.Tensor:
    """Return where published code that normalises by n - 1 and samples without ``align_corners`` really looks.

    The training code of XMorpher, TransMatch and TransMorph (OASIS) maps x + u(x) to 2 (x + u(x)) / (n - 1) - 1 and
    gives that to ``grid_sample`` with ``align_corners=False``, which reads it as (x + u(x)) n / (n - 1) - 1/2: with no
    displacement at all the image is stretched, by half a voxel at its borders. ``warp(image, shifted_displacement(u))``
    is that warp; no score uses it.

    Parameters
    ----------
    displacement
        (B, 3, D, H, W) in voxels; every axis has at least two.
    """
    shape = (displacement.shape[2], displacement.shape[3], displacement.shape[4])
    position = identity_grid(shape, displacement.device, displacement.dtype) + displacement
    extent = filters.numbers(shape, displacement).view(1, 3, 1, 1, 1)
    return displacement + position / (extent - 1) - 0.5


def compose(first: torch.Tensor, second: torch.Tensor) -> torch.Tensor:
    """Return the field that warps as ``first`` and then ``second`` do, in one resampling.

    ``u(x) = second(x) + first(x + second(x))``, so that
    ``warp(warp(image, first), second)`` and ``warp(image, compose(first, second))`` agree up to interpolation
    (recursive cascades, Zhao et al. 2019). Both (B, 3, D, H, W) in voxels.
    """
    return second + warp(first, second, padding="border")


def compose_step(first: torch.Tensor, second: torch.Tensor, start: int, end: int) -> torch.Tensor:
    """Return some planes of a field composed with a step that moves no voxel by more than one along any axis.

    The step is taken along one axis after the other (operator splitting, Strang 1968): ``compose(compose(compose(first,
    z), y), x)`` with its three components by themselves, which is ``compose(first, second)`` up to products of the step
    with its own derivatives. Each is linear interpolation between a voxel and its neighbours: nine products with
    shifted views, a tenth of a gather's time on a CPU. Where the step's slopes are below 1, none of the three folds.

    Parameters
    ----------
    first, second
        (3, D, H, W) in voxels.
    start, end
        Planes along the first axis of space, the last one not included.

    Returns
    -------
    torch.Tensor
        (3, end - start, H, W).
    """
    result = filters.planes(first, start, end, 1)
    for axis in range(3):
        if axis:
            result = filters.extended(result, 1, axis + 1)
        step = second[axis : axis + 1, start:end]
        before, own, behind = (result.narrow(axis + 1, place, result.shape[axis + 1] - 2) for place in range(3))
        result = own * (1 - step.abs())
        result.addcmul_(behind, step.clamp(min=0)).addcmul_(before, step.clamp(max=0), value=-1)
        result[axis] += step[0]
    return result


def invert(
    displacement: torch.Tensor, iterations: int = 60, tolerance: float = 1e-3, *, tell: bool = True
) -> torch.Tensor:
    """Return v with v(x) = -u(x + v(x)), by fixed-point iteration (Chen et al. 2008) and Newton's method.

    A few iterations over all voxels bring nearly all of them there; those that have not arrived, where the field
    stretches or shears, go on by damped steps of Newton. Where a field folds there is no inverse: see
    :func:`inverse_residual`, and what is logged.

    Parameters
    ----------
    displacement
        (B, 3, D, H, W) in voxels.
    iterations
        At most.
    tolerance
        Length of v(x) + u(x + v(x)), voxels, at which a voxel has arrived.
    tell
        Log where there is no inverse; without it the caller tells, from :func:`inverse_residual`.
    """
    result = torch.stack([_inverted(one, iterations, tolerance) for one in displacement])
    if tell:
        _tell_of_what_is_not_inverted(displacement, inverse_residual(displacement, result))
    return result


def _inverted(displacement: torch.Tensor, iterations: int, tolerance: float) -> torch.Tensor:
    """Return the inverse of one field (3, D, H, W)."""
    u, inverse = displacement[None], -displacement[None]
    for _ in range(SWEEPS):
        inverse = -warp(u, inverse, padding="border")
    for again in (False, True):
        error = compose(u, inverse)[0].flatten(1)
        left = (error.square().sum(0) > tolerance**2).nonzero()[:, 0]
        if not len(left):
            break
        start = inverse[0].flatten(1)
        if again:  # what did not arrive sets out once more from where its neighbours arrived
            arrived = torch.ones_like(error[0]).index_fill_(0, left, 0.0).view(1, 1, *displacement.shape[1:])
            mean = F.avg_pool3d(inverse * arrived, 3, 1, 1) / F.avg_pool3d(arrived, 3, 1, 1).clamp(min=1e-3)
            guess = mean[0].flatten(1)[:, left]
        else:
            guess = start[:, left]
        shape = (u.shape[2], u.shape[3], u.shape[4])
        place = identity_grid(shape, u.device, u.dtype)[0].flatten(1)[:, left]
        found, reached = inverse_at(displacement, place, guess, iterations - SWEEPS, tolerance)
        better = reached < error[:, left].norm(dim=0)
        start[:, left] = torch.where(better, found, start[:, left])
        inverse = start.view_as(inverse)
    return inverse[0]


def inverse_at(
    displacement: torch.Tensor, place: torch.Tensor, guess: torch.Tensor, iterations: int = 60, tolerance: float = 1e-3
) -> tuple[torch.Tensor, torch.Tensor]:
    """Improve the inverse v of a field at some places, v(x) = -u(x + v(x)), by damped steps of Newton.

    Parameters
    ----------
    displacement
        u: (3, D, H, W) in voxels; beyond its border as at the border.
    place, guess
        x and a first v: (3, n) in voxels.
    iterations, tolerance
        As for :func:`invert`.

    Returns
    -------
    inverse, left
        v, (3, n), and the length of v(x) + u(x + v(x)), (n,): in voxels.
    """
    inverse = guess.clone()
    error = inverse + _sampled_at(displacement, place + inverse)
    going, share = (error.norm(dim=0) > tolerance).nonzero()[:, 0], torch.ones_like(error[0])
    for _ in range(iterations):
        if not len(going):
            break
        moved = inverse[:, going] - share[going] * _newton_step(
            displacement, place[:, going] + inverse[:, going], error[:, going]
        )
        after = moved + _sampled_at(displacement, place[:, going] + moved)
        better = after.square().sum(0) < error[:, going].square().sum(0)
        inverse[:, going] = torch.where(better, moved, inverse[:, going])
        error[:, going] = torch.where(better, after, error[:, going])
        share[going] = torch.where(better, (2 * share[going]).clamp(max=1), 0.5 * share[going])
        going = going[(error[:, going].norm(dim=0) > tolerance) & (share[going] > LEAST_SHARE)]
    return inverse, error.norm(dim=0)


def inverse_residual(displacement: torch.Tensor, inverse: torch.Tensor) -> torch.Tensor:
    """Return how far there and back ends from the start, |v(x) + u(x + v(x))| in voxels, (B, D, H, W)."""
    return compose(displacement, inverse).norm(dim=1)


def inverse_consistency(displacement: np.ndarray) -> dict[str, float]:
    """Return ``inverse_mean`` and ``inverse_worst`` of a field (3, D, H, W): :func:`inverse_residual`, in voxels."""
    with torch.inference_mode():
        field = torch.from_numpy(np.ascontiguousarray(displacement, np.float32))[None]
        residual = inverse_residual(field, invert(field))
    return {"inverse_mean": float(residual.mean()), "inverse_worst": float(residual.amax())}


def _newton_step(displacement: torch.Tensor, places: torch.Tensor, error: torch.Tensor) -> torch.Tensor:
    """Solve (I + du/dx) s = error at places (3, n) of a field (3, D, H, W)."""
    columns = []
    for axis in range(3):
        half = places.new_zeros(3, 1)
        half[axis] = 0.5
        columns.append(_sampled_at(displacement, places + half) - _sampled_at(displacement, places - half))
        columns[axis][axis] += 1
    a, b, c = columns
    normal = torch.linalg.cross(b, c, dim=0)
    determinant = (a * normal).sum(0)
    safe = torch.where(determinant.abs() < 1e-6, torch.full_like(determinant, 1e-6), determinant)
    parts = (normal, torch.linalg.cross(c, a, dim=0), torch.linalg.cross(a, b, dim=0))
    return torch.stack([(part * error).sum(0) for part in parts]) / safe


def _sampled_at(displacement: torch.Tensor, places: torch.Tensor) -> torch.Tensor:
    """Return a field (3, D, H, W) at places (3, n) in voxels, beyond its border as at the border: (3, n)."""
    grid = torch.stack([_normalised(places[axis], displacement.shape[axis + 1]) for axis in (2, 1, 0)], dim=-1)
    sampled = F.grid_sample(displacement[None], grid[None, None, None], padding_mode="border", align_corners=True)
    return sampled[0, :, 0, 0]


def _tell_of_what_is_not_inverted(displacement: torch.Tensor, residual: torch.Tensor) -> None:
    """Warn of voxels whose inverse is no inverse, and of a field that has none because it folds."""
    wrong, folds = int((residual > NO_INVERSE).sum()), sum(folded_voxels(one) for one in displacement)
    if wrong:
        log.warning(
            "the field has no inverse at %d of %d voxels, where there and back ends up to %.3g voxels from the start:"
            " what is brought back there is wrong",
            wrong,
            residual.numel(),
            float(residual.amax()),
        )
    if folds:
        log.warning("the field folds at %d places: there it has no inverse, and what is brought back jumps", folds)


def integrate(velocity: torch.Tensor, steps: int = 7) -> torch.Tensor:
    """Return exp(v) by scaling and squaring (Arsigny et al. 2006): v / 2^steps, composed with itself ``steps`` times.

    Parameters
    ----------
    velocity
        Stationary velocity field (B, 3, D, H, W) in voxels.
    """
    displacement = velocity / 2**steps
    for _ in range(steps):
        displacement = compose(displacement, displacement)
    return displacement


def resize_displacement(displacement: torch.Tensor, shape: tuple[int, int, int]) -> torch.Tensor:
    """Resample a field (B, 3, d, h, w) to another shape, trilinearly, and rescale its values to the new voxels."""
    old = displacement.shape[2:]
    if tuple(old) == tuple(shape):
        return displacement
    resized = F.interpolate(displacement, size=tuple(shape), mode="trilinear", align_corners=True)
    # align_corners=True keeps the corner voxels in place, so a voxel shrinks by (n - 1) / (m - 1)
    factor = [(new - 1) / max(before - 1, 1) for before, new in zip(old, shape, strict=True)]
    return resized * filters.numbers(factor, resized).view(1, 3, 1, 1, 1)


def jacobian_determinant(displacement: torch.Tensor, scheme: str = "central") -> torch.Tensor:
    """Return det(I + grad u) of a field (B, 3, D, H, W) in voxels.

    Parameters
    ----------
    scheme
        ``"central"``: central differences on the interior, (B, D-2, H-2, W-2);
        ``"forward"``: forward differences, (B, D-1, H-1, W-1).
    """
    u = displacement
    gradient = []
    for axis in range(3):
        if scheme == "central":
            index = [slice(None), slice(None)] + [slice(1, -1)] * 3
            ahead, behind = list(index), list(index)
            ahead[axis + 2], behind[axis + 2] = slice(2, None), slice(None, -2)
            difference = (u[tuple(ahead)] - u[tuple(behind)]) / 2
        elif scheme == "forward":
            index = [slice(None), slice(None)] + [slice(None, -1)] * 3
            ahead = list(index)
            ahead[axis + 2] = slice(1, None)
            difference = u[tuple(ahead)] - u[tuple(index)]
        else:
            raise ValueError(f"scheme is 'central' or 'forward', not {scheme!r}")
        gradient.append(difference)  # gradient[axis][:, k] = d u_k / d x_axis
    a, b, c = (gradient[axis][:, 0] for axis in range(3))
    d, e, f = (gradient[axis][:, 1] for axis in range(3))
    g, h, i = (gradient[axis][:, 2] for axis in range(3))
    a, e, i = a + 1, e + 1, i + 1
    return a * (e * i - f * h) - b * (d * i - f * g) + c * (d * h - e * g)


def folded_voxels(displacement: torch.Tensor, least: float = 0.0) -> int:
    """Return at how many places a field (3, D, H, W) in voxels folds: 0 says that no determinant is <= ``least``.

    Looked at are, of every cube of eight voxels, the tetrahedra at its corners and the two in its middle (the ten
    determinants of Liu et al. 2022; at the border those with what lies beyond it, which is as at the border), and the
    central differences at every inner voxel.
    """

    def folds(start: int, end: int) -> int:
        around = filters.planes(displacement, start, end, 1)
        for axis in (2, 3):
            around = filters.extended(around, 1, axis)
        found = int(_folded_cubes(around, least).sum())
        inner = displacement[:, max(0, start - 1) : min(end + 1, displacement.shape[1])]
        return found + (int((jacobian_determinant(inner[None]) <= least).sum()) if min(inner.shape[1:]) > 2 else 0)

    return sum(filters.in_slabs(folds, displacement))


def _folded_cubes(u: torch.Tensor, least: float) -> torch.Tensor:
    """Return which cubes of a field (3, d, H, W) fold, (d - 1, H - 1, W - 1)."""
    edges = []
    for axis in range(3):
        edge = u.diff(dim=axis + 1)
        edge[axis] += 1
        edges.append(edge)
    size = [n - 1 for n in u.shape[1:]]

    def corner(volume: torch.Tensor, place: Sequence[int]) -> torch.Tensor:
        for axis in range(3):
            volume = volume.narrow(axis + 1, min(place[axis], volume.shape[axis + 1] - size[axis]), size[axis])
        return volume

    folded = torch.zeros(size, dtype=torch.bool, device=u.device)
    for place in CORNERS:
        folded |= _determinant(*(corner(edge, place) for edge in edges)) <= least
    # the way to a corner of the cube, seen from its first: identity and displacement
    at = {place: corner(u, place) + filters.numbers(place, u).view(3, 1, 1, 1) for place in CORNERS}
    first, opposite = at[0, 0, 0], at[1, 1, 1]
    folded |= _determinant(*(opposite - at[place] for place in ((1, 0, 0), (0, 1, 0), (0, 0, 1)))) <= least
    folded |= _determinant(*(at[place] - first for place in ((1, 1, 0), (0, 1, 1), (1, 0, 1)))) <= least
    return folded


def _determinant(a: torch.Tensor, b: torch.Tensor, c: torch.Tensor) -> torch.Tensor:
    """Return det of three vectors (3, ...) each."""
    return a[0] * (b[1] * c[2] - b[2] * c[1]) + a[1] * (b[2] * c[0] - b[0] * c[2]) + a[2] * (b[0] * c[1] - b[1] * c[0])


def to_millimetres(displacement: np.ndarray, affine: np.ndarray) -> np.ndarray:
    """Turn a field (3, D, H, W) from voxels along the array axes into RAS millimetres."""
    return np.einsum("ij,jdhw->idhw", np.asarray(affine, dtype=np.float64)[:3, :3], displacement)


def to_voxels(displacement: np.ndarray, affine: np.ndarray) -> np.ndarray:
    """Turn a field (3, D, H, W) from RAS millimetres into voxels along the array axes."""
    return np.einsum("ij,jdhw->idhw", np.linalg.inv(np.asarray(affine, dtype=np.float64)[:3, :3]), displacement)


def onto_moving_grid(
    displacement: np.ndarray,
    fixed_affine: np.ndarray,
    moving_affine: np.ndarray,
    dtype: type | np.dtype = np.float32,
) -> np.ndarray:
    """Express a field for a moving image that lies on a grid of its own.

    A field takes a fixed point to a moving point in the same world; :func:`warp` counts in the moving image's voxels.
    Of ``v = onto_moving_grid(u, fixed, moving)``, ``warp(image, v)`` samples a moving image of any shape, spacing and
    orientation on the fixed grid, in one interpolation. With equal affines ``v`` is ``u``.

    Parameters
    ----------
    displacement
        (3, D, H, W) in voxels of the fixed grid.
    fixed_affine, moving_affine
        4x4 voxel-to-RAS matrices, mm.
    dtype
        Of the result.

    Returns
    -------
    numpy.ndarray
        (3, D, H, W) on the fixed grid, in voxels of the moving grid, relative to the fixed voxel's indices.
    """
    index = np.stack(np.meshgrid(*(np.arange(n, dtype=np.float64) for n in displacement.shape[1:]), indexing="ij"))
    matrix = np.linalg.inv(moving_affine) @ fixed_affine
    place = np.einsum("ij,jdhw->idhw", matrix[:3, :3], index + displacement) + matrix[:3, 3].reshape(3, 1, 1, 1)
    return (place - index).astype(dtype)


def pair_field(folder: str | Path, moving: str, fixed: str) -> Path:
    """Return the file of a pair's field, ``<folder>/<moving>__<fixed>.nii``.

    It is not compressed: the lowest bits of a displacement are noise, so that gzip saves little and takes ten times
    as long. A compressed one that is there already, and no plain one, is found as well.
    """
    plain = Path(folder, f"{moving}__{fixed}.nii")
    compressed = plain.with_name(plain.name + ".gz")
    return compressed if compressed.is_file() and not plain.is_file() else plain


def save_field(path: str | Path, displacement: torch.Tensor | np.ndarray, affine: np.ndarray, remark: str = "") -> None:
    """Write a field as ITK and ANTs do: (D, H, W, 1, 3), intent vector, LPS millimetres, float32.

    Parameters
    ----------
    path
        ``.nii`` or ``.nii.gz``; written beside and renamed.
    displacement
        (3, D, H, W) in voxels.
    affine
        4x4 voxel-to-RAS matrix of the fixed grid, mm.
    remark
        What whoever reads the file should know, for the header's description (68 letters).
    """
    if isinstance(displacement, torch.Tensor):
        displacement = displacement.detach().cpu().numpy()
    if displacement.ndim != 4 or displacement.shape[0] != 3:
        raise ValueError(f"a field has shape (3, D, H, W), not {displacement.shape}")
    matrix = LPS.reshape(3, 1) * np.asarray(affine, dtype=np.float64)[:3, :3]
    # a file has its first axis fastest: written through the transpose, so that nothing is reordered a second time
    stored = np.empty((3, *displacement.shape[:0:-1]), dtype=np.float32)
    transform_vectors(matrix, displacement, stored.transpose(0, 3, 2, 1))
    image = nib.Nifti1Image(stored.T[..., None, :], np.asarray(affine))
    image.header.set_intent("vector")
    image.header.set_xyzt_units("mm")
    image.header["descrip"] = f"{MARK}; {remark}".encode("ascii", "replace") if remark else MARK.encode()
    with atomic_path(path) as temporary:
        save_nifti(temporary, image)


def transform_vectors(matrix: np.ndarray, vectors: np.ndarray, result: np.ndarray) -> None:
    """Put matrix @ vectors, (3, D, H, W) each, into ``result``; computed in float64, a few slices at a time."""
    for start in range(0, vectors.shape[1], SLICES):
        part = vectors[:, start : start + SLICES]
        for row, target in zip(matrix, result, strict=True):
            # most grids lie along the axes of the world: two of three products are with zero
            terms = [np.multiply(part[axis], row[axis], dtype=np.float64) for axis in range(3) if row[axis] != 0]
            target[start : start + SLICES] = sum(terms[1:], start=terms[0]).astype(np.float32)


def load_field(path: str | Path) -> tuple[np.ndarray, np.ndarray]:
    """Read a field that ITK, ANTs or :func:`save_field` wrote; :func:`dmir.transforms.read` reads any other one.

    Returns
    -------
    displacement, affine
        float32 (3, D, H, W) in voxels, and the 4x4 voxel-to-RAS matrix of the fixed grid.

    Raises
    ------
    InputError
        The file is missing, damaged, not finite, or no field of ITK's: its header or its values say that it is another
        kind, or do not say what it is.
    """
    from dmir.transforms import read

    found = read(path)
    if found.convention != "itk":
        raise InputError(
            path,
            found=f"a field of another kind: {found.convention}, by {found.known_by}",
            expected="(D, H, W, 1, 3), a vector field as ITK and ANTs write it",
            remedy=f"Convert it: dmir field convert {path} --to itk --out FIELD.nii.gz",
        )
    field = found.on()
    return field.displacement, field.affine
