"""ViT-V-Net (Chen et al. 2021, arXiv:2104.06468): a V-Net whose coarsest level is a vision transformer."""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import nn

from dmir.errors import InputError
from dmir.networks.blocks import DisplacementHead, convolve, crop, pad_to_multiple, require_pair, through_blocks
from dmir.networks.upsampling import add_upsampled_convolution

EPSILON = 1e-6  # of layer normalisation, as published


class DoubleConvolution(nn.Module):
    """Convolution 3x3x3 and (Leaky)ReLU, twice.

    Parameters
    ----------
    in_channels, out_channels
        Of the volume.
    slope
        Of the activation below zero.
    """

    def __init__(self, in_channels: int, out_channels: int, slope: float) -> None:
        super().__init__()
        self.slope = slope
        self.first = nn.Conv3d(in_channels, out_channels, 3, padding=1)
        self.second = nn.Conv3d(out_channels, out_channels, 3, padding=1)

    def forward(self, volume: torch.Tensor) -> torch.Tensor:
        """(B, in_channels, D, H, W) -> (B, out_channels, D, H, W)."""
        for convolution in (self.first, self.second):
            volume = convolve(volume, convolution.weight, convolution.bias)
            volume = F.leaky_relu(volume, self.slope, inplace=True)
        return volume


class BatchNormalisedConvolution(nn.Module):
    """Convolution 3x3x3, batch normalisation, (Leaky)ReLU; parameters as :class:`DoubleConvolution`.

    Out of training the normalisation is part of the convolution's weights: it costs nothing.
    """

    def __init__(self, in_channels: int, out_channels: int, slope: float) -> None:
        super().__init__()
        self.slope = slope
        self.convolution = nn.Conv3d(in_channels, out_channels, 3, padding=1, bias=False)
        self.norm = nn.BatchNorm3d(out_channels)

    def forward(self, volume: torch.Tensor) -> torch.Tensor:
        """(B, in_channels, D, H, W) -> (B, out_channels, D, H, W)."""
        return self.activate(convolve(volume, *self.weights()))

    def weights(self) -> tuple[torch.Tensor, torch.Tensor | None]:
        """Return the weights and the bias to convolve with."""
        norm, weight = self.norm, self.convolution.weight
        if self.training:
            return weight, None
        assert norm.running_mean is not None and norm.running_var is not None
        scale = norm.weight * torch.rsqrt(norm.running_var + norm.eps)
        return weight * scale.view(-1, 1, 1, 1, 1), norm.bias - norm.running_mean * scale

    def activate(self, convolved: torch.Tensor) -> torch.Tensor:
        """Do what is left to do after the convolution."""
        norm = self.norm
        if self.training and convolved.numel() > convolved.shape[1]:
            convolved = norm(convolved)
        elif self.training:  # one value a channel, a single token, has no variance
            convolved = F.batch_norm(
                convolved, norm.running_mean, norm.running_var, norm.weight, norm.bias, eps=norm.eps
            )
        return F.leaky_relu(convolved, self.slope, inplace=True)


class DecoderBlock(nn.Module):
    """Trilinear upsampling by two, concatenation with a skipped volume, two normalised convolutions.

    Neither what is upsampled nor the concatenation is ever made, see
    :func:`~dmir.networks.upsampling.add_upsampled_convolution`.

    Parameters
    ----------
    coarse_channels, skipped_channels, out_channels
        Of the volume that is upsampled, of the skipped one, and of the result.
    slope
        Of the activations below zero.
    """

    def __init__(self, coarse_channels: int, skipped_channels: int, out_channels: int, slope: float) -> None:
        super().__init__()
        self.coarse_channels = coarse_channels
        self.joining = BatchNormalisedConvolution(coarse_channels + skipped_channels, out_channels, slope)
        self.second = BatchNormalisedConvolution(out_channels, out_channels, slope)

    def forward(self, coarse: torch.Tensor, skipped: torch.Tensor) -> torch.Tensor:
        """(B, coarse_channels, d, h, w) and (B, skipped_channels, 2d, 2h, 2w) -> (B, out_channels, 2d, 2h, 2w)."""
        weight, bias = self.joining.weights()
        of_coarse, of_skipped = weight.split([self.coarse_channels, skipped.shape[1]], dim=1)
        volume = convolve(skipped, of_skipped, bias)
        return self.second(self.joining.activate(add_upsampled_convolution(volume, coarse, of_coarse)))


class TransformerLayer(nn.Module):
    """Self attention among all tokens and a perceptron, each on normalised tokens and added to them.

    Dosovitskiy et al. 2021, equations 2 and 3, with dropout in the perceptron.

    Parameters
    ----------
    hidden, heads
        Channels of the tokens; ``heads`` divides them.
    perceptron
        Width of the perceptron's hidden layer.
    dropout
        Rate.
    """

    def __init__(self, hidden: int, heads: int, perceptron: int, dropout: float) -> None:
        super().__init__()
        self.heads = heads
        self.attention_norm = nn.LayerNorm(hidden, eps=EPSILON)
        self.query = nn.Linear(hidden, hidden)
        self.key = nn.Linear(hidden, hidden)
        self.value = nn.Linear(hidden, hidden)
        self.output = nn.Linear(hidden, hidden)
        self.perceptron_norm = nn.LayerNorm(hidden, eps=EPSILON)
        self.widen = nn.Linear(hidden, perceptron)
        self.narrow = nn.Linear(perceptron, hidden)
        self.dropout = nn.Dropout(dropout)
        for linear in (self.widen, self.narrow):  # as published
            nn.init.xavier_uniform_(linear.weight)
            nn.init.normal_(linear.bias, std=1e-6)

    def forward(self, tokens: torch.Tensor) -> torch.Tensor:
        """(B, tokens, hidden) -> the same shape."""
        tokens = tokens + self._attention(self.attention_norm(tokens))
        hidden = self.dropout(F.gelu(self.widen(self.perceptron_norm(tokens))))
        return tokens + self.dropout(self.narrow(hidden))

    def _attention(self, tokens: torch.Tensor) -> torch.Tensor:
        parts = [layer(tokens).unflatten(2, (self.heads, -1)) for layer in (self.query, self.key, self.value)]
        if tokens.device.type == "cpu":  # where attention in bfloat16 is slow
            parts = [part.to(torch.promote_types(part.dtype, torch.float32)) for part in parts]
        with torch.autocast(tokens.device.type, enabled=False):
            answer = F.scaled_dot_product_attention(*(part.transpose(1, 2) for part in parts))
        return self.output(answer.transpose(1, 2).flatten(2))


class VisionTransformer(nn.Module):
    """Patches become tokens with a learnt position, which look at one another.

    Parameters
    ----------
    in_channels, patch
        Of the volume, and the edge of a patch in voxels of it.
    grid
        Number of patches (d, h, w) that there are positions for. On another grid they are interpolated.
    hidden, layers, heads, perceptron, dropout
        See :class:`ViTVNet`.
    checkpointing
        See :class:`ViTVNet`.
    """

    def __init__(
        self,
        in_channels: int,
        patch: int,
        grid: Sequence[int],
        *,
        hidden: int,
        layers: int,
        heads: int,
        perceptron: int,
        dropout: float,
        checkpointing: bool,
    ) -> None:
        super().__init__()
        self.checkpointing = checkpointing
        self.embedding = nn.Conv3d(in_channels, hidden, patch, stride=patch)
        self.position = nn.Parameter(torch.zeros(1, hidden, *grid))
        self.dropout = nn.Dropout(dropout)
        self.layers = nn.ModuleList(TransformerLayer(hidden, heads, perceptron, dropout) for _ in range(layers))
        self.norm = nn.LayerNorm(hidden, eps=EPSILON)

    def forward(self, volume: torch.Tensor) -> torch.Tensor:
        """(B, in_channels, D, H, W), multiples of the patch -> (B, hidden, D / patch, H / patch, W / patch)."""
        embedded = self.embedding(volume)
        position: torch.Tensor = self.position
        if embedded.shape[2:] != position.shape[2:]:
            position = F.interpolate(position, size=embedded.shape[2:], mode="trilinear", align_corners=False)
        tokens = self.dropout((embedded + position).flatten(2).transpose(1, 2))
        tokens = through_blocks(self.layers, tokens, checkpointing=self.checkpointing)
        return self.norm(tokens).transpose(1, 2).unflatten(2, embedded.shape[2:])


class ViTVNet(nn.Module):
    """ViT-V-Net; 31,560,079 parameters at 160x192x224, as the authors' code (31,544,959 at 160x192x160).

    Parameters
    ----------
    shape
        Grid (D, H, W) that the learnt positions are for. Any other works too: the positions are interpolated. Inside,
        the far ends are padded with zeros to whole patches; the authors' code takes only grids that are.
    convolutions
        Channels of the double convolutions at 1, 1/2, 1/4, ...
    patch
        Edge of a patch, a power of two from 2, in voxels of the coarsest of these levels.
    hidden, layers, heads, perceptron
        Of the transformer: channels of a token, layers, heads, which divide the channels, and the width of the
        perceptrons.
    dropout
        Rate, of the embedded patches and in the perceptrons (none of the attention weights, as published).
    bottleneck
        Channels of the convolution that follows the transformer.
    decoder
        Channels on the way up, one a doubling of the grid: from the tokens' grid to full resolution. Each level is
        joined with what the convolutions gave at it; below their coarsest, that is max-pooled further.
    slope
        Of the activations below zero. 0, ReLU, is what the authors' comparisons and the code beside the TransMorph
        paper have; their own repository has also had LeakyReLU, 0.01.
    checkpointing
        In training, keep the tokens between the transformer's layers only.

    Raises
    ------
    InputError
        The hyperparameters make no network.
    """

    TITLE = "ViT-V-Net"
    PAPER = "Chen et al. 2021, arXiv:2104.06468"
    COLOUR, MARKER = "#e69f00", "v"

    def __init__(
        self,
        shape: tuple[int, int, int],
        *,
        convolutions: Sequence[int] = (16, 32, 32),
        patch: int = 8,
        hidden: int = 252,
        layers: int = 12,
        heads: int = 12,
        perceptron: int = 3072,
        dropout: float = 0.1,
        bottleneck: int = 512,
        decoder: Sequence[int] = (96, 48, 32, 32, 16),
        slope: float = 0.0,
        checkpointing: bool = False,
    ) -> None:
        super().__init__()
        _check(convolutions, patch, hidden, layers, heads, perceptron, dropout, bottleneck, decoder)
        self.edge = patch * 2 ** (len(convolutions) - 1)  # of a token, in voxels of the images
        self.pools = len(decoder) - len(convolutions)  # levels between the last convolutions and the tokens
        self.convolutions = nn.ModuleList(
            DoubleConvolution(before, after, slope)
            for before, after in zip((2, *convolutions), convolutions, strict=False)
        )
        self.transformer = VisionTransformer(
            convolutions[-1],
            patch,
            [math.ceil(n / self.edge) for n in shape],
            hidden=hidden,
            layers=layers,
            heads=heads,
            perceptron=perceptron,
            dropout=dropout,
            checkpointing=checkpointing,
        )
        self.bottleneck = BatchNormalisedConvolution(hidden, bottleneck, slope)
        skipped = [convolutions[-1]] * self.pools + list(convolutions[::-1])
        self.decoder = nn.ModuleList(
            DecoderBlock(coarse, beside, after, slope)
            for coarse, beside, after in zip((bottleneck, *decoder[:-1]), skipped, decoder, strict=True)
        )
        self.head = DisplacementHead(decoder[-1])

    def forward(self, moving: torch.Tensor, fixed: torch.Tensor) -> torch.Tensor:
        """Return the displacement (B, 3, D, H, W), float32, in voxels, of two images (B, 1, D, H, W)."""
        require_pair(moving, fixed)
        volume = pad_to_multiple(torch.cat([moving, fixed], dim=1), self.edge)
        skipped: list[torch.Tensor] = []
        for convolution in self.convolutions:
            volume = convolution(F.max_pool3d(volume, 2) if skipped else volume)
            skipped.append(volume)
        tokens = self.transformer(volume)
        for _ in range(self.pools):
            skipped.append(F.max_pool3d(skipped[-1], 2))
        volume = self.bottleneck(tokens)
        for block in self.decoder:
            volume = block(volume, skipped.pop())  # popped: what no gradient needs is freed on the way up
        return crop(self.head(volume), moving.shape[2:]).contiguous()


def _check(
    convolutions: Sequence[int],
    patch: int,
    hidden: int,
    layers: int,
    heads: int,
    perceptron: int,
    dropout: float,
    bottleneck: int,
    decoder: Sequence[int],
) -> None:
    if not convolutions or not decoder or min(*convolutions, *decoder, bottleneck, hidden, perceptron) < 1:
        raise InputError(
            "convolutions, decoder, bottleneck, hidden, perceptron",
            found=f"{list(convolutions)}, {list(decoder)}, {bottleneck}, {hidden}, {perceptron}",
            expected="positive numbers of channels",
        )
    if patch < 2 or patch & (patch - 1):
        raise InputError("patch", found=str(patch), expected="a power of two from 2")
    doublings = len(convolutions) - 1 + patch.bit_length() - 1
    if len(decoder) != doublings:
        raise InputError(
            "decoder",
            found=f"{len(decoder)} widths",
            expected=f"{doublings}, one a doubling from the tokens' grid to full resolution",
            remedy=f"With patch={patch} and {len(convolutions)} levels of convolutions a token is "
            f"{2**doublings} voxels long.",
        )
    if heads < 1 or hidden % heads:
        raise InputError("heads", found=f"{heads} for {hidden} channels", expected="a divisor of the channels")
    if layers < 0 or not 0.0 <= dropout < 1.0:
        raise InputError(
            "layers, dropout", found=f"{layers}, {dropout}", expected="at least 0, and at least 0 and below 1"
        )
