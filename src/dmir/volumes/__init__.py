"""Images in and out: the one place that reads and writes volumes.

A volume is an array with the affine that takes its voxel indices to RAS millimetres, as nibabel gives them. Whatever a
file may hold (another orientation, a trailing axis, gzip cut short, NaN), what leaves this package is checked.

A header is a claim that anybody can write. Nothing is read because of it before the claim was held against the file:
how many voxels, of which type, where, and whether so many bytes can be there at all.
"""

from __future__ import annotations

from dmir.volumes.grids import (
    Grid,
    Volume,
    before_planes,
    describe_grid,
    reorient,
    require_same_grid,
    same_grid,
    with_orientation,
)
from dmir.volumes.masks import decide_mask, read_mask
from dmir.volumes.reading import read_grid, read_image, read_labels
from dmir.volumes.stored import MAXIMUM_VOXELS, StoredArray, stored_array
from dmir.volumes.streams import BESIDE_VOXELS
from dmir.volumes.writing import atomic_path, save_nifti, write_labels, write_volume

__all__ = [
    "BESIDE_VOXELS",
    "MAXIMUM_VOXELS",
    "Grid",
    "StoredArray",
    "Volume",
    "atomic_path",
    "before_planes",
    "decide_mask",
    "describe_grid",
    "read_grid",
    "read_image",
    "read_labels",
    "read_mask",
    "reorient",
    "require_same_grid",
    "same_grid",
    "save_nifti",
    "stored_array",
    "with_orientation",
    "write_labels",
    "write_volume",
]
