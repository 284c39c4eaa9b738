"""FreeSurfer or FastSurfer: a ``SUBJECTS_DIR``, one folder a scan, of any study.

What ``recon-all`` or FastSurfer has made of a scan stands in ``<folder>/<scan>/mri``: the conformed image (``orig``,
usually 256x256x256 voxels of 1 mm, axes L, I, A), corrected and stripped versions of it, a brain mask and automatic
label maps with FreeSurfer's ids, all on one grid. No ages and no splits.
"""

from __future__ import annotations

import os
import re
from collections.abc import Iterator, Sequence
from pathlib import Path

import pandas as pd

from dmir.cohorts.layout import person_and_session, read_bounded
from dmir.cohorts.sources import require_layout
from dmir.errors import InputError, suggestion

WHERE = (
    "What FreeSurfer (recon-all -all) or FastSurfer has made of your scans: the folder SUBJECTS_DIR, so that "
    "<folder>/<scan>/mri/orig.mgz and <folder>/<scan>/mri/aparc+aseg.mgz exist."
)
# best first; the first is a link to the second where FastSurfer has made surfaces, and links get lost in copies
LABELS = (
    "aparc+aseg",
    "aparc.DKTatlas+aseg.mapped",
    "aparc.DKTatlas+aseg.deep.withCC",
    "aparc.DKTatlas+aseg.deep",
)
MASKS = ("brainmask", "mask")
STRIPPED = ("norm", "brain", "brainmask", "brain.finalsurfs")
ENDINGS = (".mgz", ".nii.gz")
# what FreeSurfer itself puts into a SUBJECTS_DIR
AVERAGES = re.compile(r"fsaverage.*|[lr]h\.EC_average|V1_average|cvs_avg35.*")
TEMPLATES = ("base-tps", "base-tps.fastsurfer")
DISC = re.compile(r"disc\d+")


def recognises(folder: Path) -> bool:
    """Tell whether the folder has a scan's folder with ``mri/``."""
    return any(True for _ in _scan_folders(folder))


def scan_table(folder: str | Path, *, image: str = "orig", labels: str | None = None) -> pd.DataFrame:
    """List the scans of a ``SUBJECTS_DIR``, by name.

    FreeSurfer's own averages and the templates of people with several time points are left out. A longitudinal scan
    (``X.long.TEMPLATE``) is of the same subject as X, and X is listed as well where it is there: that is the same
    acquisition processed twice.

    Parameters
    ----------
    folder
        The ``SUBJECTS_DIR``. The scans may also lie one level deeper, in ``disc1``, ``disc2``, ..., as in the published
        results for OASIS-1.
    image
        Which volume of ``mri/`` is the image, without its ending: ``"orig"``, ``"T1"``, ``"norm"``, ``"brain"``, ...
        Stripped ones (:data:`STRIPPED`) get no mask.
    labels
        Which volume of ``mri/`` is the label map. None: the best of :data:`LABELS` that any scan has; all scans must
        have that one, so that all label maps are made in the same way.

    Returns
    -------
    pandas.DataFrame
        One row a scan, all text: ``scan`` (the folder's name), ``subject, session, age, image, labels, mask,
        source_id``.

    Raises
    ------
    InputError
        The folder has another layout, no scan has the volume asked for, or scans are unfinished.
    """
    folder = require_layout(folder, "freesurfer")
    files = finished_scans(folder, image=image, labels=labels)
    people = _people(folder, list(files))
    rows = []
    for name, volumes in files.items():
        subject, session = people[name]
        rows.append({"scan": name, "subject": subject, "session": session, "age": "", **volumes, "source_id": name})
    return pd.DataFrame(rows)


def finished_scans(
    folder: Path, names: Sequence[str] | None = None, *, image: str = "orig", labels: str | None = None
) -> dict[str, dict[str, str]]:
    """Return the files ``image, labels, mask`` of scans by the scan's name.

    Parameters
    ----------
    folder
        A ``SUBJECTS_DIR``.
    names
        The scans wanted; None: all that are there.
    image, labels
        As of :func:`scan_table`.

    Raises
    ------
    InputError
        No scan has the volume asked for, or scans are missing or unfinished: the first ten are named, all are counted.
    """
    folders = _folders_by_name(folder)
    wanted = sorted(folders) if names is None else list(names)
    volumes = {name: _volumes(folders[name]) for name in wanted if name in folders}
    image = _known("image", image, volumes, folder)
    labels = _known("labels", labels, volumes, folder) if labels else _best_labels(volumes)
    masks = () if image in STRIPPED else MASKS
    lacking = {name: _lacking(volumes.get(name), image, labels, masks) for name in wanted}
    unfinished = {name: what for name, what in lacking.items() if what}
    if unfinished:
        named = ", ".join(f"{name} ({what})" for name, what in list(unfinished.items())[:10])
        raise InputError(
            folder,
            found=f"{len(unfinished)} of {len(wanted)} scans unfinished: {named}{', ...' * (len(unfinished) > 10)}",
            expected="image, labels and mask of every scan in mri/, .mgz or .nii.gz",
            remedy=_remedy(volumes, labels, every=names is None),
        )
    return {
        name: {
            "image": has[image],
            "labels": has[labels],
            "mask": next((has[mask] for mask in masks if mask in has), ""),
        }
        for name, has in volumes.items()
    }


def _lacking(has: dict[str, str] | None, image: str, labels: str, masks: tuple[str, ...]) -> str:
    """Say what a scan does not have; "" when it is finished."""
    if has is None:
        return "no folder"
    lacking = [volume for volume in (image, labels) if volume not in has]
    if masks and not any(mask in has for mask in masks):
        lacking.append(" or ".join(masks))
    return f"no {', no '.join(lacking)}" if lacking else ""


def _remedy(volumes: dict[str, dict[str, str]], labels: str, *, every: bool) -> str:
    if not every:
        return (
            "Finish recon-all or FastSurfer for them, or make a cohort of the source freesurfer, which takes the scans "
            "that are there."
        )
    shared = [name for name in LABELS if name != labels and all(name in has for has in volumes.values())]
    choice = f", or name labels that all have ({shared[0]})" if shared else ""
    return f"Finish recon-all or FastSurfer for them, or move their folders away{choice}."


def _known(key: str, name: str, volumes: dict[str, dict[str, str]], folder: Path) -> str:
    """Return the name of a volume without its ending; refuse one that no scan has."""
    for ending in ENDINGS:
        name = name.removesuffix(ending)
    known = {volume for has in volumes.values() for volume in has}
    if known and name not in known:
        raise InputError(
            f"{key}: {folder}", found=f"'{name}'", expected="a volume in mri/", remedy=suggestion(name, known)
        )
    return name


def _best_labels(volumes: dict[str, dict[str, str]]) -> str:
    return next((name for name in LABELS if any(name in has for has in volumes.values())), LABELS[0])


def _volumes(folder: Path) -> dict[str, str]:
    """Return the volumes of a scan's ``mri/`` by their names without ending; .mgz goes before .nii.gz."""
    with os.scandir(folder / "mri") as entries:
        paths = {entry.name: entry.path for entry in entries if entry.name.endswith(ENDINGS) and entry.is_file()}
    return {
        name.removesuffix(ending): path
        for ending in reversed(ENDINGS)
        for name, path in paths.items()
        if name.endswith(ending)
    }


def _scan_folders(folder: Path, depth: int = 1) -> Iterator[Path]:
    """Yield the folders with ``mri/`` that are scans of people; those of discs, too, but not of discs in discs."""
    for path in sorted(folder.iterdir()):
        if path.name.startswith(".") or AVERAGES.fullmatch(path.name) or not path.is_dir():
            continue
        if DISC.fullmatch(path.name):
            if depth:
                yield from _scan_folders(path, depth - 1)
            continue
        inside = {entry.name for entry in path.iterdir()}
        if "mri" in inside and not inside.intersection(TEMPLATES):
            yield path


def _folders_by_name(folder: Path) -> dict[str, Path]:
    folders: dict[str, Path] = {}
    for path in _scan_folders(folder):
        if path.name in folders:
            raise InputError(folder, found=f"{folders[path.name]} and {path}", expected="every scan once")
        folders[path.name] = path
    return {name: path for name, path in folders.items() if not _links_to_time_point(path, folders)}


def _links_to_time_point(path: Path, folders: dict[str, Path]) -> bool:
    """Tell whether X.long.TEMPLATE is only another name of X: FastSurfer's users make such links."""
    point = folders.get(_time_point(path.name), path)
    return point != path and path.samefile(point)


def _time_point(name: str) -> str:
    return name.split(".long.", 1)[0]


def _people(folder: Path, names: Sequence[str]) -> dict[str, tuple[str, str]]:
    """Return subject and session of each scan; the time points of one template are one person."""
    template_of = _templates(folder)
    template_of.update((_time_point(name), name.split(".long.", 1)[1]) for name in names if ".long." in name)
    people = {}
    for name in names:
        point = _time_point(name)
        subject, session = person_and_session(point)
        if subject == point:
            subject = person_and_session(template_of.get(point, point))[0]
        people[name] = subject, session
    return people


def _templates(folder: Path) -> dict[str, str]:
    """Return the template of each time point, as the templates' own lists have it."""
    return {
        point: path.parent.name
        for name in TEMPLATES
        for path in folder.glob(f"*/{name}")
        if path.is_file()
        for point in read_bounded(path, "a list of time points").decode(errors="replace").split()
    }
