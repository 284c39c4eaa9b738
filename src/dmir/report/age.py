"""Dice against age: whether a method does worse on the brains of the old or of the young."""

from __future__ import annotations

import math
from dataclasses import dataclass

import matplotlib as mpl
import numpy as np
import pandas as pd
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.lines import Line2D
from scipy.stats import spearmanr, theilslopes

from dmir.report.names import method_name
from dmir.report.records import known_ages, order_methods
from dmir.report.statistics import DECIMALS, SubjectScores, subject_scores
from dmir.report.style import PAGE_WIDTH, RC, method_colours, method_markers, new_figure

FEWEST_FOR_RHO, FEWEST_FOR_TREND = 5, 10  # subjects: with fewer, one of them decides
DODGE, NARROWEST = 0.03, 0.7  # how far methods stand apart: a share of the ages' range, and of the least gap of two
HEIGHT, EMPTY_HEIGHT = 3.0, 1.0  # inches


@dataclass(frozen=True)
class AgeTrend:
    """How Dice goes with age for one method.

    Attributes
    ----------
    subjects
        How many have a score and an age.
    rho
        Spearman's rank correlation; NaN with fewer than 5 subjects, or where all ages or all scores are equal.
    slope, intercept
        Theil and Sen's line: Dice = intercept + slope x age in years; NaN with fewer than 10 subjects.
    """

    subjects: int
    rho: float
    slope: float
    intercept: float


def subject_ages(scores: SubjectScores, scans: pd.DataFrame) -> pd.Series:
    """Return the age of every subject that has a score, years, NaN where it is not known.

    Of a subject whose scores come from several scans of different ages (Dice is averaged over them too) it is the mean
    of the ages that are known.

    Parameters
    ----------
    scores
        What :func:`dmir.report.statistics.subject_scores` returns.
    scans
        The cohort's scans: scan, subject and, where anything is known, age.
    """
    units = scores.wide.index.to_frame(index=False)[["subject", "moving", "fixed"]].drop_duplicates()
    own = scans.set_index(scans["scan"].astype(str))["subject"].astype(str)
    # a pair's score is its moving scan's subject's, or its fixed scan's where the moving one is an atlas
    scan = units["moving"].where(units["moving"].map(own) == units["subject"], units["fixed"])
    scored = pd.DataFrame({"subject": units["subject"], "scan": scan}).drop_duplicates()
    ages = known_ages(scans["age"]) if "age" in scans else pd.Series(math.nan, index=scans.index)
    by_scan = ages.set_axis(scans["scan"].astype(str))
    return scored["scan"].map(by_scan).astype(float).groupby(scored["subject"]).mean()


def age_trend(ages: np.ndarray, dice: np.ndarray) -> AgeTrend:
    """Return how Dice goes with age, as far as the number of subjects allows to say.

    Parameters
    ----------
    ages, dice
        (n,), one a subject; no NaN.

    References
    ----------
    C. Spearman, The proof and measurement of association between two things, American Journal of Psychology 15, 1904.
    P. K. Sen, Estimates of the regression coefficient based on Kendall's tau, JASA 63(324), 1968: the slope is the
    median of the slopes between all two subjects, the line passes through the medians of ages and Dice.
    """
    ages, dice = np.asarray(ages, float), np.round(np.asarray(dice, float), DECIMALS)
    rho = slope = intercept = math.nan
    varied = len(np.unique(ages)) > 1
    if len(ages) >= FEWEST_FOR_RHO and varied and len(np.unique(dice)) > 1:
        rho = float(spearmanr(ages, dice).statistic)
    if len(ages) >= FEWEST_FOR_TREND and varied:
        line = theilslopes(dice, ages)
        slope, intercept = float(line.slope), float(line.intercept)
    return AgeTrend(len(ages), rho, slope, intercept)


@mpl.rc_context(RC)
def age_figure(
    structures: pd.DataFrame,
    pairs: pd.DataFrame,
    scans: pd.DataFrame,
    methods: list[str],
    *,
    labels: str = "nearest",
) -> Figure:
    """Draw the mean Dice of every subject against its age, on one cohort.

    A thin line stands at each subject's age and joins its methods, which are set a little side by side. From 5 subjects
    on, the legend has Spearman's rho of each method; from 10 on, thin lines show Theil and Sen's trends.

    Parameters
    ----------
    structures, pairs
        As for :func:`dmir.report.tables.comparison_table`; of one cohort.
    scans
        The cohort's scans: scan, subject, split, and age in years. Subjects of unknown age are left out, and the figure
        counts them; without any age it says so.
    methods
        The order of the legend; methods that are not named follow.
    labels
        The interpolation of the labels: nearest or linear.

    Raises
    ------
    InputError
        As for :func:`dmir.report.statistics.subject_scores`.
    """
    scores = subject_scores(structures, pairs, scans, "dice", labels=labels)
    ages = subject_ages(scores, scans)
    known = ages.dropna()
    cohort = str(pairs["cohort"].iloc[0])
    if known.empty:
        return _without_ages(cohort)
    present = order_methods(scores.wide.columns, methods)
    values = {method: scores.means([method])[method] for method in present}
    values = {method: dice[dice.index.isin(known.index)] for method, dice in values.items()}
    figure = new_figure(PAGE_WIDTH, HEIGHT)
    axis = figure.subplots()
    _draw_subjects(axis, values, known)
    handles = _draw_methods(axis, values, known)
    axis.set_title(cohort, loc="left")
    axis.set_xlabel(f"Age, years{_note(len(ages) - len(known), len(ages))}")
    axis.set_ylabel(f"Dice ({labels}), mean of a subject")
    axis.grid(axis="y")
    figure.legend(handles=handles, loc="outside right center", title=_legend_title(len(known)), alignment="left")
    return figure


def _without_ages(cohort: str) -> Figure:
    figure = new_figure(PAGE_WIDTH, EMPTY_HEIGHT)
    axis = figure.subplots()
    axis.set_axis_off()
    axis.text(0.5, 0.5, f"{cohort}: no ages known for this cohort", ha="center", va="center", transform=axis.transAxes)
    return figure


def _note(unknown: int, subjects: int) -> str:
    return f" ({unknown} of {subjects} subjects left out: age not known)" if unknown else ""


def _legend_title(subjects: int) -> str:
    if subjects < FEWEST_FOR_RHO:
        return f"n = {subjects} subjects"
    return f"n = {subjects} subjects\nSpearman's ρ with age"


def _draw_subjects(axis: Axes, values: dict[str, pd.Series], ages: pd.Series) -> None:
    """Draw a line at each subject's age, from its lowest to its highest Dice: what belongs together."""
    dice = pd.DataFrame(values)
    axis.vlines(ages[dice.index], dice.min(axis=1), dice.max(axis=1), color="#cccccc", linewidth=0.8, zorder=0.5)


def _offsets(methods: list[str], ages: pd.Series) -> dict[str, float]:
    """Return how many years each method stands beside its subject: so few that no two subjects' methods mix."""
    different = np.unique(ages)
    span = float(np.ptp(different)) or 1.0
    least = float(np.diff(different).min()) if len(different) > 1 else span
    width = min(DODGE * span, NARROWEST * least)
    places = np.linspace(-width / 2, width / 2, len(methods)) if len(methods) > 1 else np.zeros(1)
    return dict(zip(methods, places.tolist(), strict=True))


def _draw_methods(axis: Axes, values: dict[str, pd.Series], ages: pd.Series) -> list[Line2D]:
    """Draw every method's subjects and trend; return what the legend shows."""
    methods = list(values)
    colours, markers, offsets = method_colours(methods), method_markers(methods), _offsets(methods, ages)
    handles = []
    for method, dice in values.items():
        own = ages[dice.index].to_numpy()
        trend = age_trend(own, dice.to_numpy())
        rho = "" if math.isnan(trend.rho) else f", ρ = {trend.rho:+.2f}".replace("-", "\N{MINUS SIGN}")
        fewer = f", n = {trend.subjects}" if trend.subjects < len(ages) else ""  # it failed on some subjects
        (points,) = axis.plot(
            own + offsets[method],
            dice,
            linestyle="none",
            color=colours[method],
            marker=markers[method],
            markersize=4.5,
            markeredgecolor="black",
            markeredgewidth=0.4,
            label=f"{method_name(method, short=True)}{rho}{fewer}",
        )
        handles.append(points)
        if not math.isnan(trend.slope):
            ends = np.array([own.min(), own.max()])
            axis.plot(ends, trend.intercept + trend.slope * ends, color=colours[method], linewidth=0.8, zorder=1)
    return handles
