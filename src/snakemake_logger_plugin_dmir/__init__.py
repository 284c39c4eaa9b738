"""What a run of the workflow says on the terminal: a bar, a line a finished stage, failures with the end of their log.

Snakemake finds this package by its name; ``logger: dmir`` in a profile (or ``--logger dmir``) chooses it. Everything
that Snakemake itself would say stands in ``.snakemake/log/`` as ever, and on the terminal too with ``DMIR_VERBOSE=1``,
in a dry run, and with Snakemake's own ``--verbose``, ``--debug-dag`` and ``--quiet``.
"""

from __future__ import annotations

import logging
import os
import sys
import traceback
from pathlib import Path
from typing import TYPE_CHECKING, Any

from snakemake.logging import ColorizingTextHandler, DefaultFilter, DefaultFormatter
from snakemake_interface_logger_plugins.base import LogHandlerBase
from snakemake_interface_logger_plugins.common import LogEvent

from snakemake_logger_plugin_dmir.progress import Job, Progress, stages_of
from snakemake_logger_plugin_dmir.screen import Screen

if TYPE_CHECKING:
    from snakemake_interface_logger_plugins.settings import OutputSettingsLoggerInterface

LAST_LINES = 12  # of a failed job's log
# what Snakemake says of itself: it stands in the full log
NOISE = (
    "Assuming unrestricted shared filesystem",
    "Building DAG of jobs",
    "Conda environments: ignored",
    "Elapsed time: ",
    "Execute ",
    "Group jobs: inactive",
    "Job ",
    "Removing output files of failed job",
    "Removing temporary output",
    "Retrieving input from storage",
    "Select jobs to execute",
    "Singularity containers: ignored",
    "Storing output in storage",
    "Touching output file",
    "Using shell:",
    "host: ",
)
# what the lines about the failures have said already
SAID = ("Exiting because a job execution failed", "At least one job did not complete successfully")


class LogHandler(LogHandlerBase):
    """Snakemake's events, in few lines."""

    def __post_init__(self) -> None:
        settings = self.common_settings
        self.whole = _whole(settings) if wants_everything(settings) else None
        self.screen = Screen(sys.stdout if settings.stdout else sys.stderr)
        self.progress: Progress | None = None
        self.stages: dict[str, str] = {}
        self.kept = ""  # an error that may be no more than that of a job whose log says it better
        self.failures: set[tuple[int, float]] = set()
        self.handlers = {
            LogEvent.WORKFLOW_STARTED: self._workflow_started,
            LogEvent.RUN_INFO: self._planned,
            LogEvent.JOB_INFO: self._job_begins,
            LogEvent.JOB_FINISHED: self._job_ends,
            LogEvent.JOB_ERROR: self._job_fails,
            LogEvent.GROUP_ERROR: self._group_fails,
            LogEvent.ERROR: self._error,
            None: self._message,
        }

    def emit(self, record: logging.LogRecord) -> None:
        """Tell one event, or leave it to the full log."""
        if self.whole is not None:
            self.whole.handle(record)
            return
        handler = self.handlers.get(getattr(record, "event", None))
        try:
            if handler is not None:
                handler(record)
        except Exception:  # the run goes on, whatever becomes of what is said about it
            self.screen.say(traceback.format_exc())

    def close(self) -> None:
        """Take the bar away and tell how it ended."""
        if self.whole is None:
            self.screen.stop()
            self._say_kept()
            if self.progress is not None:
                for line in self.progress.summary():
                    self.screen.say(line)
                self.progress = None
        super().close()

    def _workflow_started(self, record: Any) -> None:
        self.stages = stages_of(Path(getattr(record, "basedir", "") or "."))

    def _planned(self, record: Any) -> None:
        counts = {rule: count for rule, count in record.stats.items() if rule != "total"}
        self.progress = Progress(counts, self.stages)
        self.screen.say(self.progress.announcement())
        self.screen.start(self.progress)

    def _job_begins(self, record: Any) -> None:
        if self.progress is not None:
            words = [str(value) for value in dict(record.wildcards or {}).values()]
            job = Job(record.rule_name, " ".join([record.rule_name.replace("_", " "), *words]))
            self.progress.begin(record.jobid, job)
            self.screen.changed()

    def _job_ends(self, record: Any) -> None:
        if self.progress is not None:
            for line in self.progress.end(record.job_id):
                self.screen.say(line)
            self.screen.changed()
            if self.progress.done.total() == self.progress.total:
                self.screen.stop()

    def _job_fails(self, record: Any) -> None:
        job, since = (None, 0.0) if self.progress is None else self.progress.fail(record.jobid)
        if (record.jobid, since) in self.failures:  # Snakemake repeats them at its end
            return
        self.failures.add((record.jobid, since))
        lines = [line for path in record.log for line in last_lines(Path(path))]
        if any(lines):
            self.kept = ""
        self._say_kept()
        name = record.rule_name if job is None else job.label
        self.screen.say(f"✗ {name} failed" + (f"; the end of {', '.join(record.log)}:" if any(lines) else "."), "red")
        for line in lines:
            self.screen.say(f"    {line}")
        if not any(lines):
            for line in [*[f"its log is empty: {path}" for path in record.log], *_as_lines(record.aux)]:
                self.screen.say(f"    {line}")

    def _group_fails(self, record: Any) -> None:
        self.screen.say(DefaultFormatter(show_failed_logs=True).format(record), "red")

    def _error(self, record: Any) -> None:
        message = record.getMessage()
        self._say_kept()
        if self.failures and any(words in message for words in SAID):
            return
        if "returned non-zero exit status" in message:
            self.kept = message
        else:
            self.screen.say(message, "red")

    def _message(self, record: logging.LogRecord) -> None:
        text = str(record.msg or "").strip()
        if not text or (record.levelno < logging.WARNING and text.startswith(NOISE)):
            return
        if self.failures and text.startswith(SAID):
            return
        if text.startswith("Complete log(s): "):
            text = f"The full log: {os.path.relpath(text.removeprefix('Complete log(s): '))}"
        self.screen.say(text, "yellow" if record.levelno >= logging.WARNING else "")

    def _say_kept(self) -> None:
        if self.kept:
            self.screen.say(self.kept, "red")
        self.kept = ""

    @property
    def writes_to_stream(self) -> bool:
        """It takes the place of Snakemake's own words."""
        return True

    @property
    def writes_to_file(self) -> bool:
        """Snakemake keeps its log file besides."""
        return False

    @property
    def has_filter(self) -> bool:
        """It chooses by itself what it says."""
        return True

    @property
    def has_formatter(self) -> bool:
        """It finds its own words."""
        return True

    @property
    def needs_rulegraph(self) -> bool:
        """The stages are read from ``rules/``."""
        return False


def wants_everything(settings: OutputSettingsLoggerInterface) -> bool:
    """Tell whether Snakemake shall say what it says without this package."""
    asked = os.environ.get("DMIR_VERBOSE", "") not in ("", "0")
    return bool(asked or settings.dryrun or settings.verbose or settings.debug_dag or settings.quiet)


def _whole(settings: OutputSettingsLoggerInterface) -> logging.Handler:
    handler = ColorizingTextHandler(
        nocolor=settings.nocolor,
        stream=sys.stdout if settings.stdout else sys.stderr,
        formatter=DefaultFormatter(settings.quiet, settings.show_failed_logs),
    )
    handler.addFilter(
        DefaultFilter(settings.quiet, settings.debug_dag, settings.verbose, settings.dryrun, settings.printshellcmds)
    )
    return handler


def last_lines(path: Path) -> list[str]:
    """Return the last lines of a job's log, of at most its last 20 kB; none where there is no log."""
    try:
        with path.open("rb") as file:
            file.seek(max(0, path.stat().st_size - 20_000))
            text = file.read().decode(errors="replace")
    except OSError:
        return []
    return text.rstrip().splitlines()[-LAST_LINES:]


def _as_lines(facts: dict[str, Any]) -> list[str]:
    return [f"{name}: {value}" for name, value in facts.items()]
