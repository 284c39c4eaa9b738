"""What there is: methods and networks, built in, of installed packages, in a file, or any program.

A *method* is a function ``register(moving, fixed, *, ...)``, mostly in a module of its own; a *network* is a class.
Both tell of themselves by constants, in the module or in the class: ``TITLE``, ``SHORT_TITLE``, ``PAPER``, ``COLOUR``,
``MARKER``. A module in :mod:`dmir.methods` or :mod:`dmir.networks` with a ``TITLE`` is there, and so is what a package
that is installed names as an entry point ``dmir.methods`` or ``dmir.networks``, and what a configuration names by its
file, ``my_network.py:MyNetwork``. ``docs/own-method.md`` has an example of each.

What there is, is read from sources and metadata. Nothing is imported for it, so that a workflow is parsed without torch
and a configuration runs nothing of what it names before a job does. Modules of methods are imported for their settings:
whatever is heavy they import within functions. Of a file not even that is done: its parameters are those of its
function, read from the source.
"""

from __future__ import annotations

import ast
import hashlib
import importlib
import importlib.util
import math
import re
import sys
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import cache
from importlib.metadata import entry_points
from pathlib import Path
from types import MappingProxyType, ModuleType, SimpleNamespace
from typing import Any, Literal

from pydantic import BaseModel, create_model

from dmir.declared import Facts, facts_of, offered_by
from dmir.errors import InputError, suggestion
from dmir.provenance import source_of
from dmir.settings import MethodSettings, PairCost

ROOT = Path(__file__).parent
FOLDERS = {"method": "methods", "network": "networks"}
BUILT_IN = "built in"
PLAIN: dict[str, Any] = {"int": int, "float": float, "bool": bool, "str": str}
UNKNOWN_VOXEL = 1e-5  # CPU seconds a voxel of a pair, of a method that says nothing of its cost: a minute at 1 mm


@dataclass(frozen=True)
class Entry:
    """A method or a network that there is.

    Attributes
    ----------
    name
        As ``algorithm`` in a configuration.
    kind
        ``"method"`` or ``"network"``.
    source
        Where it is from: ``"built in"``, a package with its version, or a file.
    module
        Its module; of a file the file's path, as it was given.
    attribute
        The class or the function in it; "": the module itself is the method.
    path
        The file of its source.
    """

    name: str
    kind: Literal["method", "network"]
    source: str
    module: str
    attribute: str
    path: Path

    @property
    def is_file(self) -> bool:
        """Whether a configuration names it by its file."""
        return self.module.endswith(".py")


# --- what there is ---


def find(name: str, kind: str | None = None, where: str = "algorithm") -> Entry:
    """Return the method or network of a name, or of a file.

    Parameters
    ----------
    kind
        ``"method"`` or ``"network"`` where it must be one.
    where
        What the name is, for the message.

    Raises
    ------
    InputError
        There is none: no such name, file, class or function.
    """
    expected = f"a known {kind}" if kind else "a method or a network"
    found = built_in().get(name)
    if found is None and names_a_file(name):
        found = _in_file(name)
        if kind not in (None, found.kind):
            what = "a class" if found.kind == "network" else "a function"
            raise InputError(where, found=f"{name}, {what}", expected=expected)
    found = found or installed().get(name)
    if found is None or kind not in (None, found.kind):
        known = [entry.name for entry in (*built_in().values(), *installed().values()) if kind in (None, entry.kind)]
        raise InputError(where, found=repr(name), expected=expected, remedy=suggestion(str(name), known))
    return found


def names_a_file(name: str) -> bool:
    """Tell whether an algorithm is named by its file, ``path/to/file.py`` or ``path/to/file.py:Name``."""
    return re.search(r"\.py(:|$)", name) is not None


def names(kind: str, *, of_packages: bool = False) -> list[str]:
    """Return the names of all built-in methods or networks, in their order, and after them those of packages."""
    everything = [*built_in().values(), *(installed().values() if of_packages else ())]
    return [entry.name for entry in everything if entry.kind == kind]


@cache
def built_in() -> dict[str, Entry]:
    """Return the modules of this library that are a method or hold a network, by name."""
    found = {}
    for kind, folder in FOLDERS.items():
        for path in sorted((ROOT / folder).glob("*.py")):
            attribute = _marked(path.read_text(encoding="utf-8"), kind)
            if attribute is not None:
                name, module = path.stem, f"dmir.{folder}.{path.stem}"
                found[name] = Entry(name, kind, BUILT_IN, module, attribute, path)  # type: ignore[arg-type]
    return found


def _marked(source: str, kind: str) -> str | None:
    """Return the class with a title in a source, "" for a module with one, None where there is none."""
    if kind == "method":
        return "" if re.search(r"^TITLE = ", source, re.MULTILINE) else None
    for name, body in re.findall(r"^class (\w+)\b(.*?)(?=^\S|\Z)", source, re.MULTILINE | re.DOTALL):
        if re.search(r"^    TITLE = ", body, re.MULTILINE):
            return str(name)
    return None


@cache
def installed() -> dict[str, Entry]:
    """Return what installed packages offer by entry points ``dmir.methods`` and ``dmir.networks``, by name.

    Raises
    ------
    InputError
        Two packages offer the same name, or one a name that is built in.
    """
    found: dict[str, Entry] = {}
    for kind, folder in FOLDERS.items():
        for point in entry_points(group=f"dmir.{folder}"):
            module, _, attribute = point.value.partition(":")
            package = f"{point.dist.name} {point.dist.version}" if point.dist else "?"
            other = found.get(point.name) or built_in().get(point.name)
            if other is not None and (other.source, other.module) != (package, module):
                raise InputError(
                    f"entry point dmir.{folder}: {point.name}",
                    found=f"the same name in {package} and in {'dmir' if other.source == BUILT_IN else other.source}",
                    expected="one of each name",
                    remedy="Uninstall one of the packages.",
                )
            path = source_of(module) or Path(module)
            found[point.name] = Entry(point.name, kind, package, module, attribute, path)  # type: ignore[arg-type]
    return found


def _in_file(name: str) -> Entry:
    file, _, attribute = name.partition(":")
    path = Path(file)
    if not path.is_file():
        raise InputError(
            name,
            found=f"no file {file} in {Path.cwd()}",
            expected="a Python file: a path from the folder in which the command is started",
        )
    offered = offered_by(path)
    wanted = attribute or "register"
    if wanted not in offered:
        raise InputError(
            name,
            found=f"no class and no function '{wanted}' in {file}",
            expected="NAME.py:CLASS, a network, or NAME.py:FUNCTION, a method; without either a function 'register'",
            remedy=suggestion(wanted, offered) if offered else "",
        )
    kind: Literal["method", "network"] = "network" if offered[wanted] else "method"
    return Entry(name, kind, f"file {file}", file, wanted, path)


# --- what it tells of itself ---


def facts(entry: Entry) -> Facts:
    """Return what the source of a method or a network tells, without running it."""
    if entry.path.suffix != ".py" or not entry.path.is_file():
        raise InputError(
            f"{entry.source}: {entry.name}",
            found=f"no source of {entry.module}",
            expected="a module of Python",
            remedy="Its entry point leads nowhere: the package is broken, or was installed in part.",
        )
    return facts_of(entry.path, entry.attribute, entry.name, f"{entry.source}: {entry.name}")


def asks_for(name: str, argument: str) -> bool:
    """Tell whether a method's function has an argument, for instance ``device``."""
    return argument in facts(find(name)).arguments


def on_gpu(name: str, parameters: Mapping[str, Any]) -> bool:
    """Tell whether a method computes on a GPU where there is one: it asks for a device, or is set to."""
    return bool(parameters.get("gpu", False)) or asks_for(name, "device")


@cache
def built_in_facts() -> dict[str, Facts]:
    """Return what all built-in methods and networks tell of themselves, by name."""
    return {name: facts(entry) for name, entry in built_in().items()}


def title(name: str, *, short: bool = False) -> str | None:
    """Return what a method or a network is called in tables or, short, in figures; None where there is none."""
    told = _facts_or_none(name)
    return None if told is None else told.short_title if short else told.title


def colour(name: str) -> str | None:
    """Return the colour, ``#rrggbb``, that a method or a network names as its own."""
    told = _facts_or_none(name)
    return told.colour.lower() if told is not None and re.fullmatch("#[0-9a-fA-F]{6}", told.colour) else None


def marker(name: str) -> str | None:
    """Return the marker that a method or a network names as its own."""
    told = _facts_or_none(name)
    return (told.marker or None) if told is not None else None


def _facts_or_none(name: str) -> Facts | None:
    """Return the facts of a plain name; a table may hold any other."""
    try:
        return None if names_a_file(name) else facts(find(name))
    except InputError:
        return None


# --- its settings, its function, its cost ---


def settings_model(name: str) -> type[MethodSettings]:
    """Return the settings of a method: its own, or else the keyword arguments of its function."""
    entry = find(name)
    assert entry.kind == "method", f"{name} is a network"
    return _settings_model(entry, tuple(facts(entry).parameters.items()))


@cache
def _settings_model(entry: Entry, parameters: tuple[tuple[str, tuple[str, str]], ...]) -> type[MethodSettings]:
    own: Any = None
    if not entry.is_file and not entry.attribute:
        own = getattr(_module(entry), "Settings", None)
    fields: dict[str, Any] = {"algorithm": (Literal[entry.name], ...)}
    if own is None:
        fields |= {key: _field(annotation, default) for key, (annotation, default) in parameters}
        bases: tuple[type[BaseModel], ...] = (MethodSettings,)
    else:
        bases = (own,) if issubclass(own, MethodSettings) else (own, MethodSettings)
    told = own.__doc__ if own else None
    quick = {"use_attribute_docstrings": False}  # those of its bases are there already
    made: Any = create_model(entry.name, __base__=bases, __doc__=told, __cls_kwargs__=quick, **fields)
    model: type[MethodSettings] = made
    model.given_only = own is None
    return model


def _field(annotation: str, default: str) -> tuple[Any, Any]:
    """Return the type and the default of a keyword argument, as far as its text tells them."""
    if not default:
        return PLAIN.get(annotation, Any), ...
    try:
        value = ast.literal_eval(default)
    except ValueError:  # computed: left to the function unless it is given
        return Any, None
    return PLAIN.get(annotation, Any), list(value) if isinstance(value, tuple) else value


def implementation(name: str) -> Any:
    """Return a method, imported: a module, or what looks like one, with ``register``.

    Raises
    ------
    InputError
        There is no such method, or it cannot be imported.
    """
    entry = find(name)
    if not entry.attribute:
        found: Any = _module(entry)
        if not callable(getattr(found, "register", None)):
            raise InputError(f"{entry.source}: {name}", found=f"no function register in {entry.module}", expected="one")
        return found
    return SimpleNamespace(register=load(entry))


def load(entry: Entry) -> Any:
    """Return the class or the function of an entry, imported."""
    module = _module(entry)
    try:
        return getattr(module, entry.attribute)
    except AttributeError:
        raise InputError(
            f"{entry.source}: {entry.name}", found=f"no {entry.attribute} in {entry.module}", expected="it there"
        ) from None


def _module(entry: Entry) -> ModuleType:
    if entry.source == BUILT_IN:
        return importlib.import_module(entry.module)
    try:
        return _module_of_file(entry.path) if entry.is_file else importlib.import_module(entry.module)
    except Exception as error:  # anything at all can be in there
        raise InputError(
            f"{entry.source}: {entry.name}",
            found=f"code that cannot be imported ({type(error).__name__}: {' '.join(str(error).split())})",
            expected=f"a {entry.kind}",
            remedy=f"Try it alone: python {entry.path}",
        ) from error


def _module_of_file(path: Path) -> ModuleType:
    """Import a file under a name of its own, once a process; it finds the files beside it, after everything else."""
    whole = path.resolve()
    name = f"dmir_file_{whole.stem}_{hashlib.sha256(str(whole).encode()).hexdigest()[:8]}"
    if name in sys.modules:
        return sys.modules[name]
    if str(whole.parent) not in sys.path:
        sys.path.append(str(whole.parent))
    spec = importlib.util.spec_from_file_location(name, whole)
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    sys.modules[name] = module  # dataclasses look their module up
    try:
        spec.loader.exec_module(module)
    except BaseException:
        del sys.modules[name]
        raise
    return module


def _told(name: str) -> Any:
    """Return the module in which a method may tell of its cost; nothing is imported of what a configuration names."""
    entry = find(name)
    return None if entry.is_file or entry.attribute else _module(entry)


def cost(
    name: str,
    parameters: Mapping[str, Any],
    shape: Sequence[int],
    spacing: Sequence[float] = (1.0, 1.0, 1.0),
    measured: Mapping[str, float] = MappingProxyType({}),
) -> PairCost:
    """Return what a method's pair costs on a grid.

    Parameters
    ----------
    name, parameters
        As :meth:`dmir.config.Config.parameters` gives them.
    shape, spacing
        Of the grid, in voxels and mm.
    measured
        Instead of the method's own constants: what its ``measure`` returned.
    """
    own = getattr(_told(name), "cost", None)
    if own is not None:
        found: PairCost = own(parameters, shape, spacing, measured)
        return found
    return PairCost(measured.get(f"{name} voxel_s", UNKNOWN_VOXEL) * math.prod(shape))


def parts(name: str, parameters: Mapping[str, Any]) -> list[dict[str, Any]]:
    """Return the methods that run one after the other in a pair, each ``{"algorithm": ..., **parameters}``."""
    own = getattr(_told(name), "parts", None)
    return [{"algorithm": name, **parameters}] if own is None else list(own(parameters))


# --- what it depends on ---


def modules(name: str) -> list[str]:
    """Return the modules whose code a method or network is, for :func:`dmir.provenance.code_hash`."""
    return [find(name).module]


def state(name: str, parameters: Mapping[str, Any]) -> str:
    """Return a hash of what a method's result depends on beside code and settings: its program, its files; or ""."""
    own = getattr(_told(name), "state", None)
    return "" if own is None else str(own(parameters))


def runs(name: str, parameters: Mapping[str, Any]) -> str:
    """Say what a configuration that names a method or a network would run of somebody else's; "" for built-in ones."""
    entry = find(name)
    if entry.is_file:
        return f"{entry.kind} {entry.attribute} of the file {entry.path.absolute()}"
    if entry.source != BUILT_IN:
        where = ":".join(filter(None, (entry.module, entry.attribute)))
        return f"{entry.kind} {where} of the package {entry.source}"
    own = getattr(_told(name), "runs", None) if entry.kind == "method" else None
    return "" if own is None else str(own(parameters))
