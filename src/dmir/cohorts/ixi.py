"""IXI: T1 scans of nearly 600 healthy people from three London hospitals, as published or as TransMorph's authors made.

The scans are published by the Biomedical Image Analysis Group, Imperial College London (brain-development.org) under
CC BY-SA 3.0: whole heads, ``IXI002-Guys-0828-T1.nii.gz``, without labels or splits. Chen et al. (TransMorph, Medical
Image Analysis 82:102615, 2022) made 576 of them ready, under the same licence: stripped, aligned affinely to Talairach
space and labelled with FreeSurfer, 160x192x224 voxels of 1 mm between 0 and 1, label maps with FreeSurfer's own ids (45
of them); 403 to train, 58 to choose, 115 to test, and an atlas. Those come as pickles of two arrays without a header;
the same folders with NIfTI files are read as well. No ages are read.
"""

from __future__ import annotations

import re
from pathlib import Path

import numpy as np
import pandas as pd

from dmir.cohorts.layout import require_files
from dmir.cohorts.pickles import read_arrays
from dmir.cohorts.sources import require_layout
from dmir.errors import InputError, suggestion
from dmir.volumes import Volume, with_orientation, write_volume

WHERE = (
    "IXI: either IXI_data.zip (1.4 GB), linked from IXI/TransMorph_on_IXI.md of the TransMorph repository, unpacked so "
    "that <folder>/atlas.pkl and <folder>/Train/subject_0.pkl exist; or IXI-T1.tar from https://brain-development.org/"
    "ixi-dataset, unpacked so that <folder>/IXI002-Guys-0828-T1.nii.gz exists. Both under CC BY-SA 3.0."
)
SPLITS = {"Train": "train", "Val": "val", "Test": "test"}
FORMS = ("auto", "pickles", "nifti")
PICKLES = re.compile(r"(atlas|subject_\d+)\.pkl")
NIFTI = re.compile(r"(atlas|subject_\d+)(_seg|_labels)?\.nii(?:\.gz)?")
PUBLISHED = re.compile(r"((IXI\d{3})-[A-Za-z]+-\d{4})-T1\.nii(?:\.gz)?")
# FreeSurfer stores conformed volumes so, and neither its alignment to Talairach space nor a crop changes the axes.
# This follows from how the arrays were made; the arrays themselves do not tell.
PICKLED_ORIENTATION = "LIA"


def recognises(folder: Path) -> bool:
    """Tell whether the folder has the atlas or the subjects of TransMorph's IXI, or published T1 scans."""
    return any(_files(folder, pattern) for pattern in (PICKLES, NIFTI, PUBLISHED))


def scan_table(folder: str | Path, *, made: str | Path | None = None, form: str = "auto") -> pd.DataFrame:
    """List the scans of IXI: TransMorph's with their split, the atlas first, then by number; or the published ones.

    Parameters
    ----------
    folder
        What has ``atlas.pkl`` and the folders ``Train``, ``Val`` and ``Test`` of pickles (``subject_0.pkl``, ...), or
        the same as NIfTI (``subject_0.nii.gz`` with ``subject_0_seg.nii.gz`` or ``subject_0_labels.nii.gz``), or the
        published ``IXI002-Guys-0828-T1.nii.gz``, ....
    made
        For pickles: the folder for the NIfTI files that :func:`write_scan` makes of them.
    form
        ``"pickles"``, ``"nifti"``, or ``"auto"``: what the folder holds.

    Returns
    -------
    pandas.DataFrame
        One row a scan, all text: ``scan`` (subject_0; IXI002-Guys-0828), ``subject, session, age, image, labels, mask,
        source_id``; of TransMorph's also ``split``, of pickles also ``made_from``. Published scans have no labels.

    Raises
    ------
    InputError
        The folder has another layout or several forms, files are missing or twice there, or an option is unusable.
    """
    if form not in FORMS:
        raise InputError("form", found=f"'{form}'", expected=" or ".join(FORMS), remedy=suggestion(form, FORMS))
    folder = require_layout(folder, "ixi")
    patterns = {"pickles": (PICKLES,), "nifti": (NIFTI, PUBLISHED), "auto": (PICKLES, NIFTI, PUBLISHED)}[form]
    there = [pattern for pattern in patterns if _files(folder, pattern)]
    if len(there) != 1:
        raise InputError(
            folder,
            found="several forms of IXI" if there else f"no scan in the form {form}",
            expected="scans in one form",
            remedy="Set form to the one that is there (pickles or nifti), or keep them in different folders.",
        )
    if there == [PICKLES]:
        return pd.DataFrame(_pickled(folder, made))
    return pd.DataFrame(_converted(folder) if there == [NIFTI] else _published(folder))


def write_scan(scan: str, folder: str | Path, *, original: str | Path, orientation: str | None = None) -> None:
    """Make NIfTI files of a pickle of TransMorph's IXI.

    Parameters
    ----------
    scan
        The scan's name, for error messages.
    folder
        The scan's own folder; receives ``image.nii.gz`` (float32), ``labels.nii.gz`` (int32) and ``mask.nii.gz``
        (image > 0), with voxels of 1 mm.
    original
        The pickle of image and label map, both (D, H, W).
    orientation
        Axis codes of the arrays; None: :data:`PICKLED_ORIENTATION`.

    Raises
    ------
    InputError
        As :func:`dmir.cohorts.pickles.read_arrays`, and where the pickle does not hold an image and a label map.
    """
    arrays = read_arrays(original)
    if len(arrays) != 2 or arrays[0].ndim != 3:
        raise InputError(
            f"{scan}: {original}",
            found=f"{len(arrays)} arrays of the shape {arrays[0].shape}",
            expected="two: an image and its label map, (D, H, W)",
            remedy="Pickles of pairs of scans, as TransMorph's OASIS has them, are another layout.",
        )
    image, labels = (with_orientation(Volume(a, np.eye(4)), orientation or PICKLED_ORIENTATION) for a in arrays)
    if not np.array_equal(labels.data, np.round(labels.data)):
        raise InputError(
            f"{scan}: {original}",
            found="a second array whose values are not whole numbers",
            expected="a label map, one integer id a voxel",
        )
    folder = Path(folder)
    write_volume(folder / "image.nii.gz", image, np.float32)
    write_volume(folder / "labels.nii.gz", labels, np.int32)
    write_volume(folder / "mask.nii.gz", Volume(image.data > 0, image.affine))


def _files(folder: Path, pattern: re.Pattern[str]) -> list[tuple[Path, re.Match[str]]]:
    """Return the files of one form with what their names say; subjects lie in folders of splits, other scans do not."""
    insides = [folder, *(folder / split for split in SPLITS if (folder / split).is_dir())]
    found = [(path, pattern.fullmatch(path.name)) for inside in insides for path in sorted(inside.iterdir())]
    return [
        (path, match) for path, match in found if match and (path.parent != folder) == match[1].startswith("subject_")
    ]


def _pickled(folder: Path, made: str | Path | None) -> list[dict[str, str]]:
    if made is None:
        raise InputError("made", found="none", expected="a folder for the NIfTI files that are made of the pickles")
    files = _by_scan(folder, [(path, match[1]) for path, match in _files(folder, PICKLES)])
    require_files(folder, [folder / "atlas.pkl"])
    _require_splits(folder, files)
    rows = []
    for scan in sorted(files, key=_place):
        image, labels, mask = (str(Path(made) / scan / f"{name}.nii.gz") for name in ("image", "labels", "mask"))
        row = _row(scan, scan, image, labels, mask)
        rows.append({**row, "split": _split(folder, files[scan]), "made_from": str(files[scan])})
    return rows


def _converted(folder: Path) -> list[dict[str, str]]:
    """List TransMorph's scans as NIfTI; where one has a label map, all must have."""
    files = _files(folder, NIFTI)
    images = _by_scan(folder, [(path, match[1]) for path, match in files if not match[2]])
    labels = _by_scan(folder, [(path, match[1]) for path, match in files if match[2]])
    kind = next((match[2] for _, match in files if match[2]), "")
    homes = {"atlas": folder, **{scan: path.parent for scan, path in (labels | images).items()}}
    for scan, home in homes.items():
        images.setdefault(scan, home / f"{scan}.nii.gz")
        if kind:
            labels.setdefault(scan, home / f"{scan}{kind}.nii.gz")
    require_files(folder, [*images.values(), *labels.values()])
    _require_splits(folder, images)
    rows = []
    for scan in sorted(images, key=_place):
        row = _row(scan, scan, str(images[scan]), str(labels.get(scan, "")), "")
        rows.append({**row, "split": _split(folder, images[scan])})
    return rows


def _published(folder: Path) -> list[dict[str, str]]:
    files = _files(folder, PUBLISHED)
    people = {match[1]: match[2] for _, match in files}
    images = _by_scan(folder, [(path, match[1]) for path, match in files])
    return [_row(scan, people[scan], str(image), "", "") for scan, image in sorted(images.items())]


def _row(scan: str, subject: str, image: str, labels: str, mask: str) -> dict[str, str]:
    return {
        "scan": scan,
        "subject": subject,
        "session": "",
        "age": "",
        "image": image,
        "labels": labels,
        "mask": mask,
        "source_id": scan,
    }


def _by_scan(folder: Path, files: list[tuple[Path, str]]) -> dict[str, Path]:
    """Return the file of each scan; refuse a scan that has two."""
    scans: dict[str, Path] = {}
    for path, scan in files:
        if scan in scans:
            names = " and ".join(str(file.relative_to(folder)) for file in (scans[scan], path))
            raise InputError(folder, found=f"{scan} twice: {names}", expected="every scan once", remedy="Remove one.")
        scans[scan] = path
    return scans


def _split(folder: Path, path: Path) -> str:
    return "atlas" if path.parent == folder else SPLITS[path.parent.name]


def _require_splits(folder: Path, files: dict[str, Path]) -> None:
    empty = [name for name in SPLITS if folder / name not in {path.parent for path in files.values()}]
    if empty:
        raise InputError(
            folder,
            found=f"no subject in {', '.join(empty)}",
            expected=f"subjects in {', '.join(SPLITS)}",
            remedy="Download or unpack it again.",
        )


def _place(scan: str) -> int:
    """Return where a scan stands: the atlas first, then the subjects by number."""
    return -1 if scan == "atlas" else int(scan.removeprefix("subject_"))
