"""Is there memory enough? Asked before a training starts, and explained when it runs out all the same.

What a network needs is counted (:mod:`dmir.training.cost`), and so is what it would need with another key of the
configuration: an answer that names the key to change, and what is gained, is worth the seconds that counting takes.
"""

from __future__ import annotations

import itertools
import logging
import re
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import torch

from dmir.errors import InputError
from dmir.networks import hyperparameter_names
from dmir.training.cost import count_inference, count_step, settings_of
from dmir.training.devices import device_name
from dmir.training.objective import has_bfloat16
from dmir.training.settings import TrainingSettings

log = logging.getLogger(__name__)

PROCESS = 300e6
"""Bytes beside what is counted: kernels' own memory; 120 to 230 MB were measured on a CPU at a million voxels or half.

Not in it is what the C library keeps of freed memory: with glibc's own settings 220 to 1000 MB more were measured."""
STEP_BYTES_A_VOXEL = 4000
"""More than a training step takes: at 160x192x224 and published sizes 590 (voxelmorph) to 3080 (caml), in float32."""
LASTING_BYTES = 1.5e9
"""More than weights, gradients and Adam's moments take: 1.13 GB for the largest (transmatch)."""


@dataclass(frozen=True)
class Job:
    """A training, or with ``training=None`` the registration of one pair.

    Attributes
    ----------
    algorithm, hyperparameters, shape
        As for :func:`dmir.networks.build`.
    training
        Keys of :class:`~dmir.training.settings.TrainingSettings`.
    precision
        Of a registration; a training has its own.
    name
        Of the method in the configuration, where it is not the algorithm's.
    """

    algorithm: str
    hyperparameters: Mapping[str, Any]
    shape: tuple[int, int, int]
    training: Mapping[str, Any] | None = None
    precision: str = "float32"
    name: str = ""

    def __str__(self) -> str:
        what = "registration with" if self.training is None else "training of"
        return f"{what} {self.name or self.algorithm} on {'x'.join(map(str, self.shape))}"

    @property
    def settings(self) -> TrainingSettings:
        """The settings of a training, complete; of a registration those that concern it."""
        return settings_of(self.training or {"precision": self.precision})

    @property
    def batch_size(self) -> int:
        """Pairs that one device works on in a step: several cards share those of a step."""
        return max(1, self.settings.batch_size // int((self.training or {}).get("gpus", 1)))

    def most(self) -> float:
        """Return the bytes that a training surely does not exceed, without counting."""
        depth, height, width = self.shape
        return depth * height * width * self.batch_size * STEP_BYTES_A_VOXEL + LASTING_BYTES

    def count(self, device_type: str) -> float:
        """Return the bytes that it needs, counted; the process is not in them."""
        where = (self.algorithm, self.hyperparameters, self.shape)
        if self.training is None:
            return count_inference(*where, self.precision, device_type=device_type).peak_mb * 1e6
        return count_step(*where, self.training, self.batch_size, device_type=device_type).peak_mb * 1e6


@dataclass(frozen=True)
class Change:
    """A change of the configuration that may save memory: how it is written, and what it does to a job."""

    text: str
    training: Mapping[str, Any] = field(default_factory=dict)
    network: Mapping[str, Any] = field(default_factory=dict)
    halved: bool = False

    def apply(self, job: Job) -> Job:
        """Return the job as it would be."""
        shape = _halved(job.shape) if self.halved else job.shape
        changed = replace(job, shape=shape, hyperparameters={**job.hyperparameters, **self.network})
        if job.training is None:
            return replace(changed, precision=self.training.get("precision", job.precision))
        return replace(changed, training={**job.training, **self.training})


def require_memory(
    algorithm: str,
    hyperparameters: Mapping[str, Any],
    shape: tuple[int, int, int],
    training: Mapping[str, Any],
    *,
    device: torch.device,
    held_bytes: float = 0,
    name: str = "",
) -> None:
    """Refuse a training that the device has no memory for, before it starts.

    Small ones cost nothing: where even the hungriest network would fit, nothing is counted.

    Parameters
    ----------
    algorithm, hyperparameters, shape, training
        As for :func:`~dmir.training.cost.count_step`.
    device
        Where it is to run.
    held_bytes
        That images will take on this device, and do not take yet.
    name
        Of the method in the configuration.

    Raises
    ------
    InputError
        It does not fit; the keys to change are named, each with what it would need.
    """
    job, free = Job(algorithm, hyperparameters, shape, dict(training), name=name), free_memory(device)
    if job.most() + held_bytes + PROCESS <= free:
        return
    needed = _counted(job, device)
    if needed is not None and needed + held_bytes + PROCESS > free:
        raise _too_little(job, device, held_bytes, free, needed)


def out_of_memory(
    error: BaseException,
    algorithm: str,
    hyperparameters: Mapping[str, Any],
    shape: tuple[int, int, int],
    training: Mapping[str, Any] | None = None,
    *,
    device: torch.device,
    precision: str = "float32",
    held_bytes: float = 0,
    name: str = "",
) -> InputError:
    """Return what to tell the user when memory has run out: what is needed, and the keys that would need less.

    Parameters
    ----------
    error
        torch's own; the first line of it is told.
    training
        None: it was a registration, in this ``precision``.
    held_bytes
        That images take on this device.
    """
    job = Job(algorithm, hyperparameters, shape, None if training is None else dict(training), precision, name)
    told = str(error).strip().splitlines()
    return _too_little(job, device, held_bytes, None, _counted(job, device), told[0].strip() if told else "")


def _too_little(
    job: Job, device: torch.device, held: float, free: float | None, needed: float | None, told: str = ""
) -> InputError:
    rest = held + PROCESS
    place = device_name(device)
    found = f"{gigabytes(free)} free on {place}" if free is not None else f"no memory left on {place} ({told})"
    total = "more" if needed is None else f"about {gigabytes(needed + rest)}"
    images = f", of which the images {gigabytes(held)}" if held > 5e7 else ""
    room = free if free is not None else _total_memory(device)
    log.info("counting what would need less memory")
    advice = "" if needed is None else _advice(job, device, needed, rest, room)
    return InputError(f"memory for the {job}", found=found, expected=f"{total}{images}", remedy=advice)


def _advice(job: Job, device: torch.device, needed: float, rest: float, room: float) -> str:
    """Say what each change alone would need, and if none of them suffices, the two that do best."""
    found = [(change, _counted(change.apply(job), device)) for change in changes(job, device)]
    helping = [(change, need) for change, need in found if need is not None and need < 0.98 * needed]
    if not helping:
        return "No key of the configuration makes it need less: use a device with more memory."
    listed = "; ".join(f"{change.text} would need {gigabytes(need + rest)}" for change, need in helping)
    if any(need + rest <= room for _, need in helping):
        return f"{listed}."
    together = _best_two(job, device, [change for change, _ in helping])
    if together is None:
        return f"{listed}. That is still too much."
    texts, need = together
    return f"{listed}. None of them is enough alone; {texts} together would need {gigabytes(need + rest)}."


def _best_two(job: Job, device: torch.device, helping: Sequence[Change]) -> tuple[str, float] | None:
    best: tuple[str, float] | None = None
    # a coarser grid changes what is compared, so it stands last; with it, only the first other change is counted
    for first, second in itertools.combinations(helping, 2):
        if second.halved and first is not helping[0]:
            continue
        need = _counted(second.apply(first.apply(job)), device)
        if need is not None and (best is None or need < best[1]):
            best = f"{first.text} and {second.text}", need
    return best


def changes(job: Job, device: torch.device) -> Iterator[Change]:
    """List the changes that this job leaves open: what costs the result least comes first."""
    settings, known = job.settings, hyperparameter_names(job.algorithm)
    network = f"settings.{job.name or job.algorithm}.network"
    if settings.precision != "bf16" and has_bfloat16(device.type):
        yield Change("`training.precision: bf16`" if job.training is not None else "bf16", {"precision": "bf16"})
    if job.training is not None:
        if "checkpointing" in known and not job.hyperparameters.get("checkpointing", False):
            yield Change(f"`{network}.checkpointing: true`", network={"checkpointing": True})
        if job.batch_size > 1:
            change = {"batch_size": settings.batch_size // job.batch_size}
            yield Change(f"`training.batch_size: {change['batch_size']}` (now {settings.batch_size})", change)
        if "field_downsampling" in known and job.hyperparameters.get("field_downsampling", 1) == 1:
            yield Change(f"`{network}.field_downsampling: 2`", network={"field_downsampling": 2})
    half = ", ".join(map(str, _halved(job.shape)))
    yield Change(f"`grid.shape: [{half}]` (and `grid.spacing` doubled)", halved=True)


def _counted(job: Job, device: torch.device) -> float | None:
    """Count; what cannot be counted is not refused, because the training itself may well work."""
    try:
        return job.count(device.type)
    except InputError:
        raise
    except Exception as error:
        log.warning("the memory of the %s cannot be counted (%s: %s)", job, type(error).__name__, error)
        return None


def free_memory(device: torch.device) -> float:
    """Return the bytes that this process can still take on a device.

    On a GPU what the driver says is free, and what torch holds in reserve; on the CPU the smaller of what the system
    can give and what the process's control group leaves, as batch systems and containers limit it.
    """
    if device.type == "cuda":
        free, _ = torch.cuda.mem_get_info(device)
        return float(free + torch.cuda.memory_reserved(device) - torch.cuda.memory_allocated(device))
    match = re.search(r"MemAvailable:\s+(\d+) kB", _text(Path("/proc/meminfo")))
    available = int(match[1]) * 1024.0 if match else float("inf")
    return min(available, control_group_headroom())


def _total_memory(device: torch.device) -> float:
    if device.type == "cuda":
        return float(torch.cuda.mem_get_info(device)[1])
    match = re.search(r"MemTotal:\s+(\d+) kB", _text(Path("/proc/meminfo")))
    return int(match[1]) * 1024.0 if match else float("inf")


def control_group_headroom(root: str | Path = "/sys/fs/cgroup", own: str | Path = "/proc/self/cgroup") -> float:
    """Return the bytes that the process's control groups (version 1 or 2) leave to it; infinity without a limit.

    A group's limit holds for all below it, so that every ancestor is looked at. What files have left in the cache
    counts as used, but is given up on demand.
    """
    headroom = float("inf")
    for line in _text(Path(own)).splitlines():
        _, controllers, path = line.split(":", 2)
        if controllers and "memory" not in controllers.split(","):
            continue
        top = Path(root) / "memory" if controllers else Path(root)
        names = ("memory.limit_in_bytes", "memory.usage_in_bytes") if controllers else ("memory.max", "memory.current")
        place = top / path.strip("/")
        for folder in [place, *place.parents]:
            if not folder.is_relative_to(top):
                break
            limit, used = (_text(folder / name).strip() for name in names)
            if limit.isdigit() and used.isdigit():
                cached = re.search(r"^(?:total_)?inactive_file (\d+)", _text(folder / "memory.stat"), re.MULTILINE)
                headroom = min(headroom, int(limit) - int(used) + (int(cached[1]) if cached else 0))
    return max(headroom, 0.0)


def _text(path: Path) -> str:
    try:
        return path.read_text()
    except OSError:
        return ""


def gigabytes(size: float) -> str:
    """Write a number of bytes as people read it."""
    return f"{size / 1e9:.1f} GB" if size >= 1e8 else f"{size / 1e6:.0f} MB"


def _halved(shape: tuple[int, int, int]) -> tuple[int, int, int]:
    depth, height, width = shape
    return (depth + 1) // 2, (height + 1) // 2, (width + 1) // 2
