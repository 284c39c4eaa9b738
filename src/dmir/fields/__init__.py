"""The displacement field: the one interchange format of every method, and all that is done to it.

A field ``u`` lives on the fixed grid and pulls back: ``warped(x) = moving(x + u(x))``. In memory it is a float32 tensor
(B, 3, D, H, W) in voxels, component ``k`` along array axis ``k``. On disk it is what ITK and ANTs write: NIfTI, 5-D,
intent vector, LPS millimetres, so that antsApplyTransforms, ITK-SNAP and 3D Slicer read it.

Sampling follows ``align_corners=True`` everywhere: voxel centres are the integer coordinates, and warping by zero is
the identity.
"""

from __future__ import annotations

from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from dmir.fields.composition import compose, compose_step, integrate
    from dmir.fields.coordinates import onto_moving_grid, to_millimetres, to_voxels, transform_vectors
    from dmir.fields.files import LPS, MARK, load_field, pair_field, save_field
    from dmir.fields.inversion import NO_INVERSE, inverse_at, inverse_consistency, inverse_residual, invert
    from dmir.fields.jacobian import folded_voxels, jacobian_determinant
    from dmir.fields.labels import warp_labels, warp_labels_each
    from dmir.fields.sampling import CORNERS, identity_grid, resize_displacement, shifted_displacement, warp

__all__ = [
    "CORNERS",
    "LPS",
    "MARK",
    "NO_INVERSE",
    "compose",
    "compose_step",
    "folded_voxels",
    "identity_grid",
    "integrate",
    "inverse_at",
    "inverse_consistency",
    "inverse_residual",
    "invert",
    "jacobian_determinant",
    "load_field",
    "onto_moving_grid",
    "pair_field",
    "resize_displacement",
    "save_field",
    "shifted_displacement",
    "to_millimetres",
    "to_voxels",
    "transform_vectors",
    "warp",
    "warp_labels",
    "warp_labels_each",
]

_HOMES = ("coordinates", "files", "sampling", "composition", "labels", "jacobian", "inversion")


def __getattr__(name: str) -> Any:
    # Loaded when asked for: who reads or writes a file of a field, as the process of pairs of SyN and Elastix does,
    # need not wait for torch, which the first two do without.
    for home in _HOMES if name in __all__ else ():
        module = import_module(f"{__name__}.{home}")
        if hasattr(module, name):
            return getattr(module, name)
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
