"""Train one network on one cohort: :func:`train`."""

from __future__ import annotations

import contextlib
import json
import logging
import math
import platform
import warnings
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass
from importlib.metadata import version
from pathlib import Path
from typing import Any

import torch
from lightning.pytorch import Trainer
from lightning.pytorch.plugins.environments import LightningEnvironment
from lightning.pytorch.utilities.exceptions import SIGTERMException
from torch import nn
from torch.utils.data import DataLoader

import dmir
from dmir import networks
from dmir.training.callbacks import Milestones, write_history
from dmir.training.data import ImageBank, PairSchedule, Scan, derived_seed, load_bank, training_pairs, validation_pairs
from dmir.training.devices import choose_device, device_name, set_threads
from dmir.training.module import RegistrationModule
from dmir.training.objective import arithmetic
from dmir.training.resume import ResumeFile, TrainingState, fingerprint
from dmir.training.settings import TrainingSettings
from dmir.training.weights import save_weights
from dmir.volumes import atomic_path

log = logging.getLogger(__name__)

BUILD_STREAM = 2  # keeps the seed of the initial weights apart from those of the pairs and the steps


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
    structures: Sequence[int] | None = None,
    resume_folder: str | Path | None = None,
    resume_key: str | None = None,
    threads: int | None = None,
    device: str | torch.device | None = None,
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
    cohort
        Name of what it is trained on, for the records.
    structures
        Ids that count in the Dice; by default all that the atlases have.
    resume_folder, resume_key
        The state of an unfinished training is kept in ``<resume_folder>/<resume_key>/last.ckpt`` and deleted at the
        end. The key should be a hash of all that the result depends on, code and images included; by default it is
        the hash of these arguments. Without a folder nothing is kept.
    threads
        Of torch on the CPU; None leaves it as it is.
    device
        See :func:`~dmir.training.devices.choose_device`.
    **settings
        Of :class:`~dmir.training.settings.TrainingSettings`: steps, validate_every, learning_rate, schedule,
        similarity, window, regularisation, batch_size, gradient_clip, precision, pairs, warp, keep, compile,
        seed, deterministic.

    Raises
    ------
    InputError
        A file or an argument that cannot be used.
    TrainingDiverged
        The loss is no longer finite; the pair at fault is named.
    SystemExit
        Stopped by SIGTERM, with code 143, after the state was kept.
    """
    chosen = TrainingSettings(**settings)
    target = choose_device(device)
    threads = set_threads(threads)
    name = network if isinstance(network, str) else type(network).__name__
    key = fingerprint(
        {
            "network": [name, dict(hyperparameters)],
            "scans": [[str(scan) for scan in part] for part in (scans, validation, atlases)],
            "cohort": [cohort, structures],
            "settings": asdict(chosen),
        }
    )
    resume = ResumeFile(resume_folder, resume_key or key, key)
    with arithmetic(chosen.precision, chosen.deterministic), _own_randomness(target), _without_chatter():
        bank = load_bank(scans, validation, atlases, device=target, structures=structures, threads=threads)
        torch.manual_seed(derived_seed(chosen.seed, BUILD_STREAM))
        built = _build(network, hyperparameters, bank)
        state = resume.load(built)
        if state.step < chosen.steps:  # else it was killed between its last step and the writing of its results
            _fit(built, bank, state, resume, chosen, counts=(len(scans), len(validation)), output=Path(output))
    result = _choose(built, state, chosen, Path(output))
    records = {"network": name, "cohort": cohort, **asdict(chosen), "kept_step": result.step, "val_dice": result.dice}
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
    write_history(result.history, state.history)
    measured = _measurements(built, bank, state, threads, counts=(len(scans), len(validation)))
    _write_json(result.summary, _without_nan(records | measured))
    resume.remove()
    log.info("the weights of step %d of %d are in %s", result.step, chosen.steps, result.weights)
    return result


def _build(network: str | nn.Module, hyperparameters: Mapping[str, Any], bank: ImageBank) -> nn.Module:
    built = networks.build(network, shape=bank.grid.shape, **hyperparameters) if isinstance(network, str) else network
    return built.to(bank.device).train()


def _fit(
    network: nn.Module,
    bank: ImageBank,
    state: TrainingState,
    resume: ResumeFile,
    settings: TrainingSettings,
    *,
    counts: tuple[int, int],
    output: Path,
) -> None:
    """Run the steps that are left; ``state`` ends where the training ends. The counts are of train and validation."""
    train_count, validation_count = counts
    positions = range(len(bank.names))
    atlases = positions[train_count + validation_count :]
    pairs = training_pairs(positions[:train_count], atlases, settings.pairs)
    schedule = PairSchedule(pairs, settings.steps, settings.batch_size, settings.seed)
    loader = DataLoader(schedule, batch_size=None, sampler=range(state.step, settings.steps))
    module = RegistrationModule(network, bank, settings, first_step=state.step)
    milestones = Milestones(
        module,
        state,
        resume,
        pairs=validation_pairs(positions[train_count : train_count + validation_count], atlases, settings.pairs),
        history_path=output / "history.csv",
    )
    trainer = Trainer(
        accelerator="gpu" if bank.device.type == "cuda" else "cpu",
        devices=[bank.device.index or 0] if bank.device.type == "cuda" else 1,
        plugins=[LightningEnvironment()],  # else it takes over signals and ranks of a Slurm job that it finds
        callbacks=[milestones],
        max_epochs=1,  # all steps that are left: what happens between them goes by steps
        logger=False,
        enable_checkpointing=False,
        enable_progress_bar=False,
        enable_model_summary=False,
        use_distributed_sampler=False,
        default_root_dir=output,
    )
    try:
        trainer.fit(module, loader)
    except SystemExit as ended:
        if isinstance(ended, SIGTERMException):
            raise SystemExit(143) from None  # its own code is 0, which would look like success
        if isinstance(ended.__context__, KeyboardInterrupt):
            raise KeyboardInterrupt from None  # Lightning makes an exit of it, which would end a notebook
        raise


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


def _measurements(
    network: nn.Module, bank: ImageBank, state: TrainingState, threads: int, counts: tuple[int, int]
) -> dict[str, Any]:
    return {
        "parameters": sum(p.numel() for p in network.parameters()),
        "train_scans": counts[0],
        "validation_scans": counts[1],
        "seconds": round(state.seconds, 3),
        "peak_memory_mb": round(state.peak_memory_mb, 1),
        "peak_memory_of": "torch's GPU allocator" if bank.device.type == "cuda" else "the process (resident set)",
        "device": device_name(bank.device),
        "threads": threads,
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


@contextlib.contextmanager
def _own_randomness(device: torch.device) -> Iterator[None]:
    """Leave the caller's random numbers as they were."""
    with torch.random.fork_rng(devices=[device] if device.type == "cuda" else []):
        yield


@contextlib.contextmanager
def _without_chatter() -> Iterator[None]:
    """Keep what Lightning says of itself, of GPUs and of loader workers out of the log; errors remain."""
    loggers = [logging.getLogger(name) for name in ("lightning.pytorch", "lightning.fabric")]
    levels = [logger.level for logger in loggers]
    for logger in loggers:
        logger.setLevel(logging.ERROR)
    try:
        with warnings.catch_warnings():
            warnings.filterwarnings("ignore", module=r"lightning\.")
            yield
    finally:
        for logger, level in zip(loggers, levels, strict=True):
            logger.setLevel(level)
