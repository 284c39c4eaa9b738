"""The methods: the truth found, and agreement with ANTs and elastix themselves, on an oblique anisotropic grid."""

import json
import logging
import os
import subprocess
import sys
import threading
import time
from collections import defaultdict
from pathlib import Path

import nibabel as nib
import numpy as np
import pytest
import torch
from scipy.ndimage import gaussian_filter

from dmir import networks, registry
from dmir.errors import DmirError, InputError
from dmir.fields import integrate, load_field, onto_moving_grid, pair_field, save_field, warp
from dmir.methods import describe, elastix, isolated, network, network_session, register
from dmir.methods.isolated import register_isolated, register_pairs
from dmir.training import devices
from dmir.training.weights import save_weights
from dmir.volumes import Grid, Volume, read_image, reorient, write_volume

SHAPE = (48, 40, 44)
SYN = {"iterations": (40, 20, 2)}
SHORT_SYN = {"iterations": (5, 2, 0)}
ELASTIX = {"final_grid_spacing": 12.0, "resolutions": 3, "iterations": 60, "bending_energy": 0.1}
SHORT_ELASTIX = {"final_grid_spacing": 16.0, "resolutions": 2, "iterations": 10}


def oblique_affine():
    """Axes left, inferior, anterior; anisotropic; turned by 12 and 8 degrees."""
    a, b = np.deg2rad([12, 8])
    about_z = np.array([[np.cos(a), -np.sin(a), 0], [np.sin(a), np.cos(a), 0], [0, 0, 1]])
    about_x = np.array([[1, 0, 0], [0, np.cos(b), -np.sin(b)], [0, np.sin(b), np.cos(b)]])
    affine = np.eye(4)
    affine[:3, :3] = about_z @ about_x @ np.array([[-2.0, 0, 0], [0, 0, 2.4], [0, -1.6, 0]])
    affine[:3, 3] = (31, -12, 7)
    return affine


def waves(sigma, seed):
    noise = gaussian_filter(np.random.default_rng(seed).standard_normal(SHAPE), sigma, mode="constant")
    return (noise / noise.std()).astype(np.float32)


@pytest.fixture(scope="module")
def pair():
    """A textured ball warped by exp(v), the ball, and exp(-v), which takes the first back onto the second."""
    axes = np.meshgrid(*((np.arange(n) - (n - 1) / 2) / (n / 2 - 4) for n in SHAPE), indexing="ij")
    radius = np.sqrt(sum(x**2 for x in axes))
    texture = np.clip(0.55 + 0.18 * waves(2.0, 1) + 0.1 * waves(4.0, 2), 0.1, 1.0)
    fixed = np.where(radius < 1, texture, 0).astype(np.float32)
    velocity = np.stack([waves(6.0, 10 + k) for k in range(3)]) * np.clip(1.2 - radius, 0, 0.5) * 3
    velocity = torch.from_numpy(velocity.astype(np.float32))[None]
    moving = warp(torch.from_numpy(fixed)[None, None], integrate(velocity))[0, 0].numpy()
    affine = oblique_affine()
    return Volume(moving, affine), Volume(fixed, affine), integrate(-velocity)[0].numpy()


@pytest.fixture(scope="module")
def files(pair, tmp_path_factory):
    folder = tmp_path_factory.mktemp("pair")
    for name, volume in zip(("moving", "fixed"), pair, strict=False):
        write_volume(folder / f"{name}.nii.gz", volume)
    return folder / "moving.nii.gz", folder / "fixed.nii.gz"


@pytest.fixture(scope="module")
def syn_run(pair):
    """The field of SyN, and the moving image as ANTs itself warped it in that very run."""
    import ants

    results = []
    original = ants.registration
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(ants, "registration", lambda *a, **k: results.append(original(*a, **k)) or results[-1])
        displacement = register(*pair[:2], method="syn", **SYN)
    return displacement, results[0]["warpedmovout"].numpy()


@pytest.fixture(scope="module")
def elastix_run(pair):
    """The field of elastix, and the moving image as transformix itself warps it by that very transform."""
    import itk
    from itk.itkTransformixFilterPython import itkTransformixFilterIF3

    calls = []
    original = elastix._deformation_field
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(elastix, "_deformation_field", lambda *a: calls.append(a) or original(*a))
        displacement = register(*pair[:2], method="elastix", **ELASTIX)
    moving, transform, _ = calls[0]
    transform.SetParameter(0, "ResampleInterpolator", "FinalLinearInterpolator")
    transformix = itkTransformixFilterIF3.New()
    transformix.SetMovingImage(moving)
    transformix.SetTransformParameterObject(transform)
    transformix.UpdateLargestPossibleRegion()
    return displacement, itk.array_from_image(transformix.GetOutput()).T


def warped(volume, displacement):
    return warp(torch.from_numpy(volume.data)[None, None], torch.from_numpy(displacement)[None])[0, 0].numpy()


def endpoint_errors(displacement, pair):
    _, fixed, truth = pair
    return np.sqrt(((displacement - truth) ** 2).sum(0))[fixed.data > 0]


@pytest.mark.parametrize("run", ["syn_run", "elastix_run"])
def test_the_true_field_is_found(run, pair, request):
    displacement, _ = request.getfixturevalue(run)
    assert displacement.shape == (3, *SHAPE)
    assert displacement.dtype == np.float32
    before = endpoint_errors(np.zeros_like(displacement), pair)
    after = endpoint_errors(displacement, pair)
    assert before.mean() > 1.5
    assert after.mean() < 0.6  # a flipped, permuted or unscaled component is above 1
    assert np.percentile(after, 95) < 1.2


@pytest.mark.parametrize("run", ["syn_run", "elastix_run"])
def test_our_warp_equals_the_methods_own(run, pair, request):
    displacement, own = request.getfixturevalue(run)
    np.testing.assert_allclose(warped(pair[0], displacement), own, atol=1e-4)


@pytest.mark.parametrize("run", ["syn_run", "elastix_run"])
def test_ants_reads_the_saved_field(run, pair, request, tmp_path):
    import ants

    displacement, _ = request.getfixturevalue(run)
    moving, fixed, _ = pair
    path = tmp_path / "field.nii.gz"
    save_field(path, displacement, fixed.affine)
    np.testing.assert_allclose(load_field(path)[0], displacement, atol=1e-5)
    for name, volume in (("m", moving), ("f", fixed)):
        nib.save(nib.Nifti1Image(volume.data, volume.affine), tmp_path / f"{name}.nii.gz")
    images = [ants.image_read(str(tmp_path / f"{name}.nii.gz")) for name in "fm"]
    theirs = ants.apply_transforms(*images, [str(path)], interpolator="linear").numpy()
    np.testing.assert_allclose(warped(moving, displacement), theirs, atol=1e-4)


@pytest.mark.parametrize(("method", "parameters"), [("syn", SHORT_SYN), ("elastix", SHORT_ELASTIX)])
def test_only_the_place_in_the_world_of_the_moving_image_counts(method, parameters, pair):
    moving, fixed, _ = pair
    elsewhere = reorient(moving, "ASR")
    assert elsewhere.shape != moving.shape
    displacement = register(moving, fixed, method, **parameters)
    other = register(elsewhere, fixed, method, **parameters)
    assert np.abs(displacement).max() > 0.5
    assert np.linalg.norm(other - displacement) < 1e-3 * np.linalg.norm(displacement)
    sampling = onto_moving_grid(other, fixed.affine, elsewhere.affine)
    np.testing.assert_allclose(warped(elsewhere, sampling), warped(moving, other), atol=1e-4)


def test_syn_is_the_same_on_every_run_and_with_any_number_of_threads(files, tmp_path):
    moving, fixed = map(read_image, files)
    first = register(moving, fixed, method="syn", **SHORT_SYN)
    assert np.array_equal(first, register(moving, fixed, method="syn", **SHORT_SYN))
    record = register_isolated(*files, tmp_path / "isolated.nii.gz", "syn", SHORT_SYN, threads=2, timeout=300)
    assert (record["status"], record["reason"], record["threads"], record["device"]) == ("ok", "", 2, "cpu")
    assert 0 < record["seconds"] < 300
    assert record["read_seconds"] > 0
    assert record["write_seconds"] > 0
    assert record["peak_memory_mb"] > 50
    save_field(tmp_path / "first.nii.gz", first, fixed.affine)
    assert np.array_equal(load_field(tmp_path / "isolated.nii.gz")[0], load_field(tmp_path / "first.nii.gz")[0])


def test_elastix_depends_on_seed_and_threads_alone(pair):
    fields = {
        (seed, threads, run): register(*pair[:2], "elastix", **SHORT_ELASTIX, seed=seed, threads=threads)
        for seed, threads, run in ((1, 1, 0), (1, 2, 0), (1, 1, 1), (2, 1, 0))
    }
    assert np.array_equal(fields[1, 1, 0], fields[1, 1, 1])  # also after a run with other threads
    assert not np.array_equal(fields[1, 1, 0], fields[2, 1, 0])
    assert np.abs(fields[1, 1, 0] - fields[1, 2, 0]).max() < 0.5


def test_nothing_is_left_behind(pair, tmp_path, monkeypatch):
    work, temporary = tmp_path / "work", tmp_path / "temporary"
    work.mkdir()
    temporary.mkdir()
    monkeypatch.chdir(work)
    monkeypatch.setattr("tempfile.tempdir", str(temporary))
    register(*pair[:2], method="elastix", **(SHORT_ELASTIX | {"iterations": 1, "resolutions": 1}))
    register(*pair[:2], method="syn", metric="meansquares", iterations=(1, 0))
    assert [*work.iterdir(), *temporary.iterdir()] == []


def test_the_metrics_of_both_methods_are_distinct(pair):
    syn = [register(*pair[:2], "syn", metric=metric, iterations=(3, 0)) for metric in ("mattes", "meansquares")]
    free = [
        register(*pair[:2], "elastix", metric=metric, final_grid_spacing=16.0, resolutions=1, iterations=5)
        for metric in elastix.METRICS
    ]
    for one, other in (syn, free):
        assert np.abs(one - other).max() > 1e-3


def test_both_estimates_of_elastixs_step_size_end_at_the_truth(pair):
    """The faster one did not with steps of a whole voxel: the optimiser ran away, by up to 21 voxels."""
    for step_size in ("displacement_distribution", "original"):
        errors = endpoint_errors(register(*pair[:2], method="elastix", **ELASTIX, step_size=step_size), pair)
        assert errors.max() < 2.0


def test_affine_is_the_zero_field(pair):
    displacement = register(*pair[:2], method="affine")
    assert displacement.shape == (3, *SHAPE)
    assert displacement.dtype == np.float32
    assert not displacement.any()


@pytest.mark.parametrize(
    ("method", "parameters", "words"),
    [
        ("sny", {}, "Did you mean 'syn'?"),
        ("voxelmorf", {}, "Did you mean 'voxelmorph'?"),
        ("voxelmorph", {}, "without weights"),
        ("missing.safetensors", {}, "missing.safetensors"),
        ("syn", {"iteration": (1,)}, "Did you mean 'iterations'?"),
        ("syn", {"metric": "cc"}, "CC"),
        ("syn", {"iterations": (0, 0)}, "not all of them 0"),
        ("elastix", {"metric": "normalized_correlation"}, "Did you mean 'normalised_correlation'?"),
        ("elastix", {"step_size": "orginal"}, "Did you mean 'original'?"),
        ("affine", {"seed": 1}, "no parameters"),
    ],
)
def test_a_mistake_is_named(method, parameters, words, pair):
    with pytest.raises(InputError) as error:
        register(*pair[:2], method=method, **parameters)
    assert words in str(error.value)


def test_a_sheared_grid_is_refused(pair):
    moving, fixed, _ = pair
    sheared = fixed.affine.copy()
    sheared[:3, 1] += 0.2 * sheared[:3, 0]
    for method in ("syn", "elastix"):
        with pytest.raises(InputError, match=r"the fixed image.*right angles"):
            register(moving, Volume(fixed.data, sheared), method)


def test_a_pair_without_overlap_fails_with_a_reason(pair):
    moving, fixed, _ = pair
    far = moving.affine.copy()
    far[0, 3] += 900
    with pytest.raises(DmirError, match="elastix failed"):
        register(Volume(moving.data, far), fixed, "elastix", **SHORT_ELASTIX)


def test_a_description_names_every_parameter():
    words = describe("syn", iterations=(9, 8), radius=3)
    assert words.startswith("syn(metric='CC', radius=3, ")
    assert "iterations=[9, 8]" in words
    assert "gradient_step=" in words
    assert describe("affine") == "affine()"
    assert all(name in describe("elastix") for name in ("final_grid_spacing=", "seed=1", "threads=1"))


# A pair in a process of its own: each of these programs stands for a method that goes wrong in its own way.
WRITES_AND_CRASHES = """
import json, os, pathlib, signal, sys
pathlib.Path(json.load(open(sys.argv[1]))["field"]).write_bytes(b"half")
os.kill(os.getpid(), signal.SIGSEGV)
"""
GIVES_NAN = """
import sys
import numpy as np
import dmir.methods.calling
from dmir.methods import isolated
dmir.methods.calling.register = lambda moving, fixed, method: np.full((3, *fixed.shape), np.nan, np.float32)
sys.exit(isolated.main(sys.argv[1:]))
"""


@pytest.mark.parametrize(
    ("program", "reason"),
    [
        (WRITES_AND_CRASHES, "killed by SIGSEGV"),
        ("import time; time.sleep(100)", "stopped after 1.5 s"),
        ("raise ValueError('no good')", "ValueError: no good"),
        ("raise SystemExit(7)", "ended with status 7"),
        ("pass", "the process ended without an answer"),
        (GIVES_NAN, f"the field has {3 * np.prod(SHAPE)} values that are NaN or infinite"),
    ],
    ids=["crash", "time-out", "exception", "status", "silence", "not finite"],
)
def test_a_failure_of_any_kind_is_a_record(program, reason, files, tmp_path, monkeypatch):
    monkeypatch.setattr(isolated, "_command", lambda request: [sys.executable, "-c", program, str(request)])
    field = tmp_path / "field.nii.gz"
    field.write_bytes(b"of an earlier run")
    timeout = 1.5 if "sleep" in program else 120
    record = register_isolated(*files, field, "affine", threads=1, timeout=timeout)
    assert (record["status"], record["reason"]) == ("failed", reason)
    assert all(np.isnan(record[name]) for name in ("seconds", "read_seconds", "write_seconds", "peak_memory_mb"))
    assert not field.exists()


def test_the_process_has_its_threads_and_seed_before_any_import(files, tmp_path, monkeypatch):
    program = (
        "import os, json, sys; names = ('ITK_GLOBAL_DEFAULT_NUMBER_OF_THREADS', 'OMP_NUM_THREADS', 'ANTS_RANDOM_SEED');"
        "sys.exit(json.dumps([os.environ[n] for n in names]))"
    )
    monkeypatch.setattr(isolated, "_command", lambda request: [sys.executable, "-c", program])
    plain = register_isolated(*files, tmp_path / "a.nii.gz", "syn", {"seed": 7}, threads=3)
    own = register_isolated(*files, tmp_path / "a.nii.gz", "elastix", {"threads": 2}, threads=3)
    assert (json.loads(plain["reason"]), plain["threads"]) == (["3", "3", "7"], 3)
    assert (json.loads(own["reason"]), own["threads"]) == (["2", "2", "1"], 2)  # part of the result, so it wins


KILLED_BY_SOMEBODY = "import os, signal; os.kill(os.getpid(), signal.SIG{})"
ON_A_FULL_DISK = """
import errno, os, sys
import dmir.fields
from dmir.methods import isolated
def save_field(path, displacement, affine):
    raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC), str(path))
dmir.fields.save_field = save_field
sys.exit(isolated.main(sys.argv[1:]))
"""
OUT_OF_MEMORY = """
import sys
import dmir.methods.calling
from dmir.methods import isolated
def register(moving, fixed, method):
    raise MemoryError
dmir.methods.calling.register = register
sys.exit(isolated.main(sys.argv[1:]))
"""


@pytest.mark.parametrize(
    ("program", "reason"),
    [
        (KILLED_BY_SOMEBODY.format("KILL"), "killed by SIGKILL: by the system, for want of memory, or by somebody"),
        (KILLED_BY_SOMEBODY.format("TERM"), "killed by SIGTERM"),
        (ON_A_FULL_DISK, r"No space left on device.*field\.nii\.gz"),
        (OUT_OF_MEMORY, "out of memory"),
    ],
    ids=["kill -9", "kill", "full disk", "memory"],
)
def test_what_is_not_the_methods_fault_is_no_failed_pair(program, reason, files, tmp_path, monkeypatch):
    monkeypatch.setattr(isolated, "_command", lambda request: [sys.executable, "-c", program, str(request)])
    with pytest.raises(DmirError, match=rf"affine, .*moving.*{reason}"):
        register_isolated(*files, tmp_path / "field.nii.gz", "affine", timeout=120)
    assert not (tmp_path / "field.nii.gz").exists()


def test_an_image_that_cannot_be_read_is_no_failed_pair(files, tmp_path):
    cut = tmp_path / "cut.nii.gz"
    cut.write_bytes(files[0].read_bytes()[:-50])
    with pytest.raises(DmirError, match=str(cut)):
        register_isolated(cut, files[1], tmp_path / "field.nii.gz", "affine", timeout=120)


def test_the_process_of_a_pair_ends_with_the_one_that_started_it(tmp_path):
    request = tmp_path / "request.json"
    request.write_text(json.dumps({"parent": os.getpid() + 1}))  # has ended already
    done = subprocess.run([sys.executable, "-m", "dmir.methods.isolated", str(request)], capture_output=True)
    assert (done.returncode, done.stderr) == (isolated.UNABLE, b"")


FAILS_ON_THE_FIRST = """
import json, sys
from dmir.methods import isolated
if "first" in json.load(open(sys.argv[1]))["moving"]:
    sys.exit("no good")
sys.exit(isolated.main(sys.argv[1:]))
"""


def test_a_failed_pair_does_not_stop_the_others(files, tmp_path, caplog, monkeypatch):
    monkeypatch.setattr(isolated, "_command", lambda request: [sys.executable, "-c", FAILS_ON_THE_FIRST, str(request)])
    moving, fixed = files
    pairs = [("a", tmp_path / "first.nii.gz", "atlas", fixed), ("b", moving, "atlas", fixed)]
    with caplog.at_level(logging.INFO):
        records = register_pairs(pairs, tmp_path / "fields", "affine", timeout=120, workers=2)
    assert list(records["status"]) == ["failed", "ok"]
    assert records["reason"][0] == "no good"
    assert records["moving"].tolist() == ["a", "b"]
    assert records["method"].tolist() == ["affine", "affine"]
    assert [path.name for path in (tmp_path / "fields").iterdir()] == ["b__atlas.nii"]
    displacement, affine = load_field(tmp_path / "fields" / "b__atlas.nii")
    assert not displacement.any()
    np.testing.assert_allclose(affine, oblique_affine(), atol=1e-5)
    lines = [line.getMessage() for line in caplog.records]
    assert lines[0].startswith("1/2 a to atlas: failed: ")
    assert lines[1].startswith("2/2 b to atlas: ")


@pytest.mark.parametrize(
    ("method", "parameters"),
    [("syn", SHORT_SYN), ("syn", SHORT_SYN | {"metric": "mattes"}), ("elastix", SHORT_ELASTIX)],
    ids=["syn", "mattes", "elastix"],
)
def test_a_process_goes_on_to_the_next_pair_whose_field_is_that_of_a_fresh_process(
    method, parameters, files, tmp_path, monkeypatch
):
    started = []
    command = isolated._command
    monkeypatch.setattr(isolated, "_command", lambda request: started.append(request) or command(request))
    moving, fixed = files
    pairs = [("a", moving, "b", fixed), ("b", fixed, "a", moving)]
    records = register_pairs(pairs, tmp_path, method, parameters, timeout=300)
    assert list(records["status"]) == ["ok", "ok"]
    assert len(started) == 1
    alone = register_isolated(fixed, moving, tmp_path / "alone.nii", method, parameters, timeout=300)
    assert (tmp_path / "b__a.nii").read_bytes() == (tmp_path / "alone.nii").read_bytes()
    assert records["peak_memory_mb"][1] < 1.2 * alone["peak_memory_mb"]
    assert len(started) == 2


def test_what_a_card_gave_to_the_pair_before_is_not_counted(files, tmp_path, monkeypatch):
    begun = []
    monkeypatch.setattr(devices, "reset_peak_memory", lambda device: begun.append(device.type))
    request = {"moving": str(files[0]), "fixed": str(files[1]), "field": str(tmp_path / "field.nii"), "names": {}}
    request |= {"method": "descent", "limit": None, "cut_planes": [[], []]}
    isolated._answer({**request, "parameters": {"stages": [{"voxel": 8, "steps": 2}]}})
    assert begun == ["cpu"]


KILLED_WHILE_IT_WAITS = """
import json, os, signal, sys
from dmir.methods import isolated
def killed(*arguments):
    os.kill(os.getpid(), signal.SIGKILL)
os.read = killed
sys.exit(isolated.main(sys.argv[1:]))
"""


def test_a_process_that_is_killed_between_two_pairs_is_no_failed_pair(files, tmp_path, monkeypatch):
    program = [sys.executable, "-c", KILLED_WHILE_IT_WAITS]
    monkeypatch.setattr(isolated, "_command", lambda request: [*program, str(request)])
    moving, fixed = files
    with pytest.raises(DmirError, match="killed by SIGKILL"):
        register_pairs([("a", moving, "b", fixed), ("c", moving, "b", fixed)], tmp_path, "affine", timeout=120)
    assert (tmp_path / "a__b.nii").is_file()


def test_records_have_the_columns_of_the_networks_records():
    assert isolated.COLUMNS == network.COLUMNS


def test_classical_libraries_are_imported_only_when_they_are_used():
    modules = [registry.find(name).module for name in registry.names("method")]
    program = (
        "import sys, dmir.methods, dmir.methods.isolated; from importlib import import_module as load;"
        f"[load(m) for m in {modules}]; print([m for m in ('ants', 'itk', 'torch') if m in sys.modules])"
    )
    done = subprocess.run(
        [sys.executable, "-c", program],
        capture_output=True,
        text=True,
        check=True,
        env={"PYTHONPATH": str(Path(isolated.__file__).parents[2])},
    )
    assert done.stdout.strip() == "[]"


# --- many pairs through one network: reading, computing and writing at once, one after another in the records ---

SMALL = (6, 7, 8)
METADATA = {"network": "double", "seed": 1, "grid": {"shape": list(SMALL), "spacing": [1.0, 1.0, 1.0]}}


class Watched(torch.nn.Module):
    """A network that does something of the test's before it gives a field of its own number."""

    def __init__(self, before=lambda number: None):
        super().__init__()
        self.calls = 0
        self.before = before

    def forward(self, moving, fixed):
        self.calls += 1
        self.before(self.calls)
        return torch.full((1, 3, *moving.shape[2:]), float(moving.mean()))


@pytest.fixture
def many(tmp_path):
    """Twelve images of one value more each, all with one atlas."""
    rows = []
    for number in range(13):
        data = np.full(SMALL, number, np.float32)
        data[0, 0, 0] += 1e-3  # an image with no contrast at all is refused
        path = tmp_path / "images" / f"s{number:02d}.nii.gz"
        write_volume(path, Volume(data, np.eye(4)))
        rows.append((f"s{number:02d}", path))
    return [(*row, *rows[0]) for row in rows[1:]]


def through(network_double, pairs, folder, monkeypatch, **options):
    monkeypatch.setattr(network, "load_weights", lambda *_, **__: (network_double, METADATA))
    return network.register_pairs(pairs, folder, "double.safetensors", device="cpu", warmup=False, **options)


class Traffic:
    """Counts what is read and written at present, and the most that lay in memory at once."""

    def __init__(self, monkeypatch, pause=0.0):
        self.lock = threading.Lock()
        self.active = self.read = self.computed = self.written = 0
        self.most_fields = self.most_ahead = 0
        self.reading, self.writing = defaultdict(threading.Event), defaultdict(threading.Event)
        read, save = network_session.read_image, network_session.save_field

        def watched_read(path, *rest):
            self.reading[Path(path).name.split(".")[0]].set()
            return self.watched(read, pause, "read", path, *rest)

        def watched_save(path, *rest):
            self.writing[Path(path).name.split("__")[0]].set()
            return self.watched(save, pause, "written", path, *rest)

        monkeypatch.setattr(network_session, "read_image", watched_read)
        monkeypatch.setattr(network_session, "save_field", watched_save)

    def watched(self, function, pause, counter, *arguments):
        with self.lock:
            self.active += 1
        try:
            time.sleep(pause)
            return function(*arguments)
        finally:
            with self.lock:
                self.active -= 1
                setattr(self, counter, getattr(self, counter) + 1)

    def compute(self, number):
        with self.lock:
            self.computed = number
            self.most_fields = max(self.most_fields, number - self.written)
            self.most_ahead = max(self.most_ahead, self.read - 1 - (number - 1))


def test_the_next_pairs_are_read_and_the_last_field_is_written_while_the_network_computes(many, tmp_path, monkeypatch):
    traffic = Traffic(monkeypatch)
    seen = {}

    def wait_for_the_others(number):
        if number == 2:
            seen["written"] = traffic.writing["s01"].wait(20)
            seen["read"] = traffic.reading["s03"].wait(20)

    records = through(Watched(wait_for_the_others), many, tmp_path / "fields", monkeypatch, overlap=True)
    assert seen == {"written": True, "read": True}
    assert (records.status == "ok").all()


def test_on_the_cpu_nothing_else_runs_while_the_network_computes(many, tmp_path, monkeypatch):
    traffic = Traffic(monkeypatch, pause=0.002)
    active = []
    records = through(Watched(lambda _: active.append(traffic.active)), many, tmp_path / "fields", monkeypatch)
    assert active == [0] * 12
    assert (records.status == "ok").all() and traffic.written == 12


@pytest.mark.parametrize("overlap", [True, False])
def test_records_and_fields_keep_their_order_and_memory_is_bounded(overlap, many, tmp_path, monkeypatch):
    traffic = Traffic(monkeypatch, pause=0.005)
    other = many[5][1]
    write_volume(other, Volume(read_image(other).data[:-1], np.eye(4)))  # not on the fixed image's grid
    double = Watched(traffic.compute)
    records = through(double, many, tmp_path / "fields", monkeypatch, overlap=overlap)
    assert list(records.moving) == [row[0] for row in many]
    assert list(records.status) == ["ok"] * 5 + ["failed"] + ["ok"] * 6
    assert "s06.nii.gz" in records.reason[5] and double.calls == 11
    for number, row in enumerate(many, start=1):
        path = pair_field(tmp_path / "fields", row[0], "s00")
        if number == 6:
            assert not path.exists()
        else:
            np.testing.assert_allclose(load_field(path)[0], number, atol=1e-3)
    assert traffic.most_fields <= (network.BEHIND if overlap else 1)
    assert traffic.most_ahead <= network.AHEAD + 1
    assert traffic.read == 13  # the atlas once, and each image


def test_what_is_interrupted_leaves_complete_fields_only(many, tmp_path, monkeypatch):
    interrupted = threading.Event()
    save = network_session.save_field

    def slow_save(*arguments):
        assert interrupted.wait(20)  # so that it is under way when the interruption comes
        save(*arguments)

    def interrupt(number):
        if number == 3:
            interrupted.set()
            raise KeyboardInterrupt

    monkeypatch.setattr(network_session, "save_field", slow_save)
    with pytest.raises(KeyboardInterrupt):
        through(Watched(interrupt), many, tmp_path / "fields", monkeypatch, overlap=True)
    written = sorted(path.name for path in (tmp_path / "fields").iterdir())
    assert written and set(written) <= {"s01__s00.nii", "s02__s00.nii"}
    for name in written:
        load_field(tmp_path / "fields" / name)
    assert not [thread.name for thread in threading.enumerate() if thread.name.startswith(("read_", "write_"))]


def test_memory_that_does_not_suffice_is_told_with_the_pair_and_the_keys(many, tmp_path, monkeypatch):
    def run_out(number):
        if number == 2:
            raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 7 GiB")

    records = through(Watched(run_out), many[:3], tmp_path / "fields", monkeypatch)
    assert list(records.status) == ["ok", "failed", "ok"]
    for words in ("s02 to s00, 6x7x8 voxels: out of memory on cpu", "`grid.shape`", "`precision`", "allocate 7 GiB"):
        assert words in records.reason[1]
    volume = read_image(many[0][1])
    with pytest.raises(DmirError, match=r"out of memory on cpu.*`grid\.shape`"):
        network.register(volume, volume, (Watched(lambda _: run_out(2)), METADATA), device="cpu")


def test_each_fixed_image_is_read_again_only_where_it_changes(many, tmp_path, monkeypatch):
    traffic = Traffic(monkeypatch)
    other = (many[-1][0], many[-1][1])
    pairs = [*many[:3], *((*row[:2], *other) for row in many[:3])]
    records = through(Watched(), pairs, tmp_path / "fields", monkeypatch, overlap=True)
    assert traffic.read == 3 + 3 + 2
    assert list(records.fixed) == ["s00"] * 3 + ["s12"] * 3 and (records.read_seconds > 0).all()


@pytest.fixture(scope="module")
def small_weights(tmp_path_factory):
    """VoxelMorph with one hyperparameter that is not the default's, for a grid of 16 voxels of 2 mm."""
    built = networks.build("voxelmorph", (16, 16, 16), encoder=[4, 4], decoder=[4, 4, 4], integration_steps=0)
    path = tmp_path_factory.mktemp("weights") / "model.safetensors"
    grid = Grid((16, 16, 16), np.diag([2.0, 2, 2, 1]))
    save_weights(path, built, name="voxelmorph", hyperparameters=built.hyperparameters, grid=grid, seed=1)
    return path


OWN = {"encoder": [4, 4], "decoder": [4, 4, 4], "integration_steps": 0}
GRID = {"shape": [16, 16, 16], "spacing": [2.0, 2.0, 2.0]}


@pytest.mark.parametrize(
    ("name", "hyperparameters", "grid", "words"),
    [
        ("voxelmorph", {**OWN, "encoder": [4, 8]}, GRID, ["encoder=[4, 4]", "expected encoder=[4, 8]"]),
        # left to its default in the configuration
        (
            "voxelmorph",
            {k: OWN[k] for k in ("encoder", "decoder")},
            GRID,
            ["integration_steps=0", "integration_steps=7"],
        ),
        ("transmorph", {}, GRID, ["network 'voxelmorph'", "expected network 'transmorph'"]),
        ("voxelmorph", OWN, {**GRID, "spacing": [1.0, 1.0, 1.0]}, ["spacing [2.0, 2.0, 2.0]", "[1.0, 1.0, 1.0]"]),
        ("voxelmorph", OWN, {**GRID, "shape": [16, 16, 32]}, ["shape [16, 16, 16]", "expected shape [16, 16, 32]"]),
    ],
)
def test_weights_of_another_configuration_are_refused_with_what_differs(
    name, hyperparameters, grid, words, small_weights, tmp_path
):
    expected = {"network": name, "hyperparameters": hyperparameters, "grid": grid}
    with pytest.raises(InputError) as error:
        network.register_pairs([], tmp_path, small_weights, device="cpu", expected=expected)
    assert str(error.value).startswith(str(small_weights))
    assert all(word in str(error.value) for word in words)
    assert "conv" not in str(error.value)  # only what differs


def test_weights_of_this_configuration_are_taken(small_weights, tmp_path):
    expected = {"network": "voxelmorph", "hyperparameters": OWN, "grid": GRID}
    assert network.register_pairs([], tmp_path, small_weights, device="cpu", expected=expected).empty
