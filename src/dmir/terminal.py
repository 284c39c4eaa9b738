"""What a terminal shows while one waits: how far it is, on standard error, and nothing at all in a file."""

from __future__ import annotations

import os
import sys
import time
from collections.abc import Iterable, Iterator, Sized
from contextlib import contextmanager
from typing import TextIO, TypeVar

Item = TypeVar("Item")


def is_terminal(stream: TextIO | None = None) -> bool:
    """Tell whether a person looks at a stream (standard error by default), on a terminal that can draw."""
    stream = sys.stderr if stream is None else stream
    return stream.isatty() and os.environ.get("TERM", "dumb") != "dumb"


def duration(seconds: float) -> str:
    """Return a time as people say it: ``"40 s"``, ``"12 min"``, ``"3 h 20 min"``, ``"2.5 days"``."""
    if seconds < 90:
        return f"{seconds:.0f} s"
    minutes = round(seconds / 60)
    if minutes < 90:
        return f"{minutes} min"
    if minutes < 48 * 60:
        return f"{minutes // 60} h {minutes % 60} min"
    return f"{minutes / 1440:.1f} days"


def followed(items: Iterable[Item], what: str, total: int | None = None) -> Iterator[Item]:
    """Give the items one by one, with a bar on a terminal that tells how many are done and how long it takes.

    Parameters
    ----------
    items
        What is worked through.
    what
        A word or two before the bar.
    total
        How many there are; by default their ``len``, and without one a bar that only moves.

    Yields
    ------
    object
        Each item; the bar moves when the next one is asked for, and is gone at the end.
    """
    if total is None and isinstance(items, Sized):
        total = len(items)
    if not is_terminal():
        yield from items
        return
    from rich.console import Console
    from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn

    columns = (TextColumn("{task.description}"), BarColumn(bar_width=None), MofNCompleteColumn(), TimeRemainingColumn())
    # what is printed meanwhile goes above the bar on the same terminal, and stays in a file that it is written to
    both = sys.stdout.isatty()
    with Progress(*columns, console=Console(stderr=True), transient=True, redirect_stdout=both) as progress:
        yield from progress.track(items, total=total, description=what)


@contextmanager
def waiting(what: str, seconds: float | None = None) -> Iterator[None]:
    """Show on a terminal that something is at work, and since when; nothing in a file.

    Parameters
    ----------
    what
        What is done.
    seconds
        What it may take; a bar tells how much of that is over.
    """
    if not is_terminal():
        yield
        return
    from rich.console import Console, RenderableType
    from rich.live import Live
    from rich.progress_bar import ProgressBar
    from rich.table import Table

    began = time.monotonic()

    def picture() -> RenderableType:
        elapsed = time.monotonic() - began
        line = Table.grid(padding=(0, 1), expand=True)
        line.add_column(no_wrap=True)
        line.add_column(ratio=1)
        line.add_column(no_wrap=True)
        limit = "" if seconds is None else f" of at most {duration(seconds)}"
        # without a limit the bar moves to and fro
        line.add_row(what, ProgressBar(total=seconds, completed=elapsed), f"{duration(elapsed)}{limit}")
        return line

    both = sys.stdout.isatty()
    with Live(console=Console(stderr=True), get_renderable=picture, transient=True, redirect_stdout=both):
        yield
