"""Train one network on one cohort: :func:`train`."""

from __future__ import annotations

import contextlib
import json
import logging
import math
import os
import platform
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass
from functools import partial
from importlib.metadata import version
from pathlib import Path
from typing import Any

import torch
from torch import nn

import dmir
from dmir.errors import InputError
from dmir.training.data import Scan
from dmir.training.devices import ON_THE_CPU, GpuUnusable, choose_devices, device_name, gpu_failures_told, set_threads
from dmir.training.loggers import HistoryLogger
from dmir.training.objective import NoNetwork
from dmir.training.pack import Pack
from dmir.training.ranks import followers
from dmir.training.resume import ResumeFile, TrainingState, fingerprint, how_to_go_on, writing
from dmir.training.session import Session, TrainingData
from dmir.training.settings import TrainingSettings
from dmir.training.weights import save_weights
from dmir.volumes import atomic_path

log = logging.getLogger(__name__)


@dataclass(frozen=True)
class TrainingResult:
    """What :func:`train` made.

    Attributes
    ----------
    network
        With the weights that were kept, in evaluation mode.
    weights, history, summary
        The files ``model.safetensors``, ``history.csv`` and ``training.json``.
    step
        The step whose weights were kept.
    dice
        The mean Dice on the validation pairs at that step; NaN without labels or validation.
    """

    network: nn.Module
    weights: Path
    history: Path
    summary: Path
    step: int
    dice: float


def train(
    network: str | nn.Module,
    hyperparameters: Mapping[str, Any],
    scans: Sequence[Scan],
    validation: Sequence[Scan],
    atlases: Sequence[Scan],
    *,
    output: str | Path,
    cohort: str = "",
    method: str = "",
    structures: Sequence[int] | None = None,
    pack: Pack | None = None,
    packed: str = "float16",
    resume_folder: str | Path | None = None,
    resume_key: str | None = None,
    threads: int | None = None,
    device: str | torch.device | None = None,
    gpus: int = 1,
    processes: int | None = None,
    **settings: Any,
) -> TrainingResult:
    """Train a registration network without labels, and keep the weights that are best on the validation scans.

    A training that is killed and started again with the same arguments goes on from its last validation. On the CPU,
    with the same number of threads, it ends with the same bits as an unbroken one.

    Parameters
    ----------
    network
        Name for ``dmir.networks.build``, or a module: (moving, fixed) -> displacement, (B, 1, D, H, W) twice ->
        (B, 3, D, H, W) voxels.
    hyperparameters
        Of the network.
    scans, validation, atlases
        Preprocessed scans on one grid. Label maps serve the validation alone; without validation scans the last
        weights are kept.
    output
        Folder for ``model.safetensors``, ``history.csv`` and ``training.json``.
    cohort, method
        Names of what it is trained on, for the records, and of the network in a configuration, for messages.
    structures
        Ids that count in the Dice; by default all that the atlases have.
    pack
        Where the scans are packed (:func:`~dmir.training.pack.open_pack`): they need not be read then.
    packed
        How images are kept that are read: ``"float16"``, ``"uint8"`` or ``"float32"``.
    resume_folder, resume_key
        The state of an unfinished training is kept in ``<resume_folder>/<resume_key>/last.ckpt`` and deleted at the
        end. The key should be a hash of all that the result depends on, code and images included; by default it is
        the hash of these arguments. Without a folder nothing is kept.
    threads
        Of torch on the CPU; None leaves it as it is.
    device
        See :func:`~dmir.training.devices.choose_device`.
    gpus
        Cards that share the pairs of each step, at most: as many as divide ``batch_size``. The steps are those of a
        training on one card, up to rounding (and to ``drop_path``'s random numbers). Without a GPU the CPU does it all.
    processes
        That share the pairs of each step; by default one for each GPU. Asked for on the CPU, they exchange gradients
        through its memory.
    **settings
        Of :class:`~dmir.training.settings.TrainingSettings`: steps, validate_every, learning_rate, schedule,
        similarity, window, regularisation, batch_size, gradient_clip, precision, pairs, warp, sampling,
        smoothing, keep, compile, seed, deterministic.

    Raises
    ------
    InputError
        A file or an argument that cannot be used.
    TrainingDiverged
        The loss is no longer finite; the pair at fault is named.
    GpuUnusable
        A GPU is gone, or has stopped working; the last state is as it was kept.
    SystemExit, KeyboardInterrupt
        Stopped by SIGTERM, with code 143, or by Ctrl-C, after the running step was done and the state kept.
    """
    chosen = TrainingSettings(**settings)
    if processes is not None and (processes < 1 or chosen.batch_size % processes):
        expected = f"a divisor of batch_size, which is {chosen.batch_size}"
        raise InputError("processes", found=str(processes), expected=expected)
    sharing = max(count for count in range(1, max(gpus, 1) + 1) if chosen.batch_size % count == 0)
    targets = choose_devices(device, sharing)
    name = network if isinstance(network, str) else type(network).__name__
    data = TrainingData(
        [*scans], [*validation], [*atlases], structures, pack, packed if pack is None else pack.precision
    )
    key = fingerprint(
        {
            "network": [name, dict(hyperparameters)],
            "scans": [[str(scan) for scan in part] for part in (scans, validation, atlases)],
            "cohort": [cohort, structures, data.packed],
            "settings": asdict(chosen),
        }
    )
    resume = ResumeFile(resume_folder, resume_key or key, key)
    session = Session(
        network,
        dict(hyperparameters),
        data,
        resume,
        chosen,
        set_threads(threads),
        targets[0],
        processes or len(targets),
        method,
    )
    with gpu_failures_told(partial(how_to_go_on, resume)), _named(method, name), session.running():
        bank, built, state = session.prepare()
        _require_same_kind_of_device(session, state)
        if state.step < chosen.steps:  # else it was killed between its last step and the writing of its results
            with followers(session.as_job() if session.processes > 1 else {}, session.processes):
                session.fit(built, bank, state, Path(output))
    with writing(output, "the result"):
        result = _choose(built, state, chosen, Path(output))
        records = {"network": name, "cohort": cohort, **asdict(chosen)}
        records |= {"kept_step": result.step, "val_dice": result.dice}
        save_weights(
            result.weights,
            built,
            name=name,
            hyperparameters=getattr(built, "hyperparameters", hyperparameters),
            grid=bank.grid,
            cohort=cohort,
            seed=chosen.seed,
            extra={"training": _without_nan(records)},
        )
        HistoryLogger(result.history, state.history).save()
        measured = _measurements(session, built, state)
        _write_json(result.summary, _without_nan(records | measured))
    resume.remove()
    log.info("the weights of step %d of %d are in %s", result.step, chosen.steps, result.weights)
    return result


@contextlib.contextmanager
def _named(method: str, network: str) -> Iterator[None]:
    """Say of a class that is no network which method it is."""
    try:
        yield
    except NoNetwork as error:
        where = f"settings.{method}, {network}" if method else network
        raise NoNetwork(where, found=error.found, expected=error.expected, remedy=error.remedy) from None


def _require_same_kind_of_device(session: Session, state: TrainingState) -> None:
    """Refuse to go on on the CPU with what a GPU began, unless the user says so; remember where it runs.

    Raises
    ------
    GpuUnusable
        The first steps were done on GPUs, and now there is none.
    """
    if session.device.type == "cuda":
        state.gpu = {"gpus": session.processes}
    elif 0 < state.step < session.settings.steps and state.gpu:
        said = f"its first {state.step} steps were trained on a GPU, and now there is none"
        if os.environ.get("GPU_POOL") != "":
            raise GpuUnusable(f"{session.method or 'This training'}: {said}. Give it one again. {ON_THE_CPU}")
        log.warning("going on on the CPU, as GPU_POOL says: %s", said)


def _choose(network: nn.Module, state: TrainingState, settings: TrainingSettings, output: Path) -> TrainingResult:
    """Put the weights to keep into the network."""
    step, dice = state.step, state.history[-1]["val_dice"]
    if settings.keep == "best" and state.best is not None:
        network.load_state_dict(state.best.weights)
        step, dice = state.best.step, state.best.dice
        if step == 0:
            log.warning("no validation was better than that of the untrained network: its weights are kept")
    files = (output / "model.safetensors", output / "history.csv", output / "training.json")
    return TrainingResult(network.eval(), *files, step=step, dice=dice)


def _measurements(session: Session, network: nn.Module, state: TrainingState) -> dict[str, Any]:
    device = session.device
    return {
        "parameters": sum(p.numel() for p in network.parameters()),
        "train_scans": len(session.data.train),
        "validation_scans": len(session.data.validation),
        "seconds": round(state.seconds, 3),
        "waited_for_images_seconds": round(state.waited_seconds, 3),
        "peak_memory_mb": round(state.peak_memory_mb, 1),
        "peak_memory_of": "torch's GPU allocator" if device.type == "cuda" else "the process (resident set)",
        "device": device_name(device),
        **state.gpu,
        "processes": session.processes,
        "threads": session.threads,
        "versions": {
            "dmir": dmir.__version__,
            "python": platform.python_version(),
            "torch": torch.__version__,
            "lightning": version("lightning"),
        },
    }


def _write_json(path: Path, content: Mapping[str, Any]) -> None:
    with atomic_path(path) as temporary:
        temporary.write_text(json.dumps(content, indent=2) + "\n", encoding="utf-8")


def _without_nan(content: Mapping[str, Any]) -> dict[str, Any]:
    """Return the mapping with None for NaN, which JSON does not know."""
    return {key: None if isinstance(value, float) and math.isnan(value) else value for key, value in content.items()}
