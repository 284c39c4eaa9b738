"""The published splits, against what their publications state: counts, places, lists and who is in which part."""

from __future__ import annotations

import csv
import hashlib
import re
from collections import Counter
from pathlib import Path

import pandas as pd
import pytest

from dmir.cohorts.pairs import registration_pairs
from dmir.cohorts.splits import apply_split, split_names, splits_folder

NEURITE = ("neurite_oasis_symnet255", "neurite_oasis_hsganet", "neurite_oasis_sitreg")
LPBA = ("lpba40_voxelmorph", "lpba40_sitreg", "lpba40_hsganet")
SIZES = {
    "neurite_oasis_symnet255": {"train": 255, "atlas": 1, "val": 5, "test": 153},
    "neurite_oasis_hsganet": {"train": 255, "val": 1, "test": 145, "atlas": 4},
    "neurite_oasis_sitreg": {"train": 255, "val": 20, "test": 139},
    "learn2reg_oasis": {"train": 374, "val": 20, "test": 20},
    "lpba40_voxelmorph": {"atlas": 1, "train": 30, "test": 9},
    "lpba40_sitreg": {"train": 25, "val": 5, "test": 10},
    "lpba40_hsganet": {"test": 35, "atlas": 5},
}
NAMES = {"neurite": r"OAS1_\d{4}_MR1", "learn2reg": r"OASIS_\d{4}", "lpba40": r"S(0[1-9]|[1-3]\d|40)"}


def rows(name: str) -> list[dict[str, str]]:
    lines = (splits_folder() / f"{name}.csv").read_text().splitlines()
    return list(csv.DictReader(line for line in lines if not line.startswith("#")))


def comments(path: Path) -> str:
    return "\n".join(line for line in path.read_text().splitlines() if line.startswith("#"))


def part(name: str, split: str) -> list[str]:
    return [row["scan"] for row in rows(name) if row["split"] == split]


def numbers(name: str, split: str) -> list[int]:
    """Return the numbers in the names of a part's scans."""
    return [int(re.findall(r"\d+", scan.removeprefix("OAS1_"))[0]) for scan in part(name, split)]


def test_the_folder_holds_these_splits_and_one_list_of_pairs() -> None:
    assert set(split_names()) == set(SIZES)
    assert {path.stem for path in splits_folder().glob("*.csv")} == {*SIZES, "learn2reg_oasis_pairs"}


@pytest.mark.parametrize(("name", "sizes"), SIZES.items())
def test_sizes_are_the_published_ones(name: str, sizes: dict[str, int]) -> None:
    assert Counter(row["split"] for row in rows(name)) == sizes


@pytest.mark.parametrize("name", SIZES)
def test_names_are_well_formed_and_no_person_stands_in_two_parts(name: str) -> None:
    scans = [row["scan"] for row in rows(name)]
    assert all(re.fullmatch(NAMES[name.split("_")[0]], scan) for scan in scans)
    people = [re.sub(r"_MR\d$", "", scan) for scan in scans]
    assert len(set(people)) == len(people)
    assert set(rows(name)[0]) == {"scan", "split"}


@pytest.mark.parametrize("path", sorted(splits_folder().glob("*.csv")), ids=lambda path: path.stem)
def test_each_file_tells_its_source_and_what_is_ours(path: Path) -> None:
    said = comments(path)
    keys = ("From",) if path.stem.endswith("_pairs") else ("From", "Published", "Ours", "Leaks")
    for key in keys:
        assert re.search(rf"^# {key}: ", said, re.MULTILINE), key
    assert "github.com/" in said
    assert f"`{path.stem}`" in (splits_folder() / "README.md").read_text()


def test_the_list_of_neurite_oasis_is_that_of_its_subjects_file() -> None:
    """The digest is that of ``subjects.txt`` in neurite-oasis.v1.0.tar, as a user of that file published it."""
    scans = [row["scan"] for row in rows("neurite_oasis_sitreg")]
    text = "".join(f"OASIS_{scan}\n" for scan in scans)
    published = "52a8a9cae5992837140464f8d28a69135b096484786f3cb85c50834958eee4ca"
    assert hashlib.sha256(text.encode()).hexdigest() == published
    # two more places that are published, counted from 1
    assert scans[333 - 1] == "OAS1_0370_MR1"
    assert scans[115 - 1] == "OAS1_0123_MR1"


@pytest.mark.parametrize(
    ("name", "slices"),
    [
        # as the published programs write them: from 0, the end not included
        ("neurite_oasis_symnet255", {"train": (0, 255), "atlas": (255, 256), "val": (256, 261), "test": (261, 414)}),
        ("neurite_oasis_hsganet", {"train": (0, 255), "val": (255, 256), "test": (256, 401), "atlas": (401, 405)}),
        ("neurite_oasis_sitreg", {"train": (0, 255), "val": (255, 275), "test": (275, 414)}),
    ],
)
def test_neurite_oasis_is_split_at_the_published_places(name: str, slices: dict[str, tuple[int, int]]) -> None:
    scans = sorted(row["scan"] for row in rows("neurite_oasis_sitreg"))
    assert {split: part(name, split) for split in slices} == {k: scans[a:b] for k, (a, b) in slices.items()}


def test_hsganets_pairs_are_580_and_175() -> None:
    for name, expected in (("neurite_oasis_hsganet", 580), ("lpba40_hsganet", 175)):
        assert len(registration_pairs(pd.DataFrame(rows(name)))) == expected


def test_lpba40_is_split_by_the_published_lists() -> None:
    assert numbers("lpba40_voxelmorph", "atlas") == [1]
    assert numbers("lpba40_voxelmorph", "test") == list(range(2, 11))
    assert numbers("lpba40_voxelmorph", "train") == list(range(11, 41))
    assert part("lpba40_sitreg", "val") == ["S14", "S16", "S19", "S26", "S39"]
    assert part("lpba40_sitreg", "test") == ["S11", "S12", "S13", "S15", "S24", "S28", "S29", "S32", "S34", "S38"]
    assert len(rows("lpba40_sitreg")) == 40
    assert numbers("lpba40_hsganet", "test") == list(range(1, 36))
    assert numbers("lpba40_hsganet", "atlas") == list(range(36, 41))


def test_learn2reg_keeps_the_published_validation_for_the_test() -> None:
    assert numbers("learn2reg_oasis", "train") == list(range(1, 375))
    assert numbers("learn2reg_oasis", "val") == list(range(375, 395))
    assert numbers("learn2reg_oasis", "test") == list(range(395, 415))


def test_learn2regs_pairs_are_the_19_published_ones() -> None:
    pairs = [(row["moving"], row["fixed"]) for row in rows("learn2reg_oasis_pairs")]
    assert len(pairs) == 19
    # "fixed": OASIS_0395, "moving": OASIS_0396, and so on to 0413 and 0414
    assert pairs == [(f"OASIS_{fixed + 1:04d}", f"OASIS_{fixed:04d}") for fixed in range(395, 414)]
    assert {scan for pair in pairs for scan in pair} == set(part("learn2reg_oasis", "test"))


@pytest.mark.parametrize("name", SIZES)
def test_a_source_takes_its_split(name: str) -> None:
    """The scans of the whole source, in its order, are split as the file says; who is not named is left out."""
    everyone = {"neurite": "neurite_oasis_sitreg", "learn2reg": "learn2reg_oasis", "lpba40": "lpba40_sitreg"}
    scans = sorted(row["scan"] for row in rows(everyone[name.split("_")[0]]))
    table = apply_split(pd.DataFrame({"scan": scans}), name, "a test")
    assert list(table["scan"]) == sorted(table["scan"])
    assert Counter(table["split"]) == SIZES[name]


def test_the_published_pairs_are_taken_from_the_list() -> None:
    pairs = registration_pairs(pd.DataFrame(rows("learn2reg_oasis")), "learn2reg_oasis_pairs")
    assert pairs[0] == ("OASIS_0396", "OASIS_0395")
    assert pairs[-1] == ("OASIS_0414", "OASIS_0413")
