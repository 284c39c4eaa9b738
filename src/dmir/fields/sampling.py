"""Volumes resampled at x + u(x): the spatial transformer, and the coordinates that it samples at."""

from __future__ import annotations

from itertools import product

import torch
import torch.nn.functional as F

from dmir import filters

CORNERS = tuple(product((0, 1), repeat=3))  # of a cell of eight voxels


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
        components.append(normalised(coordinate + displacement[:, axis], shape[axis]))
    return torch.stack(components, dim=-1)


def normalised(coordinate: torch.Tensor, size: int) -> torch.Tensor:
    """Return coordinates in voxels of an axis as ``grid_sample`` counts them: from -1, its first voxel, to 1."""
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


def resize_displacement(displacement: torch.Tensor, shape: tuple[int, int, int]) -> torch.Tensor:
    """Resample a field (B, 3, d, h, w) to another shape, trilinearly, and rescale its values to the new voxels."""
    old = displacement.shape[2:]
    if tuple(old) == tuple(shape):
        return displacement
    resized = F.interpolate(displacement, size=tuple(shape), mode="trilinear", align_corners=True)
    # align_corners=True keeps the corner voxels in place, so a voxel shrinks by (n - 1) / (m - 1)
    factor = [(new - 1) / max(before - 1, 1) for before, new in zip(old, shape, strict=True)]
    return resized * filters.numbers(factor, resized).view(1, 3, 1, 1, 1)
