"""Distances between the surfaces of structures."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
from scipy.spatial import KDTree


def hd95(
    a: np.ndarray, b: np.ndarray, labels: Sequence[int], spacing: Sequence[float] = (1.0, 1.0, 1.0)
) -> dict[int, float]:
    """Return the 95th percentile of the Hausdorff distance of each structure, in mm.

    The larger of the two directed 95th percentiles, over the surface voxels (those with a face on the outside), of
    the distance to the nearest surface voxel of the other: MONAI's voxel convention. medpy pools the two directions
    before it takes the percentile, and DeepMind's surface-distance weighs by area: both differ in general.

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
    surface_a, surface_b = _surfaces(a, labels), _surfaces(b, labels)
    distances = {}
    for label in map(int, labels):
        here, there = surface_a[label], surface_b[label]
        if len(here) and len(there):
            directed = (_distances(*pair, a.shape, spacing) for pair in ((here, there), (there, here)))
            distances[label] = max(float(np.percentile(distance, 95)) for distance in directed)
        else:
            distances[label] = float("nan")
    return distances


def _surfaces(labels: np.ndarray, ids: Sequence[int]) -> dict[int, np.ndarray]:
    """Return the surface voxels of all structures, as indices into the flat array; the volume's border is outside."""
    padded = np.pad(labels, 1)  # by 0, the background
    surface = np.zeros(labels.shape, dtype=bool)
    for axis in range(3):
        inner = [slice(1, -1)] * 3
        inner[axis] = slice(None)
        changes = np.moveaxis(np.diff(padded[tuple(inner)], axis=axis) != 0, axis, 0)
        np.moveaxis(surface, axis, 0)[...] |= changes[:-1] | changes[1:]
    surface &= labels != 0
    index = np.flatnonzero(surface)
    label = labels.reshape(-1)[index]
    order = np.argsort(label, kind="stable")
    index, label = index[order], label[order]
    first, last = np.searchsorted(label, ids), np.searchsorted(label, ids, side="right")
    return {int(i): index[m:n] for i, m, n in zip(ids, first, last, strict=True)}


def _distances(here: np.ndarray, there: np.ndarray, shape: tuple[int, ...], spacing: Sequence[float]) -> np.ndarray:
    """Return the distance in mm from each voxel of one surface to the nearest of another."""
    distance = np.zeros(len(here))
    apart = ~np.isin(here, there, assume_unique=True)  # about half of two registered surfaces is shared: 0 mm
    if apart.any():
        points, others = (
            np.stack(np.unravel_index(index, shape), axis=1) * np.asarray(spacing) for index in (here[apart], there)
        )
        distance[apart] = KDTree(others, balanced_tree=False, compact_nodes=False).query(points)[0]
    return distance
