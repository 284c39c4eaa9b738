"""What was run and what was found, in sentences that are computed from the tables."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pandas as pd

from dmir.report.columns import COLUMNS
from dmir.report.layout import rounded
from dmir.report.names import METHOD_NAMES, REFERENCE_METHODS, method_name
from dmir.report.notes import LEVEL
from dmir.report.style import method_colours
from dmir.tables import read_table

DICE, FOLDING, SECONDS = "dice", "nonpositive_jacobian_forward", "seconds"
SPLITS = ("train", "val", "test", "atlas")
NEEDED = ("cohort", "method", "n", "failed", DICE)


@dataclass(frozen=True)
class Row:
    """One method on one cohort; ``dot``, ``left`` and ``width`` are percentages of the axis, NaN where unknown."""

    name: str
    colour: str
    dice: str
    interval: str
    difference: str
    p: str
    hd95: str
    folding: str
    seconds: str
    dot: float
    left: float
    width: float
    winner: bool
    note: str


@dataclass(frozen=True)
class Cohort:
    """What was found on one cohort: sentences, a row a method, and the ends of the axis of Dice."""

    name: str
    sentences: tuple[str, ...]
    rows: tuple[Row, ...]
    axis: tuple[str, str]
    start: float
    interval_kind: str


@dataclass(frozen=True)
class CohortFacts:
    """How many scans a cohort has in each part, and how many pairs were tested."""

    name: str
    scans: str
    splits: str
    pairs: str
    structures: str
    role: str


@dataclass(frozen=True)
class Summary:
    """Everything that the first section of the page says."""

    run: tuple[str, ...]
    facts: tuple[CohortFacts, ...]
    cohorts: tuple[Cohort, ...]
    overall: tuple[str, ...]


@dataclass(frozen=True)
class _Results:
    """The rows of one cohort, by method: of the comparison, and of the tests of Dice."""

    cohort: str
    scores: pd.DataFrame
    tests: pd.DataFrame
    reference: str

    @property
    def ranked(self) -> pd.DataFrame:
        """The methods that can win: not the starting point, and not without a Dice."""
        rows = self.scores[~self.scores.index.isin(REFERENCE_METHODS) & self.scores[DICE].notna()]
        return rows.sort_values(DICE, ascending=False, kind="stable")

    def score(self, method: str, name: str) -> float:
        return _value(self.scores, method, name)

    def test(self, method: str, name: str) -> float:
        return _value(self.tests, method, name)


def _value(table: pd.DataFrame, method: str, column: str) -> float:
    if column not in table or method not in table.index:
        return math.nan
    values: dict[Any, Any] = table[column].to_dict()
    return float(values[method])


def _name(method: str) -> str:
    return method_name(method, short=True)


def listed(names: Sequence[str]) -> str:
    """Return names as a sentence lists them."""
    return " and ".join([", ".join(names[:-1]), names[-1]] if len(names) > 1 else names)


def _signed(value: float) -> str:
    return f"{value:+.3f}".replace("-", "\N{MINUS SIGN}")


def _p_text(value: float) -> str:
    return "p < 0.001" if value < 0.001 else f"p = {value:.3g}"


def _count(number: int, noun: str) -> str:
    return f"{number} {noun}{'' if number == 1 else 's'}"


def read_comparison(results: Path) -> pd.DataFrame | None:
    """Return the table of comparison; None where there is none, or another table has its name."""
    path = results / "tables" / "comparison.csv"
    if not path.is_file():
        return None
    table = read_table(path)
    return table if set(NEEDED) <= set(table.columns) else None


def _read_tests(results: Path, cohort: str, labels: str) -> pd.DataFrame:
    """Return the tests of Dice of one cohort by method; an empty table where there are none."""
    path = results / "tables" / f"statistics_{cohort}.csv"
    if not path.is_file():
        return pd.DataFrame()
    table = read_table(path)
    if not {"score", "method", "mean"} <= set(table.columns):
        return pd.DataFrame()
    chosen = table[table["score"] == DICE]
    if "labels" in chosen and (chosen["labels"] == labels).any():
        chosen = chosen[chosen["labels"] == labels]
    return chosen.drop_duplicates("method").set_index("method")


def summarise(
    results: Path,
    configuration: Mapping[str, Any],
    methods: Sequence[str],
    models: Mapping[str, str],
    labels: str,
    reference: str,
) -> Summary:
    """Return what was run and what was found; what no file tells is said to be unknown."""
    table = read_comparison(results)
    tested = [str(name) for name in configuration.get("test_on") or []]
    overall = [] if table is not None else ["There is no tables/comparison.csv: nothing can be said of who is best."]
    cohorts = []
    if table is not None:
        tested = list(dict.fromkeys([*tested, *table["cohort"]]))
        for cohort in tested:
            scores = table[table["cohort"] == cohort].drop_duplicates("method").set_index("method")
            if scores.empty:
                overall.append(f"{cohort}: the comparison table has no row.")
                continue
            cohorts.append(_cohort(_Results(cohort, scores, _read_tests(results, cohort, labels), reference)))
        overall += _failures(table)
        absent = [m for m in methods if m not in set(table["method"])]
        overall += [f"Not in the comparison table: {listed([_name(m) for m in absent])}."] if absent else []
    facts = [_facts(results, configuration, cohort, table) for cohort in _cohorts(configuration, tested)]
    return Summary(
        run=tuple(_run(configuration, methods, models, tested, labels, reference)),
        facts=tuple(facts),
        cohorts=tuple(cohorts),
        overall=tuple(overall),
    )


def _cohorts(configuration: Mapping[str, Any], tested: Sequence[str]) -> list[str]:
    trained = configuration.get("train_on")
    return list(dict.fromkeys([*([str(trained)] if trained else []), *tested]))


def _run(
    configuration: Mapping[str, Any],
    methods: Sequence[str],
    models: Mapping[str, str],
    tested: Sequence[str],
    labels: str,
    reference: str,
) -> list[str]:
    """Say what was compared, on which grid, and how the networks came about."""
    names = listed([_name(method) for method in methods])
    sentences = [
        f"{_count(len(methods), 'method')} on {_count(len(tested), 'cohort')} ({listed(list(tested))}): {names}."
    ]
    if METHOD_NAMES.get(reference, reference) != _name(reference):
        sentences.append(f"{_name(reference)} stands for {method_name(reference)}.")
    grid = configuration.get("grid") or {}
    if grid.get("shape") and grid.get("spacing"):
        shape = " × ".join(f"{number}" for number in grid["shape"])
        spacing = " × ".join(f"{number:g}" for number in grid["spacing"])
        sentences.append(f"Every scan lies on a grid of {shape} voxels of {spacing} mm.")
    networks = [method for method in methods if models.get(method, "none") != "none"]
    if networks and configuration.get("train_on"):
        trained = configuration["train_on"]
        sentences.append(f"Networks were trained on {trained}{_with_seeds(configuration, networks)}.")
        unseen = [cohort for cohort in tested if cohort != trained]
        sentences += [f"No network saw a scan of {listed(unseen)} in training."] if unseen else []
    sentences.append(f"Labels are warped by {labels} interpolation for every method, unless a column names another.")
    return sentences


def _with_seeds(configuration: Mapping[str, Any], networks: Sequence[str]) -> str:
    """Return which seeds the networks have, and whose are others; nothing where it is not known."""
    common = configuration.get("seeds")
    if not common:
        return ""
    settings = {name: (configuration.get("settings") or {}).get(name) for name in networks}
    own = {name: value["seeds"] for name, value in settings.items() if isinstance(value, dict) and value.get("seeds")}
    same = [name for name, seeds in own.items() if seeds == list(common)]
    others = "".join(f", {_name(name)} with {_seeds(seeds)}" for name, seeds in own.items() if name not in same)
    return f" with {_seeds(common)}{others}"


def _seeds(seeds: Sequence[int]) -> str:
    return f"{'seed' if len(seeds) == 1 else 'seeds'} {listed([str(seed) for seed in seeds])}"


def _facts(results: Path, configuration: Mapping[str, Any], cohort: str, table: pd.DataFrame | None) -> CohortFacts:
    path = results / "cohorts" / cohort / "scans.csv"
    scans, splits = "unknown", f"no cohorts/{cohort}/scans.csv"
    if path.is_file():
        listing = read_table(path, text=True)
        scans = str(len(listing))
        counts = dict(listing["split"].replace("", "unused").value_counts(sort=False)) if "split" in listing else {}
        order = [*(split for split in SPLITS if split in counts), *(split for split in counts if split not in SPLITS)]
        splits = ", ".join(f"{counts[split]} {split}" for split in order)
    rows = None if table is None else table[table["cohort"] == cohort]
    pairs = "" if rows is None or rows.empty else str(int((rows["n"] + rows["failed"]).max()))
    trained, tested = cohort == configuration.get("train_on"), rows is not None and not rows.empty
    settings = (configuration.get("cohorts") or {}).get(cohort) or {}
    role = " and ".join(word for word, applies in (("training", trained), ("test", tested)) if applies)
    return CohortFacts(cohort, scans, splits, pairs, str(settings.get("structures", "")), role)


def _cohort(results: _Results) -> Cohort:
    ranked = results.ranked
    sentences = ["No method has a Dice on this cohort."]
    winners: list[str] = []
    if not ranked.empty:
        best = rounded(float(ranked[DICE].iloc[0]), 3)
        winners = [m for m in ranked.index if rounded(float(ranked.loc[m, DICE]), 3) == best]
        sentences = [*_winner(results, winners, best), *_certainty(results, winners), *_below_affine(results)]
    sentences += [*_speed(results), *_folding(results)]
    return _with_axis(results, winners, sentences)


def _winner(results: _Results, winners: list[str], best: str) -> list[str]:
    if len(results.ranked) == 1:
        return [f"{_name(winners[0])} is the only method that is ranked: mean Dice {best}."]
    if len(winners) > 1:
        return [f"{listed([_name(m) for m in winners])} share the highest mean Dice, {best}."]
    low, high = (results.test(winners[0], f"mean_{end}") for end in ("low", "high"))
    subjects = results.test(winners[0], "subjects")
    about = [] if math.isnan(low) else [f"95 % interval {rounded(low, 3)} to {rounded(high, 3)}"]
    about += [] if math.isnan(subjects) else [_count(int(subjects), "subject")]
    told = f" ({', '.join(about)})" if about else ""
    return [f"{_name(winners[0])} has the highest mean Dice: {best}{told}."]


def _certainty(results: _Results, winners: list[str]) -> list[str]:
    """Say how far the best is from the reference, or the next from a reference that is best, and what that proves."""
    reference, ranked = results.reference, list(results.ranked.index)
    rivals = [m for m in ranked if m != reference]
    if math.isnan(results.score(reference, DICE)):
        return [f"{_name(reference)}, against which the others are tested, has no Dice on this cohort."]
    if not rivals:
        return []
    rival = rivals[0]
    who = _name(rival) if rival in winners else f"Next is {_name(rival)}, {rounded(results.score(rival, DICE), 3)}; it"
    both, difference = results.test(rival, "subjects_both"), results.test(rival, "difference")
    if math.isnan(difference) or math.isnan(both):
        simple = results.score(rival, DICE) - results.score(reference, DICE)
        what = "There is no test" if results.tests.empty else "No test could be made"
        return [f"{who} differs from {_name(reference)} by {_signed(simple)} in mean Dice.",
                f"{what}: whether that is more than chance is not known."]  # fmt: skip
    low, high = (results.test(rival, f"difference_{end}") for end in ("low", "high"))
    interval = "" if math.isnan(low) else f" (95 % interval {_signed(low)} to {_signed(high)})"
    first = (
        f"{who} differs from {_name(reference)} by {_signed(difference)}{interval}, over the "
        f"{_count(int(both), 'subject')} that both registered."
    )
    return [first, *_significance(results, rival)]


def _significance(results: _Results, rival: str) -> list[str]:
    tests, reference = results.tests, results.reference
    smallest = tests.get("smallest_p_holm", pd.Series(dtype=float)).dropna()
    if len(smallest) and float(smallest.min()) >= LEVEL:
        subjects, raw = int(tests["subjects_both"].max()), float(tests["smallest_p"].min())
        return [
            f"{_count(subjects, 'subject')} {'is' if subjects == 1 else 'are'} too few: no difference from "
            f"{_name(reference)} can be shown on this cohort, however large. The smallest p possible is "
            f"{raw:.3g}, and {float(smallest.min()):.3g} after Holm's correction."
        ]
    p, own = results.test(rival, "p_holm"), results.test(rival, "smallest_p_holm")
    if math.isnan(p):
        sentences = [f"No test of {_name(rival)} could be made."]
    elif p < LEVEL:
        sentences = [f"That is significant ({_p_text(p)} after Holm's correction)."]
    elif own >= LEVEL:
        sentences = [f"The subjects that differ are too few to show it ({_p_text(p)} after Holm's correction)."]
    else:
        sentences = [f"That is not significant ({_p_text(p)} after Holm's correction): it may be chance."]
    others = [m for m in results.ranked.index if m not in (rival, reference)]
    marked = [m for m in others if results.test(m, "p_holm") < LEVEL]
    higher = [_name(m) for m in marked if results.test(m, "difference") > 0]
    lower = [_name(m) for m in marked if results.test(m, "difference") < 0]
    parts = [f"{listed(names)} {word}" for names, word in ((higher, "higher"), (lower, "lower")) if names]
    if parts:
        sentences.append(f"Also significantly different from {_name(reference)}: {'; '.join(parts)}.")
    elif others:
        sentences.append(f"No other method differs significantly from {_name(reference)}.")
    return sentences


def _below_affine(results: _Results) -> list[str]:
    start = results.score("affine", DICE)
    below = [_name(m) for m in results.ranked.index if results.score(m, DICE) < start]
    return [f"Below the affine starting point ({rounded(start, 3)}): {listed(below)}."] if below else []


def _speed(results: _Results) -> list[str]:
    if SECONDS not in results.scores:
        return []
    times = results.ranked[SECONDS].dropna().sort_values(kind="stable")
    if len(times) < 2:
        return []
    (fast, quick), (slow, long) = ((str(times.index[i]), rounded(float(times.iloc[i]), None)) for i in (0, -1))
    return [f"{_name(fast)} is the fastest, {quick} s a pair (median); {_name(slow)} the slowest, {long} s."]


def _folding(results: _Results) -> list[str]:
    if FOLDING not in results.scores:
        return []
    folds = results.ranked[FOLDING].dropna().sort_values(kind="stable")
    if folds.empty:
        return []
    none = [_name(str(m)) for m in results.scores.index if m in folds.index and folds[m] == 0]
    most, share = str(folds.index[-1]), f"{rounded(float(folds.iloc[-1]), 3)} %"
    how = "|J| ≤ 0, forward differences"
    if len(none) == len(folds):
        return [f"No voxel folds with any method ({how})."]
    if none:
        return [f"No voxel folds with {listed(none)}; most fold with {_name(most)}: {share} ({how})."]
    least = f"{_name(str(folds.index[0]))} folds least, {rounded(float(folds.iloc[0]), 3)} % of voxels ({how})"
    return [f"{least}{f'; {_name(most)} most, {share}' if len(folds) > 1 else ''}."]


def _failures(table: pd.DataFrame) -> list[str]:
    """Say how many pairs failed, by method and cohort."""
    rows = table[table["failed"] > 0]
    if rows.empty:
        return ["No registration failed."]
    columns = [list(rows[name]) for name in ("cohort", "method", "n", "failed")]
    parts = [
        f"{_name(method)} {int(failed)} of {_count(int(n + failed), 'pair')} of {cohort}"
        for cohort, method, n, failed in zip(*columns, strict=True)
    ]
    return [
        f"Failed registrations: {'; '.join(parts)}. "
        "There the methods are not compared on the same pairs: each mean is over the method's own."
    ]


def _with_axis(results: _Results, winners: list[str], sentences: list[str]) -> Cohort:
    """Lay the rows out on one axis: means with their intervals, or with a standard deviation where there are none."""
    has_intervals = "mean_low" in results.tests and bool(results.tests["mean_low"].notna().any())
    spans = {}
    for method in map(str, results.scores.index):
        mean, spread = results.score(method, DICE), results.score(method, f"{DICE}_sd")
        span = (
            (results.test(method, "mean_low"), results.test(method, "mean_high"))
            if has_intervals
            else (mean - spread, mean + spread)
        )
        spans[method] = (mean, *span)
    ends = [value for span in spans.values() for value in span if not math.isnan(value)]
    low, high = (math.floor(min(ends) * 20) / 20, math.ceil(max(ends) * 20) / 20) if ends else (0.0, 1.0)
    high = high if high > low else low + 0.05

    def place(value: float) -> float:
        return round(100 * (value - low) / (high - low), 2)

    colours = method_colours(spans)
    order = sorted(spans, key=lambda m: -spans[m][0] if not math.isnan(spans[m][0]) else math.inf)
    rows = tuple(_row(results, method, colours[method], spans[method], place, winners) for method in order)
    start = results.score("affine", DICE)
    return Cohort(
        name=results.cohort,
        sentences=tuple(sentences),
        rows=rows,
        axis=(f"{low:.2f}", f"{high:.2f}"),
        start=place(start),
        interval_kind="95 % interval over subjects" if has_intervals else "± standard deviation over pairs",
    )


def _row(
    results: _Results, method: str, colour: str, span: tuple[float, float, float], place: Any, winners: list[str]
) -> Row:
    mean, low, high = span
    difference, p = results.test(method, "difference"), results.test(method, "p_holm")
    notes = [("starting point", method in REFERENCE_METHODS), ("reference", method == results.reference)]
    return Row(
        name=_name(method),
        colour=colour,
        dice=rounded(mean, 3),
        interval="" if math.isnan(low) else f"{rounded(low, 3)} to {rounded(high, 3)}",
        difference="" if math.isnan(difference) else _signed(difference),
        p="" if math.isnan(p) else rounded(p, 3) + (" †" if p < LEVEL else ""),
        hd95=rounded(results.score(method, "hd95"), 2),
        folding=rounded(results.score(method, FOLDING), 3),
        seconds=rounded(results.score(method, SECONDS), None, COLUMNS[SECONDS].least),
        dot=place(mean),
        left=place(low),
        width=round(place(high) - place(low), 2),
        winner=method in winners,
        note=", ".join(word for word, applies in notes if applies),
    )
