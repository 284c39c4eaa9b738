"""One pair as one method registered it, kept for the figures when the fields themselves are deleted."""

from __future__ import annotations

import zipfile
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch

from dmir.errors import InputError, damaged
from dmir.fields import load_field, pair_field, warp, warp_labels
from dmir.metrics import dice
from dmir.volumes import atomic_path, read_image, read_labels

FORMAT = 1
_TEXTS = ("cohort", "method", "model", "moving", "fixed")
_ARRAYS = ("warped", "displacement", "affine", "dice")


@dataclass(frozen=True, eq=False)
class Example:
    """A registered pair.

    Attributes
    ----------
    method, model
        Who registered it.
    warped
        The warped moving image (D, H, W) on the fixed grid.
    displacement
        The field (3, D, H, W) in voxels.
    affine
        4x4 voxel-to-RAS matrix of the fixed grid, mm.
    cohort, moving, fixed
        Names of the cohort and of the two scans.
    dice
        The pair's mean Dice; NaN when it is not known.
    """

    method: str
    model: str
    warped: np.ndarray
    displacement: np.ndarray
    affine: np.ndarray
    cohort: str = ""
    moving: str = ""
    fixed: str = ""
    dice: float = float("nan")

    def __post_init__(self) -> None:
        if self.displacement.shape != (3, *self.warped.shape) or self.warped.ndim != 3:
            raise ValueError(
                f"an example has warped (D, H, W) and displacement (3, D, H, W), "
                f"not {self.warped.shape} and {self.displacement.shape}"
            )


def require_one_pair(examples: Sequence[Example], shapes: Mapping[str, tuple[int, ...]]) -> None:
    """Refuse with InputError examples of several pairs or grids, and volumes on another grid.

    Parameters
    ----------
    examples
        One a method.
    shapes
        What a further volume is -> its shape.
    """
    if not examples:
        raise InputError("examples", found="none", expected="one example a method")
    first = examples[0]
    for example in examples[1:]:
        where = f"the example of {example.method}"
        if (example.moving, example.fixed) != (first.moving, first.fixed):
            found, expected = (f"the pair {e.moving} to {e.fixed}" for e in (example, first))
            raise InputError(where, found=found, expected=f"{expected}, as the other examples")
        if not np.allclose(example.affine, first.affine, atol=1e-3):
            raise InputError(where, found="another affine", expected="the grid of the other examples")
    every = {**{f"the example of {example.method}": example.warped.shape for example in examples}, **shapes}
    for where, shape in every.items():
        if shape != first.warped.shape:
            raise InputError(where, found=f"shape {shape}", expected=f"the grid of the examples, {first.warped.shape}")


def example_file(folder: str | Path, moving: str, fixed: str) -> Path:
    """Return where the example of a pair lies in a folder of examples."""
    return Path(folder, f"{moving}__{fixed}.npz")


def example_of(
    field: str | Path, moving: str | Path, moving_labels: str | Path, fixed_labels: str | Path, **names: str
) -> Example:
    """Return a registered pair from its files: the field, the moving image and label map, the fixed label map.

    Parameters
    ----------
    field, moving, moving_labels, fixed_labels
        Files on one grid.
    names
        ``method``, ``model``, ``cohort``, ``moving`` and ``fixed`` of the example, the last two as ``moving_scan`` and
        ``fixed_scan``.
    """
    displacement, affine = load_field(field)
    batch = torch.from_numpy(displacement)[None]
    labels = torch.from_numpy(read_labels(moving_labels).data)[None, None]
    fixed = read_labels(fixed_labels).data
    overlap = dice(warp_labels(labels, batch)[0, 0].numpy(), fixed, [int(i) for i in np.unique(fixed) if i])
    return Example(
        warped=warp(torch.from_numpy(read_image(moving).data)[None, None], batch)[0, 0].numpy(),
        displacement=displacement,
        affine=affine,
        method=names["method"],
        model=names["model"],
        cohort=names["cohort"],
        moving=names["moving_scan"],
        fixed=names["fixed_scan"],
        dice=float(np.nanmean(list(overlap.values()))),
    )


def save_example(path: str | Path, example: Example) -> None:
    """Write an example as a compressed .npz, all at once: half-precision arrays, exact enough for pictures.

    A displacement of 8 to 16 voxels is kept to 1/256 voxel, an image in [0, 1] to 1/4096.
    """
    path = Path(path)
    if path.suffix != ".npz":
        raise ValueError(f"an example is a .npz file, not {path.name}")
    with np.errstate(over="ignore"):
        volumes = {name: np.asarray(getattr(example, name), dtype=np.float16) for name in ("warped", "displacement")}
    if not all(np.isfinite(volume).all() for volume in volumes.values()):
        raise ValueError(f"{example.method}: an example's image or field is not finite in half precision")
    entries: dict[str, Any] = {
        "format": np.int64(FORMAT),
        "affine": np.asarray(example.affine, dtype=np.float64),
        "dice": np.float64(example.dice),
        **volumes,
        **{name: np.str_(getattr(example, name)) for name in _TEXTS},
    }
    with atomic_path(path) as temporary, temporary.open("wb") as file:
        np.savez_compressed(file, allow_pickle=False, **entries)


def keep_examples(
    folder: str | Path,
    pairs: Sequence[Sequence[str]],
    fields: str | Path,
    images: Mapping[str, str | Path],
    labels: Mapping[str, str | Path],
    **names: str,
) -> None:
    """Keep some of the pairs that were registered; one that failed leaves an empty file.

    Parameters
    ----------
    folder
        Where the examples go: it is made, though there be no pairs.
    pairs
        (moving, fixed) names.
    fields
        The folder of the fields.
    images, labels
        Preprocessed images of the moving scans, and label maps of all, by name.
    names
        ``cohort``, ``method`` and ``model``.
    """
    Path(folder).mkdir(parents=True, exist_ok=True)
    for moving, fixed in pairs:
        field, kept = pair_field(fields, moving, fixed), example_file(folder, moving, fixed)
        if field.is_file():
            scans = {"moving_scan": moving, "fixed_scan": fixed}
            save_example(kept, example_of(field, images[moving], labels[moving], labels[fixed], **names, **scans))
        else:
            kept.touch()


def load_example(path: str | Path) -> Example:
    """Read what :func:`save_example` wrote; image and field as float32.

    Raises
    ------
    InputError
        The file is missing, damaged, or not an example. Nothing in it is ever executed.
    """
    path = Path(path)
    if not path.is_file():
        raise InputError(path, found="no such file", expected="an example (.npz)", remedy="Check the path.")
    try:
        with np.load(path, allow_pickle=False) as archive:
            missing = sorted({*_TEXTS, *_ARRAYS, "format"} - set(archive.files))
            if missing:
                raise InputError(path, found=f"no {', '.join(missing)}", expected="an example that save_example wrote")
            if int(archive["format"]) != FORMAT:
                raise InputError(path, found=f"format {int(archive['format'])}", expected=f"format {FORMAT}")
            texts = {name: str(archive[name]) for name in _TEXTS}
            return Example(
                warped=archive["warped"].astype(np.float32),
                displacement=archive["displacement"].astype(np.float32),
                affine=archive["affine"],
                dice=float(archive["dice"]),
                **texts,
            )
    except (ValueError, OSError, EOFError, TypeError, zipfile.BadZipFile) as error:
        raise damaged(
            path,
            found=f"a file that cannot be read as an example ({type(error).__name__})",
            expected="a complete .npz that save_example wrote",
            remedy="It may be truncated: make it again.",
        ) from error
