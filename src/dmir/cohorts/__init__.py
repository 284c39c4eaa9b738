"""Cohorts: tables of scans with a split and an atlas, whatever they come from.

A source is a module of this package with a function ``scan_table``; it is imported when a cohort first needs it.
Adding one means one new file and one line in :data:`SOURCES`.
"""

from __future__ import annotations

import importlib
import re
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

import pandas as pd

from dmir.errors import InputError, suggestion

SOURCES = {
    "simulated": "dmir.cohorts.simulated",
    "table": "dmir.cohorts.table",
}
COLUMNS = ("scan", "subject", "session", "age", "split", "image", "labels", "mask", "truth")
REQUIRED = ("scan", "subject", "split", "image", "labels")
SPLITS = ("train", "val", "test", "atlas")
SAFE_NAME = re.compile(r"[A-Za-z0-9][A-Za-z0-9._-]*")


def scan_table(source: str, **parameters: Any) -> pd.DataFrame:
    """List the scans of a cohort, without reading an image.

    Parameters
    ----------
    source
        A key of :data:`SOURCES`.
    **parameters
        Of the source's own ``scan_table``.

    Returns
    -------
    pandas.DataFrame
        One row a scan with the columns :data:`COLUMNS`, all text; what is absent is ``""``.

    Raises
    ------
    InputError
        The source is unknown, or its table does not pass :func:`check_scan_table`.
    """
    if source not in SOURCES:
        raise InputError(
            "source", found=f"'{source}'", expected="a source of scans", remedy=suggestion(source, SOURCES)
        )
    table = importlib.import_module(SOURCES[source]).scan_table(**parameters)
    check_scan_table(table, str(parameters.get("path", f"{source} cohort")))
    return table.reindex(columns=list(COLUMNS), fill_value="").reset_index(drop=True)


def check_scan_table(table: pd.DataFrame, where: str | Path, splits: Sequence[str] = ()) -> None:
    """Refuse a table of scans that no fair comparison can be made from.

    Parameters
    ----------
    table
        At least the columns :data:`REQUIRED`; no missing values.
    where
        What the table is to the user, for error messages.
    splits
        The splits that will be used and so must have a scan each, for instance ``("train", "val")``.

    Raises
    ------
    InputError
        A column is missing, a name is repeated or unsafe as a file name, a split is unknown or empty, there is not
        exactly one atlas, or a subject stands in two splits.
    """
    missing = [name for name in REQUIRED if name not in table.columns]
    if missing:
        raise InputError(
            where,
            found=f"no column {', '.join(missing)}",
            expected=f"the columns {', '.join(REQUIRED)}",
            remedy=f"There are: {', '.join(map(str, table.columns)) or 'none'}.",
        )
    _check_names(table["scan"].astype(str), where)
    _check_splits(table["split"].astype(str), where, splits)
    _check_subjects(table, where)


def _check_names(names: pd.Series, where: str | Path) -> None:
    unsafe = [name for name in names if not SAFE_NAME.fullmatch(name) or "__" in name]
    if unsafe:
        raise InputError(
            where,
            found=f"scan names {_some(repr(name) for name in unsafe)}",
            expected="letters, digits, '.', '_' and '-', a letter or digit first, and no '__' (they name files)",
            remedy="Rename them in the column scan.",
        )
    # two names that differ in case alone are one file on some file systems
    repeated = names[names.str.lower().duplicated(keep=False)]
    if len(repeated):
        raise InputError(
            where,
            found=f"the scan names {_some(sorted(set(repeated)))} more than once",
            expected="a name of its own for every scan",
        )


def _check_splits(column: pd.Series, where: str | Path, needed: Sequence[str]) -> None:
    for split in dict.fromkeys(column):
        if split not in SPLITS:
            raise InputError(
                where, found=f"split '{split}'", expected="train, val, test or atlas", remedy=suggestion(split, SPLITS)
            )
    atlases = int((column == "atlas").sum())
    if atlases != 1:
        raise InputError(
            where,
            found=f"{atlases or 'no'} scan{'s' if atlases > 1 else ''} with split 'atlas'",
            expected="exactly one, which all others are registered to",
        )
    empty = [split for split in needed if split not in set(column)]
    if empty:
        raise InputError(
            where,
            found=f"no scan with split {', '.join(repr(split) for split in empty)}",
            expected="at least one in each split that is used",
        )


def _check_subjects(table: pd.DataFrame, where: str | Path) -> None:
    """Refuse a subject in two splits: what was learned on one of its scans is not tested on another."""
    splits = table.groupby(table["subject"].astype(str))["split"].agg(lambda column: sorted(set(column)))
    shared = splits[splits.map(len) > 1]
    if len(shared):
        named = _some(f"{subject} ({', '.join(several)})" for subject, several in shared.items())
        raise InputError(
            where,
            found=f"the same subject in several splits: {named}",
            expected="all scans of a subject in one split",
            remedy="Move them, or give different people different names in the column subject.",
        )


def _some(items: Iterable[object], most: int = 10) -> str:
    """Join the first ten, and say how many more there are."""
    words = [str(item) for item in items]
    more = f" and {len(words) - most} more" if len(words) > most else ""
    return ", ".join(words[:most]) + more
