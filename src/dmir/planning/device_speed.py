"""How fast the device at hand can be at most, and how long a counted computation takes it at least."""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable
from dataclasses import dataclass

import torch

from dmir.training.cost import Cost
from dmir.training.devices import device_name
from dmir.training.objective import arithmetic, has_bfloat16

PRODUCT_EDGE = {"cpu": 1024, "cuda": 8192}  # of square matrices: large enough that their products are not what waits
BUFFER_BYTES = {"cpu": 2**27, "cuda": 2**30}  # beyond every cache
SECONDS = 0.6  # for each of the four measurements


@dataclass(frozen=True)
class DeviceSpeed:
    """Peaks of a device.

    Attributes
    ----------
    device
        Its name.
    teraflops
        10^12 floating-point operations a second in dense matrix products, by precision.
    bandwidth
        10^9 bytes a second, read and written, in copies.
    """

    device: str
    teraflops: dict[str, float]
    bandwidth: float


REFERENCE_GPU = DeviceSpeed(
    "NVIDIA A100 80 GB (data sheet)", {"float32": 19.5, "tf32": 156.0, "bf16": 312.0}, bandwidth=2039.0
)
"""Stands for a GPU where none is at hand; from NVIDIA's data sheet, not measured."""


@dataclass(frozen=True)
class Roofline:
    """The least seconds of a computation, and whether ``"arithmetic"`` or ``"memory"`` sets them."""

    seconds: float
    bound: str


def roofline(cost: Cost, speed: DeviceSpeed, precision: str) -> Roofline:
    """Return max(operations / peak, bytes / bandwidth) (Williams et al. 2009, the roofline model).

    Operations that torch does not fuse move what :class:`~dmir.training.cost.Cost` counts; fused ones move less, so
    that a compiled network may fall below it where memory is the bound.
    """
    arithmetic_seconds = cost.gflop / 1e3 / speed.teraflops[precision]
    memory_seconds = cost.moved_gb / speed.bandwidth
    bound = "arithmetic" if arithmetic_seconds >= memory_seconds else "memory"
    return Roofline(max(arithmetic_seconds, memory_seconds), bound)


def roofline_seconds(cost: Cost, speed: DeviceSpeed, precision: str) -> float:
    """Return the seconds of :func:`roofline`."""
    return roofline(cost, speed, precision).seconds


def measure_speed(device: torch.device) -> DeviceSpeed:
    """Measure the peaks of a device, with the threads that torch has now; two or three seconds.

    The median of several runs is taken: on a machine that does other things as well a peak is not what it could be.
    A CPU computes TF32 as float32, and in float32 what it has no bfloat16 arithmetic for.
    """
    teraflops = {"float32": _product_teraflops(device, torch.float32, "float32")}
    on_gpu = device.type == "cuda"
    teraflops["tf32"] = _product_teraflops(device, torch.float32, "tf32") if on_gpu else teraflops["float32"]
    supported = has_bfloat16(device.type)
    teraflops["bf16"] = _product_teraflops(device, torch.bfloat16, "bf16") if supported else teraflops["float32"]
    bandwidth = _copy_bandwidth(device)
    if on_gpu:
        torch.cuda.empty_cache()  # for the processes that are measured next
    return DeviceSpeed(device_name(device), teraflops, bandwidth)


def _copy_bandwidth(device: torch.device) -> float:
    source = torch.ones(BUFFER_BYTES[device.type] // 4, device=device)
    target = torch.empty_like(source)
    seconds = _median_seconds(lambda: target.copy_(source), device)
    return 2 * source.nbytes / seconds / 1e9


def _product_teraflops(device: torch.device, dtype: torch.dtype, precision: str) -> float:
    edge = PRODUCT_EDGE[device.type]
    factors = torch.ones(2, edge, edge, device=device, dtype=dtype)
    with arithmetic(precision):
        seconds = _median_seconds(lambda: factors[0] @ factors[1], device)
    return 2.0 * edge**3 / seconds / 1e12


def _median_seconds(call: Callable[[], object], device: torch.device) -> float:
    taken: list[float] = []
    # of one thread its own seconds, which a busy machine changes less
    alone = device.type == "cpu" and torch.get_num_threads() == 1
    clock = time.process_time if alone else time.perf_counter
    end = time.perf_counter() + SECONDS
    call()
    while len(taken) < 3 or time.perf_counter() < end:
        _synchronise(device)
        start = clock()
        call()
        _synchronise(device)
        taken.append(clock() - start)
    return statistics.median(taken)


def _synchronise(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize(device)
