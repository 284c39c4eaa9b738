"""How each product is made: a function of its name, from files, parameters and the wildcards of its name.

``files``, ``params`` and ``names`` have as attributes what the product's entry in :mod:`dmir.report.products` asks for
and what its pattern leaves open. Each function imports what it needs, so that a table does not wait for a plotting
library, and returns a table (DataFrame) or a figure (Matplotlib's).
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Iterator, Sequence
from functools import partial
from itertools import islice
from pathlib import Path
from types import SimpleNamespace
from typing import TYPE_CHECKING, Any, Protocol

from dmir.job import do_each
from dmir.report.products import Product, product

if TYPE_CHECKING:
    import pandas as pd
    from matplotlib.figure import Figure

    from dmir.report.examples import Example

WORD = re.compile(r"{(\w+)}")


class Asked(Protocol):
    """Something with what was asked for as attributes."""

    def __getattr__(self, name: str, /) -> Any: ...


class Files(SimpleNamespace):
    """Files by name, one or several of each; gone through it gives every one."""

    def __iter__(self) -> Iterator[str]:
        for given in vars(self).values():
            yield from [given] if isinstance(given, str) else given


def make(files: Asked, params: Asked, names: Asked, outputs: Iterable[str]) -> None:
    """Make the products of one job, each of which is told by its name if it fails, and write their files.

    Parameters
    ----------
    files, params, names
        As the functions of this module are given them, of all products together; ``params.code`` has the products'
        names, each with the modules that make it.
    outputs
        The files of one product after those of another; of one they differ in their suffixes.
    """
    left = iter(outputs)
    parts = {name: [*islice(left, len(product(name).files))] for name in params.code}
    do_each({name: partial(_make_one, product(name), files, params, names, part) for name, part in parts.items()})


def _make_one(its: Product, files: Asked, params: Asked, names: Asked, outputs: Sequence[str]) -> None:
    """Make a product of those of the job's files that it needs, and write its own, each all at once."""
    from dmir.report.origin import origin_of

    own = Files(**{name: getattr(files, name) for name in (*its.needs, "provenance")})
    made = globals()[its.name](own, params, names)
    origin = origin_of(files.provenance, own, params.code[its.name]["modules"])
    stem = Path(outputs[0]).with_suffix("")
    if its.folder == "figures":
        from dmir.report.style import save_figure

        save_figure(made, stem, origin=origin)
    else:
        from dmir.report.writing import write_table

        caption = its.caption_for(getattr(names, "study", None))
        words = {word: getattr(names if hasattr(names, word) else params, word) for word in WORD.findall(caption)}
        write_table(made, stem, caption=caption.format(**words), origin=origin)


# --- tables ---


def comparison_table(files: Files, params: Asked, names: Asked) -> pd.DataFrame:
    """Compare all methods on all cohorts."""
    import pandas as pd

    from dmir.report.tables import comparison_table, mark_differences
    from dmir.tables import read_scores, read_table

    structures, pairs = read_scores(files.structures), read_scores(files.pairs)
    table = comparison_table(structures, pairs, params.methods, params.labels, sources=params.sources)
    statistics = pd.concat([read_table(path) for path in files.statistics], ignore_index=True)
    return mark_differences(table, statistics, params.reference)


def statistics_table(files: Files, params: Asked, names: Asked) -> pd.DataFrame:
    """Test every method of a cohort against the reference."""
    from dmir.report.statistics import statistics_table
    from dmir.tables import read_scores, read_table

    return statistics_table(
        read_scores(files.structures, names.cohort),
        read_scores(files.pairs, names.cohort),
        read_table(files.scans, text=True),
        params.methods,
        params.reference,
        labels=params.labels,
        resamples=params.resamples,
    )


def topology_table(files: Files, params: Asked, names: Asked) -> pd.DataFrame:
    """Compare what the methods do to the topology of structures."""
    from dmir.report.topology import topology_table
    from dmir.tables import read_scores

    return topology_table(read_scores(files.structures), read_scores(files.pairs), params.methods)


def cross_cohort_table(files: Files, params: Asked, names: Asked) -> pd.DataFrame:
    """Compare the methods on cohorts that the networks have not seen."""
    from dmir.report.cross_cohort import cross_cohort_table
    from dmir.tables import read_table

    return cross_cohort_table(read_table(files.comparison), params.trained_on)


def dice_by_structure_table(files: Files, params: Asked, names: Asked) -> pd.DataFrame:
    """Compare the methods structure by structure."""
    from dmir.report.tables import structure_scores
    from dmir.tables import read_scores

    return structure_scores(read_scores(files.structures, names.cohort), params.methods, labels=params.labels)


def study_table(files: Files, params: Asked, names: Asked) -> pd.DataFrame:
    """Compare the rows of a study: the ablation, or lambda."""
    from dmir.report.studies import study_table
    from dmir.tables import read_record, read_scores

    summaries: dict[str, list[dict[str, Any]]] = {}
    for path in map(Path, files.summaries):
        summaries.setdefault(path.parts[-3], []).append(read_record(path))
    structures, pairs = read_scores(files.structures), read_scores(files.pairs)
    return study_table(structures, pairs, params.rows, summaries, params.labels)


def training_table(files: Files, params: Asked, names: Asked) -> pd.DataFrame:
    """List the trainings of a cohort's models: what each cost, and what it brought."""
    from dmir.report.curves import read_history
    from dmir.report.tables import training_table
    from dmir.tables import read_record

    models = {}
    for history, summary in zip(map(Path, files.histories), files.summaries, strict=True):
        models[history.parts[-3], history.parts[-2]] = read_history(history), read_record(summary)
    return training_table(models)


def preprocessing_table(files: Files, params: Asked, names: Asked) -> pd.DataFrame:
    """Say what the preprocessing of every cohort cost and how it went."""
    from dmir.report.preprocessing import preprocessing_table
    from dmir.tables import read_table

    return preprocessing_table({Path(path).parent.name: read_table(path) for path in files.quality}, params.left_out)


def failures_table(files: Files, params: Asked, names: Asked) -> pd.DataFrame:
    """List the registrations that failed."""
    from dmir.report.failures import failures_table
    from dmir.tables import read_scores

    return failures_table(read_scores(files.pairs), params.methods)


def published_table(files: Files, params: Asked, names: Asked) -> pd.DataFrame:
    """List what others published on the data sets that are tested."""
    from dmir.report.published import published_table

    return published_table(params.sources.values())


def structure_table(files: Files, params: Asked, names: Asked) -> pd.DataFrame:
    """List the structures that a cohort is scored on."""
    from dmir.report.tables import structure_table
    from dmir.structures import load_structures

    return structure_table(load_structures(params.structures).table)


# --- figures ---


def dice_by_structure(files: Files, params: Asked, names: Asked) -> Figure:
    """Draw Dice by structure and method."""
    from dmir.report.boxplot import dice_boxplot
    from dmir.tables import read_scores

    scores = read_scores(files.structures, names.cohort)
    return dice_boxplot(scores, params.methods, labels=params.labels, cohort=names.cohort)


def critical_difference(files: Files, params: Asked, names: Asked) -> Figure:
    """Draw the mean ranks of the methods with the critical difference."""
    from dmir.report.critical_difference import critical_difference_figure
    from dmir.tables import read_scores, read_table

    structures, pairs = (read_scores(path, names.cohort) for path in (files.structures, files.pairs))
    scans = read_table(files.scans, text=True)
    return critical_difference_figure(structures, pairs, scans, params.methods, labels=params.labels)


def dice_against_age(files: Files, params: Asked, names: Asked) -> Figure:
    """Draw the Dice of every subject against its age."""
    from dmir.report.age import age_figure
    from dmir.tables import read_scores, read_table

    structures, pairs = (read_scores(path, names.cohort) for path in (files.structures, files.pairs))
    return age_figure(structures, pairs, read_table(files.scans, text=True), params.methods, labels=params.labels)


def dice_against_time(files: Files, params: Asked, names: Asked) -> Figure:
    """Draw Dice against time."""
    from dmir.report.tradeoffs import dice_against_time
    from dmir.tables import read_table

    table = read_table(files.comparison)
    return dice_against_time(table[table["cohort"] == names.cohort])


def dice_against_folding(files: Files, params: Asked, names: Asked) -> Figure:
    """Draw Dice against folding."""
    from dmir.report.tradeoffs import dice_against_folding
    from dmir.tables import read_table

    table = read_table(files.comparison)
    return dice_against_folding(table[table["cohort"] == names.cohort])


def qualitative(files: Files, params: Asked, names: Asked) -> Figure:
    """Draw one pair as every method registered it."""
    from dmir.preprocess.truth import truth_of_pair
    from dmir.report.qualitative import qualitative_figure
    from dmir.volumes import read_image

    truths = {Path(path).parent.name: path for path in files.truths}
    return qualitative_figure(
        registered_examples(files.examples, names),
        read_image(files.moving).data,
        read_image(files.fixed).data,
        planes=params.planes,
        truth=truth_of_pair(truths, names.moving, names.fixed),
    )


def contours(files: Files, params: Asked, names: Asked) -> Figure:
    """Draw structures of one pair as surfaces, before registration and after every method."""
    from dmir.report.contours import contours_figure
    from dmir.structures import load_structures
    from dmir.volumes import read_labels

    return contours_figure(
        registered_examples(files.examples, names),
        read_labels(files.moving_labels).data,
        read_labels(files.fixed_labels).data,
        load_structures(params.structures).names,
        structures=params.surfaces,
        interpolation=params.labels,
    )


def registered_examples(folders: Iterable[str], names: Asked) -> list[Example]:
    """Read the examples of one pair, of every method; the file of a method that failed is empty."""
    from dmir.report.examples import example_file, load_example

    paths = [example_file(folder, names.moving, names.fixed) for folder in folders]
    return [load_example(path) for path in paths if path.stat().st_size]


def training_curves(files: Files, params: Asked, names: Asked) -> Figure:
    """Draw the training curves of all models of a cohort."""
    from dmir.report.curves import read_history, training_curves

    paths = [Path(path) for path in files.histories]
    return training_curves({(path.parts[-3], path.parts[-2]): read_history(path) for path in paths})


def ablation_figure(files: Files, params: Asked, names: Asked) -> Figure:
    """Draw the ablation."""
    from dmir.report.studies import ablation_figure
    from dmir.tables import read_table

    return ablation_figure(read_table(files.study), params.switches)


def lambda_figure(files: Files, params: Asked, names: Asked) -> Figure:
    """Draw Dice and folding against lambda."""
    from dmir.report.studies import lambda_figure
    from dmir.tables import read_table

    return lambda_figure(read_table(files.study))
