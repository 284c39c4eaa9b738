"""The packed cohort: exact numbers, files that cannot be mistaken, shared memory, and images that are there in time."""

from __future__ import annotations

import importlib
import json
import os
import resource
import shutil
import signal
import subprocess
import sys
import threading
import time
from pathlib import Path

import numpy as np
import pytest
import torch

from dmir.errors import DmirError, InputError
from dmir.training import data
from dmir.training.data import ImageBank, PairSchedule, load_bank, training_pairs
from dmir.training.pack import Scan, open_pack, pack_scans, quantise
from dmir.training.streaming import Prefetcher
from dmir.training.utilisation import GpuUtilisation
from dmir.volumes import Volume, read_image, write_volume

ROOT = Path(__file__).parents[1]
SHAPE = (6, 7, 8)
AFFINE = np.array([[-1.0, 0, 0, 3], [0, 0, 1.5, -2], [0, 1.25, 0, 0.5], [0, 0, 0, 1]])
CPU = torch.device("cpu")
COUNT = 6


def write_scan(folder: Path, number: int, *, label: int = 40, shape=SHAPE) -> Scan:
    random = np.random.default_rng(number)
    image = random.random(shape, dtype=np.float32)
    image.flat[:2] = 0, 1
    labels = random.integers(0, 3, shape) * label // 2
    scan = Scan(f"s{number}", folder / f"s{number}.nii", folder / f"s{number}_labels.nii")
    write_volume(scan.image, Volume(image, AFFINE))
    write_volume(scan.labels, Volume(labels, AFFINE), dtype=np.int32)
    return scan


@pytest.fixture(scope="module")
def scans(tmp_path_factory) -> list[Scan]:
    folder = tmp_path_factory.mktemp("scans")
    return [write_scan(folder, number) for number in range(COUNT)]


@pytest.fixture(scope="module")
def packed(scans, tmp_path_factory):
    return pack_scans(tmp_path_factory.mktemp("packed") / "pack", scans, threads=2)


def raw(scan: Scan) -> np.ndarray:
    return read_image(scan.image).data


# --- the numbers ------------------------------------------------------------------------------------------------------


def test_each_type_keeps_images_as_near_as_it_says(scans, tmp_path):
    image = np.stack([raw(scan) for scan in scans])
    bounds = {"float32": 0.0, "float16": 2.0**-12, "uint8": 1 / 510}
    for precision, bound in bounds.items():
        pack = pack_scans(tmp_path / precision, scans, precision=precision)
        bank = load_bank(scans, [], [], device=CPU, pack=pack)
        assert pack.images.dtype == precision
        error = np.abs(bank.images_of(range(COUNT)).numpy()[:, 0].astype(np.float64) - image).max()
        assert bound / 2 <= error <= bound * (1 + 1e-5)  # reached by so many random numbers, and not passed
    assert np.array_equal(open_pack(tmp_path / "float16").images, image.astype(np.float16))
    assert np.array_equal(open_pack(tmp_path / "uint8").images, np.round(255.0 * image).astype(np.uint8))


def test_a_pack_tells_grid_names_and_labels(scans, tmp_path):
    some = [scans[2], Scan("bare", scans[0].image), scans[1]]
    pack = pack_scans(tmp_path, some, threads=3)
    assert pack.names == ["s2", "bare", "s1"] and pack.label_rows == {"s2": 0, "s1": 1}
    assert pack.grid.shape == SHAPE and np.array_equal(pack.grid.affine, AFFINE)
    assert pack.labels.dtype == np.uint8 and not pack.images.flags.writeable
    assert {path.name for path in tmp_path.iterdir()} == {"images.npy", "labels.npy", "pack.json"}
    for scan in (scans[1], scans[2]):
        from_file = load_bank([], [scan, scan], [], device=CPU, structures=[20, 40])
        assert np.array_equal(np.searchsorted([0, 20, 40], pack.labels_of(scan.name)), from_file.labels[0][0, 0])
    with pytest.raises(InputError, match=r"bare: found no label map; .* Pack the scans again\."):
        pack.labels_of("bare")
    alone = pack_scans(tmp_path, [some[1]])
    assert alone.labels is None and not (tmp_path / "labels.npy").exists()


def test_label_maps_are_as_wide_as_the_largest_id_of_all(tmp_path):
    scans = [write_scan(tmp_path, number, label=label) for number, label in enumerate((40, 80, 2034, 70000, 8))]
    expected = [np.asarray(data.read_labels(scan.labels).data) for scan in scans]
    for count, kind in ((2, np.uint8), (3, np.uint16), (5, np.uint32)):
        pack = pack_scans(tmp_path / "pack", scans[:count])
        assert pack.labels.dtype == kind
        assert all(np.array_equal(pack.labels[row], expected[row]) for row in range(count))


# --- what cannot be packed --------------------------------------------------------------------------------------------


def test_values_that_a_type_cannot_hold_are_refused_with_the_file():
    image = np.array([[[-0.3 / 255, 0.5, 1 + 0.3 / 255]]], dtype=np.float32)
    assert quantise(image, "uint8", "a.nii").tolist() == [[[0, 128, 255]]]
    with pytest.raises(InputError, match=r"b\.nii: found values from -0\.3 to 1\.3; expected grey values in \[0, 1\]"):
        quantise(np.array([-0.3, 1.3], np.float32), "uint8", "b.nii")
    with pytest.raises(InputError, match=r"c\.nii: found values from 0 to 70000"):
        quantise(np.array([0, 7e4], np.float32), "float16", "c.nii")
    with pytest.raises(InputError, match=r"found 'float61'; expected one of .* Did you mean 'float16'"):
        pack_scans("nowhere", [], precision="float61")


def test_a_bad_scan_is_named_and_nothing_is_left(scans, tmp_path):
    other, cut, empty = (tmp_path / f"{name}.nii" for name in ("other", "cut", "empty"))
    write_volume(other, Volume(raw(scans[0])[:, :, :-1], AFFINE))
    cut.write_bytes(scans[0].image.read_bytes()[:-100])
    write_volume(empty, Volume(np.where(raw(scans[0]) > 0.5, np.nan, 0).astype(np.float32), AFFINE))
    negative = tmp_path / "negative.nii"
    write_volume(negative, Volume(np.full(SHAPE, -3), AFFINE), dtype=np.int16)
    for scan, message in (
        (Scan("x", other), r"other\.nii: found a grid of 6x7x7"),
        (Scan("x", cut), r"cut\.nii: found a header that claims 6x7x8 voxels in a file of"),
        (Scan("x", empty), r"empty\.nii: found \d+ voxels that are NaN"),
        (Scan("x", tmp_path / "gone.nii"), r"gone\.nii: found a file that cannot be read \(No such file"),
        (Scan("x", scans[1].image, negative), r"negative\.nii: found ids from -3 to -3"),
        (scans[0], r"scans to pack: found 's0' more than once"),
    ):
        with pytest.raises(InputError, match=message):
            pack_scans(tmp_path / "pack", [scans[0], scan, scans[2]], threads=2)
        assert not any((tmp_path / "pack").glob("*"))


def test_a_full_disk_is_one_message_and_leaves_nothing(scans, tmp_path, monkeypatch):
    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    needed = r"takes 0\.00 GB; nothing of it was left behind\. Make room"
    try:
        resource.setrlimit(resource.RLIMIT_FSIZE, (3000, before[1]))  # bytes that a file may have
        with pytest.raises(DmirError, match=rf"pack: the scans cannot be packed there \(File too large\)\. .*{needed}"):
            pack_scans(tmp_path / "pack", scans)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, before)
    assert not any((tmp_path / "pack").iterdir())
    monkeypatch.setattr(shutil, "disk_usage", lambda folder: shutil._ntuple_diskusage(0, 0, 100))
    with pytest.raises(DmirError, match=rf"\(0\.00 GB are free\)\. .*{needed}"):
        pack_scans(tmp_path / "pack", scans)
    assert not any((tmp_path / "pack").iterdir())


# --- files that are not what they should be ---------------------------------------------------------------------------


def edit(folder: Path, **changes) -> None:
    record = json.loads((folder / "pack.json").read_text())
    (folder / "pack.json").write_text(json.dumps({**record, **changes}))


@pytest.mark.parametrize(
    ("damage", "message"),
    [
        (lambda f: os.truncate(f / "images.npy", 3000), r"images\.npy: found 3000 bytes; expected 4160 bytes\. .*cut"),
        (lambda f: os.truncate(f / "labels.npy", 0), r"labels\.npy: found 0 bytes; expected 2144 bytes"),
        (lambda f: (f / "images.npy").unlink(), r"images\.npy: found no such file"),
        (lambda f: (f / "pack.json").unlink(), r"pack\.json: found no such file; .*may have been stopped\. Pack"),
        (lambda f: edit(f, version=2), r"pack\.json: found version 2; expected version 1 of the format\. Pack"),
        (lambda f: edit(f, format="other"), r"pack\.json: found the format 'other'"),
        (lambda f: edit(f, names=["s0"]), r"pack\.json: found a record that is incomplete \(ValueError"),
        (lambda f: edit(f, sources=[{}] * 6), r"pack\.json: found a record that is incomplete \(KeyError: 'image'"),
        (lambda f: edit(f, precision="uint8"), r"images\.npy: found float16 of shape \(6, 6, 7, 8\); expected uint8"),
        (lambda f: (f / "pack.json").write_text("[1]"), r"pack\.json: found a file that is none \(TypeError\)"),
        (lambda f: (f / "pack.json").write_text('{"for'), r"pack\.json: found a file that is none \(JSONDecodeError\)"),
        (lambda f: (f / "images.npy").write_bytes(b"x" * 4160), r"images\.npy: found no array \("),
    ],
)
def test_a_pack_that_was_cut_or_changed_is_refused(packed, tmp_path, damage, message):
    folder = shutil.copytree(packed.folder, tmp_path / "pack")
    open_pack(folder)
    damage(folder)
    with pytest.raises(InputError, match=message):
        open_pack(folder)


def test_an_array_of_objects_is_never_unpickled(packed, tmp_path):
    folder = shutil.copytree(packed.folder, tmp_path / "pack")
    np.save(folder / "images.npy", np.array([print] * 9, dtype=object), allow_pickle=True)
    edit(folder, bytes={"images.npy": (folder / "images.npy").stat().st_size})
    with pytest.raises(InputError, match=r"images\.npy: found no array \(.*Python objects"):
        open_pack(folder)


def test_a_scan_that_is_missing_or_has_changed_is_refused(scans, tmp_path, caplog):
    folder = tmp_path / "sources"
    mine = [write_scan(folder, number) for number in range(3)]
    pack = pack_scans(tmp_path / "pack", mine)
    with pytest.raises(InputError, match=r"pack: s9: found no such scan among the 3 that are packed"):
        load_bank([mine[0], Scan("s9", mine[1].image)], [], [mine[2]], device=CPU, pack=pack)

    def bank():
        return load_bank(mine[:1], [mine[1]], [mine[2]], device=CPU, pack=pack)

    for path in (mine[0].image, mine[2].labels):
        content = path.read_bytes()
        os.utime(path, ns=(0, 0))  # touched, as by a copy: it is the same file
        bank()
        path.write_bytes(content[:-1] + bytes([content[-1] ^ 1]))
        with pytest.raises(InputError, match=rf"{path.name}: found a file that is not the one packed in .*Pack the"):
            bank()
        path.write_bytes(content)
    bank()
    assert not caplog.records
    shutil.rmtree(folder)
    bank()
    assert "5 files of the scans packed in" in caplog.text  # of the training scan its image alone


KILLED = """
import os, signal, sys
from pathlib import Path
from dmir.training.pack import Scan, pack_scans, packing

def kill(*arguments, **keywords):
    os.kill(os.getpid(), signal.SIGKILL)

scans, place = [Scan(p.stem, p, p.with_name(p.stem + "_labels.nii")) for p in map(Path, sys.argv[3:])], sys.argv[2]
if place == "reading":
    read = packing.read_image
    packing.read_image = lambda path: kill() if path == scans[-2].image else read(path)
elif place == "renaming":
    replace = Path.replace
    Path.replace = lambda path, target: kill() if target.name == "images.npy" else replace(path, target)
else:
    packing.json.dumps = kill
pack_scans(sys.argv[1], scans)
"""


@pytest.mark.parametrize("place", ["reading", "renaming", "recording"])
@pytest.mark.parametrize("again", [False, True])
def test_a_packing_that_is_killed_leaves_no_pack_and_the_next_one_clears_up(scans, tmp_path, place, again):
    folder = tmp_path / "pack"
    if again:
        before = pack_scans(folder, scans[:3], precision="uint8")
    command = [sys.executable, "-c", KILLED, str(folder), place, *(str(scan.image) for scan in scans)]
    assert subprocess.run(command).returncode == -signal.SIGKILL
    if again:  # who has it open goes on; in the folder there is the old one, whole, or none
        bank = load_bank(scans[:3], [], [], device=CPU, pack=before)
        assert np.array_equal(bank.images_of([1])[0, 0], np.round(255 * raw(scans[1])).astype(np.float32) / 255)
    if again and place == "reading":
        assert open_pack(folder).names == ["s0", "s1", "s2"]
    else:
        with pytest.raises(InputError, match=r"pack\.json: found no such file"):
            open_pack(folder)
    assert pack_scans(folder, scans).names == [scan.name for scan in scans]
    assert {path.name for path in folder.iterdir()} == {"images.npy", "labels.npy", "pack.json"}


# --- the bank ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("precision", ["float16", "uint8", "float32"])
def test_packed_or_not_a_training_sees_the_same_bits(scans, tmp_path, precision):
    pack = pack_scans(tmp_path, scans[::-1], precision=precision)
    parts = ([scans[4], scans[0]], [scans[2]], [scans[5]])  # a subset, in another order
    from_files = load_bank(*parts, device=CPU, precision=precision)
    from_pack = load_bank(*parts, device=CPU, pack=pack)
    assert from_files.names == from_pack.names == ["s4", "s0", "s2", "s5"]
    assert from_files.structures == from_pack.structures == [20, 40]
    assert sorted(from_pack.labels) == [2, 3]
    for positions in ([0], [3, 1, 1], [2, 0]):
        first, second = from_files.images_of(positions), from_pack.images_of(positions)
        assert first.shape == (len(positions), 1, *SHAPE) and first.dtype == torch.float32
        assert torch.equal(first, second)
    for position in (2, 3):
        labels = from_pack.labels_of(position)
        assert labels.dtype == torch.uint8 and torch.equal(labels, from_files.labels_of(position))
    assert np.array_equal(from_pack.grid.affine, from_files.grid.affine)
    moving, fixed = from_pack.pairs_of(torch.tensor([[0, 3], [1, 2]]))
    assert torch.equal(moving, from_files.images_of([0, 1])) and torch.equal(fixed, from_files.images_of([3, 2]))


def test_labels_that_the_training_wants_must_be_in_the_pack(scans, tmp_path):
    pack = pack_scans(tmp_path, [scans[0], Scan("s1", scans[1].image), scans[2]])
    load_bank([scans[1]], [scans[0]], [scans[2]], device=CPU, pack=pack)
    with pytest.raises(InputError, match=r"s1: found no label map"):
        load_bank([scans[0]], [scans[1]], [scans[2]], device=CPU, pack=pack)
    bare = [Scan(scan.name, scan.image) for scan in scans[:3]]
    assert not load_bank(bare[:1], bare[1:2], bare[2:], device=CPU, pack=pack).labels


def test_the_log_says_what_the_bank_holds_and_where(scans, packed):
    mapped = load_bank(scans, [], [], device=CPU, pack=packed)
    read = load_bank(scans, [], [], device=CPU, precision="uint8")
    assert mapped.describe() == f"6 scans of 6x7x8 voxels as float16, 0.00 GB, streamed from {packed.file}"
    assert read.describe() == "6 scans of 6x7x8 voxels as uint8, 0.00 GB, in memory"
    assert (mapped.is_resident, read.is_resident) == (False, True)
    assert (mapped.nbytes, read.nbytes) == (2 * 6 * 336, 6 * 336)


def test_images_are_put_on_a_gpu_as_long_as_they_leave_it_room(scans, packed, monkeypatch):
    bank = ImageBank(["a"] * 10, packed.grid, torch.device("cuda"), "float16")
    for free, fits in ((2 * 10 * 336 / data.SHARE_OF_GPU, True), (2 * 10 * 336 / data.SHARE_OF_GPU - 3, False)):
        monkeypatch.setattr(torch.cuda, "mem_get_info", lambda device, free=free: (free, 10 * free))
        assert data._fits(bank) == fits


MEMORY = """
import sys
from pathlib import Path
import torch
from dmir.training.data import load_bank
from dmir.training.pack import open_pack, Scan

def own():
    lines = Path("/proc/self/smaps_rollup").read_text().splitlines()[1:]
    return int(next(line.split()[1] for line in lines if line.startswith("Anonymous:"))) / 1000  # MB

pack = open_pack(sys.argv[1])
scans = [Scan(name, Path(source.path)) for name, (source, _) in pack.sources.items()]
start, sums = own(), []
for keywords in ({"pack": pack}, {}):
    bank = load_bank(scans, [], [], device=torch.device("cpu"), **keywords)
    with bank.prefetch(torch.tensor([[k, k]]) for k in range(len(scans))):
        sums.append(sum(float(bank.pairs_of(torch.tensor([[k, k]]))[0].sum()) for k in range(len(scans))))
    assert pack.images.view("u2").max() > 0  # every page of the map is touched
    print(int(own() - start), end=" ", flush=True)
assert sums[0] == sums[1] > 0
"""


@pytest.mark.skipif(not Path("/proc/self/smaps_rollup").exists(), reason="the kernel does not tell")
def test_a_packed_cohort_is_in_the_page_cache_and_not_in_the_process(tmp_path):
    base = np.random.default_rng(0).random((64, 64, 64), dtype=np.float32)
    scans = []
    for number in range(200):  # half a MB each
        scans.append(Scan(f"s{number}", tmp_path / f"s{number}.nii"))
        if number < 3:
            write_volume(scans[-1].image, Volume(np.roll(base, number), np.eye(4)))
        else:
            scans[-1].image.symlink_to(scans[number % 3].image)
    pack = pack_scans(tmp_path / "pack", scans)
    assert pack.images.nbytes == 200 * 2**19
    command = [sys.executable, "-c", MEMORY, str(pack.folder)]
    ended = subprocess.run(command, capture_output=True, text=True, env={**os.environ, "OMP_NUM_THREADS": "1"})
    assert ended.returncode == 0, ended.stderr
    from_pack, from_files = map(int, ended.stdout.split())
    assert from_pack < 40 < 100 < from_files


# --- fetched ahead ----------------------------------------------------------------------------------------------------


def prefetching() -> list[threading.Thread]:
    return [thread for thread in threading.enumerate() if thread.name == "prefetch of images"]


def test_prefetched_pairs_are_those_that_would_be_read_in_the_same_order(scans, packed):
    bank = load_bank(scans[:4], [], scans[4:], device=CPU, pack=packed)
    direct = load_bank(scans[:4], [], scans[4:], device=CPU)
    for batch_size in (1, 3):
        schedule = PairSchedule(training_pairs(range(6), [], "all"), 25, batch_size, seed=3)
        other = PairSchedule(schedule.pairs, 25, batch_size, seed=3)
        with bank.prefetch(schedule[step] for step in range(2, 25)):
            for step in range(2, 25):
                moving, fixed = bank.pairs_of(schedule[step])  # the schedule is asked by two threads
                assert torch.equal(moving, direct.images_of(other[step][:, 0].tolist()))
                assert torch.equal(fixed, direct.images_of(other[step][:, 1].tolist()))
                if step % 7 == 0:  # a validation in between
                    assert torch.equal(bank.images_of([5]), direct.images_of([5]))
        assert not prefetching()
    assert bank.waited_seconds > 0


def test_images_in_memory_need_no_thread(scans):
    bank = load_bank(scans, [], [], device=CPU)
    with bank.prefetch(iter(())):
        assert not prefetching()
        assert torch.equal(bank.pairs_of(torch.tensor([[1, 2]]))[1], bank.images_of([2]))


def test_so_many_batches_are_kept_ready_and_no_more():
    fetched = []

    def fetch(positions):
        fetched.extend(positions)
        return torch.tensor(positions)

    with Prefetcher(fetch, ([k] for k in range(100)), CPU, ahead=2) as coming:
        for step in range(5):
            deadline = time.monotonic() + 10
            while len(fetched) < step + 2 and time.monotonic() < deadline:
                time.sleep(0.001)
            time.sleep(0.01)
            assert fetched == list(range(step + 2))
            assert coming.take([step]).item() == step
    assert not prefetching()  # with 95 batches to go


def test_the_time_that_was_waited_is_told():
    ready = threading.Event()

    def fetch(positions):
        ready.wait(10)
        return torch.tensor(positions)

    with Prefetcher(fetch, [[0], [1]], CPU) as coming:
        threading.Timer(0.2, ready.set).start()
        coming.take([0])
        assert 0.1 < (waited := coming.waited_seconds) < 5
        time.sleep(0.1)
        coming.take([1])
        assert coming.waited_seconds - waited < 0.09  # it was there


def test_an_error_of_the_thread_reaches_who_waits_for_the_images(scans, tmp_path):
    bank = load_bank(scans, [], [], device=CPU, pack=pack_scans(tmp_path, scans))
    os.truncate(tmp_path / "images.npy", 3000)  # within the fifth image
    pairs = [torch.tensor([[k, 0]]) for k in range(6)]
    message = r"images\.npy \(s4\): found its end after 3000 bytes; expected the file as it was"
    with bank.prefetch(pairs):
        for k in range(4):
            bank.pairs_of(pairs[k])
        for _ in range(2):
            with pytest.raises(InputError, match=message):
                bank.pairs_of(pairs[4])
    assert not prefetching()
    with pytest.raises(InputError, match=message):
        bank.images_of([4])
    with pytest.raises(ZeroDivisionError), Prefetcher(torch.tensor, ([1 // k] for k in (1, 0)), CPU) as coming:
        coming.take([1])
        coming.take([0])
    assert not prefetching()


def test_images_in_another_order_than_announced_are_an_error(scans, packed):
    bank = load_bank(scans, [], [], device=CPU, pack=packed)
    with (
        pytest.raises(RuntimeError, match=r"\[0, 1\] were announced as next, and \[2, 3\] are asked for"),
        bank.prefetch([torch.tensor([[0, 1]])]),
    ):
        bank.pairs_of(torch.tensor([[2, 3]]))
    with pytest.raises(RuntimeError, match="more images are asked for"), bank.prefetch([]):
        bank.pairs_of(torch.tensor([[2, 3]]))
    assert torch.equal(bank.pairs_of(torch.tensor([[2, 3]]))[0], bank.images_of([2]))  # afterwards, as they come


def test_the_benchmark_reads_packs_and_streams(tmp_path, monkeypatch):
    monkeypatch.syspath_prepend(ROOT / "benchmarks")
    benchmark = importlib.import_module("data")
    monkeypatch.delitem(sys.modules, "data")
    benchmark.write_brains(tmp_path / "brains", (10, 12, 14), 4)
    scans = benchmark.scans_of(tmp_path / "brains")
    assert [scan.name for scan in scans] == [f"synthetic-{number}" for number in range(4)]
    assert 0.3 < (raw(scans[0]) > 0).mean() < 0.6 and np.unique(data.read_labels(scans[3].labels).data).size == 29
    row = {"device": "cpu", "threads": 1, "repeats": 1, "step_ms": 0, "precision": "uint8", "scratch": str(tmp_path)}
    found = benchmark.measure_row({**row, "folder": str(tmp_path / "brains")})
    assert found["gb"] == 4 * 10 * 12 * 14 / 1e9 and found["grid"] == "10x12x14" and found["scans"] == 4
    assert all(found[name] > 0 for name in ("read_s", "pack_s", "open_s", "cold_gb_s", "warm_gb_s", "pairs_s"))
    with pytest.raises(InputError, match=r"found 0 files \*/image\.nii\.gz"):
        benchmark.scans_of(tmp_path)


# --- how busy the GPUs are --------------------------------------------------------------------------------------------


@pytest.fixture
def nvidia_smi(tmp_path, monkeypatch):
    """Put an ``nvidia-smi`` on the path that gives one answer after the other, and notes how it was called."""

    def put(*answers: str, status: int = 0) -> Path:
        for number, answer in enumerate(answers):
            (tmp_path / f"answer{number}").write_text(answer)
        calls, program = tmp_path / "calls", tmp_path / "nvidia-smi"
        calls.touch()
        program.write_text(
            f'#!/bin/sh\nn=$(wc -l < {calls})\necho "$@" >> {calls}\n'
            f"cat {tmp_path}/answer$n 2>/dev/null || cat {tmp_path}/answer{len(answers) - 1}\nexit {status}\n"
        )
        program.chmod(0o755)
        monkeypatch.setenv("PATH", f"{tmp_path}:{os.environ['PATH']}")
        return calls

    return put


def wait_for_calls(calls: Path, count: int) -> None:
    deadline = time.monotonic() + 20
    while len(calls.read_text().splitlines()) < count and time.monotonic() < deadline:
        time.sleep(0.005)


def test_utilisation_is_that_of_this_process_cards(nvidia_smi, monkeypatch):
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "GPU-a, GPU-b")
    calls = nvidia_smi("100, 1000\n20, 500\n", "90, 3000\n[N/A], [N/A]\n", "garbage\n")
    with GpuUtilisation(every=0.01) as utilisation:
        wait_for_calls(calls, 4)
    ended = len(calls.read_text().splitlines())
    assert utilisation.summary() == {
        "gpu_utilisation_mean": 70.0,
        "gpu_utilisation_median": 90.0,
        "gpu_share_below_half": pytest.approx(1 / 3, abs=1e-4),
        "gpu_memory_used_mb": pytest.approx(3000 * 1.048576, abs=0.1),
        "gpu_samples": 3,
    }
    expected = "--query-gpu=utilization.gpu,memory.used --format=csv,noheader,nounits --id=GPU-a,GPU-b"
    assert calls.read_text().splitlines()[0] == expected
    time.sleep(0.05)
    assert len(calls.read_text().splitlines()) == ended  # the thread is gone


def test_without_a_gpu_or_with_a_driver_that_fails_there_is_no_utilisation(nvidia_smi, monkeypatch, tmp_path):
    calls = nvidia_smi("Failed to initialize NVML\n", status=9)
    monkeypatch.delenv("CUDA_VISIBLE_DEVICES", raising=False)
    with GpuUtilisation(every=0.01) as failing:
        wait_for_calls(calls, 2)
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "")
    with GpuUtilisation(every=0.01) as hidden:
        time.sleep(0.03)
    monkeypatch.setenv("PATH", str(tmp_path / "empty"))
    with GpuUtilisation(cards=["0"], every=0.01) as missing:
        time.sleep(0.03)
    assert failing.summary() == hidden.summary() == missing.summary() == {}
