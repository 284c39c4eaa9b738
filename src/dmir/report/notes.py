"""What a reader must know beside the numbers: failures, absent structures, devices."""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping
from typing import Any

import pandas as pd

from dmir.report.columns import score_name
from dmir.report.names import method_name
from dmir.report.records import attempted_pairs, check_scores, keep_scored, order_methods

LEVEL = 0.05  # a difference is marked where its adjusted p is below; intervals cover the rest
AFFINE_NOTE = f"{method_name('affine')} is the starting point of the other methods and is not ranked."


def comparison_note(structures: pd.DataFrame, pairs: pd.DataFrame, methods: list[str], primary: str = "nearest") -> str:
    """Return what a reader must know beside the numbers of :func:`comparison_table`: paragraphs of plain text.

    The interpolation; the methods that are not scored on all pairs, with counts and reasons; how many scores are
    missing because a structure is; the devices that time and memory belong to.
    """
    check_scores(structures, pairs, primary)
    attempts = attempted_pairs(pairs, methods)
    paragraphs = [
        f"Labels are warped by {primary} interpolation for every method, unless a column names another; "
        "± is the standard deviation over pairs."
    ]
    if (attempts["method"] == "affine").any():
        paragraphs.append(AFFINE_NOTE)
    present = structures[structures["labels"] == primary]
    present = keep_scored(present, attempts)
    for cohort, of_cohort in attempts.groupby("cohort", sort=False):
        order = order_methods(of_cohort["method"], methods)
        paragraphs.append(failures_note(cohort, of_cohort, order))
        paragraphs.append(absences_note(cohort, present[present["cohort"] == cohort], order))
    paragraphs.append(_devices(pairs, methods))
    return "\n\n".join(paragraph for paragraph in paragraphs if paragraph)


def failures_note(cohort: object, attempts: pd.DataFrame, methods: list[str]) -> str:
    """Say which methods miss pairs: their means are over fewer, perhaps easier, pairs than the others'."""
    parts = []
    for method in methods:
        rows = attempts[attempts["method"] == method]
        failed = rows[~rows["scored"]]
        if len(failed):
            reasons = ", ".join(f"{reason} ({count})" for reason, count in failed["reason"].value_counts().items())
            parts.append(f"{method_name(method)} {len(rows) - len(failed)} of {len(rows)} (not scored: {reasons})")
    if not parts:
        return ""
    scored = attempts[attempts["scored"]]
    pairs_of = {frozenset(zip(rows["moving"], rows["fixed"], strict=True)) for _, rows in scored.groupby("method")}
    unequal = len(pairs_of) > 1 or scored["method"].nunique() < len(methods)
    warning = " The methods are not compared on the same pairs: each mean is over the method's own." if unequal else ""
    return f"{cohort}: pairs scored: {'; '.join(parts)}.{warning}"


def absences_note(cohort: object, scored: pd.DataFrame, methods: list[str]) -> str:
    """Say how many structure scores are NaN because the structure is absent from an image, per method."""
    absent = scored[scored["dice"].isna()]
    if absent.empty:
        return ""
    alike: dict[tuple[int, int], list[str]] = {}
    for method in methods:
        dice = scored.loc[scored["method"] == method, "dice"]
        if len(dice):
            alike.setdefault((int(dice.isna().sum()), len(dice)), []).append(method_name(method))
    which = listed_names(absent["name"])
    told = "; ".join(
        f"{count} of {total} scores of {'every method' if len(alike) == 1 else ', '.join(group)}"
        for (count, total), group in alike.items()
    )
    return f"{cohort}: structures absent from an image are left out, neither 0 nor 1: {told} ({which})."


def counts_note(counts: pd.DataFrame) -> str:
    """Say which methods have a structure's score in fewer pairs than the table's n, and in how many.

    Parameters
    ----------
    counts
        A row a cohort, structure and method: cohort, name, method, pairs (with the score), n (of any method).
    """
    paragraphs = []
    for cohort, of_cohort in counts.groupby("cohort", sort=False):
        fewer = of_cohort[of_cohort["pairs"] < of_cohort["n"]]
        parts = []
        for (method, pairs, n), rows in fewer.groupby(["method", "pairs", "n"], sort=False):
            everywhere = len(rows) == of_cohort["name"].nunique()
            names = "all structures" if everywhere else listed_names(rows["name"])
            parts.append(f"{method_name(str(method))} {pairs} of {n} pairs ({names})")
        if parts:
            paragraphs.append(
                f"{cohort}: a method's mean is over its own pairs, and n counts those of any method. "
                f"Fewer than n: {'; '.join(parts)}."
            )
    return "\n\n".join(paragraphs)


def listed_names(names: Iterable[object], most: int = 6) -> str:
    """Return names as a list in a sentence: the first few in order, and how many more there are.

    Examples
    --------
    >>> listed_names("cba", most=2)
    'a, b and 1 more'
    """
    ordered = sorted(set(map(str, names)))
    return ", ".join(ordered[:most]) + (f" and {len(ordered) - most} more" if len(ordered) > most else "")


def training_devices(summaries: Iterable[Mapping[str, Any]]) -> str:
    """Say what the trainings ran on, given what ``training.json`` says of each."""
    return " / ".join(sorted({f"{summary['device']}, {summary['threads']} thread(s)" for summary in summaries}))


def _devices(pairs: pd.DataFrame, methods: list[str]) -> str:
    """Say which machine part the times and memories belong to, for a CPU's minute is not a GPU's."""
    if not {"device", "threads"} <= set(pairs.columns):
        return ""
    groups: dict[str, list[str]] = {}
    known = pairs[pairs["device"].notna() & (pairs["device"].astype(str) != "")]
    for method in order_methods(known["method"], methods):
        rows = known[known["method"] == method]
        used = []
        for device, threads in rows[["device", "threads"]].drop_duplicates().itertuples(index=False):
            count = float(str(threads)) if pd.notna(threads) else math.nan
            on_cpu = str(device).startswith("cpu") and count >= 1
            used.append(f"{device}, {count:.0f} thread{'s' if count > 1 else ''}" if on_cpu else str(device))
        groups.setdefault(" / ".join(used), []).append(method_name(method))
    if not groups:
        return ""
    told = "; ".join(
        f"{'every method' if len(groups) == 1 and len(names) > 1 else ', '.join(names)}: {device}"
        for device, names in groups.items()
    )
    of_affine = (
        f" {method_name('affine')} is found in the preprocessing: what it has here is the time of writing down a field "
        "of zeros, and the memory of the process that holds the images."
        if (known["method"] == "affine").any()
        else ""
    )
    return (
        "Time is the median over pairs of a warm registration: from both images in memory to the field in memory, with "
        "the transfers to and from a GPU and, where a field is refined, the refinement; reading, writing, training and "
        "a network's first call do not count. Memory is the highest peak during a pair, of the whole process's main "
        f"memory on a cpu and of the card's own on a GPU.{of_affine} Measured on: {told}."
    )


def statistics_note(table: pd.DataFrame, reference: str, resamples: int, *, shared: bool) -> str:
    """Say what the numbers of :func:`dmir.report.statistics.statistics_table` are, and what they cannot show.

    ``shared`` tells that both scans of a pair are of tested subjects.
    """
    labels, name = table["labels"].iloc[0], method_name(reference)
    paragraphs = [
        "The unit is the subject: a subject's pairs, scans and models (seeds) are averaged first. Labels are warped "
        f"by {labels} interpolation.",
        f"Intervals: {1 - LEVEL:.0%} bootstrap (BCa, {resamples} resamples of the subjects, fixed seed), none below 3 "
        "subjects; with fewer than about 10 they tend to be too narrow.",
        f"Difference, r and p: method minus {name}, over the subjects (and their pairs and structures) that both "
        "registered, n (both). p is of the two-sided Wilcoxon signed-rank test, exact for small n, differences of zero "
        "dropped; Holm's correction is over the methods of one score. r, the matched-pairs rank-biserial correlation, "
        "is 1 where the method's score is higher for every subject that differs, −1 where it is lower. "
        f"† p (Holm) below {LEVEL}.",
    ]
    if table["mean_seed_sd"].notna().any():
        paragraphs.append("The sd over seeds is that of the models' means over subjects; no interval contains it.")
    if shared:
        paragraphs.append(
            "Both scans of a pair are of tested subjects, so that subjects share scans and are not independent: "
            "intervals are too narrow and p too small."
        )
    if not (table["subjects_both"].fillna(0) > 0).any():
        paragraphs.append(f"No test: no subject was registered by {name} and by another method.")
    return "\n\n".join([*paragraphs, *_out_of_reach(table)])


def _out_of_reach(table: pd.DataFrame) -> list[str]:
    """Say which tests could not be significant whatever the methods do: a sentence a number of differences."""
    scores_of: dict[str, list[str]] = {}
    for score, block in table.groupby("score", sort=False):
        # where every subject is equal there is nothing to find
        tested = block[(block["smallest_p"] < 1) | (block["subjects_both"] == 1)]
        hopeless = tested[tested["smallest_p_holm"] >= LEVEL]
        tests = int(block["p"].notna().sum())
        for smallest in sorted(set(hopeless["smallest_p"])):
            rows = hopeless[hopeless["smallest_p"] == smallest]
            who = "" if len(rows) == len(tested) else f" for {_listed(rows['method'])}"
            sentence = (
                f"n = {1 - math.log2(smallest):.0f} (subjects that differ) is too small{who}: the smallest p possible "
                f"is {smallest:.3g}, {rows['smallest_p_holm'].min():.3g} after Holm's correction over {tests} "
                f"test{'s' if tests > 1 else ''}; no difference can be significant at {LEVEL}, however large."
            )
            scores_of.setdefault(sentence, []).append(score_name(str(score), str(block["labels"].iloc[0])))
    return [f"{'; '.join(scores)}: {sentence}" for sentence, scores in scores_of.items()]


def _listed(methods: Iterable[str]) -> str:
    return ", ".join(method_name(method, short=True) for method in methods)


def significance_note(statistics: pd.DataFrame, reference: str) -> str:
    """Say what the † of a comparison table means, and of which cohorts it says nothing; a row a test, as in the csv."""
    paragraphs = []
    marked = statistics["p_holm"] < LEVEL
    if marked.any():
        paragraphs.append(
            f"† differs from {method_name(reference)}: two-sided Wilcoxon signed-rank test over subjects, p below "
            f"{LEVEL} after Holm's correction over the methods; Dice, HD95 and |J|≤0 (forward) are tested."
        )
    for cohort, rows in statistics[statistics["p"].notna()].groupby("cohort", sort=False):
        if rows["smallest_p_holm"].min() >= LEVEL:
            n = int(rows["subjects_both"].max())
            paragraphs.append(
                f"{cohort}: n = {n} subjects are too few to call any difference from {method_name(reference)} "
                f"significant: the smallest p possible is {rows['smallest_p'].min():.3g}, "
                f"{rows['smallest_p_holm'].min():.3g} after Holm's correction over the methods. "
                "No mark does not mean no difference."
            )
        elif not (rows["p_holm"] < LEVEL).any():
            paragraphs.append(f"{cohort}: no method differs significantly from {method_name(reference)}.")
    return "\n\n".join(paragraphs)
