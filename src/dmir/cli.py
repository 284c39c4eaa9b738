"""The command ``dmir``: register two scans, score a field, check a configuration, convert published weights.

Imports happen inside the commands: ``dmir check`` answers in a second because it loads no torch until it must.
"""

from __future__ import annotations

import argparse
import json
import sys
from collections.abc import Sequence
from pathlib import Path

import dmir
from dmir.errors import DmirError, InputError


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
    register.add_argument("--out", required=True, type=Path, help="folder for field, warped image and labels")
    register.add_argument("--moving-labels", type=Path, help="label map of the moving scan, to be warped too")
    register.add_argument("--moving-mask", type=Path, help="brain mask; without it the scan must be stripped already")
    register.add_argument("--fixed-mask", type=Path, help="brain mask; without it the scan must be stripped already")
    register.add_argument("--no-affine", action="store_true", help="the scans are affinely aligned already")
    register.add_argument("--label-interpolation", choices=["nearest", "linear"], default="nearest")
    register.add_argument("--threads", type=int, default=1, help="threads of the method (default 1)")
    register.set_defaults(run=_register)

    score = commands.add_parser("score", help="score a displacement field")
    score.add_argument("--field", required=True, type=Path, help="field as ITK and ANTs write it")
    score.add_argument("--moving-labels", required=True, type=Path)
    score.add_argument("--fixed-labels", required=True, type=Path)
    score.add_argument("--structures", required=True, help="a table of resources/structures, for instance lpba56")
    score.add_argument("--truth", type=Path, help="true field on the same grid, for the endpoint error")
    score.add_argument("--json", action="store_true", help="print JSON instead of a table")
    score.set_defaults(run=_score)

    check = commands.add_parser("check", help="tell what is wrong with a configuration before anything runs")
    check.add_argument("config", type=Path)
    check.set_defaults(run=_check)

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
    from dmir.methods.scans import read_stripped, register_scans
    from dmir.volumes import read_labels, write_volume

    moving = read_stripped(options.moving, options.moving_mask, "moving")
    fixed = read_stripped(options.fixed, options.fixed_mask, "fixed")
    result = register_scans(
        moving,
        fixed,
        method=options.method,
        moving_labels=read_labels(options.moving_labels, "moving_labels") if options.moving_labels else None,
        align=not options.no_affine,
        label_interpolation=options.label_interpolation,
    )
    save_field(options.out / "field.nii.gz", result.displacement, fixed.affine)
    write_volume(options.out / "warped.nii.gz", result.warped)
    written = ["field.nii.gz", "warped.nii.gz"]
    if result.warped_labels is not None:
        write_volume(options.out / "warped_labels.nii.gz", result.warped_labels)
        written.append("warped_labels.nii.gz")
    print(f"{options.out}: {', '.join(written)}")


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


def _check(options: argparse.Namespace) -> None:
    from dmir.cohorts import scan_table
    from dmir.config import ConfigError, Network, TableCohort, read_config

    configuration = read_config(options.config)
    problems = []
    for name in dict.fromkeys([configuration.train_on, *configuration.test_on]):
        cohort = configuration.cohorts[name]
        if isinstance(cohort, TableCohort):
            try:
                scan_table("table", path=configuration.table_path(cohort))
            except InputError as error:
                problems.append(f"cohorts.{name}: {error}")
    studied = [row.name for study in ("ablation", "lambda_study") for row in configuration.variants(study)]
    for name in dict.fromkeys([*configuration.methods, *studied]):
        settings = configuration.method(name)
        if isinstance(settings, Network):
            problems += _building(name, settings.algorithm, settings.network, configuration.grid.shape)
    if problems:
        raise ConfigError(str(options.config), problems)
    print(f"{options.config}: nothing wrong found")


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
