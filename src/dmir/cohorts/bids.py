"""BIDS: anybody's scans in the Brain Imaging Data Structure, with label maps and masks from its derivatives.

The layout is that of bids.neuroimaging.io (BIDS 1.x): T1 images in ``sub-01/[ses-02/]anat/*_T1w.nii.gz``, ages in
``participants.tsv``, and what a pipeline has made of the scans in ``derivatives/<pipeline>/``, in folders like those of
the scans. A label map (``_dseg``) has the ids of whoever made it. BIDS knows no splits.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

import pandas as pd

from dmir.cohorts.layout import person_and_session, read_text_table, require_files, require_layout
from dmir.errors import InputError, suggestion

WHERE = (
    "A BIDS tree (https://bids.neuroimaging.io), your own or a data set of OpenNeuro under that data set's terms: a "
    "folder with sub-01/anat/sub-01_T1w.nii.gz, ... and derivatives/<pipeline>/sub-01/anat/ with *_dseg.nii.gz and "
    "*_desc-brain_mask.nii.gz; or the folder of such a pipeline itself (fMRIPrep, sMRIPrep)."
)
FILE = re.compile(r"(sub-[A-Za-z0-9]+(?:_[a-z]+-[A-Za-z0-9.+]+)*)_(T1w|mask|dseg)\.nii(?:\.gz)?")
# entities of a name that say what was made of a scan, not which scan it is
MADE = ("space", "res", "desc")
OWN_SPACES = ("T1w", "orig", "")
LABELS = ("aparcaseg", "aseg", "")  # descriptions of label maps, best first; others come last


@dataclass(frozen=True)
class _File:
    """A file of a BIDS tree: where it is, whose folder that is (the tree's or a pipeline's), what its name says."""

    path: Path
    pipeline: Path
    suffix: str
    description: str
    scan: str


def recognises(folder: Path) -> bool:
    """Tell whether the folder has BIDS's description of itself or of the participants, or folders of scans."""
    if any((folder / name).is_file() for name in ("dataset_description.json", "participants.tsv")):
        return True
    return next(_anatomy(folder), None) is not None


def scan_table(folder: str | Path, *, derivatives: Sequence[str] | None = None) -> pd.DataFrame:
    """List the T1 scans of a BIDS tree, by name.

    Every run, acquisition and session is a scan of its own. Of the label maps that any pipeline made of a scan the best
    is taken: ``desc-aparcaseg``, then ``desc-aseg``, then one without description, then any other. Its pipeline's
    ``desc-preproc_T1w`` is the image where there is one, because label maps and masks of that pipeline lie on its grid;
    else the scan itself. The mask is ``desc-brain_mask`` on the same grid. Files in another space than the scan's or in
    another resolution are passed over. An image that a pipeline made of several scans (fMRIPrep averages runs and
    sessions) stands for them.

    Parameters
    ----------
    folder
        The tree, or the folder of a pipeline.
    derivatives
        Names of the pipelines in ``derivatives/`` that are looked into; None: all.

    Returns
    -------
    pandas.DataFrame
        One row a scan, all text: ``scan`` (sub-01_ses-02_run-1), ``subject`` (sub-01), ``session`` (ses-02), ``age,
        image, labels, mask, source_id``.

    Raises
    ------
    InputError
        The folder has another layout or no scan, several files fit equally well, files are missing (links to files
        that were not fetched), or ``participants.tsv`` or ``derivatives`` is unusable.
    """
    folder = require_layout(folder, "bids")
    files = [file for pipeline in (folder, *_pipelines(folder, derivatives)) for file in _files(pipeline)]
    grids = _grids(folder, files)
    if not grids:
        raise InputError(
            folder, found="no T1 image", expected="sub-<name>/[ses-<name>/]anat/*_T1w.nii.gz", remedy=WHERE
        )
    ages = _ages(folder / "participants.tsv")
    rows = [_row(scan, _choice(scan, grids[scan]), ages) for scan in sorted(grids)]
    require_files(
        folder,
        [row[key] for row in rows for key in ("image", "labels", "mask") if row[key]],
        remedy="Fetch them (links of DataLad or git-annex: datalad get), or download them again.",
    )
    return pd.DataFrame(rows)


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
            description = entities.get("desc", "")
            known = suffix == "dseg" or (suffix, description) in (("T1w", ""), ("T1w", "preproc"), ("mask", "brain"))
            if known and "res" not in entities and entities.get("space", "") in OWN_SPACES:
                scan = "_".join(f"{key}-{value}" for key, value in entities.items() if key not in MADE)
                yield _File(path, pipeline, suffix, description, scan)


def _grids(folder: Path, files: list[_File]) -> dict[str, list[list[_File]]]:
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


def _choice(scan: str, grids: list[list[_File]]) -> dict[str, str]:
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
        remedy="Name the pipelines that are to be used in derivatives, or move one of the files away.",
    )


def _row(scan: str, files: dict[str, str], ages: dict[str, str]) -> dict[str, str]:
    subject, session = person_and_session(scan)
    return {
        "scan": scan,
        "subject": subject,
        "session": session,
        "age": ages.get(subject, ""),
        "image": files["image"],
        "labels": files["labels"],
        "mask": files["mask"],
        "source_id": scan,
    }


def _ages(path: Path) -> dict[str, str]:
    """Return the participants' ages where they are numbers."""
    if not path.is_file():
        return {}
    expected = "a table (.tsv) with the column participant_id"
    table = read_text_table(path, expected, "\t")
    if "participant_id" not in table.columns:
        raise InputError(path, found=f"the columns {', '.join(table.columns)}", expected=expected)
    if "age" not in table.columns:
        return {}
    told = table[pd.to_numeric(table["age"], errors="coerce").notna()]
    return dict(zip(told["participant_id"], told["age"], strict=True))
