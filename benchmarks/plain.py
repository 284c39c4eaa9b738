"""The plain way to compute what ``dmir`` computes faster: the other side of ``benchmarks/operations.py``.

Written from the definitions, in the manner of the published implementations; the tests hold both sides equal.
"""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch
import torch.nn.functional as F

from dmir.losses import MINIMUM_VARIANCE
from dmir.networks.attention import WindowMultiheadCrossAttention


def lncc(fixed: torch.Tensor, warped: torch.Tensor, window: int = 9) -> torch.Tensor:
    """LNCC with five convolutions by a cube of ones, 729 products a voxel each (Balakrishnan et al. 2019, equation 5).

    (B, 1, D, H, W) twice -> scalar.
    """
    ones = fixed.new_ones(1, 1, window, window, window)

    def box_sum(image: torch.Tensor) -> torch.Tensor:
        return F.conv3d(image, ones, padding=window // 2)

    return lncc_of_sums(
        box_sum(fixed), box_sum(warped), box_sum(fixed**2), box_sum(warped**2), box_sum(fixed * warped), window
    )


def lncc_exact(fixed: torch.Tensor, warped: torch.Tensor, window: int = 9) -> torch.Tensor:
    """LNCC in float64 from differences of cumulative sums, which have the digits to spare there."""
    fixed, warped = fixed.double(), warped.double()

    def box_sum(image: torch.Tensor) -> torch.Tensor:
        for axis in (2, 3, 4):
            padding = [0, 0] * (4 - axis) + [window // 2 + 1, window // 2]
            image = F.pad(image, padding).cumsum(dim=axis)
            image = image.narrow(axis, window, image.shape[axis] - window) - image.narrow(
                axis, 0, image.shape[axis] - window
            )
        return image

    return lncc_of_sums(
        box_sum(fixed), box_sum(warped), box_sum(fixed**2), box_sum(warped**2), box_sum(fixed * warped), window
    )


def lncc_of_sums(
    fixed: torch.Tensor,
    warped: torch.Tensor,
    fixed_squares: torch.Tensor,
    warped_squares: torch.Tensor,
    products: torch.Tensor,
    window: int,
) -> torch.Tensor:
    """Return the mean squared correlation, given the sums over each voxel's cube."""
    voxels = window**3
    covariance = products - fixed * warped / voxels
    variance_fixed = fixed_squares - fixed * fixed / voxels
    variance_warped = warped_squares - warped * warped / voxels
    return (covariance**2 / (variance_fixed * variance_warped + MINIMUM_VARIANCE)).mean()


def attention(module: WindowMultiheadCrossAttention, tokens: torch.Tensor, context: torch.Tensor) -> torch.Tensor:
    """W-MCA as drawn: gather each base window's search window, project the copies, store all scores, softmax.

    (B, D, H, W, C) twice, and the weights of a module -> (B, D, H, W, C).
    """
    shape, base = tokens.shape[1:4], module.window
    missing = [-n % edge for n, edge in zip(shape, base, strict=True)]
    inside = F.pad(torch.ones_like(context[..., :1]), _padding(module.margin, missing))
    gathered = _windows(F.pad(context, _padding(module.margin, missing)), base, module.margin)
    real = _windows(inside, base, module.margin)[..., 0] > 0
    query = module.query(_windows(F.pad(tokens, _padding((0, 0, 0), missing)), base, (0, 0, 0)))
    key, value = module.key(gathered), module.value(gathered)
    query, key, value = (x.unflatten(2, (module.heads, -1)).transpose(1, 2) for x in (query, key, value))
    scores = query @ key.transpose(2, 3) / math.sqrt(query.shape[-1])
    if module.mask_padding:
        scores = scores.masked_fill(~real[:, None, None], -math.inf)
    answer = module.output((scores.softmax(dim=-1) @ value).transpose(1, 2).flatten(2))
    count = [(n + m) // edge for n, m, edge in zip(shape, missing, base, strict=True)]
    answer = answer.view(-1, *count, *base, answer.shape[-1]).permute(0, 1, 4, 2, 5, 3, 6, 7)
    return answer.flatten(5, 6).flatten(3, 4).flatten(1, 2)[:, : shape[0], : shape[1], : shape[2]]


def _windows(tokens: torch.Tensor, size: Sequence[int], margin: Sequence[int]) -> torch.Tensor:
    """Copy windows and their margins: (B, D, H, W, C) -> (B windows, tokens, C)."""
    for axis in range(3):
        tokens = tokens.unfold(axis + 1, size[axis] + 2 * margin[axis], size[axis])
    return tokens.permute(0, 1, 2, 3, 5, 6, 7, 4).flatten(4, 6).flatten(0, 3)


def _padding(margin: Sequence[int], missing: Sequence[int]) -> list[int]:
    return [0, 0] + [n for axis in (2, 1, 0) for n in (margin[axis], margin[axis] + missing[axis])]


def warp(image: torch.Tensor, displacement: torch.Tensor, mode: str = "bilinear") -> torch.Tensor:
    """Make the grid of all voxels, add the field, normalise each axis, reorder the components, sample.

    (B, C, D, H, W) and (B, 3, D, H, W), voxels -> (B, C, D, H, W).
    """
    shape = displacement.shape[2:]
    axes = [torch.arange(n, dtype=displacement.dtype, device=displacement.device) for n in shape]
    place = torch.stack(torch.meshgrid(*axes, indexing="ij"))[None] + displacement
    scale = place.new_tensor([n - 1 for n in shape]).view(1, 3, 1, 1, 1)
    grid = (2 * (place / scale - 0.5)).permute(0, 2, 3, 4, 1).flip(-1)
    return F.grid_sample(image, grid, mode=mode, align_corners=True)


def warp_labels(labels: torch.Tensor, displacement: torch.Tensor) -> torch.Tensor:
    """One-hot encoding of each label, linear warp of each channel, argmax: (B, 1, D, H, W), whole numbers -> same."""
    present = labels.unique()
    channels = (labels == present.view(1, -1, 1, 1, 1)).to(displacement.dtype)
    return present[warp(channels, displacement).argmax(dim=1, keepdim=True)]


def compose(first: torch.Tensor, second: torch.Tensor) -> torch.Tensor:
    """u(x) = second(x) + first(x + second(x)), zeros beyond the border: (B, 3, D, H, W) twice -> the same."""
    return second + warp(first, second)


def integrate(velocity: torch.Tensor, steps: int = 7) -> torch.Tensor:
    """Scaling and squaring: (B, 3, D, H, W) in voxels -> the same."""
    displacement = velocity / 2**steps
    for _ in range(steps):
        displacement = compose(displacement, displacement)
    return displacement
