"""Reading a configuration: from YAML to checked models, every mistake told at once.

A configuration may come from somebody else. A YAML file becomes numbers, words, lists and dictionaries and nothing else
(no tags of Python); what is larger than any configuration is refused before it is walked through, because ten lines of
YAML aliases can stand for more than a memory holds.
"""

from __future__ import annotations

import math
import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import yaml
from pydantic import ValidationError

from dmir.config.base import QUOTES, ConfigError, mistakes, shown
from dmir.config.models import Config
from dmir.errors import InputError
from dmir.volumes import MAXIMUM_VOXELS

MAXIMUM_BYTES = 2**16  # of a file; the committed ones have three thousand
MAXIMUM_ENTRIES = 20_000  # aliases counted as often as they stand for something
MAXIMUM_DEPTH = 20
LONGEST_KEY, LONGEST_TEXT = 100, 4096  # a key can name a folder, a text can be a path
LARGEST_INTEGER = 2**63 - 1
UNSAFE_IN_PATHS = frozenset('{}*?;&|<>$`"\\')  # for a shell, or as wildcards of Snakemake
DECIMAL = re.compile(r"[-+]?(0|[1-9][0-9_]*)")
TEMPLATE_KEY = "__use_yte__"  # of YTE, through which Snakemake reads its configuration files before we see them
PATHS = frozenset({"results", "root", "folder", "table", "freesurfer", "split", "pairs"})


def parse_config(values: dict[str, Any], source: str = "configuration") -> Config:
    """Check a dictionary and return the configuration; ConfigError lists every mistake with its key."""
    problems = list(_unreasonable(values))
    if problems:
        raise ConfigError(source, problems)
    try:
        configuration = Config.model_validate(values)
    except ValidationError as error:
        raise ConfigError(source, mistakes(error)) from None
    shape = configuration.grid.shape
    if math.prod(shape) > MAXIMUM_VOXELS:
        raise ConfigError(source, [f"grid.shape: found {shape}; expected at most {MAXIMUM_VOXELS} voxels"])
    return configuration


def read_config(path: str | Path) -> Config:
    """Read and check a YAML file."""
    return parse_config(read_yaml(path), str(path))


class _Loader(yaml.SafeLoader):
    """Of numbers, words, lists and dictionaries; stops at a depth, because YAML is read in its square."""

    _depth = 0

    def compose_node(self, parent: Any, index: Any) -> Any:
        self._depth += 1
        if self._depth > MAXIMUM_DEPTH:
            raise RecursionError
        node = super().compose_node(parent, index)
        self._depth -= 1
        return node


def read_yaml(path: str | Path) -> dict[str, Any]:
    """Return the keys of a YAML file, unchecked but of plain kinds and of bounded size.

    Raises
    ------
    InputError
        The file is missing, no YAML of plain kinds, or larger or deeper than a configuration.
    ConfigError
        A key stands there twice, of which YAML's readers silently take the last.
    """
    path = Path(path)
    expected = "a configuration in YAML"
    if not path.is_file():
        raise InputError(path, found="no such file", expected=expected, remedy="Check the path.")
    if path.stat().st_size > MAXIMUM_BYTES:
        raise InputError(
            path, found=f"{path.stat().st_size} bytes", expected=f"{expected} of at most {MAXIMUM_BYTES} bytes"
        )
    try:
        loader = _Loader(path.read_text(encoding="utf-8-sig"))
        tree = loader.get_single_node()
        problems = [] if tree is None else list(_check_tree(tree))
        values = None if problems or tree is None else loader.construct_document(tree)
    except RecursionError:
        raise InputError(
            path, found="entries in entries without end", expected=f"at most {MAXIMUM_DEPTH} levels"
        ) from None
    except (yaml.YAMLError, ValueError, OverflowError) as error:  # ValueError: text, dates, integers that are none
        raise InputError(path, found=f"text that is no YAML ({error})", expected=expected) from None
    if problems:
        raise ConfigError(str(path), problems)
    if not isinstance(values, dict):
        table = path.suffix.lower() in (".csv", ".tsv")
        raise InputError(
            path,
            found="a table" if table else type(values).__name__,
            expected="a dictionary of keys",
            remedy="A table of scans is named by a cohort's key table: docs/cohorts.md." if table else "",
        )
    if TEMPLATE_KEY in values:
        raise InputError(
            path,
            found=f"the key {TEMPLATE_KEY}, with which Snakemake runs what the file holds as Python",
            expected="plain values",
            remedy="Never give this file to Snakemake unless you trust whoever wrote it; take the key away.",
        )
    return values


def _check_tree(tree: yaml.Node) -> Iterator[str]:
    """Yield the keys that stand twice in a dictionary; ValueError where the whole is too large or has no end.

    Each node is looked at once, however often aliases name it.
    """
    entries: dict[int, float] = {}

    def walk(node: yaml.Node, path: str) -> Iterator[str]:
        entries[id(node)] = math.inf  # where it is met again inside itself
        children: list[tuple[str, yaml.Node]] = []
        if isinstance(node, yaml.SequenceNode):
            children = [(f"{path}[{place}]", child) for place, child in enumerate(node.value)]
        elif _is_changed(node):
            yield (
                f"{path}: found {node.value[:LONGEST_KEY]}, of which YAML makes {shown(yaml.safe_load(node.value))}; "
                f"expected a decimal number, or a name in quotes: '{node.value[:LONGEST_KEY]}'"
            )
        elif isinstance(node, yaml.MappingNode):
            lines: dict[Any, int] = {}
            for key, value in node.value:
                name = (key.tag, key.value) if isinstance(key, yaml.ScalarNode) else id(key)
                where = ".".join(filter(None, (path, str(key.value)[:LONGEST_KEY])))
                line = key.start_mark.line + 1
                if name in lines:
                    yield f"{where}: found twice, in lines {lines[name]} and {line}; expected every key once"
                lines[name] = line
                children += [(where, key), (where, value)]
        for where, child in children:
            if id(child) not in entries:
                yield from walk(child, where)
        entries[id(node)] = 1 + sum(entries[id(child)] for _, child in children)
        if entries[id(node)] > MAXIMUM_ENTRIES:
            raise ValueError(f"{path or 'the whole'} stands for more than {MAXIMUM_ENTRIES} entries")

    yield from walk(tree, "")


def _is_changed(node: yaml.Node) -> bool:
    """Tell whether a word is one of those that YAML takes for a number of another base: 007, 0x10, 1:30."""
    number = node.tag.rpartition(":")[2] if isinstance(node, yaml.ScalarNode) and node.style is None else ""
    return (number == "int" and not DECIMAL.fullmatch(node.value)) or (number == "float" and ":" in node.value)


def _unreasonable(values: Any) -> Iterator[str]:
    """Yield what no configuration has, one ``key: what`` each: before any of it is checked, copied or printed."""
    left = [MAXIMUM_ENTRIES]

    def walk(value: Any, path: str, depth: int) -> Iterator[str]:
        left[0] -= 1
        if depth > MAXIMUM_DEPTH or left[0] == 0:
            limit = f"at most {MAXIMUM_DEPTH} levels" if left[0] else f"at most {MAXIMUM_ENTRIES} entries"
            yield f"{path}: found entries in entries; expected {limit}"
        elif left[0] > 0 and isinstance(value, dict):
            for key, entry in value.items():
                where = f"{path}.{key}" if path else f"{key}"
                if not isinstance(key, str):
                    yield f"{path or 'configuration'}: found the key {shown(key)}; {QUOTES}"
                elif not key.isprintable() or not 0 < len(key) <= LONGEST_KEY:
                    yield f"{path or 'configuration'}: found the key {shown(key)}; expected 1 to {LONGEST_KEY} letters"
                else:
                    yield from walk(entry, where, depth + 1)
        elif left[0] > 0 and isinstance(value, list | tuple):
            for entry in value:
                yield from walk(entry, path, depth + 1)
        elif reason := _strange(value, path.rpartition(".")[2]):
            yield f"{path}: found {shown(value)}; expected {reason}"

    yield from walk(values, "", 0)


def _strange(value: Any, key: str) -> str:
    """Return what is expected instead of a single value; "" where the value can stand in a configuration."""
    if isinstance(value, float) and not math.isfinite(value):
        return "a finite number"
    if isinstance(value, int) and abs(value) > LARGEST_INTEGER:
        return "a whole number of at most 64 bits"
    if isinstance(value, str):
        if len(value) > LONGEST_TEXT or not value.isprintable():
            return f"a text of one line and at most {LONGEST_TEXT} letters"
        if key in PATHS and (UNSAFE_IN_PATHS.intersection(value) or value.startswith("-")):
            return f"a path without {' '.join(sorted(UNSAFE_IN_PATHS))}, and no '-' first"
    return ""
