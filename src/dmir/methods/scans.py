"""Registration of two scans as they come: aligned affinely, then by a method, one field for both steps."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch

from dmir.fields import onto_moving_grid, to_millimetres, to_voxels, warp, warp_labels
from dmir.methods import register
from dmir.preprocess import brain_mask, estimate_affine, normalise, resample
from dmir.volumes import Volume, require_same_grid


@dataclass(frozen=True)
class RegisteredScans:
    """What registering two scans gives.

    Attributes
    ----------
    displacement
        float32 (3, D, H, W) in voxels of the fixed grid: from the fixed scan to the moving scan in its own space.
    warped
        The moving scan on the fixed grid, interpolated once.
    warped_labels
        Its label map there, where one was given.
    affine
        4x4, fixed world -> moving world (RAS mm): the affine part.
    """

    displacement: np.ndarray
    warped: Volume
    warped_labels: Volume | None
    affine: np.ndarray


def register_scans(
    moving: Volume,
    fixed: Volume,
    *,
    method: str = "syn",
    moving_labels: Volume | None = None,
    align: bool = True,
    label_interpolation: str = "nearest",
    **parameters: Any,
) -> RegisteredScans:
    """Register a moving scan to a fixed one; both skull-stripped (zero outside the brain), each on its own grid.

    Parameters
    ----------
    method
        ``"affine"``, ``"syn"``, ``"elastix"``, or the path of a ``.safetensors`` file.
    moving_labels
        On the moving scan's grid.
    align
        Align affinely first; without it the headers are trusted.
    parameters
        Of the method.
    """
    if moving_labels is not None:
        require_same_grid(moving, moving_labels, "the moving image", "the moving labels")
    brains = [
        brain_mask(volume, None, method="none", where=name) for volume, name in ((moving, "moving"), (fixed, "fixed"))
    ]
    moving_scaled, fixed_scaled = (
        Volume(normalise(volume.data, brain.data), volume.affine)
        for volume, brain in zip((moving, fixed), brains, strict=True)
    )
    matrix = estimate_affine(moving_scaled, brains[0], fixed_scaled) if align else np.eye(4)
    aligned = resample(moving_scaled, fixed.grid, matrix)
    deformation = register(aligned, fixed_scaled, method=method, **parameters)
    displacement = _append_affine(deformation, fixed.affine, matrix)
    onto_moving = torch.from_numpy(onto_moving_grid(displacement, fixed.affine, moving.affine))[None]
    warped = warp(_batch(moving.data), onto_moving)[0, 0].numpy()
    labels = None
    if moving_labels is not None:
        warped_labels = warp_labels(_batch(moving_labels.data), onto_moving, label_interpolation)[0, 0].numpy()
        labels = Volume(warped_labels.astype(np.int32), fixed.affine)
    return RegisteredScans(displacement, Volume(warped, fixed.affine), labels, matrix)


def _append_affine(deformation: np.ndarray, fixed_affine: np.ndarray, matrix: np.ndarray) -> np.ndarray:
    """Return the field of ``x -> matrix (x + u(x))``: in voxels of the fixed grid, as ``deformation`` is."""
    index = np.stack(np.meshgrid(*(np.arange(n, dtype=np.float64) for n in deformation.shape[1:]), indexing="ij"))
    world = to_millimetres(index, fixed_affine) + fixed_affine[:3, 3].reshape(3, 1, 1, 1)
    place = world + to_millimetres(deformation, fixed_affine)
    moved = np.einsum("ij,jdhw->idhw", matrix[:3, :3], place) + matrix[:3, 3].reshape(3, 1, 1, 1)
    return to_voxels(moved - world, fixed_affine).astype(np.float32)


def _batch(data: np.ndarray) -> torch.Tensor:
    return torch.from_numpy(np.ascontiguousarray(data))[None, None]


def read_stripped(path: str | Path, mask: str | Path | None, key: str) -> Volume:
    """Read a scan and set all outside its mask to zero; without a mask it must be stripped already."""
    from dmir.volumes import read_image, read_mask

    image = read_image(path, key)
    if mask is None:
        return image
    inside = read_mask(mask, f"{key}_mask")
    require_same_grid(image, inside, path, mask)
    return Volume(np.where(inside.data, image.data, 0), image.affine)
