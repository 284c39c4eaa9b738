"""What there is: found where it stands, told by its own source, and nothing is imported for it."""

import json
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

import dmir
from dmir import registry
from dmir.cli import main
from dmir.config import parse_config
from dmir.config.models import Network
from dmir.errors import InputError
from dmir.report.style import METHOD_COLOURS, METHOD_MARKERS, method_colours, method_markers

# as they have been in every figure so far
COLOURS = {
    **{"affine": "#b3b3b3", "syn": "#000000", "elastix": "#f0e442", "descent": "#882255", "descent-fast": "#ddcc77"},
    **{"greedy": "#332288", "convexadam": "#117733", "voxelmorph": "#56b4e9", "vit_v_net": "#e69f00"},
    **{"transmorph": "#009e73", "xmorpher": "#cc79a7", "transmatch": "#0072b2", "pyramid": "#5b3df4"},
    **{"caml": "#d55e00", "caml-refined": "#8b2500"},
}
MARKERS = dict(zip(COLOURS, "XsdphDH^v<>P8o*", strict=True))

METHOD = '''
"""Moves everything by some voxels along the first axis."""
from types import MappingProxyType

import numpy as np
from pydantic import Field

from dmir.settings import MethodSettings, PairCost

TITLE = "Shift"
PAPER = "Nobody 2026"
COLOUR = "#123456"


class Settings(MethodSettings):
    """One displacement for all voxels."""

    voxels: float = Field(1.0, ge=0)
    """How far."""


def register(moving, fixed, *, voxels=1.0):
    field = np.zeros((3, *fixed.shape), np.float32)
    field[0] = voxels
    return field


def cost(parameters, shape, spacing, measured=MappingProxyType({})):
    return PairCost(1234.0, note="a shift")
'''
NETWORK = '''
"""One convolution."""
import torch
from torch import nn


class Small(nn.Module):
    """One convolution."""

    TITLE = "Small net"
    SHORT_TITLE = "Small"

    def __init__(self, shape, *, width: int = 3):
        super().__init__()
        self.convolution = nn.Conv3d(2, 3, width, padding=width // 2)

    def forward(self, moving, fixed):
        return self.convolution(torch.cat([moving, fixed], 1))
'''
CONFIGURATION = {
    "train_on": "simulated",
    "test_on": ["simulated"],
    "methods": ["affine", "shift", "small"],
    "grid": {"shape": [16, 16, 16], "spacing": 10.0},
    "cohorts": {"simulated": {"source": "simulated", "train": 1, "val": 1, "test": 2}},
    "settings": {"shift": {"voxels": 2}, "small": {"network": {"width": 5}}},
}
ASK = """
import json, sys
from dmir import registry
from dmir.config import ConfigError, parse_config
from dmir.config.documents import json_schema, readme

values = json.loads(sys.argv[1])
configuration = parse_config(values)
found = {"heavy": [name for name in ("torch", "ants", "itk", "matplotlib") if name in sys.modules]}
found["parameters"] = configuration.parameters("shift")
found["schema"] = json_schema()
found["readme"] = readme()
for key, other in (("shift", {"voxel": 2}), ("small", {"network": {"widht": 5}})):
    try:
        parse_config({**values, "settings": {key: other}})
    except ConfigError as error:
        found[f"mistake in {key}"] = error.problems
from dmir.planning.plan import plan
rows = plan(configuration, measured=False).table().set_index(["stage", "what"])
found["plan"] = rows.loc[("register", "shift on simulated"), ["cpu_s", "note"]].tolist()
found["trained"] = int(rows.loc[("train", "small"), "number"])
from dmir.report.names import method_name
from dmir.report.style import method_colours, method_markers
names = ["affine", "shift", "small"]
found["names"] = [method_name(name) for name in names]
found["short"] = [method_name(name, short=True) for name in names]
found["colours"] = method_colours(names)
found["markers"] = {name: marker for name, marker in method_markers(names).items() if name in names}
from dmir.networks import build
found["built"] = build("small", (16, 16, 16)).hyperparameters
from dmir.methods import describe
found["described"] = describe("shift")
print(json.dumps(found))
"""


@pytest.fixture(scope="module")
def found(tmp_path_factory):
    """What a copy of the library with one file more for a method and one for a network says."""
    copy = tmp_path_factory.mktemp("copy") / "dmir"
    shutil.copytree(Path(dmir.__file__).parent, copy, ignore=shutil.ignore_patterns("__pycache__"))
    shutil.copytree(Path(dmir.__file__).parents[2] / "resources", copy / "resources")
    (copy / "methods" / "shift.py").write_text(METHOD)
    (copy / "networks" / "small.py").write_text(NETWORK)
    done = subprocess.run(
        [sys.executable, "-c", ASK, json.dumps(CONFIGURATION)],
        env={"PYTHONPATH": str(copy.parent), "OMP_NUM_THREADS": "1"},
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0, done.stderr
    return json.loads(done.stdout.splitlines()[-1])


def test_a_method_is_one_file_and_nothing_else(found):
    assert found["parameters"] == {"voxels": 2.0}
    assert found["mistake in shift"] == ["settings.shift.voxel: found an unknown key. Did you mean 'voxels'?"]
    schemas = json.loads(found["schema"])["properties"]["settings"]["additionalProperties"]["anyOf"]
    (own,) = [one for one in schemas if one["title"] == "shift"]
    assert own["properties"]["voxels"]["description"] == "How far." and own["properties"]["voxels"]["minimum"] == 0
    assert "## `settings.<name>` of `shift`\n\nOne displacement for all voxels." in found["readme"]
    seconds, note = found["plan"]
    assert seconds == pytest.approx(1234, abs=1) and note == "a shift"
    assert found["described"] == "shift(voxels=1.0)"


def test_a_network_is_one_file_and_nothing_else(found):
    assert "settings.small: network.widht: small has no such hyperparameter. Did you mean 'width'?" in str(
        found["mistake in small"]
    )
    assert "- `small`: `width`\n" in found["readme"]
    assert found["trained"] > 0
    assert found["built"] == {"width": 3}


def test_tables_and_legends_have_their_titles_and_colours(found):
    assert found["names"] == ["Affine only", "Shift", "Small net"]
    assert found["short"] == ["Affine only", "Shift", "Small"]
    assert found["colours"]["shift"] == "#123456"
    assert found["colours"]["affine"] == COLOURS["affine"]
    assert found["colours"]["small"] not in [*COLOURS.values(), "#123456"]
    assert found["markers"]["affine"] == "X" and found["markers"]["small"] not in MARKERS.values()


def test_a_configuration_is_parsed_without_torch(found):
    assert found["heavy"] == []


def test_every_method_and_network_that_is_built_in_tells_of_itself():
    code = (
        "import sys; from dmir import registry; "
        "models = [registry.settings_model(name) for name in registry.names('method')]; "
        "registry.built_in_facts(); "
        "print([name for name in ('torch', 'ants', 'itk', 'SimpleITK', 'matplotlib') if name in sys.modules])"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "[]"
    for name, facts in registry.built_in_facts().items():
        assert facts.title != name, f"{name} has no title"
    assert {"syn", "command", "refinement"} <= set(registry.names("method"))
    assert len(registry.names("network")) == 7


def test_colours_and_markers_of_what_is_known_never_change():
    assert COLOURS == METHOD_COLOURS
    assert MARKERS == METHOD_MARKERS


def test_a_colour_that_is_taken_is_not_given_twice(monkeypatch):
    wanted = {"mine": COLOURS["syn"], "yours": "#abcdef", "theirs": "#abcdef"}
    monkeypatch.setattr(registry, "colour", lambda name: wanted.get(name))
    colours = method_colours(["syn", "mine", "yours", "theirs"])
    assert len(set(colours.values())) == 4
    assert colours["syn"] == COLOURS["syn"] and colours["theirs"] == "#abcdef"  # the first in the alphabet
    markers = method_markers(["syn", "mine", "yours", "theirs"])
    assert len({markers[name] for name in ("syn", "mine", "yours", "theirs")}) == 4


@pytest.mark.parametrize(
    ("file", "name", "words"),
    [
        (None, "nowhere.py:Net", "no file nowhere.py in"),
        ("class Net: pass", "mine.py:Nte", "Did you mean 'Net'?"),
        ("class Net: pass", "mine.py", "no class and no function 'register'"),
        ("", "mine.py:Net", "no class and no function 'Net'"),
        ("class Net(:", "mine.py:Net", "no Python"),
    ],
    ids=["no file", "spelling", "no register", "empty", "no Python"],
)
def test_a_door_that_leads_nowhere_is_told(file, name, words, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    if file is not None:
        Path("mine.py").write_text(file)
    with pytest.raises(InputError, match=words):
        registry.find(name)
    values = {**CONFIGURATION, "methods": ["affine", "x"], "settings": {"x": {"algorithm": name}}}
    with pytest.raises(Exception, match=rf"(?s)settings\.x: .*{words}"):
        parse_config(values)
    assert main(["methods", name]) == 1
    assert words in capsys.readouterr().err


FUNCTION = """
raise SystemExit("this ran")
STEP = 2.0
def nudge(moving, fixed, *, far: float = 1, how: str = "up", step=STEP, times=(1, 2), seen=None): ...
"""


def test_what_a_file_can_be_set_to_is_read_and_not_run(tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    Path("mine.py").write_text(FUNCTION)
    settings = {"mine": {"algorithm": "mine.py:nudge", "far": 2, "times": [3]}}
    configuration = parse_config({**CONFIGURATION, "methods": ["mine"], "settings": settings})
    assert configuration.parameters("mine") == {"far": 2.0, "times": [3]}  # the rest has the function's own defaults
    for wrong, words in (
        ({"fra": 1}, "Did you mean 'far'?"),
        ({"far": "much"}, "valid number"),
        ({"seen": 1}, "unknown"),
    ):
        with pytest.raises(Exception, match=words):
            parse_config(
                {**CONFIGURATION, "methods": ["mine"], "settings": {"mine": {"algorithm": "mine.py:nudge", **wrong}}}
            )
    assert main(["methods", "mine.py:nudge"]) == 0
    assert "far: float = 1" in capsys.readouterr().out


def test_a_network_of_a_file_has_its_hyperparameters(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    Path("net.py").write_text("raise SystemExit('this ran')\n" + NETWORK)
    settings = {"net": {"algorithm": "net.py:Small", "network": {"width": 3}}}
    configuration = parse_config({**CONFIGURATION, "methods": ["net"], "settings": settings})
    assert isinstance(configuration.method("net"), Network) and configuration.network_of("net") == "net"
    with pytest.raises(Exception, match="Did you mean 'width'"):
        parse_config(
            {**CONFIGURATION, "methods": ["net"], "settings": {"net": {**settings["net"], "network": {"with": 1}}}}
        )


def test_the_list_says_where_each_is_from(capsys):
    assert main(["methods"]) == 0
    lines = capsys.readouterr().out.splitlines()
    assert any(line.split() == ["syn", "SyN", "built", "in"] for line in lines)
    assert any(line.split()[:2] == ["voxelmorph", "VoxelMorph"] for line in lines)
    assert main(["methods", "elastix"]) == 0
    told = capsys.readouterr().out
    assert "Klein et al. 2010" in told and "samples: integer ≥ 100; default 2048." in told
    assert main(["methods", "elastics"]) == 1
    assert "Did you mean 'elastix'?" in capsys.readouterr().err
