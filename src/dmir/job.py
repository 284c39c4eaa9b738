"""One job of a pipeline: where its words go, how many threads it may use, how its failure is told."""

from __future__ import annotations

import contextlib
import os
import sys
import threading
import traceback
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import NoReturn

from dmir.doubts import told_doubts
from dmir.errors import DmirError, StorageError, made_below
from dmir.runs import join_run
from dmir.storage import storage_error

THREAD_VARIABLES = (
    "OMP_NUM_THREADS",
    "OPENBLAS_NUM_THREADS",
    "MKL_NUM_THREADS",
    "NUMEXPR_NUM_THREADS",
    "ITK_GLOBAL_DEFAULT_NUMBER_OF_THREADS",
)


def limit_threads(threads: int) -> None:
    """Hold every numerical library to a number of threads; call it before the first of them is imported.

    ITK reads its variable once, at its first threaded filter; Snakemake does not set it.
    """
    for variable in THREAD_VARIABLES:
        os.environ[variable] = str(threads)


@contextlib.contextmanager
def job(log: str | Path, threads: int = 1) -> Iterator[None]:
    """Run a job with all its output in a log, C++ libraries' included, and its errors told as a user needs them.

    A :class:`DmirError` is one message without a traceback, and so is a disk that is full, read-only or broken;
    anything else is a defect and keeps its traceback. Either ends the process with status 1. What cannot be written
    into the log, because it lies on the same disk, goes where the output went before.
    """
    limit_threads(threads)
    join_run()
    path = Path(log)
    made_below(_results_of(path))
    outside = os.dup(2)
    try:
        _redirect(path)
        threading.excepthook = _tell_thread
        with told_doubts():
            yield
        sys.stdout.flush()
    except DmirError as error:
        _leave(f"Error: {error}", outside)
    except Exception as error:
        told = storage_error(error, path)
        _leave(traceback.format_exc().rstrip() if told is None else f"Error: {told}", outside)
    finally:
        os.close(outside)


def do_each(work: Mapping[str, Callable[[], object]]) -> None:
    """Do several things one after the other; a user's mistake in one of them does not keep the others from being tried.

    Parameters
    ----------
    work
        Name -> what is to be done. The name stands in the output before whatever is said meanwhile.

    Raises
    ------
    DmirError
        What failed, each by its name. A full disk, or a defect, ends everything at once.
    """
    failed = []
    for name, one in work.items():
        print(name, flush=True)
        try:
            one()
        except StorageError:
            raise
        except DmirError as error:
            failed.append(f"{name}: {error}")
    if failed:
        raise DmirError("\nError: ".join(failed))


def _results_of(log: Path) -> Path | None:
    """Return the folder of the results that a log belongs to: ``<results>/logs/<rule>/...``."""
    return next((folder.parent for folder in log.parents if folder.name == "logs"), None)


def _redirect(log: Path) -> None:
    log.parent.mkdir(parents=True, exist_ok=True)
    sys.stdout.flush()
    sys.stderr.flush()
    with log.open("wb", buffering=0) as file:
        os.dup2(file.fileno(), 1)
        os.dup2(file.fileno(), 2)


def _tell_thread(failed: threading.ExceptHookArgs) -> None:
    """Tell of a thread that a full disk has ended in one line; who waits for it hears of it too."""
    told = None if failed.exc_value is None else storage_error(failed.exc_value, "a file")
    if told is None:
        threading.__excepthook__(failed)
    else:
        with contextlib.suppress(OSError):
            print(f"Warning: {told.where}: {told.reason}", file=sys.stderr, flush=True)


def _leave(message: str, outside: int) -> NoReturn:
    """End the process with a message: in the log, or outside it where the log cannot hold it."""
    text = f"{message}\n".encode(errors="replace")
    try:
        sys.stdout.flush()
        sys.stderr.flush()
        whole = os.write(2, text) == len(text)
    except OSError:
        whole = False
    if not whole:
        os.write(outside, text)
        for descriptor in (1, 2):  # what is still to be flushed must not fail once more
            os.dup2(outside, descriptor)
    raise SystemExit(1)
