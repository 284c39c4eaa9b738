"""Time, memory and work of the networks: one table, a process a row.

    python benchmarks/networks.py --networks caml,voxelmorph --grids 80x96x80 --dtypes float32,bf16
    python benchmarks/networks.py --config config/config.yaml --step
    python benchmarks/networks.py --grids 160x192x224 --dtypes float32,bf16 --count-only
    python benchmarks/networks.py --networks caml --grids 160x192x224 --set caml.checkpointing=true --out table.csv

What the columns say
--------------------
forward_s, forward_backward_s
    Median seconds of the warm repeats, of the bare network as published comparisons have it: no warp, no loss but the
    mean square of the field. Forward is in evaluation mode without gradients, forward + backward in training mode.
    ``..._cpu_s`` are the CPU seconds of the process, which a busy machine changes less.
step_s
    With ``--step``: a whole training step. Network, warp, the objective of the configuration (without one LNCC 9^3 and
    diffusion), backward, Adam. Where the images are compared (``warp``, ``sampling``, ``smoothing`` of a training) is
    left out: it is always at the voxels, exactly and unsmoothed.
network_part_s, warp_part_s, similarity_part_s, diffusion_part_s, optimiser_part_s
    The parts of such a step, each forward and backward: medians of its CPU seconds (on a GPU of its wall seconds). The
    optimiser's part is the gradient's norm and Adam.
..._mb
    Peak memory in 10^6 bytes. On a GPU what torch's allocator gave out; on the CPU the largest resident set over that
    of the idle process. Weights and images are included; on the CPU, in the mode ``compiled``, the compiler is too.
gflop, moved_gb, counted_mb; step_gflop, step_moved_gb, step_counted_mb
    What a forward pass and, with ``--step``, a training step cost, counted on tensors without contents
    (``dmir.training.cost`` says what is in it): 10^9 operations of matrix products, convolutions and attention, 10^9
    bytes read and written if no operation is fused into another, and 10^6 bytes alive at a time.
roofline_s, roofline_share; step_roofline_s, step_roofline_share
    The least seconds that the device's peaks allow for these operations and bytes, and how much of that speed was
    reached: 1 would be all of it, above 1 less memory is moved than counted. ``bound`` and ``step_bound`` say whether
    arithmetic or memory sets them. The peaks, ``peak_tflops`` in the row's precision and ``peak_gb_per_s``, are
    measured once, before the first row. Of one thread on a CPU it is the share of its CPU seconds. With ``compiled``
    operations are fused, and the share is no longer one.
first_call_s
    The first forward call; compilation is in it.
"""

from __future__ import annotations

import argparse
import json
import statistics
import sys
import time
from collections.abc import Callable, Sequence
from itertools import product
from pathlib import Path
from typing import Any

import pandas as pd
import torch
import yaml
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
from torch import nn

from dmir.config import Network, read_config
from dmir.errors import InputError, suggestion
from dmir.fields import warp
from dmir.losses import diffusion, dissimilarity
from dmir.networks import build, hyperparameter_names, network_names
from dmir.planning.device_speed import DeviceSpeed, measure_speed, roofline
from dmir.training.cost import Cost, count_inference, count_step
from dmir.training.devices import choose_device, device_name, set_threads
from dmir.training.objective import PRECISIONS, Objective, arithmetic, displacement_of

MODES = ("plain", "compiled")
LAYOUTS = ("default", "channels_last_3d")
GRID = "80x96x80"
PARTS = ("network", "warp", "similarity", "diffusion", "optimiser")
COLUMNS = (
    *("network", "parameters", "grid", "dtype", "mode", "layout", "gflop", "moved_gb", "counted_mb"),
    *("step_gflop", "step_moved_gb", "step_counted_mb"),
    *("forward_s", "forward_cpu_s", "forward_mb", "roofline_s", "roofline_share", "bound"),
    *("forward_backward_s", "forward_backward_cpu_s", "forward_backward_mb"),
    *("step_s", "step_cpu_s", "step_mb", "step_roofline_s", "step_roofline_share", "step_bound"),
    *(f"{part}_part_s" for part in PARTS),
    *("first_call_s", "peak_tflops", "peak_gb_per_s", "device", "threads", "failed"),
)


# --- what is counted ---


def count(row: dict[str, Any]) -> dict[str, Any]:
    """Return what a forward pass costs, and where an objective is given a training step, without computing anything.

    Empty where a network cannot be built: the mistake shows when it is measured.
    """
    shape, hyperparameters = parse_shape(row["grid"]), row["hyperparameters"]
    kind = "cuda" if torch.cuda.is_available() and row["device"] != "cpu" else "cpu"
    try:
        forward = count_inference(row["algorithm"], hyperparameters, shape, row["dtype"], device_type=kind)
        found = {"parameters": forward.parameters, **_counted("", forward)}
        if row["objective"] is not None:
            training = {**row["objective"], "precision": row["dtype"]}
            found |= _counted("step_", count_step(row["algorithm"], hyperparameters, shape, training, device_type=kind))
    except InputError:
        return {}
    return found


def _counted(prefix: str, cost: Cost) -> dict[str, float]:
    figures = {"gflop": cost.gflop, "moved_gb": cost.moved_gb, "counted_mb": cost.peak_mb}
    return {prefix + name: value for name, value in figures.items()}


def against_roofline(row: dict[str, Any], speed: DeviceSpeed) -> dict[str, Any]:
    """Return the least seconds of what was counted, and the share of that speed that was reached."""
    precision = row["dtype"]
    found: dict[str, Any] = {"peak_tflops": speed.teraflops[precision], "peak_gb_per_s": speed.bandwidth}
    for prefix, measured in (("", "forward"), ("step_", "step")):
        if f"{prefix}gflop" not in row:
            continue
        cost = Cost(row[f"{prefix}gflop"], row[f"{prefix}moved_gb"], 0.0, 0, 0)
        least = roofline(cost, speed, precision)
        found |= {f"{prefix}roofline_s": least.seconds, f"{prefix}bound": least.bound}
        alone = row.get(f"{measured}_cpu_s") if row.get("threads") == 1 else None
        seconds = alone or row.get(f"{measured}_s")  # of one thread, what a busy machine changes less
        if seconds:
            found[f"{prefix}roofline_share"] = least.seconds / seconds
    return found


def parameters_of(network: nn.Module) -> int:
    """Return the number of weights."""
    return sum(p.numel() for p in network.parameters())


# --- what is measured ---


def measure_row(row: dict[str, Any]) -> dict[str, Any]:
    """Measure one network at one grid, precision, mode and layout, in this process."""
    set_threads(row["threads"])
    device = choose_device(row["device"])
    idle = idle_memory_mb(device)
    torch.manual_seed(1)
    network = build(row["algorithm"], tuple(row["shape"]), **row["hyperparameters"]).to(device)
    if row["layout"] == "channels_last_3d":
        network.to(memory_format=torch.channels_last_3d)  # type: ignore[call-overload]
    callable_network = torch.compile(network) if row["mode"] == "compiled" else network
    moving, fixed = smooth_images(row["shape"], device)
    found: dict[str, Any] = {"device": device_name(device), "threads": torch.get_num_threads()}
    found["parameters"] = parameters_of(network)

    def displacement() -> torch.Tensor:
        return displacement_of(callable_network, moving, fixed, row["dtype"])

    def forward_backward() -> None:
        displacement().square().mean().backward()
        network.zero_grad()

    with arithmetic(row["dtype"]):
        network.eval()
        with torch.inference_mode():
            forward = measure(displacement, row["repeats"], device, idle)
        found |= {"first_call_s": forward.pop("first_s"), **_prefixed("forward", forward)}
        network.train()
        found |= _prefixed("forward_backward", measure(forward_backward, row["repeats"], device, idle))
        if row["objective"] is not None:
            step = training_step(network, displacement, moving, fixed, Objective(**row["objective"]))
            found |= _prefixed("step", measure(step, row["repeats"], device, idle))
            objective = Objective(**row["objective"])
            found |= step_parts(network, displacement, moving, fixed, objective, row["repeats"])
    return found


def training_step(
    network: nn.Module,
    displacement: Callable[[], torch.Tensor],
    moving: torch.Tensor,
    fixed: torch.Tensor,
    objective: Objective,
) -> Callable[[], None]:
    """Return a training step: field, warp, loss, backward, Adam."""
    optimiser = torch.optim.Adam(network.parameters(), lr=1e-4, fused=True)

    def step() -> None:
        field = displacement()
        loss, _, _ = objective(fixed, warp(moving, field), field)
        optimiser.zero_grad()
        loss.backward()
        optimiser.step()

    return step


def step_parts(
    network: nn.Module,
    displacement: Callable[[], torch.Tensor],
    moving: torch.Tensor,
    fixed: torch.Tensor,
    objective: Objective,
    repeats: int,
) -> dict[str, float]:
    """Return the median seconds of each part of a training step, forward and backward, after one that does not count.

    The graph is cut between the parts, so that each goes back by itself.
    """
    optimiser = torch.optim.Adam(network.parameters(), lr=1e-4, fused=True)
    on_cpu = moving.device.type == "cpu"
    options = {"window": objective.window} if objective.similarity == "lncc" else {}
    steps: list[dict[str, float]] = []

    def timed(part: str, call: Callable[[], Any]) -> Any:
        start = _now(on_cpu)
        result = call()
        steps[-1][part] = steps[-1].get(part, 0.0) + _now(on_cpu) - start
        return result

    def update() -> None:
        nn.utils.get_total_norm([p.grad for p in network.parameters() if p.grad is not None])
        optimiser.step()
        optimiser.zero_grad()

    for _ in range(repeats + 1):
        steps.append({})
        field = timed("network", displacement)
        leaf = field.detach().requires_grad_()
        warped = timed("warp", lambda leaf=leaf: warp(moving, leaf))
        image = warped.detach().requires_grad_()
        alike = timed("similarity", lambda image=image: dissimilarity(objective.similarity, fixed, image, **options))
        timed("similarity", alike.backward)
        timed("warp", lambda warped=warped, image=image: warped.backward(image.grad))
        smooth = timed("diffusion", lambda leaf=leaf: objective.regularisation * diffusion(leaf))
        timed("diffusion", smooth.backward)
        timed("network", lambda field=field, leaf=leaf: field.backward(leaf.grad))
        timed("optimiser", update)
    return {f"{part}_part_s": statistics.median(step[part] for step in steps[1:]) for part in PARTS}


def _now(on_cpu: bool) -> float:
    if on_cpu:
        return time.process_time()
    torch.cuda.synchronize()
    return time.perf_counter()


def _prefixed(name: str, measured: dict[str, float | None]) -> dict[str, float | None]:
    return {f"{name}_{key}": value for key, value in measured.items() if key != "first_s"}


# --- what is asked ---


def main(arguments: Sequence[str] | None = None) -> None:
    """Measure what the command line asks for, and print the table."""
    options = _parser().parse_args(arguments)
    if options.row:
        print(json.dumps(measure_row(json.loads(options.row))))
        return
    check_common(options)
    records, asked = [], rows(options)
    speed, place = None, options.device
    if not options.count_only:
        speed, place = device_speed(options.device, options.threads)
    counts: dict[tuple[str, str, str], dict[str, Any]] = {}
    for row in asked:
        name = f"{row['network']} {row['grid']} {row['dtype']}"
        key = row["network"], row["grid"], row["dtype"]
        if key not in counts:
            counts[key] = count(row)
        if speed is None:
            tell(f"{name}: counted")
            records.append({**row, "device": None, **counts[key]})
            continue
        found = measure_apart(__file__, {**row, "device": place}, options.threads, options.timeout)
        if "failed" in found:
            told = f"failed: {found['failed']}"
        else:
            told = f"forward {found['forward_s']:.3g} s, forward + backward {found['forward_backward_s']:.3g} s"
        tell(f"{name} {row['mode']} {row['layout']}: {told}")
        complete = {**row, "device": None, **counts[key], **found}
        records.append({**complete, **against_roofline(complete, speed)})
    table = pd.DataFrame(records).reindex(columns=list(COLUMNS))
    if speed is None:
        table = table.drop(columns=["mode", "layout", "threads"]).drop_duplicates()
    print_table(table, options.out)


def device_speed(device: str, threads: int) -> tuple[DeviceSpeed, str]:
    """Measure the peaks of the device; return them, and the device as each row's process is told it.

    A GPU's lease stays with this process: the others are sent to that very card.
    """
    set_threads(threads)
    place = choose_device(device)
    speed = measure_speed(place)
    tell(f"{speed.device}: {speed.teraflops} TFLOP/s, {speed.bandwidth:.3g} GB/s")
    return speed, str(place)


def rows(options: argparse.Namespace) -> list[dict[str, Any]]:
    """List what is to be measured: each network at each grid, precision, mode and layout."""
    networks, grids = _networks(options)
    default = "float32,bf16" if options.count_only else "float32"
    precisions = _chosen("--dtypes", options.dtypes or default, PRECISIONS)
    modes = _chosen("--modes", options.modes, MODES)
    layouts = _chosen("--layout", options.layout, LAYOUTS)
    common = {"device": options.device, "threads": options.threads, "repeats": options.repeats}
    return [
        {**network, "grid": grid, "shape": parse_shape(grid), "dtype": dtype, "mode": mode, "layout": layout, **common}
        for network, grid, dtype, mode, layout in product(networks, grids, precisions, modes, layouts)
    ]


def _networks(options: argparse.Namespace) -> tuple[list[dict[str, Any]], list[str]]:
    """Return the networks with their hyperparameters and objectives, and the grids."""
    networks: dict[str, dict[str, Any]] = {}
    if options.config is None:
        for name in _chosen("--networks", options.networks or ",".join(network_names()), network_names()):
            networks[name] = {"algorithm": name, "hyperparameters": {}, "objective": {}}
        grid = GRID
    else:
        configuration = read_config(options.config)
        grid = "x".join(map(str, configuration.grid.shape))
        known = configuration.networks()
        for name in _chosen("--networks", options.networks or ",".join(known), known):
            settings = configuration.method(name)
            assert isinstance(settings, Network)
            objective = {key: settings.training[key] for key in ("similarity", "window", "regularisation")}
            networks[name] = {
                "algorithm": settings.algorithm,
                "hyperparameters": dict(settings.network),
                "objective": objective,
            }
    for assignment in options.set:
        _assign(assignment, networks)
    if not (options.step or options.count_only):
        networks = {name: {**network, "objective": None} for name, network in networks.items()}
    return [{"network": name, **network} for name, network in networks.items()], (options.grids or grid).split(",")


def _assign(assignment: str, networks: dict[str, dict[str, Any]]) -> None:
    """Take ``caml.checkpointing=true`` into the hyperparameters."""
    target, equals, value = assignment.partition("=")
    name, dot, key = target.partition(".")
    if not (equals and dot):
        raise InputError("--set", found=repr(assignment), expected="network.hyperparameter=value")
    if name not in networks:
        raise InputError("--set", found=name, expected="a network of this run", remedy=suggestion(name, networks))
    known = hyperparameter_names(networks[name]["algorithm"])
    if key not in known:
        raise InputError("--set", found=key, expected=f"a hyperparameter of {name}", remedy=suggestion(key, known))
    networks[name]["hyperparameters"][key] = yaml.safe_load(value)


def _chosen(option: str, text: str, known: Sequence[str]) -> list[str]:
    chosen = list(dict.fromkeys(text.split(",")))
    for name in chosen:
        if name not in known:
            raise InputError(option, found=repr(name), expected="a known name", remedy=suggestion(name, known))
    return chosen


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter, allow_abbrev=False
    )
    parser.add_argument("--networks", help="names, separated by commas (default: all, or those of the configuration)")
    parser.add_argument("--grids", help=f"for instance 80x96x80,160x192x224 (default {GRID}, or the configuration's)")
    parser.add_argument("--dtypes", help=f"of {', '.join(PRECISIONS)} (default float32)")
    parser.add_argument("--modes", default="plain", help=f"of {', '.join(MODES)} (default plain)")
    parser.add_argument(
        "--layout", default="default", help=f"of {', '.join(LAYOUTS)} (all weights); default: as the network does it"
    )
    parser.add_argument("--set", nargs="+", action="extend", default=[], help="network.hyperparameter=value (YAML)")
    parser.add_argument("--config", type=Path, help="take networks, hyperparameters, grid and objective from here")
    parser.add_argument("--step", action="store_true", help="measure a whole training step too")
    parser.add_argument("--count-only", action="store_true", help="count forward pass and step, and measure nothing")
    add_common_arguments(parser)
    return parser


if __name__ == "__main__":
    sys.exit(run_main(main))
