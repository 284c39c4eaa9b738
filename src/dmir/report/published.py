"""Published figures: what others report on the same data sets, beside our numbers and never mixed with them."""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping
from pathlib import Path

import pandas as pd

from dmir.errors import InputError
from dmir.report.records import require_columns
from dmir.structures import resources_folder
from dmir.tables import read_table

# the sources whose scans are a data set that others publish on; a folder of FreeSurfer's may hold any
DATASETS = {
    "learn2reg_oasis": "OASIS",
    "neurite_oasis": "OASIS",
    "oasis1": "OASIS",
    "lpba40": "LPBA40",
    "ixi": "IXI",
}
SCORES = ("dice", "hd95", "nonpositive_jacobian", "sdlogj", "nondiffeomorphic_volume")
PROTOCOL_COLUMNS = [
    "protocol", "dataset", "structures", "pairs", "split", "grid", "labels", "supervision", "scored_on", "citation",
    "obtained", "remarks",
]  # fmt: skip
UNRANKED = (
    "Published figures are what others report, with their own data preparation, split, structures and implementation: "
    "they are shown and not ranked, tested or averaged with ours."
)


def published_folder() -> Path:
    """Return the folder of the tables of published figures."""
    return resources_folder() / "published"


def published_scores() -> pd.DataFrame:
    """Return all published figures.

    Returns
    -------
    DataFrame
        A row a figure: protocol, method (as published), ours (the method here of that name, or empty), score, value
        (float, in the unit that the score has here: Dice from 0 to 1), printed (text as published), unit (of that),
        and the columns of ``protocols.csv``, empty where it is not known.

    Raises
    ------
    InputError
        A table lacks a column, or a figure its protocol.
    """
    scores = _read("scores.csv", ["protocol", "method", "ours", "score", "value", "unit"])
    protocols = _read("protocols.csv", PROTOCOL_COLUMNS)
    unknown = sorted(set(scores["protocol"]) - set(protocols["protocol"]))
    if unknown:
        raise InputError(published_folder() / "scores.csv", found=f"protocols {unknown}", expected="protocols.csv's")
    table = scores.rename(columns={"value": "printed"}).merge(protocols, on="protocol", validate="many_to_one")
    numbers = table["printed"].str.lstrip("<~").astype(float)
    percent = (table["score"] == "dice") & (table["unit"] == "%")
    table.insert(4, "value", numbers.where(~percent, numbers / 100))
    return table


def published_for(source: str) -> pd.DataFrame:
    """Return the published figures of the data set that a cohort's source reads; no row where there is none.

    Parameters
    ----------
    source
        As in the configuration: ``neurite_oasis``, ``ixi``, ``table``, ...

    Returns
    -------
    DataFrame
        As :func:`published_scores`.
    """
    table = published_scores()
    return table[table["dataset"] == DATASETS.get(source)].reset_index(drop=True)


def published_effects() -> pd.DataFrame:
    """Return the effects that the paper's prose tells of its parts: parts (such as ``caml+rbsc``), score, value (%)."""
    table = _read("ablation.csv", ["parts", "score", "value", "unit", "citation", "obtained"])
    return table.assign(value=table["value"].astype(float))


def _read(name: str, columns: list[str]) -> pd.DataFrame:
    path = published_folder() / name
    table = read_table(path, text=True)
    require_columns(table, columns, str(path))
    return table


def closest_protocol(figures: pd.DataFrame, labels: str) -> pd.Series:
    """Return the one of several figures whose protocol is closest to the pipeline's.

    Networks that learned from images alone come before others, a test before a validation, labels warped as here
    before those of which it is not known and before those warped otherwise; then the order of ``protocols.csv``.

    Parameters
    ----------
    figures
        Rows of :func:`published_scores`, at least one.
    labels
        Interpolation of the warped labels here.
    """
    order = {protocol: place for place, protocol in enumerate(_read("protocols.csv", PROTOCOL_COLUMNS)["protocol"])}

    def distance(row: pd.Series) -> tuple[bool, bool, int, int]:
        otherwise = 0 if row["labels"] == labels else 2 if row["labels"] else 1
        return row["supervision"] != "images only", row["scored_on"] != "test", otherwise, order[row["protocol"]]

    return min((row for _, row in figures.iterrows()), key=distance)


def with_published(comparison: pd.DataFrame, sources: Mapping[str, str], structures: Mapping[str, int]) -> pd.DataFrame:
    """Set published Dice beside ours, in columns of their own.

    Parameters
    ----------
    comparison
        A row a cohort and method, with n and labels: the table of :func:`dmir.report.tables.comparison_table`.
    sources
        Cohort -> its source, as for :func:`published_for`.
    structures
        Cohort -> how many structures it is scored on here, which the note tells beside the published number.

    Returns
    -------
    DataFrame
        The same rows with ``published_dice`` (NaN where nobody published it) and ``published_source`` (such as [1]);
        the note has the citation and the protocol of each.
    """
    labels = str(comparison["labels"].iloc[0])
    figures = {cohort: published_for(source) for cohort, source in sources.items()}
    chosen: list[pd.Series | None] = []
    for cohort, method in zip(comparison["cohort"], comparison["method"], strict=True):
        known = figures.get(str(cohort), published_scores()[:0])
        known = known[(known["score"] == "dice") & (known["ours"] == method)]
        chosen.append(None if known.empty else closest_protocol(known, labels))
    keys: dict[str, str] = {}
    for figure in chosen:
        if figure is not None:
            keys.setdefault(figure["protocol"], f"[{len(keys) + 1}]")
    table = comparison.copy()
    table["published_dice"] = [math.nan if figure is None else figure["value"] for figure in chosen]
    table["published_source"] = ["" if figure is None else keys[figure["protocol"]] for figure in chosen]
    if keys:
        paragraphs = [str(comparison.attrs.get("note", "")), UNRANKED, *_citations(table, keys, sources, structures)]
        table.attrs["note"] = "\n\n".join(paragraph for paragraph in paragraphs if paragraph)
    else:
        table["published_source"] = None
    return table


def _citations(
    table: pd.DataFrame, keys: Mapping[str, str], sources: Mapping[str, str], structures: Mapping[str, int]
) -> list[str]:
    """Return a paragraph a source: the citation, its protocol, and what the cohorts beside it have here."""
    protocols = {row["protocol"]: row for _, row in _read("protocols.csv", PROTOCOL_COLUMNS).iterrows()}
    paragraphs = []
    for protocol, key in keys.items():
        beside = table[table["published_source"] == key]
        here = [
            f"{cohort} ({sources[str(cohort)]}) {structures.get(str(cohort), 0)} structures, "
            f"{' to '.join(map(str, sorted({part['n'].min(), part['n'].max()})))} pairs, "
            f"labels warped by {part['labels'].iloc[0]} interpolation"
            for cohort, part in beside.groupby("cohort", sort=False)
        ]
        paragraphs.append(f"{_cited(key, protocols[protocol])} Here: {'; '.join(here)}.")
    return paragraphs


def _cited(key: str, protocol: pd.Series) -> str:
    remarks = f" Remarks: {protocol['remarks']}." if protocol["remarks"] else ""
    return f"{key} {protocol['citation']} (from: {protocol['obtained']}). Protocol: {protocol_line(protocol)}.{remarks}"


def protocol_line(protocol: pd.Series) -> str:
    """Return a protocol in one line: structures, pairs, split, grid, labels, supervision, and what is not known.

    Examples
    --------
    >>> protocol_line(published_for("ixi").iloc[0]).split("; ")[:2]
    ['30 structures', '115 test scans']
    """
    said = {
        "structures": "{} structures",
        "pairs": "{}",
        "split": "split {}",
        "grid": "grid {}",
        "labels": "labels warped by {} interpolation",
        "supervision": "learned from {}",
    }
    known = [words.format(protocol[name]) for name, words in said.items() if protocol[name]]
    unknown = [name for name in said if not protocol[name]]
    return "; ".join([*known, f"not known: {', '.join(unknown)}"] if unknown else known)


def published_table(sources: Iterable[str] | None = None) -> pd.DataFrame:
    """List published figures: a row a protocol and method.

    Parameters
    ----------
    sources
        The sources of a run's cohorts, whose data sets are listed; by default all data sets are.

    Returns
    -------
    DataFrame
        dataset, published_source (such as [1]), method (as published), and a column a score (``published_dice`` from
        0 to 1, the others in percent or as the note says) with the text of the source.
    """
    figures = published_scores()
    if sources is not None:
        figures = figures[figures["dataset"].isin({DATASETS.get(source) for source in sources})]
    keys = {protocol: f"[{place}]" for place, protocol in enumerate(dict.fromkeys(figures["protocol"]), start=1)}
    rows = []
    for (protocol, method), part in figures.groupby(["protocol", "method"], sort=False):
        row = {"dataset": part["dataset"].iloc[0], "published_source": keys[str(protocol)], "method": method}
        told = dict(zip(part["score"], part["printed"], strict=True))
        if (part["unit"][part["score"] == "dice"] == "%").any():
            told["dice"] = f"{part.loc[part['score'] == 'dice', 'value'].iloc[0]:.3f}"
        rows.append({**row, **{f"published_{score}": told.get(score) for score in SCORES}})
    columns = ["dataset", "published_source", "method", *(f"published_{score}" for score in SCORES)]
    table = pd.DataFrame(rows, columns=columns)
    cited = figures.drop_duplicates("protocol")
    citations = [_cited(keys[row["protocol"]], row) for _, row in cited.iterrows()]
    none = "None of the cohorts is of a data set with published figures here."
    table.attrs["note"] = "\n\n".join([UNRANKED, *citations] if citations else [none])
    return table
