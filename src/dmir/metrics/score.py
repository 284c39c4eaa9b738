"""All scores of one pair, from its field and its label maps, or from what another program made of the labels."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
import pandas as pd
import torch

from dmir.errors import InputError
from dmir.fields import onto_moving_grid, warp_labels_each
from dmir.metrics.endpoint import endpoint_error, inverse_consistency_error
from dmir.metrics.folding import Folding, measure_folding
from dmir.metrics.overlap import dice_of_counts, joint_counts, positions, volume_ratio_of_counts, voxel_counts
from dmir.metrics.surface import hd95_of_positions
from dmir.metrics.topology import betti_of_positions, fold_free_part
from dmir.structures import StructureSet
from dmir.volumes import Grid, Volume, same_grid

TOPOLOGY = ("components_change", "tunnels_change", "cavities_change")
UNKNOWN = np.full((1, 3), np.nan)  # changes of the topology of structures, as many as there are


def score_pair(
    displacement: np.ndarray | None,
    affine: np.ndarray,
    moving_labels: np.ndarray | None,
    fixed_labels: np.ndarray,
    structures: StructureSet,
    *,
    moving_affine: np.ndarray | None = None,
    warped_labels: Mapping[str, np.ndarray] | None = None,
    mask: np.ndarray | None = None,
    truth: np.ndarray | None = None,
    backward: np.ndarray | None = None,
    interpolations: Sequence[str] = ("nearest", "linear"),
    topology: bool = True,
) -> tuple[pd.DataFrame, dict[str, Any]]:
    """Score a field: the one scorer of all methods.

    Where labels were warped elsewhere there need be no field, and what it would tell is NaN: folding, SDlogJ, the
    distances and the floor of the topology. Without the moving label map too, a structure that the warped one lacks may
    have vanished or never have been there: it has no Dice, and volumes and topology cannot be compared.

    Parameters
    ----------
    displacement
        float32 (3, D, H, W) in voxels of the fixed grid; None where only ``warped_labels`` are known.
    affine
        4x4 voxel-to-RAS matrix of the fixed grid, mm.
    moving_labels, fixed_labels
        Label maps; the fixed one (D, H, W), the moving one on the same grid unless ``moving_affine`` says otherwise.
        A field needs both.
    structures
        What is scored.
    moving_affine
        4x4 matrix of the moving label map's own grid.
    warped_labels
        By interpolation, moving label maps (D, H, W) that another program warped: they are scored as they are, in place
        of what the field would make of ``moving_labels``.
    mask
        bool (D, H, W), where the field is judged; by default where the fixed label map is not 0.
    truth
        True field (3, D, H, W) in voxels.
    backward
        The method's field for the same scans with moving and fixed exchanged, (3, D, H, W) in voxels.
    interpolations
        How labels are warped: ``"nearest"``, ``"linear"`` (one-hot linear + argmax), or both.
    topology
        Whether the changes of topology are told, and their floor.

    Returns
    -------
    structures, pair
        A row a (structure, interpolation): structure, name, labels, dice, hd95 (mm), volume_ratio and the changes of
        components, tunnels and cavities. And the scores of the pair: folding (%), SDlogJ, TC, changes of topology
        beside those of a fold-free field, endpoint error (mm; NaN without a truth), inverse consistency error (mm; NaN
        without a field backward), how many structures are missing
        from a scan and how many vanish when they are warped.

    Raises
    ------
    InputError
        There is nothing to score: no label, no voxel in the mask, or arrays that do not belong together.
    """
    given = dict(warped_labels or {})
    wanted = [name for name in interpolations if displacement is not None or name in given]
    inside = _judged(displacement, moving_labels, fixed_labels, mask, given)
    own = affine if moving_affine is None else moving_affine
    moving = None
    if moving_labels is not None:
        moving = _Moving(moving_labels, structures.ids, None if own is affine else (affine, own))
    before = np.full(len(structures.ids), np.nan) if moving is None else moving.voxels
    fixed = positions(fixed_labels, structures.ids)
    voxel_ratio = float(abs(np.linalg.det(affine[:3, :3]) / np.linalg.det(own[:3, :3])))
    pair = _folding_scores(displacement, inside)
    warped = {name: positions(_smallest(labels), structures.ids) for name, labels in given.items() if name in wanted}
    if displacement is not None and moving is not None:
        warped |= moving.warped(displacement, [name for name in wanted if name not in given])
    changes = _topology_changes(moving, displacement, warped) if topology else {}
    tables = []
    for interpolation in wanted:
        columns = _overlap_columns(warped[interpolation], fixed, before, voxel_ratio, Grid((1, 1, 1), affine))
        vanished = (columns["volume_ratio"] == 0) & ~np.isnan(columns["dice"])
        pair[f"tc_{interpolation}"] = _mean(columns["volume_ratio"])
        pair[f"tc_deviation_{interpolation}"] = _mean(np.abs(columns["volume_ratio"] - 1))
        pair[f"labels_vanished_{interpolation}"] = float("nan") if moving is None else int(vanished.sum())
        if topology:
            of_field, of_floor = changes[interpolation]
            columns |= dict(zip(TOPOLOGY, np.broadcast_to(of_field, (len(before), 3)).T, strict=True))
            pair |= _topology_scores(interpolation, of_field, of_floor)
        names = [structures.names[i] for i in structures.ids]
        rows = {"structure": structures.ids, "name": names, "labels": interpolation}
        tables.append(pd.DataFrame({**rows, **columns}))
    pair |= _distances(displacement, affine, inside, truth, backward)
    pair["labels_missing"] = int(tables[0]["dice"].isna().sum())
    return pd.concat(tables, ignore_index=True), pair


def dice_before(moving: Volume, fixed: Volume, structures: StructureSet) -> float:
    """Return the mean Dice of two label maps as they lie in the world, nearest voxels compared."""
    zero = np.zeros((3, *fixed.shape), dtype=np.float32)
    grids = None if same_grid(moving, fixed) else (fixed.affine, moving.affine)
    start = _Moving(moving.data, structures.ids, grids)
    there = start.positions if grids is None else start.warped(zero, ["nearest"])["nearest"]
    joint = joint_counts(there, positions(fixed.data, structures.ids), len(structures.ids))
    in_both = (start.voxels > 0) & (joint.sum(axis=0)[1:] > 0)
    return _mean(np.where(in_both, dice_of_counts(joint), np.nan))


def _judged(
    displacement: np.ndarray | None,
    moving_labels: np.ndarray | None,
    fixed_labels: np.ndarray,
    mask: np.ndarray | None,
    warped_labels: Mapping[str, np.ndarray],
) -> np.ndarray:
    """Return the voxels where the field is judged, once the arrays are known to belong together."""
    if displacement is None and not warped_labels:
        raise InputError("displacement", found="neither a field nor warped labels", expected="one of them")
    if displacement is not None and moving_labels is None and not warped_labels:
        raise InputError("moving_labels", found="none beside a field", expected="the label map that the field warps")
    grid, what = (fixed_labels.shape, "fixed labels") if displacement is None else (displacement.shape[1:], "field")
    given = (
        ("fixed_labels", fixed_labels),
        ("mask", mask),
        *((f"warped_labels {k}", v) for k, v in warped_labels.items()),
    )
    for name, array in given:
        if array is not None and array.shape != grid:
            raise InputError(name, found=f"shape {array.shape}", expected=f"{grid}, the grid of the {what}")
    for name, array in (("moving_labels", moving_labels), ("fixed_labels", fixed_labels)):
        if array is not None and not array.any():
            raise InputError(name, found="no labelled voxel", expected="at least one structure")
    inside = fixed_labels > 0 if mask is None else np.asarray(mask, dtype=bool)
    if not inside.any():
        raise InputError("mask", found="no voxel", expected="the voxels where the field is judged")
    return inside


class _Moving:
    """The moving label map, as it is and as fields take it onto the fixed grid."""

    def __init__(
        self, labels: np.ndarray, ids: Sequence[int], grids: tuple[np.ndarray, np.ndarray] | None = None
    ) -> None:
        self.ids, self.grids = ids, grids
        self.labels = _smallest(labels)
        self.positions = positions(self.labels, ids)
        self.voxels = voxel_counts(self.positions, len(ids))

    def warped(self, displacement: np.ndarray, interpolations: Sequence[str]) -> dict[str, np.ndarray]:
        """Return the positions (D, H, W) of the warped structures, by interpolation.

        Labels outside the set are warped too: they compete for a voxel like any other.
        """
        sampling = displacement if self.grids is None else onto_moving_grid(displacement, *self.grids)
        labels = torch.from_numpy(np.ascontiguousarray(self.labels))[None, None]
        maps = warp_labels_each(labels, torch.from_numpy(np.ascontiguousarray(sampling))[None], interpolations)
        return {name: positions(warped[0, 0].numpy(), self.ids) for name, warped in maps.items()}


def _topology_changes(
    moving: _Moving | None, displacement: np.ndarray | None, warped: dict[str, np.ndarray]
) -> dict[str, tuple[np.ndarray, np.ndarray]]:
    """Return the changes of (b0, b1, b2), (n, 3) each, by a field and by its fold-free part, by interpolation."""
    if moving is None:
        return dict.fromkeys(warped, (UNKNOWN, UNKNOWN))
    count = len(moving.ids)
    before = betti_of_positions(moving.positions, count)
    floor = {} if displacement is None else moving.warped(fold_free_part(displacement), list(warped))
    known = np.where(moving.voxels > 0, 1.0, np.nan)[:, None]  # of what was not there nothing changes
    return {
        name: (
            (betti_of_positions(warped[name], count) - before) * known,
            (betti_of_positions(floor[name], count) - before) * known if floor else UNKNOWN,
        )
        for name in warped
    }


def _smallest(labels: np.ndarray) -> np.ndarray:
    """Return a label map in the smallest type that holds it: what is smaller is read faster."""
    if labels.min() >= 0 and labels.max() <= 255:
        return labels.astype(np.uint8, copy=False)
    kinds = (np.int16, np.int32, np.int64)  # torch has no arithmetic of larger unsigned ones
    lowest, highest = int(labels.min()), int(labels.max())
    kind = next(kind for kind in kinds if np.iinfo(kind).min <= lowest and highest <= np.iinfo(kind).max)
    return labels.astype(kind, copy=False)


def _folding_scores(displacement: np.ndarray | None, inside: np.ndarray) -> dict[str, Any]:
    nothing = Folding(*[float("nan")] * 4)
    found = nothing if displacement is None else measure_folding(displacement, inside)
    return {
        "nonpositive_jacobian_forward": found.nonpositive_forward,
        "nonpositive_jacobian_central": found.nonpositive_central,
        "nondiffeomorphic_volume": found.nondiffeomorphic_volume,
        "sdlogj": found.sdlogj,
    }


def _distances(
    displacement: np.ndarray | None,
    affine: np.ndarray,
    inside: np.ndarray,
    truth: np.ndarray | None,
    backward: np.ndarray | None,
) -> dict[str, float]:
    """Return mean and 95th percentile of the distances in mm, NaN where there is nothing to compare with."""
    unknown = np.array([np.nan])
    error = loop = unknown
    if displacement is not None and truth is not None:
        error = endpoint_error(displacement, truth, affine, inside)
    if displacement is not None and backward is not None:
        loop = inverse_consistency_error(displacement, backward, affine, inside)
    return {
        "endpoint_error": float(error.mean()),
        "endpoint_error_p95": float(np.percentile(error, 95)),
        "inverse_consistency_error": float(loop.mean()),
    }


def _overlap_columns(
    warped: np.ndarray, fixed: np.ndarray, before: np.ndarray, voxel_ratio: float, grid: Grid
) -> dict[str, np.ndarray]:
    """Return Dice, HD95 and volume ratio (n,) of all structures.

    A structure that either scan lacks has no Dice: the scans', not the warped one's, for a method that makes a
    structure vanish has a Dice of 0 to show for it. Where the moving scan is not known (NaN ``before``), the warped map
    must do.
    """
    joint = joint_counts(warped, fixed, len(before))
    in_moving = np.where(np.isnan(before), joint.sum(axis=1)[1:], before) > 0
    in_both_scans = in_moving & (joint.sum(axis=0)[1:] > 0)
    return {
        "dice": np.where(in_both_scans, dice_of_counts(joint), np.nan),
        "hd95": hd95_of_positions(warped, fixed, len(before), grid.spacing.tolist()),
        "volume_ratio": volume_ratio_of_counts(joint.sum(axis=1)[1:], before, voxel_ratio),
    }


def _topology_scores(interpolation: str, of_field: np.ndarray, of_floor: np.ndarray) -> dict[str, float]:
    """Return the sums of absolute changes and the numbers of structures changed, of a field and of its floor."""
    scores: dict[str, float] = {}
    for name, changes in (("change", of_field), ("floor", of_floor)):
        sizes, known = np.nansum(np.abs(changes), axis=1), changes is not UNKNOWN
        scores[f"topology_{name}_{interpolation}"] = int(sizes.sum()) if known else float("nan")
        scores[f"topology_{name}_structures_{interpolation}"] = int((sizes > 0).sum()) if known else float("nan")
    return scores


def _mean(values: np.ndarray) -> float:
    """Return the mean of what is not NaN; NaN of nothing."""
    known = values[~np.isnan(values)]
    return float(known.mean()) if known.size else float("nan")
