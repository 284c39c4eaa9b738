"""Methods: whatever turns a pair of images into a displacement field, behind one call.

``register(moving, fixed, method="syn")``. The classical methods look at physical space alone: the moving image may lie
on a grid of its own, and the field takes a point of the fixed world to one of the moving world, counted in voxels of
the fixed grid (:func:`dmir.fields.onto_moving_grid` counts it in the moving image's). To add one: a new file beside
this one with a function ``register(moving, fixed, **parameters)`` and the names of the ``LIBRARIES`` that it imports
when called, and one line in ``ALGORITHMS``.
"""

from __future__ import annotations

import importlib
import inspect
from collections.abc import Callable
from typing import Any

import numpy as np

from dmir.errors import InputError, suggestion
from dmir.volumes import Volume

ALGORITHMS: dict[str, str] = {
    "affine": "dmir.methods.affine",
    "syn": "dmir.methods.syn",
    "elastix": "dmir.methods.elastix",
}
"""Name -> module; imported only when it is asked for."""

NETWORK = "dmir.methods.network"
REFINEMENT = "dmir.methods.refinement"


def register(moving: Volume, fixed: Volume, method: str = "syn", **parameters: Any) -> np.ndarray:
    """Register a moving image to a fixed one, affinely aligned to it.

    Parameters
    ----------
    moving, fixed
        Images, skull-stripped and in [0, 1]. For a network both on one grid.
    method
        ``"affine"`` (the zero field), ``"syn"``, ``"elastix"``, the path of a network's ``.safetensors`` file, the
        name of a network with ``weights=`` its file, or ``"refinement"``, which refines its field on this pair.
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
    return function(moving, fixed, **parameters)


def describe(method: str = "syn", **parameters: Any) -> str:
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


def load_libraries(method: str) -> None:
    """Import what a classical method stands on, ahead of a registration whose time is to be taken."""
    if method in ALGORITHMS:
        for name in importlib.import_module(ALGORITHMS[method]).LIBRARIES:
            importlib.import_module(name)


def _plain(value: Any) -> str:
    return repr(list(value)) if isinstance(value, tuple) else repr(value)


def _resolve(method: str, parameters: dict[str, Any]) -> tuple[Callable[..., np.ndarray], dict[str, Any]]:
    """Return the function behind a method, and its parameters, checked by name."""
    module = ALGORITHMS.get(method)
    if module is None:
        module = REFINEMENT if method == "refinement" else NETWORK
        parameters = _network_parameters(method, parameters)
    function = importlib.import_module(module).register
    known = [name for name in inspect.signature(function).parameters if name not in ("moving", "fixed")]
    for name in parameters:
        if name not in known:
            raise InputError(
                f"{method}: {name}",
                found="a parameter that this method does not have",
                expected="one of its parameters" if known else "none: this method has no parameters",
                remedy=suggestion(name, known) if known else "",
            )
    return function, parameters


def _network_parameters(method: str, parameters: dict[str, Any]) -> dict[str, Any]:
    """Return the parameters with the weights among them, or refuse a name that is no method."""
    if str(method).endswith(".safetensors"):
        return {"weights": method, **parameters}
    from dmir.networks import network_names

    known = [*network_names(), "refinement"]
    if method not in known:
        raise InputError(
            "method",
            found=f"'{method}'",
            expected="affine, syn, elastix, a network, refinement, or the path of a .safetensors file",
            remedy=suggestion(str(method), [*ALGORITHMS, *known]),
        )
    if "weights" not in parameters:
        raise InputError(
            "method",
            found=f"'{method}' without weights",
            expected="weights=, the path of the network's .safetensors file",
            remedy="Train it first, or give the path of the file as the method.",
        )
    return parameters
