"""Refinement of a field on the one pair that it is for: descent (:mod:`dmir.methods.descent`) that starts from it.

A network has learnt what is alike in many pairs; the pair at hand can be fitted better by going on from its field
("instance-specific optimization", Balakrishnan et al. 2019, section V-E). The same goes for any other method's field.
Labels are never seen.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from functools import partial
from pathlib import Path
from types import MappingProxyType
from typing import TYPE_CHECKING, Any, Literal

import numpy as np
from pydantic import Field

from dmir.errors import InputError
from dmir.methods import descent
from dmir.methods.stages import REFINING, Stage
from dmir.settings import PairCost
from dmir.volumes import Volume

if TYPE_CHECKING:  # torch: not for those who ask what there is
    import torch

    from dmir.methods.network import Loaded

TITLE = "Refinement"
PAPER = "instance-specific optimization, Balakrishnan et al. 2019, section V-E"
LIBRARIES = ("dmir.methods.descending", "dmir.methods.network")
INVERTIBLE = True


class Settings(descent.DescendingSettings):
    """Any method's field, refined on each pair by descent that starts from it.

    A row of its own: of a network it uses the weights, another method runs first; its seconds are those of both.
    """

    of: str
    """The method: one of `methods`, a key of `settings` or a plain name. A network is trained once, for both rows."""
    stages: list[descent.StageSettings] = Field(descent.stage_settings(REFINING))
    """From coarse to fine; an empty list leaves the field as it is."""
    similarity: Literal["lncc", "mse", "mutual_information"] | None = None
    """What is made alike; none: as in the training of a network, else `lncc`."""


def parts(parameters: Mapping[str, Any]) -> list[dict[str, Any]]:
    """Return the methods that run one after the other, each ``{"algorithm": ..., **parameters}``."""
    first = parameters.get("of")
    return [*([dict(first)] if first else []), {"algorithm": "descent", "stages": parameters.get("stages", [])}]


def state(parameters: Mapping[str, Any]) -> str:
    """Return what the method that is refined depends on beside its code."""
    from dmir import registry

    first = dict(parameters.get("of") or {})
    return registry.state(first.pop("algorithm"), first) if first else ""


def runs(parameters: Mapping[str, Any]) -> str:
    """Say what of somebody else's would run."""
    from dmir import registry

    first = dict(parameters.get("of") or {})
    return registry.runs(first.pop("algorithm"), first) if first else ""


def cost(
    parameters: Mapping[str, Any],
    shape: Sequence[int],
    spacing: Sequence[float],
    measured: Mapping[str, float] = MappingProxyType({}),
) -> PairCost:
    """Return what a pair costs: the method that is refined, and then the descent."""
    from dmir import registry

    own, first = descent.cost(parameters, shape, spacing, measured), dict(parameters.get("of") or {})
    if not first:
        return PairCost(own.seconds, own.memory_bytes, own.note)
    before = registry.cost(first.pop("algorithm"), first, shape, spacing, measured)
    return PairCost(before.seconds + own.seconds, own.memory_bytes, own.note)


def refine(
    moving: torch.Tensor,
    fixed: torch.Tensor,
    displacement: torch.Tensor,
    spacing: Sequence[float] = (1.0, 1.0, 1.0),
    *,
    stages: Sequence[Stage | Mapping[str, Any]] = REFINING,
    similarity: str | None = None,
    noise: float = 0.005,
    tolerance: float = 5e-4,
    check_every: int = 5,
    pyramid_smoothing: float = 0.3,
    margin: float = 4.0,
    seen: tuple[torch.Tensor | None, torch.Tensor | None] = (None, None),
    watch: descent.Watch | None = None,
) -> torch.Tensor:
    """Return the field that descent finds from the one that is given.

    Parameters
    ----------
    moving, fixed
        float32 (1, 1, D, H, W), preprocessed, in [0, 1].
    displacement
        float32 (1, 3, D, H, W) in voxels: where it starts.
    spacing
        Of the voxels, mm.
    stages, similarity, noise, tolerance, check_every, pyramid_smoothing, margin, seen, watch
        See :func:`dmir.methods.descending.find_field`; without stages the field comes back as it is, bit for bit.

    Returns
    -------
    torch.Tensor
        float32 (1, 3, D, H, W), without folds.
    """
    if not stages:
        return displacement
    from dmir.methods.descending import find_field

    found = find_field(
        moving[0].float(),
        fixed[0].float(),
        spacing,
        stages=stages,
        start=displacement[0].float(),
        similarity=similarity or "lncc",
        noise=noise,
        tolerance=tolerance,
        check_every=check_every,
        pyramid_smoothing=pyramid_smoothing,
        margin=margin,
        seen=seen,
        watch=watch,
    )
    return found.displacement[None]


def register(
    moving: Volume,
    fixed: Volume,
    weights: str | Path | Loaded | None = None,
    device: str | torch.device | None = None,
    *,
    of: Mapping[str, Any] | None = None,
    stages: Sequence[Stage | Mapping[str, Any]] = REFINING,
    similarity: str | None = None,
    noise: float = 0.005,
    tolerance: float = 5e-4,
    check_every: int = 5,
    pyramid_smoothing: float = 0.3,
    margin: float = 4.0,
    seen: tuple[np.ndarray | None, np.ndarray | None] = (None, None),
    watch: descent.Watch | None = None,
) -> np.ndarray:
    """Return the field of a network or of another method, refined on this pair.

    Parameters
    ----------
    weights
        Of the network whose field is refined; see :func:`dmir.methods.network.register`.
    of
        Instead of a network: ``{"algorithm": "syn", ...}``, a method and its parameters.
    stages, noise, tolerance, check_every, pyramid_smoothing, margin, seen, watch
        See :func:`dmir.methods.descent.register`.
    similarity
        None: what a network was trained to make alike, else the local correlation.

    Raises
    ------
    InputError
        Neither or both of ``weights`` and ``of`` are given, or what they name cannot be used.
    """
    if (weights is None) == (of is None):
        raise InputError(
            "refinement",
            found="both weights and of" if of is not None else "neither weights nor of",
            expected="weights=, a network's .safetensors file, or of=, a method and its parameters",
        )
    options: dict[str, Any] = {"noise": noise, "tolerance": tolerance, "check_every": check_every, "stages": stages}
    options |= {"pyramid_smoothing": pyramid_smoothing, "margin": margin, "watch": watch}
    if of is not None:
        from dmir.methods.calling import register as register_with_method

        parameters = dict(of)
        field = register_with_method(moving, fixed, parameters.pop("algorithm"), **parameters)
        return descent.register(
            moving, fixed, device, start=field, similarity=similarity or "lncc", seen=seen, **options
        )
    import torch

    from dmir.methods.network import register as register_with_network
    from dmir.training.devices import choose_device
    from dmir.training.weights import load_weights

    target = choose_device(device)
    loaded = weights if isinstance(weights, tuple) else load_weights(weights, device=target)  # type: ignore[arg-type]
    trained = loaded[1].get("extra", {}).get("training", {}).get("similarity")
    maps = [None if map_ is None else torch.from_numpy(map_.astype(np.float32))[None].to(target) for map_ in seen]
    how = partial(refine, similarity=similarity or trained, seen=(maps[0], maps[1]), **options)
    return register_with_network(moving, fixed, loaded, target, refine=how)
