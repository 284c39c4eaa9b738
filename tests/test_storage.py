"""What is told of a disk, in whatever words a library has for it; and times of change that lie in the future."""

import errno
import os
import pickle
import resource
import time

import numpy as np
import pandas as pd
import pytest

from dmir import storage
from dmir.errors import InputError, StorageError, damaged, made_below
from dmir.storage import (
    LEFTOVER,
    require_past,
    require_writable,
    settle_times,
    storage_error,
    temporary_folder,
    told_as_storage,
)
from dmir.tables import read_record, read_scores, read_table, write_scores
from dmir.volumes import Volume, atomic_path, read_image, write_volume


def full_disk(*path):
    return OSError(errno.ENOSPC, os.strerror(errno.ENOSPC), *path)


# --- words ------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("number", "told"),
    [
        (
            errno.ENOSPC,
            r"x/a\.nii: the disk is full \(No space left on device; \d+\.\d\d of \d+ MB are free\)\. Make r",
        ),
        (
            errno.EDQUOT,
            r"x/a\.nii: the disk quota is used up \(Disk quota exceeded\)\. Make room, or ask for more and",
        ),
        (
            errno.EROFS,
            r"x/a\.nii: the file system is read-only \(Read-only file system\)\. Mount it for writing and",
        ),
        (errno.EACCES, r"x/a\.nii: this user may not read or write it \(Permission denied\)\. Give this user"),
        (errno.EIO, r"x/a\.nii: the disk reports an error"),
    ],
)
def test_each_fault_of_a_disk_is_one_message_with_what_to_do(number, told):
    with pytest.raises(StorageError, match=told), told_as_storage("x/a.nii"):
        raise OSError(number, os.strerror(number))


def test_a_fault_is_found_by_its_words_and_behind_other_exceptions():
    words = RuntimeError("I/O error: No space left on device (os error 28)")  # as safetensors and ITK say it
    assert "the disk is full" in str(storage_error(words, "w"))
    try:
        try:
            raise full_disk("real.npy")
        except OSError:
            raise RuntimeError("could not write")  # noqa: B904
    except RuntimeError as error:
        assert storage_error(error, "other").where == "real.npy"


@pytest.mark.parametrize("error", [ValueError("x"), FileNotFoundError(errno.ENOENT, "none", "x"), KeyError("disk")])
def test_other_exceptions_pass(error):
    assert storage_error(error, "a") is None
    with pytest.raises(type(error)), told_as_storage("a"):
        raise error


def test_words_that_tell_nothing_are_held_against_the_room_that_is_left(tmp_path, monkeypatch):
    with pytest.raises(RuntimeError, match="writing file"), told_as_storage(tmp_path / "a"):
        raise RuntimeError("PytorchStreamWriter failed writing file")
    monkeypatch.setattr(storage.os, "fsync", lambda descriptor: (_ for _ in ()).throw(full_disk()))
    with pytest.raises(StorageError, match="a: the disk is full"), told_as_storage(tmp_path / "a"):
        raise RuntimeError("PytorchStreamWriter failed writing file")
    with pytest.raises(StorageError, match=r"TMPDIR says where.*the disk is full"), temporary_folder("x-"):
        raise RuntimeError("ITK: could not write")


def test_the_message_survives_the_way_between_processes():
    error = storage_error(full_disk(), "a")
    assert str(pickle.loads(pickle.dumps(error))) == str(error)


# --- files that are written -------------------------------------------------------------------------------------------


def write_image(path):
    write_volume(path, Volume(np.random.default_rng(0).random((32, 32, 32)), np.eye(4)))


def write_pairs(path):
    write_scores(path, pd.DataFrame({"a": np.random.default_rng(0).random(9999)}))


def write_text(path):
    path.write_text("x" * 99_999)


@pytest.mark.parametrize("limit", [0, 5000])
@pytest.mark.parametrize("write", [write_image, write_pairs, write_text])
def test_a_write_that_fails_leaves_the_old_file_and_nothing_beside(write, limit, tmp_path):
    path, before = tmp_path / "a.nii.gz", resource.getrlimit(resource.RLIMIT_FSIZE)
    path.write_text("old")
    try:
        resource.setrlimit(resource.RLIMIT_FSIZE, (limit, before[1]))  # bytes that a file may have
        with pytest.raises(StorageError, match=r"a\.nii\.gz: the file would be larger than"), atomic_path(path) as file:
            write(file)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, before)
    assert path.read_text() == "old"
    assert [file.name for file in tmp_path.iterdir()] == ["a.nii.gz"]


def test_what_a_killed_writer_left_is_cleared_away_and_a_living_one_is_not(tmp_path):
    dead, other = tmp_path / f"{LEFTOVER}abcd1234-a.csv", tmp_path / f"{LEFTOVER}abcd1234-b-a.csv"
    for file in (dead, other):
        file.touch()
    with atomic_path(tmp_path / "a.csv") as first:
        first.write_text("first")
        assert not dead.exists()
        with atomic_path(tmp_path / "a.csv") as second:  # one more writer of the same file
            second.write_text("second")
        assert first.exists()
    assert (tmp_path / "a.csv").read_text() == "first"
    assert sorted(file.name for file in tmp_path.iterdir()) == sorted([other.name, "a.csv"])


def test_a_name_is_there_only_once_its_content_is_on_the_disk(tmp_path, monkeypatch):
    synced = []
    monkeypatch.setattr("dmir.volumes.writing.os.fsync", lambda descriptor: synced.append(os.fstat(descriptor).st_ino))
    with atomic_path(tmp_path / "a") as temporary:
        temporary.write_text("x")
        assert not synced
    assert synced == [(tmp_path / "a").stat().st_ino]


# --- folders ----------------------------------------------------------------------------------------------------------


def test_a_folder_that_can_be_written_to_is_left_alone(tmp_path):
    require_writable(tmp_path / "not" / "there" / "yet")
    assert not any(tmp_path.iterdir())


def test_a_read_only_folder_is_refused():
    read_only = next((line.split()[1] for line in open("/proc/mounts") if " ro," in line), None)  # noqa: PTH123, SIM115
    if read_only is None:
        pytest.skip("nothing is mounted read-only here")
    with pytest.raises(StorageError, match="the file system is read-only"):
        require_writable(read_only)


# --- damaged files ----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("name", "read"),
    [("a.nii.gz", read_image), ("a.parquet", read_scores), ("a.json", read_record), ("a.csv", read_table)],
)
def test_a_damaged_file_of_the_pipeline_is_told_with_the_command_that_mends_it(name, read, tmp_path):
    path = tmp_path / "results" / name
    path.parent.mkdir()
    path.write_bytes(b"" if name.endswith("csv") else b"cut")
    with pytest.raises(InputError, match=rf"{name}: found .*expected .*truncated") as told:
        read(path)
    assert " rm " not in str(told.value)
    made_below(tmp_path / "results")
    try:
        with pytest.raises(InputError, match=rf"one of the pipeline's own files.*rm {path}$") as told:
            read(path)
        assert "rm" not in str(damaged(tmp_path / "mine.nii", found="x", expected="y", remedy="Z."))
    finally:
        made_below(None)


# --- times ------------------------------------------------------------------------------------------------------------


def test_times_of_the_future_become_the_present_in_their_order(tmp_path):
    now = time.time()
    ages = {"past": -100, "input": 90_000, "output": 90_001, "nearly": 10}
    for name, age in ages.items():
        (tmp_path / name).touch()
        os.utime(tmp_path / name, (now + age, now + age))
    (tmp_path / "link").symlink_to(tmp_path / "past")
    assert [path.name for path in settle_times(tmp_path, now)] == ["input", "output"]
    times = {name: (tmp_path / name).stat().st_mtime for name in ages}
    assert times["past"] < times["input"] < times["output"] <= now
    assert settle_times(tmp_path, now) == []


def test_times_that_cannot_be_changed_are_told(tmp_path, monkeypatch):
    path = tmp_path / "a"
    path.touch()
    os.utime(path, (3e9, 3e9))

    def refused(*arguments, **options):
        raise OSError(errno.EROFS, os.strerror(errno.EROFS), str(path))

    monkeypatch.setattr(os, "utime", refused)
    with pytest.raises(StorageError, match=rf"{path}: the file system is read-only"):
        settle_times(tmp_path, now=1e9)


def test_a_users_file_of_the_future_is_named_with_what_to_do(tmp_path):
    path = tmp_path / "scan 1.nii"
    path.touch()
    require_past([path, tmp_path / "none"])
    later = time.time() + 86_400
    os.utime(path, (later, later))
    with pytest.raises(InputError, match=r"scan 1\.nii: found a time of change in the future .*touch '.*scan 1\.nii'"):
        require_past([path])
