"""Which methods differ among all: mean ranks of Dice with Nemenyi's critical difference."""

from __future__ import annotations

import math
from dataclasses import dataclass
from textwrap import fill

import matplotlib as mpl
import numpy as np
import pandas as pd
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from scipy.stats import friedmanchisquare, rankdata, studentized_range

from dmir.report.names import REFERENCE_METHODS, method_name
from dmir.report.notes import LEVEL
from dmir.report.records import order_methods
from dmir.report.statistics import DECIMALS, subject_scores
from dmir.report.style import COLUMN_WIDTH, RC, method_colours, method_markers, new_figure

FEWEST_METHODS, FEWEST_SUBJECTS = 3, 2
SIDE = 0.98  # inches beside the axis, for the methods' names
HEAD, ROW, BAR = 0.74, 0.17, 0.07  # inches: above the axis, of a name, of a bar
NAME_LENGTH = 18  # characters: longer names go on several lines


@dataclass(frozen=True)
class RankComparison:
    """Mean ranks of several methods, and which of them cannot be told apart.

    Attributes
    ----------
    ranks
        Method -> mean rank over the subjects, 1 is best, in this order.
    subjects
        How many: all are complete, every method has a value.
    chi_square, p
        Of Friedman's test that all methods are alike.
    critical_difference
        Two methods whose mean ranks differ by at least so much differ (Nemenyi, level 0.05).
    groups
        The largest runs of methods (first and last position in ``ranks``) within which no two differ; all methods in
        one where Friedman's test does not reject.
    """

    ranks: dict[str, float]
    subjects: int
    chi_square: float
    p: float
    critical_difference: float
    groups: list[tuple[int, int]]


def nemenyi_difference(methods: int, subjects: int) -> float:
    """Return the critical difference CD = q sqrt(k (k + 1) / (6 n)) of the mean ranks of k methods on n subjects.

    q is the 95 % quantile of the studentised range of k means with infinite degrees of freedom, over sqrt(2).

    References
    ----------
    P. B. Nemenyi, Distribution-free multiple comparisons, thesis, Princeton 1963.
    J. Demsar, Statistical comparisons of classifiers over multiple data sets, JMLR 7, 2006, section 3.2.2.

    Examples
    --------
    >>> round(nemenyi_difference(4, 14), 2)  # Demsar's example has 2.569 sqrt(4 * 5 / (6 * 14)) = 1.25
    1.25
    """
    quantile = float(studentized_range.ppf(1 - LEVEL, methods, math.inf)) / math.sqrt(2)
    return quantile * math.sqrt(methods * (methods + 1) / (6 * subjects))


def compare_ranks(values: pd.DataFrame) -> RankComparison:
    """Rank the methods within each subject and test the mean ranks: Friedman's test, then Nemenyi's.

    Parameters
    ----------
    values
        A row a subject (at least 2), a column a method (at least 3), higher is better, no NaN. Equal values share their
        mean rank.

    References
    ----------
    M. Friedman, The use of ranks to avoid the assumption of normality, JASA 32(200), 1937; Demsar 2006, section 3.2.2.
    """
    rounded = values.round(DECIMALS)
    by_subject = rankdata(-rounded.to_numpy(), axis=1)
    ranks = pd.Series(by_subject.mean(axis=0), index=values.columns).sort_values(kind="stable")
    chi_square, p = 0.0, 1.0
    if np.ptp(by_subject, axis=1).any():  # else every subject has equal values only, and Friedman's ratio is 0 / 0
        chi_square, p = map(float, friedmanchisquare(*rounded.to_numpy().T))
    difference = nemenyi_difference(len(ranks), len(values))
    return RankComparison(
        ranks={str(method): float(rank) for method, rank in ranks.items()},
        subjects=len(values),
        chi_square=chi_square,
        p=p,
        critical_difference=difference,
        groups=_groups(ranks.to_numpy(), difference) if p < LEVEL else [(0, len(ranks) - 1)],
    )


def _groups(ranks: np.ndarray, difference: float) -> list[tuple[int, int]]:
    """Return the largest runs of sorted ranks that span less than the critical difference, of two methods or more."""
    groups: list[tuple[int, int]] = []
    for first, rank in enumerate(ranks):
        last = int(np.flatnonzero(ranks - rank < difference - 1e-9).max())
        if last > first and (not groups or last > groups[-1][1]):
            groups.append((first, last))
    return groups


@mpl.rc_context(RC)
def critical_difference_figure(
    structures: pd.DataFrame,
    pairs: pd.DataFrame,
    scans: pd.DataFrame,
    methods: list[str],
    *,
    labels: str = "nearest",
) -> Figure:
    """Draw the mean ranks of the methods' Dice over the subjects of one cohort, bars joining what does not differ.

    Affine alignment, the methods' starting point, is not ranked. Only pairs that every method registered count (and
    structures that each has). With fewer than 3 methods or 2 subjects the figure says so, and nothing else.

    Parameters
    ----------
    structures, pairs, scans, labels
        As for :func:`dmir.report.statistics.subject_scores`.
    methods
        The order of methods of equal rank; methods that are not named follow.

    Raises
    ------
    InputError
        As for :func:`dmir.report.statistics.subject_scores`.
    """
    present = [m for m in order_methods(pairs["method"], methods) if m not in REFERENCE_METHODS]
    values = subject_scores(structures, pairs, scans, "dice", labels=labels).means(present)
    cohort = str(pairs["cohort"].iloc[0])
    if len(present) < FEWEST_METHODS or len(values) < FEWEST_SUBJECTS:
        return _no_figure(cohort, len(present), len(values))
    comparison = compare_ranks(values)
    count = len(present)
    rows = -(-count // 2)
    depth = 0.16 + BAR * len(comparison.groups)  # from the axis to the first name
    figure = new_figure(COLUMN_WIDTH, HEAD + depth + ROW * rows * 1.25 + 0.05, layout="none")
    width, height = figure.get_size_inches()
    axis = figure.add_axes((0, 0, 1, 1))
    axis.set(xlim=(0, width), ylim=(height - HEAD, -HEAD))  # inches, y from the axis downwards
    axis.set_axis_off()
    unit = (width - 2 * SIDE) / (count - 1)
    places = np.array([SIDE + (rank - 1) * unit for rank in comparison.ranks.values()])
    _draw_head(axis, comparison, f"{cohort}, Dice ({labels})", unit)
    for level, (first, last) in enumerate(comparison.groups):
        y = 0.12 + BAR * level
        axis.plot([places[first] - 0.04, places[last] + 0.04], [y, y], color="#444444", linewidth=2.5, zorder=3)
    _draw_methods(axis, list(comparison.ranks), places, depth, width)
    return figure


def _no_figure(cohort: str, methods: int, subjects: int) -> Figure:
    """Return a figure that says why there is none."""
    figure = new_figure(COLUMN_WIDTH, 0.7)
    text = (
        f"{cohort}: no ranking of the methods. It takes {FEWEST_METHODS} methods\n(affine alignment not counted) and "
        f"{FEWEST_SUBJECTS} subjects that all registered;\nthere are {methods} and {subjects}."
    )
    figure.text(0.03, 0.5, text, va="center", fontsize=7)
    return figure


def _draw_head(axis: Axes, comparison: RankComparison, title: str, unit: float) -> None:
    """Draw the axis of ranks, the critical difference to scale, and the tests in words."""
    count, difference = len(comparison.ranks), comparison.critical_difference
    right = SIDE + (count - 1) * unit
    p = f"= {comparison.p:.2g}" if comparison.p >= 1e-4 else "< 0.0001"
    told = f"Friedman χ²({count - 1}) = {comparison.chi_square:.1f}, p {p}"
    verdict = "" if comparison.p < LEVEL else ": no method differs"
    axis.text(0.06, 0.13 - HEAD, f"{title}, n = {comparison.subjects} subjects", fontsize=8)
    axis.text(0.06, 0.27 - HEAD, told + verdict, fontsize=7)
    axis.plot([SIDE, SIDE + difference * unit], [0.4 - HEAD] * 2, color="black", linewidth=1)
    axis.plot([SIDE, SIDE + difference * unit], [0.4 - HEAD] * 2, color="black", marker="|", markersize=5, linewidth=0)
    axis.text(SIDE - 0.06, 0.4 - HEAD, f"CD = {difference:.2f}", fontsize=7, ha="right", va="center")
    axis.plot([SIDE, right], [0, 0], color="black", linewidth=0.8)
    for rank in range(1, count + 1):
        x = SIDE + (rank - 1) * unit
        axis.plot([x, x], [-0.05, 0], color="black", linewidth=0.8)
        axis.text(x, -0.08, str(rank), fontsize=7, ha="center")
    axis.text(SIDE - 0.1, 0, "mean rank,\n1 is best", fontsize=7, ha="right", va="center", linespacing=0.95)


def _draw_methods(axis: Axes, methods: list[str], places: np.ndarray, depth: float, width: float) -> None:
    """Draw each method's rank and lead a line to its name: the better half on the left, the others on the right."""
    colours, markers = method_colours(methods), method_markers(methods)
    half = -(-len(methods) // 2)
    for position, (method, x) in enumerate(zip(methods, places, strict=True)):
        left = position < half
        row = position if left else len(methods) - 1 - position
        y = depth + ROW * (0.5 + 1.25 * row)
        end = SIDE - 0.06 if left else width - SIDE + 0.06
        axis.plot([x, x, end], [0, y, y], color="#888888", linewidth=0.6, zorder=1)
        axis.plot(
            x, 0, color=colours[method], marker=markers[method], markersize=5, markeredgecolor="black",
            markeredgewidth=0.4, zorder=4, clip_on=False,
        )  # fmt: skip
        name = fill(method_name(method, short=True), NAME_LENGTH)
        gap, side = (-0.03, "right") if left else (0.03, "left")
        axis.text(end + gap, y, name, fontsize=7, ha=side, va="center", linespacing=0.95)
