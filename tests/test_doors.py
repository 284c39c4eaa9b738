"""Three doors for somebody else's method, and what goes wrong behind each: one message, and the other pairs go on."""

import importlib.util
import json
import logging
import os
import re
import shutil
import stat
import sys
import time
from pathlib import Path

import numpy as np
import pytest
import torch
import yaml

from dmir import provenance, registry
from dmir.cli import main
from dmir.config import parse_config
from dmir.errors import DmirError, InputError, StorageError
from dmir.fields import load_field, save_field, warp
from dmir.methods import command, fields, isolated
from dmir.methods.isolated import register_isolated, register_pairs
from dmir.methods.network import register_pairs as register_with_network
from dmir.networks import build
from dmir.preprocess import write_affine
from dmir.report.curves import read_history
from dmir.training.failure import failure_kept
from dmir.training.loop import train
from dmir.training.objective import NoNetwork, displacement_of
from dmir.training.pack import Scan
from dmir.training.weights import load_weights, save_weights
from dmir.transforms import CONVENTIONS, write
from dmir.transforms.transform import Field
from dmir.trying import balls
from dmir.volumes import Grid, write_volume

ROOT = Path(__file__).parents[1]
SHAPE = (20, 24, 22)
MINIMAL = {
    "train_on": "simulated",
    "test_on": ["simulated"],
    "cohorts": {"simulated": {"source": "simulated", "train": 1, "val": 1, "test": 2}},
    "grid": {"shape": [16, 16, 16], "spacing": 10.0},
}


@pytest.fixture
def pair(tmp_path, monkeypatch):
    """Two images in files, in the folder that a command is started in; the fixed one is the moving one a voxel on."""
    monkeypatch.chdir(tmp_path)
    paths = []
    for name, volume in zip(("moving", "fixed"), balls(SHAPE), strict=True):
        paths.append(tmp_path / f"{name}.nii")
        write_volume(paths[-1], volume)
    return paths


def registered(pair, algorithm, parameters, **options):
    record = register_isolated(*pair, Path("out.nii"), algorithm, parameters, **{"timeout": 60, **options})
    assert Path("out.nii").exists() == (record["status"] == "ok")
    return record


def answered(pair, algorithm, parameters):
    """As :func:`registered`, in this very process, which is quicker: the reason of a failure, "" for none."""
    request = {"method": algorithm, "parameters": parameters, "field": str(Path("out.nii").absolute()), "names": {}}
    request |= {"moving": str(pair[0]), "fixed": str(pair[1]), "limit": 60, "cut_planes": [[], []]}
    try:
        isolated._answer(request)
    except isolated.Unable:
        raise
    except DmirError as error:
        return str(error)
    return ""


# --- a file ---

FUNCTION = '''
import numpy as np

from helper import FAR


def shift(moving, fixed, *, far: float = FAR):
    """Return the same displacement everywhere."""
    field = np.zeros((3, *fixed.shape), dtype=np.float32)
    field[0] = far
    return field
'''


def test_a_function_of_a_file_registers(pair):
    Path("mine.py").write_text(FUNCTION)
    Path("helper.py").write_text("FAR = -1.0\n")
    record = registered(pair, "mine.py:shift", {})
    assert (record["status"], record["reason"]) == ("ok", "")
    assert record["seconds"] >= 0 and record["peak_memory_mb"] > 20
    displacement, _ = load_field("out.nii")
    assert np.allclose(displacement[0], -1) and not displacement[1:].any()
    assert answered(pair, "mine.py:shift", {"far": 2.0}) == ""
    assert np.allclose(load_field("out.nii")[0][0], 2)
    assert answered(pair, "refinement", {"of": {"algorithm": "mine.py:shift"}, "stages": []}) == ""


@pytest.mark.parametrize(
    ("body", "reason"),
    [
        ("return np.zeros(fixed.shape, np.float32)", "the field has the shape (20, 24, 22); expected an array of"),
        ("return np.zeros((3, *fixed.shape), int)", "the field is of int64; expected an array"),
        ("return np.full((3, *fixed.shape), np.nan)", "values that are NaN or infinite"),
        ("return [1, 2]", "the method returned list; expected an array"),
        ("moving.data[:] = 0; return np.zeros((3, *fixed.shape))", "changes the images that it is given"),
        ("raise KeyError('no such thing')", "KeyError: 'no such thing'"),
        ("open('/nowhere/at/all')", "FileNotFoundError: [Errno 2] No such file"),
        ("raise MemoryError('much')", "MemoryError: much"),
    ],
    ids=["shape", "type", "NaN", "list", "moves inputs", "exception", "OSError", "memory"],
)
def test_what_goes_wrong_in_a_function_is_one_line(body, reason, pair):
    Path("mine.py").write_text(f"import numpy as np\ndef register(moving, fixed):\n    {body}\n")
    told = answered(pair, "mine.py", {})
    assert reason in told and "\n" not in told


def test_a_function_that_crashes_or_hangs_is_a_failed_pair(pair):
    Path("mine.py").write_text("import os\ndef register(moving, fixed):\n    os.kill(os.getpid(), 11)\n")
    assert registered(pair, "mine.py", {})["reason"] == "killed by SIGSEGV"
    Path("mine.py").write_text("import time\ntime.sleep(99)\ndef register(moving, fixed): ...\n")
    assert registered(pair, "mine.py", {}, timeout=2)["reason"] == "stopped after 2 s"


def test_a_file_that_cannot_be_imported_is_a_failed_pair_and_what_it_said_is_in_the_log(pair, caplog):
    Path("mine.py").write_text("print('hello from mine')\nimport nothing_of_this_name\ndef register(m, f): ...\n")
    with caplog.at_level(logging.INFO):
        record = registered(pair, "mine.py", {})
    assert record["status"] == "failed"
    assert "cannot be imported (ModuleNotFoundError: No module named 'nothing_of_this_name')" in record["reason"]
    assert any("hello from mine" in line.getMessage() for line in caplog.records)


# --- a network of a file ---

NETWORK = """
import torch
from torch import nn


class Net(nn.Module):
    TITLE = "Mine"

    def __init__(self, shape, *, channels: int = 2):
        super().__init__()
        self.convolution = nn.Conv3d(2, 3, 3, padding=1)

    def forward(self, moving, fixed):
        field = self.convolution(torch.cat([moving, fixed], 1))
        {body}
"""


def network(body="return field"):
    Path("net.py").write_text(NETWORK.format(body=body))
    for name in [name for name in sys.modules if name.startswith("dmir_file_net")]:
        del sys.modules[name]
    return build("net.py:Net", SHAPE)


def test_a_network_of_a_file_is_built_and_kept(pair, tmp_path):
    net = network()
    assert net.hyperparameters == {"channels": 2}
    grid = Grid(SHAPE, np.eye(4))
    save_weights("net.safetensors", net, name="net.py:Net", hyperparameters=net.hyperparameters, grid=grid)
    again, _ = load_weights("net.safetensors", expected={"network": "net.py:Net"})
    assert torch.equal(again.convolution.weight, net.convolution.weight)


def test_weights_never_name_code_to_run(pair):
    net = network()
    Path("net.py").write_text("open('ran', 'w')\n" + NETWORK.format(body="return field"))
    for name in [name for name in sys.modules if name.startswith("dmir_file_net")]:
        del sys.modules[name]
    save_weights("net.safetensors", net, name="net.py:Net", hyperparameters={}, grid=Grid(SHAPE, np.eye(4)))
    for expected in (None, {"network": "voxelmorph"}):
        with pytest.raises(InputError, match=r"net\.py:Net"):
            load_weights("net.safetensors", expected=expected)
    assert not Path("ran").exists()


NO_NETWORKS = [
    ("return field[:, :1]", r"a field of the shape (1, 1, 20, 24, 22); expected a float32 tensor (1, 3, 20, 24, 22)"),
    ("return moving, field", "found tuple"),
    ("return field.double()", "a field of torch.float64"),
    ("moving.mul_(2); return field", "one that changes the images that it is given"),
]


@pytest.mark.parametrize(("body", "words"), NO_NETWORKS, ids=["shape", "tuple", "type", "moves inputs"])
def test_a_class_that_is_no_network_is_told(body, words, pair):
    images = [torch.from_numpy(volume.data)[None, None] for volume in balls(SHAPE)]
    for mode in (torch.inference_mode, torch.enable_grad):
        with mode(), pytest.raises(NoNetwork, match=re.escape(words)):
            displacement_of(network(body), *images, "float32")


@pytest.mark.parametrize(
    ("body", "words"),
    [*NO_NETWORKS, ("return field * float('nan')", "NaN or infinite"), ("raise KeyError(1)", "KeyError: 1")],
    ids=["shape", "tuple", "type", "moves inputs", "NaN", "exception"],
)
def test_each_pair_of_a_class_that_is_no_network_has_failed(body, words, pair):
    net, grid = network(body), Grid(SHAPE, np.eye(4))
    save_weights("net.safetensors", net, name="net.py:Net", hyperparameters=net.hyperparameters, grid=grid)
    pairs = [("a", pair[0], "b", pair[1]), ("b", pair[1], "a", pair[0])]
    expected = {"network": "net.py:Net", "hyperparameters": {}, "grid": {"shape": SHAPE}}
    Path("fields").mkdir()
    records = register_with_network(pairs, "fields", "net.safetensors", "cpu", warmup=False, expected=expected)
    assert records["status"].tolist() == ["failed", "failed"]
    assert all(words in reason for reason in records["reason"])


@pytest.mark.parametrize(
    ("source", "words"),
    [
        ("class Net: pass", "found no network; expected a torch.nn.Module"),
        ("from torch import nn\nclass Net(nn.Module):\n    def __init__(self): pass", "cannot be built (TypeError"),
        ("1 / 0\nclass Net: pass", "cannot be imported (ZeroDivisionError"),
        ("def Net(moving, fixed): ...", "expected a known network"),
    ],
)
def test_a_class_that_cannot_be_built_is_told(source, words, pair):
    Path("other.py").write_text(source)
    for name in [name for name in sys.modules if name.startswith("dmir_file_other")]:
        del sys.modules[name]
    with pytest.raises(InputError, match=re.escape(words)):
        build("other.py:Net", SHAPE)


@pytest.mark.parametrize(
    ("body", "words"),
    [
        ("return field[:, :1]", "a field of the shape"),
        ("return field * float('nan')", "is nan"),
        ("return 1 / 0", "ZeroDiv"),
    ],
)
def test_its_training_leaves_the_reason_in_the_place_of_a_model(body, words, pair, tmp_path):
    network(body)
    grid, settings = Grid(SHAPE, np.eye(4)), {"steps": 2, "validate_every": 1}
    scans = [Scan("a", pair[0]), Scan("b", pair[1])]
    kept = {"cohort": "toy", "seed": 1, "settings": settings}
    output = tmp_path / "model"
    with failure_kept("net.py:Net", {}, grid, output, **kept):
        train("net.py:Net", {}, scans[:1], [], scans[1:], output=output, method="mine", device="cpu", **settings)
    assert sorted(path.name for path in output.iterdir() if path.is_file()) == [
        "history.csv",
        "model.safetensors",
        "training.json",
    ]
    with pytest.raises(InputError, match="no weights, because the training failed: ") as error:
        load_weights(output / "model.safetensors", expected={"network": "net.py:Net"})
    assert words in str(error.value) and words in json.loads((output / "training.json").read_text())["failed"]
    Path("fields").mkdir()
    pairs = [("a", pair[0], "b", pair[1])]
    records = register_with_network(
        pairs, "fields", output / "model.safetensors", "cpu", expected={"network": "net.py:Net"}
    )
    assert records["status"].tolist() == ["failed"] and words in records["reason"][0]
    assert read_history(output / "history.csv").empty


def test_what_is_not_the_networks_fault_ends_the_training(pair, tmp_path):
    network("return field")
    grid, kept = Grid(SHAPE, np.eye(4)), {"cohort": "toy", "seed": 1, "settings": {}}
    file, disk = InputError("a.nii", found="b", expected="c"), StorageError("x", reason="full", remedy="")
    for error in (file, disk, MemoryError()):
        with pytest.raises(type(error)), failure_kept("net.py:Net", {}, grid, tmp_path / "model", **kept):
            raise error
    greedy = network("torch.empty(10**15)")
    with pytest.raises(RuntimeError, match="allocat"), failure_kept("net.py:Net", {}, grid, tmp_path / "model", **kept):
        greedy(*torch.zeros(2, 1, 1, *SHAPE))
    with pytest.raises(ZeroDivisionError), failure_kept("voxelmorph", {}, grid, tmp_path / "model", **kept):
        raise ZeroDivisionError
    assert not (tmp_path / "model").exists()


# --- any program ---

SHIFT = """
import sys
from pathlib import Path

import nibabel as nib
import numpy as np

print("arguments", *sys.argv[1:])
field = np.zeros((*nib.load(sys.argv[1]).shape, 3), np.float32)
field[..., 0] = -1
np.save(sys.argv[2], field)
"""


def program(source, *arguments, **settings):
    Path("program.py").write_text(source)
    model = registry.settings_model("command")
    words = ["{python}", "program.py", *arguments]
    return model(algorithm="command", arguments=words, file="f.npy", field="voxels", **settings).parameters()


def test_a_program_registers_and_its_time_and_memory_are_its_own(pair, caplog):
    slow = SHIFT + "import time\nheld = np.ones(40_000_000)\ntime.sleep(0.5)\nprint(held.sum())\n"
    parameters = program(slow, "{fixed}", "{field}", "{threads}", "{seed}", "{folder}", threads=2, seed=7)
    with caplog.at_level(logging.INFO):
        record = registered(pair, "command", parameters, threads=2)
    assert (record["status"], record["reason"]) == ("ok", "")
    displacement, affine = load_field("out.nii")
    assert np.allclose(displacement[0], -1) and not displacement[1:].any() and np.allclose(affine, np.eye(4))
    assert 0.5 < record["seconds"] < 30
    assert 320 < record["peak_memory_mb"] < 900
    (said,) = [line.getMessage() for line in caplog.records if "arguments" in line.getMessage()]
    words = re.search(r"arguments (.*)", said)[1].split()
    assert words[2:4] == ["2", "7"] and words[4] == str(Path(words[1]).parent)
    assert not Path(words[4]).exists()  # nothing is left
    moving, fixed = balls(SHAPE)
    warped = warp(torch.from_numpy(moving.data)[None, None], torch.from_numpy(displacement)[None])[0, 0].numpy()
    np.testing.assert_allclose(warped, fixed.data, atol=1e-5)


def test_masks_are_there_where_they_are_asked_for(pair):
    source = SHIFT + "mask = np.asarray(nib.load(sys.argv[3]).dataobj)\nassert set(np.unique(mask)) == {0, 1}\n"
    source += "assert not Path(sys.argv[1]).with_name('moving_mask.nii').exists()\n"
    assert answered(pair, "command", program(source, "{fixed}", "{field}", "{fixed_mask}")) == ""


@pytest.mark.parametrize(
    ("source", "reason"),
    [
        ("print('almost'); raise SystemExit(3)", "ended with status 3: almost"),
        ("import os; os.kill(os.getpid(), 11)", "was killed by SIGSEGV"),
        ("import time; print('waits', flush=True); time.sleep(99)", "was stopped after 1.5 s: waits"),
        ("print('done')", "wrote no f.npy; in its folder are fixed.nii"),
        ("import sys, numpy as np; np.save(sys.argv[2], np.zeros((5, 6, 7, 3)))", "f.npy: found"),
        ("import sys, numpy as np; np.save(sys.argv[2], np.full((20, 24, 22, 3), np.nan))", "NaN or infinite"),
        ("import sys; open(sys.argv[2], 'w').write('no field')", "f.npy: found"),
        (
            "held = []\nwhile len(held) < 100:\n    held.append(bytearray(100_000_000))\n"
            "    held[-1][::4096] = b'x' * len(held[-1][::4096])\nprint('all')",
            "took more than memory_gb, 0.6 GB, and was stopped",
        ),
    ],
    ids=["status", "crash", "hangs", "no field", "another grid", "NaN", "no array", "memory"],
)
def test_what_goes_wrong_in_a_program_is_one_line(source, reason, pair):
    parameters = program(source, "{fixed}", "{field}", memory_gb=0.6)
    with pytest.raises(DmirError) as error:
        command.register(*balls(SHAPE), **parameters, limit=1.5 if "waits" in source else 60)
    assert reason in str(error.value) and "\n" not in str(error.value)


def test_a_field_on_another_grid_is_refused(pair):
    source = "import sys, nibabel as nib\nimport numpy as np\n"
    source += "image = nib.Nifti1Image(np.zeros((20, 24, 22, 1, 3), np.float32), np.diag([2.0, 2, 2, 1]))\n"
    source += "image.header.set_intent('vector')\nnib.save(image, sys.argv[2])\n"
    parameters = {**program(source, "{fixed}", "{field}"), "file": "f.nii.gz", "field": "itk"}
    assert "f.nii.gz: found a field on another grid" in answered(pair, "command", parameters)


def test_a_program_that_is_not_there_is_told_and_the_other_methods_go_on(pair):
    parameters = {**program("", "{fixed}"), "arguments": ["no-such-program", "{field}"]}
    pairs = [("a", pair[0], "b", pair[1])]
    records = [
        register_pairs(pairs, f"fields-{name}", name, own) for name, own in (("command", parameters), ("affine", {}))
    ]
    assert records[0]["reason"].tolist() == [
        "found no program 'no-such-program'; expected one on the PATH, or the path of one"
    ]
    assert records[1]["status"].tolist() == ["ok"]


def test_nothing_that_a_program_starts_outlives_it(pair):
    source = "import subprocess, sys, time\n"
    source += "child = subprocess.Popen([sys.executable, '-c', 'import time; time.sleep(60)'])\n"
    source += "open(sys.argv[2], 'w').write(str(child.pid))\ntime.sleep(60)\n"
    told = Path("child").absolute()
    record = registered(pair, "command", program(source, "{fixed}", str(told)), timeout=3)
    assert "was stopped after 3 s" in record["reason"]
    child = Path("/proc", told.read_text(), "stat")
    end = time.monotonic() + 5
    while child.exists() and child.read_text().rpartition(")")[2].split()[0] != "Z" and time.monotonic() < end:
        time.sleep(0.05)
    assert not child.exists() or child.read_text().rpartition(")")[2].split()[0] == "Z"


def test_no_shell_reads_the_arguments(pair):
    parameters = program(SHIFT, "{fixed}", "{field}", "$(touch ran)", "; touch ran", "`touch ran`")
    assert answered(pair, "command", parameters) == ""
    assert not Path("ran").exists()


def test_a_container_is_given_the_folder_and_the_program(pair, monkeypatch):
    """With a program of the name `apptainer` that tells what it is asked, and runs what comes after the image."""
    folder = Path("bin").absolute()
    folder.mkdir()
    fake = folder / "apptainer"
    fake.write_text('#!/bin/sh\necho "asked $@"\nwhile [ "$1" != image.sif ]; do shift; done\nshift\nexec "$@"\n')
    fake.chmod(fake.stat().st_mode | stat.S_IXUSR)
    monkeypatch.setenv("PATH", f"{folder}{os.pathsep}{os.environ['PATH']}")
    parameters = {**program(SHIFT, "{fixed}", "{field}"), "container": "image.sif"}
    moving, fixed = balls(SHAPE)
    displacement = command.register(moving, fixed, **parameters)
    assert np.allclose(displacement[0], -1)
    for name in command.CONTAINERS:
        monkeypatch.setattr(shutil, "which", lambda word, gone=name: None if word in command.CONTAINERS else word)
        with pytest.raises(Exception, match="found no apptainer or singularity"):
            command.register(moving, fixed, **parameters)


@pytest.mark.parametrize("convention", ["itk", "voxels", "voxels-absolute", "spm", "npz", "learn2reg"])
def test_every_convention_of_a_field_gives_the_same(convention, pair):
    """Steps or places (a warped grid), in voxels or mm: written by our own writer, read behind the door."""
    truth = np.zeros((3, *SHAPE), np.float32)
    truth[0] = -1
    suffix = {"npz": ".npz", "learn2reg": ".npz"}.get(convention, ".nii.gz")
    written = Path(f"made{suffix}").absolute()
    write(written, Field(truth, np.eye(4)), convention, moving=Grid(SHAPE, np.eye(4)))
    source = "import shutil, sys\nshutil.copy(sys.argv[1], sys.argv[2])\n"
    parameters = {**program(source, str(written), "{field}"), "file": f"f{suffix}", "field": convention}
    assert answered(pair, "command", parameters) == ""
    np.testing.assert_allclose(load_field("out.nii")[0], truth, atol=1e-4)


def test_the_conventions_are_those_that_can_be_read():
    assert set(command.CONVENTIONS) == set(CONVENTIONS)


@pytest.mark.parametrize(
    ("change", "words"),
    [
        ({"arguments": ["x", "{moveing}"]}, "Did you mean 'moving'?"),
        ({"arguments": []}, "at least 1 item"),
        ({"field": "vox"}, "Did you mean 'voxels'?"),
        ({"file": "../f.nii"}, "expected a file's name"),
        ({"memory": 3}, "Did you mean 'memory_gb'?"),
        ({"arguments": "x {moving}"}, "valid list"),
    ],
)
def test_a_mistake_in_a_programs_settings_is_told(change, words):
    settings = {"x": {"algorithm": "command", "arguments": ["x"], **change}}
    with pytest.raises(Exception, match=re.escape(words)):
        parse_config({**MINIMAL, "methods": ["x"], "settings": settings})


# --- fields of elsewhere ---


def test_fields_of_elsewhere_are_read_by_the_names_of_their_pairs(pair):
    truth = np.full((3, *SHAPE), 0.5, np.float32)
    folder = Path("theirs")
    folder.mkdir()
    save_field(folder / "cohort-a__b.nii.gz", truth, np.eye(4))
    parameters = {"folder": "theirs", "pattern": "{cohort}-{moving}__{fixed}.nii.gz", "field": None}
    pairs = [("a", pair[0], "b", pair[1]), ("b", pair[1], "a", pair[0])]
    records = register_pairs(pairs, "out", "fields", parameters, cohort="cohort")
    assert records["status"].tolist() == ["ok", "failed"]
    assert records["reason"][1] == "found no field theirs/cohort-b__a.nii.gz"
    assert np.isnan(records["seconds"][0]) and np.isnan(records["peak_memory_mb"][0])
    np.testing.assert_allclose(load_field("out/a__b.nii")[0], truth, atol=1e-5)
    before = fields.state(parameters)
    save_field(folder / "cohort-b__a.nii.gz", truth, np.eye(4))
    assert fields.state(parameters) != before


COARSE = np.array([[2.0, 0, 0, 0.5], [0, 2, 0, 0.5], [0, 0, 2, 0.5], [0, 0, 0, 1]])  # the same place in voxels of 2 mm


def turned(angle, *shift):
    """An affine that turns about the last axis, in radians, and shifts in mm."""
    matrix = np.eye(4)
    matrix[:2, :2] = [[np.cos(angle), -np.sin(angle)], [np.sin(angle), np.cos(angle)]]
    matrix[:3, 3] = shift
    return matrix


@pytest.fixture
def of_two_runs(pair):
    """A pair's images as this run has them, and the affines of both runs, no two of them the same."""
    ours = {"a": turned(0.05, 1.0, -0.5, 0.3), "b": turned(-0.02, 0.2, 0.1, -0.4)}
    theirs = {"a": turned(0.07, 0.6, -0.2, 0.1), "b": turned(-0.03, 0.4, 0.3, -0.1)}
    for run, affines in (("ours", ours), ("theirs", theirs)):
        for (name, affine), path in zip(affines.items(), pair, strict=True):
            folder = Path(run, "preprocessed", "cohort", name)
            folder.mkdir(parents=True)
            write_affine(folder / "affine.mat", affine)
            shutil.copy(path, folder / "image.nii")
    pairs = [("a", "ours/preprocessed/cohort/a/image.nii", "b", "ours/preprocessed/cohort/b/image.nii")]
    return pairs, ours, theirs


def test_a_field_of_another_run_is_reckoned_over_in_millimetres_through_the_scans_own_worlds(of_two_runs):
    """A linear map is the same function of the place, however coarse the voxels; the scan's own world is both runs'."""
    pairs, ours, theirs = of_two_runs
    linear = np.eye(4)
    linear[:3] += [[0, 0.02, 0, 0.25], [0, 0, 0.02, -0.5], [0.02, 0, 0, 0.75]]
    place = np.stack([2.0 * axis + 0.5 for axis in np.indices([n // 2 + 8 for n in SHAPE])]) - 8
    away = COARSE.copy()
    away[:3, 3] -= 8  # wider than the image: it is turned against it
    millimetres = np.einsum("ij,j...->i...", linear[:3, :3] - np.eye(3), place) + linear[:3, 3].reshape(3, 1, 1, 1)
    Path("theirs/shard0").mkdir()
    save_field("theirs/shard0/a__b.nii", (millimetres / 2).astype(np.float32), away)
    parameters = {"folder": "theirs", "pattern": "shard*/{moving}__{fixed}.nii", "preprocessed": "theirs/preprocessed"}
    records = register_pairs(pairs, "out", "fields", parameters, cohort="cohort")
    assert records["status"].tolist() == ["ok"], records["reason"].tolist()
    found, affine = load_field("out/a__b.nii")
    np.testing.assert_allclose(affine, np.eye(4))
    whole = np.linalg.inv(ours["a"]) @ theirs["a"] @ linear @ np.linalg.inv(theirs["b"]) @ ours["b"]
    index = np.indices(SHAPE).astype(float)
    expected = np.einsum("ij,j...->i...", whole[:3, :3], index) + whole[:3, 3].reshape(3, 1, 1, 1) - index
    np.testing.assert_allclose(found, expected, atol=4e-3)  # a field's file has 11 bits a number
    refused = register_pairs(pairs, "out", "fields", {**parameters, "preprocessed": None}, cohort="cohort")
    assert "a field on another grid" in refused["reason"][0]
    before = fields.state(parameters)
    write_affine(Path("theirs/preprocessed/cohort/a/affine.mat"), turned(0.0701, 0.6, -0.2, 0.1))
    assert fields.state(parameters) != before


def test_a_field_that_does_not_hold_the_brain_or_is_there_twice_is_refused(of_two_runs):
    pairs, *_ = of_two_runs
    for shard in ("shard0", "shard1"):
        Path(f"theirs/{shard}").mkdir(parents=True)
        save_field(f"theirs/{shard}/a__b.nii", np.zeros((3, *SHAPE), np.float32), np.eye(4))
    away = np.eye(4)
    away[0, 3] = 9.0
    save_field("theirs/away.nii", np.zeros((3, *SHAPE), np.float32), away)
    np.save("theirs/bare.npy", np.zeros((3, *SHAPE), np.float32))

    def reason(pattern, **more):
        parameters = {"folder": "theirs", "pattern": pattern, "preprocessed": "theirs/preprocessed", **more}
        return register_pairs(pairs, "out", "fields", parameters, cohort="cohort")["reason"][0]

    assert reason("shard*/{moving}__{fixed}.nii").startswith("found 2 fields theirs/shard*/a__b.nii; expected one")
    assert re.search(r"beyond which [\d,]+ of the fixed brain's [\d,]+ voxels lie", reason("away.nii"))
    assert "theirs/bare.npy" in reason("bare.npy", field="voxels")
    assert "elsewhere/cohort/a/affine.mat: found no such file" in reason("away.nii", preprocessed="elsewhere")


@pytest.mark.parametrize("pattern", ["/a/{moving}.nii", "**/{moving}.nii", "{fixed}.nii"])
def test_a_pattern_that_names_no_file_of_a_pair_in_the_folder_is_told(pattern):
    settings = {"x": {"algorithm": "fields", "folder": "theirs", "pattern": pattern}}
    with pytest.raises(Exception, match=re.escape(f"found '{pattern}'; expected")):
        parse_config({**MINIMAL, "methods": ["x"], "settings": settings})


# --- what is run again, and what is told before anything runs ---


def forget():
    for name in ("code_hash", "source_of", "_imports", "_read"):
        getattr(provenance, name).cache_clear()


def test_a_changed_file_changes_its_hash_and_a_comment_does_not(pair):
    Path("mine.py").write_text(FUNCTION)
    Path("helper.py").write_text("FAR = -1.0\n")

    def now():
        forget()
        return provenance.code_hash(*registry.modules("mine.py:shift"))

    before = now()
    Path("mine.py").write_text(FUNCTION + "\n# a remark\n")
    assert now() == before
    Path("helper.py").write_text("FAR = -2.0\n")
    changed = now()
    assert changed != before  # the file beside it that it imports
    Path("mine.py").write_text(FUNCTION + "\nMORE = 1\n")
    assert now() != changed


def test_a_changed_program_changes_its_state(pair, monkeypatch):
    parameters = program(SHIFT, "{fixed}", "{field}", packages=["numpy"])
    before = command.state(parameters)
    assert command.state(parameters) == before
    Path("program.py").write_text(SHIFT + "\n")
    changed = command.state(parameters)
    assert changed != before
    monkeypatch.setattr("importlib.metadata.version", lambda name: "0.0.1")
    assert command.state(parameters) != changed
    of = {"of": {"algorithm": "command", **parameters}, "stages": []}
    assert registry.state("refinement", of) == command.state(parameters)
    assert registry.state("syn", {}) == ""


CHECKED = {
    **MINIMAL,
    "methods": ["affine", "mine", "net", "prog"],
    "settings": {
        "mine": {"algorithm": "mine.py:shift"},
        "net": {"algorithm": "net.py:Net"},
        "prog": {"algorithm": "command", "arguments": ["no-such-program", "{field}"]},
    },
}


def test_the_check_lists_what_would_run_and_runs_nothing(pair, capsys):
    Path("mine.py").write_text("open('ran', 'w')\n" + FUNCTION)
    Path("net.py").write_text("open('ran', 'w')\n" + NETWORK.format(body="return moving"))
    Path("helper.py").write_text("FAR = 1\n")
    Path("c.yaml").write_text(yaml.safe_dump(CHECKED))
    assert main(["check", "c.yaml"]) == 0
    told = capsys.readouterr().out
    assert f"settings.mine: would run method shift of the file {Path('mine.py').absolute()}" in told
    assert f"settings.net: would run network Net of the file {Path('net.py').absolute()}" in told
    assert "settings.prog: would run program no-such-program {field} (no such program here)" in told
    assert not Path("ran").exists()
    assert main(["check", "--try", "c.yaml"]) == 1
    wrong = capsys.readouterr().err
    assert "settings.mine:" not in wrong
    assert "settings.net: the network: found a field of the shape (1, 1, 16, 16, 16)" in wrong
    assert "settings.prog: command fails on two images of 16x16x16 voxels: found no program" in wrong


def test_a_plan_has_the_rows_of_other_peoples_methods(pair, monkeypatch):
    from dmir.planning import plan as planning
    from dmir.planning.device_speed import DeviceSpeed

    monkeypatch.setattr(
        planning,
        "measure_speed",
        lambda device: DeviceSpeed("x", dict.fromkeys(("float32", "tf32", "bf16"), 1.0), 10.0),
    )
    network()
    Path("mine.py").write_text(FUNCTION)
    rows = planning.plan(parse_config(CHECKED), measured=False, device="cpu").table().set_index(["stage", "what"])
    assert rows.loc[("register", "prog on simulated"), "cpu_s"] == pytest.approx(60, abs=1)
    assert rows.loc[("train", "net"), "number"] > 0
    assert rows.loc[("register", "mine on simulated"), "cpu_s"] == pytest.approx(
        16**3 * registry.UNKNOWN_VOXEL, rel=0.2
    )


# --- the committed example ---


def test_the_example_of_other_methods_is_valid_and_names_files_that_are_there(monkeypatch):
    monkeypatch.chdir(ROOT)
    configuration = parse_config(yaml.safe_load((ROOT / "config/examples/other-methods.yaml").read_text()))
    for name in ("greedy", "convexadam", "fireants"):
        arguments = configuration.parameters(name)["arguments"]
        assert (ROOT / arguments[1]).is_file()
        compile((ROOT / arguments[1]).read_text(), arguments[1], "exec")
    assert configuration.takes_card("fireants") and not configuration.takes_card("greedy")


@pytest.mark.parametrize(
    ("name", "library"), [("greedy", "picsl_greedy"), ("convexadam", "convexAdam"), ("fireants", "fireants")]
)
def test_greedy_convexadam_and_fireants_find_what_was_done(name, library, pair, monkeypatch):
    if importlib.util.find_spec(library) is None:
        pytest.skip(f"{library} is not installed")
    monkeypatch.chdir(ROOT)
    configuration = parse_config(yaml.safe_load((ROOT / "config/examples/other-methods.yaml").read_text()))
    shape = (48, 56, 48)
    moving, fixed = balls(shape)
    for path, volume in zip(pair, (moving, fixed), strict=True):
        write_volume(path, volume)
    out = pair[0].with_name("out.nii")
    record = isolated.register_isolated(*pair, out, "command", configuration.parameters(name), timeout=300)
    assert (record["status"], record["reason"]) == ("ok", "")
    displacement, _ = load_field(out)
    warped = warp(torch.from_numpy(moving.data)[None, None], torch.from_numpy(displacement)[None])[0, 0].numpy()
    before, after = (np.abs(image - fixed.data).mean() for image in (moving.data, warped))
    assert after < 0.5 * before


# --- the page that tells of it ---


def blocks(kind):
    """Return the blocks of code of docs/own-method.md in one language."""
    text = (ROOT / "docs" / "own-method.md").read_text()
    return re.findall(rf"```{kind}\n(.*?)```", text, re.DOTALL)


def test_the_page_leads_to_a_row_word_for_word(pair, monkeypatch, capsys):
    """What stands there is laid into an empty folder; the network and the function are tried, the rest is read."""
    network_file, method_file, module = blocks("python")
    first, third, fourth = blocks("yaml")
    Path("my_network.py").write_text(network_file)
    Path("my_method.py").write_text(method_file)
    Path("my.yaml").write_text(first)
    assert main(["check", "--try", "my.yaml"]) == 0
    told = capsys.readouterr().out
    assert "would run network MyNetwork of the file" in told and "would run method shift of the file" in told
    assert "tried on two small images: each of them gives a field" in told
    configuration = parse_config(yaml.safe_load(first))
    assert configuration.networks() == ["my-network"] and configuration.parameters("my-shift") == {"voxels": 0.5}
    for text in (third, fourth):
        settings = yaml.safe_load(text)["settings"]
        (name,) = settings
        assert parse_config({**MINIMAL, "methods": [name], "settings": settings}).takes_card(name) is False
    (toml,) = blocks("toml")
    package = Path("my_registration")
    package.mkdir()
    (package / "__init__.py").touch()
    (package / "shift.py").write_text(module)
    (package / "network.py").write_text(network_file)
    information = Path("my_registration-1.0.dist-info")
    information.mkdir()
    (information / "METADATA").write_text("Metadata-Version: 2.1\nName: my-registration\nVersion: 1.0\n")
    points = re.sub(r'\[project\.entry-points\."(.*)"\]', r"[\1]", toml.split("\n\n", 1)[1])
    (information / "entry_points.txt").write_text(points.replace('"', ""))
    monkeypatch.syspath_prepend(str(Path.cwd()))
    registry.installed.cache_clear()
    try:
        configuration = parse_config({**MINIMAL, "methods": ["affine", "mynet", "myshift"]})
        assert configuration.networks() == ["mynet"] and configuration.parameters("myshift") == {"voxels": 1.0}
        assert registry.title("myshift") == "My shift" and registry.colour("myshift") == "#6a3d9a"
        assert registry.cost("myshift", {}, SHAPE).seconds == 1.0
        assert answered(pair, "myshift", {"voxels": 2.0}) == ""
        assert build("mynet", SHAPE).hyperparameters == {"channels": 8}
        assert main(["methods"]) == 0
        told = capsys.readouterr().out
        assert re.search(r"myshift +My shift +my-registration 1\.0", told)
    finally:
        registry.installed.cache_clear()
    assert np.allclose(load_field("out.nii")[0][0], 2)
