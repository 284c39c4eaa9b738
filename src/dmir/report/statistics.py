"""Whether methods differ: paired tests, intervals and effect sizes over subjects.

The unit is the subject. Several pairs of a subject (more than one atlas, more than one scan) and several models of a
network (seeds) are no further subjects: their scores are averaged first. What is chosen and why is told in
``docs/statistics.md``.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any

import numpy as np
import pandas as pd
from scipy.stats import norm, wilcoxon

from dmir.errors import InputError
from dmir.report.notes import LEVEL, statistics_note
from dmir.report.records import attempted_pairs, check_scores, keep_scored, order_methods, require_columns

TESTED_SCORES = ("dice", "hd95", "nonpositive_jacobian_forward")
RESAMPLES = 10_000
BOOTSTRAP_SEED = 0
FEWEST_SUBJECTS = 3  # with fewer a bootstrap interval says nothing
DECIMALS = 10  # differences that agree so far are equal; what remains is rounding of the means

_UNIT = ["subject", "moving", "fixed"]


@dataclass(frozen=True)
class SignedRank:
    """A paired comparison: the p, the smallest p that so many subjects can give, and the effect from -1 to 1."""

    p: float
    smallest_p: float
    rank_biserial: float


def signed_rank(differences: np.ndarray) -> SignedRank:
    """Test whether paired differences are symmetric about zero: Wilcoxon's signed-rank test, two-sided.

    Differences of zero are dropped, as Wilcoxon did (scipy's ``zero_method="wilcox"``). p is exact up to 50 differences
    (13 where some are equal in size), above that the normal approximation. Of m differences that are not zero no p
    is smaller than 2 / 2^m: all signs alike, either way.

    The effect is the matched-pairs rank-biserial correlation r = (W+ - W-) / (W+ + W-), where W+ and W- are the sums of
    the ranks of the positive and of the negative differences.

    Parameters
    ----------
    differences
        (n,), one a subject; no NaN.

    Returns
    -------
    SignedRank
        All NaN without a difference; p = 1 and r = 0 where all are zero.

    References
    ----------
    F. Wilcoxon, Individual comparisons by ranking methods, Biometrics Bulletin 1(6), 1945.
    D. S. Kerby, The simple difference formula, Comprehensive Psychology 3, 2014 (r).

    Examples
    --------
    >>> signed_rank(np.array([1.0, 2.0, 3.0, 4.0, -5.0]))  # 10 of 32 sign patterns have W- <= 5
    SignedRank(p=0.625, smallest_p=0.0625, rank_biserial=0.3333333333333333)
    """
    if len(differences) == 0:
        return SignedRank(math.nan, math.nan, math.nan)
    rounded = np.round(np.asarray(differences, float), DECIMALS)
    moved = rounded[rounded != 0]
    if len(moved) == 0:
        return SignedRank(1.0, 1.0, 0.0)
    ranks = pd.Series(np.abs(moved)).rank().to_numpy()
    effect = float(np.sum(ranks * np.sign(moved)) / np.sum(ranks))
    p = float(wilcoxon(moved, alternative="two-sided", method="auto").pvalue)
    return SignedRank(p, 2.0 ** (1 - len(moved)), effect)


def holm(p: np.ndarray) -> np.ndarray:
    """Adjust the p of a family of tests so that the chance of any false finding stays below the level.

    The i-th smallest of m (i = 0, 1, ...) is multiplied by m - i, never below the one before it, at most 1. NaN is a
    test that was not made: it stays NaN and does not count.

    References
    ----------
    S. Holm, A simple sequentially rejective multiple test procedure, Scandinavian Journal of Statistics 6(2), 1979.

    Examples
    --------
    >>> holm(np.array([0.01, 0.04, 0.03])).tolist()
    [0.03, 0.06, 0.06]
    """
    p = np.asarray(p, float)
    adjusted = np.full(len(p), math.nan)
    order = [int(i) for i in np.argsort(p, kind="stable") if not math.isnan(p[i])]
    largest = 0.0
    for place, i in enumerate(order):
        largest = max(largest, min(1.0, (len(order) - place) * float(p[i])))
        adjusted[i] = largest
    return adjusted


def bootstrap_interval(values: np.ndarray, resamples: int = RESAMPLES) -> tuple[float, float]:
    """Return the 95 % BCa bootstrap interval of a mean: bias-corrected and accelerated, always the same resamples.

    Parameters
    ----------
    values
        (n,), one a subject; no NaN.
    resamples
        How often n values are drawn with replacement.

    Returns
    -------
    tuple of float
        Lower and upper end; NaN for fewer than 3 values, the value itself where all are equal.

    References
    ----------
    B. Efron, Better bootstrap confidence intervals, Journal of the American Statistical Association 82(397), 1987:
    the ends are the quantiles Phi(z0 + (z0 + z) / (1 - a (z0 + z))) of the resampled means, z = Phi^-1(0.025) and
    Phi^-1(0.975), z0 = Phi^-1(share of resampled means below the mean); the acceleration a of a mean is
    sum d^3 / (6 (sum d^2)^1.5) with d the deviations from it.
    """
    values = np.asarray(values, float)
    if len(values) < FEWEST_SUBJECTS:
        return math.nan, math.nan
    deviations = values - values.mean()
    if np.allclose(deviations, 0, rtol=0, atol=10.0**-DECIMALS):
        return float(values.mean()), float(values.mean())
    generator = np.random.default_rng(BOOTSTRAP_SEED)
    means = values[generator.integers(len(values), size=(resamples, len(values)))].mean(axis=1)
    # a resampled mean that equals the mean counts half
    bias = norm.ppf(((means < values.mean()).mean() + (means <= values.mean()).mean()) / 2)
    acceleration = np.sum(deviations**3) / (6 * np.sum(deviations**2) ** 1.5)
    shifted = bias + norm.ppf([LEVEL / 2, 1 - LEVEL / 2])
    low, high = np.quantile(means, norm.cdf(bias + shifted / (1 - acceleration * shifted)))
    return float(low), float(high)


@dataclass(frozen=True)
class SubjectScores:
    """One score of all methods on one cohort, ready to be averaged by subject.

    Attributes
    ----------
    wide
        A row a subject, pair and structure, a column a method: the mean over its models; NaN where it has none.
    seed_sds
        By method: the standard deviation, over its models, of their means over subjects; NaN with one model.
    shared
        Whether both scans of some pair are of tested subjects, so that subjects share scans.
    """

    wide: pd.DataFrame
    seed_sds: dict[str, float]
    shared: bool

    def means(self, methods: list[str]) -> pd.DataFrame:
        """Return a row a subject, a column a method, from the pairs and structures that all of these methods have."""
        complete = self.wide.reindex(columns=methods).dropna()
        return complete.groupby(_UNIT).mean().groupby("subject").mean()


def subject_scores(
    structures: pd.DataFrame, pairs: pd.DataFrame, scans: pd.DataFrame, score: str, *, labels: str = "nearest"
) -> SubjectScores:
    """Return one score by subject.

    A pair belongs to the subject of its moving scan, or of its fixed scan where the moving one is an atlas. A pair that
    a model of a method failed on does not count for that method.

    Parameters
    ----------
    structures, pairs
        As for :func:`dmir.report.tables.comparison_table`; of one cohort.
    scans
        The cohort's scans: scan, subject, split.
    score
        ``dice`` or ``hd95`` (of the structures), or a column of ``pairs``.

    Raises
    ------
    InputError
        A column is missing, several cohorts are there, or a pair has a scan that is not in ``scans``.
    """
    check_scores(structures, pairs, labels)
    require_columns(scans, {"scan", "subject", "split"}, "the table of scans")
    if pairs["cohort"].nunique() > 1:
        found = f"several in one table ({', '.join(map(str, pairs['cohort'].unique()))})"
        raise InputError("cohort", found=found, expected="the scores of one of them")
    attempts = attempted_pairs(pairs)
    if score in ("dice", "hd95"):
        chosen = keep_scored(structures[structures["labels"] == labels], attempts)
    else:
        chosen = keep_scored(pairs, attempts).assign(structure=0)
    known = scans.astype(str).set_index("scan")
    missing = sorted({*pairs["moving"], *pairs["fixed"]} - set(known.index))
    if missing:
        raise InputError(
            "the table of scans", found=f"no row for {', '.join(missing)}", expected="every scan of a pair"
        )
    from_atlas = chosen["moving"].map(known["split"]).to_numpy() == "atlas"
    chosen = chosen.assign(subject=chosen["moving"].where(~from_atlas, chosen["fixed"]).map(known["subject"]))
    wide = chosen.pivot_table(index=[*_UNIT, "structure"], columns="method", values=score, aggfunc="mean")
    by_pair = chosen.groupby(["method", "model", *_UNIT])[score].mean()
    by_model = by_pair.groupby(["method", "model", "subject"]).mean().groupby(["method", "model"]).mean()
    splits = pairs[["moving", "fixed"]].apply(lambda column: column.map(known["split"]))
    return SubjectScores(
        wide=wide,
        seed_sds={str(method): float(sd) for method, sd in by_model.groupby("method").std(ddof=1).items()},
        shared=bool((splits != "atlas").all(axis=1).any()),
    )


def statistics_table(
    structures: pd.DataFrame,
    pairs: pd.DataFrame,
    scans: pd.DataFrame,
    methods: list[str],
    reference: str,
    *,
    labels: str = "nearest",
    resamples: int = RESAMPLES,
) -> pd.DataFrame:
    """Test every method against one of them, on one cohort, for Dice, HD95 and folding.

    Parameters
    ----------
    structures, pairs, scans, labels
        As for :func:`subject_scores`.
    methods
        The order of the rows; methods that are not named follow.
    reference
        The method that the others are tested against.
    resamples
        Of the bootstrap.

    Returns
    -------
    DataFrame
        A row a score and method: cohort, score, labels, method, ``subjects`` (n of the mean), ``mean`` with its
        interval ``mean_low``, ``mean_high``, ``mean_seed_sd`` (over seeds), ``subjects_both`` (n of the test),
        ``difference`` (mean of method minus reference, in the score's unit) with its interval, ``rank_biserial``, ``p``
        (:func:`signed_rank`), ``p_holm`` (:func:`holm` over the methods of the score), ``smallest_p``,
        ``smallest_p_holm`` (what the two were if all subjects agreed for every method). The reference's own row has no
        test. Notes are in ``attrs["note"]``; ``attrs["daggers"]`` are the rows with ``p_holm`` below 0.05.

    Raises
    ------
    InputError
        As for :func:`subject_scores`, or nothing is known of the reference.
    """
    present = order_methods(pairs["method"], methods)
    if reference not in present:
        raise InputError("reference", found=repr(reference), expected=f"one of the methods: {', '.join(present)}")
    blocks, shared = [], False
    for score in TESTED_SCORES:
        scores = subject_scores(structures, pairs, scans, score, labels=labels)
        block = pd.DataFrame([_row(scores, method, reference, resamples) for method in present])
        for name in ("p", "smallest_p"):
            block[f"{name}_holm"] = holm(block[name].to_numpy())
        blocks.append(block.assign(score=score))
        shared = shared or scores.shared
    table = pd.concat(blocks, ignore_index=True).assign(cohort=pairs["cohort"].iloc[0], labels=labels)
    first = ["cohort", "score", "labels", "method"]
    last = ["p", "p_holm", "smallest_p", "smallest_p_holm"]
    table = table[[*first, *(name for name in table.columns if name not in [*first, *last]), *last]]
    table = table.astype({"subjects_both": "Int64"})  # missing for the reference itself
    table.attrs["note"] = statistics_note(table, reference, resamples, shared=shared)
    table.attrs["daggers"] = {"p_holm": list(table.index[table["p_holm"] < LEVEL])}
    table.attrs["only_in_csv"] = ["smallest_p", "smallest_p_holm"]
    return table


def _row(scores: SubjectScores, method: str, reference: str, resamples: int) -> dict[str, Any]:
    """Return what is known of one method, and of its difference from the reference."""
    own = scores.means([method])[method].to_numpy()
    low, high = bootstrap_interval(own, resamples)
    row: dict[str, Any] = {
        "method": method,
        "subjects": len(own),
        "mean": own.mean() if len(own) else math.nan,
        "mean_low": low,
        "mean_high": high,
        "mean_seed_sd": scores.seed_sds.get(method, math.nan),
    }
    both = scores.means([method, reference]) if method != reference else pd.DataFrame(columns=[method])
    differences = (both[method] - both[reference]).to_numpy(float) if len(both) else np.empty(0)
    low, high = bootstrap_interval(differences, resamples)
    test = signed_rank(differences)
    return {
        **row,
        "subjects_both": len(differences) if method != reference else pd.NA,
        "difference": differences.mean() if len(differences) else math.nan,
        "difference_low": low,
        "difference_high": high,
        "rank_biserial": test.rank_biserial,
        "p": test.p,
        "smallest_p": test.smallest_p,
    }
