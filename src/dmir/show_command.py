"""``dmir show`` and ``dmir table``: what a run found, in a sentence and a table that fit the terminal."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
import textwrap
from pathlib import Path

import pandas as pd

from dmir.errors import InputError
from dmir.terminal import is_terminal

FEW = 20  # pairs of a cohort below which the sentence says what so few are worth
# what is left out where the terminal is too narrow, one after the other
LEFT_OUT = ("nondiffeomorphic_volume", "n", "seconds", "nonpositive_jacobian_forward", "hd95", "failed")


def show(results: Path) -> None:
    """Print what a finished run found: a sentence, the table, where the report is; offer to open it.

    Parameters
    ----------
    results
        The folder of the run.

    Raises
    ------
    InputError
        There is no comparison table in it.
    """
    path = results / "tables" / "comparison.csv"
    text = table_that_fits(path)
    print(text)
    print(_filled(in_a_sentence(_read(path))))
    report = results / "report.html"
    if not report.is_file():
        return
    print(f"The report is {report}.")
    opener = shutil.which("xdg-open")
    displayed = os.environ.get("DISPLAY") or os.environ.get("WAYLAND_DISPLAY")
    if opener and displayed and sys.stdin.isatty() and is_terminal(sys.stdout):
        try:
            answer = input("Open it now? [y/N] ")
        except (EOFError, KeyboardInterrupt):
            answer = ""
            print()
        if answer.strip().lower() in ("y", "yes"):
            subprocess.Popen([opener, str(report)], stderr=subprocess.DEVNULL, start_new_session=True)


def table_that_fits(path: Path) -> str:
    """Return a comparison table as plain text: whole, or on a terminal so much of it as is not wider than that.

    Parameters
    ----------
    path
        A ``comparison.csv``.

    Raises
    ------
    InputError
        There is no such file.
    """
    table = _read(path)
    text = _formatted(table)
    width = _width()
    if width is None or _widest(text) <= width:
        return text
    shown = table.drop(columns=[name for name in table.columns if str(name).endswith("_sd")])
    for name in ("", *LEFT_OUT):
        shown = shown.drop(columns=[name], errors="ignore")
        text = _formatted(shown).replace("mean ± sd", "mean")
        if _widest(text) <= width:
            break
    lines = [line if _is_row(line) else textwrap.fill(line, width) for line in text.splitlines()]
    return "\n".join([*lines, textwrap.fill(f"All columns are in {path}, and in a wider terminal.", width), ""])


def in_a_sentence(table: pd.DataFrame) -> str:
    """Return which method matches the structures of each cohort best, from where, and what that is worth."""
    from dmir.report.names import method_name

    parts = []
    for cohort, rows in table.groupby("cohort", sort=False):
        ranked = rows[rows["method"] != "affine"].dropna(subset=["dice"]).sort_values("dice", ascending=False)
        start = rows.loc[rows["method"] == "affine", "dice"]
        if len(ranked):
            best = ranked.iloc[0]
            before = f", from {start.iloc[0]:.3f} after affine alignment alone" if len(start) else ""
            parts.append(
                f"with {method_name(best['method'], short=True)} on {cohort} (Dice {best['dice']:.3f}{before})"
            )
    if not parts:
        return "No method has a Dice."
    few = pd.to_numeric(table["n"], errors="coerce").min() < FEW
    worth = "; with so few pairs that shows that everything works, not which method is better" if few else ""
    return f"Labels match best {' and '.join(parts)}{worth}."


def _read(path: Path) -> pd.DataFrame:
    from dmir.tables import read_table

    if not path.is_file():
        raise InputError(path, found="no such file", expected="a comparison table", remedy="Run the pipeline.")
    return read_table(path)


def _formatted(table: pd.DataFrame) -> str:
    from dmir.report.writing import format_for_terminal

    return format_for_terminal(table)


def _width() -> int | None:
    """Columns of the terminal; None where the text goes into a file."""
    return shutil.get_terminal_size().columns if is_terminal(sys.stdout) else None


def _filled(text: str) -> str:
    width = _width()
    return text if width is None else textwrap.fill(text, width)


def _is_row(line: str) -> bool:
    return not (": mean" in line or line.startswith("* best"))


def _widest(text: str) -> int:
    return max(len(line) for line in text.splitlines() if _is_row(line))
