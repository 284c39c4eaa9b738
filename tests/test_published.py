"""Published weights: the names and shapes that the authors' codes save, and the field that they would give.

What a network computes is written out here from the order of operations of the published code, on its own state dict,
and compared with the network here on the converted weights.
"""

import json
import math
import os
import re
import zipfile
from itertools import pairwise

import nibabel as nib
import numpy as np
import pytest
import torch
import torch.nn.functional as F

from dmir.cli import main
from dmir.errors import InputError
from dmir.fields import integrate, load_field
from dmir.networks import build
from dmir.networks.published import Published, build_published, convert, read_published, read_state
from dmir.training.weights import load_weights

# --- the published names and shapes ---


def layer(name, *shape, bias=True):
    return {f"{name}.weight": shape} | ({f"{name}.bias": shape[:1]} if bias else {})


def voxelmorph_names(encoder, decoder, pool=True, shape=None):
    down, up, full, inner = ("encoder", "decoder", "remaining", ".0") if pool else ("downarm", "uparm", "extras", "")
    names, widths, depth = {}, [2, *encoder], len(encoder)
    for index in range(depth):
        names |= layer(f"unet_model.{down}.{index}{inner}.main", widths[index + 1], widths[index], 3, 3, 3)
    beside = list(encoder[::-1]) if pool else [*encoder[-2::-1], 2]
    before = encoder[-1]
    for index, after in enumerate(decoder):
        place = f"{up}.{index}{inner}" if index < depth else f"{full}.{index - depth}"
        if 0 < index <= depth:
            before += beside[index - 1]
        names |= layer(f"unet_model.{place}.main", after, before, 3, 3, 3)
        before = after
    grid = {} if shape is None else {"transformer.grid": (1, 3, *shape)}
    return names | layer("flow", 3, before, 3, 3, 3) | grid


def batch_normalised(name, after, before):
    statistics = {f"{name}.1.{key}": (after,) for key in ("weight", "bias", "running_mean", "running_var")}
    return layer(f"{name}.0", after, before, 3, 3, 3, bias=False) | statistics | {f"{name}.1.num_batches_tracked": ()}


def vit_v_net_names(shape, convolutions, patch, hidden, layers, perceptron, bottleneck, decoder):
    embeddings, names = "transformer.embeddings", {}
    for index, (before, after) in enumerate(zip((2, *convolutions), convolutions, strict=False)):
        place = f"down{index}.maxpool_conv.1" if index else "inc"
        for number, width in ((0, before), (2, after)):
            names |= layer(f"{embeddings}.hybrid_model.{place}.double_conv.{number}", after, width, 3, 3, 3)
    names |= layer(f"{embeddings}.patch_embeddings", hidden, convolutions[-1], patch, patch, patch)
    tokens = math.prod(n // (patch * 2 ** (len(convolutions) - 1)) for n in shape)
    names[f"{embeddings}.position_embeddings"] = (1, tokens, hidden)
    for index in range(layers):
        place = f"transformer.encoder.layer.{index}"
        names |= layer(f"{place}.attention_norm", hidden) | layer(f"{place}.ffn_norm", hidden)
        names |= layer(f"{place}.ffn.fc1", perceptron, hidden) | layer(f"{place}.ffn.fc2", hidden, perceptron)
        for part in ("query", "key", "value", "out"):
            names |= layer(f"{place}.attn.{part}", hidden, hidden)
    names |= layer("transformer.encoder.encoder_norm", hidden)
    names |= batch_normalised("decoder.conv_more", bottleneck, hidden)
    beside = [convolutions[-1]] * (len(decoder) - len(convolutions)) + list(convolutions[::-1])
    before = bottleneck
    for index, (skipped, after) in enumerate(zip(beside, decoder, strict=True)):
        names |= batch_normalised(f"decoder.blocks.{index}.conv1", after, before + skipped)
        names |= batch_normalised(f"decoder.blocks.{index}.conv2", after, after)
        before = after
    return names | layer("reg_head.0", 3, before, 3, 3, 3) | {"spatial_trans.grid": (1, 3, *shape)}


def transmorph_names(shape, embedding, depths, heads, window, head, full=True, bias=False):
    rows, table = math.prod(window), math.prod(2 * n - 1 for n in window)
    names = layer("transformer.patch_embed.proj", embedding, 2, 4, 4, 4)
    names |= layer("transformer.patch_embed.norm", embedding)
    for level, depth in enumerate(depths):
        width, place = embedding * 2**level, f"transformer.layers.{level}"
        for index in range(depth):
            block = f"{place}.blocks.{index}"
            names |= layer(f"{block}.norm1", width) | layer(f"{block}.norm2", width)
            names[f"{block}.attn.relative_position_bias_table"] = (table, heads[level])
            names[f"{block}.attn.relative_position_index"] = (rows, rows)
            names |= layer(f"{block}.attn.qkv", 3 * width, width, bias=bias)
            names |= layer(f"{block}.attn.proj", width, width)
            names |= layer(f"{block}.mlp.fc1", 4 * width, width) | layer(f"{block}.mlp.fc2", width, 4 * width)
        if level < len(depths) - 1:
            names |= layer(f"{place}.downsample.reduction", 2 * width, 8 * width, bias=False)
            names |= layer(f"{place}.downsample.norm", 8 * width)
        names |= layer(f"transformer.norm{level}", width)
    widths = [embedding * 2**level for level in reversed(range(len(depths)))]
    widths += [embedding // 2, head] if full else [head]
    skips = [*widths[1 : len(depths)], embedding // 2, head]
    for index, (before, after) in enumerate(pairwise(widths)):
        names |= layer(f"up{index}.conv1.0", after, before + skips[index], 3, 3, 3, bias=False)
        names |= layer(f"up{index}.conv2.0", after, after, 3, 3, 3, bias=False)
    names |= layer("c1.0", embedding // 2, 2, 3, 3, 3, bias=False) | layer("c2.0", head, 2, 3, 3, 3, bias=False)
    return names | layer("reg_head.0", 3, head, 3, 3, 3) | {"spatial_trans.grid": (1, 3, *shape)}


def row_of_offset(window):
    """Return which row of the table of position biases is that of a query and a key of a window."""
    position = torch.stack(torch.meshgrid(*(torch.arange(n) for n in window), indexing="ij")).flatten(1)
    offset = position[:, :, None] - position[:, None]
    row = torch.zeros_like(offset[0])
    for axis, edge in enumerate(window):
        row = row * (2 * edge - 1) + offset[axis] + edge - 1
    return row


def state_of(names, seed=0):
    """Return random tensors of such names: weights that keep values near 1, variances above 0."""
    random = torch.Generator().manual_seed(seed)
    state = {}
    for name, shape in names.items():
        values = torch.randn(shape, generator=random)
        if name.endswith(("running_var", "num_batches_tracked")):
            values = values.square() + 0.5
        elif len(shape) > 1:
            values = (
                values / max(shape[1:].numel() if isinstance(shape, torch.Size) else math.prod(shape[1:]), 1) ** 0.5
            )
        elif name.endswith("weight"):
            values = 1 + 0.3 * values
        if name.endswith("relative_position_index"):
            values = row_of_offset(TRANSMORPH["window"])
        state[name] = values
    return state


SHAPE = (32, 48, 16)
VIT_V_NET = {"convolutions": [4, 6, 6], "patch": 4, "hidden": 12, "layers": 2, "perceptron": 24} | {
    "bottleneck": 10,
    "decoder": [8, 6, 6, 5],
}
TRANSMORPH = {"embedding": 8, "depths": [2, 2], "heads": [2, 4], "window": [4, 6, 2]}
CASES = {
    "voxelmorph": (
        voxelmorph_names([4, 6], [6, 5, 5, 4], shape=SHAPE),
        {"encoder": [4, 6], "decoder": [6, 5, 5, 4], "integration_steps": 0},
    ),
    "voxelmorph before 2021": (
        voxelmorph_names([4, 6], [6, 5, 5, 4], pool=False, shape=SHAPE),
        {"encoder": [4, 6], "decoder": [6, 5, 5, 4], "integration_steps": 0, "downsampling": "stride"},
    ),
    "vit_v_net": (vit_v_net_names(SHAPE, **VIT_V_NET), {**VIT_V_NET, "heads": 3}),
    "transmorph": (transmorph_names(SHAPE, **TRANSMORPH, head=5), {**TRANSMORPH, "head_channels": 5}),
    "transmorph with biases": (
        transmorph_names(SHAPE, **TRANSMORPH, head=5, bias=True),
        {**TRANSMORPH, "head_channels": 5, "qkv_bias": True},
    ),
    "transmorph of OASIS": (
        transmorph_names(SHAPE, **TRANSMORPH, head=5, full=False),
        {**TRANSMORPH, "head_channels": 5, "field_downsampling": 2},
    ),
}

PUBLISHED = [
    # name, hyperparameters, names, parameters that were published
    ("voxelmorph", {}, voxelmorph_names([16, 32, 32, 32], [32, 32, 32, 32, 32, 16, 16]), 327_331),
    (
        "voxelmorph",
        {"downsampling": "stride"},
        voxelmorph_names([16, 32, 32, 32], [32, 32, 32, 32, 32, 16, 16], pool=False),
        301_411,
    ),
    (
        "vit_v_net",
        {},
        vit_v_net_names((160, 192, 224), (16, 32, 32), 8, 252, 12, 3072, 512, (96, 48, 32, 32, 16)),
        31_560_079,
    ),
    (
        "transmorph",
        {},
        transmorph_names((160, 192, 224), 96, (2, 2, 4, 2), (4, 4, 8, 8), (5, 6, 7), 16),
        46_771_251,
    ),
    (
        "transmorph",
        {"field_downsampling": 2},
        transmorph_names((160, 192, 224), 96, (2, 2, 4, 2), (4, 4, 8, 8), (5, 6, 7), 16, full=False),
        46_556_979,
    ),
]


@pytest.mark.parametrize(("name", "hyperparameters", "names", "count"), PUBLISHED)
def test_networks_of_the_published_size_are_converted_whole(name, hyperparameters, names, count):
    buffers = re.compile(r".*(grid|relative_position_index|running_mean|running_var|num_batches_tracked)")
    assert sum(math.prod(shape) for key, shape in names.items() if not buffers.fullmatch(key)) == count
    with torch.device("meta"):
        network = build(name, (160, 192, 224), **hyperparameters)
    state = {key: torch.empty(shape, device="meta") for key, shape in names.items()}
    index = row_of_offset((5, 6, 7))
    state |= {key: index for key in names if key.endswith("relative_position_index")}
    converted = convert(state, network)
    assert {key: value.shape for key, value in converted.items()} == {
        key: value.shape for key, value in network.state_dict().items()
    }


# --- what they compute ---


def convolution(state, name, volume, padding=1, stride=1):
    return F.conv3d(volume, state[f"{name}.weight"], state.get(f"{name}.bias"), stride, padding)


def linear(state, name, tokens):
    return F.linear(tokens, state[f"{name}.weight"], state.get(f"{name}.bias"))


def layer_norm(state, name, tokens, epsilon=1e-5):
    return F.layer_norm(tokens, tokens.shape[-1:], state[f"{name}.weight"], state[f"{name}.bias"], epsilon)


def upsampled(volume):
    return F.interpolate(volume, scale_factor=2, mode="trilinear", align_corners=False)


def plain_voxelmorph(state, pair):
    """Both layouts: the first pools after each convolution, the second's convolutions have stride 2."""
    pool = "unet_model.encoder.0.0.main.weight" in state
    down, up, full, inner = ("encoder", "decoder", "remaining", ".0") if pool else ("downarm", "uparm", "extras", "")
    volume, history = pair, [pair]

    def block(place, volume, stride=1):
        return F.leaky_relu(convolution(state, f"unet_model.{place}.main", volume, stride=stride), 0.2)

    def count(part):
        return sum(1 for key in state if re.fullmatch(rf"unet_model\.{part}\..*weight", key))

    for index in range(count(down)):
        volume = block(f"{down}.{index}{inner}", volume, stride=1 if pool else 2)
        history.append(volume)
        if pool:
            volume = F.max_pool3d(volume, 2)
    if not pool:
        history.pop()
    for index in range(count(up)):
        volume = F.interpolate(block(f"{up}.{index}{inner}", volume), scale_factor=2, mode="nearest")
        volume = torch.cat([volume, history.pop()], dim=1)
    for index in range(count(full)):
        volume = block(f"{full}.{index}", volume)
    return convolution(state, "flow", volume)


def plain_vit_v_net(state, pair, heads=3, slope=0.0):
    embeddings = "transformer.embeddings"
    features, volume = [], pair
    for place in ("inc", "down1.maxpool_conv.1", "down2.maxpool_conv.1"):
        volume = volume if place == "inc" else F.max_pool3d(volume, 2)
        for number in (0, 2):
            volume = convolution(state, f"{embeddings}.hybrid_model.{place}.double_conv.{number}", volume)
            volume = F.leaky_relu(volume, slope)
        features.append(volume)
    patch = state[f"{embeddings}.patch_embeddings.weight"].shape[-1]
    patches = convolution(state, f"{embeddings}.patch_embeddings", volume, padding=0, stride=patch)
    tokens = patches.flatten(2).transpose(1, 2) + state[f"{embeddings}.position_embeddings"]
    for index in range(VIT_V_NET["layers"]):
        place = f"transformer.encoder.layer.{index}"
        own = layer_norm(state, f"{place}.attention_norm", tokens, 1e-6)
        query, key, value = (
            linear(state, f"{place}.attn.{part}", own).unflatten(2, (heads, -1)).transpose(1, 2)
            for part in ("query", "key", "value")
        )
        weights = (query @ key.mT / query.shape[-1] ** 0.5).softmax(dim=-1)
        tokens = tokens + linear(state, f"{place}.attn.out", (weights @ value).transpose(1, 2).flatten(2))
        own = F.gelu(linear(state, f"{place}.ffn.fc1", layer_norm(state, f"{place}.ffn_norm", tokens, 1e-6)))
        tokens = tokens + linear(state, f"{place}.ffn.fc2", own)
    tokens = layer_norm(state, "transformer.encoder.encoder_norm", tokens, 1e-6)

    def block(place, volume):
        statistics = [state[f"{place}.1.{key}"] for key in ("running_mean", "running_var", "weight", "bias")]
        return F.leaky_relu(F.batch_norm(convolution(state, f"{place}.0", volume), *statistics), slope)

    volume = block("decoder.conv_more", tokens.transpose(1, 2).reshape(patches.shape))
    while len(features) < len(VIT_V_NET["decoder"]):
        features.append(F.max_pool3d(features[-1], 2))
    for index in range(len(VIT_V_NET["decoder"])):
        volume = torch.cat([upsampled(volume), features.pop()], dim=1)
        volume = block(f"decoder.blocks.{index}.conv2", block(f"decoder.blocks.{index}.conv1", volume))
    return convolution(state, "reg_head.0", volume)


def regions(size, window, shift):
    """Number the parts of a shifted axis that do not see one another."""
    numbers = torch.zeros(size, dtype=torch.long)
    numbers[size - window :] = 1
    numbers[size - shift :] = 2
    return numbers


def windows_of(tokens, window):
    """(B, D, H, W, C) -> (B, windows, N, C)."""
    batch, *shape, channels = tokens.shape
    sizes = [n for pair in zip((s // w for s, w in zip(shape, window, strict=True)), window, strict=True) for n in pair]
    cut = tokens.view(batch, *sizes, channels).permute(0, 1, 3, 5, 2, 4, 6, 7)
    return cut.flatten(4, 6).flatten(1, 3)


def plain_swin_block(state, place, tokens, window, heads, shifted):
    shape, shift = tokens.shape[1:4], [n // 2 if shifted else 0 for n in window]
    rolled = layer_norm(state, f"{place}.norm1", tokens).roll([-n for n in shift], (1, 2, 3))
    qkv = linear(state, f"{place}.attn.qkv", windows_of(rolled, window)).unflatten(3, (3, heads, -1))
    query, key, value = qkv.permute(3, 0, 1, 4, 2, 5)
    bias = state[f"{place}.attn.relative_position_bias_table"][row_of_offset(window)].permute(2, 0, 1)
    scores = query @ key.mT / query.shape[-1] ** 0.5 + bias
    if shifted:
        parts = [regions(*sizes) for sizes in zip(shape, window, shift, strict=True)]
        number = parts[0][:, None, None] * 9 + parts[1][:, None] * 3 + parts[2]
        number = windows_of(number[None, ..., None], window)[0, :, :, 0]
        scores = scores - 100.0 * (number[:, :, None] != number[:, None])[:, None]
    answer = (scores.softmax(dim=-1) @ value).transpose(2, 3).flatten(3)
    counts = [s // w for s, w in zip(shape, window, strict=True)]
    answer = answer.view(len(tokens), *counts, *window, -1).permute(0, 1, 4, 2, 5, 3, 6, 7).reshape(tokens.shape)
    tokens = tokens + linear(state, f"{place}.attn.proj", answer.roll(shift, (1, 2, 3)))
    hidden = F.gelu(linear(state, f"{place}.mlp.fc1", layer_norm(state, f"{place}.norm2", tokens)))
    return tokens + linear(state, f"{place}.mlp.fc2", hidden)


def plain_transmorph(state, pair):
    def block(place, volume):
        return F.leaky_relu(F.instance_norm(convolution(state, f"{place}.0", volume)), 0.01)

    tokens = convolution(state, "transformer.patch_embed.proj", pair, padding=0, stride=4).movedim(1, -1)
    tokens = layer_norm(state, "transformer.patch_embed.norm", tokens)
    features = [block("c2", pair), block("c1", F.avg_pool3d(pair, 3, stride=2, padding=1))]
    levels = len(TRANSMORPH["depths"])
    for level in range(levels):
        for index in range(TRANSMORPH["depths"][level]):
            place = f"transformer.layers.{level}.blocks.{index}"
            heads = TRANSMORPH["heads"][level]
            tokens = plain_swin_block(state, place, tokens, TRANSMORPH["window"], heads, shifted=index == 1)
        features.append(layer_norm(state, f"transformer.norm{level}", tokens).movedim(-1, 1))
        if level < levels - 1:
            corners = [(0, 0, 0), (1, 0, 0), (0, 1, 0), (0, 0, 1), (1, 1, 0), (0, 1, 1), (1, 0, 1), (1, 1, 1)]
            cubes = torch.cat([tokens[:, d::2, h::2, w::2] for d, h, w in corners], dim=-1)
            cubes = layer_norm(state, f"transformer.layers.{level}.downsample.norm", cubes)
            tokens = linear(state, f"transformer.layers.{level}.downsample.reduction", cubes)
    volume = features.pop()
    ups = sum(1 for key in state if re.fullmatch(r"up\d+\.conv1\.0\.weight", key))
    for index in range(ups):
        volume = block(f"up{index}.conv1", torch.cat([upsampled(volume), features.pop()], dim=1))
        volume = block(f"up{index}.conv2", volume)
    field = convolution(state, "reg_head.0", volume)
    return field if field.shape[2:] == pair.shape[2:] else upsampled(field)


PLAIN = {"voxelmorph": plain_voxelmorph, "vit_v_net": plain_vit_v_net, "transmorph": plain_transmorph}


@pytest.mark.parametrize("case", CASES)
def test_converted_weights_give_the_published_field(case):
    names, hyperparameters = CASES[case]
    state, name = state_of(names), case.split()[0]
    network = build(name, SHAPE, **hyperparameters)
    network.load_state_dict(convert(state, network))
    pair = torch.rand(2, 2, *SHAPE, generator=torch.Generator().manual_seed(1))
    with torch.no_grad():
        found = network.eval()(pair[:, :1], pair[:, 1:])  # the moving image first
        truth = PLAIN[name](state, pair)
    assert float(truth.std()) > 0.05
    torch.testing.assert_close(found, truth, rtol=1e-4, atol=1e-4)


def test_vit_v_net_was_published_with_two_activations():
    state = state_of(CASES["vit_v_net"][0])
    network = build("vit_v_net", SHAPE, **CASES["vit_v_net"][1], slope=0.01)
    network.load_state_dict(convert(state, network))
    pair = torch.rand(1, 2, *SHAPE, generator=torch.Generator().manual_seed(1))
    with torch.no_grad():
        found = network.eval()(pair[:, :1], pair[:, 1:])
        torch.testing.assert_close(found, plain_vit_v_net(state, pair, slope=0.01), rtol=1e-4, atol=1e-4)


def test_the_velocity_of_voxelmorph_is_integrated_as_published_but_for_the_scale_of_grids():
    """Published: halved, integrated and doubled, whereas corners that stay make it (n - 1) / (n / 2 - 1)."""
    names, hyperparameters = CASES["voxelmorph"]
    state = state_of(names)
    state["flow.bias"] *= 0
    state["flow.weight"] *= 0.5
    pair = F.avg_pool3d(torch.rand(1, 2, *SHAPE, generator=torch.Generator().manual_seed(1)), 5, 1, 2)
    network = build("voxelmorph", SHAPE, **{**hyperparameters, "integration_steps": 7})
    network.load_state_dict(convert(state, network))
    with torch.no_grad():
        velocity = F.interpolate(plain_voxelmorph(state, pair), scale_factor=0.5, mode="trilinear", align_corners=True)
        published = F.interpolate(2 * integrate(0.5 * velocity), scale_factor=2, mode="trilinear", align_corners=True)
        found = network.eval()(pair[:, :1], pair[:, 1:])
    assert float((found - published).square().mean().sqrt()) < 0.05 * float(published.square().mean().sqrt())


# --- what is refused ---


@pytest.mark.parametrize("case", CASES)
def test_what_is_missing_or_left_over_is_named(case):
    names, hyperparameters = CASES[case]
    network = build(case.split()[0], SHAPE, **hyperparameters)
    state = state_of(names)
    carrying = [key for key in names if not re.fullmatch(r".*(grid|relative_position_index)|c2.*", key)]
    gone = carrying[len(carrying) // 2]
    with pytest.raises(InputError, match=f"1 tensors missing.*{re.escape(gone)}"):
        convert({key: tensor for key, tensor in state.items() if key != gone}, network)
    with pytest.raises(InputError, match=r"4 tensors unknown \(extra\.0, extra\.1, extra\.2, \.\.\.\)"):
        convert({**state, **{f"extra.{index}": torch.ones(1) for index in range(4)}}, network)
    for wrong in (torch.ones(7, 7, 7), torch.ones(())):
        with pytest.raises(InputError, match=rf"{re.escape(gone)} of shape .*expected what makes"):
            convert({**state, gone: wrong}, network)


def test_another_network_and_other_hyperparameters_are_refused():
    names, hyperparameters = CASES["vit_v_net"]
    transmorph = build("transmorph", SHAPE, **CASES["transmorph"][1])
    with pytest.raises(InputError, match=r"published weights of transmorph: found .* missing .* and .* unknown"):
        convert(state_of(names), transmorph)
    with pytest.raises(InputError, match="one of voxelmorph, vit_v_net, transmorph"):
        convert(state_of(names), build("xmorpher", SHAPE, channels=[8], depths=[1], heads=[1]))
    turned = build("vit_v_net", (48, 32, 16), **hyperparameters)  # as many tokens
    with pytest.raises(InputError, match=r"spatial_trans\.grid of shape \(1, 3, 32, 48, 16\)"):
        convert(state_of(names), turned)
    state = state_of(CASES["transmorph"][0])
    for window, message in (([6, 4, 2], "of other values"), ([4, 4, 2], r"of shape \(48, 48\)")):  # as many, and fewer
        with pytest.raises(InputError, match=rf"relative_position_index {message}"):
            convert(state, build("transmorph", SHAPE, **{**CASES["transmorph"][1], "window": window}))


class Code:
    """An object whose unpickling leaves a trace."""

    def __init__(self, trace):
        self.trace = str(trace)

    def __reduce__(self):
        return os.mkdir, (self.trace,)


@pytest.mark.parametrize("zipped", [True, False])
def test_code_in_a_file_is_refused_and_not_run(tmp_path, zipped):
    trace = tmp_path / "trace"
    torch.save(
        {"state_dict": {"a": torch.ones(1)}, "other": Code(trace)},
        tmp_path / "weights.pt",
        _use_new_zipfile_serialization=zipped,
    )
    with pytest.raises(InputError, match=r"it calls for .*mkdir"):
        read_state(tmp_path / "weights.pt")
    assert not trace.exists()


@pytest.mark.parametrize(
    "content", [[torch.ones(1)], {"a": 1}, {1: torch.ones(1)}, {}, {"state_dict": {"a": "b"}}, torch.ones(1)]
)
def test_what_is_no_state_dict_is_refused(tmp_path, content):
    torch.save(content, tmp_path / "weights.pt")
    with pytest.raises(InputError, match="expected published weights"):
        read_state(tmp_path / "weights.pt")


def test_a_file_that_is_none_or_no_checkpoint_is_refused(tmp_path):
    with pytest.raises(InputError, match="no such file"):
        read_state(tmp_path / "weights.pt")
    (tmp_path / "weights.pt").write_text("weights")
    with pytest.raises(InputError, match="cannot be read as tensors"):
        read_state(tmp_path / "weights.pt")


def test_a_damaged_byte_and_a_compressed_archive_are_refused(tmp_path):
    path = tmp_path / "weights.pt"
    torch.save({"layer.weight": torch.arange(1000.0)}, path)
    content = bytearray(path.read_bytes())
    position = content.index(np.float32(500).tobytes())
    path.write_bytes(content[:position] + b"\xff" + content[position + 1 :])
    assert torch.load(path, weights_only=True)["layer.weight"][500] != 500  # torch itself does not see it
    with pytest.raises(InputError, match=r"a damaged archive \(the checksum of weights/data/0 is another\).* Fetch"):
        read_state(path)
    torch.save({"layer.weight": torch.zeros(1000)}, path)
    with zipfile.ZipFile(path) as stored, zipfile.ZipFile(tmp_path / "small.pt", "w", zipfile.ZIP_DEFLATED) as small:
        for part in stored.infolist():
            small.writestr(part.filename, stored.read(part))
    with pytest.raises(InputError, match="compressed parts"):
        read_state(tmp_path / "small.pt")


@pytest.mark.parametrize(
    "wrap",
    [
        lambda state: state,
        lambda state: {"state_dict": state, "epoch": 3, "best_dsc": np.float64(0.75), "optimizer": {"state": {}}},
        lambda state: {"model_state": state, "config": {"inshape": (32, 48, 16)}},
        lambda state: {"state_dict": {f"module.{key}": tensor for key, tensor in state.items()}},
        lambda state: {f"_orig_mod.{key}": tensor for key, tensor in state.items()},
        lambda state: {f"module._orig_mod.{key}": tensor for key, tensor in state.items()},
        lambda state: {f"_orig_mod.module.{key}": tensor for key, tensor in state.items()},
        lambda state: {
            f"a._orig_mod.{key[2:]}" if key[:2] == "a." else key: state[key] for key in state
        },  # a part of it
        lambda state: {"model": {"state_dict": {f"model.{key}": state[key] for key in state}}, "epoch": 3},
        lambda state: {"model_state_dict": state},
    ],
)
def test_checkpoints_are_read_as_they_were_saved(tmp_path, wrap):
    state = {"a.weight": torch.rand(3), "grid": torch.rand(2)}
    torch.save(wrap(state), tmp_path / "weights.pth.tar")
    found = read_state(tmp_path / "weights.pth.tar")
    assert found.keys() == state.keys()
    assert all(torch.equal(found[key], state[key]) for key in state)


# --- what a file says of itself ---


VOXELMORPH_CONFIG = {"inshape": SHAPE, "nb_unet_features": [[4, 6], [6, 5, 5, 4]], "nb_unet_levels": None} | {
    **{"unet_feat_mult": 1, "nb_unet_conv_per_level": 1, "int_steps": 7, "int_downsize": 2, "bidir": False},
    **{"use_probs": False, "src_feats": 1, "trg_feats": 1, "unet_half_res": False},
}
"""As VoxelMorph's code saves it: every argument of the constructor, defaults included."""


def voxelmorph_file(shape=None, **config):
    """Return a file of a small VoxelMorph with its config; without one, where there is nothing in it."""
    state = state_of(voxelmorph_names([4, 6], [6, 5, 5, 4], shape=shape))
    return Published(state, {**VOXELMORPH_CONFIG, **config} if config else {})


@pytest.mark.parametrize("steps", [0, 5])
def test_voxelmorphs_own_config_is_taken(tmp_path, capsys, steps):
    published = voxelmorph_file(int_steps=steps, int_downsize=1)
    torch.save({"config": published.config, "model_state": published.state}, tmp_path / "weights.pt")
    command = ["convert-weights", str(tmp_path / "weights.pt"), "--network", "voxelmorph"]
    assert main([*command, "--out", str(tmp_path / "model.safetensors")]) == 0
    network, metadata = load_weights(tmp_path / "model.safetensors")
    assert network.hyperparameters == {
        **{"encoder": [4, 6], "decoder": [6, 5, 5, 4], "downsampling": "pool"},
        **{"integration_steps": steps, "integration_downsampling": 1},
    }
    assert tuple(metadata["grid"]["shape"]) == SHAPE
    pair = torch.rand(1, 2, *SHAPE, generator=torch.Generator().manual_seed(1))
    with torch.no_grad():
        displacement = plain_voxelmorph(published.state, pair)
        same = torch.allclose(network(pair[:, :1], pair[:, 1:]), displacement, rtol=1e-4, atol=1e-4)
    assert same == (steps == 0)


def test_one_number_of_features_is_multiplied_from_level_to_level():
    published = Published({}, {**VOXELMORPH_CONFIG, "nb_unet_features": 4, "nb_unet_levels": 3, "unet_feat_mult": 1.5})
    state = state_of(voxelmorph_names([4, 6], [9, 6, 4]))  # 4, 6, 9 down, the same up
    network = build_published(Published(state, published.config), "voxelmorph")
    assert (network.hyperparameters["encoder"], network.hyperparameters["decoder"]) == ([4, 6], [9, 6, 4])


def test_a_file_whose_warper_stands_alone_gives_a_displacement():
    """VoxelMorph-1 and -2 as TransMorph's authors trained them: no config, no layer that integrates."""
    network = build_published(voxelmorph_file(SHAPE), "voxelmorph", encoder=[4, 6], decoder=[6, 5, 5, 4])
    assert network.hyperparameters["integration_steps"] == 0
    assert network.shape == SHAPE


def test_what_a_file_says_of_itself_is_not_overruled():
    with pytest.raises(InputError, match=r"integration_steps = 7: found integration_steps = 0 in the published file"):
        build_published(voxelmorph_file(int_steps=0), "voxelmorph", integration_steps=7)
    with pytest.raises(InputError, match=r"shape = \[16, 16, 16\]: found shape = \[32, 48, 16\]"):
        build_published(voxelmorph_file(int_steps=0), "voxelmorph", (16, 16, 16))
    for case in ("voxelmorph", "vit_v_net", "transmorph", "transmorph of OASIS"):
        names, hyperparameters = CASES[case]
        name = case.split()[0]
        published = Published(state_of(names), {})
        assert build_published(published, name, **hyperparameters).shape == SHAPE
        with pytest.raises(InputError, match=r"found shape = \[32, 48, 16\] in the published file itself"):
            build_published(published, name, (48, 32, 16), **hyperparameters)
    assert build_published(voxelmorph_file(int_steps=0), "voxelmorph", SHAPE, integration_steps=0).shape == SHAPE


def test_a_file_that_contradicts_itself_is_refused():
    with pytest.raises(InputError, match=r"inshape \[16, 16, 16\] in its config and a warper for \[32, 48, 16\]"):
        build_published(voxelmorph_file(SHAPE, inshape=(16, 16, 16)), "voxelmorph")
    with pytest.raises(InputError, match="int_steps 7 in its config, but no integration"):
        build_published(voxelmorph_file(SHAPE, int_steps=7), "voxelmorph")
    state = voxelmorph_file(SHAPE).state | {"integrate.transformer.grid": torch.zeros(1, 3, 16, 24, 8)}
    assert build_published(Published(state, VOXELMORPH_CONFIG), "voxelmorph").hyperparameters["integration_steps"] == 7
    with pytest.raises(InputError, match="int_steps 0 in its config, and integration"):
        build_published(Published(state, {**VOXELMORPH_CONFIG, "int_steps": 0}), "voxelmorph")


def test_what_a_file_does_not_say_and_must_be_known_is_asked_for():
    given = {"encoder": [4, 6], "decoder": [6, 5, 5, 4]}
    with pytest.raises(InputError, match="--shape: found nothing"):
        build_published(voxelmorph_file(), "voxelmorph", **given)
    with pytest.raises(InputError, match=r"integration_steps: found nothing .* Give it: --set integration_steps=0"):
        build_published(voxelmorph_file(), "voxelmorph", SHAPE, **given)
    assert build_published(voxelmorph_file(), "voxelmorph", SHAPE, **given, integration_steps=0).shape == SHAPE


@pytest.mark.parametrize(
    ("config", "said"),
    [
        ({"unet_half_res": True}, "unet_half_res = True"),
        ({"src_feats": 3}, "src_feats = 3"),
        ({"nb_unet_conv_per_level": 2}, "nb_unet_conv_per_level = 2"),
        ({"reg_field": "warp"}, "reg_field = 'warp' in its config, whose meaning is not known"),
        ({"inshape": 5}, "a config that is none"),
        ({"nb_unet_features": [[4, 6]]}, "a config that is none"),
    ],
)
def test_a_config_that_is_not_understood_is_refused(config, said):
    with pytest.raises(InputError, match=re.escape(said)):
        build_published(voxelmorph_file(**config), "voxelmorph")


def test_several_state_dicts_are_refused(tmp_path):
    torch.save({"model": {"a": torch.ones(1)}, "state_dict": {"a": torch.zeros(1)}}, tmp_path / "weights.pt")
    with pytest.raises(InputError, match=r"several state dicts \(state_dict, model\)"):
        read_state(tmp_path / "weights.pt")
    torch.save({"a": torch.ones(1), "_orig_mod.a": torch.zeros(1)}, tmp_path / "weights.pt")
    with pytest.raises(InputError, match="tensors of one name"):
        read_published(tmp_path / "weights.pt")


# --- the command ---


def test_the_command_makes_a_model_that_registers(tmp_path, capsys):
    names, hyperparameters = CASES["vit_v_net"]
    state = state_of(names)
    state["reg_head.0.weight"] *= 0.1
    torch.save({"state_dict": state}, tmp_path / "weights.pth.tar")
    model = tmp_path / "model.safetensors"
    settings = [f"{key}={json.dumps(value)}" for key, value in hyperparameters.items()]
    arguments = ["convert-weights", str(tmp_path / "weights.pth.tar"), "--network", "vit_v_net", "--out", str(model)]
    arguments += ["--shape", *map(str, SHAPE), "--spacing", "2.5", "--set", *settings]
    assert main(arguments) == 0
    assert capsys.readouterr().out.startswith(f"{model}: vit_v_net, ")
    network, metadata = load_weights(model)
    assert metadata["cohort"] == "published: weights.pth.tar"
    assert metadata["grid"]["spacing"] == [2.5, 2.5, 2.5]
    pair = torch.rand(1, 2, *SHAPE, generator=torch.Generator().manual_seed(1))
    with torch.no_grad():
        truth = plain_vit_v_net(state, pair)
        torch.testing.assert_close(network(pair[:, :1], pair[:, 1:]), truth, rtol=1e-4, atol=1e-4)

    affine = np.diag([2.5, 2.5, 2.5, 1.0])
    for index, name in enumerate(("moving", "fixed")):
        image = np.zeros(SHAPE, dtype=np.float32)
        image[4:-4, 4:-4, 2:-2] = 50 + 100 * pair[0, index, 4:-4, 4:-4, 2:-2].numpy()
        nib.save(nib.Nifti1Image(image, affine), tmp_path / f"{name}.nii.gz")
    scans = ["--moving", str(tmp_path / "moving.nii.gz"), "--fixed", str(tmp_path / "fixed.nii.gz"), "--no-affine"]
    assert main(["register", *scans, "--method", str(model), "--out", str(tmp_path / "out")]) == 0
    field, _ = load_field(tmp_path / "out" / "field.nii.gz")
    assert field.shape == (3, *SHAPE)
    assert np.isfinite(field).all() and field.std() > 0.01


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--set", "decoder"], "KEY=VALUE"),
        (["--set", "decodr=[8]"], "Did you mean 'decoder'"),
        (["--set", "decoder=5"], "decoder of voxelmorph"),
        (["--spacing", "0"], "--spacing"),
        ([], "missing"),
    ],
)
def test_the_command_tells_a_users_mistake_in_one_line(tmp_path, capsys, arguments, message):
    torch.save({"a": torch.ones(1)}, tmp_path / "weights.pt")
    command = ["convert-weights", str(tmp_path / "weights.pt"), "--network", "voxelmorph", "--shape", "16", "16", "16"]
    assert main([*command, "--out", str(tmp_path / "model.safetensors"), *arguments]) == 1
    error = capsys.readouterr().err
    assert message in error and error.count("\n") == 1
    assert not (tmp_path / "model.safetensors").exists()
