"""Preprocessing from files to files: what one job of a pipeline does."""

from __future__ import annotations

import resource
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd

from dmir.doubts import doubt, told_doubts
from dmir.errors import InputError
from dmir.preprocess.scan import preprocess_atlas, preprocess_scan, read_preprocessed
from dmir.preprocess.truth import truth_on_grid
from dmir.structures import load_structures, read_structures
from dmir.tables import read_record
from dmir.volumes import Volume, read_image, read_mask, require_same_grid, write_labels


def preprocess_files(
    folder: str | Path,
    *,
    image: str | Path,
    labels: str | Path | None = None,
    mask: str | Path | None = None,
    truth: str | Path | None = None,
    atlas: str | Path | None = None,
    label_map: str | None = None,
    structures: str | None = None,
    orientation: str | None = None,
    shape: tuple[int, int, int] = (80, 96, 80),
    spacing: tuple[float, float, float] = (2.0, 2.0, 2.0),
    strict: bool = False,
    **settings: Any,
) -> None:
    """Preprocess one scan, or the atlas where ``atlas`` is None, and write the results into ``folder``.

    Parameters
    ----------
    folder
        Receives ``image.nii.gz``, ``labels.nii.gz`` (all zero for a scan without labels), ``affine.mat``,
        ``quality.json`` and, where a truth is given, ``truth.nii.gz``.
    image, labels, mask, truth
        The scan's own files.
    atlas
        Folder of the preprocessed atlas.
    label_map
        Name of the map from the label map's ids to structure ids; None: they are the structures' own.
    structures
        Name of the structure set that the labels then belong to.
    orientation
        Axis codes of the files' arrays, where their headers are wrong; not of the truth.
    shape, spacing
        The grid, made round the atlas; for other scans the atlas's own grid is taken.
    strict
        What is doubtful about a file (:mod:`dmir.doubts`), or flags the scan, is an error; else it is told and noted
        in ``quality.json``.
    settings
        Keywords of :func:`dmir.preprocess.preprocess_scan`.

    Raises
    ------
    InputError
        A file is unusable, or the files of the scan do not lie on one grid.
    """
    folder = Path(folder)
    with told_doubts(strict) as told:
        scan = read_image(image, orientation=orientation)
        label_volume = read_structures(labels, structures, label_map, orientation=orientation) if labels else None
        mask_volume = read_mask(mask, orientation=orientation) if mask else None
        for other, path in ((label_volume, labels), (mask_volume, mask)):
            if other is not None and path is not None:
                require_same_grid(scan, other, image, path)
        if settings.get("skull_strip", "mask") == "mask" and mask_volume is None:
            raise InputError(
                f"skull_strip: mask, for {image}",
                found="no mask of this scan",
                expected="a brain mask in the cohort's table (column mask)",
                remedy="Give one, or set preprocess.skull_strip to none (scans stripped already) or deepbet.",
            )
        settings["structures"] = load_structures(structures) if structures else None
        if atlas is None:
            only_for_scans = {"affine", "affine_spacing", "affine_seed", "histogram_match"}
            own = {key: value for key, value in settings.items() if key not in only_for_scans}
            result = preprocess_atlas(
                scan, label_volume, mask_volume, shape=shape, spacing=spacing, where=str(image), **own
            )
        else:
            reference = read_preprocessed(atlas)
            result = preprocess_scan(scan, label_volume, mask_volume, reference, where=str(image), **settings)
        result.quality["peak_memory_mb"] = round(resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024)
        result.quality["warnings"] = list(told)
        for flag in result.quality["flags"]:
            doubt(image, found=flag, done="used all the same unless flagged scans are left out")
    result.write(folder)
    if result.labels is None:
        write_labels(folder / "labels.nii.gz", Volume(np.zeros(result.image.shape, np.int16), result.image.affine))
    if truth:
        from dmir.fields import load_field, save_field  # and so torch, which no other scan waits for

        displacement, affine = load_field(truth)
        field = truth_on_grid(displacement, affine, result.affine, result.image.grid)
        save_field(folder / "truth.nii.gz", field, result.image.affine)


def quality_table(files: Mapping[str, str | Path]) -> pd.DataFrame:
    """Gather ``quality.json`` files, by scan, in one table.

    ``cut_off``, ``warnings`` and ``flags`` are joined by semicolons; the seconds of each step are columns, and their
    sum is ``seconds``.
    """
    rows = []
    for scan, path in files.items():
        quality = read_record(path)
        steps = quality.pop("seconds")
        told = {name: "; ".join(quality.pop(name, [])) for name in ("cut_off", "warnings", "flags")}
        ok, _ = quality.pop("ok"), quality.pop("cut_planes", None)
        seconds = {
            "seconds": round(sum(steps.values()), 2),
            **{f"seconds_{step}": value for step, value in steps.items()},
        }
        rows.append({"scan": scan, **quality, **seconds, "ok": ok, **told})
    table, last = pd.DataFrame(rows), ["cut_off", "warnings", "ok", "flags"]
    return table[[*table.columns.drop(last), *last]]  # the reference has no affine to time
