"""The command ``dmir score``: one pair, or a table of pairs that were registered elsewhere, by the pipeline's scorer.

A table's scores, tables and figures are written into a folder beside the one that is asked for, and only then moved
there: what fails leaves nothing, and what succeeds leaves nothing of the one before.
"""

from __future__ import annotations

import argparse
import json
import math
import platform
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn, TimeRemainingColumn

import dmir
from dmir.doubts import told_doubts
from dmir.errors import InputError, suggestion
from dmir.storage import replaced_files, require_folder

if TYPE_CHECKING:
    import pandas as pd

    from dmir.metrics.elsewhere import Registrations

RECORD = "score.json"  # written last and removed first: where it is, the folder holds whole scores
MADE_BY = "dmir score"
OF_A_PAIR = ("field", "warped_labels", "moving_labels", "fixed_labels", "mask", "truth", "interpolation")
OF_A_TABLE = ("out", "reference")


def run(options: argparse.Namespace) -> None:
    """Score one pair or a table of pairs."""
    _check_options(options)
    if options.table is None:
        _score_pair(options)
    else:
        with told_doubts(options.strict) as told:
            _score_table(options, told)


def _check_options(options: argparse.Namespace) -> None:
    """Refuse options that do not belong together; argparse knows of each alone."""
    of_table = options.table is not None
    misplaced = [name for name in (OF_A_PAIR if of_table else OF_A_TABLE) if getattr(options, name) is not None]
    if of_table and options.json:
        misplaced.append("json")
    if misplaced:
        option = f"--{misplaced[0].replace('_', '-')}"
        raise InputError(
            option,
            found="it beside --table" if of_table else "it without --table",
            expected="the options of one pair, or --table with --out and --reference",
            remedy="What holds for single pairs of a table stands in its columns." if of_table else "",
        )
    if of_table:
        if options.out is None:
            raise InputError("--out", found="none beside --table", expected="the folder for scores, tables and figures")
        return
    if options.field is None and options.warped_labels is None:
        raise InputError("dmir score", found="no result", expected="--field, --warped-labels, or a --table of pairs")
    if options.fixed_labels is None:
        raise InputError("--fixed-labels", found="none", expected="the label map that the result is compared with")
    if options.field is not None and options.moving_labels is None:
        raise InputError("--moving-labels", found="none beside --field", expected="the label map that the field warps")


# ---------------------------------------------------------------- one pair


def _score_pair(options: argparse.Namespace) -> None:
    import pandas as pd

    from dmir.metrics.elsewhere import tell_of_worse
    from dmir.metrics.files import PAIR_KEYS, score_files

    structures, pair = score_files(
        options.field,
        options.moving_labels,
        options.fixed_labels,
        options.structures,
        convention=options.convention,
        warped_labels=options.warped_labels,
        warped_by=options.interpolation,
        mask=options.mask,
        truth=options.truth,
        before=True,
    )
    key = dict.fromkeys(PAIR_KEYS, "it")
    tell_of_worse(structures.assign(**key), pd.DataFrame([{**key, **pair}]), options.field or options.warped_labels)
    if options.json:
        content = {"structures": _plain(structures.to_dict("records")), "pair": _plain([pair])[0]}
        print(json.dumps(content, indent=2, allow_nan=False))
        return
    print(structures.to_string(index=False, float_format="{:.4f}".format, na_rep="not known"))
    print()
    for name, value in pair.items():
        known = not (isinstance(value, float) and math.isnan(value))
        shown = f"{value:.6g}" if isinstance(value, float) else str(value)
        print(f"{name:32s} {shown if known else 'not known'}")


def _plain(rows: list[dict[Any, Any]]) -> list[dict[str, Any]]:
    """Return rows as JSON has them: numbers of Python's, and null for what is not known."""

    def plain(value: Any) -> Any:
        value = value.item() if hasattr(value, "item") else value
        return None if isinstance(value, float) and math.isnan(value) else value

    return [{str(key): plain(value) for key, value in row.items()} for row in rows]


# ---------------------------------------------------------------- a table of pairs


def _score_table(options: argparse.Namespace, told: list[str]) -> None:
    from dmir.metrics.elsewhere import common_interpolation, read_registrations, score_registrations, tell_of_worse
    from dmir.report.elsewhere import write_report
    from dmir.report.writing import format_for_terminal, format_statistics

    started = time.perf_counter()
    earlier = _earlier(options.out)
    with _progress() as tell:
        found = read_registrations(options.table, options.structures, options.convention, tell)
        reference = _reference(options.reference, found)
        structures, pairs = score_registrations(found, tell)
    labels = common_interpolation(structures, options.table)
    tell_of_worse(structures, pairs, options.table)
    scans = {cohort: found.scans(cohort) for cohort in found.structures}
    with replaced_files(options.out, earlier, RECORD) as folder:
        comparison, statistics = write_report(folder, structures, pairs, scans, found.methods, reference, labels=labels)
        record = _record(options, found, pairs, reference, labels)
        record |= {"remarks": list(told), "seconds": round(time.perf_counter() - started, 2)}
        record["files"] = sorted(path.relative_to(folder).as_posix() for path in folder.rglob("*") if path.is_file())
        (folder / RECORD).write_text(json.dumps(record, indent=2, allow_nan=False) + "\n", encoding="utf-8")
    print(format_for_terminal(comparison))
    print(format_statistics(statistics, reference))
    scored, failed = int(comparison["n"].sum()), int(comparison["failed"].sum())
    where = " (tables/failures.md)" if failed else ""
    of_methods = f"{scored} of {scored + failed} pairs of {len(found.methods)} methods"
    print(f"{options.out}: {of_methods} were scored{where}; what the numbers are is told in tables/*.md")


def _earlier(out: Path) -> list[str]:
    """Return what an earlier run of this command left in a folder; refuse one that holds anything else's results."""
    require_folder(out)
    record = out / RECORD
    if not record.is_file():
        if out.is_dir() and any(out.iterdir()):
            raise InputError(
                f"--out {out}",
                found=f"a folder that holds other files and no {RECORD}",
                expected="a new or empty folder, or one that dmir score --table made, which is made anew",
                remedy="Name another one.",
            )
        return []
    from dmir.tables import read_record

    content = read_record(record)
    files = content.get("files")
    inside = isinstance(files, list) and all(isinstance(name, str) and _is_ours(name) for name in files)
    if content.get("made_by") != MADE_BY or not inside:
        raise InputError(
            record, found="another program's record", expected="one of dmir score --table", remedy="Name another --out."
        )
    return [str(name) for name in files or []]


def _is_ours(name: str) -> bool:
    """Tell whether a file that a record names lies where this command writes: a record is a file like any other."""
    path = Path(name)
    return (
        not path.is_absolute() and ".." not in path.parts and path.parts[:1] in (("scores",), ("tables",), ("figures",))
    )


def _reference(wanted: str | None, found: Registrations) -> str:
    """Return the method that the others are tested against: the first that is no mere start, unless one is named."""
    from dmir.report.names import REFERENCE_METHODS

    cohorts = {method: part["cohort"].nunique() for method, part in found.rows.groupby("method")}
    everywhere = [method for method in found.methods if cohorts[method] == len(found.structures)]
    if wanted is not None and wanted not in everywhere:
        which = f"'{wanted}', which " + ("not every cohort has" if wanted in cohorts else "is no method of the table")
        expected = "a method that every cohort of the table has"
        raise InputError("--reference", found=which, expected=expected, remedy=suggestion(wanted, everywhere))
    if not everywhere:
        raise InputError(
            found.path, found="no method that every cohort has", expected="one, which others are tested against"
        )
    return wanted or next((method for method in everywhere if method not in REFERENCE_METHODS), everywhere[0])


def _record(
    options: argparse.Namespace, found: Registrations, pairs: pd.DataFrame, reference: str, labels: str
) -> dict[str, Any]:
    from dmir.provenance import file_hash

    scored = pairs.assign(scored=pairs["status"] == "ok")
    counts = scored.groupby(["cohort", "method"], sort=False)["scored"].agg(["size", "sum"])
    return {
        "made_by": MADE_BY,
        "versions": {"dmir": dmir.__version__, "python": platform.python_version()},
        "table": {"path": str(options.table), "hash": file_hash(options.table)},
        "structures": {cohort: chosen.name for cohort, chosen in found.structures.items()},
        "convention": options.convention,
        "reference": reference,
        "labels": labels,
        "registrations": [
            {"cohort": cohort, "method": method, "given": int(size), "scored": int(ok)}
            for (cohort, method), size, ok in counts.itertuples()
        ],
    }


@contextmanager
def _progress() -> Iterator[Any]:
    """Yield a function that is told of steps: a bar on a terminal, nothing in a log."""
    if not sys.stderr.isatty():
        yield None
        return
    columns = (TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TimeElapsedColumn())
    with Progress(*columns, TimeRemainingColumn(), console=Console(stderr=True), transient=True) as bar:
        task = bar.add_task("")
        step = ""

        def tell(name: str, done: int, count: int) -> None:
            nonlocal step
            if name != step:
                step = name
                bar.reset(task, description=name, total=count)
            bar.update(task, completed=done)

        yield tell
