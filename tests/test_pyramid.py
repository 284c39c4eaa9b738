"""The matching pyramid: its matching against the plain way to compute it, its size, its switches."""

import itertools

import pytest
import torch
import torch.nn.functional as F

from dmir.errors import InputError
from dmir.fields import jacobian_determinant, warp
from dmir.losses import lncc
from dmir.networks import build
from dmir.networks.matching import SLAB_ELEMENTS, expected_offset, neighbours
from dmir.networks.unrolled import UnrolledDescent

SMALL = {"channels": [4, 6, 8], "heads": [1, 2, 2], "head_channels": 3}
SWITCHES = [dict(zip(("caml", "rbsc", "carsc"), on, strict=True)) for on in itertools.product((False, True), repeat=3)]


def tokens(*shape: int, seed: int = 0) -> torch.Tensor:
    return torch.randn(*shape, dtype=torch.float64, generator=torch.Generator().manual_seed(seed))


def plain(fixed: torch.Tensor, moving: torch.Tensor, sharpness: torch.Tensor, radius: int) -> torch.Tensor:
    """One neighbour after the other."""
    side = 2 * radius + 1
    depth, height, width = fixed.shape[3:]
    padded = F.pad(moving.flatten(1, 2), [radius] * 6, mode="replicate").unflatten(1, moving.shape[1:3])
    scores = [
        (fixed * padded[..., i : i + depth, j : j + height, k : k + width]).sum(dim=2)
        for i, j, k in itertools.product(range(side), repeat=3)
    ]
    weights = torch.softmax(torch.stack(scores, dim=2) * sharpness, dim=2)
    return torch.einsum("bhndxy,nc->bhcdxy", weights, neighbours(radius, fixed.device, fixed.dtype))


@pytest.mark.parametrize("radius", [1, 2])
@pytest.mark.parametrize("slab", [1, 2**19])
@pytest.mark.parametrize("shape", [(5, 4, 6), (1, 1, 3)])
def test_matching_is_what_one_neighbour_after_the_other_gives(radius, slab, shape, monkeypatch):
    monkeypatch.setitem(SLAB_ELEMENTS, "cpu", slab)
    fixed, moving = (tokens(2, 3, 4, *shape, seed=seed).requires_grad_() for seed in (1, 2))
    sharpness = torch.tensor(1.7, dtype=torch.float64, requires_grad=True)
    found, expected = (match(fixed, moving, sharpness, radius) for match in (expected_offset, plain))
    torch.testing.assert_close(found, expected)
    gradient = tokens(*found.shape, seed=3)
    inputs = (fixed, moving, sharpness)
    for one, other in zip(
        torch.autograd.grad(found, inputs, gradient), torch.autograd.grad(expected, inputs, gradient), strict=True
    ):
        torch.testing.assert_close(one, other)


def test_its_gradient_is_that_of_finite_differences():
    fixed, moving = (tokens(1, 2, 2, 3, 2, 3, seed=seed).requires_grad_() for seed in (1, 2))
    sharpness = torch.tensor(0.8, dtype=torch.float64, requires_grad=True)
    assert torch.autograd.gradcheck(lambda *inputs: expected_offset(*inputs, 1), (fixed, moving, sharpness))


@pytest.mark.parametrize("offset", [(1, 0, 0), (0, -1, 1), (-2, 1, 2)])
def test_a_shifted_image_is_found_where_it_is(offset):
    moving = F.normalize(tokens(1, 2, 32, 12, 12, 12), dim=2)
    fixed = moving.roll([-n for n in offset], dims=(3, 4, 5))  # fixed(x) = moving(x + offset)
    found = expected_offset(fixed, moving, torch.tensor(2000.0), radius=2)[..., 2:-2, 2:-2, 2:-2]
    expected = torch.tensor(offset, dtype=torch.float64).view(3, 1, 1, 1).expand_as(found)
    torch.testing.assert_close(found, expected, atol=1e-3, rtol=0)


def test_no_copy_of_the_features_a_neighbour_is_kept_for_the_gradient():
    kept: list[int] = []
    fixed, moving = (tokens(1, 1, 6, 8, 8, 8, seed=seed).requires_grad_() for seed in (1, 2))
    with torch.autograd.graph.saved_tensors_hooks(lambda t: kept.append(t.numel()) or t, lambda t: t):
        expected_offset(fixed, moving, torch.tensor(1.0), 1)
    assert sum(kept) < 2 * 6 * 10**3 + 27 * 8**3 + 6 * 8**3 + 10  # the tokens, and one weight a neighbour


def test_the_default_has_half_a_million_parameters():
    channels, heads, width = (16, 32, 48, 64), (1, 2, 4, 8), 6
    convolutions = sum(27 * (a * b + b * b) for a, b in zip((1, *channels), channels, strict=False))
    matching = sum((27 * c + 1) * h * width + 1 + 27 * 9 * h + 3 for c, h in zip(channels, heads, strict=True))
    with torch.device("meta"):
        network = build("pyramid", (160, 192, 224))
    assert sum(p.numel() for p in network.parameters()) == convolutions + matching == 476_791


@pytest.mark.parametrize("switches", SWITCHES, ids=lambda s: "-".join(k for k, on in s.items() if on) or "none")
def test_every_parameter_learns_whatever_is_switched_on(switches):
    torch.manual_seed(0)
    network = build("pyramid", (16, 16, 16), **SMALL, **switches)
    network(*torch.rand(2, 2, 1, 13, 16, 20)).square().sum().backward()
    assert [name for name, p in network.named_parameters() if p.grad is None or not p.grad.any()] == []


def test_a_level_without_heads_is_encoded_and_not_matched():
    torch.manual_seed(0)
    network = build("pyramid", (16, 16, 16), **{**SMALL, "heads": [0, 2, 2]}, field_downsampling=1)
    levels = {int(name.split(".")[1]) for name, _ in network.named_parameters() if name.startswith("levels")}
    assert levels == {1, 2}
    network(*torch.rand(2, 1, 1, 16, 16, 16)).square().sum().backward()
    assert all(p.grad is not None and p.grad.any() for p in network.parameters())


def test_contrast_of_a_scanner_is_nothing_to_it():
    torch.manual_seed(0)
    network = build("pyramid", (16, 16, 16), **SMALL).double()
    moving, fixed = torch.rand(2, 1, 1, 16, 18, 20, dtype=torch.float64)
    torch.testing.assert_close(network(3.0 * moving, 0.4 * fixed), network(moving, fixed), atol=5e-3, rtol=0)
    assert float((network(moving.square(), fixed) - network(moving, fixed)).detach().abs().max()) > 0.02


@pytest.mark.parametrize("field_downsampling", [1, 2])
def test_the_finest_level_is_at_full_or_at_half_resolution(field_downsampling):
    network = build("pyramid", (16, 16, 16), **SMALL, field_downsampling=field_downsampling)
    seen = []
    network.levels[0].tokens.register_forward_hook(lambda _, inputs, output: seen.append(output.shape[2:]))
    network(*torch.rand(2, 1, 1, 16, 18, 20))
    assert seen == [(16, 18, 20) if field_downsampling == 1 else (8, 9, 10)]


@pytest.mark.parametrize(
    ("key", "value"),
    [
        ("heads", [1, 2]),
        ("channels", []),
        ("radius", 0),
        ("head_channels", 0),
        ("integration_steps", -1),
        ("field_downsampling", 3),
    ],
)
def test_what_makes_no_network_is_refused_by_name(key, value):
    with pytest.raises(InputError, match=key):
        build("pyramid", (16, 16, 16), **{**SMALL, key: value})


def test_what_a_level_adds_is_integrated_and_does_not_fold():
    folds = {}
    for steps in (0, 4):
        torch.manual_seed(0)
        network = build("pyramid", (16, 16, 16), **SMALL, integration_steps=steps)
        with torch.no_grad():
            for level in network.levels:
                level.mixing.weight *= 2  # farther and more abruptly than a training would have it
            field = network(*torch.rand(2, 1, 1, 24, 24, 24))
        folds[steps] = float((jacobian_determinant(field) <= 0).float().mean())
    assert folds[0] > 0.01
    assert folds[4] < folds[0] / 20


# --- descent, unrolled ---

DESCENT = {**SMALL, "heads": [0, 0, 0], "field_downsampling": 1, "descent_steps": [4, 4, 2]}


def texture(shift: int) -> torch.Tensor:
    """A smooth random image (1, 1, 20, 24, 22) in [0, 1], of which the content is moved along the last axis."""
    noise = torch.rand(1, 1, 24, 28, 34, dtype=torch.float64, generator=torch.Generator().manual_seed(5))
    smooth = F.avg_pool3d(F.avg_pool3d(noise, 3, 1), 3, 1)[..., 4 - shift : 26 - shift]
    return (smooth - smooth.min()) / (smooth.max() - smooth.min())


def test_without_heads_what_is_learnt_are_the_lengths_of_the_steps_alone():
    network = build("pyramid", (20, 24, 22), **DESCENT, descent_widths=[1.5, 3.0, 6.0])
    assert {name: tuple(p.shape) for name, p in network.named_parameters()} == {
        f"descents.{level}.lengths": (3, steps) for level, steps in enumerate(DESCENT["descent_steps"])
    }


def test_before_training_its_steps_find_what_moved():
    network = build("pyramid", (20, 24, 22), **DESCENT).double()
    moving, fixed = texture(0), texture(2)
    with torch.no_grad():
        field = network(moving, fixed)
        warped = warp(moving, field)
    assert lncc(fixed, moving, 7) < 0.6 < 0.8 < lncc(fixed, warped, 7)
    within = field[0][:, 4:-4, 4:-4, 4:-4].flatten(1)
    torch.testing.assert_close(within.mean(dim=1), torch.tensor([0.0, 0.0, -2.0]).double(), atol=0.2, rtol=0)
    assert float(jacobian_determinant(field).min()) > 0


def test_two_equal_images_are_not_moved():
    """Though the last digits of their levels differ after a warp by zero."""
    network = build("pyramid", (20, 24, 22), **DESCENT)
    image = texture(0).float()
    assert float(network(image, image).detach().abs().max()) < 0.05


def test_the_gradient_of_the_last_length_is_that_of_finite_differences():
    """The directions are taken as they are; those of the last step do not depend on any length that follows."""
    descent = UnrolledDescent(3, (1.5, 3.0)).double()
    moving, fixed = texture(0), texture(1)

    def loss() -> torch.Tensor:
        return -lncc(fixed, warp(moving, descent(moving, fixed, moving.new_zeros(1, 3, 20, 24, 22))), 7)

    loss().backward()
    found, lengths = descent.lengths.grad[:, -1].clone(), descent.lengths.data
    for width in range(2):
        values = []
        for change in (1e-5, -1e-5):
            lengths[width, -1] += change
            values.append(loss().item())
            lengths[width, -1] -= change
        torch.testing.assert_close(found[width].item(), (values[0] - values[1]) / 2e-5, rtol=1e-4, atol=1e-9)


def test_what_is_learnt_of_a_pair_does_not_depend_on_who_is_beside_it():
    torch.manual_seed(0)
    network = build("pyramid", (16, 16, 16), **SMALL, descent_steps=[2, 1, 1]).double()
    moving, fixed = torch.rand(2, 2, 1, 13, 16, 20, dtype=torch.float64)
    one_by_one = torch.cat([network(*pair) for pair in zip(moving.split(1), fixed.split(1), strict=True)])
    torch.testing.assert_close(network(moving, fixed), one_by_one)


@pytest.mark.parametrize(
    ("key", "settings"),
    [
        ("descent_steps", {"descent_steps": [1, 2]}),
        ("descent_steps", {"descent_steps": [1, 2, -1]}),
        ("descent_widths", {"descent_steps": [1, 2, 1], "descent_widths": []}),
        ("descent_widths", {"descent_steps": [1, 2, 1], "descent_widths": [1.0, 0.0]}),
        ("heads, descent_steps", {"heads": [0, 0, 0]}),
    ],
)
def test_steps_that_make_no_network_are_refused_by_name(key, settings):
    with pytest.raises(InputError, match=key):
        build("pyramid", (16, 16, 16), **{**SMALL, **settings})
