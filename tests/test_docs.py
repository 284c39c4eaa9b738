"""The pages: short where a person begins, listed in one place, and a site of them without a link that leads nowhere."""

import importlib.util
import re
import subprocess
import sys
from pathlib import Path

import pytest

from dmir.cli import _parser

ROOT = Path(__file__).parents[1]
specification = importlib.util.spec_from_file_location("build", ROOT / "docs" / "build.py")
build = importlib.util.module_from_spec(specification)
specification.loader.exec_module(build)


def test_the_readme_is_short_and_has_its_four_doors():
    text = (ROOT / "README.md").read_text()
    assert len(text.splitlines()) <= 150
    doors = re.search(r"\n## Four doors\n(.*?)\n## ", text, re.DOTALL)[1]
    assert re.findall(r"^### (.*)$", doors, re.MULTILINE) == [
        "My own scans",
        "My own method",
        "The paper's tables",
        "Two scans right now",
    ]
    assert all(re.search(r"\*\*\[docs/\S+\]\(docs/\S+\)\*\*", door) for door in doors.split("\n### ")[1:])


def test_every_page_of_docs_is_in_the_table_of_contents_and_in_the_site():
    contents = (ROOT / "docs" / "README.md").read_text()
    site = (ROOT / "docs" / "mkdocs.yml").read_text()
    for path in (ROOT / "docs").glob("*.md"):
        assert path.name == "README.md" or f"]({path.name})" in contents, path.name
        assert f"docs/{path.name}" in site, path.name
    for path in (ROOT / "docs" / "results").glob("*/README.md"):
        assert f"](results/{path.parent.name}/README.md)" in contents and f"results/{path.parent.name}/" in site


def test_every_command_of_the_pages_is_one_that_dmir_has():
    commands = {*next(action for action in _parser()._actions if action.choices).choices}
    found = set()
    for page in build.pages():
        blocks = "\n".join(re.findall(r"```\w*\n(.*?)```", (ROOT / page).read_text(), re.DOTALL))
        found |= set(re.findall(r"^(?:\.venv/bin/)?dmir ([a-z][\w-]*)", blocks, re.MULTILINE))
    assert found <= commands and {"check", "plan", "register", "score", "field"} <= found


def test_targets_that_the_pages_name_are_the_makefiles():
    targets = set(re.findall(r"^([a-z][\w-]*):", (ROOT / "Makefile").read_text(), re.MULTILINE))
    named = set()
    for page in (page for page in build.pages() if page.name != "CHANGELOG.md"):
        named |= set(re.findall(r"`make ([a-z][\w-]*)`|^make ([a-z][\w-]*)", (ROOT / page).read_text(), re.MULTILINE))
    assert {one or other for one, other in named} <= targets


def test_the_site_is_built_strictly_and_fetches_nothing(tmp_path):
    pytest.importorskip("mkdocs")
    done = subprocess.run(
        [sys.executable, ROOT / "docs" / "build.py", "--out", tmp_path], capture_output=True, text=True
    )
    assert done.returncode == 0, done.stdout + done.stderr
    page = (tmp_path / "api.html").read_text()
    assert "dmir.fields.warp" in page and "displacement" in page
    assert "label_interpolation" in (tmp_path / "config" / "index.html").read_text()  # the configuration's keys


def test_a_link_that_leads_nowhere_is_named(tmp_path, monkeypatch):
    (tmp_path / "docs").mkdir()
    for page in ("README.md", "CONTRIBUTING.md", "CHANGELOG.md"):
        (tmp_path / page).write_text("[there](docs/a.md) [not](docs/b.md) [outside](../c.md) `[code](x)`\n")
    (tmp_path / "docs" / "a.md").write_text("[up](../README.md)\n```\n[shown](nowhere.md)\n```\n")
    (tmp_path / "docs" / "site.css").touch()
    monkeypatch.setattr(build, "ROOT", tmp_path)
    problems = build.gather(tmp_path / "pages")
    assert set(problems) >= {"README.md: docs/b.md is not there", "README.md: ../c.md is not there"}
    assert not any("a.md" in problem for problem in problems)
    assert "[up](../index.md)" in (tmp_path / "pages" / "docs" / "a.md").read_text()


def test_a_graph_is_shown_without_a_script():
    graph = 'flowchart LR\n    a["one (1)"] --> b\n    a --> c --> d\n    c -->|two| e\n'
    assert build._as_lines(graph) == "a -> b, c\nc -> d, e\n"


def test_what_would_be_fetched_is_found():
    assert build.FROM_ELSEWHERE.search('<script src="https://unpkg.com/x"></script>')
    assert build.FROM_ELSEWHERE.search('<link rel=stylesheet href="//fonts.example/x">')
    assert not build.FROM_ELSEWHERE.search('<a href="https://doi.org/x">paper</a>')
