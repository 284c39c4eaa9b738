"""What a scanner makes of a subject: a pose, the template resampled once, a painted head, tone, field and noise."""

from __future__ import annotations

from functools import lru_cache

import numpy as np
import torch
from scipy import ndimage
from scipy.spatial.transform import Rotation

from dmir.cohorts.template import SPACING, template, working_grid
from dmir.structures import load_label_map, load_structures, remap_labels
from dmir.volumes import Grid

ORIENTATIONS = ("RAS", "LAS", "LPS", "LIA", "PSR", "RPI", "AIR", "LSP")
HALF_FIELD_OF_VIEW = (92.0, 112.0, 98.0)  # mm: half a head, and some air
# grey value of the painted head by distance from the brain's hull, white matter = 1: fluid, bone, fat, air
HEAD_DISTANCES = (0.0, 2.5, 3.5, 8.0, 9.0, 14.0, 15.5)  # mm
HEAD_VALUES = (0.18, 0.18, 0.06, 0.08, 1.05, 0.85, 0.0)
SLAB = 16  # slices sampled at a time; the coordinates of a whole head would take half a gigabyte


def random_pose(
    generator: np.random.Generator, rotation: float, translation: float, scaling: float, shearing: float
) -> np.ndarray:
    """Draw the 4x4 matrix from the scanner's world to the template's: turned about the brain's middle, then shifted."""
    image = template()[0]
    middle = (image.affine @ [*(np.array(image.shape) - 1) / 2, 1])[:3]
    turn = Rotation.from_euler("xyz", generator.uniform(-rotation, rotation, 3), degrees=True).as_matrix()
    stretch = np.diag(1 + generator.uniform(-scaling, scaling, 3))
    stretch[np.triu_indices(3, 1)] = generator.uniform(-shearing, shearing, 3)
    pose = np.eye(4)
    pose[:3, :3] = turn @ stretch
    pose[:3, 3] = middle - pose[:3, :3] @ (middle + generator.uniform(-translation, translation, 3))
    return pose


def random_scanner(generator: np.random.Generator, pose: np.ndarray) -> tuple[Grid, str]:
    """Draw the scanner's grid (axes R, A, S) and the orientation in which it stores its volumes."""
    image = template()[0]
    middle = np.linalg.inv(pose) @ image.affine @ [*(np.array(image.shape) - 1) / 2, 1]
    spacing = np.full(3, generator.uniform(1.0, 1.2))
    spacing[generator.integers(3)] = generator.uniform(1.0, 1.3)  # along the slices
    half = np.array(HALF_FIELD_OF_VIEW) + generator.uniform(-2, 2, 3)
    depth, height, width = (2 * int(n) for n in np.ceil(half / spacing))
    affine = np.diag([*np.round(spacing, 3), 1.0])
    centre = middle[:3] + generator.uniform(-3, 3, 3)  # the operator's aim is not perfect
    affine[:3, 3] = np.round(centre - affine[:3, :3] @ (np.array([depth, height, width]) - 1) / 2, 2)
    return Grid((depth, height, width), affine), ORIENTATIONS[generator.integers(len(ORIENTATIONS))]


def acquire(
    generator: np.random.Generator, forward: np.ndarray, pose: np.ndarray, native: Grid, contrast: float
) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Resample the template, once, at phi(P y) for every voxel of the scanner, and paint the head.

    Returns
    -------
    grey, ids, mask
        float32 with white matter = 1, int16, bool; all of the scanner's shape.
    """
    (image, labels, mask), grid = template(), working_grid()
    white = np.median(image.data[np.isin(labels.data, (2, 41))])
    brain = np.maximum(image.data / white * _structure_gains(generator, contrast), HEAD_VALUES[0]) * mask.data
    # the channels of each lattice, sampled together
    anatomy = torch.from_numpy(np.stack([brain, mask.data]).astype(np.float32))
    segmentation = torch.from_numpy(labels.data.astype(np.float32))[None]
    texture = ndimage.gaussian_filter(generator.standard_normal(grid.shape, dtype=np.float32), 1.5)
    head = torch.from_numpy(np.stack([_hull_distance(), texture / texture.std()]))
    field = torch.from_numpy(forward)

    grey = np.empty(native.shape, dtype=np.float32)
    ids = np.empty(native.shape, dtype=np.int16)
    inside = np.empty(native.shape, dtype=bool)
    to_template = pose @ native.affine
    for start in range(0, native.shape[0], SLAB):
        stop = min(start + SLAB, native.shape[0])
        posed = _points(to_template, (start, stop), native.shape)
        point = posed + _sample(field, posed, grid.affine)
        value, weight = _sample(anatomy, point, image.affine).numpy()
        distance, bumps = _sample(head, point, grid.affine).numpy()
        grey[start:stop] = value + (1 - weight) * _head(distance, bumps)
        ids[start:stop] = _sample(segmentation, point, image.affine, "nearest", "zeros")[0].numpy()
        inside[start:stop] = weight > 0.5
    return grey, ids, inside


def receive(
    generator: np.random.Generator, grey: np.ndarray, gamma: float, bias_field: float, noise: float
) -> np.ndarray:
    """Give a grey image (white matter = 1) the scanner's tone curve, receive field, noise and scale; int16."""
    coefficients = generator.normal(size=(4, 4, 4))
    order = np.add.outer(np.add.outer(np.arange(4), np.arange(4)), np.arange(4))
    coefficients[(order == 0) | (order > 3)] = 0
    field: np.ndarray = coefficients
    for n in grey.shape:  # a sum of products of Legendre polynomials, one axis at a time
        basis = np.polynomial.legendre.legvander(np.linspace(-1, 1, n), 3)
        field = np.tensordot(field, basis, axes=(0, 1))
    field *= bias_field / field.std()
    signal = np.clip(grey, 0, None) ** np.float32(1 + generator.uniform(-gamma, gamma)) * np.exp(
        field, dtype=np.float32
    )
    real = signal + np.float32(noise) * generator.standard_normal(grey.shape, dtype=np.float32)
    imaginary = np.float32(noise) * generator.standard_normal(grey.shape, dtype=np.float32)
    scaled = np.hypot(real, imaginary) * np.float32(generator.uniform(300, 1500))
    return np.clip(np.round(scaled), 0, np.iinfo(np.int16).max).astype(np.int16)


@lru_cache(maxsize=1)
def _hull_distance() -> np.ndarray:
    """Return the distance in mm from the brain's hull on the working grid, negative inside.

    The hull is the brain's closing by a ball of 17 mm: a skull has no sulci.
    """
    radius = 17.0
    mask, grid = template()[2], working_grid()
    to_mask = np.linalg.inv(mask.affine) @ grid.affine
    brain = ndimage.affine_transform(mask.data.astype(np.float32), to_mask, output_shape=grid.shape, order=1) > 0.5
    dilated = ndimage.distance_transform_edt(~brain) * SPACING <= radius
    return (radius - ndimage.distance_transform_edt(dilated) * SPACING).astype(np.float32)


def _structure_gains(generator: np.random.Generator, contrast: float) -> np.ndarray:
    """Return the factor of each template voxel's grey value: one a structure, shared by its two sides."""
    structures = load_structures("oasis28").table
    own = [
        name.removeprefix(f"{side} ") for name, side in zip(structures["name"], structures["hemisphere"], strict=True)
    ]
    drawn = {name: generator.normal(1.0, contrast) for name in dict.fromkeys(own)}
    factors = np.ones(structures["id"].max() + 1, dtype=np.float32)
    factors[structures["id"]] = [drawn[name] for name in own]
    return factors[remap_labels(template()[1].data, load_label_map("aparc+aseg_to_oasis28"))]


def _points(affine: np.ndarray, rows: tuple[int, int], shape: tuple[int, int, int]) -> torch.Tensor:
    """Return the world points (3, d, H, W) in mm of a slab of voxels."""
    axes = [torch.arange(*rows), torch.arange(shape[1]), torch.arange(shape[2])]
    matrix = torch.from_numpy(affine).to(torch.float32)
    terms = [
        matrix[:3, k].view(3, 1, 1, 1) * axis.view([-1 if j == k else 1 for j in range(3)])
        for k, axis in enumerate(axes)
    ]
    return terms[0] + terms[1] + terms[2] + matrix[:3, 3].view(3, 1, 1, 1)


def _sample(
    channels: torch.Tensor, points: torch.Tensor, affine: np.ndarray, mode: str = "bilinear", padding: str = "border"
) -> torch.Tensor:
    """Sample channels (C, D, H, W), on an upright grid with that affine, at world points (3, d, h, w) in mm."""
    coordinates = [
        (points[k] - float(affine[k, 3])) * (2 / (float(affine[k, k]) * (channels.shape[k + 1] - 1))) - 1
        for k in (2, 1, 0)
    ]
    grid = torch.stack(coordinates, dim=-1)[None]
    return torch.nn.functional.grid_sample(channels[None], grid, mode, padding, align_corners=True)[0]


def _head(distance: np.ndarray, bumps: np.ndarray) -> np.ndarray:
    """Return the grey value of what lies round the brain: fluid, bone, fat, air, of uneven thickness and texture."""
    depth = distance * (1 - 0.04 * np.clip(bumps, -2, 2))
    return np.interp(depth, HEAD_DISTANCES, HEAD_VALUES) * (1 + 0.12 * bumps)
