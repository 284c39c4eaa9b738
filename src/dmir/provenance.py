"""What a result depends on: hashes of the code that made it, of files and of values.

A workflow manager sees the script that it runs, not the library that the script imports. ``code_hash`` follows the
imports, so that a change in one module reruns what depends on that module and nothing else. Comments, docstrings and
layout do not count: a training is not repeated for a spelling.
"""

from __future__ import annotations

import ast
import hashlib
import importlib.util
import json
from collections.abc import Iterator
from functools import cache
from pathlib import Path
from typing import Any

PACKAGE = __name__.split(".")[0]
ROOT = Path(__file__).parent
BODIES = ("body", "orelse", "finalbody", "handlers", "cases")  # where statements have statements
LENGTH = 16  # hexadecimal digits: 64 bits tell files of one project apart


@cache
def code_hash(*modules: str) -> str:
    """Return a hash of modules of this package and of all that they import from it, directly or not.

    Imports inside functions count; names in lazy registries are strings and do not, so that the hash for one network
    does not change with another.

    Parameters
    ----------
    modules
        Full names, for instance ``"dmir.networks.caml"``. Of somebody else's package too: with all that it imports from
        that package. Or the path of a file, ``"my_network.py"``: with the files beside it that it imports.
    """
    digest = hashlib.sha256()
    for name in sorted(imported_modules(*modules)):
        digest.update(f"{name}\0{_meaning(source_of(name))}\0".encode())
    return digest.hexdigest()[:LENGTH]


def code_record(*modules: str) -> dict[str, Any]:
    """Return modules with their :func:`code_hash`: what a job that tells its origin is given."""
    return {"modules": list(modules), "hash": code_hash(*modules)}


def module_hashes(*modules: str) -> dict[str, str]:
    """Return the hash of each module that :func:`code_hash` counts, by its name."""
    return {
        name: hashlib.sha256(_meaning(source_of(name)).encode()).hexdigest()[:LENGTH]
        for name in sorted(imported_modules(*modules))
    }


def file_hash(path: str | Path) -> str:
    """Return a hash of what is in a file; of a folder, of the names and contents of its files."""
    path = Path(path)
    if path.is_dir():
        return value_hash({p.relative_to(path).as_posix(): file_hash(p) for p in path.rglob("*") if p.is_file()})
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()[:LENGTH]


def value_hash(value: Any) -> str:
    """Return a hash of numbers, texts, lists and dicts; the order of a dict's keys does not count."""
    return hashlib.sha256(json.dumps(value, sort_keys=True).encode()).hexdigest()[:LENGTH]


def imported_modules(*modules: str) -> set[str]:
    """Return the modules themselves and every module of this package that they import, directly or not."""
    found: set[str] = set()
    waiting = list(modules)
    while waiting:
        name = waiting.pop()
        if name in found:
            continue
        if source_of(name) is None:
            raise ModuleNotFoundError(f"no module {name}")
        found.add(name)
        waiting += _imports(name)
        if "." in name and not name.endswith(".py"):
            waiting.append(name.rpartition(".")[0])  # importing a module runs its package's __init__ first
    return found


@cache
def source_of(name: str) -> Path | None:
    """Return the source of a module, of this package or of an installed one; nothing is imported for it."""
    if name.endswith(".py"):
        return Path(name) if Path(name).is_file() else None
    parts = name.split(".")
    if parts[0] != PACKAGE:
        return _file_elsewhere(parts[0], parts[1:])
    return _in_folder(ROOT, parts[1:])


def _in_folder(folder: Path, parts: list[str]) -> Path | None:
    """Return the file of a package or of a module within it; relative names of it are none."""
    stem = folder.joinpath(*parts)
    for path in (stem / "__init__.py", stem.with_suffix(".py") if parts else stem / "__init__.py"):
        if path.is_file():
            return path
    return None


def _file_elsewhere(package: str, parts: list[str]) -> Path | None:
    """Return the file of a module of another package, which is not imported for it."""
    try:
        spec = importlib.util.find_spec(package)
    except (ImportError, ValueError):
        return None
    if spec is None:
        return None
    folders = spec.submodule_search_locations
    if folders is None:
        return Path(spec.origin) if spec.origin is not None and not parts else None
    return next((path for folder in folders if (path := _in_folder(Path(folder), parts)) is not None), None)


@cache
def _imports(name: str) -> tuple[str, ...]:
    path = source_of(name)
    assert path is not None
    names: list[str] = []
    for statement in _read(path)[0]:
        if isinstance(statement, ast.Import):
            names += [alias.name for alias in statement.names]
        else:
            base = statement.module or ""
            if statement.level:
                package = name if path.name == "__init__.py" else name.rpartition(".")[0]
                for _ in range(statement.level - 1):
                    package = package.rpartition(".")[0]
                base = f"{package}.{base}".rstrip(".")
            names += [base, *(f"{base}.{alias.name}" for alias in statement.names)]
    if name.endswith(".py"):
        return tuple(filter(None, (_beside(path, n) for n in names)))
    own = {PACKAGE, name.split(".")[0]}
    return tuple(n for n in names if n.split(".")[0] in own and source_of(n) is not None)


def _beside(path: Path, name: str) -> str | None:
    """Return a module that a file imports: of this package by its name, beside the file by its path, else None."""
    if name.split(".")[0] == PACKAGE:
        return name if source_of(name) is not None else None
    found = _in_folder(path.parent, name.split(".")) if name.strip(".") else None
    return None if found is None else str(found)


@cache
def _read(path: Path) -> tuple[list[ast.Import | ast.ImportFrom], str]:
    """Return what a file imports, and a hash of its syntax tree without docstrings; no tree is kept in memory."""
    if path.suffix != ".py":  # compiled
        return [], file_hash(path)
    tree = ast.parse(path.read_text())
    imports = []
    for statement in _statements(tree):
        if isinstance(statement, ast.Import | ast.ImportFrom):
            imports.append(statement)
        elif isinstance(statement, ast.Module | ast.ClassDef | ast.FunctionDef | ast.AsyncFunctionDef):
            first = statement.body[0] if statement.body else None
            if isinstance(first, ast.Expr) and isinstance(getattr(first.value, "value", None), str):
                statement.body = statement.body[1:] or [ast.Pass()]
    return imports, hashlib.sha256(ast.dump(tree).encode()).hexdigest()


def _statements(tree: ast.AST) -> Iterator[ast.AST]:
    """Yield a tree and its statements, those within others too; what they consist of is a hundred times as much."""
    waiting = [tree]
    while waiting:
        node = waiting.pop()
        yield node
        for name in BODIES:
            waiting += getattr(node, name, ())


def _meaning(path: Path | None) -> str:
    """Return a hash of the code in a file; comments, docstrings and layout do not count."""
    assert path is not None
    return _read(path)[1]
