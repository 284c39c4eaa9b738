"""What only a graphics card can show, and the command that runs it.

Tests marked ``gpu`` are left out of `make test`; `make gpu` runs them. ``DMIR_TEST_DEVICE=cpu`` has them compute on the
processor instead, which shows that they run and nothing of a card.
"""

from __future__ import annotations

import importlib
import json
import os
import re
import subprocess
import sys
import zipfile
from functools import partial
from pathlib import Path

import numpy as np
import pandas as pd
import pytest
import torch
from test_cost import SMALL
from test_devices import HOLDER
from test_other_device import SHAPE, STAGES, fresh, pair, quiet, smooth, trained

from dmir import losses
from dmir.errors import DmirError, InputError
from dmir.fields import folded_voxels, resize_displacement, warp, warp_labels
from dmir.methods import descent, network, network_device, refinement
from dmir.networks import build, network_names
from dmir.training import Scan, data, load_weights, train
from dmir.training.data import load_bank
from dmir.training.devices import batch_system, choose_device
from dmir.training.objective import PRECISIONS, arithmetic
from dmir.training.pack import pack_scans
from dmir.training.settings import TrainingSettings
from dmir.volumes import Volume, write_volume

ROOT = Path(__file__).parents[1]
gpu = pytest.mark.gpu
CPU = torch.device("cpu")

# the largest difference from the CPU's float32, of the largest number: TF32 has 10 bits, bfloat16 has 7
CLOSE = {"float32": 1e-4, "tf32": 1e-2, "bf16": 6e-2}


@pytest.fixture(scope="module")
def device():
    """The card that these tests have leased; skip where there is none."""
    asked = os.environ.get("DMIR_TEST_DEVICE", "cuda")
    if asked == "cuda" and not torch.cuda.is_available():
        pytest.skip("no graphics card that this torch can use")
    return choose_device(asked, timeout=60)


def only_on_a_card(device):
    if device.type != "cuda":
        pytest.skip("a card alone can show this")


def require_close(found, expected, close):
    found, expected = (torch.as_tensor(x).detach().float().cpu() for x in (found, expected))
    assert torch.isfinite(found).all()
    scale = float(expected.abs().max())
    assert float((found - expected).abs().max()) <= close * scale, f"differs by more than {close:g} of {scale:g}"


def displaced(seed=5):
    """Return a smooth field of some voxels, (1, 3, *SHAPE)."""
    coarse = torch.randn(1, 3, 4, 5, 6, generator=torch.Generator().manual_seed(seed))
    return resize_displacement(coarse, SHAPE)


# --- the CPU's numbers ---


@gpu
@pytest.mark.parametrize("precision", PRECISIONS)
@pytest.mark.parametrize("name", network_names())
def test_a_network_gives_the_cpus_field(device, name, precision):
    moving, fixed = smooth(2)[:, None, None].split(1)

    def field(where, how):
        net = fresh(name, quiet(name)).eval()
        with torch.no_grad(), arithmetic(how):
            for weight in net.parameters():
                weight.add_(0.02 * torch.randn_like(weight))
            net.to(where)
            inputs = moving[0].to(where), fixed[0].to(where)
            return network_device.displacement_of(net, *inputs, how)

    require_close(field(device, precision), field(CPU, "float32"), CLOSE[precision])


@gpu
@pytest.mark.parametrize("precision", PRECISIONS)
@pytest.mark.parametrize("name", network_names())
def test_a_training_step_has_the_cpus_loss_and_gradient(device, name, precision):
    settings, images = TrainingSettings(precision=precision), smooth(3).half()

    def terms(where, how):
        chosen = TrainingSettings(precision=how)
        with arithmetic(how):
            module, take = trained(fresh(name, quiet(name)), where, chosen, images.to(where))
            take()
            return module.read_terms()[0]

    found, expected = terms(device, settings.precision), terms(CPU, "float32")
    assert found[:3] == pytest.approx(expected[:3], rel=CLOSE[precision], abs=CLOSE[precision] / 10)
    assert found[3] == pytest.approx(expected[3], rel=3 * CLOSE[precision], abs=1e-6)


@gpu
@pytest.mark.parametrize("precision", PRECISIONS)
@pytest.mark.parametrize("similarity", losses.SIMILARITIES)
def test_losses_are_in_float32_whatever_the_networks_precision(device, similarity, precision):
    fixed, warped = smooth(2, seed=7)[:, None, None]

    def value(where, how):
        a, b = fixed.to(where), warped.to(where).requires_grad_()
        with arithmetic(how), torch.autocast(where.type, dtype=torch.bfloat16, enabled=how == "bf16"):
            result = losses.SIMILARITIES[similarity](a, b)
        with arithmetic(how):  # a training asks for the gradient outside of autocast
            return result, torch.autograd.grad(result, b)[0]

    (found, gradient), (expected, exact) = value(device, precision), value(CPU, "float32")
    # the histogram of mutual information is a matrix product, and TF32 is what the settings ask for such
    close = 2e-3 if (similarity, precision) == ("mutual_information", "tf32") else 2e-4
    require_close(found, expected, close)
    require_close(gradient, exact, 10 * close)


@gpu
@pytest.mark.parametrize("precision", PRECISIONS)
def test_warps_and_the_diffusion_are_the_cpus(device, precision):
    image, field = smooth(1)[None], displaced()
    labels = (image * 6).to(torch.uint8)

    def results(where):
        u = field.to(where).requires_grad_()
        with arithmetic(precision if where != CPU else "float32"):
            warped = warp(image.to(where), u)
            energy = losses.diffusion(u)
            (gradient,) = torch.autograd.grad(warped.square().sum() + energy, u)
        maps = [warp_labels(labels.to(where), u.detach(), how) for how in ("nearest", "linear")]
        return [warped, energy, gradient], maps

    (found, maps), (expected, exact) = results(device), results(CPU)
    for ours, theirs in zip(found, expected, strict=True):
        require_close(ours, theirs, 1e-4)
    for ours, theirs in zip(maps, exact, strict=True):  # where a place is half-way, rounding decides
        assert (ours.cpu() != theirs).float().mean() < 1e-3


@gpu
@pytest.mark.parametrize("similarity", losses.SIMILARITIES)
def test_a_descent_ends_where_the_cpus_does(device, similarity):
    found, expected = (
        descent.register(*pair(), where, stages=STAGES, similarity=similarity, tolerance=-1.0)
        for where in (device, CPU)
    )
    assert np.abs(expected).max() > 0.1
    assert np.abs(found - expected).mean() < 1e-2  # voxels
    assert folded_voxels(torch.from_numpy(found)) == 0


@gpu
def test_a_refinement_ends_where_the_cpus_does(device):
    moving, fixed = (torch.from_numpy(volume.data)[None, None] for volume in pair())
    found, expected = (
        refinement.refine(*(x.to(where) for x in (moving, fixed, 0.2 * displaced())), stages=STAGES, tolerance=-1.0)
        for where in (device, CPU)
    )
    assert float((found.cpu() - expected).abs().mean()) < 1e-2


@gpu
@pytest.mark.parametrize("name", network_names())
def test_a_step_does_not_wait_for_the_card(device, name):
    only_on_a_card(device)
    for precision in ("float32", "bf16"):
        settings = TrainingSettings(precision=precision, gradient_clip=1.0)
        with arithmetic(precision):
            module, take = trained(fresh(name, quiet(name)), device, settings, smooth(3).half().to(device))
            take()
            torch.cuda.synchronize(device)
            torch.cuda.set_sync_debug_mode("error")
            try:
                take()
            finally:
                torch.cuda.set_sync_debug_mode("default")
            assert np.isfinite(module.read_terms()).all()


# --- trainings ---


@pytest.fixture
def scans(tmp_path):
    made = []
    for number, image in enumerate(smooth(4).numpy()):
        made.append(Scan(f"s{number}", tmp_path / f"s{number}.nii", tmp_path / f"s{number}-labels.nii"))
        write_volume(made[-1].image, Volume(image, np.eye(4)))
        write_volume(made[-1].labels, Volume((image * 4).astype(np.int32), np.eye(4)), dtype=np.int32)
    return made


class Stumbles(Exception):
    """What ends a training in the middle."""


def trained_on(scans, folder, where, *, stumble=False, monkeypatch=None, **settings):
    split = {"scans": scans[:2], "validation": scans[2:3], "atlases": scans[3:]}
    asked = {"steps": 6, "validate_every": 2, "learning_rate": 1e-3, "similarity": "mse", **settings}
    if stumble:
        right, calls = torch.optim.Adam.step, []

        def step(*arguments, **keywords):
            calls.append(1)
            if len(calls) == 5:
                raise Stumbles
            return right(*arguments, **keywords)

        monkeypatch.setattr(torch.optim.Adam, "step", step)
    try:
        return train(
            "voxelmorph", SMALL["voxelmorph"], **split, output=folder, resume_folder=folder, device=where, **asked
        )
    finally:
        if stumble:
            monkeypatch.undo()


@gpu
def test_a_training_that_broke_off_goes_on_to_the_same_weights(device, scans, tmp_path, monkeypatch):
    with pytest.raises(Stumbles):
        trained_on(scans, tmp_path / "broken", device, stumble=True, monkeypatch=monkeypatch)
    resumed = trained_on(scans, tmp_path / "broken", device)
    unbroken = trained_on(scans, tmp_path / "unbroken", device)
    assert len(pd.read_csv(resumed.history)) == len(pd.read_csv(unbroken.history)) == 7
    for ours, theirs in zip(resumed.network.parameters(), unbroken.network.parameters(), strict=True):
        require_close(ours, theirs, 1e-2)  # a card adds up gradients in another order each time
    told = json.loads(resumed.summary.read_text())
    assert told["device"] == (torch.cuda.get_device_name(device) if device.type == "cuda" else "cpu")


@gpu
def test_weights_of_a_card_are_read_anywhere(device, scans, tmp_path):
    weights = trained_on(scans, tmp_path / "out", device, precision="bf16").weights
    fields = [network.register(*pair(), load_weights(weights, device=where), where) for where in (device, CPU)]
    require_close(fields[0], fields[1], CLOSE["float32"])


@gpu
def test_images_come_through_page_locked_memory(device, scans, tmp_path, monkeypatch):
    only_on_a_card(device)
    assert network_device.to_tensor(pair()[0], device).is_pinned()
    pack = pack_scans(tmp_path / "pack", scans)
    split = scans[:2], scans[2:3], scans[3:]
    resident = load_bank(*split, device=device, pack=pack)
    monkeypatch.setattr(data, "SHARE_OF_GPU", 0.0)
    streamed = load_bank(*split, device=device, pack=pack)
    assert resident.is_resident and not streamed.is_resident and streamed._read([0]).is_pinned()
    batches = [torch.tensor([[0, 3]]), torch.tensor([[1, 3]])]
    with streamed.prefetch(batches):
        for batch in batches:
            for ours, theirs in zip(streamed.pairs_of(batch), resident.pairs_of(batch), strict=True):
                assert torch.equal(ours, theirs)


@gpu
def test_a_second_process_is_refused_the_card(device):
    only_on_a_card(device)
    if batch_system() is not None:
        pytest.skip("a batch system's cards are not leased")
    command = [sys.executable, "-c", HOLDER, "1", "0.5"]
    environment = {**os.environ, "PYTHONPATH": str(ROOT / "src")}
    answer = subprocess.run(command, env=environment, input="", capture_output=True, text=True, check=True)
    assert json.loads(answer.stdout)[0] == "NoFreeCard"


@gpu
def test_memory_that_runs_out_is_told_with_the_keys_that_need_less(device, tmp_path):
    only_on_a_card(device)
    large = (96, 112, 96)
    scans = []
    for number in range(2):
        scans.append(Scan(f"s{number}", tmp_path / f"s{number}.nii"))
        write_volume(scans[-1].image, Volume(np.random.default_rng(number).random(large, np.float32), np.eye(4)))
    total = torch.cuda.get_device_properties(device).total_memory
    torch.cuda.empty_cache()
    torch.cuda.set_per_process_memory_fraction(1.5e8 / total, device)
    try:
        with pytest.raises(InputError) as told:
            train("voxelmorph", {}, scans[:1], [], scans[1:], output=tmp_path, device=device, steps=2)
        net = build("voxelmorph", large).to(device).eval()
        known = {"network": "voxelmorph", "seed": 1, "grid": {"spacing": [1.0, 1.0, 1.0]}}
        images = [Volume(np.ones(large, np.float32), np.eye(4))] * 2
        with pytest.raises(DmirError, match=r"out of memory on .*bf16"):
            network.register(*images, (net, known), device)
    finally:
        torch.cuda.set_per_process_memory_fraction(1.0, device)
    assert "memory for the training of voxelmorph on 96x112x96: found no memory left" in str(told.value)
    assert "`training.precision: bf16`" in str(told.value) and "grid.shape" in str(told.value)


# --- the command ---

SCRIPT = ROOT / "benchmarks" / "gpu.py"
TRYING = ["--device", "cpu", "--grid", "32x32x32", "--spacing", "5", "--networks", "voxelmorph"]


def command(*arguments, **environment):
    line = [sys.executable, str(SCRIPT), *map(str, arguments)]
    return subprocess.run(line, env={**os.environ, **environment}, capture_output=True, text=True)


def test_without_a_card_it_says_what_it_would_do(tmp_path):
    """`make gpu` on a machine without one."""
    dry = subprocess.run(["make", "-n", "gpu"], cwd=ROOT, capture_output=True, text=True, check=True).stdout
    assert "python benchmarks/gpu.py --minutes 25 --out benchmarks/results/gpu" in dry
    told = command("--out", tmp_path / "out", GPU_POOL="", CUDA_VISIBLE_DEVICES="")
    assert told.returncode == 0, told.stderr
    assert "nothing is done. With a card this would take up to 25 minutes for:" in told.stdout
    for kind in ("- tests", "- networks at 160x192x224: ", "- registration at 160x192x224", "- no trainings"):
        assert kind in told.stdout
    assert not (tmp_path / "out").exists()


def test_what_cannot_be_done_is_told_before_anything_is_begun(tmp_path, monkeypatch):
    monkeypatch.syspath_prepend(SCRIPT.parent)
    main = importlib.import_module("gpu").main
    (tmp_path / "no.zip").write_bytes(b"no archive")
    (tmp_path / "broken").mkdir()
    (tmp_path / "broken" / "state.json").write_text("{")
    wrong = {
        "no such file": ["--scans", tmp_path / "none.zip"],
        "File is not a zip file": ["--scans", tmp_path / "no.zip", *TRYING, "--out", tmp_path / "o"],
        "three numbers of voxels": ["--grid", "160"],
        "a known name": ["--networks", "voxelmorf"],
        "what this script wrote": ["--out", tmp_path / "broken"],
        "no --cohort or no --file": ["--pack", tmp_path],
    }
    for expected, arguments in wrong.items():
        with pytest.raises(InputError, match=re.escape(expected)):
            main(list(map(str, ["--work", tmp_path / "work", *arguments])))
    with zipfile.ZipFile(tmp_path / "other.zip", "w") as archive:
        archive.writestr("../outside.npy", b"")
    told = command("--work", tmp_path / "work", "--scans", tmp_path / "other.zip", *TRYING, "--out", tmp_path / "o")
    assert told.returncode == 1 and "found ../outside.npy" in told.stderr and "Traceback" not in told.stderr
    assert not (tmp_path / "outside.npy").exists()


@pytest.fixture(scope="module")
def packed(tmp_path_factory):
    """Scans of a results folder in one file."""
    results = tmp_path_factory.mktemp("packed") / "results"
    parts = ["train", "train", "val", "atlas", "test"]
    table = pd.DataFrame({"scan": [f"s{number}" for number in range(5)], "split": parts})
    (results / "cohorts" / "made").mkdir(parents=True)
    table.to_csv(results / "cohorts" / "made" / "scans.csv", index=False)
    for name, image in zip(table["scan"], torch.rand(5, 32, 32, 32).numpy(), strict=True):
        folder = results / "preprocessed" / "made" / name
        write_volume(folder / "image.nii.gz", Volume(image, np.eye(4)))
        write_volume(folder / "labels.nii.gz", Volume((image > 0.5).astype(np.int32), np.eye(4)), dtype=np.int32)
    file = results.parent / "scans.zip"
    told = command("--pack", results, "--cohort", "made", "--file", file, "--most", 1)
    assert told.returncode == 0 and "3 scans of made" in told.stdout, told.stderr
    return file


def test_the_file_of_scans_holds_who_is_learned_from_and_no_label_of_theirs(packed):
    with zipfile.ZipFile(packed) as archive:
        assert sorted(archive.namelist()) == ["images.npy", "labels.npy", "pack.json", "split.json"]
        record, split = (json.loads(archive.read(name)) for name in ("pack.json", "split.json"))
    assert split == {"train": ["s0"], "val": ["s2"], "atlas": ["s3"]}
    assert record["precision"] == "uint8" and record["names_with_labels"] == ["s2", "s3"]


def test_what_is_done_is_not_done_again_and_a_training_goes_on(packed, tmp_path):
    where = ["--out", tmp_path / "out", "--work", tmp_path / "work", "--only", "networks", "trainings"]
    asked = partial(command, *where, *TRYING, "--scans", packed, "--steps", 20)
    first = asked("--minutes", 4)
    state = json.loads((tmp_path / "out" / "state.json").read_text())["steps"]
    assert first.returncode == 0, first.stderr
    done = {name for name, step in state.items() if step["status"] == "done"}
    assert done == {f"networks voxelmorph {name}" for name in ("bf16", "float32", "tf32")} | {"trainings voxelmorph"}
    table = pd.read_csv(tmp_path / "out" / "networks.csv")
    assert len(table) == 3 and (table["step_roofline_share"] > 0).all() and set(table["grid"]) == {"32x32x32"}
    history = pd.read_csv(tmp_path / "out" / "trainings.csv")
    assert history["step"].max() == 20 and set(history["network"]) == {"voxelmorph"}
    assert sorted(path.name for path in (tmp_path / "out").iterdir()) == [
        *("log.txt", "networks.csv", "state.json", "summary.md", "trainings.csv")
    ]
    again = asked("--minutes", 4)
    assert again.returncode == 0 and "4 of 4 steps are done" in again.stderr
    assert json.loads((tmp_path / "out" / "state.json").read_text())["steps"] == state
