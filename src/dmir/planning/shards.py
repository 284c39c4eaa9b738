"""Shards: which pairs one job registers, and another one scores.

The size of a shard depends on what would register its pairs anew anyway (the grid, the method's own settings, the pairs
themselves) and on nothing else: neither on the machine nor on how much disk there is.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from itertools import accumulate

from dmir.config import Config
from dmir.planning.costs import STARTUP, field_bytes, registration_seconds, scoring_seconds

Pair = tuple[str, str]
REGISTRATION = 50 * STARTUP
"""Seconds that a registration job takes at least, where there are so many pairs: its start is a fiftieth of it."""
SCORING = STARTUP
"""Seconds that a scoring job takes at least, which reads the fields of one shard."""
MOST_FIELDS = 4 * 10**9
"""Bytes of one shard's fields: they lie on the disk until all of them are scored, for every job that runs at once."""
MOST_SHARDS = 1000
"""Of one method and cohort: a workflow of more jobs takes minutes to be put in order."""


def pairs_per_shard(configuration: Config, method: str) -> int:
    """Return the number of pairs from which neither a registration job nor a scoring job is short.

    A pair that takes long gets a job of its own, or as many as scoring needs to be longer than its start.
    """
    to_register = REGISTRATION / registration_seconds(configuration, method)
    to_score = SCORING / scoring_seconds(configuration)
    return math.ceil(max(to_register, to_score))


def shard_sizes(configuration: Config, method: str, pairs: int) -> list[int]:
    """Return the number of pairs in each shard of a method and cohort: ``pairs_per_job``, or else computed.

    Computed ones have the size of :func:`pairs_per_shard` or a little more, so that none is shorter than it should be,
    but their fields take no more than :data:`MOST_FIELDS`. Few pairs are one shard, and no cohort has more than
    :data:`MOST_SHARDS`.
    """
    size = configuration.pairs_per_job
    if size is not None:
        return [min(size, pairs - first) for first in range(0, pairs, size)]
    fewest = math.ceil(pairs / max(1, MOST_FIELDS // field_bytes(configuration)))
    count = min(pairs, MOST_SHARDS, max(fewest, pairs // pairs_per_shard(configuration, method)))
    return [pairs * (k + 1) // count - pairs * k // count for k in range(count)]


def by_scan(pairs: Sequence[Pair]) -> list[Pair]:
    """Return pairs with those of one scan together, so that a shard reads few files: atlas after atlas they are not."""
    moving, fixed = ({pair[end]: None for pair in pairs} for end in (0, 1))
    end, scans = (0, moving) if len(moving) >= len(fixed) else (1, fixed)
    place = {scan: number for number, scan in enumerate(scans)}
    return sorted(pairs, key=lambda pair: place[pair[end]])


def shard_names(count: int) -> list[str]:
    """Return the names of shards, which sort as they stand."""
    digits = max(3, len(str(count - 1)))
    return [f"shard{number:0{digits}d}" for number in range(count)]


def shards_of(configuration: Config, method: str, pairs: Sequence[Pair]) -> dict[str, list[Pair]]:
    """Return the pairs (moving, fixed) of a cohort by shard; the names sort as the shards do."""
    ordered = by_scan(pairs)
    sizes = shard_sizes(configuration, method, len(pairs))
    ends = list(accumulate(sizes))
    return {
        name: ordered[end - size : end] for name, size, end in zip(shard_names(len(sizes)), sizes, ends, strict=True)
    }
