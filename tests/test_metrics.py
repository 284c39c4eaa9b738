"""The scores: analytic cases, and agreement with independent libraries on the same numbers."""

import numpy as np
import pandas as pd
import pytest
import torch
from scipy.ndimage import gaussian_filter

from dmir.errors import InputError
from dmir.fields import integrate, invert, pair_field, save_field
from dmir.metrics import (
    dice,
    endpoint_error,
    hd95,
    inverse_consistency_error,
    nondiffeomorphic_volume,
    nonpositive_jacobian,
    score_pair,
    sdlogj,
    volume_ratio,
)
from dmir.metrics.files import score_files, score_shard
from dmir.structures import StructureSet, load_structures
from dmir.volumes import Volume, reorient, write_volume

SHAPE = (30, 26, 28)
SPACING = (1.0, 1.7, 2.5)


def blobs(seed, count=5, shape=SHAPE):
    """Label map of ``count`` smooth regions with background between them."""
    noise = np.random.default_rng(seed).standard_normal((count, *shape))
    smooth = np.stack([gaussian_filter(x, 3) for x in noise])
    smooth /= smooth.std(axis=(1, 2, 3), keepdims=True)
    return np.where(smooth.max(axis=0) > 0.6, smooth.argmax(axis=0) + 1, 0).astype(np.int32)


def rough_field(seed, amplitude=0.9, shape=SHAPE):
    """A field with a few folds, float32 (3, D, H, W)."""
    noise = np.random.default_rng(seed).standard_normal((3, *shape))
    smooth = np.stack([gaussian_filter(x, 1.2) for x in noise])
    return (amplitude * smooth / smooth.std()).astype(np.float32)


def structure_set(ids):
    rows = [{"id": i, "name": f"s{i}", "hemisphere": "both", "colour": "#808080", "source": ""} for i in ids]
    return StructureSet("test", pd.DataFrame(rows))


def linear_field(matrix, shape=SHAPE):
    """The field of x -> A x, float32 (3, D, H, W)."""
    grid = np.stack(np.meshgrid(*(np.arange(n, dtype=np.float64) for n in shape), indexing="ij"))
    return (np.einsum("ij,jdhw->idhw", np.asarray(matrix), grid) - grid).astype(np.float32)


# Overlap and volume


def test_dice_equals_simpleitk_and_monai():
    import SimpleITK as sitk
    from monai.metrics import compute_dice

    a, b = blobs(1), blobs(2)
    ours = dice(a, b, range(1, 6))
    overlap = sitk.LabelOverlapMeasuresImageFilter()
    overlap.Execute(sitk.GetImageFromArray(a), sitk.GetImageFromArray(b))
    one_hot = [torch.from_numpy(np.stack([x == i for i in range(6)])[None].astype(np.float32)) for x in (a, b)]
    monai = compute_dice(*one_hot, include_background=False)[0].numpy()
    for label in range(1, 6):
        assert ours[label] == pytest.approx(overlap.GetDiceCoefficient(label), abs=1e-12)
        assert ours[label] == pytest.approx(monai[label - 1], abs=1e-6)
    assert 0.05 < ours[1] < 0.95


def test_dice_by_hand_and_of_what_is_absent():
    a, b = np.zeros((2, 4, 4, 4), np.int32)
    a[0, 0, :3], b[0, 0, 1:] = 7, 7  # 3 voxels each, 2 shared
    a[1], b[2] = 3, 9
    values = dice(a, b, [9, 7, 3, 1000])
    assert list(values) == [9, 7, 3, 1000]
    assert values[7] == pytest.approx(2 * 2 / 6)
    assert np.isnan([values[9], values[3], values[1000]]).all()  # in one map alone, or in none: never 0 or 1
    b[0, 0] = 0
    b[3, 3, 3] = 7
    assert dice(a, b, [7])[7] == 0  # in both, and apart


def test_structures_outside_the_set_do_not_count():
    a, b = blobs(1), blobs(2)
    some = dice(a, b, [2, 4])
    others = dice(np.where(np.isin(a, [2, 4]), a, 99), np.where(np.isin(b, [2, 4]), b, 0), [2, 4])
    assert some == others


def test_volume_ratio_by_hand():
    moving, warped = np.zeros((2, 6, 6, 6), np.int32)
    moving[0], warped[:2] = 1, 1  # 36 to 72 voxels
    moving[2] = 2  # vanishes
    warped[3] = 3  # was never there
    ratios = volume_ratio(warped, moving, [1, 2, 3])
    assert ratios[1] == 2
    assert ratios[2] == 0
    assert np.isnan(ratios[3])
    assert volume_ratio(moving, moving, [1, 2]) == {1: 1, 2: 1}
    assert volume_ratio(warped, moving, [1], voxel_ratio=0.125)[1] == 0.25


# Distance


def test_hd95_equals_monai():
    from monai.metrics import compute_hausdorff_distance

    a, b = blobs(3), blobs(4)
    one_hot = [torch.from_numpy(np.stack([x == i for i in range(6)])[None].astype(np.float32)) for x in (a, b)]
    monai = compute_hausdorff_distance(
        *one_hot, include_background=False, percentile=95, directed=False, spacing=list(SPACING)
    )[0].numpy()
    ours = hd95(a, b, range(1, 6), SPACING)
    np.testing.assert_allclose([ours[i] for i in range(1, 6)], monai, rtol=1e-5)
    assert min(ours.values()) > 1


def test_hd95_equals_distance_transforms_of_the_surfaces():
    from scipy.ndimage import binary_erosion, distance_transform_edt

    a, b = blobs(5), blobs(6)
    ours = hd95(a, b, [1, 2, 3], SPACING)
    for label in (1, 2, 3):
        surfaces = [(x == label) & ~binary_erosion(x == label) for x in (a, b)]
        directed = [
            np.percentile(distance_transform_edt(~there, sampling=SPACING)[here], 95)
            for here, there in (surfaces, surfaces[::-1])
        ]
        assert ours[label] == pytest.approx(max(directed), abs=1e-9)


@pytest.mark.parametrize(("axis", "steps"), [(0, 3), (1, 2), (2, 4)])
def test_hd95_of_a_shifted_plate_is_the_shift(axis, steps):
    a, b = np.zeros((2, 16, 16, 16), np.uint8)
    for volume, start in ((a, 3), (b, 3 + steps)):
        index = [slice(2, 14)] * 3
        index[axis] = slice(start, start + 1)  # one voxel thick: every voxel is surface, and every distance the shift
        volume[tuple(index)] = 1
    assert hd95(a, b, [1], SPACING)[1] == pytest.approx(steps * SPACING[axis])


def test_hd95_is_symmetric_takes_the_worse_direction_and_forgives_five_percent():
    a, b = np.zeros((2, 30, 30, 30), np.int16)
    a[5:25, 5:25, 5:25] = 1
    b[...] = a
    b[5, 5, 5:15] = 0
    b[1, 1, 1] = 1  # one voxel far off among 2000
    values = hd95(a, b, [1]), hd95(b, a, [1])
    assert values[0] == values[1] == {1: 0.0}
    b[...] = 0
    b[5:25, 5:25, 5:15] = 1  # half of it: from b all is near, from a the far face is 10 voxels off
    assert hd95(a, b, [1])[1] > 9


def test_hd95_of_what_is_absent_or_identical():
    a, b = blobs(1), blobs(1)
    assert hd95(a, b, [1, 2]) == {1: 0.0, 2: 0.0}
    b[b == 2] = 0
    assert np.isnan(hd95(a, b, [2])[2])
    assert np.isnan(hd95(b, a, [2])[2])
    assert np.isnan(hd95(a, b, [77])[77])


# Folding


def test_central_jacobian_equals_simpleitk():
    import SimpleITK as sitk

    displacement = rough_field(1)
    # SimpleITK's images run the other way, and so do its vectors' components
    image = sitk.GetImageFromArray(np.transpose(displacement, (3, 2, 1, 0)).astype(np.float64), isVector=True)
    determinant = sitk.GetArrayFromImage(sitk.DisplacementFieldJacobianDeterminant(image)).T
    interior = determinant[1:-1, 1:-1, 1:-1]
    expected = 100 * (interior <= 0).mean()
    assert 0.1 < expected < 20
    assert nonpositive_jacobian(displacement, "central") == pytest.approx(expected, abs=1e-9)
    spread = np.log(np.clip(interior, 1e-9, 1e9)).std()
    assert sdlogj(displacement) == pytest.approx(spread, rel=1e-3)


def test_folding_counts_inside_the_mask():
    displacement = np.zeros((3, 12, 12, 12), np.float32)
    displacement[0, 6, 6, 6] = -3  # voxel 6 goes to 3: the step from 5 to 6 runs backwards
    mask = np.zeros((12, 12, 12), bool)
    mask[5, 6, 6] = True
    assert nonpositive_jacobian(displacement, "forward", mask) == 100
    assert nonpositive_jacobian(displacement, "forward") == pytest.approx(100 / 11**3)
    assert nondiffeomorphic_volume(displacement, mask) > 0
    mask[...] = False
    mask[1:3] = True
    assert nonpositive_jacobian(displacement, "forward", mask) == 0
    assert nondiffeomorphic_volume(displacement, mask) == 0
    for score in (
        nonpositive_jacobian(displacement, "central", ~(mask | ~mask)),
        sdlogj(displacement, ~(mask | ~mask)),
    ):
        assert np.isnan(score)
    assert np.isnan(nondiffeomorphic_volume(displacement, np.zeros_like(mask)))


def test_central_differences_miss_a_checkerboard_fold_and_its_volume_is_known():
    displacement = np.zeros((3, 12, 10, 10), np.float32)
    shift = 0.8
    displacement[0] = np.where(np.arange(12) % 2 == 0, shift, -shift)[:, None, None]
    # the central difference leaps over the neighbour: it sees no deformation at all
    assert nonpositive_jacobian(displacement, "central") == 0
    assert sdlogj(displacement) == pytest.approx(0, abs=1e-6)
    # steps from even to odd voxels are 1 - 2 * 0.8 = -0.6, those from odd to even 2.6
    assert nonpositive_jacobian(displacement, "forward") == pytest.approx(100 * 6 / 11)
    mask = np.zeros(displacement.shape[1:], bool)
    mask[2:10, 2:8, 2:8] = True
    # Per voxel: the four determinants of either direction are -0.6 on one side, 2.6 on the other, and the two middle
    # tetrahedra (twice a corner's) are -1.2 at even voxels alone: 0.5 * (4 * 0.6 + (2 * 1.2 or 0)) / 6, on average 0.3.
    assert nondiffeomorphic_volume(displacement, mask) == pytest.approx(100 * 0.5 * (2.4 + 1.2) / 6)


def test_one_voxel_led_astray_is_seen_by_the_ten_determinants_alone():
    displacement = np.zeros((3, 11, 11, 11), np.float32)
    displacement[:, 5, 5, 5] = (1.5, 0, 0)
    mask = np.zeros((11, 11, 11), bool)
    mask[5, 5, 5] = True
    assert nonpositive_jacobian(displacement, "central", mask) == 0
    # the four corners on the voxel's far side have 1 - 1.5 = -0.5, and so has the middle tetrahedron that touches it
    # with its edges along (1,1,0), (0,1,1), (1,0,1): det = 2 - 1.5 * (1 + 1 - 1) = 0.5, which is no fold
    assert nondiffeomorphic_volume(displacement, mask) == pytest.approx(100 * 0.5 * 4 * 0.5 / 6)


def folded_volume_of_tetrahedra(displacement):
    """Folded volume of both five-tetrahedra splits of every cube inside the grid, halved, in cubic voxels."""
    corners = {s: np.array(s) for s in np.ndindex(2, 2, 2)}
    shape = np.array(displacement.shape[1:]) - 1
    place = displacement + np.stack(np.meshgrid(*map(np.arange, displacement.shape[1:]), indexing="ij"))
    total = 0.0
    for parity in (0, 1):
        apexes = [s for s in corners if sum(s) % 2 == parity]
        middle = [s for s in corners if sum(s) % 2 != parity]
        at_corners = [[s, *(tuple(np.abs(corners[s] - np.eye(3, dtype=int)[k])) for k in range(3))] for s in apexes]
        for tetrahedron in [*at_corners, middle]:
            points = [corners[s] for s in tetrahedron]
            orientation = np.sign(np.linalg.det(np.stack([p - points[0] for p in points[1:]])))
            moved = [
                place[(slice(None), *(slice(s, s + n) for s, n in zip(p, shape, strict=True)))] for p in tetrahedron
            ]
            edges = np.stack([p - moved[0] for p in moved[1:]]).transpose(2, 3, 4, 0, 1)
            total -= np.minimum(orientation * np.linalg.det(edges) / 6, 0).sum()
    return total / 2


def test_nondiffeomorphic_volume_is_the_folded_volume_of_the_tetrahedra():
    """Where the border is at rest all folds lie inside the grid, and the sums over voxels and over cubes agree."""
    displacement = np.zeros((3, 14, 13, 12), np.float32)
    displacement[:, 2:-2, 2:-2, 2:-2] = rough_field(2, amplitude=1.2, shape=(10, 9, 8))
    expected = folded_volume_of_tetrahedra(displacement.astype(np.float64))
    assert expected > 1
    voxels = displacement[0].size
    assert nondiffeomorphic_volume(displacement) * voxels / 100 == pytest.approx(expected, rel=1e-4)


def test_a_field_without_folds_has_no_folded_volume():
    smooth = np.stack([gaussian_filter(x, 3) for x in np.random.default_rng(3).standard_normal((3, *SHAPE))])
    velocity = torch.from_numpy((smooth / smooth.std() * 1.2).astype(np.float32))[None]
    displacement = integrate(velocity)[0].numpy()
    assert np.abs(displacement).max() > 2
    assert nondiffeomorphic_volume(displacement) == 0
    assert nonpositive_jacobian(displacement, "forward") == 0
    assert nondiffeomorphic_volume(np.zeros((3, *SHAPE), np.float32)) == 0


def test_a_mirror_is_folded_everywhere():
    displacement = linear_field(np.diag([-1.0, 1.0, 1.0]))
    mask = np.zeros(SHAPE, bool)
    mask[5:-5, 5:-5, 5:-5] = True
    assert nonpositive_jacobian(displacement, "central", mask) == 100
    assert nonpositive_jacobian(displacement, "forward", mask) == 100
    assert nondiffeomorphic_volume(displacement, mask) == pytest.approx(100, rel=1e-5)


def test_sdlogj_of_uniform_stretch_is_zero_and_of_two_halves_known():
    assert sdlogj(linear_field(np.diag([1.2, 0.9, 1.1]))) == pytest.approx(0, abs=1e-5)
    shear = np.eye(3)
    shear[0, 1] = 0.7
    assert sdlogj(linear_field(shear)) == pytest.approx(0, abs=1e-5)
    displacement = np.zeros((3, 20, 8, 8), np.float32)
    displacement[0, 10:] = 0.5 * np.arange(1, 11)[:, None, None]  # determinant 1 before, 1.5 after
    mask = np.zeros((20, 8, 8), bool)
    mask[4:8], mask[13:17] = True, True
    assert sdlogj(displacement, mask) == pytest.approx(np.log(1.5) / 2, rel=1e-5)
    learn2reg = sdlogj(displacement, mask, offset=3)
    assert learn2reg == pytest.approx((np.log(4.5) - np.log(4)) / 2, rel=1e-4)


# Endpoint error and the whole pair


def test_endpoint_error_is_in_millimetres_whatever_the_axes():
    angle = np.deg2rad(25)
    turn = np.array([[np.cos(angle), -np.sin(angle), 0], [np.sin(angle), np.cos(angle), 0], [0, 0, 1]])
    affine = np.eye(4)
    affine[:3, :3] = turn @ np.array([[-2.0, 0, 0], [0, 0, 3.0], [0, -1.5, 0]])
    truth = rough_field(1)
    displacement = truth.copy()
    displacement[1] += 2  # two voxels of 1.5 mm
    displacement[2] += 1  # one of 3 mm
    np.testing.assert_allclose(endpoint_error(displacement, truth, affine), np.sqrt(3**2 + 3**2), rtol=1e-5)
    mask = np.zeros(SHAPE, bool)
    mask[3, 4, 5:9] = True
    assert endpoint_error(displacement, truth, affine, mask).shape == (4,)


TOPOLOGY_COLUMNS = ["components_change", "tunnels_change", "cavities_change"]
STRUCTURE_COLUMNS = ["structure", "name", "labels", "dice", "hd95", "volume_ratio", *TOPOLOGY_COLUMNS]
PAIR_COLUMNS = {
    "nonpositive_jacobian_forward",
    "nonpositive_jacobian_central",
    "nondiffeomorphic_volume",
    "sdlogj",
    "tc_nearest",
    "tc_deviation_nearest",
    "tc_linear",
    "tc_deviation_linear",
    "endpoint_error",
    "endpoint_error_p95",
    "inverse_consistency_error",
    "labels_missing",
    *(f"labels_vanished_{labels}" for labels in ("nearest", "linear")),
    *(
        f"topology_{name}_{labels}"
        for name in ("change", "change_structures", "floor", "floor_structures")
        for labels in ("nearest", "linear")
    ),
}


def test_the_scores_of_no_deformation():
    labels = blobs(1)
    zero = np.zeros((3, *SHAPE), np.float32)
    table, pair = score_pair(
        zero, np.diag([2.0, 2.0, 2.0, 1.0]), labels, labels, structure_set(range(1, 6)), truth=zero, backward=zero
    )
    assert list(table.columns) == STRUCTURE_COLUMNS
    assert set(pair) == PAIR_COLUMNS
    assert len(table) == 2 * 5
    assert (table["dice"] == 1).all()
    assert (table["hd95"] == 0).all()
    assert (table["volume_ratio"] == 1).all()
    assert pair["tc_nearest"] == pair["tc_linear"] == 1
    zeros = PAIR_COLUMNS - {"tc_nearest", "tc_linear"}
    assert all(pair[name] == 0 for name in zeros)


def test_the_scores_of_a_shift_are_known():
    """Labels shifted by two voxels and the field that brings them back; the brain is where the fixed labels are."""
    fixed = np.zeros((20, 20, 20), np.int32)
    fixed[6:12, 6:12, 6:12] = 1
    fixed[12:15, 6:12, 6:12] = 2
    moving = np.roll(fixed, 2, axis=0)
    moving[0, 0, 0] = 5  # a structure that the fixed scan lacks; it is not in the set's way
    displacement = np.zeros((3, 20, 20, 20), np.float32)
    displacement[0] = 2
    affine = np.diag([-1.0, 1.5, 2.0, 1.0])
    truth = displacement.copy()
    truth[2] += 1.0  # 2 mm off
    truth[2, :6] += 50.0  # outside the brain, which does not count
    structures = structure_set([1, 2, 5, 8])
    table, pair = score_pair(displacement, affine, moving, fixed, structures, truth=truth)
    for labels in ("nearest", "linear"):
        rows = table[table["labels"] == labels].set_index("structure")
        assert rows.loc[[1, 2], "dice"].tolist() == [1, 1]
        assert rows.loc[[1, 2], "hd95"].tolist() == [0, 0]
        assert rows.loc[[5, 8], ["dice", "hd95"]].isna().all(axis=None)
        assert rows.loc[5, "volume_ratio"] == 0  # shifted out of the volume
        assert np.isnan(rows.loc[8, "volume_ratio"])
        assert pair[f"tc_{labels}"] == pytest.approx(2 / 3)
        assert pair[f"tc_deviation_{labels}"] == pytest.approx(1 / 3)
    assert pair["labels_missing"] == 2
    assert pair["endpoint_error"] == pytest.approx(2)
    assert pair["endpoint_error_p95"] == pytest.approx(2)


def test_ratios_that_cancel_show_in_the_deviation():
    moving = np.zeros((24, 12, 12), np.int32)
    moving[4:12, 3:9, 3:9], moving[12:20, 3:9, 3:9] = 1, 2
    displacement = np.zeros((3, 24, 12, 12), np.float32)
    # the border between the two moves from 12 to 10: 6 planes and 10 planes are left of 8 and 8
    displacement[0, 10:12] = 2
    _, pair = score_pair(displacement, np.eye(4), moving, moving, structure_set([1, 2]), interpolations=("nearest",))
    assert pair["tc_nearest"] == pytest.approx(1)
    assert pair["tc_deviation_nearest"] == pytest.approx(0.25)
    assert "tc_linear" not in pair
    assert np.isnan(pair["endpoint_error"])


def test_a_moving_label_map_on_its_own_grid_scores_as_on_the_fixed_one():
    fixed, moving = blobs(1), blobs(1)
    affine = np.diag([1.0, 1.7, 2.5, 1.0])
    displacement = rough_field(4, amplitude=0.6)
    elsewhere = reorient(Volume(moving, affine), "PIL")
    structures = structure_set(range(1, 6))
    here = score_pair(displacement, affine, moving, fixed, structures)
    there = score_pair(displacement, affine, elsewhere.data, fixed, structures, moving_affine=elsewhere.affine)
    # a few voxels lie on the edge between two labels, where rounding decides
    np.testing.assert_allclose(there[0]["dice"], here[0]["dice"], atol=5e-3)
    assert here[0]["dice"].max() < 0.99
    np.testing.assert_allclose(there[1]["tc_linear"], here[1]["tc_linear"], atol=5e-3)


def test_a_structure_that_vanishes_when_warped_has_no_overlap_and_is_counted():
    fixed = np.zeros((16, 16, 16), np.int32)
    fixed[2:8, 2:8, 2:8], fixed[12, 12, 12] = 1, 2
    displacement = np.zeros((3, 16, 16, 16), np.float32)
    displacement[1, 12, 12, 12] = 2  # the single voxel of 2 is looked for beside it
    structures = structure_set([1, 2, 3])
    table, pair = score_pair(displacement, np.eye(4), fixed, fixed, structures, interpolations=("nearest",))
    rows = table.set_index("structure")
    assert rows.loc[1, "dice"] == 1
    assert rows.loc[2, "dice"] == 0  # both scans have it: what a method loses is no missing value
    assert np.isnan(rows.loc[2, "hd95"])
    assert rows.loc[2, TOPOLOGY_COLUMNS].tolist() == [-1, 0, 0]
    assert rows.loc[3, ["dice", "hd95", "volume_ratio", *TOPOLOGY_COLUMNS]].isna().all()
    assert pair["labels_vanished_nearest"] == 1
    assert pair["labels_missing"] == 1
    assert pair["topology_change_nearest"] == pair["topology_change_structures_nearest"] == 1


def test_what_cannot_be_scored_is_refused_by_name(tmp_path):
    labels, zero = blobs(1), np.zeros((3, *SHAPE), np.float32)
    nothing = np.zeros_like(labels)
    structures = structure_set([1, 2])
    with pytest.raises(InputError, match="moving_labels: found no labelled voxel; expected at least one structure"):
        score_pair(zero, np.eye(4), nothing, labels, structures)
    with pytest.raises(InputError, match="fixed_labels: found no labelled voxel"):
        score_pair(zero, np.eye(4), labels, nothing, structures)
    with pytest.raises(InputError, match="mask: found no voxel; expected the voxels where the field is judged"):
        score_pair(zero, np.eye(4), labels, labels, structures, mask=np.zeros(SHAPE, bool))
    with pytest.raises(InputError, match=r"mask: found shape \(2, 2, 2\); expected \(30, 26, 28\)"):
        score_pair(zero, np.eye(4), labels, labels, structures, mask=np.ones((2, 2, 2), bool))
    with pytest.raises(InputError, match="fixed_labels: found shape"):
        score_pair(zero, np.eye(4), labels, labels[1:], structures)
    save_field(tmp_path / "u.nii", zero, np.eye(4))
    write_volume(tmp_path / "empty.nii.gz", Volume(nothing, np.eye(4)))
    write_volume(tmp_path / "full.nii.gz", Volume(labels, np.eye(4)))
    with pytest.raises(InputError, match=r"empty\.nii\.gz: found no labelled voxel"):
        score_files(tmp_path / "u.nii", tmp_path / "full.nii.gz", tmp_path / "empty.nii.gz", structures)


def test_topology_can_be_left_out():
    labels = blobs(1)
    zero = np.zeros((3, *SHAPE), np.float32)
    table, pair = score_pair(zero, np.eye(4), labels, labels, structure_set([1, 2]), topology=False)
    assert list(table.columns) == [name for name in STRUCTURE_COLUMNS if name not in TOPOLOGY_COLUMNS]
    assert set(pair) == {name for name in PAIR_COLUMNS if "topology" not in name}


def test_a_mask_says_where_the_field_is_judged():
    labels = blobs(1)
    displacement = np.zeros((3, *SHAPE), np.float32)
    displacement[0, 20, 20, 20] = -3
    mask = np.zeros(SHAPE, bool)
    mask[2:10] = True
    structures = structure_set([1, 2])
    for judged, folded in ((mask, False), (np.ones(SHAPE, bool), True)):
        _, pair = score_pair(displacement, np.eye(4), labels, labels, structures, mask=judged)
        assert (pair["nonpositive_jacobian_forward"] > 0) == folded
        assert (pair["nondiffeomorphic_volume"] > 0) == folded


@pytest.mark.parametrize("ending", [".nii", ".nii.gz"])
def test_fields_in_files_score_as_in_memory(ending, tmp_path):
    affine = np.array([[0, -1.5, 0, 4], [2.0, 0, 0, 5], [0, 0, 2.5, 6], [0, 0, 0, 1]])
    fixed, moving, displacement = blobs(1), blobs(2), rough_field(5)
    structures = load_structures("oasis28")
    first, second = structures.ids[:2]
    moving, fixed = (np.select([x == 1, x == 2], [first, second]) for x in (moving, fixed))
    for name, labels in (("m", moving), ("f", fixed)):
        write_volume(tmp_path / f"{name}.nii.gz", Volume(labels.astype(np.int32), affine))
    field = tmp_path / f"m__f{ending}"
    save_field(field, displacement, affine)
    table, pair = score_pair(displacement, affine, moving, fixed, structures)
    paths = [field, *(tmp_path / f"{name}.nii.gz" for name in ("m", "f"))]
    other_table, other_pair = score_files(*paths, "oasis28")
    np.testing.assert_allclose(other_table["dice"], table["dice"], atol=5e-3)
    assert other_pair["nondiffeomorphic_volume"] == pytest.approx(pair["nondiffeomorphic_volume"], rel=1e-3)
    assert pair["labels_missing"] == 26

    record = {"cohort": "c", "method": "syn", "model": "none", "moving": "m", "fixed": "f", "seconds": 2.5}
    records = [record | {"status": "ok", "reason": ""}, record | {"status": "failed", "reason": "killed by SIGSEGV"}]
    records[1]["moving"] = "lost"
    pd.DataFrame(records).to_csv(tmp_path / "records.csv", index=False)
    labels = {"m": paths[1], "lost": paths[1], records[0]["fixed"]: paths[2]}
    tables, pairs = score_shard(
        tmp_path / "records.csv",
        fields=tmp_path,
        labels=labels,
        truths={},
        structures="oasis28",
    )
    assert list(pairs["status"]) == ["ok", "failed"]
    assert pairs["reason"][1] == "killed by SIGSEGV"
    assert pairs.loc[1, sorted(PAIR_COLUMNS)].isna().all()
    assert set(tables["moving"]) == {"m"}
    assert list(tables.columns)[5:] == STRUCTURE_COLUMNS
    np.testing.assert_array_equal(tables["dice"], other_table["dice"])


def test_there_and_back_ends_at_the_start_for_inverse_fields():
    """u and its inverse: 0. A shift by 2 voxels of 1.5 mm without a way back: 3 mm. Both shifts alike: 6 mm."""
    affine = np.diag([1.5, 2.0, 2.5, 1.0])
    inside = np.zeros(SHAPE, bool)
    inside[6:-6, 6:-6, 6:-6] = True
    smooth = 2 * np.sin(np.indices(SHAPE) / 4).astype(np.float32)
    back = invert(torch.from_numpy(smooth)[None], iterations=200, tolerance=1e-6)[0].numpy()
    assert inverse_consistency_error(back, smooth, affine, inside).max() < 1e-3
    assert inverse_consistency_error(smooth, back, affine, inside).mean() < 0.1  # interpolated between voxels
    shift = np.zeros((3, *SHAPE), np.float32)
    shift[0] = 2
    for backward, expected in ((-shift, 0), (np.zeros_like(shift), 3), (shift, 6)):
        error = inverse_consistency_error(shift, backward, affine, inside)
        assert error == pytest.approx(np.full(inside.sum(), expected), abs=1e-5)
    labels = blobs(1)
    _, pair = score_pair(shift, affine, labels, labels, structure_set([1, 2]), backward=np.zeros_like(shift))
    assert pair["inverse_consistency_error"] == pytest.approx(3, abs=1e-5)


def test_a_pair_registered_both_ways_is_scored_once_and_there_and_back(tmp_path):
    affine, labels = np.diag([2.0, 2.0, 2.0, 1.0]), blobs(1)
    first, second = load_structures("oasis28").ids[:2]
    labels = np.select([labels == 1, labels == 2], [first, second]).astype(np.int32)
    write_volume(tmp_path / "labels.nii.gz", Volume(labels, affine))
    shift = np.zeros((3, *SHAPE), np.float32)
    shift[1] = 0.75
    for moving, fixed in (("m", "f"), ("f", "m"), ("n", "f")):
        save_field(pair_field(tmp_path, moving, fixed), shift, affine)
    record = {"cohort": "c", "method": "syn", "model": "none", "status": "ok", "reason": "", "seconds": 2.5}
    registered = [record | {"moving": m, "fixed": f} for m, f in (("m", "f"), ("f", "m"), ("n", "f"))]
    pd.DataFrame(registered).to_csv(tmp_path / "records.csv", index=False)
    _, pairs = score_shard(
        tmp_path / "records.csv",
        fields=tmp_path,
        labels=dict.fromkeys("mnf", tmp_path / "labels.nii.gz"),
        truths={},
        structures="oasis28",
        pairs=[["m", "f"], ["n", "f"]],
        topology=False,
    )
    assert list(zip(pairs["moving"], pairs["fixed"], strict=True)) == [("m", "f"), ("n", "f")]
    assert pairs["inverse_consistency_error"][0] == pytest.approx(3, abs=1e-3)  # 1.5 voxels of 2 mm
    assert np.isnan(pairs["inverse_consistency_error"][1])  # nobody registered it backward


def test_the_plain_field_of_a_pair_comes_before_a_compressed_one(tmp_path):
    assert pair_field(tmp_path, "a.b", "c") == tmp_path / "a.b__c.nii"
    (tmp_path / "a.b__c.nii.gz").touch()
    assert pair_field(tmp_path, "a.b", "c") == tmp_path / "a.b__c.nii.gz"
    (tmp_path / "a.b__c.nii").touch()
    assert pair_field(tmp_path, "a.b", "c") == tmp_path / "a.b__c.nii"
