"""XMorpher (Shi et al. 2022, MICCAI, arXiv:2206.07349): two transformers, one an image, that look at each other."""

from __future__ import annotations

from collections.abc import Sequence
from itertools import pairwise

import torch
import torch.nn.functional as F
from torch import nn

from dmir.errors import InputError
from dmir.networks.blocks import (
    DisplacementHead,
    PatchExpanding,
    PatchMerging,
    crop,
    drop_path_rates,
    fastest_layout,
    pad_to_multiple,
    require_drop_path,
    require_levels,
    require_pair,
    to_tokens,
    to_volume,
)
from dmir.networks.fusion import AttentionLevel, BlockSettings

PATCH = 4  # voxels on the edge of a token of the first level


class TokensToDisplacement(nn.Module):
    """Each token becomes 4x4x4 voxels (transposed convolution), of which a convolution 3x3x3 makes the displacement.

    Nothing non-linear stands between the two, so they are one transposed convolution 6x6x6 of stride 4, and the
    voxels' many channels are never made. What the first one's bias comes to depends on the place: beyond the border
    the second one sees zeros and no bias.

    Parameters
    ----------
    in_channels, voxel_channels
        Of the tokens, and of the voxels that they become.
    """

    def __init__(self, in_channels: int, voxel_channels: int) -> None:
        super().__init__()
        self.norm = nn.LayerNorm(in_channels)
        self.expansion = nn.ConvTranspose3d(in_channels, voxel_channels, PATCH, stride=PATCH)
        self.head = DisplacementHead(voxel_channels)

    def forward(self, tokens: torch.Tensor) -> torch.Tensor:
        """Tokens (B, D, H, W, in_channels) -> (B, 3, 4D, 4H, 4W), float32 at least."""
        volume = to_volume(self.norm(tokens))
        with torch.autocast(tokens.device.type, enabled=False):  # small, and rounded once if made exactly
            kernel = F.conv3d(self.expansion.weight, self.head.weight, padding=2)
            constant = self._of_bias([PATCH * n for n in volume.shape[2:]])
        field = F.conv_transpose3d(fastest_layout(volume), kernel, stride=PATCH, padding=1)
        return (field.to(torch.promote_types(field.dtype, torch.float32)) + constant).contiguous()

    def _of_bias(self, shape: Sequence[int]) -> torch.Tensor:
        """Return the displacement of tokens of zeros, (1, 3, *shape): one value inside, others along the border."""
        assert self.expansion.bias is not None
        constant = self.expansion.bias.view(1, -1, 1, 1, 1).expand(-1, -1, 3, 3, 3)
        constant = F.conv3d(constant, self.head.weight, self.head.bias, padding=1)
        for axis, extent in enumerate(shape, start=2):
            first, inner, last = constant.split(1, dim=axis)
            repeats = [extent - 2 if other == axis else 1 for other in range(5)]
            constant = torch.cat([first, inner.repeat(repeats), last], dim=axis)
        return constant


class XMorpher(nn.Module):
    """XMorpher: 14,798,595 parameters.

    The authors' code has 15,093,891. The 295,296 more are a linear layer 768 -> 384 with a bias that nothing calls.
    Its last convolution starts with weights as large as any other's; here training starts near the identity, as with
    every other network (see :class:`~dmir.networks.blocks.DisplacementHead`).

    Both images pass the same weights. In a block each image's tokens look at the other's as they were before the
    block: queries come of the normalised tokens of one, keys and values of the other's as they are.

    Parameters
    ----------
    shape
        Grid (D, H, W) it is meant for; any other works too: inside, the far ends are padded with zeros.
    channels, depths, heads
        Of the levels at 1/4, 1/8, ...: channels, cross attention blocks in the encoder, and as many again in the
        decoder, and heads, which divide the channels.
    window, search_factor
        Base window in tokens, and how many times as large the search window is on each axis.
    mlp_ratio
        Width of the perceptrons' hidden layers, in channels.
    drop_path
        Largest rate of stochastic depth; it rises linearly from 0 over the encoder's blocks, and the decoder's have
        the rates of their level.
    head_channels
        Of the voxels at full resolution from which the displacement is made.
    mask_padding
        Keys beyond the border get no weight. False: zeros stand there and draw weight, as in the authors' code.
    missing_neighbour
        Leave one of the 27 windows of a search window out, as the authors' code does by a slip; see
        :class:`~dmir.networks.attention.WindowMultiheadCrossAttention`. Theirs is ``mask_padding=False,
        missing_neighbour=True``.
    checkpointing
        In training, keep the tokens between blocks only.

    Raises
    ------
    InputError
        The hyperparameters make no network.
    """

    TITLE = "XMorpher"
    PAPER = "Shi et al. 2022, MICCAI, arXiv:2206.07349"
    COLOUR, MARKER = "#cc79a7", ">"

    def __init__(
        self,
        shape: tuple[int, int, int],
        *,
        channels: Sequence[int] = (48, 96, 192, 384),
        depths: Sequence[int] = (2, 2, 6, 2),
        heads: Sequence[int] = (3, 6, 12, 24),
        window: Sequence[int] = (2, 2, 2),
        search_factor: Sequence[int] = (3, 3, 3),
        mlp_ratio: float = 4.0,
        drop_path: float = 0.2,
        head_channels: int = 24,
        mask_padding: bool = True,
        missing_neighbour: bool = False,
        checkpointing: bool = False,
    ) -> None:
        super().__init__()
        require_levels(channels=channels, depths=depths, heads=heads)
        require_drop_path(drop_path)
        if head_channels < 1:
            raise InputError("head_channels", found=str(head_channels), expected="a positive number of channels")
        settings = BlockSettings(
            window,
            search_factor,
            mask_padding,
            mlp_ratio,
            checkpointing,
            key_bias=True,
            missing_neighbour=missing_neighbour,
            normalise_context=False,
        )

        rates = drop_path_rates(depths, drop_path)

        def level(index: int) -> AttentionLevel:
            return AttentionLevel(channels[index], heads[index], None, settings, rates[index])

        steps = list(pairwise(channels))
        self.stem = nn.Conv3d(1, channels[0], PATCH, stride=PATCH)
        self.encoder = nn.ModuleList(level(index) for index in range(len(channels)))
        self.merging = nn.ModuleList(PatchMerging(width, coarser) for width, coarser in steps)
        self.norm = nn.LayerNorm(channels[-1])
        self.decoder = nn.ModuleList(level(index) for index in range(len(channels)))
        self.expanding = nn.ModuleList(PatchExpanding(coarser, width) for width, coarser in steps)
        self.joining = nn.ModuleList(nn.Linear(2 * width, width) for width, _ in steps)
        self.to_displacement = TokensToDisplacement(2 * channels[0], head_channels)

    def forward(self, moving: torch.Tensor, fixed: torch.Tensor) -> torch.Tensor:
        """Return the displacement (B, 3, D, H, W), float32, in voxels, of two images (B, 1, D, H, W)."""
        require_pair(moving, fixed)
        images = pad_to_multiple(torch.cat([moving, fixed]), PATCH)
        tokens = self._decode(self._encode(to_tokens(fastest_layout(self.stem(images)))))
        pair = torch.cat(tokens.chunk(2), dim=-1)
        return crop(self.to_displacement(pair), moving.shape[2:]).contiguous()

    def _encode(self, tokens: torch.Tensor) -> list[torch.Tensor]:
        """Tokens (2B, d, h, w, channels[0]) -> those of each level, from the finest."""
        encoded = [self.encoder[0](tokens)]
        for merging, level in zip(self.merging, self.encoder[1:], strict=True):
            encoded.append(level(merging(to_volume(encoded[-1]))))
        return encoded

    def _decode(self, encoded: list[torch.Tensor]) -> torch.Tensor:
        """Tokens of each level -> tokens of the finest one."""
        tokens = self.decoder[-1](self.norm(encoded[-1]))
        for index in reversed(range(len(self.joining))):
            skipped = encoded[index]
            tokens = self.expanding[index](tokens, skipped.shape[1:4])
            tokens = self.decoder[index](self.joining[index](torch.cat([tokens, skipped], dim=-1)))
        return tokens
