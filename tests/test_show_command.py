"""What a finished run is told by: a sentence, a table that fits the terminal, the report."""

import os
import shutil

import pandas as pd
import pytest

from dmir import show_command
from dmir.cli import main
from dmir.show_command import in_a_sentence


def comparison(n=4):
    rows = [("affine", 0.634), ("syn", 0.783), ("caml", 0.709)]
    columns = {
        "dice_sd": 0.02,
        "hd95": 4.46,
        "hd95_sd": 0.3,
        "nonpositive_jacobian_forward": 0.0,
        "nondiffeomorphic_volume": 0.0,
        "seconds": 1.5,
        "labels": "nearest",
    }
    return pd.DataFrame(
        {"cohort": cohort, "method": method, "n": n, "dice": dice - worse, **columns}
        for cohort, worse in (("simulated", 0.0), ("donors", 0.3))
        for method, dice in rows
    )


@pytest.fixture
def results(tmp_path):
    (tmp_path / "tables").mkdir()
    comparison().to_csv(tmp_path / "tables" / "comparison.csv", index=False)
    return tmp_path


@pytest.fixture
def terminal(monkeypatch):
    """Make standard output look like a terminal of so many columns, with a person before it."""

    def make(columns):
        monkeypatch.setattr(show_command, "is_terminal", lambda stream=None: True)
        monkeypatch.setattr(shutil, "get_terminal_size", lambda: os.terminal_size((columns, 24)))

    return make


def test_the_sentence_names_the_best_of_each_cohort_and_what_few_pairs_are_worth():
    told = in_a_sentence(comparison())
    assert told.startswith("Labels match best with SyN on simulated (Dice 0.783, from 0.634 after affine alignment")
    assert "and with SyN on donors (Dice 0.483, from 0.334" in told and told.endswith("not which method is better.")
    assert in_a_sentence(comparison(n=40)).endswith("alone).")
    assert in_a_sentence(comparison().query("method == 'affine'")) == "No method has a Dice."


def test_a_file_gets_the_whole_table_and_where_the_report_is(results, capsys):
    (results / "report.html").touch()
    assert main(["show", str(results)]) == 0
    told = capsys.readouterr().out
    assert "0.783 ± 0.020*" in told and "s/pair" in told
    assert told.splitlines()[-1] == f"The report is {results / 'report.html'}."


@pytest.mark.parametrize("columns", [50, 60, 200])
def test_the_table_fits_the_terminal(results, terminal, capsys, columns):
    terminal(columns)
    assert main(["show", str(results)]) == 0
    lines = [line for line in capsys.readouterr().out.splitlines() if str(results) not in line]
    assert max(map(len, lines)) <= columns
    whole = any("0.783 ± 0.020*" in line for line in lines)
    assert whole == (columns == 200) and (whole or any("0.783*" in line for line in lines))


@pytest.mark.parametrize(("answer", "opened"), [("y", 1), ("", 0), ("no", 0)])
def test_the_report_is_opened_where_somebody_says_so(results, terminal, monkeypatch, capsys, answer, opened):
    terminal(100)
    (results / "report.html").touch()
    calls = []
    monkeypatch.setenv("DISPLAY", ":0")
    monkeypatch.setattr("sys.stdin.isatty", lambda: True, raising=False)
    monkeypatch.setattr("builtins.input", lambda question: answer)
    monkeypatch.setattr(shutil, "which", lambda name: f"/usr/bin/{name}")
    monkeypatch.setattr(show_command.subprocess, "Popen", lambda words, **_: calls.append(words))
    assert main(["show", str(results)]) == 0
    assert calls == [["/usr/bin/xdg-open", str(results / "report.html")]] * opened


def test_a_run_without_a_table_is_one_message(tmp_path, capsys):
    assert main(["show", str(tmp_path)]) == 1
    assert "comparison.csv: found no such file" in capsys.readouterr().err
