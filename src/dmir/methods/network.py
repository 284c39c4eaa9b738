"""Registration with a trained network: one pair in memory, or many pairs of files in one process.

A network registers a pair in less time than it takes to read it and to write its field, so reading and writing are
spread over threads. While a pair is registered nothing else runs: the seconds of a pair are those of a machine that
does only that.
"""

from __future__ import annotations

import contextlib
import logging
import math
import time
from collections.abc import Iterator, Mapping, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import pandas as pd
import torch
from torch import nn

from dmir.errors import DmirError
from dmir.fields import save_field
from dmir.methods.records import COLUMNS
from dmir.training.devices import choose_device, device_name, peak_memory_mb
from dmir.training.objective import arithmetic, displacement_of
from dmir.training.weights import load_weights
from dmir.volumes import Volume, read_image, require_same_grid

log = logging.getLogger(__name__)

IO_THREADS = 4  # files read or written at the same time; more would hold many fields in memory
Loaded = tuple[nn.Module, dict[str, Any]]  # what load_weights returns


class Pair(NamedTuple):
    """Two scans on one grid: their names and their images."""

    moving: str
    moving_path: Path
    fixed: str
    fixed_path: Path


def register(
    moving: Volume,
    fixed: Volume,
    weights: str | Path | Loaded,
    device: str | torch.device | None = None,
    precision: str = "float32",
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

    Returns
    -------
    numpy.ndarray
        float32 (3, D, H, W), voxels, on the fixed grid.

    Raises
    ------
    InputError
        The two grids differ, or the weights cannot be used.
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
    with arithmetic(precision):
        displacement, _ = _timed(network, moving, fixed, target, precision)
    _require_finite(displacement)
    return displacement


def register_pairs(
    pairs: Sequence[tuple[str, str | Path, str, str | Path]],
    folder: str | Path,
    weights: str | Path,
    device: str | torch.device | None = None,
    warmup: bool = True,
    *,
    precision: str = "float32",
    cohort: str = "",
    method: str | None = None,
    model: str | None = None,
) -> pd.DataFrame:
    """Register pairs of files, and write each field as ``<folder>/<moving>__<fixed>.nii.gz``.

    Parameters
    ----------
    pairs
        (moving name, moving image, fixed name, fixed image), preprocessed, on one grid each.
    folder
        Where the fields go.
    weights
        A weights file.
    device, precision
        As for :func:`register`.
    warmup
        Register the first pair once before the clock runs: the first call of a network pays for memory and for the
        choice of algorithms.
    cohort, method, model
        For the records; by default no cohort, the network's name, and ``seed<n>``.

    Returns
    -------
    pandas.DataFrame
        One record a pair, in their order. ``seconds``: from images in host memory to the field in host memory, both
        transfers and the GPU's queue included, files not; ``read_seconds``, ``write_seconds``: of its files, as
        measured while others are read and written. ``peak_memory_mb``: on a GPU the most that torch's allocator gave
        out during this pair (weights included); on the CPU the largest resident set of the whole process so far.
        A pair that fails has the status ``"failed"``, its reason, and NaN for what was not reached.

    Raises
    ------
    InputError
        The weights cannot be used; a pair alone never raises.
    """
    session = _Session(Path(folder), Path(weights), choose_device(device), precision, warmup)
    run_as = {
        "cohort": cohort,
        "method": session.metadata["network"] if method is None else method,
        "model": f"seed{session.metadata['seed']}" if model is None else model,
        "device": device_name(session.device),
        "threads": torch.get_num_threads(),
    }
    named = [Pair(moving, Path(a), fixed, Path(b)) for moving, a, fixed, b in pairs]
    records = []
    for number, outcome in enumerate(session.run(named), start=1):
        told = f"failed: {outcome.reason}" if outcome.reason else f"{outcome.seconds:.3g} s"
        log.info("%d/%d %s to %s: %s", number, len(named), outcome.pair.moving, outcome.pair.fixed, told)
        records.append(run_as | outcome.record())
    return pd.DataFrame(records, columns=list(COLUMNS))


@dataclass
class _Outcome:
    """What became of one pair, and what it has in memory on its way."""

    pair: Pair
    reason: str = ""
    seconds: float = math.nan
    read_seconds: float = math.nan
    write_seconds: float = math.nan
    peak_memory_mb: float = math.nan
    moving: Volume | None = None
    fixed: Volume | None = None
    displacement: np.ndarray | None = None

    def record(self) -> dict[str, Any]:
        measured = ("reason", "seconds", "read_seconds", "write_seconds", "peak_memory_mb")
        return {
            "moving": self.pair.moving,
            "fixed": self.pair.fixed,
            "status": "failed" if self.reason else "ok",
            **{name: getattr(self, name) for name in measured},
        }


@contextlib.contextmanager
def _failure_noted(outcome: _Outcome) -> Iterator[None]:
    """Turn an exception into the reason why this pair, and no other, failed."""
    try:
        yield
    except Exception as error:
        message = " ".join(str(error).split())
        outcome.reason = message if isinstance(error, DmirError) else f"{type(error).__name__}: {message}"


class _Session:
    """One network that registers pairs of files in one process."""

    def __init__(self, folder: Path, weights: Path, device: torch.device, precision: str, warmup: bool) -> None:
        self.folder = folder
        self.device = device
        self.precision = precision
        self.network, self.metadata = load_weights(weights, device=device)
        self._cold = warmup
        self._told_of_spacing = False
        self._fixed: dict[Path, Volume] = {}

    def run(self, pairs: Sequence[Pair]) -> Iterator[_Outcome]:
        """Yield the outcomes in order; while fields are written, the next images are read."""
        with arithmetic(self.precision), ThreadPoolExecutor(max_workers=IO_THREADS) as pool:
            writing: list[Future[_Outcome]] = []
            for start in range(0, len(pairs), IO_THREADS):
                reading = [pool.submit(self._read, pair) for pair in pairs[start : start + IO_THREADS]]
                yield from [future.result() for future in writing]
                loaded = [future.result() for future in reading]
                # The threads are idle meanwhile: they would take time from the network.
                registered = [self._register(outcome) for outcome in loaded]
                writing = [pool.submit(self._write, outcome) for outcome in registered]
            yield from [future.result() for future in writing]

    def _read(self, pair: Pair) -> _Outcome:
        outcome = _Outcome(pair)
        with _failure_noted(outcome):
            start = time.perf_counter()
            outcome.moving = read_image(pair.moving_path)
            outcome.fixed = self._fixed.get(pair.fixed_path) or read_image(pair.fixed_path)
            outcome.read_seconds = time.perf_counter() - start
            self._fixed = {pair.fixed_path: outcome.fixed}  # mostly one atlas for all pairs
            require_same_grid(outcome.fixed, outcome.moving, pair.fixed_path, pair.moving_path)
        return outcome

    def _register(self, outcome: _Outcome) -> _Outcome:
        moving, fixed = outcome.moving, outcome.fixed
        if outcome.reason or moving is None or fixed is None:
            return outcome
        with _failure_noted(outcome):
            self._tell_of_spacing(fixed)
            if self._cold:
                _timed(self.network, moving, fixed, self.device, self.precision)
                self._cold = False
            if self.device.type == "cuda":
                torch.cuda.reset_peak_memory_stats(self.device)
            displacement, seconds = _timed(self.network, moving, fixed, self.device, self.precision)
            outcome.peak_memory_mb = peak_memory_mb(self.device)
            _require_finite(displacement)
            outcome.displacement, outcome.seconds = displacement, seconds
        outcome.moving = None  # no longer needed: the field takes three times its memory
        return outcome

    def _write(self, outcome: _Outcome) -> _Outcome:
        if outcome.displacement is not None and outcome.fixed is not None:
            with _failure_noted(outcome):
                start = time.perf_counter()
                path = self.folder / f"{outcome.pair.moving}__{outcome.pair.fixed}.nii.gz"
                save_field(path, outcome.displacement, outcome.fixed.affine)
                outcome.write_seconds = time.perf_counter() - start
            outcome.displacement = None
        return outcome

    def _tell_of_spacing(self, fixed: Volume) -> None:
        """Warn, once, of pairs on a grid that is finer or coarser than the one that it was trained on."""
        if not self._told_of_spacing:
            self._told_of_spacing = _warn_of_spacing(self.metadata, fixed)


def _timed(
    network: nn.Module, moving: Volume, fixed: Volume, device: torch.device, precision: str
) -> tuple[np.ndarray, float]:
    """Return the field and the seconds from host memory to host memory, with nothing left in the GPU's queue."""
    _synchronise(device)
    start = time.perf_counter()
    with torch.inference_mode():
        images = [torch.from_numpy(np.ascontiguousarray(v.data, np.float32))[None, None] for v in (moving, fixed)]
        displacement = displacement_of(network, images[0].to(device), images[1].to(device), precision)[0].cpu().numpy()
    _synchronise(device)
    return displacement, time.perf_counter() - start


def _synchronise(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize(device)


def _require_finite(displacement: np.ndarray) -> None:
    bad = int(displacement.size - np.isfinite(displacement).sum())
    if bad:
        raise DmirError(f"The network's field has {bad} values that are NaN or infinite.")


def _warn_of_spacing(metadata: Mapping[str, Any], fixed: Volume) -> bool:
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
