"""What happens beside the training steps: validation, history, the state on disk."""

from __future__ import annotations

import logging
import math
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pandas as pd
from lightning.pytorch import Callback, LightningModule, Trainer
from lightning.pytorch.utilities.exceptions import SIGTERMException

from dmir.training.devices import peak_memory_mb
from dmir.training.module import RegistrationModule, TrainingDiverged
from dmir.training.progress import ProgressReport
from dmir.training.resume import Best, ResumeFile, TrainingState
from dmir.training.validation import Validation, validate
from dmir.volumes import atomic_path

log = logging.getLogger(__name__)

TERMS = ("loss", "similarity", "regularisation", "gradient_norm")
HISTORY_ROWS = 500  # enough for a curve; each row is the mean of the steps since the one before
READ_EVERY = 10  # steps between two looks at the loss: each one waits for the GPU


class Milestones(Callback):
    """Before the first step, every ``validate_every`` steps and at the end: validate, keep the best, save the state.

    The history has rows between the validations too.

    Parameters
    ----------
    module
        What is trained.
    state
        Where the training stands; it is kept up to date.
    pairs
        Validation pairs as positions (moving, fixed) in the bank; may be empty.
    history_path
        CSV of all rows so far, replaced whole at each milestone.
    """

    def __init__(
        self,
        module: RegistrationModule,
        state: TrainingState,
        resume: ResumeFile,
        *,
        pairs: Sequence[tuple[int, int]],
        history_path: Path,
    ) -> None:
        self.module = module
        self.settings = module.settings
        self.state = state
        self.resume = resume
        self.pairs = list(pairs)
        self.history_path = history_path
        self.note_every = max(1, self.settings.steps // HISTORY_ROWS)
        self.progress = ProgressReport(self.settings.steps)
        self._start = time.monotonic()
        self._seconds_before = state.seconds

    def on_train_start(self, trainer: Trainer, *args: Any) -> None:
        self.progress.start(self.state.step)
        if self.state.optimiser:
            trainer.optimizers[0].load_state_dict(self.state.optimiser)
        elif self.pairs:
            self._note(self._validate())
            self._publish()

    def on_train_batch_end(self, *args: Any) -> None:
        step = self.state.step = self.module.step
        milestone = step % self.settings.validate_every == 0 or step == self.settings.steps
        due = milestone or step % self.note_every == 0
        if due or step % READ_EVERY == 0:
            self._read()
            self.progress.step(step, self.state.terms[-1][0])
        if due:
            self._note(self._validate() if milestone and self.pairs else None)
        if milestone:
            self._publish()
            self._save()

    def on_exception(self, trainer: Trainer, pl_module: LightningModule, exception: BaseException) -> None:
        self.progress.stop()
        if isinstance(exception, SIGTERMException):  # raised between two steps, where the state is whole
            self._read()
            self._save()
            log.warning("stopped by SIGTERM after step %d of %d", self.state.step, self.settings.steps)

    def on_train_end(self, *args: Any) -> None:
        self.progress.stop()
        self._keep_account()

    def _read(self) -> None:
        try:
            self.state.terms += self.module.read_terms()
        except TrainingDiverged as error:
            path = self.resume.path
            kept = f" The last good state is in {path}." if path is not None and path.is_file() else ""
            raise TrainingDiverged(f"{error}{kept}") from None

    def _validate(self) -> Validation:
        """Validate, and keep the weights if they are the best so far."""
        module = self.module
        validation = validate(module.network, module.bank, self.pairs, module.objective, self.settings.precision)
        if self.state.best is None or validation.score > self.state.best.score:
            weights = {key: value.detach().cpu().clone() for key, value in module.network.state_dict().items()}
            self.state.best = Best(self.state.step, validation.score, validation.dice, weights)
        return validation

    def _note(self, validation: Validation | None) -> None:
        """Add a row to the history: the means of the steps since the row before, and a validation."""
        step, terms = self.state.step, self.state.terms
        means = [sum(values) / len(values) for values in zip(*terms, strict=True)] or [math.nan] * len(TERMS)
        self.state.history.append(
            {
                "step": step,
                **dict(zip(TERMS, means, strict=True)),
                "val_loss": math.nan if validation is None else validation.loss,
                "val_dice": math.nan if validation is None else validation.dice,
                "learning_rate": self.settings.learning_rate_at(max(step - 1, 0)),
                "seconds": round(self._seconds(), 3),
            }
        )
        self.state.terms = []

    def _publish(self) -> None:
        best = self.state.best
        self.progress.milestone(self.state.history[-1], is_best=best is not None and best.step == self.state.step)
        write_history(self.history_path, self.state.history)

    def _save(self) -> None:
        self._keep_account()
        self.state.network = self.module.network.state_dict()
        self.state.optimiser = self.module.trainer.optimizers[0].state_dict()
        self.resume.save(self.state)

    def _keep_account(self) -> None:
        self.state.seconds = self._seconds()
        self.state.peak_memory_mb = max(self.state.peak_memory_mb, peak_memory_mb(self.module.bank.device))

    def _seconds(self) -> float:
        return self._seconds_before + time.monotonic() - self._start


def write_history(path: Path, rows: Sequence[dict[str, int | float]]) -> None:
    """Replace the CSV of a training's history; numbers that do not exist are empty."""
    with atomic_path(path) as temporary:
        pd.DataFrame(rows).to_csv(temporary, index=False)
