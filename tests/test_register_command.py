"""``dmir register``: what its folder holds, what is told, what is refused, and that a failure leaves nothing."""

import json
import sys

import numpy as np
import pytest
import torch
import yaml
from scipy.ndimage import binary_erosion, gaussian_filter

from dmir import register_command
from dmir.cli import main
from dmir.fields import load_field
from dmir.methods import scans
from dmir.metrics import dice
from dmir.volumes import Grid, Volume, read_image, read_labels, write_volume

FILES = {
    "field.nii.gz",
    "inverse_field.nii.gz",
    "affine.mat",
    "warped.nii.gz",
    "registration.json",
    "registration.png",
}
QUICK = ["--no-affine", "--method", "affine"]  # neither is computed: the rest of the command is what is tested
SHAPE, STEP = (44, 50, 40), 3.5
SHIFT = np.array([7.0, -3.5, 3.5])  # mm, whole voxels


def affine_of(shape=SHAPE, step=STEP):
    affine = np.diag([step, step, step, 1.0])
    affine[:3, 3] = -step * (np.array(shape) - 1) / 2
    return affine


def brain(shift=(0.0, 0.0, 0.0), wave=0.0):
    """Image and labels of a brain of about 1200 ml at every point of a grid, shifted by mm and bent by a wave of mm."""
    affine = affine_of()
    index = np.stack(np.meshgrid(*(np.arange(n) for n in SHAPE), indexing="ij"))
    places = STEP * index + affine[:3, 3].reshape(3, 1, 1, 1)
    x, y, z = places - np.reshape(shift, (3, 1, 1, 1)) - wave * np.sin(np.roll(places, 1, axis=0) / 25)
    inside = (x / 62) ** 2 + (y / 76) ** 2 + (z / 60) ** 2 < 1
    image = 100 + 40 * np.sin(x / 9 + 1) * np.cos(y / 11) + 30 * np.sin(z / 8 + y / 30)
    labels = np.where(x < 0, 2, 41)
    return np.where(inside, image, 0).astype(np.float32), np.where(inside, labels, 0).astype(np.int32)


@pytest.fixture(scope="module")
def files(tmp_path_factory):
    folder = tmp_path_factory.mktemp("files")

    def write(name, data, affine=None):
        write_volume(folder / f"{name}.nii.gz", Volume(data, affine_of() if affine is None else affine))

    image, labels = brain()
    write("fixed", image)
    write("fixed_labels", labels)
    moved, moved_labels = brain(SHIFT, wave=4.0)
    write("moving", moved)
    write("moving_labels", moved_labels)
    shifted = affine_of()
    shifted[:3, 3] += SHIFT
    write("shifted", image, shifted)
    write("mirrored", image[::-1].copy())
    write("mirrored_labels", labels[::-1].copy())
    sheared = affine_of()
    sheared[:3, 1] += 0.2 * sheared[:3, 0]
    write("sheared", image, sheared)
    write("head", np.maximum(image, 80 * (gaussian_filter((image > 0).astype(np.float32), 5) > 0.01)))
    write("head_mask", gaussian_filter((image > 0).astype(np.float32), 5) > 0.01)
    write("nan", np.where(image > 150, np.nan, image))
    write("constant", np.full_like(image, 7))
    write("empty", np.zeros_like(image))
    write("corner", (np.indices(SHAPE).sum(axis=0) < 6).astype(np.uint8))
    write("small_mask", np.ones((10, 10, 10), np.uint8))
    return folder


def register(folder, out, *more, moving="moving", fixed="fixed"):
    paths = {"--moving": folder / f"{moving}.nii.gz", "--fixed": folder / f"{fixed}.nii.gz", "--out": out}
    return main(["register", *(str(part) for item in paths.items() for part in item), *map(str, more)])


def there_and_back(out, start):
    """Take points (n, 3) of the moving world to the fixed one and back, by the two files alone."""
    points = start
    for name in ("inverse_field", "field"):
        displacement, affine = load_field(out / f"{name}.nii.gz")
        index = (np.linalg.inv(affine) @ np.column_stack([points, np.ones(len(points))]).T)[:3]
        sampled = torch.nn.functional.grid_sample(
            torch.from_numpy(displacement)[None],
            torch.tensor(
                (2 * index / (np.array(displacement.shape[1:]) - 1)[:, None] - 1)[::-1].T.copy(), dtype=torch.float32
            )[None, None, None],
            align_corners=True,
        )[0, :, 0, 0].numpy()
        points = ((affine @ np.vstack([index + sampled, np.ones(len(points))]))[:3]).T
    return points


# ---------------------------------------------------------------- what it gives


@pytest.fixture(scope="module")
def registered(files, tmp_path_factory):
    out = tmp_path_factory.mktemp("registered") / "deep" / "out"
    labels = ["--moving-labels", files / "moving_labels.nii.gz", "--fixed-labels", files / "fixed_labels.nii.gz"]
    assert register(files, out, *labels) == 0
    return out


def test_without_a_method_it_is_descent_and_the_folder_holds_everything(files, registered):
    names = {path.name for path in registered.iterdir()}
    assert names == FILES | {"warped_labels.nii.gz", "fixed_labels_on_moving.nii.gz"} == set(register_command.WRITTEN)
    assert [path.name for path in registered.parent.iterdir()] == ["out"]
    fixed, warped = read_image(files / "fixed.nii.gz").data, read_image(registered / "warped.nii.gz").data
    assert np.corrcoef(fixed[fixed > 0], warped[fixed > 0])[0, 1] > 0.97
    for found, target in (("warped_labels", "fixed_labels"), ("fixed_labels_on_moving", "moving_labels")):
        maps = [read_labels(path).data for path in (registered / f"{found}.nii.gz", files / f"{target}.nii.gz")]
        assert min(dice(*maps, [2, 41]).values()) > 0.96


def test_the_record_says_with_what_and_how_well(registered):
    record = json.loads((registered / "registration.json").read_text())
    assert record["method"] == "descent"
    assert [stage["voxel"] for stage in record["parameters"]["stages"]] == [4, 4, 2, 2, 1]
    assert record["versions"]["dmir"] and record["versions"]["torch"] == torch.__version__
    similarity = record["similarity"]
    assert similarity["after"]["correlation"] > similarity["after_affine"]["correlation"] + 0.02
    assert record["folds"] == 0
    assert 0 <= record["inverse_residual"]["mean"] < record["inverse_residual"]["worst"] < 0.5
    assert {"read", "affine", "method", "inverse", "warp", "write", "total"} <= set(record["seconds"])
    assert record["quality"]["moving"]["ok"] and record["remarks"] == []
    assert np.array(record["affine"]).shape == (4, 4)
    assert record["inputs"]["moving"].endswith("moving.nii.gz")


def test_the_picture_is_a_picture(registered):
    from PIL import Image

    with Image.open(registered / "registration.png") as picture:
        assert picture.size[0] == 1800 and 900 < picture.size[1] < 1500
        assert len(np.unique(np.asarray(picture.convert("RGB")).reshape(-1, 3), axis=0)) > 500  # greys, blues and reds


def test_both_fields_lead_there_and_back(registered):
    start = np.random.default_rng(1).uniform(-40, 40, (500, 3))
    assert np.linalg.norm(there_and_back(registered, start) - start, axis=1).max() < 0.5 * STEP


def test_a_shift_of_the_header_is_found_and_undone(files, tmp_path):
    assert register(files, tmp_path / "out", moving="shifted") == 0
    start = np.random.default_rng(2).uniform(-35, 35, (200, 3))
    displacement, affine = load_field(tmp_path / "out" / "field.nii.gz")
    inside = read_image(files / "fixed.nii.gz").data > 0
    found = np.einsum("ij,jn->in", affine[:3, :3], displacement[:, inside])
    assert np.abs(found - SHIFT[:, None]).max() < 0.5
    inverse, moving_affine = load_field(tmp_path / "out" / "inverse_field.nii.gz")
    np.testing.assert_allclose(moving_affine[:3, 3], affine[:3, 3] + SHIFT, atol=1e-4)
    back = np.einsum("ij,jn->in", moving_affine[:3, :3], inverse[:, inside])
    assert np.abs(back + SHIFT[:, None]).max() < 0.5
    np.testing.assert_allclose(there_and_back(tmp_path / "out", start), start, atol=0.2)


def test_another_program_follows_the_inverse_field(files, registered):
    ants = pytest.importorskip("ants")
    moving, fixed = (ants.image_read(str(files / f"{name}.nii.gz")) for name in ("moving", "fixed"))
    path = str(registered / "inverse_field.nii.gz")
    theirs = ants.apply_transforms(moving, fixed, [path], interpolator="linear").numpy()
    inside = binary_erosion(read_image(files / "moving.nii.gz").data > 0, iterations=3)  # off the border's half voxels
    assert np.corrcoef(theirs[inside], moving.numpy()[inside])[0, 1] > 0.98


# ---------------------------------------------------------------- one folder, one registration


def test_a_second_registration_leaves_nothing_of_the_first(files, tmp_path):
    out = tmp_path / "out"
    assert register(files, out, *QUICK, "--moving-labels", files / "moving_labels.nii.gz") == 0
    (out / "notes.txt").write_text("mine")
    assert (out / "warped_labels.nii.gz").exists()
    assert register(files, out, *QUICK, moving="shifted") == 0
    assert {path.name for path in out.iterdir()} == FILES | {"notes.txt"}
    np.testing.assert_allclose(load_field(out / "field.nii.gz")[0], 0, atol=1e-5)
    assert [path.name for path in tmp_path.iterdir()] == ["out"]


def test_a_failure_at_the_end_leaves_the_registration_of_before(files, tmp_path, monkeypatch):
    out = tmp_path / "out"
    assert register(files, out, *QUICK) == 0
    before = {path.name: path.read_bytes() for path in out.iterdir()}

    def fails(*arguments, **options):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr("dmir.report.registration.draw_registration", fails)
    assert register(files, out, *QUICK, moving="shifted") == 1
    assert {path.name: path.read_bytes() for path in out.iterdir()} == before
    assert register(files, tmp_path / "new", *QUICK) == 1
    assert [path.name for path in tmp_path.iterdir()] == ["out"]


# ---------------------------------------------------------------- what is refused, and what is told


@pytest.mark.parametrize(
    ("scan", "more", "words"),
    [
        ("nan", [], ["moving: ", "nan.nii.gz", "NaN"]),
        ("constant", [], ["constant image"]),
        ("empty", [], ["constant image", "0"]),
        ("sheared", [], ["moving image", "right angles"]),
        ("sheared", ["--method", "syn"], ["moving image", "right angles"]),
        ("head", [], ["moving: ", "a head and no brain", "--moving-mask", "--skull-strip deepbet", "dmir[deepbet]"]),
        ("moving", ["--moving-mask", "corner"], ["moving_mask", "corner.nii.gz", "0 everywhere"]),
        ("moving", ["--moving-mask", "empty"], ["moving_mask", "empty mask"]),
        ("moving", ["--moving-mask", "small_mask"], ["small_mask.nii.gz", "10x10x10", "44x50x40"]),
        ("moving", ["--skull-strip", "deepbet"], ["--skull-strip deepbet", "pip install 'dmir[deepbet]'"]),
    ],
)
def test_bad_input_is_one_line_and_no_folder(files, tmp_path, capsys, monkeypatch, scan, more, words):
    monkeypatch.setattr(scans, "estimate_affine", lambda *a, **k: pytest.fail("it was registered"))
    monkeypatch.setitem(sys.modules, "deepbet", None)
    known = {"corner", "empty", "small_mask"}
    more = [files / f"{part}.nii.gz" if part in known else part for part in more]
    assert register(files, tmp_path / "new" / "out", *more, moving=scan) == 1
    told = capsys.readouterr()
    assert told.err.startswith("Error: ") and told.err.count("\n") == 1 and not told.out
    assert all(word in told.err for word in words), told.err
    assert not (tmp_path / "new").exists()


def test_a_file_in_the_place_of_the_folder_is_refused(files, tmp_path, capsys):
    (tmp_path / "out").write_text("mine")
    assert register(files, tmp_path / "out", *QUICK) == 1
    assert "found a file" in capsys.readouterr().err and (tmp_path / "out").read_text() == "mine"


@pytest.mark.parametrize(
    ("text", "more", "words"),
    [
        ("stages: [{voxel: 4, steps: 3, stepp: 1}]", [], ["stages.0.stepp", "Did you mean 'step'?"]),
        ("stages: [{voxel: 4, steps: -3}]", [], ["stages.0.steps", "-3"]),
        ("similarity: lnc", [], ["similarity", "lnc"]),
        ("iteration: 3", ["--method", "syn"], ["iteration", "Did you mean 'iterations'?"]),
        ("algorithm: descent", ["--method", "syn"], ["--method syn", "algorithm: descent", "settings.yaml"]),
        ("- 3", [], ["settings.yaml", "dictionary"]),
        ("steps: 3", ["--method", "nowhere.safetensors"], ["parameters (steps)", "trained with its own"]),
    ],
)
def test_settings_that_cannot_be_used_are_named(files, tmp_path, capsys, text, more, words):
    (tmp_path / "settings.yaml").write_text(text)
    assert register(files, tmp_path / "out", "--settings", tmp_path / "settings.yaml", *more) == 1
    error = capsys.readouterr().err
    assert error.startswith("Error: ") and all(word in error for word in words), error
    assert not (tmp_path / "out").exists()


def test_settings_are_the_methods_parameters(files, tmp_path, capsys):
    """And so is what an earlier record holds."""
    stages = [{"voxel": 7, "steps": 6, "window": 3}]
    (tmp_path / "settings.yaml").write_text(yaml.safe_dump({"algorithm": "descent", "stages": stages}))
    assert register(files, tmp_path / "out", "--no-affine", "--settings", tmp_path / "settings.yaml") == 0
    record = json.loads((tmp_path / "out" / "registration.json").read_text())
    assert [(stage["voxel"], stage["steps"], stage["window"]) for stage in record["parameters"]["stages"]] == [
        (7, 6, 3)
    ]
    lines = capsys.readouterr().err.splitlines()
    assert any(line.startswith("stage 1 of 1, 7 mm: 6 steps, similarity 0.") for line in lines)
    (tmp_path / "again.yaml").write_text(yaml.safe_dump(record["parameters"]))
    assert register(files, tmp_path / "same", "--no-affine", "--settings", tmp_path / "again.yaml") == 0
    assert (tmp_path / "same" / "field.nii.gz").read_bytes() == (tmp_path / "out" / "field.nii.gz").read_bytes()


@pytest.mark.parametrize(
    ("scan", "more", "words"),
    [
        ("mirrored", ["--moving-labels", "mirrored_labels"], ["moving: ", "left structures lie on the right"]),
        ("head", ["--moving-mask", "head_mask"], ["moving: brain volume", "ml is not within", "as it is"]),
    ],
)
def test_what_is_odd_is_told_and_registered(files, tmp_path, capsys, scan, more, words):
    more = [part if part.startswith("--") else files / f"{part}.nii.gz" for part in more]
    assert register(files, tmp_path / "out", *QUICK, *more, moving=scan) == 0
    warnings = [line for line in capsys.readouterr().err.splitlines() if line.startswith("Warning: ")]
    assert any(all(word in line for word in words) for line in warnings), warnings
    record = json.loads((tmp_path / "out" / "registration.json").read_text())
    assert [f"Warning: {remark}" for remark in record["remarks"]] == warnings


def test_an_inverse_that_is_none_is_told(files, tmp_path, capsys, monkeypatch):
    def folding(moving, fixed, method, **parameters):
        wave = 6 * np.sin(2 * np.pi * np.arange(fixed.shape[0]) / 16)
        return np.stack([np.broadcast_to(wave[:, None, None], fixed.shape), *np.zeros((2, *fixed.shape))]).astype("f4")

    monkeypatch.setattr(scans, "register", folding)
    assert register(files, tmp_path / "out", *QUICK, "--fixed-labels", files / "fixed_labels.nii.gz") == 0
    told = capsys.readouterr().err
    assert told.count("inverse: the field folds at") == 1 and "jumps there" in told
    record = json.loads((tmp_path / "out" / "registration.json").read_text())
    assert record["folds"] > 100


def test_on_a_terminal_there_is_a_bar_and_no_lines(files, tmp_path, capsys, monkeypatch):
    monkeypatch.setattr("sys.stderr.isatty", lambda: True, raising=False)
    (tmp_path / "settings.yaml").write_text("stages: [{voxel: 7, steps: 3}]")
    assert register(files, tmp_path / "out", "--no-affine", "--settings", tmp_path / "settings.yaml") == 0
    assert "steps, similarity" not in capsys.readouterr().err


def test_all_cores_are_used_unless_the_method_has_one_thread(files, tmp_path, monkeypatch):
    from dmir import job

    asked = []
    monkeypatch.setattr(job, "limit_threads", asked.append)
    monkeypatch.setattr(register_command, "run", lambda options, threads: asked.append(("run", threads)))
    monkeypatch.setattr("os.sched_getaffinity", lambda _: set(range(6)))
    for more in ([], ["--method", "syn"], ["--method", "syn", "--threads", "4"]):
        assert register(files, tmp_path / "out", *more) == 0
    assert asked == [6, ("run", 6), 6, 1, ("run", 1), 4, ("run", 4)]


# ---------------------------------------------------------------- a brain that is cut off


def test_a_cut_is_found_at_its_face_and_nowhere_else():
    image, _ = brain()
    assert scans.find_cuts(image > 0) == []
    cut = image > 0
    cut[:, :, 30:] = False
    assert [(found.side, found.plane) for found in scans.find_cuts(cut)] == [("top", 29)]
    assert [(found.side, found.plane) for found in scans.find_cuts(cut[12:])] == [("left", 0), ("top", 29)]


def test_what_a_scan_saw_ends_at_the_cut_and_goes_on_elsewhere():
    grid = Grid((20, 20, 30), affine_of((20, 20, 30), 2.0))
    scan = Grid((10, 10, 10), affine_of((10, 10, 10), 2.0))
    seen = scans.seen_on(grid, scan, [scans.Cut(2, True, 7)], np.eye(4))
    last = 10 + 7  # the grid begins 10 voxels below the scan
    assert seen[:, :, : last + 1].all() and not seen[:, :, last + 1 :].any()
    assert scans.seen_on(grid, scan, [], np.eye(4)) is None


def test_what_one_scan_never_saw_does_not_pull(files, tmp_path, capsys, monkeypatch):
    """The fixed brain's top is not in the moving scan: without the knowledge it would be filled from below."""
    image, labels = brain((0, 0, 0), wave=4.0)
    image[:, :, 28:] = 0
    write_volume(tmp_path / "clipped.nii.gz", Volume(image, affine_of()))
    write_volume(tmp_path / "labels.nii.gz", Volume(labels, affine_of()))
    (tmp_path / "settings.yaml").write_text("stages: [{voxel: 7, steps: 20}, {voxel: 3.5, steps: 20}]")
    more = ["--no-affine", "--settings", tmp_path / "settings.yaml", "--moving-labels", tmp_path / "labels.nii.gz"]
    fixed, fixed_labels = (read_image(files / "fixed.nii.gz").data, read_labels(files / "fixed_labels.nii.gz").data)
    pulled, overlap = {}, {}
    for name in ("known", "unknown"):
        if name == "unknown":
            monkeypatch.setattr(scans, "find_cuts", lambda brain: [])
        assert register(files, tmp_path / name, *more, moving=tmp_path / "clipped") == 0
        displacement, _ = load_field(tmp_path / name / "field.nii.gz")
        beyond = (fixed > 0) & (np.arange(SHAPE[2]) >= 31)
        pulled[name] = float(np.abs(displacement[2][beyond]).mean())
        warped = read_labels(tmp_path / name / "warped_labels.nii.gz").data
        overlap[name] = min(dice(warped[:, :, :25], fixed_labels[:, :, :25], [2, 41]).values())
    assert (
        "moving: the brain is cut off at its top; what was not scanned there does not pull" in capsys.readouterr().err
    )
    assert pulled["known"] < 0.1 < 0.5 < pulled["unknown"]
    assert overlap["known"] > 0.96 and overlap["known"] > overlap["unknown"] - 0.005
