"""How methods fare on a cohort that networks were not trained on: the cross-cohort table."""

from __future__ import annotations

import math
from typing import Any

import pandas as pd

from dmir.report.names import method_name
from dmir.report.records import require_columns

LEAST_GAIN = 0.01  # Dice gained on the own cohort, below which a share of it says nothing


def cross_cohort_table(comparison: pd.DataFrame, trained_on: str) -> pd.DataFrame:
    """Compare each method on its networks' own cohort with each other cohort.

    Cohorts differ in their structures, so that their Dice cannot be set against each other; what a method gains over
    the affine alignment can.

    Parameters
    ----------
    comparison
        From :func:`dmir.report.tables.comparison_table`.
    trained_on
        The cohort that the networks were trained on.

    Returns
    -------
    DataFrame
        A row an unseen cohort and method: cohort, method, n, labels, dice (on that cohort), dice_sd, dice_gain (over
        affine), own_dice, own_dice_gain, gain_kept (dice_gain / own_dice_gain, %; NaN where less than
        :data:`LEAST_GAIN` was gained on the own cohort or Dice was lost on the other), nonpositive_jacobian_forward.
        Gains are NaN without the method ``affine``. Where a method misses pairs of either cohort, ``attrs["note"]``
        says so.
    """
    needed = {"cohort", "method", "n", "failed", "labels", "dice", "dice_sd", "nonpositive_jacobian_forward"}
    require_columns(comparison, needed, "the comparison table")
    affine = comparison[comparison["method"] == "affine"].set_index("cohort")["dice"]
    own = comparison[comparison["cohort"] == trained_on].set_index("method")["dice"]
    rows: list[dict[str, Any]] = []
    for record in comparison[comparison["cohort"] != trained_on].to_dict("records"):
        gain = record["dice"] - affine.get(record["cohort"], math.nan)
        own_dice = own.get(record["method"], math.nan)
        own_gain = own_dice - affine.get(trained_on, math.nan)
        rows.append(
            {
                **{key: record[key] for key in ("cohort", "method", "n", "labels", "dice", "dice_sd")},
                "dice_gain": gain,
                "own_dice": own_dice,
                "own_dice_gain": own_gain,
                "gain_kept": 100 * gain / own_gain if own_gain >= LEAST_GAIN and gain >= 0 else math.nan,
                "nonpositive_jacobian_forward": record["nonpositive_jacobian_forward"],
            }
        )
    gains = ["dice_gain", "own_dice", "own_dice_gain", "gain_kept", "nonpositive_jacobian_forward"]
    table = pd.DataFrame(rows, columns=["cohort", "method", "n", "labels", "dice", "dice_sd", *gains])
    labels = ", ".join(map(str, comparison["labels"].unique()))
    paragraphs = [
        f"Networks were trained on {trained_on} alone; the classical methods are not trained. Cohorts have different "
        "structures: compare gains over the affine alignment, not the Dice itself. Gain kept is the gain as a share of "
        f"that on {trained_on}, where that is at least {LEAST_GAIN:g} and neither is a loss. Labels are warped by "
        f"{labels} interpolation; ± is the standard deviation over pairs.",
        _failures(comparison, trained_on),
    ]
    table.attrs["note"] = "\n\n".join(paragraph for paragraph in paragraphs if paragraph)
    return table


def _failures(comparison: pd.DataFrame, trained_on: str) -> str:
    """Say which methods miss pairs, on the own cohort too: their gain is then over the affine of other pairs."""
    told = []
    for cohort, rows in comparison[comparison["failed"] > 0].groupby("cohort", sort=False):
        counts = ", ".join(
            f"{method_name(str(method))} {n} of {n + failed}"
            for method, n, failed in zip(rows["method"], rows["n"], rows["failed"], strict=True)
        )
        told.append(f"{cohort}{' (own cohort)' if cohort == trained_on else ''}: {counts}")
    if not told:
        return ""
    return (
        f"Pairs scored, where some failed: {'; '.join(told)}. A gain sets the mean over a method's own pairs against "
        "that of the affine alignment over its own: where they are not the same pairs, it is partly their difference."
    )
