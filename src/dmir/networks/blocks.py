"""Layers that networks share: convolutions, residual blocks, gates, and going up and down a level.

Two layouts are used. A *volume* is (B, C, D, H, W), what convolutions take. *Tokens* are (B, D, H, W, C), what linear
layers and attention take. Each is a view of the other: tokens lie in memory as a volume in ``channels_last_3d`` does,
the layout in which convolutions are fastest on CPUs, so that nothing is copied on the way.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import nn
from torch.autograd.function import once_differentiable
from torch.utils.checkpoint import checkpoint

from dmir.errors import InputError

SLOPE = 0.2  # of LeakyReLU below zero, VoxelMorph's
SMALL_VOLUME = 20480  # torch convolves up to so many rows (batch x channels x depth x height) without oneDNN


def to_tokens(volume: torch.Tensor) -> torch.Tensor:
    """View a volume (B, C, D, H, W) as tokens (B, D, H, W, C)."""
    return volume.movedim(1, -1)


def to_volume(tokens: torch.Tensor) -> torch.Tensor:
    """View tokens (B, D, H, W, C) as a volume (B, C, D, H, W)."""
    return tokens.movedim(-1, 1)


def pad_to_multiple(volume: torch.Tensor, multiple: int) -> torch.Tensor:
    """Add zeros at the far end of each spatial axis until a multiple of ``multiple`` is reached."""
    missing = [-n % multiple for n in volume.shape[2:]]
    if not any(missing):
        return volume
    return F.pad(volume, [0, missing[2], 0, missing[1], 0, missing[0]])


def crop(volume: torch.Tensor, shape: Sequence[int]) -> torch.Tensor:
    """Cut the far end of each spatial axis off: what :func:`pad_to_multiple` added."""
    depth, height, width = shape
    return volume[:, :, :depth, :height, :width]


def fastest_layout(volume: torch.Tensor) -> torch.Tensor:
    """Lay a volume out as the convolutions that follow are fastest: channels last on CPUs and in reduced precision.

    Convolutions pass a layout on, but images of one channel have none to begin with, and torch's own convolution of
    small volumes forgets it.
    """
    if volume.device.type == "cpu" or torch.is_autocast_enabled(volume.device.type):
        return volume.contiguous(memory_format=torch.channels_last_3d)
    return volume


def require_pair(moving: torch.Tensor, fixed: torch.Tensor) -> None:
    """Refuse what is no pair of batches of one-channel volumes on one grid."""
    if moving.shape != fixed.shape or moving.ndim != 5 or moving.shape[1] != 1:
        raise InputError(
            "network(moving, fixed)",
            found=f"shapes {tuple(moving.shape)} and {tuple(fixed.shape)}",
            expected="two equal shapes (B, 1, D, H, W)",
        )


def require_levels(**sizes: Sequence[int]) -> None:
    """Refuse levels whose sizes, one sequence a name, are not all positive and of one length."""
    for name, values in sizes.items():
        if not values or min(values) < 1:
            raise InputError(name, found=str(list(values)), expected="positive whole numbers")
    if len({len(values) for values in sizes.values()}) != 1:
        raise InputError(
            ", ".join(sizes),
            found=", ".join(str(list(values)) for values in sizes.values()),
            expected="one number a level in each",
        )


def require_drop_path(rate: float) -> None:
    """Refuse a rate of stochastic depth that is no probability of leaving something in."""
    if not 0.0 <= rate < 1.0:
        raise InputError("drop_path", found=str(rate), expected="at least 0 and below 1")


def drop_path_rates(depths: Sequence[int], largest: float) -> list[list[float]]:
    """Return a rate of stochastic depth for each block of each level: from 0, linearly, to the largest at the last."""
    last = max(sum(depths) - 1, 1)
    starts = [sum(depths[:level]) for level in range(len(depths))]
    return [
        [largest * block / last for block in range(start, start + depth)]
        for start, depth in zip(starts, depths, strict=True)
    ]


def stochastic_depth(update: torch.Tensor, rate: float, together: int = 1) -> torch.Tensor:
    """Leave out, at random, what would be added to whole images (stochastic depth, Huang et al. 2016).

    Parameters
    ----------
    update
        (together B, D, H, W, C).
    rate
        Probability of being left out; what stays is scaled up by as much.
    together
        So many stacks along the batch share their fate: 2 for both images of a pair, or neither.
    """
    keep = 1.0 - rate
    drawn = update.new_empty(update.shape[0] // together, 1, 1, 1, 1).bernoulli_(keep) / keep
    return update * drawn.repeat(together, 1, 1, 1, 1)


def through_blocks(
    blocks: nn.ModuleList, tokens: torch.Tensor, *others: torch.Tensor | None, checkpointing: bool
) -> torch.Tensor:
    """Send tokens through blocks; with ``checkpointing``, keep only what is between them for the gradient."""
    for block in blocks:
        if checkpointing and torch.is_grad_enabled():
            tokens = checkpoint(block, tokens, *others, use_reentrant=False)
        else:
            tokens = block(tokens, *others)
    return tokens


def convolve(volume: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor | None = None) -> torch.Tensor:
    """Convolve a volume (B, C, D, H, W) 3x3x3, padded with zeros, and lay the result out as is fastest."""
    volume = fastest_layout(volume)
    if volume.device.type == "cpu" and not torch.is_autocast_enabled("cpu") and volume.dtype == torch.float32:
        return _Convolution.apply(volume, weight, bias)
    return fastest_layout(padded_convolution(volume, weight, bias))


def padded_convolution(volume: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor | None = None) -> torch.Tensor:
    """Convolve a volume (B, C, D, H, W) 3x3x3, padded with zeros.

    On CPUs with bfloat16, torch 2.13 leaves the weight's gradient unwritten where there are two planes: whatever was in
    that memory, up to infinity, would be learnt from. A third plane, of zeros, changes no number and has a gradient.
    """
    low = volume.dtype == torch.bfloat16 or torch.is_autocast_enabled(volume.device.type)
    if low and volume.shape[2] == 2:  # on every device: so small a volume costs nothing
        return F.conv3d(F.pad(volume, [0, 0, 0, 0, 0, 1]), weight, bias, padding=1)[:, :, :2]
    return F.conv3d(volume, weight, bias, padding=1)


class PaddedConvolution(nn.Conv3d):
    """Convolution 3x3x3, padded with zeros, as a module: see :func:`padded_convolution`."""

    def __init__(self, in_channels: int, out_channels: int, stride: int = 1, bias: bool = True) -> None:
        super().__init__(in_channels, out_channels, 3, stride=stride, padding=1, bias=bias)

    def forward(self, volume: torch.Tensor) -> torch.Tensor:
        """(B, in_channels, D, H, W) -> (B, out_channels, D', H', W')."""
        return padded_convolution(volume, self.weight, self.bias) if self.stride[0] == 1 else super().forward(volume)


class _Convolution(torch.autograd.Function):
    """Convolution 3x3x3 in float32 by those of torch's algorithms that are fast on a CPU.

    - For small volumes torch takes one that is up to ten times as slow as for a batch: the halves of such a volume
      along the first axis are its batch. Channels last, the batch of the halves of the result is the result.
    - The weight's gradient correlates volume and gradient, and is up to seven times as fast with the one of fewer
      channels in the volume's place: the head's three, above all.
    """

    @staticmethod
    def forward(ctx: Any, volume: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor | None) -> torch.Tensor:
        ctx.save_for_backward(volume, weight)
        return _convolved(volume, weight, bias)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, gradient: torch.Tensor) -> tuple[torch.Tensor | None, ...]:
        volume, weight = ctx.saved_tensors
        gradient = fastest_layout(gradient)
        of_volume, of_weight, of_bias = ctx.needs_input_grad
        return (
            _convolved(gradient, _mirrored(weight), None) if of_volume else None,
            _correlated(volume, gradient) if of_weight else None,
            gradient.sum(dim=(0, 2, 3, 4)) if of_bias else None,
        )


def _convolved(volume: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor | None) -> torch.Tensor:
    if not _is_small(volume):
        return fastest_layout(F.conv3d(volume, weight, bias, padding=1))
    halves = to_tokens(F.conv3d(_halves(volume, 1), weight, bias, padding=(0, 1, 1))).contiguous()
    whole = to_volume(halves.view(1, -1, *halves.shape[2:])[:, : volume.shape[2]])
    # the same memory, but no view: what is done to a view in place costs copies in the gradient
    return whole.new_empty(0).set_(whole.untyped_storage(), 0, whole.shape, whole.stride())


def _correlated(volume: torch.Tensor, gradient: torch.Tensor) -> torch.Tensor:
    """Return the gradient of a weight, (channels of ``gradient``, channels of ``volume``, 3, 3, 3)."""
    if volume.shape[1] > gradient.shape[1]:
        return _mirrored(_correlated(gradient, volume))
    weight, padding = volume.new_empty(gradient.shape[1], volume.shape[1], 3, 3, 3), 1
    if _is_small(volume):
        volume, gradient, padding = _halves(volume, 1), _halves(gradient, 0), 0
    rest = (None, [1, 1, 1], [padding, 1, 1], [1, 1, 1], False, [0, 0, 0], 1)  # no bias, stride, padding, dilation, ...
    found: torch.Tensor
    _, found, _ = torch.ops.aten.convolution_backward(gradient, volume, weight, *rest, [False, True, False])
    return found


def _mirrored(weight: torch.Tensor) -> torch.Tensor:
    """Return the weight of the convolution that takes a convolution's gradient back."""
    return weight.transpose(0, 1).flip(2, 3, 4).contiguous()


def _is_small(volume: torch.Tensor) -> bool:
    batch, channels, depth, height, _ = volume.shape
    return batch == 1 and depth > 1 and channels * depth * height <= SMALL_VOLUME


def _halves(volume: torch.Tensor, margin: int) -> torch.Tensor:
    """(1, C, D, H, W) -> (2, C, ceil(D/2) + 2 margin, H, W): with layers of the other half, or of zeros, round each."""
    half = (volume.shape[2] + 1) // 2
    tokens = to_tokens(F.pad(volume, [0, 0, 0, 0, margin, margin + volume.shape[2] % 2]))
    return to_volume(torch.cat([tokens[:, : half + 2 * margin], tokens[:, half:]]))


class ConvolutionBlock(nn.Module):
    """Convolution 3x3x3 and LeakyReLU.

    Parameters
    ----------
    in_channels, out_channels
        Of the volume.
    stride
        2 halves the grid: n voxels become ceil(n / 2).
    """

    def __init__(self, in_channels: int, out_channels: int, stride: int = 1) -> None:
        super().__init__()
        self.convolution = nn.Conv3d(in_channels, out_channels, 3, stride=stride, padding=1)

    def forward(self, volume: torch.Tensor) -> torch.Tensor:
        """(B, in_channels, D, H, W) -> (B, out_channels, D, H, W)."""
        if self.convolution.stride[0] == 1:
            convolved = convolve(volume, self.convolution.weight, self.convolution.bias)
        else:
            convolved = fastest_layout(self.convolution(volume))
        return F.leaky_relu(convolved, SLOPE, inplace=True)


class UpsamplingBlock(nn.Module):
    """Nearest-neighbour upsampling by two, concatenation with a finer volume, convolution 3x3x3, LeakyReLU.

    The upsampled volume and the concatenation are never made. Convolution is linear in its input channels, so the two
    parts are convolved apart and added; and repeating each voxel 2x2x2 times before a convolution 3x3x3 is one
    transposed convolution 4x4x4 of stride 2, whose 8 products a voxel replace 27. The numbers are the same.

    Parameters
    ----------
    coarse_channels, fine_channels, out_channels
        Of the volume that is upsampled, of the finer one, and of the result.
    """

    def __init__(self, coarse_channels: int, fine_channels: int, out_channels: int) -> None:
        super().__init__()
        self.coarse_channels = coarse_channels
        self.convolution = nn.Conv3d(coarse_channels + fine_channels, out_channels, 3, padding=1)

    def forward(self, coarse: torch.Tensor, fine: torch.Tensor) -> torch.Tensor:
        """(B, coarse_channels, d, h, w) and (B, fine_channels, D, H, W), D <= 2d, -> (B, out_channels, D, H, W)."""
        weight = self.convolution.weight
        upsampled = F.conv_transpose3d(
            coarse, self._transposed_weight(weight[:, : self.coarse_channels]), stride=2, padding=1
        )
        volume = convolve(fine, weight[:, self.coarse_channels :], self.convolution.bias)
        volume += crop(upsampled, fine.shape[2:])  # in place: at full resolution these are the largest tensors
        return F.leaky_relu(fastest_layout(volume), SLOPE, inplace=True)

    @staticmethod
    def _transposed_weight(weight: torch.Tensor) -> torch.Tensor:
        kernel = weight.transpose(0, 1).flip(2, 3, 4)  # a transposed convolution scatters: mirrored kernel
        for axis in range(3):  # convolved with the box 1, 1 that repetition is, along each axis
            before = [0, 0] * (2 - axis) + [1, 0]
            after = [0, 0] * (2 - axis) + [0, 1]
            kernel = F.pad(kernel, before) + F.pad(kernel, after)
        return kernel


class ResidualBlock(nn.Module):
    """x + convolution(LeakyReLU(convolution(x))), both 3x3x3 (He et al. 2016)."""

    def __init__(self, channels: int) -> None:
        super().__init__()
        self.first = ConvolutionBlock(channels, channels)
        self.second = nn.Conv3d(channels, channels, 3, padding=1)

    def forward(self, volume: torch.Tensor) -> torch.Tensor:
        """(B, channels, D, H, W) -> the same shape."""
        return volume + convolve(self.first(volume), self.second.weight, self.second.bias)


class AttentionGate(nn.Module):
    """Additive attention gate (Oktay et al. 2018, equations 1 and 2): each token is scaled by a number in (0, 1).

    Parameters
    ----------
    channels
        Of the gated and of the gating tokens.
    """

    def __init__(self, channels: int) -> None:
        super().__init__()
        hidden = max(channels // 2, 1)
        self.of_gated = nn.Linear(channels, hidden)
        self.of_gating = nn.Linear(channels, hidden, bias=False)
        self.score = nn.Linear(hidden, 1)

    def forward(self, gated: torch.Tensor, gating: torch.Tensor) -> torch.Tensor:
        """(B, D, H, W, channels) twice -> the first, scaled."""
        score = self.score(F.relu(self.of_gated(gated) + self.of_gating(gating)))
        return gated * torch.sigmoid(score)


class PatchMerging(nn.Module):
    """Down a level: each 2x2x2 tokens become one of ``out_channels``, then layer normalisation."""

    def __init__(self, in_channels: int, out_channels: int) -> None:
        super().__init__()
        self.reduction = nn.Conv3d(in_channels, out_channels, 2, stride=2)
        self.norm = nn.LayerNorm(out_channels)

    def forward(self, volume: torch.Tensor) -> torch.Tensor:
        """(B, in_channels, D, H, W) -> tokens (B, ceil(D/2), ceil(H/2), ceil(W/2), out_channels)."""
        return self.norm(to_tokens(self.reduction(pad_to_multiple(volume, 2))))


class PatchExpanding(nn.Module):
    """Up a level: each token becomes 2x2x2 of ``out_channels``, then layer normalisation."""

    def __init__(self, in_channels: int, out_channels: int) -> None:
        super().__init__()
        self.expansion = nn.ConvTranspose3d(in_channels, out_channels, 2, stride=2)
        self.norm = nn.LayerNorm(out_channels)

    def forward(self, tokens: torch.Tensor, shape: Sequence[int]) -> torch.Tensor:
        """Tokens (B, d, h, w, in_channels) -> tokens (B, *shape, out_channels), D = 2d or 2d - 1."""
        return self.norm(to_tokens(crop(self.expansion(to_volume(tokens)), shape)))


class MultilayerPerceptron(nn.Module):
    """Linear, GELU, linear, on each token."""

    def __init__(self, channels: int, ratio: float) -> None:
        super().__init__()
        hidden = max(round(channels * ratio), 1)
        self.widen = nn.Linear(channels, hidden)
        self.narrow = nn.Linear(hidden, channels)

    def forward(self, tokens: torch.Tensor) -> torch.Tensor:
        """(..., channels) -> the same shape."""
        return self.narrow(F.gelu(self.widen(tokens)))


class DisplacementHead(nn.Conv3d):
    """Convolution 3x3x3 to three components, with weights from N(0, 1e-5): training starts at the identity."""

    def __init__(self, in_channels: int) -> None:
        super().__init__(in_channels, 3, 3, padding=1)
        nn.init.normal_(self.weight, std=1e-5)
        assert self.bias is not None
        nn.init.zeros_(self.bias)

    def forward(self, volume: torch.Tensor) -> torch.Tensor:
        """(B, in_channels, D, H, W) -> (B, 3, D, H, W), float32 at least, laid out as warping and resizing like it."""
        field = convolve(volume, self.weight, self.bias)
        return field.to(torch.promote_types(field.dtype, torch.float32)).contiguous()
