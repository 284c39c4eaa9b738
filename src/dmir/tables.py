"""Tables and records in and out: what the stages hand on beside volumes, read so that a damaged file is told as one."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pandas as pd

from dmir.errors import InputError, damaged
from dmir.volumes import atomic_path

AGAIN = "It may be truncated: make it again."


def read_scores(path: str | Path, cohort: str | None = None) -> pd.DataFrame:
    """Read a table of scores (parquet), all of it or the rows of one cohort.

    Raises
    ------
    InputError
        It is cut short, or none.
    """
    try:
        return pd.read_parquet(path, filters=None if cohort is None else [("cohort", "==", cohort)])
    except (OSError, ValueError) as error:  # pyarrow's exceptions are of these kinds
        raise _unreadable(path, error, "a complete table of scores in parquet") from error


def read_table(path: str | Path, **options: Any) -> pd.DataFrame:
    """Read a table (CSV), with options of :func:`pandas.read_csv`.

    Raises
    ------
    InputError
        It is empty, or none.
    """
    try:
        return pd.read_csv(path, **options)
    except (OSError, ValueError) as error:  # pandas's exceptions are ValueErrors
        raise _unreadable(path, error, "a complete table in CSV") from error


def read_record(path: str | Path) -> dict[str, Any]:
    """Read a record (JSON).

    Raises
    ------
    InputError
        It is cut short, or none.
    """
    try:
        record = json.loads(Path(path).read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise _unreadable(path, error, "a complete record in JSON") from error
    if not isinstance(record, dict):
        raise damaged(path, found=f"{type(record).__name__} in JSON", expected="a record in JSON", remedy=AGAIN)
    return record


def _unreadable(path: str | Path, error: Exception, expected: str) -> InputError:
    if isinstance(error, FileNotFoundError):
        return InputError(path, found="no such file", expected=expected)
    found = f"a file that cannot be read ({type(error).__name__}: {' '.join(str(error).split())[:120]})"
    return damaged(path, found=found, expected=expected, remedy=AGAIN)


def write_scores(path: str | Path, table: pd.DataFrame) -> None:
    """Write a table of scores as parquet, all at once."""
    with atomic_path(path) as temporary:
        table.to_parquet(temporary, index=False)
