"""Many pairs of files that one network registers in one process, read and written meanwhile."""

from __future__ import annotations

import contextlib
import math
import time
from collections import deque
from collections.abc import Generator, Iterator, Mapping, Sequence
from concurrent.futures import Future, ThreadPoolExecutor, wait
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

import torch

from dmir.errors import DmirError, StorageError
from dmir.fields import inverse_consistency, pair_field, save_field
from dmir.methods.network_device import Computer, memory_explained, to_tensor, warn_of_spacing
from dmir.methods.records import MEASURED, planes_of
from dmir.training.devices import GpuUnusable, gpu_failures_told, peak_memory_mb, reset_peak_memory
from dmir.training.objective import arithmetic
from dmir.volumes import Grid, before_planes, read_image, require_same_grid

AHEAD = 4  # pairs that are read, or being read, before the network gets to them; each by a thread of its own
BEHIND = 4  # fields that wait to be written, or are being written: 83 MB each at 160x192x224
REGISTERED_ANEW = "The same command, given again, registers what it was at anew."


class Pair(NamedTuple):
    """Two scans on one grid: their names and their images."""

    moving: str
    moving_path: Path
    fixed: str
    fixed_path: Path


class _Image(NamedTuple):
    """An image that was read, (1, 1, D, H, W) in host memory, the seconds that it took, and what its scan saw."""

    grid: Grid
    data: torch.Tensor
    seconds: float
    seen: torch.Tensor | None = None


@dataclass
class Outcome:
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
def _failure_noted(outcome: Outcome) -> Iterator[None]:
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


class Session:
    """One network that registers pairs of files in one process."""

    def __init__(self, folder: Path, computer: Computer, metadata: Mapping[str, Any], warmup: bool) -> None:
        self.folder = folder
        self.computer = computer
        self.metadata = metadata
        self._cold = warmup
        self._told_of_spacing = False
        self._fixed: tuple[Path, Future[_Image]] | None = None

    def run(self, pairs: Sequence[Pair], overlap: bool) -> Generator[Outcome]:
        """Yield the outcomes in order, with at most AHEAD pairs read and BEHIND fields not yet written.

        Without ``overlap`` one pair is read while one field is written, and the network waits for both.
        """
        ahead = AHEAD if overlap else 1
        waiting = deque(pairs)
        reading: deque[Future[Outcome]] = deque()
        writing: deque[Future[Outcome]] = deque()
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

    def _begin_to_read(self, pair: Pair, readers: ThreadPoolExecutor) -> Future[Outcome]:
        if self._fixed is None or self._fixed[0] != pair.fixed_path:  # mostly one atlas for all pairs
            self._fixed = pair.fixed_path, readers.submit(self._read_image, pair.fixed_path)
        return readers.submit(self._read, pair, self._fixed[1])  # after the fixed one in the threads' queue

    def _read_image(self, path: Path) -> _Image:
        start = time.perf_counter()
        image = read_image(path)
        data, seconds = to_tensor(image, self.computer.device), time.perf_counter() - start
        seen = before_planes(image.grid, planes_of(path)) if self.computer.refine is not None else None
        return _Image(image.grid, data, seconds, None if seen is None else torch.from_numpy(seen)[None].float())

    def _read(self, pair: Pair, fixed_image: Future[_Image]) -> Outcome:
        outcome = Outcome(pair)
        # an image that cannot be read is no failure of the network: it ends the whole, to be mended
        moving, fixed = self._read_image(pair.moving_path), fixed_image.result()
        with _failure_noted(outcome):
            outcome.read_seconds = moving.seconds + fixed.seconds
            require_same_grid(fixed.grid, moving.grid, pair.fixed_path, pair.moving_path)
            outcome.moving, outcome.fixed, outcome.grid = moving.data, fixed.data, fixed.grid
            outcome.seen = (moving.seen, fixed.seen)
        return outcome

    def _register(self, outcome: Outcome) -> Outcome:
        moving, fixed, grid = outcome.moving, outcome.fixed, outcome.grid
        if outcome.reason or moving is None or fixed is None or grid is None:
            return outcome
        name = f"{outcome.pair.moving} to {outcome.pair.fixed}"
        with _failure_noted(outcome), memory_explained(name, grid.shape, self.computer.device):
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

    def _write(self, outcome: Outcome) -> Outcome:
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
            self._told_of_spacing = warn_of_spacing(self.metadata, fixed)
