"""Whether tables and figures still agree with what they were made from."""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

from dmir.errors import DmirError, InputError
from dmir.provenance import file_hash, module_hashes, value_hash
from dmir.report.origin import SIDECAR, combined_code, read_provenance

if TYPE_CHECKING:
    from dmir.config import Config

FOLDERS = {"tables": ".csv", "figures": ".png"}  # what tells that there is a table or a figure
CONFIGURATION = "configuration.yaml"  # of the last run, beside its results
_SHOWN = 3  # modules or files that a finding names; then a count


@dataclass(frozen=True)
class Agreement:
    """What is known of one table or figure: ``problems`` say what no longer agrees, ``unknown`` what cannot be told."""

    name: str
    problems: tuple[str, ...] = ()
    unknown: tuple[str, ...] = ()


def check_results(results: str | Path, configuration: Config | None = None) -> list[Agreement]:
    """Compare every table and figure with what it says it was made from.

    Its own files, its inputs, the configuration, the code that made the scores and the code that made it, the cohorts'
    tables of scans, and the weights are hashed again. Files that are no longer there cannot disagree.

    Parameters
    ----------
    results
        The folder of a run.
    configuration
        What they should be of; by default that of the last run, ``configuration.yaml`` in the folder.

    Returns
    -------
    list of Agreement
        One a table or figure, by folder and name.

    Raises
    ------
    InputError
        There is no such folder, or no table and no figure in it.
    """
    results = Path(results)
    products = [
        results / folder / path.stem
        for folder, suffix in FOLDERS.items()
        for path in sorted((results / folder).glob(f"*{suffix}"))
    ]
    if not products:
        raise InputError(
            results, found="no tables/*.csv and no figures/*.png", expected="the folder of results of a finished run"
        )
    if configuration is None and (results / CONFIGURATION).is_file():
        configuration = _configuration_of(results)
    hashes = _Hashes(results, configuration)
    return [_agreement(product, results, hashes) for product in products]


def _configuration_of(results: Path) -> Config:
    from dmir.config import read_config

    return read_config(results / CONFIGURATION)


class _Hashes:
    """Hashes of what is there now, each computed once."""

    def __init__(self, results: Path, configuration: Config | None) -> None:
        self.results, self.configuration = results, configuration
        self.records: dict[str, dict[str, Any]] = {}
        self._known: dict[Any, Any] = {}

    def _once(self, key: Any, compute: Callable[[], Any]) -> Any:
        if key not in self._known:
            self._known[key] = compute()
        return self._known[key]

    def file(self, path: Path) -> str | None:
        """Return the hash of a file, None of one that is not there."""
        return self._once(path, lambda: file_hash(path) if path.exists() else None)

    def code(self, modules: tuple[str, ...]) -> dict[str, str]:
        return self._once(modules, partial(module_hashes, *modules))

    def record(self, name: str) -> dict[str, Any]:
        return self._once(("record", name), lambda: read_provenance(self.results / name))

    def numbers(self, provenance: str) -> str | None:
        """Return the hash of the present configuration, as a record of that name has it."""
        if self.configuration is None:
            return None
        study = Path(provenance).stem
        return value_hash(self.configuration.numbers(None if study == "run" else study))


def _agreement(product: Path, results: Path, hashes: _Hashes) -> Agreement:
    name = product.relative_to(results).as_posix()
    try:
        sidecar = json.loads(product.with_name(product.name + SIDECAR).read_text(encoding="utf-8"))
        made_from, files, inputs = sidecar["made_from"], sidecar["files"], sidecar["inputs"]
        record = hashes.record(sidecar["provenance"])
        modules = tuple(sidecar["modules"])
    except FileNotFoundError:
        return Agreement(name, ("carries no record of what it was made from; make it again",))
    except (ValueError, KeyError, TypeError, DmirError) as error:
        return Agreement(name, (f"its record cannot be read ({error})",))
    problems = [
        *_changed("changed by hand since it was made", _differing(product.parent, files, hashes)),
        *_changed("made from another", _differing(results, inputs, hashes)),
        *_configuration(made_from, sidecar["provenance"], hashes),
        *_code(made_from, record, modules, hashes),
        *_recorded("data", made_from, record, hashes),
        *_recorded("weights", made_from, record, hashes),
    ]
    unknown = [*_gone(results, inputs, hashes), *_gone(results, {**record["data"], **record["weights"]}, hashes)]
    if hashes.configuration is None:
        unknown.append(f"no {CONFIGURATION} to compare with")
    return Agreement(name, tuple(problems), tuple(dict.fromkeys(unknown)))


def _differing(folder: Path, recorded: Mapping[str, str], hashes: _Hashes) -> list[str]:
    """Return the files that are there and are not what they were."""
    found = {name: hashes.file(folder / name) for name in recorded}
    return [name for name, hash_ in found.items() if hash_ is not None and hash_ != recorded[name]]


def _gone(folder: Path, recorded: Mapping[str, str], hashes: _Hashes) -> list[str]:
    # a name without a folder is a file of the project, not of the results
    return [f"{name} is gone" for name in recorded if "/" in name and hashes.file(folder / name) is None]


def _changed(what: str, names: list[str]) -> list[str]:
    return [f"{what}: {_listed(names)}"] if names else []


def _listed(names: list[str]) -> str:
    more = len(names) - _SHOWN
    return ", ".join(names[:_SHOWN]) + (f" and {more} more" if more > 0 else "")


def _configuration(made_from: Mapping[str, str], provenance: str, hashes: _Hashes) -> list[str]:
    now = hashes.numbers(provenance)
    same = now is None or made_from["configuration"] == now
    return [] if same else [f"made with another configuration: {made_from['configuration']}, now {now}"]


def _code(
    made_from: Mapping[str, str], record: Mapping[str, Any], modules: tuple[str, ...], hashes: _Hashes
) -> list[str]:
    """Say which code changed: that of the scores by module, else that of the table or figure itself."""
    try:
        scoring = hashes.code(tuple(record["modules"]))
        if combined_code(scoring, modules) == made_from["code"]:
            return []
    except ModuleNotFoundError as error:
        return [f"made by code that is no longer there: {error}"]
    before = record["code"]
    changed = [name for name in sorted({*before, *scoring}) if before.get(name) != scoring.get(name)]
    if changed:
        return [f"made from scores of other code: {_listed(changed)}"]
    return [f"made by other code: {_listed(list(modules))}, or what they import"]


def _recorded(kind: str, made_from: Mapping[str, str], record: Mapping[str, Any], hashes: _Hashes) -> list[str]:
    """Say whether data or weights changed: since the scores were made, or with them since this was made."""
    if value_hash(record[kind]) != made_from[kind]:
        return [f"made from other {kind}: {made_from[kind]}, now {value_hash(record[kind])}"]
    return _changed(f"{kind} changed since", _differing(hashes.results, record[kind], hashes))
