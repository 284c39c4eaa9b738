"""BIDS: anybody's scans in the Brain Imaging Data Structure, with label maps and masks from its derivatives.

The layout is that of bids.neuroimaging.io (BIDS 1.x): T1 images in ``sub-01/[ses-02/]anat/*_T1w.nii.gz``, ages in
``participants.tsv``, and what a pipeline has made of the scans in ``derivatives/<pipeline>/``, in folders like those of
the scans. A label map (``_dseg``) has the ids of whoever made it. BIDS knows no splits.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import pandas as pd

from dmir.cohorts.ages import bids_ages, plain_name
from dmir.cohorts.layout import person_and_session, require_files
from dmir.cohorts.sources import require_layout
from dmir.doubts import doubt
from dmir.errors import InputError, suggestion

WHERE = (
    "A BIDS tree (https://bids.neuroimaging.io), your own or a data set of OpenNeuro under that data set's terms: a "
    "folder with sub-01/anat/sub-01_T1w.nii.gz, ... and derivatives/<pipeline>/sub-01/anat/ with *_dseg.nii.gz and "
    "*_desc-brain_mask.nii.gz; or the folder of such a pipeline itself (fMRIPrep, sMRIPrep)."
)
FILE = re.compile(r"(sub-[A-Za-z0-9]+(?:_[a-z]+-[A-Za-z0-9.+]+)*)_(T1w|mask|dseg)\.nii(?:\.gz)?")
# entities of a name that say what was made of a scan, not which scan it is
MADE = ("space", "res", "den", "desc", "seg", "atlas")
# of what else differs between the images of a session, in the order in which it decides: an image without the entity
# comes first (an average has no echo), then by number or name
CHOOSING = ("echo", "inv", "flip", "mt", "ce", "acq", "rec", "task", "run", "part")
EVERY = ("session", "image")
OWN_SPACES = ("T1w", "orig", "")
NAMED = 5  # files named in a message, of many
LABELS = ("aparcaseg", "aseg", "")  # descriptions of label maps, best first; others come last


@dataclass(frozen=True)
class _File:
    """A file of a BIDS tree: where it is, whose folder that is (the tree's or a pipeline's), what its name says."""

    path: Path
    pipeline: Path
    suffix: str
    description: str
    scan: str

    @property
    def entities(self) -> dict[str, str]:
        """Return what the name says of which scan it is: {"sub": "01", "run": "2"}."""
        return dict(entity.split("-", 1) for entity in self.scan.split("_"))

    @property
    def is_anatomy(self) -> bool:
        """Tell whether it shows a head: no phase or other part of a complex image, and no piece of one."""
        return self.entities.get("part", "mag") == "mag" and "chunk" not in self.entities


_Grids = list[list[_File]]  # of a scan: an image and what lies on its grid, each


def recognises(folder: Path) -> bool:
    """Tell whether the folder has BIDS's description of itself or of the participants, or folders of scans."""
    if any((folder / name).is_file() for name in ("dataset_description.json", "participants.tsv")):
        return True
    return next(_anatomy(folder), None) is not None


def scan_table(
    folder: str | Path,
    *,
    derivatives: Sequence[str] | None = None,
    entities: Mapping[str, str] | None = None,
    every: str = "session",
) -> pd.DataFrame:
    """List the T1 scans of a BIDS tree, by name.

    Of the images of a session one is the scan: one with a label map before one without; then the plainest name, which
    has neither echo, inversion, contrast agent, acquisition, reconstruction, task nor run, and of several the lowest or
    first. Images of the phase and pieces of an image (``part``, ``chunk``) are none. What is left out is told.

    Of the label maps that any pipeline made of a scan the best is taken: ``desc-aparcaseg``, then ``desc-aseg``, then
    one without description, then any other. Its pipeline's ``desc-preproc_T1w`` is the image where there is one,
    because label maps and masks of that pipeline lie on its grid; else the scan itself. The mask is ``desc-brain_mask``
    on the same grid. Files in another space than the scan's or in another resolution are passed over. An image that a
    pipeline made of several scans (fMRIPrep averages runs and sessions) stands for them.

    Parameters
    ----------
    folder
        The tree, or the folder of a pipeline.
    derivatives
        Names of the pipelines in ``derivatives/`` that are looked into; None: all.
    entities
        What the names of the scans must say, such as ``{"acq": "mprage", "run": "1"}``; "": they must lack the entity.
    every
        ``"session"`` for one scan a session, ``"image"``: runs, acquisitions and so on are scans of their own.

    Returns
    -------
    pandas.DataFrame
        One row a scan, all text: ``scan`` (sub-01_ses-02_run-1), ``subject`` (sub-01), ``session`` (ses-02), ``age,
        image, labels, mask, source_id``.

    Raises
    ------
    InputError
        The folder has another layout or no scan, several files fit equally well, files are missing (links to files
        that were not fetched), or ``participants.tsv``, ``derivatives`` or ``entities`` is unusable.
    """
    folder = require_layout(folder, "bids")
    if every not in EVERY:
        raise InputError("every", found=f"'{every}'", expected=" or ".join(EVERY), remedy=suggestion(every, EVERY))
    files = [file for pipeline in (folder, *_pipelines(folder, derivatives)) for file in _files(pipeline)]
    wanted = [file for file in files if _is_wanted(file, entities or {}, folder)]
    left_out = [file.path.name for file in wanted if not file.is_anatomy and file.pipeline == folder]
    grids = _grids(folder, [file for file in wanted if file.is_anatomy])
    if not grids:
        images = [file.path.name for file in files if file.suffix == "T1w"]
        raise InputError(
            folder,
            found=f"no T1 image of these entities: {', '.join(images[:NAMED])}" if images else "no T1 image",
            expected=f"sub-<name>/[ses-<name>/]anat/*_T1w.nii.gz {dict(entities) if entities else ''}".strip(),
            remedy="Choose other entities." if images else WHERE,
        )
    if every == "session":
        grids, others = _one_a_session(grids)
        left_out += others
    if left_out:
        named = ", ".join(left_out[:NAMED]) + (", ..." if len(left_out) > NAMED else "")
        found = f"{len(left_out)} images beside the one that is taken of a session: {named}"
        doubt(folder, found=found, done="left out (the cohort's keys entities and every choose others)")
    people = [person_and_session(scan) for scan in grids]
    ages = bids_ages(folder, people)
    rows = [
        _row(scan, _choice(scan, grids[scan]), ages.get(person, ""))
        for scan, person in sorted(zip(grids, people, strict=True))
    ]
    require_files(
        folder,
        [row[key] for row in rows for key in ("image", "labels", "mask") if row[key]],
        remedy="Fetch them (links of DataLad or git-annex: datalad get), or download them again.",
    )
    return pd.DataFrame(rows)


def _is_wanted(file: _File, entities: Mapping[str, str], folder: Path) -> bool:
    """Tell whether a name says what it must; what a pipeline made may say less than the scan's own name."""
    raw = file.suffix == "T1w" and not file.description and file.pipeline == folder
    own = file.entities
    return all(
        plain_name(own.get(key, ""), key) == plain_name(value, key)
        for key, value in entities.items()
        if raw or key in own
    )


def _one_a_session(grids: Mapping[str, _Grids]) -> tuple[dict[str, _Grids], list[str]]:
    """Return the scan of each session with its grids, and the names of the images that are left out."""
    sessions: dict[tuple[str, str], list[str]] = {}
    for scan in grids:
        sessions.setdefault(person_and_session(scan), []).append(scan)
    chosen = [min(scans, key=lambda scan: _place(scan, grids[scan])) for scans in sessions.values()]
    left_out = [grids[scan][0][0].path.name for scan in grids if scan not in chosen]
    return {scan: grids[scan] for scan in chosen}, left_out


def _place(scan: str, grids: _Grids) -> tuple[bool, list[tuple[bool, int, str]], str]:
    """Return what orders the scans of a session, the one that is taken first."""
    entities = dict(entity.split("-", 1) for entity in scan.split("_"))
    values = [entities.get(key, "") for key in CHOOSING]
    order = [(value != "", int(value) if value.isdecimal() else 0, value) for value in values]
    return not any(file.suffix == "dseg" for grid in grids for file in grid), order, scan


def _pipelines(folder: Path, names: Sequence[str] | None) -> list[Path]:
    inside = folder / "derivatives"
    there = sorted(path for path in inside.iterdir() if path.is_dir()) if inside.is_dir() else []
    known = [path.name for path in there]
    unknown = [name for name in names or () if name not in known]
    if unknown:
        raise InputError(
            "derivatives",
            found=f"'{unknown[0]}'",
            expected=f"folders of {inside}",
            remedy=suggestion(unknown[0], known) if known else "",
        )
    return [path for path in there if names is None or path.name in names]


def _anatomy(folder: Path) -> Iterator[Path]:
    """Yield the folders of anatomical images: sub-01/anat, sub-01/ses-02/anat."""
    for subject in sorted(folder.glob("sub-*")):
        for inside in (subject, *sorted(subject.glob("ses-*"))):
            if (inside / "anat").is_dir():
                yield inside / "anat"


def _files(pipeline: Path) -> Iterator[_File]:
    """Yield the images, label maps and brain masks that lie on a grid of the scan's own."""
    for anatomy in _anatomy(pipeline):
        seen: dict[str, Path] = {}
        for path in sorted(anatomy.iterdir()):
            match = FILE.fullmatch(path.name)
            if not match:
                continue
            stem, suffix = f"{match[1]}_{match[2]}", match[2]
            if stem in seen:
                raise _several([seen[stem], path], f"{stem} twice")
            seen[stem] = path
            entities = dict(entity.split("-", 1) for entity in match[1].split("_"))
            description = entities.get("desc") or entities.get("seg") or entities.get("atlas") or ""
            known = suffix == "dseg" or (suffix, description) in (("T1w", ""), ("T1w", "preproc"), ("mask", "brain"))
            if known and not {"res", "den"} & entities.keys() and entities.get("space", "") in OWN_SPACES:
                scan = "_".join(f"{key}-{value}" for key, value in entities.items() if key not in MADE)
                yield _File(path, pipeline, suffix, description, scan)


def _grids(folder: Path, files: list[_File]) -> dict[str, _Grids]:
    """Return the grids of each scan; a grid is its image, then the label maps and masks that lie on it."""
    raw = {file.scan: file for file in files if (file.suffix, file.description, file.pipeline) == ("T1w", "", folder)}
    made = {(file.pipeline, file.scan): file for file in files if (file.suffix, file.description) == ("T1w", "preproc")}
    grids: dict[str, dict[Path, list[_File]]] = {scan: {file.path: [file]} for scan, file in raw.items()}
    averaged: set[str] = set()
    for file in made.values():
        scans = _scans_of(file, raw)
        averaged.update(scans if len(scans) > 1 else ())
        grids.setdefault(scans[0] if len(scans) == 1 else file.scan, {})[file.path] = [file]
    for file in (file for file in files if file.suffix != "T1w"):
        scans = _scans_of(file, raw)
        image = made.get((file.pipeline, file.scan))
        if image is None and len(scans) > 1:
            raise _several([raw[scan].path for scan in scans], f"{file.path} may be of any of these scans")
        if image is None and scans:
            image = raw[scans[0]]
        if image is not None:
            grids[scans[0] if len(scans) == 1 else file.scan][image.path].append(file)
    alone = {scan for scan, its in grids.items() if all(len(grid) == 1 for grid in its.values())}
    return {scan: list(its.values()) for scan, its in grids.items() if scan not in averaged & alone}


def _scans_of(file: _File, raw: Iterable[str]) -> list[str]:
    """Return the scans that a file was made of: that of its own name, or those whose names say more."""
    if file.scan in raw:
        return [file.scan]
    entities = file.scan.split("_")
    return [scan for scan in raw if scan.startswith(f"{entities[0]}_") and set(entities) < set(scan.split("_"))]


def _choice(scan: str, grids: _Grids) -> dict[str, str]:
    """Return a scan's image, and the label map and the mask on its grid where there are any."""
    maps = [file for grid in grids for file in grid if file.suffix == "dseg"]
    best = min(map(_rank, maps), default=0)
    labels = [file for file in maps if _rank(file) == best]
    fitting = (
        [grid for grid in grids if any(file in labels for file in grid)]
        or [grid for grid in grids if any(file.suffix == "mask" for file in grid)]
        or [grid for grid in grids if not grid[0].description]
        or grids
    )
    masks = [file for file in fitting[0] if file.suffix == "mask"]
    chosen = {"labels": labels, "image": [grid[0] for grid in fitting], "mask": masks}
    for what, files in chosen.items():
        if len(files) > 1:
            raise _several([file.path for file in files], f"several files that fit {scan} as {what} equally well")
    return {what: str(files[0].path) if files else "" for what, files in chosen.items()}


def _rank(labels: _File) -> int:
    return LABELS.index(labels.description) if labels.description in LABELS else len(LABELS)


def _several(paths: Sequence[Path], what: str) -> InputError:
    return InputError(
        paths[0].parent,
        found=f"{what}: {' and '.join(map(str, paths))}",
        expected="one",
        remedy="Name the pipelines in derivatives, or the scans in entities, or move one of the files away.",
    )


def _row(scan: str, files: dict[str, str], age: str) -> dict[str, str]:
    subject, session = person_and_session(scan)
    named = {key: files[key] for key in ("image", "labels", "mask")}
    return {"scan": scan, "subject": subject, "session": session, "age": age, **named, "source_id": scan}
