"""Where a field folds, and how unevenly it stretches."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from itertools import product

import numpy as np

from dmir.metrics.boxes import bounding_box

SMALLEST = 1e-9  # a determinant below this has no logarithm; as the Learn2Reg evaluation clips it
SLAB = 2**15  # voxels worked through at a time: their differences stay in the processor's cache

Vector = np.ndarray | tuple[np.ndarray, np.ndarray, np.ndarray]  # three components


@dataclass(frozen=True)
class Folding:
    """What the determinants of a field say of the voxels of a mask; NaN where no voxel is left.

    Attributes
    ----------
    nonpositive_forward, nonpositive_central
        Percentage of voxels with det(I + grad u) <= 0, see :func:`nonpositive_jacobian`.
    nondiffeomorphic_volume
        Percent, see :func:`nondiffeomorphic_volume`.
    sdlogj
        See :func:`sdlogj`.
    """

    nonpositive_forward: float
    nonpositive_central: float
    nondiffeomorphic_volume: float
    sdlogj: float


def measure_folding(displacement: np.ndarray, mask: np.ndarray | None = None, *, volume: bool = True) -> Folding:
    """Return all that is told of folding and stretching, from differences that are taken once.

    Parameters
    ----------
    displacement
        (3, D, H, W) in voxels.
    mask
        bool (D, H, W): voxels that count; all by default.
    volume
        Whether the non-diffeomorphic volume, which costs most, is wanted; NaN otherwise.
    """
    inside = np.ones(displacement.shape[1:], bool) if mask is None else mask
    forward, folded, central = [0, 0], 0.0, [np.empty(0, np.float32)]
    for u, counts, ahead, between in _slabs(displacement, inside):
        steps = _Steps(u)
        determinant, negative = steps.determinants() if volume else (steps.forward(), None)
        forward[0] += int((determinant[ahead] <= 0).sum())
        forward[1] += int(ahead.sum())
        central.append(steps.central()[between])
        if negative is not None:
            folded += float(negative[counts].sum(dtype=np.float64))
    middle = np.concatenate(central)
    return Folding(
        nonpositive_forward=_percentage(forward[0], forward[1]),
        nonpositive_central=_percentage(int((middle <= 0).sum()), middle.size),
        nondiffeomorphic_volume=_percentage(folded, int(inside.sum())) if volume else float("nan"),
        sdlogj=_spread(middle, 0.0),
    )


def nonpositive_jacobian(displacement: np.ndarray, scheme: str = "forward", mask: np.ndarray | None = None) -> float:
    """Return the percentage of voxels with det(I + grad u) <= 0.

    The scheme decides: central differences over the interior (VoxelMorph, TransMorph) miss checkerboard folds that
    forward differences (H-SGANet) see; the two differ by several times on real fields.

    Parameters
    ----------
    displacement
        (3, D, H, W) in voxels.
    scheme
        ``"forward"`` or ``"central"``.
    mask
        bool (D, H, W): voxels that count; all by default.
    """
    if scheme not in ("forward", "central"):
        raise ValueError(f"scheme is 'forward' or 'central', not {scheme!r}")
    found = measure_folding(displacement, mask, volume=False)
    return found.nonpositive_forward if scheme == "forward" else found.nonpositive_central


def sdlogj(displacement: np.ndarray, mask: np.ndarray | None = None, offset: float = 0.0) -> float:
    """Return the standard deviation of log det(I + grad u), central differences on the interior.

    A spread over voxels (Leow et al. 2007 study the distribution of log J); determinants are clipped to at least 1e-9.
    The Learn2Reg evaluation (Hering et al. 2023) adds 3 to them first; ``offset=3`` gives its numbers.

    Parameters
    ----------
    displacement
        (3, D, H, W) in voxels.
    mask
        bool (D, H, W): voxels that count; all by default.
    """
    inside = np.ones(displacement.shape[1:], bool) if mask is None else mask
    parts = [_Steps(u).central()[between] for u, _, _, between in _slabs(displacement, inside)]
    return _spread(np.concatenate([np.empty(0, np.float32), *parts]), offset)


def nondiffeomorphic_volume(displacement: np.ndarray, mask: np.ndarray | None = None) -> float:
    """Return the non-diffeomorphic volume in percent of the mask (Liu et al. 2022, arXiv 2212.06060).

    A field on voxel centres is a piecewise linear map of tetrahedra. Each cube of eight voxels splits into five
    tetrahedra, four at corners and one in the middle, in two mirrored ways. Of a voxel count the corner tetrahedra in
    the eight cubes it belongs to (the eight combinations of forward and backward differences) and the two middle ones
    of the cube ahead: ten determinants, each six times a volume. The negative volumes of both splits are added and
    halved. Central differences see none of a checkerboard fold; this sees all of it.

    Parameters
    ----------
    displacement
        (3, D, H, W) in voxels; continued beyond its border by its border value.
    mask
        bool (D, H, W): voxels that count; all by default.
    """
    return measure_folding(displacement, mask).nondiffeomorphic_volume


def _slabs(
    displacement: np.ndarray, inside: np.ndarray
) -> Iterator[tuple[np.ndarray, np.ndarray, np.ndarray, np.ndarray]]:
    """Yield a few planes of the mask's bounding box at a time.

    Yields
    ------
    u, counts, ahead, between
        The field (3, d + 2, h + 2, w + 2) with a neighbour on every side, continued by its border value; which voxels
        (d, h, w) count, which of them have a neighbour ahead of them along every axis, and which on both sides.
    """
    if not inside.any():
        return
    box = bounding_box(inside)
    wider = tuple(slice(max(b.start - 1, 0), b.stop + 1) for b in box)
    beyond = [(int(b.start == 0), int(b.stop == n)) for b, n in zip(box, inside.shape, strict=True)]
    u = np.pad(displacement[(slice(None), *wider)].astype(np.float32, copy=False), [(0, 0), *beyond], mode="edge")
    ahead, between = inside.copy(), inside.copy()
    for axis in range(3):
        for mask, ends in ((ahead, [-1]), (between, [0, -1])):
            np.moveaxis(mask, axis, 0)[ends] = False
    masks = [mask[box] for mask in (inside, ahead, between)]
    thickness = max(1, SLAB // masks[0][0].size)
    for start in range(0, len(masks[0]), thickness):
        part = slice(start, start + thickness)
        yield u[:, start : start + thickness + 2], masks[0][part], masks[1][part], masks[2][part]


class _Steps:
    """Where the neighbours of every inner voxel of a field (3, D + 2, H + 2, W + 2) go, seen from the voxel."""

    def __init__(self, displacement: np.ndarray) -> None:
        self.displacement = displacement
        self.centre = self.at(0, 0, 0)
        axes = ((1, 0, 0), (0, 1, 0), (0, 0, 1))
        self.ahead = [self.at(*step) - self.centre for step in axes]
        self.behind = [self.centre - self.at(*(-s for s in step)) for step in axes]

    def at(self, *step: int) -> np.ndarray:
        """Return where the neighbours at this step go, relative to the voxel itself, (3, D, H, W)."""
        shape = self.displacement.shape[1:]
        index = tuple(slice(1 + s, n - 1 + s) for s, n in zip(step, shape, strict=True))
        place = self.displacement[(slice(None), *index)]
        return place + np.array(step, np.float32).reshape(3, 1, 1, 1) if any(step) else place

    def forward(self) -> np.ndarray:
        """Return det(I + grad u) of forward differences, (D, H, W)."""
        return _dot(self.ahead[0], _cross(self.ahead[1], self.ahead[2]))

    def central(self) -> np.ndarray:
        """Return det(I + grad u) of central differences, (D, H, W)."""
        first, second, third = ((a + b) * np.float32(0.5) for a, b in zip(self.ahead, self.behind, strict=True))
        return _dot(first, _cross(second, third))

    def determinants(self) -> tuple[np.ndarray, np.ndarray]:
        """Return det(I + grad u) of forward differences, and the folded volume by ten determinants, (D, H, W) each."""
        forward = None
        negative = np.zeros(self.centre.shape[1:], np.float32)
        for second, third in product((self.ahead[1], self.behind[1]), (self.ahead[2], self.behind[2])):
            normal = _cross(second, third)  # shared by the forward and the backward difference along the first axis
            for first in (self.ahead[0], self.behind[0]):
                determinant = _dot(first, normal)
                if forward is None:
                    forward = determinant
                negative += np.minimum(determinant, 0)
        assert forward is not None
        opposite = self.at(1, 1, 1)
        middle = (
            [opposite - self.at(*corner) for corner in ((1, 0, 0), (0, 1, 0), (0, 0, 1))],
            [self.at(*corner) - self.centre for corner in ((1, 1, 0), (0, 1, 1), (1, 0, 1))],
        )
        for first, second, third in middle:
            negative += np.minimum(_dot(first, _cross(second, third)), 0)
        return forward, negative / -12  # six times a volume, and half of each split


def _cross(a: Vector, b: Vector) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    return a[1] * b[2] - a[2] * b[1], a[2] * b[0] - a[0] * b[2], a[0] * b[1] - a[1] * b[0]


def _dot(a: Vector, b: Vector) -> np.ndarray:
    return a[0] * b[0] + a[1] * b[1] + a[2] * b[2]


def _spread(determinant: np.ndarray, offset: float) -> float:
    clipped = np.clip(determinant.astype(np.float64) + offset, SMALLEST, 1e9)
    return float(np.log(clipped).std()) if clipped.size else float("nan")


def _percentage(part: float, whole: int) -> float:
    return 100.0 * part / whole if whole else float("nan")
