"""The networks: sizes, invariants, equality with the plain way to compute the same, gradients, and that they learn."""

import itertools
import json
import subprocess
import sys

import pytest
import torch
import torch.nn.functional as F
from torch import nn

from dmir.errors import InputError
from dmir.fields import jacobian_determinant, warp
from dmir.losses import diffusion, mse
from dmir.networks import build, hyperparameter_names, network_names
from dmir.networks.blocks import UpsamplingBlock, padded_convolution
from dmir.networks.caml import _carried, _coarsened
from dmir.networks.fusion import BlockSettings, CrossAttentionBlock, exchange

SMALL = {
    "caml": {"detail_channels": [4, 6], "channels": [8, 16, 16], "depths": [1, 2, 1], "heads": [1, 2, 2]},
    "voxelmorph": {"encoder": [4, 8], "decoder": [8, 8, 6], "integration_steps": 3},
    "vit_v_net": {"convolutions": [4, 6, 6], "patch": 2, "hidden": 12, "layers": 2, "heads": 2, "perceptron": 24}
    | {"bottleneck": 16, "decoder": [8, 6, 6]},
    "transmorph": {"embedding": 8, "depths": [2, 1, 2], "heads": [1, 2, 2], "window": [2, 3, 2], "head_channels": 6},
    "xmorpher": {"channels": [8, 16, 16], "depths": [1, 2, 1], "heads": [1, 2, 2], "head_channels": 6},
    "transmatch": {"embedding": 8, "depths": [2, 1, 2], "heads": [1, 2, 2], "window": [2, 3, 2], "cross_heads": 2},
    "pyramid": {"channels": [4, 6, 8], "heads": [1, 2, 2], "head_channels": 3, "descent_steps": [2, 1, 0]},
}
NAMES = list(SMALL)
SWITCHES = [dict(zip(("caml", "rbsc", "carsc"), on, strict=True)) for on in itertools.product((False, True), repeat=3)]


def small(name: str, seed: int = 0, **changes: object) -> nn.Module:
    torch.manual_seed(seed)
    return build(name, (16, 16, 16), **{**SMALL[name], **changes})


def awake(network: nn.Module, std: float = 0.2) -> nn.Module:
    """Give the heads, which start at nearly zero, weights that move things by voxels."""
    for name, parameter in network.named_parameters():
        if ".head." in f".{name}":
            nn.init.normal_(parameter, std=std)
    return network


def images(*shape: int, batch: int = 1, seed: int = 1) -> tuple[torch.Tensor, torch.Tensor]:
    random = torch.Generator().manual_seed(seed)
    noise = torch.rand(2 * batch, 1, *shape, generator=random)
    moving, fixed = (2 * F.avg_pool3d(noise, 3, 1, 1)).clamp(0, 1).chunk(2)
    return moving, fixed


# --- the registry ---


def test_names_are_checked_without_importing_torch():
    code = (
        "import sys; from dmir.networks import network_names, hyperparameter_names;"
        "print([hyperparameter_names(n) for n in network_names()]); assert 'torch' not in sys.modules"
    )
    subprocess.run([sys.executable, "-c", code], check=True)


def test_one_network_does_not_import_the_others():
    code = (
        "import sys; from dmir.networks import build; build('voxelmorph', (16, 16, 16));"
        "assert 'dmir.networks.caml' not in sys.modules"
    )
    subprocess.run([sys.executable, "-c", code], check=True)


@pytest.mark.parametrize("name", NAMES)
def test_a_network_can_be_built_again_from_what_it_records(name):
    network = small(name)
    record = json.loads(json.dumps({"name": network.name, "shape": network.shape, **network.hyperparameters}))
    assert sorted(network.hyperparameters) == sorted(hyperparameter_names(name))
    again = build(record.pop("name"), tuple(record.pop("shape")), **record).eval()
    again.load_state_dict(network.state_dict())
    moving, fixed = images(16, 16, 16)
    torch.testing.assert_close(again(moving, fixed), network.eval()(moving, fixed))


def test_misspelt_names_are_answered_with_a_suggestion():
    assert network_names()[0] == "caml"
    with pytest.raises(InputError, match="Did you mean 'voxelmorph'"):
        build("voxelmorf", (16, 16, 16))
    with pytest.raises(InputError, match="Did you mean 'channels'"):
        build("caml", (16, 16, 16), chanels=[8, 16])
    with pytest.raises(InputError, match="shape of caml"):
        build("caml", (16, 16))


@pytest.mark.parametrize(
    ("name", "wrong"),
    [
        ("caml", {"depths": [1, 1]}),
        ("caml", {"heads": [1, 3, 2]}),
        ("caml", {"detail_channels": [4]}),
        ("caml", {"field_downsampling": 3}),
        ("caml", {"drop_path": 1.0}),
        ("caml", {"search_factor": [3, 3]}),
        ("voxelmorph", {"decoder": [8, 8]}),
        ("voxelmorph", {"encoder": [0, 8]}),
        ("voxelmorph", {"downsampling": "max"}),
        ("voxelmorph", {"integration_steps": -1}),
    ],
)
def test_hyperparameters_that_make_no_network_are_refused(name, wrong):
    with pytest.raises(InputError):
        small(name, **wrong)


# --- sizes ---


@pytest.mark.parametrize(
    ("hyperparameters", "count"),
    [
        ({}, 327_331),  # the authors' code
        ({"downsampling": "stride"}, 301_411),  # VoxelMorph-2 of the TransMorph paper
        (  # VoxelMorph-1 of the TransMorph paper
            {"downsampling": "stride", "encoder": [8, 32, 32, 32], "decoder": [32, 32, 32, 32, 32, 8, 8]},
            274_387,
        ),
    ],
)
def test_voxelmorph_has_as_many_parameters_as_were_published(hyperparameters, count):
    network = build("voxelmorph", (160, 192, 224), **hyperparameters)
    assert sum(p.numel() for p in network.parameters()) == count


def test_each_part_of_the_proposed_network_adds_its_parameters():
    counts = {
        on: sum(
            p.numel()
            for p in build(
                "caml", (160, 192, 224), **dict(zip(("caml", "rbsc", "carsc"), on, strict=True))
            ).parameters()
        )
        for on in itertools.product((False, True), repeat=3)
    }
    assert counts[True, True, True] == 34_542_761
    channels, details, depths = (48, 96, 192, 384), (8, 24), (2, 2, 6, 2)

    def residual(width: int) -> int:
        return 2 * (27 * width**2 + width)

    rbsc = sum(map(residual, (*details, *channels[:-1])))
    assert counts[False, True, False] - counts[False, False, False] == rbsc
    blocks = zip((24, *channels), channels, depths, (2, 2, 2, 1), strict=False)  # all but the coarsest twice
    caml = sum(
        sides * depth * (2 * finer + finer * width + width + 2 * width**2 + width)  # norm, projection, fusion
        for finer, width, depth, sides in blocks
    )
    assert counts[True, False, False] - counts[False, False, False] == caml
    gates = sum(width**2 + width // 2 + width // 2 + 1 for width in channels[:-1])
    carsc = gates + sum(map(residual, channels[:-1])) + counts[True, True, False]
    assert counts[True, True, True] - counts[True, True, False] == carsc
    shared = build("caml", (160, 192, 224), share_stages=True)
    assert sum(p.numel() for p in shared.parameters()) == counts[True, True, True] - counts[True, True, False]


# --- what every network does ---


@pytest.mark.parametrize("name", [name for name in NAMES if name != "pyramid"])  # which matches from the first step on
def test_training_starts_near_the_identity(name):
    moving, fixed = images(16, 16, 16)
    displacement = build(name, (16, 16, 16))(moving, fixed)
    assert 0 < float(displacement.detach().abs().max()) < 0.01


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize("shape", [(17, 22, 13), (16, 32, 24), (5, 9, 6)])
def test_any_grid_gives_a_finite_field_on_that_grid(name, shape):
    moving, fixed = images(*shape)
    displacement = awake(small(name)).eval()(moving, fixed)
    assert displacement.shape == (1, 3, *shape)
    assert displacement.dtype == torch.float32
    assert torch.isfinite(displacement).all()
    assert float(displacement.detach().std()) > 1e-3


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize("precision", [torch.float32, torch.bfloat16])
def test_a_larger_grid_trains_and_gives_the_same_field_in_other_layouts(name, precision):
    """Large enough that convolutions choose their algorithms as they do at full size."""
    network = awake(small(name), std=0.02).train()
    moving, fixed = images(64, 40, 44)
    torch.manual_seed(0)
    with torch.autocast("cpu", dtype=torch.bfloat16, enabled=precision == torch.bfloat16):
        displacement = network(moving, fixed)
    displacement.square().mean().backward()
    assert [key for key, p in network.named_parameters() if p.grad is None or not torch.isfinite(p.grad).all()] == []
    moved = network.eval()(moving, fixed).detach()
    laid_out = network(*(image.contiguous(memory_format=torch.channels_last_3d) for image in (moving, fixed)))
    torch.testing.assert_close(laid_out.detach(), moved, rtol=1e-3, atol=1e-3)


@pytest.mark.parametrize("name", NAMES)
def test_a_batch_of_two_is_two_single_pairs(name):
    network = awake(small(name)).eval()
    moving, fixed = images(14, 18, 11, batch=2)
    together = network(moving, fixed)
    for index in range(2):
        alone = network(moving[index : index + 1], fixed[index : index + 1])
        torch.testing.assert_close(together[index : index + 1], alone, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("name", NAMES)
def test_mixed_precision_gives_a_float32_field_close_to_the_exact_one(name):
    network = awake(small(name)).eval()
    moving, fixed = images(16, 20, 12)
    exact = network(moving, fixed)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        rough = network(moving, fixed)
    assert rough.dtype == torch.float32
    assert float((rough - exact).detach().square().mean().sqrt()) < 0.05 * float(exact.detach().std())


@pytest.mark.parametrize("name", NAMES)
def test_gradients_agree_with_finite_differences(name):
    changes = {"descent_steps": []} if name == "pyramid" else {}  # whose directions are taken as they are
    network = awake(small(name, **changes)).double().eval()  # what is drawn at random would differ from step to step
    moving, fixed = (image.double() for image in images(8, 9, 10))
    parameters = list(network.parameters())
    random = torch.Generator().manual_seed(3)
    direction = [torch.randn(p.shape, generator=random, dtype=p.dtype) * p.detach().abs().mean() for p in parameters]

    def objective() -> torch.Tensor:
        return mse(fixed, warp(moving, network(moving, fixed), padding="border"))

    gradient = torch.autograd.grad(objective(), parameters)
    slope = sum(float((g * d).sum()) for g, d in zip(gradient, direction, strict=True))
    values, step = [], 1e-6
    with torch.no_grad():
        for sign in (1, -2):
            for p, d in zip(parameters, direction, strict=True):
                p += sign * step * d
            values.append(float(objective()))
    assert slope == pytest.approx((values[0] - values[1]) / (2 * step), rel=1e-4)


@pytest.mark.parametrize("pair", [((1, 1, 8, 8, 8), (1, 1, 8, 8, 9)), ((1, 2, 8, 8, 8), (1, 2, 8, 8, 8))])
@pytest.mark.parametrize("name", NAMES)
def test_what_is_no_pair_of_images_is_refused(name, pair):
    with pytest.raises(InputError, match="two equal shapes"):
        small(name)(*(torch.zeros(shape) for shape in pair))


@pytest.mark.parametrize(
    ("name", "hyperparameters", "learning_rate"),
    [
        ("voxelmorph", {"encoder": [8, 16], "decoder": [16, 16, 8], "integration_steps": 0}, 5e-3),
        ("voxelmorph", {"encoder": [8, 16], "decoder": [16, 16, 8], "downsampling": "stride"}, 5e-3),
        (
            "caml",
            {"detail_channels": [4, 6], "channels": [8, 16], "depths": [1, 1], "heads": [1, 2]}
            | {"field_downsampling": 2, "drop_path": 0.0},
            2e-3,
        ),
    ],
)
def test_a_translation_is_learnt(name, hyperparameters, learning_rate):
    torch.manual_seed(0)
    shape = (16, 20, 18)
    moving = torch.randn(2, 1, *shape)
    for _ in range(3):
        moving = F.avg_pool3d(moving, 3, 1, 1)
    moving = (moving - moving.amin()) / (moving.amax() - moving.amin())
    translation = torch.tensor([1.5, -1.0, 0.5]).view(1, 3, 1, 1, 1)
    fixed = warp(moving, translation.expand(2, 3, *shape), padding="border")
    network = build(name, shape, **hyperparameters)
    optimiser = torch.optim.Adam(network.parameters(), lr=learning_rate)
    history = []
    for _ in range(40):
        displacement = network(moving, fixed)
        loss = 100 * mse(fixed, warp(moving, displacement, padding="border")) + 0.02 * diffusion(displacement)
        optimiser.zero_grad()
        loss.backward()
        optimiser.step()
        history.append(float(loss.detach()))
    assert history[-1] < 0.15 * history[0]
    error = (displacement.detach() - translation)[:, :, 4:-4, 4:-4, 4:-4].square().sum(dim=1).sqrt().mean()
    assert float(error) < 0.5 < float(translation.norm())


# --- VoxelMorph ---


@pytest.mark.parametrize("shape", [(8, 10, 6), (7, 9, 5)])
def test_upsampling_is_nearest_neighbour_concatenation_and_convolution(shape):
    torch.manual_seed(0)
    block = UpsamplingBlock(3, 2, 4).double()
    coarse = torch.randn(2, 3, *(-(-n // 2) for n in shape), dtype=torch.float64)
    fine = torch.randn(2, 2, *shape, dtype=torch.float64)
    upsampled = F.interpolate(coarse, scale_factor=2, mode="nearest")
    missing = [2 * c - n for c, n in zip(coarse.shape[2:], shape, strict=True)]
    beside = F.pad(fine, [0, missing[2], 0, missing[1], 0, missing[0]])  # what lies beyond the grid is cut off after
    plain = F.leaky_relu(block.convolution(torch.cat([upsampled, beside], dim=1)), 0.2)
    plain = plain[:, :, : shape[0], : shape[1], : shape[2]]
    torch.testing.assert_close(block(coarse, fine), plain)


def test_integration_makes_a_field_without_folds():
    moving, fixed = images(24, 24, 24)
    dense = awake(small("voxelmorph", integration_steps=0), std=10.0).eval()
    integrated = small("voxelmorph", integration_steps=7).eval()
    integrated.load_state_dict(dense.state_dict())
    folded = [float((jacobian_determinant(n(moving, fixed).detach()) <= 0).float().mean()) for n in (dense, integrated)]
    assert folded[0] > 0.0
    assert folded[1] == 0.0


# --- the proposed network ---


@pytest.mark.parametrize("switches", SWITCHES)
@pytest.mark.parametrize("field_downsampling", [1, 2])
def test_every_parameter_learns_whatever_is_switched_on(switches, field_downsampling):
    network = small("caml", field_downsampling=field_downsampling, drop_path=0.0, **switches)
    moving, fixed = images(16, 20, 12, batch=2)
    displacement = network(moving, fixed)
    assert displacement.shape == (2, 3, 16, 20, 12)
    displacement.square().sum().backward()
    assert [name for name, p in network.named_parameters() if p.grad is None or not p.grad.any()] == []


@pytest.mark.parametrize("finer_channels", [None, 4])
def test_exchanging_the_images_exchanges_what_a_block_gives(finer_channels):
    torch.manual_seed(0)
    block = CrossAttentionBlock(8, 2, finer_channels, BlockSettings(), drop_path=0.0).double()
    tokens = torch.randn(4, 5, 6, 4, 8, dtype=torch.float64)
    finer = None if finer_channels is None else torch.randn(4, 5, 6, 4, finer_channels, dtype=torch.float64)
    swapped = block(exchange(tokens), None if finer is None else exchange(finer))
    torch.testing.assert_close(swapped, exchange(block(tokens, finer)))
    assert float((swapped - block(tokens, finer)).detach().abs().max()) > 0.1


def test_exchanging_the_images_exchanges_all_that_encoder_and_decoder_make_of_them():
    stage = small("caml", carsc=False, drop_path=0.0).double().first
    pair = torch.cat(images(13, 16, 18)).double()
    encoded, swapped = stage.encoder(pair, None), stage.encoder(exchange(pair), None)
    for tokens, other in zip(encoded.tokens, swapped.tokens, strict=True):
        torch.testing.assert_close(other, exchange(tokens))
    for tokens, other in zip(stage.decoder(encoded)[1], stage.decoder(swapped)[1], strict=True):
        torch.testing.assert_close(other, exchange(tokens))


def test_each_image_sees_the_other_and_across_levels_only_with_caml():
    tokens, finer = torch.randn(2, 6, 6, 6, 8), torch.randn(2, 6, 6, 6, 4)
    torch.manual_seed(0)
    block = CrossAttentionBlock(8, 2, 4, BlockSettings(), drop_path=0.0)
    before = block(tokens, finer).detach()
    for changed, unchanged in ((0, 1), (1, 0)):
        other = finer.clone()
        other[changed] += torch.randn(6, 6, 6, 4)
        after = block(tokens, other).detach()
        assert float((after - before)[unchanged].abs().max()) > 1e-3  # looks at the other's finer level
        torch.testing.assert_close(after[changed], before[changed])  # and not at its own


def test_a_second_stage_that_adds_nothing_leaves_the_first_field():
    network = awake(small("caml", drop_path=0.0)).eval()
    nn.init.zeros_(network.second.decoder.head.weight)
    nn.init.zeros_(network.second.decoder.head.bias)
    moving, fixed = images(16, 16, 16)
    torch.testing.assert_close(network(moving, fixed), network.first(moving, fixed)[0])


def test_the_second_stage_hears_of_the_first():
    network = awake(small("caml", drop_path=0.0)).eval()
    moving, fixed = images(16, 16, 16)
    _, decoded = network.first(moving, fixed)
    told, _ = network.second(moving, fixed, decoded)
    untold, _ = network.second(moving, fixed, [torch.zeros_like(tokens) for tokens in decoded])
    assert float((told - untold).detach().abs().max()) > 1e-3


def test_what_is_carried_to_the_second_stage_moves_with_the_image():
    tokens = torch.randn(2, 6, 5, 4, 3)
    displacement = torch.zeros(1, 3, 23, 20, 16)
    displacement[:, 0] = 4.0  # voxels: one token of 4x4x4
    carried = _carried([tokens], displacement)[0]
    torch.testing.assert_close(carried[0, :-1], tokens[0, 1:])  # the moving image's
    torch.testing.assert_close(carried[1], tokens[1])  # the fixed image's
    varying = torch.arange(16.0).expand(1, 3, 23, 20, 16)
    assert _coarsened(varying, 4)[0, 0, 0, 0].tolist() == [1.5 / 4, 5.5 / 4, 9.5 / 4, 13.5 / 4]


@pytest.mark.parametrize("name", [name for name in NAMES if "checkpointing" in hyperparameter_names(name)])
def test_checkpointing_changes_no_gradient(name):
    moving, fixed = images(16, 20, 14, batch=2)
    dropped = {"dropout": 0.5} if name == "vit_v_net" else {"drop_path": 0.5}
    results = []
    for checkpointing in (False, True):
        network = awake(small(name, checkpointing=checkpointing, **dropped)).train()
        torch.manual_seed(5)  # the same blocks, or numbers, are dropped
        network(moving, fixed).square().mean().backward()
        results.append([p.grad for p in network.parameters()])
    for one, other in zip(*results, strict=True):
        torch.testing.assert_close(one, other)


def test_drop_path_drops_both_images_of_a_pair_or_neither():
    torch.manual_seed(0)
    block = CrossAttentionBlock(8, 2, None, BlockSettings(), drop_path=0.5).train()
    update = torch.ones(16, 1, 1, 1, 1)
    kept = block._dropped(update).flatten()
    assert set(kept.tolist()) == {0.0, 2.0}
    assert torch.equal(kept[:8], kept[8:])
    assert block.eval()._dropped(update) is update


def test_bfloat16_learns_from_two_planes_what_float32_learns():
    """Of a weight over two planes torch's own gradient is what was in that memory before, on CPUs with bfloat16."""
    volume, weight = torch.randn(1, 16, 2, 4, 4), torch.randn(32, 16, 3, 3, 3)
    for seed in range(4):
        generator, gradients = torch.Generator().manual_seed(seed), []
        direction = torch.randn(1, 32, 2, 4, 4, generator=generator)
        for dtype in (torch.float32, torch.bfloat16):
            occupied = [torch.full((weight.numel(),), 1e30) for _ in range(4)]
            del occupied
            learnt = weight.detach().to(dtype).requires_grad_()
            padded_convolution(volume.to(dtype), learnt).backward(direction.to(dtype))
            gradients.append(learnt.grad.float())
        torch.testing.assert_close(gradients[1], gradients[0], atol=0.2, rtol=0.05)


def test_no_network_convolves_two_planes_in_another_way(monkeypatch):
    planes, convolve = [], F.conv3d

    def watched(volume, weight, *rest, stride=1, padding=0, **options):
        low = torch.is_autocast_enabled("cpu") or volume.dtype == torch.bfloat16
        if low and weight.shape[2] == 3 and stride in (1, (1, 1, 1)) and padding in (1, (1, 1, 1)):
            planes.append(volume.shape[2])
        return convolve(volume, weight, *rest, stride=stride, padding=padding, **options)

    def within_a_module(self, volume, weight, bias):
        return watched(volume, weight, bias, stride=self.stride, padding=self.padding)

    monkeypatch.setattr(F, "conv3d", watched)
    monkeypatch.setattr(nn.Conv3d, "_conv_forward", within_a_module)
    for name in NAMES:
        with torch.autocast("cpu", dtype=torch.bfloat16):
            small(name)(*images(16, 16, 16))
    assert 4 in planes and 2 not in planes


def test_a_padded_convolution_is_torchs_own():
    volume, weight, bias = torch.randn(2, 4, 2, 5, 6), torch.randn(3, 4, 3, 3, 3), torch.randn(3)
    expected = torch.nn.functional.conv3d(volume, weight, bias, padding=1)
    torch.testing.assert_close(padded_convolution(volume, weight, bias), expected)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        found = padded_convolution(volume, weight, bias)
    assert found.shape == expected.shape
    torch.testing.assert_close(found.float(), expected, atol=0.1, rtol=0.02)
