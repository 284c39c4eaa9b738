"""What methods do to the topology of structures: the table of TC and of Betti numbers."""

from __future__ import annotations

import math

import pandas as pd

from dmir.errors import InputError
from dmir.report.notes import AFFINE_NOTE, failures_note
from dmir.report.records import (
    INTERPOLATIONS,
    PAIR,
    PAIR_COLUMNS,
    STRUCTURE_COLUMNS,
    attempted_pairs,
    keep_scored,
    order_methods,
    refuse_twice,
    require_columns,
)

OF_PAIRS = {
    "tc": "tc_{}",
    "tc_deviation": "tc_deviation_{}",
    "topology_change": "topology_change_{}",
    "topology_floor": "topology_floor_{}",
    "topology_change_structures": "topology_change_structures_{}",
    "topology_floor_structures": "topology_floor_structures_{}",
    "labels_vanished": "labels_vanished_{}",
}
OF_STRUCTURES = ("components_change", "tunnels_change", "cavities_change")
COLUMNS = [
    "cohort", "labels", "method", "n", "failed", "tc", "tc_deviation", "topology_change", "topology_change_sd",
    "topology_floor", *OF_STRUCTURES, "structures_scored", "topology_change_structures", "topology_floor_structures",
    "labels_vanished",
]  # fmt: skip


def topology_table(structures: pd.DataFrame, pairs: pd.DataFrame, methods: list[str]) -> pd.DataFrame:
    """Compare what the methods do to the topology of structures: one row a cohort, interpolation and method.

    A number of a method is the mean over pairs; of a pair, the mean over the method's models (seeds). What each number
    is stands in ``docs/scores.md``.

    Parameters
    ----------
    structures
        A row a pair, model, structure and interpolation, as for :func:`dmir.report.tables.comparison_table`, with
        components_change, tunnels_change, cavities_change.
    pairs
        A row a pair and model: status, reason, and for each interpolation ``topology_change_<labels>`` and the others.
    methods
        What the run compares, in the order of the rows; one without any record has a row all the same.

    Returns
    -------
    DataFrame
        cohort, labels (the interpolation), method, n, failed, ``tc`` and ``tc_deviation`` (mean \\|TC-1\\|),
        ``topology_change`` with its sd over pairs, ``topology_floor``; its parts, of each the sum over structures of
        absolute changes; ``structures_scored``, ``topology_change_structures``, ``topology_floor_structures``,
        ``labels_vanished``. What a reader must know is in ``attrs["note"]``.

    Raises
    ------
    InputError
        A column is missing, for instance because the pairs were scored without topology, or a record is there twice.
    """
    schemes = [labels for labels in INTERPOLATIONS if f"topology_change_{labels}" in pairs]
    if not schemes:
        raise InputError(
            "the table of pair scores",
            found="no column topology_change_nearest or topology_change_linear",
            expected="scores of topology",
            remedy="score the pairs with topology",
        )
    require_columns(structures, {*STRUCTURE_COLUMNS, *OF_STRUCTURES}, "the table of structure scores")
    wanted = {name.format(labels) for name in OF_PAIRS.values() for labels in schemes}
    require_columns(pairs, PAIR_COLUMNS | wanted, "the table of pair scores")
    refuse_twice(structures, [*PAIR, "model", "structure", "labels"], "the table of structure scores")
    refuse_twice(pairs, [*PAIR, "model"], "the table of pair scores")
    attempts = attempted_pairs(pairs, methods)
    scored, parts = keep_scored(pairs, attempts), keep_scored(structures, attempts)
    rows = []
    for cohort in dict.fromkeys(attempts["cohort"]):
        here = attempts[attempts["cohort"] == cohort]
        for labels in schemes:
            for method in order_methods(here["method"], methods):
                tried = here.loc[here["method"] == method, "scored"]
                row = {"cohort": cohort, "labels": labels, "method": method}
                row |= {"n": int(tried.sum()), "failed": int((~tried).sum())}
                row |= _of_pairs(scored[(scored["cohort"] == cohort) & (scored["method"] == method)], labels)
                row |= _of_structures(parts[(parts["cohort"] == cohort) & (parts["method"] == method)], labels)
                rows.append(row)
    table = pd.DataFrame(rows, columns=COLUMNS)
    table.attrs["note"] = _note(attempts, methods, schemes)
    return table


def _of_pairs(pairs: pd.DataFrame, labels: str) -> dict[str, float]:
    """Return the means over pairs, given one method's records of one cohort."""
    columns = {name.format(labels): column for column, name in OF_PAIRS.items()}
    by_pair = pairs.groupby(["moving", "fixed"], sort=False)[list(columns)].mean().rename(columns=columns)
    return {**by_pair.mean(), "topology_change_sd": by_pair["topology_change"].std(ddof=1)}


def _of_structures(structures: pd.DataFrame, labels: str) -> dict[str, float]:
    """Return the means over pairs of the summed absolute changes, and how many structures have one in any pair."""
    known = structures[structures["labels"] == labels].dropna(subset=list(OF_STRUCTURES))
    if known.empty:
        return dict.fromkeys(OF_STRUCTURES, math.nan)
    sizes = known.assign(**{name: known[name].abs() for name in OF_STRUCTURES})
    by_model = sizes.groupby([*PAIR, "model"], sort=False)[list(OF_STRUCTURES)].sum()
    means = by_model.groupby(["moving", "fixed"], sort=False).mean().mean()
    return {**means, "structures_scored": int(known["structure"].nunique())}


def _note(attempts: pd.DataFrame, methods: list[str], schemes: list[str]) -> str:
    paragraphs = [
        "TC is the mean over structures of warped volume / original volume: 1 also where growing and shrinking cancel; "
        "in |TC−1| they do not.",
        "Topology change: by how much warping changes the numbers of components, tunnels and cavities of a structure "
        "(Betti numbers; a structure is 26-connected, its surroundings 6-connected), in absolute values, summed over "
        "structures; the three columns after its floor are its parts. Means over pairs; ± is the standard deviation "
        "over pairs.",
        "Warping onto a grid alone changes topology, without any fold: a wall a voxel thick breaks. The floor is the "
        "same count for a field of about the same size that does not fold: a change near its floor is of the "
        "resampling, not of the method. The floor is no lower bound, for that field lacks the finest detail. A method "
        "that moves little changes little: the changes are not ranked; read them beside the floor and the Dice.",
    ]
    if len(schemes) > 1:
        paragraphs.append(
            "Nearest interpolation adds steps and single voxels; linear interpolation (of one-hot maps, the largest "
            "wins) breaks and fills what is a voxel or two thin. Which of them inflates the counts more depends on the "
            "size of a voxel: compare only what is of one interpolation and one grid."
        )
    if (attempts["method"] == "affine").any():
        paragraphs.append(f"{AFFINE_NOTE} Its labels are those of the preprocessed scans: nothing is warped here.")
    for cohort, of_cohort in attempts.groupby("cohort", sort=False):
        paragraphs.append(failures_note(cohort, of_cohort, order_methods(of_cohort["method"], methods)))
    return "\n\n".join(paragraph for paragraph in paragraphs if paragraph)
