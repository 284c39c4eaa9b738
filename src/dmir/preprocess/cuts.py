"""Brains that are cut off, by the end of the field of view or of what was kept of it: what was not seen must not pull.

A cut is a plane. In the world it is four numbers p, such that a scan saw nothing where p . (x, y, z, 1) > 0.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import numpy as np

from dmir.volumes import Grid, Volume, before_planes

CUT = 0.15  # of a brain's largest plane: a brain that ends in a larger one is cut off there
ALIGNED_AGAIN = 5  # times, where a brain is cut off: each halves the pull of the cut, or nearly
SIDES = (("left", "right"), ("back", "front"), ("bottom", "top"))  # of the axes R, A and S


@dataclass(frozen=True)
class Cut:
    """A face at which a brain ends because its scan does: the array's axis, which end of it, and the last plane."""

    axis: int
    upper: bool
    plane: int

    @property
    def side(self) -> str:
        """Which side of the head that is, where the axes run to the right, the front and the top."""
        return SIDES[self.axis][self.upper]


def find_cuts(brain: np.ndarray) -> list[Cut]:
    """Return at which faces of its box a brain is cut off.

    A whole brain ends in a small plane. It is cut off where the outermost one is more than ``CUT`` of the largest
    plane along that axis, and what an ellipsoid's can be besides: twice a voxel's share of half its length.

    Parameters
    ----------
    brain
        Mask (D, H, W).
    """
    cuts = []
    for axis in range(3):
        areas = brain.sum(axis=tuple(other for other in range(3) if other != axis))
        inside = np.flatnonzero(areas)
        limit = (CUT + 4 / len(inside)) * areas.max()
        ends = ((False, int(inside[0])), (True, int(inside[-1])))
        cuts += [Cut(axis, upper, plane) for upper, plane in ends if areas[plane] > limit]
    return cuts


def cut_planes(scan: Grid | Volume, cuts: Sequence[Cut], transform: np.ndarray | None = None) -> list[np.ndarray]:
    """Return the planes of cuts, (4,) each, in the world from which ``transform`` (4x4, RAS mm) leads to the scan's.

    They lie at the middle of a cut brain's last plane of voxels, also where that is the end of the array. At all other
    faces the scan goes on as background.
    """
    to_voxels = np.linalg.inv(scan.affine) @ (np.eye(4) if transform is None else transform)
    last = np.array([0.0, 0.0, 0.0, 1.0])
    return [(1 if cut.upper else -1) * (to_voxels[cut.axis] - cut.plane * last) for cut in cuts]


def seen_on(grid: Grid, scan: Grid | Volume, cuts: Sequence[Cut], transform: np.ndarray) -> np.ndarray | None:
    """Return where a grid lies on what a scan saw of its brain: bool (D, H, W), None where nothing is cut off.

    Parameters
    ----------
    grid
        On which it is wanted.
    scan
        The scan's own grid.
    cuts
        Of :func:`find_cuts`.
    transform
        4x4, world of ``grid`` -> world of ``scan`` (RAS mm).
    """
    return before_planes(grid, cut_planes(scan, cuts, transform))


def align_cut(
    estimate: Callable[[Volume, Volume], np.ndarray],
    brains: tuple[Volume, Volume],
    planes: tuple[Sequence[np.ndarray], Sequence[np.ndarray]],
) -> np.ndarray:
    """Return the matrix that takes the fixed world to the moving one.

    What one scan never saw would pull the other's brain to the cut: there the other one is cut as well, where the last
    matrix says that it is.

    Parameters
    ----------
    estimate
        From the masks of the moving and the fixed brain to a matrix.
    brains
        Masks of the moving and the fixed brain, each on its own grid.
    planes
        Where either is cut off, in its own world.
    """
    matrix = estimate(*brains)
    for _ in range(ALIGNED_AGAIN if any(map(len, planes)) else 0):
        ways = (np.linalg.inv(matrix), matrix)  # from each scan to the other
        shared = []
        for brain, others, way in zip(brains, planes[::-1], ways, strict=True):
            seen = before_planes(brain.grid, [plane @ way for plane in others])
            shared.append(brain if seen is None else Volume(brain.data & seen, brain.affine))
        if not all(brain.data.any() for brain in shared):
            break
        matrix = estimate(shared[0], shared[1])
    return matrix
