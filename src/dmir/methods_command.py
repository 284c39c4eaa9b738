"""``dmir methods``: what there is, from where, and what it can be set to."""

from __future__ import annotations

import inspect
import json
from typing import Any

from dmir import registry
from dmir.config.documents import kind_of
from dmir.errors import InputError

COST_GRID = (160, 192, 224)
KINDS = {"method": "registers a pair by itself", "network": "is trained, and then registers"}


def listing() -> str:
    """Return a line a method and network: its name, its title, where it is from; what cannot be read is told."""
    rows = []
    for name, entry in {**registry.built_in(), **registry.installed()}.items():
        try:
            title = registry.facts(entry).title
        except InputError as error:
            title = f"cannot be used: {error}"
        rows.append((entry.kind, name, title, entry.source))
    widths = [max(len(row[column]) for row in rows) for column in range(3)]
    lines = []
    for kind, meaning in KINDS.items():
        lines.append(f"{kind}s: each {meaning}")
        for row in rows:
            if row[0] == kind:
                lines.append(f"  {row[1]:{widths[1]}}  {row[2]:{widths[2]}}  {row[3]}")
    lines.append("dmir methods NAME tells of one; a file is one too: dmir methods my_network.py:MyNetwork")
    lines.append("docs/own-method.md: how to add your own")
    return "\n".join(lines)


def explanation(name: str) -> str:
    """Return what one method or network is, where it is from, and its parameters with their defaults.

    Raises
    ------
    InputError
        There is none of this name.
    """
    entry = registry.find(name, where="method")
    facts = registry.facts(entry)
    lines = [f"{name}: {facts.title}", f"  {entry.kind}: {KINDS[entry.kind]}", f"  from: {entry.source}, {entry.path}"]
    lines += [f"  paper: {facts.paper}"] if facts.paper else []
    if entry.kind == "network":
        lines += ["  hyperparameters, under settings.<name>.network:", *_given(facts.parameters)]
        return "\n".join(lines)
    model = registry.settings_model(name)
    about = inspect.cleandoc(model.__doc__ or "").splitlines() if not model.given_only else []
    lines += [f"  {line}".rstrip() for line in about]
    if model.given_only:
        return "\n".join([*lines, "  parameters, under settings.<name>:", *_given(facts.parameters)])
    lines.append("  parameters, under settings.<name>:")
    properties = model.model_json_schema()["properties"]
    for key, field in model.model_fields.items():
        if key != "algorithm":
            default = "required" if field.is_required() else f"default {_plain(field.default)}"
            meaning = " ".join((field.description or "").split())
            lines.append(f"    {key}: {kind_of(properties[key]).replace('`', '')}; {default}. {meaning}")
    if len(model.model_fields) == 1:
        lines[-1] = "  it has no parameters"
    return "\n".join([*lines, *_cost(name, model)])


def _given(parameters: Any) -> list[str]:
    """Return the arguments of a function or a class as its source has them."""
    if not parameters:
        return ["    none"]
    return [
        f"    {key}{f': {annotation}' if annotation else ''}{f' = {default}' if default else ', required'}"
        for key, (annotation, default) in parameters.items()
    ]


def _cost(name: str, model: type[Any]) -> list[str]:
    """Return what a pair costs with the defaults, where the method says that."""
    if any(field.is_required() for key, field in model.model_fields.items() if key != "algorithm"):
        return []
    cost = registry.cost(name, model(algorithm=name).parameters(), COST_GRID)
    edges, note = "x".join(map(str, COST_GRID)), f" ({cost.note})" if cost.note else ""
    return [f"  a pair of {edges} voxels of 1 mm: about {cost.seconds:,.0f} s on one core{note}"]


def _plain(value: Any) -> str:
    if isinstance(value, list) and value and hasattr(value[0], "model_dump"):
        return f"{len(value)} of them, see config/README.md"
    return json.dumps(list(value) if isinstance(value, tuple) else value)
