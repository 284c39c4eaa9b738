"""Where a field folds, and how unevenly it stretches."""

from __future__ import annotations

from itertools import product

import numpy as np
import torch

from dmir.fields import jacobian_determinant

SMALLEST = 1e-9  # a determinant below this has no logarithm; as the Learn2Reg evaluation clips it
SLAB = 2**15  # voxels worked through at a time


def _determinant(displacement: np.ndarray, scheme: str, mask: np.ndarray | None) -> np.ndarray:
    """Return the determinants (n,) inside the mask where the scheme defines them."""
    determinant = jacobian_determinant(torch.from_numpy(displacement)[None], scheme)[0].numpy()
    if mask is None:
        return determinant.ravel()
    cut = slice(1, -1) if scheme == "central" else slice(None, -1)
    return determinant[mask[cut, cut, cut]]


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
    determinant = _determinant(displacement, scheme, mask)
    return 100.0 * float((determinant <= 0).mean()) if determinant.size else float("nan")


def sdlogj(displacement: np.ndarray, mask: np.ndarray | None = None, offset: float = 0.0) -> float:
    """Return the standard deviation of log det(I + grad u), central differences on the interior.

    Determinants are clipped to at least 1e-9. The Learn2Reg evaluation adds 3 to them first; ``offset=3`` gives its
    numbers.

    Parameters
    ----------
    displacement
        (3, D, H, W) in voxels.
    mask
        bool (D, H, W): voxels that count; all by default.
    """
    determinant = _determinant(displacement, "central", mask).astype(np.float64)
    return float(np.log(np.clip(determinant + offset, SMALLEST, 1e9)).std()) if determinant.size else float("nan")


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
    inside = np.ones(displacement.shape[1:], bool) if mask is None else mask
    if not inside.any():
        return float("nan")
    box = tuple(slice(int(i.min()), int(i.max()) + 1) for i in np.nonzero(inside))
    u = np.pad(np.asarray(displacement, np.float32), [(0, 0)] + [(1, 1)] * 3, mode="edge")
    u = u[(slice(None), *(slice(b.start, b.stop + 2) for b in box))]
    inside = inside[box]
    thickness = max(1, SLAB // inside[0].size)  # a few planes at a time stay in the processor's cache
    folded = sum(
        float(_folded(u[:, k : k + thickness + 2])[inside[k : k + thickness]].sum(dtype=np.float64))
        for k in range(0, len(inside), thickness)
    )
    return 100.0 * folded / int(inside.sum())


def _folded(displacement: np.ndarray) -> np.ndarray:
    """Return the folded volume at the inner voxels of a field (3, D + 2, H + 2, W + 2), (D, H, W)."""
    shape = displacement.shape[1:]

    def at(*step: int) -> np.ndarray:
        """Return where the neighbours at this step go, relative to the voxel itself, (3, D, H, W)."""
        index = tuple(slice(1 + s, n - 1 + s) for s, n in zip(step, shape, strict=True))
        return displacement[(slice(None), *index)] + np.array(step, np.float32).reshape(3, 1, 1, 1)

    centre = at(0, 0, 0)
    # differences[axis]: forward, backward
    differences = [(at(*step) - centre, centre - at(*(-s for s in step))) for step in ((1, 0, 0), (0, 1, 0), (0, 0, 1))]
    negative = np.zeros(centre.shape[1:], np.float32)
    for second, third in product(differences[1], differences[2]):
        normal = _cross(second, third)  # shared by the forward and the backward difference along the first axis
        for first in differences[0]:
            negative += np.minimum(_dot(first, normal), 0)
    opposite = at(1, 1, 1)
    middle = (
        [opposite - at(*corner) for corner in ((1, 0, 0), (0, 1, 0), (0, 0, 1))],
        [at(*corner) - centre for corner in ((1, 1, 0), (0, 1, 1), (1, 0, 1))],
    )
    for first, second, third in middle:
        negative += np.minimum(_dot(first, _cross(second, third)), 0)
    return -negative / 12  # six times a volume, and half of each split


def _cross(a: np.ndarray, b: np.ndarray) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    return a[1] * b[2] - a[2] * b[1], a[2] * b[0] - a[0] * b[2], a[0] * b[1] - a[1] * b[0]


def _dot(a: np.ndarray, b: tuple[np.ndarray, np.ndarray, np.ndarray]) -> np.ndarray:
    return a[0] * b[0] + a[1] * b[1] + a[2] * b[2]
