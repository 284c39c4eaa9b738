"""All scores of one pair, from its field and its label maps."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
import pandas as pd
import torch

from dmir.fields import onto_moving_grid, warp_labels
from dmir.metrics.endpoint import endpoint_error
from dmir.metrics.folding import nondiffeomorphic_volume, nonpositive_jacobian, sdlogj
from dmir.metrics.overlap import dice, volume_ratio
from dmir.metrics.surface import hd95
from dmir.structures import StructureSet
from dmir.volumes import Grid


def score_pair(
    displacement: np.ndarray,
    affine: np.ndarray,
    moving_labels: np.ndarray,
    fixed_labels: np.ndarray,
    structures: StructureSet,
    *,
    moving_affine: np.ndarray | None = None,
    mask: np.ndarray | None = None,
    truth: np.ndarray | None = None,
    interpolations: Sequence[str] = ("nearest", "linear"),
) -> tuple[pd.DataFrame, dict[str, Any]]:
    """Score a field: the one scorer of all methods.

    Parameters
    ----------
    displacement
        float32 (3, D, H, W) in voxels of the fixed grid.
    affine
        4x4 voxel-to-RAS matrix of the fixed grid, mm.
    moving_labels, fixed_labels
        Label maps; the fixed one (D, H, W), the moving one on the same grid unless ``moving_affine`` says otherwise.
    structures
        What is scored.
    moving_affine
        4x4 matrix of the moving label map's own grid.
    mask
        bool (D, H, W), where the field is judged; by default where the fixed label map is not 0.
    truth
        True field (3, D, H, W) in voxels.
    interpolations
        How labels are warped: ``"nearest"``, ``"linear"`` (one-hot linear + argmax), or both.

    Returns
    -------
    structures, pair
        A row a (structure, interpolation): structure, name, labels, dice, hd95 (mm), volume_ratio. And the scores of
        the pair: folding (%), SDlogJ, TC, endpoint error (mm; NaN without a truth), how many structures are missing.
    """
    own = affine if moving_affine is None else moving_affine
    sampling = displacement if own is affine else onto_moving_grid(displacement, affine, own)
    spacing = Grid((1, 1, 1), affine).spacing
    voxel_ratio = float(abs(np.linalg.det(affine[:3, :3]) / np.linalg.det(own[:3, :3])))
    inside = fixed_labels > 0 if mask is None else mask
    pair: dict[str, Any] = {
        "nonpositive_jacobian_forward": nonpositive_jacobian(displacement, "forward", inside),
        "nonpositive_jacobian_central": nonpositive_jacobian(displacement, "central", inside),
        "nondiffeomorphic_volume": nondiffeomorphic_volume(displacement, inside),
        "sdlogj": sdlogj(displacement, inside),
    }
    tables = []
    for interpolation in interpolations:
        warped = warp_labels(
            torch.from_numpy(np.ascontiguousarray(moving_labels))[None, None],
            torch.from_numpy(np.ascontiguousarray(sampling))[None],
            interpolation,
        )[0, 0].numpy()
        ratios = volume_ratio(warped, moving_labels, structures.ids, voxel_ratio)
        overlaps = dice(warped, fixed_labels, structures.ids)
        distances = hd95(warped, fixed_labels, structures.ids, spacing.tolist())
        pair[f"tc_{interpolation}"] = _mean(ratios.values())
        pair[f"tc_deviation_{interpolation}"] = _mean(abs(r - 1) for r in ratios.values())
        columns = {"dice": overlaps, "hd95": distances, "volume_ratio": ratios}
        tables.append(_rows(structures, interpolation, columns))
    table = pd.concat(tables, ignore_index=True)
    error = endpoint_error(displacement, truth, affine, inside) if truth is not None else np.array([np.nan])
    pair["endpoint_error"] = float(error.mean())
    pair["endpoint_error_p95"] = float(np.percentile(error, 95))
    pair["labels_missing"] = int(tables[0]["dice"].isna().sum())
    return table, pair


def _rows(structures: StructureSet, interpolation: str, columns: dict[str, dict[int, float]]) -> pd.DataFrame:
    ids = structures.ids
    names = [structures.names[i] for i in ids]
    scores = {name: [values[i] for i in ids] for name, values in columns.items()}
    return pd.DataFrame({"structure": ids, "name": names, "labels": interpolation, **scores})


def _mean(values: Any) -> float:
    """Return the mean of what is not NaN; NaN of nothing."""
    known = [value for value in values if not np.isnan(value)]
    return float(np.mean(known)) if known else float("nan")
