"""Cohorts: tables of scans with a split and an atlas, whatever they come from.

A source is a module of this package with a function ``scan_table``; it is imported when a cohort first needs it.
Adding one means one new file and one line in :data:`SOURCES`.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

import pandas as pd

from dmir.cohorts.sources import SOURCES, default_orientation, folder_sources, source_table
from dmir.doubts import doubt
from dmir.errors import InputError, suggestion

__all__ = [
    "COLUMNS",
    "REQUIRED",
    "SAFE_NAME",
    "SOURCES",
    "SPLITS",
    "check_pairs",
    "check_scan_table",
    "check_text",
    "check_unseen",
    "default_orientation",
    "folder_sources",
    "reference_scan",
    "scan_table",
    "source_table",
    "stated_orientation",
]

COLUMNS = (
    *("scan", "subject", "session", "age", "split", "image", "labels", "mask", "truth"),
    *("source_id", "made_from"),
)
REQUIRED = ("scan", "subject", "split", "image", "labels")
SPLITS = ("train", "val", "test", "atlas")
SAFE_NAME = re.compile(r"[A-Za-z0-9][A-Za-z0-9._-]{0,99}")  # two of them and a suffix are the name of a file


def scan_table(
    source: str,
    *,
    split: str | Path | None = None,
    missing: str = "refuse",
    exclude: Sequence[str] = (),
    pairs: str | Path = "scan_to_atlas",
    **parameters: Any,
) -> pd.DataFrame:
    """List the scans of a cohort, without reading an image.

    Parameters
    ----------
    source
        A key of :data:`SOURCES`.
    split
        Which scan is for what: see :func:`dmir.cohorts.splits.apply_split`. Without it, as the source itself says.
    missing
        What is done when the split names scans that are not there: ``"refuse"`` or ``"leave_out"``.
    exclude
        Scans to leave out.
    pairs
        The protocol that makes pairs of the scans: see :func:`dmir.cohorts.pairs.registration_pairs`.
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
    from dmir.cohorts.splits import apply_split

    table = source_table(source, **parameters)
    where = str(next((parameters[key] for key in ("path", "folder") if key in parameters), f"{source} cohort"))
    table = apply_split(table, split, where, missing=missing)
    table = _without(table, exclude, where)
    check_scan_table(table, where, protocol=str(pairs))
    return table.reindex(columns=list(COLUMNS), fill_value="").reset_index(drop=True)


def check_pairs(table: pd.DataFrame, protocol: str | Path, *, tested: bool, trained: Iterable[str]) -> int:
    """Return the number of pairs that are registered; InputError where what a cohort is used for makes none.

    Parameters
    ----------
    table, protocol
        As for :func:`dmir.cohorts.pairs.registration_pairs`.
    tested
        Whether methods are compared on the cohort.
    trained
        The kinds of pairs that networks are trained with on it: ``scan_to_atlas``, ``atlas_to_scan``, ``all``.
    """
    from dmir.cohorts.pairs import registration_pairs

    pairs = registration_pairs(table, protocol)
    if tested and not pairs:
        raise InputError("pairs", found="none", expected="scans with split test to register")
    for kind in trained:
        scans, atlases = int((table["split"] == "train").sum()), int((table["split"] == "atlas").sum())
        if scans < (2 if kind == "all" else 1) or (kind != "all" and not atlases):
            raise InputError(
                "training.pairs",
                found=f"{scans} training scans and {atlases} atlases",
                expected="two training scans" if kind == "all" else f"a training scan and an atlas for {kind}",
                remedy="Choose another split, or other pairs.",
            )
    return len(pairs) if tested else 0


def check_unseen(tables: Mapping[str, pd.DataFrame], origins: Mapping[str, str], train_on: str) -> None:
    """Refuse with InputError a cohort that tests on people whom the networks have seen in another cohort.

    Names that differ only by zeros, case or ``sub-`` are told.

    Parameters
    ----------
    tables
        Of scans, by cohort.
    origins
        What names of subjects are common to, by cohort: two cohorts of one origin mean one person by one name.
        OASIS-1's names (``OAS1_0001``) are the same in all that was made of it.
    train_on
        The cohort that networks are trained on.
    """

    from dmir.cohorts.ages import plain_name

    def people(cohort: str, *splits: str) -> dict[str, str]:
        subjects = tables[cohort].loc[tables[cohort]["split"].isin(splits), "subject"]
        return {name if name.startswith("OAS1_") else f"{origins[cohort]}: {name}": name for name in subjects}

    seen = people(train_on, "train", "val")
    plain = {plain_name(name) for name in seen.values()} if len(tables) > 1 else set()
    for cohort in tables:
        tested = people(cohort, "test")
        shared = [name for person, name in tested.items() if person in seen]
        alike = [name for name in tested.values() if plain_name(name) in plain and name not in shared]
        if cohort != train_on and origins[cohort] == origins[train_on] and alike:
            found = f"names that differ from those of {train_on}'s train and val only by zeros, case or 'sub-'"
            doubt(f"cohorts.{cohort}", found=f"{found}: {_some(alike)}", done="taken for different people")
        if cohort != train_on and shared:
            raise InputError(
                f"cohorts.{cohort}",
                found=f"subjects that networks are trained on in {train_on}: {_some(shared)}",
                expected="other people in test than in the train and val of the training cohort",
                remedy="Choose splits that keep them apart.",
            )


def stated_orientation(cohort: Any) -> str | None:
    """Return the axis codes that hold instead of those in a cohort's files: its own key, or its source's; or None.

    Parameters
    ----------
    cohort
        Its settings (:mod:`dmir.config.cohorts`, which is not imported here: then all of it would be code of a scan).
    """
    known = {key: getattr(cohort, key) for key in cohort.ORIENTED_BY}
    return cohort.orientation or default_orientation(cohort.source, **known)


def reference_scan(table: pd.DataFrame, reference: str | None = None) -> str:
    """Return the scan that defines a cohort's grid: the one asked for, or the first atlas, or the first scan.

    Raises
    ------
    InputError
        The one asked for is not in the table.
    """
    scans = list(table["scan"])
    if reference is not None:
        if reference not in scans:
            raise InputError(
                "reference",
                found=f"'{reference}'",
                expected="a scan of the cohort",
                remedy=suggestion(reference, scans),
            )
        return reference
    atlases = table.loc[table["split"] == "atlas", "scan"]
    return str(atlases.iloc[0] if len(atlases) else scans[0])


def _without(table: pd.DataFrame, exclude: Sequence[str], where: str | Path) -> pd.DataFrame:
    unknown = [name for name in exclude if name not in set(table["scan"])]
    if unknown:
        raise InputError(
            f"{where}: exclude",
            found=f"'{unknown[0]}'",
            expected="scans of the cohort",
            remedy=suggestion(unknown[0], table["scan"]),
        )
    return table[~table["scan"].isin(exclude)]


def check_scan_table(table: pd.DataFrame, where: str | Path, protocol: str = "scan_to_atlas") -> None:
    """Refuse a table of scans that no fair comparison can be made from.

    Parameters
    ----------
    table
        At least the columns :data:`REQUIRED`; no missing values.
    where
        What the table is to the user, for error messages.
    protocol
        How pairs are made; some protocols need an atlas.

    Raises
    ------
    InputError
        A column is missing, a name is repeated or unsafe as a file name, a split is unknown, there is no
        atlas where pairs need one, a subject stands in two splits, or a scan that is scored has no label map.
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
    check_text(table, where)
    _check_splits(table["split"].astype(str), where, protocol)
    _check_subjects(table, where)
    _check_labels(table, where)


def _check_names(names: pd.Series, where: str | Path) -> None:
    unsafe = [name for name in names if not SAFE_NAME.fullmatch(name) or "__" in name]
    if unsafe:
        raise InputError(
            where,
            found=f"scan names {_some(f'{name!r:.110}' for name in unsafe)}",
            expected="up to 100 letters, digits, '.', '_' and '-', a letter or digit first, and no '__' (they name "
            "files)",
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


def check_text(table: pd.DataFrame, where: str | Path) -> None:
    """Refuse entries with control characters (a line break, an escape of terminals): they end up in texts and logs."""
    for name in table.columns:
        strange = [str(entry) for entry in table[name] if not str(entry).isprintable()]
        if strange:
            raise InputError(
                where,
                found=f"in the column {name} {_some(f'{entry!r:.110}' for entry in strange)}",
                expected="text without line breaks and other control characters",
            )


def _check_splits(column: pd.Series, where: str | Path, protocol: str) -> None:
    for split in dict.fromkeys(column):
        if split not in SPLITS:
            raise InputError(
                where, found=f"split '{split}'", expected="train, val, test or atlas", remedy=suggestion(split, SPLITS)
            )
    if "atlas" in protocol and not (column == "atlas").any():
        raise InputError(
            where,
            found="no scan with split 'atlas'",
            expected=f"at least one, because pairs is {protocol}",
            remedy="Name an atlas in the split, or set pairs to all or to a table of pairs.",
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


def _check_labels(table: pd.DataFrame, where: str | Path) -> None:
    without = table.loc[(table["labels"] == "") & (table["split"] != "train"), ["scan", "split"]]
    if len(without):
        raise InputError(
            where,
            found=f"no labels for {_some(f'{scan} ({split})' for scan, split in without.itertuples(index=False))}",
            expected="labels for every scan of val, test and atlas, which scores are taken from",
            remedy="Give them label maps (the column labels), or move these scans to train.",
        )


def _some(items: Iterable[object], most: int = 10) -> str:
    """Join the first ten, and say how many more there are."""
    words = [str(item) for item in items]
    more = f" and {len(words) - most} more" if len(words) > most else ""
    return ", ".join(words[:most]) + more
