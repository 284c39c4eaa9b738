"""The command ``dmir``: register two scans, score a field, check or plan a configuration, convert published weights.

Imports happen inside the commands: ``dmir check`` answers in a second because it loads no torch until it must.
"""

from __future__ import annotations

import argparse
import json
import os
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

import dmir
from dmir.doubts import told_doubts
from dmir.errors import DmirError, InputError, suggestion
from dmir.terminal import followed, waiting

if TYPE_CHECKING:
    import pandas as pd

    from dmir.config import Config


ONE_THREAD = ("syn", "elastix")  # methods of ``dmir register`` that have one thread, unless more are asked for


def main(arguments: Sequence[str] | None = None) -> int:
    """Run one command; a user's mistake is one message and status 1."""
    options = _parser().parse_args(arguments)
    try:
        with told_doubts(getattr(options, "strict", False)):
            options.run(options)
    except DmirError as error:
        print(f"Error: {error}", file=sys.stderr)
        return 1
    return 0


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(prog="dmir", description=dmir.__doc__)
    parser.add_argument("--version", action="version", version=f"dmir {dmir.__version__}")
    commands = parser.add_subparsers(required=True, metavar="COMMAND")
    reading = argparse.ArgumentParser(add_help=False)  # what commands that read scans have in common
    reading.add_argument("--strict", action="store_true", help="what is doubtful about a file is an error")

    register = commands.add_parser("register", parents=[reading], help="register a moving scan to a fixed one")
    register.add_argument("--moving", required=True, type=Path, help="scan to be warped")
    register.add_argument("--fixed", required=True, type=Path, help="scan that it is warped to")
    register.add_argument(
        "--method", help="descent (the default), affine, syn, elastix, or the path of a model.safetensors"
    )
    register.add_argument("--settings", type=Path, metavar="FILE.yaml", help="the method's parameters")
    register.add_argument(
        "--out", required=True, type=Path, help="folder for fields, affine, warped image and labels, record and picture"
    )
    register.add_argument("--moving-labels", type=Path, help="label map of the moving scan, to be warped too")
    register.add_argument(
        "--fixed-labels", type=Path, help="label map of the fixed scan, to be brought to the moving scan's own space"
    )
    register.add_argument("--moving-mask", type=Path, help="brain mask; without it the scan must be stripped already")
    register.add_argument("--fixed-mask", type=Path, help="brain mask; without it the scan must be stripped already")
    register.add_argument(
        "--skull-strip",
        choices=["deepbet"],
        help="find the brain of a scan that has no mask (pip install 'dmir[deepbet]')",
    )
    register.add_argument("--no-affine", action="store_true", help="the scans are affinely aligned already")
    register.add_argument("--label-interpolation", choices=["nearest", "linear"], default="nearest")
    register.add_argument(
        "--refine",
        type=int,
        nargs="?",
        const=-1,
        metavar="STEPS",
        help="refine a network's field on this pair, in at most so many steps a stage",
    )
    register.add_argument("--threads", type=_threads, help="default: all cores; 1 for syn and elastix")
    register.set_defaults(run=_register)

    field = commands.add_parser("field", help="read, convert, invert, compose and apply displacement fields")
    _field_parsers(field, reading)

    native = commands.add_parser(
        "native", parents=[reading], help="bring a volume on a cohort's grid back to a scan's own space"
    )
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

    score = commands.add_parser(
        "score",
        parents=[reading],
        help="score a field, warped labels, or a table of both that were made elsewhere",
    )
    score.add_argument("--field", type=Path, help="displacement field or affine of any program")
    score.add_argument(
        "--warped-labels", type=Path, help="moving labels as another program warped them, beside or without a field"
    )
    score.add_argument("--moving-labels", type=Path, help="needed with --field")
    score.add_argument("--fixed-labels", type=Path)
    score.add_argument(
        "--structures", help="a table of resources/structures, for instance lpba56 (default: all labels there are)"
    )
    score.add_argument(
        "--from", dest="convention", metavar="KIND", help="the field's convention, where the file does not prove it"
    )
    score.add_argument(
        "--interpolation", choices=["nearest", "linear"], help="how --warped-labels were warped (default nearest, told)"
    )
    score.add_argument("--mask", type=Path, help="where the field is judged (default: where the fixed labels are)")
    score.add_argument("--truth", type=Path, help="true field on the same grid, for the endpoint error")
    score.add_argument("--json", action="store_true", help="print JSON instead of a table")
    score.add_argument("--table", type=Path, metavar="FILE.csv", help="a row a registration, see docs/scores.md")
    score.add_argument("--out", type=Path, help="with --table: folder for scores, tables and figures")
    score.add_argument("--reference", metavar="METHOD", help="with --table: what the others are tested against")
    score.set_defaults(run=_score)

    scans = commands.add_parser("scans", parents=[reading], help="print the table of scans that a folder holds")
    scans.add_argument("source", help="a source of scans, for instance freesurfer, bids or lpba40")
    scans.add_argument("folder", type=Path)
    scans.set_defaults(run=_scans)

    check = commands.add_parser(
        "check",
        parents=[reading],
        help="tell what is wrong with a configuration before anything runs, or whether results still agree",
    )
    check.add_argument("path", type=Path, metavar="CONFIG|RESULTS", help="a configuration, or a folder of results")
    check.add_argument(
        "--config", type=Path, help="what the results should be of (default: the configuration of their last run)"
    )
    check.add_argument(
        "--try", dest="try_all", action="store_true", help="run what it names of somebody else's on two small images"
    )
    check.set_defaults(run=_check)

    methods = commands.add_parser(
        "methods", help="list methods and networks, where they are from, what they are set to"
    )
    methods.add_argument("name", nargs="?", help="explain one: a name, or file.py:Class")
    methods.set_defaults(run=_methods)

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
    convert.add_argument(
        "--shape", type=int, nargs=3, help="grid it was trained on, in voxels, where the file does not say it"
    )
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

    run = commands.add_parser("run", help="run the workflow on a configuration; the same command goes on after a stop")
    run.add_argument("config", type=Path)
    run.add_argument("arguments", nargs=argparse.REMAINDER, metavar="...", help="for Snakemake: targets, then options")
    run.set_defaults(run=_run)

    init = commands.add_parser("init", help="lay out a project: a configuration to fill in, a table of scans, profiles")
    init.add_argument("folder", type=Path)
    init.set_defaults(run=_init)

    show = commands.add_parser("show", help="tell what a finished run found, and where its report is")
    show.add_argument("results", type=Path, nargs="?", default=Path("results"))
    show.set_defaults(run=_show)

    table = commands.add_parser("table", help="print a comparison table")
    table.add_argument("table", type=Path, help="results/tables/comparison.csv")
    table.set_defaults(run=_table)

    docs = commands.add_parser("docs", help="write config/config.schema.json and config/README.md")
    docs.add_argument("--folder", type=Path, default=Path("config"))
    docs.set_defaults(run=_docs)
    return parser


def _field_parsers(field: argparse.ArgumentParser, reading: argparse.ArgumentParser) -> None:
    """Add the commands of ``dmir field``, each with the options of what reads files."""
    one, written = (argparse.ArgumentParser(add_help=False) for _ in range(2))
    images = argparse.ArgumentParser(add_help=False, parents=[reading])
    one.add_argument("field", type=Path, help="a displacement field, or an affine")
    one.add_argument("--from", dest="convention", metavar="KIND", help="what it is, where it does not say so itself")
    images.add_argument("--fixed", type=Path, metavar="IMAGE", help="the fixed image, on whose grid a field lies")
    images.add_argument("--moving", type=Path, metavar="IMAGE", help="the moving image")
    written.add_argument("--out", type=Path, required=True, help="the file to write")
    written.add_argument(
        "--to", default="itk", metavar="KIND", help="itk (default), fsl, afni, spm, voxels, learn2reg, npz, ..."
    )
    commands = field.add_subparsers(required=True, metavar="COMMAND", dest="field_command")
    field.set_defaults(run=_field)

    info = commands.add_parser("info", parents=[one, images], help="what it is, how one knows, grid, lengths, folds")
    info.add_argument("--json", action="store_true", help="print JSON instead of lines")
    commands.add_parser("convert", parents=[one, images, written], help="write it in another convention")
    invert = commands.add_parser("invert", parents=[one, images, written], help="invert it, on the moving image's grid")
    invert.add_argument(
        "--allow-residual",
        type=float,
        metavar="VOXELS",
        help="write it although there and back ends so far from the start (default: up to 0.5)",
    )
    joined = commands.add_parser("compose", parents=[images, written], help="several as one field or affine")
    joined.add_argument(
        "fields",
        nargs="+",
        metavar="[KIND:]FILE",
        help="the nearest to the fixed image first, as antsApplyTransforms takes them",
    )
    joined.add_argument("--images", nargs="+", type=Path, metavar="IMAGE", help="fixed, those between, moving")
    apply = commands.add_parser("apply", parents=[one, images], help="warp an image, a label map or points")
    apply.add_argument("image", type=Path, help="the moving image, or points (.csv, .fcsv)")
    apply.add_argument("--out", type=Path, required=True, help="the file to write")
    apply.add_argument("--labels", action="store_true", help="the image is a label map")
    apply.add_argument("--interpolation", choices=["nearest", "linear"], help="default: linear; nearest for labels")
    apply.add_argument("--coordinates", choices=["ras", "lps", "voxels"], help="of the points of a .csv")
    apply.add_argument("--of-fixed", action="store_true", help="the points are the fixed image's, sought in the moving")
    jacobian = commands.add_parser("jacobian", parents=[one, images], help="its Jacobian determinant, map and numbers")
    jacobian.add_argument("--out", type=Path, required=True, help="the map to write, NIfTI")
    jacobian.add_argument("--json", action="store_true", help="print JSON instead of lines")


def _threads(text: str) -> int:
    """Read a number of threads."""
    if not text.isdecimal() or not 1 <= int(text) <= 1024:
        raise argparse.ArgumentTypeError(f"found {text}; expected a number from 1 to 1024")
    return int(text)


def _register(options: argparse.Namespace) -> None:
    from dmir.job import limit_threads

    threads = options.threads or len(os.sched_getaffinity(0))
    limit_threads(threads)
    # threads that wait busily take the cores from one another where other work goes on: fifty times as long
    os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")

    from dmir.register_command import chosen_method, run

    if options.threads is None and chosen_method(options)[0] in ONE_THREAD:
        threads = 1
        limit_threads(threads)
    run(options, threads)


def _field(options: argparse.Namespace) -> None:
    from dmir.field_command import run

    run(options)


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
    from dmir.score_command import run

    run(options)


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
        _check_configuration(options.path, options.strict, options.try_all)


def _check_results(results: Path, config: Path | None) -> None:
    """Print a line a table or figure; those that no longer agree are an error."""
    from dmir.config import read_config
    from dmir.report.agreement import check_results

    with waiting("comparing hashes"):
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


def _check_configuration(path: Path, strict: bool, try_all: bool) -> None:
    from dmir import registry, trying
    from dmir.cohorts import check_unseen
    from dmir.cohorts.duplicates import require_distinct
    from dmir.config import ConfigError, Network, read_config
    from dmir.planning.jobs import cohort_size
    from dmir.planning.quota import room_for_fields

    configuration = read_config(path)
    for name, told in trying.what_runs(configuration).items():
        print(f"settings.{name}: would run {told}")
    problems, tables = [], {}
    for name in dict.fromkeys([configuration.train_on, *configuration.test_on]):
        try:
            doubted = told_doubts(strict or configuration.preprocess_of(configuration.cohorts[name]).strict)
            with waiting(f"looking for {name}"), doubted:
                tables[name] = _listed(configuration, name)
        except InputError as error:
            problems.append(f"cohorts.{name}: {error}")
    if not problems:
        try:
            with told_doubts(strict or configuration.preprocess.strict):
                check_unseen(tables, {name: configuration.origin(name) for name in tables}, configuration.train_on)
                require_distinct(tables, configuration.train_on)
            room_for_fields(configuration, {name: cohort_size(configuration, name) for name in tables})
        except InputError as error:
            problems.append(str(error))
    for name in followed(configuration.every_method(), "building networks"):
        settings = configuration.method(name)
        # of a file nothing is run to be checked, unless that is asked for
        if isinstance(settings, Network) and not registry.find(settings.algorithm).is_file:
            problems += _building(name, settings.algorithm, settings.network, configuration.grid.shape)
    tried = list(trying.mistakes(configuration)) if try_all else []
    problems += tried
    if try_all and not tried and trying.what_runs(configuration):
        print("tried on two small images: each of them gives a field")
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
    _look_at_labels(configuration, name, table, reference)
    counts = ", ".join(f"{count} {split}" for split, count in table["split"].value_counts(sort=False).items())
    subjects = table["subject"].nunique()
    print(
        f"cohorts.{name}: {counts} scans of {subjects} subjects; {pairs} pairs to register; on the grid of {reference}"
    )
    return table


def _look_at_labels(configuration: Config, name: str, table: pd.DataFrame, reference: str) -> None:
    """Read the label maps of the reference and of the first test scan: whether they have the cohort's structures."""
    from dmir.cohorts import stated_orientation
    from dmir.structures import read_structures

    cohort = configuration.cohorts[name]
    orientation = stated_orientation(cohort)
    labels = dict(zip(table["scan"], table["labels"], strict=True))
    for scan in dict.fromkeys([reference, *table.loc[table["split"] == "test", "scan"][:1]]):
        if labels[scan] and Path(labels[scan]).is_file():  # else a job makes it
            read_structures(labels[scan], cohort.structures, cohort.label_map, orientation=orientation)


def _building(name: str, algorithm: str, hyperparameters: dict, shape: tuple[int, int, int]) -> list[str]:
    """Build a network without memory for its weights and return what is wrong with its hyperparameters."""
    from dmir.networks import build
    from dmir.networks.shapes import shapes_alone

    try:
        with shapes_alone():
            build(algorithm, shape=shape, **hyperparameters)
    except DmirError as error:
        return [f"settings.{name}.network: {error}"]
    return []


def _methods(options: argparse.Namespace) -> None:
    from dmir.methods_command import explanation, listing

    print(listing() if options.name is None else explanation(options.name))


def _plan(options: argparse.Namespace) -> None:
    from dmir.job import limit_threads

    limit_threads(options.threads)

    from dmir.config import read_config
    from dmir.planning.plan import plan
    from dmir.planning.writing import check_options, describe, to_json, write_table

    check_options(options.out, seconds=options.seconds, threads=options.threads, gpus=options.gpus)
    configuration = read_config(options.config)
    measured = not options.no_measure
    with waiting("measuring" if measured else "counting", options.seconds if measured else None):
        found = plan(
            configuration,
            device=options.device,
            threads=options.threads,
            seconds=options.seconds,
            measured=measured,
            gpus=options.gpus,
        )
    print(to_json(found) if options.json else describe(found))
    if options.out is not None:
        write_table(found, options.out)


def _convert_weights(options: argparse.Namespace) -> None:
    import numpy as np

    from dmir.networks.published import build_published, read_published
    from dmir.training.weights import save_weights
    from dmir.volumes import Grid

    if not 0.0 < options.spacing < float("inf"):
        raise InputError("--spacing", found=str(options.spacing), expected="a positive number of mm")
    shape = None if options.shape is None else tuple(options.shape)
    network = build_published(read_published(options.weights), options.network, shape, **_hyperparameters(options.set))
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


def _run(options: argparse.Namespace) -> None:
    from dmir.run_command import run

    run(options.config, options.arguments)


def _init(options: argparse.Namespace) -> None:
    from dmir.run_command import init

    for path in init(options.folder):
        print(path)
    print(f"{options.folder}/README.md says what to do next.")


def _show(options: argparse.Namespace) -> None:
    from dmir.show_command import show

    show(options.results)


def _table(options: argparse.Namespace) -> None:
    from dmir.show_command import table_that_fits

    print(table_that_fits(options.table))


def _docs(options: argparse.Namespace) -> None:
    from dmir.config.documents import write_documents

    for path in write_documents(options.folder):
        print(path)
