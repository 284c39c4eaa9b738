"""Where a training's curves go: a table that survives everything, and TensorBoard to watch them live."""

from __future__ import annotations

import logging
import math
import shutil
from collections.abc import Callable, Mapping
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import pandas as pd
from lightning.pytorch.loggers import Logger, TensorBoardLogger

from dmir.training.resume import writing
from dmir.volumes import atomic_path

log = logging.getLogger(__name__)

TENSORBOARD_FOLDER = "tensorboard"


class HistoryLogger(Logger):
    """``history.csv``: all rows so far, replaced whole, so that it never has a half row or the same step twice.

    Lightning's own CSV logger appends, and a training that goes on from an earlier step would be told twice.

    Parameters
    ----------
    rows
        Those of earlier sessions; the list grows with each new one, for it is part of a training's state.
    """

    def __init__(self, path: str | Path, rows: list[dict[str, int | float]]) -> None:
        super().__init__()
        self.path = Path(path)
        self.rows = rows

    @property
    def name(self) -> str:
        return self.path.stem

    @property
    def version(self) -> str:
        return ""

    def log_hyperparams(self, params: Any, *args: Any, **kwargs: Any) -> None:
        """The hyperparameters stand in ``training.json``."""

    def log_metrics(self, metrics: Mapping[str, float], step: int | None = None) -> None:
        """Add a row; it is written when :meth:`save` is called."""
        self.rows.append({"step": step or 0, **metrics})

    def save(self) -> None:
        """Replace the table; numbers that do not exist are empty."""
        with writing(self.path, "the history"), atomic_path(self.path) as temporary:
            pd.DataFrame(self.rows).to_csv(temporary, index=False)


class Curves(TensorBoardLogger):
    """Event files for TensorBoard, under ``<folder>/tensorboard``; ``tensorboard --logdir results/models`` shows them.

    They are a convenience: what cannot be written there is said once and stops nothing.
    """

    def __init__(self, folder: str | Path, first_step: int) -> None:
        # with a step to purge, TensorBoard forgets what an interrupted session wrote of later steps
        options: dict[str, Any] = {"purge_step": first_step + 1} if first_step else {}
        super().__init__(folder, name=TENSORBOARD_FOLDER, version="", default_hp_metric=False, **options)
        self._silent = False

    def log_metrics(self, metrics: Mapping[str, float], step: int | None = None) -> None:
        """Write the numbers that exist."""
        known = {key: value for key, value in metrics.items() if not math.isnan(value)}
        self._attempt(lambda: super(Curves, self).log_metrics(known, step))

    def log_hyperparams(self, params: Any, *args: Any, **kwargs: Any) -> None:
        """The hyperparameters stand in ``training.json``."""

    def save(self) -> None:
        """Write what is still in memory."""
        self._attempt(lambda: self.experiment.flush())

    def finalize(self, status: str) -> None:
        """Close the file."""
        self._attempt(lambda: self.experiment.close())

    def _attempt(self, action: Callable[[], object]) -> None:
        if self._silent:
            return
        try:
            action()
        except OSError as error:
            self._silent = True
            log.warning("no more curves for TensorBoard: %s", error)


def loggers_of(folder: str | Path, rows: list[dict[str, int | float]], first_step: int) -> list[Logger]:
    """Return the loggers of a training in this folder, with the rows of earlier sessions; a new one forgets old curves.

    TensorBoard's logger is left out where the package is not installed.
    """
    folder = Path(folder)
    history = HistoryLogger(folder / "history.csv", rows)
    if not first_step:
        shutil.rmtree(folder / TENSORBOARD_FOLDER, ignore_errors=True)
    if find_spec("tensorboard") is None:
        log.info("no curves for TensorBoard: the package tensorboard is not installed")
        return [history]
    return [history, Curves(folder, first_step)]
