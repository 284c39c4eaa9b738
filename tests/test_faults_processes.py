"""Processes that are killed, and runs that meet: nothing is lost, the same command goes on, the tables are the same."""

import json
import os
import re
import signal
import socket
import time
from pathlib import Path

import pytest
from workflow_runs import TARGETS, copy_up_to, final_tables, processes_in, snakemake, start, wait_for

pytestmark = [
    pytest.mark.faults,
    pytest.mark.skipif(not Path("/proc/self").is_dir(), reason="finds processes in /proc, which only Linux has"),
]


def process_of(folder, words):
    """Return the process whose command line has certain words, if there is one."""
    return next((number for number, command in processes_in(folder).items() if re.search(words, command)), None)


def find(words, folder, run, log):
    """Wait for a process of a run and return it."""
    wait_for(lambda: process_of(folder, words), run, log)
    return process_of(folder, words)


def training_has_kept_its_state(folder):
    return lambda: list((folder / "results/models/simulated/.resume").glob("*/last.ckpt"))


def wait_until_none_is_left(folder, seconds=60):
    end = time.monotonic() + seconds
    while left := processes_in(folder):
        assert time.monotonic() < end, left
        time.sleep(0.1)


@pytest.mark.parametrize("moment", ["training", "syn"])
def test_kill_9_of_snakemake_ends_its_jobs_and_the_same_command_goes_on(moment, undisturbed, tmp_path):
    folder, log = copy_up_to("models", undisturbed, tmp_path / "run"), tmp_path / "killed.log"
    run = start(folder, log, *TARGETS)
    if moment == "training":
        wait_for(training_has_kept_its_state(folder), run, log)
    else:
        find(r"dmir\.methods\.isolated", folder, run, log)
    os.kill(run.pid, signal.SIGKILL)  # it alone: its jobs are not told
    run.wait()
    wait_until_none_is_left(folder)
    text = snakemake(folder, *TARGETS)
    assert re.search(rf"a run, process {run.pid} on .* was killed; the folder is unlocked", text)
    assert final_tables(folder) == final_tables(undisturbed)
    if moment == "training":
        trained = (folder / "results/logs/train/simulated/voxelmorph/seed1.log").read_text()
        assert re.search(r"go(es|ing)? on|resum", trained, re.IGNORECASE)


def test_kill_9_of_a_training_fails_that_job_alone_and_it_goes_on_from_its_last_state(undisturbed, tmp_path):
    folder, log = copy_up_to("models", undisturbed, tmp_path / "run"), tmp_path / "killed.log"
    run = start(folder, log, *TARGETS)
    wait_for(training_has_kept_its_state(folder), run, log)
    os.kill(process_of(folder, r"tmp\w+\.train\.py|scripts/.*train\.py"), signal.SIGKILL)
    assert run.wait(timeout=400) != 0
    assert (folder / "results/scores/simulated/syn/none").is_dir(), "the other methods did not go on"
    assert not (folder / "results/models/simulated/voxelmorph/seed1/model.safetensors").exists()
    snakemake(folder, *TARGETS)
    trained = (folder / "results/logs/train/simulated/voxelmorph/seed1.log").read_text()
    assert re.search(r"go(es|ing)? on|resum", trained, re.IGNORECASE)
    assert final_tables(folder) == final_tables(undisturbed)


def test_kill_9_of_a_syn_is_no_failed_pair(undisturbed, tmp_path):
    folder, log = copy_up_to("registered", undisturbed, tmp_path / "run"), tmp_path / "killed.log"
    run = start(folder, log, *TARGETS)
    while True:  # until it is SyN's process, and not that of the affine method
        process = find(r"dmir\.methods\.isolated", folder, run, log)
        if '"syn"' in request_of(process):
            break
    os.kill(process, signal.SIGKILL)
    assert run.wait(timeout=400) != 0
    assert re.search(r"Error: syn, .*: the process that registered this pair was killed by SIGKILL", log.read_text())
    assert not list((folder / "results/registered/simulated/syn").rglob("*.csv"))
    snakemake(folder, *TARGETS)
    assert final_tables(folder) == final_tables(undisturbed)


def request_of(process):
    """Return what a pair's process was asked; nothing if it has ended."""
    try:
        path = Path(f"/proc/{process}/cmdline").read_text().split("\0")[-2]
        return Path(path).read_text()
    except OSError:
        return ""


def test_a_second_snakemake_in_the_folder_is_refused_and_the_first_goes_on(undisturbed, tmp_path):
    folder, log = copy_up_to("registered", undisturbed, tmp_path / "run"), tmp_path / "first.log"
    first = start(folder, log, *TARGETS)
    wait_for(lambda: list((folder / ".snakemake" / "locks").glob("*.lock")), first, log)
    second = snakemake(folder, *TARGETS, succeeds=False)
    assert f"at work in this folder is a run, process {first.pid} on {socket.gethostname()} (snakemake " in second
    assert "Directory cannot be locked" in second
    assert first.wait(timeout=400) == 0, log.read_text()[-4000:]
    assert final_tables(folder) == final_tables(undisturbed)


def leave_a_lock(folder, **changes):
    """Leave what a run leaves that was killed before it had finished the tables."""
    snakemake_folder = folder / ".snakemake"
    (snakemake_folder / "locks").mkdir(exist_ok=True)
    (snakemake_folder / "locks" / "0.output.lock").write_text("\n".join(TARGETS))
    (snakemake_folder / "runs").mkdir(exist_ok=True)
    record = {"host": socket.gethostname(), "process": 4, "batch_job": "", "command": "snakemake", "jobs": "none yet"}
    (snakemake_folder / "runs" / "a-4.run").write_text(json.dumps(record | changes))


def test_a_stale_lock_is_freed_by_the_same_command(undisturbed, tmp_path):
    folder = copy_up_to("tables", undisturbed, tmp_path / "run")
    leave_a_lock(folder)
    assert "was killed; the folder is unlocked" in snakemake(folder, *TARGETS)
    assert final_tables(folder) == final_tables(undisturbed)
    assert not list((folder / ".snakemake" / "runs").glob("*.run"))


@pytest.mark.parametrize(
    ("changes", "told"),
    [({"host": "another"}, "process 4 on another"), ({"jobs": "elsewhere"}, "may still be in the cluster's queue")],
    ids=["another machine", "jobs in a queue"],
)
def test_a_lock_that_may_be_alive_is_left_until_unlock(changes, told, undisturbed, tmp_path):
    folder = copy_up_to("tables", undisturbed, tmp_path / "run")
    leave_a_lock(folder, **changes)
    text = snakemake(folder, *TARGETS, succeeds=False)
    assert told in text
    assert "--unlock" in text
    snakemake(folder, "--unlock")
    snakemake(folder, *TARGETS)
    assert final_tables(folder) == final_tables(undisturbed)
