"""What stands in the place of a model when somebody's own network cannot be trained, so that the others go on.

A program or a function that fails makes failed pairs, and the tables tell them. A network of an installed package or of
a file is to be no different: its training then leaves weights that hold nothing but the reason, an empty history and a
record with the reason, and each pair that it should register fails with that. A built-in network's failure is a
defect of this library or of the configuration, and ends the job.
"""

from __future__ import annotations

import contextlib
import json
import logging
import traceback
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import pandas as pd
import torch

from dmir import registry
from dmir.errors import DmirError, InputError
from dmir.training.module import TrainingDiverged
from dmir.training.objective import NoNetwork
from dmir.training.weights import FAILED, save_weights
from dmir.volumes import Grid, atomic_path

log = logging.getLogger(__name__)

NO_MEMORY = "DefaultCPUAllocator"  # of torch's RuntimeError where main memory does not suffice
HISTORY = ("step", "loss", "similarity", "regularisation", "val_dice", "seconds")


@contextlib.contextmanager
def failure_kept(
    network: str,
    hyperparameters: Mapping[str, Any],
    grid: Grid,
    output: str | Path,
    *,
    cohort: str,
    seed: int,
    settings: Mapping[str, Any],
) -> Iterator[None]:
    """Write what stands for a model, and raise nothing, when a network that is not built in fails in its training.

    Parameters
    ----------
    network, hyperparameters, grid, output, cohort, seed, settings
        As :func:`dmir.training.train` has them. Nothing is left in ``output`` but the three files of a model.

    Raises
    ------
    Exception
        What is not the network's fault: a disk, a file, a GPU, memory; and whatever ends a built-in network's training.
    """
    try:
        yield
    except Exception as error:
        entry = registry.find(network, "network")
        if entry.source == registry.BUILT_IN or not _is_its_own(error, entry):
            raise
        message = " ".join(str(error).split())
        reason = message if isinstance(error, DmirError) else f"{type(error).__name__}: {message}"
        log.error("The training failed, and all pairs of this model will: %s", reason, exc_info=error)
        _write(Path(output), network, hyperparameters, grid, cohort, seed, settings, reason)


def _is_its_own(error: Exception, entry: registry.Entry) -> bool:
    """Tell whether an error is the network's own: it is no network, diverges, or its code raised it."""
    if isinstance(error, MemoryError | torch.OutOfMemoryError | OSError) or NO_MEMORY in str(error):
        return False
    if isinstance(error, InputError) and error.where.startswith(f"{entry.source}: "):
        return True
    frames = traceback.extract_tb(error.__traceback__)
    raised_in_it = not isinstance(error, DmirError) and any(
        Path(frame.filename).resolve() == entry.path.resolve() for frame in frames
    )
    return isinstance(error, NoNetwork | TrainingDiverged) or raised_in_it


def _write(
    output: Path,
    network: str,
    hyperparameters: Mapping[str, Any],
    grid: Grid,
    cohort: str,
    seed: int,
    settings: Mapping[str, Any],
    reason: str,
) -> None:
    save_weights(
        output / "model.safetensors",
        torch.nn.Identity(),
        name=network,
        hyperparameters=hyperparameters,
        grid=grid,
        cohort=cohort,
        seed=seed,
        extra={FAILED: reason},
    )
    with atomic_path(output / "history.csv") as temporary:
        pd.DataFrame(columns=list(HISTORY)).to_csv(temporary, index=False)
    record = {"network": network, "cohort": cohort, **settings, "seed": seed, FAILED: reason}
    with atomic_path(output / "training.json") as temporary:
        temporary.write_text(json.dumps(record, indent=1) + "\n", encoding="utf-8")
