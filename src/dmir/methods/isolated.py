"""One pair in a process of its own: a method's crash, time-out or exception is one failed pair, never more.

The classical methods are C++ that can end its process without a Python exception, that reads its number of threads
from the environment once, and whose memory only the process itself can tell. So each pair gets a fresh one:
``python -m dmir.methods.isolated request.json``.

A failed pair is a result, and stands in the tables. What is not the method's fault is none: a process that somebody
killed (or the kernel, for want of memory), images that cannot be read, a full disk. Then the whole job fails, and is
done again by the next run.
"""

from __future__ import annotations

import contextlib
import ctypes
import json
import logging
import math
import os
import resource
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import TYPE_CHECKING, Any

from dmir.errors import DmirError, StorageError
from dmir.job import THREAD_VARIABLES
from dmir.methods.records import COLUMNS, MEASURED

if TYPE_CHECKING:
    import pandas as pd

log = logging.getLogger(__name__)

MODULE = "dmir.methods.isolated"
MIB = 2**20
UNABLE = 3  # the status of a process that could not do what it was asked, whatever the method
KILLED = (signal.SIGKILL, signal.SIGTERM, signal.SIGINT, signal.SIGHUP, signal.SIGQUIT)  # signals that others send
PR_SET_PDEATHSIG = 1


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

    Returns
    -------
    dict
        ``status`` ("ok" or "failed"), ``reason`` ("" or one line), ``seconds`` (the registration alone),
        ``read_seconds``, ``write_seconds``, ``peak_memory_mb`` (of that process, MiB), ``device`` ("cpu"), ``threads``.
        What was not reached is NaN.

    Raises
    ------
    DmirError
        It was not the method that failed: the process was killed, the images cannot be read, the disk is full.
    """
    parameters = dict(parameters or {})
    threads = int(parameters.get("threads", threads))
    field_path = Path(field_path)
    field_path.unlink(missing_ok=True)
    record: dict[str, Any] = {"status": "ok", "reason": "", **dict.fromkeys(MEASURED, math.nan)}
    record |= {"device": "cpu", "threads": threads}
    with tempfile.TemporaryDirectory(prefix="pair-") as name:
        folder = Path(name)
        request = {
            "moving": str(Path(moving_path).absolute()),
            "fixed": str(Path(fixed_path).absolute()),
            "field": str(field_path.absolute()),
            "method": method,
            "parameters": parameters,
            "answer": str(folder / "answer.json"),
            "parent": os.getpid(),
        }
        (folder / "request.json").write_text(json.dumps(request, default=str))
        pair = f"{method}, {moving_path} to {fixed_path}"
        reason = _run(folder, _environment(threads, parameters, folder), timeout, pair)
        answer = folder / "answer.json"
        if not reason and not answer.is_file():
            reason = "the process ended without an answer"
        record |= json.loads(answer.read_text()) if not reason else {"status": "failed", "reason": reason}
    if record["status"] == "failed":
        field_path.unlink(missing_ok=True)
    return record


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
    """Register pairs of files, each in a process of its own; the fields are ``<folder>/<moving>__<fixed>.nii``.

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

    def one(pair: tuple[str, str | Path, str, str | Path]) -> dict[str, Any]:
        moving, moving_path, fixed, fixed_path = pair
        field_path = pair_field(folder, moving, fixed)
        record = register_isolated(moving_path, fixed_path, field_path, method, parameters, threads, timeout)
        return {"cohort": cohort, "method": method, "model": model, "moving": moving, "fixed": fixed} | record

    records = []
    with ThreadPoolExecutor(max_workers=workers) as pool:
        for number, record in enumerate(pool.map(one, pairs), start=1):
            told = f"{record['seconds']:.1f} s" if record["status"] == "ok" else f"failed: {record['reason']}"
            log.info("%d/%d %s to %s: %s", number, len(pairs), record["moving"], record["fixed"], told)
            records.append(record)
    return pd.DataFrame(records, columns=list(COLUMNS))


def _environment(threads: int, parameters: Mapping[str, Any], folder: Path) -> dict[str, str]:
    """Return the environment of the process: threads and seed before anything is imported."""
    environment = os.environ | dict.fromkeys(THREAD_VARIABLES, str(threads))
    environment["ANTS_RANDOM_SEED"] = str(parameters.get("seed", 1))
    environment["TMPDIR"] = str(folder)  # what a killed process leaves goes with this folder
    source = str(Path(__file__).parents[2])  # this very library, installed or not
    environment["PYTHONPATH"] = os.pathsep.join(filter(None, [source, os.environ.get("PYTHONPATH")]))
    return environment


def _command(request: Path) -> list[str]:
    return [sys.executable, "-m", MODULE, str(request)]


def _run(folder: Path, environment: Mapping[str, str], timeout: float | None, pair: str) -> str:
    """Run the process and return why the method failed, or an empty text; DmirError where it was not the method."""
    output = folder / "output.txt"
    with output.open("wb") as file:
        try:
            done = subprocess.run(
                _command(folder / "request.json"),
                env=dict(environment),
                stdin=subprocess.DEVNULL,
                stdout=file,
                stderr=subprocess.STDOUT,
                timeout=timeout,
                check=False,
            )
        except subprocess.TimeoutExpired:
            return f"stopped after {timeout:g} s"
    if done.returncode == 0:
        return ""
    if done.returncode < 0:
        number = -done.returncode
        name = next((s.name for s in signal.Signals if s == number), f"signal {number}")
        if number in KILLED:
            raise DmirError(
                f"{pair}: the process that registered this pair was killed by {name}: by the system, for want of"
                " memory, or by somebody. Nothing is recorded; the same command registers these pairs again."
            )
        return f"killed by {name}"
    if done.returncode == UNABLE:
        raise DmirError(f"{pair}: {_last_line(output) or 'nothing could be told: is the temporary folder full?'}")
    return _last_line(output) or f"ended with status {done.returncode}"


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
    import numpy as np

    from dmir.fields import save_field
    from dmir.methods import load_libraries, register
    from dmir.volumes import read_image

    with _whatever_the_method():
        load_libraries(request["method"])  # seconds that are no part of the registration
        start = time.perf_counter()
        moving, fixed = read_image(request["moving"], "moving"), read_image(request["fixed"], "fixed")
        read = time.perf_counter()
    displacement = register(moving, fixed, request["method"], **request["parameters"])
    registered = time.perf_counter()
    bad = int(displacement.size - np.isfinite(displacement).sum())
    if bad:
        raise DmirError(f"the field has {bad} values that are NaN or infinite")
    with _whatever_the_method():
        before = time.perf_counter()
        save_field(request["field"], displacement, fixed.affine)
        written = time.perf_counter()
    return {
        "seconds": registered - read,
        "read_seconds": read - start,
        "write_seconds": written - before,
        "peak_memory_mb": peak_memory_mb(),
    }


@contextlib.contextmanager
def _whatever_the_method() -> Iterator[None]:
    """Mark what fails in here as no failure of the method."""
    try:
        yield
    except (DmirError, OSError) as error:
        raise Unable(str(error)) from error


def _end_with(parent: int) -> None:
    """Let the kernel kill this process when the job that started it ends: a method may hear no other call."""
    if sys.platform == "linux":
        ctypes.CDLL(None).prctl(PR_SET_PDEATHSIG, signal.SIGKILL)
        if os.getppid() != parent:  # it has ended already
            os._exit(UNABLE)


def main(arguments: Sequence[str]) -> int:
    """Answer one request; the last line of what is printed is the reason of a failure."""
    request = json.loads(Path(arguments[0]).read_text())
    _end_with(request["parent"])
    try:
        answer = _answer(request)
        Path(request["answer"]).write_text(json.dumps(answer))
    except (DmirError, OSError, MemoryError) as error:
        print(" ".join(str(error).split()) or "out of memory", file=sys.stderr)
        return 1 if isinstance(error, DmirError) and not isinstance(error, Unable | StorageError) else UNABLE
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
