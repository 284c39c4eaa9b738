"""Transforms of anybody's: affines and displacement fields in the conventions that programs have for them.

Whatever a file holds, what comes out of :func:`read` is one thing: a map from the fixed image's world to the moving
image's, RAS mm, made of affines and of fields as :mod:`dmir.fields` has them. ``read(path).on(grid)`` is the field of
a registration on a grid; ``.at(points)`` takes points through it; :func:`write` writes it in any convention.

What a file means is taken from what its header and its values prove, and is asked for (``convention=``) where they do
not: relative or absolute, RAS or LPS, millimetres or voxels look alike.
"""

from dmir.transforms.conventions import CONVENTIONS, Convention
from dmir.transforms.inverse import Inverse, inverse_of, inverse_points
from dmir.transforms.reading import read
from dmir.transforms.transform import Affine, Field, Transform, compose
from dmir.transforms.writing import write

__all__ = [
    "CONVENTIONS",
    "Affine",
    "Convention",
    "Field",
    "Inverse",
    "Transform",
    "compose",
    "inverse_of",
    "inverse_points",
    "read",
    "write",
]
