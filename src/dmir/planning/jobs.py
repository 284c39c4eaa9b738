"""What a configuration makes a pipeline do: how many scans, trainings, pairs and jobs. Nothing is computed."""

from __future__ import annotations

import re
from dataclasses import dataclass
from pathlib import Path

import pandas as pd

from dmir.cohorts import scan_table
from dmir.cohorts.pairs import registration_pairs
from dmir.cohorts.splits import published_or_path, read_rows
from dmir.config import Config
from dmir.errors import InputError


@dataclass(frozen=True)
class CohortSize:
    """How much there is of a cohort.

    Attributes
    ----------
    scans
        Number by split: train, val, test, atlas.
    pairs
        That are compared; 0 where the cohort is only trained on.
    registrations
        Of a method on them: twice as many where each pair is registered the other way round too.
    known_from
        ``"data"``; ``"split"``: the data are not there, the split's file says how many there will be; ``"nothing"``.
    problem
        Why the data could not be listed.
    """

    scans: dict[str, int]
    pairs: int
    registrations: int
    known_from: str
    problem: str = ""

    @property
    def total(self) -> int:
        """All scans."""
        return sum(self.scans.values())

    @property
    def for_training(self) -> int:
        """The scans that a training holds in memory."""
        return self.total - self.scans.get("test", 0)

    @property
    def ways(self) -> int:
        """How often each pair is registered: 2 where it is the other way round too."""
        return self.registrations // self.pairs if self.pairs else 1


def used_cohorts(configuration: Config) -> list[str]:
    """Return the cohorts that something is done with."""
    return list(dict.fromkeys([configuration.train_on, *configuration.test_on]))


def cohort_size(configuration: Config, name: str) -> CohortSize:
    """Count the scans and pairs of a cohort, from its files or, without them, from its split."""
    parameters, problem = configuration.scan_parameters(name), ""
    try:
        table, known_from = scan_table(**parameters), "data"
    except InputError as error:
        problem = str(error)
        planned, known_from = _planned_table(parameters["split"]), "split"
        if planned is None:
            return CohortSize({}, 0, 0, "nothing", problem)
        table = planned
    pairs = _pairs(table, parameters["pairs"]) if name in configuration.test_on else 0
    return size_of_table(configuration, name, table, pairs, known_from, problem)


def size_of_table(
    configuration: Config, name: str, table: pd.DataFrame, pairs: int, known_from: str = "data", problem: str = ""
) -> CohortSize:
    """Count the scans of a cohort whose table and number of pairs are known."""
    scans = {str(split): int(count) for split, count in table["split"].value_counts(sort=False).items()}
    both_ways = configuration.scores.inverse_consistency and configuration.cohorts[name].source == "simulated"
    return CohortSize(scans, pairs, 2 * pairs if both_ways else pairs, known_from, problem)


def _planned_table(split: str | Path | None) -> pd.DataFrame | None:
    """Return the scans that a split names, without any files; places stand for names."""
    if split is None:
        return None
    try:
        rows = read_rows(published_or_path(split, "split"), (("scan", "split"), ("position", "split")))
    except InputError:
        return None
    if "position" not in rows.columns:
        return rows
    found = []
    for entry, kind in rows.itertuples(index=False):
        match = re.fullmatch(r"(\d+)(?:-(\d+))?", entry)
        if match is None:
            return None
        found += [(str(place), kind) for place in range(int(match[1]), int(match[2] or match[1]) + 1)]
    return pd.DataFrame(found, columns=["scan", "split"])


def _pairs(table: pd.DataFrame, protocol: str | Path) -> int:
    try:
        return len(registration_pairs(table, protocol))
    except InputError:  # a list of pairs names scans, and a split by places does not
        return len(read_rows(published_or_path(protocol, "pairs"), (("moving", "fixed"),)))
