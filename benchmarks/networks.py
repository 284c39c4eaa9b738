"""Time, memory and work of the networks: one table, a process a row.

    python benchmarks/networks.py --networks caml,voxelmorph --grids 80x96x80 --dtypes float32,bf16
    python benchmarks/networks.py --config config/config.yaml --step
    python benchmarks/networks.py --networks caml --grids 160x192x224 --set caml.checkpointing=true --out table.csv

What the columns say
--------------------
forward_s, forward_backward_s
    Median seconds of the warm repeats, of the bare network as published comparisons have it: no warp, no loss but the
    mean square of the field. Forward is in evaluation mode without gradients, forward + backward in training mode.
    ``..._cpu_s`` are the CPU seconds of the process, which a busy machine changes less.
step_s
    With ``--step``: a whole training step. Network, warp, the objective of the configuration (without one LNCC 9^3 and
    diffusion), backward, Adam.
..._mb
    Peak memory in 10^6 bytes. On a GPU what torch's allocator gave out; on the CPU the largest resident set over that
    of the idle process. Weights and images are included; on the CPU, in the mode ``compiled``, the compiler is too.
gflop
    10^9 floating-point operations of the forward pass, a multiplication and an addition being two (twice the MACs that
    some papers print as "FLOPs"). Matrix products, convolutions and attention are counted, as they are really done:
    products that a network skips by algebra are not there, products with masked keys are. Counted on tensors without
    contents where a network can work on them, else in one more forward call. Not counted: norms, softmax,
    activations, pooling, resampling and warps, which move memory rather than compute.
first_call_s
    The first forward call; compilation is in it.
"""

from __future__ import annotations

import argparse
import json
import sys
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
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.utils.flop_counter import FlopCounterMode, sdpa_flop_count

from dmir.config import Network, read_config
from dmir.errors import InputError, suggestion
from dmir.fields import warp
from dmir.networks import build, hyperparameter_names, network_names
from dmir.training.devices import choose_device, device_name, set_threads
from dmir.training.objective import PRECISIONS, Objective, arithmetic, displacement_of

MODES = ("plain", "compiled")
LAYOUTS = ("default", "channels_last_3d")
GRID = "80x96x80"
COLUMNS = (
    *("network", "parameters", "grid", "dtype", "mode", "layout", "gflop"),
    *("forward_s", "forward_cpu_s", "forward_mb"),
    *("forward_backward_s", "forward_backward_cpu_s", "forward_backward_mb"),
    *("step_s", "step_cpu_s", "step_mb", "first_call_s", "device", "threads", "failed"),
)


# --- what is counted ---


def count(row: dict[str, Any]) -> dict[str, Any]:
    """Return the parameters and the GFLOP of a forward pass, without computing anything.

    Empty where the network's layers depend on what is in its tensors: then it must be counted while it computes.
    """
    shape = tuple(row["shape"])
    try:
        with FakeTensorMode():  # tensors that have a shape and a device, but no memory
            network = build(row["algorithm"], shape, **row["hyperparameters"]).eval()
            gflop = gflop_of(network, torch.empty(1, 1, *shape), torch.empty(1, 1, *shape))
    except Exception:  # a mistake in the network or its hyperparameters shows when it is measured
        return {}
    return {"parameters": parameters_of(network), "gflop": gflop}


def parameters_of(network: nn.Module) -> int:
    """Return the number of weights."""
    return sum(p.numel() for p in network.parameters())


def gflop_of(network: nn.Module, *inputs: torch.Tensor) -> float:
    """Return the GFLOP of calling a module: matrix products, convolutions, attention."""
    on_cpu = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu  # torch's list has its sisters on GPUs only
    with FlopCounterMode(display=False, custom_mapping={on_cpu: _attention_flop}) as counter, torch.no_grad():
        network(*inputs)
    return counter.get_total_flops() / 1e9


def _attention_flop(query: Any, key: Any, value: Any, *_: Any, **__: Any) -> int:
    return sdpa_flop_count(query, key, value)  # given the shapes (B, heads, tokens, d)


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
    if row["count"]:  # last: it is not part of the peak
        found["gflop"] = gflop_of(network.eval(), moving, fixed)
    return found


def training_step(
    network: nn.Module,
    displacement: Callable[[], torch.Tensor],
    moving: torch.Tensor,
    fixed: torch.Tensor,
    objective: Objective,
) -> Callable[[], None]:
    """Return a training step: field, warp, loss, backward, Adam."""
    optimiser = torch.optim.Adam(network.parameters(), lr=1e-4)

    def step() -> None:
        field = displacement()
        loss, _, _ = objective(fixed, warp(moving, field), field)
        optimiser.zero_grad()
        loss.backward()
        optimiser.step()

    return step


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
    records = []
    counts: dict[tuple[str, str], dict[str, Any]] = {}
    for row in rows(options):
        name = f"{row['network']} {row['grid']}"
        key = row["network"], row["grid"]
        if not counts.get(key):
            counts[key] = count(row)
        found = measure_apart(__file__, {**row, "count": not counts[key]}, options.threads, options.timeout)
        if "failed" in found:
            told = f"failed: {found['failed']}"
        else:
            told = f"forward {found['forward_s']:.3g} s, forward + backward {found['forward_backward_s']:.3g} s"
            counts[key] = counts[key] or {column: found[column] for column in ("parameters", "gflop")}
        tell(f"{name} {row['dtype']} {row['mode']} {row['layout']}: {told}")
        records.append({**row, "device": None, **counts[key], **found})
    print_table(pd.DataFrame(records).reindex(columns=list(COLUMNS)), options.out)


def rows(options: argparse.Namespace) -> list[dict[str, Any]]:
    """List what is to be measured: each network at each grid, precision, mode and layout."""
    networks, grids = _networks(options)
    precisions = _chosen("--dtypes", options.dtypes, PRECISIONS)
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
    if not options.step:
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
    parser.add_argument("--dtypes", default="float32", help=f"of {', '.join(PRECISIONS)} (default float32)")
    parser.add_argument("--modes", default="plain", help=f"of {', '.join(MODES)} (default plain)")
    parser.add_argument(
        "--layout", default="default", help=f"of {', '.join(LAYOUTS)} (all weights); default: as the network does it"
    )
    parser.add_argument("--set", nargs="+", action="extend", default=[], help="network.hyperparameter=value (YAML)")
    parser.add_argument("--config", type=Path, help="take networks, hyperparameters, grid and objective from here")
    parser.add_argument("--step", action="store_true", help="measure a whole training step too")
    add_common_arguments(parser)
    return parser


if __name__ == "__main__":
    sys.exit(run_main(main))
