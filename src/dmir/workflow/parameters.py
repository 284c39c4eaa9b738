"""What jobs are given beside files: a change of it reruns the job, so that none is given more than it depends on."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from dmir.cohorts import stated_orientation
from dmir.config import Network, Refinement
from dmir.planning.batches import Batch
from dmir.provenance import code_hash, value_hash
from dmir.workflow.facts import FOR_TRAINING, Row, Wildcards, study_of
from dmir.workflow.inputs import Inputs


class Parameters(Inputs):
    """The parameters of the rules, each a function of a job's wildcards."""

    # --- cohort and preprocess ---

    def making_parameters(self, name: str) -> dict[str, Any]:
        """Return the source that makes a cohort's scans, and the keys that their making depends on."""
        cohort = self.configuration.cohorts[name]
        return {"source": cohort.source, **{key: getattr(cohort, key) for key in cohort.MADE or ()}}

    def made_scans(self, batch: Batch) -> dict[str, dict[str, str]]:
        """Return scan -> the file that it is made from, where there is one."""
        rows = self.rows[batch.cohort]
        originals = {scan: rows[scan]["made_from"] for scan in batch.scans}
        return {scan: {"original": path} if path else {} for scan, path in originals.items()}

    def scan_records(self, wildcards: Wildcards) -> list[Row]:
        """Return the rows of a cohort's table of scans."""
        return self.scans[wildcards.cohort].fillna("").astype(str).to_dict("records")

    def preprocess_settings(self, name: str) -> dict[str, Any]:
        """Return what the preprocessing of a cohort depends on: how, the grid, and what its labels mean."""
        cohort = self.configuration.cohorts[name]
        settings = self.configuration.preprocess_of(cohort).model_dump(mode="json")
        del settings["flagged"]  # concerns those who use the scans
        grid = self.configuration.grid.model_dump(mode="json")
        return {**settings, **grid, "label_map": cohort.label_map, "structures": cohort.structures}

    def preprocessed_scans(self, batch: Batch) -> dict[str, dict[str, str | None]]:
        """Return scan -> its files, and what their axes are where their headers are wrong."""
        axes = {scan: self._stated_orientation(batch.cohort, scan) for scan in batch.scans}
        return {scan: {**its, "orientation": axes[scan]} for scan, its in self.files_of_scans(batch).items()}

    def splits_of_cohort(self, wildcards: Wildcards) -> dict[str, str]:
        """Return scan -> split of a whole cohort."""
        return self.splits(wildcards.cohort)

    def reference_of_cohort(self, wildcards: Wildcards) -> str:
        """Return the scan that a cohort's others are aligned to."""
        return self.references[wildcards.cohort]

    def _stated_orientation(self, cohort: str, scan: str) -> str | None:
        """Return the axis codes that replace those of a scan's files; what a job has made has a true header."""
        made = Path(self.configuration.results, "cohorts", cohort)
        if Path(self.rows[cohort][scan]["image"]).is_relative_to(made):
            return None
        return stated_orientation(self.configuration.cohorts[cohort])

    # --- train ---

    def training_splits(self, wildcards: Wildcards) -> dict[str, str]:
        """Return scan -> split of what a training sees, in the order of its inputs."""
        rows = self.rows[wildcards.cohort]
        return {scan: rows[scan]["split"] for scan in self.scans_of(wildcards.cohort, *FOR_TRAINING)}

    def training_settings(self, wildcards: Wildcards) -> dict[str, Any]:
        """Return what a trained network depends on: its settings, but not how many cards share the work."""
        settings = self.settings_as_json(wildcards.method)
        return {**settings, "training": {k: v for k, v in settings["training"].items() if k != "gpus"}}

    # --- register ---

    def pairs_of_shard(self, wildcards: Wildcards) -> list[list[str]]:
        """Return the pairs (moving, fixed) of a shard."""
        return [list(pair) for pair in self.members_of_shard(wildcards)]

    def registered_pairs(self, wildcards: Wildcards) -> list[list[str]]:
        """Return the pairs of a shard, and after them the same the other way round where that is to be scored."""
        forward = self.pairs_of_shard(wildcards)
        both = self.configuration.scores.inverse_consistency and wildcards.cohort in self.simulated
        backward = [[fixed, moving] for moving, fixed in forward] if both else []
        return [*forward, *(pair for pair in backward if pair not in forward)]

    def parameters_of_method(self, wildcards: Wildcards) -> dict[str, Any]:
        """Return what a method without weights is given: its algorithm and its parameters."""
        method = wildcards.method
        return {"algorithm": self.method(method).algorithm, **self.parameters_of(method)}

    def expected_weights(self, wildcards: Wildcards) -> dict[str, Any]:
        """Return what the weights of a method must be of; weights of another configuration are refused."""
        network = self.method(self.weights_owner(wildcards.method))
        assert isinstance(network, Network)
        grid = self.configuration.grid.model_dump(mode="json")
        return {"network": network.algorithm, "hyperparameters": network.network, "grid": grid}

    def refinement_of_method(self, wildcards: Wildcards) -> dict[str, Any]:
        """Return how a network's fields are refined; nothing for the network itself."""
        settings = self.method(wildcards.method)
        refines = isinstance(settings, Refinement)
        return settings.model_dump(mode="json", exclude={"algorithm", "of"}) if refines else {}

    # --- evaluate and report ---

    def kept_examples(self, wildcards: Wildcards) -> dict[str, Any]:
        """Return the pairs of a shard that are kept to be drawn, and the code that keeps them; nothing for none."""
        pairs = [list(pair) for pair in self.examples_of_shard(wildcards)]
        return {"pairs": pairs, "code": code_hash("dmir.report.examples")} if pairs else {}

    def structure_set(self, wildcards: Wildcards) -> str:
        """Return the name of the structures that a cohort is scored on."""
        return self.configuration.cohorts[wildcards.cohort].structures

    def numbers_hash(self, wildcards: Wildcards) -> str:
        """Return the hash of all in the configuration that scores depend on."""
        return value_hash(self.configuration.numbers(study_of(wildcards)))

    def rows_of_study(self, wildcards: Wildcards) -> dict[str, dict[str, Any]]:
        """Return method -> what a study changes in it."""
        return {row.name: row.changes for row in self.studies[wildcards.study]}

    def surfaces_of_cohort(self, wildcards: Wildcards) -> list[int] | None:
        """Return the structures whose surfaces are drawn; None: some that are well known or large."""
        return self.configuration.report.surfaces.get(wildcards.cohort)
