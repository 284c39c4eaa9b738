"""The configuration as a whole: its keys at the top level, its checks, and what the keys mean together."""

from __future__ import annotations

import contextlib
from functools import cached_property, partial
from pathlib import Path
from typing import Annotated, Any, Literal

from pydantic import Field, ValidationError, model_validator

from dmir import registry
from dmir.config.base import mistakes_of, unique_mistakes
from dmir.config.cohorts import Cohort, CohortKeys
from dmir.config.sections import Grid, Network, Preprocess, Report, Scores, Seed, Training
from dmir.config.studies import STUDIES, Ablation, LambdaStudy, Variant, ablation_variants, lambda_variants
from dmir.errors import InputError, suggestion
from dmir.methods.refinement import Settings as Refinement
from dmir.networks import network_names
from dmir.settings import MethodSettings, Model, Positive
from dmir.structures import label_map_names, load_structures, structure_set_names

__all__ = ["Config", "Grid", "Network", "Preprocess", "Refinement", "Report", "Scores", "Training"]

MOST_MODELS = 1000  # more is a slip: the jobs could not even be listed


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
    seeds: list[Seed] = [1]
    """One model of each network a seed."""
    pairs_per_job: Annotated[int, Field(ge=1)] | None = None
    """Pairs that one job registers, and another scores; none: computed for each method from what a pair takes, so that
    no job is short (docs/scale.md). Another number makes other jobs, and all of them run anew."""
    scans_per_job: Annotated[int, Field(ge=1)] | None = None
    """Scans that one job makes or preprocesses; none: computed from what a scan takes, so that no job is short
    (docs/scale.md). 1 is for a cohort that grows while it is worked on: a scan is then never made again with others."""
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
            *unique_mistakes("test_on", self.test_on),
            *unique_mistakes("methods", self.methods),
            *unique_mistakes("seeds", self.seeds),
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
            for study in STUDIES:
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
        if name not in self.settings and name not in registry.built_in():  # perhaps a row of a study
            return self._settings(name, self._variant_settings.get(name, {}))
        return self._settings(name, self.settings.get(name, {}))

    def _settings(self, name: str, given: Any) -> MethodSettings:
        if not isinstance(given, dict):
            raise ValueError(f"found {given!r}; expected a dictionary of parameters")
        algorithm = given.get("algorithm", name)
        if not isinstance(algorithm, str):
            raise ValueError(f"algorithm: found {algorithm!r}; expected a name")
        try:
            kind = registry.find(algorithm).kind
            model = Network if kind == "network" else registry.settings_model(algorithm)
        except InputError as error:
            plain = not registry.names_a_file(algorithm) and error.where == "algorithm"
            raise ValueError(f"'{algorithm}' is no algorithm. {error.remedy}" if plain else str(error)) from None
        settings = model.model_validate({**given, "algorithm": algorithm})
        if isinstance(settings, Network):
            training = Training.model_validate({**self.training.model_dump(), **settings.training})
            settings = settings.model_copy(update={"training": training.model_dump(mode="json")})
        if isinstance(settings, Refinement):
            with contextlib.suppress(ValidationError):  # of what is refined: told at its own key
                refined = self._refined(settings.of)
                if isinstance(refined, Network) and settings.similarity is None:
                    settings = settings.model_copy(update={"similarity": refined.training["similarity"]})
        return settings

    def _algorithm(self, name: str) -> str:
        """Return what a method is, as far as the configuration says it."""
        given = self.settings.get(name, {})
        return str(given.get("algorithm", name)) if isinstance(given, dict) else name

    def _refined(self, name: str) -> MethodSettings:
        """Return the settings of the method that a refinement names as ``of``."""
        if self._algorithm(name) == "refinement":
            raise ValueError(f"of: found '{name}', a refinement itself; expected a network or a classical method")
        if not _is_known(self._algorithm(name)) and not (name in self.methods and name in self._variant_settings):
            named = [*self.methods, *self.settings, *registry.names("method"), *registry.names("network")]
            known = [method for method in dict.fromkeys(named) if self._algorithm(method) != "refinement"]
            raise ValueError(f"of: found '{name}', no method of this configuration. {suggestion(name, known)}")
        return self.method(name)

    def network_of(self, name: str) -> str | None:
        """Return the method whose weights a method uses: a network itself, the one that is refined, else none."""
        settings = self.method(name)
        if isinstance(settings, Refinement):
            return self.network_of(settings.of)
        return name if isinstance(settings, Network) else None

    def parameters(self, name: str) -> dict[str, Any]:
        """Return what a classical method's ``register`` is to be given, as JSON has it; ``of``: of what is refined."""
        settings = self.method(name)
        values = settings.parameters()
        if isinstance(settings, Refinement):
            refined = self.method(settings.of)
            values["of"] = {"algorithm": refined.algorithm, **self.parameters(settings.of)}
        return values

    def takes_card(self, name: str) -> bool:
        """Tell whether a method that needs no weights computes on a GPU where there is one."""
        settings = self.method(name)
        return self.network_of(name) is None and registry.on_gpu(settings.algorithm, self.parameters(name))

    def _few_enough(self) -> None:
        rows = 2 ** len(self.ablation.switches) + len(self.lambda_study.methods) * len(self.lambda_study.values)
        own = [value.get("seeds") for value in self.settings.values() if isinstance(value, dict)]
        most = max(len(seeds) for seeds in (self.seeds, *own) if isinstance(seeds, list))
        models = (len(self.methods) + rows) * most
        if models > MOST_MODELS:
            keys = "methods, ablation and lambda_study, for each of the seeds"
            raise ValueError(f"{keys}: found {models} models; expected at most {MOST_MODELS}")

    def networks(self) -> list[str]:
        """Return the networks to train, in the tables' order: methods, and what is there to be refined alone."""
        used = (self.network_of(name) for name in self.methods)
        return list(dict.fromkeys(name for name in used if name is not None))

    def every_method(self) -> list[str]:
        """Return all that a run may train or register with: what is compared, what is refined, the rows of studies."""
        studied = [row.name for study in STUDIES for row in self.variants(study)]
        return list(dict.fromkeys([*self.methods, *self.networks(), *studied]))

    def models_of(self, method: str) -> list[str]:
        """Return the models that a method registers with: of a network and its refinement one a seed, else ``none``."""
        network = self.network_of(method)
        return ["none"] if network is None else [f"seed{seed}" for seed in self.seeds_of(network)]

    def seeds_of(self, network: str) -> list[int]:
        """Return the seeds that a network is trained with: its own, or those of all."""
        settings = self.method(network)
        own = settings.seeds if isinstance(settings, Network) else None
        return self.seeds if own is None else own

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
        if _is_known(self._algorithm(name), "method"):
            raise ValueError(f"'{name}' is no network; expected one of {', '.join(network_names())}")
        settings = self._settings(name, self.settings.get(name, {}))  # not method(): it asks for the studies' rows
        return settings.model_dump(mode="json")

    @cached_property
    def _variant_settings(self) -> dict[str, dict[str, Any]]:
        return {row.name: row.settings for study in STUDIES for row in self.variants(study)}

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
        named = {*STUDIES} - {study}
        return self.model_dump(mode="json", exclude={*PLACES_AND_DRAWINGS, *named})

    def trained_pairs(self) -> list[str]:
        """Return the kinds of pairs that networks are trained with, each once."""
        trained = (self.method(name) for name in self.networks())
        return list(dict.fromkeys(one.training["pairs"] for one in trained if isinstance(one, Network)))

    def scan_parameters(self, name: str) -> dict[str, Any]:
        """Return what :func:`dmir.cohorts.scan_table` is to be given for a cohort."""
        cohort = self.cohorts[name]
        made = Path(self.results, "cohorts", name)
        return {"source": cohort.source, **cohort.scan_parameters(Path(self.root), made)}


PLACES_AND_DRAWINGS = frozenset(
    {"results", "root", "keep_fields", "pairs_per_job", "scans_per_job", "disk_quota_gb", "report"}
)


def _is_known(algorithm: str, kind: str | None = None) -> bool:
    """Tell whether a method or a network goes by a name."""
    try:
        registry.find(algorithm, kind)
    except InputError:
        return False
    return True


def _safe_name(key: str, name: str) -> list[str]:
    allowed = name and all(c.isalnum() or c in "._-" for c in name) and name.isascii() and name[0] not in ".-"
    return [] if allowed else [f"{key}: found '{name}'; expected letters, digits, '.', '_' and '-' (it names folders)"]
