"""What a reader must know beside the numbers: failures, absent structures, devices."""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping
from typing import Any

import pandas as pd

from dmir.report.names import method_name
from dmir.report.records import attempted_pairs, check_scores, keep_scored, order_methods


def comparison_note(structures: pd.DataFrame, pairs: pd.DataFrame, methods: list[str], primary: str = "nearest") -> str:
    """Return what a reader must know beside the numbers of :func:`comparison_table`: paragraphs of plain text.

    The interpolation; the methods that are not scored on all pairs, with counts and reasons; how many scores are
    missing because a structure is; the devices that time and memory belong to.
    """
    check_scores(structures, pairs, primary)
    attempts = attempted_pairs(pairs)
    paragraphs = [
        f"Labels are warped by {primary} interpolation for every method, unless a column names another; "
        "± is the standard deviation over pairs."
    ]
    if (attempts["method"] == "affine").any():
        paragraphs.append(f"{method_name('affine')} is the starting point of the other methods and is not ranked.")
    present = structures[structures["labels"] == primary]
    present = keep_scored(present, attempts)
    for cohort, of_cohort in attempts.groupby("cohort", sort=False):
        order = order_methods(of_cohort["method"], methods)
        paragraphs.append(_failures(cohort, of_cohort, order))
        paragraphs.append(_absences(cohort, present[present["cohort"] == cohort], order))
    paragraphs.append(_devices(pairs, methods))
    return "\n\n".join(paragraph for paragraph in paragraphs if paragraph)


def _failures(cohort: object, attempts: pd.DataFrame, methods: list[str]) -> str:
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


def _absences(cohort: object, scored: pd.DataFrame, methods: list[str]) -> str:
    """Say how many structure scores are NaN because the structure is absent from an image, per method."""
    absent = scored[scored["dice"].isna()]
    if absent.empty:
        return ""
    alike: dict[tuple[int, int], list[str]] = {}
    for method in methods:
        dice = scored.loc[scored["method"] == method, "dice"]
        if len(dice):
            alike.setdefault((int(dice.isna().sum()), len(dice)), []).append(method_name(method))
    names = sorted(map(str, absent["name"].unique()))
    which = ", ".join(names[:6]) + (f" and {len(names) - 6} more" if len(names) > 6 else "")
    told = "; ".join(
        f"{count} of {total} scores of {'every method' if len(alike) == 1 else ', '.join(group)}"
        for (count, total), group in alike.items()
    )
    return f"{cohort}: structures absent from an image are left out, neither 0 nor 1: {told} ({which})."


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
    told = "; ".join(f"{', '.join(names)}: {device}" for device, names in groups.items())
    return (
        "Time is the median over pairs of a warm registration: from both images in memory to the field in memory, with "
        "the transfers to and from a GPU and, where a field is refined, the refinement; reading, writing, training and "
        "a network's first call do not count. Memory is the highest peak during a pair, of the whole process's main "
        f"memory on a cpu and of the card's own on a GPU. Measured on: {told}."
    )
