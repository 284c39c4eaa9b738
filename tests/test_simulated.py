"""The simulated cohort: the template fits its labels, and the truth is true."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch
from scipy import ndimage

from dmir.cohorts.acquisition import ORIENTATIONS, random_pose, random_scanner
from dmir.cohorts.anatomy import VENTRICLES, ageing_velocity, exponential, random_velocity
from dmir.cohorts.simulated import SimulatedScan, scan_seed, simulate_scan, template, write_scan
from dmir.cohorts.template import SPACING, working_grid
from dmir.errors import InputError
from dmir.fields import jacobian_determinant, load_field, save_field
from dmir.structures import load_label_map, load_structures, remap_labels
from dmir.volumes import read_image, read_labels, read_mask, reorient, same_grid, write_volume

SCAN, COHORT_SEED = "sub-001", 2
SEED = scan_seed(COHORT_SEED, SCAN)
IDS = load_structures("oasis28").ids
TO_OASIS = load_label_map("aparc+aseg_to_oasis28")


@pytest.fixture(scope="module")
def scan() -> SimulatedScan:
    return simulate_scan(SEED)


def points_of_template(step: int = 2) -> tuple[np.ndarray, np.ndarray]:
    """Return some of the template brain's voxels (n, 3) and their world points (n, 3)."""
    mask = template()[2]
    voxels = np.argwhere(mask.data)
    voxels = voxels[(voxels % step == 0).all(axis=1)]
    return voxels, voxels + mask.affine[:3, 3]


def sample_field(millimetres: np.ndarray, affine: np.ndarray, points: np.ndarray) -> np.ndarray:
    """Sample a field (3, D, H, W) at world points (n, 3)."""
    inverse = np.linalg.inv(affine)
    coordinates = (points @ inverse[:3, :3].T + inverse[:3, 3]).T
    return np.stack([ndimage.map_coordinates(c, coordinates, order=1, mode="nearest") for c in millimetres], axis=1)


def in_scanner(scan: SimulatedScan, points: np.ndarray, sign: float = 1.0) -> np.ndarray:
    """Return the scanner voxels (3, n) that the truth assigns to template points."""
    place = points + sign * sample_field(scan.truth * SPACING, scan.truth_affine, points)
    inverse = np.linalg.inv(scan.image.affine)
    return (place @ inverse[:3, :3].T + inverse[:3, 3]).T


def mean_dice(a: np.ndarray, b: np.ndarray) -> float:
    return float(np.mean([2 * ((a == i) & (b == i)).sum() / ((a == i).sum() + (b == i).sum()) for i in IDS]))


def test_template_has_every_structure_inside_its_brain() -> None:
    image, labels, mask = template()
    assert same_grid(image, labels)
    assert same_grid(image, mask)
    labelled = labels.data > 0
    assert (labelled & mask.data).sum() / labelled.sum() > 0.99
    assert set(IDS) <= set(np.unique(remap_labels(labels.data, TO_OASIS)))
    assert not mask.data[[0, -1]].any()  # the crop leaves the brain whole
    assert 1700 < mask.data.sum() / 1000 < 2000  # ml


def test_template_and_labels_fit_each_other() -> None:
    """White matter is brighter than cortex, cortex than ventricles; a shift of the labels makes it worse."""
    image, labels, _ = template()
    ids = remap_labels(labels.data, TO_OASIS)

    def spread(shift: int) -> float:
        moved = np.roll(ids, shift, axis=1)
        white, cortex, fluid = (np.isin(moved, which) for which in ([2, 41], [3, 42], [4, 43]))
        means = [image.data[tissue].mean() for tissue in (white, cortex, fluid)]
        assert means == sorted(means, reverse=True)
        return sum(image.data[tissue].std() for tissue in (white, cortex, fluid))

    assert spread(0) < min(spread(3), spread(-3))


def test_template_is_radiologically_the_right_way_round() -> None:
    _, labels, _ = template()
    x = np.argwhere(labels.data == 17)[:, 0].mean(), np.argwhere(labels.data == 53)[:, 0].mean()
    assert labels.orientation == "RAS"
    assert x[0] < x[1]  # left hippocampus, right hippocampus


def test_template_is_read_only() -> None:
    with pytest.raises(ValueError, match="read-only"):
        template()[0].data[0, 0, 0] = 1


def test_truth_carries_the_templates_labels_onto_the_scans(scan: SimulatedScan) -> None:
    voxels, points = points_of_template()
    expected = remap_labels(template()[1].data, TO_OASIS)[tuple(voxels.T)]
    labels = remap_labels(scan.labels.data, TO_OASIS)
    found = ndimage.map_coordinates(labels, in_scanner(scan, points), order=0)
    assert mean_dice(found, expected) > 0.93  # what is lost is one nearest-neighbour resampling
    wrong = ndimage.map_coordinates(labels, in_scanner(scan, points, sign=-1), order=0)
    assert mean_dice(wrong, expected) < 0.3
    inside = ndimage.map_coordinates(scan.mask.data.astype(np.uint8), in_scanner(scan, points), order=0)
    assert inside.mean() > 0.98


def test_truth_carries_the_templates_grey_values_onto_the_scans(scan: SimulatedScan) -> None:
    voxels, points = points_of_template()
    expected = template()[0].data[tuple(voxels.T)]
    tissue = expected > 3000  # fluid, where the template is 0, was given a floor
    place = in_scanner(scan, points)[:, tissue]
    found = ndimage.map_coordinates(scan.image.data.astype(np.float32), place, order=1)
    # log S = constant + gamma log T + a receive field, which is a polynomial of degree three
    unit = place / np.array(scan.image.shape)[:, None] * 2 - 1
    powers = [(i, j, k) for i in range(4) for j in range(4) for k in range(4) if i + j + k <= 3]
    field = [unit[0] ** i * unit[1] ** j * unit[2] ** k for i, j, k in powers]

    def explained(template_values: np.ndarray) -> float:
        design = np.stack([*field, np.log(template_values)], axis=1)
        residual = np.log(found) - design @ np.linalg.lstsq(design, np.log(found), rcond=None)[0]
        return 1 - residual.var() / np.log(found).var()

    assert explained(expected[tissue]) > 0.93
    assert explained(np.roll(expected[tissue], 3)) < 0.75  # a few voxels off is seen


def test_truth_inverts_the_anatomy_that_was_sampled(scan: SimulatedScan) -> None:
    """exp(v) after the pose brings p(x) back to x, within a tenth of a millimetre."""
    generator = np.random.default_rng([SEED, 1])
    ageing = float(np.clip((scan.age - 45) / 45, 0, 1.2))
    forward = exponential(0.9 * random_velocity(generator) + 5.0 * ageing * ageing_velocity())
    _, points = points_of_template(step=3)
    place = points + sample_field(scan.truth * SPACING, scan.truth_affine, points)
    posed = place @ scan.pose[:3, :3].T + scan.pose[:3, 3]
    back = posed + sample_field(forward, working_grid().affine, posed)
    error = np.linalg.norm(back - points, axis=1)
    assert error.mean() < 0.05
    assert error.max() < 0.5
    assert np.linalg.norm(posed - points, axis=1).mean() > 2  # there was something to invert


def test_truth_does_not_fold(scan: SimulatedScan) -> None:
    for scheme in ("central", "forward"):
        assert jacobian_determinant(torch.from_numpy(scan.truth)[None], scheme).min() > 0.05


def test_scan_is_as_a_scanner_gives_it(scan: SimulatedScan) -> None:
    assert scan.image.data.dtype == np.int16
    assert scan.image.data.min() >= 0
    assert scan.image.orientation in ORIENTATIONS
    assert same_grid(scan.image, scan.labels)
    assert same_grid(scan.image, scan.mask)
    assert ((scan.image.spacing >= 1.0) & (scan.image.spacing <= 1.3)).all()
    assert len(set(np.round(scan.image.spacing, 3))) > 1
    for axis in range(3):  # the brain is whole
        assert not scan.mask.data.take([0, -1], axis=axis).any()
    assert set(np.unique(scan.labels.data)) <= set(np.unique(template()[1].data))


def test_head_gives_skull_stripping_work(scan: SimulatedScan) -> None:
    millilitres = np.prod(scan.image.spacing) / 1000
    white = np.median(scan.image.data[np.isin(scan.labels.data, (2, 41))])
    outside = ~scan.mask.data
    scalp = outside & (scan.image.data > 0.7 * white)
    assert scalp.sum() * millilitres > 200
    air = scan.image.data[outside] < 0.15 * white
    assert air.mean() > 0.4
    # a band of bone keeps scalp and brain apart
    touching = ndimage.binary_dilation(scan.mask.data, iterations=2) & scalp
    assert touching.sum() < 0.02 * scalp.sum()


def test_noise_is_rician_in_air(scan: SimulatedScan) -> None:
    """In air the magnitude of complex noise is Rayleigh distributed: mean / sd = sqrt(pi / (4 - pi)) = 1.913."""
    ras = reorient(scan.image)
    corners = np.concatenate(
        [ras.data[x, y, -12:].ravel() for x in (slice(8), slice(-8, None)) for y in (slice(8), slice(-8, None))]
    )
    assert corners.mean() / corners.std() == pytest.approx(1.913, rel=0.05)


def test_ageing_enlarges_the_ventricles() -> None:
    """The inverse map exp(-v) takes the template's ventricles to the subject's: its Jacobian is their growth."""
    labels, grid = template()[1], working_grid()
    backward = torch.from_numpy(exponential(-5.0 * ageing_velocity()) / SPACING)[None]
    growth = jacobian_determinant(backward)[0].numpy()
    to_labels = np.linalg.inv(labels.affine) @ grid.affine
    inside = ndimage.affine_transform(
        np.isin(labels.data, VENTRICLES).astype(np.uint8), to_labels, output_shape=grid.shape, order=0
    )
    assert growth.min() > 0
    assert growth[inside[1:-1, 1:-1, 1:-1] > 0].mean() > 1.5
    assert abs(growth.mean() - 1) < 0.02  # and nothing far away


def test_velocity_has_the_stated_size() -> None:
    velocity = random_velocity(np.random.default_rng(0))
    expected = np.sqrt(2.5**2 + 1.35**2 + 0.6**2)
    assert velocity.std(axis=(1, 2, 3)) == pytest.approx(expected, rel=0.15)


def test_pose_turns_about_the_brain() -> None:
    """Without a shift the middle of the brain stays where it is; the determinant is the volume's change."""
    image = template()[0]
    middle = image.affine @ [*(np.array(image.shape) - 1) / 2, 1]
    pose = random_pose(np.random.default_rng(1), 8, 0, 0.05, 0.02)
    np.testing.assert_allclose(pose @ middle, middle, atol=1e-9)
    assert 0.95**3 < np.linalg.det(pose[:3, :3]) < 1.05**3
    assert np.abs(pose[:3, :3] - np.eye(3)).max() > 0.02


def test_same_seed_gives_the_same_bytes(tmp_path: Path, scan: SimulatedScan) -> None:
    write_scan(SCAN, tmp_path / "written", seed=COHORT_SEED)
    names = [f"{key}.nii.gz" for key in ("image", "labels", "mask", "truth")]
    assert sorted(path.name for path in (tmp_path / "written").iterdir()) == names
    write_volume(tmp_path / "image.nii.gz", scan.image, np.int16)
    write_volume(tmp_path / "labels.nii.gz", scan.labels, np.int16)
    write_volume(tmp_path / "mask.nii.gz", scan.mask)
    save_field(tmp_path / "truth.nii.gz", scan.truth, scan.truth_affine)
    for name in names:
        assert (tmp_path / "written" / name).read_bytes() == (tmp_path / name).read_bytes(), name
    image = read_image(tmp_path / "image.nii.gz")
    assert same_grid(image, read_labels(tmp_path / "labels.nii.gz"))
    assert same_grid(image, read_mask(tmp_path / "mask.nii.gz"))
    truth, affine = load_field(tmp_path / "truth.nii.gz")
    np.testing.assert_allclose(affine, scan.truth_affine)
    np.testing.assert_allclose(truth, scan.truth, atol=1e-5)


def test_every_seed_gives_another_subject() -> None:
    seeds = {scan_seed(cohort, f"sub-{k:03d}") for cohort in range(20) for k in range(1, 20)}
    assert len(seeds) == 20 * 19
    generators = [np.random.default_rng([seed, 1]) for seed in sorted(seeds)[:2]]
    velocities = [random_velocity(generator) for generator in generators]
    assert abs(np.corrcoef(velocities[0].ravel(), velocities[1].ravel())[0, 1]) < 0.2
    poses = [random_pose(generator, 8, 10, 0.05, 0.02) for generator in generators]
    assert np.abs(poses[0] - poses[1]).max() > 0.5
    scanners = [random_scanner(generator, pose)[0] for generator, pose in zip(generators, poses, strict=True)]
    assert scanners[0].shape != scanners[1].shape


def test_atlas_is_the_template(tmp_path: Path) -> None:
    write_scan("template", tmp_path)
    assert sorted(p.name for p in tmp_path.iterdir()) == ["image.nii.gz", "labels.nii.gz", "mask.nii.gz"]
    for written, volume in zip(
        (read_image(tmp_path / "image.nii.gz"), read_labels(tmp_path / "labels.nii.gz")), template()[:2], strict=True
    ):
        assert same_grid(written, volume)
        np.testing.assert_array_equal(written.data, volume.data)


def test_unknown_scan_is_refused(tmp_path: Path) -> None:
    with pytest.raises(InputError, match="found scan 'subject-1'"):
        write_scan("subject-1", tmp_path)
