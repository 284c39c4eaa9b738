"""What a table or a figure was made from, as it carries it: the hashes of configuration, code, data and weights."""

from __future__ import annotations

import json
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from dmir.errors import InputError
from dmir.provenance import file_hash, module_hashes, value_hash
from dmir.volumes import atomic_path

SIDECAR = ".json"
KINDS = ("configuration", "code", "data", "weights")


@dataclass(frozen=True)
class Origin:
    """What a table or a figure was made from.

    Attributes
    ----------
    configuration, code, data, weights
        Hashes: of everything in the configuration that numbers depend on; of the modules that made the scores and of
        those that made this; of the cohorts' tables of scans; of all weights.
    modules
        The modules that made this from its inputs.
    provenance
        The record of the scores that the hashes are from, relative to the folder of results.
    inputs
        Path relative to the folder of results -> hash of the file.
    """

    configuration: str
    code: str
    data: str
    weights: str
    modules: tuple[str, ...]
    provenance: str
    inputs: Mapping[str, str]

    def line(self) -> str:
        """Return the hashes as one line, which text files and pictures carry in themselves."""
        return "dmir: " + ", ".join(f"{kind} {getattr(self, kind)}" for kind in KINDS)

    def record(self, files: Iterable[Path]) -> dict[str, Any]:
        """Return what the sidecar says: the hashes, the inputs and the files themselves."""
        return {
            "made_from": {kind: getattr(self, kind) for kind in KINDS},
            "modules": list(self.modules),
            "provenance": self.provenance,
            "inputs": dict(self.inputs),
            "files": {path.name: file_hash(path) for path in files},
        }


def record_provenance(
    configuration: str, modules: Iterable[str], data: Iterable[str | Path], weights: Iterable[str | Path], results: Path
) -> dict[str, Any]:
    """Return what the scores of a run depend on.

    Parameters
    ----------
    configuration
        Hash of the configuration, :meth:`dmir.config.Config.numbers_hash`.
    modules
        The modules that made the scores from the scans; what they import counts too.
    data
        The cohorts' tables of scans.
    weights
        The weights of every model.
    results
        The folder that the paths are told relative to.
    """
    modules = sorted(set(modules))
    return {
        "configuration": configuration,
        "modules": modules,
        "code": module_hashes(*modules),
        "data": {_relative(path, results): file_hash(path) for path in data},
        "weights": {_relative(path, results): file_hash(path) for path in weights},
    }


def read_provenance(path: str | Path) -> dict[str, Any]:
    """Read what :func:`record_provenance` returned; InputError for another file."""
    path = Path(path)
    try:
        record = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise InputError(
            path, found=f"no readable record ({error})", expected="JSON that the pipeline wrote"
        ) from error
    if not isinstance(record, dict) or not {"configuration", "modules", "code", "data", "weights"} <= set(record):
        raise InputError(path, found="another JSON file", expected="configuration, modules, code, data and weights")
    return record


def origin_of(provenance: str | Path, inputs: Iterable[str | Path], modules: Iterable[str]) -> Origin:
    """Return the origin of what the modules make from the inputs.

    Parameters
    ----------
    provenance
        The record of the scores, ``<results>/scores/[<study>.]provenance.json``; it is left out of the inputs.
    inputs
        Files. Those outside the folder of results belong to the project and count by their name.
    modules
        As for :func:`dmir.provenance.code_hash`.
    """
    provenance = Path(provenance)
    results = provenance.parent.parent
    record = read_provenance(provenance)
    modules = tuple(sorted(set(modules)))
    return Origin(
        configuration=record["configuration"],
        code=combined_code(record["code"], modules),
        data=value_hash(record["data"]),
        weights=value_hash(record["weights"]),
        modules=modules,
        provenance=_relative(provenance, results),
        inputs={_relative(path, results): file_hash(path) for path in map(Path, inputs) if path != provenance},
    )


def combined_code(scores: Mapping[str, str], modules: Iterable[str]) -> str:
    """Return one hash of the modules that made the scores (module -> hash) and of those that made something of them."""
    return value_hash({**scores, **module_hashes(*modules)})


def write_sidecar(origin: Origin, path: Path, files: Iterable[Path]) -> Path:
    """Write what a table or a figure was made from beside its files: ``<path>.json``, all at once."""
    target = path.with_name(path.name + SIDECAR)
    with atomic_path(target) as temporary:
        temporary.write_text(json.dumps(origin.record(files), indent=1) + "\n", encoding="utf-8")
    return target


def _relative(path: str | Path, results: Path) -> str:
    path = Path(path)
    return path.relative_to(results).as_posix() if path.is_relative_to(results) else path.name
