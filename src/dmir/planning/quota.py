"""The disk that a configuration takes: what stays, what peaks, and how a quota keeps the peak under it.

Displacement fields lie on the disk from their registration until all that reads them is done. How much that is at once
no resource of Snakemake can bound, because a resource is free again when a job ends. So registrations wait for one
another: each is given a place in a *lane*, and starts when the fields before it in its lane are gone. As many fields
can be there at once as there are lanes, on one machine and on a cluster.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field

from dmir.config import Config
from dmir.errors import InputError
from dmir.planning.costs import field_bytes, registration_seconds, scoring_seconds, voxels_of
from dmir.planning.jobs import CohortSize
from dmir.planning.shards import shard_names, shard_sizes
from dmir.structures import load_structures

# what stays, in bytes
PREPROCESSED_VOXEL = 6  # image float32, label map int16
TRUTH_VOXEL = 12
MADE_VOXELS, MADE_VOXEL = 8_600_000, 7  # of a scan that a job makes, 1 mm: image float32, label map int16, mask
PACKED_VOXEL = {"uint8": 1 + 2, "float16": 2 + 2, "float32": 4 + 2}  # image, label map
MODEL = 10**9  # the weights, and while it is trained the state from which it would go on: three times as much
SCORE_ROW, PAIR_ROW = 400, 2000  # of a structure and of a pair, in the shard's table and in all, parquet and csv
REST = 10**8  # logs, tables, figures, the report


@dataclass(frozen=True)
class FieldShard:
    """The fields of one shard.

    Attributes
    ----------
    run
        ``cohort/method/model/shard``.
    method
        Whose they are.
    size
        Bytes, uncompressed.
    seconds
        That registering and scoring take, about.
    """

    run: str
    method: str
    size: int
    seconds: float


@dataclass(frozen=True)
class Lanes:
    """Shards that wait for one another: shard k of a group waits for shard k - ``width`` of it.

    Attributes
    ----------
    groups
        Shards by group: a method's, or all under "" where there is not room enough for every method at once.
    widths
        Lanes of each group: so many of its shards have fields at once.
    """

    groups: dict[str, list[FieldShard]]
    widths: dict[str, int]
    waits: dict[str, str] = field(default_factory=dict)

    def peak(self) -> int:
        """Return the bytes of fields that can be there at once."""
        return sum(
            self.widths[name] * max(shard.size for shard in members) for name, members in self.groups.items() if members
        )


def field_shards(configuration: Config, methods: Iterable[str], sizes: Mapping[str, CohortSize]) -> list[FieldShard]:
    """Return the shards of methods in the order in which they are registered: method, model, cohort."""
    found = []
    scoring, one = scoring_seconds(configuration), field_bytes(configuration)
    for method in methods:
        registering = registration_seconds(configuration, method)
        for model in configuration.models_of(method):
            for cohort in configuration.test_on:
                counts = shard_sizes(configuration, method, sizes[cohort].pairs)
                ways = sizes[cohort].ways
                found += [
                    FieldShard(
                        f"{cohort}/{method}/{model}/{shard}",
                        method,
                        count * ways * one,
                        count * (ways * registering + scoring),
                    )
                    for shard, count in zip(shard_names(len(counts)), counts, strict=True)
                ]
    return found


def staying_bytes(configuration: Config, sizes: Mapping[str, CohortSize]) -> dict[str, int]:
    """Return what is written once and stays, before compression: what -> bytes."""
    voxels = voxels_of(configuration.grid.shape)
    made = [size for name, size in sizes.items() if configuration.cohorts[name].MADE is not None]
    simulated = [size for name, size in sizes.items() if configuration.cohorts[name].source == "simulated"]
    truths = sum(size.total for size in simulated)
    models = sum(len(configuration.seeds_of(name)) for name in configuration.networks())
    scores = SCORE_ROW * score_rows(configuration, sizes) + PAIR_ROW * _scored_pairs(configuration, sizes)
    fields = sum(shard.size for shard in field_shards(configuration, configuration.methods, sizes))
    found = {
        "scans made": sum(size.total for size in made) * MADE_VOXELS * MADE_VOXEL + truths * MADE_VOXELS * TRUTH_VOXEL,
        "preprocessed scans": sum(size.total for size in sizes.values()) * voxels * PREPROCESSED_VOXEL
        + truths * voxels * TRUTH_VOXEL,
        "images that the trainings share": sizes[configuration.train_on].for_training
        * voxels
        * PACKED_VOXEL[configuration.packed]
        * bool(models),
        "models": models * MODEL,
        "scores": scores,
        "logs, tables, figures": REST,
        "fields, kept": fields if configuration.keep_fields else 0,
    }
    return {what: size for what, size in found.items() if size}


def score_rows(configuration: Config, sizes: Mapping[str, CohortSize]) -> int:
    """Return the rows of the table of scores: one a structure, pair, model and interpolation."""
    structures = {name: len(load_structures(configuration.cohorts[name].structures).ids) for name in sizes}
    rows = sum(sizes[name].pairs * structures[name] for name in configuration.test_on)
    return registering_models(configuration) * rows * len(configuration.scores.label_interpolation)


def _scored_pairs(configuration: Config, sizes: Mapping[str, CohortSize]) -> int:
    return registering_models(configuration) * sum(sizes[name].pairs for name in configuration.test_on)


def registering_models(configuration: Config) -> int:
    """Return how many models register each pair, a classical method counted as one."""
    return sum(len(configuration.models_of(method)) for method in configuration.methods)


def room_for_fields(configuration: Config, sizes: Mapping[str, CohortSize]) -> int | None:
    """Return the bytes of fields that may be there at once; None where nothing bounds them.

    Raises
    ------
    InputError
        ``disk_quota_gb`` does not even hold what stays, and the fields of one shard.
    """
    if configuration.disk_quota_gb is None:
        return None
    staying = staying_bytes(configuration, sizes)
    shards = field_shards(configuration, configuration.methods, sizes)
    largest = 0 if configuration.keep_fields else max((shard.size for shard in shards), default=0)
    needed = sum(staying.values()) + largest
    room = int(configuration.disk_quota_gb * 1e9) - sum(staying.values())
    if room < largest:
        parts = [*(f"{what} {_gb(size)}" for what, size in staying.items()), f"fields of one shard {_gb(largest)}"]
        raise InputError(
            "disk_quota_gb",
            found=f"{configuration.disk_quota_gb:g}",
            expected=f"at least {math.ceil(needed / 1e7) / 100:.2f} GB ({', '.join(parts if largest else parts[:-1])})",
            remedy="Raise it, set results to a larger disk, set pairs_per_job lower, or test on less"
            + ("; keep_fields: false keeps no field." if configuration.keep_fields else "."),
        )
    return None if configuration.keep_fields else room


def lanes(shards: Sequence[FieldShard], room: int) -> Lanes:
    """Divide the room for fields into lanes.

    Every method has lanes of its own, as long as there is room for one of each: then a slow method holds up no other
    one. The others go to the method whose lanes take longest. Where there is less room, all methods take turns.

    Parameters
    ----------
    room
        Bytes; at least the largest shard's.
    """
    groups: dict[str, list[FieldShard]] = {}
    for shard in shards:
        groups.setdefault(shard.method, []).append(shard)
    largest = {name: max(shard.size for shard in members) for name, members in groups.items()}
    if sum(largest.values()) > room:
        return _waiting({"": list(shards)}, {"": room // max(largest.values())})
    seconds = {name: sum(shard.seconds for shard in members) for name, members in groups.items()}
    widths, left = dict.fromkeys(groups, 1), room - sum(largest.values())
    while more := [name for name in groups if widths[name] < len(groups[name]) and largest[name] <= left]:
        longest = max(more, key=lambda name: seconds[name] / widths[name])
        widths[longest] += 1
        left -= largest[longest]
    return _waiting(groups, widths)


def lanes_of_study(main: Lanes, shards: Sequence[FieldShard], methods: Iterable[str], room: int) -> Lanes:
    """Return the lanes of a study's own shards.

    A method that the study shares with the comparison is registered in the comparison's lanes; the study's own shards
    then come after it in these. A study that shares none has all the room.

    Parameters
    ----------
    main
        Lanes of the comparison.
    shards
        Of the methods that only the study has.
    methods
        All methods of the study.
    """
    shared = [name for name in methods if name in main.groups or any(s.method == name for s in main.groups.get("", []))]
    if not shared:
        return lanes(shards, room)
    group = "" if "" in main.groups else shared[0]
    width = main.widths[group]  # shards of networks are of one size
    return _waiting({group: [*main.groups[group][-width:], *shards]}, {group: width})


def _waiting(groups: dict[str, list[FieldShard]], widths: dict[str, int]) -> Lanes:
    waits = {
        members[place].run: members[place - widths[name]].run
        for name, members in groups.items()
        for place in range(widths[name], len(members))
    }
    return Lanes(groups, widths, waits)


def disk_parts(configuration: Config, sizes: Mapping[str, CohortSize], jobs: int = 8) -> dict[str, float]:
    """Return what stays on the disk and what fields come on top of it at their peak, 10^9 bytes, before compression.

    Parameters
    ----------
    jobs
        That run at once, of the three answers the second: fields are there from a registration's start to their
        scoring's end, and scoring goes before registering.
    """
    parts = {f"stays: {what}": size for what, size in staying_bytes(configuration, sizes).items()}
    parts["stays in all"] = sum(parts.values())
    if not configuration.keep_fields:
        shards = field_shards(configuration, configuration.methods, sizes)
        largest = sorted((shard.size for shard in shards), reverse=True)
        parts["fields on top while pairs are registered, all jobs at once (a cluster)"] = sum(largest)
        parts[f"with {jobs} jobs at once, at most"] = sum(largest[:jobs])
        room = room_for_fields(configuration, sizes)
        if room is not None:
            parts["under the quota, at most"] = lanes(shards, room).peak()
    return {what: size / 1e9 for what, size in parts.items()}


def _gb(size: int) -> str:
    return f"{size / 1e9:.3g} GB"
