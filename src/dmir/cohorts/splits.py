"""Splits: which scan is learned from, chosen on, reported, or registered to. Each is a table in a file.

Published protocols stand in ``resources/splits``. A split names scans (columns ``scan, split``) or, where a publication
counts them, their places in the source's sorted order, from 1 (columns ``position, split``; ``1-255`` is a range).
Lines that begin with # are comments. A scan that the split does not name is not used.
"""

from __future__ import annotations

import re
from pathlib import Path

import pandas as pd

from dmir.cohorts.layout import read_text_table
from dmir.errors import InputError, suggestion
from dmir.structures import resources_folder


def split_names() -> list[str]:
    """Return the names of the published splits."""
    return sorted(path.stem for path in splits_folder().glob("*.csv") if not path.stem.endswith("_pairs"))


def splits_folder() -> Path:
    """Return the folder of the published splits and lists of pairs."""
    return resources_folder() / "splits"


def published_or_path(name: str | Path, key: str) -> Path:
    """Return the file that a name in ``resources/splits`` or a path means; InputError when there is none."""
    path = Path(name) if Path(name).suffix else splits_folder() / f"{name}.csv"
    if not path.is_file():
        remedy = "Check the path." if Path(name).suffix else suggestion(str(name), split_names())
        raise InputError(
            f"{key}: {name}", found="no such file", expected="a .csv file, or a name in resources/splits", remedy=remedy
        )
    return path


def read_rows(path: Path, columns: tuple[tuple[str, ...], ...]) -> pd.DataFrame:
    """Read a table of text whose columns are one of some sets; lines that begin with # are comments."""
    table = read_text_table(path, "a .csv file", comment="#")
    if tuple(table.columns) not in columns:
        expected = " or ".join(", ".join(names) for names in columns)
        raise InputError(path, found=f"the columns {', '.join(table.columns)}", expected=f"the columns {expected}")
    return table


def apply_split(
    table: pd.DataFrame, split: str | Path | None, where: str | Path, *, missing: str = "refuse"
) -> pd.DataFrame:
    """Give the scans of a source their split, and leave out those that it does not name.

    Parameters
    ----------
    table
        Of a source: a row a scan, in the source's order.
    split
        Name of a published split, or the path of a ``.csv`` file; None: the source's own column ``split``.
    where
        What the source is to the user, for error messages.
    missing
        ``"refuse"``: every scan that the split names must be there. ``"leave_out"``: those that are there are used.

    Raises
    ------
    InputError
        There is no split, the file is unusable, a scan stands in it twice or is missing.
    """
    if split is None:
        if "split" not in table.columns:
            raise InputError(
                where,
                found="no split",
                expected="what each scan is for",
                remedy="Name a .csv file with the columns scan, split in the cohort's key split, or a published split: "
                f"{', '.join(split_names())}.",
            )
        return table
    path = published_or_path(split, "split")
    rows = read_rows(path, (("scan", "split"), ("position", "split")))
    chosen = _by_position(rows, table, path, where) if "position" in rows.columns else _by_name(rows, path)
    lacking = [scan for scan in chosen if scan not in set(table["scan"])]
    if lacking and (missing == "refuse" or len(lacking) == len(chosen)):
        named = ", ".join(lacking[:10]) + (", ..." if len(lacking) > 10 else "")
        raise InputError(
            where,
            found=f"{len(lacking)} of the {len(chosen)} scans of the split {split} missing: {named}",
            expected="every scan that the split names",
            remedy="Complete the data, or set the cohort's key missing to leave_out.",
        )
    # the order of the source, not of the split: the first atlas is then the same whatever the split's order
    kept = table[table["scan"].isin(list(chosen))]
    return kept.assign(split=kept["scan"].map(chosen))


def _by_name(rows: pd.DataFrame, path: Path) -> dict[str, str]:
    twice = rows.loc[rows["scan"].duplicated(), "scan"]
    if len(twice):
        raise InputError(path, found=f"the scan {twice.iloc[0]} more than once", expected="every scan once")
    return dict(zip(rows["scan"], rows["split"], strict=True))


def _by_position(rows: pd.DataFrame, table: pd.DataFrame, path: Path, where: str | Path) -> dict[str, str]:
    """Count in the source's own order; a source that has fewer scans than that is not the published one."""
    scans, chosen = list(table["scan"]), {}
    for entry, split in rows.itertuples(index=False):
        match = re.fullmatch(r"(\d+)(?:-(\d+))?", entry)
        first, last = (int(match[1]), int(match[2] or match[1])) if match else (0, 0)
        if not 1 <= first <= last:
            raise InputError(path, found=f"the position '{entry}'", expected="a number from 1 on, or first-last")
        if last > len(scans):
            raise InputError(
                where,
                found=f"{len(scans)} scans",
                expected=f"at least {last}, which the split {path.stem} counts to",
                remedy="Places in another list of scans are other scans: complete the data, or name them in a split.",
            )
        for scan in scans[first - 1 : last]:
            if scan in chosen:
                raise InputError(path, found=f"the position of {scan} more than once", expected="every position once")
            chosen[scan] = split
    return chosen
