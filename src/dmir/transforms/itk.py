"""What ITK reads: its linear transforms, composites and splines, and fields in NRRD and MetaImage."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np

from dmir.errors import InputError, damaged
from dmir.transforms.conventions import CONVENTIONS, LPS, decoded
from dmir.transforms.transform import Affine, Field, Transform
from dmir.transforms.vectors import from_vectors
from dmir.volumes import Grid

IMAGES = (".nrrd", ".nhdr", ".mha", ".mhd")


def read_itk(path: Path, convention: str | None, fixed: Grid | None, moving: Grid | None) -> Transform:
    """Read a transform or a vector image that ITK wrote, by SimpleITK."""
    import SimpleITK as sitk

    if convention not in (None, "itk") and path.suffix.lower() not in IMAGES:
        raise InputError(path, found="a file of ITK's", expected=f"a file that '{convention}' can be")
    try:
        with _quiet(sitk):
            if path.suffix.lower() in IMAGES:
                image = sitk.ReadImage(str(path))
            else:
                steps = tuple(_steps(sitk, sitk.ReadTransform(str(path)), path, fixed))
    except RuntimeError as error:
        lines = [line for line in str(error).splitlines() if line.strip()]
        raise damaged(
            path,
            found=f"a file that ITK cannot read ({lines[-1].strip() if lines else 'RuntimeError'})",
            expected="a transform as ITK, ANTs or elastix write it",
            remedy="Check that it is whole; of a matrix in another form name the convention (--from).",
        ) from error
    if path.suffix.lower() in IMAGES:
        return _of_image(sitk, image, path, convention, fixed, moving)
    return Transform(steps, "itk", "ITK's transform file")


class _quiet:
    """ITK prints of what it cannot read; the error says it."""

    def __init__(self, sitk: Any) -> None:
        self._sitk, self._before = sitk, True

    def __enter__(self) -> None:
        self._before = self._sitk.ProcessObject.GetGlobalWarningDisplay()
        self._sitk.ProcessObject.GlobalWarningDisplayOff()

    def __exit__(self, *_: object) -> None:
        self._sitk.ProcessObject.SetGlobalWarningDisplay(self._before)


def _of_image(
    sitk: Any, image: Any, path: Path, convention: str | None, fixed: Grid | None, moving: Grid | None
) -> Transform:
    if image.GetDimension() != 3 or image.GetNumberOfComponentsPerPixel() != 3:
        found = f"{image.GetDimension()} axes and {image.GetNumberOfComponentsPerPixel()} components a voxel"
        raise InputError(path, found=found, expected="a displacement field: 3 axes and 3 components")
    vectors, grid = _vectors(sitk, image)
    names, said = ("itk", "spm"), "a vector image in a format of ITK's"
    return from_vectors(path, vectors, grid, convention, names, said, fixed, moving)


def _vectors(sitk: Any, image: Any) -> tuple[np.ndarray, Grid]:
    """Return a vector image's components, (3, D, H, W) in nibabel's order of axes, and its grid."""
    affine = np.eye(4)
    affine[:3, :3] = np.reshape(image.GetDirection(), (3, 3)) * np.array(image.GetSpacing())
    affine[:3, 3] = image.GetOrigin()
    depth, height, width = image.GetSize()
    vectors = sitk.GetArrayFromImage(image).transpose(3, 2, 1, 0)
    return vectors, Grid((depth, height, width), LPS @ affine)


def _steps(sitk: Any, transform: Any, path: Path, fixed: Grid | None) -> Iterator[Affine | Field]:
    """Yield the parts of a transform in the order in which a point of the fixed image goes through them."""
    if transform.GetDimension() != 3:
        raise InputError(path, found=f"a transform of {transform.GetDimension()} dimensions", expected="one of 3")
    if transform.GetTransformEnum() == sitk.sitkComposite:
        composite = sitk.CompositeTransform(transform)
        for number in reversed(range(composite.GetNumberOfTransforms())):  # the last one is applied first
            yield from _steps(sitk, composite.GetNthTransform(number), path, fixed)
    elif transform.IsLinear():
        yield Affine(_matrix(transform))
    else:
        if transform.GetTransformEnum() == sitk.sitkDisplacementField:
            image = sitk.DisplacementFieldTransform(transform).GetDisplacementField()
        else:
            image = _sampled(sitk, transform, path, fixed)
        vectors, grid = _vectors(sitk, image)
        if not np.isfinite(vectors).all():
            raise InputError(path, found="displacements that are NaN or infinite", expected="finite millimetres")
        yield Field(decoded(vectors, CONVENTIONS["itk"], grid, grid), grid.affine)


def _matrix(transform: Any) -> np.ndarray:
    """Return the 4x4 matrix, RAS mm, of any linear transform of ITK's, by where it takes four points."""
    points = np.array([transform.TransformPoint(tuple(point)) for point in np.vstack([np.zeros(3), np.eye(3)])])
    lps = np.eye(4)
    lps[:3, :3], lps[:3, 3] = (points[1:] - points[0]).T, points[0]
    return LPS @ lps @ LPS


def _sampled(sitk: Any, transform: Any, path: Path, fixed: Grid | None) -> Any:
    """Return a transform that is neither linear nor a field, as splines are, as a field on the fixed grid."""
    if fixed is None:
        raise InputError(
            path,
            found=f"a {transform.GetName()}, which lies on no grid of voxels",
            expected="the fixed image, on whose grid it is to be sampled",
            remedy="Name it: --fixed IMAGE (fixed= in Python).",
        )
    lps = LPS @ fixed.affine
    spacing = np.sqrt((lps[:3, :3] ** 2).sum(axis=0))
    sampler = sitk.TransformToDisplacementFieldFilter()
    sampler.SetSize([int(n) for n in fixed.shape])
    sampler.SetOutputOrigin([float(x) for x in lps[:3, 3]])
    sampler.SetOutputSpacing([float(x) for x in spacing])
    sampler.SetOutputDirection([float(x) for x in (lps[:3, :3] / spacing).ravel()])
    return sampler.Execute(transform)
