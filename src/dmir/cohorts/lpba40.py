"""LPBA40: 40 scans of healthy volunteers with 56 structures drawn by hand, from the LONI Probabilistic Brain Atlas.

Published by the Laboratory of Neuro Imaging (Shattuck et al., NeuroImage 39:1064, 2008), for research under LONI's
terms. In delineation space (181x217x181 voxels of 1 mm, aligned rigidly to one template) a folder a scan holds the
stripped image and the structures; in native space the stripped, bias-corrected image and a map of tissue classes, but
no structures. Cerebellum and brainstem (181, 182) lie outside the stripped images. No ages and no splits.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from pathlib import Path

import pandas as pd

from dmir.cohorts.sources import require_layout
from dmir.errors import InputError, suggestion

WHERE = (
    "LPBA40: LPBA40_Subjects_Delineation_Space_MRI_and_label_files.zip (for space native also "
    "LPBA40_Subjects_Native_Space_MRI_data_and_masks.zip) from https://resource.loni.usc.edu/resources/"
    "atlases-downloads, under LONI's terms for research; unpack it and the archive inside it, so that "
    "<folder>/delineation_space/S01/S01.delineation.skullstripped.hdr exists."
)
# image and labels of a scan in its folder
FILES = {
    "delineation": ("{scan}.delineation.skullstripped", "{scan}.delineation.structure.label"),
    "native": ("{scan}.native.brain.bfc", "tissue/{scan}.native.tissue"),
}
ENDINGS = (".nii.gz", ".nii", ".img.gz", ".img")
SCAN = re.compile(r"S\d{2}")
# The axes of the arrays as stored. Analyze headers do not tell left from right (nibabel takes them for L, A, S)
# and copies as NIfTI exist whose headers say L, P, S: the brain turned by 180 degrees about the vertical axis.
# Measured in 36 such scans: the odd ids (left) lie at low first indices, the frontal lobe at high second ones, the
# parietal lobe at high third ones. That the odd ids are anatomically left follows from the brain's torque. The mean
# left-right asymmetry of the cerebrum, each brain aligned with its own mirror image before, correlates by 0.78
# (bootstrap over subjects, 95 %: 0.33 to 0.81; were the odd ids right, it would be negative) with that of 24 people of
# OASIS-1, whose sides are known and whose halves agree by 0.73. Of single brains 30 of 36 agree (OASIS-1: 22 of 24).
# Assumed, not measured: the published Analyze files, and those of native space, are stored in this order, too.
ORIENTATION = "RAS"


def recognises(folder: Path) -> bool:
    """Tell whether the folder has one of LPBA40's two spaces, or folders of its scans, complete or not."""
    return any((folder / f"{space}_space").is_dir() for space in FILES) or any(
        next(path.glob(f"{path.name}.{space}.*"), None) for path in _scan_folders(folder) for space in FILES
    )


def scan_table(folder: str | Path, *, space: str = "delineation") -> pd.DataFrame:
    """List the scans of LPBA40 that are there, S01 to S40.

    Parameters
    ----------
    folder
        What has ``delineation_space`` and ``native_space``, or one of these two, or any folder of S01, S02, ...; the
        images as published (``.hdr`` with ``.img.gz``) or as ``.img``, ``.nii`` or ``.nii.gz``.
    space
        ``"delineation"``: labels are the 56 structures. ``"native"``: labels are tissue classes; there are no
        structures in native space.

    Returns
    -------
    pandas.DataFrame
        One row a scan, all text: ``scan`` (S01), ``subject, session, age, image, labels, mask, source_id``. The images
        are stripped: there is no mask.

    Raises
    ------
    InputError
        The folder has another layout, a scan lacks a file or has it in two forms, or ``space`` is unknown.
    """
    if space not in FILES:
        raise InputError("space", found=f"'{space}'", expected=" or ".join(FILES), remedy=suggestion(space, FILES))
    folder = require_layout(folder, "lpba40")
    inside = folder / f"{space}_space"
    scans = _scan_folders(inside if inside.is_dir() else folder)
    files = {path.name: [_only_form(path / name.format(scan=path.name)) for name in FILES[space]] for path in scans}
    _check_files(folder, files, space)
    return pd.DataFrame([_row(scan, *both) for scan, both in files.items()])


def _row(scan: str, image: Path, labels: Path) -> dict[str, str]:
    return {
        "scan": scan,
        "subject": scan,
        "session": "",
        "age": "",
        "image": str(image),
        "labels": str(labels),
        "mask": "",
        "source_id": scan,
    }


def _scan_folders(folder: Path) -> list[Path]:
    return sorted(path for path in folder.iterdir() if SCAN.fullmatch(path.name) and path.is_dir())


def _only_form(stem: Path) -> Path:
    """Return the file of a volume; without ending where there is none, with .hdr where the header lacks."""
    found = [path for path in (stem.with_name(stem.name + ending) for ending in ENDINGS) if path.is_file()]
    if len(found) > 1:
        raise InputError(
            stem,
            found=f"two files of one volume: {' and '.join(path.name for path in found[:2])}",
            expected="one",
            remedy="Move one of them away (converted files may have other axes than the published ones).",
        )
    if not found:
        return stem
    header = stem.with_name(f"{stem.name}.hdr")
    return found[0] if ".img" not in found[0].suffixes or header.is_file() else header


def _check_files(folder: Path, files: Mapping[str, list[Path]], space: str) -> None:
    """Refuse a tree without scans, or with scans that lack a volume."""
    wanted = [path for both in files.values() for path in both]
    missing = [str(path.relative_to(folder)) for path in wanted if not path.name.endswith(ENDINGS)]
    if wanted and not missing:
        return
    named = ", ".join(missing[:10]) + (", ..." if len(missing) > 10 else "")
    raise InputError(
        folder,
        found=f"{len(missing)} of {len(wanted)} volumes missing: {named}" if missing else f"no scan in {space} space",
        expected="image and labels of every scan, as .hdr with .img.gz or .img, or as .nii.gz or .nii",
        remedy="Unpack the archive again, or move the folders of unfinished scans away."
        if len(missing) < len(wanted)
        else WHERE,
    )
