"""Dice structure by structure: box plots, the methods side by side."""

from __future__ import annotations

import matplotlib as mpl
import pandas as pd
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.patches import Patch

from dmir.errors import InputError
from dmir.report.names import method_name, structure_group
from dmir.report.records import STRUCTURE_COLUMNS, order_methods, require_columns
from dmir.report.style import PAGE_WIDTH, RC, legend_columns, method_colours, new_figure

GROUPS_PER_ROW = 16
LABEL_WIDTH = 14  # characters: longer names go on two lines


def grouped_scores(structures: pd.DataFrame, score: str = "dice", labels: str = "nearest") -> pd.DataFrame:
    """Return one value a (method, structure group, pair): the mean over left and right and over models, NaN left out.

    Columns: method, group, moving, fixed, and the score.
    """
    chosen = structures[structures["labels"] == labels]
    chosen = chosen.assign(group=chosen["name"].astype(str).map(structure_group))
    key = ["method", "group", "moving", "fixed"]
    return chosen.groupby(key, sort=False)[score].mean().dropna().reset_index()


@mpl.rc_context(RC)
def dice_boxplot(
    structures: pd.DataFrame, methods: list[str], *, labels: str = "nearest", cohort: str | None = None
) -> Figure:
    """Draw Dice by structure, left and right averaged, the best-aligned structures first.

    Boxes are quartiles over pairs with the median; whiskers reach to 1.5 interquartile ranges, dots lie beyond.
    More than 16 structures go in two rows.

    Parameters
    ----------
    structures
        A row a pair, model, structure and interpolation, as :func:`dmir.report.tables.comparison_table` takes.
    methods
        Their order from left to right; methods that are not named follow.
    cohort
        Which one, where the table holds several.

    Raises
    ------
    InputError
        No score of that cohort and interpolation, or several cohorts and none chosen.
    """
    require_columns(structures, STRUCTURE_COLUMNS, "the table of structure scores")
    if cohort is not None:
        structures = structures[structures["cohort"] == cohort]
    elif structures["cohort"].nunique() > 1:
        found = ", ".join(map(str, structures["cohort"].unique()))
        raise InputError("cohort", found=f"several in one table ({found})", expected="the name of one of them")
    scores = grouped_scores(structures, labels=labels)
    if scores.empty:
        raise InputError(
            "the table of structure scores", found=f"no Dice for {labels} labels", expected="at least one score"
        )
    order = order_methods(scores["method"], methods)
    groups = list(scores.groupby("group")["dice"].median().sort_values(ascending=False, kind="stable").index)
    row_count = -(-len(groups) // GROUPS_PER_ROW)
    row_length = -(-len(groups) // row_count)
    figure = new_figure(PAGE_WIDTH, 0.55 + 2.35 * row_count)
    axes = figure.subplots(row_count, 1, sharey=True, squeeze=False)[:, 0]
    for row, axis in enumerate(axes):
        _draw_row(axis, scores, groups[row * row_length : (row + 1) * row_length], order, row_length)
        axis.set_ylabel(f"Dice ({labels})")
    lowest, highest = float(scores["dice"].min()), float(scores["dice"].max())
    axes[0].set_ylim(lowest - 0.03, min(1.0, highest + 0.03))
    colours = method_colours(order)
    handles = [
        Patch(facecolor=colours[m], edgecolor="black", linewidth=0.4, label=method_name(m, short=True)) for m in order
    ]
    columns = legend_columns(len(order), 8)
    figure.legend(handles=handles, loc="outside upper center", ncols=columns, handlelength=1, columnspacing=1.2)
    return figure


def _draw_row(axis: Axes, scores: pd.DataFrame, groups: list[str], methods: list[str], slots: int) -> None:
    colours = method_colours(methods)
    width = 0.84 / len(methods)
    by_box = {key: part["dice"].to_numpy() for key, part in scores.groupby(["method", "group"])}
    for i in range(0, len(groups), 2):
        axis.axvspan(i - 0.5, i + 0.5, color="#f2f2f2", linewidth=0, zorder=-1)
    for j, method in enumerate(methods):
        places = [i for i, group in enumerate(groups) if (method, group) in by_box]
        boxes = axis.boxplot(
            [by_box[method, groups[i]] for i in places],
            positions=[i + (j - (len(methods) - 1) / 2) * width for i in places],
            widths=width * 0.88,
            patch_artist=True,
            manage_ticks=False,
            boxprops={"facecolor": colours[method], "linewidth": 0.3},
            whiskerprops={"linewidth": 0.5},
            showcaps=False,
            medianprops={"color": "white" if _is_dark(colours[method]) else "black", "linewidth": 0.8},
            flierprops={"marker": ".", "markersize": 2.5, "markerfacecolor": colours[method], "markeredgewidth": 0},
        )
        for line in boxes["whiskers"]:
            line.set_color("#444444")
    axis.set_xlim(-0.5, slots - 0.5)
    labels = [_on_two_lines(group) for group in groups]
    axis.set_xticks(range(len(groups)), labels, rotation=40, linespacing=1.0, ha="right", rotation_mode="anchor")
    axis.tick_params(axis="x", length=0)
    axis.grid(axis="y")


def _on_two_lines(name: str) -> str:
    """Break a long name where the longer of its two lines is shortest."""
    words = name.split(" ")
    if len(name) <= LABEL_WIDTH or len(words) == 1:
        return name
    breaks = [(" ".join(words[:i]), " ".join(words[i:])) for i in range(1, len(words))]
    return "\n".join(min(breaks, key=lambda lines: max(map(len, lines))))


def _is_dark(colour: str) -> bool:
    red, green, blue = mpl.colors.to_rgb(colour)
    return 0.299 * red + 0.587 * green + 0.114 * blue < 0.4
