"""Disks that are full or read-only, files that are cut short, clocks that jump: nothing is lost, nothing is wrong.

One line tells what is the matter, and the same command goes on, to the tables of a run to which nothing happened.
"""

import ast
import json
import os
import re
import shutil
import subprocess
import time

import nibabel as nib
import pandas as pd
import pytest
from workflow_runs import ROOT, SMALL, TARGETS, checkout, copy_without, final_tables, remove, snakemake, start, wait_for

pytestmark = pytest.mark.faults
COHORT = "simulated"
PAGE = 4096  # bytes: what a file of one byte takes on a tmpfs


def mount(folder, megabytes):
    """Put a file system of its own under a folder, with what is in it."""
    done = subprocess.run(
        ["mount", "-t", "tmpfs", "-o", f"size={megabytes}m", "dmir-test", str(folder)], capture_output=True, text=True
    )
    if done.returncode:
        pytest.skip(f"a small disk needs root and the right to mount: {done.stderr.strip()}")


@pytest.fixture
def disk(undisturbed, tmp_path):
    """A copy of a finished run whose results lie on a small disk of their own."""
    if os.geteuid():
        pytest.skip("a small disk needs root")
    folder = tmp_path / "run"
    (folder / "results").mkdir(parents=True)
    mount(folder / "results", 200)
    try:
        yield copy_without(undisturbed, folder)
    finally:
        subprocess.run(["umount", "--lazy", str(folder / "results")], check=True)


def fill(folder, left):
    """Leave so many bytes on the disk of a run's results, or of another folder."""
    folder = folder / "results" if (folder / "results").is_dir() else folder
    filler, state = folder / "filler", os.statvfs(folder)
    with filler.open("wb") as file:
        os.posix_fallocate(file.fileno(), 0, state.f_bavail * state.f_frsize - left)
    return filler


def files(folder):
    """Return the results that there are, but for logs, benchmarks and what runs write of themselves."""
    kept = {"cohorts", "preprocessed", "models", "registered", "scores", "tables", "provenance"}
    return {
        path.relative_to(folder / "results").as_posix()
        for name in kept
        for path in (folder / "results" / name).rglob("*")
        if path.is_file()
    }


def lines(text):
    """Return the messages of a run's jobs: what users read."""
    assert "Traceback" not in text, text[-6000:]
    return [line for line in text.splitlines() if line.startswith("Error: ")]


def nothing_to_do(folder):
    return "Nothing to be done" in snakemake(folder, "-n", *TARGETS)


# --- a full disk ------------------------------------------------------------------------------------------------------

EVERYTHING_OF_ONE_BATCH = (  # of the two scans to test, which one job makes
    *("cohorts/*/sub-00[34]", "cohorts/*/scans.csv", "preprocessed/*/sub-00[34]", "preprocessed/*/quality.csv"),
    *("preprocessed/*/contact_sheet.png", "models/*", "registered/*", "scores/*", "tables/*", "provenance"),
)
# stage -> its target, the bytes that are left, and the files that do not fit
FULL_DISKS = {
    "cohort": ("cohort_all", 16 * PAGE, {r"cohorts/simulated/sub-003/\w+\.nii\.gz"}),
    "preprocess": ("preprocess_all", 16 * PAGE, {r"preprocessed/simulated/sub-003/\w+\.nii\.gz"}),
    "pack": ("results/models/simulated/packed/pack.json", 16 * PAGE, {"models/simulated/packed"}),
    "train": ("train_all", 4 * PAGE, {r"models/simulated/\S+"}),
    "register": (
        "register_all",
        16 * PAGE,
        {rf"registered/simulated/{run}/shard000/\S+\.nii" for run in ("affine/none", "syn/none", "voxelmorph/seed1")},
    ),
    "evaluate": ("evaluate_all", 4 * PAGE, {r"registered/simulated/\w+/\w+/examples-shard000/\S+\.npz"}),
    "report": (TARGETS[0], 2 * PAGE, {r"(?:tables|figures)/\w+_simulated\.\w+"}),  # run.json takes two
}


def test_a_full_disk_in_each_stage(disk, undisturbed):
    remove(disk, *EVERYTHING_OF_ONE_BATCH)
    for stage, (target, left, unwritten) in FULL_DISKS.items():
        before = files(disk)
        filler = fill(disk, left)
        told = lines(snakemake(disk, target, succeeds=False))
        for path in unwritten:
            message = rf"Error: .*results/{path}: .*(No space left on device|GB are free).*Make room.*"
            assert any(re.fullmatch(message, line) for line in told), (stage, path, told)
        if stage != "report":  # tables that fit are finished
            assert not {path for path in files(disk) - before if "tensorboard" not in path}, stage
        assert not list(disk.rglob(".writing-*"))
        filler.unlink()
        # fields stay until their scores are there, as in a run of all stages
        snakemake(disk, target, *(["--notemp"] if stage == "register" else []))
    snakemake(disk, *TARGETS)
    assert final_tables(disk) == final_tables(undisturbed)
    assert nothing_to_do(disk)


def test_a_full_temporary_folder_is_no_failed_pair(undisturbed, tmp_path):
    folder = copy_without(undisturbed, tmp_path / "run", "registered/*/syn", "scores/*/syn", "scores/*.*", "tables/*")
    small = tmp_path / "small"
    small.mkdir()
    mount(small, 1)
    try:
        filler = fill(small, 8 * PAGE)
        told = lines(snakemake(folder, *TARGETS, succeeds=False, TMPDIR=str(small)))
        assert any(re.search(r"syn.*TMPDIR.*the disk is full \(No space left on device", line) for line in told), told
        assert not list(folder.glob("results/registered/*/syn/none/*.csv"))
        filler.unlink()
    finally:
        subprocess.run(["umount", "--lazy", str(small)], check=True)
    snakemake(folder, *TARGETS)
    assert final_tables(folder) == final_tables(undisturbed)


# --- a read-only folder -----------------------------------------------------------------------------------------------


def remount(folder, how):
    subprocess.run(["mount", "-o", f"remount,{how}", str(folder)], check=True)


def test_a_read_only_results_folder_is_told_before_any_job(disk, undisturbed):
    remove(disk, "tables/*", "figures/*")  # where a job's files are there in part, Snakemake itself tells of them first
    remount(disk / "results", "ro")
    text = snakemake(disk, *TARGETS, succeeds=False)
    assert len(lines(text)) == 1
    assert re.search(
        r"^Error: results: the file system is read-only \(Read-only file system\)\. Mount it for writing and start the"
        r" same command again",
        text,
        re.MULTILINE,
    )
    assert "rule comparison_tables:" not in text  # no job was started
    remount(disk / "results", "rw")
    snakemake(disk, *TARGETS)
    assert final_tables(disk) == final_tables(undisturbed)


# --- files that are cut short -----------------------------------------------------------------------------------------

OWN = re.compile(r"Error: .*?(results/[\w./-]+): found .*expected .*one of the pipeline's own files.* again: rm (\S+)$")


def cut(path):
    os.truncate(path, path.stat().st_size * 2 // 3)


def mend(folder, text):
    """Run the commands that messages give; return the files that they delete."""
    found = [match for line in lines(text) if (match := OWN.search(line))]
    assert found, text[-6000:]
    for match in found:
        assert match[1] == match[2]
        (folder / match[2]).unlink(missing_ok=True)
    return {match[2].removeprefix("results/") for match in found}


def test_a_file_of_the_pipelines_own_that_is_cut_short_is_made_anew(undisturbed, tmp_path):
    folder = copy_without(undisturbed, tmp_path / "run", "scores/*.*", "tables/*")
    scores, image, model, packed = (
        "scores/simulated/affine/none/shard000.pairs.parquet",
        "preprocessed/simulated/sub-004/image.nii.gz",
        "models/simulated/voxelmorph/seed1/model.safetensors",
        "models/simulated/packed/images.npy",
    )
    cut(folder / "results" / scores)
    assert mend(folder, snakemake(folder, *TARGETS, succeeds=False)) == {scores}
    cut(folder / "results" / image)
    cut(folder / "results" / model)
    assert {image, model} <= (found := mend(folder, snakemake(folder, *TARGETS, succeeds=False))), found
    for name in (image, model):
        (folder / "results" / name).unlink(missing_ok=True)
    cut(folder / "results" / packed)
    assert mend(folder, snakemake(folder, *TARGETS, succeeds=False)) == {packed}
    snakemake(folder, *TARGETS)
    assert final_tables(folder) == final_tables(undisturbed)
    assert nothing_to_do(folder)


def test_a_users_image_that_is_cut_short_is_named_and_goes_on_when_it_is_back(undisturbed, tmp_path):
    scans = tmp_path / "scans"
    (tmp_path / "run").mkdir()
    folder = checkout(
        tmp_path / "run", {**SMALL, "methods": ["affine"], "cohorts": {COHORT: given(undisturbed, scans)}}
    )
    snakemake(folder, *TARGETS)
    before = final_tables(folder)
    image = scans / "sub-003-image.nii.gz"
    whole = image.read_bytes()
    cut(image)
    told = lines(snakemake(folder, *TARGETS, succeeds=False))
    assert told == [
        line for line in told if re.fullmatch(rf"Error: sub-003: image: {image}: found .*expected .*again\.", line)
    ]
    assert "pipeline's own" not in told[0]
    image.write_bytes(whole)
    snakemake(folder, *TARGETS)
    assert final_tables(folder) == before
    assert nothing_to_do(folder)


def given(undisturbed, folder):
    """Give some scans as a user's own files, coarse and small; return the cohort."""
    folder.mkdir()
    rows = []
    for scan, split in {"template": "atlas", "sub-001": "train", "sub-003": "test", "sub-004": "test"}.items():
        row = {"scan": scan, "subject": scan, "split": split}
        for kind in ("image", "labels", "mask"):
            volume = nib.load(undisturbed / "results" / "cohorts" / COHORT / scan / f"{kind}.nii.gz")
            coarse = volume.slicer[::3, ::3, ::3]
            row[kind] = str(folder / f"{scan}-{kind}.nii.gz")
            nib.save(coarse, row[kind])
        rows.append(row)
    pd.DataFrame(rows).to_csv(folder / "scans.csv", index=False)
    return {"source": "table", "table": str(folder / "scans.csv"), "structures": "oasis28"}


# --- clocks that jump -------------------------------------------------------------------------------------------------

DAY = 86_400


def shift(folder, seconds):
    """Let all results be that much younger."""
    for path in (folder / "results").rglob("*"):
        changed = path.stat().st_mtime + seconds
        os.utime(path, (changed, changed))


def test_a_clock_that_was_ahead_when_half_of_the_run_was_done(undisturbed, tmp_path):
    folder = copy_without(
        undisturbed, tmp_path / "run", "registered/*/affine", "scores/*/affine", "scores/*.*", "tables/*"
    )
    shift(folder, DAY)
    text = snakemake(folder, *TARGETS)
    assert "times of change in the future" in text
    assert "rule preprocess" not in text  # what is finished is not done again
    assert "rule train" not in text
    assert final_tables(folder) == final_tables(undisturbed)
    assert nothing_to_do(folder)


def test_a_clock_that_went_backward_between_two_stages(undisturbed, tmp_path):
    folder = copy_without(undisturbed, tmp_path / "run")
    for stage, before in (("models", "preprocessed"), ("scores", "registered"), ("tables", "scores")):
        made = [path.stat().st_mtime for path in (folder / "results" / before).rglob("*") if path.is_file()]
        for path in (folder / "results" / stage).rglob("*"):
            os.utime(path, (min(made) - 1, min(made) - 1))  # older than all that it was made from
    (folder / TARGETS[0]).unlink()
    text = snakemake(folder, *TARGETS)
    assert "rule train" not in text  # their content tells that it is the same
    assert final_tables(folder) == final_tables(undisturbed)
    assert nothing_to_do(folder)


WALL_CLOCK = {"time", "time_ns", "now", "utcnow", "today", "localtime", "gmtime", "ctime"}
# the one thing that is compared with a wall clock is a file's time of change
ALLOWED = {("src/dmir/storage.py", "time"), ("src/dmir/storage.py", "localtime")}


def test_no_duration_and_no_time_out_is_read_from_the_clock_on_the_wall():
    used = set()
    for path in [*ROOT.glob("src/**/*.py"), *ROOT.glob("workflow/**/*.py")]:
        for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
            owner = getattr(node, "value", None)
            if (
                isinstance(node, ast.Attribute)
                and node.attr in WALL_CLOCK
                and isinstance(owner, ast.Name | ast.Attribute)
            ):
                name = owner.id if isinstance(owner, ast.Name) else owner.attr
                if name in {"time", "datetime", "date", "Timestamp"}:
                    used.add((path.relative_to(ROOT).as_posix(), node.attr))
            if isinstance(node, ast.ImportFrom) and node.module == "time":
                used |= {(path.relative_to(ROOT).as_posix(), f"from time import {name.name}") for name in node.names}
    assert used <= ALLOWED, used - ALLOWED


BACKWARD = """
#define _GNU_SOURCE
#include <dlfcn.h>
#include <stdlib.h>
#include <sys/time.h>
#include <time.h>
#include <unistd.h>

/* one hour less, as soon as a certain file is there */
static void turn_back(time_t *seconds) {
    if (!access(getenv("CLOCK_JUMPS_WITH"), F_OK)) *seconds -= 3600;
}
int clock_gettime(clockid_t clock, struct timespec *now) {
    static int (*real)(clockid_t, struct timespec *);
    if (!real) real = dlsym(RTLD_NEXT, "clock_gettime");
    int status = real(clock, now);
    if (!status && clock == CLOCK_REALTIME) turn_back(&now->tv_sec);
    return status;
}
int gettimeofday(struct timeval *restrict now, void *restrict zone) {
    struct timespec exact;
    clock_gettime(CLOCK_REALTIME, &exact);
    now->tv_sec = exact.tv_sec;
    now->tv_usec = exact.tv_nsec / 1000;
    return 0;
}
time_t time(time_t *at) {
    struct timespec exact;
    clock_gettime(CLOCK_REALTIME, &exact);
    if (at) *at = exact.tv_sec;
    return exact.tv_sec;
}
"""


@pytest.mark.skipif(shutil.which("gcc") is None, reason="needs gcc, to turn back the clock of a run's processes")
def test_a_clock_that_jumps_back_while_methods_train_and_register(undisturbed, tmp_path):
    (tmp_path / "clock.c").write_text(BACKWARD)
    library = tmp_path / "clock.so"
    subprocess.run(["gcc", "-shared", "-fPIC", "-o", library, tmp_path / "clock.c", "-ldl"], check=True)
    folder = copy_without(undisturbed, tmp_path / "run", "models/*", "registered/*", "scores/*", "tables/*")
    log = tmp_path / "run.log"
    begun = time.monotonic()
    run = start(folder, log, *TARGETS, LD_PRELOAD=str(library), CLOCK_JUMPS_WITH=str(tmp_path / "now"))
    wait_for(lambda: list(folder.glob("results/models/simulated/.resume/*/last.ckpt")), run, log)
    (tmp_path / "now").touch()
    assert run.wait(timeout=1200) == 0, log.read_text()[-6000:]
    took = time.monotonic() - begun
    said = (folder / "results/logs/train/simulated/voxelmorph/seed1.log").read_text()
    moments = re.findall(r"^\d{4}-\d\d-\d\d \d\d:\d\d:\d\d", said, re.MULTILINE)
    assert moments[-1] < moments[0], "the clock did not jump while the network was trained"
    assert final_tables(folder) == final_tables(undisturbed)
    table = pd.read_csv(folder / "results/tables/comparison.csv")
    assert table["seconds"].between(0, took).all()
    trained = json.loads((folder / "results/models/simulated/voxelmorph/seed1/training.json").read_text())
    assert 0 < trained["seconds"] < took
    assert nothing_to_do(folder)
