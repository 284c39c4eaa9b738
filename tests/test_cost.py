"""What is counted of a computation: against numbers known by hand, against real tensors, against a real process."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
from torch import nn

from dmir.errors import InputError
from dmir.networks import build, network_names
from dmir.networks.swin import relative_position_index
from dmir.training import memory
from dmir.training.cost import ADAM, CostCounter, count_inference, count_objective, count_step
from dmir.training.hollow import hollow_tensors

FULL = (160, 192, 224)
CPU = torch.device("cpu")
SMALL = {
    "voxelmorph": {"encoder": [4, 8], "decoder": [8, 8, 4]},
    "vit_v_net": {"convolutions": [4, 8, 8], "patch": 4, "hidden": 24, "layers": 1, "heads": 2, "perceptron": 24}
    | {"bottleneck": 16, "decoder": [8, 8, 8, 4]},
    "transmorph": {"embedding": 8, "depths": [2, 2], "heads": [2, 4], "window": [2, 3, 3], "drop_path": 0.0},
    "xmorpher": {"channels": [8, 16], "depths": [1, 1], "heads": [1, 2], "head_channels": 4, "drop_path": 0.0},
    "transmatch": {"embedding": 8, "depths": [2, 2], "heads": [2, 4], "cross_heads": 2, "drop_path": 0.0},
    "pyramid": {"channels": [4, 6, 8], "heads": [1, 2, 2], "head_channels": 3, "descent_steps": [2, 1, 0]},
    "caml": {"detail_channels": [4, 6], "channels": [8, 16], "depths": [1, 1], "heads": [1, 2]},
}


# --- arithmetic ---


def test_a_convolution_is_counted_as_by_hand():
    with CostCounter() as counter, torch.no_grad():
        nn.Conv3d(4, 8, 3, padding=1)(torch.zeros(1, 4, 10, 12, 14))
    assert counter.flop == 2 * 27 * 4 * 8 * (10 * 12 * 14)


@pytest.mark.parametrize("masked", [True, False])
def test_attention_is_counted_as_by_hand(masked):
    with hollow_tensors(), CostCounter() as counter:
        query, key = torch.zeros(3, 2, 64, 16, requires_grad=True), torch.zeros(3, 2, 512, 16)
        answer = F.scaled_dot_product_attention(
            query, key, key, attn_mask=torch.zeros(3, 1, 64, 512) if masked else None
        )
        product = 2 * (3 * 2) * 64 * 512 * 16
        assert counter.flop == 2 * product  # scores, and weighted values
        answer.sum().backward()
    # the scores once more, and the gradients of weights, values, queries and keys
    assert counter.flop == (2 + 5) * product


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
    found = count_inference("voxelmorph", {"downsampling": "stride", "integration_steps": 0}, FULL)
    assert found.parameters == 301_411
    assert found.gflop == pytest.approx(published - saved, rel=1e-9)


@pytest.mark.parametrize("name", network_names())
def test_counting_without_contents_is_counting_for_real(name):
    shape = (32, 24, 28)
    counted = count_inference(name, SMALL[name], shape)
    network = build(name, shape, **SMALL[name]).eval()
    moving, fixed = torch.rand(2, 1, 1, *shape)
    with CostCounter() as counter, torch.no_grad():
        network(moving, fixed)
    held = 4 * (counted.parameters + 2 * moving.numel())  # was there before the counter
    buffers = sum(b.nbytes for b in network.buffers())
    assert counted.gflop == pytest.approx(counter.flop / 1e9, rel=1e-9)
    # what is made once and kept, such as masks, is made within the one and before the other
    assert counted.moved_gb == pytest.approx(counter.moved / 1e9, rel=0.01)
    assert counted.peak_mb == pytest.approx((counter.peak + held + buffers) / 1e6, rel=0.05)


def test_what_networks_keep_has_contents_after_counting():
    index = relative_position_index((2, 2, 2))
    count_step("transmorph", SMALL["transmorph"], (24, 20, 28), {"similarity": "mse"})
    assert torch.equal(relative_position_index((2, 2, 2)), index)
    network = build("transmorph", (24, 20, 28), **SMALL["transmorph"])
    assert network(*torch.rand(2, 1, 1, 24, 20, 28)).isfinite().all()


# --- traffic and memory ---


def test_bytes_are_those_of_a_small_network_by_hand():
    voxels = 10 * 12 * 14
    with hollow_tensors(), CostCounter() as counter, torch.no_grad():
        image, weight, bias = torch.empty(1, 2, 10, 12, 14), torch.empty(4, 2, 3, 3, 3), torch.empty(4)
        counter.restart()
        volume = F.conv3d(image, weight, bias, padding=1)  # reads 2, writes 4
        volume = F.leaky_relu(volume, inplace=True)  # reads and writes 4
        (volume + volume[:, :1].expand_as(volume)).mean()  # reads 4 and one, writes 4; reads 4, writes a number
    assert counter.moved == 4 * ((2 + 4 + 4 + 4 + 4 + 1 + 4 + 4) * voxels + 4 * 2 * 27 + 4 + 1)
    assert counter.kernels == 4
    assert counter.peak == 4 * ((2 + 4 + 4) * voxels + 4 * 2 * 27 + 4 + 1)


def test_memory_falls_when_nobody_holds_it_any_more():
    with hollow_tensors(), CostCounter() as counter:
        one = torch.empty(1000)
        view = one[10:20]
        del one
        assert counter.alive == 4000
        weight = torch.ones(1000, requires_grad=True)
        loss = (weight.exp() * 2).sum()  # exp's result is kept for its gradient, the product is not
        assert counter.alive == 4 * (1000 + 1000 + 1000 + 1)
        del view
        loss.backward()
        assert counter.alive == 4 * (1000 + 1000 + 1)  # the weight and its gradient, the loss


def test_a_step_holds_weights_gradients_and_moments():
    one_stage = {**SMALL["caml"], "carsc": False}
    tiny = count_step("caml", one_stage, (16, 16, 16), {"similarity": "mse"})
    assert tiny.lasting_mb == pytest.approx(16 * tiny.parameters / 1e6)
    wide = count_step("caml", {**one_stage, "channels": [48, 96]}, (16, 16, 16), {"similarity": "mse"})
    more = wide.lasting_mb - tiny.lasting_mb
    assert wide.peak_mb - tiny.peak_mb > more
    assert wide.moved_gb - tiny.moved_gb > 4e-9 * ADAM * (wide.parameters - tiny.parameters)


def test_more_pairs_take_more_and_checkpointing_less():
    def peak(**changes):
        network = {**SMALL["transmorph"], "depths": [2], "heads": [2]}
        network["checkpointing"] = changes.pop("checkpointing", False)
        return count_step("transmorph", network, (32, 32, 32), {"similarity": "mse", **changes}).peak_mb

    once = peak()
    assert 1.4 * once < peak(batch_size=2) < 2.01 * once
    assert peak(checkpointing=True) < once
    assert peak(precision="bf16") < once


def test_the_objective_alone_is_less_than_the_step():
    step = count_step("voxelmorph", SMALL["voxelmorph"], (32, 32, 32), {})
    alone = count_objective((32, 32, 32), {})
    assert 0 < alone.moved_gb < step.moved_gb
    assert alone.gflop == 0


def test_the_objective_is_counted_whole_with_any_number_of_threads():
    """On a CPU threads share its slabs, and a count is of one thread."""
    shape, threads = (48, 64, 48), torch.get_num_threads()
    try:
        counted = []
        for number in (1, 2):
            torch.set_num_threads(number)
            counted.append(count_objective(shape, {"similarity": "lncc", "window": 7}))
    finally:
        torch.set_num_threads(threads)
    assert counted[0] == counted[1] and counted[0].moved_gb > 0


def test_full_size_is_counted_for_the_smallest_network():
    dense = {"downsampling": "stride", "integration_steps": 0}
    step, forward = count_step("voxelmorph", dense, FULL, {}), count_inference("voxelmorph", dense, FULL)
    assert step.gflop == pytest.approx(3 * forward.gflop, rel=0.02)  # the gradient of a convolution is two more
    assert 2.5e3 < step.peak_mb < 5e3


MEASURED = """
import sys, json, torch
sys.path.insert(0, sys.argv[1])
torch.set_num_threads(1)
from measuring import idle_memory_mb, smooth_images
from dmir.fields import warp
from dmir.networks import build
from dmir.training.devices import peak_memory_mb
from dmir.training.objective import Objective
device = torch.device("cpu")

def train(*shape):
    network = build("voxelmorph", shape, **json.loads(sys.argv[2])).train()
    optimiser = torch.optim.Adam(network.parameters(), fused=True)
    moving, fixed = smooth_images(shape)
    field = network(moving, fixed)
    loss = Objective()(fixed, warp(moving, field), field)[0]
    del field
    loss.backward()
    optimiser.step()

train(16, 16, 16)
idle = idle_memory_mb(device)
train(104, 104, 24)
print(peak_memory_mb(device) - idle)
"""


def test_counted_memory_is_what_a_process_takes():
    network = {"encoder": [8, 32, 32, 32], "decoder": [32, 32, 32, 32, 32, 8, 8]}
    # 2 x 104 x 104 rows: torch convolves smaller volumes by copying each voxel 27 times, which no count can know
    benchmarks = str(Path(__file__).parents[1] / "benchmarks")
    command = [sys.executable, "-c", MEASURED, benchmarks, json.dumps(network)]
    # freed memory goes back to the system, instead of staying with the process for later
    environment = {**os.environ, "MALLOC_MMAP_THRESHOLD_": "1000000", "OMP_NUM_THREADS": "1"}
    ended = subprocess.run(command, env=environment, capture_output=True, text=True, check=True)
    measured = float(ended.stdout)
    counted = count_step("voxelmorph", network, (104, 104, 24), {}).peak_mb
    assert counted == pytest.approx(measured, rel=0.3)


# --- is there enough? ---


def invented_count(job, device_type):
    """100 MB a pair at 48^3; less by known factors for what saves."""
    settings = job.settings
    need = 100e6 * settings.batch_size * job.shape[0] * job.shape[1] * job.shape[2] / 48**3
    return (
        need * (0.6 if settings.precision == "bf16" else 1) * (0.5 if job.hyperparameters.get("checkpointing") else 1)
    )


def too_little(monkeypatch, free, **changes):
    job = {"algorithm": "caml", "hyperparameters": SMALL["caml"], "shape": (48, 48, 48), "training": {}, **changes}
    monkeypatch.setattr(memory, "free_memory", lambda device: free)
    monkeypatch.setattr(memory, "LASTING_BYTES", 0)
    monkeypatch.setattr(memory, "has_bfloat16", lambda device_type: True)
    monkeypatch.setattr(memory.Job, "count", invented_count)
    with pytest.raises(InputError) as raised:
        memory.require_memory(**job, device=CPU)
    return str(raised.value)


def test_a_training_too_large_is_refused_with_the_keys_to_change(monkeypatch):
    assert too_little(monkeypatch, 560e6, training={"batch_size": 4}, name="mine") == (
        "memory for the training of mine on 48x48x48: found 0.6 GB free on cpu; expected about 0.7 GB."
        " `training.precision: bf16` would need 0.5 GB;"
        " `settings.mine.network.checkpointing: true` would need 0.5 GB;"
        " `training.batch_size: 1` (now 4) would need 0.4 GB;"
        " `grid.shape: [24, 24, 24]` (and `grid.spacing` doubled) would need 0.3 GB."
    )  # field_downsampling changes nothing here, and is not proposed


def test_what_a_network_does_not_have_is_not_proposed(monkeypatch):
    message = too_little(monkeypatch, 350e6, algorithm="voxelmorph", training={"precision": "bf16", "batch_size": 1})
    assert "checkpointing" not in message
    assert "bf16" not in message
    assert "batch_size" not in message
    assert message.endswith(
        "expected about 0.4 GB. `grid.shape: [24, 24, 24]` (and `grid.spacing` doubled) would need 0.3 GB."
    )


def test_two_changes_are_counted_together_where_none_is_enough(monkeypatch):
    message = too_little(monkeypatch, 380e6, shape=(96, 96, 96))
    assert "`grid.shape: [48, 48, 48]` (and `grid.spacing` doubled) would need 0.4 GB." in message
    assert "None of them is enough alone; `training.precision: bf16` and `grid.shape: [48, 48, 48]`" in message
    assert message.endswith("together would need 0.4 GB.")


def test_a_training_that_fits_passes_and_a_small_one_is_not_even_counted(monkeypatch):
    monkeypatch.setattr(memory, "free_memory", lambda device: 2e9)
    job = {"algorithm": "caml", "hyperparameters": SMALL["caml"], "shape": (32, 32, 32), "training": {}, "device": CPU}
    monkeypatch.setattr(memory.Job, "count", lambda self, device_type: pytest.fail("was counted"))
    memory.require_memory(**job)
    monkeypatch.setattr(memory.Job, "count", lambda self, device_type: 1e9)
    memory.require_memory(**job, held_bytes=0.6e9)
    with pytest.raises(InputError, match=r"of which the images 0\.8 GB"):
        memory.require_memory(**job, held_bytes=0.8e9)


def test_memory_that_ran_out_is_told_with_what_would_need_less():
    error = torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB.\nMore")
    told = memory.out_of_memory(error, "voxelmorph", SMALL["voxelmorph"], (24, 24, 24), {"batch_size": 64}, device=CPU)
    assert "Tried to allocate 2.00 GiB.)" in str(told)
    assert "`training.batch_size: 1` (now 64)" in str(told)
    told = memory.out_of_memory(error, "voxelmorph", SMALL["voxelmorph"], (64, 64, 64), device=CPU)
    assert str(told).startswith("memory for the registration with voxelmorph on 64x64x64")
    assert "batch_size" not in str(told)


@pytest.mark.parametrize(
    ("line", "folder", "names"),
    [
        ("0::/job/step", "job", ("memory.max", "memory.current")),
        ("4:cpu,memory:/job/step", "memory/job", ("memory.limit_in_bytes", "memory.usage_in_bytes")),
    ],
)
def test_the_limit_of_a_control_group_holds_for_all_below_it(tmp_path, line, folder, names):
    own = tmp_path / "own"
    own.write_text(f"1:name=systemd:/elsewhere\n{line}\n")
    assert memory.control_group_headroom(tmp_path, own) == float("inf")
    group = tmp_path / folder
    (group / "step").mkdir(parents=True)
    for name, text in zip((*names, "memory.stat"), ("5000\n", "4000\n", "cache 9\ninactive_file 700\n"), strict=True):
        (group / name).write_text(text)
    assert memory.control_group_headroom(tmp_path, own) == 5000 - 4000 + 700
    (group / "step" / names[0]).write_text("max\n")
    assert memory.control_group_headroom(tmp_path, own) == 1700
