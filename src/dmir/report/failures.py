"""Which pairs were not registered, by which method, and why: the table of failures."""

from __future__ import annotations

import pandas as pd

from dmir.report.notes import failures_note
from dmir.report.records import PAIR, attempted_pairs, order_methods, reason_of, refuse_twice, require_columns

COLUMNS = ["cohort", "method", "model", "moving", "fixed", "reason"]
NO_RECORD = "no record"


def failures_table(pairs: pd.DataFrame, methods: list[str]) -> pd.DataFrame:
    """List the registrations that failed: one row a cohort, method, model and pair.

    Parameters
    ----------
    pairs
        A row a pair and model: cohort, method, model, moving, fixed, status, reason.
    methods
        What the run compares, in the order of the rows; one without any record in a cohort failed on all its pairs.

    Returns
    -------
    DataFrame
        cohort, method, model (empty where no model of the method has any record), moving, fixed, reason: what the
        record says or, for a pair that another method or model was given, "no record". Empty if nothing failed.
        ``attrs["note"]`` says how many registrations there are and what a failure means in the other tables.

    Raises
    ------
    InputError
        A column is missing, or the same pair is there twice.
    """
    require_columns(pairs, {*PAIR, "model", "status", "reason"}, "the table of pair scores")
    refuse_twice(pairs, [*PAIR, "model"], "the table of pair scores")
    rows: list[tuple[object, ...]] = []
    registrations = 0
    for cohort, of_cohort in pairs.groupby("cohort", sort=False):
        wanted = list(dict.fromkeys(zip(of_cohort["moving"], of_cohort["fixed"], strict=True)))
        for method in order_methods([*of_cohort["method"], *methods], methods):
            records = of_cohort[of_cohort["method"] == method]
            for model in dict.fromkeys(records["model"]) or [""]:
                failed = _reasons(records[records["model"] == model], wanted)
                rows += [(cohort, method, model, *pair, reason) for pair, reason in failed.items()]
                registrations += len(wanted)
    table = pd.DataFrame(rows, columns=COLUMNS)
    table.attrs["note"] = _note(pairs, methods, len(rows), registrations)
    return table


def _reasons(records: pd.DataFrame, wanted: list[tuple[str, str]]) -> dict[tuple[str, str], str]:
    """Return pair -> reason of what one model did not register."""
    given = records.set_index(["moving", "fixed"])
    reasons = {}
    for pair in wanted:
        if pair not in given.index:
            reasons[pair] = NO_RECORD
        elif str(given.at[pair, "status"]) != "ok":
            reasons[pair] = reason_of(given.at[pair, "reason"])
    return reasons


def _note(pairs: pd.DataFrame, methods: list[str], failures: int, registrations: int) -> str:
    attempts = attempted_pairs(pairs, methods)
    count = attempts["method"].nunique()
    of_methods = f"{count} method{'s' if count != 1 else ''}"
    if not failures:
        return f"All {registrations} registrations of {of_methods} succeeded: the table has no row."
    paragraphs = [
        f"{failures} of {registrations} registrations of {of_methods} failed. A pair that one model (seed) of a method "
        "lost counts for none of the method's models in the other tables, so that all are judged on the same pairs."
    ]
    for cohort, of_cohort in attempts.groupby("cohort", sort=False):
        paragraphs.append(failures_note(cohort, of_cohort, order_methods(of_cohort["method"], methods)))
    return "\n\n".join(paragraph for paragraph in paragraphs if paragraph)
