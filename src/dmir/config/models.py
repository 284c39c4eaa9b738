"""The models of the configuration: every key, its type, its default and what it means."""

from __future__ import annotations

import contextlib
from functools import cached_property, partial
from pathlib import Path
from typing import Annotated, Any, Literal

from pydantic import Field, ValidationError, field_validator, model_validator

from dmir.config.base import Model, mistakes_of
from dmir.config.cohorts import Cohort, CohortKeys
from dmir.config.studies import Ablation, LambdaStudy, Variant, ablation_variants, lambda_variants
from dmir.errors import suggestion
from dmir.networks import hyperparameter_names, network_names
from dmir.structures import label_map_names, load_structures, structure_set_names

CLASSICAL = ("affine", "syn", "elastix")
MOST_MODELS = 1000  # more is a slip: the jobs could not even be listed
Positive = Annotated[float, Field(gt=0)]
Shape = tuple[Annotated[int, Field(ge=16)], Annotated[int, Field(ge=16)], Annotated[int, Field(ge=16)]]


class Grid(Model):
    """The grid on which a cohort is preprocessed; it is centred on the atlas's brain, its axes run RAS."""

    shape: Shape = (80, 96, 80)
    """Voxels along left-right, posterior-anterior, inferior-superior."""
    spacing: tuple[Positive, Positive, Positive] = (2.0, 2.0, 2.0)
    """Voxel size in mm; one number stands for three equal ones."""

    @field_validator("spacing", mode="before")
    @classmethod
    def _one_for_three(cls, value: Any) -> Any:
        return (value,) * 3 if isinstance(value, int | float | str) else value  # text: from the command line


class Preprocess(Model):
    """From a scan as it comes to a scan on the grid."""

    skull_strip: Literal["mask", "none", "deepbet"] = "mask"
    """`mask`: the cohort's own brain mask; `none`: the scans are stripped already; `deepbet`: its network."""
    denoise: bool = False
    """Non-local means (Coupe et al. 2008), within the brain, before N4."""
    bias_correction: bool = True
    """N4 (Tustison et al. 2010), within the brain."""
    bias_shrink: Annotated[int, Field(ge=1, le=8)] = 4
    """N4 estimates the field on an image this many times smaller."""
    affine: bool = True
    """Rigid, then affine registration to the atlas by mutual information (ANTs). Off: the headers are trusted."""
    affine_spacing: Annotated[float, Field(ge=1, le=8)] = 3.0
    """Voxel size in mm at which the affine is sought."""
    affine_seed: int = 1
    """Of the affine's random sampling."""
    histogram_match: bool = False
    """Match the histogram to the atlas's before the intensities are scaled."""
    lower: Annotated[float, Field(ge=0, lt=50)] = 0.5
    """This percentile of the brain's intensities becomes 0."""
    upper: Annotated[float, Field(gt=50, le=100)] = 99.5
    """This percentile of the brain's intensities becomes 1."""
    label_interpolation: Literal["nearest", "generic_label"] = "nearest"
    """How label maps come to the grid."""
    flagged: Literal["keep", "leave_out"] = "keep"
    """Scans that quality control flags: used like all others, or neither trained on nor registered."""


class Training(Model):
    """How networks are trained; each method's own `training` may differ."""

    steps: Annotated[int, Field(ge=1)] = 300
    """Optimiser steps."""
    validate_every: Annotated[int, Field(ge=1)] = 50
    """Steps between validations; also the most that a killed training loses."""
    learning_rate: Positive = 1e-4
    """Of Adam."""
    schedule: Literal["constant", "cosine", "polynomial"] = "constant"
    """How the learning rate goes to its end."""
    batch_size: Annotated[int, Field(ge=1)] = 1
    """Pairs a step."""
    gpus: Annotated[int, Field(ge=1)] = 1
    """Cards that share the pairs of each step, so that `batch_size` is a multiple of it."""
    gradient_clip: Annotated[float, Field(ge=0)] = 0.0
    """Largest norm of the gradient; 0: none."""
    similarity: Literal["lncc", "mse", "mutual_information"] = "lncc"
    """What is made alike."""
    window: Annotated[int, Field(ge=3)] = 9
    """Edge of the window of `lncc` in voxels, odd."""
    regularisation: Annotated[float, Field(ge=0)] = 1.0
    """Weight lambda of the diffusion of the field."""
    pairs: Literal["scan_to_atlas", "atlas_to_scan", "all"] = "scan_to_atlas"
    """Each training scan to each atlas, the reverse, or every ordered pair of training scans."""
    warp: Literal["exact", "shifted"] = "exact"
    """In the loss; `shifted`: that of the published code of XMorpher, TransMatch and TransMorph (OASIS)."""
    keep: Literal["best", "last"] = "best"
    """Which weights: those with the best Dice on the validation scans, or the last."""
    compile: bool = False
    """Let torch write kernels for the network (`torch.compile`): minutes before the first step."""
    precision: Literal["float32", "tf32", "bf16"] = "float32"
    """Of the network; the loss, the field and the warp are float32 in all three."""
    deterministic: bool = True
    """Choose operations that give the same bits in every run; a GPU lacks some of them, which is said in the log."""

    @model_validator(mode="after")
    def _consistent(self) -> Training:
        if self.window % 2 == 0:
            raise ValueError(f"window: found {self.window}; expected an odd number")
        if self.batch_size % self.gpus:
            raise ValueError(f"gpus: found {self.gpus}; expected a divisor of batch_size, which is {self.batch_size}")
        return self


class Affine(Model):
    """No deformation: what affine preprocessing alone gives."""

    algorithm: Literal["affine"]


class Syn(Model):
    """SyN of ANTs (Avants et al. 2008), deformable part only: the pairs are affinely aligned."""

    algorithm: Literal["syn"]
    metric: Literal["CC", "mattes", "meansquares"] = "CC"
    """Similarity: cross-correlation, mutual information or mean squares."""
    radius: Annotated[int, Field(ge=1)] = 2
    """Radius of the window of `CC` in voxels."""
    bins: Annotated[int, Field(ge=8)] = 32
    """Histogram bins of `mattes`."""
    iterations: list[Annotated[int, Field(ge=0)]] = [40, 20, 2]
    """Iterations a level, from the coarsest to full resolution."""
    gradient_step: Positive = 0.3
    """Length of a step."""
    flow_sigma: Annotated[float, Field(ge=0)] = 3.0
    """Smoothing of the update field."""
    total_sigma: Annotated[float, Field(ge=0)] = 0.0
    """Smoothing of the total field."""
    mask_margin: Annotated[int, Field(ge=0)] | None = 2
    """The metric is computed within the fixed brain and so many voxels round it; none: everywhere."""
    single_precision: bool = False
    """Compute in float32 instead of float64."""
    seed: int = 1
    """Of ITK's random numbers."""


class Elastix(Model):
    """Elastix (Klein et al. 2010): free-form B-splines."""

    algorithm: Literal["elastix"]
    metric: Literal["normalised_correlation", "mutual_information"] = "normalised_correlation"
    """Similarity."""
    final_grid_spacing: Positive = 10.0
    """Spacing of the control points in mm at the finest level."""
    resolutions: Annotated[int, Field(ge=1, le=8)] = 4
    """Levels."""
    iterations: Annotated[int, Field(ge=1)] = 150
    """Iterations a level."""
    samples: Annotated[int, Field(ge=100)] = 2048
    """Random samples an iteration."""
    bending_energy: Annotated[float, Field(ge=0)] = 1.0
    """Weight of the bending energy of the field."""
    seed: int = 1
    """Of the random samples."""
    threads: Annotated[int, Field(ge=1)] = 1
    """Its result depends on the number of threads, so that this is a parameter and not a resource."""


class Network(Model):
    """A network: which, its hyperparameters, and where its training differs from `training`."""

    algorithm: str
    """One of the networks of `dmir.networks`."""
    network: dict[str, Any] = {}
    """Hyperparameters of the network, by the names of its constructor."""
    training: dict[str, Any] = {}
    """Keys of `training` that differ for this method."""

    @model_validator(mode="after")
    def _known(self) -> Network:
        known = hyperparameter_names(self.algorithm)
        for key in self.network:
            if key not in known:
                raise ValueError(
                    f"network.{key}: {self.algorithm} has no such hyperparameter. {suggestion(key, known)}"
                )
        return self


class Refinement(Model):
    """A network's field, refined on each pair by some steps of Adam that minimise the loss of the network's training.

    A row of its own: it uses the weights of the network, and its seconds are those of both.
    """

    algorithm: Literal["refinement"]
    of: str
    """The network: one of `methods`, a key of `settings` or a plain name. It is trained once, for both rows."""
    steps: Annotated[int, Field(ge=0)] = 20
    """Steps of Adam; the field with the lowest loss of them all is taken."""
    learning_rate: Positive = 0.1
    """Of Adam: about as many voxels a step."""
    similarity: Literal["lncc", "mse", "mutual_information"] | None = None
    """What is made alike; none: as in the network's training, and so for the next two."""
    window: Annotated[int, Field(ge=3)] | None = None
    """Edge of the window of `lncc` in voxels, odd."""
    regularisation: Annotated[float, Field(ge=0)] | None = None
    """Weight lambda of the diffusion of the field."""
    downsampling: Annotated[int, Field(ge=1, le=8)] = 2
    """The correction has one vector in a cube of so many voxels."""
    smoothing: Annotated[float, Field(ge=0, le=10)] = 1.0
    """Standard deviation of the Gaussian that smooths the correction, in its own coarse voxels; 0: none."""

    @field_validator("window")
    @classmethod
    def _odd(cls, value: int | None) -> int | None:
        if value is not None and value % 2 == 0:
            raise ValueError(f"found {value}; expected an odd number")
        return value


MethodSettings = Affine | Syn | Elastix | Refinement | Network
METHOD_MODELS: dict[str, type[Model]] = {"affine": Affine, "syn": Syn, "elastix": Elastix, "refinement": Refinement}


class Scores(Model):
    """What is measured."""

    label_interpolation: list[Literal["nearest", "linear"]] = ["nearest", "linear"]
    """How label maps are warped, for every method; the first is the tables' (`linear`: one-hot linear + argmax)."""
    inverse_consistency: bool = True
    """Register the pairs of simulated cohorts the other way round too, and score how far there and back ends from the
    start: registration takes twice as long there."""

    @field_validator("label_interpolation")
    @classmethod
    def _at_least_one(cls, value: list[str]) -> list[str]:
        if not value or len(set(value)) != len(value):
            raise ValueError(f"found {value}; expected one or both of nearest, linear, the table's own first")
        return value


class Report(Model):
    """What is drawn and tested."""

    examples: Annotated[int, Field(ge=1, le=8)] = 1
    """Pairs that are drawn and can be looked at in the report: the first test scans of each cohort."""
    planes: list[Literal["axial", "coronal", "sagittal"]] = ["axial", "coronal", "sagittal"]
    """Planes of the qualitative figure; one plane alone shows displacement, difference and endpoint error too."""
    surfaces: dict[str, list[int]] = {}
    """Structures (ids) of the figure of surfaces, by cohort; by default some that are well known or large."""
    reference: str | None = None
    """The method that all others are tested against: `caml` where it is compared, else the last network, else the last
    method."""
    bootstrap: Annotated[int, Field(ge=1000, le=100_000)] = 10_000
    """Resamples of the subjects for the intervals of means and differences."""

    @field_validator("planes")
    @classmethod
    def _each_once(cls, value: list[str]) -> list[str]:
        if not value or len(set(value)) != len(value):
            raise ValueError(f"found {value}; expected one to three of axial, coronal, sagittal, each once")
        return value


class Config(Model):
    """Everything that a run depends on."""

    results: str = "results"
    """Folder of all results."""
    root: str = "."
    """Folder from which the cohorts' data are found."""
    train_on: str
    """The cohort that the networks are trained on."""
    test_on: list[str]
    """The cohorts that the methods are compared on."""
    methods: list[str]
    """The rows of the tables, in their order; each is a key of `settings`, or the plain name of an algorithm."""
    seeds: list[int] = [1]
    """One model of each network a seed."""
    pairs_per_job: Annotated[int, Field(ge=1)] | None = None
    """Pairs that one job registers, and another scores; none: computed for each method from what a pair takes, so that
    no job is short (docs/scale.md). Another number makes other jobs, and all of them run anew."""
    keep_fields: bool = False
    """Keep every displacement field under `results/registered/` (at 160x192x224 one takes 83 MB)."""
    disk_quota_gb: Positive | None = None
    """Most that `results` takes at once, in 10^9 bytes before compression: registrations then wait until enough fields
    are scored and gone (docs/scale.md). It can be changed at any time, and nothing that is done runs anew."""
    timeout_minutes: Positive = 120
    """A classical registration of one pair that takes longer is stopped and counted as failed."""
    packed: Literal["float16", "uint8", "float32"] = "float16"
    """How trainings keep the preprocessed images: `float16` is exact to 1/4096 of the range, `uint8` to 1/510."""
    grid: Grid = Grid()
    cohorts: dict[str, Cohort]
    """The cohorts, by name."""
    preprocess: Preprocess = Preprocess()
    training: Training = Training()
    settings: dict[str, Any] = {}
    """Parameters of the methods, by name; `algorithm` is the name itself unless it is given."""
    scores: Scores = Scores()
    report: Report = Report()
    ablation: Ablation = Ablation()
    lambda_study: LambdaStudy = LambdaStudy()

    @model_validator(mode="after")
    def _consistent(self) -> Config:
        self._few_enough()
        problems = [
            *_unique("test_on", self.test_on),
            *_unique("methods", self.methods),
            *_unique("seeds", self.seeds),
            *(
                f"{key}: '{name}' is no cohort. {suggestion(name, self.cohorts)}"
                for key, names in (("train_on", [self.train_on]), ("test_on", self.test_on))
                for name in names
                if name not in self.cohorts
            ),
        ]
        for name, cohort in self.cohorts.items():
            problems += _safe_name(f"cohorts.{name}", name)
            if cohort.structures not in structure_set_names():
                hint = suggestion(cohort.structures, structure_set_names())
                problems.append(f"cohorts.{name}.structures: '{cohort.structures}' is no structure set. {hint}")
            if cohort.label_map is not None and cohort.label_map not in label_map_names():
                hint = suggestion(cohort.label_map, label_map_names())
                problems.append(f"cohorts.{name}.label_map: '{cohort.label_map}' is no label map. {hint}")
            problems += mistakes_of(partial(self.preprocess_of, cohort), f"cohorts.{name}.preprocess")
        for name in dict.fromkeys([*self.methods, *self.settings]):
            problems += _safe_name(f"methods: {name}", name)
            problems += mistakes_of(partial(self.method, name), f"settings.{name}")
        reference = self.report.reference
        if reference is not None and reference not in self.methods:
            problems.append(f"report.reference: '{reference}' is no method. {suggestion(reference, self.methods)}")
        for name, ids in self.report.surfaces.items():
            problems += self._surface_mistakes(name, ids)
        if not problems:  # else they would be told once more
            for study in ("ablation", "lambda_study"):
                problems += self._variant_mistakes(study)
        if problems:
            raise ValueError("\n".join(problems))
        return self

    def _surface_mistakes(self, cohort: str, ids: list[int]) -> list[str]:
        key = f"report.surfaces.{cohort}"
        if cohort not in self.cohorts:
            return [f"{key}: '{cohort}' is no cohort. {suggestion(cohort, self.cohorts)}"]
        name = self.cohorts[cohort].structures
        if name not in structure_set_names():
            return []  # told at its own key
        unknown = sorted(set(ids) - set(load_structures(name).ids))
        if unknown or not ids:
            found = f"no structure of {name}: {', '.join(map(str, unknown))}" if unknown else "an empty list"
            return [f"{key}: found {found}; expected ids of resources/structures/{name}.csv"]
        return []

    def preprocess_of(self, cohort: CohortKeys) -> Preprocess:
        """Return the preprocessing of a cohort: the common settings and where this cohort differs."""
        return Preprocess.model_validate({**self.preprocess.model_dump(), **cohort.preprocess})

    def method(self, name: str) -> MethodSettings:
        """Return the settings of a method by its name in ``methods``; the training of a network is complete in them."""
        if name not in [*self.settings, *CLASSICAL, *network_names()]:  # perhaps a row of a study
            return self._settings(name, self._variant_settings.get(name, {}))
        return self._settings(name, self.settings.get(name, {}))

    def _settings(self, name: str, given: Any) -> MethodSettings:
        if not isinstance(given, dict):
            raise ValueError(f"found {given!r}; expected a dictionary of parameters")
        algorithm, known = given.get("algorithm", name), [*METHOD_MODELS, *network_names()]
        if algorithm not in known:
            raise ValueError(f"'{algorithm}' is no algorithm. {suggestion(str(algorithm), known)}")
        settings = METHOD_MODELS.get(algorithm, Network).model_validate({**given, "algorithm": algorithm})
        if isinstance(settings, Network):
            training = Training.model_validate({**self.training.model_dump(), **settings.training})
            settings = settings.model_copy(update={"training": training.model_dump(mode="json")})
        if isinstance(settings, Refinement):
            with contextlib.suppress(ValidationError):  # of the network: told at its own key
                trained = self._refined(settings.of).training
                keys = [key for key in ("similarity", "window", "regularisation") if getattr(settings, key) is None]
                settings = settings.model_copy(update={key: trained[key] for key in keys})
        return settings  # type: ignore[return-value]

    def _algorithm(self, name: str) -> str:
        """Return what a method is, as far as the configuration says it."""
        given = self.settings.get(name, {})
        return str(given.get("algorithm", name)) if isinstance(given, dict) else name

    def _refined(self, name: str) -> Network:
        """Return the settings of the network that a refinement names as ``of``."""
        if self._algorithm(name) == "refinement":
            raise ValueError(f"of: found '{name}', a refinement itself; expected a network")
        known = [
            method
            for method in dict.fromkeys([*self.methods, *self.settings, *network_names()])
            if self._algorithm(method) in network_names()
        ]
        known += self._variant_settings if name in self.methods and name not in known else []
        if name not in known:
            raise ValueError(f"of: found '{name}', no network of this configuration. {suggestion(name, known)}")
        return self.method(name)  # type: ignore[return-value]

    def network_of(self, name: str) -> str | None:
        """Return the method whose weights a method uses: a network itself, what a refinement refines, else none."""
        settings = self.method(name)
        if isinstance(settings, Refinement):
            return settings.of
        return name if isinstance(settings, Network) else None

    def _few_enough(self) -> None:
        rows = 2 ** len(self.ablation.switches) + len(self.lambda_study.methods) * len(self.lambda_study.values)
        models = (len(self.methods) + rows) * len(self.seeds)
        if models > MOST_MODELS:
            keys = "methods, ablation and lambda_study, for each of the seeds"
            raise ValueError(f"{keys}: found {models} models; expected at most {MOST_MODELS}")

    def networks(self) -> list[str]:
        """Return the networks to train, in the tables' order: methods, and what is there to be refined alone."""
        used = (self.network_of(name) for name in self.methods)
        return list(dict.fromkeys(name for name in used if name is not None))

    def models_of(self, method: str) -> list[str]:
        """Return the models that a method registers with: of a network and its refinement one a seed, else ``none``."""
        return ["none"] if self.network_of(method) is None else [f"seed{seed}" for seed in self.seeds]

    def reference(self) -> str:
        """Return the method that all others are tested against."""
        if self.report.reference is not None:
            return self.report.reference
        networks = [name for name in self.methods if self.network_of(name) == name]
        return "caml" if "caml" in self.methods else (networks or self.methods)[-1]

    def variants(self, study: str) -> list[Variant]:
        """Return the rows of a study, ``"ablation"`` or ``"lambda_study"``; each name is a method."""
        if study == "ablation":
            return ablation_variants(self.ablation, self._network_settings)
        return lambda_variants(self.lambda_study, self._network_settings)

    def _network_settings(self, name: str) -> dict[str, Any]:
        if self._algorithm(name) in METHOD_MODELS:
            raise ValueError(f"'{name}' is no network; expected one of {', '.join(network_names())}")
        settings = self._settings(name, self.settings.get(name, {}))  # not method(): it asks for the studies' rows
        return settings.model_dump(mode="json")

    @cached_property
    def _variant_settings(self) -> dict[str, dict[str, Any]]:
        rows = [*self.variants("ablation"), *self.variants("lambda_study")]
        return {row.name: row.settings for row in rows}

    def _variant_mistakes(self, study: str) -> list[str]:
        """Say what is wrong with a study: its networks, its switches, its training."""
        problems = mistakes_of(partial(self.variants, study), study)
        rows = [] if problems else self.variants(study)
        for row in rows:
            problems += mistakes_of(partial(Network.model_validate, row.settings), study)
            problems += mistakes_of(partial(Training.model_validate, row.settings["training"]), f"{study}.training")
        return list(dict.fromkeys(problems))

    def origin(self, name: str) -> str:
        """Return what a cohort's scans come from: its source and its files."""
        cohort = self.cohorts[name]
        keys = {key: getattr(cohort, key) for key in (*cohort.FILES, "table", "seed") if hasattr(cohort, key)}
        return f"{cohort.source} {keys}"

    def numbers(self, study: str | None = None) -> dict[str, Any]:
        """Return all that scores depend on, as JSON has it: of a study, its own key too; no place, no drawing."""
        named = {"ablation", "lambda_study"} - {study}
        return self.model_dump(mode="json", exclude={*PLACES_AND_DRAWINGS, *named})

    def trained_pairs(self) -> list[str]:
        """Return the kinds of pairs that networks are trained with, each once."""
        kinds = [self.method(name).training["pairs"] for name in self.networks()]  # type: ignore[union-attr]
        return list(dict.fromkeys(kinds))

    def scan_parameters(self, name: str) -> dict[str, Any]:
        """Return what :func:`dmir.cohorts.scan_table` is to be given for a cohort."""
        cohort = self.cohorts[name]
        made = Path(self.results, "cohorts", name)
        return {"source": cohort.source, **cohort.scan_parameters(Path(self.root), made)}


PLACES_AND_DRAWINGS = frozenset({"results", "root", "keep_fields", "pairs_per_job", "disk_quota_gb", "report"})


def _unique(key: str, names: list) -> list[str]:
    if not names:
        return [f"{key}: found an empty list; expected at least one"]
    repeated = sorted({str(n) for n in names if names.count(n) > 1})
    return [f"{key}: {', '.join(repeated)} stands there more than once"] if repeated else []


def _safe_name(key: str, name: str) -> list[str]:
    allowed = name and all(c.isalnum() or c in "._-" for c in name) and name.isascii() and name[0] not in ".-"
    return [] if allowed else [f"{key}: found '{name}'; expected letters, digits, '.', '_' and '-' (it names folders)"]
