"""Tables of scans: what is accepted, and what each mistake is answered with."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pandas as pd
import pytest

from dmir.cohorts import COLUMNS, SOURCES, check_pairs, check_scan_table, check_unseen, reference_scan, scan_table
from dmir.errors import InputError

ROWS = [
    ("a1", "anna", "atlas", "a1.nii.gz", "a1_labels.nii.gz"),
    ("b1", "bert", "train", "b1.nii.gz", ""),
    ("b2", "bert", "train", "b2.nii.gz", ""),
    ("c1", "cleo", "val", "c1.nii.gz", "c1_labels.nii.gz"),
    ("007", "dora", "test", "d1.nii.gz", "d1_labels.nii.gz"),
]
NAMES = ["scan", "subject", "split", "image", "labels"]


def frame(rows=ROWS, names=NAMES) -> pd.DataFrame:
    return pd.DataFrame(rows, columns=names)


def write(folder: Path, table: pd.DataFrame, name: str = "scans.csv", files: bool = True) -> Path:
    """Write a table and, beside it, an empty file for each that it names."""
    path = folder / name
    table.to_csv(path, index=False, sep="\t" if name.endswith(".tsv") else ",")
    if files:
        for column in ("image", "labels", "mask"):
            for entry in table.get(column, []):
                if entry:
                    (folder / entry).touch()
    return path


def message(table: pd.DataFrame, tmp_path: Path, **options) -> str:
    """Return what a table is refused with."""
    path = write(tmp_path, table, **options)
    with pytest.raises(InputError) as caught:
        scan_table("table", path=path)
    assert str(path) in str(caught.value)
    return str(caught.value)


@pytest.mark.parametrize("name", ["scans.csv", "scans.tsv"])
def test_table_is_read_as_it_is_written(tmp_path: Path, name: str) -> None:
    table = scan_table("table", path=write(tmp_path, frame().assign(age=["30", "", "", "80", "25"]), name))
    assert list(table.columns) == list(COLUMNS)
    assert list(table["scan"]) == ["a1", "b1", "b2", "c1", "007"]  # a name, not the number 7
    assert list(table["age"]) == ["30", "", "", "80", "25"]
    assert (table["truth"] == "").all()
    assert (table["mask"] == "").all()


def test_relative_paths_start_from_the_tables_own_folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "data").mkdir()
    elsewhere = tmp_path / "elsewhere.nii.gz"
    elsewhere.touch()
    table = frame()
    table.loc[1, "image"] = str(elsewhere)
    path = write(tmp_path / "data", table.replace(str(elsewhere), ""), files=True)
    table.to_csv(path, index=False)
    monkeypatch.chdir(tmp_path)
    found = scan_table("table", path="data/scans.csv")
    assert found.loc[0, "image"] == "data/a1.nii.gz"
    assert found.loc[1, "image"] == str(elsewhere)
    assert found.loc[1, "labels"] == ""


def test_people_seen_in_training_are_not_tested_in_another_cohort() -> None:
    rows = [("OAS1_0001_MR1", "OAS1_0001", "train"), ("OAS1_0002_MR1", "OAS1_0002", "test"), ("s1", "S01", "train")]
    home = pd.DataFrame(rows, columns=["scan", "subject", "split"])
    away = pd.DataFrame([("OASIS_0001", "OAS1_0001", "test"), ("S01", "S01", "test")], columns=home.columns)
    origins = {"home": "a", "away": "b"}
    with pytest.raises(InputError, match=r"cohorts\.away: found subjects .* in home: OAS1_0001;"):
        check_unseen({"home": home, "away": away}, origins, "home")
    check_unseen({"home": home, "away": away[1:]}, origins, "home")  # S01 of another data set is another person
    with pytest.raises(InputError, match="in home: S01;"):
        check_unseen({"home": home, "away": away[1:]}, {"home": "a", "away": "a"}, "home")
    check_unseen({"home": home, "away": home}, {"home": "a", "away": "a"}, "home")  # the same split twice is no leak


def test_unknown_source_is_answered_with_a_suggestion() -> None:
    with pytest.raises(InputError, match="Did you mean 'simulated'"):
        scan_table("simulatd", made="x")


@pytest.mark.parametrize("source", SOURCES)
def test_sources_are_found(source: str) -> None:
    import importlib

    assert callable(importlib.import_module(SOURCES[source]).scan_table)


def test_listing_scans_imports_no_heavy_library() -> None:
    """A workflow lists its scans each time it is parsed, and each of its jobs parses it again."""
    code = (
        "import sys; from dmir.cohorts import scan_table; scan_table('simulated', made='x', train=2);"
        "print([m for m in ('torch', 'scipy.ndimage', 'ants', 'SimpleITK', 'itk', 'nilearn') if m in sys.modules])"
    )
    result = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert result.stdout.strip() == "[]"


def test_missing_table(tmp_path: Path) -> None:
    with pytest.raises(InputError, match=r"nowhere\.csv: found no such file"):
        scan_table("table", path=tmp_path / "nowhere.csv")


def test_wrong_ending(tmp_path: Path) -> None:
    assert "ending '.txt'" in message(frame(), tmp_path, name="scans.txt")


def test_empty_table(tmp_path: Path) -> None:
    assert "no row" in message(frame([]), tmp_path)


def test_binary_file(tmp_path: Path) -> None:
    path = tmp_path / "scans.csv"
    path.write_bytes(b"\xff\xfe\x00\x80scan")
    with pytest.raises(InputError, match="no table"):
        scan_table("table", path=path)


def test_misspelt_column(tmp_path: Path) -> None:
    text = message(frame().rename(columns={"subject": "subjekt"}), tmp_path)
    assert "unknown column 'subjekt'" in text
    assert "Did you mean 'subject'" in text


def test_missing_column(tmp_path: Path) -> None:
    assert "no column subject" in message(frame().drop(columns="subject"), tmp_path)


def test_without_a_split_one_is_asked_for(tmp_path: Path) -> None:
    text = message(frame().drop(columns="split"), tmp_path)
    assert "found no split" in text and "key split" in text


def test_repeated_column(tmp_path: Path) -> None:
    path = write(tmp_path, frame())
    path.write_text(path.read_text().replace("scan,subject,split,image,labels", "scan,subject,split,image,image"))
    with pytest.raises(InputError, match="column image more than once"):
        scan_table("table", path=path)


def test_misspelt_split(tmp_path: Path) -> None:
    text = message(frame().replace("train", "trian"), tmp_path)
    assert "split 'trian'" in text
    assert "Did you mean 'train'" in text


def test_an_atlas_is_needed_where_pairs_need_one(tmp_path: Path) -> None:
    table = frame()
    table.loc[0, "split"] = "test"
    assert "no scan with split 'atlas'" in message(table, tmp_path)
    assert set(scan_table("table", path=tmp_path / "scans.csv", pairs="all")["split"]) == {"test", "train", "val"}


def test_several_atlases_are_allowed_and_the_first_gives_the_grid(tmp_path: Path) -> None:
    table = frame([*ROWS, ("e1", "emil", "atlas", "e1.nii.gz", "e1_labels.nii.gz")])
    found = scan_table("table", path=write(tmp_path, table))
    assert reference_scan(found) == "a1"
    assert reference_scan(found, "e1") == "e1"
    assert reference_scan(found[found["split"] != "atlas"]) == "b1"
    with pytest.raises(InputError, match="Known: 007, a1"):
        reference_scan(found, "e2")


def test_subject_in_two_splits_is_named(tmp_path: Path) -> None:
    table = frame()
    table.loc[4, "subject"] = "bert"
    text = message(table, tmp_path)
    assert "bert (test, train)" in text
    assert "anna" not in text
    assert "all scans of a subject in one split" in text


def test_atlas_subject_may_not_be_tested(tmp_path: Path) -> None:
    table = frame()
    table.loc[4, "subject"] = "anna"
    assert "anna (atlas, test)" in message(table, tmp_path)


@pytest.mark.parametrize("name", [".hidden", "a b", "a/b", "../a", "a__b", "-a", "ä", "a\n"])
def test_unsafe_scan_names(name: str) -> None:
    table = frame()
    table.loc[1, "scan"] = name
    with pytest.raises(InputError, match="scan names") as caught:
        check_scan_table(table, "scans.csv")
    assert repr(name) in str(caught.value)


@pytest.mark.parametrize("name", ["b2", "B2"])
def test_repeated_scan_names(name: str) -> None:
    table = frame()
    table.loc[1, "scan"] = name
    with pytest.raises(InputError, match="more than once"):
        check_scan_table(table, "scans.csv")


def test_scans_are_excluded_by_name(tmp_path: Path) -> None:
    path = write(tmp_path, frame())
    assert list(scan_table("table", path=path, exclude=["b1", "c1"])["scan"]) == ["a1", "b2", "007"]
    with pytest.raises(InputError, match=r"exclude: found 'b3'.*Known: 007"):
        scan_table("table", path=path, exclude=["b3"])


def test_a_use_that_makes_no_pair_is_refused() -> None:
    table = frame()
    assert check_pairs(table, "scan_to_atlas", tested=True, trained=["scan_to_atlas", "all"]) == 1
    with pytest.raises(InputError, match="scans with split test"):
        check_pairs(table[table["split"] != "test"], "scan_to_atlas", tested=True, trained=[])
    with pytest.raises(InputError, match=r"training\.pairs: found 1 training scans .*expected two"):
        check_pairs(table.drop(index=1), "scan_to_atlas", tested=True, trained=["all"])


@pytest.mark.parametrize("row", [0, 3, 4])
def test_labels_are_needed_where_scores_are_taken(tmp_path: Path, row: int) -> None:
    table = frame()
    table.loc[row, "labels"] = ""
    text = message(table, tmp_path)
    assert f"no labels for {ROWS[row][0]} ({ROWS[row][2]})" in text


@pytest.mark.parametrize("column", ["scan", "subject", "image"])
def test_empty_entries_are_found_by_row(tmp_path: Path, column: str) -> None:
    table = frame()
    table.loc[2, column] = ""
    assert f"nothing in the column {column} (row 4)" in message(table, tmp_path)


def test_missing_files_are_counted_and_the_first_ten_named(tmp_path: Path) -> None:
    rows = [*ROWS, *((f"e{k:02d}", f"e{k:02d}", "train", f"gone{k:02d}.nii.gz", "") for k in range(13))]
    path = write(tmp_path, frame(rows))
    for k in range(13):
        (tmp_path / f"gone{k:02d}.nii.gz").unlink()
    with pytest.raises(InputError) as caught:
        scan_table("table", path=path)
    text = str(caught.value)
    assert "13 of 21 files missing" in text
    assert "gone09.nii.gz" in text
    assert "gone10.nii.gz" not in text


def test_missing_mask_file_is_found(tmp_path: Path) -> None:
    path = write(tmp_path, frame().assign(mask=["", "m.nii.gz", "", "", ""]))
    (tmp_path / "m.nii.gz").unlink()
    with pytest.raises(InputError, match=r"1 of 9 files missing: .*m\.nii\.gz"):
        scan_table("table", path=path)


def test_simulated_table_is_reproducible_and_grows_at_its_end() -> None:
    small = scan_table("simulated", made="x", train=2, val=1, test=1, seed=3)
    assert small.equals(scan_table("simulated", made="x", train=2, val=1, test=1, seed=3))
    assert list(small["scan"]) == ["template", "sub-001", "sub-002", "sub-003", "sub-004"]
    assert list(small["split"]) == ["atlas", "train", "train", "val", "test"]
    assert small.loc[0, "truth"] == ""
    assert small.loc[1, "truth"] == "x/sub-001/truth.nii.gz"
    large = scan_table("simulated", made="x", train=9, val=1, test=1, seed=3)
    assert list(large["age"][1:5]) == list(small["age"][1:])
    other = scan_table("simulated", made="x", train=9, val=1, test=1, seed=4)
    assert list(other["age"]) != list(large["age"])


def test_simulated_cohort_has_young_and_old_subjects() -> None:
    ages = scan_table("simulated", made="x", train=200, ageing=0.4)["age"][1:].astype(float)
    assert ages.between(18, 90).all()
    assert 0.3 < (ages >= 60).mean() < 0.5


def test_simulated_cohort_refuses_a_negative_size() -> None:
    with pytest.raises(InputError, match="simulated cohort: val: found -1"):
        scan_table("simulated", made="x", val=-1)
