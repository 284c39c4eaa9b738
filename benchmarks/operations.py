"""The costly operations beside the plain way to compute the same: one table, each side in a process of its own.

    python benchmarks/operations.py
    python benchmarks/operations.py --operations lncc --shape 160x192x224 --image brain.nii.gz

The plain way (``benchmarks/plain.py``) is what published implementations do, written from the definitions.

lncc
    Plain: 9^3 local correlation by five convolutions with a cube of ones. Goal: ten times as fast, forward + backward.
attention
    40x48x56 tokens, 48 channels, 3 heads, base windows 2^3, search windows 6^3. Plain: gather the search windows,
    project the copies, store the scores, softmax. Goal: half the time and 40 % of the memory.
warp
    One channel, linear. Plain: the grid of all voxels made, normalised and reordered.
labels
    28 structures. Plain: one-hot, each channel warped linearly, argmax.
integrate, compose
    Seven squarings; one composition. Plain: with the plain warp.

Seconds are CPU seconds on the CPU (a busy machine changes them less) and wall seconds on a GPU, medians of warm
repeats; MB are peaks over the idle process and hold the inputs too. ``gradient_error`` is the largest error of the
LNCC's gradient in float32 against float64, over the largest gradient, on a real skull-stripped image in [0, 1] and the
same image deformed: the background is where careless sums go wrong.
"""

from __future__ import annotations

import argparse
import json
import sys
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import plain
import torch
import torch.nn.functional as F
from measuring import (
    add_common_arguments,
    check_common,
    idle_memory_mb,
    measure,
    measure_apart,
    parse_shape,
    print_table,
    run_main,
    smooth_images,
    tell,
)

from dmir import fields, losses
from dmir.cohorts.template import template
from dmir.errors import InputError, suggestion
from dmir.networks.attention import WindowMultiheadCrossAttention
from dmir.training.devices import choose_device, device_name, set_threads
from dmir.training.objective import arithmetic
from dmir.volumes import read_image

OPERATIONS = ("lncc", "attention", "warp", "labels", "integrate", "compose")
SIDES = ("ours", "plain")
WITHOUT_GRADIENT = ("labels",)
SHAPE = "80x96x112"
TOKENS = "40x48x56"
STRUCTURES = 28
PASSES = ("forward", "forward + backward")
GOALS = {  # largest ratio ours / plain of an operation's time or memory
    ("lncc", "forward + backward", "time"): 0.1,
    **{("attention", name, "time"): 0.5 for name in PASSES},
    **{("attention", name, "memory"): 0.4 for name in PASSES},
}

Operation = tuple[Callable[[], torch.Tensor], list[torch.Tensor]]  # what to compute, and by what to differentiate it


# --- one side of one operation, in this process ---


def measure_side(row: dict[str, Any]) -> dict[str, Any]:
    """Measure forward, and forward + backward where there is a gradient."""
    set_threads(row["threads"])
    device = choose_device(row["device"])
    idle = idle_memory_mb(device)
    call, leaves = PREPARE[row["operation"]](row, device)

    def forward_backward() -> None:
        output = call()
        torch.autograd.grad(output if output.ndim == 0 else output.square().mean(), leaves)

    found: dict[str, Any] = {"device": device_name(device), "threads": torch.get_num_threads()}
    with arithmetic("float32"):
        with torch.inference_mode():
            found[PASSES[0]] = measure(call, row["repeats"], device, idle)
        if row["operation"] not in WITHOUT_GRADIENT:
            found[PASSES[1]] = measure(forward_backward, row["repeats"], device, idle)
        if row["operation"] == "lncc":
            found["gradient_error"] = gradient_error(row["side"], *brain_pair(row["shape"], row["image"], device))
    return found


def _lncc(row: dict[str, Any], device: torch.device) -> Operation:
    similarity = {"ours": losses.lncc, "plain": plain.lncc}[row["side"]]
    warped, fixed = smooth_images(row["shape"], device)
    warped.requires_grad_()
    return lambda: similarity(fixed, warped), [warped]


def _attention(row: dict[str, Any], device: torch.device) -> Operation:
    torch.manual_seed(1)
    module = WindowMultiheadCrossAttention(48, 3).to(device)
    tokens, context = (torch.randn(1, *row["tokens"], 48, device=device, requires_grad=True) for _ in range(2))
    leaves = [tokens, context, *module.parameters()]
    if row["side"] == "ours":
        return lambda: module(tokens, context)[0], leaves
    return lambda: plain.attention(module, tokens, context), leaves


def _warp(row: dict[str, Any], device: torch.device) -> Operation:
    warp = {"ours": fields.warp, "plain": plain.warp}[row["side"]]
    image, _ = smooth_images(row["shape"], device)
    field = smooth_field(row["shape"], device).requires_grad_()
    return lambda: warp(image, field), [field]


def _labels(row: dict[str, Any], device: torch.device) -> Operation:
    image, _ = smooth_images(row["shape"])
    for _ in range(3):  # compact structures, as in a brain
        image = F.avg_pool3d(image, 5, 1, 2)
    rank = image.flatten().argsort().argsort().view_as(image)
    labels = (rank * (STRUCTURES + 1) // image.numel()).to(device)
    field = smooth_field(row["shape"], device)
    if row["side"] == "ours":
        return lambda: fields.warp_labels(labels, field, "linear"), []
    return lambda: plain.warp_labels(labels, field), []


def _integrate(row: dict[str, Any], device: torch.device) -> Operation:
    integrate = {"ours": fields.integrate, "plain": plain.integrate}[row["side"]]
    velocity = smooth_field(row["shape"], device).requires_grad_()
    return lambda: integrate(velocity), [velocity]


def _compose(row: dict[str, Any], device: torch.device) -> Operation:
    compose = {"ours": fields.compose, "plain": plain.compose}[row["side"]]
    first = smooth_field(row["shape"], device).requires_grad_()
    second = smooth_field(row["shape"], device).flip(1).requires_grad_()
    return lambda: compose(first, second), [first, second]


PREPARE: dict[str, Callable[[dict[str, Any], torch.device], Operation]] = {
    "lncc": _lncc,
    "attention": _attention,
    "warp": _warp,
    "labels": _labels,
    "integrate": _integrate,
    "compose": _compose,
}


def smooth_field(shape: Sequence[int], device: torch.device | str = "cpu") -> torch.Tensor:
    """Return a smooth displacement (1, 3, *shape) of up to about three voxels, the same every time."""
    random = torch.Generator().manual_seed(2)
    coarse = torch.randn(1, 3, *(max(n // 16, 2) for n in shape), generator=random)
    return F.interpolate(coarse, size=tuple(shape), mode="trilinear", align_corners=True).to(device)


def brain_pair(
    shape: Sequence[int], path: str | None, device: torch.device | str = "cpu"
) -> tuple[torch.Tensor, torch.Tensor]:
    """Return a real skull-stripped image in [0, 1], resized to (1, 1, *shape), and the same image deformed."""
    data = (template()[0] if path is None else read_image(path)).data
    image = torch.from_numpy(np.array(data, dtype=np.float32))[None, None]
    image = (image / image.max()).clamp(0.0, 1.0)
    fixed = F.interpolate(image, size=tuple(shape), mode="trilinear", align_corners=True).to(device)
    return fixed, fields.warp(fixed, smooth_field(shape, device))


def gradient_error(side: str, fixed: torch.Tensor, warped: torch.Tensor) -> float:
    """Return the largest error of the LNCC's gradient by the warped image, over the largest gradient in float64."""

    def gradient(similarity: Callable[..., torch.Tensor], warped: torch.Tensor) -> torch.Tensor:
        leaf = warped.clone().requires_grad_()
        return torch.autograd.grad(similarity(fixed, leaf), leaf)[0]

    found = gradient({"ours": losses.lncc, "plain": plain.lncc}[side], warped)
    truth = gradient(plain.lncc_exact, warped.double())
    return float((found - truth).abs().max() / truth.abs().max())


# --- what is asked ---


def main(arguments: Sequence[str] | None = None) -> None:
    """Measure what the command line asks for, and print the table."""
    options = _parser().parse_args(arguments)
    if options.row:
        print(json.dumps(measure_side(json.loads(options.row))))
        return
    check_common(options)
    if options.image is not None and not options.image.is_file():
        raise InputError("--image", found=f"no file {options.image}", expected="a skull-stripped image")
    common = {
        "shape": parse_shape(options.shape),
        "tokens": parse_shape(options.tokens),
        "image": None if options.image is None else str(options.image),
        **{key: getattr(options, key) for key in ("device", "threads", "repeats")},
    }
    records = []
    for operation in _operations(options.operations):
        sides = {}
        for side in SIDES:
            row = {"operation": operation, "side": side, **common}
            sides[side] = measure_apart(__file__, row, options.threads, options.timeout)
            tell(f"{operation} {side}: {sides[side].get('failed', 'done')}")
        grid = options.tokens if operation == "attention" else options.shape
        records += [{"operation": operation, "grid": grid, **line} for line in compared(operation, sides)]
    print_table(pd.DataFrame(records), options.out)


def compared(operation: str, sides: dict[str, dict[str, Any]]) -> list[dict[str, Any]]:
    """Return the lines of one operation's two sides: a line a pass."""
    failures = "; ".join(f"{side}: {found['failed']}" for side, found in sides.items() if "failed" in found)
    lines = []
    for name in [name for name in PASSES if any(name in found for found in sides.values())] or PASSES[:1]:
        line: dict[str, Any] = {"pass": name}
        for what, unit in (("time", "s"), ("memory", "mb")):
            ours, other = (_value(sides[side].get(name), unit) for side in SIDES)
            ratio = ours / other if ours is not None and other else None
            goal = GOALS.get((operation, name, what))
            line |= {f"ours_{unit}": ours, f"plain_{unit}": other, f"{what}_ratio": ratio, f"{what}_goal": goal}
        if name == PASSES[1]:
            line |= {f"gradient_error_{side}": found.get("gradient_error") for side, found in sides.items()}
        run_on = {key: next((s[key] for s in sides.values() if key in s), None) for key in ("device", "threads")}
        lines.append({**line, **run_on, "failed": failures or None})
    return lines


def _value(measured: dict[str, Any] | None, unit: str) -> float | None:
    """Return the CPU seconds, the wall seconds where there are none, or the memory."""
    if measured is None:
        return None
    value: float | None = measured[unit]
    return measured["cpu_s"] if unit == "s" and measured["cpu_s"] is not None else value


def _operations(text: str) -> list[str]:
    chosen = list(dict.fromkeys(text.split(",")))
    for name in chosen:
        if name not in OPERATIONS:
            known = suggestion(name, OPERATIONS)
            raise InputError("--operations", found=repr(name), expected="a known operation", remedy=known)
    return chosen


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter, allow_abbrev=False
    )
    parser.add_argument("--operations", default="lncc,attention", help=f"of {', '.join(OPERATIONS)}")
    parser.add_argument("--shape", default=SHAPE, help=f"grid of all but attention (default {SHAPE})")
    parser.add_argument("--tokens", default=TOKENS, help=f"grid of attention, in tokens (default {TOKENS})")
    parser.add_argument("--image", type=Path, help="skull-stripped image for gradient_error (default: a template)")
    add_common_arguments(parser)
    return parser


if __name__ == "__main__":
    sys.exit(run_main(main))
