"""Imports within the package flow one way: no module needs, in the end, itself."""

import ast
from pathlib import Path

import pytest

SOURCES = Path(__file__).parents[1] / "src"
# a field is read as any other transform is, and transforms are made of fields: `load_field` waits until it is called
WITHIN_FUNCTIONS = {("dmir.fields.files", "dmir.transforms")}


def modules_of(folder):
    """Every module of the packages in a folder, with its file."""
    found = {}
    for path in sorted(folder.rglob("*.py")):
        parts = path.relative_to(folder).with_suffix("").parts
        found[".".join(parts[:-1] if parts[-1] == "__init__" else parts)] = path
    return found


def imports_of(name, path, modules, within_functions=False):
    """The modules that one imports: with packages whose ``__init__`` runs for it, its own only where asked by name."""
    wanted = set()
    for node in statements(ast.parse(path.read_text(encoding="utf-8")), within_functions):
        if isinstance(node, ast.Import):
            asked = [alias.name for alias in node.names]
        else:
            package = name if path.name == "__init__.py" else name.rpartition(".")[0]
            for _ in range(node.level - 1):
                package = package.rpartition(".")[0]
            base = ".".join(filter(None, (package if node.level else "", node.module)))
            below = [f"{base}.{alias.name}" for alias in node.names]
            asked = [one if one in modules else base for one in below]
        for target in asked:
            packages = [target.rsplit(".", count)[0] for count in range(target.count(".") + 1)]
            wanted |= {one for one in packages if one == target or not f"{name}.".startswith(f"{one}.")}
    return {one for one in wanted if one in modules and one != name}


def statements(tree, within_functions):
    """The imports of a module: those that run, or are looked at by a type checker, or also those within functions."""
    waiting = [tree]
    while waiting:
        for node in ast.iter_child_nodes(waiting.pop()):
            if isinstance(node, ast.Import | ast.ImportFrom):
                yield node
            elif within_functions or not isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef | ast.Lambda):
                waiting.append(node)


def graph_of(folder, within_functions=False):
    modules = modules_of(folder)
    return {name: imports_of(name, path, modules, within_functions) for name, path in modules.items()}


def circles(graph):
    """Shortest circles, each told once, as the modules on the way round."""
    found = {}
    for start in sorted(graph):
        ways, seen = [[start]], {start}
        while ways and start not in found:
            way = ways.pop(0)
            for following in sorted(graph[way[-1]]):
                if following == start:
                    found[start] = way
                elif following not in seen:
                    seen.add(following)
                    ways.append([*way, following])
    told = {frozenset(way): way for way in reversed(found.values())}  # of each the one that starts first
    return [" -> ".join([*way, way[0]]) for way in told.values()]


def asked_of_their_own_package(graph):
    """Modules that ask for a name of their own package's ``__init__``, which is not done with before they are."""
    return [
        f"{name} -> {package}"
        for name, wanted in sorted(graph.items())
        for package in sorted(wanted)
        if name.startswith(f"{package}.") and graph[package]  # `dmir` itself imports nothing: it has the version
    ]


def test_imports_flow_one_way():
    graph = graph_of(SOURCES)
    assert len(graph) > 200
    assert circles(graph) == []
    assert asked_of_their_own_package(graph) == []


def test_imports_within_functions_flow_the_same_way():
    """They wait for what is heavy, and not for a module that could not be imported yet."""
    graph = graph_of(SOURCES, within_functions=True)
    for name, wanted in WITHIN_FUNCTIONS:
        assert wanted in graph[name], "no longer needed: take it from the list"
        graph[name] -= {one for one in graph[name] if f"{one}.".startswith(f"{wanted}.")}
    assert circles(graph) == []
    assert asked_of_their_own_package(graph) == []


@pytest.fixture
def package(tmp_path):
    """A package of modules that import nothing."""
    for name in ("__init__", "first", "second", "below.__init__", "below.third"):
        path = tmp_path.joinpath("own", *name.split(".")).with_suffix(".py")
        path.parent.mkdir(exist_ok=True, parents=True)
        path.write_text("import json\n")
    return tmp_path


@pytest.mark.parametrize(
    ("first", "second"),
    [
        ("import own.second", "from own import first"),
        ("from own.second import x", "from . import first"),
        ("from .second import x", "from .first import y"),
        ("from own import second", "if TYPE_CHECKING:\n    from own.first import y"),
        ("try:\n    from own.second import x\nexcept ImportError:\n    pass", "class A:\n    import own.first"),
    ],
)
def test_a_circle_is_named(package, first, second):
    (package / "own" / "first.py").write_text(first)
    (package / "own" / "second.py").write_text(second)
    assert circles(graph_of(package)) == ["own.first -> own.second -> own.first"]


def test_a_circle_within_functions_and_one_through_a_package_are_named(package):
    own = package / "own"
    (own / "first.py").write_text("from own.below import third")
    (own / "below" / "__init__.py").write_text("def later():\n    from own.first import y")
    assert circles(graph_of(package)) == []
    assert circles(graph_of(package, within_functions=True)) == ["own.below -> own.first -> own.below"]


def test_what_a_module_asks_of_its_own_package_is_named(package):
    own = package / "own"
    (own / "below" / "third.py").write_text("from own.below import x\nfrom . import y\nfrom own import first")
    assert asked_of_their_own_package(graph_of(package)) == []  # its __init__ imports nothing of the package
    (own / "below" / "__init__.py").write_text("from own.first import x")
    assert asked_of_their_own_package(graph_of(package)) == ["own.below.third -> own.below"]
