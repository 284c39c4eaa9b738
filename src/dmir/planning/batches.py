"""Batches: which scans one job makes, and another one preprocesses.

A scan takes seconds, and so does the start of a process that has all its libraries. The size of a batch depends on what
would preprocess its scans anew anyway, and on nothing else.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass

from dmir.config import Config
from dmir.planning.costs import STARTUP, preprocessing_seconds
from dmir.planning.jobs import CohortSize

BATCH = 20 * STARTUP
"""Seconds that a job of scans takes at least, where there are so many: what is lost with it, if it is killed."""


@dataclass(frozen=True)
class Batch:
    """Some scans of a cohort.

    Attributes
    ----------
    cohort, name
        The name is the split and a number, or ``"reference"``.
    scans
        Their names.
    """

    cohort: str
    name: str
    scans: tuple[str, ...]


def scans_per_batch(configuration: Config, cohort: str) -> int:
    """Return the number of scans from which a job is not short: ``scans_per_job``, or else computed."""
    if configuration.scans_per_job is not None:
        return configuration.scans_per_job
    return math.ceil(BATCH / preprocessing_seconds(configuration, cohort))


def batches_of(configuration: Config, cohort: str, splits: Mapping[str, str], reference: str) -> list[Batch]:
    """Return the batches of a cohort.

    The scan that all others wait for is one by itself. The others are divided in their order and split by split: a test
    scan that is added makes another batch of test scans, and nothing that a training has seen is touched.

    Parameters
    ----------
    configuration, cohort
        A checked one, and the cohort's name.
    splits
        Scan -> split.
    reference
        The scan that the others are aligned to.
    """
    members: dict[str, list[str]] = {}
    for scan, split in splits.items():
        if scan != reference:
            members.setdefault(split, []).append(scan)
    size = scans_per_batch(configuration, cohort)
    return [
        Batch(cohort, "reference", (reference,)),
        *(
            Batch(cohort, f"{split}{first // size:03d}", tuple(scans[first : first + size]))
            for split, scans in members.items()
            for first in range(0, len(scans), size)
        ),
    ]


def count_batches(configuration: Config, cohort: str, size: CohortSize) -> int:
    """Return how many batches a cohort of that size has, whichever of its scans is the reference."""
    if not size.total:
        return 0
    per_batch = scans_per_batch(configuration, cohort)
    others = {**size.scans, "atlas": size.scans.get("atlas", 0) - 1}
    return 1 + sum(math.ceil(scans / per_batch) for scans in others.values())
