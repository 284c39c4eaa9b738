"""The pipeline on a real Slurm of one node with two counted GPUs: partitions, cards, retries, resuming, report."""

import contextlib
import importlib.util
import itertools
import shutil
import signal
import subprocess
import sys
import tempfile
from collections import Counter
from pathlib import Path

import pandas as pd
import pytest
from slurm_cluster import slurm_cluster, why_not
from workflow_runs import checkout, start_in_session, wait_for, write_config

ON_GPUS = {"train", "register_network", "register_descent"}
BATCHES = ("reference", "train000", "val000", "test000")
BEFORE_TRAINING = {
    *(f"{kind}_scans_simulated_{batch}" for kind in ("make", "preprocess") for batch in BATCHES),
    "list_scans",
    "pack_scans",
}
TABLES = ["comparison", "statistics_simulated", "topology"]
TARGETS = [f"results/tables/{name}.csv" for name in TABLES]
# three trainings for two cards
TINY = {
    "train_on": "simulated",
    "test_on": ["simulated"],
    "methods": ["affine", "descent", "voxelmorph"],
    "seeds": [1, 2, 3],
    "pairs_per_job": 2,
    "grid": {"shape": [32, 40, 32], "spacing": 6.0},
    "cohorts": {"simulated": {"source": "simulated", "train": 1, "val": 1, "test": 2}},
    "training": {"steps": 4, "validate_every": 2, "learning_rate": 1e-3, "window": 5},
    "settings": {"voxelmorph": {"network": {"encoder": [4, 8, 8, 8], "decoder": [8, 8, 8, 8, 8, 4, 4]}}},
}
# two trainings that want both cards each; they compute on the CPU, in one process
WIDE = {**TINY, "seeds": [4, 5], "training": {**TINY["training"], "batch_size": 2, "gpus": 2}}
# the profile as it is, but for how often the queue is asked, and for as many threads as the local run has
PROFILE = ["--workflow-profile", "profiles/slurm", "--set-threads", "train=1", "--slurm-no-account"]
PATIENCE = ["--slurm-status-command", "squeue", "--slurm-init-seconds-before-status-checks", "2"]
SOON = [*PATIENCE, "--seconds-between-status-checks", "2", "--latency-wait", "5"]


def reason_to_skip():
    if importlib.util.find_spec("snakemake_executor_plugin_slurm") is None:
        return "snakemake-executor-plugin-slurm is not installed"
    return why_not()


pytestmark = pytest.mark.slurm
if reason := reason_to_skip():
    pytest.skip(f"no Slurm here: {reason}", allow_module_level=True)


def command(*arguments, targets=TARGETS):
    return [str(Path(sys.executable).parent / "snakemake"), *targets, *arguments]


def start(folder, cluster, log, *arguments, targets=TARGETS):
    """Start Snakemake with the profile for Slurm, in a process group of its own."""
    # were Snakemake to lease cards although Slurm has given them, it would choose among these
    variables = {"PYTHONPATH": "", "GPU_POOL": "0,1", "GPU_LEASE_DIR": str(cluster.folder / "lease")}
    words = command(*PROFILE, *SOON, *arguments, targets=targets)
    return start_in_session(words, folder, log, {**cluster.environment, **variables})


def stop(process):
    """Let a run that is still there cancel its jobs and end."""
    if process.poll() is None:
        process.send_signal(signal.SIGINT)
        try:
            process.wait(timeout=60)
        except subprocess.TimeoutExpired:
            process.kill()


@pytest.fixture(scope="module")
def local(tmp_path_factory):
    """Return the folder of a run of the same configuration without Slurm."""
    folder = checkout(tmp_path_factory.mktemp("local"), TINY)
    result = subprocess.run(
        command("--cores", "2", "--resources", "gpu=2"), cwd=folder, capture_output=True, text=True, timeout=1800
    )
    assert result.returncode == 0, (result.stdout + result.stderr)[-6000:]
    return folder


@pytest.fixture(scope="module")
def clustered(tmp_path_factory):
    """Three runs: in the first all jobs were cancelled during the trainings, in the second one ran out of time and
    the report was made, and in the third trainings had two cards each."""
    folder = checkout(tmp_path_factory.mktemp("slurm"), TINY)
    state = Path(tempfile.mkdtemp(prefix="dmir-slurm-"))
    processes = []
    try:
        with slurm_cluster(state, gpus=2, cpus=4) as cluster, contextlib.ExitStack() as runs:
            runs.callback(lambda: [stop(process) for process in processes])
            first = cancelled_run(folder, cluster, processes)
            before = {path: path.stat().st_mtime_ns for path in done_before_training(folder)}
            submitted = len(cluster.submissions())
            second = run_with_a_hung_training(folder, cluster, processes)
            narrow = len(cluster.submissions())
            third = run_with_two_cards_each(folder, cluster, processes)
            submissions = cluster.submissions()
            yield {
                "folder": folder,
                "first": first,
                "second": second,
                "third": third,
                "before": before,
                "submissions": (submissions[:submitted], submissions[submitted:narrow], submissions[narrow:]),
                "cards": cluster.cards(),
                "leases": list(state.glob("lease/*")),
                "state": cluster.state(second["hung"]),
            }
    finally:
        shutil.rmtree(state, ignore_errors=True)


def done_before_training(folder):
    return [*folder.glob("results/cohorts/**/*.nii.gz"), *folder.glob("results/preprocessed/**/*.nii.gz")]


def cancelled_run(folder, cluster, processes):
    """Run without retries until two trainings are at work, and cancel every job by Slurm's own means."""
    log = folder / "first.log"
    processes.append(start(folder, cluster, log, "--retries", "0"))
    at_work = folder / "results/logs/train/simulated/voxelmorph"
    wait_for(
        lambda: len(cluster.running("gpu")) == 2 and len(list(at_work.glob("*.log"))) >= 2,
        processes[-1],
        log,
        seconds=900,
    )
    cluster.call("scancel", "--user", "root")
    returned = processes[-1].wait(timeout=600)
    # on a machine that is busy one may have ended before the second began: all three are to be trained by the next run
    shutil.rmtree(folder / "results/models/simulated/voxelmorph", ignore_errors=True)
    return {"returned": returned, "text": log.read_text()}


def run_with_a_hung_training(folder, cluster, processes):
    """Run to the report; stop one training's processes and let its time be over."""
    log = folder / "second.log"
    already = len(cluster.submissions())
    processes.append(start(folder, cluster, log, targets=[*TARGETS, "results/report.html"]))

    def trainings():
        submitted = {one.job for one in cluster.submissions()[already:] if one.rule == "train"}
        return [job for job in cluster.running("gpu") if job in submitted]

    wait_for(trainings, processes[-1], log, seconds=900)
    hung = trainings()[0]
    cluster.call("scancel", "--full", "--signal=STOP", hung)
    cluster.call("scontrol", "update", f"JobId={hung}", "EndTime=now")
    returned = processes[-1].wait(timeout=1800)
    return {"returned": returned, "text": log.read_text(), "hung": hung}


def run_with_two_cards_each(folder, cluster, processes):
    """Train again with other seeds, each training on two cards."""
    log = folder / "third.log"
    write_config(folder, WIDE)
    processes.append(start(folder, cluster, log, targets=["train_all"]))
    returned = processes[-1].wait(timeout=900)
    return {"returned": returned, "text": log.read_text()}


def test_the_cancelled_run_fails_and_the_second_one_ends_well(clustered):
    assert clustered["first"]["returned"] != 0
    assert clustered["second"]["returned"] == 0, clustered["second"]["text"][-6000:]


def test_every_rule_is_on_its_partition_with_its_cards(clustered):
    submissions = list(itertools.chain(*clustered["submissions"][:2]))
    assert {one.rule for one in submissions} >= ON_GPUS | BEFORE_TRAINING | {"register_classical", "score_shard"}
    for one in submissions:
        assert (one.partition, one.gpus) == (("gpu", 1) if one.rule in ON_GPUS else ("cpu", 0)), one


def test_no_card_is_held_by_two_jobs_and_two_are_held_at_once(clustered):
    held = clustered["cards"]
    wide = {one.job for one in clustered["submissions"][2]}
    assert all(len(one.cards) == (2 if one.job in wide else 1) for one in held)
    assert set().union(*(one.cards for one in held)) == {"0", "1"}
    together = 0
    for one, other in itertools.combinations(held, 2):
        overlap = one.begin < other.end and other.begin < one.end
        together += overlap
        assert not (overlap and one.cards & other.cards), (one, other)
    assert together >= 1, held
    assert not clustered["leases"]  # Slurm has given the cards: no lease of one's own beside that


def test_a_training_that_asks_for_two_cards_has_both(clustered):
    assert clustered["third"]["returned"] == 0, clustered["third"]["text"][-6000:]
    submitted = clustered["submissions"][2]
    assert [(one.rule, one.partition, one.gpus) for one in submitted] == [("train", "gpu", 2)] * 2
    held = {one.job: one.cards for one in clustered["cards"]}
    assert [held[one.job] for one in submitted] == [{"0", "1"}] * 2
    for seed in WIDE["seeds"]:
        log = clustered["folder"] / f"results/logs/train/simulated/voxelmorph/seed{seed}.log"
        assert "GPU 0, 1 assigned by the batch system" in log.read_text()


def test_figures_and_the_report_are_made_in_the_same_job_as_the_tables(clustered):
    folder = clustered["folder"]
    assert "simulated" in (folder / "results/report.html").read_text()
    assert list((folder / "results/figures").glob("qualitative_simulated_*.svg"))
    submitted = {one.rule for one in clustered["submissions"][1]}
    assert not submitted & {"report_page", "pictures", "trainings", "cohort_products"}


def test_what_was_done_before_everything_was_cancelled_is_not_done_again(clustered):
    assert clustered["before"]
    assert {path: path.stat().st_mtime_ns for path in clustered["before"]} == clustered["before"]
    assert not BEFORE_TRAINING & {one.rule for one in clustered["submissions"][1]}


def test_a_training_killed_for_its_time_is_submitted_again_with_more_and_ends_well(clustered):
    hung = clustered["second"]["hung"]
    assert clustered["state"] == "TIMEOUT"
    trainings = [one for one in clustered["submissions"][1] if one.rule == "train"]
    killed = next(one for one in trainings if one.job == hung)
    first, second = (one for one in trainings if one.wildcards == killed.wildcards)
    assert first.job == hung
    assert (second.minutes, second.memory_mb) == (2 * first.minutes, 2 * first.memory_mb)
    assert sorted(Counter(one.wildcards for one in trainings).values()) == [1, 1, 2]
    for seed in TINY["seeds"]:
        assert (clustered["folder"] / f"results/models/simulated/voxelmorph/seed{seed}/model.safetensors").is_file()


def test_many_short_jobs_are_few_submissions(clustered):
    first, second, _ = clustered["submissions"]
    simulated = [one.tasks for one in first if one.rule.startswith("make_scans")]
    assert simulated == [1] * len(BATCHES)
    groups = [one for one in second if one.rule.startswith("report_")]
    assert len(groups) == 1
    gathered = {"gather_scores", "provenance", "comparison_tables", "cohort_products", "preprocessing_table"}
    assert not gathered & {one.rule for one in second}


def test_the_tables_are_those_of_a_local_run(clustered, local):
    for name in TABLES:
        ours, theirs = (pd.read_csv(place / f"results/tables/{name}.csv") for place in (clustered["folder"], local))
        measured = [column for column in ours if "second" in column or "memory" in column]
        pd.testing.assert_frame_equal(ours.drop(columns=measured), theirs.drop(columns=measured), rtol=1e-6)
