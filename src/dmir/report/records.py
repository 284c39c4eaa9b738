"""Which records count: the checks of the score tables, and the pairs that every model of a method registered."""

from __future__ import annotations

from collections.abc import Iterable

import pandas as pd

from dmir.cohorts.ages import known_ages
from dmir.errors import InputError

PAIR = ["cohort", "method", "moving", "fixed"]
INTERPOLATIONS = ("nearest", "linear")
FIELD_SCORES = [
    "nonpositive_jacobian_forward",
    "nonpositive_jacobian_central",
    "nondiffeomorphic_volume",
    "sdlogj",
]
STRUCTURE_COLUMNS = {*PAIR, "model", "structure", "name", "labels", "dice", "hd95"}
PAIR_COLUMNS = {*PAIR, "model", "status", "reason", "seconds", "peak_memory_mb", *FIELD_SCORES, "endpoint_error"}


def require_columns(table: pd.DataFrame, columns: Iterable[str], where: str) -> None:
    """Refuse with InputError a table that lacks columns."""
    missing = sorted(set(columns) - set(table.columns))
    if missing:
        raise InputError(where, found=f"columns {sorted(map(str, table.columns))}", expected=f"also {missing}")


def check_scores(structures: pd.DataFrame, pairs: pd.DataFrame, primary: str) -> None:
    """Refuse with InputError score tables that lack columns or hold a score twice."""
    if primary not in INTERPOLATIONS:
        raise InputError("labels", found=repr(primary), expected=f"one of {', '.join(INTERPOLATIONS)}")
    require_columns(structures, STRUCTURE_COLUMNS, "the table of structure scores")
    require_columns(pairs, {*PAIR_COLUMNS, f"tc_{primary}", f"tc_deviation_{primary}"}, "the table of pair scores")
    if pairs.empty:
        raise InputError("the table of pair scores", found="no row", expected="at least one pair")
    refuse_twice(structures, [*PAIR, "model", "structure", "labels"], "the table of structure scores")
    refuse_twice(pairs, [*PAIR, "model"], "the table of pair scores")


def refuse_twice(table: pd.DataFrame, key: list[str], where: str) -> None:
    """Refuse with InputError a table that holds the same record twice."""
    twice = table.duplicated(key)
    if twice.any():
        first = dict(table.loc[twice, key].iloc[0])
        raise InputError(where, found=f"{int(twice.sum())} rows twice, first {first}", expected="each once")


def order_methods(present: Iterable[str], wanted: Iterable[str]) -> list[str]:
    """Return the methods that are present: in the order wanted, then those that nobody named, as they come."""
    present = list(dict.fromkeys(present))
    return list(dict.fromkeys([m for m in wanted if m in present] + present))


def attempted_pairs(pairs: pd.DataFrame, methods: Iterable[str] = ()) -> pd.DataFrame:
    """Return one row a (cohort, method, moving, fixed) that should be scored: ``scored`` and, if not, the ``reason``.

    What should be scored: each pair that any method of the cohort was given, by every method of the cohort's records
    and by those named. A pair counts as scored when every model of the method registered it; one model's failure makes
    it a failed pair, so that all seeds are judged on the same pairs and ``scored + failed`` is the number of pairs.
    """
    rows = []
    methods = list(methods)
    for cohort, of_cohort in pairs.groupby("cohort", sort=False):
        wanted = list(dict.fromkeys(zip(of_cohort["moving"], of_cohort["fixed"], strict=True)))
        for method in dict.fromkeys([*of_cohort["method"], *methods]):
            records = of_cohort[of_cohort["method"] == method]
            models = max(1, records["model"].nunique())
            given = dict(iter(records.groupby(["moving", "fixed"], sort=False)))
            for moving, fixed in wanted:
                part = given.get((moving, fixed))
                reason = "" if part is not None and len(part) == models else "no record"
                if part is not None and (part["status"] != "ok").any():
                    reason = "; ".join(dict.fromkeys(map(reason_of, part.loc[part["status"] != "ok", "reason"])))
                rows.append((cohort, method, moving, fixed, reason == "", reason))
    return pd.DataFrame(rows, columns=[*PAIR, "scored", "reason"])


def reason_of(told: object) -> str:
    """Return why a pair failed as one line."""
    return " ".join(str(told).split()) or "not told"


def keep_scored(table: pd.DataFrame, attempts: pd.DataFrame) -> pd.DataFrame:
    """Return the rows of the pairs that every model of the method registered."""
    return table.merge(attempts.loc[attempts["scored"], PAIR], on=PAIR, how="inner")


def ages_known(scans: pd.DataFrame) -> bool:
    """Return whether a cohort's table of scans knows the age of any scan that methods are tested on."""
    require_columns(scans, {"split"}, "the table of scans")
    return "age" in scans and bool(known_ages(scans.loc[scans["split"] == "test", "age"]).notna().any())
