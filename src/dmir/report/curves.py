"""Training curves: the parts of the loss and the validation Dice, by step."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Literal

import matplotlib as mpl
import numpy as np
import pandas as pd
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.lines import Line2D

from dmir.errors import InputError
from dmir.report.names import method_name
from dmir.report.records import require_columns
from dmir.report.style import PAGE_WIDTH, RC, legend_columns, method_colours, new_figure
from dmir.tables import read_table

PANELS = {
    "loss": "Loss",
    "similarity": "Similarity part",
    "regularisation": "Regularisation part",
    "val_dice": "Validation Dice",
}
LineStyle = Literal["-", "--", ":", "-."]
SEED_STYLES: tuple[LineStyle, ...] = ("-", "--", ":", "-.")


def read_history(path: str | Path) -> pd.DataFrame:
    """Read a ``history.csv``: step, loss, similarity, regularisation, val_dice (NaN between validations), seconds.

    Raises
    ------
    InputError
        The file is missing, cannot be read as a table, or lacks a column.
    """
    history = read_table(path)
    require_columns(history, {"step", *PANELS}, str(path))
    return history


@mpl.rc_context(RC)
def training_curves(histories: Mapping[tuple[str, str], pd.DataFrame]) -> Figure:
    """Draw loss, its parts and validation Dice of every model.

    Parameters
    ----------
    histories
        By (method, model), for instance ``("caml", "seed1")``; what :func:`read_history` returns. Colours tell
        methods, line styles a method's models. Noisy curves are shown pale with their running mean on top; the best
        validation Dice, the checkpoint that is kept, is marked.

    Raises
    ------
    InputError
        No history.
    """
    if not histories:
        raise InputError("training histories", found="none", expected="the history of at least one model")
    methods = list(dict.fromkeys(method for method, _ in histories))
    colours = method_colours(methods)
    figure = new_figure(PAGE_WIDTH, 4.4)
    axes = dict(zip(PANELS, figure.subplots(2, 2, sharex=True).flat, strict=True))
    for (method, model), history in histories.items():
        models = [other for name, other in histories if name == method]
        style = SEED_STYLES[models.index(model) % len(SEED_STYLES)]
        for name, axis in axes.items():
            values = history[["step", name]].replace([np.inf, -np.inf], np.nan).dropna()
            _draw_curve(axis, values["step"].to_numpy(), values[name].to_numpy(), colours[method], style, name)
    for name, axis in axes.items():
        axis.set_title(PANELS[name], loc="left")
        axis.grid()
    for name in ("regularisation", "val_dice"):
        axes[name].set_xlabel("Training step")
    handles = [Line2D([], [], color=colours[method], label=method_name(method, short=True)) for method in methods]
    most = max((sum(name == method for name, _ in histories), method) for method in methods)
    if most[0] > 1:
        models = [model for name, model in histories if name == most[1]]
        handles += [
            Line2D([], [], color="#444444", linestyle=SEED_STYLES[i % len(SEED_STYLES)], label=model)
            for i, model in enumerate(models)
        ]
    figure.legend(handles=handles, loc="outside upper center", ncols=legend_columns(len(handles), 6))
    return figure


def _draw_curve(axis: Axes, steps: np.ndarray, values: np.ndarray, colour: str, style: LineStyle, name: str) -> None:
    if len(steps) == 0:
        return
    if name == "val_dice":
        best = int(np.argmax(values))
        axis.plot(steps, values, color=colour, linestyle=style, linewidth=1)
        axis.plot(steps[best], values[best], marker="o", markersize=4, color=colour, markeredgecolor="white", zorder=3)
        return
    window = max(1, len(values) // 40)
    if window > 1:
        axis.plot(steps, values, color=colour, alpha=0.15, linewidth=0.5)
        values = pd.Series(values).rolling(window, min_periods=1, center=True).mean().to_numpy()
    axis.plot(steps, values, color=colour, linestyle=style, linewidth=1)
