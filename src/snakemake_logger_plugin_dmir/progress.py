"""How far a run is: its jobs by stage, what runs now, and how long the rest will take."""

from __future__ import annotations

import re
import time
from collections import Counter, defaultdict
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path

from dmir.terminal import duration

# What a job of a stage takes, relative to others, until one of its rule has ended. Only the proportions count.
WEIGHTS = {"cohort": 5, "preprocess": 11, "train": 60, "register": 8, "evaluate": 5, "report": 2}
RULE = re.compile(r"^(?:rule\s+(\w+)\s*:|use rule \w+ as (\w+))", re.MULTILINE)
# one of many that a loop makes: what their names begin with, if that is the same
LOOP = re.compile(r"^\s+rule\s*:\s+name:\s+(?:f\"(\w+))?", re.MULTILINE)


def stages_of(folder: Path) -> dict[str, str]:
    """Return rule -> stage: the name of the file in ``rules/`` that holds it, ``""`` for those of the Snakefile.

    Rules that a loop makes stand there as ``"make_scans_*"`` or, where their names have nothing in common, ``"*"``.
    """
    found = {}
    for path in [folder / "Snakefile", *sorted((folder / "rules").glob("*.smk"))]:
        if path.is_file():
            text = path.read_text(encoding="utf-8", errors="replace")
            stage = "" if path.name == "Snakefile" else path.stem
            found.update({one or other: stage for one, other in RULE.findall(text)})
            found.update({f"{first}*": stage for first in LOOP.findall(text)})
    return found


def stage_of(rule: str, stages: Mapping[str, str]) -> str:
    """Return the stage of a rule among those of :func:`stages_of`, ``""`` for an unknown one."""
    loops = [name for name in stages if name.endswith("*") and rule.startswith(name[:-1])]
    return stages.get(rule, stages[max(loops, key=len)] if loops else "")


@dataclass(frozen=True)
class Job:
    """A job that runs.

    Attributes
    ----------
    rule, label
        The rule, and what a person calls the job.
    since
        When it began, in seconds of the progress's clock.
    """

    rule: str
    label: str
    since: float = 0.0


class Progress:
    """The jobs of a run.

    Parameters
    ----------
    counts
        Rule -> number of jobs.
    stages
        Rule -> stage; a rule without one counts, and no line tells of it.
    clock
        Seconds from any moment.
    """

    def __init__(
        self, counts: Mapping[str, int], stages: Mapping[str, str], clock: Callable[[], float] = time.monotonic
    ) -> None:
        self.clock = clock
        self.began = clock()
        self.counts = dict(counts)
        self.stages = dict(stages)
        self.running: dict[int, Job] = {}
        self.done: Counter[str] = Counter()
        self.failed: dict[int, str] = {}  # job -> rule
        self.seconds: defaultdict[str, list[float]] = defaultdict(list)  # rule -> of each job that has ended
        self.first: dict[str, float] = {}  # stage -> when its first job began
        self.total = sum(self.counts.values())
        self.planned: Counter[str] = Counter()
        for rule, count in self.counts.items():
            self.planned[self.stage(rule)] += count

    def stage(self, rule: str) -> str:
        """Return the stage of a rule; ``""`` for those that only collect, of which no line tells."""
        return stage_of(rule, self.stages)

    def begin(self, number: int, job: Job) -> None:
        """Note that a job has begun, or was submitted."""
        now = self.clock()
        self.failed.pop(number, None)  # it is tried again
        self.running[number] = Job(job.rule, job.label, now)
        self.first.setdefault(self.stage(job.rule), now)

    def end(self, number: int) -> list[str]:
        """Note that a job has ended well; return what is to be told, a line where it was the last of its stage."""
        job = self.running.pop(number, None)
        if job is None:
            return []
        now = self.clock()
        self.done[job.rule] += 1
        self.seconds[job.rule].append(now - job.since)
        stage = self.stage(job.rule)
        if not stage or self.done_of(stage) < self.planned[stage]:
            return []
        jobs = "1 job" if self.planned[stage] == 1 else f"{self.planned[stage]} jobs"
        return [f"✓ {stage}: {jobs} in {duration(now - self.first[stage])}"]

    def fail(self, number: int) -> tuple[Job | None, float]:
        """Note that a job has failed; return it and when it had begun."""
        job = self.running.pop(number, None)
        if job is None:
            return None, -1.0
        self.failed[number] = job.rule
        return job, job.since

    def done_of(self, stage: str) -> int:
        """Return how many jobs of a stage are done."""
        return sum(count for rule, count in self.done.items() if self.stage(rule) == stage)

    def announcement(self) -> str:
        """Return what will be done, in one line."""
        stages = ", ".join(f"{stage} {count}" for stage, count in self._in_order() if stage)
        return f"{self.total} jobs" + (f": {stages}" if stages else "")

    def _in_order(self) -> list[tuple[str, int]]:
        """The stages as data flows, and those of other names after them."""
        order = [*WEIGHTS]
        return sorted(self.planned.items(), key=lambda item: order.index(item[0]) if item[0] in order else len(order))

    def left(self) -> float | None:
        """Return the seconds that the rest will take, None as long as nothing has ended that tells of it."""
        ended = [(rule, seconds) for rule, times in self.seconds.items() for seconds in times]
        elapsed = self.clock() - self.began
        weighed = sum(self._weight(rule) for rule, _ in ended)
        if weighed <= 0 or elapsed <= 0:
            return None
        scale = sum(seconds for _, seconds in ended) / weighed
        now = self.clock()
        work = 0.0
        rest = Counter(self.counts) - self.done - Counter(self.failed.values())
        for job in self.running.values():
            rest[job.rule] -= 1
            work += max(self._expected(job.rule, scale) - (now - job.since), 0.1 * (now - job.since))
        work += sum(count * self._expected(rule, scale) for rule, count in rest.items() if count > 0)
        busy = sum(seconds for _, seconds in ended) + sum(now - job.since for job in self.running.values())
        return work / max(1.0, busy / elapsed)

    def _weight(self, rule: str) -> float:
        return WEIGHTS.get(self.stage(rule), 0)

    def _expected(self, rule: str, scale: float) -> float:
        known = self.seconds.get(rule)
        return sum(known) / len(known) if known else scale * self._weight(rule)

    def state(self) -> str:
        """Return the jobs done and the time left, short."""
        done = self.done.total()
        left = self.left()
        parts = [f"{done} of {self.total} jobs"]
        if self.failed:
            parts.append(f"{len(self.failed)} failed")
        if left is not None and done < self.total:
            parts.append(f"about {duration(left)} left" if left >= 10 else "seconds left")
        return ", ".join(parts)

    def now(self) -> str:
        """Return what runs now, the longest-running first."""
        jobs = sorted(self.running.values(), key=lambda job: job.since)
        return "; ".join(f"{job.label} ({duration(self.clock() - job.since)})" for job in jobs)

    def summary(self) -> list[str]:
        """Return what is to be told at the end."""
        took = duration(self.clock() - self.began)
        done = self.done.total()
        if done == self.total:
            return [f"All {self.total} jobs done in {took}."]
        lines = []
        for stage, planned in self._in_order():
            if stage and 0 < planned > self.done_of(stage):
                lines.append(f"- {stage}: {self.done_of(stage)} of {planned} jobs done")
        failed = f", {len(self.failed)} failed" if self.failed else ""
        return [*lines, f"{done} of {self.total} jobs done{failed}, after {took}. The same command goes on from here."]
