"""Tables and figures: which there are in a run, and what each is made from."""

from __future__ import annotations

import ast
import inspect
from collections.abc import Callable
from itertools import groupby
from pathlib import Path
from typing import Any

from dmir.provenance import ROOT, code_hash, code_record, file_hash, value_hash
from dmir.report import making
from dmir.report.products import Product, products, rules
from dmir.report.published import DATASETS, published_folder
from dmir.report.records import ages_known
from dmir.workflow.facts import Wildcards
from dmir.workflow.parameters import Parameters

Given = str | list[str] | Callable[[Wildcards], Any]
ASSETS = ROOT / "report" / "page" / "assets"
SCORES_A_MB, VOXELS_A_MB = 1500, 3000


class Products(Parameters):
    """The products of a run: their names, their files, their parameters."""

    def tables(self) -> list[str]:
        """Return the names of all tables, but for those of studies."""
        return [product.pattern.format(**one) for product in products("tables") for one in self._each(product.of)]

    def figures(self) -> list[str]:
        """Return the names of all figures, but for those of studies; those of one cohort, or pair, stand together."""
        together = groupby(products("figures"), key=lambda product: product.of)
        groups = [(self._each(of), list(members)) for of, members in together]
        return [product.pattern.format(**one) for each, members in groups for one in each for product in members]

    def _each(self, of: str) -> list[dict[str, str]]:
        """Return the wildcards of every product of a kind."""
        tested, trained = self.configuration.test_on, self.configuration.train_on
        pairs = (dict(zip(("cohort", "moving", "fixed"), pair, strict=True)) for pair in self.pairs_of_page())
        each: dict[str, list[dict[str, str]]] = {
            "all": [{}],
            "unseen": [{}] if any(name != trained for name in tested) else [],
            "published": [{}] if DATASETS.keys() & self._sources().values() else [],
            "cohort": [{"cohort": name} for name in tested],
            "aged": [{"cohort": name} for name in tested if ages_known(self.scans[name])],
            "pair": list(pairs),
            "training": [{"cohort": trained}] if self.networks else [],
            "study": [],
        }
        return each[of]

    def product_rules(self) -> dict[str, list[Product]]:
        """Return rule -> the products that it makes in this run; of a rule that makes none, all that it could make."""
        return {rule: [its for its in kin if self._each(its.of)] or kin for rule, kin in rules().items()}

    def needs_of(self, *kin: Product) -> dict[str, Given]:
        """Return the files of one rule's products by their names in the entries: patterns, or functions, as rules have.

        Kin are of the same study.
        """
        paths, study = self.patterns, kin[0].study
        published = ("ablation",) if study else ("protocols", "scores")
        files: dict[str, Given] = {
            "structures": paths.scores("structures.parquet", study),
            "pairs": paths.scores("pairs.parquet", study),
            "scans": paths.scans(),
            "statistics": [paths.table(f"statistics_{name}.csv") for name in self.configuration.test_on],
            "comparison": paths.table("comparison.csv"),
            "study": paths.table(f"{study}.csv"),
            "published": [str(published_folder() / f"{name}.csv") for name in published],
            "quality": [paths.quality(name) for name in self.cohorts],
            "structure_set": self.structure_set_file,
            "histories": self.histories,
            "summaries": self.summaries,
            "examples": self.examples,
            "truths": self.truths_of_pair,
            **{end: paths.preprocessed("image.nii.gz", scan=f"{{{end}}}") for end in ("moving", "fixed")},
            **{f"{end}_labels": paths.preprocessed("labels.nii.gz", scan=f"{{{end}}}") for end in ("moving", "fixed")},
        }
        return {**{name: files[name] for its in kin for name in its.needs}, "provenance": paths.provenance(study)}

    def params_of(self, *kin: Product) -> dict[str, Any]:
        """Return the parameters of one rule's products by their names in the entries, and what the code of each is."""
        configuration = self.configuration
        values: dict[str, Any] = {
            "methods": configuration.methods,
            "labels": configuration.scores.label_interpolation[0],
            "reference": configuration.reference(),
            "resamples": configuration.report.bootstrap,
            "planes": configuration.report.planes,
            "switches": configuration.ablation.switches,
            "trained_on": configuration.train_on,
            "sources": self._sources(),
            "left_out": {name: self.leaves_out_flagged(name) for name in self.cohorts},
            "structures": self.structure_set,
            "surfaces": self.surfaces_of_cohort,
            "rows": self.rows_of_study,
        }
        named = {name: values[name] for its in kin for name in its.params}
        return {**named, "code": {its.name: code_of(its) for its in kin}}

    def memory_of(self, *kin: Product) -> int:
        """Return the MB that one rule's products, made one after the other, take at the first attempt."""
        more = {"scores": self.score_rows // SCORES_A_MB, "voxels": self.voxels // VOXELS_A_MB, "": 0}
        return max(its.memory + more[its.grows_with] for its in kin)

    def _sources(self) -> dict[str, str]:
        """Return the source of every tested cohort: published figures are of data sets."""
        return {name: self.source_of(name) for name in self.configuration.test_on}

    # --- the report page ---

    def page_files(self) -> dict[str, Given]:
        """Return what the report page shows, by kind."""
        paths, tables, figures = self.patterns, self.tables(), self.figures()
        return {
            "tables": [paths.table(f"{name}.html") for name in tables],
            "csv": [paths.table(f"{name}.csv") for name in tables],
            "figures": [paths.figure(f"{name}.{kind}") for name in figures for kind in ("svg", "png", "json")],
            "origins": [paths.table(f"{name}.json") for name in tables],
            "scans": [paths.scans(name) for name in self.cohorts],
            "examples": sorted({folder for pair in self.examples_of_page() for folder in pair}),
            "volumes": self.volumes_of_page(),
            "summaries": self.of_every_model(self.configuration.train_on, "training.json"),
        }

    def page_params(self) -> dict[str, Any]:
        """Return what the report page is told beside files; studies are on it where they are there."""
        configuration, studies = self.configuration, self.finished_studies()
        return {
            "configuration": configuration.model_dump(mode="json"),
            "tables": self.tables() + studies,
            "figures": self.figures() + studies,
            "pairs": self.pairs_of_page(),
            "examples": self.examples_of_page(),
            "methods": configuration.methods,
            "models": {method: self.models_of(method)[0] for method in configuration.methods},
            "labels": configuration.scores.label_interpolation[0],
            "reference": configuration.reference(),
            "assets": file_hash(ASSETS),
            "code": code_hash("dmir.report.page"),
        }

    def finished_studies(self) -> list[str]:
        """Return the studies whose table and figures are there."""
        paths = self.paths
        shown = {study: (paths.table(f"{study}.html"), paths.figure(f"{study}.svg")) for study in self.studies}
        return [study for study, files in shown.items() if all(Path(file).exists() for file in files)]

    def report_files(self) -> list[str]:
        """Return every file that Snakemake's own report shows."""
        paths = self.paths
        return [
            paths.scores("pairs.csv"),
            *map(paths.quality, self.cohorts),
            *map(paths.contact_sheet, self.cohorts),
            *(paths.table(f"{table}.html") for table in self.tables()),
            *(paths.figure(f"{figure}.svg") for figure in self.figures()),
        ]


def code_of(product: Product) -> dict[str, Any]:
    """Return the modules that make a product, with a hash of them and of its function in :mod:`dmir.report.making`.

    That function is hashed by itself: its module has those of all products.
    """
    record = code_record(*product.modules)
    return {**record, "hash": value_hash([record["hash"], _meaning(product.name)])}


def _meaning(name: str) -> str:
    """Return a product's function, and those of its module that it calls, as text without docstrings."""
    function = ast.parse(inspect.getsource(getattr(making, name))).body[0]
    assert isinstance(function, ast.FunctionDef)
    called = {node.id for node in ast.walk(function) if isinstance(node, ast.Name)}
    helpers = [other for other in sorted(called) if inspect.isfunction(getattr(making, other, None)) and other != name]
    function.body = function.body[1:]  # the docstring
    return ast.dump(function) + "".join(map(_meaning, helpers))
