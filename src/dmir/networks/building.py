"""Networks built by their names, with hyperparameters that are checked by theirs."""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

from dmir import registry
from dmir.errors import InputError, suggestion

if TYPE_CHECKING:
    from torch import nn

Shape = tuple[int, int, int]


def network_names() -> list[str]:
    """Return the names of the networks that are built in."""
    return registry.names("network")


def hyperparameter_names(name: str) -> list[str]:
    """Return the names of a network's hyperparameters: the keyword-only arguments of its constructor.

    They are read from the source and not from the class, so that a configuration is checked without importing torch.

    Raises
    ------
    InputError
        There is no such network.
    """
    return list(registry.facts(registry.find(name, "network", where="network")).parameters)


def build(name: str, shape: tuple[int, int, int], **hyperparameters: Any) -> nn.Module:
    """Build a network with fresh weights.

    Parameters
    ----------
    name
        One of :func:`network_names`, of an installed package's, or ``"path/to/file.py:Class"`` (:mod:`dmir.registry`).
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
    entry = registry.find(name, "network", where="network")
    network_class = registry.load(entry)
    shape = (int(shape[0]), int(shape[1]), int(shape[2]))
    defaults = getattr(network_class.__init__, "__kwdefaults__", None) or {}
    for key, value in hyperparameters.items():
        if key in defaults:
            _require_kind(f"{key} of {name}", value, defaults[key])
    network: nn.Module = _constructed(entry, network_class, shape, hyperparameters)
    network.name = name  # type: ignore[assignment]
    network.shape = shape  # type: ignore[assignment]
    network.hyperparameters = {key: _plain(value) for key, value in {**defaults, **hyperparameters}.items()}  # type: ignore[assignment]
    return network


def _constructed(entry: registry.Entry, network_class: Any, shape: Shape, hyperparameters: dict[str, Any]) -> Any:
    """Return an instance; of somebody else's class whatever goes wrong is told by its name."""
    if entry.source == registry.BUILT_IN:
        return network_class(shape, **hyperparameters)
    from torch import nn

    where, expected = (
        f"{entry.source}: {entry.attribute}",
        "a torch.nn.Module that is made of (shape, **hyperparameters)",
    )
    if not (isinstance(network_class, type) and issubclass(network_class, nn.Module)):
        raise InputError(where, found="no network", expected=expected)
    try:
        return network_class(shape, **hyperparameters)
    except InputError:
        raise
    except Exception as error:  # anything at all can be in there
        found = f"a class that cannot be built ({type(error).__name__}: {' '.join(str(error).split())})"
        raise InputError(where, found=found, expected=expected) from error


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
