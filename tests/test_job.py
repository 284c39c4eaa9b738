"""A job's words go to its log, and its failure is told as a user needs it."""

import subprocess
import sys

import pytest


def run(tmp_path, body):
    code = f"from dmir.job import job\nwith job({str(tmp_path / 'a.log')!r}, 1):\n" + "\n".join(
        f"    {line}" for line in body.splitlines()
    )
    result = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    return result, (tmp_path / "a.log").read_text()


def test_everything_goes_to_the_log_even_what_c_libraries_say(tmp_path):
    result, log = run(tmp_path, "import os\nprint('python')\nos.system('echo child')\nos.write(2, b'raw\\n')")
    assert result.returncode == 0 and result.stdout == result.stderr == ""
    assert {"python", "child", "raw"} <= set(log.split())


def test_a_users_mistake_is_one_message_without_traceback(tmp_path):
    body = "from dmir.errors import InputError\nraise InputError('a.nii.gz', found='x', expected='y', remedy='Do z.')"
    result, log = run(tmp_path, body)
    assert result.returncode == 1
    assert log == "Error: a.nii.gz: found x; expected y. Do z.\n"


def test_a_defect_keeps_its_traceback(tmp_path):
    result, log = run(tmp_path, "1 / 0")
    assert result.returncode == 1
    assert "Traceback" in log and "ZeroDivisionError" in log


def test_threads_are_held_before_anything_is_imported(tmp_path):
    _, log = run(
        tmp_path, "import os, torch\nprint(torch.get_num_threads(), os.environ['ITK_GLOBAL_DEFAULT_NUMBER_OF_THREADS'])"
    )
    assert log.split() == ["1", "1"]


def test_a_full_disk_is_one_message_without_traceback(tmp_path):
    body = "import errno, os\nraise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC), 'results/a.npy')"
    result, log = run(tmp_path, body)
    assert result.returncode == 1
    assert log.startswith("Error: results/a.npy: the disk is full (No space left on device")
    assert log.count("\n") == 1


def test_a_thread_that_a_full_disk_ended_is_told_in_a_line(tmp_path):
    body = (
        "import errno, os, threading\n"
        "def write(): raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC), 'events')\n"
        "thread = threading.Thread(target=write); thread.start(); thread.join()"
    )
    result, log = run(tmp_path, body)
    assert result.returncode == 0
    assert log.startswith("Warning: events: the disk is full (No space") and log.count("\n") == 1


@pytest.mark.parametrize("body", ["raise InputError('a.nii', found='x', expected='y')", "print('a' * 99_999)"])
def test_a_log_that_cannot_be_written_hides_no_reason(tmp_path, body):
    code = (
        "import resource\nfrom dmir.errors import InputError\nfrom dmir.job import job\n"
        f"with job({str(tmp_path / 'a.log')!r}, 1):\n"
        "    resource.setrlimit(resource.RLIMIT_FSIZE, (9, resource.RLIM_INFINITY))\n"  # bytes that a file may have
        f"    {body}\n"
    )
    result = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert result.returncode == 1
    assert result.stderr.splitlines()[0].startswith("Error: ")
    assert "a.nii: found x" in result.stderr or "a.log: the file would be larger than" in result.stderr
    assert "Traceback" not in result.stderr


def test_a_log_that_cannot_be_begun_is_told_outside(tmp_path):
    (tmp_path / "file").touch()
    code = f"from dmir.job import job\nwith job({str(tmp_path / 'file' / 'a.log')!r}, 1):\n    pass"
    result = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert result.returncode == 1 and "file" in result.stderr


def test_several_things_are_all_tried_and_those_that_failed_are_told_by_name(tmp_path):
    body = (
        "from dmir.errors import InputError\n"
        "from dmir.job import do_each\n"
        "def bad(): raise InputError('a.nii.gz', found='x', expected='y')\n"
        "do_each({'one': bad, 'two': lambda: print('done'), 'three': bad})"
    )
    result, log = run(tmp_path, body)
    assert result.returncode == 1
    told = [f"Error: {name}: a.nii.gz: found x; expected y." for name in ("one", "three")]
    assert log.splitlines() == ["one", "two", "done", "three", *told]


def test_of_several_things_none_is_tried_once_the_disk_is_full(tmp_path):
    body = (
        "from dmir.errors import StorageError\n"
        "from dmir.job import do_each\n"
        "def full(): raise StorageError('a.nii.gz', reason='the disk is full', remedy='Make room.')\n"
        "do_each({'one': full, 'two': lambda: print('done')})"
    )
    result, log = run(tmp_path, body)
    assert result.returncode == 1
    assert log.splitlines() == ["one", "Error: a.nii.gz: the disk is full. Make room."]
