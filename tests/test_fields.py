"""The field: conventions, and agreement with ANTs and ITK on the same numbers."""

import numpy as np
import pytest
import torch
import torch.nn.functional as F

from dmir.errors import InputError
from dmir.fields import (
    compose,
    identity_grid,
    integrate,
    invert,
    jacobian_determinant,
    load_field,
    onto_moving_grid,
    resize_displacement,
    save_field,
    shifted_displacement,
    to_millimetres,
    to_voxels,
    warp,
    warp_labels,
)
from dmir.volumes import Volume, write_volume

SHAPE = (22, 26, 18)
# axes L, I, A; anisotropic; oblique: nothing in it is the identity
ROTATION = np.array([[0.96, 0.2, -0.196], [-0.2, 0.98, 0.02], [0.196, 0.02, 0.98]])
AFFINE = np.eye(4)
AFFINE[:3, :3] = np.linalg.qr(ROTATION)[0] @ np.array([[-1.0, 0, 0], [0, 0, 1.5], [0, -1.2, 0]])
AFFINE[:3, 3] = (12, -7, 30)


def smooth(seed, shape=SHAPE, amplitude=2.0, channels=3):
    """Random waves, each about as long as the volume, (1, channels, D, H, W)."""
    generator = torch.Generator().manual_seed(seed)
    x = identity_grid(shape) / torch.tensor([n - 1.0 for n in shape]).view(1, 3, 1, 1, 1)
    waves = []
    for _ in range(channels):
        frequency = 2 * torch.pi * (torch.rand(3, generator=generator) - 0.5) * 2
        phase = 2 * torch.pi * torch.rand(1, generator=generator)
        waves.append(torch.sin((x * frequency.view(1, 3, 1, 1, 1)).sum(1) + phase))
    return amplitude * torch.stack(waves, dim=1)


def interior(tensor, margin=4):
    return tensor[..., margin:-margin, margin:-margin, margin:-margin]


def test_warping_by_zero_is_the_identity():
    image = torch.rand(2, 3, *SHAPE)
    torch.testing.assert_close(warp(image, torch.zeros(2, 3, *SHAPE)), image, atol=2e-5, rtol=0)
    labels = torch.randint(0, 60, (1, 1, *SHAPE))
    for interpolation in ("nearest", "linear"):
        assert torch.equal(warp_labels(labels, torch.zeros(1, 3, *SHAPE), interpolation), labels)


@pytest.mark.parametrize("axis", [0, 1, 2])
def test_a_displacement_of_one_voxel_takes_the_next_voxel(axis):
    image = torch.rand(1, 1, *SHAPE)
    u = torch.zeros(1, 3, *SHAPE)
    u[:, axis] = 1
    expected = torch.roll(image, -1, dims=axis + 2)
    expected.select(axis + 2, SHAPE[axis] - 1).zero_()  # what comes from outside is zero
    torch.testing.assert_close(warp(image, u), expected, atol=2e-5, rtol=0)


def test_a_linear_image_is_interpolated_exactly():
    x = identity_grid(SHAPE)
    u = smooth(1)
    ramp = (x * torch.tensor([1.0, -2.0, 0.5]).view(1, 3, 1, 1, 1)).sum(1, keepdim=True)
    moved = ((x + u) * torch.tensor([1.0, -2.0, 0.5]).view(1, 3, 1, 1, 1)).sum(1, keepdim=True)
    torch.testing.assert_close(interior(warp(ramp, u), 6), interior(moved, 6), atol=1e-3, rtol=0)


def test_linear_labels_are_one_hot_linear_and_argmax():
    labels = torch.randint(0, 7, (1, 1, *SHAPE), generator=torch.Generator().manual_seed(0))
    u = smooth(2)
    channels = F.one_hot(labels[:, 0], 7).movedim(-1, 1).to(torch.float32)
    weights = warp(channels, u)
    weights[:, 0] += 1 - weights.sum(1)  # outside is background
    top = weights.topk(2, dim=1).values
    decided = (top[:, 0] - top[:, 1]) > 1e-4
    assert decided.float().mean() > 0.99
    assert torch.equal(warp_labels(labels, u, "linear")[:, 0][decided], weights.argmax(1)[decided])


def test_the_shifted_warp_is_the_published_one_and_moves_half_a_voxel_at_the_borders():
    torch.manual_seed(0)
    image, u = torch.rand(2, 2, *SHAPE), torch.randn(2, 3, *SHAPE)
    axes = torch.meshgrid(*(torch.arange(float(n)) for n in SHAPE), indexing="ij")
    places = [2 * ((axes[k] + u[:, k]) / (SHAPE[k] - 1) - 0.5) for k in range(3)]
    published = torch.nn.functional.grid_sample(image, torch.stack(places[::-1], dim=-1), align_corners=False)
    torch.testing.assert_close(warp(image, shifted_displacement(u)), published, atol=2e-5, rtol=0)
    at_rest = shifted_displacement(torch.zeros(1, 3, *SHAPE))[0, 0, :, 0, 0]
    assert at_rest[0] == -0.5 and at_rest[-1] == pytest.approx(0.5, abs=1e-6)


def test_composition_is_one_warp_after_the_other():
    image = smooth(3, channels=1)
    first, second = smooth(4, amplitude=1), smooth(5, amplitude=1)
    twice = warp(warp(image, first), second)
    once = warp(image, compose(first, second))
    assert float(interior(twice - once).abs().max()) < 0.1
    assert float(interior(twice - warp(image, compose(second, first))).abs().max()) > 0.3  # the order matters
    zero = torch.zeros_like(first)
    torch.testing.assert_close(compose(first, zero), first, atol=1e-4, rtol=0)
    torch.testing.assert_close(compose(zero, second), second)


def test_the_inverse_undoes_the_field():
    u = integrate(smooth(6, amplitude=1.0))
    assert float(u.abs().max()) > 0.9
    assert float(interior(compose(u, invert(u)), 5).abs().max()) < 0.01


def test_integration_of_a_constant_velocity_and_its_opposite():
    constant = torch.ones(1, 3, *SHAPE) * torch.tensor([0.5, -1.0, 2.0]).view(1, 3, 1, 1, 1)
    torch.testing.assert_close(integrate(constant), constant)
    v = smooth(7, amplitude=1.0)
    assert float(interior(compose(integrate(v), integrate(-v)), 5).abs().max()) < 0.05
    assert float(jacobian_determinant(integrate(v)).min()) > 0


@pytest.mark.parametrize("scheme", ["central", "forward"])
def test_the_jacobian_of_an_affine_field_is_its_determinant(scheme):
    matrix = torch.tensor([[1.1, 0.2, 0.0], [-0.1, 0.9, 0.3], [0.05, 0.0, 1.2]])
    x = identity_grid(SHAPE, dtype=torch.float64)
    u = torch.einsum("ij,bjdhw->bidhw", matrix.double() - torch.eye(3), x)
    determinant = jacobian_determinant(u, scheme)
    shrink = 2 if scheme == "central" else 1
    assert determinant.shape == (1, *(n - shrink for n in SHAPE))
    torch.testing.assert_close(determinant, torch.full_like(determinant, float(torch.det(matrix))), atol=1e-6, rtol=0)


def test_the_warp_is_differentiable_in_image_and_field():
    image = torch.rand(1, 1, 4, 5, 4, dtype=torch.float64, requires_grad=True)
    u = (0.3 * torch.rand(1, 3, 4, 5, 4, dtype=torch.float64) + 0.1).requires_grad_()
    assert torch.autograd.gradcheck(warp, (image, u), eps=1e-6, atol=1e-5)


def test_resizing_keeps_the_field_in_space():
    u = smooth(8, shape=(11, 13, 9))
    large = resize_displacement(u, (21, 25, 17))
    torch.testing.assert_close(large[..., ::2, ::2, ::2], 2 * u, atol=1e-4, rtol=0)


def test_a_field_comes_back_from_disk_and_lies_there_in_lps_millimetres(tmp_path):
    import nibabel as nib

    u = smooth(9)[0].numpy()
    save_field(tmp_path / "u.nii.gz", u, AFFINE)
    again, affine = load_field(tmp_path / "u.nii.gz")
    np.testing.assert_allclose(again, u, atol=1e-5)
    np.testing.assert_allclose(affine, AFFINE, atol=1e-5)
    raw = nib.load(tmp_path / "u.nii.gz")
    assert raw.shape == (*SHAPE, 1, 3) and raw.header.get_intent()[0] == "vector"
    voxel = (5, 6, 7)
    expected = (AFFINE[:3, :3] @ u[(slice(None), *voxel)]) * [-1, -1, 1]
    np.testing.assert_allclose(np.asarray(raw.dataobj)[voxel][0], expected, atol=1e-4)
    np.testing.assert_allclose(to_voxels(to_millimetres(u, AFFINE), AFFINE), u, atol=1e-5)


def test_what_is_no_field_is_refused(tmp_path):
    write_volume(tmp_path / "image.nii.gz", Volume(np.random.default_rng(0).random((5, 5, 5), np.float32), AFFINE))
    with pytest.raises(InputError, match="vector field"):
        load_field(tmp_path / "image.nii.gz")
    u = smooth(9)[0].numpy()
    u[0, 3, 3, 3] = np.nan
    save_field(tmp_path / "nan.nii.gz", u, AFFINE)
    with pytest.raises(InputError, match="NaN or infinite"):
        load_field(tmp_path / "nan.nii.gz")


def test_ants_warps_with_our_file_as_we_do(tmp_path):
    """antsApplyTransforms reads the field from disk; both warped images agree to 1e-4 on an oblique grid."""
    ants = pytest.importorskip("ants")
    image, u = smooth(10, channels=1), smooth(11, amplitude=1.5)
    write_volume(tmp_path / "image.nii.gz", Volume(image[0, 0].numpy(), AFFINE))
    save_field(tmp_path / "u.nii.gz", u[0], AFFINE)
    moving = ants.image_read(str(tmp_path / "image.nii.gz"))
    theirs = ants.apply_transforms(moving, moving, [str(tmp_path / "u.nii.gz")], interpolator="linear").numpy()
    ours = warp(image, u)[0, 0].numpy()
    np.testing.assert_allclose(ours[4:-4, 4:-4, 4:-4], theirs[4:-4, 4:-4, 4:-4], atol=1e-4)
    assert np.abs(ours - image[0, 0].numpy()).max() > 0.5  # the field does something


def test_a_moving_image_may_lie_on_a_grid_of_its_own():
    """Resampling onto a finer, turned grid first and warping there, or sampling once: the same, up to interpolation."""
    world = np.array([0.02, -0.03, 0.05])

    def ramp(affine, shape):  # linear in the world, so interpolation is exact
        index = identity_grid(shape, dtype=torch.float64)[0].numpy()
        points = np.einsum("ij,jdhw->idhw", affine[:3, :3], index) + affine[:3, 3].reshape(3, 1, 1, 1)
        return np.einsum("i,idhw->dhw", world, points)

    moving_affine = np.array([[0, 0, 2.0, -40], [-1.0, 0, 0, 60], [0, 1.5, 0, -60], [0, 0, 0, 1]])
    moving = torch.from_numpy(ramp(moving_affine, (110, 100, 60)))[None, None]
    u = smooth(12)[0].numpy()
    warped = warp(moving, torch.from_numpy(onto_moving_grid(u, AFFINE, moving_affine))[None])[0, 0].numpy()
    expected = ramp(AFFINE, SHAPE) + np.einsum("i,idhw->dhw", world, to_millimetres(u, AFFINE))
    np.testing.assert_allclose(warped, expected, atol=1e-3)
    np.testing.assert_allclose(onto_moving_grid(u, AFFINE, AFFINE), u, atol=1e-4)
