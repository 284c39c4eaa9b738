"""Overlap and volume of structures, counted for all of them in one pass over the voxels."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np


def _positions(labels: np.ndarray, ids: Sequence[int]) -> np.ndarray:
    """Replace each id by its position in ``ids`` plus one; all others become 0."""
    highest = max(int(labels.max(initial=0)), *ids, 0)
    lookup = np.zeros(highest + 1, dtype=np.int32)
    lookup[list(ids)] = np.arange(1, len(ids) + 1)
    return lookup[np.clip(labels, 0, None)]


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
    count = len(labels) + 1
    joint = np.bincount((_positions(a, labels) * count + _positions(b, labels)).ravel(), minlength=count * count)
    joint = joint.reshape(count, count)
    in_a, in_b, in_both = joint.sum(1)[1:], joint.sum(0)[1:], np.diag(joint)[1:]
    present = (in_a > 0) & (in_b > 0)
    values = np.where(present, 2 * in_both / np.maximum(in_a + in_b, 1), np.nan)
    return {int(i): float(v) for i, v in zip(labels, values, strict=True)}


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
    after, before = (
        np.bincount(_positions(x, labels).ravel(), minlength=len(labels) + 1)[1:] for x in (warped, moving)
    )
    values = np.where(before > 0, after * voxel_ratio / np.maximum(before, 1), np.nan)
    return {int(i): float(v) for i, v in zip(labels, values, strict=True)}
