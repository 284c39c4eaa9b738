"""One pair by one method, in this process and no other: `registration.py` starts it, and no one else need.

    python benchmarks/pair.py --row '{"algorithm": "descent", "parameters": {}, "threads": 1,
                                      "moving": "a.nii.gz", "fixed": "b.nii.gz", "field": "u.npy"}'

It writes the field, float32 (3, D, H, W) in voxels of the fixed grid, and prints what the registration took. Libraries
are imported and images read before the clock starts, and the field is written after it stopped. Nothing is imported
that the method does not need: torch or pandas would be counted as the memory of a program that knows neither.
"""

from __future__ import annotations

import importlib
import importlib.metadata
import importlib.util
import inspect
import json
import os
import resource
import sys
import time
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import numpy as np

from dmir.errors import InputError, suggestion
from dmir.job import limit_threads
from dmir.methods.geometry import LPS, geometry
from dmir.methods.isolated import peak_memory_mb
from dmir.volumes import Volume, read_image

MEBIBYTE = 1.048576  # in 10^6 bytes
LIBRARIES = {  # algorithm -> what it imports, of which the first is told with its version
    "affine": (),
    "syn": ("ants",),
    "elastix": ("itk",),
    "descent": ("torch",),
    "greedy": ("picsl_greedy", "SimpleITK"),
    "convexadam": ("convexAdam", "torch"),
}
PACKAGES = {"ants": "antspyx", "itk": "itk-elastix", "picsl_greedy": "picsl-greedy", "convexAdam": "convexadam"}


# --- methods of others ---


def greedy(
    moving: Volume, fixed: Volume, *, arguments: str = "-noise 0 -m NCC 2x2x2 -n 100x50x10 -wp 0", threads: int = 1
) -> np.ndarray:
    """Return the field of greedy (Yushkevich et al. 2016), of `picsl_greedy`: images and field in memory.

    By its own default it rounds the field to tenths of a voxel, which folds in places; `-wp 0` does not round.

    Parameters
    ----------
    arguments
        Of its command line, but for images, dimension and threads.
    """
    import SimpleITK as sitk
    from picsl_greedy import Greedy3D

    def image(volume: Volume, name: str) -> Any:
        place = geometry(volume, name)
        result = sitk.GetImageFromArray(np.ascontiguousarray(volume.data.T, np.float32))
        result.SetOrigin(place.origin)
        result.SetSpacing(place.spacing)
        result.SetDirection(place.direction.ravel().tolist())
        return result

    program = Greedy3D()
    images = {"fixed": image(fixed, "the fixed image"), "moving": image(moving, "the moving image")}
    program.execute(f"-V 0 -threads {threads} -d 3 {arguments} -i fixed moving -o warp", **images, warp=None)
    warp = program["warp"]  # held here: a view does not keep its image
    millimetres = sitk.GetArrayViewFromImage(warp).T  # (3, D, H, W), LPS
    to_voxels = np.linalg.inv(LPS @ fixed.affine[:3, :3])
    return np.tensordot(to_voxels, millimetres, axes=1).astype(np.float32)


def convexadam(moving: Volume, fixed: Volume, **parameters: Any) -> np.ndarray:
    """Return the field of ConvexAdam with MIND features (Siebert et al. 2021), of `convexAdam`, on the CPU in float32.

    Parameters
    ----------
    parameters
        Of its `convex_adam_pt`.
    """
    import torch
    from convexAdam.convex_adam_MIND import convex_adam_pt

    images = [np.ascontiguousarray(volume.data, np.float32) for volume in (fixed, moving)]
    field = convex_adam_pt(*images, dtype=torch.float32, device=torch.device("cpu"), **parameters)
    return np.moveaxis(field, -1, 0).astype(np.float32)


# --- what a method is ---


def missing_library(algorithm: str) -> str:
    """Return the name of a library that this algorithm needs and that is not installed, else an empty text."""
    if algorithm not in LIBRARIES:
        raise InputError(
            "method", found=repr(algorithm), expected=", ".join(LIBRARIES), remedy=suggestion(algorithm, LIBRARIES)
        )
    return next((name for name in LIBRARIES[algorithm] if importlib.util.find_spec(name) is None), "")


def knows_cards(algorithm: str) -> bool:
    """Tell whether an algorithm can be given a device to compute on."""
    return algorithm == "descent"


def version_of(algorithm: str) -> str:
    """Return the library behind an algorithm with its version, as pip calls it."""
    names = [PACKAGES.get(name, name) for name in LIBRARIES[algorithm]]
    return " ".join([names[0], importlib.metadata.version(names[0])]) if names else ""


def function_of(algorithm: str) -> Callable[..., np.ndarray]:
    """Return what registers a pair, imported with all that it stands on."""
    for name in LIBRARIES[algorithm]:
        importlib.import_module("convexAdam.convex_adam_MIND" if name == "convexAdam" else name)
    others = {"greedy": greedy, "convexadam": convexadam}
    return others.get(algorithm) or importlib.import_module(f"dmir.methods.{algorithm}").register


def describe(algorithm: str, parameters: Mapping[str, Any]) -> str:
    """Return all parameters of an algorithm, its defaults included, in one line; InputError for one it does not have.

    What is None is left out, and so are the threads.
    """
    function = convex_adam_pt() if algorithm == "convexadam" else function_of(algorithm)
    known = inspect.signature(function).parameters
    for name in parameters:
        if name not in known:
            raise InputError(f"{algorithm}: {name}", found="no parameter of this method", expected=", ".join(known))
    values = {name: value.default for name, value in known.items() if value.default is not value.empty} | parameters
    aside = {"threads", "device", "dtype", "verbose"}
    told = {name: value for name, value in values.items() if name not in aside and value not in (None, (None, None))}
    plain = {name: list(value) if isinstance(value, tuple) else value for name, value in told.items()}
    return ", ".join(f"{name}={value!r}" for name, value in plain.items())


def convex_adam_pt() -> Callable[..., Any]:
    """Return the function of `convexAdam` whose parameters are the method's."""
    function: Callable[..., Any] = importlib.import_module("convexAdam.convex_adam_MIND").convex_adam_pt
    return function


# --- the process that registers ---


def register_row(row: Mapping[str, Any]) -> dict[str, Any]:
    """Register one pair, write its field, and return what it took.

    Returns
    -------
    dict
        ``cpu_s``, ``wall_s``: of the registration alone. ``peak_mb``: the largest resident set of this process up to
        its end, 10^6 bytes; ``idle_mb``: the same before it, with libraries and images.
    """
    limit_threads(row["threads"])
    on_card = row.get("device", "cpu") != "cpu"
    if not on_card:
        os.environ["CUDA_VISIBLE_DEVICES"] = ""  # seconds of a processor are compared
    function, parameters = function_of(row["algorithm"]), dict(row["parameters"])
    if row["algorithm"] == "greedy":
        parameters["threads"] = row["threads"]
    moving, fixed = read_image(row["moving"], "moving"), read_image(row["fixed"], "fixed")
    if on_card:
        field, spent = on_a_card(lambda device: function(moving, fixed, device, **parameters), row["device"])
    else:
        idle, cpu, wall = peak_memory_mb(), cpu_seconds(), time.perf_counter()
        field = function(moving, fixed, **parameters)
        spent = {"cpu_s": cpu_seconds() - cpu, "wall_s": time.perf_counter() - wall}
        spent |= {"peak_mb": peak_memory_mb() * MEBIBYTE, "idle_mb": idle * MEBIBYTE}
    if not np.isfinite(field).all():
        raise ValueError("the field has values that are NaN or infinite")
    np.save(row["field"], field)
    return spent


def on_a_card(register: Callable[[Any], np.ndarray], device: str) -> tuple[np.ndarray, dict[str, Any]]:
    """Register three times, and return the field: warm, timed, and counted, beside the device's own peaks."""
    import torch

    from dmir.planning.device_speed import measure_speed, roofline
    from dmir.training.cost import Cost, CostCounter
    from dmir.training.devices import choose_device, reset_peak_memory
    from dmir.training.devices import peak_memory_mb as device_memory_mb

    target = choose_device(torch.device("cpu") if device == "host" else device)  # the host: to try this without a card
    speed = measure_speed(target)
    register(target)
    reset_peak_memory(target)
    cpu, wall = cpu_seconds(), time.perf_counter()
    field = register(target)  # ends with a copy to the host, which waits for the card
    spent: dict[str, Any] = {"cpu_s": cpu_seconds() - cpu, "wall_s": time.perf_counter() - wall}
    spent |= {"peak_mb": device_memory_mb(target), "idle_mb": 0.0}
    with CostCounter() as counter:
        register(target)
    cost = Cost(counter.flop / 1e9, counter.moved / 1e9, 0.0, counter.kernels, 0)
    least = roofline(cost, speed, "float32")
    spent |= {"gflop": cost.gflop, "moved_gb": cost.moved_gb, "roofline_s": least.seconds, "bound": least.bound}
    return field, spent | {"roofline_share": least.seconds / spent["wall_s"]}


def cpu_seconds() -> float:
    """Return user and system seconds of all threads of this process, and of children that have ended."""
    usages = [resource.getrusage(who) for who in (resource.RUSAGE_SELF, resource.RUSAGE_CHILDREN)]
    return sum(usage.ru_utime + usage.ru_stime for usage in usages)


def main(arguments: Sequence[str]) -> None:
    """Answer one request: the only line that is printed, whatever a library may have to say."""
    answer = os.dup(1)
    os.dup2(2, 1)
    found = register_row(json.loads(arguments[arguments.index("--row") + 1]))
    os.write(answer, (json.dumps(found) + "\n").encode())


if __name__ == "__main__":
    main(sys.argv[1:])
