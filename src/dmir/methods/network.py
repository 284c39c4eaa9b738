"""Registration with a trained network: one pair in memory, or many pairs of files in one process.

A network registers a pair in less time than it takes to read it and to write its field. On a GPU the three go on at
once: threads read the next pairs and write the last fields while the network computes. On the CPU reading and writing
would take cores from the network, so that nothing else runs while a pair is registered: its seconds are those of a
machine that does only that.
"""

from __future__ import annotations

import contextlib
import logging
import math
import time
from collections import deque
from collections.abc import Callable, Generator, Iterator, Mapping, Sequence
from concurrent.futures import Future, ThreadPoolExecutor, wait
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import pandas as pd
import torch
from torch import nn

from dmir import networks
from dmir.errors import DmirError, InputError, StorageError
from dmir.fields import inverse_consistency, pair_field, save_field
from dmir.methods.records import COLUMNS, MEASURED, planes_of
from dmir.training.devices import GpuUnusable, choose_device, device_name, gpu_failures_told, peak_memory_mb
from dmir.training.objective import arithmetic, displacement_of
from dmir.training.weights import TrainingFailed, load_weights, read_metadata, require_trained
from dmir.volumes import Grid, Volume, before_planes, read_image, require_same_grid

log = logging.getLogger(__name__)

AHEAD = 4  # pairs that are read, or being read, before the network gets to them; each by a thread of its own
BEHIND = 4  # fields that wait to be written, or are being written: 83 MB each at 160x192x224
REGISTERED_ANEW = "The same command, given again, registers what it was at anew."
Loaded = tuple[nn.Module, dict[str, Any]]  # what load_weights returns
Refine = Callable[..., torch.Tensor]  # moving, fixed, displacement, spacing, and perhaps what was seen
"""(moving, fixed, displacement, spacing) -> displacement: (1, 1, D, H, W) twice and (1, 3, D, H, W), voxels; mm."""


class Pair(NamedTuple):
    """Two scans on one grid: their names and their images."""

    moving: str
    moving_path: Path
    fixed: str
    fixed_path: Path


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
    _warn_of_spacing(metadata, fixed)
    with _memory_explained("the pair", fixed.shape, target), arithmetic(precision):
        computer = _Computer(network, target, precision, refine)
        displacement, _ = computer.register(
            _to_tensor(moving, target), _to_tensor(fixed, target), fixed.spacing.tolist()
        )
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
    outcomes: Generator[_Outcome]
    try:
        network, metadata = load_expected(weights, expected or {}, target)
    except TrainingFailed as failed:
        metadata, reason = read_metadata(weights), failed.found
        outcomes = (_Outcome(pair, reason) for pair in named)
    else:
        session = _Session(Path(folder), _Computer(network, target, precision, refine), metadata, warmup)
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
        with torch.device("meta"):
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


class _Image(NamedTuple):
    """An image that was read, (1, 1, D, H, W) in host memory, the seconds that it took, and what its scan saw."""

    grid: Grid
    data: torch.Tensor
    seconds: float
    seen: torch.Tensor | None = None


@dataclass
class _Outcome:
    """What became of one pair, and what it has in memory on its way."""

    pair: Pair
    reason: str = ""
    seconds: float = math.nan
    read_seconds: float = math.nan
    write_seconds: float = math.nan
    peak_memory_mb: float = math.nan
    inverse_mean: float = math.nan
    inverse_worst: float = math.nan
    moving: torch.Tensor | None = None
    fixed: torch.Tensor | None = None
    seen: tuple[torch.Tensor | None, torch.Tensor | None] = (None, None)
    grid: Grid | None = None
    displacement: torch.Tensor | None = None

    def record(self) -> dict[str, Any]:
        return {
            "moving": self.pair.moving,
            "fixed": self.pair.fixed,
            "status": "failed" if self.reason else "ok",
            "reason": self.reason,
            **{name: getattr(self, name) for name in MEASURED},
        }


@contextlib.contextmanager
def _failure_noted(outcome: _Outcome) -> Iterator[None]:
    """Turn an exception into the reason why this pair, and no other, failed.

    Raises
    ------
    GpuUnusable
        The GPU stopped working: that is no result of a pair, and every pair after it would fail as well.
    StorageError
        The field cannot be written: no result of a pair either.
    """
    try:
        with gpu_failures_told(lambda: REGISTERED_ANEW):
            yield
    except (GpuUnusable, StorageError):
        raise
    except Exception as error:
        message = " ".join(str(error).split())
        outcome.reason = message if isinstance(error, DmirError) else f"{type(error).__name__}: {message}"


@contextlib.contextmanager
def _memory_explained(pair: str, shape: Sequence[int], device: torch.device) -> Iterator[None]:
    """Say of memory that does not suffice which pair wants it, and which keys make it less."""
    try:
        yield
    except (torch.OutOfMemoryError, MemoryError) as error:
        if device.type == "cuda":
            torch.cuda.empty_cache()  # the next pair finds the card as this one did
        raise DmirError(
            f"{pair}, {'x'.join(map(str, shape))} voxels: out of memory on {device_name(device)}. "
            "A smaller `grid.shape` needs less, and `precision` bf16 on a device that has it; `checkpointing` saves "
            f"nothing here, because only training keeps what lies between the layers. ({' '.join(str(error).split())})"
        ) from error


class _Session:
    """One network that registers pairs of files in one process."""

    def __init__(self, folder: Path, computer: _Computer, metadata: Mapping[str, Any], warmup: bool) -> None:
        self.folder = folder
        self.computer = computer
        self.metadata = metadata
        self._cold = warmup
        self._told_of_spacing = False
        self._fixed: tuple[Path, Future[_Image]] | None = None

    def run(self, pairs: Sequence[Pair], overlap: bool) -> Generator[_Outcome]:
        """Yield the outcomes in order, with at most AHEAD pairs read and BEHIND fields not yet written.

        Without ``overlap`` one pair is read while one field is written, and the network waits for both.
        """
        ahead = AHEAD if overlap else 1
        waiting = deque(pairs)
        reading: deque[Future[_Outcome]] = deque()
        writing: deque[Future[_Outcome]] = deque()
        readers, writers = ThreadPoolExecutor(ahead, "read"), ThreadPoolExecutor(BEHIND, "write")
        try:
            with arithmetic(self.computer.precision):
                while waiting or reading:
                    while waiting and len(reading) < ahead:
                        reading.append(self._begin_to_read(waiting.popleft(), readers))
                    loaded = reading.popleft().result()
                    if not overlap:
                        wait(writing)
                    registered = self._register(loaded)
                    writing.append(writers.submit(self._write, registered))
                    while writing and (len(writing) >= BEHIND or writing[0].done()):
                        yield writing.popleft().result()
                while writing:
                    yield writing.popleft().result()
        finally:  # what is being written is finished, what is not begun is not
            readers.shutdown(cancel_futures=True)
            writers.shutdown(cancel_futures=True)

    def _begin_to_read(self, pair: Pair, readers: ThreadPoolExecutor) -> Future[_Outcome]:
        if self._fixed is None or self._fixed[0] != pair.fixed_path:  # mostly one atlas for all pairs
            self._fixed = pair.fixed_path, readers.submit(self._read_image, pair.fixed_path)
        return readers.submit(self._read, pair, self._fixed[1])  # after the fixed one in the threads' queue

    def _read_image(self, path: Path) -> _Image:
        start = time.perf_counter()
        image = read_image(path)
        data, seconds = _to_tensor(image, self.computer.device), time.perf_counter() - start
        seen = before_planes(image.grid, planes_of(path)) if self.computer.refine is not None else None
        return _Image(image.grid, data, seconds, None if seen is None else torch.from_numpy(seen)[None].float())

    def _read(self, pair: Pair, fixed_image: Future[_Image]) -> _Outcome:
        outcome = _Outcome(pair)
        # an image that cannot be read is no failure of the network: it ends the whole, to be mended
        moving, fixed = self._read_image(pair.moving_path), fixed_image.result()
        with _failure_noted(outcome):
            outcome.read_seconds = moving.seconds + fixed.seconds
            require_same_grid(fixed.grid, moving.grid, pair.fixed_path, pair.moving_path)
            outcome.moving, outcome.fixed, outcome.grid = moving.data, fixed.data, fixed.grid
            outcome.seen = (moving.seen, fixed.seen)
        return outcome

    def _register(self, outcome: _Outcome) -> _Outcome:
        moving, fixed, grid = outcome.moving, outcome.fixed, outcome.grid
        if outcome.reason or moving is None or fixed is None or grid is None:
            return outcome
        name = f"{outcome.pair.moving} to {outcome.pair.fixed}"
        with _failure_noted(outcome), _memory_explained(name, grid.shape, self.computer.device):
            self._tell_of_spacing(grid)
            if self._cold:
                self.computer.register(moving, fixed, grid.spacing.tolist(), outcome.seen)
                self._cold = False
            reset_peak_memory(self.computer.device)
            displacement, seconds = self.computer.register(moving, fixed, grid.spacing.tolist(), outcome.seen)
            outcome.peak_memory_mb = peak_memory_mb(self.computer.device)
            outcome.displacement, outcome.seconds = displacement, seconds
            if self.computer.refine is not None:  # its field has an inverse
                told = inverse_consistency(displacement.numpy())
                outcome.inverse_mean, outcome.inverse_worst = told["inverse_mean"], told["inverse_worst"]
        outcome.moving = outcome.fixed = None  # no longer needed: the field takes three times their memory
        return outcome

    def _write(self, outcome: _Outcome) -> _Outcome:
        if outcome.displacement is not None and outcome.grid is not None:
            with _failure_noted(outcome):
                start = time.perf_counter()
                path = pair_field(self.folder, outcome.pair.moving, outcome.pair.fixed)
                save_field(path, outcome.displacement, outcome.grid.affine)
                outcome.write_seconds = time.perf_counter() - start
        outcome.displacement = outcome.grid = None
        return outcome

    def _tell_of_spacing(self, fixed: Grid) -> None:
        """Warn, once, of pairs on a grid that is finer or coarser than the one that it was trained on."""
        if not self._told_of_spacing:
            self._told_of_spacing = _warn_of_spacing(self.metadata, fixed)


class _Computer:
    """A network on its device, and the fixed image that it has there."""

    def __init__(self, network: nn.Module, device: torch.device, precision: str, refine: Refine | None) -> None:
        self.network = network
        self.device = device
        self.precision = precision
        self.refine = refine
        self._host: torch.Tensor | None = None
        self._there: torch.Tensor | None = None
        self._transfer_seconds = 0.0

    def register(
        self,
        moving: torch.Tensor,
        fixed: torch.Tensor,
        spacing: Sequence[float],
        seen: Sequence[torch.Tensor | None] = (None, None),
    ) -> tuple[torch.Tensor, float]:
        """Register one pair of host tensors (1, 1, D, H, W), with voxels of so many mm.

        What a scan never saw, (1, D, H, W), does not pull where the field is refined.

        Returns
        -------
        displacement, seconds
            float32 (3, D, H, W) in host memory, and the seconds from host memory to host memory, with nothing left in
            the GPU's queue.

        Raises
        ------
        DmirError
            The field is not finite.
        """
        fixed_seconds = self._put_there(fixed)
        on_gpu = self.device.type == "cuda"
        # page-locked memory is slow to come the first time and torch keeps it: it is no part of one pair
        held = torch.empty(3, *moving.shape[2:], pin_memory=True) if on_gpu else None
        start = self._now()
        moving_there = moving.to(self.device, non_blocking=True)
        with torch.inference_mode():
            displacement = displacement_of(self.network, moving_there, self._there, self.precision)  # type: ignore[arg-type]
        if self.refine is not None:
            known = {"seen": tuple(map(self._brought, seen))} if any(map_ is not None for map_ in seen) else {}
            displacement = self.refine(moving_there, self._there, displacement, spacing, **known)
        result = displacement[0] if held is None else held.copy_(displacement[0], non_blocking=True)
        seconds = self._now() - start + fixed_seconds
        bad = int(displacement.numel() - displacement.isfinite().sum())
        if bad:
            raise DmirError(f"The network's field has {bad} values that are NaN or infinite.")
        return result, seconds

    def _brought(self, volume: torch.Tensor | None) -> torch.Tensor | None:
        return None if volume is None else volume.to(self.device)

    def _put_there(self, fixed: torch.Tensor) -> float:
        """Have the fixed image on the device, and return the seconds that this takes, or took when it came."""
        if self._host is not fixed:
            self._there = None  # two at a time are never needed
            start = self._now()
            self._there = fixed.to(self.device, non_blocking=True)
            self._transfer_seconds = self._now() - start
            self._host = fixed
        return self._transfer_seconds

    def _now(self) -> float:
        """Return the time when all that the device was told to do is done."""
        if self.device.type == "cuda":
            torch.cuda.synchronize(self.device)
        return time.perf_counter()


def _to_tensor(image: Volume, device: torch.device) -> torch.Tensor:
    """Return an image as (1, 1, D, H, W) in host memory, page-locked where a GPU is to fetch it."""
    tensor = torch.from_numpy(np.ascontiguousarray(image.data, np.float32))[None, None]
    return tensor.pin_memory() if device.type == "cuda" else tensor


def reset_peak_memory(device: torch.device) -> None:
    """Let the peak of :func:`~dmir.training.devices.peak_memory_mb` begin anew, where the system can do that."""
    if device.type == "cuda":
        torch.cuda.reset_peak_memory_stats(device)
    else:
        with contextlib.suppress(OSError):
            Path("/proc/self/clear_refs").write_text("5")  # Linux: the peak becomes what is resident now


def _warn_of_spacing(metadata: Mapping[str, Any], fixed: Volume | Grid) -> bool:
    """Warn when the images' voxels are not those of the training; tell whether there was a reason to."""
    trained = np.asarray(metadata["grid"]["spacing"])
    differs = not np.allclose(trained, fixed.spacing, atol=1e-3)
    if differs:
        log.warning(
            "%s was trained on voxels of %s mm, and these are %s mm: what it learnt of sizes does not hold",
            metadata["network"],
            "x".join(f"{s:.3g}" for s in trained),
            "x".join(f"{s:.3g}" for s in fixed.spacing),
        )
    return differs
