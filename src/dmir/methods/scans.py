"""Registration of two scans as they come: aligned affinely, then by a method, one field for both steps."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch

from dmir.fields import invert, onto_moving_grid, warp, warp_labels
from dmir.methods import describe, register
from dmir.methods.network_grid import field_on_grid, network_grid
from dmir.preprocess import brain_mask, estimate_affine, normalise, resample
from dmir.training.weights import read_metadata
from dmir.volumes import Grid, Volume, read_image, read_labels, read_mask, reorient, require_same_grid


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
    fixed_labels_on_moving
        The fixed scan's label map on the moving scan's own grid, through the inverse, where one was given.
    """

    displacement: np.ndarray
    warped: Volume
    warped_labels: Volume | None
    affine: np.ndarray
    fixed_labels_on_moving: Volume | None = None


def register_scans(
    moving: Volume,
    fixed: Volume,
    *,
    method: str = "syn",
    moving_labels: Volume | None = None,
    fixed_labels: Volume | None = None,
    align: bool = True,
    label_interpolation: str = "nearest",
    **parameters: Any,
) -> RegisteredScans:
    """Register a moving scan to a fixed one; both skull-stripped (zero outside the brain), each on its own grid.

    A classical method works on the fixed scan's own grid; a network on one with the voxels and at least the shape of
    its training (:func:`~dmir.methods.network_grid.network_grid`), from which its field is brought to the fixed
    scan's. The order and the direction of the axes in the files change nothing.

    Parameters
    ----------
    method
        ``"affine"``, ``"syn"``, ``"elastix"``, or the path of a ``.safetensors`` file.
    moving_labels
        On the moving scan's grid.
    fixed_labels
        On the fixed scan's grid: they are brought to the moving scan.
    align
        Align affinely first; without it the headers are trusted.
    label_interpolation
        ``"nearest"`` or ``"linear"``, see :func:`dmir.fields.warp_labels`.
    parameters
        Of the method.

    Raises
    ------
    InputError
        Labels lie on another grid, a scan is not stripped, the method or its weights cannot be used, or the affine
        finds nothing.
    """
    describe(method, **parameters)  # a mistake is told before minutes of work
    trained = _trained_grid(method, parameters)
    for name, scan, labels in (("moving", moving, moving_labels), ("fixed", fixed, fixed_labels)):
        if labels is not None:
            require_same_grid(scan, labels, f"the {name} image", f"the {name} labels")
    images = [reorient(scan, "RAS") for scan in (moving, fixed)]
    brains = [
        brain_mask(image, None, method="none", where=name)
        for image, name in zip(images, ("moving", "fixed"), strict=True)
    ]
    matrix = _affine(images, brains) if align else np.eye(4)
    grid = images[1].grid if trained is None else network_grid(trained, brains[1])
    moving_there, fixed_there = (
        _on_grid(image, brain, grid, transform)
        for image, brain, transform in zip(images, brains, (matrix, np.eye(4)), strict=True)
    )
    deformation = register(moving_there, fixed_there, method=method, **parameters)
    return _results(
        moving, fixed, deformation, grid, matrix, moving_labels, fixed_labels, interpolation=label_interpolation
    )


def _trained_grid(method: str, parameters: dict[str, Any]) -> dict[str, Any] | None:
    """Return what a network's weights say of the grid of their training, None for a method that is no network."""
    weights = parameters.get("weights", method if str(method).endswith(".safetensors") else None)
    if weights is None:
        return None
    metadata = weights[1] if isinstance(weights, tuple) else read_metadata(weights)
    grid: dict[str, Any] = metadata["grid"]
    return grid


def _affine(images: list[Volume], brains: list[Volume]) -> np.ndarray:
    """Return the matrix that takes the fixed world to the moving one."""
    moving, fixed = (
        Volume(normalise(image.data, brain.data), image.affine) for image, brain in zip(images, brains, strict=True)
    )
    return estimate_affine(moving, brains[0], fixed)


def _on_grid(image: Volume, brain: Volume, grid: Grid, transform: np.ndarray) -> Volume:
    """Resample an image once and bring its grey values to [0, 1], as preprocessing does."""
    mask = resample(Volume(brain.data.astype(np.float32), brain.affine), grid, transform).data > 0.5
    return Volume(normalise(resample(image, grid, transform).data, mask), grid.affine)


def _results(
    moving: Volume,
    fixed: Volume,
    deformation: np.ndarray,
    grid: Grid,
    matrix: np.ndarray,
    moving_labels: Volume | None,
    fixed_labels: Volume | None,
    interpolation: str,
) -> RegisteredScans:
    """Join deformation and affine, ``x -> matrix (x + u(x))``, and warp everything once, there and back."""
    seen = Grid(moving.shape, np.linalg.inv(matrix) @ moving.affine)  # the moving grid in the fixed world
    forward = field_on_grid(deformation, grid.affine, fixed.grid)
    # the affine is only another matrix of the moving scan's grid
    displacement = onto_moving_grid(forward, fixed.affine, np.linalg.inv(matrix) @ fixed.affine)
    onto_moving = _batch(onto_moving_grid(forward, fixed.affine, seen.affine))
    warped = warp(_batch(moving.data[None]), onto_moving)[0, 0].numpy()
    warped_labels = None if moving_labels is None else _warped(moving_labels, onto_moving, fixed, interpolation)
    brought_back = None
    if fixed_labels is not None:
        inverse = invert(_batch(deformation))[0].numpy()
        onto_fixed = onto_moving_grid(field_on_grid(inverse, grid.affine, seen), seen.affine, fixed.affine)
        brought_back = _warped(fixed_labels, _batch(onto_fixed), moving, interpolation)
    return RegisteredScans(displacement, Volume(warped, fixed.affine), warped_labels, matrix, brought_back)


def _warped(labels: Volume, sampling: torch.Tensor, like: Volume, interpolation: str) -> Volume:
    data = warp_labels(_batch(labels.data[None]), sampling, interpolation)[0, 0].numpy()
    return Volume(data.astype(np.int32), like.affine)


def _batch(data: np.ndarray) -> torch.Tensor:
    return torch.from_numpy(np.ascontiguousarray(data))[None]


def read_stripped(path: str | Path, mask: str | Path | None, key: str) -> Volume:
    """Read a scan and set all outside its mask to zero; without a mask it must be stripped already."""
    image = read_image(path, key)
    if mask is None:
        return image
    inside = read_mask(mask, f"{key}_mask")
    require_same_grid(image, inside, path, mask)
    return Volume(np.where(inside.data, image.data, 0), image.affine)


def read_labels_of(scan: Volume, path: str | Path | None, key: str) -> Volume | None:
    """Read the label map of a scan that is read already, None where there is none; its grid must be the scan's."""
    if path is None:
        return None
    labels = read_labels(path, f"{key}_labels")
    require_same_grid(scan, labels, f"the {key} image", f"{key}_labels: {path}")
    return labels
