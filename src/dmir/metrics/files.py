"""Scores from files: one pair, or a shard of pairs with what became of each."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd

from dmir.doubts import doubt
from dmir.errors import InputError
from dmir.fields import pair_field
from dmir.metrics.score import TOPOLOGY, dice_before, score_pair
from dmir.preprocess.quality import swapped_sides
from dmir.preprocess.truth import truth_of_pair
from dmir.structures import StructureSet, load_structures, misfit, present_ids, structures_of_ids
from dmir.tables import read_table
from dmir.transforms import Field, read
from dmir.volumes import Volume, describe_grid, read_labels, read_mask, require_same_grid, same_grid

PAIR_KEYS = ("cohort", "method", "model", "moving", "fixed")


def score_files(
    field: str | Path | None,
    moving_labels: str | Path | None,
    fixed_labels: str | Path,
    structures: str | StructureSet | None,
    *,
    convention: str | None = None,
    warped_labels: str | Path | None = None,
    warped_by: str | None = None,
    mask: str | Path | None = None,
    truth: str | Path | np.ndarray | None = None,
    backward: str | Path | None = None,
    before: bool = False,
    interpolations: Sequence[str] = ("nearest", "linear"),
    topology: bool = True,
) -> tuple[pd.DataFrame, dict[str, Any]]:
    """Score one pair: its displacement field, or the labels that another program warped, or both.

    Parameters
    ----------
    field, truth, backward
        Displacement fields on the grid of ``fixed_labels``, or affines, as :func:`dmir.transforms.read` reads them;
        the truth may also be given as (3, D, H, W) in voxels. ``backward`` is of the same scans with moving and fixed
        exchanged.
    moving_labels, fixed_labels
        Label maps; the moving one may lie on a grid of its own. A field needs both.
    structures
        A structure set or its name; None for all labels that the maps have.
    convention
        Of the field, where header and values do not prove it.
    warped_labels
        The moving labels as another program warped them, on the grid of ``fixed_labels``; what only a field tells is
        NaN where there is none.
    warped_by
        How that program interpolated them, ``"nearest"`` or ``"linear"``; without it they count as ``"nearest"``, which
        is told.
    mask
        Where the field is judged, by default where ``fixed_labels`` is not 0.
    before
        Whether the pair has a ``dice_before`` too: the mean Dice of the label maps as they lie in the world.
    interpolations, topology
        As for :func:`dmir.metrics.score_pair`.

    Returns
    -------
    structures, pair
        As :func:`dmir.metrics.score_pair` gives them.

    Raises
    ------
    InputError
        A file is unusable or has no label, or what should lie on the grid of the fixed labels does not.
    """
    fixed = read_labels(fixed_labels, "fixed_labels")
    moving = None if moving_labels is None else read_labels(moving_labels, "moving_labels")
    if moving is None and field is not None:
        raise InputError("moving_labels", found=f"none beside the field {field}", expected="the labels that it warps")
    found = None if field is None else read_field(field, fixed, fixed_labels, convention, moving)
    warped = _read_beside(read_labels, warped_labels, "warped_labels", fixed, fixed_labels)
    judged = _read_beside(read_mask, mask, "mask", fixed, fixed_labels)
    given = [(moving, moving_labels), (fixed, fixed_labels), (warped, warped_labels)]
    maps = [(volume, path) for volume, path in given if volume is not None and path is not None]
    chosen = load_structures(structures) if isinstance(structures, str) else structures
    chosen = chosen or structures_of_ids(number for volume, _ in maps for number in np.unique(volume.data))
    _tell_of_ids({path: volume for volume, path in maps}, chosen)
    _tell_of_sides(maps, chosen)
    if warped is not None and warped_labels is not None:
        _tell_of_warped(warped, warped_labels, fixed, moving, chosen, known=warped_by is not None)
    true_field, back = (
        read_field(one, fixed, fixed_labels).displacement if isinstance(one, str | Path) else one
        for one in (truth, backward)
    )
    table, pair = score_pair(
        None if found is None else found.displacement,
        fixed.affine if found is None else found.affine,
        None if moving is None else moving.data,
        fixed.data,
        chosen,
        moving_affine=None if moving is None else moving.affine,
        warped_labels=None if warped is None else {warped_by or "nearest": warped.data},
        mask=None if judged is None else judged.data,
        truth=true_field,
        backward=back,
        interpolations=tuple(interpolations),
        topology=topology,
    )
    if before:
        pair["dice_before"] = float("nan") if moving is None else dice_before(moving, fixed, chosen)
    return table, pair


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
    registered = read_table(records)
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


def _tell_of_ids(maps: Mapping[str | Path, Volume], structures: StructureSet) -> None:
    """Warn of label maps that hardly have the ids of a structure set; InputError where they have none in common."""
    ids = {path: present_ids(labels.data) for path, labels in maps.items()}
    strange = {path: found for path, own in ids.items() if (found := misfit(own, structures))}
    shared = set(structures.ids).intersection(*ids.values())
    for path, found in strange.items():
        if not shared:
            remedy = "Name the structure set of these label maps, or bring their ids to it."
            raise InputError(path, found=found, expected=f"a label map of {structures.name}", remedy=remedy)
        doubt(path, found=found, done="the structures that both label maps have are scored")


def read_field(
    path: str | Path,
    fixed: Volume,
    fixed_path: str | Path,
    convention: str | None = None,
    moving: Volume | None = None,
) -> Field:
    """Read a field of any convention, or an affine, as one field on the grid of the fixed labels; InputError if not."""
    transform = read(path, convention, fixed, moving)
    for line in transform.assumed:
        doubt(path, found=line, done=f"scored as {transform.convention}")
    first = transform.steps[0]
    if not isinstance(first, Field):
        return transform.on(fixed.grid)
    if not same_grid(fixed, first.grid, tolerance=1e-2):
        raise InputError(
            path,
            found=f"a field on {describe_grid(first.grid)}",
            expected=f"the grid of {fixed_path}: {describe_grid(fixed)}",
            remedy="A field lies on the fixed image's grid; check that these belong together.",
        )
    return transform.on()


def _read_beside(
    reader: Callable[..., Volume], path: str | Path | None, key: str, fixed: Volume, fixed_path: str | Path
) -> Volume | None:
    """Read a volume that lies on the grid of the fixed labels, if there is one; InputError where it does not."""
    if path is None:
        return None
    volume = reader(path, key)
    require_same_grid(fixed, volume, fixed_path, f"{key}: {path}")
    return volume


def _tell_of_warped(
    warped: Volume,
    path: str | Path,
    fixed: Volume,
    moving: Volume | None,
    structures: StructureSet,
    *,
    known: bool,
) -> None:
    """Warn of what cannot be known of warped labels, and of a map that is none."""
    if not known:
        doubt(path, found="how its labels were interpolated is not known", done="counted as nearest")
    if np.array_equal(warped.data, fixed.data):
        doubt(path, found="the same labels as the fixed ones", done="scored as it is: look whether it is their file")
    if moving is not None and same_grid(moving, warped) and np.array_equal(warped.data, moving.data):
        doubt(path, found="the same labels as the moving ones: nothing was warped", done="scored as it is")
    if moving is None:
        there, here = (set(np.unique(volume.data)) for volume in (fixed, warped))
        gone = [structures.names[number] for number in structures.ids if number in there and number not in here]
        if gone:
            doubt(
                path,
                found=f"{len(gone)} structures of the fixed labels are not in it ({', '.join(gone[:5])}"
                f"{', ...' if len(gone) > 5 else ''})",
                done="left out: whether the moving scan had them is not known without its labels",
            )


def _tell_of_sides(maps: Iterable[tuple[Volume, str | Path]], structures: StructureSet) -> None:
    """Warn of a label map in which left lies on the right."""
    for labels, path in maps:
        swapped, paired = swapped_sides(labels, structures)
        if swapped > paired / 2:
            found = f"{swapped} of {paired} left structures lie on the right of this label map"
            doubt(path, found=found, done="scored as it is: look at the orientation in its header")
