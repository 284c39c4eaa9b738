"""The studies: one network trained several times, each time with one thing changed."""

from __future__ import annotations

import itertools
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Annotated, Any

from pydantic import Field, field_validator

from dmir.config.base import Model

STUDIES = ("ablation", "lambda_study")


class Ablation(Model):
    """What `snakemake ablation` trains: a network with every combination of some switches on and off."""

    method: str = "caml"
    """The network, a key of `settings` or the plain name of an algorithm."""
    switches: list[str] = ["caml", "rbsc", "carsc"]
    """Its hyperparameters that are true or false."""
    training: dict[str, Any] = {}
    """Keys of `training` that differ for this study."""

    @field_validator("switches")
    @classmethod
    def _few(cls, value: list[str]) -> list[str]:
        if not 1 <= len(value) <= 4 or len(set(value)) != len(value):
            raise ValueError(f"found {value}; expected one to four different hyperparameters")
        return value


class LambdaStudy(Model):
    """What `snakemake lambda_study` trains: networks with several weights lambda of the regularisation."""

    methods: list[str] = ["caml"]
    """The networks, keys of `settings` or plain names of algorithms."""
    values: list[Annotated[float, Field(ge=0)]] = [0.25, 0.5, 1.0, 2.0, 4.0]
    """The weights."""
    training: dict[str, Any] = {}
    """Keys of `training` that differ for this study."""

    @field_validator("methods", "values")
    @classmethod
    def _at_least_one(cls, value: list[Any]) -> list[Any]:
        if not value or len(set(value)) != len(value):
            raise ValueError(f"found {value}; expected at least one, each once")
        return value


@dataclass(frozen=True)
class Variant:
    """One row of a study.

    Attributes
    ----------
    name
        Of the method; the studied method's own where nothing differs from it, so that it is not trained twice.
    settings
        What stands for it in ``settings``.
    changes
        What the study's table says of it.
    """

    name: str
    settings: dict[str, Any]
    changes: dict[str, Any]


def ablation_variants(study: Ablation, settings_of: Callable[[str], Mapping[str, Any]]) -> list[Variant]:
    """Return every combination of the switches, from none on to all on.

    Parameters
    ----------
    settings_of
        The settings of a method as the configuration gives them, ``algorithm`` included.
    """
    own = settings_of(study.method)
    combinations = itertools.product((True, False), repeat=len(study.switches))
    variants = []
    for values in sorted(combinations, key=sum):  # stable: of as many parts, the first switches first
        on = dict(zip(study.switches, values, strict=True))
        network = dict(own.get("network", {}))
        # a switch that is on by default and not named stays unnamed: the complete network is then the method itself
        network |= {key: value for key, value in on.items() if not value or key in network}
        off = [key for key, value in on.items() if not value]
        name = f"{study.method}-{'without-' + '-'.join(off) if off else 'complete'}"
        variants.append(_variant(name, study.method, own, network, study.training, dict(on)))
    return variants


def lambda_variants(study: LambdaStudy, settings_of: Callable[[str], Mapping[str, Any]]) -> list[Variant]:
    """Return each network with each weight; see :func:`ablation_variants`."""
    variants = []
    for method, value in itertools.product(study.methods, study.values):
        own = settings_of(method)
        training = {**study.training, "regularisation": value}
        changes = {"network": method, "regularisation": value}
        variants.append(_variant(f"{method}-lambda-{value:g}", method, own, own.get("network", {}), training, changes))
    return variants


def _variant(
    name: str,
    method: str,
    own: Mapping[str, Any],
    network: Mapping[str, Any],
    training: Mapping[str, Any],
    changes: dict[str, Any],
) -> Variant:
    complete = own.get("training", {})
    settings = {**own, "network": dict(network), "training": {**complete, **training}}
    same = settings["network"] == own.get("network", {}) and settings["training"] == complete
    return Variant(method if same else name, settings, changes)
