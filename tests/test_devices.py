"""Which GPU a process gets. The cards are made up: a lease is a lock on a file, whatever the card."""

from __future__ import annotations

import json
import logging
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from dmir.errors import InputError
from dmir.training import devices

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


@pytest.fixture
def start(tmp_path, monkeypatch):
    """Start processes that lease cards and hold them; whatever is left of them ends with the test."""
    for variable in (*devices.BATCH_JOB_VARIABLES, "CUDA_VISIBLE_DEVICES", "GPU_POOL"):
        monkeypatch.delenv(variable, raising=False)
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
