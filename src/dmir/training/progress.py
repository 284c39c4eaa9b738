"""How a training tells how far it is: a bar on a terminal, plain lines in a log."""

from __future__ import annotations

import logging
import math
import sys
import time

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn

log = logging.getLogger(__name__)

QUIET_SECONDS = 60.0  # a log hears of a training at least so often


class ProgressReport:
    """Progress of a training of so many steps."""

    def __init__(self, steps: int) -> None:
        self.steps = steps
        self._bar: Progress | None = None
        self._told = time.monotonic()
        self._first = (0, 0.0)

    def start(self, step: int) -> None:
        """Show the bar, if somebody is watching."""
        self._first = (step, time.monotonic())
        if sys.stderr.isatty():
            columns = (TextColumn("training"), BarColumn(), MofNCompleteColumn(), TextColumn("{task.description}"))
            self._bar = Progress(*columns, TimeRemainingColumn(), console=Console(stderr=True), transient=True)
            self._bar.add_task("", total=self.steps, completed=step)
            self._bar.start()

    def step(self, step: int, loss: float) -> None:
        """Tell of a step between two milestones."""
        if self._bar is not None:
            self._bar.update(self._bar.task_ids[0], completed=step, description=f"loss {loss:.4f}")
        elif time.monotonic() - self._told > QUIET_SECONDS:
            self._tell(f"step {step}/{self.steps}, loss {loss:.4f}, {self._left(step)}")

    def milestone(self, row: dict[str, int | float], is_best: bool) -> None:
        """Tell of a validation."""
        step = int(row["step"])
        named = {"loss": row["loss"], "validation loss": row["val_loss"], "validation Dice": row["val_dice"]}
        told = [f"step {step}/{self.steps}"]
        told += [f"{name} {value:.4f}" for name, value in named.items() if not math.isnan(value)]
        if is_best:
            told.append("the best so far")
        self._tell(", ".join([*told, self._left(step)]))
        if self._bar is not None:
            self._bar.update(self._bar.task_ids[0], completed=step)

    def stop(self) -> None:
        """Take the bar away."""
        if self._bar is not None:
            self._bar.stop()
            self._bar = None

    def _tell(self, line: str) -> None:
        self._told = time.monotonic()
        log.info(line)

    def _left(self, step: int) -> str:
        done = step - self._first[0]
        if done <= 0 or step >= self.steps:
            return f"{self.steps - step} steps left"
        each = (time.monotonic() - self._first[1]) / done
        return f"{each:.3g} s a step, {each * (self.steps - step) / 60:.3g} min left"
