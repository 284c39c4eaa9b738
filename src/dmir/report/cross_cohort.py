"""How methods fare on a cohort that networks were not trained on: the cross-cohort table."""

from __future__ import annotations

import math
from typing import Any

import pandas as pd

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
        A row an unseen cohort and method: cohort, method, n, dice (on that cohort), dice_sd, dice_gain (over affine),
        own_dice, own_dice_gain, gain_kept (dice_gain / own_dice_gain, %; NaN where less than :data:`LEAST_GAIN` was
        gained on the own cohort), nonpositive_jacobian_forward. Gains are NaN without the method ``affine``.
    """
    require_columns(comparison, {"cohort", "method", "n", "dice", "dice_sd"}, "the comparison table")
    affine = comparison[comparison["method"] == "affine"].set_index("cohort")["dice"]
    own = comparison[comparison["cohort"] == trained_on].set_index("method")["dice"]
    rows: list[dict[str, Any]] = []
    for record in comparison[comparison["cohort"] != trained_on].to_dict("records"):
        gain = record["dice"] - affine.get(record["cohort"], math.nan)
        own_dice = own.get(record["method"], math.nan)
        own_gain = own_dice - affine.get(trained_on, math.nan)
        rows.append(
            {
                **{key: record[key] for key in ("cohort", "method", "n", "dice", "dice_sd")},
                "dice_gain": gain,
                "own_dice": own_dice,
                "own_dice_gain": own_gain,
                "gain_kept": 100 * gain / own_gain if own_gain >= LEAST_GAIN else math.nan,
                "nonpositive_jacobian_forward": record["nonpositive_jacobian_forward"],
            }
        )
    table = pd.DataFrame(rows)
    labels = ", ".join(map(str, comparison["labels"].unique()))
    table.attrs["note"] = (
        f"Networks were trained on {trained_on} alone; the classical methods are not trained. Cohorts have different "
        "structures: compare gains over the affine alignment, not the Dice itself. Labels are warped by "
        f"{labels} interpolation; ± is the standard deviation over pairs."
    )
    return table
