"""Which runs are alive in a folder: locks of dead ones are freed, those of others are left, jobs end with their run."""

import json
import os
import signal
import socket
import subprocess
import sys
import time
from pathlib import Path

import pytest

from dmir import runs

SOURCE = str(Path(runs.__file__).parents[1])
RUN = """
import subprocess, sys, time
from dmir.runs import begin_run, tell_where_jobs_are
begin_run(sys.argv[1], "snakemake --cores 8")
tell_where_jobs_are("{place}" == "here")
job = subprocess.Popen([sys.executable, "-c", sys.argv[2]])
print("begun", job.pid, flush=True)
time.sleep(60)
"""
JOB = "import time; from dmir.runs import join_run; join_run(); print('joined', flush=True); time.sleep(60)"


def begin(folder, job=JOB, place="here", **variables):
    """Start a run with one job; return its process and the job's number."""
    environment = {**os.environ, "PYTHONPATH": SOURCE, **variables}
    process = subprocess.Popen(
        [sys.executable, "-c", RUN.format(place=place), str(folder), job],
        stdout=subprocess.PIPE,
        text=True,
        env=environment,
    )
    said = sorted(process.stdout.readline() for _ in range(2 if "joined" in job else 1))
    assert said[1:] in ([], ["joined\n"])
    return process, int(said[0].removeprefix("begun"))


def lock(folder):
    (folder / "locks").mkdir(parents=True, exist_ok=True)
    (folder / "locks" / "0.output.lock").write_text("a")
    return folder / "locks" / "0.output.lock"


def kill(process):
    process.kill()
    process.wait()


def is_alive(process):
    try:
        return "Z" not in Path(f"/proc/{process}/stat").read_text().rsplit(")")[1].split()[0]
    except OSError:
        return False


def wait_until_ended(process, seconds=20):
    end = time.monotonic() + seconds
    while is_alive(process):
        assert time.monotonic() < end, "the job goes on"
        time.sleep(0.05)


@pytest.fixture
def started():
    """Collect processes; what is left of them at the end is killed."""
    numbers = []
    yield numbers
    for number in numbers:
        if is_alive(number):
            os.kill(number, signal.SIGKILL)


@pytest.fixture(autouse=True)
def no_run_of_this_process(monkeypatch):
    monkeypatch.delenv(runs.VARIABLE, raising=False)
    yield
    runs.end_run()


def test_a_job_ends_when_its_run_is_killed(tmp_path, started):
    process, job = begin(tmp_path)
    started.append(job)
    assert is_alive(job)
    kill(process)
    wait_until_ended(job)


def test_a_dead_runs_lock_is_freed_and_said(tmp_path, started):
    process, job = begin(tmp_path)
    started.append(job)
    held = lock(tmp_path)
    kill(process)
    told = runs.begin_run(tmp_path)
    assert told == [
        f"Note: a run, process {process.pid} on {socket.gethostname()} (snakemake --cores 8) was killed; the folder is"
        " unlocked, and its work goes on."
    ]
    assert not held.exists()
    assert [path.suffix for path in (tmp_path / "runs").glob("*.*")] == [".run"]  # its own
    assert not is_alive(job)  # it was waited for


def test_a_living_runs_lock_is_left_and_said(tmp_path, started):
    process, job = begin(tmp_path)
    started += [job, process.pid]
    held = lock(tmp_path)
    assert runs.begin_run(tmp_path)[0].startswith(f"Note: at work in this folder is a run, process {process.pid} on ")
    assert held.exists()
    kill(process)


def test_of_a_dead_and_a_living_run_nothing_is_freed(tmp_path, started):
    dead, job = begin(tmp_path)
    alive, another = begin(tmp_path)
    started += [job, another, alive.pid]
    held = lock(tmp_path)
    kill(dead)
    assert f"process {alive.pid} " in runs.begin_run(tmp_path)[0]
    assert held.exists()
    kill(alive)


def test_a_lock_of_another_machine_is_left(tmp_path):
    held = lock(tmp_path)
    (tmp_path / "runs").mkdir()
    record = {"host": "another", "process": 1, "batch_job": "", "command": "", "jobs": "this machine"}
    (tmp_path / "runs" / "another-1.run").write_text(json.dumps(record))
    assert runs.begin_run(tmp_path) == ["Note: at work in this folder is a run, process 1 on another."]
    assert held.exists()


def test_jobs_in_a_clusters_queue_outlive_their_run_and_its_lock_is_left(tmp_path, started):
    process, job = begin(tmp_path, place="elsewhere")
    started.append(job)
    held = lock(tmp_path)
    kill(process)
    assert "`snakemake --unlock`" in runs.begin_run(tmp_path)[0]
    assert held.exists()


def test_a_job_in_another_batch_job_than_its_run_is_not_ended(tmp_path, started):
    submitted = f"import os; os.environ['SLURM_JOB_ID'] = '17'; {JOB}"
    process, job = begin(tmp_path, submitted)
    started.append(job)
    kill(process)
    time.sleep(1)
    assert is_alive(job)


def test_a_job_that_starts_after_its_run_was_killed_ends_at_once(tmp_path):
    process, _ = begin(tmp_path, "pass")
    place = json.dumps([str(tmp_path / "runs" / f"{socket.gethostname()}-{process.pid}.run"), socket.gethostname(), ""])
    kill(process)
    for gone in (False, True):  # and after another run has tidied up
        if gone:
            runs.begin_run(tmp_path)
        environment = {**os.environ, "PYTHONPATH": SOURCE, runs.VARIABLE: place}
        done = subprocess.run([sys.executable, "-c", JOB], env=environment, timeout=30, capture_output=True, text=True)
        assert done.returncode == 1
        assert "The run that started this job has ended" in done.stderr


def test_an_ended_run_leaves_nothing(tmp_path):
    assert runs.begin_run(tmp_path) == []
    assert list((tmp_path / "runs").glob("*.run"))
    runs.end_run()
    assert [path.name for path in (tmp_path / "runs").iterdir()] == ["gate"]


def test_a_lock_that_nobody_is_known_to_have_left_is_left(tmp_path):
    held = lock(tmp_path)
    assert runs.begin_run(tmp_path) == []
    assert held.exists()


def test_a_folder_that_cannot_be_written_to_is_no_failure(tmp_path):
    (tmp_path / "file").write_text("")
    told = runs.begin_run(tmp_path / "file")
    assert len(told) == 1
    assert "must be removed by hand" in told[0]
