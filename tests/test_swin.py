"""The Swin transformer against its definition, window by window, in float64."""

import itertools
import math

import pytest
import torch

from dmir.errors import InputError
from dmir.networks import window_attention
from dmir.networks.fusion import exchange
from dmir.networks.swin import (
    CornerMerging,
    SwinBlock,
    SwinEncoder,
    SwinSettings,
    SwinStage,
    WindowAttention,
    relative_position_index,
)
from dmir.networks.window_layout import window_layout

CASES = [
    # grid, window
    ((4, 6, 8), (2, 3, 4)),  # whole windows
    ((5, 7, 6), (2, 3, 4)),  # windows that the border cuts
    ((3, 4, 9), (5, 4, 3)),  # an axis smaller than the window, one as large
    ((5, 4, 7), (4, 1, 4)),  # padding that the shift moves into the last but one window; an axis without shift
    ((1, 1, 1), (2, 3, 2)),  # one token
]


def offsets_bias(module: WindowAttention, query: torch.Tensor, key: torch.Tensor) -> torch.Tensor:
    """Bias of two positions, (N, 3) and (M, 3): the row of the table in raster order of query - key."""
    row = torch.zeros(len(query), len(key), dtype=torch.long)
    for axis, edge in enumerate(module.window):
        row = row * (2 * edge - 1) + query[:, None, axis] - key[None, :, axis] + edge - 1
    return module.position_bias[row].movedim(-1, 0)


def naive(module: WindowAttention, tokens: torch.Tensor, context: torch.Tensor) -> torch.Tensor:
    """Attention as defined: a window is a set of positions of the padded grid that a cyclic shift brings together.

    Positions on different sides of the shift's cut do not see each other, and none sees padding if that is masked.
    """
    grid, window, shift = tokens.shape[1:4], module.window, module.shift
    padded = [math.ceil(n / w) * w for n, w in zip(grid, window, strict=True)]
    answer = torch.zeros_like(tokens)
    for start in itertools.product(*(range(0, p, w) for p, w in zip(padded, window, strict=True))):
        axes = [
            [(s + i + move) % p for i in range(w)] for s, w, move, p in zip(start, window, shift, padded, strict=True)
        ]
        positions = torch.tensor(list(itertools.product(*axes)))
        within = torch.tensor(list(itertools.product(*(range(w) for w in window))))
        inside = (positions < torch.tensor(grid)).all(dim=1)
        wrapped = positions < torch.tensor(shift)
        where = positions[inside].unbind(dim=1)
        query = module.query(tokens[:, *where])
        gathered = context.new_zeros(len(context), len(positions), context.shape[-1])
        gathered[:, inside] = context[:, *where]
        key, value = module.key_value(gathered).chunk(2, dim=-1)
        query, key, value = (x.unflatten(2, (module.heads, -1)).transpose(1, 2) for x in (query, key, value))
        scores = query @ key.mT / math.sqrt(query.shape[-1]) + offsets_bias(module, within[inside], within)
        apart = (wrapped[inside][:, None] != wrapped).any(dim=-1)
        if module.mask_padding:
            apart = apart | ~inside
        scores = scores.masked_fill(apart, -math.inf)
        answer[:, *where] = module.output((scores.softmax(dim=-1) @ value).transpose(1, 2).flatten(2))
    return answer


def attention(window: tuple[int, ...], shifted: bool, **changes: object) -> WindowAttention:
    torch.manual_seed(0)
    module = WindowAttention(6, 2, SwinSettings(window, **changes), shifted).double()
    with torch.no_grad():
        module.position_bias.normal_()
    return module


def gradients(output: torch.Tensor, inputs: list[torch.Tensor]) -> list[torch.Tensor]:
    weights = torch.linspace(-1.0, 1.0, output.numel(), dtype=output.dtype).view_as(output)
    return list(torch.autograd.grad((output * weights).sum(), inputs))


@pytest.mark.parametrize("scores_at_a_time", [2**20, 1])
@pytest.mark.parametrize("mask_padding", [True, False])
@pytest.mark.parametrize("shifted", [False, True])
@pytest.mark.parametrize(("grid", "window"), CASES)
def test_values_and_gradients_agree_with_the_definition(
    monkeypatch, grid, window, shifted, mask_padding, scores_at_a_time
):
    monkeypatch.setattr(window_attention, "SCORES_AT_A_TIME", scores_at_a_time)
    module = attention(window, shifted, mask_padding=mask_padding, query_bias=True, key_value_bias=True)
    tokens, context = (torch.randn(2, *grid, 6, dtype=torch.float64) for _ in range(2))
    inputs = [x.requires_grad_() for x in (tokens, context, *module.parameters())]
    found, truth = module(tokens, context), naive(module, tokens, context)
    torch.testing.assert_close(found, truth, rtol=1e-6, atol=1e-9)
    for one, other in zip(gradients(found, inputs), gradients(truth, inputs), strict=True):
        torch.testing.assert_close(one, other, rtol=1e-6, atol=1e-9)
    with torch.inference_mode():
        torch.testing.assert_close(module(tokens), naive(module, tokens, tokens), rtol=1e-6, atol=1e-9)


def test_a_layout_first_made_in_inference_mode_serves_training():
    window_layout.cache_clear()
    window_attention._row_of_offset.cache_clear()
    module = attention((2, 3, 2), True)
    tokens = torch.randn(1, 5, 5, 5, 6, dtype=torch.float64)
    with torch.inference_mode():
        module(tokens)
    module(tokens).sum().backward()
    assert module.position_bias.grad is not None


def test_the_bias_depends_on_the_offset_only():
    window = (2, 3, 4)
    index = relative_position_index(window)
    positions = list(itertools.product(*(range(n) for n in window)))
    rows: dict[tuple[int, ...], set[int]] = {}
    for (i, query), (j, key) in itertools.product(enumerate(positions), repeat=2):
        rows.setdefault(tuple(q - k for q, k in zip(query, key, strict=True)), set()).add(int(index[i, j]))
    assert all(len(found) == 1 for found in rows.values())
    assert [found.pop() for _, found in sorted(rows.items())] == list(range(3 * 5 * 7))  # every row, in raster order


def test_shifted_windows_do_not_mix_what_the_shift_brought_round_the_border():
    module = attention((4, 4, 4), True)
    tokens = torch.randn(1, 8, 8, 8, 6, dtype=torch.float64)
    changed = tokens.clone()
    changed[:, 0, 3, 3] += 1.0  # on the first axis alone in front of the first cut, at 2; windows 2 to 5 on the others
    seen = (module(changed) - module(tokens)).abs().amax(dim=-1)[0] > 0
    expected = torch.zeros_like(seen)
    expected[0:2, 2:6, 2:6] = True
    assert torch.equal(seen, expected)


@pytest.mark.parametrize("shifted", [False, True])
def test_padding_draws_no_weight_unless_asked_to(shifted):
    constant = torch.full((1, 5, 4, 3, 6), 0.7, dtype=torch.float64)
    module = attention((4, 3, 2), shifted)
    everywhere = module.output(module.key_value(constant).chunk(2, dim=-1)[1])  # any weights that add up to 1 give this
    torch.testing.assert_close(module(constant), everywhere)
    module = attention((4, 3, 2), shifted, mask_padding=False)
    assert float((module(constant) - everywhere).detach().abs().max()) > 1e-3


def test_windows_larger_than_the_grid_cost_no_more_than_the_grid():
    layout = window_layout((3, 8, 4), (5, 4, 7), (2, 2, 3), True, torch.device("cpu"), torch.float32)
    assert layout.window == (3, 4, 4)
    assert layout.padded == (3, 8, 4)
    assert layout.roll == (0, 2, 0)
    assert sum(layout.counts) == 2


def test_one_mask_serves_all_windows_alike():
    layout = window_layout((40, 48, 56), (5, 6, 7), (2, 3, 3), True, torch.device("cpu"), torch.float32)
    assert sum(layout.counts) == 512
    assert len(layout.masks) == 8  # in the middle or last, on each axis
    assert sum(mask is None for mask in layout.masks) == 1
    assert layout.counts[[mask is None for mask in layout.masks].index(True)] == 343


def test_cubes_are_merged_in_the_published_order():
    tokens = torch.arange(2.0 * 4 * 2).view(1, 2, 4, 2, 1)
    merging = CornerMerging(1)
    found = []
    merging.norm.register_forward_pre_hook(lambda module, inputs: found.append(inputs[0]))
    assert merging(tokens).shape == (1, 1, 2, 1, 2)
    d, h, w = 8, 2, 1  # steps along the axes
    assert found[0][0, 0, 1, 0].tolist() == [4 + n for n in (0, d, h, w, d + h, h + w, d + w, d + h + w)]


def test_exchanging_the_images_exchanges_what_cross_attention_gives():
    torch.manual_seed(0)
    stage = SwinStage(8, 2, SwinSettings((2, 3, 2), query_bias=True), (0.0, 0.0), cross=True).double()
    tokens = torch.randn(4, 5, 6, 4, 8, dtype=torch.float64)
    found = stage(tokens)
    torch.testing.assert_close(stage(exchange(tokens)), exchange(found))
    changed = tokens.clone()
    changed[0] += torch.randn(5, 6, 4, 8)
    moved = (stage(changed) - found).detach().abs().amax(dim=(1, 2, 3, 4))
    assert moved[0] > 1e-3 and moved[2] > 1e-3  # the image itself, and the other one of its pair
    assert moved[1] == moved[3] == 0.0


def test_levels_halve_the_grid_and_double_the_channels():
    encoder = SwinEncoder(1, 8, (1, 2, 1), (1, 2, 2), 0.3, SwinSettings((2, 3, 2)))
    shapes = [tuple(tokens.shape) for tokens in encoder(torch.rand(2, 1, 17, 22, 13))]
    assert shapes == [(2, 5, 6, 4, 8), (2, 3, 3, 2, 16), (2, 2, 2, 1, 32)]
    rates = [block.drop_path for stage in encoder.stages for block in stage.blocks]
    assert rates == pytest.approx([0.0, 0.1, 0.2, 0.3])
    assert [block.attention.shift for block in encoder.stages[1].blocks] == [(0, 0, 0), (1, 1, 1)]


def test_drop_path_drops_whole_images():
    torch.manual_seed(0)
    block = SwinBlock(8, 2, SwinSettings((2, 2, 2)), shifted=False, drop_path=0.5).train()
    update = torch.ones(16, 1, 1, 1, 1)
    assert set(block._dropped(update).flatten().tolist()) == {0.0, 2.0}
    assert block.eval()._dropped(update) is update


def test_bfloat16_is_close_and_finite():
    module = attention((2, 3, 2), True).float()
    tokens = torch.randn(1, 5, 6, 7, 6, requires_grad=True)
    exact = module(tokens)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        rough = module(tokens)
    torch.testing.assert_close(rough.float(), exact, rtol=0.05, atol=0.02)
    assert torch.isfinite(torch.autograd.grad(rough.float().square().sum(), tokens)[0]).all()


def test_what_makes_no_encoder_is_refused():
    with pytest.raises(InputError, match="three positive"):
        WindowAttention(8, 2, SwinSettings((2, 2)), shifted=False)
    with pytest.raises(InputError, match="divisor"):
        WindowAttention(8, 3, SwinSettings((2, 2, 2)), shifted=False)
    for embedding, depths, heads, drop_path in ((8, (1,), (1, 1), 0.0), (7, (1,), (1,), 0.0), (8, (1,), (1,), 1.0)):
        with pytest.raises(InputError):
            SwinEncoder(1, embedding, depths, heads, drop_path, SwinSettings((2, 2, 2)))
