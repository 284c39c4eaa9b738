"""From a scan's own space to the cohort's grid."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import torch
from scipy import ndimage
from scipy.spatial.transform import Rotation

from dmir.cohorts.simulated import SimulatedScan, simulate_scan, template
from dmir.errors import InputError
from dmir.fields import jacobian_determinant, to_voxels, warp, warp_labels
from dmir.preprocess import (
    Preprocessed,
    assess,
    brain_mask,
    correct_bias,
    estimate_affine,
    match_histogram,
    normalise,
    preprocess_atlas,
    preprocess_scan,
    read_affine,
    read_preprocessed,
    resample,
    truth_on_grid,
    write_affine,
)
from dmir.structures import load_label_map, load_structures, remap_labels
from dmir.volumes import Grid, Volume, read_image, read_labels, reorient, same_grid

DATA = Path(__file__).parents[2] / "shared" / "data"
IDS = load_structures("oasis28").ids


def to_oasis28(labels: Volume) -> Volume:
    return Volume(remap_labels(labels.data, load_label_map("aparc+aseg_to_oasis28")), labels.affine)


def mean_dice(a: np.ndarray, b: np.ndarray, ids: list[int] = IDS) -> float:
    return float(np.mean([2 * ((a == i) & (b == i)).sum() / ((a == i).sum() + (b == i).sum()) for i in ids]))


def pose(angles: tuple[float, float, float], shift: tuple[float, float, float], scale: float = 1.0) -> np.ndarray:
    matrix = np.eye(4)
    matrix[:3, :3] = Rotation.from_euler("xyz", angles, degrees=True).as_matrix() * scale
    matrix[:3, 3] = shift
    return matrix


def phantom(shape: tuple[int, int, int] = (40, 44, 36), seed: int = 0) -> tuple[Volume, Volume, Volume]:
    """Return an ellipsoid with structure: image, labels 1 and 2, mask; 2 mm, axes RAS."""
    generator = np.random.default_rng(seed)
    axes = [np.linspace(-1.25, 1.25, n) for n in shape]
    radius = np.sqrt(sum(a**2 for a in np.meshgrid(*axes, indexing="ij")))
    mask = radius < 1
    texture = ndimage.gaussian_filter(generator.standard_normal(shape), 2)
    labels = np.where(mask, 1 + (texture > 0), 0).astype(np.int32)
    image = np.where(mask, 100.0 * labels + 400 * texture, 0).astype(np.float32)
    image[mask] = np.maximum(image[mask], 1)
    affine = np.diag([2.0, 2.0, 2.0, 1.0])
    affine[:3, 3] = (-30, 12, 5)
    return Volume(image, affine), Volume(labels, affine), Volume(mask, affine)


@pytest.fixture(scope="module")
def atlas() -> Preprocessed:
    image, labels, mask = template()
    return preprocess_atlas(image, to_oasis28(labels), mask, bias_correction=False)


@pytest.fixture(scope="module")
def scan() -> SimulatedScan:
    return simulate_scan(23)


@pytest.fixture(scope="module")
def preprocessed(scan: SimulatedScan, atlas: Preprocessed) -> Preprocessed:
    return preprocess_scan(scan.image, to_oasis28(scan.labels), scan.mask, atlas)


# ---------------------------------------------------------------- resampling


def test_resampling_onto_its_own_grid_changes_nothing() -> None:
    image, labels, _ = phantom()
    np.testing.assert_allclose(resample(image, image.grid).data, image.data, rtol=1e-5)
    for interpolation in ("nearest", "generic_label"):
        np.testing.assert_array_equal(resample(labels, image.grid, interpolation=interpolation).data, labels.data)


def test_resampling_reads_a_linear_image_exactly_anywhere() -> None:
    """The image is a linear function of its world; the transform says which world point each voxel shows."""
    gradient, offset = np.array([2.0, -1.0, 0.5]), 300.0
    source = np.array([[0, -1.5, 0, 40], [1.2, 0, 0, -30], [0, 0, 1.7, 10], [0, 0, 0, 1.0]])
    voxels = np.stack(np.meshgrid(*(np.arange(n) for n in (50, 60, 55)), indexing="ij"), axis=-1)
    image = Volume(((voxels @ source[:3, :3].T + source[:3, 3]) @ gradient + offset).astype(np.float32), source)
    middle = source @ [25, 30, 27, 1]
    grid = Grid((6, 7, 8), np.diag([1.1, 2.0, 0.9, 1.0]))
    transform = pose((5, -9, 4), (0, 0, 0), 1.1)
    transform[:3, 3] = middle[:3] - transform[:3, :3] @ (grid.affine[:3, :3] @ [3, 3, 4])
    there = np.stack(np.meshgrid(*(np.arange(n) for n in grid.shape), indexing="ij"), axis=-1)
    world = there @ (transform @ grid.affine)[:3, :3].T + (transform @ grid.affine)[:3, 3]
    np.testing.assert_allclose(resample(image, grid, transform).data, world @ gradient + offset, atol=1e-2)


def test_antialiasing_averages_instead_of_dropping_voxels() -> None:
    generator = np.random.default_rng(0)
    noise = Volume(generator.standard_normal((64, 64, 64)).astype(np.float32), np.eye(4))
    grid = Grid((30, 30, 30), np.array([[2, 0, 0, 2], [0, 2, 0, 2], [0, 0, 2, 2], [0, 0, 0, 1.0]]))
    plain = resample(noise, grid, antialias=False).data
    smooth = resample(noise, grid).data
    np.testing.assert_array_equal(plain, noise.data[2:62:2, 2:62:2, 2:62:2])
    # a Gaussian of sigma s leaves (2 sqrt(pi) s)^-3 of the variance; s = sqrt(2^2 - 1) / 2.355
    expected = (2 * np.sqrt(np.pi) * np.sqrt(3) / 2.3548) ** -3
    assert smooth.var() == pytest.approx(expected, rel=0.1)


def test_generic_label_keeps_volumes_that_nearest_loses_by_chance() -> None:
    """Of a ball, resampled to twice the voxel size, both keep the volume; only ids that were there come out."""
    axes = np.meshgrid(*(np.arange(48),) * 3, indexing="ij")
    ball = sum((a - 23.3) ** 2 for a in axes) < 18**2
    labels = Volume(np.where(ball, np.where(axes[0] > 23, 7, 4), 0).astype(np.int16), np.eye(4))
    grid = Grid((24, 24, 24), np.diag([2.0, 2.0, 2.0, 1.0]))
    for interpolation in ("nearest", "generic_label"):
        result = resample(labels, grid, interpolation=interpolation)
        assert set(np.unique(result.data)) == {0, 4, 7}
        for label in (4, 7):
            assert 8 * (result.data == label).sum() == pytest.approx((labels.data == label).sum(), rel=0.06)


def test_a_scan_is_interpolated_once() -> None:
    """Half a voxel away, one linear interpolation spreads a point over 2x2x2 voxels; a second would spread it wider."""
    image, labels, mask = phantom()
    flat = np.where(mask.data, 10.0, 0).astype(np.float32)
    flat[20, 22, 18] = 1010
    reference = preprocess_atlas(image, labels, mask, shape=(40, 44, 40), bias_correction=False, lower=0, upper=100)
    shifted = image.affine.copy()
    shifted[:3, 3] += 1  # half a voxel
    result = preprocess_scan(
        Volume(flat, shifted),
        None,
        Volume(mask.data, shifted),
        reference,
        affine=False,
        bias_correction=False,
        lower=0,
        upper=100,
    )
    values = result.image.data[result.image.data > 0.01]
    # the interior is 10, the point adds an eighth of 1000 to each of its eight neighbours; the edge stays below 10
    assert len(values[values > 0.5]) == 8
    np.testing.assert_allclose(values[values > 0.5], 1.0, atol=1e-3)


def test_an_atlas_of_the_grids_own_spacing_is_copied() -> None:
    image, labels, mask = phantom()
    result = preprocess_atlas(image, labels, mask, shape=(44, 48, 40), bias_correction=False, lower=0, upper=100)
    inside = result.image.data[result.mask.data]
    expected = image.data[mask.data]
    scaled = (expected - expected.min()) / (expected.max() - expected.min())
    np.testing.assert_allclose(inside, np.maximum(scaled, 1e-3), atol=1e-5)
    np.testing.assert_array_equal(result.labels.data[result.mask.data], labels.data[mask.data])
    np.testing.assert_array_equal(result.affine, np.eye(4))


# ---------------------------------------------------------------- grey values


def test_normalise_maps_the_percentiles_and_shows_the_mask() -> None:
    generator = np.random.default_rng(0)
    data = generator.normal(500, 100, (20, 20, 20))
    mask = generator.random(data.shape) < 0.5
    result = normalise(data, mask, lower=10, upper=90)
    assert result.dtype == np.float32
    np.testing.assert_array_equal(result > 0, mask)
    assert result.max() == 1
    low, high = np.percentile(data[mask], [10, 90])
    middle = mask & (data > low + 1) & (data < high - 1)
    np.testing.assert_allclose(result[middle], (data[middle] - low) / (high - low), atol=1e-5)
    np.testing.assert_array_equal(result, normalise(3 * data + 70, mask, lower=10, upper=90))


def test_histogram_match_gives_the_references_quantiles() -> None:
    generator = np.random.default_rng(1)
    data, reference = generator.random((16, 16, 16)) ** 3, generator.random((20, 20, 20)) * 0.5 + 0.3
    mask, reference_mask = data > 0.01, reference > 0.35
    matched = match_histogram(data, mask, reference, reference_mask)
    assert (matched[~mask] == 0).all()
    quantiles = np.linspace(5, 95, 7)
    np.testing.assert_allclose(
        np.percentile(matched[mask], quantiles), np.percentile(reference[reference_mask], quantiles), atol=0.01
    )
    order = np.argsort(data[mask])
    assert (np.diff(matched[mask][order]) >= -1e-6).all()


def test_bias_correction_removes_a_known_field_and_keeps_the_mean() -> None:
    image, labels, mask = phantom((64, 64, 60))
    tissue = np.where(mask.data, 100.0 + 60 * labels.data, 0) + np.random.default_rng(0).normal(0, 3, mask.shape)
    x, y, z = np.meshgrid(*(np.linspace(-1, 1, n) for n in mask.shape), indexing="ij")
    log_field = 0.3 * x - 0.25 * y * z + 0.2 * y**2
    inside = mask.data
    corrupted = Volume((np.maximum(tissue, 1) * np.exp(log_field)).astype(np.float32), image.affine)
    corrected = correct_bias(corrupted, mask, shrink=2)
    left = np.log(corrected.data[inside] / tissue[inside])
    assert left.std() < 0.25 * log_field[inside].std()
    assert corrected.data[inside].mean() == pytest.approx(corrupted.data[inside].mean(), rel=1e-4)
    assert same_grid(corrected, corrupted)
    np.testing.assert_array_equal(corrected.data, correct_bias(corrupted, mask, shrink=2).data)


# ---------------------------------------------------------------- the affine


@pytest.fixture(scope="module")
def moved() -> tuple[Volume, Volume, np.ndarray]:
    """Return the template as another scanner might see it, its mask, and the matrix from template to scanner world."""
    image, _, mask = template()
    truth = pose((7, -6, 8), (11, -25, 260), 1.05) @ np.diag([0.97, 1.04, 1.0, 1.0])
    centre = truth @ image.affine @ [*(np.array(image.shape) / 2), 1]
    shape, spacing = (112, 136, 124), np.array([-1.6, 1.5, 1.6])  # axes L, A, S
    affine = np.diag([*spacing, 1.0])
    affine[:3, 3] = centre[:3] - spacing * (np.array(shape) - 1) / 2
    grid = Grid(shape, affine)
    grey = resample(image, grid, np.linalg.inv(truth))
    seen = resample(Volume(mask.data.astype(np.float32), mask.affine), grid, np.linalg.inv(truth)).data > 0.5
    return grey, Volume(seen, affine), truth


def corner_error(found: np.ndarray, truth: np.ndarray) -> float:
    """Return the largest distance in mm between two maps over the corners of the template's brain."""
    mask = template()[2]
    voxels = np.argwhere(mask.data)
    box = np.array(np.meshgrid(*zip(voxels.min(axis=0), voxels.max(axis=0), strict=True))).reshape(3, -1).T
    points = np.c_[box + mask.affine[:3, 3], np.ones(len(box))].T
    return float(np.linalg.norm(((found - truth) @ points)[:3], axis=0).max())


def test_affine_recovers_a_known_matrix(atlas: Preprocessed, moved: tuple[Volume, Volume, np.ndarray]) -> None:
    grey, mask, truth = moved
    found = estimate_affine(grey, mask, atlas.image)
    assert corner_error(found, truth) < 1.0
    assert corner_error(truth, np.eye(4)) > 200  # it was not there from the start


def test_results_do_not_depend_on_the_number_of_threads(tmp_path: Path) -> None:
    """Both N4 and the affine sum over threads; each is held to one, whatever the environment says."""
    code = """
import sys
import numpy as np
from dmir.preprocess import correct_bias, estimate_affine, resample
from dmir.volumes import Volume
affine = np.diag([2.0, 2.0, 2.0, 1.0])
image, mask = np.load(sys.argv[1]), np.load(sys.argv[2])
image = correct_bias(Volume(image, affine), Volume(mask, affine), shrink=2)
moved = resample(image, image.grid, np.array([[1, .1, 0, 3], [-.1, 1, 0, 9], [0, .05, 1, 4], [0, 0, 0, 1.0]]))
print(image.data.astype("f8").sum().hex(), *estimate_affine(moved, Volume(moved.data > 0, affine), image).ravel())
"""
    image, _, mask = phantom((48, 52, 44))
    files = [str(tmp_path / "image.npy"), str(tmp_path / "mask.npy")]
    for file, volume in zip(files, (image, mask), strict=True):
        np.save(file, volume.data)
    outputs = []
    for threads, first in (("1", ""), ("2", ""), ("2", "import ants")):
        environment = {**os.environ, "ITK_GLOBAL_DEFAULT_NUMBER_OF_THREADS": threads}
        command = [sys.executable, "-c", first + code, *files]
        outputs.append(subprocess.run(command, env=environment, capture_output=True, text=True, check=True).stdout)
    assert len(outputs[0].split()) == 17
    assert outputs[0] == outputs[1] == outputs[2]


def test_affine_file_is_read_by_itk_and_by_ants(tmp_path: Path, moved: tuple[Volume, Volume, np.ndarray]) -> None:
    import ants
    import SimpleITK as sitk

    grey, _, truth = moved
    path = tmp_path / "affine.mat"
    write_affine(path, truth)
    np.testing.assert_allclose(read_affine(path), truth, atol=1e-12)
    point = np.array([12.0, -30.0, 7.0])
    lps = np.array([-1, -1, 1])
    expected = (truth[:3, :3] @ point + truth[:3, 3]) * lps
    np.testing.assert_allclose(sitk.ReadTransform(str(path)).TransformPoint((point * lps).tolist()), expected)

    grid = Grid((40, 46, 42), np.array([[4, 0, 0, -78], [0, 4, 0, -112], [0, 0, 4, -74], [0, 0, 0, 1.0]]))

    def image_of(data: np.ndarray, affine: np.ndarray):
        spacing = np.sqrt((affine[:3, :3] ** 2).sum(axis=0))
        direction = np.diag(lps) @ affine[:3, :3] / spacing
        return ants.from_numpy(
            data, origin=(affine[:3, 3] * lps).tolist(), spacing=spacing.tolist(), direction=direction
        )

    fixed = image_of(np.zeros(grid.shape, dtype=np.float32), grid.affine)
    theirs = ants.apply_transforms(fixed, image_of(grey.data, grey.affine), [str(path)], interpolator="linear").numpy()
    ours = resample(grey, grid, truth, antialias=False).data
    assert theirs.max() > 1000
    inner = (slice(3, -3),) * 3  # the two treat the image's very edge differently
    assert np.abs(ours - theirs)[inner].max() < 1e-3 * theirs.max()


def test_affine_files_with_a_centre_are_understood(tmp_path: Path) -> None:
    import SimpleITK as sitk

    transform = sitk.AffineTransform(3)
    transform.SetMatrix([1.1, 0.1, 0, -0.2, 0.9, 0.05, 0, 0.1, 1.0])
    transform.SetTranslation((3, -4, 5))
    transform.SetCenter((20, 30, -40))
    path = tmp_path / "centred.mat"
    sitk.WriteTransform(transform, str(path))
    point = np.array([7.0, 8.0, 9.0])
    lps = np.array([-1, -1, 1])
    matrix = read_affine(path)
    np.testing.assert_allclose(
        (matrix[:3, :3] @ (point * lps) + matrix[:3, 3]) * lps, transform.TransformPoint(point.tolist())
    )


@pytest.mark.parametrize(
    ("content", "found"), [(None, "no such file"), (b"no matrix", "cannot be read"), ("other", "entries")]
)
def test_files_that_are_no_affine(tmp_path: Path, content: bytes | str | None, found: str) -> None:
    from scipy.io import savemat

    path = tmp_path / "affine.mat"
    if isinstance(content, bytes):
        path.write_bytes(content)
    elif content:
        savemat(path, {content: np.eye(3)}, format="4")
    with pytest.raises(InputError, match=found):
        read_affine(path)


# ---------------------------------------------------------------- the whole way


def test_orientation_of_the_file_changes_nothing(atlas: Preprocessed, moved: tuple[Volume, Volume, np.ndarray]) -> None:
    grey, mask, _ = moved
    results = [
        preprocess_scan(reorient(grey, axes), None, reorient(mask, axes), atlas, bias_shrink=6)
        for axes in (grey.orientation, "PSR")
    ]
    np.testing.assert_array_equal(results[0].affine, results[1].affine)  # nor does running it again
    np.testing.assert_allclose(results[0].image.data, results[1].image.data, atol=1e-6)
    assert results[0].labels is None


def test_affine_aligns_a_simulated_scan(scan: SimulatedScan, atlas: Preprocessed, preprocessed: Preprocessed) -> None:
    before = resample(to_oasis28(scan.labels), atlas.image.grid, interpolation="nearest").data
    dice = mean_dice(preprocessed.labels.data, atlas.labels.data)
    assert dice > mean_dice(before, atlas.labels.data) + 0.15
    assert 0.5 < dice < 0.75  # there is something left to register
    assert preprocessed.quality["flags"] == []
    assert preprocessed.quality["mask_overlap"] > 0.92
    np.testing.assert_array_equal(preprocessed.image.data > 0, preprocessed.mask.data)
    assert preprocessed.labels.data.dtype == np.int32
    assert same_grid(preprocessed.labels, atlas.image)


def test_true_field_carries_the_scan_onto_the_atlas(
    scan: SimulatedScan, atlas: Preprocessed, preprocessed: Preprocessed
) -> None:
    grid = atlas.image.grid
    truth = torch.from_numpy(truth_on_grid(scan.truth, scan.truth_affine, preprocessed.affine, grid))[None]
    labels = torch.from_numpy(preprocessed.labels.data.astype(np.int32))[None, None]
    image = torch.from_numpy(preprocessed.image.data)[None, None]
    inside = atlas.mask.data

    def dice(field: torch.Tensor) -> float:
        return mean_dice(warp_labels(labels, field, "linear")[0, 0].numpy(), atlas.labels.data)

    def correlation(field: torch.Tensor) -> float:
        return float(np.corrcoef(warp(image, field)[0, 0].numpy()[inside], atlas.image.data[inside])[0, 1])

    assert dice(truth) > 0.87  # the rest is lost by resampling thin structures to 2 mm
    assert correlation(truth) > 0.94
    assert correlation(0 * truth) < 0.85
    for wrong in (-truth, 0 * truth, truth.flip(1)):
        assert dice(wrong) < dice(truth) - 0.15
    assert jacobian_determinant(truth)[0].numpy()[inside[1:-1, 1:-1, 1:-1]].min() > 0.05
    length = 2 * truth[0].norm(dim=0).numpy()[inside]
    assert 2 < length.mean() < 6  # mm; the pose is not in it


def test_native_labels_at_the_true_places_are_the_atlas(
    scan: SimulatedScan, atlas: Preprocessed, preprocessed: Preprocessed
) -> None:
    """B (x + u(x)) is the scanner's point, so that one nearest-neighbour look-up must give the atlas's label."""
    grid = atlas.image.grid
    field = truth_on_grid(scan.truth, scan.truth_affine, preprocessed.affine, grid)
    voxels = np.stack(np.meshgrid(*(np.arange(n) for n in grid.shape), indexing="ij")) + field
    to_scan = np.linalg.inv(scan.labels.affine) @ preprocessed.affine @ grid.affine
    place = np.einsum("ij,jdhw->idhw", to_scan[:3, :3], voxels) + to_scan[:3, 3].reshape(3, 1, 1, 1)
    found = ndimage.map_coordinates(to_oasis28(scan.labels).data, place, order=0)
    assert mean_dice(found, atlas.labels.data) > 0.93


def test_truth_of_a_pose_that_the_affine_found_is_zero_even_beyond_its_grid() -> None:
    matrix = pose((4, 3, -6), (9, -8, 7), 1.03)
    affine = np.diag([3.0, 3.0, 3.0, 1.0])
    affine[:3, 3] = (-24, -27, -30)
    points = np.stack(
        np.meshgrid(*(3.0 * np.arange(n) - o for n, o in zip((17, 18, 19), (24, 27, 30), strict=True)), indexing="ij")
    )
    there = np.einsum("ij,jdhw->idhw", matrix[:3, :3], points) + matrix[:3, 3].reshape(3, 1, 1, 1)
    displacement = to_voxels(there - points, affine)
    grid = Grid((20, 20, 20), np.array([[-5.0, 0, 0, 47], [0, 5, 0, -48], [0, 0, 5, -50], [0, 0, 0, 1]]))  # larger
    np.testing.assert_allclose(truth_on_grid(displacement, affine, matrix, grid), 0, atol=1e-5)
    # an estimate that is 2 mm off along x leaves 2 mm, which is 0.4 voxels against the axis L
    off = matrix @ np.array([[1, 0, 0, 2.0], [0, 1, 0, 0], [0, 0, 1, 0], [0, 0, 0, 1]])
    left = truth_on_grid(displacement, affine, off, grid)
    np.testing.assert_allclose(left, np.broadcast_to(np.array([0.4, 0, 0]).reshape(3, 1, 1, 1), left.shape), atol=1e-5)


def test_written_and_read_again(tmp_path: Path, preprocessed: Preprocessed) -> None:
    preprocessed.write(tmp_path)
    assert sorted(p.name for p in tmp_path.iterdir()) == ["affine.mat", "image.nii.gz", "labels.nii.gz", "quality.json"]
    again = read_preprocessed(tmp_path)
    np.testing.assert_array_equal(again.image.data, preprocessed.image.data)
    np.testing.assert_array_equal(again.labels.data, preprocessed.labels.data)
    np.testing.assert_array_equal(again.mask.data, preprocessed.mask.data)
    np.testing.assert_allclose(again.affine, preprocessed.affine, atol=1e-12)
    assert again.quality == preprocessed.quality


def test_histogram_matched_scan_has_the_atlas_grey_values(scan: SimulatedScan, atlas: Preprocessed) -> None:
    result = preprocess_scan(
        scan.image, None, scan.mask, atlas, affine=False, bias_correction=False, histogram_match=True
    )
    quantiles = [10, 50, 90]
    np.testing.assert_allclose(
        np.percentile(result.image.data[result.mask.data], quantiles),
        np.percentile(atlas.image.data[atlas.mask.data], quantiles),
        atol=0.01,
    )
    np.testing.assert_array_equal(result.image.data > 0, result.mask.data)


# ---------------------------------------------------------------- quality


def judge(change: Callable[[np.ndarray], np.ndarray], transform: np.ndarray | None = None) -> dict:
    image, _, mask = phantom()
    found = Volume(change(mask.data), mask.affine)
    result = assess(mask, np.eye(4) if transform is None else transform, image, found, image, mask)
    assert result == json.loads(json.dumps(result))
    assert result["ok"] == (not result["flags"])
    return result


def test_quality_of_a_perfect_match() -> None:
    image, _, mask = phantom()
    quality = judge(lambda m: m)
    assert quality["mask_overlap"] == 1
    assert quality["outside_percent"] == 0
    assert quality["correlation"] == pytest.approx(1)
    assert quality["brain_volume_ml"] == pytest.approx(mask.data.sum() * 8 / 1000, abs=0.01)
    assert quality["intensity_mean"] == pytest.approx(image.data[mask.data].mean(), rel=1e-4)
    assert [flag for flag in quality["flags"] if "volume" not in flag] == []  # the phantom is a small brain


def test_quality_flags_say_why() -> None:
    shifted = judge(lambda m: np.roll(m, 8, axis=0))
    assert shifted["mask_overlap"] < 0.8
    assert any("brain masks overlap by a Dice of" in flag for flag in shifted["flags"])
    assert any("brain volume" in flag and "is not within 700" in flag for flag in shifted["flags"])
    outside = judge(lambda m: m, pose((0, 0, 0), (40, 0, 0)))
    assert outside["outside_percent"] > 20
    assert any("lies outside the grid" in flag for flag in outside["flags"])
    large = judge(lambda m: m, np.diag([1.3, 1.3, 1.3, 1]))
    assert large["affine_scale"] == pytest.approx(1.3**3, abs=1e-3)
    assert any("scales volumes by 2.20" in flag for flag in large["flags"])


# ---------------------------------------------------------------- bad input


def refused(call: Callable, *arguments, **options) -> str:
    with pytest.raises(InputError) as caught:
        call(*arguments, **options)
    return str(caught.value)


def test_labels_on_another_grid() -> None:
    image, labels, mask = phantom()
    elsewhere = labels.affine.copy()
    elsewhere[0, 3] += 3
    text = refused(preprocess_atlas, image, Volume(labels.data, elsewhere), mask, where="s1")
    assert "s1: labels: found a grid of 40x44x36" in text
    text = refused(preprocess_atlas, image, labels, Volume(mask.data[:-1], mask.affine), where="s1")
    assert "s1: mask: found a grid of 39x44x36" in text
    assert "expected the grid of s1: image: 40x44x36" in text


def test_no_mask() -> None:
    image, labels, _ = phantom()
    text = refused(preprocess_atlas, image, labels, None, where="s1")
    assert "s1: mask: found no mask" in text
    assert "skull_strip" in text


def test_empty_mask() -> None:
    image, labels, mask = phantom()
    text = refused(preprocess_atlas, image, labels, Volume(np.zeros_like(mask.data), mask.affine), where="s1")
    assert "s1: mask: found an empty mask" in text


def test_constant_brain() -> None:
    image, labels, mask = phantom()
    constant = Volume(np.where(mask.data, 5.0, image.data), image.affine)
    text = refused(preprocess_atlas, constant, labels, mask, where="s1")
    assert "s1: image: found the same value everywhere inside the brain mask" in text


def test_brain_without_contrast_between_the_percentiles() -> None:
    mask = np.ones((10, 10, 10), dtype=bool)
    data = np.full(mask.shape, 7.0)
    data[0, 0, 0] = 8
    assert "found the value 7 at both" in refused(normalise, data, mask, where="s1")


def test_unstripped_image_is_not_taken_for_a_stripped_one() -> None:
    image, _, _ = phantom()
    text = refused(brain_mask, Volume(image.data + 1, image.affine), method="none", where="s1")
    assert "s1: image: found 100 % of the voxels not zero" in text
    assert "stripped" in text


def test_stripped_image_gives_its_mask_without_holes() -> None:
    image, _, mask = phantom()
    data = image.data.copy()
    data[20:22, 22, 18] = 0
    np.testing.assert_array_equal(brain_mask(Volume(data, image.affine), method="none").data, mask.data)


def test_unknown_skull_strip() -> None:
    image, _, mask = phantom()
    assert "Did you mean 'mask'" in refused(brain_mask, image, mask, method="masc")


def test_deepbet_that_is_not_installed(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "deepbet", None)
    text = refused(brain_mask, phantom()[0], method="deepbet")
    assert "'deepbet', which is not installed" in text
    assert "pip install deepbet" in text


def test_deepbets_mask_comes_back_on_the_images_own_axes(monkeypatch: pytest.MonkeyPatch) -> None:
    """A stand-in that, as such tools do, writes its mask with canonical axes."""
    import types

    from dmir.volumes import write_volume

    image, _, mask = phantom()

    def run_bet(inputs: list[str], mask_paths: list[str], **_) -> None:
        seen = reorient(read_image(inputs[0]), "RAS")
        write_volume(mask_paths[0], Volume(seen.data > 0, seen.affine))

    monkeypatch.setitem(sys.modules, "deepbet", types.SimpleNamespace(run_bet=run_bet))
    found = brain_mask(reorient(image, "LIP"), method="deepbet")
    np.testing.assert_array_equal(found.data, reorient(mask, "LIP").data)


def test_deepbet_finds_the_brain_of_a_simulated_head(scan: SimulatedScan) -> None:
    pytest.importorskip("deepbet", reason="deepbet is not installed")
    found = brain_mask(scan.image, method="deepbet")
    assert same_grid(found, scan.image)
    both = (found.data & scan.mask.data).sum()
    assert 2 * both / (found.data.sum() + scan.mask.data.sum()) > 0.95


def test_brain_larger_than_the_grid_is_told_the_shape_that_fits() -> None:
    image, labels, mask = phantom()
    text = refused(preprocess_atlas, image, labels, mask, shape=(32, 32, 32), bias_correction=False, where="s1")
    assert "s1: shape: found (32, 32, 32) voxels" in text
    least = tuple(int(n) for n in text.split("at least (")[1].split(")")[0].split(","))
    fits = preprocess_atlas(image, labels, mask, shape=least, bias_correction=False)
    assert fits.mask.data.sum() == mask.data.sum()
    assert fits.quality["outside_percent"] == 0


# ---------------------------------------------------------------- real scans


@pytest.mark.skipif(not (DATA / "lpba40").is_dir(), reason="needs ../shared/data/lpba40")
def test_lpba40_affine_raises_the_overlap() -> None:
    def load(name: str) -> tuple[Volume, Volume]:
        folder = DATA / "lpba40" / name
        return (
            read_image(folder / f"{name}.delineation.skullstripped.nii.gz"),
            read_labels(folder / f"{name}.delineation.structure.label.nii.gz"),
        )

    ids = load_structures("lpba56").ids
    reference = preprocess_atlas(*load("S01"), None, skull_strip="none", bias_correction=False)
    before = resample(load("S06")[1], reference.image.grid, interpolation="nearest").data
    result = preprocess_scan(*load("S06"), None, reference, skull_strip="none", bias_correction=False)
    assert mean_dice(before, reference.labels.data, ids) == pytest.approx(0.476, abs=0.02)
    assert mean_dice(result.labels.data, reference.labels.data, ids) > 0.6
    assert result.quality["flags"] == []


@pytest.mark.skipif(not (DATA / "oasis_manual").is_dir(), reason="needs ../shared/data/oasis_manual")
def test_oasis_scan_of_an_old_brain_in_its_own_space() -> None:
    """Each scan has its own grid, axes L, A, S, hundreds of mm from the other's; one brain is 90 years old."""
    mapping = load_label_map("neuromorphometrics_to_oasis28")

    def load(name: str) -> tuple[Volume, Volume]:
        folder = DATA / "oasis_manual" / name
        labels = read_labels(folder / f"{name}_labels.nii.gz")
        return read_image(folder / f"{name}_T1w_brain.nii.gz"), Volume(
            remap_labels(labels.data, mapping), labels.affine
        )

    reference = preprocess_atlas(*load("1006"), None, skull_strip="none", bias_correction=False)
    result = preprocess_scan(*load("1128"), None, reference, skull_strip="none", bias_correction=False)
    assert load("1128")[0].orientation == "LAS"
    assert mean_dice(result.labels.data, reference.labels.data) > 0.55
    assert result.quality["flags"] == []
