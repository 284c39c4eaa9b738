"""The numbers of the tables: methods compared, structures listed, structures scored."""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any

import pandas as pd

from dmir.report.names import method_name, structure_group
from dmir.report.notes import LEVEL, comparison_note, counts_note, significance_note, training_devices
from dmir.report.published import with_published
from dmir.report.records import (
    FIELD_SCORES,
    INTERPOLATIONS,
    PAIR,
    STRUCTURE_COLUMNS,
    attempted_pairs,
    check_scores,
    keep_scored,
    order_methods,
    require_columns,
)
from dmir.report.writing import format_for_terminal, write_table

__all__ = [
    "comparison_note",
    "comparison_table",
    "format_for_terminal",
    "mark_differences",
    "structure_scores",
    "structure_table",
    "training_table",
    "write_table",
]


TRAINING_COLUMNS = (
    "method",
    "model",
    "parameters",
    "steps",
    "val_dice_before",
    "val_dice",
    "kept_step",
    "seconds_a_step",
    "training_seconds",
    "waited_percent",
    "training_memory_mb",
)


def _pair_means(structures: pd.DataFrame, labels: str) -> pd.DataFrame:
    """Return Dice and HD95 a (pair, model): the mean over the structures present in both images (NaN are left out)."""
    chosen = structures[structures["labels"] == labels]
    return chosen.groupby([*PAIR, "model"], sort=False)[["dice", "hd95"]].mean().reset_index()


def comparison_table(
    structures: pd.DataFrame,
    pairs: pd.DataFrame,
    methods: list[str],
    primary: str = "nearest",
    *,
    sources: Mapping[str, str] | None = None,
) -> pd.DataFrame:
    """Compare the methods: one row a cohort and method.

    A score of a method is the mean over pairs; of a pair, the mean over the method's models (seeds); Dice and HD95 of
    a pair and model, the mean over the structures present in both images. Spreads (``_sd``) are sample standard
    deviations over pairs; ``dice_seed_sd`` that of the models' means. ``seconds`` is the median over pairs,
    ``peak_memory_mb`` the maximum.

    Parameters
    ----------
    structures
        A row a pair, model, structure and interpolation: cohort, method, model, moving, fixed, structure, name,
        labels, dice, hd95 (mm).
    pairs
        A row a pair and model: status, reason, and the scores of the field.
    methods
        What the run compares, in the order of the rows; methods that are not named follow. One without any record has
        a row all the same: every pair failed.
    primary
        Interpolation of the warped labels (``nearest`` or ``linear``) that Dice, HD95 and TC are given for.
    sources
        Cohort -> where its scans are from (``ixi``, ``lpba40``, ...): what others published for the same data stands
        in columns of its own, see :func:`dmir.report.published.with_published`.

    Returns
    -------
    DataFrame
        ``n`` counts the pairs that every model of the method registered, ``failed`` the others. What a reader must
        know beside the numbers is in ``attrs["note"]``, which :func:`write_table` writes below the table.

    Raises
    ------
    InputError
        A column is missing, or the same pair is there twice.
    """
    check_scores(structures, pairs, primary)
    attempts = attempted_pairs(pairs, methods)
    other = next(labels for labels in INTERPOLATIONS if labels != primary)
    scored = keep_scored(structures, attempts)
    by_model = _pair_means(scored, primary)
    alternative = _pair_means(scored, other)
    fields = keep_scored(pairs, attempts)
    rows = []
    for cohort in dict.fromkeys(attempts["cohort"]):
        here = attempts[attempts["cohort"] == cohort]
        for method in order_methods(here["method"], methods):
            wanted = here[here["method"] == method]
            models = pairs.loc[(pairs["cohort"] == cohort) & (pairs["method"] == method), "model"].unique()
            row: dict[str, object] = {
                "cohort": cohort,
                "method": method,
                "models": ";".join(sorted(map(str, models))),
                "n": int(wanted["scored"].sum()),
                "failed": int((~wanted["scored"]).sum()),
                "labels": primary,
            }
            chosen = [_of(table, cohort, method) for table in (by_model, alternative, fields)]
            rows.append({**row, **_overlap(chosen[0], chosen[1], other), **_of_fields(chosen[2], primary)})
    table = pd.DataFrame(rows)
    table.attrs["note"] = comparison_note(structures, pairs, methods, primary)
    return table if sources is None else with_published(table, sources, scored_structures(scored, primary))


def scored_structures(structures: pd.DataFrame, labels: str) -> dict[str, int]:
    """Return how many structures of each cohort have a Dice in any pair."""
    known = structures[(structures["labels"] == labels) & structures["dice"].notna()]
    return {str(cohort): int(part.nunique()) for cohort, part in known.groupby("cohort", sort=False)["structure"]}


def _of(table: pd.DataFrame, cohort: object, method: str) -> pd.DataFrame:
    return table[(table["cohort"] == cohort) & (table["method"] == method)]


def _over_models(table: pd.DataFrame, column: str) -> pd.Series:
    """Return one value a pair: the mean over the models."""
    return table.groupby(["moving", "fixed"], sort=False)[column].mean()


def _overlap(by_model: pd.DataFrame, alternative: pd.DataFrame, other: str) -> dict[str, float]:
    dice, hd95 = _over_models(by_model, "dice"), _over_models(by_model, "hd95")
    return {
        "dice": dice.mean(),
        "dice_sd": dice.std(ddof=1),
        "dice_seed_sd": by_model.groupby("model")["dice"].mean().std(ddof=1),
        f"dice_{other}": _over_models(alternative, "dice").mean(),
        "hd95": hd95.mean(),
        "hd95_sd": hd95.std(ddof=1),
    }


def _of_fields(fields: pd.DataFrame, primary: str) -> dict[str, float]:
    means = {name: _over_models(fields, name).mean() for name in FIELD_SCORES}
    endpoint_error = _over_models(fields, "endpoint_error")
    back = _over_models(fields, "inverse_consistency_error") if "inverse_consistency_error" in fields else pd.Series()
    return {
        **means,
        "tc": _over_models(fields, f"tc_{primary}").mean(),
        "tc_deviation": _over_models(fields, f"tc_deviation_{primary}").mean(),
        "endpoint_error": endpoint_error.mean(),
        "endpoint_error_sd": endpoint_error.std(ddof=1),
        "inverse_consistency_error": back.mean(),  # NaN where nobody registered the pairs backward
        "seconds": _over_models(fields, "seconds").median(),
        "peak_memory_mb": fields["peak_memory_mb"].max(),
    }


def mark_differences(comparison: pd.DataFrame, statistics: pd.DataFrame, reference: str) -> pd.DataFrame:
    """Return a comparison table that marks what differs significantly from the reference, and says so below.

    Parameters
    ----------
    comparison
        From :func:`comparison_table`.
    statistics
        From :func:`dmir.report.statistics.statistics_table`, of all cohorts.
    reference
        The method that the others are tested against.

    Returns
    -------
    DataFrame
        The same numbers; ``attrs["daggers"]`` is column -> positions of the rows that :func:`write_table` marks.

    Raises
    ------
    InputError
        A column is missing.
    """
    needed = {"cohort", "method", "score", "subjects_both", "p", "p_holm", "smallest_p", "smallest_p_holm"}
    require_columns(statistics, needed, "the table of statistics")
    different = statistics[statistics["p_holm"] < LEVEL]
    rows = list(zip(comparison["cohort"], comparison["method"], strict=True))
    marked = comparison.copy()
    marked.attrs["daggers"] = {
        str(score): [rows.index(row) for row in zip(part["cohort"], part["method"], strict=True)]
        for score, part in different.groupby("score", sort=False)
    }
    paragraphs = [str(comparison.attrs.get("note", "")), significance_note(statistics, reference)]
    marked.attrs["note"] = "\n\n".join(paragraph for paragraph in paragraphs if paragraph)
    return marked


def structure_table(structures: pd.DataFrame) -> pd.DataFrame:
    """List a structure set with left and right side by side.

    Parameters
    ----------
    structures
        ``StructureSet.table``: id, name, hemisphere (left, right or both).

    Returns
    -------
    DataFrame
        name, and the ids under left, right, both (missing where there is none), in order of the smallest id.
    """
    require_columns(structures, {"id", "name", "hemisphere"}, "the structure set")
    groups: dict[str, dict[str, int]] = {}
    ordered = structures.sort_values("id")
    for number, name, hemisphere in zip(ordered["id"], ordered["name"], ordered["hemisphere"], strict=True):
        groups.setdefault(structure_group(str(name)), {})[str(hemisphere)] = int(number)
    table = pd.DataFrame(
        [{"name": name, **ids} for name, ids in groups.items()], columns=["name", "left", "right", "both"]
    )
    return table.astype({"left": "Int64", "right": "Int64", "both": "Int64"})


def training_table(models: Mapping[tuple[str, str], tuple[pd.DataFrame, Mapping[str, Any]]]) -> pd.DataFrame:
    """List the trainings: what each model cost, and what it brought on the validation scans.

    Parameters
    ----------
    models
        By (method, model): the training's history, and what its ``training.json`` says.

    Returns
    -------
    DataFrame
        A row a model: method, model, parameters, steps, ``val_dice_before`` (of the untrained network), ``val_dice``
        (of the weights that were kept), ``kept_step``, ``seconds_a_step``, ``training_seconds``,
        ``waited_percent`` (of that, for images), ``training_memory_mb``. Where a training failed only the first two
        and the steps are known, and the note says why.

    Raises
    ------
    InputError
        A history lacks a column.
    """
    rows: list[dict[str, Any]] = []
    failed = {}
    for (method, model), (history, summary) in models.items():
        require_columns(history, {"step", "val_dice"}, f"the history of {method}/{model}")
        row: dict[str, Any] = {"method": method, "model": model, "steps": int(summary["steps"])}
        if "failed" in summary:
            failed[f"{method}/{model}"] = summary["failed"]
        else:
            row |= _trained(history, summary)
        rows.append(row)
    table = pd.DataFrame(rows, columns=list(TRAINING_COLUMNS))
    if failed:
        table = table.astype({"parameters": "Int64", "kept_step": "Int64"})  # whole numbers, some of them missing
    summaries = [summary for _, summary in models.values() if "failed" not in summary]
    precisions = sorted({str(summary["precision"]) for summary in summaries})
    notes = [f"The training of {model} failed: {reason}" for model, reason in failed.items()]
    if summaries:
        notes.insert(
            0,
            "Validation Dice is the mean over the validation scans, labels warped by nearest interpolation, before the "
            "first step and of the weights that are kept. Training time and memory include validation; measured on "
            f"{training_devices(summaries)}, precision {' / '.join(precisions)}.",
        )
    if len(pairs := sorted({str(summary.get("pairs")) for summary in summaries})) > 1:
        notes.append(
            f"Validation pairs are made as those of training are, which differ here ({', '.join(pairs)}): "
            "the validation Dice of two networks is to be compared where they have the same."
        )
    table.attrs["note"] = "\n\n".join(notes)
    return table


def _trained(history: pd.DataFrame, summary: Mapping[str, Any]) -> dict[str, int | float]:
    validated = history.dropna(subset="val_dice").set_index("step")["val_dice"]
    seconds = float(summary["seconds"])
    return {
        "parameters": int(summary["parameters"]),
        "val_dice_before": float(validated.get(0, math.nan)),
        "val_dice": float(validated.get(summary["kept_step"], math.nan)),
        "kept_step": int(summary["kept_step"]),
        "seconds_a_step": seconds / int(summary["steps"]),
        "training_seconds": seconds,
        "waited_percent": 100 * float(summary["waited_for_images_seconds"]) / seconds,
        "training_memory_mb": float(summary["peak_memory_mb"]),
    }


def structure_scores(
    structures: pd.DataFrame, methods: list[str], score: str = "dice", labels: str = "nearest"
) -> pd.DataFrame:
    """Compare the methods structure by structure.

    Parameters
    ----------
    structures
        As for :func:`comparison_table`; one or several cohorts.
    score
        ``dice`` or another column where higher is better.

    Returns
    -------
    DataFrame
        A row a cohort and structure: cohort, structure, name, n, and for each method the mean over pairs (of the mean
        over models) and its ``<method>_sd``. ``n`` counts the pairs in which any method has the score; where a method
        has it in fewer, ``attrs["note"]`` says so. A pair that one model of a method lacks counts for none of them.
    """
    require_columns(structures, {*STRUCTURE_COLUMNS, score}, "the table of structure scores")
    chosen = _of_every_model(structures[structures["labels"] == labels])
    key = ["cohort", "structure", "name", "method", "moving", "fixed"]
    by_pair = chosen.groupby(key, sort=False)[score].mean().reset_index()
    present = order_methods(chosen["method"], methods)
    rows: list[dict[str, Any]] = []
    counts: list[dict[str, Any]] = []
    for (cohort, structure, name), part in by_pair.groupby(["cohort", "structure", "name"]):
        known = part[part[score].notna()]
        row = {"cohort": cohort, "structure": structure, "name": name}
        row["n"] = len(known[["moving", "fixed"]].drop_duplicates())
        for method in present:
            values = known.loc[known["method"] == method, score]
            counts.append({**row, "method": method, "pairs": len(values)})
            row |= {method: values.mean(), f"{method}_sd": values.std(ddof=1)}
        rows.append(row)
    cohorts = list(dict.fromkeys(chosen["cohort"]))
    rows.sort(key=lambda row: (cohorts.index(row["cohort"]), row["structure"]))
    table = pd.DataFrame(rows, columns=None if rows else ["cohort", "structure", "name", "n"])
    table.attrs["across"] = True
    table.attrs["note"] = _structure_note(score, labels, [m for m in methods if m not in present], counts)
    return table


def _of_every_model(structures: pd.DataFrame) -> pd.DataFrame:
    """Return the rows of the pairs that every model of a method has: all seeds are judged on the same pairs."""
    models = structures.groupby(["cohort", "method"], sort=False)["model"].transform("nunique")
    return structures[structures.groupby(PAIR, sort=False)["model"].transform("nunique") == models]


def _structure_note(score: str, labels: str, without: list[str], counts: list[dict[str, Any]]) -> str:
    paragraphs = [
        f"{score.capitalize()} with labels warped by {labels} interpolation; ± is the standard deviation over pairs."
    ]
    if without:
        paragraphs.append(f"Without any score: {', '.join(method_name(method) for method in without)}.")
    if counts:
        paragraphs.append(counts_note(pd.DataFrame(counts)))
    return "\n\n".join(paragraph for paragraph in paragraphs if paragraph)
