"""The determinant of a field's Jacobian, and where a field folds."""

from __future__ import annotations

from collections.abc import Sequence

import torch

from dmir import filters
from dmir.fields.sampling import CORNERS


def jacobian_determinant(displacement: torch.Tensor, scheme: str = "central") -> torch.Tensor:
    """Return det(I + grad u) of a field (B, 3, D, H, W) in voxels.

    Parameters
    ----------
    scheme
        ``"central"``: central differences on the interior, (B, D-2, H-2, W-2);
        ``"forward"``: forward differences, (B, D-1, H-1, W-1).
    """
    u = displacement
    gradient = []
    for axis in range(3):
        if scheme == "central":
            index = [slice(None), slice(None)] + [slice(1, -1)] * 3
            ahead, behind = list(index), list(index)
            ahead[axis + 2], behind[axis + 2] = slice(2, None), slice(None, -2)
            difference = (u[tuple(ahead)] - u[tuple(behind)]) / 2
        elif scheme == "forward":
            index = [slice(None), slice(None)] + [slice(None, -1)] * 3
            ahead = list(index)
            ahead[axis + 2] = slice(1, None)
            difference = u[tuple(ahead)] - u[tuple(index)]
        else:
            raise ValueError(f"scheme is 'central' or 'forward', not {scheme!r}")
        gradient.append(difference)  # gradient[axis][:, k] = d u_k / d x_axis
    a, b, c = (gradient[axis][:, 0] for axis in range(3))
    d, e, f = (gradient[axis][:, 1] for axis in range(3))
    g, h, i = (gradient[axis][:, 2] for axis in range(3))
    a, e, i = a + 1, e + 1, i + 1
    return a * (e * i - f * h) - b * (d * i - f * g) + c * (d * h - e * g)


def folded_voxels(displacement: torch.Tensor, least: float = 0.0) -> int:
    """Return at how many places a field (3, D, H, W) in voxels folds: 0 says that no determinant is <= ``least``.

    Looked at are, of every cube of eight voxels, the tetrahedra at its corners and the two in its middle (the ten
    determinants of Liu et al. 2022; at the border those with what lies beyond it, which is as at the border), and the
    central differences at every inner voxel.
    """

    def folds(start: int, end: int) -> int:
        around = filters.planes(displacement, start, end, 1)
        for axis in (2, 3):
            around = filters.extended(around, 1, axis)
        found = int(_folded_cubes(around, least).sum())
        inner = displacement[:, max(0, start - 1) : min(end + 1, displacement.shape[1])]
        return found + (int((jacobian_determinant(inner[None]) <= least).sum()) if min(inner.shape[1:]) > 2 else 0)

    return sum(filters.in_slabs(folds, displacement))


def _folded_cubes(u: torch.Tensor, least: float) -> torch.Tensor:
    """Return which cubes of a field (3, d, H, W) fold, (d - 1, H - 1, W - 1)."""
    edges = []
    for axis in range(3):
        edge = u.diff(dim=axis + 1)
        edge[axis] += 1
        edges.append(edge)
    size = [n - 1 for n in u.shape[1:]]

    def corner(volume: torch.Tensor, place: Sequence[int]) -> torch.Tensor:
        for axis in range(3):
            volume = volume.narrow(axis + 1, min(place[axis], volume.shape[axis + 1] - size[axis]), size[axis])
        return volume

    folded = torch.zeros(size, dtype=torch.bool, device=u.device)
    for place in CORNERS:
        folded |= _determinant(*(corner(edge, place) for edge in edges)) <= least
    # the way to a corner of the cube, seen from its first: identity and displacement
    at = {place: corner(u, place) + filters.numbers(place, u).view(3, 1, 1, 1) for place in CORNERS}
    first, opposite = at[0, 0, 0], at[1, 1, 1]
    folded |= _determinant(*(opposite - at[place] for place in ((1, 0, 0), (0, 1, 0), (0, 0, 1)))) <= least
    folded |= _determinant(*(at[place] - first for place in ((1, 1, 0), (0, 1, 1), (1, 0, 1)))) <= least
    return folded


def _determinant(a: torch.Tensor, b: torch.Tensor, c: torch.Tensor) -> torch.Tensor:
    """Return det of three vectors (3, ...) each."""
    return a[0] * (b[1] * c[2] - b[2] * c[1]) + a[1] * (b[2] * c[0] - b[0] * c[2]) + a[2] * (b[0] * c[1] - b[1] * c[0])
