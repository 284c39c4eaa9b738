"""Short runs of what a pipeline does, each in a process of its own, from which the length of long ones follows.

``python -m dmir.planning.trial REQUEST``: the request is JSON with a ``kind`` of :data:`KINDS` and the arguments of the
function of that name; the answer is a line of JSON.
"""

from __future__ import annotations

import json
import math
import os
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F

from dmir import registry
from dmir.fields import save_field
from dmir.job import THREAD_VARIABLES
from dmir.methods import load_libraries, register
from dmir.metrics.score import score_pair
from dmir.networks import build
from dmir.structures import load_structures
from dmir.training.comparison import compared
from dmir.training.cost import settings_of
from dmir.training.devices import choose_device, set_threads
from dmir.training.objective import arithmetic, displacement_of
from dmir.volumes import Volume

REPEATS = 3


def try_apart(request: dict[str, Any], threads: int, timeout: float) -> dict[str, float] | None:
    """Run a request in a process of its own; None where it fails or is not done in time."""
    environment = {**os.environ, **dict.fromkeys(THREAD_VARIABLES, str(threads))}
    source = str(Path(__file__).parents[2])  # this very library, installed or not
    environment["PYTHONPATH"] = os.pathsep.join(filter(None, [source, os.environ.get("PYTHONPATH")]))
    command = [sys.executable, "-m", "dmir.planning.trial", json.dumps({**request, "threads": threads})]
    try:
        done = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=timeout, check=True)
        answer: dict[str, float] = json.loads(done.stdout.splitlines()[-1])
    except (subprocess.SubprocessError, ValueError, IndexError):
        return None
    return answer


def network(
    algorithm: str,
    hyperparameters: dict[str, Any],
    shape: Sequence[int],
    training: dict[str, Any],
    device: str,
    threads: int,
    seconds: float,
) -> dict[str, float]:
    """Return ``inference_s`` and ``step_s``, the medians of warm runs, as many as there is time for."""
    place = choose_device(device)
    settings = settings_of(training)
    size = (shape[0], shape[1], shape[2])
    net = build(algorithm, size, **hyperparameters).to(place)
    moving, fixed = (image.to(place) for image in _pair(size, settings.batch_size))
    objective, optimiser = settings.objective(), torch.optim.Adam(net.parameters(), fused=True)

    def infer() -> None:
        with torch.inference_mode():
            displacement_of(net, moving[:1], fixed[:1], settings.precision)

    def step() -> None:
        displacement = displacement_of(net, moving, fixed, settings.precision)
        loss = objective(*compared(moving, fixed, displacement, settings), displacement)[0]
        optimiser.zero_grad()
        loss.backward()
        optimiser.step()

    with arithmetic(settings.precision):
        net.eval()
        inference_s = _median(infer, place, threads, seconds / 4)
        net.train()
        return {"inference_s": inference_s, "step_s": _median(step, place, threads, 3 * seconds / 4)}


def method(algorithm: str, parameters: dict[str, Any], shape: Sequence[int], threads: int) -> dict[str, float]:
    """Return what a method measures of itself, or else the seconds of one voxel of a pair."""
    moving, fixed = _volumes(shape)
    load_libraries(algorithm, parameters)

    def seconds_of(changed: Mapping[str, Any]) -> float:
        clock = _Clock(threads)
        register(moving, fixed, algorithm, **changed)
        return clock.seconds()

    measure = getattr(registry.implementation(algorithm), "measure", None)
    if measure is not None:
        found: dict[str, float] = measure(parameters, seconds_of, shape)
        return found
    return {f"{algorithm} voxel_s": seconds_of(parameters) / math.prod(shape)}


def score(structures: str, interpolations: Sequence[str], shape: Sequence[int], threads: int) -> dict[str, float]:
    """Return the seconds of a voxel in scoring one pair, and in writing its field."""
    chosen = load_structures(structures)
    ids = np.array([0, *chosen.ids])
    coarse = np.random.default_rng(1).integers(0, len(ids), [max(2, n // 8) for n in shape])
    labels = ids[_enlarged(coarse, shape)].astype(np.int32)
    field = 2.0 * (_pair((shape[0], shape[1], shape[2]), 3)[0][:, 0].numpy() - 0.5)
    clock = _Clock(threads)
    score_pair(field, np.eye(4), labels, labels, chosen, interpolations=interpolations)
    scored = clock.seconds()
    with tempfile.TemporaryDirectory(prefix="plan-") as folder:
        clock = _Clock(threads)
        save_field(Path(folder) / "field.nii.gz", field, np.eye(4))
        return {"score_s": scored / labels.size, "write_s": clock.seconds() / labels.size}


KINDS: dict[str, Callable[..., dict[str, float]]] = {
    "network": network,
    "method": method,
    "score": score,
}


class _Clock:
    """Seconds of one thread's work, which a busy machine changes less; of several threads, seconds on the wall."""

    def __init__(self, threads: int, on_cpu: bool = True) -> None:
        self._now = time.process_time if threads == 1 and on_cpu else time.perf_counter
        self._start = self._now()

    def seconds(self) -> float:
        return self._now() - self._start


def _median(call: Callable[[], None], device: torch.device, threads: int, seconds: float) -> float:
    def timed() -> float:
        clock = _Clock(threads, device.type == "cpu")
        call()
        if device.type == "cuda":
            torch.cuda.synchronize(device)
        return clock.seconds()

    end = time.perf_counter() + seconds
    first = timed()  # memory, choice of algorithms
    taken = [first] if time.perf_counter() + first > end else []
    while not taken or (len(taken) < REPEATS and time.perf_counter() < end):
        taken.append(timed())
    return statistics.median(taken)


def _pair(shape: tuple[int, int, int], batch: int) -> torch.Tensor:
    """Return two batches of smoothed noise in [0, 1], (2, batch, 1, *shape), the same every time."""
    noise = torch.rand(2 * batch, 1, *shape, generator=torch.Generator().manual_seed(1))
    return F.avg_pool3d(noise, 3, 1, 1).unflatten(0, (2, batch))


def _volumes(shape: Sequence[int]) -> tuple[Volume, Volume]:
    """Return two ellipsoids with smoothed noise, as large within the grid as a brain is."""
    inside = sum(x**2 for x in np.meshgrid(*(np.linspace(-1.2, 1.2, n) for n in shape), indexing="ij")) < 1
    moving, fixed = _pair((shape[0], shape[1], shape[2]), 1)[:, 0, 0].numpy()
    return Volume(moving * inside, np.eye(4)), Volume(fixed * inside, np.eye(4))


def _enlarged(coarse: np.ndarray, shape: Sequence[int]) -> np.ndarray:
    index = np.ix_(*(np.arange(n) * m // n for n, m in zip(shape, coarse.shape, strict=True)))
    enlarged: np.ndarray = coarse[index]
    return enlarged


def main(arguments: Sequence[str]) -> None:
    """Answer one request."""
    request = json.loads(arguments[0])
    set_threads(request["threads"])
    print(json.dumps(KINDS[request.pop("kind")](**request)))


if __name__ == "__main__":
    main(sys.argv[1:])
