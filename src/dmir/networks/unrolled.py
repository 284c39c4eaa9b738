"""Descent on the pair's own similarity, unrolled: so few steps that their lengths are worth learning."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import nn

from dmir.fields import compose, warp
from dmir.filters import gaussian, in_slabs, sampled
from dmir.similarity import LocalCorrelation

WINDOW = 7  # voxels of its level, the edge of the local correlation's cube
COMPRESSION = 0.5  # of the forces' lengths, so that strong edges do not drown weak ones
LENGTH = 1.0  # voxels of the first step before training, over all widths; the last one of n is an nth of it
SCALE = 0.1  # a length is its parameter divided by this: it learns ten times as fast as a weight
WEAK = 25.0  # square of a force below which it is not compressed: what is left where images agree stays small
LONGEST = 12.0  # times the width, a smoothed force that moves by a voxel; if there is a longer one, that one does


class UnrolledDescent(nn.Module):
    """A few steps that make two images more alike, each as long as was learnt.

    A step goes along the derivative of the squared local correlation (Avants et al. 2008), compressed as in
    :mod:`dmir.methods.descending` and smoothed by Gaussians of several widths; each of these is scaled so that its
    longest displacement is one voxel, or less where the images agree. How much of which width a step takes is all that
    there is to learn (optimisation steps as layers of a network: Qiu et al. 2022). No gradient flows into the
    directions, which are what they are where the field stands, so that a step costs little more in training than
    otherwise. Before training it is plain descent.

    Parameters
    ----------
    steps
        How many.
    widths
        Of the Gaussians, standard deviations in voxels of the level.
    """

    def __init__(self, steps: int, widths: Sequence[float]) -> None:
        super().__init__()
        self.widths = tuple(widths)
        first = torch.linspace(LENGTH, LENGTH / steps, steps) * (SCALE / len(self.widths))
        self.lengths = nn.Parameter(first.repeat(len(self.widths), 1))

    def forward(self, moving: torch.Tensor, fixed: torch.Tensor, displacement: torch.Tensor) -> torch.Tensor:
        """Go on from a field.

        Parameters
        ----------
        moving, fixed
            (B, 1, D, H, W), the images at its level.
        displacement
            (B, 3, D, H, W) in voxels of it.
        """
        with torch.no_grad():
            similarities = [LocalCorrelation(image, WINDOW) for image in fixed.unbind()]
        for lengths in (self.lengths / SCALE).unbind(dim=1):
            with torch.no_grad():
                pairs = zip(similarities, warp(moving, displacement).unbind(), strict=True)
                directions = torch.stack([self._directions(*pair) for pair in pairs])
            displacement = compose(displacement, torch.einsum("bwcdhx,w->bcdhx", directions, lengths))
        return displacement

    def _directions(self, similarity: LocalCorrelation, warped: torch.Tensor) -> torch.Tensor:
        """Return where an image (1, D, H, W) is to go to be more like the fixed one, (widths, 3, D, H, W)."""
        similarity.prepare(warped)
        parts = in_slabs(lambda start, end: similarity.force(warped, start, end, COMPRESSION, WEAK)[1], warped)
        force = torch.cat(parts, dim=1)
        smoothed = [(gaussian(force, width), LONGEST / width) for width in self.widths]
        return torch.stack([one / one.square().sum(0).amax().sqrt().clamp(min=least) for one, least in smoothed])


def at_level(images: torch.Tensor, shape: Sequence[int]) -> torch.Tensor:
    """Return images (B, 1, D, H, W) on a coarser grid whose corner voxels are theirs, smoothed for it."""
    before = images.shape[2:]
    if tuple(before) == tuple(shape):
        return images
    sizes = list(zip(before, shape, strict=True))
    places = [torch.linspace(0, n - 1, m, device=images.device, dtype=images.dtype) for n, m in sizes]
    return sampled(images[:, 0], places, [0.5 * (n - 1) / max(m - 1, 1) for n, m in sizes])[:, None]
