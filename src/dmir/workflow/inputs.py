"""The files that jobs read, where the names of what they make do not say it."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence

from dmir.planning.batches import Batch
from dmir.structures import structures_folder
from dmir.workflow.facts import FOR_TRAINING, Facts, Wildcards, study_of

VOLUMES = ("image", "labels", "mask", "truth")
OF_REFERENCE = ("image.nii.gz", "labels.nii.gz", "affine.mat", "quality.json")


class Inputs(Facts):
    """The inputs of the rules, each a function of a job's wildcards."""

    # --- cohort and preprocess ---

    def originals_of(self, batch: Batch) -> list[str]:
        """Return the files that scans are made from, where there are any."""
        return list(filter(None, (self.rows[batch.cohort][scan]["made_from"] for scan in batch.scans)))

    def made_files(self, batch: Batch) -> list[str]:
        """Return what the making of scans writes; of a simulated one its true field too."""
        return self._written(batch, self.patterns.made, [f"{kind}.nii.gz" for kind in VOLUMES[:3]])

    def files_of_cohort(self, wildcards: Wildcards) -> list[str]:
        """Return every file of a cohort."""
        table = self.scans[wildcards.cohort]
        return [path for key in VOLUMES for path in table[key] if path]

    def files_of_scans(self, batch: Batch) -> dict[str, dict[str, str]]:
        """Return scan -> its files as its cohort gives them; an absent label map or mask is left out."""
        rows = self.rows[batch.cohort]
        return {scan: {key: rows[scan][key] for key in VOLUMES if rows[scan][key]} for scan in batch.scans}

    def files_of_batch(self, batch: Batch) -> list[str]:
        """Return the files of a batch's scans."""
        return [path for files in self.files_of_scans(batch).values() for path in files.values()]

    def reference_of_batch(self, batch: Batch) -> list[str]:
        """Return the preprocessed scan that scans are aligned to; nothing for that scan itself."""
        cohort, reference = batch.cohort, self.references[batch.cohort]
        alone = batch.scans == (reference,)
        return [] if alone else [self.patterns.preprocessed(file, cohort, reference) for file in OF_REFERENCE]

    def preprocessed_files(self, batch: Batch) -> list[str]:
        """Return what the preprocessing of scans writes; of a simulated one its true field too."""
        return self._written(batch, self.patterns.preprocessed, OF_REFERENCE)

    def _written(self, batch: Batch, place: Callable[..., str], files: Sequence[str]) -> list[str]:
        rows = self.rows[batch.cohort]
        with_truth = [*files, "truth.nii.gz"]
        return [
            place(file, batch.cohort, scan)
            for scan in batch.scans
            for file in (with_truth if rows[scan]["truth"] else files)
        ]

    def preprocessed_of(self, file: str, cohort: str, scans: Iterable[str]) -> list[str]:
        """Return one preprocessed file of each of some scans."""
        return [self.paths.preprocessed(file, cohort, scan) for scan in scans]

    def quality_files(self, wildcards: Wildcards) -> list[str]:
        """Return the quality of every scan of a cohort."""
        return self.preprocessed_of("quality.json", wildcards.cohort, self.rows[wildcards.cohort])

    def preprocessed_images(self, wildcards: Wildcards) -> list[str]:
        """Return every preprocessed image of a cohort."""
        return self.preprocessed_of("image.nii.gz", wildcards.cohort, self.rows[wildcards.cohort])

    # --- train ---

    def training_images(self, wildcards: Wildcards) -> list[str]:
        """Return the images that trainings learn from, choose on and align to."""
        return self._for_training(wildcards, "image.nii.gz")

    def training_labels(self, wildcards: Wildcards) -> list[str]:
        """Return the label maps of the same scans."""
        return self._for_training(wildcards, "labels.nii.gz")

    def quality_for_training(self, wildcards: Wildcards) -> list[str]:
        """Return the quality of a training's scans, where it decides whether they are used."""
        return self._for_training(wildcards, "quality.json") if self.leaves_out_flagged(wildcards.cohort) else []

    def _for_training(self, wildcards: Wildcards, file: str) -> list[str]:
        return self.preprocessed_of(file, wildcards.cohort, self.scans_of(wildcards.cohort, *FOR_TRAINING))

    def of_every_model(self, cohort: str, file: str, networks: Iterable[str] | None = None) -> list[str]:
        """Return one file of every model that a cohort trained: of the networks that are compared, or of some."""
        runs = self.runs(self.networks if networks is None else networks)
        return [self.paths.model(file, cohort, *run.split("/")) for run in runs]

    # --- register ---

    def images_of_shard(self, wildcards: Wildcards) -> list[str]:
        """Return the images of a shard's scans."""
        return self.preprocessed_of("image.nii.gz", wildcards.cohort, self.scans_of_shard(wildcards))

    def labels_of_shard(self, wildcards: Wildcards) -> list[str]:
        """Return the label maps of a shard's scans."""
        return self.preprocessed_of("labels.nii.gz", wildcards.cohort, self.scans_of_shard(wildcards))

    def quality_of_shard(self, wildcards: Wildcards) -> list[str]:
        """Return the quality of a shard's scans, where it decides whether they are used."""
        if not self.leaves_out_flagged(wildcards.cohort):
            return []
        return self.preprocessed_of("quality.json", wildcards.cohort, self.scans_of_shard(wildcards))

    def weights_of_method(self, wildcards: Wildcards) -> str:
        """Return the weights that a network, or its refinement, registers with."""
        owner = self.weights_owner(wildcards.method)
        return self.paths.model("model.safetensors", self.configuration.train_on, owner, wildcards.model)

    def turn_of_shard(self, wildcards: Wildcards) -> str | None:
        """Return what a registration waits for: what was made last of the fields that have its place on the disk."""
        before = self.registration_turns.get(run_of(wildcards))
        return None if before is None else self.paths.scores_of_shard("pairs", before)

    def records_of_comparison(self) -> list[str]:
        """Return the records of every registration job of the methods that are compared."""
        return [self.paths.records(*run.split("/")) for run in self.shard_runs(self.configuration.methods)]

    # --- evaluate ---

    def truths_of(self, cohort: str, scans: Iterable[str]) -> list[str]:
        """Return the true fields of scans, where the cohort is simulated; its reference is the truth's own space."""
        if cohort not in self.simulated:
            return []
        return self.preprocessed_of("truth.nii.gz", cohort, (s for s in scans if self.rows[cohort][s]["truth"]))

    def truths_of_shard(self, wildcards: Wildcards) -> list[str]:
        """Return the true fields of a shard's scans."""
        return self.truths_of(wildcards.cohort, self.scans_of_shard(wildcards))

    def images_of_examples(self, wildcards: Wildcards) -> list[str]:
        """Return the images that are warped for the figures, of a shard's moving scans."""
        moving = dict.fromkeys(moving for moving, _ in self.examples_of_shard(wildcards))
        return self.preprocessed_of("image.nii.gz", wildcards.cohort, moving)

    def structure_scores(self, wildcards: Wildcards) -> list[str]:
        """Return the scores of every shard by structure: of one study's methods, or of all that are compared."""
        return self._scores(wildcards, "structures")

    def pair_scores(self, wildcards: Wildcards) -> list[str]:
        """Return the scores of every shard by pair."""
        return self._scores(wildcards, "pairs")

    def _scores(self, wildcards: Wildcards, kind: str) -> list[str]:
        return [self.paths.scores_of_shard(kind, run) for run in self.shard_runs(self.scored_methods(wildcards))]

    # --- report ---

    def weights_of_scores(self, wildcards: Wildcards) -> list[str]:
        """Return the weights of every model that scored: of the methods that are compared, or of a study's."""
        networks = self.scored_networks(wildcards)
        return self.of_every_model(self.configuration.train_on, "model.safetensors", networks)

    def histories(self, wildcards: Wildcards) -> list[str]:
        """Return the history of every training of a cohort."""
        return self.of_every_model(wildcards.cohort, "history.csv")

    def summaries(self, wildcards: Wildcards) -> list[str]:
        """Return what was measured while each model was trained: a cohort's, or a study's."""
        study = study_of(wildcards)
        if study is None:
            return self.of_every_model(wildcards.cohort, "training.json")
        return self.of_every_model(self.configuration.train_on, "training.json", self.methods_of_study(study))

    def structure_set_file(self, wildcards: Wildcards) -> str:
        """Return the table of the structures that a cohort is scored on."""
        return str(structures_folder() / f"{self.configuration.cohorts[wildcards.cohort].structures}.csv")

    def truths_of_pair(self, wildcards: Wildcards) -> list[str]:
        """Return the true fields of a pair's two scans, where the cohort is simulated."""
        return self.truths_of(wildcards.cohort, [wildcards.moving, wildcards.fixed])

    def examples(self, wildcards: Wildcards) -> list[str]:
        """Return the folders of one pair's examples, one of each method; of several seeds, the first."""
        return self.examples_of_pair(wildcards.cohort, wildcards.moving, wildcards.fixed)

    def examples_of_pair(self, cohort: str, moving: str, fixed: str) -> list[str]:
        """Return the same by the names of a pair."""
        return [
            self.paths.examples(
                cohort, method, self.models_of(method)[0], self.shard_of_pair(cohort, method)[moving, fixed]
            )
            for method in self.configuration.methods
        ]

    def examples_of_page(self) -> list[list[str]]:
        """Return the folders of what the report's viewer shows: of each of its pairs those of the methods."""
        return [self.examples_of_pair(*pair) for pair in self.pairs_of_page()]

    def volumes_of_page(self) -> list[str]:
        """Return the images and label maps of the pairs that the report shows."""
        return [
            self.paths.preprocessed(file, cohort, scan)
            for cohort, moving, fixed in self.pairs_of_page()
            for scan in (moving, fixed)
            for file in ("image.nii.gz", "labels.nii.gz")
        ]

    def users_files(self) -> list[str]:
        """Return the files of all scans that no job makes."""
        own = [name for name in self.cohorts if name not in self.made]
        kinds = ("image", "labels", "mask")
        return [row[key] for name in own for row in self.rows[name].values() for key in kinds if row[key]]


def run_of(wildcards: Wildcards) -> str:
    """Return ``cohort/method/model/shard`` of a job."""
    return f"{wildcards.cohort}/{wildcards.method}/{wildcards.model}/{wildcards.shard}"
