"""Scores of registrations that were done elsewhere: a table of pairs, checked as a whole, then scored row by row."""

from __future__ import annotations

import re
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd

from dmir.cohorts.layout import person_and_session
from dmir.cohorts.table import check_columns, check_files, check_filled, read_rows
from dmir.doubts import doubt
from dmir.errors import InputError, suggestion
from dmir.metrics.files import PAIR_KEYS, read_field, score_files
from dmir.structures import StructureSet, load_structures, structures_of_ids
from dmir.transforms import CONVENTIONS
from dmir.transforms.linear import AFFINES
from dmir.volumes import Grid, read_grid, read_labels, require_same_grid, stored_array

NEEDED = ("method", "fixed_labels")
TEXTS = ("cohort", "model", "subject", "structures", "convention", "interpolation", "device", "reason")
FILES = ("field", "warped_labels", "moving_labels", "fixed_labels", "mask", "truth")
NUMBERS = ("seconds", "peak_memory_mb", "threads")
OPTIONAL = ("pair", "moving", "fixed", *(name for name in FILES if name not in NEEDED), *TEXTS, *NUMBERS)
INTERPOLATIONS = ("nearest", "linear")
HEADERS = (".nii", ".nii.gz", ".mgh", ".mgz")  # of fields whose shape is known without reading them
SAFE_COHORT = re.compile(r"[A-Za-z0-9][A-Za-z0-9._-]{0,99}")  # it names files

Tell = Callable[[str, int, int], None]
"""Told of each step: what it is, how many of its parts are done, and how many there are."""


@dataclass(frozen=True)
class Registrations:
    """What was registered elsewhere, ready to be scored.

    Attributes
    ----------
    path
        The table.
    rows
        A row a registration: cohort, method, model, moving, fixed; its files ("" where there is none); what else the
        table says. All text, but for seconds, peak_memory_mb and threads.
    structures
        By cohort.
    """

    path: Path
    rows: pd.DataFrame
    structures: dict[str, StructureSet]

    @property
    def methods(self) -> list[str]:
        """The methods in the order of the table."""
        return list(dict.fromkeys(self.rows["method"]))

    def scans(self, cohort: str) -> pd.DataFrame:
        """Return whose the scans of a cohort are, as statistics want it: scan, subject, split.

        Where no scan is both moving and fixed, the side with fewer scans (the fixed one, if there are as many) is taken
        for atlases, whose pairs belong to the other side's subjects.
        """
        rows = self.rows[self.rows["cohort"] == cohort]
        moving, fixed = list(dict.fromkeys(rows["moving"])), list(dict.fromkeys(rows["fixed"]))
        atlases: set[str] = set()
        if (rows["moving"] == rows["fixed"]).all():  # pairs by one name: nobody else's scans
            atlases = set(fixed)
        elif not set(moving) & set(fixed):
            atlases = set(moving if len(moving) < len(fixed) else fixed)
        side = "fixed" if set(moving) <= atlases else "moving"
        stated = dict(zip(rows[side], rows["subject"], strict=True))
        scans = list(dict.fromkeys([*moving, *fixed]))
        return pd.DataFrame(
            {
                "scan": scans,
                "subject": [stated.get(scan) or person_and_session(scan)[0] for scan in scans],
                "split": ["atlas" if scan in atlases else "test" for scan in scans],
            }
        )


# ---------------------------------------------------------------- the table, checked before anything is computed


def read_registrations(
    path: str | Path, structures: str | None = None, convention: str | None = None, tell: Tell | None = None
) -> Registrations:
    """Read a table of registrations, and check all that can be known to be wrong before any is scored.

    Parameters
    ----------
    path
        A ``.csv`` or ``.tsv`` file (UTF-8), a row a registration. ``method``; ``moving`` and ``fixed``, names of scans,
        or ``pair``, one name for both; ``field`` or ``warped_labels`` or both, or neither where the method failed (with
        its ``reason``); ``moving_labels`` (not needed for warped labels), ``fixed_labels``; optionally ``mask``,
        ``truth``, ``cohort`` (default: the table's name), ``model`` (of several seeds), ``subject`` (of the pair),
        ``structures``, ``convention``, ``interpolation`` (of the warped labels), ``seconds``, ``peak_memory_mb``,
        ``device``, ``threads``. Relative paths start from the table's own folder.
    structures
        Name of the structure set, where the table has no such column; without any, all labels are scored.
    convention
        Of all fields for which the table names none.
    tell
        Told how far the check is.

    Raises
    ------
    InputError
        Something is wrong with the table or with a file that it names.
    """
    path = Path(path)
    rows = read_rows(path, "a table of registrations", "one row a registration")
    columns = list(rows.columns)
    check_columns(columns, path, NEEDED, OPTIONAL)
    _check_choice(columns, path)
    rows = rows.reindex(columns=[*NEEDED, *OPTIONAL], fill_value="")
    if "pair" in columns:
        rows["moving"] = rows["fixed"] = rows["pair"]
    rows["cohort"] = rows["cohort"].where(rows["cohort"] != "", re.sub(r"[^A-Za-z0-9._-]+", "-", path.stem))
    rows["model"] = rows["model"].where(rows["model"] != "", "none")
    rows["structures"] = rows["structures"].where(rows["structures"] != "", structures or "")
    rows["convention"] = rows["convention"].where(rows["convention"] != "", convention or "")
    check_filled(rows, path, ["method", "pair"] if "pair" in columns else ["method", "moving", "fixed"])
    _check_words(rows, path)
    for name in NUMBERS:
        rows[name] = _numbers(rows[name], path)
    for name in FILES:
        rows[name] = [str(path.parent / entry) if entry else "" for entry in rows[name]]
    _check_rows(rows, path)
    check_files(rows, path, FILES)
    _check_headers(rows, tell or _silent)
    chosen = {str(cohort): _structures_of(part, path) for cohort, part in rows.groupby("cohort", sort=False)}
    _tell_of_rows(rows, path)
    _read_first_fields(rows)
    return Registrations(path, rows.drop(columns="pair"), chosen)


def _silent(step: str, done: int, count: int) -> None:
    pass


def _check_choice(columns: list[str], path: Path) -> None:
    """Refuse columns that contradict each other, or of which there must be one or the other."""
    if ("pair" in columns) == ("moving" in columns or "fixed" in columns):
        found = "pair beside moving or fixed" if "pair" in columns else "neither moving and fixed nor pair"
        raise InputError(path, found=found, expected="the columns moving and fixed (names of scans), or pair")
    if "pair" not in columns and not {"moving", "fixed"} <= set(columns):
        raise InputError(path, found="one of moving and fixed alone", expected="both columns")
    if not {"field", "warped_labels"} & set(columns):
        raise InputError(path, found="no column field and no column warped_labels", expected="one of them, or both")


def _check_words(rows: pd.DataFrame, path: Path) -> None:
    """Refuse words that are none of those known, and what cannot name a file or go into a text."""
    for name, known in (("interpolation", INTERPOLATIONS), ("convention", tuple(sorted({*CONVENTIONS, *AFFINES})))):
        unknown = [word for word in rows[name] if word and word not in known]
        if unknown:
            raise InputError(
                path,
                found=f"'{unknown[0]}' in the column {name}",
                expected=", ".join(known),
                remedy=suggestion(unknown[0], known),
            )
    for name in ("method", "model", "moving", "fixed", "subject", *TEXTS):
        strange = [word for word in rows[name] if not word.isprintable()]
        if strange:
            raise InputError(path, found=f"{strange[0]!r:.110} in the column {name}", expected="text of one line")
    unsafe = [word for word in rows["cohort"] if not SAFE_COHORT.fullmatch(word)]
    if unsafe:
        expected = "letters, digits, '.', '_' and '-', a letter or digit first: it names files"
        raise InputError(path, found=f"the cohort {unsafe[0]!r:.110}", expected=expected)


def _numbers(column: pd.Series, path: Path) -> pd.Series:
    """Return a column of numbers from 0 on, NaN where nothing stands."""
    numbers = pd.to_numeric(column.where(column != "", None), errors="coerce").astype(float)
    wrong = (column != "") & ~(np.isfinite(numbers) & (numbers >= 0))
    if wrong.any():
        found = f"'{column[wrong].iloc[0]}' in the column {column.name} (row {_row(column.index[wrong])})"
        raise InputError(path, found=found, expected="a number from 0 on, with a decimal point, or nothing")
    return numbers


def _row(index: pd.Index) -> str:
    """Return the rows of a table as a user counts them: the header is row 1."""
    return ", ".join(str(int(k) + 2) for k in index[:10]) + (", ..." if len(index) > 10 else "")


def _check_rows(rows: pd.DataFrame, path: Path) -> None:
    """Refuse rows that say the same registration twice, or lack what its scores need."""
    key = list(PAIR_KEYS)
    twice = rows[rows.duplicated(key, keep=False)]
    if len(twice):
        first = twice[(twice[key] == twice[key].iloc[0]).all(axis=1)]
        what = f"{first['method'].iloc[0]}, {first['moving'].iloc[0]} to {first['fixed'].iloc[0]}"
        found = f"{what} {len(first)} times (rows {_row(first.index)})"
        raise InputError(path, found=found, expected="each once; several seeds have a column model")
    result = (rows["field"] != "") | (rows["warped_labels"] != "")
    if not result.any():
        raise InputError(path, found="no field and no warped labels in any row", expected="something to score")
    without_moving = (rows["field"] != "") & (rows["moving_labels"] == "")
    for name, wrong in (("fixed_labels", result & (rows["fixed_labels"] == "")), ("moving_labels", without_moving)):
        if wrong.any():
            found = f"nothing in the column {name} (row {_row(rows.index[wrong])})"
            raise InputError(path, found=found, expected="the label map, which the scores are taken from")
    given = rows[rows["subject"] != ""]
    if len(given) and len(given) < len(rows):
        found = f"no subject in row {_row(rows.index[rows['subject'] == ''])}"
        raise InputError(path, found=found, expected="the subject of every pair, or of none")
    subjects = given.groupby(["cohort", "moving", "fixed"])["subject"].nunique()
    if (subjects > 1).any():
        _, moving, fixed = subjects.index[subjects > 1][0]
        raise InputError(path, found=f"several subjects of the pair {moving} to {fixed}", expected="one of each pair")


def _results(rows: pd.DataFrame) -> Iterator[dict[str, Any]]:
    """Yield the rows that have something to score."""
    for row in rows.to_dict("records"):
        if row["field"] or row["warped_labels"]:
            yield {str(key): value for key, value in row.items()}


def _check_headers(rows: pd.DataFrame, tell: Tell) -> None:
    """Open every file by its header; refuse shapes that do not belong together."""
    grids: dict[str, Grid] = {}
    results = list(_results(rows))
    for number, row in enumerate(results):
        tell("checking files", number, len(results))
        for name in ("fixed_labels", "moving_labels", "warped_labels", "mask"):
            if row[name] and row[name] not in grids:
                grids[row[name]] = read_grid(row[name], name)
        for name in ("warped_labels", "mask"):
            if row[name]:
                fixed = row["fixed_labels"]
                require_same_grid(grids[fixed], grids[row[name]], fixed, f"{name}: {row[name]}")
        if row["field"].lower().endswith(HEADERS):
            _check_shape(row["field"], grids[row["fixed_labels"]], row["fixed_labels"])


def _check_shape(field: str, fixed: Grid, fixed_labels: str) -> None:
    with stored_array(Path(field), "field") as stored:
        shape = stored.shape
        stored.check_claims()
    if len(shape) < 4:
        return  # what it is instead is told when it is read
    space = shape[1:] if len(shape) == 4 and shape[3] != 3 else shape[:3]
    if tuple(space) != tuple(fixed.shape):
        raise InputError(
            field,
            found=f"a field of shape {shape}",
            expected=f"{'x'.join(map(str, fixed.shape))} voxels, the grid of {fixed_labels}",
            remedy="A field lies on the fixed image's grid; check that these belong together.",
        )


def _structures_of(rows: pd.DataFrame, path: Path) -> StructureSet:
    """Return the structure set of a cohort: the one that is named, or all labels that its maps have."""
    names = list(dict.fromkeys(rows["structures"]))
    if len(names) > 1:
        found = f"several structure sets in {rows['cohort'].iloc[0]}: {', '.join(name or 'none' for name in names)}"
        raise InputError(path, found=found, expected="one a cohort")
    if names[0]:
        return load_structures(names[0])
    files = dict.fromkeys(row[name] for row in _results(rows) for name in ("fixed_labels", "moving_labels"))
    return structures_of_ids(number for file in files if file for number in np.unique(read_labels(file).data))


def _tell_of_rows(rows: pd.DataFrame, path: Path) -> None:
    """Warn of what is possible and rarely meant."""
    for name in ("field", "warped_labels"):
        used = rows[rows[name] != ""]
        files = used[name].map(lambda file: str(Path(file).resolve()))
        again = used[files.duplicated(keep=False)]
        if len(again):
            found = f"one file in the column {name} of several rows ({_row(again.index)}), first {again[name].iloc[0]}"
            doubt(path, found=found, done="scored in each of them")
    untold = rows[(rows["warped_labels"] != "") & (rows["interpolation"] == "")]
    if len(untold):
        found = f"how labels were interpolated is not told for {', '.join(dict.fromkeys(untold['method']))}"
        doubt(path, found=found, done="counted as nearest (the column interpolation says otherwise)")
    for name in ("moving_labels", "fixed_labels", "mask"):
        used = rows[(rows["field"] != "") | (rows["warped_labels"] != "")]
        several = used.groupby(["cohort", "moving", "fixed"])[name].nunique()
        if (several > 1).any():
            _, moving, fixed = several.index[several > 1][0]
            found = f"several {name} of one pair, first {moving} to {fixed}"
            doubt(path, found=found, done="every method is scored on its own: they are not compared on the same labels")
    for (cohort, method), part in rows.groupby(["cohort", "method"], sort=False):
        wanted = rows.loc[rows["cohort"] == cohort, ["moving", "fixed"]].drop_duplicates()
        has = part[["moving", "fixed"]].drop_duplicates()
        if len(has) < len(wanted):
            found = f"{method} has rows for {len(has)} of the {len(wanted)} pairs of {cohort}"
            doubt(path, found=found, done="the others count as failed")


def _read_first_fields(rows: pd.DataFrame) -> None:
    """Read one field of every method: they are of one program, and what it wrote must be known before hours pass."""
    fields = rows[rows["field"] != ""].drop_duplicates(["cohort", "method"])
    for row in _results(fields):
        _field_of(row)


def _field_of(row: dict[str, Any]) -> None:
    fixed, moving = read_labels(row["fixed_labels"], "fixed_labels"), read_labels(row["moving_labels"], "moving_labels")
    read_field(row["field"], fixed, row["fixed_labels"], row["convention"] or None, moving)


# ---------------------------------------------------------------- the scores


def score_registrations(found: Registrations, tell: Tell | None = None) -> tuple[pd.DataFrame, pd.DataFrame]:
    """Score what was registered elsewhere, by the scorer of the pipeline.

    A row without a result is a failed pair with its reason; so is one whose files turn out to be unusable, and told.

    Returns
    -------
    structures, pairs
        Tidy tables as :func:`dmir.metrics.files.score_shard` returns them; a pair has a ``dice_before`` too.

    Raises
    ------
    InputError
        No row could be scored.
    """
    tables, pairs, last = [], [], None
    records = [{str(key): value for key, value in row.items()} for row in found.rows.to_dict("records")]
    for number, row in enumerate(records):
        (tell or _silent)("scoring", number, len(records))
        told = {name: row[name] for name in (*PAIR_KEYS, *NUMBERS, "device")}
        status, reason = "failed", row["reason"] or "no result"
        scores: dict[str, Any] = {}
        if row["field"] or row["warped_labels"]:
            try:
                table, scores = _scored(row, found.structures[row["cohort"]])
                status, reason = "ok", ""
                tables.append(table.assign(**{key: row[key] for key in PAIR_KEYS})[[*PAIR_KEYS, *table.columns]])
            except InputError as error:
                reason, last = str(error), error
                what = f"{row['method']}, {row['moving']} to {row['fixed']}"
                doubt(what, found=reason.rstrip("."), done="counted as a failed pair")
        pairs.append({**told, "status": status, "reason": reason, **scores})
    if not tables:
        raise last or InputError(found.path, found="no result in any row", expected="something to score")
    return pd.concat(tables, ignore_index=True), _with_all_columns(pd.DataFrame(pairs))


def _scored(row: dict[str, Any], structures: StructureSet) -> tuple[pd.DataFrame, dict[str, Any]]:
    return score_files(
        row["field"] or None,
        row["moving_labels"] or None,
        row["fixed_labels"],
        structures,
        convention=row["convention"] or None,
        warped_labels=row["warped_labels"] or None,
        warped_by=row["interpolation"] or INTERPOLATIONS[0],
        mask=row["mask"] or None,
        truth=row["truth"] or None,
        before=True,
    )


def _with_all_columns(pairs: pd.DataFrame) -> pd.DataFrame:
    """Return a table of pairs with the scores of labels for both interpolations, NaN where labels had but one."""
    known = [name for name in pairs.columns if name.endswith(INTERPOLATIONS)]
    other = dict(zip(INTERPOLATIONS, reversed(INTERPOLATIONS), strict=True))
    for name in known:
        stem, _, labels = name.rpartition("_")
        if f"{stem}_{other[labels]}" not in pairs:
            pairs[f"{stem}_{other[labels]}"] = np.nan
    return pairs


def common_interpolation(structures: pd.DataFrame, path: str | Path) -> str:
    """Return the interpolation of warped labels by which methods are compared; a doubt, where not all have it."""
    has = {labels: set(part["method"]) for labels, part in structures.groupby("labels")}
    methods = set(structures["method"])
    for labels in INTERPOLATIONS:
        if has.get(labels) == methods:
            return labels
    chosen = max(INTERPOLATIONS, key=lambda labels: len(has.get(labels, set())))
    lacking = ", ".join(sorted(methods - has[chosen]))
    found = f"{lacking}: no labels that were warped by {chosen} interpolation, as the other methods have"
    doubt(path, found=found, done="without a Dice in the tables")
    return chosen


def tell_of_worse(structures: pd.DataFrame, pairs: pd.DataFrame, path: str | Path) -> None:
    """Warn of methods that make most pairs worse: moving and fixed may be exchanged, or the field of another kind."""
    after = structures.groupby([*PAIR_KEYS, "labels"])["dice"].mean().groupby(list(PAIR_KEYS)).max().rename("after")
    both = pairs.merge(after.reset_index(), on=list(PAIR_KEYS))
    both = both[both["after"].notna() & both["dice_before"].notna()]
    for method, part in both.groupby("method", sort=False):
        worse = part[part["after"] < part["dice_before"]]
        if len(worse) > len(part) / 2:
            doubt(
                path,
                found=f"{method} makes {len(worse)} of {len(part)} pairs worse (mean Dice "
                f"{worse['dice_before'].mean():.3f} before, {worse['after'].mean():.3f} after)",
                done="scored as it is: moving and fixed may be exchanged, or the field of another convention (--from)",
            )
