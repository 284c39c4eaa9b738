"""Training: what is seen in which order, what is minimised, what is kept, and what survives a kill."""

from __future__ import annotations

import io
import json
import logging
import math
import os
import pickle
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pandas as pd
import pytest
import torch
from safetensors.torch import load_file
from scipy import ndimage
from torch import nn

from dmir.errors import InputError
from dmir.fields import shifted_displacement, warp
from dmir.filters import TRUNCATE, gaussian
from dmir.losses import lncc
from dmir.training import Scan, TrainingDiverged, TrainingSettings, read_metadata, train
from dmir.training.comparison import compared
from dmir.training.data import PairSchedule, load_bank, training_pairs, validation_pairs
from dmir.training.module import RegistrationModule
from dmir.training.objective import Objective, arithmetic, displacement_of
from dmir.training.validation import Validation, mean_dice, validate
from dmir.volumes import Volume, write_volume

SHAPE = (10, 12, 14)
CPU = torch.device("cpu")
TESTS = Path(__file__).parent
FAST = {"device": "cpu", "threads": 1, "similarity": "mse", "learning_rate": 1e-3}


class Tiny(nn.Module):
    """Two convolutions with dropout between them, so that random numbers matter.

    ``at_call`` names a training call at which ``accident`` happens.
    """

    def __init__(self, at_call: int = 0, accident=lambda: None) -> None:
        super().__init__()
        self.first = nn.Conv3d(2, 4, 3, padding=1)
        self.second = nn.Conv3d(4, 3, 3, padding=1)
        self.calls, self.at_call, self.accident = 0, at_call, accident

    def forward(self, moving: torch.Tensor, fixed: torch.Tensor) -> torch.Tensor:
        if self.training:
            self.calls += 1
            if self.calls == self.at_call:
                self.accident()
        hidden = torch.tanh(self.first(torch.cat([moving, fixed], dim=1)))
        return self.second(nn.functional.dropout(hidden, 0.2, self.training))


def tiny(**keywords) -> Tiny:
    torch.manual_seed(5)
    return Tiny(**keywords)


def make_scans(folder: Path, count: int = 6) -> list[Scan]:
    """Write one box per scan, each moved by some voxels, with two labels: its halves. The last is the atlas."""
    scans = []
    for number in range(count):
        image, labels = np.zeros(SHAPE, np.float32), np.zeros(SHAPE, np.int32)
        offset = number % 3
        image[2 + offset : 7 + offset, 3:9, 4:11] = 0.8
        labels[2 + offset : 7 + offset, 3:9, 4:11] = 17
        labels[2 + offset : 7 + offset, 3:9, 8:11] = 42
        image += 0.1 * np.random.default_rng(number).random(SHAPE, dtype=np.float32)
        scan = Scan(f"s{number}", folder / f"s{number}" / "image.nii.gz", folder / f"s{number}" / "labels.nii.gz")
        write_volume(scan.image, Volume(image, np.eye(4)))
        write_volume(scan.labels, Volume(labels, np.eye(4)), dtype=np.int16)
        scans.append(scan)
    return scans


@pytest.fixture(scope="module")
def scans(tmp_path_factory) -> list[Scan]:
    return make_scans(tmp_path_factory.mktemp("scans"))


def split(scans: list[Scan]) -> dict:
    """Return three training scans, two validation scans and the atlas as keywords of ``train``."""
    return {"scans": scans[:3], "validation": scans[3:5], "atlases": [scans[5]]}


def run(network, scans, output, **keywords):
    return train(network, {}, **split(scans), output=output, **(FAST | keywords))


def validated(history: Path) -> list[int]:
    """Return the steps of a history that have a validation."""
    return pd.read_csv(history).dropna(subset="val_loss").step.tolist()


# --- the order of the pairs -------------------------------------------------------------------------------------------


def test_every_pass_sees_every_pair_once_and_in_its_own_order():
    pairs = training_pairs(range(7), [7], "scan_to_atlas")
    schedule = PairSchedule(pairs, steps=21, batch_size=1, seed=3)
    seen = [tuple(schedule[step][0].tolist()) for step in range(21)]
    passes = [seen[start : start + 7] for start in (0, 7, 14)]
    assert all(sorted(one) == [(scan, 7) for scan in range(7)] for one in passes)
    assert passes[0] != passes[1] != passes[2]


def test_a_step_sees_the_same_pairs_whatever_was_asked_before():
    pairs = training_pairs(range(5), [5], "scan_to_atlas")
    forwards = [PairSchedule(pairs, 12, 2, seed=3)[step] for step in range(12)]
    schedule = PairSchedule(pairs, 12, 2, seed=3)
    backwards = [schedule[step] for step in reversed(range(12))][::-1]
    assert torch.equal(torch.stack(forwards), torch.stack(backwards))
    other = [PairSchedule(pairs, 12, 2, seed=4)[step] for step in range(12)]
    assert not torch.equal(torch.stack(forwards), torch.stack(other))


def test_a_batch_is_the_next_steps_of_batches_of_one():
    pairs = training_pairs(range(5), [5], "scan_to_atlas")
    single, triple = PairSchedule(pairs, 12, 1, seed=3), PairSchedule(pairs, 4, 3, seed=3)
    assert torch.equal(torch.cat([single[step] for step in range(12)]), torch.cat([triple[step] for step in range(4)]))


def test_all_pairs_are_all_ordered_pairs_of_two_different_scans():
    pairs = training_pairs(range(4), [4], "all").tolist()
    assert (
        len(pairs) == 12
        and all(a != b for a, b in pairs)
        and {*map(tuple, pairs)} == {*map(tuple, map(reversed, pairs))}
    )
    with pytest.raises(InputError, match="expected at least two scans"):
        training_pairs(range(1), [1], "all")


def test_pairs_go_to_every_atlas_or_from_it():
    assert training_pairs(range(2), [5, 6], "scan_to_atlas").tolist() == [[0, 5], [1, 5], [0, 6], [1, 6]]
    assert training_pairs(range(2), [5, 6], "atlas_to_scan").tolist() == [[5, 0], [5, 1], [6, 0], [6, 1]]
    with pytest.raises(InputError, match="2 scans and 0 atlases; expected at least a scan and an atlas"):
        training_pairs(range(2), [], "scan_to_atlas")


def test_validation_pairs_follow_the_training_and_stay_few():
    assert validation_pairs([3, 4], [5, 6], "scan_to_atlas") == [(3, 5), (4, 5), (3, 6), (4, 6)]
    assert validation_pairs([3, 4], [5], "atlas_to_scan") == [(5, 3), (5, 4)]
    assert validation_pairs([3, 4, 7], [], "all") == [(3, 4), (4, 7), (7, 3)]
    assert validation_pairs([3], [], "all") == validation_pairs([], [5], "scan_to_atlas") == []


# --- the scans --------------------------------------------------------------------------------------------------------


def test_the_bank_holds_images_and_the_labels_that_validation_needs(scans):
    bank = load_bank(scans[:3], scans[3:5], [scans[5]], device=CPU)
    assert bank.names == [f"s{i}" for i in range(6)] and bank.images_of(range(6)).shape == (6, 1, *SHAPE)
    assert sorted(bank.labels) == [3, 4, 5] and bank.structures == [17, 42]
    assert bank.labels_of(0) is None
    assert bank.labels[5].unique().tolist() == [0, 1, 2]
    assert int((bank.labels[5] == 2).sum()) == 5 * 6 * 3
    assert torch.equal(bank.images_of([4, 1])[0], bank.images_of([4])[0])
    only = load_bank(scans[:1], scans[3:4], [scans[5]], device=CPU, structures=[42, 99])
    assert only.structures == [42] and int((only.labels[2] == 1).sum()) == 5 * 6 * 3


def test_without_an_atlas_the_validation_scans_tell_the_structures(scans):
    bank = load_bank(scans[:3], scans[3:5], [], device=CPU)
    assert sorted(bank.labels) == [3, 4] and bank.structures == [17, 42]


def test_a_scan_on_another_grid_is_named(scans, tmp_path):
    path = tmp_path / "strange.nii.gz"
    write_volume(path, Volume(np.random.default_rng(0).random((10, 12, 13), dtype=np.float32), np.eye(4)))
    with pytest.raises(InputError, match=r"strange\.nii\.gz: found a grid of 10x12x13"):
        load_bank([scans[0], Scan("strange", path)], [], [scans[5]], device=CPU)
    with pytest.raises(InputError, match=r"strange\.nii\.gz"):
        load_bank(scans[:2], [Scan("v", scans[3].image, path)], [scans[5]], device=CPU)


# --- what is minimised and measured -----------------------------------------------------------------------------------


def test_the_mean_dice_counts_structures_that_both_maps_have():
    first, second = torch.zeros(2, 1, 1, 1, 4, 5, dtype=torch.uint8)
    first[..., 0, :4] = 1  # 4 voxels, 3 of them common with the second's 3: 2 * 3 / 7
    second[..., 0, :3] = 1
    first[..., 1, :] = 2  # 5 and 5, 2 common: 2 * 2 / 10
    second[..., 1, :2] = 2
    second[..., 2, :3] = 2
    first[..., 3, :] = 3  # the second has none
    assert mean_dice(first, second, 3) == pytest.approx((6 / 7 + 4 / 10) / 2, abs=1e-12)
    assert math.isnan(mean_dice(first, torch.zeros_like(first), 3))


def test_validation_of_a_network_that_does_nothing_is_the_dice_before(scans):
    class Nothing(nn.Module):
        def forward(self, moving, fixed):
            return torch.zeros(1, 3, *SHAPE)

    bank = load_bank(scans[:3], scans[3:5], [scans[5]], device=CPU)
    network = Nothing()
    value = validate(network, bank, [(3, 5), (5, 5)], Objective("mse"), "float32")
    assert value.dice == pytest.approx((2 * 3 / 10 + 1) / 2)  # boxes of 5 that share 3; the atlas with itself
    difference = np.square((bank.images_of([3]) - bank.images_of([5])).numpy(), dtype=np.float64).mean()
    assert value.loss == pytest.approx(difference / 2, rel=1e-5)
    assert network.training


def test_the_dice_decides_then_the_loss_and_what_is_no_number_is_worst():
    inputs = [(math.nan, math.nan), (0.1, math.nan), (0.3, 0.5), (0.2, 0.5), (0.9, 0.6)]
    scores = [Validation(loss, dice).score for loss, dice in inputs]
    assert sorted(scores) == scores and len(set(scores)) == len(scores)


def test_the_loss_is_the_dissimilarity_and_lambda_times_the_diffusion(scans):
    torch.manual_seed(0)
    fixed, warped = torch.rand(2, 1, 1, *SHAPE)
    field = torch.rand(1, 3, *SHAPE)
    for name, sign in (("lncc", -1), ("mse", 1), ("mutual_information", -1)):
        loss, similarity, diffusion = Objective(name, regularisation=0.3)(fixed, warped, field)
        assert float(loss) == pytest.approx(float(sign * similarity + 0.3 * diffusion), rel=1e-5)
    same, different = (Objective("lncc")(fixed, image, field)[0] for image in (fixed, warped))
    assert same < different


def test_the_voxels_reward_a_shift_of_a_part_of_one_and_random_points_do_not():
    torch.manual_seed(0)
    head = gaussian(torch.rand(1, 24, 24, 24), 3.0)[None]
    head = (head - head.min()) / (head.max() - head.min())
    noise = 0.5 * float(head.std())
    moving, fixed = (head + noise * torch.randn(head.shape) for _ in range(2))

    def similarity(shift, **keywords):
        settings = TrainingSettings(window=7, **keywords)
        field = torch.full((1, 3, *head.shape[2:]), shift)
        offsets = [settings.offset_at(step) for step in range(60 if settings.sampling == "random" else 1)]
        return float(np.mean([lncc(*compared(moving, fixed, field, settings, offset), 7) for offset in offsets]))

    nearby = (0.0, 0.2, 0.5)
    at_voxels = [similarity(shift) for shift in nearby]
    assert at_voxels[1] > 1.04 * at_voxels[0]  # although the heads lie where they are
    for keywords in ({"sampling": "random"}, {"smoothing": 1.0}, {"sampling": "random", "smoothing": 0.7}):
        still, near, far = [similarity(shift, **keywords) for shift in nearby]
        assert still > 1.01 * near > 1.04 * far


def test_images_are_compared_at_points_that_the_step_and_the_seed_decide():
    settings = TrainingSettings(sampling="random")
    offsets = np.array([settings.offset_at(step) for step in range(300)])
    assert np.abs(offsets).max() <= 0.5 and np.abs(offsets.mean(axis=0)).max() < 0.06
    assert offsets.std(axis=0) == pytest.approx([math.sqrt(1 / 12)] * 3, rel=0.1)
    assert settings.offset_at(7) == tuple(offsets[7])
    assert TrainingSettings(sampling="random", seed=2).offset_at(7) != settings.offset_at(7)
    assert TrainingSettings().offset_at(7) == (0.0, 0.0, 0.0)
    # where both images are linear, what is compared is they, that much further on
    line = torch.arange(12.0)[:, None, None].expand(1, 1, 12, 12, 12)
    field = torch.zeros(1, 3, 12, 12, 12)
    field[:, 0] = 2.0
    fixed, warped = compared(line, 3.0 * line, field, settings, (0.25, -0.25, 0.125))
    inside = (slice(None), slice(None), slice(1, 8), slice(1, -1), slice(1, -1))
    torch.testing.assert_close(fixed[inside], 3.0 * (line[inside] + 0.25))
    torch.testing.assert_close(warped[inside], line[inside] + 2.25)


def test_without_keys_images_are_compared_as_they_are_and_smoothing_is_for_the_loss_alone(scans):
    torch.manual_seed(0)
    moving, fixed = torch.rand(2, 2, 1, *SHAPE)
    field = torch.rand(2, 3, *SHAPE)
    plain = compared(moving, fixed, field, TrainingSettings())
    assert plain[0] is fixed and torch.equal(plain[1], warp(moving, field))
    found = compared(moving, fixed, field, TrainingSettings(smoothing=0.8))
    smooth = [ndimage.gaussian_filter(image, 0.8, mode="nearest", truncate=TRUNCATE) for image in fixed[:, 0].numpy()]
    np.testing.assert_allclose(found[0][:, 0], smooth, atol=1e-5)
    bank = load_bank(scans[:3], [], [scans[5]], device=CPU)
    network = tiny()
    module = RegistrationModule(network, bank, TrainingSettings(smoothing=0.8, sampling="random"))
    seen = []
    network.register_forward_pre_hook(lambda _, images: seen.append(images))
    module._trainer = SimpleNamespace(global_step=0, world_size=1, global_rank=0)
    module.training_step(torch.tensor([[0, 3]]), 0)
    assert all(torch.equal(*pair) for pair in zip(seen[0], bank.pairs_of(torch.tensor([[0, 3]])), strict=True))


def test_in_bf16_the_network_is_narrow_and_the_loss_is_not(monkeypatch):
    monkeypatch.setattr("dmir.training.objective.has_bfloat16", lambda kind: True)  # imitated where there is none
    torch.manual_seed(0)
    moving, fixed = torch.rand(2, 1, 1, *SHAPE)
    network = tiny().eval().requires_grad_(False)
    seen = []
    network.second.register_forward_hook(lambda *args: seen.append(args[2].dtype))
    field = displacement_of(network, moving, fixed, "bf16")
    assert seen == [torch.bfloat16] and field.dtype == torch.float32
    exact = Objective("lncc")(fixed, moving, field)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        narrow = Objective("lncc")(fixed, moving, field)
    assert [float(a) for a in narrow] == [float(a) for a in exact]
    assert torch.equal(displacement_of(network, moving, fixed, "float32"), network(moving, fixed))


def test_the_switches_of_torch_are_put_back():
    before = torch.backends.cudnn.allow_tf32, torch.backends.cudnn.benchmark
    with pytest.raises(KeyError), arithmetic("float32", deterministic=True):
        assert not torch.backends.cudnn.allow_tf32 and torch.are_deterministic_algorithms_enabled()
        raise KeyError
    assert (torch.backends.cudnn.allow_tf32, torch.backends.cudnn.benchmark) == before
    assert not torch.are_deterministic_algorithms_enabled()


def test_the_learning_rate_follows_its_schedule():
    rates = {
        name: TrainingSettings(steps=100, learning_rate=2.0, schedule=name)
        for name in ("constant", "cosine", "polynomial")
    }
    assert {settings.learning_rate_at(0) for settings in rates.values()} == {2.0}
    assert rates["constant"].learning_rate_at(99) == 2.0
    assert rates["cosine"].learning_rate_at(50) == pytest.approx(1.0)
    assert rates["cosine"].learning_rate_at(25) == pytest.approx(1.0 + math.sqrt(0.5))
    assert rates["polynomial"].learning_rate_at(50) == pytest.approx(2.0 * 0.5**0.9)


def test_settings_that_make_no_sense_are_refused_by_name():
    for name, value in (
        ("steps", 0),
        ("learning_rate", -1.0),
        ("schedule", "cosin"),
        ("precision", "fp8"),
        ("similarity", "ncc"),
        ("sampling", "grid"),
        ("smoothing", -0.5),
    ):
        with pytest.raises(InputError, match=f"^{name}: found "):
            TrainingSettings(**{name: value})
    with pytest.raises(TypeError, match="lerning_rate"):
        TrainingSettings(lerning_rate=1.0)


def test_the_gradient_is_clipped_and_its_norm_noted(scans):
    bank = load_bank(scans[:3], [], [scans[5]], device=CPU)
    network = tiny()
    module = RegistrationModule(network, bank, TrainingSettings(gradient_clip=0.5))
    for parameter in network.parameters():
        parameter.grad = torch.full_like(parameter, 2.0)
    count = sum(parameter.numel() for parameter in network.parameters())
    module._unread.append((1, torch.tensor([[0, 3]]), [torch.tensor(0.0)] * 3))
    module.configure_gradient_clipping(torch.optim.Adam(network.parameters(), fused=True))
    assert module.read_terms()[0][3] == pytest.approx(2.0 * math.sqrt(count), rel=1e-5)
    clipped = torch.cat([parameter.grad.flatten() for parameter in network.parameters()])
    assert float(clipped.norm()) == pytest.approx(0.5, rel=1e-4)


# --- training ---------------------------------------------------------------------------------------------------------


def test_a_training_learns_keeps_its_best_and_tells_all_of_it(scans, tmp_path, monkeypatch, capfd, caplog):
    (tmp_path / "elsewhere").mkdir()
    monkeypatch.chdir(tmp_path / "elsewhere")
    network = tiny()
    before = torch.get_rng_state()
    with caplog.at_level(logging.INFO):
        result = run(
            network, scans, tmp_path / "out", steps=64, validate_every=20, learning_rate=0.02, regularisation=0.001,
            resume_folder=tmp_path / "resume", cohort="boxes", seed=3,
        )  # fmt: skip
    history = pd.read_csv(result.history)
    assert history.step.tolist() == list(range(65)) and validated(result.history) == [0, 20, 40, 60, 64]
    assert history.loss.isna().tolist() == [True] + [False] * 64
    assert history.val_dice.max() > history.val_dice[0] + 0.1
    assert history.loss[-10:].mean() < 0.5 * history.loss[1:11].mean()
    assert history.seconds.is_monotonic_increasing and (history.learning_rate == 0.02).all()

    assert (
        result.dice == pytest.approx(history.val_dice.max()) and result.step == history.step[history.val_dice.idxmax()]
    )
    bank = load_bank(scans[:3], scans[3:5], [scans[5]], device=CPU)
    again = validate(result.network, bank, [(3, 5), (4, 5)], Objective("mse"), "float32")
    assert again.dice == pytest.approx(result.dice)
    kept = load_file(result.weights)
    assert all(torch.equal(kept[name], value) for name, value in result.network.state_dict().items())

    summary = json.loads(result.summary.read_text())
    assert summary["parameters"] == 2 * 4 * 27 + 4 + 4 * 3 * 27 + 3 and summary["steps"] == 64
    assert summary["kept_step"] == result.step and summary["device"] == "cpu" and summary["threads"] == 1
    assert summary["seconds"] >= history.seconds.max() - 1e-3 and summary["versions"]["torch"] == torch.__version__
    metadata = read_metadata(result.weights)
    assert metadata["network"] == "Tiny" and metadata["cohort"] == "boxes" and metadata["seed"] == 3
    assert metadata["grid"]["shape"] == list(SHAPE)

    assert sorted(path.name for path in (tmp_path / "out").iterdir()) == [
        "history.csv",
        "model.safetensors",
        "tensorboard",
        "training.json",
    ]
    assert not any((tmp_path / "resume").iterdir())
    assert not any((tmp_path / "elsewhere").iterdir())
    assert torch.equal(torch.random.get_rng_state(), before)
    printed = "".join(capfd.readouterr()) + caplog.text
    assert "step 40/64" in printed and not any(
        word in printed for word in ("Tip", "litlogger", "GPU available", "num_workers")
    )


def test_a_training_from_a_pack_is_that_from_the_files_and_says_how_long_it_waited(scans, tmp_path):
    from dmir.training import open_pack, pack_scans

    pack_scans(tmp_path / "packed", scans[::-1])
    pack = open_pack(tmp_path / "packed")
    packed = [pack.scan(scan.name) for scan in scans]
    assert packed == scans
    keywords = {"steps": 6, "validate_every": 3, "keep": "last", "pairs": "all"}
    from_files = run(tiny(), scans, tmp_path / "files", **keywords)
    from_pack = run(tiny(), packed, tmp_path / "pack", pack=pack, **keywords)
    assert from_pack.weights.read_bytes() == from_files.weights.read_bytes()
    assert from_pack.dice == from_files.dice
    summary = json.loads(from_pack.summary.read_text())
    assert 0 <= summary["waited_for_images_seconds"] <= summary["seconds"]


def test_validating_more_often_changes_nothing(scans, tmp_path):
    weights = []
    for every in (3, 7):
        result = run(tiny(), scans, tmp_path / str(every), steps=9, validate_every=every, keep="last", pairs="all")
        weights.append(load_file(result.weights))
    assert all(torch.equal(weights[0][name], weights[1][name]) for name in weights[0])


def test_the_seed_decides(scans, tmp_path):
    first, same, other = (
        load_file(run(tiny(), scans, tmp_path / name, steps=3, keep="last", seed=seed).weights)["first.weight"]
        for name, seed in (("a", 1), ("b", 1), ("c", 2))
    )
    assert torch.equal(first, same) and not torch.equal(first, other)


def test_the_first_step_of_adam_has_the_length_of_the_learning_rate(scans, tmp_path):
    before = tiny().second.weight.detach()
    result = run(tiny(), scans, tmp_path, steps=1, learning_rate=0.01, schedule="cosine", keep="last", batch_size=2)
    moved = (result.network.second.weight.detach() - before).abs()
    assert float(moved.median()) == pytest.approx(0.01, rel=1e-3)


def test_without_labels_the_validation_loss_decides_and_without_scans_nothing_does(scans, tmp_path):
    bare = [Scan(scan.name, scan.image) for scan in scans]
    result = run(tiny(), bare, tmp_path / "loss", steps=30, validate_every=6, learning_rate=0.3)
    history = pd.read_csv(result.history)
    assert history.val_dice.isna().all() and math.isnan(result.dice)
    assert result.step == history.step[history.val_loss.idxmin()] < 30
    alone = train(tiny(), {}, bare[:3], [], [bare[5]], output=tmp_path / "none", steps=5, validate_every=2, **FAST)
    assert pd.read_csv(alone.history).step.tolist() == [1, 2, 3, 4, 5] and alone.step == 5


def test_a_network_is_built_by_name_with_its_own_seed(scans, tmp_path, monkeypatch):
    def build(name, shape, **keywords):
        assert (name, shape, keywords) == ("tiny", SHAPE, {"at_call": 0})
        return Tiny(**keywords)

    monkeypatch.setattr("dmir.networks.build", build)
    results = [
        train("tiny", {"at_call": 0}, **split(scans), output=tmp_path / str(i), steps=2, keep="last", seed=seed, **FAST)
        for i, seed in enumerate((1, 1, 2))
    ]
    biases = [result.network.first.bias.tolist() for result in results]
    assert biases[0] == biases[1] != biases[2]
    assert read_metadata(results[0].weights)["network"] == "tiny"


class Undropped(Tiny):
    """Without dropout, whose random numbers a compiled network draws in another order."""

    def forward(self, moving: torch.Tensor, fixed: torch.Tensor) -> torch.Tensor:
        return self.second(torch.tanh(self.first(torch.cat([moving, fixed], dim=1))))


@pytest.mark.skipif(shutil.which("gcc") is None, reason="torch.compile needs a compiler")
def test_a_compiled_network_learns_the_same_and_is_kept_under_the_same_names(scans, tmp_path):
    states = []
    for compiled in (False, True):
        torch.manual_seed(5)
        result = run(Undropped(), scans, tmp_path / str(compiled), steps=3, keep="last", compile=compiled)
        states.append(load_file(result.weights))
    assert states[0].keys() == states[1].keys()
    for key, value in states[0].items():
        torch.testing.assert_close(states[1][key], value, rtol=1e-4, atol=1e-6)


class Still(nn.Module):
    """Gives no displacement, whatever it learns."""

    def __init__(self) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.ones(()))

    def forward(self, moving: torch.Tensor, fixed: torch.Tensor) -> torch.Tensor:
        return 0 * self.weight * torch.zeros(1, 3, *SHAPE)


def test_the_shifted_warp_of_published_code_changes_the_loss_and_not_the_validation(scans, tmp_path):
    histories = {
        kind: pd.read_csv(run(Still(), scans, tmp_path / kind, steps=3, validate_every=3, warp=kind).history)
        for kind in ("exact", "shifted")
    }
    bank = load_bank(scans[:3], scans[3:5], [scans[5]], device=CPU)
    atlas, rest = bank.images_of([5]), torch.zeros(1, 3, *SHAPE)
    for kind, field in (("exact", rest), ("shifted", shifted_displacement(rest))):
        expected = [float((warp(bank.images_of([i]), field) - atlas).square().mean()) for i in range(3)]
        assert sorted(histories[kind].loss[1:]) == pytest.approx(sorted(expected), rel=1e-5)
    assert histories["exact"].val_loss.dropna().tolist() == histories["shifted"].val_loss.dropna().tolist()


def test_the_history_of_a_long_training_has_means_in_its_rows(scans, tmp_path, monkeypatch):
    every = {}
    for rows in (500, 4):
        monkeypatch.setattr("dmir.training.callbacks.HISTORY_ROWS", rows)
        every[rows] = pd.read_csv(run(tiny(), scans, tmp_path / str(rows), steps=12, validate_every=7).history)
    assert every[4].step.tolist() == [0, 3, 6, 7, 9, 12] and every[500].step.tolist() == list(range(13))
    for name in ("loss", "similarity", "regularisation", "gradient_norm"):
        values = every[500][name]
        means = [values[first:last].mean() for first, last in ((1, 4), (4, 7), (7, 8), (8, 10), (10, 13))]
        assert every[4][name][1:].tolist() == pytest.approx(means, rel=1e-6)


# --- accidents --------------------------------------------------------------------------------------------------------


class Poisoned(Tiny):
    """A network whose field, or whose gradient alone, is NaN for one scan."""

    def __init__(self, image: torch.Tensor, where: str) -> None:
        super().__init__()
        self.image, self.where = image, where

    def forward(self, moving, fixed):
        field = super().forward(moving, fixed)
        if self.training and torch.equal(moving[0, 0], self.image) and self.calls > 3:
            # the value of the second is 0, and its gradient 0 * infinity
            return field * torch.nan if self.where == "field" else field + 0 * (self.first.bias * 0).abs().sqrt().sum()
        return field


@pytest.mark.parametrize("where", ["field", "gradient"])
def test_a_loss_that_is_not_finite_names_its_pair_and_leaves_the_last_good_state(scans, tmp_path, where):
    bank = load_bank(scans[:3], [], [scans[5]], device=CPU)
    torch.manual_seed(0)
    network = Poisoned(bank.images_of([1])[0, 0], where)
    with pytest.raises(
        TrainingDiverged, match=r"Step \d+ \(s1 to s5\): .*last good state is in .*last\.ckpt"
    ) as caught:
        run(network, scans, tmp_path / "out", steps=50, validate_every=3, resume_folder=tmp_path, resume_key="key")
    state = torch.load(tmp_path / "key" / "last.ckpt", weights_only=True)
    last_good = caught.value.step - 1
    assert state["step"] == last_good and 3 < last_good < 9
    assert not (tmp_path / "out" / "model.safetensors").exists()
    # the state is that of a training that ended there: nothing of the step that failed is in its weights or moments
    torch.manual_seed(0)
    whole = run(Poisoned(bank.images_of([1])[0, 0] + 1, where), scans, tmp_path / "whole", steps=last_good, keep="last")
    for name, value in load_file(whole.weights).items():
        assert torch.equal(state["network"][name], value)
    assert float(state["optimiser"]["state"][0]["step"]) == last_good
    history = pd.DataFrame(state["history"]).drop(columns="seconds")
    assert history.step.tolist() == list(range(last_good + 1))


LONG = {"steps": 13, "validate_every": 5, "keep": "last", "learning_rate": 0.01, "schedule": "cosine", "pairs": "all"}
LONG |= {"sampling": "random", "smoothing": 0.7}


def child(folder: str, accident: str) -> None:
    """Train in a process of its own, which an accident ends."""
    folder = Path(folder)
    scans = [Scan(f"s{i}", folder / f"s{i}" / "image.nii.gz", folder / f"s{i}" / "labels.nii.gz") for i in range(6)]
    network = tiny(at_call=8, accident=lambda: os.kill(os.getpid(), signal.SIGKILL))
    if accident == "while saving":
        network = tiny()
        save = torch.save

        def save_half(content, path):
            save(content, path)
            if content["step"] == 10:
                os.truncate(path, Path(path).stat().st_size // 2)
                os.kill(os.getpid(), signal.SIGKILL)

        torch.save = save_half
    run(network, scans, folder / "broken", resume_folder=folder / "resume", resume_key="key", **LONG)


def test_a_killed_training_ends_with_the_bits_of_an_unbroken_one(tmp_path):
    scans = make_scans(tmp_path)
    command = "import sys; from test_training import child; child(*sys.argv[1:])"
    environment = {**os.environ, "PYTHONPATH": f"{TESTS.parent / 'src'}{os.pathsep}{TESTS}", "OMP_NUM_THREADS": "1"}
    for accident, steps_seen in (("in a step", [0, 5]), ("while saving", [0, 5])):
        ended = subprocess.run(
            [sys.executable, "-c", command, str(tmp_path), accident], env=environment, capture_output=True, text=True
        )
        assert ended.returncode == -signal.SIGKILL, ended.stderr
        assert validated(tmp_path / "broken" / "history.csv") == steps_seen
        state = torch.load(tmp_path / "resume" / "key" / "last.ckpt", weights_only=True)
        assert state["step"] == 5  # killed in its 8th step, and while it saved its 10th
        (tmp_path / "broken" / "history.csv").unlink()  # as Snakemake does with the outputs of a job that failed

    network = tiny()
    resumed = run(network, scans, tmp_path / "broken", resume_folder=tmp_path / "resume", resume_key="key", **LONG)
    assert network.calls == 8  # only the steps that were left
    unbroken = run(tiny(), scans, tmp_path / "unbroken", **LONG)

    assert resumed.weights.read_bytes() == unbroken.weights.read_bytes()
    histories = [pd.read_csv(result.history).drop(columns="seconds") for result in (resumed, unbroken)]
    pd.testing.assert_frame_equal(*histories, check_exact=True)
    assert validated(resumed.history) == [0, 5, 10, 13]
    assert not any((tmp_path / "resume").iterdir())  # the file that the second kill left half-written is gone too


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
def test_a_signal_ends_the_running_step_and_keeps_it(scans, tmp_path, number):
    network = tiny(at_call=8, accident=lambda: os.kill(os.getpid(), number))
    long = LONG | {"keep": "best", "learning_rate": 0.3}  # so fast that the best is an early one
    handlers = signal.getsignal(signal.SIGTERM), signal.getsignal(signal.SIGINT)
    with pytest.raises((SystemExit, KeyboardInterrupt)) as caught:
        run(network, scans, tmp_path / "out", resume_folder=tmp_path, resume_key="key", **long)
    if number == signal.SIGTERM:
        assert caught.value.code == 143
    else:
        assert caught.type is KeyboardInterrupt
    assert (signal.getsignal(signal.SIGTERM), signal.getsignal(signal.SIGINT)) == handlers
    again = tiny()
    resumed = run(again, scans, tmp_path / "out", resume_folder=tmp_path, resume_key="key", **long)
    unbroken = run(tiny(), scans, tmp_path / "unbroken", **long)
    assert again.calls == 13 - 8 and resumed.step == unbroken.step < 8
    assert resumed.weights.read_bytes() == unbroken.weights.read_bytes()
    histories = [pd.read_csv(result.history).drop(columns="seconds") for result in (resumed, unbroken)]
    pd.testing.assert_frame_equal(*histories, check_exact=True)
    # TensorBoard shows each step once, although two sessions wrote
    assert curve(tmp_path / "out", "val_dice") == curve(tmp_path / "unbroken", "val_dice")
    assert [step for step, _ in curve(tmp_path / "out", "loss")] == list(range(1, 14))


def curve(output: Path, name: str) -> list[tuple[int, float]]:
    """Return what TensorBoard shows of a training."""
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    events = EventAccumulator(str(output / "tensorboard"))
    events.Reload()
    return [(event.step, event.value) for event in events.Scalars(name)]


def test_a_second_interrupt_does_not_wait_for_the_step(scans, tmp_path):
    network = tiny(at_call=3, accident=lambda: [os.kill(os.getpid(), signal.SIGINT) for _ in range(2)])
    with pytest.raises(KeyboardInterrupt):
        run(network, scans, tmp_path / "out", resume_folder=tmp_path, resume_key="key", **LONG)
    assert not (tmp_path / "key").exists()


FULL_DISK = """
import resource, signal, sys
from pathlib import Path
from test_training import LONG, Scan, Tiny, run, tiny
folder, limit = Path(sys.argv[1]), int(sys.argv[2])
scans = [Scan(f"s{i}", folder / f"s{i}" / "image.nii.gz", folder / f"s{i}" / "labels.nii.gz") for i in range(6)]
signal.signal(signal.SIGXFSZ, signal.SIG_IGN)  # as where a quota or a full disk cuts a file short
network = tiny(at_call=7, accident=lambda: resource.setrlimit(resource.RLIMIT_FSIZE, (limit, limit)))
try:
    run(network, scans, folder / "out", resume_folder=folder, resume_key="key", **LONG)
except Exception as error:
    print(type(error).__name__, error)
"""


@pytest.mark.parametrize(("limit", "steps_left"), [(600, 8), (4000, 8)])
def test_a_full_disk_ends_with_a_message_and_loses_no_state(tmp_path, limit, steps_left):
    scans = make_scans(tmp_path)
    environment = {**os.environ, "PYTHONPATH": f"{TESTS.parent / 'src'}{os.pathsep}{TESTS}", "OMP_NUM_THREADS": "1"}
    ended = subprocess.run(
        [sys.executable, "-c", FULL_DISK, str(tmp_path), str(limit)], env=environment, capture_output=True, text=True
    )
    assert "DmirError" in ended.stdout and "cannot be written" in ended.stdout, ended.stdout + ended.stderr
    assert "Make room" in ended.stdout
    assert not [*tmp_path.glob("**/.writing-*")]
    again = tiny()
    resumed = run(again, scans, tmp_path / "out", resume_folder=tmp_path, resume_key="key", **LONG)
    unbroken = run(tiny(), scans, tmp_path / "unbroken", **LONG)
    assert again.calls == steps_left
    assert resumed.weights.read_bytes() == unbroken.weights.read_bytes()


def test_of_several_processes_the_one_with_the_bad_pair_is_named(scans):
    bank = load_bank(scans[:4], [], [scans[5]], device=CPU)
    module = RegistrationModule(tiny(), bank, TrainingSettings(batch_size=4))
    good, spread, bad = [0.5, 0.5, 0.1, 2.0], [0.7, 0.7, 0.3, math.nan], [math.nan, math.nan, 0.1, math.nan]
    others = torch.tensor([[0.3, 0.1, 0.3, 2.0], bad])  # of the second process; a NaN is in the gradient of all
    strategy = SimpleNamespace(all_gather=lambda rows: torch.stack([rows, others]))
    module._trainer = SimpleNamespace(world_size=2, strategy=strategy)
    batch = torch.tensor([[0, 4], [1, 4], [2, 4], [3, 4]])
    module._unread = [(step, batch, list(map(torch.tensor, row))) for step, row in ((7, good), (8, spread))]
    with pytest.raises(TrainingDiverged, match=r"Step 8 \(s1 to s5, s3 to s5\): the loss is nan") as caught:
        module.read_terms()
    assert caught.value.step == 8
    assert caught.value.terms == [pytest.approx([0.4, 0.3, 0.2, 2.0])]


# --- several processes ------------------------------------------------------------------------------------------------

SHARED_TRAINING = {
    "batch_size": 2,
    "steps": 7,
    "validate_every": 3,
    "pairs": "all",
    "keep": "last",
    "learning_rate": 1e-3,
    "gradient_clip": 1.0,
    "similarity": "lncc",
    "window": 5,
    "sampling": "random",
}
NARROW = {"encoder": [4, 4], "decoder": [4, 4, 4], "downsampling": "stride", "integration_steps": 0}


def shared(scans, output, **keywords):
    return train("voxelmorph", NARROW, **split(scans), output=output, **(FAST | SHARED_TRAINING | keywords))


def test_two_processes_learn_what_one_learns_and_go_on_where_they_were_stopped(tmp_path, monkeypatch):
    scans = make_scans(tmp_path)
    one = shared(scans, tmp_path / "one")
    two = shared(scans, tmp_path / "two", processes=2)
    for name, value in load_file(one.weights).items():
        torch.testing.assert_close(load_file(two.weights)[name], value, rtol=1e-4, atol=1e-6)
    first, second = (pd.read_csv(result.history).drop(columns="seconds") for result in (one, two))
    pd.testing.assert_frame_equal(first, second, rtol=1e-4)
    assert json.loads(two.summary.read_text())["processes"] == 2
    assert "WORLD_SIZE" not in os.environ and "LOCAL_RANK" not in os.environ

    from dmir.training.module import RegistrationModule

    step = RegistrationModule.training_step

    def stopping(self, batch, number):
        if self.step == 4:
            os.kill(os.getpid(), signal.SIGTERM)
        return step(self, batch, number)

    keywords = {"processes": 2, "resume_folder": tmp_path, "resume_key": "key"}
    with monkeypatch.context() as patch, pytest.raises(SystemExit):
        patch.setattr(RegistrationModule, "training_step", stopping)
        shared(scans, tmp_path / "again", **keywords)
    assert torch.load(tmp_path / "key" / "last.ckpt", weights_only=True)["step"] == 5
    again = shared(scans, tmp_path / "again", **keywords)
    for name, value in load_file(two.weights).items():
        torch.testing.assert_close(load_file(again.weights)[name], value, rtol=1e-5, atol=1e-7)


def test_the_other_processes_end_with_the_one_that_leads(tmp_path):
    make_scans(tmp_path)
    script = """
import os, signal, sys
from pathlib import Path
from test_training import Scan, shared
from dmir.training.module import RegistrationModule
folder = Path(sys.argv[1])
scans = [Scan(f"s{i}", folder / f"s{i}" / "image.nii.gz", folder / f"s{i}" / "labels.nii.gz") for i in range(6)]
read = RegistrationModule.read_terms
def killing(self):
    if self.step == 4:
        (folder / "followers").write_text(" ".join(
            entry.name for entry in Path("/proc").iterdir() if entry.name.isdigit() and parent(entry) == os.getpid()
        ))
        os.kill(os.getpid(), signal.SIGKILL)
    return read(self)
def parent(entry):
    try:
        return int((entry / "stat").read_text().rpartition(")")[2].split()[1])
    except OSError:
        return -1
RegistrationModule.read_terms = killing
shared(scans, folder / "out", processes=2)
"""
    environment = {**os.environ, "PYTHONPATH": f"{TESTS.parent / 'src'}{os.pathsep}{TESTS}", "OMP_NUM_THREADS": "1"}
    ended = subprocess.run(
        [sys.executable, "-c", script, str(tmp_path)], env=environment, capture_output=True, text=True
    )
    assert ended.returncode == -signal.SIGKILL, ended.stderr
    left = [Path("/proc", number) for number in (tmp_path / "followers").read_text().split()]
    assert left
    end = time.monotonic() + 20
    while any(entry.exists() for entry in left) and time.monotonic() < end:
        time.sleep(0.1)
    assert not [entry for entry in left if entry.exists()]


def test_a_training_that_no_memory_is_there_for_says_which_key_to_change(scans, tmp_path, monkeypatch):
    from dmir.training import memory

    monkeypatch.setattr(memory, "free_memory", lambda device: 1e6)
    with pytest.raises(InputError, match=r"training of narrow on 10x12x14.*free on cpu.*`training\.batch_size: 1`"):
        shared(scans, tmp_path, method="narrow")
    monkeypatch.undo()

    def run_out(*args):
        raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB.")

    monkeypatch.setattr(RegistrationModule, "training_step", run_out)
    with pytest.raises(InputError, match=r"no memory left on cpu \(CUDA out of memory.*`training\.batch_size: 1`"):
        shared(scans, tmp_path, method="narrow")


def test_pairs_that_processes_cannot_share_are_refused(scans, tmp_path):
    with pytest.raises(InputError, match="processes: found 2; expected a divisor of batch_size, which is 3"):
        shared(scans, tmp_path, batch_size=3, processes=2)
    with pytest.raises(InputError, match="network: found an object of Tiny; expected a name"):
        run(tiny(), scans, tmp_path, batch_size=2, processes=2)


def test_a_training_killed_before_it_wrote_its_results_writes_them(scans, tmp_path, monkeypatch):
    keywords = {**LONG, "keep": "best", "resume_folder": tmp_path, "resume_key": "key"}
    with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
        patch.setattr("dmir.training.loop.save_weights", lambda *args, **keywords: _interrupt())
        run(tiny(), scans, tmp_path / "out", **keywords)
    (tmp_path / "out" / "history.csv").unlink()
    again = tiny()
    result = run(again, scans, tmp_path / "out", **keywords)
    unbroken = run(tiny(), scans, tmp_path / "unbroken", **{**LONG, "keep": "best"})
    assert again.calls == 0 and result.step == unbroken.step
    assert result.weights.read_bytes() == unbroken.weights.read_bytes()
    assert validated(result.history) == [0, 5, 10, 13] and not (tmp_path / "key").exists()


class Payload:
    def __init__(self, path: Path) -> None:
        self.path = path

    def __reduce__(self):
        return (Path.touch, (self.path,))


def test_a_state_that_does_not_fit_is_not_resumed(scans, tmp_path, caplog):
    state, marker = tmp_path / "key" / "last.ckpt", tmp_path / "it ran"
    keywords = {"resume_folder": tmp_path, "resume_key": "key", "validate_every": 2, "keep": "last"}
    with pytest.raises(KeyboardInterrupt):  # leaves the state of step 4
        run(tiny(at_call=6, accident=_interrupt), scans, tmp_path / "a", steps=8, **keywords)
    for content, steps, warning in (
        (state.read_bytes(), 9, "is of another training"),
        (_narrowed(state, "first.bias"), 8, "is of another training"),
        (state.read_bytes()[:-100], 8, "cannot be read"),
        (pickle.dumps(Payload(marker), protocol=2), 8, "cannot be read"),
    ):
        state.parent.mkdir(exist_ok=True)
        state.write_bytes(content)
        caplog.clear()
        network = tiny()
        run(network, scans, tmp_path / "b", steps=steps, **keywords)
        assert network.calls == steps and warning in caplog.text
    assert not marker.exists()


def _narrowed(state: Path, name: str) -> bytes:
    """Return the file with one tensor of another shape, as a changed network would leave it."""
    content = torch.load(state, weights_only=True)
    content["network"][name] = content["network"][name][:-1]
    buffer = io.BytesIO()
    torch.save(content, buffer)
    return buffer.getvalue()


def _interrupt() -> None:
    raise KeyboardInterrupt
