"""What jobs ask for, where it is not one number: what grows with the attempt, the pairs, the cards."""

from __future__ import annotations

from collections.abc import Callable
from functools import cache, cached_property, partial
from math import ceil

from dmir.planning.costs import registration_memory_mb
from dmir.workflow.facts import Wildcards
from dmir.workflow.parameters import Parameters

MOST_TRAINING_THREADS = 8


def growing(amount: int) -> Callable[[Wildcards, int], int]:
    """Return a resource that grows with each attempt: a job killed for want of it gets more the next time."""

    def of_attempt(wildcards: Wildcards, attempt: int) -> int:
        return amount * attempt

    return of_attempt


class Resources(Parameters):
    """Threads, cards and minutes of the jobs."""

    def method_threads(self, wildcards: Wildcards) -> int:
        """Return the threads of a classical method: one, unless its result depends on them and so they are its own."""
        return getattr(self.method(wildcards.method), "threads", 1)

    def training_gpus(self, wildcards: Wildcards) -> int:
        """Return the cards that share a training."""
        return self.settings_as_json(wildcards.method)["training"]["gpus"]

    def training_threads(self, cores: int | None) -> int:
        """Share the cores among the trainings that can run at once; on a cluster nobody knows how many there are."""
        trainings = max(1, len(self.runs(self.networks)))
        return max(1, min(MOST_TRAINING_THREADS, (cores or MOST_TRAINING_THREADS) // trainings))

    def scoring_memory(self, wildcards: Wildcards, attempt: int) -> int:
        """Return the memory of scoring a shard, one pair at a time: more where pairs are kept to be drawn."""
        kept = bool(self.examples_of_shard(wildcards))
        return attempt * (1500 + self.voxels // 2500 if kept else 1000 + self.voxels // 6000)

    def classical_memory(self, wildcards: Wildcards, attempt: int) -> int:
        """Return the memory of a shard of a method without weights: more each attempt."""
        return attempt * self.registration_memory(wildcards.method)

    @cached_property
    def registration_memory(self) -> Callable[[str], int]:
        """Method -> MB, found once for its hundreds of jobs."""
        return cache(partial(registration_memory_mb, self.configuration))

    def classical_runtime(self, wildcards: Wildcards, attempt: int) -> int:
        """Return the minutes of a shard: as long as every pair may take, and longer each attempt."""
        minutes = 60 + len(self.registered_pairs(wildcards)) * self.configuration.timeout_minutes
        return attempt * ceil(minutes)
