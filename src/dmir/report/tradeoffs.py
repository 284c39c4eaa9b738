"""What a method's Dice costs: against time, and against folding."""

from __future__ import annotations

import math
from typing import Any

import matplotlib as mpl
import pandas as pd
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import FuncFormatter

from dmir.errors import InputError
from dmir.report.names import REFERENCE_METHODS, method_name
from dmir.report.records import require_columns
from dmir.report.style import COLUMN_WIDTH, PAGE_WIDTH, RC, method_colours, method_markers, new_figure


@mpl.rc_context(RC)
def dice_against_time(table: pd.DataFrame) -> Figure:
    """Draw Dice (mean and sd over pairs) against the median seconds a pair, a panel a cohort; a comparison table in.

    The starting point of the methods, which takes no time, is a line across.
    """
    starts = table["method"].isin(REFERENCE_METHODS)
    if starts.all():
        starts[:] = False
    figure, axes = _scatter(table[~starts], "seconds", "Time a pair, s (median)", across=table[starts])
    lowest, highest = float(table.loc[~starts, "seconds"].min()), float(table.loc[~starts, "seconds"].max())
    for axis in axes:
        axis.set_xscale("log")
        # whole decades, so that there are always two labelled ticks
        axis.set_xlim(10 ** math.floor(math.log10(lowest * 0.8)), 10 ** math.ceil(math.log10(highest * 1.25)))
        axis.xaxis.set_major_formatter(FuncFormatter(lambda value, _: f"{value:g}"))
        axis.minorticks_off()
    return figure


@mpl.rc_context(RC)
def dice_against_folding(table: pd.DataFrame) -> Figure:
    """Draw Dice (mean and sd over pairs) against the share of |J|≤0 (forward), a panel a cohort.

    The methods without any fold stand side by side in a grey band above 0.
    """
    column = "nonpositive_jacobian_forward"
    positive = table.loc[table[column] > 0, column]
    smallest = float(positive.min()) if len(positive) else 1e-3
    threshold = 10.0 ** math.floor(math.log10(smallest))
    figure, axes = _scatter(table, column, "|J|≤0, forward, %", beside=0.5 * threshold)
    for axis in axes:
        axis.axvspan(-0.6 * threshold, 0.6 * threshold, color="#f0f0f0", linewidth=0, zorder=0)
        # zero is a real and the best value: logarithmic above the smallest share seen, linear below
        axis.set_xscale("symlog", linthresh=threshold, linscale=0.7)
        axis.xaxis.set_major_formatter(FuncFormatter(_share))
        axis.set_xlim(-0.6 * threshold, max(float(table[column].max()) * 2, 10 * threshold))
    return figure


def _share(value: float, _: object) -> str:
    return f"1e{math.log10(value):.0f}" if 0 < value < 1e-3 else f"{value:g}"


def _places(values: list[float], beside: float) -> list[float]:
    """Return where points are drawn: those at exactly 0 side by side, up to ``beside`` to either side."""
    zeros = [k for k, value in enumerate(values) if value == 0]
    if beside and len(zeros) > 1:
        step = 2 * beside / (len(zeros) - 1)
        return [-beside + step * zeros.index(k) if k in zeros else value for k, value in enumerate(values)]
    return values


def _scatter(
    table: pd.DataFrame, column: str, label: str, beside: float = 0.0, across: pd.DataFrame | None = None
) -> tuple[Figure, list[Axes]]:
    """Draw a point a method; those at exactly 0 up to ``beside`` to its sides, those of ``across`` as lines."""
    require_columns(table, {"cohort", "method", "dice", "dice_sd", column}, "the comparison table")
    shown = table.dropna(subset=["dice", column])
    if shown.empty:
        raise InputError("the comparison table", found=f"no row with dice and {column}", expected="at least one method")
    cohorts = list(dict.fromkeys(shown["cohort"]))
    lines = shown[:0] if across is None else across
    methods = list(dict.fromkeys([*lines["method"], *shown["method"]]))
    colours, markers = method_colours(methods), method_markers(methods)
    figure = new_figure(PAGE_WIDTH if len(cohorts) > 1 else COLUMN_WIDTH * 1.35, 2.8)
    axes = list(figure.subplots(1, len(cohorts), squeeze=False, sharey=True)[0])
    handles: dict[str, Any] = {}
    for axis, cohort in zip(axes, cohorts, strict=True):
        for row in lines[lines["cohort"] == cohort].to_dict("records"):
            method = str(row["method"])
            style: dict[str, Any] = {"color": colours[method], "linestyle": (0, (4, 2)), "linewidth": 1.5, "zorder": 1}
            handles[method] = axis.axhline(row["dice"], label=method_name(method, short=True), **style)
        of_cohort = shown[shown["cohort"] == cohort]
        places = _places(of_cohort[column].tolist(), beside)
        for place, row in zip(places, of_cohort.to_dict("records"), strict=True):
            method = str(row["method"])
            handles[method] = axis.errorbar(
                place,
                row["dice"],
                yerr=None if pd.isna(row["dice_sd"]) else row["dice_sd"],
                color=colours[method],
                marker=markers[method],
                markersize=7 if method not in REFERENCE_METHODS else 6,
                markeredgecolor="black",
                markeredgewidth=0.5,
                elinewidth=0.8,
                linestyle="none",
                label=method_name(method, short=True),
            )
        axis.set_title(str(cohort), loc="left")
        axis.set_xlabel(label)
        axis.grid()
    schemes = "/".join(sorted(set(shown["labels"].astype(str)))) if "labels" in shown else ""
    axes[0].set_ylabel(f"Dice ({schemes})" if schemes else "Dice")
    figure.legend(handles=[handles[m] for m in methods if m in handles], loc="outside right center")
    return figure, axes
