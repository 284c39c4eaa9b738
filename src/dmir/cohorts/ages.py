"""Ages: whose they are and in which unit, as far as tables tell; what they do not is no age, and is told."""

from __future__ import annotations

import json
import re
from collections.abc import Callable, Iterable, Sequence
from pathlib import Path

import pandas as pd

from dmir.cohorts.layout import read_bounded, read_text_table
from dmir.doubts import doubt
from dmir.errors import InputError

OLDEST = 130.0  # years: what is older is a code for what is not known, as 999
UNKNOWN = frozenset({"", "n/a", "na", "nan", "none", "null", "unknown", "-", "."})
UNITS = {"y": 1.0, "m": 1 / 12, "w": 7 / 365.25, "d": 1 / 365.25}  # years, by the first letter of year, month, ...
SHOWN = 5  # entries or names in a message, of many

Person = tuple[str, str]  # subject and session, as the folders name them


def known_ages(ages: pd.Series) -> pd.Series:
    """Return ages in years as numbers; NaN for what is empty, text, negative or above 130.

    Examples
    --------
    >>> known_ages(pd.Series(["24", "", "n/a", "89+", "61.5", "-1", "999"])).tolist()
    [24.0, nan, nan, nan, 61.5, nan, nan]
    """
    numbers = pd.to_numeric(ages, errors="coerce").astype(float)
    return numbers.where((numbers >= 0) & (numbers <= OLDEST))


def tell_unknown_ages(ages: pd.Series, where: str | Path) -> None:
    """Tell of entries that are neither an age in years nor one of the usual words for an unknown one."""
    strange = ages[known_ages(ages).isna() & ~ages.str.casefold().isin(UNKNOWN)]
    if len(strange):
        named = f"{len(strange)} ages that are no number of years ({_some(dict.fromkeys(strange))})"
        doubt(where, found=named, done="taken as not known")


def plain_name(name: str, kind: str = "sub") -> str:
    """Return what two names of one person have in common: neither case, nor ``sub-``, nor zeros before a number.

    Examples
    --------
    >>> plain_name("sub-0050772") == plain_name("50772")
    True
    >>> plain_name("Pat007"), plain_name("sub-0")
    ('pat7', '0')
    """
    return re.sub(r"(?<!\d)0+(?=\d)", "", name.casefold().removeprefix(f"{kind}-"))


def bids_ages(folder: Path, people: Sequence[Person]) -> dict[Person, str]:
    """Return the ages that ``participants.tsv`` and ``sub-*_sessions.tsv`` of a BIDS tree tell, in years.

    Parameters
    ----------
    folder
        The tree.
    people
        Subject and session of each scan, such as ("sub-01", "ses-02").

    Returns
    -------
    dict
        Only those that are known. What is told in its own unit (``participants.json``) is told in years.

    Raises
    ------
    InputError
        A table is none, or has no column ``participant_id`` or ``session_id``.
    """
    subjects = list(dict.fromkeys(subject for subject, _ in people))
    found: dict[Person, str] = {}
    path = folder / "participants.tsv"
    if path.is_file() and "age" in (table := _table(path, "participant_id")):
        own = _matched(table["participant_id"], subjects, path)
        for subject, session in people:
            if own[subject] is not None:
                rows = table[table["participant_id"] == own[subject]]
                found[subject, session] = _age_of(rows, session, path)
    for subject in subjects:
        path = folder / subject / f"{subject}_sessions.tsv"
        if path.is_file() and "age" in (table := _table(path, "session_id")):
            sessions = [session for other, session in people if other == subject and session]
            found |= {(subject, session): _age_of(table, session, path) for session in sessions}
    return {person: age for person, age in found.items() if age}


def _table(path: Path, key: str) -> pd.DataFrame:
    """Return a table of BIDS, its ages in years."""
    expected = f"a table (.tsv) with the column {key}"
    table = read_text_table(path, expected, "\t")
    if key not in table.columns:
        raise InputError(path, found=f"the columns {', '.join(table.columns)}", expected=expected)
    if "age" not in table.columns:
        return table
    factor = _years(path.with_suffix(".json"))
    if factor is None:
        return table.drop(columns="age")
    if factor != 1:
        numbers = pd.to_numeric(table["age"], errors="coerce") * factor
        table["age"] = [
            age if years != years else f"{years:.6g}" for age, years in zip(table["age"], numbers, strict=True)
        ]
    tell_unknown_ages(table["age"], path)
    return table


def _years(sidecar: Path) -> float | None:
    """Return how many years the unit of the ages is, as the table's description says; without one, BIDS's: a year."""
    if not sidecar.is_file():
        return 1.0
    expected = "a description of a table's columns in JSON"
    try:
        described = json.loads(read_bounded(sidecar, expected).decode("utf-8-sig"))
    except ValueError as error:
        raise InputError(sidecar, found=f"no JSON ({error})", expected=expected) from error
    column = described.get("age") if isinstance(described, dict) else None
    unit = str(column.get("Units") or "years").strip() if isinstance(column, dict) else "years"
    letter = re.fullmatch(r"(y|m|w|d)(ear|onth|eek|ay|r|o|k)?s?|a", unit.casefold())
    if letter is None:
        doubt(sidecar, found=f"the unit '{unit}' of ages", done="the ages are taken as not known")
        return None
    factor = UNITS.get(letter[1] or "y", 1.0)
    if factor != 1:
        doubt(sidecar, found=f"ages in {unit}", done="turned into years")
    return factor


def _matched(ids: Iterable[str], subjects: Sequence[str], path: Path) -> dict[str, str | None]:
    """Return the id in the table of each subject: its own name, else the only one that differs by zeros or ``sub-``."""
    known = set(ids)
    alike = _grouped(known, plain_name)
    peers = _grouped(subjects, plain_name)
    own: dict[str, str | None] = {}
    for subject in subjects:
        others = alike.get(plain_name(subject), [])
        alone = len(others) == 1 and len(peers[plain_name(subject)]) == 1
        own[subject] = subject if subject in known else others[0] if alone else None
    loose = {subject: name for subject, name in own.items() if name not in (subject, None)}
    without = [subject for subject, name in own.items() if name is None]
    if loose:
        first = f"'{next(iter(loose.values()))}' for {next(iter(loose))}"
        found = f"ids of {len(loose)} of {len(subjects)} subjects that differ by zeros, case or 'sub-' ({first})"
        doubt(path, found=found, done="taken for the same people")
    if without:
        found = f"no row that is surely one of {len(without)} of {len(subjects)} subjects ({_some(without)})"
        doubt(path, found=found, done="their ages are not known")
    return own


def _age_of(rows: pd.DataFrame, session: str, path: Path) -> str:
    """Return the age of a session among rows of one person; "" where they do not say one."""
    column = next((name for name in ("session_id", "session") if name in rows.columns), None)
    if column is not None and session:
        wanted = plain_name(session, "ses")
        rows = rows[[plain_name(name, "ses") == wanted for name in rows[column]]]
    numbers = known_ages(rows["age"]).dropna()
    told = sorted(set(rows.loc[numbers.index, "age"]))
    if len(told) > 1:
        doubt(
            path, found=f"several ages ({', '.join(told)}) in rows of one person or session", done="taken as not known"
        )
    return told[0] if len(told) == 1 else ""


def _grouped(names: Iterable[str], key: Callable[[str], str]) -> dict[str, list[str]]:
    groups: dict[str, list[str]] = {}
    for name in names:
        groups.setdefault(key(name), []).append(name)
    return groups


def _some(names: Iterable[str]) -> str:
    listed = list(names)
    return ", ".join(listed[:SHOWN]) + (", ..." if len(listed) > SHOWN else "")
