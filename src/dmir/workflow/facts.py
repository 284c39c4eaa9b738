"""What every stage knows: the configuration, the scans, the pairs and their shards."""

from __future__ import annotations

import re
from collections.abc import Hashable, Iterable, Mapping
from functools import cache, cached_property
from typing import Any, Protocol

from dmir.cohorts import check_pairs, check_unseen, reference_scan, scan_table
from dmir.cohorts.pairs import registration_pairs
from dmir.config import Config
from dmir.config.studies import STUDIES
from dmir.planning import quota, shards
from dmir.planning.batches import Batch, batches_of
from dmir.planning.costs import voxels_of
from dmir.planning.jobs import size_of_table, used_cohorts
from dmir.planning.shards import Pair
from dmir.workflow.paths import Paths

FOR_TRAINING = ("train", "val", "atlas")  # the splits that a training sees
SCAN_NAME = r"[A-Za-z0-9][A-Za-z0-9._-]*"
Row = dict[Hashable, Any]  # of a table of scans: column -> text


class Wildcards(Protocol):
    """What a job's name says of it: ``wildcards.cohort``, ``wildcards.method``, ..., all text."""

    def __getattr__(self, name: str, /) -> str: ...


def study_of(wildcards: Wildcards) -> str | None:
    """Return the study that a job belongs to; None: it belongs to the comparison."""
    return getattr(wildcards, "study", None)


def one_of(names: Iterable[str]) -> str:
    """Return a pattern that matches one of some names; of none, nothing."""
    return "|".join(map(re.escape, names)) or "(?!)"


class Facts:
    """What follows from a configuration and the lists of its scans; no image is read.

    Parameters
    ----------
    configuration
        A checked one.

    Attributes
    ----------
    paths, patterns
        Where results are, and the same for rules.
    cohorts
        The names of those that something is done with.
    simulated, made
        Of these, those that are simulated, and those whose scans a job makes.
    scans
        Cohort -> its table of scans.
    rows
        Cohort -> scan -> its row.
    references
        Cohort -> the scan that the others are aligned to.
    batches
        The scans of all cohorts as jobs make and preprocess them.
    pairs
        Tested cohort -> its pairs (moving, fixed).
    models
        Of a network: one a seed.
    networks
        To train, for the methods that are compared.
    studies
        Study -> its rows.
    method, parameters_of, network_of, models_of
        As the configuration's own, each asked once: there are thousands of jobs.
    settings_as_json
        Method -> its complete settings.
    shards_of
        (cohort, method) -> shard -> its pairs: what one job of a method works through.
    shard_of_pair
        (cohort, method) -> pair -> the shard that holds it.

    Raises
    ------
    InputError
        A cohort cannot be listed, makes no pairs, or tests on what another one trains on, or ``disk_quota_gb`` is too
        small.
    """

    def __init__(self, configuration: Config) -> None:
        self.configuration = configuration
        self.paths, self.patterns = Paths(configuration.results), Paths("<results>")
        self.cohorts = used_cohorts(configuration)
        self.simulated = [name for name in self.cohorts if self.source_of(name) == "simulated"]
        self.made = [name for name in self.cohorts if configuration.cohorts[name].MADE is not None]
        self.networks = configuration.networks()
        self.studies = {name: configuration.variants(name) for name in STUDIES}
        self.method = cache(configuration.method)
        self.parameters_of = cache(configuration.parameters)
        self.network_of = cache(configuration.network_of)
        self.models_of = cache(configuration.models_of)
        self.settings_as_json = cache(self._settings_as_json)
        self.shards_of = cache(self._shards_of)
        self.shard_of_pair = cache(self._shard_of_pair)
        self._list_scans()
        self._measure()

    def _list_scans(self) -> None:
        configuration = self.configuration
        listing = {name: configuration.scan_parameters(name) for name in self.cohorts}
        self.scans = {name: scan_table(**listing[name]) for name in self.cohorts}
        self.rows: dict[str, dict[str, Row]] = {
            name: {row["scan"]: row for row in table.to_dict("records")} for name, table in self.scans.items()
        }
        self.references = {
            name: reference_scan(table, configuration.cohorts[name].reference) for name, table in self.scans.items()
        }
        self.batches = [
            batch
            for name in self.cohorts
            for batch in batches_of(configuration, name, self.splits(name), self.references[name])
        ]
        for name in self.cohorts:
            trained = configuration.trained_pairs() if name == configuration.train_on else []
            tested = name in configuration.test_on
            check_pairs(self.scans[name], listing[name]["pairs"], tested=tested, trained=trained)
        origins = {name: configuration.origin(name) for name in self.cohorts}
        check_unseen(self.scans, origins, configuration.train_on)
        self.pairs = {
            name: registration_pairs(self.scans[name], listing[name]["pairs"]) for name in configuration.test_on
        }

    def _measure(self) -> None:
        """Find how much there will be of everything, and whether it fits under a quota of the disk."""
        configuration = self.configuration
        self.sizes = {
            name: size_of_table(configuration, name, self.scans[name], len(self.pairs.get(name, [])))
            for name in self.cohorts
        }
        self.room_for_fields = quota.room_for_fields(configuration, self.sizes)
        self.score_rows = quota.score_rows(configuration, self.sizes)
        self.voxels = voxels_of(configuration.grid.shape)

    @property
    def batches_made(self) -> list[Batch]:
        """The batches whose scans a job makes."""
        return [batch for batch in self.batches if batch.cohort in self.made]

    @property
    def constraints(self) -> dict[str, str]:
        """Wildcard -> the pattern of what it may be."""
        return {
            # the longest first: in figures' names a cohort called a would else take a part of a_b
            "cohort": one_of(sorted(self.cohorts, key=len, reverse=True)),
            **dict.fromkeys(("scan", "moving", "fixed"), SCAN_NAME),
            "method": one_of(self.configuration.every_method()),
            "study": "|".join(self.studies),
            "model": r"none|seed\d+",
            "shard": r"shard\d+",
        }

    def without_weights(self, *, card: bool) -> list[str]:
        """Return the methods that no training makes: those that take a card where there is one, or the others."""
        names = self.configuration.every_method()
        return [name for name in names if self.network_of(name) is None and self.configuration.takes_card(name) == card]

    def source_of(self, cohort: str) -> str:
        """Return what a cohort's scans come from."""
        return self.configuration.cohorts[cohort].source

    def splits(self, cohort: str) -> dict[str, str]:
        """Return scan -> split of a cohort."""
        return {scan: row["split"] for scan, row in self.rows[cohort].items()}

    def scans_of(self, cohort: str, *splits: str) -> list[str]:
        """Return the names of a cohort's scans in some splits."""
        return [scan for scan, row in self.rows[cohort].items() if row["split"] in splits]

    def leaves_out_flagged(self, cohort: str) -> bool:
        """Tell whether scans that quality control flags are left out."""
        return self.configuration.preprocess_of(self.configuration.cohorts[cohort]).flagged == "leave_out"

    def _settings_as_json(self, method: str) -> dict[str, Any]:
        return self.method(method).model_dump(mode="json")

    def weights_owner(self, method: str) -> str:
        """Return the network whose weights a method uses: itself, or the one that it refines."""
        network = self.network_of(method)
        assert network is not None, f"{method} has no weights"
        return network

    def _shards_of(self, cohort: str, method: str) -> dict[str, list[Pair]]:
        return shards.shards_of(self.configuration, method, self.pairs[cohort])

    def _shard_of_pair(self, cohort: str, method: str) -> Mapping[Pair, str]:
        members = self.shards_of(cohort, method).items()
        return {pair: shard for shard, pairs in members for pair in pairs}

    def members_of_shard(self, wildcards: Wildcards) -> list[Pair]:
        """Return the pairs (moving, fixed) of a job."""
        return self.shards_of(wildcards.cohort, wildcards.method)[wildcards.shard]

    def scans_of_shard(self, wildcards: Wildcards) -> list[str]:
        """Return the scans that a shard's pairs consist of, each once."""
        return list(dict.fromkeys(scan for pair in self.members_of_shard(wildcards) for scan in pair))

    def runs(self, methods: Iterable[str]) -> list[str]:
        """Return ``method/model`` of everything that registers a pair."""
        return [f"{method}/{model}" for method in methods for model in self.models_of(method)]

    def shard_runs(self, methods: Iterable[str]) -> list[str]:
        """Return ``cohort/method/model/shard`` of every registration job."""
        methods = list(methods)
        return [
            f"{cohort}/{method}/{model}/{shard}"
            for cohort in self.configuration.test_on
            for method in methods
            for model in self.models_of(method)
            for shard in self.shards_of(cohort, method)
        ]

    def methods_of_study(self, study: str) -> list[str]:
        """Return the methods that are the rows of a study, each once."""
        return list(dict.fromkeys(row.name for row in self.studies[study]))

    def example_pairs(self, cohort: str) -> list[Pair]:
        """Return the pairs of a cohort that are drawn: the first ones."""
        return self.pairs[cohort][: self.configuration.report.examples]

    def examples_of_shard(self, wildcards: Wildcards) -> list[Pair]:
        """Return the pairs of a shard that are drawn: of what is compared, and of several seeds the first."""
        cohort, method = wildcards.cohort, wildcards.method
        if method not in self.configuration.methods or wildcards.model != self.models_of(method)[0]:
            return []
        members = self.members_of_shard(wildcards)
        return [pair for pair in self.example_pairs(cohort) if pair in members]

    def pairs_of_page(self) -> list[list[str]]:
        """Return the pairs (cohort, moving, fixed) that the report shows."""
        return [[cohort, *pair] for cohort in self.configuration.test_on for pair in self.example_pairs(cohort)]

    def scored_methods(self, wildcards: Wildcards) -> list[str]:
        """Return the methods whose scores a table holds: those of a study, or all that are compared."""
        study = study_of(wildcards)
        return self.methods_of_study(study) if study else self.configuration.methods

    def scored_networks(self, wildcards: Wildcards) -> list[str]:
        """Return the networks whose weights those methods use, each once."""
        used = map(self.network_of, self.scored_methods(wildcards))
        return [name for name in dict.fromkeys(used) if name is not None]

    @cached_property
    def registration_turns(self) -> dict[str, str]:
        """Run -> the run whose fields must be gone before it starts, so that all fit under the disk quota."""
        if self.room_for_fields is None:
            return {}
        configuration, room = self.configuration, self.room_for_fields
        main = quota.lanes(quota.field_shards(configuration, configuration.methods, self.sizes), room)
        turns = dict(main.waits)
        for study in self.studies:
            methods = self.methods_of_study(study)
            own = [name for name in methods if name not in configuration.methods]
            if own:
                members = quota.field_shards(configuration, own, self.sizes)
                turns |= quota.lanes_of_study(main, members, methods, room).waits
        return turns
