"""The state of an unfinished training on disk, so that a killed one goes on where it was.

One file, replaced whole: weights, optimiser, history, best weights so far. No random state is in it, because none is
carried along: the order of the pairs and the random numbers of a step are functions of the seed and the step.
"""

from __future__ import annotations

import contextlib
import hashlib
import json
import logging
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field, fields
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from torch import nn

from dmir.archives import check_archive
from dmir.errors import DmirError, StorageError
from dmir.storage import told_as_storage
from dmir.training.devices import GPU_FAILURE
from dmir.volumes import atomic_path

log = logging.getLogger(__name__)


@contextlib.contextmanager
def writing(path: str | Path, what: str) -> Iterator[None]:
    """Tell as a DmirError, in a user's words, that a file cannot be written: the disk is full, or read-only."""
    try:
        with told_as_storage(path):
            yield
    except (StorageError, OSError, RuntimeError, SafetensorError) as error:  # torch has no words for it
        if GPU_FAILURE.search(str(error)):  # it was the copy from the card that failed
            raise
        reason = error.reason if isinstance(error, StorageError) else " ".join(str(error).split())[:200]
        raise DmirError(
            f"{path}: {what} cannot be written: {reason}. Make room on this disk and start again: the training goes on"
            " from the last state that was written."
        ) from error


@dataclass
class Best:
    """The best weights so far, on the CPU, and where they stood."""

    step: int
    score: tuple[float, float]
    dice: float
    weights: dict[str, torch.Tensor]


@dataclass
class TrainingState:
    """All of a training that a later process needs.

    Attributes
    ----------
    step
        Steps done.
    seconds, waited_seconds
        Spent so far, in all sessions; and how much of it waiting for images.
    peak_memory_mb
        Largest of all sessions.
    history
        One row a validation.
    terms
        Loss, similarity, regularisation, gradient norm of each step since the last row.
    network, optimiser
        Their ``state_dict``.
    gpu
        How busy the GPUs were in the last session: :meth:`~dmir.training.utilisation.GpuUtilisation.summary`.
    """

    step: int = 0
    seconds: float = 0.0
    waited_seconds: float = 0.0
    peak_memory_mb: float = 0.0
    history: list[dict[str, int | float]] = field(default_factory=list)
    terms: list[list[float]] = field(default_factory=list)
    best: Best | None = None
    network: dict[str, Any] = field(default_factory=dict)
    optimiser: dict[str, Any] = field(default_factory=dict)
    gpu: dict[str, float] = field(default_factory=dict)


def fingerprint(settings: Mapping[str, Any]) -> str:
    """Return a short hash of anything JSON can hold (other objects by their text); the order of keys is no matter."""
    text = json.dumps(settings, sort_keys=True, default=str)
    return hashlib.sha256(text.encode()).hexdigest()[:16]


class ResumeFile:
    """``<folder>/<key>/last.ckpt``: written whole after each validation, read once, removed on success.

    Parameters
    ----------
    folder
        Where unfinished trainings are kept; None keeps none.
    key
        Name of this training: a hash of everything its result depends on.
    settings_hash
        Hash of the settings that ``train`` itself knows. A state of other settings under the same key is not resumed.
    """

    def __init__(self, folder: str | Path | None, key: str, settings_hash: str) -> None:
        self.path = None if folder is None else Path(folder) / key / "last.ckpt"
        self.settings_hash = settings_hash

    @classmethod
    def at(cls, path: str | Path, settings_hash: str) -> ResumeFile:
        """Return the same file for another process, by its path."""
        folder = Path(path).parent
        return cls(folder.parent, folder.name, settings_hash)

    def save(self, state: TrainingState) -> None:
        """Replace the file.

        Raises
        ------
        DmirError
            It cannot be written, for instance because the disk is full; the file is as it was.
        """
        if self.path is None:
            return
        # not dataclasses.asdict, which would copy every tensor
        content = {entry.name: getattr(state, entry.name) for entry in fields(state)}
        content["best"] = None if state.best is None else vars(state.best)
        with writing(self.path, f"the state after step {state.step}"), atomic_path(self.path) as temporary:
            torch.save({"settings": self.settings_hash, **content}, temporary)

    def load(self, network: nn.Module) -> TrainingState:
        """Return the state to go on from, with its weights in the network; an empty one if the file does not fit.

        Parameters
        ----------
        network
            As it is built, to be trained.
        """
        if self.path is None or not self.path.is_file():
            return TrainingState()
        try:
            check_archive(self.path)
            content = torch.load(self.path, map_location="cpu", weights_only=True)
            settings = content.pop("settings")
            best = content.pop("best")
            state = TrainingState(**content, best=None if best is None else Best(**best))
            fits = settings == self.settings_hash and _shapes(state.network) == _shapes(network.state_dict())
        except Exception as error:  # whatever a damaged file makes of the reader
            log.warning("%s cannot be read (%s): training starts anew", self.path, " ".join(str(error).split())[:200])
            return TrainingState()
        if not fits:
            log.warning("%s is of another training: this one starts anew", self.path)
            return TrainingState()
        network.load_state_dict(state.network)
        log.info("resuming %s after step %d", self.path, state.step)
        return state

    def remove(self) -> None:
        """Delete the file with what killed writers left beside it, and the folder if that leaves it empty."""
        if self.path is None:
            return
        for path in (self.path, *self.path.parent.glob(f".writing-*-{self.path.name}")):
            path.unlink(missing_ok=True)
        with contextlib.suppress(OSError):
            self.path.parent.rmdir()


def _shapes(weights: Mapping[str, torch.Tensor]) -> dict[str, torch.Size]:
    return {name: value.shape for name, value in weights.items()}


def how_to_go_on(resume: ResumeFile) -> str:
    """Say what the same command will do when it is given again."""
    kept = resume.path is not None and resume.path.is_file()
    then = "goes on from the last state that was kept" if kept else "starts this training anew"
    return f"The same command, given again, {then}."
