"""Learn2Reg's OASIS task (2021, task 3): brains for registration between people, with labels of 35 structures.

Stripped, bias-corrected T1 images of 160x224x192 voxels of 1 mm, aligned affinely, with automatic label maps (the ids
of neurite-OASIS's seg35) and brain masks; prepared from OASIS (Marcus et al., Journal of Cognitive Neuroscience
19:1498, 2007) by the authors of HyperMorph (Hoopes et al., arXiv:2101.01035, 2021), under OASIS's data use agreement.
People are numbered anew: nothing tells their ages, or whether two scans are of one person. 414 scans have public labels
(0001-0394 to learn from, 0395-0414 for the 19 validation pairs); those of the test scans (0415-0453) are withheld.
"""

from __future__ import annotations

import json
from pathlib import Path, PurePosixPath
from typing import Any

import pandas as pd

from dmir.cohorts.layout import read_bounded, require_files
from dmir.cohorts.sources import require_layout
from dmir.errors import InputError

WHERE = (
    "Learn2Reg OASIS: the archive of the task OASIS from https://learn2reg.grand-challenge.org/Datasets (a free "
    "account is needed), under OASIS's data use agreement (https://sites.wustl.edu/oasisbrains); unpack it so that "
    "<folder>/OASIS_dataset.json, <folder>/imagesTr and <folder>/labelsTr exist."
)
DESCRIPTION = "OASIS_dataset.json"


def recognises(folder: Path) -> bool:
    """Tell whether the folder has Learn2Reg's description of the task or its training images, complete or not."""
    return (folder / DESCRIPTION).is_file() or any((folder / "imagesTr").glob("OASIS_*"))


def scan_table(folder: str | Path) -> pd.DataFrame:
    """List the scans of Learn2Reg's OASIS task that have labels, by number.

    The 39 test scans (``imagesTs``) are left out: their labels are withheld, so nothing can be scored on them. The
    scans of the validation pairs are listed; :func:`validation_pairs` tells the pairs.

    Parameters
    ----------
    folder
        Where ``OASIS_dataset.json`` is.

    Returns
    -------
    pandas.DataFrame
        One row a scan, all text: ``scan`` (OASIS_0001), ``subject, session, age, image, labels, mask, source_id``.

    Raises
    ------
    InputError
        The folder has another layout, files are missing, or the description is unusable.
    """
    folder = require_layout(folder, "learn2reg_oasis")
    description = _description(folder)
    entries = _training(description, folder)
    names = [_scan(entry["image"]) for entry in entries]
    # scans of the validation pairs that are not among the training scans have labels, too
    paired = dict.fromkeys(image for pair in _validation(description, folder) for image in pair)
    entries += [{"image": image} for image in paired if _scan(image) not in names]
    twice = sorted({name for name in names if names.count(name) > 1})
    if twice:
        raise InputError(folder / DESCRIPTION, found=f"{twice[0]} more than once", expected="every scan once")
    if not entries:
        raise InputError(folder / DESCRIPTION, found="no scan in training", expected="at least one", remedy=WHERE)
    masks = (folder / "masksTr").is_dir()
    rows = sorted((_row(folder, entry, masks=masks) for entry in entries), key=lambda row: row["source_id"])
    require_files(folder, [row[key] for row in rows for key in ("image", "labels", "mask") if row[key]])
    return pd.DataFrame(rows)


def validation_pairs(folder: str | Path) -> pd.DataFrame:
    """Return the published validation pairs (19: OASIS_0396 to OASIS_0395, ...), in their own order.

    Returns
    -------
    pandas.DataFrame
        The columns ``moving, fixed``: names of scans.

    Raises
    ------
    InputError
        The folder has another layout, or the description is unusable or names no such pairs.
    """
    folder = require_layout(folder, "learn2reg_oasis")
    pairs = _validation(_description(folder), folder)
    if not pairs:
        raise InputError(folder / DESCRIPTION, found="no registration_val", expected="the validation pairs")
    return pd.DataFrame([(_scan(moving), _scan(fixed)) for moving, fixed in pairs], columns=["moving", "fixed"])


def _description(folder: Path) -> dict[str, Any]:
    path = folder / DESCRIPTION
    require_files(folder, [path])
    expected = "Learn2Reg's description of the task, with the lists training and registration_val"
    remedy = "Download or unpack it again."
    try:
        description = json.loads(read_bounded(path, expected).decode("utf-8-sig"))
    except (ValueError, RecursionError) as error:
        raise InputError(path, found=f"a file that is no JSON ({error})", expected=expected, remedy=remedy) from error
    if not isinstance(description, dict) or not isinstance(description.get("training"), list):
        raise InputError(path, found="no list training", expected=expected, remedy=remedy)
    return description


def _training(description: dict[str, Any], folder: Path) -> list[dict[str, str]]:
    """Return what the description says of each training scan: image and, where it tells them, label and mask."""
    keys, entries = ("image", "label", "mask"), []
    for entry in description["training"]:
        told = {"image": entry} if isinstance(entry, str) else entry
        if (
            not isinstance(told, dict)
            or not told.get("image")
            or not all(isinstance(told.get(k, ""), str) for k in keys)
        ):
            raise InputError(folder / DESCRIPTION, found=f"{entry!r} in training", expected="'image' and 'label'")
        entries.append({key: _relative(told[key], folder) for key in keys if told.get(key)})
    return entries


def _validation(description: dict[str, Any], folder: Path) -> list[tuple[str, str]]:
    """Return the images of the validation pairs, (moving, fixed)."""
    pairs = []
    for entry in description.get("registration_val") or []:
        if not isinstance(entry, dict) or not all(isinstance(entry.get(key), str) for key in ("moving", "fixed")):
            raise InputError(
                folder / DESCRIPTION, found=f"{entry!r} in registration_val", expected="'moving' and 'fixed'"
            )
        pairs.append((_relative(entry["moving"], folder), _relative(entry["fixed"], folder)))
    return pairs


def _row(folder: Path, entry: dict[str, str], *, masks: bool) -> dict[str, str]:
    """Make a scan's row; label map and mask are called like the image, in folders of their own, unless told."""
    scan, name = _scan(entry["image"]), PurePosixPath(entry["image"]).name
    mask = entry.get("mask", f"masksTr/{name}" if masks else "")
    return {
        "scan": scan,
        "subject": scan,
        "session": "",
        "age": "",
        "image": str(folder / entry["image"]),
        "labels": str(folder / entry.get("label", f"labelsTr/{name}")),
        "mask": str(folder / mask) if mask else "",
        "source_id": scan,
    }


def _relative(path: str, folder: Path) -> str:
    """Return a path of the description without the ``./`` that it begins with; refuse one that leads out of the folder.

    The description comes with the scans from elsewhere.
    """
    inside = PurePosixPath(path.replace("\\", "/").lstrip("/"))
    if ".." in inside.parts or "\0" in path:
        raise InputError(folder / DESCRIPTION, found=f"the path {path!r:.200}", expected="a path inside the folder")
    return str(inside)


def _scan(image: str) -> str:
    return PurePosixPath(image).name.removesuffix(".nii.gz").removesuffix("_0000")
