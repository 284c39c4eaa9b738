"""A field of vectors: which convention they are in, and what they are in voxels."""

from __future__ import annotations

from pathlib import Path

import numpy as np

from dmir.errors import InputError
from dmir.transforms import proof
from dmir.transforms.conventions import CONVENTIONS, decoded, is_oblique
from dmir.transforms.transform import Field, Transform
from dmir.volumes import Grid


def from_vectors(
    path: Path,
    vectors: np.ndarray,
    own: Grid,
    convention: str | None,
    names: tuple[str, ...],
    said: str,
    fixed: Grid | None,
    moving: Grid | None,
    unit: float = 1.0,
) -> Transform:
    """Make a transform of vectors (3, D, H, W) on their own grid; find out the convention where it is not given.

    Vectors that are lengths are in the unit of the file, of so many mm.
    """
    if unit != 1:
        vectors = vectors * unit
    if not np.isfinite(vectors).all():
        raise InputError(path, found="displacements that are NaN or infinite", expected="finite numbers")
    marked = said.startswith("its description")
    given = convention is not None
    if convention is None:
        chosen = names[0] if marked else proof.proven(vectors, names, said, path, own, moving)
    else:
        chosen = convention
    if chosen not in proof.FIELDS:
        raise InputError(path, found="a vector image", expected=f"a convention of one, which '{chosen}' is not")
    kind, assumed = CONVENTIONS[chosen], []
    if given and not proof.fitting(vectors, [chosen], own, moving)[1]:
        assumed.append(f"as {chosen} the vectors make no likely registration: it is read so because you say so")
    if kind.frame is CONVENTIONS["voxels"].frame:
        vectors = vectors / unit if unit != 1 else vectors
        own = _place_of(own, fixed, path, assumed)
    there = _moving_grid(chosen, path, own, moving, assumed)
    with np.errstate(all="ignore"):  # what overflows to Inf is refused below
        displacement = decoded(vectors, kind, own, there)
    if not np.isfinite(displacement).all():
        raise InputError(path, found="displacements that are NaN or infinite", expected="finite numbers")
    known_by = "what you say" if given else said
    return Transform((Field(displacement, own.affine),), chosen, known_by, tuple(assumed))


def _place_of(own: Grid, fixed: Grid | None, path: Path, assumed: list[str]) -> Grid:
    """Return the fixed grid of a field in voxels, which programs often write without a place in the world."""
    if fixed is None:
        if np.allclose(own.affine, np.eye(4)):
            assumed.append("the file says nothing of its place (its affine is the identity): name the fixed image")
        return own
    if tuple(fixed.shape) != tuple(own.shape):
        raise InputError(
            path,
            found=f"a field of {'x'.join(map(str, own.shape))} voxels",
            expected=f"the fixed image's shape, {'x'.join(map(str, fixed.shape))}",
            remedy="Check that these belong together.",
        )
    return fixed


def _moving_grid(name: str, path: Path, fixed: Grid, moving: Grid | None, assumed: list[str]) -> Grid:
    """Return the moving image's grid, or what may be taken for it."""
    if moving is not None or not CONVENTIONS[name].of_images:
        return fixed if moving is None else moving
    if name.startswith("fsl") or (name == "afni" and is_oblique(fixed)):
        raise InputError(
            path,
            found=f"vectors in coordinates of the moving image ({name})",
            expected="that image",
            remedy="Name it: --moving IMAGE (moving= in Python).",
        )
    assumed.append(
        "the moving image is taken for one that is not oblique"
        if name == "afni"
        else "the moving image is taken for one on the fixed image's grid"
    )
    return fixed
