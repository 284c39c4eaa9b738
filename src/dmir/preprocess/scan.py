"""One scan from its own space to the cohort's grid: strip, correct, align, resample once, normalise, judge."""

from __future__ import annotations

import contextlib
import json
import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from dmir.errors import InputError
from dmir.preprocess.affine import estimate_affine, read_affine, write_affine
from dmir.preprocess.bias_field import correct_bias
from dmir.preprocess.cuts import align_cut, cut_planes, find_cuts
from dmir.preprocess.denoise import denoise as remove_noise
from dmir.preprocess.normalise import match_histogram, normalise
from dmir.preprocess.quality import assess
from dmir.preprocess.resample import resample
from dmir.preprocess.skull_strip import brain_mask
from dmir.structures import StructureSet
from dmir.tables import read_record
from dmir.volumes import (
    Grid,
    Volume,
    atomic_path,
    read_image,
    read_labels,
    reorient,
    require_same_grid,
    write_labels,
    write_volume,
)


@dataclass(frozen=True)
class Preprocessed:
    """A scan on the cohort's grid.

    Attributes
    ----------
    image
        float32 in [0, 1]: above 0 exactly inside the brain.
    labels
        Structure ids, or None where the scan has none.
    mask
        bool, the brain.
    affine
        4x4, atlas world -> the scan's own world (RAS mm), with which the scan was resampled.
    quality
        What :func:`dmir.preprocess.assess` says, ``cut_planes`` (:mod:`dmir.preprocess.cuts`, in the atlas's world),
        and ``seconds`` by step.
    """

    image: Volume
    labels: Volume | None
    mask: Volume
    affine: np.ndarray
    quality: dict[str, Any]

    def write(self, folder: str | Path) -> None:
        """Write image, labels (where there are any), affine.mat and quality.json into a folder."""
        folder = Path(folder)
        write_volume(folder / "image.nii.gz", self.image, np.float32)
        if self.labels is not None:
            write_labels(folder / "labels.nii.gz", self.labels)
        write_affine(folder / "affine.mat", self.affine)
        with atomic_path(folder / "quality.json") as path:
            path.write_text(json.dumps(self.quality, indent=2) + "\n")


def read_preprocessed(folder: str | Path) -> Preprocessed:
    """Read what :meth:`Preprocessed.write` wrote; the mask is where the image is above 0."""
    folder = Path(folder)
    image = read_image(folder / "image.nii.gz", "preprocessed image")
    labels = folder / "labels.nii.gz"
    return Preprocessed(
        image=image,
        labels=read_labels(labels, "preprocessed labels") if labels.is_file() else None,
        mask=Volume(image.data > 0, image.affine),
        affine=read_affine(folder / "affine.mat"),
        quality=read_record(folder / "quality.json"),
    )


def preprocess_atlas(
    image: Volume,
    labels: Volume | None,
    mask: Volume | None,
    *,
    shape: Sequence[int] = (80, 96, 80),
    spacing: Sequence[float] = (2.0, 2.0, 2.0),
    skull_strip: str = "mask",
    denoise: bool = False,
    bias_correction: bool = True,
    bias_shrink: int = 4,
    lower: float = 0.5,
    upper: float = 99.5,
    label_interpolation: str = "nearest",
    structures: StructureSet | None = None,
    where: str = "atlas",
) -> Preprocessed:
    """Preprocess a cohort's atlas and so define its grid: RAS axes, centred on the brain.

    Parameters
    ----------
    image, labels, mask
        The atlas in its own space, on one grid; labels already mapped to structure ids.
    shape, spacing
        Voxels, and mm, along the R, A and S axes of the grid.
    skull_strip
        ``"mask"``, ``"none"`` or ``"deepbet"``, see :func:`dmir.preprocess.brain_mask`.
    denoise
        Whether noise is removed first.
    bias_correction, bias_shrink
        Whether N4 runs, and on blocks of how many voxels.
    lower, upper
        Percentiles within the brain that become 0 and 1.
    label_interpolation
        ``"nearest"`` or ``"generic_label"``.
    structures
        What the labels mean: it is then checked that left lies left.
    where
        The scan's name, for error messages.

    Raises
    ------
    InputError
        Labels or mask lie on another grid, the mask is empty, or the brain does not fit the grid.
    """
    clock = _Clock()
    shrink = bias_shrink if bias_correction else 0
    image, labels, brain = _prepare(image, labels, mask, skull_strip, denoise, shrink, where, clock)
    grid = _centred_grid(brain, shape, spacing, where)
    scale = _GreyScale(lower, upper)
    return _finish(image, labels, brain, np.eye(4), grid, None, scale, label_interpolation, structures, where, clock)


def preprocess_scan(
    image: Volume,
    labels: Volume | None,
    mask: Volume | None,
    atlas: Preprocessed,
    *,
    skull_strip: str = "mask",
    denoise: bool = False,
    bias_correction: bool = True,
    bias_shrink: int = 4,
    affine: bool = True,
    affine_spacing: float = 3.0,
    affine_seed: int = 1,
    lower: float = 0.5,
    upper: float = 99.5,
    histogram_match: bool = False,
    label_interpolation: str = "nearest",
    structures: StructureSet | None = None,
    where: str = "scan",
) -> Preprocessed:
    """Preprocess one scan onto its atlas's grid, interpolating it once.

    Parameters
    ----------
    image, labels, mask
        The scan in its own space, in any orientation, on one grid; labels already mapped to structure ids.
    atlas
        From :func:`preprocess_atlas`, or :func:`read_preprocessed`.
    affine
        Whether the scan is aligned to the atlas; without it, its world is taken to be the atlas's.
    affine_spacing, affine_seed
        Voxel size (mm) at which the affine is sought, and the seed of its metric.
    histogram_match
        Whether the brain also takes on the atlas's grey-value distribution.
    skull_strip, denoise, bias_correction, bias_shrink, lower, upper, label_interpolation, structures, where
        As in :func:`preprocess_atlas`.

    Raises
    ------
    InputError
        Labels or mask lie on another grid, the mask is empty, the image has no contrast in it, or ANTs fails.
    """
    clock = _Clock()
    shrink = bias_shrink if bias_correction else 0
    image, labels, brain = _prepare(image, labels, mask, skull_strip, denoise, shrink, where, clock)
    transform = np.eye(4)
    if affine:
        with clock.step("affine"):
            transform = _aligned(image, brain, atlas, spacing=affine_spacing, seed=affine_seed)
    grid, scale = atlas.image.grid, _GreyScale(lower, upper, histogram_match)
    return _finish(image, labels, brain, transform, grid, atlas, scale, label_interpolation, structures, where, clock)


def _aligned(image: Volume, brain: Volume, atlas: Preprocessed, **how: Any) -> np.ndarray:
    """Return the affine; what either scan never saw does not pull it."""

    def estimate(brain: Volume, reference: Volume) -> np.ndarray:
        seen = Volume(np.where(reference.data, atlas.image.data, 0), atlas.image.affine)
        return estimate_affine(image, brain, seen, **how)

    planes = [np.array(plane) for plane in atlas.quality.get("cut_planes", [])]
    return align_cut(estimate, (brain, atlas.mask), (cut_planes(brain, find_cuts(brain.data)), planes))


@dataclass(frozen=True)
class _GreyScale:
    """How grey values come to a common scale."""

    lower: float
    upper: float
    histogram_match: bool = False


class _Clock:
    """Seconds of wall time by step."""

    def __init__(self) -> None:
        self.seconds: dict[str, float] = {}

    @contextlib.contextmanager
    def step(self, name: str) -> Iterator[None]:
        start = time.perf_counter()
        yield
        self.seconds[name] = round(time.perf_counter() - start, 2)


def _prepare(
    image: Volume,
    labels: Volume | None,
    mask: Volume | None,
    skull_strip: str,
    denoise: bool,
    bias_shrink: int,
    where: str,
    clock: _Clock,
) -> tuple[Volume, Volume | None, Volume]:
    """Do what happens in the scan's own space, with its axes turned to RAS so that their order changes nothing.

    ``bias_shrink`` 0 leaves the bias field as it is.
    """
    with clock.step("skull_strip"):
        if labels is not None:
            require_same_grid(image, labels, f"{where}: image", f"{where}: labels")
            labels = reorient(labels, "RAS")
        brain = reorient(brain_mask(image, mask, method=skull_strip, where=where), "RAS")
        image = reorient(image, "RAS")
    if np.ptp(image.data[brain.data]) == 0:
        raise InputError(
            f"{where}: image",
            found="the same value everywhere inside the brain mask",
            expected="contrast inside the brain mask",
            remedy="Check that image and mask belong together.",
        )
    if denoise:
        with clock.step("denoise"):
            image = remove_noise(image, brain)
    if bias_shrink:
        with clock.step("bias_field"):
            image = correct_bias(image, brain, shrink=bias_shrink)
    return image, labels, brain


def _centred_grid(brain: Volume, shape: Sequence[int], spacing: Sequence[float], where: str) -> Grid:
    """Return the RAS grid of that shape and spacing whose middle is the middle of the brain's bounding box.

    Its first voxel is put on a voxel of the atlas, so that an atlas of the same spacing is copied, not blurred.
    """
    voxels = np.argwhere(brain.data)
    low, high = voxels.min(axis=0), voxels.max(axis=0)
    corners = np.stack(np.meshgrid(*zip(low - 0.5, high + 0.5, strict=True), indexing="ij"), axis=-1).reshape(-1, 3)
    world = corners @ brain.affine[:3, :3].T + brain.affine[:3, 3]
    size, step = world.max(axis=0) - world.min(axis=0), np.asarray(spacing, dtype=float)
    least = np.ceil(size / step).astype(int) + 1  # one more: the grid may be shifted by half a voxel
    if (np.asarray(shape) < least).any():
        raise InputError(
            f"{where}: shape",
            found=f"{tuple(shape)} voxels of {tuple(float(s) for s in spacing)} mm",
            expected=f"at least {tuple(int(n) for n in least)}, for a brain of {size.round().astype(int).tolist()} mm",
            remedy="Enlarge the shape or the spacing, or check the brain mask.",
        )
    depth, height, width = (int(n) for n in shape)
    origin = (world.min(axis=0) + world.max(axis=0)) / 2 - step * (np.array([depth, height, width]) - 1) / 2
    nearest = np.round(np.linalg.inv(brain.affine) @ [*origin, 1.0])
    affine = np.diag([*step, 1.0])
    affine[:3, 3] = (brain.affine @ nearest)[:3]
    return Grid((depth, height, width), affine)


def _finish(
    image: Volume,
    labels: Volume | None,
    brain: Volume,
    transform: np.ndarray,
    grid: Grid,
    atlas: Preprocessed | None,
    scale: _GreyScale,
    label_interpolation: str,
    structures: StructureSet | None,
    where: str,
    clock: _Clock,
) -> Preprocessed:
    """Resample, normalise and judge; the atlas is compared with itself."""
    with clock.step("resample"):
        mask = resample(Volume(brain.data.astype(np.float32), brain.affine), grid, transform).data > 0.5
        stripped = Volume(np.where(brain.data, image.data, 0), image.affine)
        data = resample(stripped, grid, transform).data
        if labels is not None:
            labels = resample(labels, grid, transform, interpolation=label_interpolation)
    with clock.step("normalise"):
        data = normalise(data, mask, lower=scale.lower, upper=scale.upper, where=where)
        if scale.histogram_match and atlas is not None:
            data = match_histogram(data, mask, atlas.image.data, atlas.mask.data)
    result, found = Volume(data, grid.affine), Volume(mask, grid.affine)
    reference = (result, found) if atlas is None else (atlas.image, atlas.mask)
    with clock.step("quality"):
        quality = assess(brain, transform, result, found, *reference, labels=labels, structures=structures)
    planes = cut_planes(brain, find_cuts(brain.data), transform)
    quality |= {"cut_planes": [plane.tolist() for plane in planes], "seconds": clock.seconds}
    return Preprocessed(image=result, labels=labels, mask=found, affine=transform, quality=quality)
