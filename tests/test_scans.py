"""Two scans on any grids: what a network is shown, where its field ends, and the way back to a scan's own space."""

import numpy as np
import pytest
import torch
from scipy.ndimage import binary_erosion, center_of_mass

from dmir.cli import main
from dmir.fields import load_field, to_millimetres, to_voxels
from dmir.methods import register, scans
from dmir.methods.network_grid import field_on_grid, network_grid
from dmir.metrics import dice
from dmir.networks import build
from dmir.preprocess import (
    preprocess_atlas,
    preprocess_scan,
    read_affine,
    read_preprocessed,
    resample,
    to_native,
    write_affine,
)
from dmir.training.weights import save_weights
from dmir.volumes import Grid, Volume, read_image, read_labels, reorient, same_grid, with_orientation, write_volume

IDS = [21, 22, 23, 24]
SMALL = {"encoder": [4, 4], "decoder": [4, 4, 4], "integration_steps": 0}
SHIFT = np.array([[0.995, -0.0998, 0, 6], [0.0998, 0.995, 0, -4], [0, 0, 1.0, 5], [0, 0, 0, 1]])  # fixed to moving


def world_of(grid):
    index = np.stack(np.meshgrid(*(np.arange(n) for n in grid.shape), indexing="ij")).astype(float)
    return applied(grid.affine, index)


def applied(matrix, points):
    return np.einsum("ij,j...->i...", matrix[:3, :3], points) + matrix[:3, 3].reshape(3, 1, 1, 1)


def wave(points):
    """A smooth displacement of up to 12 mm along each axis; its gradient is below 0.45."""
    x, y, z = points
    return np.stack([12 * np.sin(y / 30), 10 * np.cos(z / 28), 12 * np.sin(x / 32 + 1)])


def anatomy(points):
    """Grey values and four structures of an ellipsoid at world points (3, ...) mm."""
    x, y, z = points
    inside = (x / 50) ** 2 + (y / 60) ** 2 + (z / 45) ** 2 < 1
    image = 100 + 40 * np.sin(x / 9 + 1) * np.cos(y / 11) + 30 * np.sin(z / 8 + y / 30)
    labels = 21 + (x > 5).astype(int) + 2 * (y > -8)
    return np.where(inside, image, 0).astype(np.float32), np.where(inside, labels, 0).astype(np.int32)


def well_inside(volume):
    """Voxels away from the border of the brain, where half a voxel of blur is all or nothing."""
    return binary_erosion(volume.data > 0, iterations=3)


def scan(shape, affine, to_anatomy=lambda points: points):
    image, labels = anatomy(to_anatomy(world_of(Grid(shape, affine))))
    return Volume(image, affine), Volume(labels, affine)


def centred(shape, steps):
    affine = np.diag([*steps, 1.0])
    affine[:3, 3] = -np.array(steps) * (np.array(shape) - 1) / 2
    return affine


def to_fixed(points):
    """The inverse of x -> SHIFT (x + wave(x)), by iteration."""
    there = applied(np.linalg.inv(SHIFT), points)
    found = there
    for _ in range(60):
        found = there - wave(found)
    return found


@pytest.fixture(scope="module")
def fixed():
    return scan((56, 66, 52), centred((56, 66, 52), (2.2, 2.2, 2.2)))


@pytest.fixture(scope="module")
def moving():
    """The fixed anatomy where ``SHIFT (x + wave(x))`` puts it, on an anisotropic grid with axes S, R, A."""
    affine = np.array([[0, 2.0, 0, -70], [0, 0, 2.2, -85], [2.5, 0, 0, -62], [0, 0, 0, 1.0]])
    return scan((52, 74, 78), affine, to_fixed)


@pytest.fixture(scope="module")
def model(tmp_path_factory):
    """A small network that answers with displacements of some voxels; its grid is too short along the second axis."""
    torch.manual_seed(3)
    network = build("voxelmorph", (28, 24, 26), **SMALL)
    with torch.no_grad():
        for parameter in network.head.parameters():
            parameter.normal_(0, 1)
    path = tmp_path_factory.mktemp("model") / "model.safetensors"
    grid = Grid((28, 24, 26), centred((28, 24, 26), (4.0, 4.0, 4.0)))
    save_weights(path, network, name="voxelmorph", hyperparameters=SMALL, grid=grid)
    return path


@pytest.fixture
def known(monkeypatch):
    """Stand in for affine and method: they find the truth. What the method was shown is kept."""
    shown = []

    def truth(moving, fixed, method, **parameters):
        shown.extend([moving, fixed])
        return to_voxels(wave(world_of(fixed.grid)), fixed.affine).astype(np.float32)

    monkeypatch.setattr(scans, "register", truth)
    monkeypatch.setattr(scans, "estimate_affine", lambda *a, **k: SHIFT)
    return shown


# ---------------------------------------------------------------- the network's grid


def test_a_network_is_shown_its_own_voxels_round_the_fixed_brain(fixed, moving, model, known):
    scans.register_scans(moving[0], reorient(fixed[0], "LIA"), method=str(model))
    there, here = known
    assert same_grid(there, here)
    np.testing.assert_allclose(here.affine[:3, :3], np.diag([4.0, 4.0, 4.0]))
    assert (here.shape[0], here.shape[2]) == (28, 26)  # the training's
    assert 31 <= here.shape[1] <= 33  # the brain is 120 mm long: 30 voxels
    for volume in known:
        assert 0 < volume.data[volume.data > 0].min() < 0.01
        assert volume.data.max() == 1
    assert not any(here.data.take((0, -1), axis).any() for axis in range(3))
    middle = world_of(here.grid)[:, here.data > 0]
    np.testing.assert_allclose((middle.min(axis=1) + middle.max(axis=1)) / 2, 0, atol=2.1)
    expected = anatomy(world_of(here.grid))[0]
    within = well_inside(here)
    assert np.corrcoef(expected[within], here.data[within])[0, 1] > 0.97


@pytest.mark.parametrize("spacing", [2.2, 2.0])
def test_the_grid_holds_the_brain_and_copies_voxels_of_its_own_size(spacing, fixed):
    brain = Volume(fixed[0].data > 0, fixed[0].affine)
    trained = {"shape": [30, 70, 46], "affine": np.diag([spacing, spacing, spacing, 1.0]).tolist()}
    grid = network_grid(trained, brain)
    place = applied(np.linalg.inv(grid.affine) @ brain.affine, np.argwhere(brain.data).T[..., None, None])
    assert place.min() > -0.5
    assert (place.max(axis=(1, 2, 3)) < np.array(grid.shape) - 0.5).all()
    offset = np.linalg.inv(brain.affine) @ grid.affine[:, 3]
    assert np.allclose(offset, np.round(offset), atol=1e-6) == (spacing == 2.2)


def test_a_scan_on_the_grid_of_the_training_stays_there(fixed, model, tmp_path):
    image = fixed[0]
    torch.manual_seed(3)
    network = build("voxelmorph", image.shape, **SMALL)
    with torch.no_grad():
        for parameter in network.head.parameters():
            parameter.normal_(0, 1)
    path = tmp_path / "model.safetensors"
    save_weights(path, network, name="voxelmorph", hyperparameters=SMALL, grid=image.grid)
    scaled = Volume(scans.normalise(image.data, image.data > 0), image.affine)
    other = Volume(scaled.data[::-1].copy(), image.affine)
    result = scans.register_scans(other, scaled, method=str(path), align=False)
    rescaled = [Volume(scans.normalise(v.data, v.data > 0), v.affine) for v in (other, scaled)]
    expected = register(*rescaled, method=str(path))
    assert np.abs(expected).max() > 0.1
    np.testing.assert_allclose(result.displacement, expected, atol=1e-4)


@pytest.mark.parametrize("kind", ["affine", "descent", "network"])
def test_the_order_of_the_axes_in_the_files_changes_nothing(kind, fixed, moving, model):
    method = str(model) if kind == "network" else kind
    (image, _), (other, _) = fixed, moving
    result = scans.register_scans(other, image, method=method)
    turned = scans.register_scans(reorient(other, "PIL"), reorient(image, "LIA"), method=method)
    assert turned.displacement.shape == (3, 56, 52, 66)
    np.testing.assert_allclose(turned.affine, result.affine, atol=1e-6)
    of_turned = to_millimetres(turned.displacement, turned.warped.affine)
    back = np.stack([reorient(Volume(component, turned.warped.affine)).data for component in of_turned])
    found = to_millimetres(result.displacement, image.affine)
    beyond_affine = found - (applied(result.affine, world_of(image.grid)) - world_of(image.grid))
    assert (np.abs(beyond_affine).max() > 1) == (kind != "affine")
    # Twice, of many runs, the last digits differed, and by what was not found; descent makes hundredths of a millimetre
    # of them at a few voxels (.07 of noise of 1e-8 in the grey values). A wrong axis is millimetres off.
    np.testing.assert_allclose(back, found, atol=0.2 if kind == "descent" else 1e-3)
    assert np.quantile(np.abs(back - found), 0.99) < 1e-3
    np.testing.assert_allclose(reorient(turned.warped).data, result.warped.data, atol=0.1)  # of about 170


def test_beyond_its_grid_a_field_goes_on_as_a_shift():
    affine = centred((12, 14, 10), (4.0, 4.0, 4.0))
    displacement = to_voxels(wave(world_of(Grid((12, 14, 10), affine))), affine).astype(np.float32)
    wide = Grid((40, 44, 36), centred((40, 44, 36), (2.0, -2.0, 2.0)))
    found = to_millimetres(field_on_grid(displacement, affine, wide), wide.affine)
    points = world_of(wide)
    limit = np.array([22.0, 26.0, 18.0]).reshape(3, 1, 1, 1)
    np.testing.assert_allclose(found, wave(np.clip(points, -limit, limit)), atol=0.06)


# ---------------------------------------------------------------- there and back


@pytest.mark.parametrize("kind", ["syn", "network"])
def test_a_known_field_takes_images_and_labels_there_and_back(kind, fixed, moving, model, known):
    method = str(model) if kind == "network" else "syn"
    fixed_image, fixed_labels = (reorient(volume, "LPI") for volume in fixed)
    moving_image, moving_labels = moving
    result = scans.register_scans(
        moving_image, fixed_image, method=method, moving_labels=moving_labels, fixed_labels=fixed_labels
    )
    points = world_of(fixed_image.grid)
    found = points + to_millimetres(result.displacement, fixed_image.affine)
    inside = fixed_image.data > 0
    np.testing.assert_allclose(found[:, inside], applied(SHIFT, points + wave(points))[:, inside], atol=0.15)
    within = well_inside(fixed_image)
    assert np.corrcoef(result.warped.data[within], fixed_image.data[within])[0, 1] > 0.98

    assert same_grid(result.warped_labels, fixed_image)
    assert min(dice(result.warped_labels.data, fixed_labels.data, IDS).values()) > 0.95
    on_moving = result.fixed_labels_on_moving
    assert same_grid(on_moving, moving_image)
    assert min(dice(on_moving.data, moving_labels.data, IDS).values()) > 0.95

    again = scans.register_scans(moving_image, fixed_image, method=method, moving_labels=on_moving)
    assert min(dice(again.warped_labels.data, fixed_labels.data, IDS).values()) > 0.95


def test_the_command_brings_the_fixed_labels_to_the_moving_scan(fixed, tmp_path, capsys):
    """A moving scan that is only shifted, by whole voxels of its own grid: its labels are found to the voxel."""
    image, labels = fixed
    affine = image.affine.copy()
    affine[:3, 3] += (8.8, -6.6, 4.4)
    paths = {name: tmp_path / f"{name}.nii.gz" for name in ("fixed", "labels", "moving")}
    for name, volume in (("fixed", image), ("labels", labels), ("moving", Volume(image.data, affine))):
        write_volume(paths[name], volume)
    arguments = ["register", "--moving", str(paths["moving"]), "--fixed", str(paths["fixed"]), "--method", "affine"]
    assert main([*arguments, "--fixed-labels", str(paths["labels"]), "--out", str(tmp_path / "out")]) == 0
    written = "field.nii.gz, inverse_field.nii.gz, affine.mat, warped.nii.gz, fixed_labels_on_moving.nii.gz"
    assert f"out: {written}, registration.png, registration.json" in capsys.readouterr().out
    matrix = read_affine(tmp_path / "out" / "affine.mat")
    corners = np.array([[40.0, 0, 0], [0, -50, 0], [0, 0, 35]]).T
    moved = matrix[:3, :3] @ corners + matrix[:3, 3:]
    np.testing.assert_allclose(moved - corners, np.tile([[8.8], [-6.6], [4.4]], 3), atol=0.3)
    found = read_labels(tmp_path / "out" / "fixed_labels_on_moving.nii.gz")
    np.testing.assert_allclose(found.affine, affine, atol=1e-5)
    assert min(dice(found.data, labels.data, IDS).values()) > 0.99
    displacement, _ = load_field(tmp_path / "out" / "field.nii.gz")
    points = world_of(image.grid)
    moved = points + to_millimetres(displacement, image.affine)
    np.testing.assert_allclose(moved, applied(matrix, points), atol=1e-3)


def test_the_command_refines_a_networks_field_on_the_pair(fixed, moving, model, tmp_path):
    paths = {name: tmp_path / f"{name}.nii.gz" for name in ("fixed", "moving")}
    for name, (image, _) in (("fixed", fixed), ("moving", moving)):
        write_volume(paths[name], image)
    arguments = ["register", "--moving", str(paths["moving"]), "--fixed", str(paths["fixed"]), "--method", str(model)]
    for out, more in (("network", []), ("same", ["--refine", "0"]), ("refined", ["--refine", "8"])):
        assert main([*arguments, "--out", str(tmp_path / out), *more]) == 0
    network, same, refined = (load_field(tmp_path / k / "field.nii.gz")[0] for k in ("network", "same", "refined"))
    np.testing.assert_array_equal(same, network)
    assert np.abs(refined - network).max() > 0.1


@pytest.mark.parametrize(
    ("change", "words"),
    [
        ({"--method": "nowhere/model.safetensors"}, ["nowhere/model.safetensors", "no such file", "train the model"]),
        ({"--method": "snn"}, ["snn", "Did you mean 'syn'"]),
        ({"--refine": "5"}, ["--refine", "with --method affine", "a network's model.safetensors"]),
        ({"--fixed-labels": "other.nii.gz"}, ["fixed_labels", "other.nii.gz", "56x66x53", "56x66x52"]),
        ({"--moving-labels": "other.nii.gz"}, ["moving_labels", "other.nii.gz", "the moving image"]),
        ({"--fixed-labels": "image.nii.gz"}, ["fixed_labels", "image.nii.gz", "not whole numbers"]),
        ({"--fixed": "whole.nii.gz"}, ["fixed: image", "100 % of the voxels not zero", "stripped"]),
    ],
)
def test_a_mistake_is_named_before_anything_is_registered(change, words, fixed, tmp_path, capsys, monkeypatch):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(scans, "estimate_affine", lambda *a, **k: pytest.fail("it was registered"))
    image, labels = fixed
    write_volume("image.nii.gz", image)
    write_volume("whole.nii.gz", Volume(image.data + 1, image.affine))
    write_volume("other.nii.gz", Volume(np.pad(labels.data, [(0, 0), (0, 0), (0, 1)]), image.affine))
    options = {"--moving": "image.nii.gz", "--fixed": "image.nii.gz", "--method": "affine", "--out": "out"} | change
    assert main(["register", *(part for item in options.items() for part in item)]) == 1
    error = capsys.readouterr().err
    assert error.startswith("Error: ")
    assert all(word in error for word in words), error
    assert not (tmp_path / "out").exists()


# ---------------------------------------------------------------- from the cohort's grid to the scan


@pytest.fixture(scope="module")
def preprocessed(fixed, moving, tmp_path_factory):
    """The moving scan on the grid of an atlas, in a folder; beside it the scan as it came."""
    image, labels = fixed
    atlas = preprocess_atlas(
        image, labels, None, shape=(48, 52, 44), spacing=(3.0, 3.0, 3.0), skull_strip="none", bias_correction=False
    )
    folder = tmp_path_factory.mktemp("cohort")
    result = preprocess_scan(*moving, None, atlas, skull_strip="none", bias_correction=False)
    result.write(folder / "scan")
    for name, volume in zip(("image", "labels"), moving, strict=True):
        write_volume(folder / f"{name}.nii.gz", volume)
    return folder


def native(folder, *more, volume="scan/labels.nii.gz", like="image.nii.gz", preprocessed="scan", out="native.nii.gz"):
    paths = {"--preprocessed": preprocessed, "--volume": volume, "--like": like, "--out": out}
    return main(["native", *(part for key, name in paths.items() for part in (key, str(folder / name))), *more])


@pytest.mark.parametrize("interpolation", ["nearest", "generic_label"])
def test_labels_return_to_the_scan_that_they_came_from(interpolation, preprocessed):
    assert np.abs(read_affine(preprocessed / "scan" / "affine.mat") - np.eye(4)).max() > 2  # there is a way to go
    assert native(preprocessed, "--interpolation", interpolation) == 0
    found, original = (read_labels(preprocessed / f"{name}.nii.gz") for name in ("native", "labels"))
    assert same_grid(found, original)
    for number in IDS:
        middles = np.array([center_of_mass(volume.data == number) for volume in (found, original)])
        assert np.abs(middles[0] - middles[1]).max() < 0.5
    assert min(dice(found.data, original.data, IDS).values()) > 0.93


def test_an_image_returns_too(preprocessed):
    assert native(preprocessed, "--interpolation", "linear", volume="scan/image.nii.gz", out="grey.nii.gz") == 0
    found, original = read_image(preprocessed / "grey.nii.gz"), read_image(preprocessed / "image.nii.gz")
    within = well_inside(original)
    assert np.corrcoef(found.data[within], original.data[within])[0, 1] > 0.97


def test_a_scan_with_a_wrong_header_gets_its_labels_back_under_that_header(preprocessed):
    """The cohort restated the axes; the volume returns to the voxels that it came from."""
    image, labels = read_image(preprocessed / "image.nii.gz"), read_labels(preprocessed / "labels.nii.gz")
    wrong = centred(image.shape, (-2.5, 2.0, -2.2))
    write_volume(preprocessed / "wrong.nii.gz", Volume(image.data, wrong))
    restated = with_orientation(Volume(image.data, wrong), image.orientation)
    result = read_preprocessed(preprocessed / "scan")
    result.write(preprocessed / "restated")
    matrix = restated.affine @ np.linalg.inv(image.affine) @ result.affine
    write_affine(preprocessed / "restated" / "affine.mat", matrix)
    names = {"preprocessed": "restated", "like": "wrong.nii.gz", "out": "back.nii.gz"}
    assert native(preprocessed, "--orientation", image.orientation, **names) == 0
    found = read_labels(preprocessed / "back.nii.gz")
    np.testing.assert_allclose(found.affine, wrong, atol=1e-5)
    assert min(dice(found.data, labels.data, IDS).values()) > 0.93


def test_bringing_back_is_the_inverse_of_bringing_there(fixed):
    image, labels = fixed
    there = resample(labels, Grid((60, 66, 56), centred((60, 66, 56), (2.5, 2.5, 2.5))), SHIFT, interpolation="nearest")
    back = to_native(there, SHIFT, image.grid)
    assert min(dice(back.data, labels.data, IDS).values()) > 0.95
    assert min(dice(to_native(there, np.eye(4), image.grid).data, labels.data, IDS).values()) < 0.9


@pytest.mark.parametrize(
    ("change", "words"),
    [
        ({"volume": "labels.nii.gz"}, ["labels.nii.gz", "found a grid of 52x74x78", "48x52x44"]),
        ({"volume": "scan/image.nii.gz"}, ["volume", "not whole numbers"]),
        ({"preprocessed": "elsewhere"}, ["elsewhere/affine.mat", "no such file"]),
        ({"like": "nothing.nii.gz"}, ["like", "nothing.nii.gz", "no such file"]),
        ({"out": "never.png"}, ["never.png", ".nii.gz"]),
    ],
)
def test_what_cannot_be_brought_back_is_one_message(change, words, preprocessed, capsys):
    assert native(preprocessed, **({"out": "never.nii.gz"} | change)) == 1
    error = capsys.readouterr().err
    assert error.startswith("Error: ")
    assert all(word in error for word in words), error
    assert not list(preprocessed.glob("never*"))
