"""A T1-like image of a cerebrum of which only the label map is known: white matter filled in, grey values painted.

What lies between the labels is found or estimated, not known. White matter is told from sulci by a potential that is 1
deep in the hemispheres and 0 outside, and that cannot pass the cortex. Ventricles and the ventral diencephalon are
where the template has them, carried over by a spline through the middles of the structures that both have. Grey values
are the template's, one a structure, smoothed to partial volumes (as in SynthSeg: Billot et al., Medical Image Analysis
86:102789, 2023, but with the contrast of a T1).
"""

from __future__ import annotations

import numpy as np
from scipy import ndimage, sparse
from scipy.interpolate import RBFInterpolator
from scipy.sparse.linalg import cg

from dmir.cohorts.acquisition import HEAD_VALUES
from dmir.cohorts.template import template
from dmir.structures import remap_labels

# FreeSurfer's ids of what the donors' maps number 1 to 41 (left) and 42 to 82 (right); its parcel 4 is the callosum
PARCELS = [k for k in range(1, 36) if k != 4]
LEFT = [*(1000 + k for k in PARCELS), 10, 11, 12, 13, 26, 17, 18]
RIGHT = [*(2000 + k for k in PARCELS), 49, 50, 51, 52, 58, 53, 54]
TO_TEMPLATE = dict(enumerate(LEFT + RIGHT, start=1))
LEFT_CORTEX, RIGHT_CORTEX, VENTRICLE_WALLS = range(1, 35), range(42, 76), (35, 36, 76, 77)

WHITE, CORTEX, VENTRICLE, DIENCEPHALON = 2, 3, 4, 28
WHITE_MATTER = (2, 41, 77, 251, 252, 253, 254, 255)
VENTRICLES = (4, 43, 5, 44, 14, 31, 63)
DIENCEPHALA = (28, 60)

CLOSED = 12.0  # mm: sulci and the openings of the ribbon are narrower than twice this
SKULL_STRIPPED = 4.0  # mm: fluid in narrower clefts than twice this counts as brain, as it does after skull stripping
FISSURE = 10  # voxels: across the fissure the hemispheres are nearer than that
COARSE = 4  # voxels between the points where the spline is evaluated
BRIGHTEST_FLUID = 0.25  # white matter = 1
# The template is an average and so blurred. Raised to this power its ratios to white matter are those of a single T1:
# cortex 0.70, caudate 0.72, putamen 0.82, hippocampus 0.61; in OASIS scans with manual labels 0.62, 0.72, 0.82, 0.67.
SHARPENING = 1.7


def complete(ids: np.ndarray) -> np.ndarray:
    """Fill the ribbon of a donor's label map.

    Parameters
    ----------
    ids
        (D, H, W) ids 1 to 82 of the donors' scheme, axes R, A, S, voxels of 1 mm.

    Returns
    -------
    numpy.ndarray
        int32, the labels as aparc+aseg ids, and in between: 2 white matter, 4 ventricles and 28 ventral diencephalon of
        both sides, 3 gaps within the cortex of which one cannot know what is in them, 0 outside.
    """
    free = ids == 0
    hull = closing(~free, CLOSED)
    around = np.zeros(ids.shape, dtype=np.int32)
    around[free & hull] = _template_at(ids, free & hull)
    low = free & (~hull | _fissure(ids))
    core = np.isin(around, (*WHITE_MATTER, *VENTRICLES, *DIENCEPHALA))
    high = free & ~low & ndimage.minimum_filter(core, 5)
    inside = free & (potential(free, low, high) > 0.5)
    parts, _ = ndimage.label(free)

    tissue = remap_labels(ids, TO_TEMPLATE)
    tissue[free & ~np.isin(parts, np.unique(parts[low | high]))] = CORTEX
    tissue[inside] = WHITE
    tissue[inside & np.isin(around, DIENCEPHALA)] = DIENCEPHALON
    tissue[inside & _ventricles(ids, around)] = VENTRICLE
    return tissue


def brain_mask(tissue: np.ndarray) -> np.ndarray:
    """Return the mask of a filled cerebrum as skull stripping gives it: one piece without holes, sulci filled."""
    mask = closing(tissue > 0, SKULL_STRIPPED) | (tissue > 0)
    parts, _ = ndimage.label(mask)
    return ndimage.binary_fill_holes(parts == np.bincount(parts.ravel())[1:].argmax() + 1)


def paint(
    generator: np.random.Generator, tissue: np.ndarray, contrast: float, blur: float, texture: float
) -> np.ndarray:
    """Give every structure its grey value, white matter = 1, and smooth the steps between them.

    Parameters
    ----------
    generator
        Draws the values.
    tissue
        From :func:`complete`.
    contrast
        Standard deviation of each structure's factor; its two sides share it, and so does all cortex.
    blur
        Standard deviation in voxels of the Gaussian that makes partial volumes.
    texture
        Standard deviation of the uneven grey of tissue.

    Returns
    -------
    numpy.ndarray
        float32, of the shape of ``tissue``.
    """
    image, labels, _ = template()
    white = np.median(image.data[np.isin(labels.data, (2, 41))])
    values = np.ones(max(RIGHT) + 1, dtype=np.float32)
    values[[0, VENTRICLE]] = generator.uniform(HEAD_VALUES[0], BRIGHTEST_FLUID)
    cortex = [CORTEX, *(i for i in TO_TEMPLATE.values() if i > 1000)]
    deep = zip(LEFT[len(PARCELS) :], RIGHT[len(PARCELS) :], strict=True)
    for structure in (cortex, list(DIENCEPHALA), *map(list, deep)):
        ratio = np.median(image.data[np.isin(labels.data, structure)]) / white
        values[structure] = ratio**SHARPENING * generator.normal(1.0, contrast)
    bumps = ndimage.gaussian_filter(generator.standard_normal(tissue.shape, dtype=np.float32), 1.5)
    return ndimage.gaussian_filter(values[tissue], blur) * (1 + texture / bumps.std() * bumps)


def closing(mask: np.ndarray, radius: float) -> np.ndarray:
    """Close a mask by a ball (radius in voxels) and fill its holes; on blocks of two voxels, so a little wider."""
    margin = int(radius) // 2 + 2
    even = np.pad(mask, [(0, n % 2) for n in mask.shape])
    depth, height, width = (n // 2 for n in even.shape)
    blocks = np.pad(even.reshape(depth, 2, height, 2, width, 2).any(axis=(1, 3, 5)), margin)
    dilated = ndimage.binary_fill_holes(ndimage.distance_transform_edt(~blocks) <= radius / 2)
    below = ndimage.distance_transform_edt(dilated).astype(np.float32) - radius / 2
    below = below[margin : margin + depth, margin : margin + height, margin : margin + width]
    closed = ndimage.zoom(below, 2, order=1, mode="nearest", grid_mode=True) > 0
    return closed[tuple(slice(n) for n in mask.shape)]


def potential(free: np.ndarray, low: np.ndarray, high: np.ndarray) -> np.ndarray:
    """Solve Laplace's equation in the free voxels, with no current through the others.

    Thin cortex has pinholes, which a flood would pass. Here they hardly matter: little current flows through one, the
    less as a voxel conducts the worse, the fewer of its neighbours are free.

    Parameters
    ----------
    free, low, high
        bool (D, H, W): where there is no label, and in it where the potential is 0 and 1.

    Returns
    -------
    numpy.ndarray
        float64 (D, H, W), 0 where nothing is free; 0.5 in what neither ``low`` nor ``high`` is connected to.
    """
    conductance = ndimage.uniform_filter(free.astype(np.float32), 3) * free
    unknown = free & ~low & ~high
    number = np.full(free.shape, -1, dtype=np.int32)
    number[unknown] = np.arange(unknown.sum(), dtype=np.int32)
    total, inflow, edges = np.zeros(free.shape), np.zeros(free.shape), []
    for axis in range(3):
        one, other = (tuple(s if k == axis else slice(None) for k in range(3)) for s in (slice(-1), slice(1, None)))
        between = conductance[one] * conductance[other]
        for here, there in ((one, other), (other, one)):
            total[here] += between
            inflow[here] += between * high[there]
        both = unknown[one] & unknown[other]
        edges.append((number[one][both], number[other][both], between[both]))
    rows, columns, weights = (np.concatenate(parts) for parts in zip(*edges, strict=True))
    # scaled to a diagonal of ones; in double precision, so that sums in another order make no other brain
    scale = 1 / np.sqrt(np.maximum(total[unknown], 1e-6))
    values = -weights * scale[rows] * scale[columns]
    upper = sparse.coo_matrix((values, (rows, columns)), shape=(len(scale), len(scale)))
    system = (upper + upper.T + sparse.identity(len(scale))).tocsr()
    found, _ = cg(system, inflow[unknown] * scale, x0=0.5 / scale, rtol=1e-3, maxiter=400)
    potential = high.astype(float)
    potential[unknown] = found * scale
    return potential


def _template_at(ids: np.ndarray, where: np.ndarray) -> np.ndarray:
    """Return the template's ids at the voxels of a mask, carried over by a spline through the structures' middles."""
    labels = template()[1].data
    here = np.array(ndimage.center_of_mass(np.ones_like(ids), ids, list(TO_TEMPLATE)))
    there = np.array(ndimage.center_of_mass(np.ones_like(labels), labels, list(TO_TEMPLATE.values())))
    spline = RBFInterpolator(here, there, kernel="thin_plate_spline", smoothing=30.0)
    axes = [np.arange(0, n + COARSE, COARSE) for n in ids.shape]
    points = np.stack(np.meshgrid(*axes, indexing="ij"), axis=-1)
    coarse = spline(points.reshape(-1, 3)).reshape(points.shape)
    voxels = np.argwhere(where).T / COARSE
    place = [ndimage.map_coordinates(coarse[..., k], voxels, order=1) for k in range(3)]
    return ndimage.map_coordinates(labels, place, order=0)


def _fissure(ids: np.ndarray) -> np.ndarray:
    """Return where the next structure to the left is left cortex and the next to the right right cortex, both near."""
    free, place = ids == 0, np.arange(len(ids))[:, None, None]
    before = np.maximum.accumulate(np.where(free, 0, place), axis=0)
    after = np.minimum.accumulate(np.where(free, len(ids) - 1, place)[::-1], axis=0)[::-1]
    left = np.take_along_axis(np.isin(ids, LEFT_CORTEX), before, axis=0)
    right = np.take_along_axis(np.isin(ids, RIGHT_CORTEX), after, axis=0)
    return free & left & right & (after - before <= FISSURE)


def _ventricles(ids: np.ndarray, around: np.ndarray) -> np.ndarray:
    """Return the template's ventricles, and what little lies between them and the caudate or the thalamus."""
    ventricles = np.isin(around, VENTRICLES)
    walls = np.isin(ids, VENTRICLE_WALLS)
    return ventricles | (ndimage.maximum_filter(ventricles, 3) & ndimage.maximum_filter(walls, 3))
