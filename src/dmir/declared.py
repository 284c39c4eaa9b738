"""What a source tells of the method or network in it, read and never run: its constants and its parameters."""

from __future__ import annotations

import ast
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from functools import cache
from pathlib import Path
from types import MappingProxyType
from typing import Any

from dmir.errors import InputError

# what isolated.py gives to a method that has an argument of this name: no parameters
ASKED_FOR = frozenset({"device", "seen", "limit", "names", "measured", "start", "watch"})


@dataclass(frozen=True)
class Facts:
    """What a source tells of a method or a network.

    Attributes
    ----------
    parameters
        Keyword-only arguments of the function or the constructor: name -> (annotation, default), both as text.
    arguments
        All its arguments.
    """

    title: str
    short_title: str
    paper: str
    colour: str
    marker: str
    parameters: Mapping[str, tuple[str, str]] = field(default_factory=dict)
    arguments: tuple[str, ...] = ()


def tree_of(path: Path) -> ast.Module:
    """Return the syntax tree of a source; InputError where it is none."""
    state = path.stat()
    return _parsed(path.absolute(), state.st_mtime_ns, state.st_size)


@cache
def _parsed(path: Path, changed: int, size: int) -> ast.Module:
    try:
        return ast.parse(path.read_bytes(), filename=str(path))
    except (SyntaxError, ValueError) as error:
        raise InputError(path, found=f"no Python ({error})", expected="a Python file") from None


def offered_by(path: Path) -> dict[str, bool]:
    """Return the classes (true) and functions (false) at the top level of a file."""
    kinds = (ast.ClassDef, ast.FunctionDef)
    return {node.name: isinstance(node, ast.ClassDef) for node in tree_of(path).body if isinstance(node, kinds)}


def facts_of(path: Path, attribute: str, name: str, where: str) -> Facts:
    """Return what the source of a method or a network tells.

    Parameters
    ----------
    path
        The file.
    attribute
        The class or the function in it; "": the module itself, with a function ``register``.
    name
        Its title where it has none.
    where
        For the message of an InputError: there is no such class or function.
    """
    body: Sequence[ast.stmt] = tree_of(path).body
    owner, wanted = body, "register"
    if attribute:
        node = next((n for n in body if getattr(n, "name", None) == attribute), None)
        if node is None:
            raise InputError(where, found=f"no {attribute} in {path}", expected="it there")
        owner, wanted = (node.body, "__init__") if isinstance(node, ast.ClassDef) else (body, attribute)
    told = _constants(owner)
    arguments, parameters = _arguments(owner, wanted)
    title = str(told.get("TITLE", name))
    short = str(told.get("SHORT_TITLE", title))
    colour, marker, paper = (str(told.get(key, "")) for key in ("COLOUR", "MARKER", "PAPER"))
    return Facts(title, short, paper, colour, marker, MappingProxyType(parameters), arguments)


def _constants(body: Iterable[ast.stmt]) -> dict[str, Any]:
    """Return the plain values that are given to names in capitals; of ``A, B = 1, 2`` both."""
    found: dict[str, Any] = {}
    for node in body:
        if isinstance(node, ast.Assign) and len(node.targets) == 1:
            target, value = node.targets[0], node.value
            names_ = target.elts if isinstance(target, ast.Tuple) else [target]
            values = value.elts if isinstance(target, ast.Tuple) and isinstance(value, ast.Tuple) else [value]
            for one, other in zip(names_, values, strict=False):
                if isinstance(one, ast.Name) and one.id.isupper() and isinstance(other, ast.Constant):
                    found[one.id] = other.value
    return found


def _arguments(body: Iterable[ast.stmt], name: str) -> tuple[tuple[str, ...], dict[str, tuple[str, str]]]:
    """Return the arguments of a function, and its keyword-only ones with annotation and default as text."""
    for node in body:
        if isinstance(node, ast.FunctionDef) and node.name == name:
            given = node.args
            every = [one.arg for one in (*given.posonlyargs, *given.args, *given.kwonlyargs)]
            parameters = {
                one.arg: (
                    "" if one.annotation is None else ast.unparse(one.annotation),
                    "" if default is None else ast.unparse(default),
                )
                for one, default in zip(given.kwonlyargs, given.kw_defaults, strict=True)
                if one.arg not in ASKED_FOR
            }
            return tuple(every), parameters
    return (), {}
