"""What is installed, in one place and the same everywhere."""

import re
import subprocess
import sys
import tomllib
from pathlib import Path

import yaml
from packaging.specifiers import SpecifierSet
from packaging.version import Version

ROOT = Path(__file__).parents[1]


def pins(lines):
    found = (re.match(r"([A-Za-z0-9_.-]+)==([^\s;]+)", line) for line in lines)
    return {m[1].lower().replace("_", "-"): m[2] for m in found if m}


CONSTRAINTS = pins((ROOT / "constraints.txt").read_text().splitlines())


def direct(path):
    lines = (ROOT / path).read_text().splitlines()
    return {re.split(r"[=<>~ ]", line)[0].lower() for line in lines if line and not line.startswith("#")}


def test_conda_environments_agree_with_the_constraints():
    paths = list((ROOT / "envs").glob("*.yaml"))
    assert paths
    for path in paths:
        packages = yaml.safe_load(path.read_text())["dependencies"][-1]["pip"]
        for name, version in pins(packages).items():
            assert CONSTRAINTS[name] == version, f"{path.name}: {name}"
        assert set(pins(packages)) == direct("requirements.txt")


def python_version():
    """Return the minor version of Python that the conda environment names."""
    packages = yaml.safe_load((ROOT / "envs" / "dmir.yaml").read_text())["dependencies"]
    (named,) = (entry for entry in packages if str(entry).startswith("python="))
    return named.removeprefix("python=")


def test_every_environment_has_one_python_and_the_project_allows_it():
    version = python_version()
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    assert Version(version) in SpecifierSet(project["requires-python"])
    installed = (ROOT / "envs" / "install.sh").read_text()
    assert {*re.findall(r"python(\d\.\d+)", installed)} == {version}
    # what jobs are started as is what Snakemake's own process runs on: it passes pickled objects to them
    assert f"python{version} -m venv /opt/dmir" in installed


def test_both_images_are_made_of_the_requirement_files_and_of_no_other_list():
    container, definition, installed = (
        (ROOT / "envs" / name).read_text() for name in ("Containerfile", "dmir.def", "install.sh")
    )
    files = {"envs/install.sh", "requirements.txt", "constraints.txt"}
    assert {*re.search(r"^COPY (.*) /opt/$", container, re.MULTILINE)[1].split()} == files
    copied = re.search(r"^%files\n(.*?)\n\n", definition, re.MULTILINE | re.DOTALL)[1]
    assert {*re.findall(r"^    (\S+) /opt/\S+$", copied, re.MULTILINE)} == files
    assert re.findall(r"^RUN (.*)", container, re.MULTILINE) == ["sh /opt/install.sh"]
    assert re.search(r"^%post\n(.*)\n\n", definition, re.MULTILINE)[1].strip() == "sh /opt/install.sh"
    assert '-r "$here/requirements.txt" -c "$here/constraints.txt"' in installed
    named = set(re.findall(r"[\w-]+", " ".join(code_of(text) for text in (container, definition, installed))))
    assert not named & (set(CONSTRAINTS) - {"pip", "setuptools"})


def code_of(text):
    return "\n".join(line for line in text.splitlines() if not line.startswith("#"))


def test_both_images_stand_on_the_same_system():
    container, definition = ((ROOT / "envs" / name).read_text() for name in ("Containerfile", "dmir.def"))
    (base,) = re.findall(r"^ARG BASE=(\S+)$", container, re.MULTILINE)
    assert re.findall(r"^From: (\S+)$", definition, re.MULTILINE) == [base]
    assert "PATH=/opt/dmir/bin:" in container and "PATH=/opt/dmir/bin:" in definition


def test_the_workflow_names_the_image_that_the_documented_command_makes():
    (image,) = re.findall(r'^container: "(.+)"$', (ROOT / "Snakefile").read_text(), re.MULTILINE)
    build = f"apptainer build {image} envs/dmir.def"
    assert build in (ROOT / "envs" / "dmir.def").read_text()
    assert build in (ROOT / "profiles" / "README.md").read_text()


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
