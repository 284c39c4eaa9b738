"""Overlap and volume of structures, counted for all of them in one pass over the voxels."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

from dmir.structures import positions

CHUNK = 2**16  # voxels counted at a time: their pairs of labels stay in the processor's cache


def joint_counts(a: np.ndarray, b: np.ndarray, count: int) -> np.ndarray:
    """Return how many voxels are i in ``a`` and j in ``b``, (count + 1, count + 1), of positions up to ``count``."""
    size = count + 1
    joint = np.zeros(size * size, dtype=np.int64)
    flat_a, flat_b = a.reshape(-1), b.reshape(-1)
    for start in range(0, flat_a.size, CHUNK):
        pairs = flat_a[start : start + CHUNK].astype(np.intp) * size + flat_b[start : start + CHUNK]
        joint += np.bincount(pairs, minlength=size * size)
    return joint.reshape(size, size)


def dice(a: np.ndarray, b: np.ndarray, labels: Sequence[int]) -> dict[int, float]:
    """Return the Dice coefficient of each structure, 2 |A and B| / (|A| + |B|) (Dice 1945).

    Parameters
    ----------
    a, b
        Label maps (D, H, W) on one grid.
    labels
        Ids of the structures.

    Returns
    -------
    dict
        id -> Dice; NaN for a structure that either map lacks.
    """
    joint = joint_counts(positions(a, labels), positions(b, labels), len(labels))
    values = dice_of_counts(joint)
    present = (joint.sum(axis=1) > 0) & (joint.sum(axis=0) > 0)
    return _by_id(labels, np.where(present[1:], values, np.nan))


def dice_of_counts(joint: np.ndarray) -> np.ndarray:
    """Return the Dice coefficients (n,) of a table of joint counts (n + 1, n + 1); NaN where both maps lack it."""
    both, either = np.diag(joint)[1:], (joint.sum(axis=1) + joint.sum(axis=0))[1:]
    return np.where(either > 0, 2 * both / np.maximum(either, 1), np.nan)


def volume_ratio(
    warped: np.ndarray, moving: np.ndarray, labels: Sequence[int], voxel_ratio: float = 1.0
) -> dict[int, float]:
    """Return warped volume / original volume of each structure, whose mean is the topology change TC.

    The paper names TC without a formula; this is the volume ratio that is published for the same protocol (H-SGANet,
    arXiv 2408.16719). Ratios of 1.1 and 0.9 cancel in the mean, which is why |TC - 1| belongs beside it.

    Parameters
    ----------
    warped, moving
        The moving label map after and before warping.
    labels
        Ids of the structures.
    voxel_ratio
        Volume of a voxel of ``warped`` over that of a voxel of ``moving``.

    Returns
    -------
    dict
        id -> ratio; NaN for a structure that the moving scan lacks.
    """
    after, before = (voxel_counts(positions(x, labels), len(labels)) for x in (warped, moving))
    return _by_id(labels, volume_ratio_of_counts(after, before, voxel_ratio))


def voxel_counts(a: np.ndarray, count: int) -> np.ndarray:
    """Return how many voxels each position from 1 to ``count`` has, (count,)."""
    flat = a.reshape(-1)
    parts = (np.bincount(flat[start : start + CHUNK], minlength=count + 1) for start in range(0, flat.size, CHUNK))
    return sum(parts, start=np.zeros(count + 1, dtype=np.int64))[1:]


def volume_ratio_of_counts(after: np.ndarray, before: np.ndarray, voxel_ratio: float) -> np.ndarray:
    """Return the volume ratios (n,) of numbers of voxels; NaN where there was nothing before."""
    return np.where(before > 0, after * voxel_ratio / np.maximum(before, 1), np.nan)


def _by_id(ids: Sequence[int], values: np.ndarray) -> dict[int, float]:
    return {int(i): float(v) for i, v in zip(ids, values, strict=True)}
