"""Topology of structures: components, tunnels and cavities, and what resampling alone does to them."""

from __future__ import annotations

from collections.abc import Sequence
from itertools import product

import numpy as np
import torch
import torch.nn.functional as F
from scipy.sparse import coo_array
from scipy.sparse.csgraph import connected_components

from dmir.fields import CORNERS, integrate
from dmir.metrics.boxes import bounding_box
from dmir.metrics.overlap import positions

BLOCK = 8  # voxels along the side of a block over which a field is averaged, to begin with


def betti_numbers(labels: np.ndarray, ids: Sequence[int]) -> dict[int, tuple[int, int, int]]:
    """Return the number of components, tunnels and cavities of each structure: the Betti numbers b0, b1, b2.

    A structure is 26-connected and what surrounds it 6-connected: voxels are closed cubes, which touch by a corner. b0
    counts its components, b2 the components of its surroundings less the one outside, and b1 = b0 + b2 - chi, with chi
    the Euler characteristic (Kong and Rosenfeld 1989). With 6/26 all three are other numbers.

    Parameters
    ----------
    labels
        Label map (D, H, W); beyond its border is background.
    ids
        Ids of the structures.

    Returns
    -------
    dict
        id -> (components, tunnels, cavities); (0, 0, 0) for a structure that is absent.
    """
    table = betti_of_positions(positions(labels, ids), len(ids))
    return {int(i): (int(row[0]), int(row[1]), int(row[2])) for i, row in zip(ids, table, strict=True)}


def betti_of_positions(a: np.ndarray, count: int) -> np.ndarray:
    """Return b0, b1, b2 of structures numbered from 1, (count, 3)."""
    import cc3d

    if not a.any():
        return np.zeros((count, 3), dtype=np.int64)
    padded = np.pad(a[bounding_box(a)], 1)
    cells = _MixedCells(padded, count)
    pieces = cc3d.connected_components(padded, connectivity=26)
    label_of_piece = np.zeros(int(pieces.max()) + 1, dtype=padded.dtype)
    label_of_piece[cells.first_of(pieces)] = cells.corners[0]  # every piece ends somewhere
    components = np.bincount(label_of_piece[1:], minlength=count + 1)[1:]
    cavities = _cavities(padded, cells, components)
    tunnels = components + cavities - cells.euler_characteristics()
    return np.stack([components, tunnels, cavities], axis=1)


def _cavities(padded: np.ndarray, cells: _MixedCells, components: np.ndarray) -> np.ndarray:
    """Return the number of cavities of every structure, (count,).

    What surrounds a structure is made of 6-connected regions of other labels and of background. Which of them touch is
    the same for all structures; of each, the regions that remain without it are counted, less the one outside.
    """
    import cc3d

    shifted = np.add(padded, 1, dtype=np.uint8 if len(components) < 255 else np.uint16)  # background is a label too
    regions = cc3d.connected_components(shifted, connectivity=6)
    count = int(regions.max())
    own = cells.first_of(regions)
    label = np.zeros(count + 1, dtype=np.intp)
    label[own] = cells.corners[0]
    label[regions.reshape(-1)[-1]] = 0
    edges = [
        np.unique(own[d] * (count + 1) + other[d]) for other in cells.neighbours_of(regions) for d in [own != other]
    ]
    first, second = np.divmod(np.unique(np.concatenate(edges)), count + 1)
    cavities = np.zeros(len(components), dtype=np.int64)
    for number in np.flatnonzero(components) + 1:
        kept = (label[first] != number) & (label[second] != number)
        graph = coo_array((np.ones(kept.sum(), bool), (first[kept], second[kept])), shape=(count + 1, count + 1))
        parts = connected_components(graph, directed=False, return_labels=False)
        absent = 1 + int((label[1:] == number).sum())  # number 0, and the structure's own regions, stand alone
        cavities[number - 1] = parts - absent - 1
    return cavities


class _MixedCells:
    """The cells of eight voxels that hold more than one label, of a label map with a border of 0.

    They say all of the surfaces: every piece of a label ends in the first corner of one, or begins in its last.
    """

    def __init__(self, padded: np.ndarray, count: int) -> None:
        self.count = count
        cells = np.zeros(padded.shape, dtype=bool)
        # pairs that differ; then squares and cubes, in which two of the smaller ones are mixed or differ
        pairs = padded[:, :, 1:] != padded[:, :, :-1]
        squares = pairs[:, 1:] | pairs[:, :-1] | (padded[:, 1:, :-1] != padded[:, :-1, :-1])
        cells[:-1, :-1, :-1] = squares[1:] | squares[:-1] | (padded[1:, :-1, :-1] != padded[:-1, :-1, :-1])
        self.index, flat = np.flatnonzero(cells), padded.reshape(-1)
        self.strides = (padded.shape[1] * padded.shape[2], padded.shape[2], 1)
        offsets = [sum(c * s for c, s in zip(corner, self.strides, strict=True)) for corner in CORNERS]
        self.corners = [flat[self.index + offset] for offset in offsets]

    def first_of(self, volume: np.ndarray) -> np.ndarray:
        """Return what another volume of the same shape has at the first corner of every cell."""
        return volume.reshape(-1)[self.index].astype(np.intp)

    def neighbours_of(self, volume: np.ndarray) -> list[np.ndarray]:
        """Return what it has at the next voxel along each axis."""
        flat = volume.reshape(-1)
        return [flat[self.index + stride].astype(np.intp) for stride in self.strides]

    def euler_characteristics(self) -> np.ndarray:
        """Return vertices - edges + faces - cubes of every structure, (count,); cells of one label add nothing."""
        eighths = np.zeros(self.count + 1, dtype=np.int64)
        for number, label in enumerate(self.corners):
            shape = np.zeros(len(label), dtype=np.uint8)  # which corners of the cell have this label, a bit each
            for bit, other in enumerate(self.corners):
                shape |= (other == label).view(np.uint8) << np.uint8(bit)
            times = np.bincount(label.astype(np.intp) * 256 + shape, minlength=(self.count + 1) * 256)
            earlier = np.arange(256) & ((1 << number) - 1)  # a label that an earlier corner has is counted there
            eighths += times.reshape(-1, 256) @ np.where(earlier == 0, EIGHTHS, 0)
        return eighths[1:] // 8


def _eighths_of_cells() -> np.ndarray:
    """Return eight times what a vertex and its share of the edges, faces and cubes around it add, (256,).

    Cell ``shape`` has voxel k of CORNERS where bit k is set. The vertex in its middle belongs to the structure if any
    of the eight does; an edge, shared with one other vertex, if any of four; a face, shared by four, if one of two.
    """
    bits = (np.arange(256)[:, None] >> np.arange(8)) & 1
    voxels = bits.reshape(256, 2, 2, 2).astype(bool)
    vertices = voxels.any(axis=(1, 2, 3))
    edges = sum(voxels.any(axis=pair).sum(axis=1) for pair in ((2, 3), (1, 3), (1, 2)))
    faces = sum(voxels.any(axis=axis).sum(axis=(1, 2)) for axis in (1, 2, 3))
    return 8 * vertices - 4 * edges + 2 * faces - bits.sum(axis=1)


EIGHTHS = _eighths_of_cells()


def fold_free_part(displacement: np.ndarray) -> np.ndarray:
    """Return a smooth field of about the same size that does not fold: exp of the field's block means.

    The field is averaged in blocks of 8 voxels, and exp of that as a stationary velocity (scaling and squaring, Arsigny
    et al. 2006) is interpolated linearly between the blocks. In a cell between eight blocks every derivative is a mean
    of the steps along four edges, so that the determinant is a mean of those of 4 x 4 x 4 triples of edges: where all
    are positive it is positive everywhere, not at voxels alone. Where one is not, the blocks are doubled; a single
    block, in the end, is a shift.

    Parameters
    ----------
    displacement
        (3, D, H, W) in voxels.

    Returns
    -------
    numpy.ndarray
        float32 (3, D, H, W) in voxels.
    """
    field = torch.from_numpy(np.ascontiguousarray(displacement, dtype=np.float32))[None]
    depth, height, width = field.shape[2:]
    size = BLOCK
    while True:
        blocks = [min(size, n) for n in (depth, height, width)]
        means = F.avg_pool3d(field, blocks, ceil_mode=True, count_include_pad=False)
        lattice = means.shape[2:]
        scale = torch.tensor([n / m for n, m in zip((depth, height, width), lattice, strict=True)]).view(1, 3, 1, 1, 1)
        smooth = integrate(means / scale)  # in steps of the lattice
        if lattice.numel() == 1 or _smallest_determinant(smooth[0]) > 0:
            break
        size *= 2
    # the interpolation of one axis is a matrix, and three products of matrices are faster than F.interpolate
    first, second, third = (
        F.interpolate(torch.eye(m)[None], n, mode="linear")[0] for m, n in zip(lattice, field.shape[2:], strict=True)
    )
    planes = torch.einsum("cijk,kw,jh->cihw", (smooth * scale)[0], third, second)
    return (first.T @ planes.reshape(3, len(first), -1)).reshape(3, depth, height, width).numpy()


def _smallest_determinant(lattice: torch.Tensor) -> float:
    """Return a lower bound of det(I + grad u) of the linear interpolation of a field (3, d, h, w) in its own steps."""
    field = F.pad(lattice[None], (0, 1) * 3, mode="replicate")[0]  # beyond the outer blocks the displacement stays
    edges = []
    for axis in range(3):
        steps = field.diff(dim=axis + 1)
        steps[axis] += 1
        across = [k + 1 for k in range(3) if k != axis]
        sides = [steps.narrow(across[0], i, lattice.shape[across[0]]) for i in (0, 1)]
        edges.append([side.narrow(across[1], i, lattice.shape[across[1]]) for side in sides for i in (0, 1)])
    normals = (torch.linalg.cross(second, third, dim=0) for second, third in product(edges[1], edges[2]))
    return min(float((first * normal).sum(dim=0).min()) for normal in normals for first in edges[0])
