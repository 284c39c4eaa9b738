"""Which runs of a pipeline are alive in a folder: no job outlives its run, no lock outlives both.

Snakemake locks the folder in which it works, and a run that is killed (``kill -9``, a power cut) cannot take its lock
away. Worse, its jobs go on: a second run beside them would write the same files. So each run keeps two files in
``.snakemake/runs/``, and the kernel's locks on them tell who lives, however a process ended:

- ``<host>-<process>.run``, locked by the run alone. A thread of each job waits for that lock. When it gets it, the run
  has ended, and the job ends itself.
- ``<host>-<process>.jobs``, shared by all jobs. When nobody holds it, no job is left.

A run that starts looks at those before it. Where all are dead, began their jobs on this machine, and these have ended
too, what they left locked is freed. What is alive, of another machine, or has jobs in a cluster's queue is left alone.
"""

from __future__ import annotations

import contextlib
import fcntl
import json
import os
import socket
import sys
import threading
import time
from collections.abc import Iterator
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import NoReturn

VARIABLE = "DMIR_RUN"  # how a job finds its run: its file, machine and batch job, as JSON
BATCH_JOB_VARIABLES = ("SLURM_JOB_ID", "SLURM_JOBID", "PBS_JOBID", "LSB_JOBID", "FLUX_JOB_ID", "OAR_JOB_ID", "JOB_ID")
# seconds until the jobs of a killed run have ended: they do so at once, unless they hold the interpreter
PATIENCE = 120.0
NO_JOBS, ON_THIS_MACHINE, ELSEWHERE = "none yet", "this machine", "elsewhere"
_held: list[int] = []  # descriptors of locked files, held until the process ends
_own: dict[str, int] = {}  # the file of this process's run -> its descriptor


@dataclass(frozen=True)
class Run:
    """What a run says of itself.

    Attributes
    ----------
    host, process
        Where it is, and its number there.
    batch_job
        Of the cluster, in which the run itself is; empty outside of any.
    command
        As the user gave it.
    jobs
        ``"none yet"``, ``"this machine"`` or ``"elsewhere"``: where its jobs are.
    """

    host: str
    process: int
    batch_job: str
    command: str
    jobs: str = NO_JOBS


def begin_run(folder: str | Path, command: str = "") -> list[str]:
    """Register this process as a run in a folder, after what dead ones left locked there has been freed.

    Parameters
    ----------
    folder
        Snakemake's own: ``.snakemake`` of the folder where it works.
    command
        For those who meet this run.

    Returns
    -------
    list of str
        What the user is to know, a line each.
    """
    runs = Path(folder, "runs")
    try:
        runs.mkdir(parents=True, exist_ok=True)
        with _gate(runs):
            told = _free(Path(folder), runs)
            _register(runs, command)
    except OSError as error:  # a folder that cannot be written to, a file system without locks: as without this module
        return [f"{runs}: {error.strerror or error}: a lock that a killed run leaves must be removed by hand"]
    return told


def tell_where_jobs_are(on_this_machine: bool) -> None:
    """Write into this run's file where its jobs will be; call it before the first of them starts."""
    for name, descriptor in _own.items():
        record = _read(Path(name))
        if record is not None:
            _write(descriptor, replace(record, jobs=ON_THIS_MACHINE if on_this_machine else ELSEWHERE))


def end_run() -> None:
    """Take this run's files away; a run that is killed leaves them to the next one."""
    for name, descriptor in _own.items():
        for path in (Path(name), _jobs_of(Path(name))):
            path.unlink(missing_ok=True)
        os.close(descriptor)
        os.environ.pop(VARIABLE, None)
    _own.clear()


def join_run() -> None:
    """Make this process, a job, end as soon as its run has ended.

    Nothing happens in a process that no run of this machine has started: on a cluster jobs outlive what submitted them.
    """
    started_by = os.environ.get(VARIABLE)
    if not started_by or _own:
        return
    name, *place = json.loads(started_by)
    if place != [socket.gethostname(), _batch_job()]:
        return
    try:
        jobs = os.open(_jobs_of(Path(name)), os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o644)
        fcntl.flock(jobs, fcntl.LOCK_SH)
        _held.append(jobs)
        watched = os.open(name, os.O_RDWR | os.O_CLOEXEC)
    except FileNotFoundError:  # it was killed before this job could look, and another has tidied up after it
        _end()
    except OSError:
        return
    threading.Thread(target=_end_with, args=(watched,), daemon=True).start()


def _end_with(descriptor: int) -> None:
    """Wait until a run has ended, however it did, and end this process."""
    fcntl.flock(descriptor, fcntl.LOCK_SH)  # the kernel gives it when the run is dead
    _end()


def _end() -> NoReturn:
    with contextlib.suppress(OSError):
        os.write(2, b"The run that started this job has ended: so does the job.\n")
    os._exit(1)


def _free(folder: Path, runs: Path) -> list[str]:
    """Free what dead runs left locked, if nothing is alive; return what there is to say."""
    locks = folder / "locks"
    found = {path: record for path in sorted(runs.glob("*.run")) if (record := _read(path)) is not None}
    dead = [path for path, record in found.items() if _is_here(record) and _has_ended(path)]
    others = [record for path, record in found.items() if path not in dead]
    if not locks.is_dir() or not any(locks.iterdir()):
        for path in dead:
            _forget(path)
        return []
    if others:
        return [f"Note: at work in this folder is {_name(record)}." for record in others]
    submitted = [record for path, record in found.items() if path in dead and record.jobs == ELSEWHERE]
    if submitted:
        return [
            f"Note: {_name(record)} was killed, and its jobs may still be in the cluster's queue. Look there (squeue"
            " --me), cancel what is left, then `snakemake --unlock`."
            for record in submitted
        ]
    if not all(_jobs_have_ended(path) for path in dead):
        return [f"Note: jobs of {_name(found[path])}, which was killed, still go on." for path in dead]
    if dead:
        for path in locks.iterdir():
            path.unlink()
    for path in dead:
        _forget(path)
    return [f"Note: {_name(found[path])} was killed; the folder is unlocked, and its work goes on." for path in dead]


def _jobs_have_ended(run: Path) -> bool:
    """Tell whether no job of a dead run is left; those that are about to end are waited for."""
    path = _jobs_of(run)
    end, told = time.monotonic() + PATIENCE, False
    while not _can_lock(path, fcntl.LOCK_EX):
        if time.monotonic() > end:
            return False
        if not told:
            print("Jobs of a run that was killed are ending ...", file=sys.stderr, flush=True)
            told = True
        time.sleep(0.2)
    return True


def _register(runs: Path, command: str) -> None:
    """Write and lock this run's file, under its name only once it is locked."""
    record = Run(socket.gethostname(), os.getpid(), _batch_job(), command)
    path = runs.absolute() / f"{record.host}-{record.process}.run"
    draft = path.with_suffix(".new")
    descriptor = os.open(draft, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o644)
    fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
    _write(descriptor, record)
    draft.rename(path)
    _own[str(path)] = descriptor
    os.environ[VARIABLE] = json.dumps([str(path), record.host, record.batch_job])


def _write(descriptor: int, record: Run) -> None:
    text = json.dumps(asdict(record)).encode()
    os.ftruncate(descriptor, 0)
    os.pwrite(descriptor, text, 0)


def _read(path: Path) -> Run | None:
    """Return what a run says of itself; None where that cannot be read."""
    try:
        return Run(**json.loads(path.read_text(encoding="utf-8")))
    except (OSError, ValueError, TypeError):
        return None


def _batch_job() -> str:
    return next((os.environ[name] for name in BATCH_JOB_VARIABLES if name in os.environ), "")


def _is_here(record: Run) -> bool:
    return record.host == socket.gethostname()


def _has_ended(run: Path) -> bool:
    """Tell whether nobody holds a run's own lock; jobs share it in the moment in which they end."""
    return _can_lock(run, fcntl.LOCK_SH)


def _can_lock(path: Path, kind: int) -> bool:
    """Tell whether a file can be locked, or is not there at all."""
    try:
        descriptor = os.open(path, os.O_RDWR | os.O_CLOEXEC)
    except FileNotFoundError:
        return True
    try:
        fcntl.flock(descriptor, kind | fcntl.LOCK_NB)
    except BlockingIOError:
        return False
    finally:
        os.close(descriptor)
    return True


def _forget(run: Path) -> None:
    for path in (run, _jobs_of(run)):
        path.unlink(missing_ok=True)


def _jobs_of(run: Path) -> Path:
    return run.with_suffix(".jobs")


def _name(record: Run) -> str:
    command = f" ({record.command})" if record.command else ""
    return f"a run, process {record.process} on {record.host}{command}"


@contextlib.contextmanager
def _gate(runs: Path) -> Iterator[None]:
    """Let one run at a time look at the others and register: none frees what another has just locked."""
    descriptor = os.open(runs / "gate", os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o644)
    try:
        fcntl.flock(descriptor, fcntl.LOCK_EX)
        yield
    finally:
        os.close(descriptor)
