"""Registration with a trained network: one pair in memory, or many pairs of files in one process.

A network registers a pair in less time than it takes to read it and to write its field. On a GPU the three go on at
once: threads read the next pairs and write the last fields while the network computes. On the CPU reading and writing
would take cores from the network, so that nothing else runs while a pair is registered: its seconds are those of a
machine that does only that.
"""

from __future__ import annotations

import contextlib
import logging
from collections.abc import Generator, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import torch
from torch import nn

from dmir import networks
from dmir.errors import InputError
from dmir.methods.network_device import (
    Computer,
    Refine,
    memory_explained,
    to_tensor,
    warn_of_spacing,
)
from dmir.methods.network_session import AHEAD, BEHIND, REGISTERED_ANEW, Outcome, Pair, Session
from dmir.methods.records import COLUMNS
from dmir.networks.shapes import shapes_alone
from dmir.training.devices import choose_device, device_name, gpu_failures_told
from dmir.training.objective import arithmetic
from dmir.training.weights import TrainingFailed, load_weights, read_metadata, require_trained
from dmir.volumes import Volume, require_same_grid

__all__ = [
    "AHEAD",
    "BEHIND",
    "COLUMNS",
    "Loaded",
    "Pair",
    "Refine",
    "load_expected",
    "register",
    "register_pairs",
]

log = logging.getLogger(__name__)

Loaded = tuple[nn.Module, dict[str, Any]]  # what load_weights returns


@gpu_failures_told(lambda: REGISTERED_ANEW)
def register(
    moving: Volume,
    fixed: Volume,
    weights: str | Path | Loaded,
    device: str | torch.device | None = None,
    precision: str = "float32",
    refine: Refine | None = None,
) -> np.ndarray:
    """Return the displacement field that takes the moving image to the fixed one.

    Parameters
    ----------
    moving, fixed
        Preprocessed images on one grid, in [0, 1].
    weights
        A weights file, or what :func:`~dmir.training.weights.load_weights` made of it.
    device
        See :func:`~dmir.training.devices.choose_device`.
    precision
        ``"float32"``, ``"tf32"`` or ``"bf16"``.
    refine
        What is done to the network's field on the same device, for instance
        :func:`dmir.methods.refinement.refine`.

    Returns
    -------
    numpy.ndarray
        float32 (3, D, H, W), voxels, on the fixed grid.

    Raises
    ------
    InputError
        The two grids differ, or the weights cannot be used.
    DmirError
        The memory does not suffice, the field is not finite, or the GPU stopped working.
    """
    require_same_grid(fixed, moving, "the fixed image", "the moving image")
    if isinstance(weights, tuple):
        network, metadata = weights
        target = next(network.parameters()).device if device is None else choose_device(device)
        network.to(target)
    else:
        target = choose_device(device)
        network, metadata = load_weights(weights, device=target)
    warn_of_spacing(metadata, fixed)
    with memory_explained("the pair", fixed.shape, target), arithmetic(precision):
        computer = Computer(network, target, precision, refine)
        displacement, _ = computer.register(to_tensor(moving, target), to_tensor(fixed, target), fixed.spacing.tolist())
    return displacement.numpy()


@gpu_failures_told(lambda: REGISTERED_ANEW)
def register_pairs(
    pairs: Sequence[tuple[str, str | Path, str, str | Path]],
    folder: str | Path,
    weights: str | Path,
    device: str | torch.device | None = None,
    warmup: bool = True,
    *,
    precision: str = "float32",
    refine: Refine | None = None,
    expected: Mapping[str, Any] | None = None,
    overlap: bool | None = None,
    cohort: str = "",
    method: str | None = None,
    model: str | None = None,
) -> pd.DataFrame:
    """Register pairs of files, and write each field where :func:`dmir.fields.pair_field` says.

    Parameters
    ----------
    pairs
        (moving name, moving image, fixed name, fixed image), preprocessed, on one grid each.
    folder
        Where the fields go.
    weights
        A weights file.
    device, precision, refine
        As for :func:`register`.
    warmup
        Register the first pair once before the clock runs: the first call of a network pays for memory and for the
        choice of algorithms.
    expected
        What the weights must be of: ``network``, ``hyperparameters`` (those not named have their defaults) and
        ``grid`` (``shape`` and ``spacing``); what is left out is free.
    overlap
        Read and write while the network computes. None: on a GPU only, as told above.
    cohort, method, model
        For the records; by default no cohort, the network's name, and ``seed<n>``.

    Returns
    -------
    pandas.DataFrame
        One record a pair, in their order. ``seconds``: from images in host memory to the field in host memory, the
        transfers of both and the GPU's queue included, files not. ``read_seconds``, ``write_seconds``: of its files, as
        measured while others are read and written. A fixed image that serves several pairs is read and brought to the
        GPU once, and counted with each of them. ``peak_memory_mb``: on a GPU the most that torch's allocator gave
        out during this pair (weights included); on the CPU the largest resident set of the whole process meanwhile
        (where the system cannot say that, since its start).
        A pair that fails has the status ``"failed"``, its reason, and NaN for what was not reached; where the training
        failed, all of them.

    Raises
    ------
    InputError
        The weights cannot be used or are not the expected ones, or an image cannot be read. What fails because of
        the two scans of a pair is that pair alone.
    StorageError
        A field cannot be written.
    GpuUnusable
        The GPU stopped working.
    """
    target = choose_device(device)
    named = [Pair(moving, Path(a), fixed, Path(b)) for moving, a, fixed, b in pairs]
    outcomes: Generator[Outcome]
    try:
        network, metadata = load_expected(weights, expected or {}, target)
    except TrainingFailed as failed:
        metadata, reason = read_metadata(weights), failed.found
        outcomes = (Outcome(pair, reason) for pair in named)
    else:
        session = Session(Path(folder), Computer(network, target, precision, refine), metadata, warmup)
        outcomes = session.run(named, overlap=target.type == "cuda" if overlap is None else overlap)
    run_as = {
        "cohort": cohort,
        "method": metadata["network"] if method is None else method,
        "model": f"seed{metadata['seed']}" if model is None else model,
        "device": device_name(target),
        "threads": torch.get_num_threads(),
    }
    records = []
    # closed at once when anything is raised here, Ctrl-C too: fields are complete or not there
    with contextlib.closing(outcomes):
        for number, outcome in enumerate(outcomes, start=1):
            told = f"failed: {outcome.reason}" if outcome.reason else f"{outcome.seconds:.3g} s"
            log.info("%d/%d %s to %s: %s", number, len(named), outcome.pair.moving, outcome.pair.fixed, told)
            records.append(run_as | outcome.record())
    return pd.DataFrame(records, columns=list(COLUMNS))


def load_expected(weights: str | Path, expected: Mapping[str, Any], device: torch.device) -> Loaded:
    """Load weights that must be of a certain network, hyperparameters and grid; see :func:`register_pairs`.

    Raises
    ------
    InputError
        They are not: what differs is named, with what was found and what was expected.
    """
    wanted = {key: expected[key] for key in ("network", "hyperparameters") if key in expected}
    if len(wanted) == 2:
        require_trained(weights)  # before the network is built: perhaps it cannot be
        # a weights file tells all of its hyperparameters, a configuration those that are not the default
        shape = tuple(expected.get("grid", {}).get("shape", (32, 32, 32)))
        with shapes_alone():
            built = networks.build(wanted["network"], shape=shape, **wanted["hyperparameters"])
        wanted["hyperparameters"] = built.hyperparameters
    network, metadata = load_weights(weights, expected=wanted, device=device)
    held = metadata["grid"]
    differing = [key for key, value in expected.get("grid", {}).items() if not np.allclose(held[key], value, atol=1e-3)]
    if differing:
        raise InputError(
            weights,
            found="a grid of " + ", ".join(f"{key} {list(held[key])}" for key in differing),
            expected=", ".join(f"{key} {list(expected['grid'][key])}" for key in differing),
            remedy="Set `grid` to the grid that it was trained on, or train it again on this one.",
        )
    return network, metadata
