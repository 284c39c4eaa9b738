"""Pairs: which scan is registered to which."""

from __future__ import annotations

from itertools import permutations
from pathlib import Path

import pandas as pd

from dmir.cohorts.splits import published_or_path, read_rows
from dmir.errors import InputError, suggestion

PROTOCOLS = ("scan_to_atlas", "atlas_to_scan", "all")


def registration_pairs(
    table: pd.DataFrame, protocol: str | Path = "scan_to_atlas", split: str = "test"
) -> list[tuple[str, str]]:
    """Return the pairs of a cohort as (moving, fixed), in the table's order.

    Parameters
    ----------
    table
        Of scans, with the columns ``scan, split``.
    protocol
        ``"scan_to_atlas"``: every scan of the split to every atlas; ``"atlas_to_scan"``: every atlas to every scan;
        ``"all"``: every ordered pair of two different scans of the split; else a table of pairs (columns
        ``moving, fixed``): the path of a ``.csv`` file or a name in ``resources/splits``.
    split
        Whose scans.

    Raises
    ------
    InputError
        A table of pairs is unusable, or names scans that are not in the split (atlases are allowed), a pair of a scan
        with itself, or a pair twice.
    """
    scans = list(table.loc[table["split"] == split, "scan"])
    atlases = list(table.loc[table["split"] == "atlas", "scan"])
    if protocol == "scan_to_atlas":
        return [(scan, atlas) for atlas in atlases for scan in scans]
    if protocol == "atlas_to_scan":
        return [(atlas, scan) for atlas in atlases for scan in scans]
    if protocol == "all":
        return list(permutations(scans, 2))
    return _listed(published_or_path(protocol, "pairs"), [*scans, *atlases], split)


def _listed(path: Path, allowed: list[str], split: str) -> list[tuple[str, str]]:
    rows = read_rows(path, (("moving", "fixed"),))
    pairs = [(str(moving), str(fixed)) for moving, fixed in rows.itertuples(index=False)]
    known = set(allowed)
    for pair in pairs:
        for scan in pair:
            if scan not in known:
                raise InputError(
                    f"pairs: {path}",
                    found=f"the scan '{scan}'",
                    expected=f"scans of the split {split} or atlases",
                    remedy=suggestion(scan, known),
                )
    same = [moving for moving, fixed in pairs if moving == fixed]
    twice = list(rows[rows.duplicated()].itertuples(index=False, name=None))
    if same or twice:
        what = f"{same[0]} with itself" if same else f"{' -> '.join(twice[0])} more than once"
        raise InputError(f"pairs: {path}", found=what, expected="pairs of two different scans, each once")
    return pairs
