"""The command ``dmir``: register two scans, score a field, check or plan a configuration, convert published weights.

Imports happen inside the commands: ``dmir check`` answers in a second because it loads no torch until it must.
"""

from __future__ import annotations

import argparse
import json
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import dmir
from dmir.errors import DmirError, InputError, suggestion

if TYPE_CHECKING:
    import pandas as pd

    from dmir.config import Config


def main(arguments: Sequence[str] | None = None) -> int:
    """Run one command; a user's mistake is one message and status 1."""
    options = _parser().parse_args(arguments)
    try:
        options.run(options)
    except DmirError as error:
        print(f"Error: {error}", file=sys.stderr)
        return 1
    return 0


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(prog="dmir", description=dmir.__doc__)
    parser.add_argument("--version", action="version", version=f"dmir {dmir.__version__}")
    commands = parser.add_subparsers(required=True, metavar="COMMAND")

    register = commands.add_parser("register", help="register a moving scan to a fixed one")
    register.add_argument("--moving", required=True, type=Path, help="scan to be warped")
    register.add_argument("--fixed", required=True, type=Path, help="scan that it is warped to")
    register.add_argument("--method", required=True, help="affine, syn, elastix, or the path of a model.safetensors")
    register.add_argument("--out", required=True, type=Path, help="folder for field, affine, warped image and labels")
    register.add_argument("--moving-labels", type=Path, help="label map of the moving scan, to be warped too")
    register.add_argument(
        "--fixed-labels", type=Path, help="label map of the fixed scan, to be brought to the moving scan's own space"
    )
    register.add_argument("--moving-mask", type=Path, help="brain mask; without it the scan must be stripped already")
    register.add_argument("--fixed-mask", type=Path, help="brain mask; without it the scan must be stripped already")
    register.add_argument("--no-affine", action="store_true", help="the scans are affinely aligned already")
    register.add_argument("--label-interpolation", choices=["nearest", "linear"], default="nearest")
    register.add_argument(
        "--refine", type=int, metavar="STEPS", help="refine a network's field on this pair, for instance in 20 steps"
    )
    register.add_argument("--threads", type=int, default=1, help="threads of the method (default 1)")
    register.set_defaults(run=_register)

    native = commands.add_parser("native", help="bring a volume on a cohort's grid back to a scan's own space")
    native.add_argument(
        "--preprocessed", required=True, type=Path, help="the scan's folder, results/preprocessed/<cohort>/<scan>"
    )
    native.add_argument("--volume", required=True, type=Path, help="label map or image on the cohort's grid")
    native.add_argument("--like", required=True, type=Path, help="the scan as it came, whose grid the result gets")
    native.add_argument("--out", required=True, type=Path, help="the volume to write")
    native.add_argument(
        "--interpolation",
        choices=["nearest", "generic_label", "linear"],
        default="nearest",
        help="nearest (default) or generic_label for label maps, linear for images",
    )
    native.add_argument("--orientation", help="the cohort's key orientation, where the scan's header is wrong")
    native.set_defaults(run=_native)

    score = commands.add_parser("score", help="score a displacement field")
    score.add_argument("--field", required=True, type=Path, help="field as ITK and ANTs write it")
    score.add_argument("--moving-labels", required=True, type=Path)
    score.add_argument("--fixed-labels", required=True, type=Path)
    score.add_argument("--structures", required=True, help="a table of resources/structures, for instance lpba56")
    score.add_argument("--truth", type=Path, help="true field on the same grid, for the endpoint error")
    score.add_argument("--json", action="store_true", help="print JSON instead of a table")
    score.set_defaults(run=_score)

    scans = commands.add_parser("scans", help="print the table of scans that a folder holds")
    scans.add_argument("source", help="a source of scans, for instance freesurfer, bids or lpba40")
    scans.add_argument("folder", type=Path)
    scans.set_defaults(run=_scans)

    check = commands.add_parser(
        "check", help="tell what is wrong with a configuration before anything runs, or whether results still agree"
    )
    check.add_argument("path", type=Path, metavar="CONFIG|RESULTS", help="a configuration, or a folder of results")
    check.add_argument(
        "--config", type=Path, help="what the results should be of (default: the configuration of their last run)"
    )
    check.set_defaults(run=_check)

    plan = commands.add_parser("plan", help="tell what a configuration will cost: jobs, hours, memory, disk")
    plan.add_argument("config", type=Path)
    plan.add_argument("--seconds", type=float, default=120.0, help="for all measurements together (default 120)")
    plan.add_argument("--no-measure", action="store_true", help="lower bounds and stated constants alone")
    plan.add_argument("--device", default="auto", choices=["auto", "cpu", "cuda"], help="what networks run on")
    plan.add_argument("--threads", type=int, default=1, help="threads of a job (default 1)")
    plan.add_argument("--gpus", type=int, default=1, help="cards that share the jobs (default 1)")
    plan.add_argument("--json", action="store_true", help="print JSON instead of a table")
    plan.add_argument("--out", type=Path, help="write the table here too: .csv or .md")
    plan.set_defaults(run=_plan)

    convert = commands.add_parser("convert-weights", help="make a model of weights that a network's authors published")
    convert.add_argument("weights", type=Path, help="state dict as torch saved it (.pt, .pth, .pth.tar)")
    convert.add_argument("--network", required=True, help="voxelmorph, vit_v_net or transmorph")
    convert.add_argument("--shape", required=True, type=int, nargs=3, help="grid it was trained on, in voxels")
    convert.add_argument("--spacing", type=float, default=1.0, help="of that grid in mm (default 1)")
    convert.add_argument("--out", required=True, type=Path, help="the model.safetensors to write")
    convert.add_argument(
        "--set",
        nargs="+",
        action="extend",
        default=[],
        metavar="KEY=VALUE",
        help="hyperparameters that are not the default, for instance window=[5,6,7]",
    )
    convert.set_defaults(run=_convert_weights)

    table = commands.add_parser("table", help="print a comparison table")
    table.add_argument("table", type=Path, help="results/tables/comparison.csv")
    table.set_defaults(run=_table)

    docs = commands.add_parser("docs", help="write config/config.schema.json and config/README.md")
    docs.add_argument("--folder", type=Path, default=Path("config"))
    docs.set_defaults(run=_docs)
    return parser


def _register(options: argparse.Namespace) -> None:
    from dmir.job import limit_threads

    limit_threads(options.threads)

    from dmir.fields import save_field
    from dmir.methods.scans import read_labels_of, read_stripped, register_scans
    from dmir.preprocess import write_affine
    from dmir.volumes import write_volume

    method, parameters = _method(options)
    moving = read_stripped(options.moving, options.moving_mask, "moving")
    fixed = read_stripped(options.fixed, options.fixed_mask, "fixed")
    result = register_scans(
        moving,
        fixed,
        method=method,
        moving_labels=read_labels_of(moving, options.moving_labels, "moving"),
        fixed_labels=read_labels_of(fixed, options.fixed_labels, "fixed"),
        align=not options.no_affine,
        label_interpolation=options.label_interpolation,
        **parameters,
    )
    save_field(options.out / "field.nii.gz", result.displacement, fixed.affine)
    write_affine(options.out / "affine.mat", result.affine)
    volumes = {
        "warped.nii.gz": result.warped,
        "warped_labels.nii.gz": result.warped_labels,
        "fixed_labels_on_moving.nii.gz": result.fixed_labels_on_moving,
    }
    written = {name: volume for name, volume in volumes.items() if volume is not None}
    for name, volume in written.items():
        write_volume(options.out / name, volume)
    print(f"{options.out}: {', '.join(['field.nii.gz', 'affine.mat', *written])}")


def _method(options: argparse.Namespace) -> tuple[str, dict[str, Any]]:
    """Return the method and its parameters: a network's file, or the refinement of its field."""
    if options.refine is None:
        return options.method, {}
    if not options.method.endswith(".safetensors"):
        found, expected = f"with --method {options.method}", "a network's model.safetensors, whose field is refined"
        raise InputError("--refine", found=found, expected=expected)
    return "refinement", {"weights": options.method, "steps": options.refine}


def _native(options: argparse.Namespace) -> None:
    from dmir.preprocess.native import native_files

    native_files(
        options.out,
        preprocessed=options.preprocessed,
        volume=options.volume,
        like=options.like,
        interpolation=options.interpolation,
        orientation=options.orientation,
    )
    print(f"{options.out}: {options.volume} in the space of {options.like}")


def _score(options: argparse.Namespace) -> None:
    from dmir.metrics.files import score_files

    structures, pair = score_files(
        options.field, options.moving_labels, options.fixed_labels, options.structures, truth=options.truth
    )
    if options.json:
        content = {"structures": json.loads(structures.to_json(orient="records")), "pair": pair}
        print(json.dumps(content, indent=2, default=float).replace("NaN", "null"))
        return
    print(structures.to_string(index=False, float_format="{:.4f}".format))
    print()
    for name, value in pair.items():
        print(f"{name:32s} {value:.6g}" if isinstance(value, float) else f"{name:32s} {value}")


def _scans(options: argparse.Namespace) -> None:
    from dmir.cohorts import folder_sources, source_table

    sources = folder_sources()
    if options.source not in sources:
        hint = suggestion(options.source, sources)
        raise InputError("source", found=f"'{options.source}'", expected="a source that reads a folder", remedy=hint)
    table = source_table(options.source, folder=options.folder)
    print(table.to_csv(index=False), end="")


def _check(options: argparse.Namespace) -> None:
    if options.path.is_dir():
        _check_results(options.path, options.config)
    elif options.config is not None:
        raise InputError(options.path, found="no folder", expected="a folder of results beside --config")
    else:
        _check_configuration(options.path)


def _check_results(results: Path, config: Path | None) -> None:
    """Print a line a table or figure; those that no longer agree are an error."""
    from dmir.config import read_config
    from dmir.report.agreement import check_results

    found = check_results(results, None if config is None else read_config(config))
    for product in found:
        print(f"{product.name}: {'; '.join(product.problems) or 'agrees'}")
    for unknown in dict.fromkeys(line for product in found for line in product.unknown):
        print(f"could not be compared: {unknown}")
    stale = sum(bool(product.problems) for product in found)
    if stale:
        raise InputError(
            results,
            found=f"{stale} of {len(found)} tables and figures that do not agree with what they were made from",
            expected="all to agree",
            remedy="Run snakemake again: it makes anew what is out of date. Delete first what was changed by hand.",
        )
    print(f"{results}: {len(found)} tables and figures agree with configuration, code, data and weights")


def _check_configuration(path: Path) -> None:
    from dmir.cohorts import check_unseen
    from dmir.config import ConfigError, Network, read_config
    from dmir.planning.jobs import cohort_size
    from dmir.planning.quota import room_for_fields

    configuration = read_config(path)
    problems, tables = [], {}
    for name in dict.fromkeys([configuration.train_on, *configuration.test_on]):
        try:
            tables[name] = _listed(configuration, name)
        except InputError as error:
            problems.append(f"cohorts.{name}: {error}")
    if not problems:
        try:
            check_unseen(tables, {name: configuration.origin(name) for name in tables}, configuration.train_on)
            room_for_fields(configuration, {name: cohort_size(configuration, name) for name in tables})
        except InputError as error:
            problems.append(str(error))
    studied = [row.name for study in ("ablation", "lambda_study") for row in configuration.variants(study)]
    for name in dict.fromkeys([*configuration.methods, *configuration.networks(), *studied]):
        settings = configuration.method(name)
        if isinstance(settings, Network):
            problems += _building(name, settings.algorithm, settings.network, configuration.grid.shape)
    if problems:
        raise ConfigError(str(path), problems)
    print(f"{path}: nothing wrong found")


def _listed(configuration: Config, name: str) -> pd.DataFrame:
    """List a cohort's scans, check what they are used for, and print how many there are."""
    from dmir.cohorts import check_pairs, reference_scan, scan_table

    parameters = configuration.scan_parameters(name)
    table = scan_table(**parameters)
    reference = reference_scan(table, configuration.cohorts[name].reference)
    pairs = check_pairs(
        table,
        parameters["pairs"],
        tested=name in configuration.test_on,
        trained=configuration.trained_pairs() if name == configuration.train_on else [],
    )
    counts = ", ".join(f"{count} {split}" for split, count in table["split"].value_counts(sort=False).items())
    subjects = table["subject"].nunique()
    print(
        f"cohorts.{name}: {counts} scans of {subjects} subjects; {pairs} pairs to register; on the grid of {reference}"
    )
    return table


def _building(name: str, algorithm: str, hyperparameters: dict, shape: tuple[int, int, int]) -> list[str]:
    """Build a network without memory for its weights and return what is wrong with its hyperparameters."""
    import torch

    from dmir.networks import build

    try:
        with torch.device("meta"):
            build(algorithm, shape=shape, **hyperparameters)
    except DmirError as error:
        return [f"settings.{name}.network: {error}"]
    return []


def _plan(options: argparse.Namespace) -> None:
    from dmir.job import limit_threads

    limit_threads(options.threads)

    from dmir.config import read_config
    from dmir.planning.plan import plan
    from dmir.planning.writing import check_options, describe, to_json, write_table

    check_options(options.out, seconds=options.seconds, threads=options.threads, gpus=options.gpus)
    found = plan(
        read_config(options.config),
        device=options.device,
        threads=options.threads,
        seconds=options.seconds,
        measured=not options.no_measure,
        gpus=options.gpus,
    )
    print(to_json(found) if options.json else describe(found))
    if options.out is not None:
        write_table(found, options.out)


def _convert_weights(options: argparse.Namespace) -> None:
    import numpy as np

    from dmir.networks import build
    from dmir.networks.published import convert, read_state
    from dmir.training.weights import save_weights
    from dmir.volumes import Grid

    if not 0.0 < options.spacing < float("inf"):
        raise InputError("--spacing", found=str(options.spacing), expected="a positive number of mm")
    network = build(options.network, shape=tuple(options.shape), **_hyperparameters(options.set))
    network.load_state_dict(convert(read_state(options.weights), network))
    grid = Grid(network.shape, np.diag([options.spacing] * 3 + [1.0]))  # type: ignore[arg-type]
    save_weights(
        options.out,
        network,
        name=options.network,
        hyperparameters=network.hyperparameters,  # type: ignore[arg-type]
        grid=grid,
        cohort=f"published: {options.weights.name}",
    )
    count = sum(parameter.numel() for parameter in network.parameters())
    print(f"{options.out}: {options.network}, {count:,} parameters")


def _hyperparameters(assignments: Sequence[str]) -> dict[str, object]:
    """Read ``key=value`` pairs; a value is JSON, or else a word."""
    result: dict[str, object] = {}
    for assignment in assignments:
        key, sign, value = assignment.partition("=")
        if not sign or not key:
            raise InputError("--set", found=repr(assignment), expected="KEY=VALUE")
        try:
            result[key] = json.loads(value)
        except json.JSONDecodeError:
            result[key] = value
    return result


def _table(options: argparse.Namespace) -> None:
    import pandas as pd

    from dmir.report.writing import format_for_terminal

    if not options.table.is_file():
        raise InputError(options.table, found="no such file", expected="a comparison table", remedy="Run the pipeline.")
    print(format_for_terminal(pd.read_csv(options.table)))


def _docs(options: argparse.Namespace) -> None:
    from dmir.config.documents import write_documents

    for path in write_documents(options.folder):
        print(path)
