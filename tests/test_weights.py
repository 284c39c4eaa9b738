"""Weights on disk, and registration with them."""

from __future__ import annotations

import logging
import pickle
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors.torch import save_file
from torch import nn

from dmir import networks
from dmir.errors import InputError, StorageError
from dmir.fields import load_field
from dmir.methods.network import COLUMNS, register, register_pairs
from dmir.training.weights import load_weights, read_metadata, save_weights
from dmir.volumes import Grid, Volume, write_volume

SHAPE = (6, 7, 8)
AFFINE = np.array([[-1.5, 0, 0, 10], [0, 0, 1.5, -3], [0, 1.5, 0, 7], [0, 0, 0, 1.0]])  # axes L, S, A
GRID = Grid(SHAPE, AFFINE)


class Shift(nn.Module):
    """Everything by ``shift`` voxels, and NaN for a moving image whose mean is above one half."""

    def __init__(self, shape: tuple[int, int, int], *, channels: int = 2, window: tuple[int, ...] = (3, 3)) -> None:
        super().__init__()
        self.shift = nn.Parameter(torch.zeros(3))
        self.convolution = nn.Conv3d(1, channels, 3)
        self.built_for = shape

    def forward(self, moving: torch.Tensor, fixed: torch.Tensor) -> torch.Tensor:
        shift = torch.where(moving.mean() > 0.5, torch.nan, self.shift)
        return shift.view(1, 3, 1, 1, 1).expand(len(moving), 3, *moving.shape[2:])


@pytest.fixture(autouse=True)
def shift_can_be_built(monkeypatch):
    monkeypatch.setattr(
        networks, "build", lambda name, shape, **keywords: {"shift": Shift, "other": nn.Linear}[name](shape, **keywords)
    )


@pytest.fixture
def weights(tmp_path) -> Path:
    torch.manual_seed(0)
    network = Shift(SHAPE, channels=3)
    with torch.no_grad():
        network.shift.copy_(torch.tensor([1.0, 0.0, -2.5]))
    return written(tmp_path / "model.safetensors", network)


def written(path: Path, network: nn.Module, **changes) -> Path:
    settings = {
        "name": "shift",
        "hyperparameters": {"channels": 3, "window": (3, 3)},
        "grid": GRID,
        "cohort": "c",
        "seed": 4,
    }
    save_weights(path, network, **(settings | changes))
    return path


def test_what_is_written_is_read_back_bit_by_bit(weights):
    torch.manual_seed(0)
    convolution = Shift(SHAPE, channels=3).convolution
    network, metadata = load_weights(weights)
    assert torch.equal(network.convolution.weight, convolution.weight)
    assert network.shift.tolist() == [1.0, 0.0, -2.5]
    assert not network.training and network.built_for == SHAPE
    assert metadata["network"] == "shift" and metadata["cohort"] == "c" and metadata["seed"] == 4
    assert metadata["hyperparameters"] == {"channels": 3, "window": [3, 3]}
    assert metadata["grid"]["shape"] == list(SHAPE) and metadata["grid"]["spacing"] == [1.5, 1.5, 1.5]
    assert np.allclose(metadata["grid"]["affine"], AFFINE)
    assert read_metadata(weights) == metadata


def test_equal_weights_are_equal_files(weights, tmp_path):
    network, _ = load_weights(weights)
    assert written(tmp_path / "again.safetensors", network).read_bytes() == weights.read_bytes()


def test_a_failed_write_leaves_the_old_file_and_nothing_else(weights, tmp_path):
    before = weights.read_bytes()
    with pytest.raises(TypeError):
        written(weights, Shift(SHAPE), extra={"not for JSON": object()})
    assert weights.read_bytes() == before
    assert [path.name for path in tmp_path.iterdir()] == [weights.name]


def test_tensors_that_share_memory_are_written(tmp_path):
    network = Shift(SHAPE, channels=3)
    network.tied = nn.Parameter(network.shift.data)  # safetensors itself refuses this
    path = written(tmp_path / "tied.safetensors", network)
    with pytest.raises(InputError, match=r"1 tensors unexpected \(tied\)"):
        load_weights(path)


class Payload:
    def __init__(self, path: Path) -> None:
        self.path = path

    def __reduce__(self):
        return (Path.touch, (self.path,))


def test_a_pickle_is_refused_and_not_run(tmp_path):
    marker, path = tmp_path / "it ran", tmp_path / "model.safetensors"
    for write in (lambda: path.write_bytes(pickle.dumps(Payload(marker))), lambda: torch.save(Payload(marker), path)):
        write()
        with pytest.raises(InputError, match="not safetensors"):
            load_weights(path)
        assert not marker.exists()


def test_files_that_are_no_weights_are_refused_by_name(weights, tmp_path):
    with pytest.raises(InputError, match=r"absent\.safetensors: found no such file"):
        load_weights(tmp_path / "absent.safetensors")
    short = tmp_path / "short.safetensors"
    short.write_bytes(weights.read_bytes()[:-10])
    with pytest.raises(InputError, match=r"short\.safetensors: found .*cut short"):
        load_weights(short)
    foreign = tmp_path / "foreign.safetensors"
    save_file({"shift": torch.zeros(3)}, foreign, metadata={"format": "pt"})
    with pytest.raises(InputError, match="another program"):
        load_weights(foreign)


def test_weights_of_a_later_version_are_refused(weights, monkeypatch):
    monkeypatch.setattr("dmir.training.weights.FORMAT", 0)
    with pytest.raises(InputError, match="weights format 1"):
        load_weights(weights)


def test_another_network_is_refused_and_both_are_named(weights):
    with pytest.raises(InputError, match="found network 'shift'; expected network 'caml'"):
        load_weights(weights, expected={"network": "caml"})


def test_what_weights_do_not_say_of_their_network_is_assumed_and_told(tmp_path, monkeypatch, caplog):
    monkeypatch.undo()
    network = networks.build("pyramid", (16, 16, 16), channels=[4], heads=[1])
    complete = network.hyperparameters
    older = {key: value for key, value in complete.items() if key != "integration_steps"}
    for name, said in (("new", complete), ("old", older)):
        path = tmp_path / f"{name}.safetensors"
        save_weights(path, network, name="pyramid", hyperparameters=said, grid=Grid((16, 16, 16), AFFINE))
        load_weights(path)
        assert ("integration_steps = 4 is assumed" in caplog.text) == (name == "old")


def test_other_hyperparameters_are_refused_and_only_they_are_named(weights):
    load_weights(weights, expected={"network": "shift", "hyperparameters": {"window": (3, 3)}})
    with pytest.raises(InputError) as caught:
        load_weights(weights, expected={"hyperparameters": {"channels": 8, "window": (3, 3), "depth": 2}})
    assert "channels=3, depth=None" in str(caught.value) and "channels=8, depth=2" in str(caught.value)
    assert "window" not in str(caught.value)


def test_tensors_that_do_not_fit_are_named(tmp_path):
    wider = written(tmp_path / "wide.safetensors", Shift(SHAPE, channels=5))
    with pytest.raises(InputError, match=r"2 tensors of another shape \(convolution\.bias, convolution\.weight\)"):
        load_weights(wider)
    network = Shift(SHAPE, channels=3)
    del network.convolution
    lacking = written(tmp_path / "lacking.safetensors", network)
    with pytest.raises(InputError, match=r"2 tensors missing \(convolution\.bias, convolution\.weight\)"):
        load_weights(lacking)


def image(seed: int, shape=SHAPE, affine=AFFINE, brightness: float = 0.5) -> Volume:
    data = np.random.default_rng(seed).random(shape, dtype=np.float32) * brightness
    return Volume(data, affine)


def test_the_field_of_one_pair_is_what_the_network_gives(weights):
    field = register(image(1), image(2), weights, device="cpu")
    assert field.shape == (3, *SHAPE) and field.dtype == np.float32
    assert np.array_equal(field, np.broadcast_to(np.array([1, 0, -2.5], np.float32).reshape(3, 1, 1, 1), field.shape))
    assert np.array_equal(register(image(1), image(2), load_weights(weights)), field)


def test_a_pair_on_two_grids_is_refused(weights):
    with pytest.raises(InputError, match="the moving image: found a grid"):
        register(image(1, affine=AFFINE @ np.diag([2, 1, 1, 1.0])), image(2), weights, device="cpu")


def test_other_spacing_and_shape_than_trained_on(weights, caplog):
    shape, affine = (8, 8, 9), AFFINE @ np.diag([2, 2, 2, 1.0])
    field = register(image(1, shape, affine), image(2, shape, affine), weights, device="cpu")
    assert field.shape == (3, *shape)
    assert "trained on voxels of 1.5x1.5x1.5 mm, and these are 3x3x3 mm" in caplog.text


def test_a_network_with_a_table_of_positions_registers_on_another_grid(tmp_path, monkeypatch):
    monkeypatch.undo()  # the real networks
    hyperparameters = {"convolutions": [4, 4], "patch": 2, "hidden": 8, "layers": 1, "heads": 1, "perceptron": 8}
    hyperparameters |= {"bottleneck": 8, "decoder": [4, 4]}
    network = networks.build("vit_v_net", (16, 16, 16), **hyperparameters)
    path, grid = tmp_path / "vit.safetensors", Grid((16, 16, 16), AFFINE)
    save_weights(path, network, name="vit_v_net", hyperparameters=network.hyperparameters, grid=grid)
    field = register(image(1, (20, 24, 18)), image(2, (20, 24, 18)), path, device="cpu")
    assert field.shape == (3, 20, 24, 18) and np.isfinite(field).all()


def test_pairs_become_fields_and_records_and_failures_are_records_too(weights, tmp_path, caplog):
    paths = {
        name: tmp_path / "images" / f"{name}.nii.gz"
        for name in ("atlas", "s1", "s2", "s3", "s4", "s5", "elsewhere", "bright")
    }
    for seed, (name, path) in enumerate(paths.items()):
        shifted = AFFINE + np.array([[0, 0, 0, 9.0 * (name == "elsewhere")]] + [[0] * 4] * 3)
        write_volume(path, image(seed, affine=shifted, brightness=2.0 if name == "bright" else 0.5))
    order = ["s1", "s2", "elsewhere", "s3", "bright", "s4", "s5"]

    with caplog.at_level(logging.INFO, logger="dmir"):
        records = register_pairs(
            [(name, paths[name], "atlas", paths["atlas"]) for name in order],
            tmp_path / "fields",
            weights,
            device="cpu",
            cohort="test",
        )

    assert tuple(records.columns) == COLUMNS
    assert list(records.moving) == order and set(records.fixed) == {"atlas"}
    failed = records.status == "failed"
    assert list(records.moving[failed]) == ["elsewhere", "bright"]
    reasons = dict(zip(records.moving, records.reason, strict=True))
    assert "elsewhere.nii.gz" in reasons["elsewhere"]
    assert f"{3 * np.prod(SHAPE)} values that are NaN" in reasons["bright"]
    assert (records.reason[~failed] == "").all()
    measured = ["seconds", "read_seconds", "write_seconds", "peak_memory_mb"]
    assert (records.loc[~failed, measured] > 0).all(axis=None)
    assert records.loc[failed, ["seconds", "write_seconds"]].isna().all(axis=None)
    assert (records.cohort == "test").all() and (records.method == "shift").all() and (records.model == "seed4").all()
    assert (records.device == "cpu").all() and (records.threads == torch.get_num_threads()).all()
    assert {path.name for path in (tmp_path / "fields").iterdir()} == {f"s{i}__atlas.nii" for i in range(1, 6)}
    field, affine = load_field(tmp_path / "fields" / "s4__atlas.nii")
    assert np.allclose(field, np.array([1, 0, -2.5]).reshape(3, 1, 1, 1), atol=1e-6) and np.allclose(affine, AFFINE)
    lines = [record.getMessage() for record in caplog.records if "/7 " in record.getMessage()]
    assert len(lines) == 7 and lines[2].startswith("3/7 elsewhere to atlas: failed")


def test_an_image_that_cannot_be_read_and_a_full_disk_are_no_failed_pairs(weights, tmp_path, monkeypatch):
    whole, broken = tmp_path / "whole.nii.gz", tmp_path / "broken.nii.gz"
    write_volume(whole, image(1))
    broken.write_bytes(whole.read_bytes()[:100])
    with pytest.raises(InputError, match=r"broken\.nii\.gz"):
        register_pairs([("broken", broken, "atlas", whole)], tmp_path / "fields", weights, device="cpu")

    def save_field(path, *arguments):
        raise StorageError(path, reason="the disk is full", remedy="Make room.")

    monkeypatch.setattr("dmir.methods.network_session.save_field", save_field)
    with pytest.raises(StorageError, match=r"whole__atlas\.nii: the disk is full"):
        register_pairs([("whole", whole, "atlas", whole)], tmp_path / "fields", weights, device="cpu")


def test_no_pairs_are_an_empty_table(weights, tmp_path):
    records = register_pairs([], tmp_path, weights, device="cpu")
    assert records.empty and tuple(records.columns) == COLUMNS


def test_neither_shapes_alone_nor_the_arithmetic_of_a_registration_import_torchs_compiler():
    code = (
        "import sys; from dmir.networks import build; from dmir.networks.shapes import shapes_alone\n"
        "from dmir.training.objective import arithmetic\n"
        "with shapes_alone(), arithmetic('float32'): network = build('caml', (16, 16, 16))\n"
        "print({p.device.type for p in network.parameters()}, 'torch._dynamo' in sys.modules)"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.split("\n")[0] == "{'meta'} False"
