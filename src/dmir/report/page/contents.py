"""Tables, figures and sidecars as the page shows them; what is not there is named and never an error."""

from __future__ import annotations

import base64
import json
import os
import re
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from html.parser import HTMLParser
from pathlib import Path
from typing import Any
from urllib.parse import quote

from dmir.report.origin import KINDS
from dmir.report.products import products

VECTOR_BYTES = 400_000  # a vector figure above this is slower to draw than its pixels
FIGURES_BYTES = 16_000_000  # of all figures inside the page; what comes after is linked only
WIDE = 1.9  # times its height: a figure that is not readable on half the page

# what the names of files begin with -> title, and of figures the caption as well
TABLE_KINDS = {kind: title for table in products("tables") for kind, title in table.titles.items()}
FIGURE_KINDS = {
    kind: (title, str(figure.caption)) for figure in products("figures") for kind, title in figure.titles.items()
}


@dataclass(frozen=True)
class Link:
    """A file beside the page: what it is called and where it is, relative to the page."""

    text: str
    target: str


@dataclass(frozen=True)
class Cell:
    """A cell of a table: its text, which side it is set to, and whether it is best or second."""

    text: str
    numeric: bool = False
    mark: str = ""


@dataclass(frozen=True)
class Table:
    """A table of the results; without headers where its file is missing."""

    name: str
    title: str
    caption: str
    headers: tuple[Cell, ...]
    rows: tuple[tuple[Cell, ...], ...]
    notes: tuple[str, ...]
    links: tuple[Link, ...]
    missing: str = ""

    @property
    def leading(self) -> int:
        """How many columns name the row: up to the last one of text among the first three."""
        return max((place + 1 for place, header in enumerate(self.headers[:3]) if not header.numeric), default=1)

    @property
    def grouped(self) -> bool:
        """Whether rows of several cohorts stand in one table."""
        first = self.headers[0].text if self.headers else ""
        return first == "Cohort" and len({row[0].text for row in self.rows}) > 1


@dataclass(frozen=True)
class Figure:
    """A figure: its picture as a data URI, empty where it is missing or left out; ``wide`` if it needs a full row."""

    name: str
    title: str
    caption: str
    picture: str
    links: tuple[Link, ...]
    missing: str = ""
    wide: bool = False


@dataclass(frozen=True)
class Group:
    """Tables of one kind, or figures of one cohort, under one heading."""

    title: str
    items: tuple[Any, ...]


@dataclass(frozen=True)
class Origin:
    """What the sidecar of a table or a figure says; ``hashes`` is empty where there is none."""

    name: str
    folder: str
    hashes: tuple[str, ...]
    inputs: int
    missing: str = ""


class _TableReader(HTMLParser):
    """Reads what :func:`dmir.report.writing.to_html` wrote: a paragraph, one table, paragraphs."""

    def __init__(self) -> None:
        super().__init__()
        self.before: list[str] = []
        self.after: list[str] = []
        self.headers: list[Cell] = []
        self.rows: list[list[Cell]] = []
        self._text: list[str] | None = None
        self._numeric = False
        self._mark = ""
        self._tables = 0

    def handle_starttag(self, tag: str, attributes: list[tuple[str, str | None]]) -> None:
        if tag == "table":
            self._tables += 1
        elif tag == "tr":
            self.rows.append([])
        elif tag in ("td", "th", "p"):
            self._text, self._mark = [], ""
            self._numeric = dict(attributes).get("class") == "right"
        elif tag in ("b", "u"):
            self._mark = {"b": "best", "u": "second"}[tag]

    def handle_data(self, data: str) -> None:
        if self._text is not None:
            self._text.append(data)

    def handle_endtag(self, tag: str) -> None:
        if tag not in ("td", "th", "p") or self._text is None:
            return
        text, self._text = "".join(self._text).strip(), None
        if tag == "p":
            (self.after if self._tables else self.before).append(text)
        elif tag == "th":
            self.headers.append(Cell(text, self._numeric))
        elif self.rows:
            self.rows[-1].append(Cell(text, self._numeric, self._mark))


def relative_link(path: Path, page: Path) -> str:
    """Return where a file is, seen from the page, as an address."""
    return quote(Path(os.path.relpath(path.resolve(), page.resolve().parent)).as_posix())


def links_to(stem: Path, suffixes: Sequence[str], page: Path) -> tuple[Link, ...]:
    """Return links to the files of a table or figure that exist."""
    paths = [(suffix, stem.with_name(stem.name + suffix)) for suffix in suffixes]
    return tuple(Link(suffix, relative_link(path, page)) for suffix, path in paths if path.is_file())


def split_name(name: str, kinds: Iterable[str], cohorts: Iterable[str]) -> tuple[str, str]:
    """Return the kind of a table or figure and its cohort, empty for none; both may have underscores.

    Examples
    --------
    >>> split_name("qualitative_my_cohort_a__b", ["qualitative"], ["my", "my_cohort"])
    ('qualitative', 'my_cohort')
    """
    kind = max((k for k in kinds if name == k or name.startswith(f"{k}_")), key=len, default="")
    if not kind:
        cohort = max((c for c in cohorts if name.endswith(f"_{c}")), key=len, default="")
        return (name.removesuffix(f"_{cohort}"), cohort) if cohort else (name, "")
    rest = name[len(kind) + 1 :]
    return kind, max((c for c in cohorts if rest == c or rest.startswith(f"{c}_")), key=len, default="")


def read_table(folder: Path, name: str, title: str, page: Path) -> Table:
    """Read a table of the results: its .html, cell by cell, so that nothing else of that file comes into the page."""
    links = links_to(folder / name, (".csv", ".md", ".tex"), page)
    path = folder / f"{name}.html"
    if not path.is_file():
        return Table(name, title, "", (), (), (), links, f"There is no tables/{path.name}.")
    reader = _TableReader()
    reader.feed(path.read_text(encoding="utf-8"))
    reader.close()
    rows = tuple(tuple(row) for row in reader.rows if row)
    if not reader.headers:
        return Table(name, title, "", (), (), (), links, f"tables/{path.name} holds no table.")
    return Table(name, title, " ".join(reader.before), tuple(reader.headers), rows, tuple(reader.after), links)


def read_tables(results: Path, names: Sequence[str], cohorts: Sequence[str], page: Path) -> list[Group]:
    """Return the tables in groups of one kind, in the order in which readers ask for them."""
    found: dict[str, list[Table]] = {}
    for name in dict.fromkeys(names):
        kind, cohort = split_name(name, TABLE_KINDS, cohorts)
        title = cohort or "All cohorts"
        found.setdefault(kind, []).append(read_table(results / "tables", name, title, page))
    order = [*(kind for kind in TABLE_KINDS if kind in found), *(kind for kind in found if kind not in TABLE_KINDS)]
    return [Group(TABLE_KINDS.get(kind, kind), tuple(found[kind])) for kind in order]


def _picture(folder: Path, name: str) -> Path | None:
    """Return the file to show: the vector figure where it is small, else its pixels."""
    vector, pixels = folder / f"{name}.svg", folder / f"{name}.png"
    if vector.is_file() and (vector.stat().st_size <= VECTOR_BYTES or not pixels.is_file()):
        return vector
    return pixels if pixels.is_file() else None


def proportion(path: Path) -> float:
    """Return the width of a picture over its height; 1 where its file does not tell."""
    with path.open("rb") as file:
        start = file.read(4096)
    if path.suffix == ".png":
        width, height = (float(int.from_bytes(start[place : place + 4], "big")) for place in (16, 20))
    else:
        found = re.search(rb'viewBox="[\d.+-]+[ ,]+[\d.+-]+[ ,]+([\d.]+)[ ,]+([\d.]+)"', start)
        width, height = map(float, found.groups()) if found else (1.0, 1.0)
    return width / height if height else 1.0


def data_uri(path: Path) -> str:
    """Return a picture as an address that contains it."""
    kind = {".svg": "image/svg+xml", ".png": "image/png"}[path.suffix]
    return f"data:{kind};base64,{base64.b64encode(path.read_bytes()).decode('ascii')}"


def read_figures(results: Path, names: Sequence[str], cohorts: Sequence[str], page: Path) -> list[Group]:
    """Return the figures in groups of one cohort; those of all cohorts come last."""
    folder = results / "figures"
    found: dict[str, list[Figure]] = {}
    room = FIGURES_BYTES
    for name in dict.fromkeys(names):
        kind, cohort = split_name(name, FIGURE_KINDS, cohorts)
        title, caption = FIGURE_KINDS.get(kind, (kind, ""))
        path, links = _picture(folder, name), links_to(folder / name, (".png", ".svg", ".pdf"), page)
        picture, missing, wide = "", "", False
        if path is None:
            missing = f"There is no figures/{name}.svg and no figures/{name}.png."
        elif path.stat().st_size > room:
            missing = f"figures/{path.name} is left out to keep the page small; it is linked below."
        else:
            picture, wide = data_uri(path), proportion(path) > WIDE
            room -= path.stat().st_size
        about = name.removeprefix(f"{kind}_").removeprefix(cohort).removeprefix("_").replace("__", " → ")
        title = f"{title}: {about}" if cohort and about else title
        found.setdefault(cohort, []).append(Figure(name, title, caption, picture, links, missing, wide))
    order = [*(cohort for cohort in cohorts if cohort in found), *([""] if "" in found else [])]
    return [Group(cohort or "All cohorts", tuple(found[cohort])) for cohort in order]


def _read_sidecar(path: Path) -> Mapping[str, Any] | None:
    try:
        record = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return None
    return record if isinstance(record, dict) and isinstance(record.get("made_from"), dict) else None


def read_origins(results: Path, tables: Sequence[str], figures: Sequence[str]) -> list[Origin]:
    """Return what every table and figure says it was made from."""
    origins = []
    for folder, names in (("tables", tables), ("figures", figures)):
        for name in dict.fromkeys(names):
            record = _read_sidecar(results / folder / f"{name}.json")
            if record is None:
                origins.append(Origin(name, folder, (), 0, f"no readable {name}.json"))
                continue
            hashes = tuple(str(record["made_from"].get(kind, "")) for kind in KINDS)
            origins.append(Origin(name, folder, hashes, len(record.get("inputs") or {})))
    return origins
