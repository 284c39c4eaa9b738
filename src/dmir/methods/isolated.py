"""Pairs in a process apart: a method's crash, time-out or exception is one failed pair, never more.

The classical methods are C++ that can end its process without a Python exception, that reads its number of threads
from the environment once, and whose memory only the process itself can tell. So pairs are registered by another one:
``python -m dmir.methods.isolated request.json``. It goes on with the next pair, since what a method imports takes
seconds; it ends with a pair that fails, and the next pair gets a fresh one. Somebody else's method gets one for each.

A failed pair is a result, and stands in the tables. What is not the method's fault is none: a process that somebody
killed (or the kernel, for want of memory), images that cannot be read, a full disk. Then the whole job fails, and is
done again by the next run.
"""

from __future__ import annotations

import contextlib
import json
import logging
import math
import os
import resource
import subprocess
import sys
import tempfile
import time
import traceback
import zlib
from collections.abc import Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from multiprocessing.connection import wait
from pathlib import Path
from queue import SimpleQueue
from typing import TYPE_CHECKING, Any

from dmir import registry
from dmir.errors import DmirError, StorageError
from dmir.job import THREAD_VARIABLES
from dmir.methods.processes import KILLED, end_of, end_with_parent, signal_name
from dmir.methods.records import COLUMNS, MEASURED, planes_of
from dmir.registry import asks_for, runs

if TYPE_CHECKING:
    import numpy as np
    import pandas as pd

    from dmir.volumes import Volume

log = logging.getLogger(__name__)

MODULE = "dmir.methods.isolated"
MIB = 2**20
GRACE = 20.0  # seconds that a process has to stop its program after its time is over
MOST_LOGGED = 2**16  # bytes of what a pair of somebody else's method said
UNABLE = 3  # the status of a process that could not do what it was asked, whatever the method


class Unable(DmirError):
    """A pair could not be registered, and it was not the method that failed."""


def register_isolated(
    moving_path: str | Path,
    fixed_path: str | Path,
    field_path: str | Path,
    method: str,
    parameters: Mapping[str, Any] | None = None,
    threads: int = 1,
    timeout: float | None = None,
    names: Mapping[str, str] | None = None,
) -> dict[str, Any]:
    """Register one pair in a process of its own and write its field.

    Parameters
    ----------
    moving_path, fixed_path
        Images, affinely aligned.
    field_path
        Where the field goes; nothing is left there by a pair that fails.
    method, parameters
        As for :func:`dmir.methods.register`.
    threads
        Of every library in that process. A method whose result depends on them has a parameter of this name, which
        wins.
    timeout
        Seconds after which the process is stopped; None: never.
    names
        What scans and cohort are called, for a method that asks for it: ``moving``, ``fixed``, ``cohort``.

    Returns
    -------
    dict
        ``status`` ("ok" or "failed"), ``reason`` ("" or one line), ``seconds`` (the registration alone),
        ``read_seconds``, ``write_seconds``, ``peak_memory_mb`` (of that process, or of a GPU where it computed there,
        MiB), ``device``, ``threads``; ``inverse_mean`` and ``inverse_worst``, how far there and back by the inverse
        ends from the start (voxels), of a method that gives one. What was not reached is NaN.

    Raises
    ------
    DmirError
        It was not the method that failed: the process was killed, the images cannot be read, the disk is full.
    """
    with PairProcess(method, parameters, threads) as process:
        return process.register(moving_path, fixed_path, field_path, timeout, names)


def register_pairs(
    pairs: Sequence[tuple[str, str | Path, str, str | Path]],
    folder: str | Path,
    method: str,
    parameters: Mapping[str, Any] | None = None,
    threads: int = 1,
    timeout: float | None = None,
    workers: int = 1,
    *,
    cohort: str = "",
    model: str = "none",
) -> pd.DataFrame:
    """Register pairs of files in processes apart; the fields are ``<folder>/<moving>__<fixed>.nii``.

    Parameters
    ----------
    pairs
        (moving name, moving image, fixed name, fixed image).
    workers
        Processes at the same time.
    cohort, model
        For the records.

    Returns
    -------
    pandas.DataFrame
        One record a pair, in their order: see :func:`register_isolated`.
    """
    import pandas as pd  # not in the process of a pair, which would count it, or torch, as the method's memory

    from dmir.fields import pair_field

    folder = Path(folder)
    folder.mkdir(parents=True, exist_ok=True)

    free: SimpleQueue[PairProcess] = SimpleQueue()

    def one(pair: tuple[str, str | Path, str, str | Path]) -> dict[str, Any]:
        moving, moving_path, fixed, fixed_path = pair
        names = {"moving": moving, "fixed": fixed, "cohort": cohort}
        process = free.get()
        try:
            record = process.register(moving_path, fixed_path, pair_field(folder, moving, fixed), timeout, names)
        finally:
            free.put(process)
        return {"cohort": cohort, "method": method, "model": model, "moving": moving, "fixed": fixed} | record

    records = []
    with contextlib.ExitStack() as processes, ThreadPoolExecutor(max_workers=workers) as pool:
        for _ in range(workers):
            free.put(processes.enter_context(PairProcess(method, parameters, threads)))
        for number, record in enumerate(pool.map(one, pairs), start=1):
            told = f"{record['seconds']:.1f} s" if record["status"] == "ok" else f"failed: {record['reason']}"
            log.info("%d/%d %s to %s: %s", number, len(pairs), record["moving"], record["fixed"], told)
            records.append(record)
    return pd.DataFrame(records, columns=list(COLUMNS))


class PairProcess:
    """A process in which one pair after another is registered, and the folder that it has for them.

    Parameters
    ----------
    method, parameters, threads
        See :func:`register_isolated`.
    """

    def __init__(self, method: str, parameters: Mapping[str, Any] | None = None, threads: int = 1) -> None:
        self._method, self._parameters = method, dict(parameters or {})
        self._threads = int((self._parameters.get("of") or self._parameters).get("threads", threads))
        self._goes_on = not _is_foreign(method, self._parameters)
        self._child: subprocess.Popen[bytes] | None = None
        self._answered = -1  # the end of a pipe from which a byte is read for each answer

    def __enter__(self) -> PairProcess:
        self._kept = tempfile.TemporaryDirectory(prefix="pair-")
        self._folder = Path(self._kept.name)
        return self

    def __exit__(self, *_: object) -> None:
        self._end()
        self._kept.cleanup()

    def register(
        self,
        moving_path: str | Path,
        fixed_path: str | Path,
        field_path: str | Path,
        timeout: float | None = None,
        names: Mapping[str, str] | None = None,
    ) -> dict[str, Any]:
        """Register one pair and return its record, see :func:`register_isolated`."""
        method, parameters, field_path = self._method, self._parameters, Path(field_path)
        field_path.unlink(missing_ok=True)
        record: dict[str, Any] = {"status": "ok", "reason": "", **dict.fromkeys(MEASURED, math.nan)}
        record |= {"device": "cpu", "threads": self._threads}
        request = {
            "moving": str(Path(moving_path).absolute()),
            "fixed": str(Path(fixed_path).absolute()),
            "field": str(field_path.absolute()),
            "method": method,
            "parameters": parameters,
            "cut_planes": [planes_of(path) for path in (moving_path, fixed_path)] if asks_for(method, "seen") else [],
            "limit": timeout,
            "names": dict(names or {}),
            "answer": str(self._folder / "answer.json"),
            "parent": os.getpid(),
        }
        pair = f"{method}, {moving_path} to {fixed_path}"
        own_limit = timeout is not None and asks_for(method, "limit")  # it stops what it has started, and says so
        reason = self._ask(request, timeout + GRACE if own_limit and timeout is not None else timeout, pair)
        if runs(method, parameters):
            _log_output(self._folder / "output.txt", pair)
        answer = self._folder / "answer.json"
        if not reason and not answer.is_file():
            reason = "the process ended without an answer"
        if reason:
            field_path.unlink(missing_ok=True)
            return record | {"status": "failed", "reason": reason}
        return record | json.loads(answer.read_text())

    def _ask(self, request: Mapping[str, Any], timeout: float | None, pair: str) -> str:
        """Have a pair registered; return why the method failed, or an empty text; DmirError: it was not the method."""
        (self._folder / "answer.json").unlink(missing_ok=True)
        output = self._folder / "output.txt"
        output.write_bytes(b"")
        if self._child is None:
            self._start(request, output)
        else:
            self._write(request)
            with contextlib.suppress(BrokenPipeError):  # it ended meanwhile, and its status will tell
                os.write(self._wakes, b"\n")
        try:
            status = self._status(timeout)
        except subprocess.TimeoutExpired:
            self._end()
            return f"stopped after {timeout:g} s"
        if status is None:
            return ""
        self._end()
        return _why(status, output, pair)

    def _write(self, request: Mapping[str, Any]) -> None:
        (self._folder / "request.json").write_text(json.dumps(request, default=str))

    def _start(self, request: Mapping[str, Any], output: Path) -> None:
        asked, self._wakes = os.pipe()
        self._answered, answers = os.pipe()
        self._write({**request, "more": [asked, answers] if self._goes_on else None})
        try:
            with output.open("ab") as file:  # so that what a pair says begins at the start of the file again
                self._child = subprocess.Popen(
                    _command(self._folder / "request.json"),
                    env=_environment(self._threads, self._parameters, self._folder),
                    stdin=subprocess.DEVNULL,
                    stdout=file,
                    stderr=subprocess.STDOUT,
                    pass_fds=(asked, answers) if self._goes_on else (),
                )
        finally:
            os.close(asked)
            os.close(answers)

    def _status(self, timeout: float | None) -> int | None:
        """Wait for an answer and return None, or for the end of the process and return its status."""
        assert self._child is not None
        if self._goes_on:
            if not wait([self._answered], timeout):
                raise subprocess.TimeoutExpired(self._child.args, timeout or 0.0)
            if os.read(self._answered, 1):
                return None
        return self._child.wait(timeout)

    def _end(self) -> None:
        """End the process, which has nothing to put away, and wait for it."""
        if self._child is not None:
            self._child.kill()
            self._child.wait()
            os.close(self._wakes)
            os.close(self._answered)
        self._child = None


def _environment(threads: int, parameters: Mapping[str, Any], folder: Path) -> dict[str, str]:
    """Return the environment of the process: threads and seed before anything is imported."""
    environment = os.environ | dict.fromkeys(THREAD_VARIABLES, str(threads))
    environment["ANTS_RANDOM_SEED"] = str((parameters.get("of") or parameters).get("seed", 1))
    environment["TMPDIR"] = str(folder)  # what a killed process leaves goes with this folder
    source = str(Path(__file__).parents[2])  # this very library, installed or not
    environment["PYTHONPATH"] = os.pathsep.join(filter(None, [source, os.environ.get("PYTHONPATH")]))
    return environment


def _command(request: Path) -> list[str]:
    return [sys.executable, "-m", MODULE, str(request)]


def _why(status: int, output: Path, pair: str) -> str:
    """Return why the method failed, or an empty text; DmirError where it was not the method."""
    if status == 0:
        return ""
    if status < 0:
        name = signal_name(-status)
        if -status in KILLED:
            raise DmirError(
                f"{pair}: the process that registered this pair was killed by {name}: by the system, for want of"
                " memory, or by somebody. Nothing is recorded; the same command registers these pairs again."
            )
        return f"killed by {name}"
    if status == UNABLE:
        raise DmirError(f"{pair}: {_last_line(output) or 'nothing could be told: is the temporary folder full?'}")
    return _last_line(output) or f"ended with status {status}"


def _log_output(output: Path, pair: str) -> None:
    """Write what somebody else's program or module said into the job's log: of much, its end."""
    text, more = end_of(output, MOST_LOGGED)
    if text:
        log.info("%s said%s:\n%s", pair, " at its end" if more else "", text)


def _last_line(output: Path) -> str:
    lines = [line.strip() for line in output.read_text(errors="replace").splitlines() if line.strip()]
    return lines[-1] if lines else ""


def peak_memory_mb() -> float:
    """Return the largest resident set of this process so far, MiB."""
    status = Path("/proc/self/status")
    if status.is_file():
        for line in status.read_text().splitlines():
            if line.startswith("VmHWM:"):  # ru_maxrss would begin with the parent's, inherited at the fork
                return int(line.split()[1]) * 1024 / MIB
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return peak / MIB if sys.platform == "darwin" else peak * 1024 / MIB


def _answer(request: Mapping[str, Any]) -> dict[str, Any]:
    """Do what a request asks, in this process, and return what was measured."""
    from dmir.fields import save_field
    from dmir.methods.calling import load_libraries
    from dmir.volumes import read_image

    method, parameters = request["method"], request["parameters"]
    with contextlib.nullcontext() if _is_foreign(method, parameters) else _whatever_the_method():
        load_libraries(method, parameters)  # seconds that are no part of the registration
    with _whatever_the_method():
        start = time.perf_counter()
        moving, fixed = read_image(request["moving"], "moving"), read_image(request["fixed"], "fixed")
        read = time.perf_counter()
    displacement, measured = _registered(request, moving, fixed)
    with _whatever_the_method():
        ready = time.perf_counter()
        save_field(request["field"], displacement, fixed.affine)
        written = time.perf_counter()
    times = {"read_seconds": read - start, "write_seconds": written - ready}
    return {**times, "peak_memory_mb": peak_memory_mb(), **measured}


def _is_foreign(method: str, parameters: Mapping[str, Any]) -> bool:
    """Tell whether somebody else's function is called for a pair, by itself or to be refined."""
    used = [method, *(part["algorithm"] for part in registry.parts(method, parameters))]
    return any(registry.find(name).source != registry.BUILT_IN for name in used)


def _registered(request: Mapping[str, Any], moving: Volume, fixed: Volume) -> tuple[np.ndarray, dict[str, Any]]:
    """Return the field of a request's pair, and what was measured of it."""
    import numpy as np

    from dmir.methods.calling import register, surroundings
    from dmir.training.devices import choose_device, device_name, reset_peak_memory
    from dmir.training.devices import peak_memory_mb as device_memory_mb
    from dmir.volumes import before_planes

    method, parameters, device = request["method"], dict(request["parameters"]), None
    if asks_for(method, "device"):
        device = parameters["device"] = choose_device()
        reset_peak_memory(device)  # of the pairs before
    if asks_for(method, "seen"):
        images = zip((moving, fixed), request["cut_planes"], strict=True)
        parameters["seen"] = tuple(before_planes(image.grid, planes) for image, planes in images)
    foreign = _is_foreign(method, request["parameters"])
    told: dict[str, Any] = {}
    before = _checksum(moving, fixed) if foreign else 0
    start = time.perf_counter()
    paths = {side: request[side] for side in ("moving", "fixed")}
    around = surroundings(limit=request["limit"], names=request["names"], paths=paths, measured=told)
    with around, _faults_told(foreign):
        displacement = register(moving, fixed, method, **parameters)
    measured: dict[str, Any] = {"seconds": time.perf_counter() - start}
    require_field(displacement, fixed.shape)
    if foreign and _checksum(moving, fixed) != before:
        raise DmirError("the method changes the images that it is given; it may change copies of them")
    if device is not None:
        peak = device_memory_mb(device) if device.type == "cuda" else peak_memory_mb()
        measured |= {"device": device_name(device), "peak_memory_mb": peak}
    if asks_for(method, "measured"):
        measured |= told
    displacement = np.asarray(displacement, dtype=np.float32)
    if getattr(registry.implementation(method), "INVERTIBLE", False):
        from dmir.fields import inverse_consistency

        measured |= inverse_consistency(displacement)
    return displacement, measured


def require_field(displacement: Any, shape: Sequence[int]) -> None:
    """Raise DmirError for what is no finite displacement field, numbers (3, D, H, W) on the grid of the fixed image."""
    import numpy as np

    expected = f"expected an array of numbers (3, {', '.join(map(str, shape))}), voxels of the fixed grid"
    if not isinstance(displacement, np.ndarray):
        raise DmirError(f"the method returned {type(displacement).__name__}; {expected}")
    if displacement.shape != (3, *shape):
        raise DmirError(f"the field has the shape {displacement.shape}; {expected}")
    if displacement.dtype.kind != "f":
        raise DmirError(f"the field is of {displacement.dtype}; {expected}, float32")
    bad = int(displacement.size - np.isfinite(displacement).sum())
    if bad:
        raise DmirError(f"the field has {bad} values that are NaN or infinite")


def _checksum(*images: Volume) -> int:
    import numpy as np

    return hash(tuple(zlib.crc32(np.ascontiguousarray(image.data).tobytes()) for image in images))


@contextlib.contextmanager
def _faults_told(foreign: bool) -> Iterator[None]:
    """Make whatever somebody else's method raises the reason of a failed pair, in one line after its traceback."""
    try:
        yield
    except DmirError:
        raise
    except Exception as error:
        if not foreign:
            raise
        traceback.print_exc()
        raise DmirError(f"{type(error).__name__}: {' '.join(str(error).split())}") from error


@contextlib.contextmanager
def _whatever_the_method() -> Iterator[None]:
    """Mark what fails in here as no failure of the method."""
    try:
        yield
    except (DmirError, OSError) as error:
        raise Unable(str(error)) from error


def _end_with(parent: int) -> None:
    """Let the kernel kill this process when the job that started it ends: a method may hear no other call."""
    end_with_parent()
    if sys.platform == "linux" and os.getppid() != parent:  # it has ended already
        os._exit(UNABLE)


def main(arguments: Sequence[str]) -> int:
    """Answer a request, and more if there are any; the last line of what is printed is the reason of a failure."""
    from dmir.training.devices import reset_peak_memory

    path = Path(arguments[0])
    request = json.loads(path.read_text())
    _end_with(request["parent"])
    asked, answers = request.get("more") or (-1, -1)
    for pipe in (asked, answers):
        if pipe >= 0:
            os.set_inheritable(pipe, False)
    while True:
        status = _attempt(request)
        # what a pair needs at most could not be told of a second one
        if status or answers < 0 or not reset_peak_memory():
            return status
        os.write(answers, b"\n")
        if not os.read(asked, 1):
            return 0
        request = json.loads(path.read_text())


def _attempt(request: Mapping[str, Any]) -> int:
    """Answer a request and return the status with which the process is to end, 0 for an answer."""
    try:
        answer = _answer(request)
        Path(request["answer"]).write_text(json.dumps(answer))
    except (DmirError, OSError, MemoryError) as error:
        print(" ".join(str(error).split()) or "out of memory", file=sys.stderr)
        return 1 if isinstance(error, DmirError) and not isinstance(error, Unable | StorageError) else UNABLE
    finally:
        sys.stdout.flush()
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
