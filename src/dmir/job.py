"""One job of a pipeline: where its words go, how many threads it may use, how its failure is told."""

from __future__ import annotations

import contextlib
import os
import sys
import traceback
from collections.abc import Iterator
from pathlib import Path

from dmir.errors import DmirError

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

    A :class:`DmirError` is one message without a traceback; anything else is a defect and keeps its traceback.
    Either ends the process with status 1.
    """
    limit_threads(threads)
    path = Path(log)
    path.parent.mkdir(parents=True, exist_ok=True)
    sys.stdout.flush()
    sys.stderr.flush()
    with path.open("wb", buffering=0) as file:
        os.dup2(file.fileno(), 1)
        os.dup2(file.fileno(), 2)
    try:
        yield
    except DmirError as error:
        print(f"Error: {error}", file=sys.stderr)
        _leave()
    except Exception:
        traceback.print_exc()
        _leave()
    sys.stdout.flush()
    sys.stderr.flush()


def _leave() -> None:
    sys.stdout.flush()
    sys.stderr.flush()
    raise SystemExit(1)
