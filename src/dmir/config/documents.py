"""What is generated from the models: the JSON schema for editors, and the table of keys for people."""

from __future__ import annotations

import inspect
import json
from pathlib import Path
from typing import Any

from pydantic.fields import FieldInfo

from dmir import registry
from dmir.cohorts.splits import split_names
from dmir.config.base import models_in
from dmir.config.cohorts import COHORT_MODELS, CohortKeys, source_of
from dmir.config.models import Config
from dmir.config.sections import Grid, Network, Preprocess, Report, Scores, Training
from dmir.config.studies import Ablation, LambdaStudy
from dmir.networks import hyperparameter_names, network_names
from dmir.settings import Model
from dmir.structures import label_map_names, structure_set_names


def _method_sections() -> list[tuple[str, type[Model]]]:
    """Return the settings of every built-in method that has any, and of the lists of sections in them."""
    sections: list[tuple[str, type[Model]]] = []
    for name in registry.names("method"):
        model = registry.settings_model(name)
        if len(model.model_fields) > 1:  # more than `algorithm`
            sections.append((f"`settings.<name>` of `{name}`", model))
        for key, field in model.model_fields.items():
            nested = [(f"`settings.<name>.{key}[]` of `{name}`", one) for one in models_in(field.annotation)]
            sections += [(title, one) for title, one in nested if one not in [model for _, model in sections]]
    return sections


SECTIONS: tuple[tuple[str, type[Model]], ...] = (
    ("Top level", Config),
    ("`grid`", Grid),
    ("`cohorts.<name>`", CohortKeys),
    *((f"`cohorts.<name>` with `source: {source_of(model)}`", model) for model in COHORT_MODELS),
    ("`preprocess`", Preprocess),
    ("`training`", Training),
    *_method_sections(),
    ("`settings.<name>` of a network", Network),
    ("`scores`", Scores),
    ("`report`", Report),
    ("`ablation`", Ablation),
    ("`lambda_study`", LambdaStudy),
)
INTRODUCTION = """\
# The configuration

<!-- Generated from src/dmir/config by `dmir docs`; do not edit. -->

`config.yaml` is the default; another one is named with `--configfile` and stands by itself: nothing of the default is
laid under it, so that a published setting never inherits a demonstration's. Single keys can be changed on the command
line: `snakemake --cores 8 --config methods='[affine, syn]'`.

Lists say what runs (`methods`, `test_on`, `seeds`), dictionaries only hold parameters (`settings`, `cohorts`). A method
may have any name: `settings: {syn_mi: {algorithm: syn, metric: mattes}}` and `methods: [affine, syn, syn_mi]` compare
two kinds of SyN, `settings: {caml-refined: {algorithm: refinement, of: caml}}` and `methods: [caml, caml-refined]` a
network with what some steps of optimisation on each pair make of its fields. `dmir check CONFIG` tells every mistake
before anything runs.

A method may also be somebody else's: of an installed package, of a file (`algorithm: my_network.py:MyNetwork`), any
program (`algorithm: command`), or fields that are there (`algorithm: fields`): [own-method.md](../docs/own-method.md)
has an example of each, and `dmir methods` lists what there is. A configuration that names code runs code; `dmir check`
lists it.

A table of files (`source: table`) is a .csv or .tsv with the columns `scan, subject, image, labels` and, where they are
known, `split, session, age, mask`. `split` is `train`, `val`, `test` or `atlas`; it may also stand in a file of its own
(`scan, split`), which the key `split` names. A subject may have several scans; they must stay in one split. Paths start
from the table's own folder. `dmir scans SOURCE FOLDER` prints such a table of a folder that a source recognises.

"""


def json_schema() -> str:
    """Return the JSON schema of the configuration, for editors."""
    schema = Config.model_json_schema()
    models: list[type[Model]] = [*map(registry.settings_model, registry.names("method")), Network]
    methods = [_optional_algorithm(model.model_json_schema()) for model in models]
    schema["$comment"] = "Generated from src/dmir/config by `dmir docs`; do not edit."
    schema["properties"]["settings"]["additionalProperties"] = {"anyOf": methods}
    return json.dumps(schema, indent=2) + "\n"


def _optional_algorithm(schema: dict[str, Any]) -> dict[str, Any]:
    required = [key for key in schema.get("required", []) if key != "algorithm"]
    return {**schema, "required": required}


def readme() -> str:
    """Return ``config/README.md``: every key with its type, its default and its meaning."""
    parts = [INTRODUCTION]
    parts += [_section(title, model) for title, model in SECTIONS]
    parts.append("## Hyperparameters of the networks\n\n")
    parts += [
        f"- `{name}`: " + ", ".join(f"`{key}`" for key in hyperparameter_names(name)) + "\n" for name in network_names()
    ]
    parts.append("\n## Structure sets and label maps\n\n")
    parts.append(f"Structure sets: {', '.join(f'`{name}`' for name in structure_set_names())}. ")
    parts.append(f"Label maps: {', '.join(f'`{name}`' for name in label_map_names())}. ")
    parts.append("[resources/structures/README.md](../resources/structures/README.md) tells what they are.\n\n")
    parts.append("## Published splits\n\n")
    parts.append(f"{', '.join(f'`{name}`' for name in split_names())}. ")
    parts.append("[resources/splits/README.md](../resources/splits/README.md) tells where they come from.\n")
    return "".join(parts)


def _section(title: str, model: type[Model]) -> str:
    lines = [
        f"## {title}\n",
        f"{inspect.cleandoc(model.__doc__ or '')}\n",
        "| key | type | default | meaning |",
        "|---|---|---|---|",
    ]
    schema = model.model_json_schema()
    common = CohortKeys.model_fields if issubclass(model, CohortKeys) and model is not CohortKeys else {}
    for name, field in model.model_fields.items():
        if name in common and common[name].default == field.default:
            continue  # told once, for all sources
        if name == "source":
            continue  # the title has it
        default = "required" if field.is_required() else f"`{_plain(field.default)}`"
        kind = kind_of(schema["properties"][name]).replace("|", "\\|")
        lines.append(f"| `{name}` | {kind} | {default} | {_meaning(name, field, common)} |")
    return "\n".join(lines) + "\n\n"


def _meaning(name: str, field: FieldInfo, common: dict[str, FieldInfo]) -> str:
    description = field.description or (common[name].description if name in common else "") or ""
    return description.replace("\n", " ")


def _plain(value: Any) -> str:
    if isinstance(value, Model) or (isinstance(value, list) and any(isinstance(item, Model) for item in value)):
        return "see below"
    return json.dumps(list(value) if isinstance(value, tuple) else value)


def kind_of(schema: dict[str, Any]) -> str:
    """Say a JSON schema's type in a few words."""
    if "enum" in schema:
        return ", ".join(f"`{value}`" for value in schema["enum"])
    if "const" in schema:
        return f"`{schema['const']}`"
    if "anyOf" in schema:
        return " or ".join(kind_of(option) for option in schema["anyOf"])
    if "$ref" in schema:
        return "section"
    if schema.get("type") == "array":
        items = schema.get("items") or (schema.get("prefixItems") or [{}])[0]
        count = (
            f"{schema['minItems']} x "
            if schema.get("minItems") and schema.get("minItems") == schema.get("maxItems")
            else ""
        )
        return f"list of {count}{kind_of(items)}"
    names = {
        "object": "dictionary",
        "integer": "integer",
        "number": "number",
        "boolean": "true or false",
        "null": "none",
        "string": "text",
    }
    limits = [
        f"{sign} {schema[key]:g}"
        for key, sign in (("minimum", "≥"), ("exclusiveMinimum", ">"), ("maximum", "≤"), ("exclusiveMaximum", "<"))
        if key in schema
    ]
    return " ".join([names.get(schema.get("type", "object"), "any"), *limits])


def write_documents(folder: str | Path) -> list[Path]:
    """Write ``config.schema.json`` and ``README.md`` into the folder of the configuration."""
    folder = Path(folder)
    documents = {folder / "config.schema.json": json_schema(), folder / "README.md": readme()}
    for path, text in documents.items():
        path.write_text(text, encoding="utf-8")
    return list(documents)
