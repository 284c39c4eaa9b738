"""A cohort from a table of files: any scans that a user has, one row each."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import pandas as pd

from dmir.cohorts.ages import tell_unknown_ages
from dmir.cohorts.layout import read_text_table
from dmir.errors import InputError, suggestion

FILES = ("image", "labels", "mask")
NEEDED = ("scan", "subject", "image", "labels")
OPTIONAL = ("split", "session", "age", "mask")


def scan_table(path: str | Path) -> pd.DataFrame:
    """Read a table of scans.

    Parameters
    ----------
    path
        A ``.csv`` or ``.tsv`` file (UTF-8) with the columns ``scan, subject, image, labels`` and optionally ``split``
        (else a split must be named), ``session, age, mask``. Relative paths start from the table's own folder.
        ``labels`` may be empty for scans of the split train, which are only learned from.

    Returns
    -------
    pandas.DataFrame
        One row a scan, all text; paths joined to the table's folder.

    Raises
    ------
    InputError
        The table is missing or unreadable, a column is misspelt or missing, a required entry is empty, or files do
        not exist.
    """
    path = Path(path)
    table = read_rows(path, "a table of scans", "one row a scan")
    check_columns(list(table.columns), path, NEEDED, OPTIONAL)
    for name in OPTIONAL[1:]:
        if name not in table.columns:
            table[name] = ""
    check_filled(table, path, [name for name in ("scan", "subject", "split", "image") if name in table.columns])
    tell_unknown_ages(table["age"], path)
    for name in FILES:
        table[name] = [str(path.parent / entry) if entry else "" for entry in table[name]]
    check_files(table, path, FILES)
    return table.assign(source_id=table["scan"])


def read_rows(path: Path, expected: str, each: str) -> pd.DataFrame:
    """Read a table that a user wrote, .csv or .tsv, all text; InputError where it is none, or empty.

    Parameters
    ----------
    expected, each
        What it is and what its rows are, for messages.
    """
    expected = f"{expected} (.csv or .tsv)"
    if not path.is_file():
        raise InputError(path, found="no such file", expected=expected, remedy="Check the path.")
    separators = {".csv": ",", ".tsv": "\t"}
    if path.suffix.lower() not in separators:
        raise InputError(path, found=f"the ending '{path.suffix}'", expected=expected)
    table = read_text_table(path, expected, separators[path.suffix.lower()])
    if table.empty:
        raise InputError(path, found="no row", expected=each)
    return table


def check_columns(columns: list[str], path: Path, needed: Sequence[str], optional: Sequence[str]) -> None:
    """Refuse with InputError a table with columns that are missing, unknown, or there twice."""
    known = [*needed, *optional]
    missing = [name for name in needed if name not in columns]
    unknown = [name for name in columns if name not in known]
    repeated = [name for name in known if columns.count(name) > 1 or f"{name}.1" in columns]
    if repeated:
        raise InputError(path, found=f"the column {repeated[0]} more than once", expected="every column once")
    if unknown:
        open_names = [name for name in known if name not in columns]
        raise InputError(
            path,
            found=f"an unknown column '{unknown[0]}'",
            expected=f"the columns {', '.join(needed)} and optionally {', '.join(optional)}",
            remedy=suggestion(unknown[0], open_names or known),
        )
    if missing:
        raise InputError(path, found=f"no column {', '.join(missing)}", expected=f"the columns {', '.join(needed)}")


def check_filled(table: pd.DataFrame, path: Path, names: Sequence[str]) -> None:
    """Refuse with InputError rows that have nothing in a column of those named."""
    for name in names:
        empty = table.index[table[name] == ""]
        if len(empty):
            rows = ", ".join(str(k + 2) for k in empty[:10])  # the header is row 1
            raise InputError(path, found=f"nothing in the column {name} (row {rows})", expected="an entry in every row")


def check_files(table: pd.DataFrame, path: Path, names: Sequence[str]) -> None:
    """Refuse with InputError a table that names, in these columns, files that there are not."""
    files = [file for name in names for file in table[name] if file]
    missing = [file for file in dict.fromkeys(files) if not Path(file).is_file()]
    if missing:
        raise InputError(
            path,
            found=f"{len(missing)} of {len(files)} files missing: {', '.join(missing[:10])}"
            + (", ..." if len(missing) > 10 else ""),
            expected="every file that the table names",
            remedy=f"Relative paths start from {path.parent}.",
        )
