"""Linear transforms of FSL, FreeSurfer and AFNI, as nitransforms reads them, and plain matrices."""

from __future__ import annotations

import warnings
from pathlib import Path
from typing import Any

import numpy as np

from dmir.errors import InputError, damaged
from dmir.transforms.conventions import empty_image
from dmir.transforms.itk import read_itk
from dmir.transforms.transform import Affine, Transform
from dmir.volumes import Grid

AFFINES = ("itk", "fsl", "ras", "afni", "freesurfer")
MOST_BYTES = 2**20  # of a file of text


def read_matrix(path: Path, convention: str | None, fixed: Grid | None, moving: Grid | None) -> Transform:
    """Read a ``.mat``, ``.txt`` or ``.xfm``: ITK's, or four lines of four numbers, which may be FSL's or RAS."""
    text = _text(path)
    numbers = None if text is None else _numbers(text)
    if numbers is None or numbers.size != 16:
        return read_itk(path, convention, fixed, moving)
    matrix = numbers.reshape(4, 4)
    if not np.allclose(matrix[3], (0, 0, 0, 1)):
        raise InputError(path, found=f"a last row of {matrix[3].tolist()}", expected="0 0 0 1, as of an affine")
    if convention == "ras":
        return Transform((Affine(_checked(path, matrix)),), "ras", "what you say")
    if convention == "fsl":
        from nitransforms.io.fsl import FSLLinearTransform

        return _by_nitransforms(path, FSLLinearTransform, text or "", "fsl", "what you say", fixed, moving, True)
    raise InputError(
        path,
        found="a matrix of sixteen numbers" + (f", which is not '{convention}'" if convention else ""),
        expected="to be told whose: fsl (FLIRT; from the moving to the fixed image, in FSL's mm)"
        " or ras (greedy, c3d, nitransforms: from fixed to moving, RAS mm)",
        remedy="Name it with --from fsl or --from ras (convention= in Python).",
    )


def read_lta(path: Path, convention: str | None, fixed: Grid | None, moving: Grid | None) -> Transform:
    """Read FreeSurfer's ``.lta``: from its destination, the fixed image, to its source, the moving one."""
    from nitransforms.io.lta import FSLinearTransform

    _require(path, convention, "freesurfer")
    known_by = "the suffix and FreeSurfer's lines"
    return _by_nitransforms(path, FSLinearTransform, _text(path) or "", "freesurfer", known_by, fixed, moving, False)


def read_afni(path: Path, convention: str | None, fixed: Grid | None, moving: Grid | None) -> Transform:
    """Read AFNI's ``.aff12.1D``: from the base, the fixed image, to the source, the moving one."""
    from nitransforms.io.afni import AFNILinearTransform

    _require(path, convention, "afni")
    text = _text(path)
    numbers = None if text is None else _numbers(text)
    if numbers is None or numbers.size != 12:
        raise InputError(path, found="not twelve numbers", expected="one affine, as AFNI's .aff12.1D has it")
    line = " ".join(repr(float(number)) for number in numbers)
    return _by_nitransforms(path, AFNILinearTransform, line, "afni", "the suffix", fixed, moving, True)


def _require(path: Path, convention: str | None, own: str) -> None:
    if convention not in (None, own):
        raise InputError(path, found=f"a file of {own}'s", expected=f"no other convention than {own}")


def _by_nitransforms(
    path: Path, kind: Any, text: str, name: str, known_by: str, fixed: Grid | None, moving: Grid | None, images: bool
) -> Transform:
    """Return what a reader of nitransforms makes of a text."""
    missing = [word for word, grid in (("--fixed", fixed), ("--moving", moving)) if grid is None]
    if images and missing:
        raise InputError(
            path,
            found=f"an affine in the coordinates of two images ({name})",
            expected="both images",
            remedy=f"Name {' and '.join(f'{word} IMAGE' for word in missing)} (fixed=, moving= in Python).",
        )
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            transform = kind.from_string(text)
            reference, source = (None if grid is None else empty_image(grid) for grid in (fixed, moving))
            matrix = np.asarray(transform.to_ras(moving=source, reference=reference), dtype=np.float64)
    except Exception as error:  # it checks by assertions and by what numpy raises
        raise damaged(
            path,
            found=f"a file that cannot be read as an affine of {name} ({type(error).__name__})",
            expected="one linear transform",
            remedy="Check that it is whole, and whose it is.",
        ) from error
    return Transform((Affine(_checked(path, matrix)),), name, known_by)


def _checked(path: Path, matrix: np.ndarray) -> np.ndarray:
    if matrix.shape != (4, 4) or not np.isfinite(matrix).all() or abs(np.linalg.det(matrix[:3, :3])) < 1e-9:
        raise InputError(path, found="a matrix that has no inverse", expected="an affine, 4x4")
    return np.vstack([matrix[:3], (0.0, 0.0, 0.0, 1.0)])


def _text(path: Path) -> str | None:
    """Return a file of text, or None where it is none."""
    content = path.read_bytes()[: MOST_BYTES + 1]
    if len(content) > MOST_BYTES or b"\0" in content:
        return None
    try:
        return content.decode()
    except UnicodeDecodeError:
        return None


def _numbers(text: str) -> np.ndarray | None:
    """Return all numbers of a text, its comments left out; None where anything else is in it."""
    words = " ".join(line.split("#")[0] for line in text.splitlines()).split()
    try:
        return np.array([float(word) for word in words])
    except ValueError:
        return None
