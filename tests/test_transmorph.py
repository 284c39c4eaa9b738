"""TransMorph: its size, and its decoder against the plain way to compute the same, in float64."""

import pytest
import torch
import torch.nn.functional as F

from dmir.errors import InputError
from dmir.networks import blocks, build, transmorph, upsampling
from dmir.networks.blocks import DisplacementHead, convolve
from dmir.networks.transmorph import DecoderBlock, half_resolution, normalised_activation
from dmir.networks.upsampling import add_upsampled_convolution

SMALL = {"embedding": 8, "depths": [2, 1, 2], "heads": [1, 2, 2], "window": [2, 3, 2], "head_channels": 6}
GRIDS = [(4, 5, 3), (8, 10, 6), (7, 9, 5)]


def gradients(output: torch.Tensor, inputs: list[torch.Tensor]) -> list[torch.Tensor]:
    weights = torch.linspace(-1.0, 1.0, output.numel(), dtype=output.dtype).view_as(output)
    return list(torch.autograd.grad((output * weights).sum(), inputs))


def upsampled(coarse: torch.Tensor, shape: torch.Size) -> torch.Tensor:
    fine = F.interpolate(coarse, scale_factor=2, mode="trilinear", align_corners=False)
    return fine[:, :, : shape[0], : shape[1], : shape[2]]


@pytest.mark.parametrize(
    ("hyperparameters", "count"),
    [
        ({}, 46_771_251),
        ({"field_downsampling": 2}, 46_556_979 - 27 * 2 * 16),  # without the convolution that nothing uses
    ],
)
def test_there_are_as_many_parameters_as_were_published(hyperparameters, count):
    with torch.device("meta"):
        sizes = [
            sum(p.numel() for p in build("transmorph", shape, **hyperparameters).parameters())
            for shape in ((160, 192, 224), (17, 22, 13))
        ]
    assert sizes == [count, count]  # nothing depends on the grid


@pytest.mark.parametrize("wide", [False, True])
@pytest.mark.parametrize("slab_elements", [2**21, 1])
@pytest.mark.parametrize("shape", GRIDS)
def test_upsampling_is_never_made_and_makes_no_difference(monkeypatch, shape, slab_elements, wide):
    monkeypatch.setattr(upsampling, "SLAB_ELEMENTS", slab_elements)
    monkeypatch.setattr(upsampling, "_is_wide", lambda slab: wide)
    torch.manual_seed(0)
    coarse = torch.randn(2, 3, *(-(-n // 2) for n in shape), dtype=torch.float64, requires_grad=True)
    onto = torch.randn(2, 4, *shape, dtype=torch.float64, requires_grad=True)
    weight = torch.randn(4, 3, 3, 3, 3, dtype=torch.float64, requires_grad=True)
    found = add_upsampled_convolution(1.0 * onto, coarse, weight)
    plain = onto + F.conv3d(upsampled(coarse, onto.shape[2:]), weight, padding=1)
    torch.testing.assert_close(found, plain, rtol=0, atol=1e-10)
    inputs = [onto, coarse, weight]
    for one, other in zip(gradients(found, inputs), gradients(plain, inputs), strict=True):
        torch.testing.assert_close(one, other, rtol=1e-10, atol=1e-10)


@pytest.mark.parametrize("cached_elements", [2**18, 1])
def test_normalisation_and_activation_in_place_are_the_plain_ones(monkeypatch, cached_elements):
    monkeypatch.setattr(transmorph, "CACHED_ELEMENTS", cached_elements)
    torch.manual_seed(0)
    volume = 3 * torch.randn(2, 4, 5, 6, 3, dtype=torch.float64, requires_grad=True) + 7
    found, plain = normalised_activation(1.0 * volume), F.leaky_relu(F.instance_norm(volume), 0.01)
    torch.testing.assert_close(found, plain)
    torch.testing.assert_close(gradients(found, [volume])[0], gradients(plain, [volume])[0])
    single = normalised_activation(torch.randn(1, 4, 1, 1, 1))  # torch's own refuses a single voxel
    assert not single.any()


@pytest.mark.parametrize("small", [True, False])
@pytest.mark.parametrize(("batch", "before", "after"), [(1, 3, 4), (1, 5, 3), (2, 5, 3)])
@pytest.mark.parametrize("shape", GRIDS)
def test_our_convolution_is_torchs(monkeypatch, shape, batch, before, after, small):
    monkeypatch.setattr(blocks, "SMALL_VOLUME", blocks.SMALL_VOLUME if small else 0)
    torch.manual_seed(0)
    sizes = (batch, before, *shape), (after, before, 3, 3, 3), (after,)
    leaves = [torch.randn(size, requires_grad=True) for size in sizes]
    for inputs in (leaves[:2], leaves):
        found, plain = convolve(*inputs), F.conv3d(*inputs, padding=1)
        assert found.is_contiguous(memory_format=torch.channels_last_3d)
        assert not found._is_view()
        torch.testing.assert_close(found, plain, rtol=1e-5, atol=1e-5)
        for one, other in zip(gradients(found, inputs), gradients(plain, inputs), strict=True):
            torch.testing.assert_close(one, other, rtol=1e-4, atol=1e-4)
    wide = [leaf.double() for leaf in leaves]
    torch.testing.assert_close(convolve(*wide), F.conv3d(*wide, padding=1))


@pytest.mark.parametrize("shape", GRIDS)
def test_a_decoder_block_is_upsampling_concatenation_and_two_normalised_convolutions(shape):
    torch.manual_seed(0)
    block = DecoderBlock(6, 3, 4).double()
    coarse = torch.randn(2, 6, *(-(-n // 2) for n in shape), dtype=torch.float64)
    fine = torch.randn(2, 3, *shape, dtype=torch.float64)
    plain = torch.cat([upsampled(coarse, fine.shape[2:]), fine], dim=1)
    for convolution in (block.joining, block.second.convolution):
        plain = F.leaky_relu(F.instance_norm(convolution(plain)), 0.01)
    torch.testing.assert_close(block(coarse, fine), plain)


def test_the_inputs_of_a_decoder_block_are_left_alone():
    block = DecoderBlock(6, 3, 4)
    coarse, fine = torch.randn(1, 6, 2, 3, 2), torch.randn(1, 3, 4, 5, 3)
    before = coarse.clone(), fine.clone()
    block(coarse, fine)
    assert torch.equal(coarse, before[0])
    assert torch.equal(fine, before[1])


def test_a_field_of_half_resolution_is_upsampled_and_not_scaled():
    torch.manual_seed(0)
    network = build("transmorph", (16, 16, 16), field_downsampling=2, **SMALL).eval()
    torch.nn.init.zeros_(network.head.weight)
    with torch.no_grad():
        network.head.bias.copy_(torch.tensor([1.0, 2.0, 3.0]))
    field = network(*torch.rand(2, 1, 1, 13, 16, 9))
    assert field.shape == (1, 3, 13, 16, 9)
    torch.testing.assert_close(field, torch.tensor([1.0, 2.0, 3.0]).view(1, 3, 1, 1, 1).expand_as(field))


def test_the_half_resolution_is_the_published_average():
    volume = torch.arange(5.0 * 4 * 3).view(1, 1, 5, 4, 3)
    found = half_resolution(volume)
    assert found.shape == (1, 1, 3, 2, 2)
    assert float(found[0, 0, 1, 1, 0]) == pytest.approx(float(volume[0, 0, 1:4, 1:4, 0:2].sum()) / 27)


def test_every_parameter_learns():
    torch.manual_seed(0)
    for field_downsampling in (1, 2):
        network = build("transmorph", (16, 16, 16), field_downsampling=field_downsampling, drop_path=0.0, **SMALL)
        assert isinstance(network.head, DisplacementHead)
        network(*torch.rand(2, 1, 1, 16, 20, 36)).square().sum().backward()
        assert [name for name, p in network.named_parameters() if p.grad is None or not p.grad.any()] == []


@pytest.mark.parametrize(
    "wrong",
    [
        {"depths": [1, 1]},
        {"heads": [1, 3, 2]},
        {"window": [2, 2]},
        {"embedding": 0},
        {"head_channels": 0},
        {"field_downsampling": 4},
        {"drop_path": 1.0},
        {"mlp_ratio": 0.0},
    ],
)
def test_hyperparameters_that_make_no_network_are_refused(wrong):
    with pytest.raises(InputError):
        build("transmorph", (16, 16, 16), **{**SMALL, **wrong})
