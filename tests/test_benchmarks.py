"""The benchmarks: what they count is right, what they compare is equal, and they run. No timing is judged."""

import importlib
import json
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
pair, registration = script("pair"), script("registration")


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


# --- registration methods side by side ---


def turned_affine():
    """An affine whose axes lie in other directions than the world's: permuted, flipped, turned by 20 degrees."""
    c, s = np.cos(np.deg2rad(20)), np.sin(np.deg2rad(20))
    directions = np.array([[c, -s, 0], [s, c, 0], [0, 0, 1]]) @ np.array([[0, -1, 0], [0, 0, 1], [1, 0, 0]])
    affine = np.eye(4)
    affine[:3, :3], affine[:3, 3] = directions * (1.0, 1.25, 1.5), (-20, 30, 11)
    return affine


def blobs(field):
    """A moving image of blobs in an ellipsoid, (40, 48, 40), and the fixed image that a field (3, ...) makes of it."""
    shape = (40, 48, 40)
    torch.manual_seed(3)
    noise = torch.randn(1, 1, *shape)
    for _ in range(3):
        noise = F.avg_pool3d(noise, 5, 1, 2)
    radius = sum(((x / n - 0.5) / 0.36) ** 2 for x, n in zip(fields.identity_grid(shape)[0], shape, strict=True))
    moving = (0.5 + 0.15 * noise / noise.std()).clamp(0.05, 1) * torch.sigmoid(12 * (1 - radius))
    fixed = fields.warp(moving, field[None])
    return [Volume(image[0, 0].numpy(), turned_affine()) for image in (moving, fixed)]


def known_field():
    """Displacements of 2.5, -1.5 and 1 voxels, each less or more from place to place."""
    waves = [torch.sin(3 * x / n) for x, n in zip(fields.identity_grid((40, 48, 40))[0], (40, 48, 40), strict=True)]
    return torch.stack([2.5 * waves[1], -1.5 * waves[2], waves[0]])


def error_of(found, known, fixed):
    inside = fixed.data > 0.2
    return float(np.linalg.norm(found - known.numpy(), axis=0)[inside].mean())


def test_a_registration_is_measured_in_a_process_of_its_own(tmp_path):
    known = torch.tensor([2.0, -1.0, 1.0]).view(3, 1, 1, 1).expand(3, 40, 48, 40)
    images = dict(zip(("moving", "fixed"), blobs(known), strict=True))
    for name, volume in images.items():
        write_volume(tmp_path / f"{name}.nii.gz", volume)
    row = {"algorithm": "descent", "parameters": {}, "threads": 1, "field": str(tmp_path / "field.npy")}
    row |= {name: str(tmp_path / f"{name}.nii.gz") for name in images}
    found = measuring.measure_apart(ROOT / "benchmarks" / "pair.py", row, 1, timeout=100.0)
    assert 0 < found["cpu_s"] < 50
    assert found["wall_s"] > 0
    assert found["peak_mb"] > found["idle_mb"] > 50
    assert error_of(np.load(row["field"]), known, images["fixed"]) < 0.4


@pytest.mark.parametrize("algorithm", ["greedy", "convexadam"])
def test_fields_of_other_programs_are_ours(algorithm):
    """Found on a grid that is turned in its world: components, axes and signs are those of the library."""
    lacking = pair.missing_library(algorithm)
    if lacking:
        pytest.skip(f"{lacking} is not installed")
    known = known_field()
    moving, fixed = blobs(known)
    assert error_of(np.zeros((3, 40, 48, 40)), known, fixed) > 1.7
    found = pair.function_of(algorithm)(moving, fixed)
    assert (found.dtype, found.shape) == (np.float32, (3, 40, 48, 40))
    assert error_of(found, known, fixed) < 0.6


@pytest.fixture
def pairs_table(tmp_path):
    """A table of two pairs whose label maps are one structure, shifted by a voxel in the second."""
    image = np.zeros((12, 12, 12), np.float32)
    for name, start in (("a", 3), ("b", 3), ("c", 4)):
        labels = np.zeros((12, 12, 12), np.int16)
        labels[start : start + 4, 3:9, 3:9] = 21
        write_volume(tmp_path / f"{name}_labels.nii.gz", Volume(labels, np.eye(4)))
        write_volume(tmp_path / f"{name}.nii.gz", Volume(image + labels, np.eye(4)))
    rows = [
        {"cohort": "cubes", "moving": name, "fixed": "a", "moving_image": f"{name}.nii.gz", "fixed_image": "a.nii.gz"}
        | {"moving_labels": f"{name}_labels.nii.gz", "fixed_labels": "a_labels.nii.gz"}
        for name in ("b", "c")
    ]
    pd.DataFrame(rows).to_csv(tmp_path / "pairs.csv", index=False)
    return tmp_path / "pairs.csv"


def test_what_has_a_record_is_not_registered_again(tmp_path, monkeypatch, pairs_table):
    asked, failing = [], set()

    def nothing_moves(script, row, threads, timeout):
        asked.append((row["algorithm"], Path(row["moving"]).name[0]))
        if asked[-1] in failing:
            return {"failed": "ValueError: of the test"}
        np.save(row["field"], np.zeros((3, 12, 12, 12), np.float32))
        return {"cpu_s": 2.0, "wall_s": 3.0, "peak_mb": 400.0, "idle_mb": 300.0}

    monkeypatch.setattr(registration, "measure_apart", nothing_moves)
    (tmp_path / "syn.yaml").write_text("algorithm: syn\niterations: [1]\n")
    common = ["--pairs", str(pairs_table), "--out", str(tmp_path / "out"), "--reference", "affine", "--methods"]

    def newly(*arguments):
        asked.clear()
        registration.main([*common, *arguments])
        return asked

    failing.add(("syn", "c"))
    assert newly("affine", "syn") == [("affine", "b"), ("syn", "b"), ("affine", "c"), ("syn", "c")]
    failing.clear()
    assert newly("affine", "syn") == [("syn", "c")]  # what failed is no result
    assert newly("affine", "syn") == []
    assert newly(f"syn={tmp_path / 'syn.yaml'}") == [("syn", "b"), ("syn", "c")]
    assert newly("affine", "--again") == [("affine", "b"), ("affine", "c")]
    assert newly("affine", "--threads", "2") == [("affine", "b"), ("affine", "c")]
    assert len(pd.read_csv(tmp_path / "out" / "records.csv")) == 11
    table = pd.read_csv(tmp_path / "out" / "table.csv").set_index("method")
    assert list(table["n"]) == [2, 2]
    assert table.loc["syn", "dice"] == pytest.approx((1 + 0.75) / 2)  # 3 of 4 planes of the cube overlap
    assert table.loc["syn", "hd95"] == pytest.approx(0.5)
    assert (table.loc["syn", "cpu_s"], table.loc["syn", "wins"]) == (2.0, "0/2")
    settings = json.loads((tmp_path / "out" / "settings.json").read_text())
    assert settings["threads"] == [1, 2]
    assert "iterations=[1]" in settings["methods"]["syn"]["parameters"]
    assert "| Affine only |" in (tmp_path / "out" / "table.md").read_text()
    assert (tmp_path / "out" / "figure.png").stat().st_size > 5000


def test_the_table_of_methods_compares_pairs_of_both():
    shared = {"cohort": "one", "fixed": "a", "status": "ok", "parameters": "", "threads": 1}
    shared |= dict.fromkeys(registration.MEANS, 0.0)
    dice = {"greedy": [0.70, 0.72, 0.74, 0.60], "descent": [0.71, 0.74, 0.73, np.nan]}
    rows = [
        {**shared, "method": method, "moving": f"S{number}", "dice": value}
        | ({} if value > 0 else {"status": "failed"} | dict.fromkeys(registration.MEANS, np.nan))
        for method, values in dice.items()
        for number, value in enumerate(values)
    ]
    table = registration.summary(pd.DataFrame(rows), "greedy").set_index("method")
    assert list(table["n"]) == [4, 3]
    assert list(table["failed"]) == [0, 1]
    assert table.loc["greedy", "dice_sd"] == pytest.approx(np.std(dice["greedy"], ddof=1))
    row = table.loc["descent"]
    assert (row["dice"], row["difference"]) == (pytest.approx(2.18 / 3), pytest.approx(0.02 / 3))
    assert row["wins"] == "2/3"
    assert row["p"] == pytest.approx(0.75)  # W- is 1.5 of 6: so extreme are 2 x 3 of the 8 patterns of signs
    assert np.isnan(table.loc["greedy", "p"])
    assert registration.mean_and_sd(0.71284, 0.0213, 3) == "0.713 ± 0.021"
    assert registration.mean_and_sd(0.5, np.nan, 1) == "0.5"


def test_pairs_of_a_results_folder_are_its_test_scans_to_the_atlas(tmp_path):
    for cohort, scan in (("one", "S1"), ("one", "S2"), ("one", "S3"), ("two", "T1"), ("two", "T2")):
        (tmp_path / "preprocessed" / cohort / scan).mkdir(parents=True)
    (tmp_path / "cohorts" / "one").mkdir(parents=True)
    split = "scan,split\nS1,atlas\nS2,test\nS3,train\n"
    (tmp_path / "cohorts" / "one" / "scans.csv").write_text(split)
    (tmp_path / "configuration.yaml").write_text("cohorts: {one: {structures: lpba56}}\n")

    def names(cohorts, scans=(), atlases=()):
        found = registration.results_pairs(tmp_path, cohorts, scans, atlases)
        return [(pair.cohort, pair.moving, pair.fixed, pair.structures) for pair in found]

    assert names(["one"]) == [("one", "S2", "S1", "lpba56")]
    assert names(["one"], ["S3"]) == [("one", "S3", "S1", "lpba56")]
    both = [("one", "S2", "S1", "lpba56"), ("two", "T2", "T1", "")]
    assert names([], ["S2", "T2"], ["S1", "T1"]) == both
    with pytest.raises(InputError, match=r"--scans and --atlas of each"):
        names(["two"])
    with pytest.raises(InputError, match="S9"):
        names(["one"], ["S2", "S9"])


def test_a_method_that_does_not_import_is_left_out_and_told(monkeypatch, capsys):
    monkeypatch.setitem(pair.LIBRARIES, "greedy", ("no_such_library",))
    assert [method.name for method in registration.available(["affine", "greedy"])] == ["affine"]
    assert "greedy is left out: no_such_library is not installed" in capsys.readouterr().err
    with pytest.raises(InputError, match="Did you mean 'descent'"):
        registration.available(["desent"])


def test_labels_of_the_figure_cover_no_other():
    figure = registration.new_figure(4, 3, layout=None)
    panel = figure.subplots()
    points = [(10.0 + step, 0.70 + 0.002 * step, f"method {step} 0.70", "black") for step in range(5)]
    panel.scatter(*zip(*(point[:2] for point in points), strict=True))
    panel.set(xlim=(0, 30), ylim=(0.6, 0.8))
    registration.place_labels(panel, points)
    boxes = [text.get_window_extent() for text in panel.texts]
    assert not any(a.overlaps(b) for number, a in enumerate(boxes) for b in boxes[:number])


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
    assert by_name["caml"]["objective"] == {"similarity": "lncc", "window": 7, "regularisation": 1.0}


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
