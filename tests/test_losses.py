"""The losses against direct sums in float64, exact values, and finite differences."""

from pathlib import Path

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from sklearn.metrics import mutual_info_score

from dmir import filters
from dmir.errors import InputError
from dmir.losses import _pooled_lncc, diffusion, dissimilarity, lncc, mse, mutual_information

LPBA40 = Path(__file__).parents[2] / "shared" / "data" / "lpba40"


def direct_lncc(fixed: torch.Tensor, warped: torch.Tensor, window: int = 9) -> torch.Tensor:
    """Equation 5 of Balakrishnan et al. as it stands: five sums over all 729 voxels, in the type of the inputs."""
    ones = fixed.new_ones(1, 1, window, window, window)

    def box_sum(image: torch.Tensor) -> torch.Tensor:
        return F.conv3d(image, ones, padding=window // 2)

    voxels = window**3
    mean_f, mean_w = box_sum(fixed) / voxels, box_sum(warped) / voxels
    cross = box_sum(fixed * warped) - mean_w * box_sum(fixed) - mean_f * box_sum(warped) + mean_f * mean_w * voxels
    variance_f = box_sum(fixed * fixed) - 2 * mean_f * box_sum(fixed) + mean_f**2 * voxels
    variance_w = box_sum(warped * warped) - 2 * mean_w * box_sum(warped) + mean_w**2 * voxels
    return (cross**2 / (variance_f * variance_w + 1e-5)).mean()


def real_pair() -> tuple[torch.Tensor, torch.Tensor]:
    """Crops of two skull-stripped brains at their upper edge, a third of it zero background."""
    nib = pytest.importorskip("nibabel")
    crops = []
    for scan in ("S01", "S02"):
        path = LPBA40 / scan / f"{scan}.delineation.skullstripped.nii.gz"
        if not path.is_file():
            pytest.skip("needs the LPBA40 scans in ../shared/data/lpba40")
        data = np.asarray(nib.load(path).dataobj, dtype=np.float32).squeeze()
        inside = np.argwhere(data > 0)
        low, middle = inside.min(axis=0), inside.mean(axis=0).astype(int)
        crop = data[middle[0] : middle[0] + 22, max(low[1] - 8, 0) : low[1] + 18, middle[2] : middle[2] + 20]
        crops.append(torch.from_numpy(crop / data.max())[None, None])
    shape = [min(a, b) for a, b in zip(crops[0].shape[2:], crops[1].shape[2:], strict=True)]
    first, second = (c[:, :, : shape[0], : shape[1], : shape[2]] for c in crops)
    assert 0.05 < float((first == 0).float().mean()) < 0.95
    return first, second


def simulated_pair() -> tuple[torch.Tensor, torch.Tensor]:
    """Two textured balls of different size on zero background."""
    random = torch.Generator().manual_seed(0)
    axes = torch.meshgrid(*(torch.linspace(-1, 1, n) for n in (24, 20, 22)), indexing="ij")
    radius = torch.stack(axes).square().sum(dim=0).sqrt()
    images = []
    for size in (0.6, 0.7):
        texture = F.avg_pool3d(torch.rand(1, 1, 24, 20, 22, generator=random), 3, 1, 1)
        images.append((0.4 + 0.6 * texture) * (radius < size))
    return images[0], images[1]


def relative(found: torch.Tensor, truth: torch.Tensor) -> float:
    return float((found.double() - truth).abs().max().detach() / truth.abs().max().detach())


@pytest.mark.parametrize("pair", [real_pair, simulated_pair])
def test_lncc_and_its_gradient_agree_with_direct_sums(pair):
    fixed, warped = pair()
    truth_fixed, truth_warped = fixed.double().requires_grad_(), warped.double().requires_grad_()
    truth = direct_lncc(truth_fixed, truth_warped)
    truth.backward()
    fixed, warped = fixed.clone().requires_grad_(), warped.clone().requires_grad_()
    found = lncc(fixed, warped)
    found.backward()
    assert found.dtype == torch.float32
    assert relative(found, truth) < 1e-4
    assert relative(fixed.grad, truth_fixed.grad) < 1e-4
    assert relative(warped.grad, truth_warped.grad) < 1e-4


@pytest.mark.parametrize("window", [3, 7, 9])
def test_both_ways_to_lncc_and_its_gradient_agree(window):
    pairs = [torch.cat([image, image.flip(2)]) for image in simulated_pair()]  # a batch of two
    values, gradients = [], []
    for function in (lncc, _pooled_lncc):
        inputs = [image.double().requires_grad_() for image in pairs]
        values.append(function(*inputs, window))
        gradients += [torch.autograd.grad(3 * values[-1], inputs)]
    torch.testing.assert_close(*values, rtol=1e-9, atol=0)
    torch.testing.assert_close(*gradients, rtol=1e-6, atol=1e-12)


def test_lncc_has_the_same_bits_in_slabs_of_any_number_of_threads():
    fixed, warped = (F.interpolate(image, scale_factor=2.5) for image in simulated_pair())
    assert fixed.numel() > filters.WHOLE
    found, threads = [], torch.get_num_threads()
    try:
        for number in (1, 2):
            torch.set_num_threads(number)
            leaf = warped.clone().requires_grad_()
            value = lncc(fixed, leaf)
            found.append((value.detach(), *torch.autograd.grad(value, leaf)))
    finally:
        torch.set_num_threads(threads)
    assert all(torch.equal(one, other) for one, other in zip(*found, strict=True))


def test_lncc_of_other_windows_agrees_with_direct_sums():
    fixed, warped = (image.double() for image in simulated_pair())
    for window in (3, 5):
        assert float(lncc(fixed, warped, window)) == pytest.approx(float(direct_lncc(fixed, warped, window)), rel=1e-9)


@pytest.mark.parametrize("value", [0.0, 0.5, 1.0])
def test_lncc_of_constant_images_is_finite_and_so_is_its_gradient(value):
    constant = torch.full((1, 1, 16, 16, 16), value, requires_grad=True)
    textured = torch.rand(1, 1, 16, 16, 16)
    for other in (textured, torch.full((1, 1, 16, 16, 16), value)):
        constant.grad = None
        result = lncc(other, constant)
        result.backward()
        assert 0.0 <= float(result.detach()) <= 1.0
        assert torch.isfinite(constant.grad).all()


def test_lncc_does_not_change_with_contrast_and_brightness():
    fixed, warped = simulated_pair()
    fixed, warped = (F.pad(image, [5] * 6).double() for image in (fixed, warped))  # windows at the border see zeros
    value = float(lncc(fixed, warped))
    for scale, shift in ((2.0, 0.0), (-1.0, 0.0), (0.7, 0.3)):
        assert float(lncc(fixed, scale * warped + shift)) == pytest.approx(value, rel=1e-3)


def test_lncc_is_one_for_equal_and_nothing_for_unrelated_texture():
    random = torch.Generator().manual_seed(1)
    image, other = torch.rand(2, 1, 1, 20, 20, 20, generator=random) - 0.5  # zero mean, as the zeros round the image
    assert float(lncc(image, image)) == pytest.approx(1.0, abs=1e-4)
    # the squared correlation of unrelated noise in n voxels is 1 / (n - 1) on average: n = 729 inside, 125 in corners
    assert 1 / 728 < float(lncc(image, other)) < 1 / 124


def test_lncc_ignores_autocast():
    fixed, warped = simulated_pair()
    with torch.autocast("cpu", dtype=torch.bfloat16):
        inside = lncc(fixed, warped)
    assert inside == lncc(fixed, warped)


def test_gradients_agree_with_finite_differences():
    random = torch.Generator().manual_seed(2)
    fixed, warped = torch.rand(2, 1, 1, 4, 3, 4, generator=random, dtype=torch.float64)
    warped.requires_grad_()
    assert torch.autograd.gradcheck(lambda w: lncc(fixed, w, window=3), warped)
    assert torch.autograd.gradcheck(lambda w: mse(fixed, w), warped)
    assert torch.autograd.gradcheck(lambda w: mutual_information(fixed, w, bins=5), warped)
    field = torch.randn(1, 3, 4, 3, 5, generator=random, dtype=torch.float64, requires_grad=True)
    assert torch.autograd.gradcheck(lambda u: diffusion(u, (1.0, 2.0, 0.5)), field)


def test_diffusion_of_a_linear_displacement_is_the_mean_square_of_its_matrix():
    matrix = torch.tensor([[0.1, -0.2, 0.3], [0.0, 0.4, 0.05], [-0.1, 0.2, -0.3]], dtype=torch.float64)
    grid = torch.stack(torch.meshgrid(*(torch.arange(n) for n in (6, 7, 5)), indexing="ij")).double()
    field = torch.einsum("kj,jdhw->kdhw", matrix, grid)[None]
    assert float(diffusion(field)) == pytest.approx(float(matrix.square().mean()), rel=1e-12)
    spacing = torch.tensor([1.0, 2.0, 0.5], dtype=torch.float64)
    scaled = matrix * spacing[:, None] / spacing[None, :]  # millimetres per millimetre
    assert float(diffusion(field, spacing.tolist())) == pytest.approx(float(scaled.square().mean()), rel=1e-12)
    assert float(diffusion(torch.full((2, 3, 4, 4, 4), 3.0))) == 0.0


def test_mutual_information_of_distant_grey_values_is_that_of_their_counts():
    random = np.random.default_rng(0)
    first = random.integers(0, 4, size=4000)
    second = np.where(random.random(4000) < 0.6, first, random.integers(0, 4, size=4000))
    # four values ten bins apart: the Parzen windows of different values do not touch
    images = [torch.from_numpy(x / 3.0).reshape(1, 1, 10, 20, 20) for x in (first, second)]
    assert float(mutual_information(*images, bins=31)) == pytest.approx(mutual_info_score(first, second), rel=1e-6)


def test_mutual_information_does_not_care_which_grey_means_what():
    fixed, warped = simulated_pair()
    assert mutual_information(fixed, 1.0 - warped) == pytest.approx(float(mutual_information(fixed, warped)), rel=1e-4)
    constant = torch.zeros_like(fixed).requires_grad_()
    result = mutual_information(fixed, constant)
    result.backward()
    assert float(result.detach()) == pytest.approx(0.0, abs=1e-5)
    assert torch.isfinite(constant.grad).all()


@pytest.mark.parametrize("name", ["lncc", "mse", "mutual_information"])
def test_every_dissimilarity_is_smaller_for_the_better_match(name):
    fixed, other = simulated_pair()
    assert float(dissimilarity(name, fixed, fixed)) < float(dissimilarity(name, fixed, other))


def test_what_is_wrong_is_said():
    image = torch.zeros(1, 1, 4, 4, 4)
    with pytest.raises(InputError, match="Did you mean 'lncc'"):
        dissimilarity("lnc", image, image)
    with pytest.raises(InputError, match="odd"):
        lncc(image, image, window=8)
    with pytest.raises(InputError, match="two equal shapes"):
        mse(image, image[:, :, :3])
