"""A job's words go to its log, and its failure is told as a user needs it."""

import subprocess
import sys


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
