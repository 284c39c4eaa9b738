"""OASIS-1, the cross-sectional set, as it is published: 436 sessions of 416 people, 18 to 96 years, on twelve discs.

Marcus et al., Journal of Cognitive Neuroscience 19:1498 (2007), under OASIS's data use agreement. A folder a session
(MR2 is a rescan within 90 days, of 20 people): in ``PROCESSED/MPRAGE`` the average of the session's T1 images, in its
own space (``SUBJ_111``) and gain-corrected and aligned to an atlas (``T88_111``, 176x208x176 voxels of 1 mm), there
also stripped (``masked``); in ``FSL_SEG`` three tissue classes. Analyze 7.5, 16 bit, big-endian, with an axis of length
one at the end; the headers tell no orientation (see :func:`orientation`). There are no label maps of structures: those
need FreeSurfer, whose results for most of OASIS-1 are published beside it.
"""

from __future__ import annotations

import re
from collections.abc import Iterator
from pathlib import Path

import pandas as pd

from dmir.cohorts.freesurfer import finished_scans
from dmir.cohorts.layout import person_and_session, read_bounded, read_text_table, require_files
from dmir.cohorts.sources import require_layout
from dmir.errors import InputError, suggestion

WHERE = (
    "OASIS-1: oasis_cross-sectional_disc1.tar.gz to ...disc12.tar.gz (15.8 GB) from "
    "https://sites.wustl.edu/oasisbrains, under OASIS's data use agreement; unpack them so that "
    "<folder>/disc1/OAS1_0001_MR1/PROCESSED/ exists. FreeSurfer's results for them are "
    "oasis_cs_freesurfer_disc1.tar.gz, ... from the same place."
)
# folder, ending of the header's name; which n of mpr_n4 (images averaged) varies
VERSIONS = {
    "masked": ("PROCESSED/MPRAGE/T88_111", "_t88_masked_gfc.hdr"),
    "atlas": ("PROCESSED/MPRAGE/T88_111", "_t88_gfc.hdr"),
    "subject": ("PROCESSED/MPRAGE/SUBJ_111", "_sbj_111.hdr"),
}
TISSUES = ("FSL_SEG", "_t88_masked_gfc_fseg.hdr")
AGES = "oasis_cross-sectional.csv"
SESSION = re.compile(r"OAS1_\d{4}_MR\d")
DISC = re.compile(r"(?:oasis_cross-sectional_)?disc\d+")


def recognises(folder: Path) -> bool:
    """Tell whether the folder has sessions of OASIS-1, complete or not, which are not FreeSurfer's alone."""
    return any(
        (session / part).exists()
        for session in _sessions(folder)
        for part in ("PROCESSED", "FSL_SEG", "RAW", f"{session.name}.txt")
    )


def orientation(version: str = "masked", freesurfer: str | Path | None = None) -> str | None:
    """Return the axis codes of the files, which Analyze headers do not tell; None where the headers are right.

    The atlas's axes run L, A, S, as readers take Analyze files to. The subject's own run A, S, L: these images are
    sagittal (Winkler, "Converting OASIS brains to NIFTI", brainder.org, 2011).
    """
    return "ASL" if version == "subject" and freesurfer is None else None


def scan_table(folder: str | Path, *, version: str = "masked", freesurfer: str | Path | None = None) -> pd.DataFrame:
    """List the scans of OASIS-1 that are there, by name.

    Parameters
    ----------
    folder
        Where ``disc1``, ``disc2``, ... are, or where all discs were unpacked into; some discs alone will do.
    version
        ``"masked"``: aligned to the atlas and stripped; ``"atlas"``: aligned to the atlas, with the head;
        ``"subject"``: the average in its own space, with the head, whose orientation must be told (``ASL``).
    freesurfer
        A ``SUBJECTS_DIR`` with a finished folder for each scan. Images, label maps and masks are then FreeSurfer's
        (``orig``, ``aparc+aseg``, ``brainmask``), and ``version`` does not matter.

    Returns
    -------
    pandas.DataFrame
        One row a scan, all text: ``scan`` (OAS1_0001_MR1), ``subject, session, age, image, labels, mask, source_id``.
        Without FreeSurfer the labels of the atlas's versions are 1 CSF, 2 grey and 3 white matter, and the subject's
        has none. The mask of ``"atlas"`` is the stripped image, positive inside. A rescan is of the same subject.

    Raises
    ------
    InputError
        The folder has another layout, files are missing, a scan is there twice or is unfinished in FreeSurfer, or an
        option is unusable.
    """
    if version not in VERSIONS:
        raise InputError(
            "version", found=f"'{version}'", expected=" or ".join(VERSIONS), remedy=suggestion(version, VERSIONS)
        )
    folder = require_layout(folder, "oasis1")
    sessions = _sessions_by_name(folder)
    if freesurfer is None:
        files = _files(folder, sessions, version)
    else:
        files = finished_scans(require_layout(freesurfer, "freesurfer"), list(sessions))
    ages = _ages(folder, sessions)
    rows = []
    for name in sessions:
        subject, session = person_and_session(name)
        rows.append(
            {
                "scan": name,
                "subject": subject,
                "session": session,
                "age": ages[name],
                **files[name],
                "source_id": name,
            }
        )
    return pd.DataFrame(rows)


def _sessions(folder: Path, depth: int = 2) -> Iterator[Path]:
    """Yield the folders of the sessions: in the folder itself, in discs, and in the archives' own folders.

    No deeper: of folders that link to one another there is no end.
    """
    for path in sorted(folder.iterdir()):
        if SESSION.fullmatch(path.name):
            yield path
        elif depth and DISC.fullmatch(path.name) and path.is_dir():
            yield from _sessions(path, depth - 1)


def _sessions_by_name(folder: Path) -> dict[str, Path]:
    sessions: dict[str, Path] = {}
    for path in _sessions(folder):
        if path.name in sessions:
            raise InputError(
                folder,
                found=f"{path.name} in {sessions[path.name].parent} and in {path.parent}",
                expected="every session once",
                remedy="Move one of them away.",
            )
        sessions[path.name] = path
    return dict(sorted(sessions.items()))


def _files(folder: Path, sessions: dict[str, Path], version: str) -> dict[str, dict[str, str]]:
    """Return the files ``image, labels, mask`` of each session; refuse a tree that lacks some."""
    wanted = {"image": VERSIONS[version]}
    if version != "subject":
        wanted["labels"] = TISSUES
    if version == "atlas":
        wanted["mask"] = VERSIONS["masked"]
    files, needed = {}, []
    for name, session in sessions.items():
        listings = {place: _listing(session / place) for place, _ in wanted.values()}
        headers = {key: _header(session, place, ending, listings[place]) for key, (place, ending) in wanted.items()}
        for key, header in headers.items():
            compressed = header.with_suffix(".img.gz")
            there = compressed.name in listings[wanted[key][0]]
            needed += [header, compressed if there else header.with_suffix(".img")]
        files[name] = {key: str(headers[key]) if key in headers else "" for key in ("image", "labels", "mask")}
    require_files(folder, needed)
    return files


def _listing(folder: Path) -> list[str]:
    return [path.name for path in folder.iterdir()] if folder.is_dir() else []


def _header(session: Path, place: str, ending: str, names: list[str]) -> Path:
    """Return the one header whose name ends so; where there is none, a name that tells what is missing."""
    found = [name for name in names if name.startswith(session.name) and name.endswith(ending)]
    if len(found) > 1:
        raise InputError(
            session / place, found=" and ".join(sorted(found)), expected=f"one file *{ending}", remedy="Keep one."
        )
    return session / place / (found[0] if found else f"{session.name}_*{ending}")


def _ages(folder: Path, sessions: dict[str, Path]) -> dict[str, str]:
    """Return the age of each session, from the table of all or from the session's own text; "" where neither tells."""
    ages = _table_of_ages(folder / AGES) if (folder / AGES).is_file() else {}
    return {name: ages.get(name) or _own_age(session) for name, session in sessions.items()}


def _table_of_ages(path: Path) -> dict[str, str]:
    table = read_text_table(path, "a .csv file")
    if not {"ID", "Age"} <= set(table.columns):
        raise InputError(path, found=f"the columns {', '.join(table.columns)}", expected="also ID and Age")
    return dict(zip(table["ID"], table["Age"], strict=True))


def _own_age(session: Path) -> str:
    path = session / f"{session.name}.txt"
    text = read_bounded(path, "what is known of a session").decode(errors="replace") if path.is_file() else ""
    age = re.search(r"^AGE:[ \t]*(\d+)", text, re.MULTILINE)
    return age[1] if age else ""
