"""Distances between the surfaces of structures."""

from __future__ import annotations

from collections.abc import Sequence
from itertools import product

import numpy as np
from scipy.spatial import KDTree

from dmir.metrics.boxes import bounding_box
from dmir.metrics.overlap import positions

PERCENTILE = 95.0
REACH = 3  # voxels that are searched one by one around a surface voxel before a tree is planted


def hd95(
    a: np.ndarray, b: np.ndarray, labels: Sequence[int], spacing: Sequence[float] = (1.0, 1.0, 1.0)
) -> dict[int, float]:
    """Return the 95th percentile of the Hausdorff distance of each structure, in mm.

    The larger of the two directed 95th percentiles, over the surface voxels (those with a face on the outside), of
    the distance to the nearest surface voxel of the other (Huttenlocher et al. 1993): MONAI's voxel convention. medpy
    pools the two directions before it takes the percentile, and DeepMind's surface-distance weighs by area: both
    differ in general.

    Parameters
    ----------
    a, b
        Label maps (D, H, W) on one grid.
    labels
        Ids of the structures.
    spacing
        Voxel size in mm.

    Returns
    -------
    dict
        id -> mm; NaN for a structure that either map lacks.
    """
    values = hd95_of_positions(positions(a, labels), positions(b, labels), len(labels), spacing)
    return {int(i): float(v) for i, v in zip(labels, values, strict=True)}


def hd95_of_positions(a: np.ndarray, b: np.ndarray, count: int, spacing: Sequence[float]) -> np.ndarray:
    """Return the distances (count,) in mm of structures numbered from 1; NaN for one that either map lacks."""
    occupied = (a > 0) | (b > 0)
    if not occupied.any():
        return np.full(count, np.nan)
    box = bounding_box(occupied)
    # what lies beyond the volume is outside, and a layer of REACH voxels keeps every step of the search within the box
    of_a, of_b = (np.pad(_surface(x[box]), REACH) for x in (a, b))
    sides = np.asarray(spacing, dtype=np.float64)
    return np.maximum(_directed(of_a, of_b, count, sides), _directed(of_b, of_a, count, sides))


def _surface(a: np.ndarray) -> np.ndarray:
    """Return the structures' numbers at their surface voxels and 0 elsewhere."""
    padded = np.pad(a, 1)
    surface = np.zeros(a.shape, dtype=bool)
    for axis in range(3):
        inner = [slice(1, -1)] * 3
        inner[axis] = slice(None)
        line = np.moveaxis(padded[tuple(inner)], axis, 0)
        changes = line[1:] != line[:-1]
        np.moveaxis(surface, axis, 0)[...] |= changes[:-1] | changes[1:]
    return np.where(surface, a, a.dtype.type(0))


def _directed(here: np.ndarray, there: np.ndarray, count: int, spacing: np.ndarray) -> np.ndarray:
    """Return the 95th percentile (count,) of the distances in mm from each structure's surface to the same of another.

    The voxels around are searched in the order of their distance, for all structures at once. A percentile needs no
    more than the nearest 95 %: a structure whose share is found is done, and only others need a search in a tree.
    """
    flat = there.reshape(-1)
    index = np.flatnonzero(here)
    label = here.reshape(-1)[index]
    total = np.bincount(label, minlength=count + 1)
    wanted = (total > 0) & (np.bincount(flat, minlength=count + 1) > 0)
    wanted[0] = False
    rank = (total - 1) * (PERCENTILE / 100)  # between two of the sorted distances, as numpy.percentile has it
    ranks = np.floor(rank), np.ceil(rank)
    bounds = np.full((2, count + 1), np.nan)
    found = np.zeros(count + 1, dtype=np.int64)
    for distance, offsets in _shells(spacing, here.shape):
        kept = wanted[label]
        index, label = index[kept], label[kept]
        for offset in offsets:
            apart = flat[index + offset] != label
            index, label = index[apart], label[apart]
        found = np.where(wanted, total - np.bincount(label, minlength=count + 1), found)
        for bound, place in zip(bounds, ranks, strict=True):
            bound[wanted & np.isnan(bound) & (found > place)] = distance
        wanted &= np.isnan(bounds[1])
        if not wanted.any():
            break
    if wanted.any():
        left = _by_tree(index, label, flat, wanted, here.shape, spacing)
        for bound, place in zip(bounds, ranks, strict=True):
            for number in np.flatnonzero(wanted & np.isnan(bound)):
                bound[number] = left[number][int(place[number]) - found[number]]
    return (bounds[0] + (bounds[1] - bounds[0]) * (rank - ranks[0]))[1:]


def _shells(spacing: np.ndarray, shape: tuple[int, ...]) -> list[tuple[float, np.ndarray]]:
    """Return distances in mm up to REACH smallest sides of a voxel, and the steps in a flat array that go there."""
    steps = np.array(list(product(range(-REACH, REACH + 1), repeat=3)))
    distances = np.sqrt(((steps * spacing) ** 2).sum(axis=1))
    alike = distances.round(9)
    strides = np.array([shape[1] * shape[2], shape[2], 1])
    # those farther off are not all among the steps
    radii = [radius for radius in np.unique(alike) if radius <= REACH * spacing.min() + 1e-8]
    return [(float(distances[alike == radius][0]), steps[alike == radius] @ strides) for radius in radii]


def _by_tree(
    index: np.ndarray,
    label: np.ndarray,
    flat: np.ndarray,
    wanted: np.ndarray,
    shape: tuple[int, ...],
    spacing: np.ndarray,
) -> dict[int, np.ndarray]:
    """Return the sorted distances in mm of the voxels that are left, by structure."""
    other = np.flatnonzero(flat)
    other_label = flat[other]
    distances = {}
    for number in map(int, np.flatnonzero(wanted)):
        points, others = (
            np.stack(np.unravel_index(i[j == number], shape), axis=1) * spacing
            for i, j in ((index, label), (other, other_label))
        )
        tree = KDTree(others, balanced_tree=False, compact_nodes=False)
        distances[number] = np.sort(tree.query(points)[0])
    return distances
