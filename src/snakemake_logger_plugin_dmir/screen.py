"""Where it is said: a bar below the lines on a terminal, lines alone in a file."""

from __future__ import annotations

import sys
import time
from typing import TYPE_CHECKING, TextIO

from dmir.terminal import is_terminal

if TYPE_CHECKING:
    from rich.console import RenderableType
    from rich.live import Live

    from snakemake_logger_plugin_dmir.progress import Progress

PARTS = 10  # of the jobs: a line in a file each
SILENCE = 600.0  # seconds after which a file is told that something still runs
SOON = 5.0  # seconds between two lines about how far it is, at least


class Screen:
    """What is said about a run.

    Parameters
    ----------
    stream
        Standard error, as a rule.
    """

    def __init__(self, stream: TextIO) -> None:
        self.stream = stream
        self.live: Live | None = None
        self.progress: Progress | None = None
        self.told, self.when = 0, time.monotonic()

    def start(self, progress: Progress) -> None:
        """Show how far it is, from now on."""
        self.progress = progress
        if is_terminal(self.stream) and self.live is None:
            from rich.console import Console
            from rich.live import Live

            console = Console(file=self.stream)
            self.live = Live(
                console=console,
                get_renderable=self._picture,
                transient=True,
                refresh_per_second=2,
                redirect_stdout=sys.stdout.isatty(),  # what is printed into a file goes there
            )
            self.live.start()

    def stop(self) -> None:
        """Take the bar away."""
        if self.live is not None:
            self.live.stop()
            self.live = None
        self.progress = None

    def say(self, text: str, colour: str = "") -> None:
        """Say a line, above the bar if there is one."""
        if self.live is not None:
            from rich.text import Text

            self.live.console.print(Text(text, style=colour), soft_wrap=True)
        else:
            print(text, file=self.stream, flush=True)
        self.when = time.monotonic()

    def changed(self) -> None:
        """Tell a file how far it is: at each tenth of the jobs, and once in a while. The bar looks by itself."""
        if self.live is not None or self.progress is None:
            return
        done, total = self.progress.done.total(), self.progress.total
        part = PARTS * done // max(1, total)
        silent = time.monotonic() - self.when
        if (part > self.told and silent > SOON and done < total) or silent > SILENCE:
            self.told = part
            now = self.progress.now()
            self.say((self.progress.state() + (f"; now {now}" if now else ""))[:160])

    def _picture(self) -> RenderableType:
        """Draw two lines, no wider than the terminal: the bar with its numbers, and what runs now."""
        from rich.console import Group
        from rich.progress_bar import ProgressBar
        from rich.table import Table
        from rich.text import Text

        if self.progress is None:
            return Text("")
        line = Table.grid(padding=(0, 1), expand=True)
        line.add_column(ratio=1)
        line.add_column(no_wrap=True)
        done = self.progress.done.total()
        line.add_row(ProgressBar(total=max(1, self.progress.total), completed=done), self.progress.state())
        running = self.progress.now()
        return Group(line, Text(f"now: {running}" if running else "", style="dim", no_wrap=True, overflow="ellipsis"))
