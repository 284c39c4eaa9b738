"""The displacement field: the one interchange format of every method, and all that is done to it.

A field ``u`` lives on the fixed grid and pulls back: ``warped(x) = moving(x + u(x))``. In memory it is a float32 tensor
(B, 3, D, H, W) in voxels, component ``k`` along array axis ``k``. On disk it is what ITK and ANTs write: NIfTI, 5-D,
intent vector, LPS millimetres, so that antsApplyTransforms, ITK-SNAP and 3D Slicer read it.

Sampling follows ``align_corners=True`` everywhere: voxel centres are the integer coordinates, and warping by zero is
the identity.
"""

from __future__ import annotations

from collections.abc import Sequence
from itertools import product
from pathlib import Path

import nibabel as nib
import numpy as np
import torch
import torch.nn.functional as F

from dmir.errors import InputError
from dmir.volumes import atomic_path, save_nifti, stored_array

CORNERS = tuple(product((0, 1), repeat=3))  # of a cell of eight voxels
LPS = np.array([-1.0, -1.0, 1.0]).reshape(3, 1, 1, 1)  # RAS <-> LPS, its own inverse
VOTED = 2**17  # voxels of a label map resampled at a time on a CPU: what its cache holds
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
        grid = _sampling_grid(displacement.to(dtype), image.shape[2:])
        return F.grid_sample(
            image.to(dtype),
            grid,
            mode="bilinear" if mode == "linear" else "nearest",
            padding_mode=padding,
            align_corners=True,
        )


def warp_labels(labels: torch.Tensor, displacement: torch.Tensor, interpolation: str = "nearest") -> torch.Tensor:
    """Resample a label map at x + u(x).

    ``"linear"`` gives what one-hot encoding, linear warping of each channel and argmax give, without ever making the
    channels: of the eight neighbours of a sampling point, those of one label add their weights, and the heaviest
    label wins (the smallest id on a tie). Its cost does not depend on the number of structures.

    Parameters
    ----------
    labels
        (B, 1, D, H, W), any integer type; what lies outside is 0. It may have another shape than the field.
    displacement
        (B, 3, D, H, W) in voxels of the label map.

    Returns
    -------
    torch.Tensor
        (B, 1, D, H, W) of the type of ``labels``.
    """
    if interpolation == "nearest":
        return warp(labels.to(torch.float32), displacement, mode="nearest").round().to(labels.dtype)
    if interpolation != "linear":
        raise ValueError(f"interpolation is 'nearest' or 'linear', not {interpolation!r}")
    warped = [_warp_labels(a[0], u, ["linear"])[0] for a, u in zip(labels, displacement, strict=True)]
    return torch.stack(warped)[:, None]


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
    image = labels.to(torch.float32) if "nearest" in interpolations else labels
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
                winners = _nearest(image, places).to(labels.dtype)
            result[part] = values.index_put((voters,), winners).view(-1, height, width)
    return results


def _nearest(image: torch.Tensor, places: torch.Tensor) -> torch.Tensor:
    """Return the values (n,) of the voxels of an image (D, H, W) nearest to places (3, n), as :func:`warp` does."""
    grid = torch.stack([_normalised(places[axis], image.shape[axis]) for axis in (2, 1, 0)], dim=-1)
    sampled = F.grid_sample(image[None, None], grid[None, None, None], mode="nearest", align_corners=True)
    return sampled.reshape(-1).round()


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
    extent = displacement.new_tensor(shape).view(1, 3, 1, 1, 1)
    return displacement + position / (extent - 1) - 0.5


def compose(first: torch.Tensor, second: torch.Tensor) -> torch.Tensor:
    """Return the field that warps as ``first`` and then ``second`` do, in one resampling.

    ``u(x) = second(x) + first(x + second(x))``, so that
    ``warp(warp(image, first), second)`` and ``warp(image, compose(first, second))`` agree up to interpolation
    (recursive cascades, Zhao et al. 2019). Both (B, 3, D, H, W) in voxels.
    """
    return second + warp(first, second, padding="border")


def invert(displacement: torch.Tensor, iterations: int = 30, tolerance: float = 1e-3) -> torch.Tensor:
    """Return v with v(x) = -u(x + v(x)), by fixed-point iteration (Chen et al. 2008).

    It converges where the displacement is a contraction (local stretch below two); iteration ends when no voxel
    moves by more than ``tolerance`` voxels.

    Parameters
    ----------
    displacement
        (B, 3, D, H, W) in voxels.
    """
    inverse = -displacement
    for _ in range(iterations):
        update = -warp(displacement, inverse, padding="border")
        change = float((update - inverse).abs().amax())
        inverse = update
        if change < tolerance:
            break
    return inverse


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
    return resized * resized.new_tensor(factor).view(1, 3, 1, 1, 1)


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


def to_millimetres(displacement: np.ndarray, affine: np.ndarray) -> np.ndarray:
    """Turn a field (3, D, H, W) from voxels along the array axes into RAS millimetres."""
    return np.einsum("ij,jdhw->idhw", np.asarray(affine, dtype=np.float64)[:3, :3], displacement)


def to_voxels(displacement: np.ndarray, affine: np.ndarray) -> np.ndarray:
    """Turn a field (3, D, H, W) from RAS millimetres into voxels along the array axes."""
    return np.einsum("ij,jdhw->idhw", np.linalg.inv(np.asarray(affine, dtype=np.float64)[:3, :3]), displacement)


def onto_moving_grid(displacement: np.ndarray, fixed_affine: np.ndarray, moving_affine: np.ndarray) -> np.ndarray:
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

    Returns
    -------
    numpy.ndarray
        float32 (3, D, H, W) on the fixed grid, in voxels of the moving grid, relative to the fixed voxel's indices.
    """
    index = np.stack(np.meshgrid(*(np.arange(n, dtype=np.float64) for n in displacement.shape[1:]), indexing="ij"))
    matrix = np.linalg.inv(moving_affine) @ fixed_affine
    place = np.einsum("ij,jdhw->idhw", matrix[:3, :3], index + displacement) + matrix[:3, 3].reshape(3, 1, 1, 1)
    return (place - index).astype(np.float32)


def pair_field(folder: str | Path, moving: str, fixed: str) -> Path:
    """Return the file of a pair's field, ``<folder>/<moving>__<fixed>.nii``.

    It is not compressed: the lowest bits of a displacement are noise, so that gzip saves little and takes ten times
    as long. A compressed one that is there already, and no plain one, is found as well.
    """
    plain = Path(folder, f"{moving}__{fixed}.nii")
    compressed = plain.with_name(plain.name + ".gz")
    return compressed if compressed.is_file() and not plain.is_file() else plain


def save_field(path: str | Path, displacement: torch.Tensor | np.ndarray, affine: np.ndarray) -> None:
    """Write a field as ITK and ANTs do: (D, H, W, 1, 3), intent vector, LPS millimetres, float32.

    Parameters
    ----------
    path
        ``.nii`` or ``.nii.gz``; written beside and renamed.
    displacement
        (3, D, H, W) in voxels.
    affine
        4x4 voxel-to-RAS matrix of the fixed grid, mm.
    """
    if isinstance(displacement, torch.Tensor):
        displacement = displacement.detach().cpu().numpy()
    if displacement.ndim != 4 or displacement.shape[0] != 3:
        raise ValueError(f"a field has shape (3, D, H, W), not {displacement.shape}")
    matrix = LPS.reshape(3, 1) * np.asarray(affine, dtype=np.float64)[:3, :3]
    # a file has its first axis fastest: written through the transpose, so that nothing is reordered a second time
    stored = np.empty((3, *displacement.shape[:0:-1]), dtype=np.float32)
    _transform_vectors(matrix, displacement, stored.transpose(0, 3, 2, 1))
    image = nib.Nifti1Image(stored.T[..., None, :], np.asarray(affine))
    image.header.set_intent("vector")
    image.header.set_xyzt_units("mm")
    with atomic_path(path) as temporary:
        save_nifti(temporary, image)


def _transform_vectors(matrix: np.ndarray, vectors: np.ndarray, result: np.ndarray) -> None:
    """Put matrix @ vectors, (3, D, H, W) each, into ``result``; computed in float64, a few slices at a time."""
    for start in range(0, vectors.shape[1], SLICES):
        part = vectors[:, start : start + SLICES]
        for row, target in zip(matrix, result, strict=True):
            # most grids lie along the axes of the world: two of three products are with zero
            terms = [np.multiply(part[axis], row[axis], dtype=np.float64) for axis in range(3) if row[axis] != 0]
            target[start : start + SLICES] = sum(terms[1:], start=terms[0]).astype(np.float32)


def load_field(path: str | Path) -> tuple[np.ndarray, np.ndarray]:
    """Read a field that ITK, ANTs or :func:`save_field` wrote.

    Returns
    -------
    displacement, affine
        float32 (3, D, H, W) in voxels, and the 4x4 voxel-to-RAS matrix of the fixed grid.

    Raises
    ------
    InputError
        The file is missing, damaged, no vector field, or not finite.
    """
    path = Path(path)
    with stored_array(path, "displacement field") as stored:
        shape, affine = stored.shape, stored.affine
        if len(shape) != 5 or shape[3:] != (1, 3):
            raise InputError(
                path,
                found=f"an array of shape {shape}",
                expected="(D, H, W, 1, 3), a vector field as ITK and ANTs write it",
            )
        data = stored.read()
    displacement = np.empty((3, *shape[:3]), dtype=np.float32)
    matrix = np.linalg.inv(affine[:3, :3]) * LPS.reshape(1, 3)
    with np.errstate(all="ignore"):  # what overflows to Inf is refused below
        _transform_vectors(matrix, np.moveaxis(data[..., 0, :], -1, 0), displacement)
    if not np.isfinite(displacement).all():
        raise InputError(path, found="displacements that are NaN or infinite", expected="finite millimetres")
    return displacement, affine
