"""The networks: each turns a moving and a fixed image into a displacement field.

A network is built by name, ``build("caml", shape=(160, 192, 224), channels=(16, 32, 64), ...)``, and called as
``network(moving, fixed) -> displacement``: (B, 1, D, H, W) twice, float32 in [0, 1], to (B, 3, D, H, W), float32, in
voxels. To add one: a new file beside this one, and one line in ``NETWORKS``.
"""

from __future__ import annotations

import ast
import importlib
import importlib.util
from collections.abc import Mapping
from functools import cache
from pathlib import Path
from typing import TYPE_CHECKING, Any

from dmir.errors import InputError, suggestion

if TYPE_CHECKING:
    from torch import nn

NETWORKS: dict[str, str] = {
    "caml": "dmir.networks.caml:CAML",
    "voxelmorph": "dmir.networks.voxelmorph:VoxelMorph",
    "vit_v_net": "dmir.networks.vit_v_net:ViTVNet",
    "transmorph": "dmir.networks.transmorph:TransMorph",
    "xmorpher": "dmir.networks.xmorpher:XMorpher",
    "transmatch": "dmir.networks.transmatch:TransMatch",
}
"""Name -> ``module:Class``; imported only when it is asked for."""


def network_names() -> list[str]:
    """Return the names that :func:`build` knows, in the order of the tables."""
    return list(NETWORKS)


def hyperparameter_names(name: str) -> list[str]:
    """Return the names of a network's hyperparameters: the keyword-only arguments of its constructor.

    They are read from the source and not from the class, so that a configuration is checked without importing torch.

    Raises
    ------
    InputError
        There is no such network.
    """
    return list(_constructor_arguments(*_location(name)))


@cache
def _constructor_arguments(module: str, class_name: str) -> tuple[str, ...]:
    spec = importlib.util.find_spec(module)
    assert spec is not None and spec.origin is not None, f"{module}, named in NETWORKS, does not exist"
    tree = ast.parse(Path(spec.origin).read_text(encoding="utf-8"))
    for node in tree.body:
        if isinstance(node, ast.ClassDef) and node.name == class_name:
            for method in node.body:
                if isinstance(method, ast.FunctionDef) and method.name == "__init__":
                    return tuple(argument.arg for argument in method.args.kwonlyargs)
    raise AssertionError(f"{module} has no class {class_name} with a constructor")


def build(name: str, shape: tuple[int, int, int], **hyperparameters: Any) -> nn.Module:
    """Build a network with fresh weights.

    Parameters
    ----------
    name
        One of :func:`network_names`.
    shape
        Grid (D, H, W) that it is meant for, in voxels.
    hyperparameters
        Keyword arguments of the network's class; what is left out keeps its default.

    Returns
    -------
    nn.Module
        With the attributes ``name``, ``shape`` and ``hyperparameters`` (JSON-able, complete with the defaults), which
        are all that is needed to build it again.

    Raises
    ------
    InputError
        Unknown network, unknown hyperparameter, or a value that makes no network.
    """
    known = hyperparameter_names(name)
    for key in hyperparameters:
        if key not in known:
            raise InputError(
                f"hyperparameters of {name}", found=repr(key), expected="a known name", remedy=suggestion(key, known)
            )
    if len(shape) != 3 or any(int(n) != n or n < 1 for n in shape):
        raise InputError(f"shape of {name}", found=str(shape), expected="three positive numbers of voxels")
    module, class_name = _location(name)
    network_class = getattr(importlib.import_module(module), class_name)
    shape = (int(shape[0]), int(shape[1]), int(shape[2]))
    defaults = network_class.__init__.__kwdefaults__
    for key, value in hyperparameters.items():
        _require_kind(f"{key} of {name}", value, defaults[key])
    network: nn.Module = network_class(shape, **hyperparameters)
    network.name = name  # type: ignore[assignment]
    network.shape = shape  # type: ignore[assignment]
    network.hyperparameters = {key: _plain(value) for key, value in {**defaults, **hyperparameters}.items()}  # type: ignore[assignment]
    return network


def _location(name: str) -> tuple[str, str]:
    if name not in NETWORKS:
        raise InputError(
            "network", found=repr(name), expected="a known network", remedy=suggestion(str(name), NETWORKS)
        )
    module, class_name = NETWORKS[name].split(":")
    return module, class_name


def _require_kind(where: str, value: Any, default: Any) -> None:
    """Refuse a hyperparameter of another kind than its default, before a constructor stumbles over it."""
    if isinstance(default, bool):
        fits, expected = isinstance(value, bool), "true or false"
    elif isinstance(default, (list, tuple)):
        fits = isinstance(value, (list, tuple)) and all(_is_number(item) for item in value)
        expected = "a list of numbers"
    elif isinstance(default, str):
        fits, expected = isinstance(value, str), "a word"
    else:
        fits = _is_number(value) and not (isinstance(default, int) and int(value) != value)
        expected = "a whole number" if isinstance(default, int) else "a number"
    if not fits:
        raise InputError(where, found=repr(value), expected=f"{expected}, such as {_plain(default)!r}")


def _is_number(value: Any) -> bool:
    return isinstance(value, (int, float)) and not isinstance(value, bool)


def _plain(value: Any) -> Any:
    """Return the value as JSON gives it back: lists for tuples."""
    if isinstance(value, Mapping):
        return {str(key): _plain(item) for key, item in value.items()}
    return [_plain(item) for item in value] if isinstance(value, (list, tuple)) else value
