"""What a method's Dice costs: against time, and against folding."""

from __future__ import annotations

import math

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
    """Draw Dice (mean and sd over pairs) against the median seconds a pair, a panel a cohort; a comparison table in."""
    figure, axes = _scatter(table, "seconds", "Time a pair, s (median)")
    lowest, highest = float(table["seconds"].min()), float(table["seconds"].max())
    for axis in axes:
        axis.set_xscale("log")
        # whole decades, so that there are always two labelled ticks
        axis.set_xlim(10 ** math.floor(math.log10(lowest * 0.8)), 10 ** math.ceil(math.log10(highest * 1.25)))
        axis.xaxis.set_major_formatter(FuncFormatter(lambda value, _: f"{value:g}"))
        axis.minorticks_off()
    return figure


@mpl.rc_context(RC)
def dice_against_folding(table: pd.DataFrame) -> Figure:
    """Draw Dice (mean and sd over pairs) against the share of |J|≤0 (forward), a panel a cohort."""
    column = "nonpositive_jacobian_forward"
    figure, axes = _scatter(table, column, "|J|≤0, forward, %")
    positive = table.loc[table[column] > 0, column]
    smallest = float(positive.min()) if len(positive) else 1e-3
    threshold = 10.0 ** math.floor(math.log10(smallest))
    for axis in axes:
        # zero is a real and the best value: logarithmic above the smallest share seen, linear below
        axis.set_xscale("symlog", linthresh=threshold, linscale=0.7)
        axis.xaxis.set_major_formatter(FuncFormatter(_share))
        axis.set_xlim(-threshold / 3, max(float(table[column].max()) * 2, 10 * threshold))
    return figure


def _share(value: float, _: object) -> str:
    return f"1e{math.log10(value):.0f}" if 0 < value < 1e-3 else f"{value:g}"


def _scatter(table: pd.DataFrame, column: str, label: str) -> tuple[Figure, list[Axes]]:
    require_columns(table, {"cohort", "method", "dice", "dice_sd", column}, "the comparison table")
    shown = table.dropna(subset=["dice", column])
    if shown.empty:
        raise InputError("the comparison table", found=f"no row with dice and {column}", expected="at least one method")
    cohorts = list(dict.fromkeys(shown["cohort"]))
    methods = list(dict.fromkeys(shown["method"]))
    colours, markers = method_colours(methods), method_markers(methods)
    figure = new_figure(PAGE_WIDTH if len(cohorts) > 1 else COLUMN_WIDTH * 1.35, 2.8)
    axes = list(figure.subplots(1, len(cohorts), squeeze=False, sharey=True)[0])
    handles = {}
    for axis, cohort in zip(axes, cohorts, strict=True):
        for row in shown[shown["cohort"] == cohort].to_dict("records"):
            method = str(row["method"])
            handles[method] = axis.errorbar(
                row[column],
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
    figure.legend(handles=[handles[m] for m in methods], loc="outside right center")
    return figure, axes
