"""Every table and figure of the report: an entry here, and in :mod:`dmir.report.making` the function of its name.

Nothing else is to be told of a new one. The workflow makes a rule of each entry, with the files and parameters that it
asks for; the report page takes titles and order from here.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import dataclass
from functools import partial

SUFFIXES = {"tables": (".html", ".csv", ".md", ".tex", ".json"), "figures": (".svg", ".png", ".pdf", ".json")}


@dataclass(frozen=True)
class Product:
    """A table or a figure, or one for each cohort, pair or study.

    Attributes
    ----------
    name
        Of its rule, and of its function in :mod:`dmir.report.making`.
    folder
        ``"tables"`` or ``"figures"``.
    pattern
        Of its files' names, without a suffix; wildcards in braces.
    of
        What there is one of it for: ``"all"``, ``"unseen"`` (all, where a cohort is tested that was not trained on),
        ``"published"`` (all, where others published on what is tested), ``"cohort"`` (each that is tested), ``"aged"``
        (those with ages), ``"pair"`` (each that is drawn), ``"training"`` (if any), ``"study"`` (if asked for).
    needs, params
        Its files, and what else its function is given, by the names that :mod:`dmir.workflow.products` knows.
    modules
        Of this package, that make it: where they change, it is made anew.
    title
        On the report page; of studies, by the study's name.
    caption
        Above the table, with wildcards and parameters in braces, or below the figure on the page; by study as well.
    label
        What Snakemake's report calls it.
    category
        Where it stands there.
    text
        Its caption there: a file in ``workflow/report/``; "": none.
    study
        Whose scores it is of: ``""`` (the comparison), a study, or ``"{study}"``.
    memory
        MB that it takes at least.
    grows_with
        What it takes more for: ``"scores"``, ``"voxels"`` or ``""``.
    together
        The rule that makes it with its kin, which are of the same and wait for the same, in one job: most take less
        time than the start of a process. "": a rule of its own name.
    """

    name: str
    folder: str
    pattern: str
    needs: tuple[str, ...]
    modules: tuple[str, ...]
    title: str | Mapping[str, str]
    label: str
    caption: str | Mapping[str, str] = ""
    params: tuple[str, ...] = ()
    of: str = "all"
    category: str = "Tables"
    text: str = ""
    study: str = ""
    memory: int = 1000
    grows_with: str = ""
    together: str = ""

    @property
    def rule(self) -> str:
        """The name of the rule that makes it."""
        return self.together or self.name

    @property
    def wildcards(self) -> list[str]:
        """What tells one of it from another."""
        return re.findall(r"{(\w+)}", self.pattern)

    @property
    def log(self) -> str:
        """The name of its job's log and benchmark, without a suffix: the rule, then a folder a wildcard."""
        if not self.wildcards:
            return self.rule
        wildcards = self.pattern[self.pattern.index("{") :]
        return f"{self.rule}/{wildcards.replace('}_{', '}/{')}"

    @property
    def files(self) -> tuple[str, ...]:
        """Its files below the results: the one that reports show first, then the others."""
        return tuple(f"{self.folder}/{self.pattern}{suffix}" for suffix in SUFFIXES[self.folder])

    @property
    def labels(self) -> dict[str, str]:
        """What Snakemake's report finds it by."""
        found = {wildcard: f"{{{wildcard}}}" for wildcard in self.wildcards if wildcard != "study"}
        return {self.folder.removesuffix("s"): self.label, **found}

    @property
    def titles(self) -> dict[str, str]:
        """The first part of its files' names -> its title; of a study, the study's name."""
        if isinstance(self.title, str):
            return {self.pattern.split("_{")[0]: self.title}
        return dict(self.title)

    def caption_for(self, study: str | None) -> str:
        """Return its caption, of a study that study's own."""
        return self.caption if isinstance(self.caption, str) else self.caption[str(study)]


_table = partial(Product, folder="tables")
_figure = partial(Product, folder="figures", category="Figures", memory=2000)
_WRITING = "dmir.report.writing"

# in the order in which readers ask for them
PRODUCTS = (
    _table(
        name="comparison_table",
        pattern="comparison",
        needs=("structures", "pairs", "statistics", "published"),
        params=("methods", "labels", "reference", "sources"),
        modules=("dmir.report.tables", _WRITING),
        title="Comparison of the methods",
        caption="Comparison of the registration methods.",
        label="comparison of all methods",
        text="comparison",
        grows_with="scores",
        together="comparison_tables",
    ),
    _table(
        name="statistics_table",
        pattern="statistics_{cohort}",
        of="cohort",
        needs=("structures", "pairs", "scans"),
        params=("methods", "labels", "reference", "resamples"),
        modules=("dmir.report.statistics", _WRITING),
        title="Tests and intervals",
        caption="Differences between the methods, {cohort}.",
        label="statistics",
        text="statistics",
        memory=2000,
        grows_with="scores",
        together="cohort_products",
    ),
    _table(
        name="topology_table",
        pattern="topology",
        needs=("structures", "pairs"),
        params=("methods",),
        modules=("dmir.report.topology", _WRITING),
        title="Topology of the warped labels",
        caption="Changes of the structures' volumes and topology.",
        label="topology of the warped labels",
        text="topology",
        grows_with="scores",
        together="comparison_tables",
    ),
    _table(
        name="cross_cohort_table",
        pattern="cross_cohort",
        of="unseen",
        needs=("comparison",),
        params=("trained_on",),
        modules=("dmir.report.cross_cohort", _WRITING),
        title="Cohorts unseen in training",
        caption="Methods on cohorts other than {trained_on}, which the networks were trained on.",
        label="unseen cohorts",
        text="cross_cohort",
    ),
    _table(
        name="dice_by_structure_table",
        pattern="dice_by_structure_{cohort}",
        of="cohort",
        needs=("structures",),
        params=("methods", "labels"),
        modules=("dmir.report.tables", _WRITING),
        title="Dice by structure",
        caption="Dice by structure, {cohort} ({labels} labels).",
        label="Dice by structure",
        text="dice_by_structure",
        grows_with="scores",
        together="cohort_products",
    ),
    _table(
        name="study_table",
        pattern="{study}",
        of="study",
        study="{study}",
        needs=("structures", "pairs", "summaries", "published"),
        params=("rows", "labels"),
        modules=("dmir.report.studies", _WRITING),
        title={"ablation": "Ablation", "lambda_study": "Weight of the regularisation"},
        caption={
            "ablation": "Ablation: every combination of the parts.",
            "lambda_study": "The regularisation's weight.",
        },
        label="{study}",
        category="Studies",
        text="study_table",
        grows_with="scores",
    ),
    _table(
        name="training_table",
        pattern="trainings_{cohort}",
        of="training",
        needs=("histories", "summaries"),
        modules=("dmir.report.tables", "dmir.report.curves", _WRITING),
        title="Trainings",
        caption="Trainings on {cohort}.",
        label="trainings",
        category="Training",
        text="training_table",
        together="trainings",
    ),
    _table(
        name="preprocessing_table",
        pattern="preprocessing",
        needs=("quality",),
        params=("left_out",),
        modules=("dmir.report.preprocessing", _WRITING),
        title="Preprocessing",
        caption="Preprocessing of every cohort.",
        label="cost and overlap",
        category="Preprocessing",
        text="preprocessing",
    ),
    _table(
        name="failures_table",
        pattern="failures",
        needs=("pairs",),
        params=("methods",),
        modules=("dmir.report.failures", _WRITING),
        title="Registrations that failed",
        caption="Registrations that failed.",
        label="registrations that failed",
        text="failures",
        together="comparison_tables",
    ),
    _table(
        name="published_table",
        pattern="published",
        of="published",
        needs=("published",),
        params=("sources",),
        modules=("dmir.report.published", _WRITING),
        title="Published figures",
        caption="Published figures.",
        label="published figures",
        text="published",
        together="comparison_tables",
    ),
    _table(
        name="structure_table",
        pattern="structures_{cohort}",
        of="cohort",
        needs=("structure_set",),
        params=("structures",),
        modules=("dmir.report.tables", _WRITING),
        title="Structures",
        caption="Structures of {cohort} ({structures}).",
        label="structures",
        text="structures",
        together="cohort_products",
    ),
    _figure(
        name="dice_by_structure",
        pattern="dice_by_structure_{cohort}",
        of="cohort",
        needs=("structures",),
        params=("methods", "labels"),
        modules=("dmir.report.boxplot",),
        title="Dice by structure",
        caption="Left and right are averaged; the best-aligned structures come first. Boxes are quartiles over pairs "
        "with the median, whiskers reach to 1.5 interquartile ranges, dots lie beyond.",
        label="Dice by structure",
        text="dice_by_structure",
        grows_with="scores",
        together="cohort_products",
    ),
    _figure(
        name="critical_difference",
        pattern="critical_difference_{cohort}",
        of="cohort",
        needs=("structures", "pairs", "scans"),
        params=("methods", "labels"),
        modules=("dmir.report.critical_difference",),
        title="Mean ranks",
        caption="Mean ranks of the methods by Dice over subjects; 1 is best. Bars join methods that do not differ at "
        "the 0.05 level (Nemenyi's critical difference, or Friedman's test finds none). Affine alignment is not "
        "ranked.",
        label="critical difference",
        text="critical_difference",
        grows_with="scores",
        together="cohort_products",
    ),
    _figure(
        name="dice_against_time",
        pattern="dice_against_time_{cohort}",
        of="cohort",
        needs=("comparison",),
        modules=("dmir.report.tradeoffs",),
        title="Dice against time",
        caption="Mean Dice with its standard deviation over pairs, against the median seconds a pair. The notes of the "
        "comparison table name the devices.",
        label="Dice against time",
        text="dice_against_time",
        together="tradeoffs",
    ),
    _figure(
        name="dice_against_folding",
        pattern="dice_against_folding_{cohort}",
        of="cohort",
        needs=("comparison",),
        modules=("dmir.report.tradeoffs",),
        title="Dice against folding",
        caption="Mean Dice against the share of voxels whose Jacobian determinant is not positive (forward "
        "differences). Methods without any fold stand side by side in the grey band.",
        label="Dice against folding",
        text="dice_against_folding",
        together="tradeoffs",
    ),
    _figure(
        name="dice_against_age",
        pattern="dice_against_age_{cohort}",
        of="aged",
        needs=("structures", "pairs", "scans"),
        params=("methods", "labels"),
        modules=("dmir.report.age",),
        title="Dice against age",
        caption="Dice of each test subject against its age: whether a method fares worse where brains differ more from "
        "the fixed scan.",
        label="Dice against age",
        text="dice_against_age",
        grows_with="scores",
    ),
    _figure(
        name="qualitative",
        pattern="qualitative_{cohort}_{moving}__{fixed}",
        of="pair",
        needs=("examples", "moving", "fixed", "truths"),
        params=("planes",),
        modules=("dmir.report.qualitative",),
        title="One pair, every method",
        caption="Above, before deformable registration. Below, for each method: the warped moving image, the deformed "
        "grid and the Jacobian determinant (red: the moving image is larger there, blue: smaller, yellow: folded); in "
        "one plane alone also the length of the displacement, the difference from the fixed image and, where the truth "
        "is known, the endpoint error. Colour scales are shared.",
        label="qualitative",
        text="qualitative",
        grows_with="voxels",
        together="pictures",
    ),
    _figure(
        name="contours",
        pattern="contours_{cohort}_{moving}__{fixed}",
        of="pair",
        needs=("examples", "moving_labels", "fixed_labels"),
        params=("structures", "surfaces", "labels"),
        modules=("dmir.report.contours",),
        title="Structures before and after",
        caption="Surfaces of some structures in three dimensions: those of the fixed scan with those of the moving "
        "scan before registration and after it by each method.",
        label="surfaces",
        text="contours",
        grows_with="voxels",
        together="pictures",
    ),
    _figure(
        name="training_curves",
        pattern="training_curves_{cohort}",
        of="training",
        needs=("histories",),
        modules=("dmir.report.curves",),
        title="Training",
        caption="Loss over training steps, and Dice on the validation scans, on which the kept weights are chosen.",
        label="training curves",
        category="Training",
        text="training_curves",
        together="trainings",
    ),
    _figure(
        name="ablation_figure",
        pattern="ablation",
        of="study",
        study="ablation",
        needs=("study",),
        params=("switches",),
        modules=("dmir.report.studies",),
        title="Ablation",
        caption="The proposed network with its components switched on and off, all else equal.",
        label="ablation",
        category="Studies",
        text="ablation",
    ),
    _figure(
        name="lambda_figure",
        pattern="lambda_study",
        of="study",
        study="lambda_study",
        needs=("study",),
        modules=("dmir.report.studies",),
        title="Weight of the regularisation",
        caption="Dice and folding against λ, the weight of the regularisation in the loss.",
        label="lambda study",
        category="Studies",
        text="lambda_study",
    ),
)


def products(folder: str) -> list[Product]:
    """Return the tables, or the figures."""
    return [product for product in PRODUCTS if product.folder == folder]


def product(name: str) -> Product:
    """Return the product of a name."""
    return next(product for product in PRODUCTS if product.name == name)


def rules() -> dict[str, list[Product]]:
    """Return rule -> what it makes, in the order of :data:`PRODUCTS`."""
    made: dict[str, list[Product]] = {}
    for product in PRODUCTS:
        made.setdefault(product.rule, []).append(product)
    return made
