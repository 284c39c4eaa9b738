"""Which GPU a process gets. The cards are made up: a lease is a lock on a file, whatever the card."""

from __future__ import annotations

import json
import logging
import os
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from torch import nn

from dmir.errors import InputError
from dmir.methods import network
from dmir.training import Scan, devices, train
from dmir.volumes import Volume, write_volume

SOURCE = Path(__file__).parents[1] / "src"
HOLDER = """
import json, os, sys
from dmir.training.devices import lease_cards
count, timeout = int(sys.argv[1]), float(sys.argv[2])
try:
    cards = lease_cards(count, timeout)
except Exception as error:
    cards = type(error).__name__
print(json.dumps([cards, os.environ.get("CUDA_VISIBLE_DEVICES"), "torch" in sys.modules]), flush=True)
sys.stdin.read()  # holds the cards until the test closes the pipe, or kills
"""


def _outside_of_everything(monkeypatch):
    variables = (*devices.BATCH_JOB_VARIABLES, *devices.COUNTED_CARDS_VARIABLES, "CUDA_VISIBLE_DEVICES", "GPU_POOL")
    for variable in variables:
        monkeypatch.delenv(variable, raising=False)


@pytest.fixture
def start(tmp_path, monkeypatch):
    """Start processes that lease cards and hold them; whatever is left of them ends with the test."""
    _outside_of_everything(monkeypatch)
    monkeypatch.setenv("GPU_LEASE_DIR", str(tmp_path / "lease"))
    started = []

    def _start(pool, count=1, timeout=20.0, **environment):
        process = subprocess.Popen(
            [sys.executable, "-c", HOLDER, str(count), str(timeout)],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            text=True,
            env={
                **os.environ,
                "PYTHONPATH": str(SOURCE),
                **({"GPU_POOL": pool} if pool is not None else {}),
                **environment,
            },
        )
        started.append(process)
        return process

    yield _start
    for process in started:
        process.kill()
        process.wait()
        process.stdin.close()
        process.stdout.close()


def answer(process):
    """Return (cards, CUDA_VISIBLE_DEVICES, whether torch was imported) of a holder."""
    return json.loads(process.stdout.readline())


def test_two_processes_get_two_cards_and_a_third_none(start):
    first, second = answer(start("a,b")), answer(start("a,b"))
    assert {first[0][0], second[0][0]} == {"a", "b"}
    assert first[1] == first[0][0]  # CUDA sees the leased card alone
    assert answer(start("a,b", timeout=0.5))[0] == "NoFreeCard"


def test_a_lease_is_taken_before_torch_sees_the_cards(start):
    assert answer(start("a"))[2] is False


def test_a_killed_process_gives_its_card_back(start):
    holder = start("a")
    assert answer(holder)[0] == ["a"]
    waiting = start("a")
    assert answer(start("a", timeout=0.5))[0] == "NoFreeCard"
    holder.kill()
    assert answer(waiting)[0] == ["a"]


def test_two_processes_that_want_two_cards_each_do_not_block_one_another(start):
    one, other = start("a,b", count=2), start("a,b", count=2)
    one.stdin.close()  # each leaves as soon as it has answered, so each must get both cards in turn
    other.stdin.close()
    assert answer(one)[0] == answer(other)[0] == ["a", "b"]


def test_a_process_that_gets_too_few_cards_keeps_none(start):
    holder = start("a,b")
    assert answer(holder)[0] == ["a"]
    greedy = start("a,b", count=2)
    assert answer(start("a,b"))[0] == ["b"]
    assert greedy.poll() is None


def test_cards_assigned_by_a_batch_system_are_left_alone(start, tmp_path):
    cards, visible, _ = answer(start(None, SLURM_JOB_ID="7", CUDA_VISIBLE_DEVICES="3"))
    assert cards == ["3"] and visible == "3"
    assert not (tmp_path / "lease").exists()


def test_fewer_cards_from_a_batch_system_than_asked_for_are_refused(monkeypatch):
    monkeypatch.setenv("SLURM_JOB_ID", "7")
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "3")
    with pytest.raises(InputError, match=r"1 assigned by the batch system \(3\); expected at least 2"):
        devices.lease_cards(2)
    assert devices.lease_cards(1) == ["3"]


def test_a_list_of_visible_cards_is_the_pool(start):
    assert answer(start(None, CUDA_VISIBLE_DEVICES="4,5"))[0] == ["4"]
    assert answer(start(None, CUDA_VISIBLE_DEVICES="4,5"))[0] == ["5"]


def test_no_gpu_is_no_error_but_too_many_are(start):
    assert answer(start(""))[0] == []
    assert answer(start(None, CUDA_VISIBLE_DEVICES="-1"))[0] == []
    assert answer(start("a", count=2))[0] == "InputError"


def test_without_a_gpu_the_cpu_is_chosen_and_the_log_told_once(monkeypatch, caplog):
    monkeypatch.setenv("GPU_POOL", "")
    monkeypatch.setattr(devices, "_leased", {})
    monkeypatch.setattr(torch.backends.cuda, "is_built", lambda: True)
    monkeypatch.setattr(torch.cuda, "is_initialized", lambda: False)
    devices._say_once.cache_clear()
    with caplog.at_level(logging.INFO, logger="dmir"):
        assert devices.choose_device() == devices.choose_device("auto") == torch.device("cpu")
    assert [record.getMessage() for record in caplog.records] == ["computing on the CPU: no GPU here"]
    with pytest.raises(InputError, match="no GPU here"):
        devices.choose_device("cuda")


def test_a_named_device_is_taken_at_its_word(monkeypatch):
    monkeypatch.setattr(devices, "lease_cards", lambda *_: pytest.fail("no lease is wanted"))
    assert devices.choose_device("cpu") == torch.device("cpu")
    assert devices.choose_device("cuda:1") == torch.device("cuda", 1)
    assert devices.choose_device(torch.device("cpu")) == torch.device("cpu")


def test_threads_are_set_and_none_leaves_them():
    before = torch.get_num_threads()
    try:
        assert devices.set_threads(1) == torch.get_num_threads() == 1
        assert devices.set_threads(None) == 1
    finally:
        torch.set_num_threads(before)


def test_peak_memory_is_that_of_this_process_in_megabytes():
    script = """
from types import SimpleNamespace
from dmir.training.devices import peak_memory_mb
cpu = SimpleNamespace(type="cpu")
before = peak_memory_mb(cpu)
held = b"x" * 200_000_000
del held
print(peak_memory_mb(cpu) - before)
"""
    environment = {**os.environ, "PYTHONPATH": str(SOURCE)}
    grown = subprocess.run([sys.executable, "-c", script], env=environment, capture_output=True, text=True, check=True)
    assert 190 < float(grown.stdout) < 210


# --- cards that the driver lists, and cards that are gone -------------------------------------------------------------

LOST = "Unable to determine the device handle for GPU0000:0B:00.0: GPU is lost. Reboot the system to recover this GPU"
LAUNCH_FAILURE = "CUDA error: unspecified launch failure\nCompile with `TORCH_USE_CUDA_DSA` to enable assertions."
CUDNN_FAILURE = "cuDNN error: CUDNN_STATUS_MAPPING_ERROR"
SHAPE = (10, 12, 14)
FIFTH = 5  # call of a network: the third step, after a validation, two steps and their validation


@pytest.fixture
def driver(tmp_path, monkeypatch):
    """Put an nvidia-smi first in PATH that says what the test wants; outside of any batch system, with no lease."""
    _outside_of_everything(monkeypatch)
    monkeypatch.setenv("GPU_LEASE_DIR", str(tmp_path / "lease"))
    monkeypatch.setenv("PATH", str(tmp_path / "bin"), prepend=os.pathsep)
    monkeypatch.setattr(devices, "_leased", {})
    program = tmp_path / "bin" / "nvidia-smi"
    program.parent.mkdir()

    def says(*lines, status=0):
        program.write_text("#!/bin/sh\n" + "".join(f"echo '{line}'\n" for line in lines) + f"exit {status}\n")
        program.chmod(0o755)

    says("GPU-one", "GPU-two")
    yield says
    for descriptor in devices._leased.values():
        os.close(descriptor)


@pytest.fixture
def with_cuda(monkeypatch):
    """Have torch take itself for a CUDA build that can use some number of cards."""
    monkeypatch.setattr(torch.backends.cuda, "is_built", lambda: True)
    monkeypatch.setattr(torch.cuda, "is_initialized", lambda: False)
    return lambda usable: monkeypatch.setattr(torch.cuda, "device_count", lambda: usable)


def test_two_cards_then_one_then_a_driver_that_fails(driver, with_cuda, monkeypatch):
    with_cuda(1)
    assert devices.visible_cards() == ["GPU-one", "GPU-two"]
    driver("GPU-two")
    assert devices.choose_device() == torch.device("cuda", 0)
    assert list(devices._leased) == [os.environ["CUDA_VISIBLE_DEVICES"]] == ["GPU-two"]
    with pytest.raises(InputError, match=r"found 1 \(GPU-two\); expected at least 2"):
        devices.choose_devices(count=2)
    monkeypatch.delenv("CUDA_VISIBLE_DEVICES")
    os.close(devices._leased.pop("GPU-two"))
    driver(LOST, status=15)
    with pytest.raises(devices.GpuUnusable, match=r"driver does not work .*GPU is lost.*GPU_POOL= snakemake"):
        devices.choose_device()
    monkeypatch.setenv("GPU_POOL", "")
    assert devices.choose_device() == torch.device("cpu")


def test_a_driver_without_a_card_is_no_failure(driver, with_cuda):
    driver("No devices were found", status=6)
    assert devices.choose_device() == torch.device("cpu")


@pytest.mark.parametrize(("usable", "count"), [(0, 1), (1, 2)])
def test_a_card_of_the_pool_that_is_gone_is_named_and_the_cpu_does_not_step_in(
    driver, with_cuda, monkeypatch, usable, count
):
    driver("GPU-one")
    with_cuda(usable)
    monkeypatch.setenv("GPU_POOL", "7,8")
    with pytest.raises(devices.GpuUnusable) as caught:
        devices.choose_devices(count=count)
    expected = f"GPU {'7' if count == 1 else '7, 8'}: torch can use {usable} of the {count} that this job is to have. "
    assert str(caught.value).startswith(f"{expected}The driver lists GPU-one now.")


def test_a_torch_without_cuda_leases_what_is_listed_and_computes_on_the_cpu(driver, monkeypatch):
    monkeypatch.setenv("GPU_POOL", "7")
    monkeypatch.setattr(torch.backends.cuda, "is_built", lambda: False)
    assert devices.choose_device() == torch.device("cpu")
    assert list(devices._leased) == ["7"]


def test_a_job_of_a_batch_system_takes_no_card_that_it_was_not_given(driver, with_cuda, monkeypatch, caplog):
    monkeypatch.setenv("SLURM_JOB_ID", "7")
    devices._say_once.cache_clear()
    for assigned in (None, "", "NoDevFiles"):
        if assigned is not None:
            monkeypatch.setenv("CUDA_VISIBLE_DEVICES", assigned)
        with caplog.at_level(logging.INFO, logger="dmir"):
            assert devices.choose_device() == torch.device("cpu")
    told = "computing on the CPU: the batch system (SLURM_JOB_ID is set) has assigned no GPU to this job"
    assert [record.getMessage() for record in caplog.records] == [told]
    monkeypatch.delenv("CUDA_VISIBLE_DEVICES")
    monkeypatch.setenv("GPU_POOL", "1")  # a cluster that leaves the cards to its users
    assert devices.lease_cards() == ["1"]


def test_cards_that_a_batch_system_counts_without_naming_them_are_not_guessed(driver, with_cuda, monkeypatch):
    monkeypatch.setenv("SLURM_JOB_ID", "7")
    monkeypatch.setenv("SLURM_GPUS_ON_NODE", "0")
    assert devices.choose_device() == torch.device("cpu")
    monkeypatch.setenv("SLURM_GPUS_ON_NODE", "2")
    with pytest.raises(devices.GpuUnusable, match=r"\(SLURM_GPUS_ON_NODE=2\) without saying which.*GPU_POOL"):
        devices.choose_device()


# --- a card that fails at work ----------------------------------------------------------------------------------------


class Failing(nn.Module):
    """A convolution of both images; in its ``at``-th call something is raised."""

    hyperparameters: dict = {}  # noqa: RUF012

    def __init__(self, at: int = 0, error: Exception | None = None) -> None:
        super().__init__()
        torch.manual_seed(5)
        self.layer = nn.Conv3d(2, 3, 3, padding=1)
        self.calls, self.at, self.error = 0, at, error

    def forward(self, moving: torch.Tensor, fixed: torch.Tensor) -> torch.Tensor:
        self.calls += 1
        if self.calls == self.at and self.error is not None:
            raise self.error
        return self.layer(torch.cat([moving, fixed], dim=1))


@pytest.fixture
def scans(tmp_path):
    scans = []
    for number in range(4):
        scan = Scan(f"s{number}", tmp_path / f"s{number}.nii.gz", None)
        image = np.random.default_rng(number).random(SHAPE, dtype=np.float32)
        write_volume(scan.image, Volume(image, np.eye(4)))
        scans.append(scan)
    return scans


def trained(scans, folder, model, **keywords):
    split = {"scans": scans[:2], "validation": scans[2:3], "atlases": scans[3:]}
    fast = {"device": "cpu", "threads": 1, "similarity": "mse", "learning_rate": 1e-3, "steps": 6, "validate_every": 2}
    return train(model, {}, **split, output=folder, resume_folder=folder, resume_key="key", **fast, **keywords)


def test_a_training_whose_card_fails_says_which_and_goes_on_from_its_last_state(driver, scans, tmp_path, monkeypatch):
    monkeypatch.setattr(devices, "_leased", {"GPU-one": os.open(os.devnull, os.O_RDONLY)})
    driver("GPU-two")
    with pytest.raises(devices.GpuUnusable) as caught:
        trained(scans, tmp_path / "broken", Failing(at=FIFTH, error=torch.AcceleratorError(LAUNCH_FAILURE)))
    assert str(caught.value).startswith(
        "GPU GPU-one stopped working: CUDA error: unspecified launch failure. The driver lists GPU-two now. "
        "The same command, given again, goes on from the last state that was kept."
    )
    again = Failing()
    resumed = trained(scans, tmp_path / "broken", again)
    unbroken = trained(scans, tmp_path / "unbroken", Failing())
    assert again.calls == 4 + 2  # the steps after the second, and their validations
    assert resumed.weights.read_bytes() == unbroken.weights.read_bytes()


@pytest.mark.parametrize("error", [RuntimeError("mat1 and mat2 cannot be multiplied"), ValueError("CUDA error")])
def test_other_errors_are_no_failing_card(scans, tmp_path, error):
    with pytest.raises(type(error), match=str(error)):
        trained(scans, tmp_path / "out", Failing(at=1, error=error))


def test_what_a_gpu_began_does_not_go_on_on_the_cpu_unless_it_is_said(driver, scans, tmp_path, monkeypatch):
    with pytest.raises(devices.GpuUnusable, match="cuDNN error"):
        trained(scans, tmp_path / "out", Failing(at=FIFTH, error=RuntimeError(CUDNN_FAILURE)))
    state = tmp_path / "out" / "key" / "last.ckpt"
    content = torch.load(state, weights_only=True)
    torch.save({**content, "gpu": {"gpus": 1}}, state)  # as a training on a GPU writes it
    with pytest.raises(devices.GpuUnusable, match="its first 2 steps were trained on a GPU, and now there is none"):
        trained(scans, tmp_path / "out", Failing())
    assert state.is_file()
    monkeypatch.setenv("GPU_POOL", "")
    assert trained(scans, tmp_path / "out", Failing()).weights.is_file()


@pytest.mark.parametrize("overlap", [True, False])
def test_a_card_that_fails_while_registering_is_no_result_of_a_pair(driver, scans, tmp_path, monkeypatch, overlap):
    grid = {"shape": list(SHAPE), "spacing": [1.0, 1.0, 1.0]}
    metadata = {"network": "failing", "seed": 1, "grid": grid}
    model = Failing(at=3, error=torch.AcceleratorError(LAUNCH_FAILURE)).eval()
    monkeypatch.setattr(network, "load_weights", lambda *args, **keywords: (model, metadata))
    pairs = [(scan.name, scan.image, "s3", scans[3].image) for scan in scans[:3]]
    with pytest.raises(devices.GpuUnusable, match=r"unspecified launch failure.*registers what it was at anew"):
        network.register_pairs(pairs, tmp_path / "fields", "weights", "cpu", warmup=False, overlap=overlap)
