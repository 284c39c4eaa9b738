"""Fields in numpy's files: Learn2Reg's, VoxelMorph's, and dmir's own, which has its grid with it."""

from __future__ import annotations

import zipfile
from pathlib import Path
from typing import Any

import numpy as np
from scipy.ndimage import zoom

from dmir.errors import InputError, damaged
from dmir.transforms.proof import FIELDS
from dmir.transforms.transform import Transform
from dmir.transforms.vectors import from_vectors
from dmir.volumes import MAXIMUM_VOXELS, Grid

OURS = ("displacement", "affine")
MOST_BYTES = 3 * 8 * MAXIMUM_VOXELS


def read_arrays(path: Path, convention: str | None, fixed: Grid | None, moving: Grid | None) -> Transform:
    """Read a field of an ``.npz`` or ``.npy``; nothing in it is unpickled."""
    arrays = _load(path)
    if set(OURS) <= set(arrays):
        return _ours(path, arrays)
    if convention == "npz":
        raise InputError(path, found=f"arrays {sorted(arrays)}", expected=" and ".join(OURS))
    if len(arrays) != 1:
        raise InputError(path, found=f"arrays {sorted(arrays)}", expected="one array, the field")
    ((key, array),) = arrays.items()
    array = np.squeeze(array)
    if fixed is None:
        raise InputError(
            path,
            found="a field without a place in the world",
            expected="the fixed image, on whose grid it lies",
            remedy="Name it: --fixed IMAGE (fixed= in Python).",
        )
    vectors = _components_first(path, array, fixed)
    shape = vectors.shape[1:]
    if shape == tuple(fixed.shape) and convention != "learn2reg":
        names, said = FIELDS, "numpy's files say nothing"
        if key == "vol" and convention is None:
            names, said = ("voxels", "voxels-absolute"), "VoxelMorph's name of its array, 'vol'"
        return from_vectors(path, vectors, fixed, convention, names, said, fixed, moving)
    if tuple(2 * n for n in shape) == tuple(fixed.shape) and convention in (None, "learn2reg"):
        known_by = "half the fixed image's shape" if convention is None else "what you say"
        full = doubled(vectors)
        found = from_vectors(path, full, fixed, "voxels", FIELDS, "", fixed, moving)
        return Transform(found.steps, "learn2reg", known_by, found.assumed)
    raise InputError(
        path,
        found=f"an array of shape {array.shape}" + (f" as {convention}" if convention else ""),
        expected=f"three components a voxel on {_times(fixed.shape)} voxels, the fixed image's,"
        " or as learn2reg on half as many along each axis",
        remedy="Check that these belong together.",
    )


def doubled(vectors: np.ndarray) -> np.ndarray:
    """Double a field's resolution (3, d, h, w) as Learn2Reg's evaluation does, by quadratic splines."""
    return np.stack([zoom(component.astype(np.float32), 2, order=2) for component in vectors])


def _components_first(path: Path, array: np.ndarray, fixed: Grid) -> np.ndarray:
    if array.ndim == 4 and (array.shape[0] == 3) != (array.shape[3] == 3):
        return array if array.shape[0] == 3 else np.moveaxis(array, 3, 0)
    raise InputError(
        path,
        found=f"an array of shape {array.shape}",
        expected=f"(3, D, H, W) or (D, H, W, 3) for the fixed image of {_times(fixed.shape)} voxels",
    )


def _times(shape: tuple[int, ...]) -> str:
    return "x".join(map(str, shape))


def _ours(path: Path, arrays: dict[str, np.ndarray]) -> Transform:
    displacement, affine = (arrays[name] for name in OURS)
    if displacement.ndim != 4 or displacement.shape[0] != 3 or affine.shape != (4, 4):
        raise InputError(
            path,
            found=f"displacement {displacement.shape}, affine {affine.shape}",
            expected="displacement (3, D, H, W) and affine (4, 4)",
        )
    if not np.isfinite(affine).all() or abs(np.linalg.det(affine[:3, :3])) < 1e-9:
        raise InputError(path, found="an affine that cannot be inverted", expected="voxel indices to RAS mm")
    depth, height, width = displacement.shape[1:]
    grid = Grid((depth, height, width), affine.astype(np.float64))
    found = from_vectors(path, displacement, grid, "voxels", (), "", grid, grid)
    return Transform(found.steps, "npz", f"the names of its arrays ({', '.join(OURS)})", ())


def _load(path: Path) -> dict[str, np.ndarray]:
    """Return the arrays of a file, of numbers alone, held against what memory may be taken for them."""
    try:
        if path.suffix.lower() == ".npz":
            with zipfile.ZipFile(path) as archive:
                if sum(part.file_size for part in archive.infolist()) > MOST_BYTES:
                    raise ValueError("more bytes than a field has")
        loaded: Any = np.load(path, allow_pickle=False, mmap_mode="r" if path.suffix.lower() == ".npy" else None)
        arrays = {"": loaded} if isinstance(loaded, np.ndarray) else {name: loaded[name] for name in loaded.files}
        if any(array.dtype.kind not in "fiu" for array in arrays.values()):
            raise ValueError("an array of something else than numbers")
        return {name: np.asarray(array) for name, array in arrays.items()}
    except Exception as error:  # numpy and zipfile raise many kinds for what is no such file
        raise damaged(
            path,
            found=f"a file that cannot be read ({type(error).__name__}: {str(error).partition(chr(10))[0]})",
            expected="arrays of numbers as numpy saves them",
            remedy="It may be truncated: copy it again.",
        ) from error
