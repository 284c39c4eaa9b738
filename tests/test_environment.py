"""What is installed, in one place and the same everywhere."""

import re
import subprocess
import sys
import tomllib
from importlib.metadata import files, requires
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


# what pip may resolve (pyproject.toml, conda), and what is installed one by one: Elastix with so much of ITK as it uses
RESOLVED = (direct("requirements.txt") - {"itk-core"}) | direct("requirements-elastix.txt")


def test_elastix_and_its_itk_are_of_the_versions_that_go_together():
    named = pins((ROOT / "requirements-elastix.txt").read_text().splitlines())
    assert named == {"itk-elastix": CONSTRAINTS["itk-elastix"]}
    assert CONSTRAINTS["itk-core"] == CONSTRAINTS["itk"]
    assert Version(CONSTRAINTS["itk"]) in SpecifierSet(
        next(r for r in requires("itk-elastix") if r.startswith("itk"))[3:]
    )


def test_elastix_needs_no_library_of_itk_but_the_core():
    code = (
        "from itk.itkElastixRegistrationMethodPython import itkElastixRegistrationMethodIF3IF3;"
        "from itk.itkTransformixFilterPython import itkTransformixFilterIF3;"
        "from itk.elxParameterObjectPython import elastixParameterObject;"
        "print(*{line.split()[-1] for line in open('/proc/self/maps') if '/itk/' in line})"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    core = {str(path.locate()) for name in ("itk-core", "itk-elastix") for path in files(name)}
    assert done.stdout.split() and {*done.stdout.split()} <= core


def test_conda_environments_agree_with_the_constraints():
    paths = list((ROOT / "envs").glob("*.yaml"))
    assert paths
    for path in paths:
        packages = yaml.safe_load(path.read_text())["dependencies"][-1]["pip"]
        for name, version in pins(packages).items():
            assert CONSTRAINTS[name] == version, f"{path.name}: {name}"
        assert set(pins(packages)) == RESOLVED


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
    files = {"envs/install.sh", "requirements.txt", "requirements-elastix.txt", "constraints.txt"}
    assert {*re.search(r"^COPY (.*) /opt/$", container, re.MULTILINE)[1].split()} == files
    copied = re.search(r"^%files\n(.*?)\n\n", definition, re.MULTILINE | re.DOTALL)[1]
    assert {*re.findall(r"^    (\S+) /opt/\S+$", copied, re.MULTILINE)} == files
    assert re.findall(r"^RUN (.*)", container, re.MULTILINE) == ["sh /opt/install.sh"]
    assert re.search(r"^%post\n(.*)\n\n", definition, re.MULTILINE)[1].strip() == "sh /opt/install.sh"
    assert '-r "$here/requirements.txt" -c "$here/constraints.txt"' in installed
    assert '--no-deps -r "$here/requirements-elastix.txt"' in installed
    named = set(re.findall(r"[\w-]+", " ".join(code_of(text) for text in (container, definition, installed))))
    named -= {"requirements-elastix"}
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
    assert declared == RESOLVED


def test_constraints_name_no_place_and_no_build():
    text = (ROOT / "constraints.txt").read_text()
    assert "@" not in text and "://" not in text and "+cpu" not in text


def test_the_rule_graph_of_the_documentation_is_the_workflows():
    graph = re.search(r"```mermaid\n(.*?)```", (ROOT / "docs" / "workflow.md").read_text(), re.DOTALL)
    assert graph is not None
    script = ROOT / "workflow" / "rulegraph.py"
    printed = subprocess.run([sys.executable, script], capture_output=True, text=True, check=True).stdout
    arrows = re.findall(r"(\w+) --> (\w+)", printed)
    boxes = re.findall(r"^    (\w+)\[", printed, re.MULTILINE)
    assert len(boxes) == 7 and {name for arrow in arrows for name in arrow} == set(boxes)
    assert ("preprocess", "train") in arrows and ("train", "preprocess") not in arrows
    assert graph[1] == printed, "run `make graph` and put what it prints into docs/workflow.md"


def test_commands_of_the_documentation_name_targets_first():
    """Snakemake takes what follows --configfile for another configuration, and what follows --config for a value."""
    snakefile = (ROOT / "Snakefile").read_text()
    targets = set(re.findall(r"^rule (\w+):", snakefile, re.MULTILINE)) - {"all"}
    assert {"preprocess_all", "ablation"} <= targets
    kinds = ("*.md", "*.yaml", "*.yml", "*.rst", "*.j2", "*.py", "*.smk", "Makefile", "Snakefile")
    folders = ("docs", "profiles", "config", "benchmarks", "envs", "resources", "rules", "workflow", "src", ".github")
    files = [path for folder in folders for kind in kinds for path in (ROOT / folder).rglob(kind)]
    found = 0
    for path in [ROOT / "README.md", ROOT / "CONTRIBUTING.md", ROOT / "Makefile", *files]:
        text = path.read_text(encoding="utf-8").replace("\\\n", " ")
        spans = re.findall(r"`([^`]+)`", re.sub(r"```.*?```", "", text, flags=re.DOTALL))
        lines = [line.split("`")[0] for line in text.splitlines()]
        for words in (part.split("snakemake ")[1].split() for part in (*spans, *lines) if "snakemake " in part):
            first_option = next((place for place, word in enumerate(words) if word.startswith("-")), len(words))
            late = [word for word in words[first_option:] if word in targets]
            assert not late, f"{path.relative_to(ROOT)}: snakemake {' '.join(words)}: {late} after an option"
            found += any(word in targets for word in words)
    assert found >= 4, "the documentation names targets, and this test finds them"


def test_every_commit_is_checked_by_what_make_check_runs():
    makefile = (ROOT / "Makefile").read_text()
    checks = re.search(r"^check: .*\n((?:\t.*\n)+)", makefile, re.MULTILINE)[1]
    hooks = yaml.safe_load((ROOT / ".pre-commit-config.yaml").read_text())["repos"][0]["hooks"]
    entries = " ".join(hook["entry"].replace("--force-exclude", "") for hook in hooks)
    for line in checks.strip().splitlines():
        words = line.strip().replace("$(BIN)", ".venv/bin").removesuffix(" .")
        assert words in entries, words


def test_hosted_checks_run_every_python_that_the_project_allows_and_only_targets_that_there_are():
    jobs = yaml.safe_load((ROOT / ".github" / "workflows" / "ci.yml").read_text())["jobs"]
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    allowed = SpecifierSet(project["requires-python"])
    pythons = jobs["library"]["strategy"]["matrix"]["python"]
    assert pythons == [f"3.{minor}" for minor in range(30) if f"3.{minor}" in allowed]
    commands = [step["run"] for job in jobs.values() for step in job["steps"] if "run" in step]
    targets = set(re.findall(r"^([.\w/-]+):", (ROOT / "Makefile").read_text(), re.MULTILINE))
    assert {words.split()[1] for words in commands if words.startswith("make ")} <= targets
    tested = (ROOT / "Makefile").read_text()
    assert all(mark in tested for mark in re.findall(r'-m "?([^"]+)"?', " ".join(commands)))
