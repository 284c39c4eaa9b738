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
from torch import nn
from torch._subclasses.fake_tensor import FakeTensorMode

from dmir import fields, losses
from dmir.errors import InputError
from dmir.networks import build
from dmir.networks.attention import WindowMultiheadCrossAttention
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


def test_a_convolution_is_counted_as_by_hand():
    convolution = nn.Conv3d(4, 8, 3, padding=1)
    gflop = networks.gflop_of(convolution, torch.zeros(1, 4, 10, 12, 14))
    assert gflop == pytest.approx(2 * 27 * 4 * 8 * (10 * 12 * 14) / 1e9, rel=1e-12)


@pytest.mark.parametrize("fake", [True, False])
@pytest.mark.parametrize("masked", [True, False])
def test_attention_is_counted_as_by_hand(fake, masked):
    class Attention(nn.Module):
        def forward(self, query, key, mask):
            return F.scaled_dot_product_attention(query, key, key, attn_mask=mask)

    with FakeTensorMode(allow_non_fake_inputs=True) if fake else torch.no_grad():
        query, key = torch.zeros(3, 2, 64, 16), torch.zeros(3, 2, 512, 16)
        gflop = networks.gflop_of(Attention(), query, key, torch.zeros(3, 1, 64, 512) if masked else None)
    assert gflop == pytest.approx(2 * 2 * (3 * 2) * 64 * 512 * 16 / 1e9, rel=1e-12)  # scores, and weighted values


def test_voxelmorphs_work_is_the_published_less_what_algebra_saves():
    voxels = 160 * 192 * 224
    layers = [  # in, out, level of VoxelMorph-2 of the TransMorph paper; and what of `in` is upsampled just before
        *((2, 16, 1, 0), (16, 32, 2, 0), (32, 32, 3, 0), (32, 32, 4, 0), (32, 32, 4, 0)),
        *((32 + 32, 32, 3, 32), (32 + 32, 32, 2, 32), (32 + 16, 32, 1, 32), (32 + 2, 32, 0, 32)),
        *((32, 16, 0, 0), (16, 16, 0, 0), (16, 3, 0, 0)),
    ]
    published = sum(2 * 27 * before * after * voxels / 8**level for before, after, level, _ in layers) / 1e9
    assert published == pytest.approx(797.6, abs=0.05)
    # repeated voxels meet the same weights: 8 products a voxel and channel do the work of 27
    saved = sum(2 * (27 - 8) * upsampled * after * voxels / 8**level for _, after, level, upsampled in layers) / 1e9
    row = {"algorithm": "voxelmorph", "shape": [160, 192, 224]}
    found = networks.count({**row, "hyperparameters": {"downsampling": "stride", "integration_steps": 0}})
    assert found["parameters"] == 301_411
    assert found["gflop"] == pytest.approx(published - saved, rel=1e-9)


def test_counting_without_contents_is_counting_for_real():
    hyperparameters = {"detail_channels": [4, 6], "channels": [8, 16], "depths": [1, 1], "heads": [1, 2]}
    shape = (12, 16, 18)
    network = build("caml", shape, **hyperparameters).eval()
    found = networks.count({"algorithm": "caml", "shape": shape, "hyperparameters": hyperparameters})
    assert found["gflop"] == networks.gflop_of(network, torch.rand(1, 1, *shape), torch.rand(1, 1, *shape)) > 0
    assert found["parameters"] == sum(p.numel() for p in network.parameters())


def test_a_network_that_must_compute_to_be_counted_is_counted_when_it_is_measured():
    row = {"algorithm": "voxelmorph", "shape": (16, 12, 8), "hyperparameters": {}, "layout": "default"}
    how = {"dtype": "float32", "mode": "plain", "objective": None, "device": "cpu", "repeats": 1, "count": True}
    found = networks.measure_row({**row, **how, "threads": torch.get_num_threads()})
    assert {key: found[key] for key in ("parameters", "gflop")} == networks.count(row)
    assert networks.count({**row, "hyperparameters": {"downsampling": "none"}}) == {}


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
    assert row["gflop"] == networks.gflop_of(network, *torch.zeros(2, 1, 1, 16, 16, 12))
    for column in ("forward_s", "forward_backward_cpu_s", "step_s", "step_mb"):
        assert row[column] > 0
    assert row["device"] == "cpu"
    assert pd.isna(row["failed"])
    assert "divisor of the channels" in table.loc["caml", "failed"]
    assert ended.stdout.startswith("| network")
    assert "divisor of the channels" in ended.stdout


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
