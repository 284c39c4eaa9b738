"""The command ``dmir field``: displacement fields that every tool reads."""

from __future__ import annotations

import argparse
import json
import sys
from pathlib import Path
from typing import Any

import numpy as np
import torch

from dmir.doubts import doubt
from dmir.errors import InputError, suggestion
from dmir.fields import (
    NO_INVERSE,
    folded_voxels,
    jacobian_determinant,
    onto_moving_grid,
    to_millimetres,
    warp,
    warp_labels,
)
from dmir.metrics.folding import measure_folding
from dmir.preprocess import write_affine
from dmir.transforms import CONVENTIONS, Affine, Field, Transform, compose, inverse_of, inverse_points, read, write
from dmir.transforms.linear import AFFINES
from dmir.transforms.points import read_points
from dmir.transforms.reading import grid_of
from dmir.volumes import Grid, Volume, describe_grid, read_image, read_labels, write_volume


def run(options: argparse.Namespace) -> None:
    """Run one of the commands of ``dmir field``."""
    to = getattr(options, "to", "itk")
    if to not in CONVENTIONS:
        known = ", ".join(CONVENTIONS)
        raise InputError(
            f"--to {to}", found="no convention of this name", expected=known, remedy=suggestion(to, CONVENTIONS)
        )
    RUN[options.field_command](options)


# ---------------------------------------------------------------- what is read


def _read(options: argparse.Namespace) -> Transform:
    transform = read(options.field, options.convention, options.fixed, options.moving)
    _tell(options.field, transform)
    return transform


def _tell(path: str | Path, transform: Transform) -> None:
    for line in transform.assumed:
        doubt(path, found=line, done="read so all the same")


def _grid(path: Path | None, name: str) -> Grid | None:
    return None if path is None else grid_of(path, name)


def _field(options: argparse.Namespace) -> Field:
    """Return the one field that was asked for: on the fixed image's grid where that is named, else on its own."""
    transform = _read(options)
    return transform.on(_grid(options.fixed, "fixed"))


def _save(options: argparse.Namespace, field: Field, moving: Grid | None, remark: str = "") -> None:
    write(options.out, field, options.to, moving, remark)
    if options.to != "learn2reg":
        return
    lost = read(options.out, fixed=field.grid, moving=moving).on().displacement - field.displacement
    length = _lengths(lost, field.affine)
    print(
        f"Warning: {options.out}: at half the resolution the field differs by {length.mean():.3g} mm on average and"
        f" up to {length.max():.3g} mm",
        file=sys.stderr,
    )


def _lengths(displacement: np.ndarray, affine: np.ndarray) -> np.ndarray:

    return np.linalg.norm(to_millimetres(displacement, affine), axis=0)


# ---------------------------------------------------------------- the commands


def _info(options: argparse.Namespace) -> None:
    transform = _read(options)
    title = CONVENTIONS[transform.convention].title if transform.convention in CONVENTIONS else "a linear transform"
    facts: dict[str, Any] = {
        "convention": transform.convention,
        "what": title,
        "known by": transform.known_by,
        "parts": [type(step).__name__.lower() for step in transform.steps],
    }
    grid = _grid(options.fixed, "fixed") or transform.grid
    if grid is None:
        facts["matrix"] = _product(transform).tolist()
    else:
        facts |= {"grid": describe_grid(grid)} | _numbers(transform.on(grid))
    _print(facts, options.json)


def _product(transform: Transform) -> np.ndarray:
    """Return the matrix of affines alone, RAS mm."""
    matrix = np.eye(4)
    for step in transform.steps:
        matrix = step.matrix @ matrix  # type: ignore[union-attr]
    return matrix


def _numbers(field: Field) -> dict[str, Any]:

    length = _lengths(field.displacement, field.affine)
    folds = folded_voxels(torch.from_numpy(field.displacement))
    return {
        "length, mm": {
            "mean": float(length.mean()),
            "median": float(np.median(length)),
            "99 %": float(np.percentile(length, 99)),
            "largest": float(length.max()),
        },
        "folds": folds,
    }


def _print(facts: dict[str, Any], as_json: bool) -> None:
    if as_json:
        print(json.dumps(facts, indent=2, allow_nan=False))
        return
    for name, value in facts.items():
        if isinstance(value, dict):
            text = ", ".join(f"{key} {number:.4g}" for key, number in value.items())
        elif name == "matrix":
            text = "; ".join(" ".join(f"{number:.6g}" for number in row) for row in value)
        elif isinstance(value, list):
            text = ", ".join(map(str, value))
        else:
            text = f"{value:.4g}" if isinstance(value, float) else str(value)
        print(f"{name:22s} {text}")


def _convert(options: argparse.Namespace) -> None:
    field = _field(options)
    _save(options, field, _grid(options.moving, "moving"))
    print(f"{options.out}: {CONVENTIONS[options.to].title}")


def _invert(options: argparse.Namespace) -> None:

    transform = _read(options)
    if transform.grid is None and options.fixed is None:
        back = Transform((Affine(np.linalg.inv(_product(transform))),), "itk")
        _write_linear(options, back)
        return
    field = transform.on(_grid(options.fixed, "fixed"))
    inverse = inverse_of(field, _grid(options.moving, "moving"))
    wrong = int((inverse.residual[inverse.inside] > NO_INVERSE).sum())
    allowed = NO_INVERSE if options.allow_residual is None else options.allow_residual
    if not inverse.inside.any():
        raise InputError(
            options.field,
            found="a field of which nothing lands on the grid of its inverse",
            expected="the moving image, into which it leads",
            remedy="Name it: --moving IMAGE.",
        )
    mean = float(inverse.residual[inverse.inside].mean())
    folds = _numbers(field)["folds"]
    told = f"there and back ends {mean:.2g} voxels from the start on average, {inverse.worst:.3g} at worst"
    if inverse.worst > allowed:
        raise InputError(
            options.field,
            found=f"a field that has no inverse at {wrong:,} voxels and folds at {folds:,} places ({told})",
            expected=f"a field that can be inverted: at most {allowed:g} voxels",
            remedy=f"Nothing was written; --allow-residual {np.ceil(inverse.worst * 10) / 10:g} writes it all the same",
        )
    outside = int((~inverse.inside).sum())
    if wrong:
        doubt(options.field, found=f"it has no inverse at {wrong:,} voxels", done="do not trust it there")
    if folds:
        doubt(options.field, found=f"it folds at {folds:,} places", done="its inverse jumps there")
    if outside:
        found = f"{outside:,} of {inverse.inside.size:,} voxels of its inverse come from beyond the field's grid"
        doubt(options.field, found=found, done="the displacement at its border was taken there")
    remark = f"folds at {folds} places" if folds else ""
    if wrong:
        remark = f"no inverse at {wrong} voxels, up to {inverse.worst:.3g} off"
    _save(options, inverse.field, field.grid, remark)
    print(f"{options.out}: the inverse of {options.field}: {told}")


def _compose(options: argparse.Namespace) -> None:
    files = [_named(text) for text in options.fields]
    images = _images(options, len(files))
    parts = []
    for number, (convention, path) in enumerate(files):
        parts.append(read(path, convention, images[number], images[number + 1]))
        _tell(path, parts[-1])
    whole = compose(parts)
    if whole.grid is None and images[0] is None:
        _write_linear(options, whole)
        return
    field = whole.on(_grid(images[0], "fixed") or whole.grid)
    _save(options, field, _grid(images[-1], "moving"))
    print(f"{options.out}: {' then '.join(str(path) for _, path in files)}, on {describe_grid(field.grid)}")


def _images(options: argparse.Namespace, count: int) -> list[Path | None]:
    """Return the images between the parts of a composition, the fixed one first."""
    if options.images is None:
        return [options.fixed, *[None] * (count - 1), options.moving]
    if len(options.images) != count + 1 or options.fixed or options.moving:
        raise InputError(
            "--images",
            found=f"{len(options.images)} images for {count} files",
            expected=f"{count + 1} without --fixed and --moving: the fixed one, those between, the moving one",
        )
    return list(options.images)


def _named(text: str) -> tuple[str | None, Path]:
    """Take ``KIND:FILE`` apart, where it begins with a kind."""

    kind, sign, rest = text.partition(":")
    return (kind, Path(rest)) if sign and kind in {*CONVENTIONS, *AFFINES} else (None, Path(text))


def _write_linear(options: argparse.Namespace, transform: Transform) -> None:
    """Write affines alone as one, as ITK does."""

    if options.out.suffix != ".mat" or options.to != "itk":
        raise InputError(
            options.out,
            found="affines alone and no image",
            expected="a .mat of ITK's, or for a field the fixed image, on whose grid it is to lie",
            remedy="Name it: --fixed IMAGE.",
        )
    write_affine(options.out, _product(transform))
    print(f"{options.out}: an affine as ITK and ANTs read it")


def _apply(options: argparse.Namespace) -> None:
    if options.image.suffix.lower() in (".csv", ".fcsv"):
        _apply_to_points(options)
        return

    if options.of_fixed or options.coordinates:
        raise InputError(options.image, found="an image", expected="points, for --of-fixed and --coordinates")
    volume = read_labels(options.image) if options.labels else read_image(options.image)
    options.moving = options.moving or options.image  # of which it is the field
    field = _field(options)
    there = torch.from_numpy(onto_moving_grid(field.displacement, field.affine, volume.affine))[None]
    data = torch.from_numpy(volume.data)[None, None]
    mode = options.interpolation or ("nearest" if options.labels else "linear")
    warped = (warp_labels(data, there, mode) if options.labels else warp(data, there, mode))[0, 0].numpy()
    if not warped.any():
        raise InputError(
            options.image,
            found="an image of which nothing lands on the field's grid",
            expected="the moving image of this field",
            remedy="Look at both with dmir field info: they may be of different worlds, or the field of another kind.",
        )
    write_volume(options.out, Volume(warped, field.affine))
    print(f"{options.out}: {options.image} on {describe_grid(field.grid)}")


def _apply_to_points(options: argparse.Namespace) -> None:

    points = read_points(options.image, options.coordinates)
    transform = _read(options)
    moving = _grid(options.moving, "moving")
    fixed = _grid(options.fixed, "fixed") or transform.grid
    if points.coordinates == "voxels" and (moving is None or fixed is None):
        raise InputError(
            options.image,
            found="points in voxels",
            expected="both images, whose voxels they are",
            remedy="Name --moving IMAGE and, for an affine, --fixed IMAGE.",
        )
    anywhere = Grid((1, 1, 1), np.eye(4))  # of coordinates that no grid matters to
    here, there = moving or anywhere, fixed or anywhere
    if options.of_fixed:
        here, there = there, here
        start = points.in_world(here)
        found, residual, inside = transform.at(start), np.zeros(len(start)), transform.within(start)
    else:
        found, residual, inside = inverse_points(transform, points.in_world(here))
    lost = np.flatnonzero((residual > 0.1) | ~inside) + 1
    if len(lost):
        raise InputError(
            options.image,
            found=f"points that the field does not reach or has no inverse for: {', '.join(map(str, lost[:10]))}"
            + (" ..." if len(lost) > 10 else ""),
            expected="points within its grid, where it does not fold",
            remedy="Take these rows out (the first point is 1).",
        )
    points.write(options.out, found, there)
    way = "fixed to the moving" if options.of_fixed else "moving to the fixed"
    print(f"{options.out}: {len(found)} points, from the {way} image, {points.coordinates}")


def _jacobian(options: argparse.Namespace) -> None:
    field = _field(options)
    values = _determinants(field.displacement)
    folding = measure_folding(field.displacement)
    write_volume(options.out, Volume(values, field.affine))
    facts = {
        "determinant": {
            "smallest": float(values.min()),
            "1 %": float(np.percentile(values, 1)),
            "mean": float(values.mean()),
            "99 %": float(np.percentile(values, 99)),
            "largest": float(values.max()),
        },
        "|J| <= 0, %": {"central": folding.nonpositive_central, "forward": folding.nonpositive_forward},
        "non-diffeomorphic volume, %": folding.nondiffeomorphic_volume,
        "SDlogJ": folding.sdlogj,
    }
    _print(facts, options.json)
    if not options.json:
        print(f"{options.out}: the determinant on {describe_grid(field.grid)}")


def _determinants(displacement: np.ndarray) -> np.ndarray:
    """Return the Jacobian determinant at every voxel, (D, H, W): central differences, one-sided at the border."""
    beyond = displacement
    for axis in (1, 2, 3):  # a voxel beyond the border, in a straight line
        if beyond.shape[axis] > 1:
            first, second, last_but_one, last = (beyond.take([k], axis=axis) for k in (0, 1, -2, -1))
            beyond = np.concatenate([2 * first - second, beyond, 2 * last - last_but_one], axis=axis)
        else:
            beyond = beyond.repeat(3, axis=axis)
    return jacobian_determinant(torch.from_numpy(np.ascontiguousarray(beyond))[None])[0].numpy()


RUN = {
    "info": _info,
    "convert": _convert,
    "invert": _invert,
    "compose": _compose,
    "apply": _apply,
    "jacobian": _jacobian,
}
