"""XMorpher: its published size, and its blocks against the definition, window by window, in float64."""

import itertools
import math

import pytest
import torch
import torch.nn.functional as F
from torch import nn

from dmir.errors import InputError
from dmir.networks import attention, build
from dmir.networks.fusion import BlockSettings, CrossAttentionBlock, exchange
from dmir.networks.xmorpher import TokensToDisplacement

SMALL = {"channels": [8, 16, 16], "depths": [1, 2, 1], "heads": [1, 2, 2], "head_channels": 6}
GRIDS = [(4, 6, 8), (5, 3, 7), (1, 2, 9)]
MISSING = 20  # of the 27 windows in raster order


def small(shape=(16, 16, 16), **changes):
    torch.manual_seed(0)
    return build("xmorpher", shape, **{**SMALL, **changes})


def images(*shape, batch=1):
    random = torch.Generator().manual_seed(1)
    return torch.rand(2 * batch, 1, *shape, generator=random).chunk(2)


def block_of(mask_padding: bool, missing_neighbour: bool) -> CrossAttentionBlock:
    torch.manual_seed(0)
    settings = BlockSettings(
        mask_padding=mask_padding, missing_neighbour=missing_neighbour, key_bias=True, normalise_context=False
    )
    block = CrossAttentionBlock(6, 2, None, settings, drop_path=0.0).double()
    for parameter in block.parameters():
        nn.init.normal_(parameter, std=0.5)
    return block


def plain_attention(module, tokens: torch.Tensor, context: torch.Tensor) -> torch.Tensor:
    """Attention as published: 27 windows of 2x2x2 side by side, projected, and an explicit softmax."""
    shape = tokens.shape[1:4]
    padding = [0, 0] + [n for size in reversed(shape) for n in (2, 2 + size % 2)]
    padded = F.pad(context, padding)
    real = F.pad(torch.ones_like(context[..., :1]), padding)[..., 0] > 0
    answer = torch.zeros_like(tokens)
    for start in itertools.product(*(range(0, size, 2) for size in shape)):
        gathered, seen = [], []
        for index, neighbour in enumerate(itertools.product((0, 2, 4), repeat=3)):  # raster order
            window = tuple(slice(s + n, s + n + 2) for s, n in zip(start, neighbour, strict=True))
            absent = module.missing_neighbour and index == MISSING
            part, there = padded[:, *window].flatten(1, 3), real[:, *window].flatten(1)
            gathered.append(torch.zeros_like(part) if absent else part)
            seen.append(there & (not absent))
        search, inside = torch.cat(gathered, dim=1), torch.cat(seen, dim=1)
        assert search.shape[1] == 216
        base = tuple(slice(s, min(s + 2, size)) for s, size in zip(start, shape, strict=True))
        query, key, value = module.query(tokens[:, *base].flatten(1, 3)), module.key(search), module.value(search)
        query, key, value = (x.unflatten(2, (module.heads, -1)).transpose(1, 2) for x in (query, key, value))
        scores = query @ key.mT / math.sqrt(query.shape[-1])
        if module.mask_padding:
            scores = scores.masked_fill(~inside[:, None, None], -math.inf)
        result = module.output((scores.softmax(dim=-1) @ value).transpose(1, 2).flatten(2))
        answer[:, *base] = result.reshape(answer[:, *base].shape)
    return answer


def plain_block(block: CrossAttentionBlock, tokens: torch.Tensor, other: torch.Tensor) -> torch.Tensor:
    fusion = block.feature_fusion
    tokens = tokens + plain_attention(fusion.attention, fusion.norm(tokens), other)
    perceptron = block.perceptron
    return tokens + perceptron.narrow(F.gelu(perceptron.widen(block.norm(tokens))))


def test_it_has_the_published_parameters_less_those_that_nothing_calls():
    with torch.device("meta"):
        network = build("xmorpher", (160, 192, 224))
    assert sum(p.numel() for p in network.parameters()) == 15_093_891 - (768 * 384 + 384)
    blocks = [block for level in (*network.encoder, *network.decoder) for block in level.blocks]
    assert len(blocks) == 24
    for block in blocks:
        width = block.norm.weight.numel()
        assert sum(p.numel() for p in block.parameters()) == 12 * width**2 + 13 * width


@pytest.mark.parametrize("slab_elements", [2**24, 1])
@pytest.mark.parametrize("missing_neighbour", [False, True])
@pytest.mark.parametrize("mask_padding", [True, False])
@pytest.mark.parametrize("grid", GRIDS)
def test_a_block_is_what_was_published_in_both_directions(
    monkeypatch, grid, mask_padding, missing_neighbour, slab_elements
):
    monkeypatch.setattr(attention, "SLAB_ELEMENTS", slab_elements)
    block = block_of(mask_padding, missing_neighbour)
    moving, fixed = torch.randn(2, 2, *grid, 6, dtype=torch.float64).requires_grad_()
    found = block(torch.cat([moving, fixed]))
    plain = torch.cat([plain_block(block, moving, fixed), plain_block(block, fixed, moving)])
    torch.testing.assert_close(found, plain, rtol=1e-6, atol=1e-9)
    weights = torch.linspace(-1.0, 1.0, plain.numel(), dtype=torch.float64).view_as(plain)
    inputs = [moving, fixed, *block.parameters()]
    for one, truth in zip(
        torch.autograd.grad((found * weights).sum(), inputs),
        torch.autograd.grad((plain * weights).sum(), inputs),
        strict=True,
    ):
        torch.testing.assert_close(one, truth, rtol=1e-6, atol=1e-8)


def test_exchanging_the_images_exchanges_all_tokens():
    network = small(drop_path=0.0).double()
    tokens = torch.randn(4, 5, 6, 3, 8, dtype=torch.float64)
    encoded, swapped = network._encode(tokens), network._encode(exchange(tokens))
    for one, other in zip(encoded, swapped, strict=True):
        torch.testing.assert_close(other, exchange(one))
    torch.testing.assert_close(network._decode(swapped), exchange(network._decode(encoded)))


def test_the_neighbour_that_the_published_code_leaves_out_is_not_seen():
    block = block_of(mask_padding=False, missing_neighbour=True)
    tokens, context = torch.randn(2, 1, 12, 12, 12, 6, dtype=torch.float64)
    module = block.feature_fusion.attention
    before = module(tokens, context)[0]
    changed = context.clone()
    changed[:, 5, 6, 7] += 1.0  # in window (2, 3, 3): it is the missing neighbour of window (1, 4, 2)
    seen = (module(tokens, changed)[0] - before).abs().amax(dim=-1)[0] > 0
    expected = torch.zeros_like(seen)
    expected[2:8, 4:10, 4:10] = True
    expected[2:4, 8:10, 4:6] = False
    assert torch.equal(seen, expected)


def test_displacements_are_a_transposed_convolution_and_a_convolution():
    torch.manual_seed(0)
    head = TokensToDisplacement(6, 5).double()
    for parameter in head.parameters():
        nn.init.normal_(parameter)
    tokens = torch.randn(2, 3, 1, 2, 6, dtype=torch.float64)
    plain = head.head(head.expansion(head.norm(tokens).movedim(-1, 1)))
    torch.testing.assert_close(head(tokens), plain)


@pytest.mark.parametrize("missing_neighbour", [False, True])
@pytest.mark.parametrize("mask_padding", [False, True])
def test_every_parameter_learns_and_a_batch_is_its_pairs(mask_padding, missing_neighbour):
    network = small(mask_padding=mask_padding, missing_neighbour=missing_neighbour, drop_path=0.0)
    for parameter in network.to_displacement.head.parameters():
        nn.init.normal_(parameter, std=0.2)
    moving, fixed = images(18, 20, 13, batch=2)
    displacement = network(moving, fixed)
    for index in range(2):
        alone = network(moving[index : index + 1], fixed[index : index + 1])
        torch.testing.assert_close(displacement[index : index + 1], alone, rtol=1e-4, atol=1e-5)
    displacement.square().sum().backward()
    idle = [name for name, p in network.named_parameters() if p.grad is None or not p.grad.any()]
    assert idle == []


@pytest.mark.parametrize(
    ("wrong", "message"),
    [
        ({"depths": [1, 1]}, "one number a level"),
        ({"heads": [1, 3, 2]}, "divisor"),
        ({"channels": []}, "positive"),
        ({"head_channels": 0}, "positive"),
        ({"drop_path": 1.0}, "below 1"),
        ({"window": [1, 2]}, "three positive"),
        ({"missing_neighbour": True, "search_factor": [3, 3, 5]}, "27"),
    ],
)
def test_hyperparameters_that_make_no_network_are_refused(wrong, message):
    with pytest.raises(InputError, match=message):
        small(**wrong)
