"""TransMatch (Chen, Zheng and Gee 2023, IEEE TMI 43(1):15-27): one Swin transformer for both images, and matching."""

from __future__ import annotations

from collections.abc import Sequence
from itertools import pairwise

import torch
from torch import nn

from dmir.errors import InputError
from dmir.networks.blocks import DisplacementHead, require_pair, to_volume
from dmir.networks.swin import SwinEncoder, SwinSettings, SwinStage
from dmir.networks.transmorph import DecoderBlock, NormalisedConvolution, half_resolution
from dmir.networks.upsampling import add_upsampled_convolution


class TransMatch(nn.Module):
    """TransMatch: 70,793,235 parameters, as many as act in the published code, on any grid.

    The images are encoded apart, with the same weights. At each level local window cross attention (LWCA) then matches
    them: two blocks, the second one shifted, whose queries come from one image and keys and values from the other. The
    decoder goes up from the coarsest level, joined by what both images became at each finer one.

    Where the paper leaves a choice, this is how it is read here:

    - both directions of a block see what the images were before it, and the second block what the first made of both;
    - queries, keys and values come from tokens that one layer normalisation prepares, the same for both images;
    - at the coarsest level the decoder starts from the moving image's share alone, as the number of parameters tells;
    - stochastic depth is the encoder's, not LWCA's.

    The published code has a second encoder that nothing uses: 112,350,291 parameters with what is dead.

    Parameters
    ----------
    shape
        Grid (D, H, W) it is meant for; any other works too: n voxels become ceil(n / 4) tokens, these ceil(n / 2) from
        level to level.
    embedding
        Channels of the transformer at 1/4; twice as many from level to level. Half as many at 1/2.
    depths, heads
        Blocks and heads of the encoder's levels at 1/4, 1/8, ...
    cross_heads
        Of the cross attention, at every level.
    window
        In tokens. Published for 160x192x160; it divides the levels of that grid.
    mlp_ratio
        Width of the perceptrons' hidden layers, in channels.
    qkv_bias
        The encoder's projections to queries, keys and values have a bias. In LWCA that to queries alone has one.
    drop_path
        Largest rate of stochastic depth; it rises linearly from 0 over the encoder's blocks.
    mask_padding
        Where a level is no multiple of the window, the padding gets no weight. False: it does, as in the published
        code.
    checkpointing
        In training, keep of the transformers the tokens between blocks only: less memory, and more time.

    Raises
    ------
    InputError
        The hyperparameters make no network.
    """

    TITLE = "TransMatch"
    PAPER = "Chen, Zheng and Gee 2023, IEEE TMI 43(1):15-27"
    COLOUR, MARKER = "#0072b2", "P"

    def __init__(
        self,
        shape: tuple[int, int, int],
        *,
        embedding: int = 96,
        depths: Sequence[int] = (2, 2, 4, 2),
        heads: Sequence[int] = (4, 4, 8, 8),
        cross_heads: int = 4,
        window: Sequence[int] = (5, 6, 5),
        mlp_ratio: float = 4.0,
        qkv_bias: bool = False,
        drop_path: float = 0.3,
        mask_padding: bool = True,
        checkpointing: bool = False,
    ) -> None:
        super().__init__()
        if cross_heads < 1 or embedding % cross_heads:
            raise InputError(
                "cross_heads", found=f"{cross_heads} for {embedding} channels", expected="a divisor of the embedding"
            )
        settings = SwinSettings(window, mlp_ratio, qkv_bias, qkv_bias, mask_padding, checkpointing)
        matching = SwinSettings(window, mlp_ratio, True, False, mask_padding, checkpointing)
        self.encoder = SwinEncoder(1, embedding, depths, heads, drop_path, settings)
        widths = [embedding * 2**level for level in range(len(depths))]
        self.matching = nn.ModuleList(
            SwinStage(width, cross_heads, matching, drop_paths=(0.0, 0.0), cross=True) for width in widths
        )
        self.decoder = nn.ModuleList(
            DecoderBlock(coarse, 2 * fine, fine) for fine, coarse in reversed(list(pairwise(widths)))
        )
        half = embedding // 2
        self.half_skip = NormalisedConvolution(2, half)
        self.to_half = DecoderBlock(embedding, half, half)
        self.head = DisplacementHead(half)

    def forward(self, moving: torch.Tensor, fixed: torch.Tensor) -> torch.Tensor:
        """Return the displacement (B, 3, D, H, W), float32, in voxels, of two images (B, 1, D, H, W)."""
        require_pair(moving, fixed)
        *finer, coarsest = self.matched(torch.cat([moving, fixed]))
        volume = to_volume(coarsest.chunk(2)[0])
        for block, tokens in zip(self.decoder, reversed(finer), strict=True):
            volume = block(volume, to_volume(torch.cat(tokens.chunk(2), dim=-1)))
        pair = torch.cat([moving, fixed], dim=1)
        volume = self.to_half(volume, self.half_skip(half_resolution(pair)))
        return self._full_resolution(volume, pair)

    def matched(self, images: torch.Tensor) -> list[torch.Tensor]:
        """Encode images (2B, 1, D, H, W), moving ones first, and return their matched tokens level by level."""
        return [stage(tokens) for stage, tokens in zip(self.matching, self.encoder(images), strict=True)]

    def _full_resolution(self, volume: torch.Tensor, pair: torch.Tensor) -> torch.Tensor:
        """Upsample by two, trilinearly, and let the head make the displacement of it; what is upsampled never exists.

        In float32 at least: the field's derivatives are what folds.
        """
        assert self.head.bias is not None
        bias = self.head.bias.to(torch.promote_types(volume.dtype, torch.float32))
        onto = bias.view(1, 3, 1, 1, 1).expand(len(pair), -1, *pair.shape[2:])
        onto = onto.clone(memory_format=torch.channels_last_3d)
        return add_upsampled_convolution(onto, volume, self.head.weight).contiguous()
