"""Descent on the pair itself: the truth found, no folds, exact gradients, the same bits with any number of threads."""

from __future__ import annotations

import inspect
import os
import subprocess
import sys
from dataclasses import asdict, fields

import numpy as np
import pytest
import torch
from scipy.ndimage import gaussian_filter

from dmir import filters, losses, registry
from dmir.errors import InputError
from dmir.fields import (
    compose,
    compose_step,
    folded_voxels,
    integrate,
    inverse_consistency,
    inverse_residual,
    invert,
    onto_moving_grid,
    warp,
)
from dmir.methods import descending, descent, register
from dmir.methods.descending import descend, find_field
from dmir.methods.descent import StageSettings
from dmir.methods.stages import REFINING, STAGES, Stage, levels, voxel_steps
from dmir.metrics.folding import measure_folding
from dmir.similarity import LocalCorrelation, MeanSquares, MutualInformation, similarity_of
from dmir.volumes import Volume

SHAPE = (44, 48, 40)
SHORT = (Stage(4, 20, update_smoothing=2, compression=0.5), Stage(2, 20, momentum=0.5), Stage(1, 10))


def waves(sigma, seed, shape=SHAPE):
    noise = gaussian_filter(np.random.default_rng(seed).standard_normal(shape), sigma, mode="constant")
    return (noise / noise.std()).astype(np.float32)


def ball(shape=SHAPE, seed=1):
    """Return a textured ball in [0, 1], zero round it, and its radius (1 at its surface)."""
    axes = np.meshgrid(*((np.arange(n) - (n - 1) / 2) / (n / 2 - 5) for n in shape), indexing="ij")
    radius = np.sqrt(sum(x**2 for x in axes))
    texture = np.clip(0.55 + 0.18 * waves(1.5, seed, shape) + 0.1 * waves(3.0, seed + 1, shape), 0.1, 1.0)
    return np.where(radius < 1, texture, 0).astype(np.float32), radius


def batch(array):
    return torch.from_numpy(np.ascontiguousarray(array, np.float32))[None]


def texture(places):
    """Return a sum of waves of 4 to 12 voxels at places (3, ...): warped without interpolation."""
    random, total = np.random.default_rng(3), 0.0
    for _ in range(80):
        direction = random.standard_normal(3)
        wave = 2 * np.pi / random.uniform(4, 12) * direction / np.linalg.norm(direction)
        total = total + np.cos(np.tensordot(wave, places, 1) + random.uniform(0, 2 * np.pi))
    return np.clip(0.5 + 0.025 * total, 0, 1)


@pytest.fixture(scope="module")
def pair():
    """An image warped by exp(v), the image, and exp(-v), which takes the first back onto the second; where to look."""
    places = np.stack(np.meshgrid(*(np.arange(n, dtype=float) for n in SHAPE), indexing="ij"))
    middle = (np.array(SHAPE).reshape(3, 1, 1, 1) - 1) / 2
    radius = np.sqrt((((places - middle) / (middle + 0.5)) ** 2).sum(0))
    velocity = batch(np.stack([waves(8.0, 10 + k) for k in range(3)]) * np.clip(1.1 - radius, 0, 0.5) * 2.5)
    moving = texture(places + integrate(velocity)[0].numpy())
    return batch(moving), batch(texture(places)), integrate(-velocity)[0], radius < 0.8


# --- what it finds ---


def test_a_known_diffeomorphism_is_recovered_to_a_tenth_of_a_voxel(pair):
    """Two voxels on average, up to six. The default stages come near; smoother steps at the end get there."""
    moving, fixed, truth, inside = pair
    to_the_end = Stage(2, 40, update_smoothing=2.5), Stage(1, 80, window=3, update_smoothing=3, field_smoothing=0)
    assert truth.norm(dim=0).numpy()[inside].mean() > 2
    for stages, within in ((STAGES, 0.15), (STAGES + to_the_end, 0.1)):
        found = find_field(moving, fixed, (1, 1, 1), stages=stages, tolerance=0.0).displacement
        assert (found - truth).norm(dim=0).numpy()[inside].mean() < within


@pytest.mark.parametrize(("similarity", "within"), [("lncc", 0.1), ("mse", 0.1), ("mutual_information", 0.15)])
def test_a_known_translation_is_recovered_by_each_similarity(similarity, within):
    fixed, radius = ball()
    shift = (2.0, -1.5, 1.0)
    truth = torch.tensor(shift).view(1, 3, 1, 1, 1).expand(1, 3, *SHAPE)
    moving = warp(batch(fixed[None]), -truth)[0]
    found = find_field(moving, batch(fixed), (1, 1, 1), similarity=similarity, stages=SHORT).displacement
    assert np.abs(found.numpy()[:, radius < 0.7].mean(axis=1) - shift).max() < within


def test_equal_images_are_not_moved_at_all():
    fixed = batch(ball()[0])
    for name in ("lncc", "mse"):
        similarity = similarity_of(name, fixed, 5, 0.005)
        similarity.prepare(fixed.clone())
        parts = [similarity.slab(*part)[1] for part in filters.slabs(fixed)]
        assert float(torch.cat(parts, 1).abs().max()) == 0.0
        assert torch.equal(
            find_field(fixed, fixed, (1, 1, 1), similarity=name, stages=SHORT).displacement, torch.zeros(3, *SHAPE)
        )


def test_from_the_optimum_it_stays_there(pair):
    moving, fixed, _, inside = pair
    there = find_field(moving, fixed, (1, 1, 1)).displacement
    again = find_field(moving, fixed, (1, 1, 1), start=there, stages=REFINING).displacement
    assert (again - there).norm(dim=0).numpy()[inside].mean() < 0.03


def test_no_similarity_is_lower_after_a_stage_than_before_it(pair):
    moving, fixed, truth, _ = pair
    for stages in (STAGES, [Stage(1, 12, step=1.0, update_smoothing=0.5)], [Stage(1, 3)]):
        for start in (None, truth.clone()):
            for _, before, after in descend(moving, fixed, stages=stages, start=start).similarity:
                assert after >= before


def test_the_similarity_told_is_that_of_the_losses(pair):
    moving, fixed, *_ = pair
    descended = descend(moving, fixed, stages=SHORT[2:])
    ((_, before, after),), found = descended.similarity, descended.displacement
    for value, field in ((before, torch.zeros_like(found)), (after, found)):
        assert value == pytest.approx(float(losses.lncc(fixed[None], warp(moving[None], field[None]), 5)), abs=2e-3)


def test_nothing_folds_on_a_hundred_hard_pairs():
    """Unrelated textures, far too long deformations, noise: whatever the images, the field does not fold."""
    shape, hard = (20, 22, 18), (Stage(2, 8, momentum=0.5, field_smoothing=0.4), Stage(1, 8, update_smoothing=1.0))
    for seed in range(100):
        images = [
            batch(np.clip(0.5 + 0.3 * waves(0.6 + 0.02 * seed, 1000 + 2 * seed + k, shape), 0, 1)) for k in range(2)
        ]
        field = find_field(*images, (1, 1, 1), stages=hard).displacement
        folding = measure_folding(field.numpy())
        assert (folding.nonpositive_forward, folding.nonpositive_central, folding.nondiffeomorphic_volume) == (0, 0, 0)


def test_a_start_that_folds_is_unfolded(pair):
    moving, fixed, truth, _ = pair
    folding = truth + 3 * torch.from_numpy(np.stack([waves(1.0, 70 + k) for k in range(3)]))
    assert folded_voxels(folding) > 1000
    unfolded = descending.unfolded(folding)
    assert folded_voxels(unfolded, 1e-3) == 0  # so much that rounding in a file folds nothing
    assert torch.equal(descending.unfolded(truth), truth)
    assert folded_voxels(find_field(moving, fixed, (1, 1, 1), start=folding, stages=SHORT[1:]).displacement) == 0


def test_the_inverse_takes_there_and_back(pair):
    """Everywhere on its own grid; the other way round, where it is interpolated, within the image."""
    field = find_field(*pair[:2], (1, 1, 1)).displacement[None]
    inverse = invert(field)
    there, back = inverse_residual(field, inverse)[0], inverse_residual(inverse, field)[0].numpy()[pair[3]]
    assert float(there.mean()) < 0.05 and float(there.max()) < 0.5
    assert back.mean() < 0.05 and back.max() < 0.5
    assert inverse_consistency(field[0].numpy()) == {
        "inverse_mean": float(there.mean()), "inverse_worst": float(there.max())
    }  # fmt: skip


def test_a_field_without_an_inverse_is_told(caplog):
    """Case 12: 6 sin(2 pi x / 16) folds. Some way back is found, and not the only one."""
    field = torch.zeros(1, 3, 48, 8, 8)
    field[0, 0] = (6 * torch.sin(2 * np.pi * torch.arange(48.0) / 16)).view(48, 1, 1)
    invert(field)
    assert "the field folds at" in caplog.text and "has no inverse" in caplog.text
    caplog.clear()
    invert(0.3 * field)  # slopes of .7: no fold
    assert not caplog.text
    torn = torch.zeros(1, 3, 48, 8, 8)
    torn[0, 0, 24:] = 5  # nothing comes to lie between 23 and 29, but by interpolation
    torn[0, 0, 30:] = -5  # and much twice
    invert(torn)
    assert "the field folds at" in caplog.text


# --- exactness ---


@pytest.mark.parametrize("window", [3, 5])
def test_the_derivative_of_the_local_correlation_is_its_finite_difference(window):
    """In float64, at voxels inside, at a border and in a corner, against differences of the whole sum."""
    shape, factor = (9, 10, 8), 2 / window**3
    fixed, warped = (torch.from_numpy(np.random.default_rng(k).random((1, *shape))) for k in (1, 2))
    similarity = LocalCorrelation(fixed, window, noise=1e-4)

    def total(image):
        similarity.prepare(image)
        return float(sum(similarity.slab(*part)[0].sum() for part in filters.slabs(image)))

    similarity.prepare(warped)
    derivative = torch.cat([similarity.slab(*part)[1] for part in filters.slabs(warped)], 1) * factor
    for place in ((0, 4, 5, 4), (0, 0, 3, 7), (0, 8, 9, 7), (0, 2, 0, 1)):
        values = []
        for change in (1e-6, -1e-6):
            moved = warped.clone()
            moved[place] += change
            values.append(total(moved))
        assert float(derivative[place]) == pytest.approx((values[0] - values[1]) / 2e-6, rel=1e-5)


def test_the_derivatives_are_those_of_autograd():
    fixed, warped = (torch.from_numpy(np.random.default_rng(k).random((1, 7, 8, 9))) for k in (1, 2))
    for build, value, factor in (
        (lambda: LocalCorrelation(fixed, 5, 1e-4), lambda w: losses.lncc(fixed[None], w[None], 5) * w.numel(), 2 / 125),
        (lambda: MeanSquares(fixed), lambda w: -losses.mse(fixed[None], w[None]) * w.numel(), 2),
        (lambda: MutualInformation(fixed), lambda w: losses.mutual_information(fixed[None], w[None]) * w.numel(), 1),
    ):
        similarity = build()
        similarity.prepare(warped)
        found, derivative = similarity.slab(0, 7)
        leaf = warped.clone().requires_grad_()
        expected = value(leaf)
        (gradient,) = torch.autograd.grad(expected, leaf)
        assert float(found.sum()) == pytest.approx(float(expected.detach()), rel=1e-4)
        assert torch.allclose(derivative * factor, gradient, rtol=1e-3, atol=1e-6 * float(gradient.abs().max()) + 1e-9)


def test_slabs_and_threads_change_no_bit(pair, monkeypatch):
    """One and two threads, in processes of their own, and slabs of another size."""
    code = (
        "import sys, torch; sys.path.insert(0, sys.argv[1]); torch.set_num_threads(int(sys.argv[2]));"
        "import hashlib, test_descent as t;"
        "from dmir.methods.descending import find_field;"
        "images = [t.batch(t.ball((64, 72, 60), seed)[0]) for seed in (1, 5)];"
        "u = find_field(*images, (1, 1, 1)).displacement;"
        "print(hashlib.sha1(u.numpy().tobytes()).hexdigest())"
    )
    folder = __file__.rsplit("/", 1)[0]
    # threads that wait without spinning: on a busy machine they would take turns of milliseconds
    environment = {**os.environ, "OMP_WAIT_POLICY": "PASSIVE"}
    hashes = []
    for threads in ("1", "2"):
        command = [sys.executable, "-c", code, folder, threads]
        done = subprocess.run(command, capture_output=True, text=True, check=True, env=environment)
        hashes.append(done.stdout)
    assert hashes[0] == hashes[1] and len(hashes[0]) > 30
    whole = find_field(*pair[:2], (1, 1, 1), stages=SHORT).displacement
    monkeypatch.setattr(filters, "SLAB", 3 * 48 * 40)
    assert torch.equal(whole, find_field(*pair[:2], (1, 1, 1), stages=SHORT).displacement)


def test_box_sums_and_gaussians_are_what_they_say():
    volume = torch.from_numpy(np.random.default_rng(1).random((2, 11, 12, 13)))
    for window in (1, 3, 4, 5, 7, 9):
        kernel = torch.ones(1, 1, window, window, window, dtype=torch.float64)
        expected = torch.nn.functional.conv3d(volume[:, None], kernel)[:, 0]
        assert torch.allclose(filters.box_sums(volume, window), expected, rtol=1e-12)
    smoothed = filters.gaussian(volume.float(), 1.2).numpy()
    expected = [gaussian_filter(part.numpy(), 1.2, mode="nearest", truncate=3 / 1.2) for part in volume]
    assert np.abs(smoothed - expected).max() < 1e-6
    assert torch.equal(filters.gaussian(volume, 0.0), volume)
    constant = torch.full((1, 6, 7, 8), 0.3)
    assert torch.allclose(filters.gaussian(constant, 2.0), constant, atol=1e-6)


def test_a_step_is_composed_along_one_axis_after_the_other():
    first = torch.from_numpy(np.stack([waves(2.0, k) for k in range(3)])) * 2
    second = torch.from_numpy(np.stack([waves(2.0, 5 + k) for k in range(3)]))
    second = second / second.abs().max()
    expected = first[None]
    for axis in range(3):
        part = torch.zeros_like(second)
        part[axis] = second[axis]
        expected = compose(expected, part[None])
    parts = [compose_step(first, second, start, min(start + 7, SHAPE[0])) for start in range(0, SHAPE[0], 7)]
    assert float((torch.cat(parts, 1) - expected[0]).abs().max()) < 2e-4
    # and it is the composition itself up to products of the step with its slopes
    small = 0.05 * second
    assert float((compose_step(first, small, 0, SHAPE[0]) - compose(first[None], small[None])[0]).abs().max()) < 0.01


def test_folded_voxels_are_those_of_the_metrics():
    smooth = torch.from_numpy(np.stack([waves(3.0, k) for k in range(3)]))
    assert folded_voxels(smooth * 0.5) == 0 == measure_folding((smooth * 0.5).numpy()).nondiffeomorphic_volume
    checkerboard = torch.zeros(3, 8, 8, 8)
    checkerboard[0, ::2] = 0.6
    checkerboard[0, 1::2] = -0.6
    assert measure_folding(checkerboard.numpy()).nonpositive_central == 0  # central differences do not see it
    assert folded_voxels(checkerboard) > 100


# --- grids, stages, what is not there ---


def test_a_moving_image_on_a_grid_of_its_own_in_another_orientation(pair):
    moving, fixed, truth, inside = pair
    affine = np.diag([1.0, 1.0, 1.0, 1.0])
    own = np.ascontiguousarray(moving[0].numpy()[::-1].transpose(2, 0, 1))
    own_affine = np.zeros((4, 4))
    own_affine[0, 1], own_affine[1, 2], own_affine[2, 0], own_affine[3, 3] = -1, 1, 1, 1
    own_affine[0, 3] = SHAPE[0] - 1
    field = register(Volume(own, own_affine), Volume(fixed[0].numpy(), affine), "descent", device="cpu")
    assert np.linalg.norm(field - truth.numpy(), axis=0)[inside].mean() < 0.15
    there = warp(batch(own[None]), batch(onto_moving_grid(field, affine, own_affine)))[0, 0]
    assert float((there - fixed[0])[torch.from_numpy(inside)].abs().mean()) < 0.02


def test_anisotropic_voxels_and_other_units_of_grey(pair):
    moving, fixed, _, inside = pair
    thick = [
        Volume(1000 * image[0, :, :, ::2].numpy() + 50, np.diag([1.0, 1.0, 2.0, 1.0])) for image in (moving, fixed)
    ]
    field = register(*thick, "descent", device="cpu")
    assert field.shape == (3, *thick[1].shape) and np.isfinite(field).all()
    before = np.abs(thick[0].data - thick[1].data)[inside[:, :, ::2]].mean()
    after = warp(batch(thick[0].data[None]), batch(field))[0, 0].numpy()
    assert np.abs(after - thick[1].data)[inside[:, :, ::2]].mean() < 0.4 * before


def test_stages_finer_than_the_grid_are_done_once_on_its_voxels():
    at = lambda spacing: [(stage.voxel, factors) for stage, factors in levels(STAGES, (60, 60, 60), spacing)]  # noqa: E731
    assert [voxel for voxel, _ in at((1, 1, 1))] == [4, 4, 2, 2, 1]
    assert [voxel for voxel, _ in at((2, 2, 2))] == [4, 4, 2, 2]
    assert at((3, 3, 3)) == [(4, (4 / 3,) * 3)] * 2 + [(2, (1.0,) * 3)] * 2
    assert at((1, 1, 2))[2] == (2, (2.0, 2.0, 1.0))
    assert voxel_steps([Stage(2, 3), Stage(1, 2)], (16, 16, 16), (1, 1, 1)) == 16**3 * (3 / 8 + 2)
    assert levels([Stage(1, 0)], (16, 16, 16), (1, 1, 1)) == []


def test_what_one_scan_never_saw_does_not_pull(pair):
    """A moving scan that ends at a plane: with what was seen told, the field there is not drawn into the void."""
    moving, fixed, truth, inside = pair
    clipped = moving.clone()
    clipped[:, :, :, 26:] = 0
    seen = torch.ones_like(moving)
    seen[:, :, :, 26:] = 0
    blind = find_field(clipped, fixed, (1, 1, 1)).displacement
    told = find_field(clipped, fixed, (1, 1, 1), seen=(seen, None)).displacement
    beyond = inside & (np.arange(SHAPE[2]) > 26) & (np.arange(SHAPE[2]) < 34)
    errors = [(field - truth).norm(dim=0).numpy()[beyond].mean() for field in (blind, told)]
    assert errors[1] < 0.5 * errors[0]
    whole = find_field(moving, fixed, (1, 1, 1), seen=(torch.ones_like(moving), torch.ones_like(fixed))).displacement
    assert torch.equal(whole, find_field(moving, fixed, (1, 1, 1)).displacement)


def image(data, name="x"):
    return Volume(np.asarray(data, np.float32), np.eye(4))


@pytest.mark.parametrize(
    ("data", "words"),
    [
        (np.zeros((16, 16, 16)), "the value 0 everywhere"),
        (np.full((16, 16, 16), 3.0), "the value 3 everywhere"),
        (np.where(np.arange(16) == 3, np.nan, 1.0) * np.ones((16, 16, 16)), "NaN or infinite"),
    ],
)
def test_images_that_say_nothing_are_refused_by_name(data, words):
    good = image(ball((16, 16, 16))[0])
    for moving, fixed, name in ((image(data), good, "the moving image"), (good, image(data), "the fixed image")):
        with pytest.raises(InputError, match=name) as told:
            register(moving, fixed, "descent", device="cpu")
        assert words in str(told.value) and len(str(told.value).splitlines()) <= 4


def test_images_that_do_not_overlap_are_refused():
    good, far = image(ball((16, 16, 16))[0]), np.eye(4)
    far[0, 3] = 500
    with pytest.raises(InputError, match="nothing of it within the fixed image's grid"):
        register(Volume(good.data, far), good, "descent", device="cpu")


def test_the_watcher_hears_of_every_step(pair):
    heard = []
    found = find_field(*pair[:2], (1, 1, 1), stages=SHORT, watch=lambda *told: heard.append(told))
    assert [max(step for number, step, _, _ in heard if number == k) for k in range(3)] == list(found.steps)
    assert {steps for _, _, steps, _ in heard} == {20, 10}
    assert all(np.isfinite(value) for _, step, _, value in heard if step % 5 == 0)


def test_a_float_that_no_gpu_waits_for(pair):
    """Between two looks the similarity is never read: a device would not be waited for."""
    reads = []
    original = torch.Tensor.__float__

    def counted(self):
        reads.append(1)
        return original(self)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(torch.Tensor, "__float__", counted)
        descend(*pair[:2], stages=[Stage(1, 20)], check_every=10, tolerance=0.0)
    assert len(reads) <= 4


# --- in the configuration ---


def test_the_settings_of_the_configuration_are_the_parameters_with_the_same_defaults():
    model = registry.settings_model("descent")
    settings = model(algorithm="descent")
    assert [stage.model_dump() for stage in settings.stages] == [asdict(stage) for stage in STAGES]
    keywords = {
        p.name: p.default for p in inspect.signature(descent.register).parameters.values() if p.kind is p.KEYWORD_ONLY
    }
    assert {key: keywords[key] for key in settings.model_dump(exclude={"algorithm", "stages"})} == settings.model_dump(
        exclude={"algorithm", "stages"}
    )
    assert set(keywords) - set(model.model_fields) == {"start", "seen", "watch"}
    own = {field.name: field.default for field in fields(Stage)}
    told = dict(StageSettings.model_fields)
    assert set(own) == set(told)
    assert all(told[name].default == default for name, default in own.items() if not told[name].is_required())


def test_it_imports_neither_ants_nor_itk():
    code = "import sys, dmir.methods.descending; print([m for m in ('ants', 'itk', 'SimpleITK') if m in sys.modules])"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "[]"
    assert descent.LIBRARIES == ("dmir.methods.descending",)
