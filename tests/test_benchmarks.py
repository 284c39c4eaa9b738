"""The benchmarks: what they count is right, what they compare is equal, and they run. No timing is judged."""

import importlib
import subprocess
import sys
from pathlib import Path

import numpy as np
import pandas as pd
import pytest
import torch
import torch.nn.functional as F

from dmir import fields, losses
from dmir.errors import InputError
from dmir.networks import build
from dmir.networks.attention import WindowMultiheadCrossAttention
from dmir.training.cost import count_inference
from dmir.volumes import Volume, write_volume

ROOT = Path(__file__).parents[1]
SMALL = ["voxelmorph.encoder=[4, 8]", "voxelmorph.decoder=[8, 8, 4]", "voxelmorph.integration_steps=0"]


def script(name):
    """Import a script of the benchmarks, which import one another from their own folder."""
    sys.path.insert(0, str(ROOT / "benchmarks"))
    try:
        return importlib.import_module(name)
    finally:
        sys.path.remove(str(ROOT / "benchmarks"))


networks, operations, plain, measuring = map(script, ("networks", "operations", "plain", "measuring"))
preprocessing = script("preprocessing")


def run(name, *arguments):
    command = [sys.executable, ROOT / "benchmarks" / f"{name}.py", "--device", "cpu", "--repeats", "1", *arguments]
    return subprocess.run(command, capture_output=True, text=True)


def smooth_field(shape, scale=1.0):
    """A field of float64 that vanishes on the border, where methods may differ."""
    torch.manual_seed(0)
    field = torch.randn(1, 3, *(n - 4 for n in shape), dtype=torch.float64)
    for _ in range(2):
        field = F.avg_pool3d(field, 3, 1, 1)
    return scale * F.pad(field, (2,) * 6)


# --- what is counted ---

UNMEASURED = {"grid": "16x12x8", "dtype": "float32", "objective": None, "device": "cpu"}


def test_what_is_counted_stands_in_the_row():
    row = {"algorithm": "voxelmorph", "hyperparameters": {}, **UNMEASURED}
    found = networks.count(row)
    expected = count_inference("voxelmorph", {}, (16, 12, 8))
    assert (found["parameters"], found["gflop"]) == (expected.parameters, expected.gflop)
    assert (found["moved_gb"], found["counted_mb"]) == (expected.moved_gb, expected.peak_mb)
    assert "step_gflop" not in found
    step = networks.count({**row, "objective": {"similarity": "mse"}})
    assert step["step_gflop"] > 2 * found["gflop"]
    assert networks.count({**row, "hyperparameters": {"downsampling": "none"}}) == {}


def test_the_roofline_is_told_beside_what_was_measured():
    speed = networks.DeviceSpeed("cpu", {"bf16": 2.0}, bandwidth=10.0)
    row = {"dtype": "bf16", "gflop": 400.0, "moved_gb": 1.0, "forward_s": 0.8}
    row |= {"step_gflop": 100.0, "step_moved_gb": 5.0, "step_s": 2.0}
    found = networks.against_roofline(row, speed)
    assert (found["roofline_s"], found["roofline_share"], found["bound"]) == (0.2, 0.25, "arithmetic")
    assert (found["step_roofline_s"], found["step_roofline_share"], found["step_bound"]) == (0.5, 0.25, "memory")
    assert "step_roofline_share" not in networks.against_roofline({**row, "step_s": None}, speed)


# --- what is compared ---


@pytest.mark.parametrize("window", [3, 9])
def test_the_plain_lncc_is_ours(window):
    torch.manual_seed(0)
    fixed, warped = torch.rand(2, 1, 1, 11, 12, 13, dtype=torch.float64)
    warped.requires_grad_()
    ours = losses.lncc(fixed, warped, window)
    gradient = torch.autograd.grad(ours, warped)[0]
    for similarity in (plain.lncc, plain.lncc_exact):
        other = similarity(fixed, warped, window)
        torch.testing.assert_close(ours, other)
        torch.testing.assert_close(gradient, torch.autograd.grad(other, warped)[0], rtol=1e-6, atol=1e-10)


@pytest.mark.parametrize("mask_padding", [True, False])
@pytest.mark.parametrize(("grid", "window"), [((8, 6, 4), (2, 2, 2)), ((5, 7, 6), (2, 3, 1))])
def test_the_plain_attention_is_ours(grid, window, mask_padding):
    torch.manual_seed(0)
    module = WindowMultiheadCrossAttention(6, 2, window, mask_padding=mask_padding).double()
    tokens, context = torch.randn(2, 2, *grid, 6, dtype=torch.float64)
    torch.testing.assert_close(plain.attention(module, tokens, context), module(tokens, context)[0])


def test_the_plain_warps_are_ours():
    shape = (12, 14, 13)
    field = smooth_field(shape, scale=3.0)
    image = torch.rand(1, 1, *shape, dtype=torch.float64)
    torch.testing.assert_close(plain.warp(image, field), fields.warp(image, field))
    torch.testing.assert_close(plain.compose(field, field.flip(1)), fields.compose(field, field.flip(1)))
    torch.testing.assert_close(plain.integrate(field), fields.integrate(field))
    labels = (4 * F.avg_pool3d(image, 5, 1, 2) - 1.5).clamp(0).mul(6).round().to(torch.int64)
    assert len(labels.unique()) > 3
    expected = fields.warp_labels(labels, field, "linear")
    assert (plain.warp_labels(labels, field) == expected).double().mean() > 0.999  # but for ties of rounding
    assert (labels != expected).double().mean() > 0.01


def test_the_gradient_of_ours_is_right_on_a_real_brain():
    pair = operations.brain_pair((24, 28, 26), None)
    assert float((pair[0] == 0).float().mean()) > 0.2  # background
    assert float(pair[0].max()) > 0.5
    assert operations.gradient_error("ours", *pair) < 1e-4


# --- that they run ---


def test_networks_measures_each_row_apart_and_a_failure_is_a_row(tmp_path):
    out = tmp_path / "table.csv"
    ended = run(
        *("networks", "--networks", "voxelmorph,caml", "--grids", "16x16x12", "--step", "--out", out),
        *("--set", *SMALL, "caml.heads=[5, 6, 12, 24]"),
    )
    assert ended.returncode == 0, ended.stderr
    table = pd.read_csv(out).set_index("network")
    row = table.loc["voxelmorph"]
    network = build("voxelmorph", (16, 16, 12), encoder=[4, 8], decoder=[8, 8, 4], integration_steps=0)
    assert row["parameters"] == sum(p.numel() for p in network.parameters())
    options = {"encoder": [4, 8], "decoder": [8, 8, 4], "integration_steps": 0}
    assert row["gflop"] == count_inference("voxelmorph", options, (16, 16, 12)).gflop
    for column in ("forward_s", "forward_backward_cpu_s", "step_s", "step_mb", "step_roofline_s", "peak_gb_per_s"):
        assert row[column] > 0
    assert row["device"] == "cpu"
    assert pd.isna(row["failed"])
    assert "divisor of the channels" in table.loc["caml", "failed"]
    assert ended.stdout.startswith("| network")
    assert "divisor of the channels" in ended.stdout


def test_counting_alone_measures_nothing(tmp_path):
    out = tmp_path / "table.csv"
    ended = run("networks", "--networks", "voxelmorph", "--grids", "160x192x224", "--count-only", "--out", out)
    assert ended.returncode == 0, ended.stderr
    table = pd.read_csv(out).set_index("dtype")
    assert list(table.index) == ["float32", "bf16"]
    assert table.loc["bf16", "step_moved_gb"] < table.loc["float32", "step_moved_gb"]
    assert "forward_s" not in table.columns


def test_operations_compares_both_sides(tmp_path):
    out = tmp_path / "table.csv"
    ended = run("operations", "--operations", "lncc", "--shape", "16x18x14", "--out", out)
    assert ended.returncode == 0, ended.stderr
    table = pd.read_csv(out).set_index("pass")
    assert list(table.index) == ["forward", "forward + backward"]
    row = table.loc["forward + backward"]
    assert row["time_ratio"] == pytest.approx(row["ours_s"] / row["plain_s"])
    assert row["time_goal"] == 0.1
    assert 0 < row["gradient_error_ours"] < 1e-4


def test_preprocessing_aligns_a_shifted_scan_in_both_ways(tmp_path):
    """Two ellipsoids in one box, then moved by whole voxels: after the affine they overlap, before it they do not."""
    axes = np.meshgrid(*(np.linspace(-1.3, 1.3, n) for n in (40, 48, 36)), indexing="ij")
    inside = sum(x**2 for x in axes) < 1
    image = np.where(inside, 100 + 50 * np.sin(4 * axes[0] + 1) * np.cos(5 * axes[1]) + 20 * axes[2], 0)
    labels = np.where(inside, 21 + (axes[0] > 0.1), 0)
    rows = {}
    for name, shift in (("reference", 0.0), ("scan", 24.0)):
        affine = np.diag([4.0, 4.0, 4.0, 1.0])
        affine[:3, 3] = (-80 + shift, -90, -70)
        scan = {"scan": name, "mask": "", "image": f"{tmp_path}/{name}.nii.gz", "labels": f"{tmp_path}/{name}_l.nii.gz"}
        write_volume(scan["image"], Volume(image.astype(np.float32), affine))
        write_volume(scan["labels"], Volume(labels.astype(np.int16), affine))
        rows[name] = {
            "scan": scan,
            "folder": str(tmp_path / name),
            "atlas": None if shift == 0 else rows["reference"]["folder"],
        }
        rows[name] |= {"label_map": None, "structures": "lpba56", "orientation": None, "denoise": False, "threads": 1}
        found = preprocessing.measure_steps({**rows[name], "shape": [44, 50, 40], "spacing": [4.0] * 3})
        assert found["bias_field_s"] > 0
        assert (found["affine_s"] is None) == (name == "reference")
    atlas = preprocessing.read_preprocessed(rows["reference"]["folder"])
    unmoved = preprocessing.overlap(np.eye(4), tmp_path / "scan" / "stripped", "lpba56", atlas)
    assert unmoved["label_dice"] < 0.8
    for way in ("ants", "6"):
        found = preprocessing.measure_affine({**rows["scan"], "way": way})
        assert found["cpu_s"] > 0
        assert found["mask_dice"] > 0.97
        assert found["label_dice"] > 0.95


def test_a_process_that_dies_is_a_reason(tmp_path):
    script = tmp_path / "script.py"
    for code, reason in (
        ("import os; os.kill(os.getpid(), 9)", "SIGKILL, as when memory runs out"),
        ("raise ValueError('too large')", "ValueError: too large"),
        ("import time; time.sleep(60)", "not done after 2 s"),
    ):
        script.write_text(code)
        assert reason in measuring.measure_apart(script, {}, 1, timeout=2.0)["failed"]


# --- what is asked ---


def rows(*arguments):
    return networks.rows(networks._parser().parse_args(arguments))


def test_ways_to_align_are_ants_or_a_size_of_voxels():
    assert preprocessing.parse_ways("ants,2,3.5,2") == ["ants", "2", "3.5"]
    for wrong in ("elastix", "0", "-3", "3,"):
        with pytest.raises(InputError, match="a size of voxels in mm"):
            preprocessing.parse_ways(wrong)


def test_rows_are_all_combinations():
    asked = rows("--networks", "voxelmorph,caml", "--grids", "8x8x8,16x16x12", "--dtypes", "float32,bf16")
    assert len(asked) == 8
    assert {tuple(row["shape"]) for row in asked} == {(8, 8, 8), (16, 16, 12)}
    assert all(row["objective"] is None for row in asked)


def test_a_configuration_gives_hyperparameters_grid_and_objective():
    asked = rows("--config", str(ROOT / "config" / "config.yaml"), "--step", "--set", "caml.depths=[1, 2]")
    by_name = {row["network"]: row for row in asked}
    assert {"voxelmorph", "caml"} <= set(by_name)
    assert by_name["caml"]["shape"] == (56, 68, 56)
    assert by_name["caml"]["hyperparameters"]["depths"] == [1, 2]
    assert by_name["caml"]["hyperparameters"]["field_downsampling"] == 2
    assert by_name["caml"]["objective"] == {"similarity": "lncc", "window": 7, "regularisation": 0.5}


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--grids", "80x96"], "three numbers of voxels"),
        (["--networks", "voxelmorf"], "Did you mean 'voxelmorph'"),
        (["--dtypes", "fp16"], "Did you mean 'bf16'"),
        (["--set", "caml.chanels=[1]"], "Did you mean 'channels'"),
        (["--set", "caml"], "network.hyperparameter=value"),
    ],
)
def test_what_cannot_be_measured_is_refused_at_once(arguments, message):
    with pytest.raises(InputError, match=message):
        rows(*arguments)
