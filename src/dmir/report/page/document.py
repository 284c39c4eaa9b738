"""The page: what was read, put into its template with style and scripts, so that it needs nothing beside it."""

from __future__ import annotations

import base64
import hashlib
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from jinja2 import Environment, FileSystemLoader, StrictUndefined
from markupsafe import Markup

from dmir.report.origin import KINDS
from dmir.report.page.contents import read_figures, read_origins, read_tables
from dmir.report.page.summary import summarise
from dmir.report.page.surroundings import (
    configuration_text,
    machine,
    revision_text,
    versions,
    without_home,
)
from dmir.report.page.times import duration, read_times, read_trainings
from dmir.report.page.viewer import pack_pairs
from dmir.volumes import atomic_path

ASSETS = Path(__file__).parent / "assets"
SCRIPTS = ("page.js", "viewer.js")


def _asset(name: str) -> str:
    return (ASSETS / name).read_text(encoding="utf-8")


def _policy(scripts: Sequence[str]) -> str:
    """Return what the page may do: run its own scripts, show the pictures inside it, and ask no network."""
    hashes = [base64.b64encode(hashlib.sha256(script.encode()).digest()).decode("ascii") for script in scripts]
    sources = " ".join(f"'sha256-{value}'" for value in hashes)
    return f"default-src 'none'; img-src data:; style-src 'unsafe-inline'; script-src {sources}; base-uri 'none'"


def write_page(
    results: str | Path,
    target: str | Path,
    *,
    configuration: Mapping[str, Any],
    tables: Sequence[str],
    figures: Sequence[str],
    pairs: Sequence[tuple[str, str, str]],
    examples: Sequence[Sequence[str | Path]],
    methods: Sequence[str],
    models: Mapping[str, str],
    command: str,
    revision: str,
    label_interpolation: str = "nearest",
    reference: str = "caml",
    budget_bytes: int = 24_000_000,
) -> Path:
    """Write the report: one page that opens without a network and without other files.

    Parameters
    ----------
    results
        The folder of results; nothing else is read.
    target
        The page. Links to the files of tables and figures are relative to it.
    configuration
        Everything that was configured, as nested mappings.
    tables, figures
        Names, without a suffix, of what is shown; what is not there is named as missing.
    pairs, examples
        (cohort, moving, fixed) of the pairs that can be looked at, and of each the methods' folders of examples.
    methods, models
        The methods in their order, and of each the model whose example is shown; ``none`` where nothing is trained.
    command
        The exact command of the run.
    revision
        What ``git describe --dirty`` said; may be empty.
    label_interpolation
        Of the warped labels, ``nearest`` or ``linear``.
    reference
        The method that the others are tested against.
    budget_bytes
        Of the volumes inside the page; above it they are reduced by an integer factor.

    Returns
    -------
    Path
        The page.

    Raises
    ------
    InputError
        A volume or an example is damaged, or the files of a pair lie on different grids.
    """
    results, target = Path(results), Path(target)
    cohorts = list((configuration.get("cohorts") or {}).keys())
    scripts = [_asset(name) for name in SCRIPTS]
    viewer = pack_pairs(
        results, [(c, m, f) for c, m, f in pairs], methods, examples, configuration,
        interpolation=label_interpolation, budget_bytes=budget_bytes,
    )  # fmt: skip
    environment = Environment(
        loader=FileSystemLoader(ASSETS),
        autoescape=True,
        undefined=StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    environment.filters["duration"] = duration
    text = environment.get_template("page.html.j2").render(
        style=Markup(_asset("page.css")),  # the package's own: nothing of the user's is in it
        scripts=[Markup(script) for script in scripts],
        policy=_policy(scripts),
        summary=summarise(results, configuration, methods, models, label_interpolation, reference),
        tables=read_tables(results, tables, cohorts, target),
        figures=read_figures(results, figures, cohorts, target),
        viewer=viewer,
        times=read_times(results),
        trainings=read_trainings(results, tables),
        machine=machine(),
        versions=versions(),
        command=without_home(command),
        revision=revision_text(revision),
        origins=read_origins(results, tables, figures),
        hash_kinds=KINDS,
        configuration=configuration_text(configuration),
        interpolation=label_interpolation,
        reference=reference,
    )
    with atomic_path(target) as temporary:
        temporary.write_text(text, encoding="utf-8")
    return target
