"""Topology of structures: shapes of known Betti numbers, an independent count, and what warping does to them."""

import numpy as np
import pandas as pd
import pytest
import torch
from scipy import ndimage
from skimage.measure import euler_number

from dmir.fields import integrate, warp_labels
from dmir.metrics import betti_numbers, fold_free_part, nondiffeomorphic_volume, nonpositive_jacobian, score_pair
from dmir.metrics.topology import EIGHTHS
from dmir.structures import StructureSet
from dmir.volumes import Volume, reorient

SHAPE = (32, 32, 32)
AXES = np.meshgrid(*(np.arange(n) - 15.5 for n in SHAPE), indexing="ij")
RADIUS = np.sqrt(sum(x**2 for x in AXES))
TORUS = (np.hypot(AXES[0], AXES[1]) - 9) ** 2 + AXES[2] ** 2 < 12


def ball(centre, radius):
    return sum((x - c) ** 2 for x, c in zip(AXES, centre, strict=True)) < radius**2


def blobs(seed, shape=SHAPE):
    """Label map of five smooth regions with background between them."""
    noise = np.random.default_rng(seed).standard_normal((5, *shape))
    smooth = np.stack([ndimage.gaussian_filter(x, 3) for x in noise])
    smooth /= smooth.std(axis=(1, 2, 3), keepdims=True)
    return np.where(smooth.max(axis=0) > 0.6, smooth.argmax(axis=0) + 1, 0).astype(np.int32)


def structure_set(ids):
    return StructureSet("test", pd.DataFrame([{"id": i, "name": f"s{i}"} for i in ids]))


def smooth_noise(seed, sigma, shape=SHAPE):
    noise = np.random.default_rng(seed).standard_normal((3, *shape))
    smooth = np.stack([ndimage.gaussian_filter(x, sigma, mode="wrap") for x in noise])
    return (smooth / smooth.std()).astype(np.float32)


# Known shapes


@pytest.mark.parametrize(
    ("shape", "expected"),
    [
        (RADIUS < 10, (1, 0, 0)),
        (ball((-8, 0, 0), 5) | ball((8, 0, 0), 5), (2, 0, 0)),
        ((RADIUS < 10) & (RADIUS > 5), (1, 0, 1)),
        (TORUS, (1, 1, 0)),
        ((RADIUS < 14) & ~TORUS, (1, 1, 1)),  # a ball hollowed by a ring: the hole's ring leaves a tunnel and a cavity
        ((RADIUS < 14) & ~ball((-6, 0, 0), 4) & ~ball((6, 0, 0), 4), (1, 0, 2)),
        (np.ones(SHAPE, bool), (1, 0, 0)),  # touches every border of the volume
        (np.zeros(SHAPE, bool), (0, 0, 0)),
    ],
)
def test_known_shapes_have_their_betti_numbers(shape, expected):
    assert betti_numbers(shape.astype(np.uint8), [1]) == {1: expected}


def test_a_structure_is_joined_by_corners_and_its_surroundings_by_faces():
    labels = np.zeros((6, 6, 6), np.int16)
    labels[1, 1, 1] = labels[2, 2, 2] = 7
    assert betti_numbers(labels, [7]) == {7: (1, 0, 0)}
    labels[...] = 7
    labels[2, 2, 2] = labels[3, 3, 3] = 0
    assert betti_numbers(labels, [7]) == {7: (1, 0, 2)}  # two holes that touch by a corner are two


def test_a_structure_inside_another_is_a_cavity_of_it():
    labels = np.where(RADIUS < 5, 4, np.where(RADIUS < 10, 900, 0))
    assert betti_numbers(labels, [900, 4, 5]) == {900: (1, 0, 1), 4: (1, 0, 0), 5: (0, 0, 0)}


def test_all_labels_of_a_rough_map_agree_with_a_count_of_each_alone():
    labels = np.random.default_rng(2).integers(0, 6, (18, 17, 19))
    found = betti_numbers(labels, range(1, 6))
    for label in range(1, 6):
        padded = np.pad(labels == label, 1)
        components = ndimage.label(padded, np.ones((3, 3, 3)))[1]
        cavities = ndimage.label(~padded)[1] - 1
        assert found[label] == (components, components + cavities - euler_number(padded, connectivity=3), cavities)
        assert found[label][1] > 50


def test_the_table_of_cells_is_that_of_a_cube_complex():
    # by hand: no voxel, one voxel (a vertex, 3 edges, 3 faces, a cube), all eight (nothing but the inside)
    assert EIGHTHS[[0, 1, 255]].tolist() == [0, 8 - 4 * 3 + 2 * 3 - 1, 8 - 4 * 6 + 2 * 12 - 8]


# Warping


def test_a_diffeomorphism_of_smooth_shapes_changes_nothing_with_linear_labels():
    labels = np.zeros(SHAPE, np.uint8)
    labels[TORUS], labels[RADIUS < 4] = 1, 2
    displacement = integrate(torch.from_numpy(1.5 * smooth_noise(1, 6))[None])[0].numpy()
    assert nondiffeomorphic_volume(displacement) == 0
    table, pair = score_pair(displacement, np.eye(4), labels, labels, structure_set([1, 2]))
    rows = table[table["labels"] == "linear"]
    assert (rows[["components_change", "tunnels_change", "cavities_change"]] == 0).all(axis=None)
    assert pair["topology_change_linear"] == pair["topology_change_structures_linear"] == 0
    assert rows["dice"].max() < 0.97  # it does move them


def test_a_field_that_tears_changes_what_its_smooth_part_does_not():
    labels = np.zeros(SHAPE, np.uint8)
    labels[TORUS], labels[RADIUS < 4] = 1, 2
    displacement = 2.5 * smooth_noise(3, 1)
    assert nondiffeomorphic_volume(displacement) > 1
    _, pair = score_pair(displacement, np.eye(4), labels, labels, structure_set([1, 2]))
    assert pair["topology_change_linear"] > 10
    assert pair["topology_change_structures_linear"] == 2
    assert pair["topology_floor_linear"] == pair["topology_floor_structures_linear"] == 0


def test_changes_are_of_the_warped_less_the_original():
    labels = np.where((RADIUS < 10) & (RADIUS > 7), 3, 0)
    displacement = np.zeros((3, *SHAPE), np.float32)
    displacement[0, :, 14:18, 14:18] = 40  # looks outside: a channel right through the hollow ball
    table, pair = score_pair(displacement, np.eye(4), labels, labels, structure_set([3]), interpolations=("nearest",))
    # the cavity is open to the outside at both ends: a tunnel instead
    assert table.loc[0, ["components_change", "tunnels_change", "cavities_change"]].tolist() == [0, 1, -1]
    assert pair["topology_change_nearest"] == 2


def test_the_original_is_counted_on_its_own_grid():
    labels = blobs(1)
    affine = np.diag([1.0, 1.7, 2.5, 1.0])
    elsewhere = reorient(Volume(labels, affine), "PIL")
    zero = np.zeros((3, *labels.shape), np.float32)
    structures = structure_set(range(1, 6))
    table, pair = score_pair(zero, affine, elsewhere.data, labels, structures, moving_affine=elsewhere.affine)
    assert pair["topology_change_nearest"] == pair["topology_floor_linear"] == 0
    assert (table["dice"] == 1).all()


# The floor


@pytest.mark.parametrize("seed", range(4))
def test_the_floor_is_a_field_of_like_size_without_folds(seed):
    displacement = 2.0 * smooth_noise(seed, 6, (40, 33, 29)) + 1.2 * smooth_noise(seed + 9, 1, (40, 33, 29))
    assert nonpositive_jacobian(displacement) > 5
    floor = fold_free_part(displacement)
    assert floor.shape == displacement.shape
    assert floor.dtype == np.float32
    assert nonpositive_jacobian(floor, "forward") == nonpositive_jacobian(floor, "central") == 0
    assert nondiffeomorphic_volume(floor) == 0
    sizes = [np.sqrt((u**2).sum(axis=0)).mean() for u in (floor, displacement)]
    assert 0.4 < sizes[0] / sizes[1] < 1
    np.testing.assert_array_equal(fold_free_part(displacement), floor)


def test_the_floor_of_a_shift_is_the_shift_and_of_nothing_nothing():
    shift = np.broadcast_to(np.array([1.5, -2.0, 0.25], np.float32).reshape(3, 1, 1, 1), (3, 20, 17, 9))
    np.testing.assert_allclose(fold_free_part(shift), shift, atol=1e-5)
    assert not fold_free_part(np.zeros((3, 20, 17, 9), np.float32)).any()


def test_a_field_that_folds_over_long_ways_is_averaged_until_it_does_not():
    position = np.stack(AXES).astype(np.float32)
    displacement = np.zeros((3, *SHAPE), np.float32)
    displacement[0] = 60 * np.sin(position[0] / 3)
    assert nonpositive_jacobian(displacement) > 20
    assert nondiffeomorphic_volume(fold_free_part(displacement)) == 0


def test_nearest_labels_alone_change_the_topology_of_smooth_shapes():
    """Why a floor is told: no fold anywhere, and yet the shapes have other cavities and tunnels afterwards."""
    labels = blobs(1, shape=(48, 48, 48))
    u = integrate(torch.from_numpy(3.0 * smooth_noise(5, 5, labels.shape))[None])
    assert nondiffeomorphic_volume(u[0].numpy()) == 0
    before = betti_numbers(labels, range(1, 6))
    changes = {}
    for interpolation in ("nearest", "linear"):
        warped = warp_labels(torch.from_numpy(labels)[None, None], u, interpolation)[0, 0].numpy()
        after = betti_numbers(warped, range(1, 6))
        changes[interpolation] = sum(np.abs(np.subtract(after[i], before[i])).sum() for i in after)
    assert changes["nearest"] > changes["linear"]
