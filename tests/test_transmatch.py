"""TransMatch: its size, its symmetry, and its last layers against the plain way to compute the same."""

from itertools import pairwise

import pytest
import torch
import torch.nn.functional as F

from dmir.errors import InputError
from dmir.networks import build
from dmir.networks.fusion import exchange

SMALL = {"embedding": 8, "depths": [2, 1, 2], "heads": [1, 2, 2], "window": [2, 3, 2], "cross_heads": 2}


def test_there_are_as_many_parameters_as_act_in_the_published_code():
    with torch.device("meta"):
        network = build("transmatch", (160, 192, 160))
    count = {name: sum(p.numel() for p in part.parameters()) for name, part in network.named_children()}
    widths, biases = (96, 192, 384, 768), 9 * 11 * 9 * 4
    assert count["encoder"] == 25_549_728
    assert count["matching"] == sum(2 * (12 * width**2 + 11 * width + biases) for width in widths)
    convolutions = sum(27 * (coarse + 2 * fine + fine) * fine for fine, coarse in pairwise(widths))
    assert count["decoder"] == convolutions
    assert count["half_skip"] + count["to_half"] == 27 * (2 + 96 + 48 + 48) * 48
    assert count["head"] == 3891
    assert sum(count.values()) == 70_793_235


def test_exchanging_the_images_exchanges_all_that_becomes_of_them():
    torch.manual_seed(0)
    network = build("transmatch", (16, 16, 16), drop_path=0.0, **SMALL).double()
    images = torch.rand(4, 1, 13, 16, 18, dtype=torch.float64)
    for encode in (network.encoder, network.matched):
        for tokens, swapped in zip(encode(images), encode(exchange(images)), strict=True):
            torch.testing.assert_close(swapped, exchange(tokens))
    moving, fixed = images.chunk(2)
    difference = network(moving, fixed) - network(fixed, moving)
    assert float(difference.detach().abs().max()) > 0  # but the decoder tells them apart


def test_images_meet_in_the_matching_only():
    torch.manual_seed(0)
    network = build("transmatch", (16, 16, 16), drop_path=0.0, **SMALL).double()
    images = torch.rand(2, 1, 16, 16, 16, dtype=torch.float64)
    changed = images.clone()
    changed[0] += torch.rand(1, 16, 16, 16)
    for before, after in zip(network.encoder(images), network.encoder(changed), strict=True):
        assert torch.equal(before[1], after[1])
    for before, after in zip(network.matched(images), network.matched(changed), strict=True):
        assert float((before - after).detach()[1].abs().max()) > 1e-6


@pytest.mark.parametrize("shape", [(8, 10, 6), (7, 9, 5)])
def test_the_displacement_is_the_head_of_the_upsampled_volume(shape):
    torch.manual_seed(0)
    network = build("transmatch", (16, 16, 16), **SMALL).double()
    for parameter in network.head.parameters():
        torch.nn.init.normal_(parameter)
    pair = torch.rand(2, 2, *shape, dtype=torch.float64)
    volume = torch.randn(2, 4, *(-(-n // 2) for n in shape), dtype=torch.float64, requires_grad=True)
    fine = F.interpolate(volume, scale_factor=2, mode="trilinear", align_corners=False)
    plain = network.head(fine[:, :, : shape[0], : shape[1], : shape[2]])
    found = network._full_resolution(volume, pair)
    torch.testing.assert_close(found, plain, rtol=0, atol=1e-10)
    inputs = [volume, *network.head.parameters()]
    for one, other in zip(
        torch.autograd.grad(found.square().sum(), inputs),
        torch.autograd.grad(plain.square().sum(), inputs),
        strict=True,
    ):
        torch.testing.assert_close(one, other)


def test_every_parameter_learns():
    torch.manual_seed(0)
    network = build("transmatch", (16, 16, 16), drop_path=0.0, **SMALL)
    network(*torch.rand(2, 2, 1, 16, 20, 36)).square().sum().backward()
    assert [name for name, p in network.named_parameters() if p.grad is None or not p.grad.any()] == []


@pytest.mark.parametrize("wrong", [{"cross_heads": 3}, {"cross_heads": 0}, {"depths": []}, {"window": [2, 2, 0]}])
def test_hyperparameters_that_make_no_network_are_refused(wrong):
    with pytest.raises(InputError):
        build("transmatch", (16, 16, 16), **{**SMALL, **wrong})
