"""One scan under two names: the same file, the same bytes, or names that are likely one person's."""

from __future__ import annotations

import gzip
import hashlib
import zlib
from collections.abc import Callable, Hashable, Iterable, Iterator, Mapping
from dataclasses import dataclass
from itertools import combinations
from pathlib import Path
from typing import TypeVar

import pandas as pd

from dmir.cohorts.ages import plain_name
from dmir.doubts import doubt
from dmir.errors import InputError
from dmir.terminal import followed

GZIP = b"\x1f\x8b"  # how such a file begins
CHUNK = 2**20  # bytes read at a time
SAMPLES, SAMPLE = 8, 4096  # places of a plain file that are looked at first, and bytes at each
SHOWN = 5
Item = TypeVar("Item")


@dataclass(frozen=True)
class _Scan:
    cohort: str
    name: str
    split: str
    image: Path

    def __str__(self) -> str:
        return f"{self.cohort}: {self.name} ({self.split})"


def require_distinct(tables: Mapping[str, pd.DataFrame], train_on: str) -> None:
    """Refuse what is in two splits under two names, and tell of what may be.

    A file is the same under another path, by a link, as a copy, and compressed anew.

    Parameters
    ----------
    tables
        Of scans, by cohort. Images that a job makes are known by what they are made from; those that are not there yet
        are passed over.
    train_on
        The cohort that networks are trained on: its training and validation images are no test images of any other.

    Raises
    ------
    InputError
        One file is in two splits of a cohort, or was trained on and is tested on.
    """
    scans = [scan for cohort, table in tables.items() for scan in _scans(cohort, table)]
    for same in _same_files(scans):
        named = _some(same)
        if any(_leaks(one, other, train_on) for one, other in combinations(same, 2)):
            raise InputError(
                same[0].image,
                found=f"one file in several splits: {named}",
                expected="a file in one split: what was learned from, or chosen on, is not tested on",
                remedy="Take all but one of them out of the split, or name the right files.",
            )
        if len({scan.cohort for scan in same}) < len(same):
            doubt(same[0].image, found=f"one file under several names: {named}", done="taken for different scans")
    for cohort, table in tables.items():
        _tell_of_names(cohort, table)


def _scans(cohort: str, table: pd.DataFrame) -> Iterator[_Scan]:
    for row in table.to_dict("records"):
        path = Path(row.get("made_from") or row["image"])
        if path.suffix == ".hdr":  # the headers of many images are one and the same
            path = next((p for p in (path.with_suffix(".img"), path.with_suffix(".img.gz")) if p.is_file()), path)
        if path.is_file() and path.stat().st_size:  # what is empty is told where it is read
            yield _Scan(cohort, str(row["scan"]), str(row["split"]), path)


def _leaks(one: _Scan, other: _Scan, train_on: str) -> bool:
    """Tell whether two scans of one file must not be: in two splits of a cohort, or learned from and tested on."""
    if one.cohort == other.cohort:
        return one.split != other.split
    seen = [scan.cohort == train_on and scan.split in ("train", "val") for scan in (one, other)]
    return (seen[0] and other.split == "test") or (seen[1] and one.split == "test")


def _same_files(scans: Iterable[_Scan]) -> Iterator[list[_Scan]]:
    """Yield groups of scans whose images are the same, two or more each; whole files are read where parts are alike."""
    for alike in _grouped(followed(scans, "comparing files"), lambda scan: _fingerprint(scan.image)):
        files = {scan.image.resolve() for scan in alike}
        yield from [alike] if len(files) == 1 else _grouped(alike, lambda scan: _digest(scan.image))


def _grouped(items: Iterable[Item], key: Callable[[Item], Hashable]) -> list[list[Item]]:
    """Return the items whose keys are the same, where there are several."""
    groups: dict[Hashable, list[Item]] = {}
    for item in items:
        groups.setdefault(key(item), []).append(item)
    return [group for group in groups.values() if len(group) > 1]


def _fingerprint(path: Path) -> Hashable:
    """Return what two equal files have in common, without reading them whole: of gzip its own checksum and length."""
    with path.open("rb") as file:
        zipped = file.read(2) == GZIP
        size = file.seek(0, 2)
        if zipped and size > 18:
            file.seek(-8, 2)
            return "gzip", file.read(8)
        checksum = 0
        for place in range(SAMPLES):
            file.seek(max(0, size - SAMPLE) * place // (SAMPLES - 1))
            checksum = zlib.crc32(file.read(SAMPLE), checksum)
    return "plain", size, checksum


def _digest(path: Path) -> str:
    """Return a hash of a file's content, decompressed where it can be."""
    for opened in (gzip.open, open):
        content = hashlib.sha256()
        try:
            with opened(path, "rb") as file:
                while part := file.read(CHUNK):
                    content.update(part)
            return content.hexdigest()
        except (gzip.BadGzipFile, EOFError, zlib.error):  # no gzip, or one that is cut short
            continue
    raise AssertionError("any file can be read as it is")


def _tell_of_names(cohort: str, table: pd.DataFrame) -> None:
    """Tell of subjects whose names differ only by zeros, case or ``sub-``."""
    splits = table.groupby("subject", sort=False)["split"].agg(lambda column: "/".join(dict.fromkeys(column)))
    alike = _grouped(splits.index, lambda name: plain_name(str(name)))
    if alike:
        named = "; ".join(", ".join(f"{name} ({splits[name]})" for name in names) for names in alike[:SHOWN])
        more = f" and {len(alike) - SHOWN} more" if len(alike) > SHOWN else ""
        found = f"subjects whose names differ only by zeros, case or 'sub-': {named}{more}"
        doubt(f"cohorts.{cohort}", found=found, done="taken for different people")


def _some(scans: list[_Scan]) -> str:
    return ", ".join(map(str, scans[:SHOWN])) + (f" and {len(scans) - SHOWN} more" if len(scans) > SHOWN else "")
