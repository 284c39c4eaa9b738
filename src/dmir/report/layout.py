"""How numbers become the cells of a table: rounded, joined with their spread, best and second marked."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any, Literal

import pandas as pd

from dmir.report.columns import COLUMNS, Column
from dmir.report.names import REFERENCE_METHODS, method_name

Mark = Literal["best", "second", ""]


@dataclass(frozen=True)
class Sheet:
    """A table ready to be written: text in every cell, and which cells are best and second."""

    headers: list[str]
    cells: list[list[str]]
    marks: list[list[Mark]]
    numeric: list[bool]
    breaks: frozenset[int]  # rows before which a rule is drawn


def rounded(value: float, digits: int | None, least: float = 0.0) -> str:
    """Return a number as it is printed; empty for NaN, ``<0.001`` for what is not zero but rounds to it.

    What is positive and below ``least`` shows as ``<least``.
    """
    if math.isnan(value):
        return ""
    if 0 < value < least:
        return f"<{least:g}"
    if digits is None:
        if value != 0 and abs(value) < 1e-4:
            return f"{value:.2e}"
        digits = 2 if value == 0 else max(0, 2 - math.floor(math.log10(abs(value))))
    text = f"{value:.{digits}f}"
    if float(text) == 0 and value != 0:
        return f"{'<' if value > 0 else '>-'}{10.0**-digits:.{digits}f}"
    return text


def _displayed(value: float, column: Column) -> float:
    """Return what a cell is ranked by: its printed value, so that cells that read the same rank the same."""
    text = rounded(value, column.digits, column.least)
    if not text:
        return math.nan
    shown = float(text.lstrip("<>")) / 2 if text[0] in "<>" else float(text)
    return {"higher": -shown, "lower": shown, "one": abs(shown - 1)}.get(column.better, math.nan)


def rank_marks(values: list[float], column: Column, ranked: list[bool]) -> list[Mark]:
    """Return the mark of each value: ``best``, ``second`` or none; ties share a mark, and no contest gives none."""
    keys = [
        _displayed(value, column) if takes_part else math.nan for value, takes_part in zip(values, ranked, strict=True)
    ]
    levels = sorted({key for key in keys if not math.isnan(key)})
    if len(levels) < 2:
        return [""] * len(values)
    names: dict[float, Mark] = {levels[0]: "best", levels[1]: "second"}
    return [names.get(key, "") for key in keys]


def _text(value: Any, column: Column) -> str:
    if isinstance(value, bool):
        return "✓" if value else ""
    if value is None or value is pd.NA:
        return ""
    if not isinstance(value, float):
        return str(value)
    if not column.rounds:
        return "" if math.isnan(value) else f"{value:g}"
    return rounded(value, column.digits, column.least)


def _shown_columns(table: pd.DataFrame) -> list[str]:
    """Leave out what says nothing: spreads (they join their mean), columns without a value, failures where none are."""
    shown = []
    for name in map(str, table.columns):
        series = table[name]
        joins_its_mean = name.endswith("_sd") and name.removesuffix("_sd") in table.columns
        empty = len(table) > 0 and bool(series.isna().all())
        told_elsewhere = name == "labels" and len(_schemes(table)) < 2  # in the headers
        one_model_each = name == "models" and not series.astype(str).str.contains(";").any()
        no_failure = name == "failed" and not series.any()
        if not (joins_its_mean or empty or told_elsewhere or one_model_each or no_failure):
            shown.append(name)
    return shown


def _schemes(table: pd.DataFrame) -> list[str]:
    """Return how labels were warped for the numbers of a table: one way, which headers tell, or several."""
    return sorted(set(table["labels"].dropna().astype(str))) if "labels" in table else []


def _column(name: str, table: pd.DataFrame, across: bool) -> Column:
    if name in COLUMNS:
        return COLUMNS[name]
    if across and pd.api.types.is_float_dtype(table[name]):
        return Column(method_name(name), method_name(name, short=True), 3, "higher")
    return Column(method_name(name))


def _headers(names: list[str], columns: list[Column], table: pd.DataFrame, short: bool, across: bool) -> list[str]:
    schemes = _schemes(table)
    headers = []
    for name, column in zip(names, columns, strict=True):
        header = (column.short or column.header) if short else column.header
        header = header.replace("{labels}", schemes[0]) if len(schemes) == 1 else header.replace(" ({labels})", "")
        if name + "_sd" in table.columns and not table[name + "_sd"].isna().all():
            # the arrow stays last: "Dice (nearest), mean ± sd ↑" reads better than the other order
            arrow = header[-2:] if header[-1:] in "↑↓" else ""
            header = header if short or across else f"{header.removesuffix(arrow)}, mean ± sd{arrow}"
        headers.append(header)
    return headers


def lay_out(table: pd.DataFrame, *, across: bool = False, short: bool = False) -> Sheet:
    """Turn numbers into text: rounded, ``mean ± sd`` in one cell, best and second marked.

    Parameters
    ----------
    table
        Columns that :data:`COLUMNS` knows get their header, unit and rounding; others show as they are.
    across
        Rank the methods along each row (a column a method) instead of down each column within a cohort and, where a
        table has several, one interpolation of the labels.
    short
        Short headers and method names.
    """
    names = _shown_columns(table)
    columns = [_column(name, table, across) for name in names]
    rows = [dict(zip(map(str, table.columns), row, strict=True)) for row in table.itertuples(index=False, name=None)]
    cells = [[_cell(row, name, column, short) for name, column in zip(names, columns, strict=True)] for row in rows]
    groups = _groups(table)
    marks = _marks_across(rows, names, columns) if across else _marks_down(rows, names, columns, groups)
    return Sheet(
        headers=_headers(names, columns, table, short, across),
        cells=cells,
        marks=marks,
        numeric=[bool(pd.api.types.is_numeric_dtype(table[name])) for name in names],
        breaks=frozenset(i for i in range(1, len(rows)) if groups[i] != groups[i - 1]),
    )


def _groups(table: pd.DataFrame) -> list[tuple[str, ...]]:
    """Return what each row is ranked within, and ruled off by: its cohort and the interpolation of its labels."""
    keys = [key for key in ("cohort", "labels") if key in table]
    return list(zip(*(table[key].astype(str) for key in keys), strict=True)) if keys else [()] * len(table)


def _cell(row: dict[str, Any], name: str, column: Column, short: bool) -> str:
    value = row[name]
    if name == "method":
        return method_name(str(value), short=short)
    text = _text(value, column)
    spread = row.get(name + "_sd")
    if text and isinstance(spread, float) and not math.isnan(spread):
        text += f" ± {rounded(spread, column.digits)}"
    return text


def _marks_down(
    rows: list[dict[str, Any]], names: list[str], columns: list[Column], groups: list[tuple[str, ...]]
) -> list[list[Mark]]:
    marks: list[list[Mark]] = [[""] * len(names) for _ in rows]
    for j, (name, column) in enumerate(zip(names, columns, strict=True)):
        for group in sorted(set(groups)) if column.better else []:
            members = [i for i, g in enumerate(groups) if g == group]
            values = [float(rows[i][name]) for i in members]
            ranked = [str(rows[i].get("method", "")) not in REFERENCE_METHODS for i in members]
            for i, mark in zip(members, rank_marks(values, column, ranked), strict=True):
                marks[i][j] = mark
    return marks


def _marks_across(rows: list[dict[str, Any]], names: list[str], columns: list[Column]) -> list[list[Mark]]:
    contest = [j for j, column in enumerate(columns) if column.better]
    ranked = [names[j] not in REFERENCE_METHODS for j in contest]
    marks: list[list[Mark]] = []
    for row in rows:
        line: list[Mark] = [""] * len(names)
        values = [float(row[names[j]]) for j in contest]
        for j, mark in zip(contest, rank_marks(values, columns[contest[0]], ranked) if contest else [], strict=True):
            line[j] = mark
        marks.append(line)
    return marks
