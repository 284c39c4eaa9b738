"""All tables and figures that scores alone allow: for methods that were run elsewhere, without a pipeline's results."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from pathlib import Path

import pandas as pd
from matplotlib.figure import Figure

from dmir.report.boxplot import dice_boxplot
from dmir.report.critical_difference import critical_difference_figure
from dmir.report.failures import failures_table
from dmir.report.names import method_name
from dmir.report.statistics import RESAMPLES, statistics_table
from dmir.report.style import save_figure
from dmir.report.tables import comparison_table, mark_differences, structure_scores
from dmir.report.topology import topology_table
from dmir.report.tradeoffs import dice_against_folding, dice_against_time
from dmir.report.writing import write_table
from dmir.tables import write_scores
from dmir.volumes import atomic_path

MEASURED = ("seconds", "peak_memory_mb")
TIMES_NOTE = (
    "Time (the median over pairs) and memory are as they were given: whether they mean the same for all methods is not "
    "known."
)


def write_report(
    folder: Path,
    structures: pd.DataFrame,
    pairs: pd.DataFrame,
    scans: Mapping[str, pd.DataFrame],
    methods: list[str],
    reference: str,
    *,
    labels: str = "nearest",
    resamples: int = RESAMPLES,
) -> tuple[pd.DataFrame, pd.DataFrame]:
    """Write the scores, and what the pipeline makes of scores: ``scores/``, ``tables/`` and ``figures/``.

    Parameters
    ----------
    structures, pairs
        Tidy tables, see :func:`dmir.metrics.elsewhere.score_registrations`.
    scans
        The scans of each cohort: scan, subject, split.
    methods
        Their order.
    reference
        The method that the others are tested against.
    labels
        Interpolation of the warped labels that tables and figures are of.
    resamples
        Of the bootstrap.

    Returns
    -------
    comparison, statistics
        As :func:`dmir.report.tables.comparison_table` and :func:`dmir.report.statistics.statistics_table` give them,
        the latter of all cohorts.
    """
    for kind, table in (("structures", structures), ("pairs", pairs)):
        write_scores(folder / "scores" / f"{kind}.parquet", table)
        with atomic_path(folder / "scores" / f"{kind}.csv") as temporary:
            table.to_csv(temporary, index=False)
    # the pipeline's words on how time and memory were measured are of its own measurements
    judged = pairs.drop(columns=["device", "threads"], errors="ignore")
    tested = []
    for cohort, of_scans in scans.items():
        scores, registered = (table[table["cohort"] == cohort] for table in (structures, judged))
        statistics = statistics_table(
            scores, registered, of_scans, methods, reference, labels=labels, resamples=resamples
        )
        write_table(statistics, folder / f"tables/statistics_{cohort}", f"Differences between the methods, {cohort}.")
        tested.append(statistics)
    everything = pd.concat(tested, ignore_index=True)
    comparison = comparison_table(structures, judged, methods, labels)
    comparison = mark_differences(comparison, everything, reference)
    comparison.attrs["note"] += "".join(f"\n\n{part}" for part in _notes(pairs))
    write_table(comparison, folder / "tables/comparison", "Comparison of the registration methods.")
    topology = topology_table(structures, judged, methods)
    write_table(topology, folder / "tables/topology", "Changes of the structures' volumes and topology.")
    write_table(failures_table(judged, methods), folder / "tables/failures", "Registrations that failed.")
    for cohort in scans:
        table = structure_scores(structures[structures["cohort"] == cohort], methods, labels=labels)
        write_table(
            table, folder / f"tables/dice_by_structure_{cohort}", f"Dice by structure, {cohort} ({labels} labels)."
        )
    for name, figure in _figures(structures, judged, scans, methods, comparison, labels):
        save_figure(figure, folder / "figures" / name)
    return comparison, everything


def _figures(
    structures: pd.DataFrame,
    pairs: pd.DataFrame,
    scans: Mapping[str, pd.DataFrame],
    methods: list[str],
    comparison: pd.DataFrame,
    labels: str,
) -> Iterator[tuple[str, Figure]]:
    """Yield the figures for which the numbers are known, with their names."""
    for cohort, of_scans in scans.items():
        scores = structures[structures["cohort"] == cohort]
        rows = comparison[comparison["cohort"] == cohort]
        if not rows["dice"].notna().any():
            continue
        yield f"dice_by_structure_{cohort}", dice_boxplot(scores, methods, labels=labels, cohort=cohort)
        ranks = (scores, pairs[pairs["cohort"] == cohort], of_scans, methods)
        yield f"critical_difference_{cohort}", critical_difference_figure(*ranks, labels=labels)
        if len(rows.dropna(subset=["dice", "nonpositive_jacobian_forward"])):
            yield f"dice_against_folding_{cohort}", dice_against_folding(rows)
        timed = rows.query("seconds > 0")
        if timed["dice"].notna().any():
            yield f"dice_against_time_{cohort}", dice_against_time(timed)


def _notes(pairs: pd.DataFrame) -> Iterator[str]:
    """Yield what a reader must know of scores that are not known, and of numbers that others measured."""
    scored = pairs[pairs["status"] == "ok"]
    by_method = scored.groupby("method", sort=False)["sdlogj"]
    names = [method_name(str(method)) for method, known in by_method if known.isna().all()]
    if names:
        yield (
            f"Scored from warped labels alone, which say nothing of folding and smoothness: {', '.join(names)}. "
            "Their labels were warped by the programs that made them."
        )
    if pairs[list(MEASURED)].notna().any(axis=None):
        yield TIMES_NOTE
