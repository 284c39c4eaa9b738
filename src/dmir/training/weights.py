"""Trained weights on disk: safetensors, with all that is needed to build their network again.

A weights file cannot run code when it is read, and tells what it holds: the network's name and hyperparameters, the
grid and the cohort it was trained on. Reading refuses whatever does not fit. What a file tells of its network is
compared with its tensors on torch's ``meta`` device, where tensors have no memory, before the network is built.
"""

from __future__ import annotations

import json
import logging
import math
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import nn

import dmir
from dmir import networks, registry
from dmir.errors import InputError, damaged
from dmir.networks.shapes import shapes_alone
from dmir.volumes import MAXIMUM_VOXELS, Grid, atomic_path

log = logging.getLogger(__name__)

FORMAT = 1
LARGEST = 4096  # a hyperparameter, and 64 entries of a list of them: several times those of any network here
FAILED = "failed"  # in the file's extra: why there are no weights, because the training failed
KEY = "dmir"  # one key with one JSON text: safetensors keeps several keys in no fixed order


class TrainingFailed(InputError):
    """A file that stands for a model whose training failed; ``found`` is the reason."""


def save_weights(
    path: str | Path,
    network: nn.Module,
    *,
    name: str,
    hyperparameters: Mapping[str, Any],
    grid: Grid,
    cohort: str = "",
    seed: int | None = None,
    extra: Mapping[str, Any] | None = None,
) -> None:
    """Write a network's weights and what they are, all or nothing.

    Parameters
    ----------
    path
        ``.safetensors`` file.
    network
        Its ``state_dict`` is written, on the CPU, in the types it has.
    name, hyperparameters
        What ``dmir.networks.build`` needs to build it again, with the shape of the grid.
    grid
        The grid of the images it was trained on.
    cohort, seed
        What it was trained on and with.
    extra
        Anything more that JSON can hold, for instance the training's settings.
    """
    metadata = {
        "format": FORMAT,
        "dmir": dmir.__version__,
        "network": name,
        "hyperparameters": dict(hyperparameters),
        "grid": {
            "shape": [int(n) for n in grid.shape],
            "spacing": [round(float(s), 6) for s in grid.spacing],
            "affine": [[float(value) for value in row] for row in grid.affine],
        },
        "cohort": cohort,
        "seed": seed,
        "extra": dict(extra or {}),
    }
    # cloned: safetensors refuses tensors that share memory
    tensors = {key: value.detach().cpu().clone().contiguous() for key, value in network.state_dict().items()}
    with atomic_path(path) as temporary:
        save_file(tensors, temporary, metadata={KEY: json.dumps(metadata, sort_keys=True)})


def load_weights(
    path: str | Path,
    expected: Mapping[str, Any] | None = None,
    device: str | torch.device = "cpu",
) -> tuple[nn.Module, dict[str, Any]]:
    """Build the network that a weights file holds, with its weights, ready for inference.

    Parameters
    ----------
    path
        A file of :func:`save_weights`.
    expected
        What the file must say of itself, for instance ``{"network": "caml", "hyperparameters": {...}}``;
        hyperparameters that are not named here are free.
    device
        Where the network goes.

    Returns
    -------
    network, metadata
        The network in evaluation mode, and the file's metadata.

    Raises
    ------
    InputError
        The file is missing, not safetensors, not this library's, of another network or hyperparameters than
        expected, or its tensors do not fit the network.
    TrainingFailed
        There are no weights in it, but the reason why there are none.
    """
    path = Path(path)
    metadata, tensors = _read(path)
    _require(path, metadata, expected or {})
    _require_trained(path, metadata)
    if registry.names_a_file(metadata["network"]) and "network" not in (expected or {}):
        raise InputError(
            path,
            found=f"weights of a network in a file, {metadata['network']}",
            expected="those of a network that is built in or installed: a file of weights never names code to run",
            remedy="Use them by the configuration that names the file, or install the network as a package.",
        )
    with shapes_alone():
        shapes = _build(path, metadata)
    _require_fit(path, shapes, tensors, metadata)
    network = _build(path, metadata)
    _tell_of_newer_keys(path, network, metadata)
    network.load_state_dict(tensors)
    return network.to(device).eval(), metadata


def _tell_of_newer_keys(path: Path, network: nn.Module, metadata: Mapping[str, Any]) -> None:
    """Say which hyperparameters the network did not have yet when the weights were written, and what is assumed."""
    complete = getattr(network, "hyperparameters", {})
    if newer := {key: value for key, value in complete.items() if key not in metadata["hyperparameters"]}:
        assumed = ", ".join(f"{key} = {value}" for key, value in newer.items())
        log.warning("%s does not say, being of dmir %s or not complete: %s is assumed", path, metadata["dmir"], assumed)


def require_trained(path: str | Path) -> None:
    """Raise TrainingFailed for a file that holds the reason why there are no weights."""
    _require_trained(Path(path), read_metadata(path))


def _require_trained(path: Path, metadata: Mapping[str, Any]) -> None:
    if FAILED in metadata["extra"]:
        raise TrainingFailed(
            path,
            found=f"no weights, because the training failed: {metadata['extra'][FAILED]}",
            expected="weights",
            remedy="Mend the network, and the same command trains it.",
        )


def read_metadata(path: str | Path) -> dict[str, Any]:
    """Return what a weights file says of itself, without its tensors; raises InputError as :func:`load_weights`."""
    return _read(Path(path), tensors=False)[0]


def _read(path: Path, tensors: bool = True) -> tuple[dict[str, Any], dict[str, torch.Tensor]]:
    expected = "a weights file (.safetensors) written by this library"
    if not path.is_file():
        raise InputError(path, found="no such file", expected=expected, remedy="Check the path, or train the model.")
    try:
        with safe_open(path, framework="pt") as file:
            text = (file.metadata() or {}).get(KEY)
            held = {key: file.get_tensor(key) for key in file.keys()} if tensors else {}  # noqa: SIM118 (not a dict)
    except (SafetensorError, OSError) as error:
        raise damaged(
            path,
            found=f"a file that is not safetensors, or is cut short ({error})",
            expected=expected,
            remedy="Pickled checkpoints (.pt, .pth, .ckpt) are never read: they can run code.",
        ) from error
    if text is None:
        raise InputError(path, found="safetensors of another program", expected=expected)
    metadata = _metadata(path, text)
    if metadata["format"] > FORMAT:
        raise InputError(
            path,
            found=f"weights format {metadata['format']}, written by dmir {metadata['dmir']}",
            expected=f"format {FORMAT} or older",
            remedy=f"Update dmir (this is {dmir.__version__}).",
        )
    return metadata, held


def _metadata(path: Path, text: str) -> dict[str, Any]:
    """Return what the file says of itself; InputError where that cannot be of a network."""
    try:
        metadata = json.loads(text)
    except (ValueError, RecursionError) as error:
        metadata, reason = None, f"no JSON ({str(error)[:100]})"
    else:
        reason = _strange(metadata)
    if reason:
        raise InputError(
            path,
            found=f"a description of the network with {reason}",
            expected="what this library writes: format, network, hyperparameters, grid",
            remedy="The file is damaged, or was made by something else.",
        )
    return metadata


def _strange(metadata: Any) -> str:
    """Say what a description has that no network has; "" where it has all, in the right kinds."""
    kinds = {"format": int, "dmir": str, "network": str, "hyperparameters": dict, "grid": dict, "extra": dict}
    if not isinstance(metadata, dict):
        return f"{type(metadata).__name__} instead of keys"
    wrong = [key for key, kind in kinds.items() if not isinstance(metadata.get(key), kind)]
    if wrong:
        return f"no usable {wrong[0]}"
    shape = metadata["grid"].get("shape")
    if not isinstance(shape, list) or len(shape) != 3 or not all(type(n) is int and n > 0 for n in shape):
        return f"the grid {shape!r:.100}"
    if math.prod(shape) > MAXIMUM_VOXELS:
        return f"a grid of {'x'.join(map(str, shape))} voxels"
    for name, value in metadata["hyperparameters"].items():
        entries = value if isinstance(value, list) else [value]
        numbers = [entry for entry in entries if isinstance(entry, int | float)]
        if len(entries) > 64 or not all(abs(number) <= LARGEST for number in numbers):
            return f"{name:.100} = {value!r:.100}"
    return ""


def _build(path: Path, metadata: Mapping[str, Any]) -> nn.Module:
    try:
        return networks.build(
            metadata["network"], shape=tuple(metadata["grid"]["shape"]), **metadata["hyperparameters"]
        )
    except InputError as error:
        raise InputError(
            f"{path}: {error.where}", found=error.found, expected=error.expected, remedy=error.remedy
        ) from None
    except (RuntimeError, ValueError, TypeError, ArithmeticError, LookupError) as error:
        raise InputError(
            path,
            found=f"hyperparameters that make no {metadata['network']} ({str(error)[:200]})",
            expected="those of a trained network",
        ) from error


def _require(path: Path, metadata: Mapping[str, Any], expected: Mapping[str, Any]) -> None:
    for key, wanted in expected.items():
        held: Any = metadata.get(key)
        if key == "hyperparameters":
            # through JSON, as the file's went: a tuple and a list are the same
            wanted = json.loads(json.dumps(dict(wanted)))
            differing = [name for name in wanted if name not in held or held[name] != wanted[name]]
            if differing:
                raise InputError(
                    path,
                    found="hyperparameters " + ", ".join(f"{name}={held.get(name)!r}" for name in differing),
                    expected=", ".join(f"{name}={wanted[name]!r}" for name in differing),
                    remedy="Give the hyperparameters that it was trained with, or train it again.",
                )
        elif held != wanted:
            raise InputError(path, found=f"{key} {held!r}", expected=f"{key} {wanted!r}")


def _require_fit(
    path: Path,
    network: nn.Module,
    tensors: Mapping[str, torch.Tensor],
    metadata: Mapping[str, Any],
) -> None:
    wanted = network.state_dict()
    problems = {
        "missing": sorted(wanted.keys() - tensors.keys()),
        "unexpected": sorted(tensors.keys() - wanted.keys()),
        "of another shape": sorted(k for k in wanted.keys() & tensors.keys() if wanted[k].shape != tensors[k].shape),
    }
    found = [
        f"{len(keys)} tensors {kind} ({', '.join(keys[:3])}{', ...' if len(keys) > 3 else ''})"
        for kind, keys in problems.items()
        if keys
    ]
    if not found:
        return
    trained_for = "x".join(map(str, metadata["grid"]["shape"]))
    raise InputError(
        path,
        found=", ".join(found),
        expected=f"the {len(wanted)} tensors of {metadata['network']} for a grid of {trained_for}",
        remedy=f"These weights were written by dmir {metadata['dmir']}.",
    )
