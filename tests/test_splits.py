"""Splits and pairs that are files: what they mean, and what each mistake is answered with."""

from __future__ import annotations

from pathlib import Path

import pandas as pd
import pytest

from dmir.cohorts.pairs import registration_pairs
from dmir.cohorts.splits import apply_split
from dmir.errors import InputError

SCANS = [f"s{k}" for k in range(1, 7)]
TABLE = pd.DataFrame({"scan": SCANS, "subject": SCANS})


def write(folder: Path, text: str, name: str = "split.csv") -> Path:
    path = folder / name
    path.write_text(text)
    return path


def refused(text: str, folder: Path, **options) -> str:
    with pytest.raises(InputError) as caught:
        apply_split(TABLE, write(folder, text), "the tree", **options)
    return str(caught.value)


def test_names_and_positions_mean_the_same(tmp_path: Path) -> None:
    names = apply_split(
        TABLE, write(tmp_path, "# of a paper\nscan,split\ns5,atlas\ns1,train\ns2,train\ns3,test\n"), "x"
    )
    places = apply_split(TABLE, write(tmp_path, "position,split\n1-2,train\n3,test\n5,atlas\n", "p.csv"), "x")
    expected = {"s1": "train", "s2": "train", "s3": "test", "s5": "atlas"}
    for found in (names, places):
        # in the source's order; what the split does not name is not used
        assert list(zip(found["scan"], found["split"], strict=True)) == list(expected.items())


def test_a_missing_scan_is_named_and_may_be_left_out(tmp_path: Path) -> None:
    text = "scan,split\ns1,atlas\ns8,test\ns9,test\ns2,test\n"
    told = refused(text, tmp_path)
    assert "the tree: found 2 of the 4 scans" in told and "s8, s9" in told and "leave_out" in told
    kept = apply_split(TABLE, write(tmp_path, text), "x", missing="leave_out")
    assert list(kept["scan"]) == ["s1", "s2"]


def test_a_split_of_other_scans_is_refused_even_if_missing_ones_may_be_left_out(tmp_path: Path) -> None:
    assert "2 of the 2 scans" in refused("scan,split\na,test\nb,atlas\n", tmp_path, missing="leave_out")


def test_positions_in_a_shorter_list_are_refused(tmp_path: Path) -> None:
    told = refused("position,split\n1-7,train\n", tmp_path)
    assert "found 6 scans; expected at least 7" in told


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ("scan,split\ns1,train\ns1,test\n", "the scan s1 more than once"),
        ("position,split\n1-3,train\n2,test\n", "position of s2 more than once"),
        ("position,split\n0,train\n", "the position '0'"),
        ("position,split\n3-1,train\n", "the position '3-1'"),
        ("scan,spilt\ns1,train\n", "the columns scan, spilt"),
        ("", "no table"),
    ],
)
def test_mistakes_in_a_split(tmp_path: Path, text: str, words: str) -> None:
    told = refused(text, tmp_path)
    assert words in told and "split.csv" in told


def test_a_misspelt_name_of_a_published_split_gets_a_suggestion() -> None:
    with pytest.raises(InputError, match="Did you mean 'lpba40_voxelmorph'"):
        apply_split(TABLE, "lpba40_voxlmorph", "x")


TWO_ATLASES = TABLE.assign(split=["train", "test", "test", "test", "atlas", "atlas"])


def test_protocols_make_their_pairs() -> None:
    to_atlas = registration_pairs(TWO_ATLASES, "scan_to_atlas")
    assert to_atlas == [("s2", "s5"), ("s3", "s5"), ("s4", "s5"), ("s2", "s6"), ("s3", "s6"), ("s4", "s6")]
    assert registration_pairs(TWO_ATLASES, "atlas_to_scan") == [(fixed, moving) for moving, fixed in to_atlas]
    everyone = registration_pairs(TWO_ATLASES, "all")
    assert len(everyone) == len(set(everyone)) == 6 and all(a != b for a, b in everyone)
    assert {scan for pair in everyone for scan in pair} == {"s2", "s3", "s4"}


def test_listed_pairs_are_taken_as_they_stand(tmp_path: Path) -> None:
    path = write(tmp_path, "moving,fixed\ns3,s2\ns2,s3\ns5,s4\n")
    assert registration_pairs(TWO_ATLASES, path) == [("s3", "s2"), ("s2", "s3"), ("s5", "s4")]


@pytest.mark.parametrize(
    ("rows", "words"),
    [
        ("s1,s2", "the scan 's1'"),  # a training scan
        ("s2,s2", "s2 with itself"),
        ("s2,s3\ns2,s3", "s2 -> s3 more than once"),
    ],
)
def test_mistakes_in_listed_pairs(tmp_path: Path, rows: str, words: str) -> None:
    path = write(tmp_path, f"moving,fixed\n{rows}\n")
    with pytest.raises(InputError, match=words):
        registration_pairs(TWO_ATLASES, path)
