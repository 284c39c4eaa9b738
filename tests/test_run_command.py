"""dmir where it is installed without its checkout: it runs the workflow, and lays out projects."""

import os
import re
import subprocess
import sys
import zipfile
from pathlib import Path

import pytest
import yaml
from workflow_runs import SMALL, jobs

import dmir
from dmir.cli import main
from dmir.config import read_config
from dmir.errors import InputError
from dmir.run_command import command, init, plain_python, workflow_folder

ROOT = Path(__file__).parents[1]


@pytest.fixture(scope="module")
def installed(tmp_path_factory):
    """A folder with the wheel's content and nothing else; the libraries are those of this environment."""
    pytest.importorskip("hatchling", reason="builds a wheel")
    folder = tmp_path_factory.mktemp("wheel")
    words = ["wheel", "--no-deps", "--no-build-isolation", "--disable-pip-version-check", "-w", str(folder), str(ROOT)]
    done = subprocess.run([sys.executable, "-m", "pip", *words], capture_output=True, text=True)
    assert done.returncode == 0, done.stdout + done.stderr
    (wheel,) = folder.glob("*.whl")
    assert wheel.name == f"dmir-{dmir.__version__}-py3-none-any.whl"
    zipfile.ZipFile(wheel).extractall(folder / "installed")
    return folder / "installed"


def dmir_of(installed, folder, *words):
    """Run the installed dmir somewhere; nothing of the checkout is on its path."""
    done = subprocess.run(
        [sys.executable, "-P", "-m", "dmir", *words],
        cwd=folder,
        env={**os.environ, "PYTHONPATH": str(installed)},
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0, done.stdout + done.stderr
    return done.stdout + done.stderr


def test_the_wheel_holds_the_workflow_and_runs_it(installed, tmp_path):
    (tmp_path / "my config.yaml").write_text(yaml.safe_dump(SMALL))
    text = dmir_of(installed, tmp_path, "run", "my config.yaml", "-n")
    planned = jobs(text)
    assert planned["train"] == 1 and planned["report_page"] == 1
    assert str(ROOT / "Snakefile") not in text and str(ROOT / "src") not in text
    packaged = installed / "dmir" / "pipeline"
    for folder in ("rules", "workflow", "profiles", "envs", "config"):
        ours = [path for path in (ROOT / folder).rglob("*") if path.suffix in (".smk", ".py", ".yaml", ".rst")]
        assert ours and all((packaged / path.relative_to(ROOT)).is_file() for path in ours)
    assert (installed / "snakemake_logger_plugin_dmir" / "__init__.py").is_file()


def test_the_installed_dmir_lays_out_a_project_that_is_read(installed, tmp_path):
    text = dmir_of(installed, tmp_path, "init", "my study")
    project = tmp_path / "my study"
    assert "my study/README.md says what to do next." in text
    configuration = read_config(project / "config.yaml")
    assert configuration.results == "results"
    assert (project / configuration.root / configuration.cohorts["mine"].table).is_file()
    named = re.findall(r"`(profiles/\S+)`", (project / "README.md").read_text())
    assert named and all((project / name).is_file() for name in named)


def test_nothing_is_overwritten(tmp_path, capsys):
    (tmp_path / "kept").touch()
    with pytest.raises(InputError, match="not empty"):
        init(tmp_path)
    assert [path.name for path in tmp_path.iterdir()] == ["kept"]
    assert main(["init", str(tmp_path / "kept")]) == 1
    assert "expected a new folder" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("given", "added"),
    [
        ([], ["--cores", "all"]),
        (["-n"], ["--cores", "all"]),
        (["train_all", "-c2"], []),
        (["--jobs=3"], []),
        (["--cores", "4", "--resources", "gpu=2"], []),
    ],
)
def test_all_cores_are_used_unless_snakemake_is_told_how_many(tmp_path, monkeypatch, given, added):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "c.yaml").touch()
    words = command(Path("c.yaml"), given)[4:]
    root = workflow_folder()
    profile = ["--workflow-profile", str(root / "profiles" / "default")]
    assert words == [*given, *profile, *added, "--snakefile", str(root / "Snakefile"), "--configfile", "c.yaml"]


def test_a_profile_is_the_users_own_or_the_workflows(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "c.yaml").touch()
    for name in ("slurm", "profiles/slurm"):
        words = command(Path("c.yaml"), ["--workflow-profile", name])
        assert words[5] == str(workflow_folder() / "profiles" / "slurm") and "--cores" not in words
    (tmp_path / "profiles" / "slurm").mkdir(parents=True)
    assert command(Path("c.yaml"), ["--workflow-profile", "profiles/slurm"])[5] == "profiles/slurm"
    with pytest.raises(InputError, match="Did you mean 'slurm'"):
        command(Path("c.yaml"), ["--workflow-profile", "slurn"])


def test_a_python_whose_path_has_a_blank_is_started_by_a_link_without(tmp_path, monkeypatch):
    prefix = tmp_path / "my environment"
    (prefix / "bin").mkdir(parents=True)
    (prefix / "bin" / "python").symlink_to(sys.executable)
    monkeypatch.setattr("sys.executable", str(prefix / "bin" / "python"))
    (tmp_path / "c.yaml").touch()
    for cache in ("cache", "a cache"):
        monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / cache))
        monkeypatch.setattr("tempfile.tempdir", str(tmp_path))
        named = plain_python()
        assert " " not in named and Path(named).parents[1].resolve() == prefix
        started = command(tmp_path / "c.yaml", [])[0]
        assert " " not in started and (cache != "cache" or started == named)


def test_a_configuration_that_is_not_there_is_one_message(tmp_path, capsys):
    assert main(["run", str(tmp_path / "none.yaml")]) == 1
    assert capsys.readouterr().err.count("\n") <= 2


def test_a_configuration_that_snakemake_would_run_as_python_does_not_reach_it(tmp_path, capsys, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "mine.yaml").write_text("__use_yte__: true\nresults: ?open('ran', 'w') and 'x'\n")
    assert main(["run", "mine.yaml", "-n"]) == 1
    assert "runs what the file holds as Python" in capsys.readouterr().err and not (tmp_path / "ran").exists()


def test_one_place_names_the_version():
    assert f"version: {dmir.__version__}\n" in (ROOT / "CITATION.cff").read_text()
    assert f"## {dmir.__version__}" in (ROOT / "CHANGELOG.md").read_text()
    assert 'dynamic = ["version"]' in (ROOT / "pyproject.toml").read_text()
