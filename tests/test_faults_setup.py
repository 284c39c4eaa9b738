"""A set-up that is killed on its way: the same `make` goes on to an environment that works."""

import os
import shutil
import signal
import subprocess
import time
from pathlib import Path

import pytest

pytestmark = pytest.mark.faults
ROOT = Path(__file__).parents[1]
STAMP = ".venv/.installed"
# a package that is installed without a network, and whose building waits as long as a file says so
BACKEND = """
import pathlib, time, zipfile
HERE = pathlib.Path(__file__).parent
def build_wheel(folder, config_settings=None, metadata_directory=None):
    (HERE / "building").touch()
    while (HERE / "wait").exists():
        time.sleep(0.05)
    name = "{name}-1.0-py3-none-any.whl"
    info = "{name}-1.0.dist-info"
    with zipfile.ZipFile(pathlib.Path(folder, name), "w") as wheel:
        wheel.writestr("{name}.py", "WHOLE = True")
        wheel.writestr(info + "/METADATA", "Metadata-Version: 2.1\\nName: {name}\\nVersion: 1.0\\n")
        wheel.writestr(info + "/WHEEL", "Wheel-Version: 1.0\\nRoot-Is-Purelib: true\\nTag: py3-none-any\\n")
        wheel.writestr(info + "/RECORD", "")
    return name
build_editable = build_wheel
"""
PROJECT = """
[build-system]
requires = []
build-backend = "backend"
backend-path = ["."]
[project]
name = "{name}"
version = "1.0"
"""


def package(folder, name):
    folder.mkdir(exist_ok=True)
    (folder / "backend.py").write_text(BACKEND.format(name=name))
    (folder / "pyproject.toml").write_text(PROJECT.format(name=name))


@pytest.fixture
def project(tmp_path):
    """A folder with the real Makefile, and requirements that need no network."""
    folder = tmp_path / "project"
    package(folder, "project")
    package(folder / "needed", "needed")
    shutil.copy(ROOT / "Makefile", folder)
    (folder / "requirements.txt").write_text("./needed\n")
    (folder / "requirements-elastix.txt").write_text("")
    (folder / "constraints.txt").write_text("")
    return folder


def environment():
    """A user's own `make`, though the tests may run under one, which would tell folders and hand down its flags."""
    without = {name: value for name, value in os.environ.items() if name not in ("MAKELEVEL", "MAKEFLAGS", "MFLAGS")}
    return {**without, "PIP_NO_INDEX": "1", "PIP_CONFIG_FILE": os.devnull}


def make(folder):
    done = subprocess.run(["make", STAMP], cwd=folder, env=environment(), capture_output=True, text=True, timeout=600)
    assert done.returncode == 0, done.stdout + done.stderr
    return done.stdout


def kill_make(folder, moment):
    """Start `make`, and kill it with all that it started, as a power cut would, as soon as a moment has come."""
    log = folder / "make.log"
    with log.open("wb") as file:
        process = subprocess.Popen(
            ["make", STAMP], cwd=folder, env=environment(), stdout=file, stderr=file, start_new_session=True
        )
    end = time.monotonic() + 300
    while not moment():
        assert process.poll() is None and time.monotonic() < end, log.read_text()
        time.sleep(0.02)
    os.killpg(process.pid, signal.SIGKILL)
    process.wait()
    assert not (folder / STAMP).exists()


def works(folder):
    code = "import needed, project; assert needed.WHOLE and project.WHOLE"
    return subprocess.run([folder / ".venv" / "bin" / "python", "-c", code]).returncode == 0


def test_an_interrupted_set_up_goes_on_with_the_same_make(project):
    packages = project / ".venv" / "lib"
    kill_make(project, lambda: any(packages.glob("python*/site-packages/pip/*")))  # while `python -m venv` works
    assert not (project / ".venv" / "bin" / "pip").exists()
    (project / "needed" / "wait").touch()
    kill_make(project, (project / "needed" / "building").exists)  # while pip installs
    half = project / ".venv" / "half-written"
    half.touch()
    (project / "needed" / "wait").unlink()
    make(project)
    assert works(project)
    assert not half.exists()  # nothing of what was interrupted is trusted
    assert "up to date" in make(project)


def test_a_second_make_waits_for_the_one_that_installs(project):
    (project / "needed" / "wait").touch()
    words = {"cwd": project, "env": environment(), "stdout": subprocess.PIPE, "stderr": subprocess.STDOUT, "text": True}
    first = subprocess.Popen(["make", STAMP], **words)
    end = time.monotonic() + 300
    while not (project / "needed" / "building").exists():
        assert first.poll() is None and time.monotonic() < end
        time.sleep(0.05)
    second = subprocess.Popen(["make", STAMP], **words)
    assert "Another make installs the packages: waiting for it." in second.stdout.readline()
    (project / "needed" / "wait").unlink()
    told = second.communicate(timeout=300)[0]
    assert first.wait(timeout=300) == second.returncode == 0
    assert "Installing" not in told and works(project)


def test_a_finished_environment_is_upgraded_in_place_and_an_interrupted_upgrade_begun_anew(project):
    make(project)
    kept = project / ".venv" / "kept"
    kept.touch()
    (project / ".venv" / ".installed-for-tests").touch()
    later = time.time() + 10
    os.utime(project / "requirements.txt", (later, later))
    (project / "wait").touch()
    (project / "building").unlink()
    kill_make(project, (project / "building").exists)
    assert kept.exists()
    assert not (project / ".venv" / ".installed-for-tests").exists()
    (project / "wait").unlink()
    now = time.time() - 10
    os.utime(project / "requirements.txt", (now, now))
    make(project)
    assert works(project)
    assert not kept.exists()
