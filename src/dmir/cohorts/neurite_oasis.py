"""neurite-OASIS v1.0: 414 scans of OASIS-1, one a person, as FreeSurfer and SAMSEG have processed them.

Prepared by Hoopes and Dalca for HyperMorph (Hoopes et al., arXiv:2101.01035, 2021), from OASIS-1 (Marcus et al.,
Journal of Cognitive Neuroscience 19:1498, 2007), under OASIS's data use agreement. A folder a scan: T1 images between 0
and 1, stripped and bias-corrected (``norm``) or not (``orig``), with automatic label maps of 35 structures or 4
tissues; in the scanner's space, conformed to 256x256x256 voxels (``norm``, ``seg35``), and aligned affinely to
FreeSurfer's Talairach space and cropped to 160x192x224 (``aligned_norm``, ``aligned_seg35``; axes L, I, A). No ages and
no splits. The label maps lack CSF (FreeSurfer's 24), so they have 27 of the 28 structures of ``oasis28``.
"""

from __future__ import annotations

import re
from pathlib import Path

import pandas as pd

from dmir.cohorts.layout import person_and_session, require_files
from dmir.cohorts.sources import require_layout
from dmir.errors import InputError, suggestion

WHERE = (
    "neurite-OASIS v1.0: neurite-oasis.v1.0.tar (6.6 GB, md5 081392a8150ff99ab7a64a9ded377835) from "
    "https://github.com/adalca/medical-datasets/blob/master/neurite-oasis.md, under OASIS's data use agreement "
    "(https://sites.wustl.edu/oasisbrains); unpack it in a new folder, so that <folder>/subjects.txt and "
    "<folder>/OASIS_OAS1_0001_MR1/ exist."
)
SPACES = {"aligned": "aligned_", "native": ""}
LABELS = ("seg35", "seg4")
LIST = "subjects.txt"
SCAN = re.compile(r"OASIS_(OAS1_\d{4}_MR\d)")


def recognises(folder: Path) -> bool:
    """Tell whether the folder has neurite-OASIS's folders or its list of them, complete or not."""
    if any(SCAN.fullmatch(path.name) for path in folder.iterdir()):
        return True
    path = folder / LIST
    return path.is_file() and bool(SCAN.match(path.read_text(encoding="utf-8", errors="replace").lstrip()))


def scan_table(folder: str | Path, *, space: str = "aligned", labels: str = "seg35") -> pd.DataFrame:
    """List the scans of neurite-OASIS, in the order of their folders' names.

    Parameters
    ----------
    folder
        Where ``subjects.txt`` is. Its lines say which scans there are; other folders are ignored.
    space
        ``"aligned"``: affinely aligned to one template, 160x192x224; ``"native"``: the scanner's space, 256x256x256.
    labels
        ``"seg35"`` or ``"seg4"``.

    Returns
    -------
    pandas.DataFrame
        One row a scan, all text: ``scan`` (OAS1_0001_MR1), ``subject, session, age, image, labels, mask, source_id``
        (the folder's name). The images are stripped: there is no mask.

    Raises
    ------
    InputError
        The folder has another layout, files are missing, or an option or the list is unusable.
    """
    for key, value, known in (("space", space, tuple(SPACES)), ("labels", labels, LABELS)):
        if value not in known:
            raise InputError(key, found=f"'{value}'", expected=" or ".join(known), remedy=suggestion(value, known))
    folder = require_layout(folder, "neurite_oasis")
    require_files(folder, [folder / LIST])
    rows = []
    for name in sorted(_listed(folder / LIST)):
        subject, session = person_and_session(name)
        rows.append(
            {
                "scan": name.removeprefix("OASIS_"),
                "subject": subject,
                "session": session,
                "age": "",
                "image": str(folder / name / f"{SPACES[space]}norm.nii.gz"),
                "labels": str(folder / name / f"{SPACES[space]}{labels}.nii.gz"),
                "mask": "",
                "source_id": name,
            }
        )
    require_files(
        folder,
        [row[key] for row in rows for key in ("image", "labels")],
        remedy="Unpack neurite-oasis.v1.0.tar again (the archive neurite-oasis.2d.v1.0.tar has slices only).",
    )
    return pd.DataFrame(rows)


def _listed(path: Path) -> list[str]:
    names = path.read_text(encoding="utf-8", errors="replace").split()
    strange = [name for name in names if not SCAN.fullmatch(name)]
    if strange or not names:
        raise InputError(
            path,
            found=f"'{strange[0]}'" if strange else "no scan",
            expected="one folder a line, such as OASIS_OAS1_0001_MR1",
            remedy="Unpack it again from the archive.",
        )
    twice = sorted({name for name in names if names.count(name) > 1})
    if twice:
        raise InputError(path, found=f"{twice[0]} more than once", expected="every scan once")
    return names
