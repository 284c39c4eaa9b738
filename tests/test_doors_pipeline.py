"""Somebody else's methods through the whole pipeline: of an installed package, of a file, any program, fields alone."""

import os
import re
import subprocess
import sys

import numpy as np
import pandas as pd
import pytest
from workflow_runs import checkout, jobs, snakemake

from dmir.cohorts import scan_table
from dmir.cohorts.pairs import registration_pairs
from dmir.config import parse_config

pytestmark = pytest.mark.pipeline

PACKAGE = {
    "pyproject.toml": """
[build-system]
requires = ["setuptools"]
build-backend = "setuptools.build_meta"

[project]
name = "tiny-registration"
version = "0.3"

[project.entry-points."dmir.networks"]
tinynet = "tiny_registration.network:TinyNet"

[project.entry-points."dmir.methods"]
nudge = "tiny_registration.nudge"

[tool.setuptools]
packages = ["tiny_registration"]
""",
    "tiny_registration/__init__.py": "",
    "tiny_registration/network.py": '''
import torch
from torch import nn


class TinyNet(nn.Module):
    """Two convolutions."""

    TITLE = "Tiny net"
    COLOUR = "#6a3d9a"

    def __init__(self, shape, *, channels: int = 4):
        super().__init__()
        self.first = nn.Conv3d(2, channels, 3, padding=1)
        self.last = nn.Conv3d(channels, 3, 3, padding=1)

    def forward(self, moving, fixed):
        return self.last(torch.relu(self.first(torch.cat([moving, fixed], dim=1))))
''',
    "tiny_registration/nudge.py": '''
import numpy as np

from dmir.settings import MethodSettings

TITLE = "Nudge"


class Settings(MethodSettings):
    """The same small step everywhere."""

    far: float = 0.1
    """Voxels."""


def register(moving, fixed, *, far=0.1):
    return np.full((3, *fixed.shape), far, dtype=np.float32)
''',
}
NETWORK = '''
import torch
from torch import nn


class Mine(nn.Module):
    """One convolution."""

    def __init__(self, shape, *, width: int = 3):
        super().__init__()
        self.convolution = nn.Conv3d(2, 3, width, padding=width // 2)

    def forward(self, moving, fixed):
        return self.convolution(torch.cat([moving, fixed], dim=1))
'''
NO_NETWORK = NETWORK.replace("class Mine", "class Broken").replace("dim=1))", "dim=1))[:, :2]")
PROGRAM = '''
"""Gives no displacement; the first time that it is called it fails."""
import os
import sys
from pathlib import Path

import nibabel as nib
import numpy as np

moving, fixed, field = sys.argv[1:]
called = Path(os.environ["CALLED"])
print("looks at", moving)
if not called.exists():
    called.touch()
    sys.exit("I do not like this scan")
np.save(field, np.zeros((*nib.load(fixed).shape, 3), np.float32))
'''
BROKEN = ["broken", "broken-refined"]
METHODS = ["affine", "tinynet", "nudge", "mine", "program", "theirs", *BROKEN]
CONFIGURATION = {
    "train_on": "simulated",
    "test_on": ["simulated"],
    "methods": METHODS,
    "grid": {"shape": [32, 40, 32], "spacing": 6.0},
    "cohorts": {"simulated": {"source": "simulated", "train": 1, "val": 1, "test": 2}},
    "scores": {"label_interpolation": ["nearest"], "inverse_consistency": False},
    "preprocess": {"affine": False, "bias_correction": False},
    "report": {"planes": ["axial"]},
    "training": {"steps": 4, "validate_every": 2, "window": 5},
    "settings": {
        "nudge": {"far": 0.2},
        "mine": {"algorithm": "mine.py:Mine", "network": {"width": 5}},
        "broken": {"algorithm": "broken.py:Broken"},
        "broken-refined": {"algorithm": "refinement", "of": "broken"},
        "program": {
            "algorithm": "command",
            "arguments": ["{python}", "program.py", "{moving}", "{fixed}", "{field}"],
            "file": "field.npy",
            "field": "voxels",
        },
        "theirs": {"algorithm": "fields", "folder": "theirs", "pattern": "{moving}__{fixed}.npy", "field": "voxels"},
    },
}


@pytest.fixture(scope="module")
def package(tmp_path_factory):
    """A folder into which pip has installed a package with entry points; the environment of the tests is left alone."""
    source, target = tmp_path_factory.mktemp("package"), tmp_path_factory.mktemp("site")
    for name, text in PACKAGE.items():
        (source / name).parent.mkdir(exist_ok=True)
        (source / name).write_text(text)
    pip = [sys.executable, "-m", "pip", "install", "--quiet", "--no-deps", "--no-build-isolation", "--no-index"]
    subprocess.run([*pip, "--disable-pip-version-check", "--target", target, source], check=True, cwd=source)
    return target


@pytest.fixture(scope="module")
def finished(package, tmp_path_factory):
    """A run to its end, with fields of `theirs` that are as long as a voxel along the second axis."""
    folder = tmp_path_factory.mktemp("doors")
    program = {**CONFIGURATION["settings"]["program"], "environment": {"CALLED": str(folder / "called")}}
    settings = {**CONFIGURATION["settings"], "program": program}
    checkout(folder, {**CONFIGURATION, "settings": settings})
    (folder / "mine.py").write_text(NETWORK)
    (folder / "broken.py").write_text(NO_NETWORK)
    (folder / "program.py").write_text(PROGRAM)
    (folder / "theirs").mkdir()
    simulated = {**CONFIGURATION, "methods": ["affine"], "settings": {}}
    listing = parse_config(simulated).scan_parameters("simulated")
    for moving, fixed in registration_pairs(scan_table(**listing), listing["pairs"]):
        field = np.zeros((32, 40, 32, 3), np.float32)
        field[..., 1] = 1
        np.save(folder / "theirs" / f"{moving}__{fixed}.npy", field)
    snakemake(folder, **seen_by(folder, package))
    return folder


def seen_by(folder, package):
    """Return where Python finds the library of the copy, before any other one, and the package."""
    return {"PYTHONPATH": os.pathsep.join([str(folder / "src"), str(package)])}


def test_each_has_its_row_and_a_failed_pair_is_told(finished):
    tables = finished / "results" / "tables"
    table = pd.read_csv(tables / "comparison.csv").set_index("method")
    assert list(table.index) == METHODS
    assert table["n"].to_dict() == {**dict.fromkeys(METHODS, 2), "program": 1, **dict.fromkeys(BROKEN, 0)}
    assert table["failed"].to_dict() == {**dict.fromkeys(METHODS, 0), "program": 1, **dict.fromkeys(BROKEN, 2)}
    assert (table["dice"].drop(BROKEN) > 0.2).all() and table["dice"][BROKEN].isna().all()
    assert table.loc["program", "nonpositive_jacobian_forward"] == 0
    assert table.loc["theirs", "dice"] < table.loc["affine", "dice"]  # 6 mm beside it
    failures = pd.read_csv(tables / "failures.csv").astype(str)
    assert "program" in set(failures["method"])
    assert failures.to_csv().count("ended with status 1: I do not like this scan") == 1


def test_a_class_that_is_no_network_is_a_failed_row_and_the_table_goes_on(finished):
    words = "settings.broken, broken.py:Broken: found a field of the shape (1, 2, 32, 40, 32)"
    failures = pd.read_csv(finished / "results/tables/failures.csv").astype(str)
    told = failures[failures["method"].isin(BROKEN)]
    assert len(told) and told.to_csv().count(words) == len(told)
    trainings = finished / "results/tables/trainings_simulated.md"
    assert f"The training of broken/seed1 failed: {words}" in trainings.read_text()
    log = finished / "results/logs/train/simulated/broken/seed1.log"
    assert words in log.read_text()
    assert not list((finished / "results/models").glob("**/*.ckpt"))


def test_seconds_and_memory_are_measured_and_what_a_program_said_is_in_the_log(finished):
    records = [pd.read_csv(path) for path in (finished / "results/registered/simulated/program/none").glob("*.csv")]
    scored = pd.concat(records).query("status == 'ok'")
    assert (scored["seconds"] > 0.05).all() and (scored["peak_memory_mb"] > 20).all()
    (log,) = (finished / "results/logs/register_classical/simulated/program").glob("**/*.log")
    assert "looks at" in log.read_text() and "I do not like this scan" in log.read_text()


def test_both_networks_were_trained_and_all_are_in_the_report(finished):
    for name in ("tinynet", "mine"):
        assert (finished / f"results/models/simulated/{name}/seed1/model.safetensors").is_file()
    markdown = (finished / "results/tables/comparison.md").read_text()
    page = (finished / "results/report.html").read_text()
    for name in ("Tiny net", "Nudge", "mine", "program", "theirs"):
        assert name in markdown and name in page
    legend = (finished / "results/figures/dice_by_structure_simulated.svg").read_text()
    assert "Tiny net" in legend and "#6a3d9a" in legend


def planned_methods(text):
    """Return (rule, method) of every training and registration that a dry run would do."""
    found = re.findall(r"rule (train|register_\w+):\n(?:    .*\n)*?    wildcards: .*\bmethod=([\w-]+)", text)
    return sorted(found)


def test_a_change_reruns_that_method_only(finished, package):
    """A file of each door is changed; nothing of another method is done again."""
    environment = seen_by(finished, package)
    assert "Nothing to be done" in snakemake(finished, "-n", **environment)
    nudge, network = (package / "tiny_registration" / name for name in ("nudge.py", "network.py"))
    mine, program = finished / "mine.py", finished / "program.py"
    changes = {
        (mine, nudge): [("register_classical", "nudge"), ("register_network", "mine"), ("train", "mine")],
        (program, network): [("register_classical", "program"), ("register_network", "tinynet"), ("train", "tinynet")],
    }
    for paths, expected in changes.items():
        before = {path: path.read_text() for path in paths}
        try:
            for path, text in before.items():
                path.write_text(text + "\nCHANGED = True\n")
            planned = snakemake(finished, "-n", **environment)
        finally:
            for path, text in before.items():
                path.write_text(text)
        assert planned_methods(planned) == expected
        assert not [rule for rule in jobs(planned) if rule.startswith("preprocess_scans")]
