"""Two scans from the command line: another grid, another pose, one field that other tools read."""

import json

import numpy as np
import pytest
import torch

from dmir.cli import main
from dmir.fields import load_field, save_field
from dmir.metrics import dice
from dmir.volumes import Volume, read_image, read_labels, write_volume

FIXED_AFFINE = np.diag([3.0, 3.0, 3.0, 1.0]) + np.array(
    [[0, 0, 0, -70], [0, 0, 0, -80], [0, 0, 0, -60], [0, 0, 0, 0.0]]
)
TURN = np.array([[0.995, -0.0998, 0, 4], [0.0998, 0.995, 0, -6], [0, 0, 1.0, 5], [0, 0, 0, 1]])  # 6 degrees


def head(points):
    """A brain-like object in world coordinates (3, ...) mm: an ellipsoid with soft waves, and four structures."""
    x, y, z = points
    inside = (x / 58) ** 2 + (y / 68) ** 2 + (z / 50) ** 2 < 1
    image = 100 + 40 * np.sin(x / 9 + 1) * np.cos(y / 11) + 30 * np.sin(z / 8 + y / 30)
    labels = 21 + (x > 5).astype(int) + 2 * (y > -8)
    return np.where(inside, image, 0).astype(np.float32), np.where(inside, labels, 0).astype(np.int16)


def scan(folder, name, shape, affine, world=None):
    index = np.stack(np.meshgrid(*(np.arange(n) for n in shape), indexing="ij")).astype(float)
    points = np.einsum("ij,j...->i...", affine[:3, :3], index) + affine[:3, 3].reshape(3, 1, 1, 1)
    if world is not None:
        points = np.einsum("ij,j...->i...", world[:3, :3], points) + world[:3, 3].reshape(3, 1, 1, 1)
    image, labels = head(points)
    write_volume(folder / f"{name}.nii.gz", Volume(image, affine))
    write_volume(folder / f"{name}_labels.nii.gz", Volume(labels, affine))


@pytest.fixture(scope="module")
def scans(tmp_path_factory):
    folder = tmp_path_factory.mktemp("scans")
    scan(folder, "fixed", (48, 54, 42), FIXED_AFFINE)
    moving_affine = np.array([[0, 0, -2.5, 80], [2.5, 0, 0, -85], [0, 3.5, 0, -75], [0, 0, 0, 1.0]])
    scan(folder, "moving", (68, 43, 64), moving_affine, TURN)
    arguments = [
        *("register", "--moving", str(folder / "moving.nii.gz"), "--fixed", str(folder / "fixed.nii.gz")),
        *("--moving-labels", str(folder / "moving_labels.nii.gz"), "--method", "affine", "--out", str(folder / "out")),
    ]
    assert main(arguments) == 0
    return folder


def test_a_turned_scan_on_another_grid_comes_to_lie_on_the_fixed_one(scans):
    fixed, warped = read_image(scans / "fixed.nii.gz"), read_image(scans / "out" / "warped.nii.gz")
    assert warped.shape == fixed.shape
    inside = fixed.data > 0
    assert np.corrcoef(fixed.data[inside], warped.data[inside])[0, 1] > 0.93
    labels = read_labels(scans / "out" / "warped_labels.nii.gz").data
    overlap = dice(labels, read_labels(scans / "fixed_labels.nii.gz").data, [21, 22, 23, 24])
    assert min(overlap.values()) > 0.9


def test_ants_warps_the_users_own_scan_with_the_field(scans):
    ants = pytest.importorskip("ants")
    fixed, moving = (ants.image_read(str(scans / f"{name}.nii.gz")) for name in ("fixed", "moving"))
    theirs = ants.apply_transforms(fixed, moving, [str(scans / "out" / "field.nii.gz")], interpolator="linear").numpy()
    ours = read_image(scans / "out" / "warped.nii.gz").data
    np.testing.assert_allclose(ours[3:-3, 3:-3, 3:-3], theirs[3:-3, 3:-3, 3:-3], atol=0.05)  # of about 170


def test_a_field_is_scored_with_the_moving_labels_on_their_own_grid(scans, capsys):
    arguments = [
        *("score", "--field", str(scans / "out" / "field.nii.gz"), "--structures", "lpba56", "--json"),
        *("--moving-labels", str(scans / "moving_labels.nii.gz"), "--fixed-labels", str(scans / "fixed_labels.nii.gz")),
    ]
    capsys.readouterr()
    assert main(arguments) == 0
    content = json.loads(capsys.readouterr().out)
    rows = {(r["structure"], r["labels"]): r for r in content["structures"]}
    written = dice(
        read_labels(scans / "out/warped_labels.nii.gz").data, read_labels(scans / "fixed_labels.nii.gz").data, [21]
    )
    assert rows[21, "nearest"]["dice"] == pytest.approx(written[21], abs=2e-3)
    assert rows[21, "nearest"]["volume_ratio"] == pytest.approx(1, abs=0.03)  # in mm3: the voxels differ by a fifth
    assert rows[181, "nearest"]["dice"] is None and content["pair"]["labels_missing"] == 52
    assert content["pair"]["nonpositive_jacobian_forward"] == 0


@pytest.mark.parametrize(
    ("change", "words"),
    [
        ({"--method": "sin"}, ["sin", "Did you mean 'syn'?"]),
        ({"--moving": "nowhere.nii.gz"}, ["moving", "nowhere.nii.gz", "no such file"]),
        ({"--moving-labels": "fixed_labels.nii.gz"}, ["grid"]),
    ],
)
def test_a_mistake_is_one_message(scans, capsys, change, words):
    values = {"--moving": "moving.nii.gz", "--fixed": "fixed.nii.gz", "--moving-labels": "moving_labels.nii.gz"}
    values |= {"--method": "affine", "--out": "wrong"} | change
    paths = {k: v if k == "--method" else str(scans / v) for k, v in values.items()}
    assert main(["register", "--no-affine", *(part for item in paths.items() for part in item)]) == 1
    error = capsys.readouterr().err
    assert error.startswith("Error: ") and all(word in error for word in words) and not (scans / "wrong").exists()


def test_a_field_on_another_grid_than_the_fixed_labels_is_refused(scans, capsys):
    other = scans / "other.nii.gz"
    save_field(other, torch.zeros(3, 10, 10, 10), FIXED_AFFINE)
    arguments = [
        *("score", "--field", str(other), "--structures", "lpba56"),
        *("--moving-labels", str(scans / "moving_labels.nii.gz"), "--fixed-labels", str(scans / "fixed_labels.nii.gz")),
    ]
    assert main(arguments) == 1
    error = capsys.readouterr().err
    assert "other.nii.gz" in error and "10x10x10" in error and "48x54x42" in error


def test_the_field_holds_the_turn(scans):
    """Fixed point to moving point: the known pose, within a millimetre in the brain."""
    displacement, affine = load_field(scans / "out" / "field.nii.gz")
    expected = np.linalg.inv(TURN)
    for voxel in [(24, 27, 21), (15, 20, 15), (33, 36, 27)]:
        world = (affine @ [*voxel, 1])[:3]
        moved = (affine @ [*(np.array(voxel) + displacement[(slice(None), *voxel)]), 1])[:3]
        assert np.abs(moved - (expected @ [*world, 1])[:3]).max() < 1.5
