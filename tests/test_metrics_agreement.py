"""The scores beside independent implementations of the same definitions, on the same numbers."""

from itertools import product

import numpy as np
import pandas as pd
import pytest
import torch
import torch.nn.functional as F
from scipy import ndimage

from dmir import fields
from dmir.fields import integrate, save_field
from dmir.metrics import (
    dice,
    hd95,
    measure_folding,
    nondiffeomorphic_volume,
    nonpositive_jacobian,
    score_pair,
    sdlogj,
    volume_ratio,
)
from dmir.metrics.surface import REACH
from dmir.structures import StructureSet

SHAPE = (26, 30, 28)
LABELS = range(1, 6)
SPACINGS = [(1.0, 1.0, 1.0), (1.0, 1.7, 2.5), (3.0, 0.9, 1.1)]


def blobs(seed, shape=SHAPE):
    """Label map of five smooth regions with background between them."""
    noise = np.random.default_rng(seed).standard_normal((5, *shape))
    smooth = np.stack([ndimage.gaussian_filter(x, 3) for x in noise])
    smooth /= smooth.std(axis=(1, 2, 3), keepdims=True)
    return np.where(smooth.max(axis=0) > 0.6, smooth.argmax(axis=0) + 1, 0).astype(np.uint8)


def rough_field(seed, amplitude=0.9, sigma=1.2, shape=SHAPE):
    noise = np.random.default_rng(seed).standard_normal((3, *shape))
    smooth = np.stack([ndimage.gaussian_filter(x, sigma) for x in noise])
    return (amplitude * smooth / smooth.std()).astype(np.float32)


def near_and_far(kind):
    """Two label maps whose surfaces lie close together, or far apart, or partly either."""
    a = blobs(1)
    moved = ndimage.shift(a, {"near": (1, 0, -1), "far": (0, 9, -8), "mixed": (1, 0, 0)}[kind], order=0)
    if kind == "mixed":
        moved[:4, :4, :4] = 3  # a piece of 3 far from the rest of it
        moved[moved == 5] = np.where(np.arange((moved == 5).sum()) % 2, 5, 0)
    return a, moved


# Overlap


def test_dice_of_many_labels_in_any_type_equals_a_count_of_each():
    random = np.random.default_rng(0)
    for kind, ids in ((np.uint8, range(1, 250)), (np.int16, range(1000, 1300)), (np.int64, [5, 70000, 3])):
        a, b = (random.choice([0, *ids], (20, 19, 18)).astype(kind) for _ in range(2))
        found, ratios = dice(a, b, list(ids)), volume_ratio(a, b, list(ids))
        for label in list(ids)[:: max(1, len(ids) // 20)]:
            of_a, of_b = a == label, b == label
            assert found[label] == 2 * (of_a & of_b).sum() / (of_a.sum() + of_b.sum())
            assert ratios[label] == of_a.sum() / of_b.sum()


# Distance


@pytest.mark.parametrize("spacing", SPACINGS)
@pytest.mark.parametrize("kind", ["near", "far", "mixed"])
def test_hd95_equals_monai_near_and_far(kind, spacing):
    metrics = pytest.importorskip("monai.metrics")
    a, b = near_and_far(kind)
    one_hot = [torch.from_numpy(np.stack([x == i for i in range(6)])[None].astype(np.float32)) for x in (a, b)]
    theirs = metrics.compute_hausdorff_distance(
        *one_hot, include_background=False, percentile=95, directed=False, spacing=list(spacing)
    )[0].numpy()
    ours = hd95(a, b, LABELS, spacing)
    np.testing.assert_allclose([ours[i] for i in LABELS], theirs, rtol=1e-5)
    if kind == "far":
        assert min(ours.values()) > REACH * min(spacing)  # beyond what is searched voxel by voxel


@pytest.mark.parametrize("spacing", SPACINGS)
def test_hd95_equals_simpleitks_exact_distance_maps(spacing):
    import SimpleITK as sitk

    a, b = near_and_far("mixed")
    ours = hd95(a, b, LABELS, spacing)
    for label in LABELS:
        contours = []
        for x in (a, b):
            image = sitk.GetImageFromArray(np.pad(x == label, 1).astype(np.uint8))
            image.SetSpacing(spacing[::-1])
            contours.append(sitk.BinaryContour(image, fullyConnected=False))
        directed = []
        for here, there in (contours, contours[::-1]):
            distance = sitk.SignedMaurerDistanceMap(there, squaredDistance=False, useImageSpacing=True)
            inside = sitk.GetArrayFromImage(here) > 0
            directed.append(np.percentile(np.abs(sitk.GetArrayFromImage(distance)[inside]), 95))
        assert ours[label] == pytest.approx(max(directed), rel=1e-5)


@pytest.mark.filterwarnings("ignore:Please import:DeprecationWarning")  # of a namespace of SciPy's
@pytest.mark.parametrize(("axis", "steps"), [(0, 3), (1, 2), (2, -4)])
def test_hd95_equals_deepminds_where_surfaces_are_planes(axis, steps):
    """It weighs surface elements by their area and pools nothing; of parallel planes both see the distance alone."""
    surface_distance = pytest.importorskip("surface_distance")
    spacing = (2.0, 1.0, 1.5)
    box = np.zeros((30, 30, 32), np.int32)
    box[8:16, 8:20, 8:22] = 1
    shifted = np.roll(box, steps, axis)
    distances = surface_distance.compute_surface_distances(box == 1, shifted == 1, spacing)
    theirs = surface_distance.compute_robust_hausdorff(distances, 95)
    assert hd95(box, shifted, [1], spacing)[1] == pytest.approx(theirs) == abs(steps) * spacing[axis]


@pytest.mark.filterwarnings("ignore:Please import:DeprecationWarning")
def test_hd95_and_deepminds_differ_by_less_than_a_voxel_elsewhere():
    surface_distance = pytest.importorskip("surface_distance")
    spacing = (1.0, 1.7, 2.5)
    x, y, z = np.indices((40, 36, 30))
    balls = [((x - c) / 12) ** 2 + ((y - 17) / 9) ** 2 + ((z - 15) / 7) ** 2 <= 1 for c in (17, 21)]
    distances = surface_distance.compute_surface_distances(*balls, spacing)
    theirs = surface_distance.compute_robust_hausdorff(distances, 95)
    ours = hd95(*(ball.astype(np.int32) for ball in balls), [1], spacing)[1]
    assert ours == pytest.approx(theirs, abs=np.linalg.norm(spacing))
    assert ours == pytest.approx(4.0, abs=0.5)  # the shift, which the ends of the longest axis see whole


def test_hd95_of_touching_and_of_nested_boxes_is_known():
    a, b = np.zeros((2, 40, 12, 12), np.uint8)
    a[4:14, 1:11, 1:11], b[14:24, 1:11, 1:11] = 1, 1
    # equal boxes side by side: of the 488 surface voxels of either, 100 in each end plane, 36 in each ring between; the
    # sorted distances are 1 (100 times), 2..9 (36 times each), 10 (100 times), and 95 % of them lie below the last
    assert hd95(a, b, [1], (2.0, 1.0, 1.0))[1] == pytest.approx(2.0 * 10)
    a[...], b[...] = 0, 0
    a[10:30, 1:11, 1:11], b[12:28, 1:11, 1:11] = 1, 1
    # a is two voxels longer at both ends, 1 mm each: its two end planes are more than 5 % of its surface
    assert hd95(a, b, [1])[1] == pytest.approx(2.0)


# Jacobian


def test_the_jacobian_equals_itks_on_an_oblique_left_handed_grid(tmp_path):
    """ITK reads the file and works in millimetres; its filter knows the spacing but not the directions of the axes.

    The vectors are therefore turned into the frame of the image's own axes, with the directions that ITK has read.
    """
    import SimpleITK as sitk

    angle = np.deg2rad(25)
    turn = np.array([[np.cos(angle), -np.sin(angle), 0], [np.sin(angle), np.cos(angle), 0], [0, 0, 1]])
    affine = np.eye(4)
    affine[:3, :3] = turn @ np.array([[1.5, 0, 0], [0, 0, 2.5], [0, 1.2, 0]])
    affine[:3, 3] = 7, -3, 20
    displacement = rough_field(3)
    save_field(tmp_path / "u.nii", displacement, affine)
    image = sitk.ReadImage(str(tmp_path / "u.nii"), sitk.sitkVectorFloat64)
    direction = np.array(image.GetDirection()).reshape(3, 3)
    assert np.linalg.det(direction) < 0
    turned = sitk.GetImageFromArray(sitk.GetArrayFromImage(image) @ direction, isVector=True)
    turned.SetSpacing(image.GetSpacing())
    determinant = sitk.GetArrayFromImage(sitk.DisplacementFieldJacobianDeterminant(turned, useImageSpacing=True)).T
    mask = np.zeros(SHAPE, bool)
    mask[2:-3, 4:-1, 1:-2] = True
    inside = mask[1:-1, 1:-1, 1:-1]
    expected = determinant[1:-1, 1:-1, 1:-1][inside]
    assert 0.1 < 100 * (expected <= 0).mean() < 20
    assert nonpositive_jacobian(displacement, "central", mask) == pytest.approx(100 * (expected <= 0).mean(), abs=1e-9)
    spread = np.log(np.clip(expected, 1e-9, 1e9)).std()
    assert sdlogj(displacement, mask) == pytest.approx(spread, rel=1e-3)


def test_the_jacobian_of_a_known_scaling_is_its_product():
    axes = np.meshgrid(*(np.arange(n, dtype=np.float32) for n in SHAPE), indexing="ij")
    stretched = np.stack([0.3 * axes[0], -0.25 * axes[1], np.where(axes[2] < 14, 0, 1.0) * (axes[2] - 14)])
    found = measure_folding(stretched.astype(np.float32))
    # determinant 1.3 * 0.75 before the middle and twice as much behind it, with sqrt(1.5 * ...) of central differences
    planes = np.r_[np.full(13, 1.0), 1.5, np.full(12, 2.0)]
    assert found.sdlogj == pytest.approx(np.log(planes).std(), rel=1e-5)
    assert found.nonpositive_forward == found.nonpositive_central == found.nondiffeomorphic_volume == 0


@pytest.mark.parametrize("box", [(slice(None),) * 3, (slice(0, 5), slice(20, None), slice(3, 4)), (slice(7, 9),) * 3])
def test_what_is_measured_together_equals_the_schemes_written_out(box):
    displacement = rough_field(4)
    mask = np.zeros(SHAPE, bool)
    mask[box] = np.random.default_rng(1).random(SHAPE)[box] < (0.7 if box[0].stop else 0.05)
    gradient = np.stack(np.gradient(displacement.astype(np.float64), axis=(1, 2, 3)), axis=1)
    central = np.linalg.det((gradient + np.eye(3)[:, :, None, None, None]).transpose(2, 3, 4, 0, 1))
    inner = np.zeros_like(mask)
    inner[1:-1, 1:-1, 1:-1] = mask[1:-1, 1:-1, 1:-1]
    found = measure_folding(displacement, mask)
    assert found.nonpositive_central == pytest.approx(100 * (central[inner] <= 0).mean(), nan_ok=True)
    assert found.sdlogj == pytest.approx(np.log(np.clip(central[inner], 1e-9, None)).std(), rel=1e-3, nan_ok=True)
    forward = fields.jacobian_determinant(torch.from_numpy(displacement)[None], "forward")[0].numpy()
    expected = 100 * (forward[mask[:-1, :-1, :-1]] <= 0).mean()
    assert found.nonpositive_forward == nonpositive_jacobian(displacement, "forward", mask) == pytest.approx(expected)
    volume = nondiffeomorphic_volume(displacement, mask)
    assert found.nondiffeomorphic_volume == volume == pytest.approx(ten_determinants(displacement, mask), rel=1e-4)


def ten_determinants(displacement, mask):
    """Non-diffeomorphic volume in percent as Liu et al. define it, voxel by voxel with numpy's determinant."""
    u = np.pad(displacement.astype(np.float64), [(0, 0)] + [(1, 1)] * 3, mode="edge")
    unit = np.eye(3, dtype=int)
    total = 0.0
    for voxel in np.argwhere(mask) + 1:
        place = {s: np.array(s) + u[(slice(None), *(voxel + s))] for s in product((-1, 0, 1), repeat=3)}

        def step(start, stop, place=place):
            return place[tuple(stop)] - place[tuple(start)]

        zero, one = np.zeros(3, int), np.ones(3, int)
        ends = [((zero, e), (-e, zero)) for e in unit]  # forward and backward along every axis
        triples = [*product(*ends)]
        triples.append([(e, one) for e in unit])
        triples.append([(zero, one - unit[k]) for k in (2, 0, 1)])
        for triple in triples:
            total += -0.5 * min(np.linalg.det(np.stack([step(*ends) for ends in triple], axis=1)), 0) / 6
    return 100 * total / mask.sum()


# The whole pair


def test_labels_warped_together_are_those_warped_one_by_one():
    labels = torch.from_numpy(np.random.default_rng(0).integers(0, 40, (2, 1, *SHAPE)).astype(np.uint8))
    u = 3 * torch.from_numpy(np.stack([rough_field(seed) for seed in (1, 2)]))
    u[0, :, ::2] = u[0, :, ::2].round() + 0.5  # exactly between two voxels
    u[1, 0, 3] = 1e6
    one_hot = F.one_hot(labels[:, 0].long(), 40).movedim(-1, 1).float()
    weights = fields.warp(one_hot, u).sort(dim=1, descending=True)
    decided = weights.values[:, 0] - weights.values[:, 1] > 1e-3
    for wanted in (("nearest", "linear"), ("linear", "nearest"), ("linear",), ("nearest",)):
        both = fields.warp_labels_each(labels, u, wanted)
        assert list(both) == list(wanted)
        for name, warped in both.items():
            assert torch.equal(warped, fields.warp_labels(labels, u, name))
            assert warped.dtype == labels.dtype
        if "nearest" in both:
            assert torch.equal(both["nearest"], fields.warp(labels.float(), u, mode="nearest").to(labels.dtype))
        if "linear" in both:
            # where all is outside, or the sum of what is inside is less than what is outside, the answer is 0
            inside = decided & (weights.values.sum(dim=1) > 0.999)
            assert torch.equal(both["linear"][:, 0][inside].long(), weights.indices[:, 0][inside])


def test_labels_outside_the_set_compete_though_they_are_not_scored():
    moving = np.zeros((12, 12, 12), np.int32)
    moving[4:8, 2:10, 2:10], moving[8:, 2:10, 2:10] = 1, 2000
    displacement = np.full((3, 12, 12, 12), 0.4, np.float32)
    displacement[1:] = 0
    sets = [StructureSet("test", pd.DataFrame([{"id": i, "name": f"s{i}"} for i in ids])) for ids in ([1], [1, 2000])]
    one, both = (score_pair(displacement, np.eye(4), moving, moving, chosen)[0] for chosen in sets)
    pd.testing.assert_frame_equal(one, both[both["structure"] == 1].reset_index(drop=True))


def test_the_scores_of_a_diffeomorphism_are_those_of_its_parts():
    fixed = blobs(2)
    u = integrate(torch.from_numpy(rough_field(7, amplitude=2.0, sigma=4))[None])
    moving = fields.warp_labels(torch.from_numpy(fixed)[None, None], fields.invert(u), "linear")[0, 0].numpy()
    displacement = u[0].numpy()
    spacing = (1.0, 1.5, 2.0)
    structures = StructureSet("test", pd.DataFrame([{"id": i, "name": f"s{i}"} for i in LABELS]))
    table, pair = score_pair(displacement, np.diag([*spacing, 1]), moving, fixed, structures)
    for name, rows in table.groupby("labels"):
        warped = fields.warp_labels(torch.from_numpy(moving)[None, None], u, name)[0, 0].numpy()
        np.testing.assert_array_equal(rows["dice"], [*dice(warped, fixed, LABELS).values()])
        np.testing.assert_array_equal(rows["hd95"], [*hd95(warped, fixed, LABELS, spacing).values()])
        np.testing.assert_array_equal(rows["volume_ratio"], [*volume_ratio(warped, moving, LABELS).values()])
        assert 0.7 < rows["dice"].min() < 0.99
        assert pair[f"tc_{name}"] == pytest.approx(rows["volume_ratio"].mean())
    assert pair["nondiffeomorphic_volume"] == nondiffeomorphic_volume(displacement, fixed > 0) == 0
