"""What `make demo` says before it begins: what it needs, where there is no room for it, and that all is done."""

import importlib.util
import shutil
from pathlib import Path
from types import SimpleNamespace

import pytest


def loaded(name):
    specification = importlib.util.spec_from_file_location(name, Path(__file__).parents[1] / "envs" / f"{name}.py")
    module = importlib.util.module_from_spec(specification)
    specification.loader.exec_module(module)
    return module


needs, unchanged = loaded("needs"), loaded("unchanged")


@pytest.fixture
def machine(tmp_path, monkeypatch):
    """Make a machine with so much memory (MB) and disk (GB), in an empty folder."""

    def make(memory, disk, *words):
        monkeypatch.chdir(tmp_path)
        monkeypatch.setattr(needs, "memory_mb", lambda: memory)
        monkeypatch.setattr(shutil, "disk_usage", lambda path: SimpleNamespace(free=disk * 1e9))
        monkeypatch.setattr("sys.argv", ["needs.py", *words])
        return needs.main()

    return make


def test_it_says_what_it_needs(machine, capsys):
    assert machine(16000, 100.0) == 0
    told = capsys.readouterr().out
    assert "GB of memory and" in told and "the network while it installs" in told and "Only" not in told


def test_little_memory_is_told_and_jobs_wait_for_one_another(machine, capsys):
    assert machine(2500, 100.0) == 0
    assert "Only 2.5 GB of memory are free" in capsys.readouterr().out
    assert machine(2500, 100.0, "--memory") == 0
    assert capsys.readouterr().out == "2000\n"


def test_a_disk_without_room_is_refused(machine, capsys):
    assert machine(16000, 1.0) == 1
    assert "Error: 1.0 GB are free on this disk" in capsys.readouterr().err


def test_what_is_installed_needs_no_network_and_what_is_done_needs_no_word(machine, tmp_path, capsys):
    (tmp_path / ".venv").mkdir()
    (tmp_path / ".venv" / ".installed").touch()
    assert machine(16000, 1.0) == 0
    assert "network" not in capsys.readouterr().out
    (tmp_path / "results").mkdir()
    (tmp_path / "results" / "report.html").touch()
    assert machine(100, 0.0) == 0
    assert capsys.readouterr() == ("", "")


def test_memory_is_what_the_kernel_says_is_available():
    lines = Path("/proc/meminfo").read_text().splitlines()
    (total,) = (int(line.split()[1]) // 1024 for line in lines if line.startswith("MemTotal:"))
    assert 0 < needs.memory_mb() <= total


def change_code(folder):
    (folder / "src" / "code.py").write_text("2")


def change_results_by_hand(folder):
    (folder / "results" / "table.csv").write_text("another")


def delete_a_result(folder):
    (folder / "results" / "table.csv").unlink()


def spoil_the_note(folder):
    (folder / unchanged.NOTE).write_text("{")


@pytest.mark.parametrize("change", [change_code, change_results_by_hand, delete_a_result, spoil_the_note])
def test_what_is_done_is_looked_at_no_closer_until_something_changes(tmp_path, monkeypatch, capsys, change):
    monkeypatch.chdir(tmp_path)
    for part, name in (("src", "code.py"), ("results", "table.csv")):
        (tmp_path / part).mkdir()
        (tmp_path / part / name).write_text("1")
    monkeypatch.setattr("sys.argv", ["unchanged.py"])
    assert unchanged.main() == 1  # nothing is known yet
    monkeypatch.setattr("sys.argv", ["unchanged.py", "--remember"])
    assert unchanged.main() == 0
    monkeypatch.setattr("sys.argv", ["unchanged.py"])
    (tmp_path / "src" / "code.pyc").touch()
    assert unchanged.main() == 0
    assert capsys.readouterr().out == "Everything is done, and nothing has changed since.\n"
    change(tmp_path)
    assert unchanged.main() == 1
