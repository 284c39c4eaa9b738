"""How a method is called by its name, with parameters that are checked by theirs."""

from __future__ import annotations

import importlib
import inspect
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from contextvars import ContextVar
from typing import Any

import numpy as np

from dmir import registry
from dmir.errors import InputError, suggestion
from dmir.volumes import Volume

NETWORK = "dmir.methods.network"
_SURROUNDINGS: ContextVar[dict[str, Any]] = ContextVar("surroundings", default={})  # noqa: B039 (never changed)


def register(moving: Volume, fixed: Volume, method: str = "descent", **parameters: Any) -> np.ndarray:
    """Register a moving image to a fixed one, affinely aligned to it.

    Parameters
    ----------
    moving, fixed
        Images, skull-stripped and in [0, 1]. For a network both on one grid.
    method
        ``"affine"`` (the zero field), ``"syn"``, ``"elastix"``, ``"descent"``, the path of a network's
        ``.safetensors`` file, the name of a network with ``weights=`` its file, ``"refinement"``, which refines its
        field, or that of another method (``of=``), on this pair, or a method of a package or a file.
    parameters
        Of the method; see ``register`` in its module.

    Returns
    -------
    numpy.ndarray
        float32 (3, D, H, W) on the fixed grid, in its voxels: ``warped(x) = moving(x + u(x))``.

    Raises
    ------
    InputError
        There is no such method, or it has no such parameter.
    """
    function, parameters = _resolve(method, parameters)
    asked = inspect.signature(function).parameters
    around = {name: value for name, value in _SURROUNDINGS.get().items() if name in asked}
    return function(moving, fixed, **{**around, **parameters})


@contextmanager
def surroundings(**values: Any) -> Iterator[None]:
    """Give methods that ask for them what is no parameter of theirs, also where one runs within another.

    ``limit``, seconds that a pair may take; ``names``, what the scans are called; ``paths``, the files of the images;
    ``measured``, a dictionary into which a method writes what it measures better than its caller.
    """
    before = _SURROUNDINGS.set(values)
    try:
        yield
    finally:
        _SURROUNDINGS.reset(before)


def describe(method: str = "descent", **parameters: Any) -> str:
    """Return a method and all its parameters, defaults included, in one line for provenance.

    Raises
    ------
    InputError
        As :func:`register`.
    """
    function, parameters = _resolve(method, parameters)
    defaults = {
        name: parameter.default
        for name, parameter in inspect.signature(function).parameters.items()
        if parameter.default is not parameter.empty
    }
    values = ", ".join(f"{name}={_plain(value)}" for name, value in {**defaults, **parameters}.items())
    return f"{method}({values})"


def load_libraries(method: str, parameters: Mapping[str, Any] | None = None) -> None:
    """Import what a method without weights stands on, ahead of a registration whose time is to be taken."""
    for part in registry.parts(method, parameters or {}) if parameters else ():
        if part["algorithm"] != method:
            load_libraries(part["algorithm"])
    for name in getattr(registry.implementation(method), "LIBRARIES", ()):
        importlib.import_module(name)


def _plain(value: Any) -> str:
    return repr(list(value)) if isinstance(value, tuple) else repr(value)


def _resolve(method: str, parameters: dict[str, Any]) -> tuple[Callable[..., np.ndarray], dict[str, Any]]:
    """Return the function behind a method, and its parameters, checked by name."""
    entry = None if str(method).endswith(".safetensors") else registry.find(method, where="method")
    if entry is None or entry.kind == "network":
        parameters = _with_weights(method, parameters)
        function = importlib.import_module(NETWORK).register
    else:
        if method == "refinement" and parameters.get("of") is None:
            parameters = _with_weights(method, parameters)
        function = registry.implementation(method).register
    arguments = inspect.signature(function).parameters.values()
    known = [argument.name for argument in arguments if argument.name not in ("moving", "fixed")]
    if any(argument.kind is argument.VAR_KEYWORD for argument in arguments):
        return function, parameters
    for name in parameters:
        if name not in known:
            raise InputError(
                f"{method}: {name}",
                found="a parameter that this method does not have",
                expected="one of its parameters" if known else "none: this method has no parameters",
                remedy=suggestion(name, known) if known else "",
            )
    return function, parameters


def _with_weights(method: str, parameters: dict[str, Any]) -> dict[str, Any]:
    """Return the parameters with the weights among them, or refuse a network without any."""
    if str(method).endswith(".safetensors"):
        return {"weights": method, **parameters}
    if "weights" not in parameters:
        raise InputError(
            "method",
            found=f"'{method}' without weights",
            expected="weights=, the path of the network's .safetensors file",
            remedy="Train it first, or give the path of the file as the method.",
        )
    return parameters
