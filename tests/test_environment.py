"""What is installed, in one place and the same everywhere."""

import re
import subprocess
import sys
import tomllib
from pathlib import Path

import yaml

ROOT = Path(__file__).parents[1]


def pins(lines):
    found = (re.match(r"([A-Za-z0-9_.-]+)==([^\s;]+)", line) for line in lines)
    return {m[1].lower().replace("_", "-"): m[2] for m in found if m}


CONSTRAINTS = pins((ROOT / "constraints.txt").read_text().splitlines())


def direct(path):
    lines = (ROOT / path).read_text().splitlines()
    return {re.split(r"[=<>~ ]", line)[0].lower() for line in lines if line and not line.startswith("#")}


def test_conda_environments_agree_with_the_constraints():
    for path in (ROOT / "envs").glob("*.yaml"):
        packages = yaml.safe_load(path.read_text())["dependencies"][-1]["pip"]
        for name, version in pins(packages).items():
            assert CONSTRAINTS[name] == version, f"{path.name}: {name}"
        assert set(pins(packages)) == direct("requirements.txt")


def test_everything_required_is_constrained_and_declared():
    assert direct("requirements.txt") | direct("requirements-dev.txt") <= set(CONSTRAINTS)
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    declared = {re.split(r"[=<>~ ]", d)[0].lower() for d in project["dependencies"]}
    assert declared == direct("requirements.txt")


def test_constraints_name_no_place_and_no_build():
    text = (ROOT / "constraints.txt").read_text()
    assert "@" not in text and "://" not in text and "+cpu" not in text


def test_the_rule_graph_in_the_readme_is_the_workflows():
    graph = re.search(r"```mermaid\n(.*?)```", (ROOT / "README.md").read_text(), re.DOTALL)
    assert graph is not None
    script = ROOT / "workflow" / "rulegraph.py"
    printed = subprocess.run([sys.executable, script], capture_output=True, text=True, check=True).stdout
    assert "preprocess_scan --> pack_scans" in printed
    assert graph[1] == printed, "run `make graph` and put what it prints into the README"
