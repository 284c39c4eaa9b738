"""One scan under two names, and label maps of another scheme: what the tables of a benchmark must not be made of."""

from __future__ import annotations

import gzip
import os
import shutil
import warnings
from pathlib import Path

import nibabel as nib
import numpy as np
import pandas as pd
import pytest

from dmir.cli import main
from dmir.cohorts import check_unseen, duplicates, scan_table
from dmir.cohorts.duplicates import require_distinct
from dmir.doubts import Doubt
from dmir.errors import InputError
from dmir.fields import save_field
from dmir.structures import (
    label_map_names,
    load_label_map,
    load_structures,
    misfit,
    read_structures,
    structure_set_names,
)

CONFIGURATION = """
train_on: mine
test_on: [mine]
methods: [affine]
preprocess: {skull_strip: none}
cohorts: {mine: {source: table, table: mine.csv, structures: oasis28}}
"""


def image(path: Path, seed: int) -> Path:
    """Write an image of noise, compressed or not by its name."""
    data = np.random.default_rng(seed).random((12, 12, 12), np.float32)
    nib.save(nib.Nifti1Image(data, np.eye(4)), path)
    return path


def labels(path: Path, ids: list[int]) -> Path:
    """Write a label map of some ids."""
    data = np.zeros((12, 12, 12), np.int32)
    data.ravel()[: 3 * len(ids)] = np.repeat(ids, 3)
    nib.save(nib.Nifti1Image(data, np.eye(4)), path)
    return path


def cohort(*rows: tuple[str, str, Path]) -> pd.DataFrame:
    """Return a table of (scan, split, image); a scan is its own subject."""
    table = pd.DataFrame(rows, columns=["scan", "split", "image"]).astype(str)
    return table.assign(subject=table["scan"], labels="", made_from="")


def same_file(folder: Path, kind: str) -> tuple[Path, Path]:
    """Return two paths of one image."""
    first, second = image(folder / "one.nii.gz", 1), folder / "two.nii.gz"
    if kind == "path":
        return first, folder / "." / "sub" / ".." / "one.nii.gz"
    if kind == "link":
        second.symlink_to(first)
    elif kind == "hard link":
        os.link(first, second)
    elif kind == "copy":
        shutil.copy(first, second)
    elif kind == "compressed anew":
        second.write_bytes(gzip.compress(gzip.decompress(first.read_bytes()), compresslevel=1, mtime=7))
    elif kind == "plain copy":
        first, second = image(folder / "one.nii", 1), folder / "two.nii"
        shutil.copy(first, second)
    elif kind == "pair":
        data = nib.load(first).get_fdata().astype(np.float32)
        first, second = folder / "one.hdr", folder / "two.hdr"
        for path in (first, second):
            nib.save(nib.Nifti1Pair(data, np.eye(4)), path)
    return first, second


@pytest.mark.parametrize("kind", ["path", "link", "hard link", "copy", "compressed anew", "plain copy", "pair"])
@pytest.mark.parametrize("splits", [("train", "test"), ("train", "val"), ("atlas", "test"), ("val", "test")])
def test_one_file_in_two_splits_is_refused(tmp_path: Path, kind: str, splits: tuple[str, str]) -> None:
    (tmp_path / "sub").mkdir()
    first, second = same_file(tmp_path, kind)
    other = image(tmp_path / "other.nii.gz", 2)
    with pytest.raises(
        InputError, match=rf"one file in several splits: mine: a \({splits[0]}\), mine: b \({splits[1]}\)"
    ):
        require_distinct(
            {"mine": cohort(("a", splits[0], first), ("c", "train", other), ("b", splits[1], second))}, "mine"
        )


@pytest.mark.parametrize("ending", ["nii", "nii.gz", "hdr"])
def test_images_that_differ_in_one_voxel_are_two(tmp_path: Path, ending: str, recwarn: pytest.WarningsRecorder) -> None:
    """Of equal headers and equal length, and with equal samples of the file."""
    data = np.zeros((40, 40, 40), np.float32)
    paths = []
    for number in range(3):
        data[20, 21, 22 + number] = 1
        paths.append(tmp_path / f"{number}.{ending}")
        nib.save((nib.Nifti1Pair if ending == "hdr" else nib.Nifti1Image)(data, np.eye(4)), paths[-1])
    rows = zip(("pat", "quill", "rho"), ("train", "val", "test"), paths, strict=True)
    require_distinct({"mine": cohort(*rows)}, "mine")
    assert not [warning for warning in recwarn if issubclass(warning.category, Doubt)]


def test_one_file_twice_in_a_split_is_told(tmp_path: Path) -> None:
    path = image(tmp_path / "one.nii.gz", 1)
    with pytest.warns(Doubt, match=r"one file under several names: mine: a \(test\), mine: b \(test\)"):
        require_distinct({"mine": cohort(("a", "test", path), ("b", "test", path))}, "mine")


def test_what_was_trained_on_is_no_test_image_of_another_cohort(tmp_path: Path) -> None:
    path = image(tmp_path / "one.nii.gz", 1)
    shutil.copy(path, tmp_path / "again.nii.gz")
    tables = {"mine": cohort(("a", "train", path)), "theirs": cohort(("x", "test", tmp_path / "again.nii.gz"))}
    with pytest.raises(InputError, match=r"several splits: mine: a \(train\), theirs: x \(test\)"):
        require_distinct(tables, "mine")
    for split in ("train", "atlas"):  # neither was learned from here, nor is it tested on
        tables["theirs"]["split"] = split
        with warnings.catch_warnings():
            warnings.simplefilter("error", Doubt)
            require_distinct(tables, "mine")


def test_files_that_are_not_there_empty_or_cut_short_are_no_reason_to_stop(tmp_path: Path) -> None:
    whole = image(tmp_path / "one.nii.gz", 1).read_bytes()
    for name, content in (("a", b""), ("b", b""), ("c", whole[:-30]), ("d", b"\1" + whole[1:]), ("e", whole[:40])):
        (tmp_path / f"{name}.nii.gz").write_bytes(content)
    rows = [
        (name, split, tmp_path / f"{name}.nii.gz") for name, split in zip("abcdef", ["train", "test"] * 3, strict=True)
    ]
    require_distinct({"mine": cohort(*rows)}, "mine")
    shutil.copy(tmp_path / "c.nii.gz", tmp_path / "f.nii.gz")
    rows[2] = ("c", "train", tmp_path / "c.nii.gz")
    with pytest.raises(InputError, match="one file in several splits"):
        require_distinct({"mine": cohort(*rows)}, "mine")


def test_whole_files_are_read_only_where_parts_are_alike(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    rows = [(f"s{k}", "train", image(tmp_path / f"{k}.nii{'.gz' if k % 2 else ''}", k)) for k in range(20)]
    read = []
    monkeypatch.setattr(duplicates, "_digest", lambda path: read.append(path) or str(path))
    require_distinct({"mine": cohort(*rows)}, "mine")
    assert read == []


def test_names_of_one_person_are_told(tmp_path: Path) -> None:
    table = cohort(
        ("7", "train", tmp_path), ("007", "test", tmp_path), ("sub-7", "val", tmp_path), ("8", "val", tmp_path)
    )
    with pytest.warns(Doubt, match=r"cohorts.mine: .*'sub-': 7 \(train\), 007 \(test\), sub-7 \(val\); taken for diff"):
        require_distinct({"mine": table}, "mine")
    theirs = cohort(("Sub-07", "test", tmp_path), ("9", "test", tmp_path))
    with pytest.warns(Doubt, match=r"cohorts.theirs: names that differ from those of mine's train and val .*: Sub-07;"):
        check_unseen({"mine": table, "theirs": theirs}, dict.fromkeys(("mine", "theirs"), "one"), "mine")
    with warnings.catch_warnings():
        warnings.simplefilter("error", Doubt)  # cohorts of other origins count their people anew
        check_unseen({"mine": table, "theirs": theirs}, {"mine": "one", "theirs": "two"}, "mine")


def write_cohort(folder: Path, ids: list[int], images: tuple[str, ...] = ("a", "b", "c")) -> Path:
    """Write a table of three scans whose label maps have some ids, and its configuration; return the latter."""
    rows = ["scan,subject,split,image,labels"]
    for number, (name, split) in enumerate(zip("abc", ("atlas", "train", "test"), strict=True)):
        image(folder / f"{name}.nii.gz", number)
        labels(folder / f"{name}_labels.nii.gz", ids)
        rows.append(f"{name},{name},{split},{images[number]}.nii.gz,{name}_labels.nii.gz")
    (folder / "mine.csv").write_text("\n".join(rows) + "\n")
    (folder / "mine.yaml").write_text(CONFIGURATION)
    return folder / "mine.yaml"


OASIS28 = load_structures("oasis28").ids


def test_check_refuses_one_file_in_two_splits(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys) -> None:
    monkeypatch.chdir(tmp_path)
    assert main(["check", str(write_cohort(tmp_path, OASIS28))]) == 0
    assert "Warning" not in capsys.readouterr().err
    assert main(["check", str(write_cohort(tmp_path, OASIS28, ("b", "b", "c")))]) == 1
    error = capsys.readouterr().err
    assert "one file in several splits: mine: a (atlas), mine: b (train)" in error and "Traceback" not in error
    table = (tmp_path / "mine.csv").read_text().replace("\nb,b,", "\nb,007,").replace("\nc,c,", "\nc,7,")
    (tmp_path / "mine.csv").write_text(table.replace("atlas,b.nii", "atlas,a.nii"))
    assert main(["check", "mine.yaml"]) == 0
    assert "Warning: cohorts.mine: subjects whose names differ only by zeros" in capsys.readouterr().err
    for strict in (["check", "mine.yaml", "--strict"], ["check", "strict.yaml"]):
        (tmp_path / "strict.yaml").write_text(CONFIGURATION.replace("none}", "none, strict: true}"))
        assert main(strict) == 1
        assert "subjects whose names differ" in capsys.readouterr().err


# --- structure sets that do not fit ---


@pytest.mark.parametrize("name", structure_set_names())
def test_every_structure_set_fits_itself_and_is_found_from_its_ids(name: str) -> None:
    ids = load_structures(name).ids
    assert misfit(ids, load_structures(name)) == ""
    assert misfit(ids[: -(len(ids) // 3) or None], load_structures(name)) == ""
    others = [other for other in structure_set_names() if not set(load_structures(other).ids) & set(ids)]
    for other in others:
        assert f"the ids fit structures: {name}" in misfit(ids, load_structures(other))


@pytest.mark.parametrize("name", label_map_names())
def test_the_map_from_the_labels_to_the_set_is_named(name: str) -> None:
    structures = load_structures(name.partition("_to_")[2])
    ids = sorted(load_label_map(name))
    assert misfit(ids, structures, load_label_map(name)) == ""
    told = misfit(ids, structures)
    assert told == "" or f"label_map: {name}" in told or "the ids fit" not in told


def test_a_few_of_the_structures_are_told_and_not_refused(tmp_path: Path) -> None:
    path = labels(tmp_path / "two.nii.gz", [2, 41])
    with pytest.warns(Doubt, match="26 of the 28 structures of oasis28 absent; used as it is"):
        assert set(np.unique(read_structures(path, "oasis28").data)) == {0, 2, 41}


def test_labels_of_another_scheme_are_refused_where_they_enter(tmp_path: Path) -> None:
    path = labels(tmp_path / "other.nii.gz", [1, 20])
    with pytest.raises(InputError, match=r"oasis28 does not know \(1, 20\); the ids fit structures: seg35, or label_"):
        read_structures(path, "oasis28")
    with pytest.warns(Doubt, match="26 of the 28 structures of oasis28 absent; used as it is"):
        mapped = read_structures(path, "oasis28", "seg35_to_oasis28")
    assert {load_label_map("seg35_to_oasis28")[number] for number in (1, 20)} == set(np.unique(mapped.data)) - {0}


def test_most_labels_unknown_names_what_knows_them(tmp_path: Path) -> None:
    path = labels(tmp_path / "aparc.nii.gz", [2, 41, 10, 49, *load_structures("dk112").ids[20:]])
    with pytest.warns(
        Doubt, match="labels unknown .*; the ids fit structures: dk112, or label_map: aparc.aseg_to_oasis28"
    ):
        read_structures(path, "oasis28")


def test_check_names_the_set_that_fits(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys) -> None:
    monkeypatch.chdir(tmp_path)
    assert main(["check", str(write_cohort(tmp_path, list(range(1, 36))))]) == 0
    told = capsys.readouterr().err
    assert told.count("the ids fit structures: seg35, or label_map: seg35_to_oasis28; used as it is") == 2
    assert main(["check", str(write_cohort(tmp_path, [1, 20]))]) == 1
    assert "the ids fit structures: seg35" in capsys.readouterr().err


def test_score_says_first_that_the_structure_set_is_another(tmp_path: Path, capsys) -> None:
    save_field(tmp_path / "zero.nii.gz", np.zeros((3, 12, 12, 12), np.float32), np.eye(4))
    other = labels(tmp_path / "other.nii.gz", [1, 20])
    command = ["score", "--field", str(tmp_path / "zero.nii.gz"), "--fixed-labels", str(other)]
    command += ["--moving-labels", str(other), "--structures"]
    assert main([*command, "oasis28"]) == 1
    told = capsys.readouterr()
    assert (
        told.out == "" and "28 of the 28 structures of oasis28 absent and 2 of its 2 labels unknown (1, 20)" in told.err
    )
    assert "the ids fit structures: seg35" in told.err
    assert main([*command, "seg35"]) == 0
    told = capsys.readouterr()
    assert "33 of the 35 structures of seg35 absent" in told.err and "1.0000" in told.out


def test_the_table_of_three_splits_is_refused(tmp_path: Path) -> None:
    """As people wrote it: one file for 7, 007 and sub-7, in train, test and val."""
    image(tmp_path / "M.nii.gz", 1), image(tmp_path / "F.nii.gz", 2), labels(tmp_path / "L.nii.gz", OASIS28)
    people = (
        ("a", "at", "atlas", "M"),
        ("b", "7", "train", "F"),
        ("c", "007", "test", "F"),
        ("d", "sub-7", "val", "F"),
    )
    rows = [f"{scan},{subject},{split},{name}.nii.gz,L.nii.gz" for scan, subject, split, name in people]
    (tmp_path / "mine.csv").write_text("\n".join(["scan,subject,split,image,labels", *rows]) + "\n")
    table = scan_table("table", path=tmp_path / "mine.csv")
    with pytest.raises(InputError, match=r"mine: b \(train\), mine: c \(test\), mine: d \(val\)"):
        require_distinct({"mine": table}, "mine")
