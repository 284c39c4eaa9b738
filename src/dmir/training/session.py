"""One process of a training: the images, the network and the steps that it runs."""

from __future__ import annotations

import contextlib
import logging
import os
import warnings
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
from lightning.pytorch import Trainer
from lightning.pytorch.plugins.environments import LightningEnvironment
from lightning.pytorch.strategies import DDPStrategy
from torch import distributed, nn
from torch.utils.data import DataLoader

from dmir import networks
from dmir.errors import InputError
from dmir.training.callbacks import Milestones
from dmir.training.data import ImageBank, PairSchedule, derived_seed, load_bank, training_pairs, validation_pairs
from dmir.training.devices import set_threads
from dmir.training.loggers import loggers_of
from dmir.training.memory import out_of_memory, require_memory
from dmir.training.module import RegistrationModule
from dmir.training.objective import arithmetic
from dmir.training.pack import Pack, Scan, open_pack
from dmir.training.resume import ResumeFile, TrainingState
from dmir.training.settings import TrainingSettings
from dmir.training.stopping import Stopped
from dmir.training.utilisation import GpuUtilisation

BUILD_STREAM = 2  # keeps the seed of the initial weights apart from those of the pairs and the steps
PARTS = ("train", "validation", "atlases")


@dataclass(frozen=True)
class TrainingData:
    """The scans of a training."""

    train: list[Scan]
    validation: list[Scan]
    atlases: list[Scan]
    structures: Sequence[int] | None
    pack: Pack | None
    packed: str


@dataclass(frozen=True)
class Session:
    """One process of a training: all that it depends on, and its steps.

    ``processes`` of them share each step's pairs; ``method`` is the network's name in the configuration, for messages.
    """

    network: str | nn.Module
    hyperparameters: dict[str, Any]
    data: TrainingData
    resume: ResumeFile
    settings: TrainingSettings
    threads: int
    device: torch.device
    processes: int = 1
    method: str = ""

    def as_job(self) -> dict[str, Any]:
        """Return what the other processes need, for JSON.

        Raises
        ------
        InputError
            The network is an object, which they could not build.
        """
        if not isinstance(self.network, str):
            found = f"an object of {type(self.network).__name__}"
            raise InputError("network", found=found, expected="a name, as several processes build it")
        data = self.data
        return {
            "network": self.network,
            "hyperparameters": self.hyperparameters,
            "data": {
                part: [[s.name, str(s.image), s.labels and str(s.labels)] for s in getattr(data, part)]
                for part in PARTS
            },
            "structures": None if data.structures is None else [int(value) for value in data.structures],
            "pack": None if data.pack is None else str(data.pack.folder),
            "packed": data.packed,
            "resume": [None if self.resume.path is None else str(self.resume.path), self.resume.settings_hash],
            "settings": asdict(self.settings),
            "threads": self.threads,
            "device": self.device.type,
            "processes": self.processes,
            "method": self.method,
        }

    @classmethod
    def of_job(cls, job: Mapping[str, Any], rank: int) -> Session:
        train, validation, atlases = (
            [Scan(name, Path(image), labels and Path(labels)) for name, image, labels in job["data"][part]]
            for part in PARTS
        )
        pack = None if job["pack"] is None else open_pack(job["pack"])
        data = TrainingData(train, validation, atlases, job["structures"], pack, job["packed"])
        path, settings_hash = job["resume"]
        resume = ResumeFile(None, "", settings_hash) if path is None else ResumeFile.at(path, settings_hash)
        device = torch.device("cuda", rank) if job["device"] == "cuda" else torch.device(job["device"])
        settings = TrainingSettings(**job["settings"])
        threads = set_threads(job["threads"])
        shared = (job["processes"], job["method"])
        return cls(job["network"], job["hyperparameters"], data, resume, settings, threads, device, *shared)

    @contextlib.contextmanager
    def running(self) -> Iterator[None]:
        """Set torch's switches for the time of a training."""
        settings = self.settings
        with arithmetic(settings.precision, settings.deterministic), _own_randomness(self.device), _without_chatter():
            yield

    def prepare(self) -> tuple[ImageBank, nn.Module, TrainingState]:
        """Return the images, the network to train, and where its training stands.

        Raises
        ------
        InputError
            Scans that cannot be used, or a training that the device has no memory for.
        """
        data = self.data
        bank = load_bank(
            data.train,
            data.validation,
            data.atlases,
            device=self.device,
            structures=data.structures,
            threads=self.threads,
            pack=data.pack,
            precision=data.packed,
        )
        torch.manual_seed(derived_seed(self.settings.seed, BUILD_STREAM))
        if isinstance(self.network, str):
            require_memory(self.network, self.hyperparameters, bank.grid.shape, **self._memory_known())
            built = networks.build(self.network, shape=bank.grid.shape, **self.hyperparameters)
        else:
            built = self.network
        built = built.to(self.device).train()
        return bank, built, self.resume.load(built)

    def _memory_known(self) -> dict[str, Any]:
        """Return what counting memory must know beside the network and the grid; the images are where they will be."""
        training = {**asdict(self.settings), "gpus": self.processes}
        return {"training": training, "device": self.device, "name": self.method}

    def fit(self, network: nn.Module, bank: ImageBank, state: TrainingState, output: Path | None) -> None:
        """Run the steps that are left; ``state`` ends where the training ends. Without an output nothing is written."""
        settings, train_count = self.settings, len(self.data.train)
        positions = range(len(bank.names))
        atlases = positions[train_count + len(self.data.validation) :]
        validated = positions[train_count : train_count + len(self.data.validation)]
        pairs = training_pairs(positions[:train_count], atlases, settings.pairs)
        schedule = PairSchedule(pairs, settings.steps, settings.batch_size, settings.seed)
        steps = range(state.step, settings.steps)
        rank = int(os.environ.get("LOCAL_RANK", 0)) if self.processes > 1 else 0
        module = RegistrationModule(network, bank, settings, first_step=state.step)
        milestones = Milestones(module, state, self.resume, pairs=validation_pairs(validated, atlases, settings.pairs))
        trainer = self._trainer(milestones, output, state)
        try:
            coming = (schedule[step][rank :: self.processes] for step in steps)
            asks = self.device.type == "cuda" and output is not None  # one process for all cards
            with bank.prefetch(coming), GpuUtilisation(None if asks else []) as utilisation:
                trainer.fit(module, DataLoader(schedule, batch_size=None, sampler=steps))
            state.gpu = utilisation.summary()
        except Stopped as stopped:
            raise stopped.as_exit() from None
        except torch.OutOfMemoryError as error:
            if not isinstance(self.network, str):
                raise
            known = self._memory_known()
            shape = bank.grid.shape
            raise out_of_memory(error, self.network, self.hyperparameters, shape, **known) from error
        except SystemExit as ended:
            if isinstance(ended.__context__, KeyboardInterrupt):
                raise KeyboardInterrupt from None  # Lightning makes an exit of it, which would end a notebook
            raise
        finally:
            if distributed.is_available() and distributed.is_initialized():
                distributed.destroy_process_group()  # the next training of this process has other followers

    def _trainer(self, milestones: Milestones, output: Path | None, state: TrainingState) -> Trainer:
        on_gpu = self.device.type == "cuda"
        environment = LightningEnvironment()  # else it takes over signals and ranks of a Slurm job that it finds
        if self.processes == 1:
            chosen: dict[str, Any] = {"devices": [self.device.index or 0] if on_gpu else 1, "plugins": [environment]}
        else:
            chosen = {
                "devices": self.processes,
                "strategy": DDPStrategy(cluster_environment=environment),
                "sync_batchnorm": on_gpu,  # a batch's statistics are those of all its pairs, wherever they are
            }
        return Trainer(
            accelerator="gpu" if on_gpu else "cpu",
            **chosen,
            callbacks=[milestones],
            logger=loggers_of(output, state.history, state.step) if output is not None else False,
            max_epochs=1,  # all steps that are left: what happens between them goes by steps
            enable_checkpointing=False,
            enable_progress_bar=False,
            enable_model_summary=False,
            use_distributed_sampler=False,
            default_root_dir=output,
        )


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
