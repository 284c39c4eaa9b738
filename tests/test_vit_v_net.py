"""ViT-V-Net: its published sizes, its parts against the plain way to compute them, and what it does on other grids."""

import pytest
import torch
import torch.nn.functional as F
from torch import nn

from dmir.errors import InputError
from dmir.networks import build
from dmir.networks.vit_v_net import BatchNormalisedConvolution, DecoderBlock, TransformerLayer, VisionTransformer

SMALL = {"convolutions": [4, 6, 6], "patch": 4, "hidden": 12, "layers": 2, "heads": 2, "perceptron": 24} | {
    "bottleneck": 10,
    "decoder": [8, 6, 6, 5],
}


def small(shape=(32, 32, 32), **changes):
    torch.manual_seed(0)
    return build("vit_v_net", shape, **{**SMALL, **changes})


def images(*shape, batch=1):
    random = torch.Generator().manual_seed(1)
    return torch.rand(2 * batch, 1, *shape, generator=random).chunk(2)


def unsettle(module: nn.Module) -> None:
    """Give normalisations statistics and weights that training would give them, and the head larger weights."""
    for part in module.modules():
        if isinstance(part, nn.BatchNorm3d):
            nn.init.normal_(part.running_mean, std=0.3)
            nn.init.uniform_(part.running_var, 0.5, 2.0)
            nn.init.uniform_(part.weight, 0.5, 2.0)
            nn.init.normal_(part.bias, std=0.3)
    for name, parameter in module.named_parameters():
        if name.startswith("head.") or name.endswith("position"):
            nn.init.normal_(parameter, std=0.2)


@pytest.mark.parametrize(
    ("shape", "count"), [((160, 192, 224), 31_560_079), ((160, 192, 160), 31_544_959), ((96, 96, 128), 31_516_231)]
)
def test_it_has_as_many_parameters_as_were_published(shape, count):
    with torch.device("meta"):
        network = build("vit_v_net", shape)
    assert sum(p.numel() for p in network.parameters()) == count


@pytest.mark.parametrize("training", [True, False])
@pytest.mark.parametrize("slope", [0.0, 0.01])
def test_a_decoder_block_is_upsampling_concatenation_and_two_normalised_convolutions(training, slope):
    torch.manual_seed(0)
    block = DecoderBlock(6, 4, 5, slope).double().train(training)
    unsettle(block)
    coarse = torch.randn(2, 6, 5, 4, 7, dtype=torch.float64, requires_grad=True)
    skipped = torch.randn(2, 4, 10, 8, 14, dtype=torch.float64, requires_grad=True)
    plain = torch.cat([F.interpolate(coarse, scale_factor=2, mode="trilinear", align_corners=False), skipped], dim=1)
    for part in (block.joining, block.second):
        norm = part.norm
        convolved = F.conv3d(plain, part.convolution.weight, padding=1)
        mean, variance = (None, None) if training else (norm.running_mean, norm.running_var)
        plain = F.leaky_relu(F.batch_norm(convolved, mean, variance, norm.weight, norm.bias, training), slope)
    found = block(coarse, skipped)
    torch.testing.assert_close(found, plain)
    inputs = [coarse, skipped, *block.parameters()]
    weights = torch.linspace(-1.0, 1.0, plain.numel(), dtype=torch.float64).view_as(plain)
    for one, truth in zip(
        torch.autograd.grad((found * weights).sum(), inputs),
        torch.autograd.grad((plain * weights).sum(), inputs),
        strict=True,
    ):
        torch.testing.assert_close(one, truth, rtol=1e-6, atol=1e-8)


def test_training_keeps_the_running_statistics_of_batch_normalisation():
    torch.manual_seed(0)
    part = BatchNormalisedConvolution(3, 4, 0.0)
    volume = torch.randn(2, 3, 6, 5, 4)
    part(volume)
    convolved = F.conv3d(volume, part.convolution.weight, padding=1)
    torch.testing.assert_close(part.norm.running_mean, 0.1 * convolved.mean(dim=(0, 2, 3, 4)))
    variance = 0.9 + 0.1 * convolved.transpose(0, 1).flatten(1).var(dim=1)
    torch.testing.assert_close(part.norm.running_var, variance)


def test_a_transformer_layer_agrees_with_explicit_attention():
    torch.manual_seed(0)
    layer = TransformerLayer(12, 3, 20, dropout=0.5).double().eval()
    tokens = torch.randn(2, 7, 12, dtype=torch.float64)
    own = layer.attention_norm(tokens)
    heads = []
    for channels in torch.arange(12).chunk(3):
        query, key, value = (part(own)[..., channels] for part in (layer.query, layer.key, layer.value))
        heads.append((query @ key.mT / 4**0.5).softmax(dim=-1) @ value)
    plain = tokens + layer.output(torch.cat(heads, dim=-1))
    plain = plain + layer.narrow(F.gelu(layer.widen(layer.perceptron_norm(plain))))
    torch.testing.assert_close(layer(tokens), plain)


def test_positions_are_those_of_the_grid_it_is_built_for_and_interpolated_on_others():
    transformer = VisionTransformer(
        3, 2, (2, 3, 4), hidden=4, layers=0, heads=1, perceptron=4, dropout=0.0, checkpointing=False
    )
    nn.init.zeros_(transformer.embedding.weight)
    nn.init.zeros_(transformer.embedding.bias)
    transformer.norm = nn.Identity()
    nn.init.normal_(transformer.position)
    torch.testing.assert_close(transformer(torch.zeros(1, 3, 4, 6, 8)), transformer.position)
    finer = F.interpolate(transformer.position, size=(4, 6, 8), mode="trilinear")
    torch.testing.assert_close(transformer(torch.zeros(1, 3, 8, 12, 16)), finer)
    assert small((160, 33, 64)).transformer.position.shape == (1, 12, 10, 3, 4)  # tokens of 16 voxels, padded


def test_what_is_padded_inside_is_zeros_at_the_far_ends():
    network = small().eval()
    unsettle(network)
    moving, fixed = images(20, 31, 32)
    padded = [F.pad(image, [0, 0, 0, 1, 0, 12]) for image in (moving, fixed)]
    torch.testing.assert_close(network(moving, fixed), network(*padded)[:, :, :20, :31], rtol=1e-4, atol=1e-5)


def test_one_token_can_be_trained_on():
    network = small((16, 16, 16)).train()
    moving, fixed = images(16, 16, 16)
    displacement = network(moving, fixed)  # no variance in one value: batch normalisation takes what it has
    displacement.sum().backward()
    assert torch.isfinite(displacement).all()
    assert int(network.bottleneck.norm.num_batches_tracked) == 0
    assert int(network.decoder[0].joining.norm.num_batches_tracked) == 1


@pytest.mark.parametrize(
    ("wrong", "message"),
    [
        ({"decoder": [8, 6, 6]}, "expected 4"),
        ({"patch": 6}, "power of two"),
        ({"patch": 1}, "power of two"),
        ({"heads": 5}, "divisor"),
        ({"convolutions": []}, "positive"),
        ({"bottleneck": 0}, "positive"),
        ({"dropout": 1.0}, "below 1"),
    ],
)
def test_hyperparameters_that_make_no_network_are_refused(wrong, message):
    with pytest.raises(InputError, match=message):
        small(**wrong)
