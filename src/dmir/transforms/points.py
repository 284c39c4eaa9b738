"""Tables of points: ``.csv`` with columns x, y, z, and 3D Slicer's ``.fcsv``; every other column stays as it is."""

from __future__ import annotations

import csv
import io
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from dmir.errors import InputError
from dmir.transforms.conventions import CONVENTIONS
from dmir.volumes import Grid, atomic_path

FRAMES: dict[str, Callable[[Grid], np.ndarray]] = {
    "ras": CONVENTIONS["ras"].frame,
    "lps": CONVENTIONS["itk"].frame,
    "voxels": CONVENTIONS["voxels"].frame,
}
SLICER = {"0": "ras", "1": "lps", "RAS": "ras", "LPS": "lps"}  # what an .fcsv calls its coordinates
COORDINATES = ("x", "y", "z")
MOST_BYTES = 2**28


@dataclass(frozen=True)
class Points:
    """A table of points.

    Attributes
    ----------
    places
        (n, 3) in ``coordinates``.
    coordinates
        ``ras``, ``lps`` (mm) or ``voxels``.
    """

    places: np.ndarray
    coordinates: str
    _comments: tuple[str, ...]
    _rows: tuple[tuple[str, ...], ...]
    _columns: tuple[int, ...]
    _header: bool

    def in_world(self, grid: Grid) -> np.ndarray:
        """Return the points in RAS mm; ``grid`` is that of the image that they were found in."""
        matrix = FRAMES[self.coordinates](grid)
        return self.places @ matrix[:3, :3].T + matrix[:3, 3]

    def write(self, path: str | Path, world: np.ndarray, grid: Grid) -> None:
        """Write the table with other places, given in RAS mm; ``grid`` is that of the image that they lie in."""
        matrix = np.linalg.inv(FRAMES[self.coordinates](grid))
        places = world @ matrix[:3, :3].T + matrix[:3, 3]
        lines = io.StringIO()
        lines.writelines(f"{line}\n" for line in self._comments)
        table = csv.writer(lines, lineterminator="\n")
        body = self._rows[1:] if self._header else self._rows
        if self._header:
            table.writerow(self._rows[0])
        for row, place in zip(body, places, strict=True):
            cells = list(row)
            for column, value in zip(self._columns, place, strict=True):
                cells[column] = f"{value:.6f}"
            table.writerow(cells)
        with atomic_path(path) as temporary:
            temporary.write_text(lines.getvalue())


def read_points(path: str | Path, coordinates: str | None = None) -> Points:
    """Read a table of points.

    Parameters
    ----------
    path
        ``.csv``, of which the first line names the columns, or ``.fcsv``.
    coordinates
        ``ras``, ``lps`` or ``voxels``; an ``.fcsv`` says it itself, a ``.csv`` does not.

    Raises
    ------
    InputError
        No such file, no columns x, y, z, a coordinate that is no number, or coordinates of an unknown kind.
    """
    path = Path(path)
    if not path.is_file():
        raise InputError(path, found="no such file", expected="a table of points (.csv, .fcsv)")
    if path.stat().st_size > MOST_BYTES:
        raise InputError(path, found=f"{path.stat().st_size} bytes", expected="a table of points")
    try:
        lines = path.read_text(encoding="utf-8-sig").splitlines()
    except UnicodeDecodeError:
        raise InputError(path, found="no text", expected="a table of points (.csv, .fcsv)") from None
    comments = tuple(line for line in lines if line.startswith("#"))
    rows = tuple(tuple(row) for row in csv.reader(line for line in lines if line.strip() and line[0] != "#"))
    said = dict(_settings(comments))
    names = tuple(said["columns"].split(",")) if "columns" in said else rows[0] if rows else ()
    header = "columns" not in said
    lower = [name.strip().lower() for name in names]
    if any(lower.count(name) != 1 for name in COORDINATES):
        raise InputError(
            path,
            found=f"columns {', '.join(names) or 'of no name'}",
            expected="each of x, y and z once, in a first line",
        )
    columns = tuple(lower.index(name) for name in COORDINATES)
    places = _numbers(path, rows[1:] if header else rows, columns)
    return Points(places, _kind(path, said.get("CoordinateSystem"), coordinates), comments, rows, columns, header)


def _settings(comments: tuple[str, ...]) -> list[tuple[str, str]]:
    """Return what an .fcsv says in its comments: ``# name = value``."""
    pairs = (line.lstrip("# ").partition("=") for line in comments)
    return [(name.strip(), value.strip()) for name, sign, value in pairs if sign]


def _numbers(path: Path, rows: tuple[tuple[str, ...], ...], columns: tuple[int, ...]) -> np.ndarray:
    places = np.empty((len(rows), 3))
    for number, row in enumerate(rows):
        try:
            places[number] = [float(row[column]) for column in columns]
        except (ValueError, IndexError):
            places[number] = np.nan
        if not np.isfinite(places[number]).all():
            raise InputError(path, found=f"point {number + 1}: {','.join(row)}", expected="numbers for x, y and z")
    if not len(rows):
        raise InputError(path, found="no points", expected="at least one")
    return places


def _kind(path: Path, said: str | None, given: str | None) -> str:
    own = None if said is None else SLICER.get(said)
    if said is not None and own is None:
        raise InputError(path, found=f"CoordinateSystem = {said}", expected="RAS or LPS (0 or 1)")
    if own and given and own != given:
        raise InputError(path, found=f"a file that says {own}", expected=f"the same as --coordinates {given}")
    if own is None and given is None:
        raise InputError(
            path,
            found="coordinates of which nothing says the kind",
            expected="ras (nibabel, FreeSurfer's scanner RAS), lps (ITK, ANTs) or voxels",
            remedy="Name it with --coordinates.",
        )
    return own or given or ""
