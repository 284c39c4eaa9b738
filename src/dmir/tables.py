"""Tables and records in and out: what the stages hand on beside volumes, read so that a damaged file is told as one."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pandas as pd

from dmir.errors import InputError, damaged
from dmir.volumes import atomic_path

AGAIN = "It may be truncated: make it again."
TEXT = frozenset(
    (
        *("cohort", "method", "model", "network", "moving", "fixed", "scan", "subject", "session", "name", "score"),
        *("labels", "status", "reason", "device", "flags", "warnings", "cut_off", "published_source"),
        *("algorithm", "library", "source_name", "hemisphere", "colour", "source"),
    )
)
"""Columns of text in the tables that are read back: a name may look like a number, or like what is missing."""


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


def read_table(path: str | Path, *, text: bool = False) -> pd.DataFrame:
    """Read a table (CSV) as it was written: ``007``, ``1_2344``, ``NA`` and ``None`` are names where names stand.

    Parameters
    ----------
    path
        A table of the pipeline's, or of resources.
    text
        All columns are text, "" where nothing stands. Else those of :data:`TEXT` are, and in the others pandas finds
        numbers and truth values; what is missing there is NaN.

    Raises
    ------
    InputError
        It is empty, or none.
    """
    try:
        columns = pd.read_csv(path, nrows=0).columns
        words = [name for name in columns if text or name in TEXT]
        missing = {name: [""] for name in columns if name not in words}
        return pd.read_csv(path, dtype=dict.fromkeys(words, str), keep_default_na=False, na_values=missing)
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
