"""What happens beside the training steps: validation, history, the state on disk."""

from __future__ import annotations

import logging
import math
import time
from collections.abc import Sequence
from signal import Signals
from typing import Any

import torch
from lightning.pytorch import Callback, LightningModule, Trainer

from dmir.training.devices import peak_memory_mb
from dmir.training.module import RegistrationModule, TrainingDiverged
from dmir.training.progress import ProgressReport
from dmir.training.resume import Best, ResumeFile, TrainingState
from dmir.training.stopping import Stopped, StopRequest, ignore_signals
from dmir.training.validation import Validation, validate

log = logging.getLogger(__name__)

TERMS = ("loss", "similarity", "regularisation", "gradient_norm")
HISTORY_ROWS = 500  # enough for a curve; each row is the mean of the steps since the one before
READ_EVERY = 10  # steps between two looks at the loss: each one waits for the GPU


class Milestones(Callback):
    """Before the first step, every ``validate_every`` steps and at the end: validate, keep the best, save the state.

    The history has rows between the validations too. Of several processes the first does all of this; the others only
    take part in reading the terms of the loss.

    Parameters
    ----------
    module
        What is trained.
    state
        Where the training stands; it is kept up to date.
    pairs
        Validation pairs as positions (moving, fixed) in the bank; may be empty.
    """

    def __init__(
        self,
        module: RegistrationModule,
        state: TrainingState,
        resume: ResumeFile,
        *,
        pairs: Sequence[tuple[int, int]],
    ) -> None:
        self.module = module
        self.settings = module.settings
        self.state = state
        self.resume = resume
        self.pairs = list(pairs)
        self.note_every = max(1, self.settings.steps // HISTORY_ROWS)
        self.progress = ProgressReport(self.settings.steps)
        self.stop_request = StopRequest()
        self._start = time.monotonic()
        self._seconds_before, self._waited_before = state.seconds, state.waited_seconds

    def on_train_start(self, trainer: Trainer, *args: Any) -> None:
        if self.state.optimiser:
            trainer.optimizers[0].load_state_dict(self.state.optimiser)
        if not trainer.is_global_zero:
            ignore_signals()  # once more: Lightning has just taken them
            return
        self.stop_request.listen()
        if not self.state.optimiser and self.pairs:
            self._note(self._validate())
            self._publish()
        self.progress.start(self.state.step)  # its clock is that of the steps

    def on_train_batch_end(self, trainer: Trainer, *args: Any) -> None:
        step = self.state.step = self.module.step
        milestone = step % self.settings.validate_every == 0 or step == self.settings.steps
        due = milestone or step % self.note_every == 0
        read = due or step % READ_EVERY == 0
        if read:
            self._read()
            if trainer.is_global_zero:
                self.progress.step(step, self.state.terms[-1][0])
        if not trainer.is_global_zero:
            return
        if due:
            self._note(self._validate() if milestone and self.pairs else None)
        if milestone:
            self._save()  # first: if the disk is full, the state is what counts
            self._publish()
        # several processes read together, at steps that they all know
        if self.stop_request.signal_number is not None and (read or trainer.world_size == 1):
            self._stop(self.stop_request.signal_number)

    def on_exception(self, trainer: Trainer, pl_module: LightningModule, exception: BaseException) -> None:
        self.progress.stop()

    def on_train_end(self, *args: Any) -> None:
        self.progress.stop()
        self._keep_account()

    def _read(self) -> None:
        try:
            self.state.terms += self.module.read_terms()
        except TrainingDiverged as error:
            if not self.module.trainer.is_global_zero:
                raise
            raise TrainingDiverged(f"{error}{self._keep_last_good(error)}", error.step, error.terms) from None

    def _keep_last_good(self, error: TrainingDiverged) -> str:
        """Save the state before the step that diverged, whose weights no later step has changed; tell where it is."""
        network = self.module.network
        if all(bool(torch.isfinite(value).all()) for value in network.state_dict().values()):
            self.state.step = error.step - 1
            self.state.terms += error.terms
            self._save()
        # else the running means of a batch normalisation are lost, and the last milestone's state is the good one
        path = self.resume.path
        return f" The last good state is in {path}." if path is not None and path.is_file() else ""

    def _stop(self, signal_number: int) -> None:
        if self.state.step == self.settings.steps:
            return  # it is at its end
        self._read()
        self._save()
        done = self.state.step, self.settings.steps
        log.warning("stopped by %s after step %d of %d", Signals(signal_number).name, *done)
        raise Stopped(signal_number)

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
        row = {
            **dict(zip(TERMS, means, strict=True)),
            "val_loss": math.nan if validation is None else validation.loss,
            "val_dice": math.nan if validation is None else validation.dice,
            "learning_rate": self.settings.learning_rate_at(max(step - 1, 0)),
            "seconds": round(self._seconds(), 3),
        }
        for logger in self.module.trainer.loggers:
            logger.log_metrics(row, step)
        self.state.terms = []

    def _publish(self) -> None:
        best = self.state.best
        self.progress.milestone(self.state.history[-1], is_best=best is not None and best.step == self.state.step)
        for logger in self.module.trainer.loggers:
            logger.save()

    def _save(self) -> None:
        self._keep_account()
        self.state.network = self.module.network.state_dict()
        self.state.optimiser = self.module.trainer.optimizers[0].state_dict()
        self.resume.save(self.state)

    def _keep_account(self) -> None:
        self.state.seconds = self._seconds()
        self.state.waited_seconds = self._waited_before + self.module.bank.waited_seconds
        self.state.peak_memory_mb = max(self.state.peak_memory_mb, peak_memory_mb(self.module.bank.device))

    def _seconds(self) -> float:
        return self._seconds_before + time.monotonic() - self._start
