"""Windowed cross attention against its definition, window by window, in float64."""

import itertools
import math

import pytest
import torch
import torch.nn.functional as F

from dmir.errors import InputError
from dmir.networks import attention
from dmir.networks.attention import (
    WindowMultiheadCrossAttention,
    merge_windows,
    search_margin,
    slabs,
    window_area_division,
    window_division,
)

CASES = [
    # grid, base window, search factor
    ((8, 8, 8), (2, 2, 2), (3, 3, 3)),  # whole tiles
    ((5, 7, 6), (2, 2, 2), (3, 3, 3)),  # windows that the border cuts
    ((3, 2, 9), (2, 2, 2), (3, 3, 3)),  # an axis of a single window
    ((5, 6, 7), (1, 2, 3), (5, 3, 1)),  # different on each axis
    ((6, 5, 4), (2, 4, 2), (2, 2, 2)),  # an even factor
    ((7, 6, 5), (5, 6, 5), (3, 1, 1)),  # windows larger than a tile
    ((1, 1, 1), (1, 1, 1), (3, 3, 3)),  # one token
]


def naive(module: WindowMultiheadCrossAttention, tokens: torch.Tensor, context: torch.Tensor) -> torch.Tensor:
    """W-MCA as defined: each base window gathers its search window, projects it, and takes an explicit softmax."""
    shape, window, margin = tokens.shape[1:4], module.window, module.margin
    padding = [0, 0]
    for n, w, m in zip(reversed(shape), reversed(window), reversed(margin), strict=True):
        padding += [m, m + -n % w]
    padded = F.pad(context, padding)
    real = F.pad(torch.ones_like(context[..., :1]), padding)[..., 0] > 0
    answer = torch.zeros_like(tokens)
    for start in itertools.product(*(range(0, n, w) for n, w in zip(shape, window, strict=True))):
        base = tuple(slice(s, min(s + w, n)) for s, w, n in zip(start, window, shape, strict=True))
        search = tuple(slice(s, s + w + 2 * m) for s, w, m in zip(start, window, margin, strict=True))
        query = module.query(tokens[:, *base].flatten(1, 3))
        gathered = padded[:, *search].flatten(1, 3)
        key, value = module.key(gathered), module.value(gathered)
        query, key, value = (x.unflatten(2, (module.heads, -1)).transpose(1, 2) for x in (query, key, value))
        scores = query @ key.transpose(2, 3) / math.sqrt(query.shape[-1])
        if module.mask_padding:
            scores = scores.masked_fill(~real[:, *search].flatten(1)[:, None, None], -math.inf)
        result = module.output((scores.softmax(dim=-1) @ value).transpose(1, 2).flatten(2))
        answer[:, *base] = result.reshape(answer[:, *base].shape)
    return answer


def gradients(output: torch.Tensor, inputs: list[torch.Tensor]) -> list[torch.Tensor]:
    weights = torch.linspace(-1.0, 1.0, output.numel(), dtype=output.dtype).view_as(output)
    return list(torch.autograd.grad((output * weights).sum(), inputs, allow_unused=True))


@pytest.mark.parametrize("slab_elements", [2**24, 1])
@pytest.mark.parametrize("mask_padding", [True, False])
@pytest.mark.parametrize(("grid", "window", "search_factor"), CASES)
def test_values_and_gradients_agree_with_the_definition(
    monkeypatch, grid, window, search_factor, mask_padding, slab_elements
):
    monkeypatch.setattr(attention, "SLAB_ELEMENTS", slab_elements)
    torch.manual_seed(0)
    module = WindowMultiheadCrossAttention(6, 2, window, search_factor, mask_padding).double()
    tokens, context, other = (2 * torch.randn(2, *grid, 6, dtype=torch.float64) for _ in range(3))
    inputs = [x.requires_grad_() for x in (tokens, context, *module.parameters())]
    found = module(tokens, context, other)
    for answer, looked_at in zip(found, (context, other), strict=True):
        torch.testing.assert_close(answer, naive(module, tokens, looked_at), rtol=1e-6, atol=1e-9)
    for one, truth in zip(gradients(found[0], inputs), gradients(naive(module, tokens, context), inputs), strict=True):
        torch.testing.assert_close(one, truth, rtol=1e-6, atol=1e-9)


def test_padding_draws_no_weight_unless_asked_to():
    torch.manual_seed(0)
    constant = torch.full((1, 5, 4, 3, 8), 0.7)
    tokens = torch.randn(1, 5, 4, 3, 8)
    module = WindowMultiheadCrossAttention(8, 2)
    everywhere = module.output(module.value(constant))  # any weights that add up to 1 give this
    torch.testing.assert_close(module(tokens, constant)[0], everywhere)
    module = WindowMultiheadCrossAttention(8, 2, mask_padding=False)
    everywhere = module.output(module.value(constant))
    assert (module(tokens, constant)[0] - everywhere).abs().amax(dim=-1).min() > 1e-3  # this grid is all border


def test_nothing_beyond_the_search_window_is_seen():
    torch.manual_seed(0)
    module = WindowMultiheadCrossAttention(4, 1).double()
    tokens, context = torch.randn(2, 1, 12, 10, 8, 4, dtype=torch.float64)
    before = module(tokens, context)[0]
    changed = context.clone()
    changed[:, 7, 5, 2] += 1.0  # in base window (3, 2, 1): seen by windows 2 to 4, 1 to 3, 0 to 2
    seen = (module(tokens, changed)[0] - before).abs().amax(dim=-1)[0] > 0
    expected = torch.zeros_like(seen)
    expected[4:10, 2:8, 0:6] = True
    assert torch.equal(seen, expected)


def test_areas_are_the_windows_with_their_surroundings():
    tokens = torch.arange(2 * 12 * 6 * 4 * 3, dtype=torch.float64).view(2, 12, 6, 4, 3)
    size, margin = (4, 3, 2), (2, 3, 1)
    padded = F.pad(tokens, [0, 0, 1, 1, 3, 3, 2, 2])
    areas = window_area_division(padded, size, margin)
    starts = itertools.product(range(0, 12, 4), range(0, 6, 3), range(0, 4, 2))
    for area, (d, h, w) in zip(areas, starts, strict=True):
        assert torch.equal(area, padded[:, d : d + 8, h : h + 9, w : w + 4].flatten(1, 3))
    assert torch.equal(merge_windows(window_division(tokens, size), size, (12, 6, 4)), tokens)
    pieces = torch.cat([window_area_division(slab, size, margin) for slab in slabs(padded, 8, 4)])
    assert torch.equal(pieces, areas)


@pytest.mark.parametrize("step", [2, 4, 8])
def test_the_gradient_of_areas_agrees_with_finite_differences(step):
    tokens = torch.randn(1, 8, 5, 7, 1, dtype=torch.float64, requires_grad=True)
    weights = torch.randn(3, 1, 4 * 5 * 7, 1, dtype=torch.float64)

    def areas(tokens: torch.Tensor) -> torch.Tensor:
        cut = torch.cat([window_area_division(slab, (2, 1, 1), (1, 2, 3)) for slab in slabs(tokens, step, 2)])
        return (cut * weights).sum(dim=(1, 2, 3))

    assert torch.autograd.gradcheck(areas, tokens)


def test_bfloat16_is_close_and_finite():
    torch.manual_seed(0)
    module = WindowMultiheadCrossAttention(16, 2)
    tokens, context = torch.randn(2, 1, 5, 6, 7, 16, requires_grad=True)
    exact = module(tokens, context)[0]
    with torch.autocast("cpu", dtype=torch.bfloat16):
        rough = module(tokens, context)[0]
    torch.testing.assert_close(rough.float(), exact, rtol=0.05, atol=0.02)
    gradient = torch.autograd.grad(rough.float().square().sum(), tokens)[0]
    assert torch.isfinite(gradient).all()


def test_what_makes_no_window_is_refused():
    assert search_margin((2, 2, 4), (3, 2, 5)) == (2, 1, 8)
    with pytest.raises(InputError, match="centred"):
        search_margin((1, 2, 2), (2, 3, 3))
    with pytest.raises(InputError, match="three positive"):
        search_margin((2, 2), (3, 3, 3))
    with pytest.raises(InputError, match="divisor"):
        WindowMultiheadCrossAttention(10, 3)
