"""The studies as tables and figures: what each part of the proposed network adds, and what lambda trades."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import Any

import matplotlib as mpl
import numpy as np
import pandas as pd
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import FixedLocator, FuncFormatter, NullLocator

from dmir.errors import InputError
from dmir.report.names import method_name
from dmir.report.notes import training_devices
from dmir.report.published import published_effects
from dmir.report.records import require_columns
from dmir.report.style import COLUMN_WIDTH, METHOD_COLOURS, PAGE_WIDTH, RC, method_colours, method_markers, new_figure
from dmir.report.tables import comparison_table

ABLATION_PANELS = {
    "dice": "Dice",
    "nonpositive_jacobian_forward": "|J|≤0, %",
    "seconds": "s a pair",
    "training_memory_mb": "training, MB",
}
LEFT_OUT = ["models", "nonpositive_jacobian_central", "sdlogj", "tc_deviation"]  # the comparison table has them
LAMBDA_PANELS = {"dice": "Dice", "nonpositive_jacobian_forward": "|J|≤0, forward, %"}


def study_table(
    structures: pd.DataFrame,
    pairs: pd.DataFrame,
    rows: Mapping[str, Mapping[str, Any]],
    summaries: Mapping[str, Sequence[Mapping[str, Any]]],
    primary: str = "nearest",
) -> pd.DataFrame:
    """Compare the rows of a study: one row a cohort and variant, in the study's order.

    Parameters
    ----------
    structures, pairs, primary
        As for :func:`dmir.report.tables.comparison_table`.
    rows
        Method -> what the study changes in it: ``{"caml": True, "rbsc": False, "carsc": True}``, or
        ``{"network": "caml", "regularisation": 0.5}``. Switches become columns of their names in capitals.
    summaries
        Method -> what ``training.json`` says of each of its models.

    Returns
    -------
    DataFrame
        What is changed, the scores of the comparison table, ``parameters``, ``training_seconds`` (mean over the
        models), ``training_memory_mb`` (the highest), and ``method``; of a failed training nothing is known. Of an
        ablation, also what the parts bring, see :func:`effects_of_parts`.

    Raises
    ------
    InputError
        A table lacks a column, or a method its summary.
    """
    missing = [method for method in rows if not summaries.get(method)]
    if missing:
        raise InputError(
            "the summaries of the trainings", found=f"none of {', '.join(missing)}", expected="one a model"
        )
    compared = comparison_table(structures, pairs, list(rows), primary)
    records: list[dict[str, Any]] = []
    for row in _records(compared):
        method = str(row.pop("method"))
        changes = _shown(rows[method])
        trained = [summary for summary in summaries[method] if "failed" not in summary]
        trainings = pd.DataFrame.from_records(trained, columns=["parameters", "seconds", "peak_memory_mb"])
        cost = {
            "parameters": int(trainings["parameters"].iloc[0]) if trained else pd.NA,
            "training_seconds": float(trainings["seconds"].mean()),
            "training_memory_mb": float(trainings["peak_memory_mb"].max()),
        }
        cohort = row.pop("cohort")
        records.append({"cohort": cohort, **changes, **row, **cost, "method": method})
    table = pd.DataFrame(records).drop(columns=LEFT_OUT)
    trained = [summary for group in summaries.values() for summary in group if "failed" not in summary]
    table.attrs["note"] = "\n\n".join([str(compared.attrs["note"]), _training_note(trained)])
    switches = [key for key, value in next(iter(rows.values())).items() if isinstance(value, bool)]
    return effects_of_parts(table, switches) if switches else table


def effects_of_parts(table: pd.DataFrame, switches: Sequence[str]) -> pd.DataFrame:
    """Add what the parts bring, here and in the prose of the paper, to the table of an ablation.

    The paper calls it the "effect" of a part or two, and says that it "eliminated" two at a time. Both readings have
    their column here: what the parts add to the network without any, and what the complete network loses without them.

    Parameters
    ----------
    table
        A row a cohort and combination: cohort, dice, and a column of booleans a switch, named in capitals.
    switches
        The hyperparameters that were switched.

    Returns
    -------
    DataFrame
        The same rows with ``dice_gain_over_none`` (100 x Dice less that of the row with all off),
        ``dice_loss_without`` (100 x Dice of the row with all on less that of the row with exactly these off) and
        ``published_dice_gain`` (percent, as printed; NaN where the paper's prose tells none).
    """
    names = [switch.upper() for switch in switches]
    dice = {(row["cohort"], _parts(row, names)): row["dice"] for row in _records(table)}
    everything = frozenset(names)
    told = _published(names)
    published = {_parts_of(parts): value for parts, value in told["dice"].items()}
    gains, losses, effects = [], [], []
    for row in _records(table):
        cohort, on = row["cohort"], _parts(row, names)
        gains.append(100 * (row["dice"] - dice.get((cohort, frozenset()), math.nan)) if on else math.nan)
        rest = dice.get((cohort, everything - on), math.nan)
        losses.append(100 * (dice.get((cohort, everything), math.nan) - rest) if on else math.nan)
        effects.append(published.get(on, math.nan))
    columns = {"dice_gain_over_none": gains, "dice_loss_without": losses, "published_dice_gain": effects}
    before = [name for name in table.columns if name.startswith("dice")][-1]
    place = list(table.columns).index(before) + 1
    order = [*table.columns[:place], *columns, *table.columns[place:]]
    shown = table.assign(**columns)[order]
    shown.attrs["note"] = "\n\n".join([str(table.attrs.get("note", "")), _effects_note(told)]).strip()
    return shown


def _records(table: pd.DataFrame) -> list[dict[str, Any]]:
    return [{str(key): value for key, value in row.items()} for row in table.to_dict("records")]


def _parts(row: Mapping[str, Any], names: Sequence[str]) -> frozenset[str]:
    return frozenset(name for name in names if row[name])


def _parts_of(text: str) -> frozenset[str]:
    return frozenset(text.upper().split("+"))


def _published(names: Sequence[str]) -> dict[str, dict[str, float]]:
    """Return score -> parts -> percent as the paper's prose tells; nothing for an ablation of other parts."""
    effects = published_effects()
    known = set(names) == frozenset().union(*map(_parts_of, effects["parts"]))
    scores: dict[str, dict[str, float]] = {"dice": {}, "nonpositive_jacobian": {}}
    for row in effects.to_dict("records") if known else []:
        scores[row["score"]][row["parts"]] = float(row["value"])
    return scores


def _effects_note(told: Mapping[str, Mapping[str, float]]) -> str:
    ours = (
        "Gain over none: 100 x Dice of the row less that of the network without any of the parts. Loss without: 100 x "
        "Dice of the complete network less that of the network without exactly the row's parts."
    )
    if not told["dice"]:
        return ours
    folding = ", ".join(f"{parts.upper()} {value:g} %" for parts, value in told["nonpositive_jacobian"].items())
    return (
        f"{ours} Published effect: what the prose of the paper (Intelligent Data Analysis, doi 10.3233/IDA-230692) "
        "tells of these parts, on its own data and training. It does not say whether they are added to nothing or "
        "taken from the complete network, nor whether percent are points; its table of the ablation could not be "
        f"obtained. Of the Jacobian coefficient it tells: {folding}. Published figures are not ranked."
    )


def _shown(changes: Mapping[str, Any]) -> dict[str, Any]:
    """Return what a study changes as columns: switches in capitals, networks by the names that readers know."""
    shown = {key.upper() if isinstance(value, bool) else key: value for key, value in changes.items()}
    if "network" in shown:
        shown["network"] = method_name(str(shown["network"]), short=True)
    return shown


def _training_note(summaries: Sequence[Mapping[str, Any]]) -> str:
    steps = sorted({int(summary["steps"]) for summary in summaries})
    seeds = sorted({int(summary["seed"]) for summary in summaries})
    memory = sorted({str(summary["peak_memory_of"]) for summary in summaries})
    return (
        f"Each trained for {' or '.join(map(str, steps))} steps with the seed(s) {', '.join(map(str, seeds))} on "
        f"{training_devices(summaries)}; training memory is the highest peak of {' / '.join(memory)}. "
        "Differences between rows that are smaller than the spread over seeds say nothing."
    )


@mpl.rc_context(RC)
def ablation_figure(table: pd.DataFrame, switches: Sequence[str]) -> Figure:
    """Draw Dice, folding and cost of every combination, above dots that tell which parts are on; a column a cohort.

    Parameters
    ----------
    table
        Of :func:`study_table`.
    switches
        The hyperparameters that were switched.
    """
    names = [switch.upper() for switch in switches]
    require_columns(table, {"cohort", *names, *ABLATION_PANELS, "dice_sd"}, "the ablation table")
    cohorts = list(dict.fromkeys(table["cohort"]))
    figure = new_figure(min(PAGE_WIDTH, (COLUMN_WIDTH + 0.6) * len(cohorts)), 4.6)
    heights = [2.2, 1, 1, 1, 0.28 * len(names)]
    axes = figure.subplots(5, len(cohorts), sharex=True, squeeze=False, height_ratios=heights)
    for place, (column, cohort) in enumerate(zip(axes.T, cohorts, strict=True)):
        part = table[table["cohort"] == cohort].reset_index(drop=True)
        for axis, (name, label) in zip(column, ABLATION_PANELS.items(), strict=False):
            _draw_bars(axis, part, name)
            axis.set_ylabel(label if place == 0 else "")
        column[0].set_title(str(cohort), loc="left")
        _draw_switches(column[-1], part, names, labelled=place == 0)
    figure.align_ylabels()
    return figure


def _draw_bars(axis: Axes, part: pd.DataFrame, name: str) -> None:
    values = part[name].to_numpy(float)
    complete = np.arange(len(part)) == len(part) - 1
    colours = np.where(complete, METHOD_COLOURS["caml"], "#9a9a9a")
    if name == "dice":  # where zero means nothing, a point and not a bar
        spread = part["dice_sd"].fillna(0.0).to_numpy(float)
        axis.errorbar(np.arange(len(part)), values, yerr=spread, fmt="none", ecolor="#555555", elinewidth=0.8)
        axis.scatter(np.arange(len(part)), values, c=list(colours), s=26, edgecolor="black", linewidth=0.5, zorder=3)
    else:
        axis.bar(np.arange(len(part)), values, width=0.6, color=list(colours))
        axis.set_ylim(0, max(1.1 * float(np.nanmax(values, initial=0.0)), 1e-3))
    axis.grid(axis="y")
    axis.tick_params(axis="x", length=0)


def _draw_switches(axis: Axes, part: pd.DataFrame, names: Sequence[str], *, labelled: bool) -> None:
    """Draw which parts each column has: a black dot for on, a pale one for off (as an UpSet plot does)."""
    for place, name in enumerate(names):
        on = part[name].to_numpy(bool)
        axis.scatter(np.arange(len(part)), np.full(len(part), place), c=np.where(on, "black", "#dddddd"), s=22)
    axis.set_yticks(range(len(names)), list(names) if labelled else [""] * len(names))
    axis.set_ylim(len(names) - 0.4, -0.6)
    axis.set_xlim(-0.6, len(part) - 0.4)
    axis.xaxis.set_major_locator(NullLocator())
    axis.tick_params(length=0)
    for side in axis.spines.values():
        side.set_visible(False)


@mpl.rc_context(RC)
def lambda_figure(table: pd.DataFrame) -> Figure:
    """Draw Dice and folding against lambda, a line a network and a column a cohort; a table of :func:`study_table`."""
    require_columns(table, {"cohort", "network", "method", "regularisation", *LAMBDA_PANELS}, "the lambda table")
    cohorts = list(dict.fromkeys(table["cohort"]))
    figure = new_figure(min(PAGE_WIDTH, (COLUMN_WIDTH + 0.6) * len(cohorts)), 3.8)
    axes = figure.subplots(2, len(cohorts), sharex=True, squeeze=False)
    bases = {name: _base(part["method"]) for name, part in table.groupby("network", sort=False)}
    colours, markers = method_colours(bases.values()), method_markers(bases.values())
    for column, cohort in zip(axes.T, cohorts, strict=True):
        for network, part in table[table["cohort"] == cohort].groupby("network", sort=False):
            part = part.sort_values("regularisation")
            for axis, name in zip(column, LAMBDA_PANELS, strict=True):
                base = bases[network]
                line = {"color": colours[base], "marker": markers[base], "markersize": 4.5, "label": str(network)}
                axis.plot(part["regularisation"], part[name], **line)
        column[0].set_title(str(cohort), loc="left")
        column[1].set_xlabel("λ")
        for axis in column:
            _scale_lambda(axis, np.unique(table["regularisation"]))
            axis.grid()
    for axis, label in zip(axes[:, 0], LAMBDA_PANELS.values(), strict=True):
        axis.set_ylabel(label)
    figure.align_ylabels()
    if len(bases) > 1:
        figure.legend(*axes[0, 0].get_legend_handles_labels(), loc="outside upper center", ncols=min(len(bases), 6))
    return figure


def _base(methods: pd.Series) -> str:
    """Return the method that variants are named after: what stands before their lambda."""
    return str(methods.iloc[0]).split("-lambda-")[0]


def _scale_lambda(axis: Axes, values: np.ndarray) -> None:
    positive = values[values > 0]
    axis.set_xscale("symlog", linthresh=float(positive.min()) if positive.size else 1.0, linscale=0.5)
    axis.xaxis.set_major_locator(FixedLocator(list(values)))
    axis.xaxis.set_minor_locator(NullLocator())
    axis.xaxis.set_major_formatter(FuncFormatter(lambda value, _: f"{value:g}"))
