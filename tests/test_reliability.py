"""The page of faults names every test that breaks something, and none that there is not."""

import ast
import re
from pathlib import Path

ROOT = Path(__file__).parents[1]
PAGE = (ROOT / "docs" / "reliability.md").read_text(encoding="utf-8")


def names_of_tests_in(*patterns):
    files = [path for pattern in patterns for path in (ROOT / "tests").glob(pattern)]
    trees = [ast.parse(path.read_text(encoding="utf-8")) for path in files]
    return {
        node.name
        for tree in trees
        for node in tree.body
        if isinstance(node, ast.FunctionDef) and node.name.startswith("test_")
    }


def test_every_row_names_tests_that_there_are():
    rows = [line for line in PAGE.splitlines() if line.startswith("| ") and not line.startswith(("| fault", "|---"))]
    assert len(rows) > 20
    there = names_of_tests_in("test_*.py")
    for row in rows:
        named = re.findall(r"`(test_\w+)`", row)
        assert named and there.issuperset(named), row


def test_every_fault_that_is_tested_stands_on_the_page():
    assert names_of_tests_in("test_faults_*.py") <= set(re.findall(r"`(test_\w+)`", PAGE))
