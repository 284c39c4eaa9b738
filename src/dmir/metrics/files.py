"""Scores from files: one field, or a shard of pairs with what became of each."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd

from dmir.errors import InputError
from dmir.fields import load_field, pair_field
from dmir.metrics.score import TOPOLOGY, score_pair
from dmir.preprocess.truth import truth_of_pair
from dmir.structures import StructureSet, load_structures
from dmir.tables import read_table
from dmir.volumes import Grid, Volume, describe_grid, read_labels, same_grid

PAIR_KEYS = ("cohort", "method", "model", "moving", "fixed")


def score_files(
    field: str | Path,
    moving_labels: str | Path,
    fixed_labels: str | Path,
    structures: str | StructureSet,
    *,
    truth: str | Path | np.ndarray | None = None,
    backward: str | Path | None = None,
    interpolations: Sequence[str] = ("nearest", "linear"),
    topology: bool = True,
) -> tuple[pd.DataFrame, dict[str, Any]]:
    """Score one displacement field.

    Parameters
    ----------
    field, truth, backward
        Displacement fields as ITK and ANTs write them, on the grid of ``fixed_labels``; the truth may also be given
        as (3, D, H, W) in voxels. ``backward`` is of the same scans with moving and fixed exchanged.
    moving_labels, fixed_labels
        Label maps; the moving one may lie on a grid of its own.
    structures
        A structure set or its name.
    interpolations, topology
        As for :func:`dmir.metrics.score_pair`.

    Returns
    -------
    structures, pair
        As :func:`dmir.metrics.score_pair` gives them.

    Raises
    ------
    InputError
        A file is unusable or has no label, or the field, the fixed labels and the truth do not lie on one grid.
    """
    chosen = load_structures(structures) if isinstance(structures, str) else structures
    displacement, affine = load_field(field)
    fixed, moving = read_labels(fixed_labels, "fixed_labels"), read_labels(moving_labels, "moving_labels")
    _require_grid(fixed, displacement, affine, fixed_labels, field)
    true_field = truth if isinstance(truth, np.ndarray) else None
    if isinstance(truth, str | Path):
        true_field, true_affine = load_field(truth)
        _require_grid(fixed, true_field, true_affine, fixed_labels, truth)
    back = None
    if backward is not None:
        back, back_affine = load_field(backward)
        _require_grid(fixed, back, back_affine, fixed_labels, backward)
    return score_pair(
        displacement,
        affine,
        moving.data,
        fixed.data,
        chosen,
        moving_affine=moving.affine,
        truth=true_field,
        backward=back,
        interpolations=tuple(interpolations),
        topology=topology,
    )


def score_shard(
    records: str | Path,
    *,
    fields: str | Path,
    labels: Mapping[str, str | Path],
    truths: Mapping[str, str | Path],
    structures: str,
    pairs: Sequence[Sequence[str]] | None = None,
    interpolations: Sequence[str] = ("nearest", "linear"),
    topology: bool = True,
) -> tuple[pd.DataFrame, pd.DataFrame]:
    """Score all pairs of a shard; one that failed keeps its record with no scores.

    Where a pair was registered the other way round too, its field there and back is scored beside the rest.

    Parameters
    ----------
    records
        The table that the registration wrote, a row a pair.
    fields
        Folder of the fields, see :func:`dmir.fields.pair_field`.
    labels, truths
        Label map and, for simulated scans, true field by scan.
    structures
        Name of the structure set.
    pairs
        (moving, fixed) of the pairs that are scored; all that were registered by default.
    interpolations, topology
        As for :func:`dmir.metrics.score_pair`.

    Returns
    -------
    structures, pairs
        Tidy tables: a row a (pair, structure, interpolation), and a row a pair.
    """
    chosen = load_structures(structures)
    tables, rows = [], []
    # a scan may be called 007, and an empty reason is no missing one
    numbers = {name: [""] for name in ("seconds", "read_seconds", "write_seconds", "peak_memory_mb")}
    texts = dict.fromkeys((*PAIR_KEYS, "status", "reason", "device"), str)
    registered = read_table(records, keep_default_na=False, na_values=numbers, dtype=texts)
    wanted = None if pairs is None else {(moving, fixed) for moving, fixed in pairs}
    for row in registered.to_dict("records"):
        record = {str(key): value for key, value in row.items()}
        moving, fixed = str(record["moving"]), str(record["fixed"])
        if wanted is not None and (moving, fixed) not in wanted:
            continue
        backward = pair_field(fields, fixed, moving)
        scores: dict[str, Any] = {}
        if record["status"] == "ok":
            table, scores = score_files(
                pair_field(fields, moving, fixed),
                labels[moving],
                labels[fixed],
                chosen,
                truth=truth_of_pair(truths, moving, fixed),
                backward=backward if backward.is_file() else None,
                interpolations=interpolations,
                topology=topology,
            )
            tables.append(table.assign(**{key: record[key] for key in PAIR_KEYS})[[*PAIR_KEYS, *table.columns]])
        print(f"{moving} -> {fixed}: {record['status']} {record['reason']}", flush=True)
        rows.append({**record, **scores})
    columns = [*PAIR_KEYS, "structure", "name", "labels", "dice", "hd95", "volume_ratio"]
    columns += TOPOLOGY if topology else ()
    return pd.concat(tables, ignore_index=True) if tables else pd.DataFrame(columns=columns), pd.DataFrame(rows)


def _require_grid(
    labels: Volume, displacement: np.ndarray, affine: np.ndarray, labels_path: str | Path, field_path: str | Path
) -> None:
    depth, height, width = displacement.shape[1:]
    grid = Grid((depth, height, width), affine)
    if not same_grid(labels, grid, tolerance=1e-2):
        raise InputError(
            field_path,
            found=f"a field on {describe_grid(grid)}",
            expected=f"the grid of {labels_path}: {describe_grid(labels)}",
            remedy="A field lies on the fixed image's grid; check that these belong together.",
        )
