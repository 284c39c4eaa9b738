"""Published weights: what the authors' code of a network saved, as weights of the network here.

For VoxelMorph (both layouts of its torch code), ViT-V-Net and TransMorph. Each network has a table that says, for each
of its tensors, which published one it is; what is left over on either side is refused, so that nothing is lost or left
untrained in silence.

All three agree with the fields here: component k of what they call flow is the displacement along array axis k, in
voxels, and the warped image is the moving one at x + u(x). What the weights cannot tell is the images that they expect:
how their axes lie, their grid, and the range of their intensities are those of the authors' preprocessing.
"""

from __future__ import annotations

import re
import zipfile
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NoReturn

import numpy as np
import torch
from torch import nn

from dmir.archives import check_archive
from dmir.errors import InputError
from dmir.networks.building import build
from dmir.networks.swin import relative_position_index

CONVERTIBLE = ("voxelmorph", "vit_v_net", "transmorph")
# where checkpoints keep the state dict, beside the optimiser's and others
WRAPPERS = ("state_dict", "model_state_dict", "model_state", "model", "network", "net")
COMPILED = re.compile(r"(?:^|(?<=\.))_orig_mod\.")  # what torch.compile puts before a module's own names
PREFIXES = ("module.", "model.")  # of networks that were trained in parallel, or as a part of a LightningModule
WARPER_GRID = r"(.+\.)?grid"  # the voxel coordinates that a spatial transformer keeps
IMAGE_GRIDS = ("transformer.grid", "spatial_trans.grid")  # of the one that warps the image
INTEGRATION = "integrate."  # VoxelMorph's layer of that name, which its network without integration lacks
NAMED = 3  # keys named in a message, of many

State = Mapping[str, torch.Tensor]


@dataclass(frozen=True)
class Published:
    """A published file: its tensors, and what it says of its network beside them.

    Parameters
    ----------
    state
        Key to tensor, on the CPU.
    config
        The arguments of the network's constructor, which VoxelMorph's code saves; mostly empty.
    """

    state: dict[str, torch.Tensor]
    config: Mapping[str, Any]


@dataclass(frozen=True)
class Source:
    """Where a tensor comes from: its published key, and what is to be done to it.

    Parameters
    ----------
    key
        In the published state dict.
    change
        Given the published tensor, returns ours; by default the same.
    """

    key: str
    change: Callable[[torch.Tensor], torch.Tensor] = torch.Tensor.detach


@dataclass(frozen=True)
class Table:
    """What becomes of a published state dict.

    Parameters
    ----------
    sources
        For each tensor of the network here, where it comes from.
    unused
        Patterns of published keys that carry nothing, and what they must be: a shape, a tensor, or None for anything.
    """

    sources: Mapping[str, Source]
    unused: Mapping[str, tuple[int, ...] | torch.Tensor | None]


def read_published(path: str | Path) -> Published:
    """Read a published file; no code in it is run.

    Parameters
    ----------
    path
        What ``torch.save`` wrote: a state dict, or dicts that hold one under a name of :data:`WRAPPERS`. The
        prefixes of networks that were compiled, or trained in parallel, are taken off.

    Raises
    ------
    InputError
        The file is missing, cut short or damaged, needs code to be read, or holds no state dict or several.
    """
    path = Path(path)
    expected = "published weights: a state dict of tensors, saved by torch"
    if not path.is_file():
        raise InputError(path, found="no such file", expected=expected, remedy="Check the path.")
    if zipfile.is_zipfile(path):  # else of a torch before 1.6: a plain pickle, without checksums
        _require_whole(path, expected)
    try:
        with torch.serialization.safe_globals(_numbers()):
            content = torch.load(path, map_location="cpu", weights_only=True)
    except Exception as error:  # of many kinds: whatever a damaged or foreign file brings about
        raise InputError(
            path,
            found=f"a file that cannot be read as tensors alone{_code_needed(error)}",
            expected=expected,
            remedy="Files that hold code are never run. Where you trust it, open it with its authors' code and save "
            "only its tensors: torch.save(model.state_dict(), path).",
        ) from error
    config: Mapping[str, Any] = {}
    while inside := _inner_dicts(content):
        if len(inside) > 1:
            raise InputError(path, found=f"several state dicts ({', '.join(inside)})", expected="one")
        config = content["config"] if isinstance(content.get("config"), Mapping) else config
        content = content[inside[0]]
    held = content.items() if isinstance(content, Mapping) else ()
    if not held or not all(isinstance(key, str) and torch.is_tensor(tensor) for key, tensor in held):
        raise InputError(path, found=f"a {type(content).__name__} of other things", expected=expected)
    state = dict(zip(_plain_keys(content), content.values(), strict=True))
    if len(state) < len(content):
        raise InputError(path, found="tensors of one name with prefixes and without", expected=expected)
    return Published(state, config)


def _inner_dicts(content: Any) -> list[str]:
    """Return the names under which a checkpoint may keep its state dict."""
    return [key for key in WRAPPERS if isinstance(content, Mapping) and isinstance(content.get(key), Mapping)]


def read_state(path: str | Path) -> dict[str, torch.Tensor]:
    """Return the tensors of :func:`read_published`."""
    return read_published(path).state


def _plain_keys(keys: Iterable[str]) -> list[str]:
    """Return keys without what torch's wrappers put before them; other prefixes are taken off where all have them."""
    names = [COMPILED.sub("", key) for key in keys]
    while shared := [prefix for prefix in PREFIXES if all(name.startswith(prefix) for name in names)]:
        names = [name.removeprefix(shared[0]) for name in names]
    return names


def build_published(
    published: Published, name: str, shape: tuple[int, int, int] | None = None, **given: Any
) -> nn.Module:
    """Build a network as it was published, with its weights.

    Parameters
    ----------
    published
        Of :func:`read_published`.
    name
        One of :data:`CONVERTIBLE`.
    shape
        Grid (D, H, W) it was trained on, in voxels; None where the file says it.
    given
        Hyperparameters that are not the default and that the file does not say itself.

    Raises
    ------
    InputError
        What is given contradicts what the file says, or neither says what must be known; or as :func:`convert`.
    """
    stated = _stated(published, name)
    for key, value in {**given, **({} if shape is None else {"shape": shape})}.items():
        if key in stated and _plain_value(value) != stated[key]:
            raise InputError(
                f"{key} = {_plain_value(value)}",
                found=f"{key} = {stated[key]} in the published file itself",
                expected="what it was trained with",
                remedy="Leave it out: what the file says of itself is taken.",
            )
    own_shape = stated.pop("shape", shape)
    if own_shape is None:
        raise InputError(
            "--shape", found="nothing, here or in the published file", expected="the grid that it was trained on"
        )
    network = build(name, shape=tuple(own_shape), **{**stated, **given})
    network.load_state_dict(convert(published.state, network))
    if name == "voxelmorph" and "integration_steps" not in {**stated, **given}:
        raise InputError(
            "integration_steps",
            found="nothing in the published file that tells whether its field is a velocity, to be integrated",
            expected="0 (a displacement), or the number of steps (the authors' default is 7)",
            remedy="Give it: --set integration_steps=0.",
        )
    return network


def _plain_value(value: Any) -> Any:
    return [_plain_value(item) for item in value] if isinstance(value, list | tuple) else value


def _stated(published: Published, name: str) -> dict[str, Any]:
    """Return what a published file says of its network: ``shape`` and hyperparameters, by their names here."""
    known = VOXELMORPH_KEYS if name == "voxelmorph" else ()
    unknown = [key for key, value in published.config.items() if key not in known and value is not None]
    if unknown:
        raise InputError(
            f"published weights of {name}",
            found=f"{unknown[0]} = {published.config[unknown[0]]!r:.100} in its config, whose meaning is not known",
            expected=f"a config of {', '.join(known)}" if known else "no config",
            remedy="Save its tensors alone (torch.save(model.state_dict(), path)) and give hyperparameters by --set.",
        )
    try:
        stated = _of_voxelmorph(published.config) if name == "voxelmorph" else {}
    except (TypeError, ValueError) as error:
        found = f"a config that is none ({error})"
        raise InputError(f"published weights of {name}", found=found, expected="VoxelMorph's own") from error
    grids = [list(published.state[key].shape[2:]) for key in IMAGE_GRIDS if key in published.state]
    for grid in grids:
        if stated.setdefault("shape", grid) != grid:
            _contradiction(name, f"inshape {stated['shape']} in its config and a warper for {grid}")
    if name == "voxelmorph" and grids:  # the code that keeps one warper's grid keeps the other's too
        integrates = any(key.startswith(INTEGRATION) for key in published.state)
        steps = stated.get("integration_steps", None if integrates else 0)
        if steps is not None and bool(steps) != integrates:
            _contradiction(name, f"int_steps {steps} in its config, {'and' if integrates else 'but no'} integration")
        stated |= {} if steps is None else {"integration_steps": steps}
    return stated


def _contradiction(name: str, found: str) -> NoReturn:
    raise InputError(
        f"published weights of {name}",
        found=found,
        expected="a file that says one thing of itself",
        remedy="Save its tensors without the grids and the config, and give what is true by --shape and --set.",
    )


VOXELMORPH_FIXED = {
    "nb_unet_conv_per_level": 1,
    "use_probs": False,
    "src_feats": 1,
    "trg_feats": 1,
    "unet_half_res": False,
}
"""Arguments of VoxelMorph's constructor that have one value here."""
VOXELMORPH_KEYS = (
    *("inshape", "nb_unet_features", "nb_unet_levels", "unet_feat_mult", "int_steps", "int_downsize", "bidir"),
    *VOXELMORPH_FIXED,
)


def _of_voxelmorph(config: Mapping[str, Any]) -> dict[str, Any]:
    """Return what VoxelMorph's own config says, by the names of the hyperparameters here.

    ``bidir`` adds a loss in training alone. One number of features is that of the first level, multiplied from level to
    level; none are the authors' default, which is the default here.
    """
    for key, only in VOXELMORPH_FIXED.items():
        if config.get(key, only) != only:
            raise InputError(
                "published weights of voxelmorph",
                found=f"{key} = {config[key]!r:.100} in its config",
                expected=f"{only}: other networks of its authors' code are not made here",
            )
    stated: dict[str, Any] = {}
    if "inshape" in config:
        stated["shape"] = [int(size) for size in config["inshape"]]
    for theirs, ours in (("int_steps", "integration_steps"), ("int_downsize", "integration_downsampling")):
        if config.get(theirs) is not None:
            stated[ours] = int(config[theirs])
    features = config.get("nb_unet_features")
    if isinstance(features, int):
        factor, levels = config.get("unet_feat_mult", 1), config.get("nb_unet_levels") or 0
        widths = [round(features * factor**level) for level in range(levels)]
        stated |= {"encoder": widths[:-1], "decoder": widths[::-1]}
    elif features is not None:
        encoder, decoder = features
        stated |= {"encoder": [int(width) for width in encoder], "decoder": [int(width) for width in decoder]}
    return stated


def _require_whole(path: Path, expected: str) -> None:
    try:
        check_archive(path)
    except (ValueError, OSError, zipfile.BadZipFile) as error:
        found = f"a damaged archive ({error})"
        raise InputError(path, found=found, expected=expected, remedy="Fetch the file again.") from error


def convert(state: State, network: nn.Module) -> dict[str, torch.Tensor]:
    """Turn a published state dict into one that ``network.load_state_dict`` takes.

    Parameters
    ----------
    state
        Of :func:`read_state`.
    network
        A network that :func:`dmir.networks.build` built with the hyperparameters of the published one, for its grid.

    Returns
    -------
    dict
        Key to tensor, complete.

    Raises
    ------
    InputError
        There is no table for the network; or tensors are missing, left over, or of another shape.
    """
    name = str(network.name)
    tables = {"voxelmorph": _voxelmorph, "vit_v_net": _vit_v_net, "transmorph": _transmorph}
    if name not in tables:
        raise InputError("network", found=repr(name), expected=f"one of {', '.join(CONVERTIBLE)}")
    table = tables[name](network)
    _require_complete(state, table, network)
    converted = {}
    for key, wanted in network.state_dict().items():
        source = table.sources[key]
        try:
            tensor = source.change(state[source.key])
        except RuntimeError:  # it has not even the number of elements or axes that the change needs
            tensor = state[source.key]
        if tensor.shape != wanted.shape:
            raise _of_another_shape(
                network, source.key, state[source.key], f"what makes {key} of shape {tuple(wanted.shape)}"
            )
        converted[key] = tensor.to(wanted.dtype).clone()
    return converted


def _require_complete(state: State, table: Table, network: nn.Module) -> None:
    """Refuse what is missing and what is left over, on either side."""
    wanted = network.state_dict().keys()
    assert wanted == table.sources.keys(), f"table out of step: {sorted(wanted ^ table.sources.keys())[:NAMED]}"
    used = {source.key for source in table.sources.values()}
    left = [key for key in state if key not in used and not _carries_nothing(key, state[key], table, network)]
    missing = [key for key in used if key not in state]
    if left or missing:
        found = [_listed(keys, kind) for keys, kind in ((missing, "missing"), (left, "unknown")) if keys]
        raise InputError(
            f"published weights of {network.name}",
            found=" and ".join(found),
            expected=f"{len(used)} tensors, as the network with these hyperparameters was published",
            remedy="Check the network's name and its hyperparameters.",
        )


def _carries_nothing(key: str, tensor: torch.Tensor, table: Table, network: nn.Module) -> bool:
    """Tell whether a key is one of those that are left out; if so, it must be what the network here makes itself."""
    for pattern, due in table.unused.items():
        if re.fullmatch(pattern, key) is None:
            continue
        shape = tuple(due.shape) if isinstance(due, torch.Tensor) else due
        if shape is not None and tuple(tensor.shape) != shape:
            raise _of_another_shape(network, key, tensor, f"shape {shape}")
        if isinstance(due, torch.Tensor) and not torch.equal(tensor, due):
            raise InputError(
                f"published weights of {network.name}",
                found=f"{key} of other values",
                expected="those that follow from the hyperparameters",
                remedy="Give the hyperparameters that it was trained with, axes in the same order.",
            )
        return True
    return False


def _of_another_shape(network: nn.Module, key: str, tensor: torch.Tensor, expected: str) -> InputError:
    return InputError(
        f"published weights of {network.name}",
        found=f"{key} of shape {tuple(tensor.shape)}",
        expected=expected,
        remedy="Give the grid and the hyperparameters that it was trained with.",
    )


def _listed(keys: Iterable[str], kind: str) -> str:
    names = sorted(keys)
    more = ", ..." if len(names) > NAMED else ""
    return f"{len(names)} tensors {kind} ({', '.join(names[:NAMED])}{more})"


def _layer(ours: str, theirs: str, *names: str) -> dict[str, Source]:
    """A layer of the same tensors in both: weight and bias, unless they are named."""
    return {f"{ours}.{name}": Source(f"{theirs}.{name}") for name in names or ("weight", "bias")}


def _voxelmorph(network: Any) -> Table:
    """VoxelMorph's torch code: since 2021 ``encoder``, ``decoder``, ``remaining``; before, and beside TransMorph,
    ``downarm``, ``uparm``, ``extras``.

    The field is that of the authors' code without integration. With it, the velocity is; the code halves and doubles
    its values where grids of n and n / 2 voxels with the same corners differ by (n - 1) / (n / 2 - 1), as they are
    scaled here, and it composes with zeros beyond the border, not with the border's values.
    """
    pools = network.hyperparameters["downsampling"] == "pool"
    if pools:
        down, up, full, convolution = "encoder", "decoder", "remaining", ".0.main"
    else:
        down, up, full, convolution = "downarm", "uparm", "extras", ".main"
    depth = len(network.encoder)
    sources: dict[str, Source] = {}
    for index in range(depth):
        sources |= _layer(f"encoder.{index}.convolution", f"unet_model.{down}.{index}{convolution}")
    # what follows an upsampling is one block here: the next level's convolution, and the first at full resolution
    after = [f"unet_model.{up}.{index}{convolution}" for index in range(depth)] + [f"unet_model.{full}.0.main"]
    for ours, theirs in zip(["bottom", *(f"upsampling.{index}" for index in range(depth))], after, strict=True):
        sources |= _layer(f"{ours}.convolution", theirs)
    for index in range(len(network.full_resolution)):
        sources |= _layer(f"full_resolution.{index}.convolution", f"unet_model.{full}.{index + 1}.main")
    unused = {r"transformer\.grid": (1, 3, *network.shape), rf"{INTEGRATION}.*grid": None}
    return Table(sources | _layer("head", "flow"), unused)


def _vit_v_net(network: Any) -> Table:
    """ViT-V-Net's code: the positions are a table of tokens in raster order, (1, tokens, hidden)."""
    embeddings = "transformer.embeddings"
    cnn = f"{embeddings}.hybrid_model"
    sources: dict[str, Source] = {}
    for index in range(len(network.convolutions)):
        theirs = f"{cnn}.down{index}.maxpool_conv.1.double_conv" if index else f"{cnn}.inc.double_conv"
        sources |= _layer(f"convolutions.{index}.first", f"{theirs}.0")
        sources |= _layer(f"convolutions.{index}.second", f"{theirs}.2")
    grid = network.transformer.position.shape[2:]
    sources |= _layer("transformer.embedding", f"{embeddings}.patch_embeddings")
    sources["transformer.position"] = Source(
        f"{embeddings}.position_embeddings", lambda table: table.mT.unflatten(2, tuple(grid))
    )
    pairs = {"attention_norm": "attention_norm", "perceptron_norm": "ffn_norm", "widen": "ffn.fc1", "narrow": "ffn.fc2"}
    pairs |= {"query": "attn.query", "key": "attn.key", "value": "attn.value", "output": "attn.out"}
    for index in range(len(network.transformer.layers)):
        for ours, theirs in pairs.items():
            sources |= _layer(f"transformer.layers.{index}.{ours}", f"transformer.encoder.layer.{index}.{theirs}")
    sources |= _layer("transformer.norm", "transformer.encoder.encoder_norm")
    sources |= _with_batch_norm("bottleneck", "decoder.conv_more")
    for index in range(len(network.decoder)):
        sources |= _with_batch_norm(f"decoder.{index}.joining", f"decoder.blocks.{index}.conv1")
        sources |= _with_batch_norm(f"decoder.{index}.second", f"decoder.blocks.{index}.conv2")
    # a table of as many tokens can be that of another grid: the warper's tells
    return Table(sources | _layer("head", "reg_head.0"), {WARPER_GRID: (1, 3, *network.shape)})


def _with_batch_norm(ours: str, theirs: str) -> dict[str, Source]:
    statistics = ("weight", "bias", "running_mean", "running_var", "num_batches_tracked")
    return _layer(f"{ours}.convolution", f"{theirs}.0", "weight") | _layer(f"{ours}.norm", f"{theirs}.1", *statistics)


def _transmorph(network: Any) -> Table:
    """TransMorph's code, for IXI (field at full resolution) and OASIS (at half).

    The order of the corners in a merging and of the rows of position biases is the same in both. The buffers of row
    numbers follow from the window. For OASIS a convolution of the code, ``c2``, is never called.
    """
    levels = len(network.encoder.stages)
    sources = _layer("encoder.embedding.convolution", "transformer.patch_embed.proj")
    sources |= _layer("encoder.embedding.norm", "transformer.patch_embed.norm")
    for level, stage in enumerate(network.encoder.stages):
        for index in range(len(stage.blocks)):
            sources |= _swin_block(
                f"encoder.stages.{level}.blocks.{index}",
                f"transformer.layers.{level}.blocks.{index}",
                stage.blocks[index],
            )
        sources |= _layer(f"encoder.norms.{level}", f"transformer.norm{level}")
    for level in range(levels - 1):
        theirs = f"transformer.layers.{level}.downsample"
        sources |= _layer(f"encoder.merging.{level}.norm", f"{theirs}.norm")
        sources |= _layer(f"encoder.merging.{level}.reduction", f"{theirs}.reduction", "weight")
    blocks = [f"decoder.{index}" for index in range(levels - 1)] + ["to_half"]
    sources |= _layer("half_skip.convolution", "c1.0", "weight")
    rows = relative_position_index(tuple(network.hyperparameters["window"]))
    unused: dict[str, tuple[int, ...] | torch.Tensor | None] = {
        WARPER_GRID: (1, 3, *network.shape),
        r".+\.relative_position_index": rows,
    }
    if network.full_resolution:
        blocks.append("to_full")
        sources |= _layer("full_skip.convolution", "c2.0", "weight")
    else:
        unused[r"c2\.0\.weight"] = (network.head.in_channels, 2, 3, 3, 3)
    for index, ours in enumerate(blocks):
        sources |= _layer(f"{ours}.joining", f"up{index}.conv1.0", "weight")
        sources |= _layer(f"{ours}.second.convolution", f"up{index}.conv2.0", "weight")
    return Table(sources | _layer("head", "reg_head.0"), unused)


def _swin_block(ours: str, theirs: str, block: Any) -> dict[str, Source]:
    """A block of a Swin transformer, whose projection to queries, keys and values is one layer in the code."""
    sources = {f"{ours}.attention.position_bias": Source(f"{theirs}.attn.relative_position_bias_table")}
    pairs = {"attention_norm": "norm1", "attention.output": "attn.proj", "perceptron_norm": "norm2"}
    pairs |= {"perceptron.widen": "mlp.fc1", "perceptron.narrow": "mlp.fc2"}
    for our_layer, their_layer in pairs.items():
        sources |= _layer(f"{ours}.{our_layer}", f"{theirs}.{their_layer}")
    for name, _ in block.attention.query.named_parameters():
        sources[f"{ours}.attention.query.{name}"] = Source(f"{theirs}.attn.qkv.{name}", lambda qkv: qkv.chunk(3)[0])
        sources[f"{ours}.attention.key_value.{name}"] = Source(
            f"{theirs}.attn.qkv.{name}", lambda qkv: torch.cat(qkv.chunk(3)[1:])
        )
    return sources


def _numbers() -> list[Any]:
    """What a pickle needs to hold numpy numbers, as checkpoints do beside the weights: data, and nothing that runs."""
    scalar = np.float64(0).__reduce__()[0]
    kinds = [type(np.dtype(kind)) for kind in (np.float32, np.float64, np.int32, np.int64, np.bool_)]
    # older numpy pickled under another module's name
    return [scalar, (scalar, "numpy.core.multiarray.scalar"), np.dtype, *kinds]


def _code_needed(error: Exception) -> str:
    """Return the name of the first class or function that a pickle calls for, in words."""
    # torch's own message advises to run the code
    name = re.search(r"GLOBAL (\S+)", str(error))
    return f": it calls for {name[1]}" if name else ""
