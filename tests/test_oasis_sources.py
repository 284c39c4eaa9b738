"""The three forms of OASIS that people have, as small trees of the published shape: what is listed, what is refused."""

from __future__ import annotations

import functools
import gzip
import json
import shutil
import subprocess
import sys
from pathlib import Path

import nibabel as nib
import numpy as np
import pytest

from dmir.cohorts import learn2reg_oasis, neurite_oasis, oasis1
from dmir.cohorts.sources import recognised
from dmir.errors import InputError
from dmir.volumes import read_image, read_labels, read_mask, same_grid

DATA = Path(__file__).parents[2] / "shared" / "data" / "oasis_manual" / "1000"
COLUMNS = {"scan", "subject", "session", "age", "image", "labels", "mask", "source_id"}
# the header of neurite-OASIS's aligned volumes: axes L, I, A
TALAIRACH = np.array([[-1.0, 0, 0, 80], [0, 0, 1, -112], [0, -1, 0, 96], [0, 0, 0, 1]])


@functools.cache
def brain() -> tuple[np.ndarray, np.ndarray]:
    """Return a stripped image (int16) and labels 0..35, every eighth voxel of a real scan where there is one."""
    if DATA.is_dir():
        image, labels = (nib.load(DATA / f"1000_{name}.nii.gz") for name in ("T1w_brain", "labels"))
        return np.asarray(image.dataobj)[::8, ::8, ::8], np.asarray(labels.dataobj)[::8, ::8, ::8] % 36
    generator = np.random.default_rng(0)
    labels = generator.integers(0, 36, (21, 27, 21))
    return np.where(labels > 0, generator.integers(1, 1900, labels.shape), 0).astype(np.int16), labels


def write_nifti(path: Path, data: np.ndarray, affine: np.ndarray) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    nib.save(nib.Nifti1Image(data, affine), path)


def touch(*paths: Path) -> None:
    for path in paths:
        path.parent.mkdir(parents=True, exist_ok=True)
        path.touch()


def refusal(source, folder: Path, **options) -> str:
    """Return what a folder is refused with."""
    with pytest.raises(InputError) as caught:
        source.scan_table(folder, **options)
    return str(caught.value)


# ------------------------------------------------------------------------------------------------- neurite-OASIS


def neurite_tree(root: Path, numbers: list[int], space: str = "aligned_", listed: bool = True) -> Path:
    """Build the archive's shape with empty files; subjects.txt lists the folders."""
    names = [f"OASIS_OAS1_{number:04d}_MR1" for number in numbers]
    for name in names:
        touch(*(root / name / f"{space}{file}.nii.gz" for file in ("norm", "orig", "seg35", "seg4")))
    if listed:
        (root / "subjects.txt").write_text("".join(f"{name}\n" for name in names))
        touch(*(root / f"{labels}_labels.txt" for labels in ("seg35", "seg4", "seg24")))
    return root


@pytest.mark.parametrize(
    ("options", "image", "labels"),
    [
        ({}, "aligned_norm.nii.gz", "aligned_seg35.nii.gz"),
        ({"labels": "seg4"}, "aligned_norm.nii.gz", "aligned_seg4.nii.gz"),
        ({"space": "native"}, "norm.nii.gz", "seg35.nii.gz"),
        ({"space": "native", "labels": "seg4"}, "norm.nii.gz", "seg4.nii.gz"),
    ],
)
def test_neurite_scans_are_listed_in_the_order_of_their_names(tmp_path: Path, options, image, labels) -> None:
    space = "" if options.get("space") == "native" else "aligned_"
    table = neurite_oasis.scan_table(neurite_tree(tmp_path, [457, 2, 1], space), **options)
    assert set(table.columns) == COLUMNS
    assert list(table["scan"]) == ["OAS1_0001_MR1", "OAS1_0002_MR1", "OAS1_0457_MR1"]
    assert list(table["subject"]) == ["OAS1_0001", "OAS1_0002", "OAS1_0457"]
    assert list(table["source_id"]) == [f"OASIS_{scan}" for scan in table["scan"]]
    assert set(table["session"]) == {"MR1"}
    assert set(table["age"]) == set(table["mask"]) == {""}
    assert table["image"][1] == str(tmp_path / "OASIS_OAS1_0002_MR1" / image)
    assert table["labels"][1] == str(tmp_path / "OASIS_OAS1_0002_MR1" / labels)


def test_neurite_image_and_labels_are_on_one_grid(tmp_path: Path) -> None:
    image, labels = brain()
    folder = neurite_tree(tmp_path, [1]) / "OASIS_OAS1_0001_MR1"
    write_nifti(folder / "aligned_norm.nii.gz", (image / image.max()).astype(np.float32), TALAIRACH)
    write_nifti(folder / "aligned_seg35.nii.gz", labels.astype(np.float32), TALAIRACH)
    row = neurite_oasis.scan_table(tmp_path).iloc[0]
    read, ids = read_image(row["image"]), read_labels(row["labels"])
    assert read.orientation == "LIA"
    assert same_grid(read, ids)
    assert np.array_equal(ids.data, labels)
    assert read.data.max() == 1


def test_neurite_files_missing_are_counted_and_the_first_ten_named(tmp_path: Path) -> None:
    neurite_tree(tmp_path, list(range(1, 21)))
    for number in range(3, 16):
        (tmp_path / f"OASIS_OAS1_{number:04d}_MR1" / "aligned_norm.nii.gz").unlink()
    shutil.rmtree(tmp_path / "OASIS_OAS1_0020_MR1")
    text = refusal(neurite_oasis, tmp_path)
    assert "15 of 40 files missing: OASIS_OAS1_0003_MR1/aligned_norm.nii.gz, OASIS_OAS1_0004_MR1/" in text
    assert "OASIS_OAS1_0012_MR1" in text
    assert "OASIS_OAS1_0013_MR1" not in text


def test_neurite_is_recognised_by_its_list_alone_and_by_its_folders_alone(tmp_path: Path) -> None:
    neurite_tree(tmp_path / "folders", [1, 2], listed=False)
    assert "1 of 1 files missing: subjects.txt" in refusal(neurite_oasis, tmp_path / "folders")
    neurite_tree(tmp_path / "list", [1, 2])
    for number in (1, 2):
        shutil.rmtree(tmp_path / "list" / f"OASIS_OAS1_{number:04d}_MR1")
    assert "4 of 4 files missing" in refusal(neurite_oasis, tmp_path / "list")


def test_neurite_aligned_files_do_not_stand_for_native_ones(tmp_path: Path) -> None:
    text = refusal(neurite_oasis, neurite_tree(tmp_path, [1]), space="native")
    assert "2 of 2 files missing: OASIS_OAS1_0001_MR1/norm.nii.gz, OASIS_OAS1_0001_MR1/seg35.nii.gz" in text


def test_neurite_archive_of_slices_is_answered_with_the_right_archive(tmp_path: Path) -> None:
    neurite_tree(tmp_path, [1, 2], space="slice_")
    assert "the archive neurite-oasis.2d.v1.0.tar has slices only" in refusal(neurite_oasis, tmp_path)


def test_neurite_folders_that_are_not_listed_are_ignored(tmp_path: Path) -> None:
    neurite_tree(tmp_path, [1, 2])
    touch(tmp_path / "OASIS_OAS1_0003_MR1" / "aligned_norm.nii.gz")
    assert len(neurite_oasis.scan_table(tmp_path)) == 2


@pytest.mark.parametrize(
    ("text", "found"),
    [
        ("OASIS_OAS1_0001_MR1\nOASIS_OAS1_0002_MR1\nOASIS_OAS1_0001_MR1\n", "OASIS_OAS1_0001_MR1 more than once"),
        ("OASIS_OAS1_0001_MR1\r\nOASIS_OAS1_00", "'OASIS_OAS1_00'"),
        ("\n", "no scan"),
    ],
)
def test_neurite_list_that_is_damaged(tmp_path: Path, text: str, found: str) -> None:
    neurite_tree(tmp_path, [1, 2])
    (tmp_path / "subjects.txt").write_text(text)
    assert f"subjects.txt: found {found}" in refusal(neurite_oasis, tmp_path)


@pytest.mark.parametrize("options", [{"space": "alinged"}, {"labels": "seg53"}])
def test_neurite_options_misspelt(tmp_path: Path, options: dict[str, str]) -> None:
    ((key, value),) = options.items()
    text = refusal(neurite_oasis, neurite_tree(tmp_path, [1]), **options)
    assert f"{key}: found '{value}'" in text
    assert "Did you mean" in text


# ------------------------------------------------------------------------------------------------- Learn2Reg


def learn2reg_image(number: int, folder: str = "imagesTr") -> str:
    return f"{folder}/OASIS_{number:04d}_0000.nii.gz"


def learn2reg_tree(root: Path, training: list[int], test: list[int] = (), prefix: str = "./") -> Path:
    """Build the archive's shape with empty files; the last training scans are the validation pairs' (two pairs)."""
    touch(*(root / learn2reg_image(n, folder) for n in training for folder in ("imagesTr", "labelsTr", "masksTr")))
    touch(*(root / learn2reg_image(n, "imagesTs") for n in test))
    entry = {"image": "imagesTr", "label": "labelsTr", "mask": "masksTr"}
    first, second, third = training[-3:] if len(training) > 2 else [training[0]] * 3
    pairs = [(second, first), (third, second)]
    description = {
        "name": "OASIS",
        "tensorImageSize": {"0": "3D"},
        "tensorImageShape": {"0": [160, 224, 192]},
        "numTraining": len(training),
        "numTest": len(test),
        "training": [
            {key: prefix + learn2reg_image(n, folder) for key, folder in entry.items()} for n in reversed(training)
        ],
        "test": [prefix + learn2reg_image(n, "imagesTs") for n in test],
        "numRegistration_val": 2,
        "registration_val": [
            {"fixed": prefix + learn2reg_image(fixed), "moving": prefix + learn2reg_image(moving)}
            for moving, fixed in pairs
        ],
    }
    return describe(root, description)


def describe(root: Path, description: dict) -> Path:
    (root / "OASIS_dataset.json").write_text(json.dumps(description, indent=4))
    return root


def described(root: Path) -> dict:
    return json.loads((root / "OASIS_dataset.json").read_text())


@pytest.mark.parametrize("prefix", ["./", "", "/"])
def test_learn2reg_scans_with_labels_are_listed_by_number(tmp_path: Path, prefix: str) -> None:
    table = learn2reg_oasis.scan_table(learn2reg_tree(tmp_path, [1, 2, 395, 396, 397], [415, 416], prefix))
    assert set(table.columns) == COLUMNS
    assert list(table["scan"]) == ["OASIS_0001", "OASIS_0002", "OASIS_0395", "OASIS_0396", "OASIS_0397"]
    assert list(table["scan"]) == list(table["subject"]) == list(table["source_id"])
    for column, folder in (("image", "imagesTr"), ("labels", "labelsTr"), ("mask", "masksTr")):
        assert table[column][3] == str(tmp_path / folder / "OASIS_0396_0000.nii.gz")


def test_learn2reg_validation_pairs_are_those_of_the_description(tmp_path: Path) -> None:
    pairs = learn2reg_oasis.validation_pairs(learn2reg_tree(tmp_path, [1, 2, 395, 396, 397], [415]))
    assert list(pairs.itertuples(index=False, name=None)) == [
        ("OASIS_0396", "OASIS_0395"),
        ("OASIS_0397", "OASIS_0396"),
    ]
    assert list(pairs.columns) == ["moving", "fixed"]
    describe(tmp_path, {**described(tmp_path), "registration_val": []})
    with pytest.raises(InputError, match="no registration_val"):
        learn2reg_oasis.validation_pairs(tmp_path)


def test_learn2reg_scans_of_validation_pairs_are_listed_once_wherever_they_are_described(tmp_path: Path) -> None:
    """Whether ``training`` has the scans of the validation pairs differs between releases."""
    learn2reg_tree(tmp_path, [1, 2, 395, 396, 397])
    inside = learn2reg_oasis.scan_table(tmp_path)
    description = described(tmp_path)
    training = [entry for entry in description["training"] if "_039" not in entry["image"]]
    describe(tmp_path, {**description, "training": training})
    assert learn2reg_oasis.scan_table(tmp_path).equals(inside)


def test_learn2reg_labels_and_masks_that_are_not_told_are_named_like_the_image(tmp_path: Path) -> None:
    learn2reg_tree(tmp_path, [1, 2, 395, 396, 397])
    told = learn2reg_oasis.scan_table(tmp_path)
    description = described(tmp_path)
    describe(tmp_path, {**description, "training": [entry["image"] for entry in description["training"]]})
    assert learn2reg_oasis.scan_table(tmp_path).equals(told)
    shutil.rmtree(tmp_path / "masksTr")
    assert set(learn2reg_oasis.scan_table(tmp_path)["mask"]) == {""}


def test_learn2reg_image_labels_and_mask_are_on_one_grid(tmp_path: Path) -> None:
    image, labels = (np.swapaxes(volume, 1, 2) for volume in brain())
    learn2reg_tree(tmp_path, [1])
    write_nifti(tmp_path / learn2reg_image(1), (image / image.max()).astype(np.float32), np.eye(4))
    write_nifti(tmp_path / learn2reg_image(1, "labelsTr"), labels.astype(np.uint8), np.eye(4))
    write_nifti(tmp_path / learn2reg_image(1, "masksTr"), (image > 0).astype(np.uint8), np.eye(4))
    row = learn2reg_oasis.scan_table(tmp_path).iloc[0]
    read, ids, mask = read_image(row["image"]), read_labels(row["labels"]), read_mask(row["mask"])
    assert same_grid(read, ids)
    assert same_grid(read, mask)
    assert np.array_equal(ids.data, labels)
    assert np.array_equal(mask.data, read.data > 0)


def test_learn2reg_files_missing_are_counted_and_the_first_ten_named(tmp_path: Path) -> None:
    learn2reg_tree(tmp_path, list(range(1, 21)))
    for number in range(1, 14):
        (tmp_path / learn2reg_image(number, "labelsTr")).unlink()
    text = refusal(learn2reg_oasis, tmp_path)
    assert "13 of 60 files missing: labelsTr/OASIS_0001_0000.nii.gz, labelsTr/OASIS_0002" in text
    assert "OASIS_0010_0000.nii.gz, ..." in text


def test_learn2reg_without_its_description_is_recognised_by_its_images(tmp_path: Path) -> None:
    learn2reg_tree(tmp_path, [1, 2])
    (tmp_path / "OASIS_dataset.json").unlink()
    assert "1 of 1 files missing: OASIS_dataset.json" in refusal(learn2reg_oasis, tmp_path)


@pytest.mark.parametrize(
    ("content", "found"),
    [
        (b'{"training": [{"image": "./imagesTr/OASIS_0001', "a file that is no JSON"),
        (b"\x1f\x8b\x08\x00\xff", "a file that is no JSON"),
        (b"", "a file that is no JSON"),
        (b"[]", "no list training"),
        (b'{"name": "OASIS"}', "no list training"),
        (b'{"training": {"0": "a"}}', "no list training"),
        (b'{"training": []}', "no scan in training"),
        (b'{"training": [{"label": "./labelsTr/OASIS_0001_0000.nii.gz"}]}', "{'label': './labelsTr/OASIS_0001"),
        (b'{"training": [{"image": ["a", "b"]}]}', "{'image': ['a', 'b']} in training"),
        (b'{"training": [17]}', "17 in training"),
        (b'{"training": [], "registration_val": [["a", "b"]]}', "['a', 'b'] in registration_val"),
    ],
)
def test_learn2reg_description_that_is_damaged(tmp_path: Path, content: bytes, found: str) -> None:
    learn2reg_tree(tmp_path, [1, 2, 3])
    (tmp_path / "OASIS_dataset.json").write_bytes(content)
    assert f"OASIS_dataset.json: found {found}" in refusal(learn2reg_oasis, tmp_path)


def test_learn2reg_scan_that_is_described_twice(tmp_path: Path) -> None:
    learn2reg_tree(tmp_path, [1, 2, 3])
    description = described(tmp_path)
    describe(tmp_path, {**description, "training": [*description["training"], "imagesTr/OASIS_0002_0000.nii.gz"]})
    assert "found OASIS_0002 more than once" in refusal(learn2reg_oasis, tmp_path)


# ------------------------------------------------------------------------------------------------- OASIS-1


def oasis1_session(session: Path, averaged: int = 4, age: str | None = "74") -> Path:
    """Build a session of the published shape with empty files; ``averaged`` images (3 to 6) made the mean."""
    name, processed = session.name, session / "PROCESSED" / "MPRAGE"
    stem = f"{name}_mpr_n{averaged}_anon"
    for ending in (".hdr", ".img", "_tra_90.gif"):
        touch(
            processed / "T88_111" / f"{stem}_111_t88_gfc{ending}",
            processed / "T88_111" / f"{stem}_111_t88_masked_gfc{ending}",
            processed / "SUBJ_111" / f"{stem}_sbj_111{ending}",
            session / "FSL_SEG" / f"{stem}_111_t88_masked_gfc_fseg{ending}",
            session / "RAW" / f"{name}_mpr-1_anon{ending}",
        )
    touch(processed / "T88_111" / "t4_files" / f"{name}_mpr_n{averaged}_anon_111_t88_gfc_t4.txt")
    if age is not None:
        text = f"SESSION ID:    {name}\n\nAGE:           {age}\nM/F:           F\nHAND:          R\n\nmpr-1\n"
        (session / f"{name}.txt").write_text(text)
    return session


def write_analyze(header: Path, data: np.ndarray) -> None:
    """Write a 16-bit, big-endian Analyze 7.5 pair with an axis of length one, and blanks for the origin."""
    kind = nib.AnalyzeImage.header_class
    empty = kind(endianness=">")
    empty.set_data_dtype(np.int16)
    nib.save(nib.AnalyzeImage(data.astype(np.int16)[..., None], None, empty), header)
    content = bytearray(header.read_bytes())
    content[253:263] = b" " * 9 + b"\0"  # OASIS-1 has blanks where others have the origin
    header.write_bytes(content)
    assert kind(bytes(content), endianness=">")["sizeof_hdr"] == 348


@pytest.mark.parametrize(
    ("version", "image", "labels", "mask"),
    [
        ("masked", "PROCESSED/MPRAGE/T88_111/{}_mpr_n4_anon_111_t88_masked_gfc.hdr", True, ""),
        (
            "atlas",
            "PROCESSED/MPRAGE/T88_111/{}_mpr_n4_anon_111_t88_gfc.hdr",
            True,
            "PROCESSED/MPRAGE/T88_111/{}_mpr_n4_anon_111_t88_masked_gfc.hdr",
        ),
        ("subject", "PROCESSED/MPRAGE/SUBJ_111/{}_mpr_n4_anon_sbj_111.hdr", False, ""),
    ],
)
def test_oasis1_versions_have_the_published_files(tmp_path: Path, version, image, labels, mask) -> None:
    session = oasis1_session(tmp_path / "disc2" / "OAS1_0042_MR1")
    row = oasis1.scan_table(tmp_path, version=version).iloc[0]
    assert set(row.index) == COLUMNS
    assert row["image"] == str(session / image.format(session.name))
    tissues = f"FSL_SEG/{session.name}_mpr_n4_anon_111_t88_masked_gfc_fseg.hdr"
    assert row["labels"] == (str(session / tissues) if labels else "")
    assert row["mask"] == (str(session / mask.format(session.name)) if mask else "")


@pytest.mark.parametrize("disc", ["disc{}", ".", "oasis_cross-sectional_disc{0}/disc{0}"])
def test_oasis1_scans_are_listed_by_name_however_the_discs_are_unpacked(tmp_path: Path, disc: str) -> None:
    for number, disc_number in ((457, 1), (2, 12), (61, 2)):
        oasis1_session(tmp_path / disc.format(disc_number) / f"OAS1_{number:04d}_MR1", averaged=3 + number % 4)
    table = oasis1.scan_table(tmp_path)
    assert list(table["scan"]) == list(table["source_id"]) == ["OAS1_0002_MR1", "OAS1_0061_MR1", "OAS1_0457_MR1"]
    assert ["_n5_" in name for name in table["image"]] == [True, False, False]
    assert all(Path(path).is_file() for column in ("image", "labels") for path in table[column])


def test_oasis1_rescans_share_a_subject(tmp_path: Path) -> None:
    for name in ("OAS1_0061_MR2", "OAS1_0061_MR1", "OAS1_0062_MR1"):
        oasis1_session(tmp_path / "disc2" / name)
    table = oasis1.scan_table(tmp_path)
    assert list(table["scan"]) == ["OAS1_0061_MR1", "OAS1_0061_MR2", "OAS1_0062_MR1"]
    assert list(table["subject"]) == ["OAS1_0061", "OAS1_0061", "OAS1_0062"]
    assert list(table["session"]) == ["MR1", "MR2", "MR1"]


def test_oasis1_ages_are_from_the_table_or_the_sessions_own_text(tmp_path: Path) -> None:
    for number, age in enumerate(("74", "55", "", None), start=1):
        oasis1_session(tmp_path / "disc1" / f"OAS1_{number:04d}_MR1", age=age)
    assert list(oasis1.scan_table(tmp_path)["age"]) == ["74", "55", "", ""]
    table = "ID,M/F,Hand,Age,Educ,SES,MMSE,CDR,eTIV,nWBV,ASF,Delay\n"
    table += "OAS1_0002_MR1,F,R,56,4,1,29,0,1147,0.81,1.531,N/A\nOAS1_0003_MR1,F,R,73,4,3,27,0.5,1454,0.708,1.207,N/A\n"
    (tmp_path / "oasis_cross-sectional.csv").write_text(table)
    assert list(oasis1.scan_table(tmp_path)["age"]) == ["74", "56", "73", ""]
    (tmp_path / "oasis_cross-sectional.csv").write_text("ID;Age\nOAS1_0002_MR1;56\n")
    assert "oasis_cross-sectional.csv: found the columns ID;Age; expected also ID and Age" in refusal(oasis1, tmp_path)


def test_oasis1_files_are_read_as_they_are_published(tmp_path: Path) -> None:
    """Big-endian Analyze with an axis of length one: the values come back, image, mask and tissues on one grid."""
    image, labels = brain()
    head = np.where(image > 0, image, 7)
    session = oasis1_session(tmp_path / "disc1" / "OAS1_0001_MR1")
    row = oasis1.scan_table(tmp_path, version="atlas").iloc[0]
    for path, data in ((row["image"], head), (row["mask"], image), (row["labels"], labels % 4)):
        write_analyze(Path(path), data)
    read, mask, tissues = read_image(row["image"]), read_mask(row["mask"]), read_labels(row["labels"])
    assert read.shape == image.shape
    assert np.array_equal(read.data, head)
    assert np.array_equal(mask.data, image > 0)
    assert np.array_equal(tissues.data, labels % 4)
    assert same_grid(read, mask)
    assert same_grid(read, tissues)
    assert read.orientation == "LAS"
    middle = read.affine @ [*((n - 1) / 2 for n in read.shape), 1]
    assert np.allclose(middle[:3], 0)  # blanks are no origin
    stripped = next((session / "PROCESSED" / "MPRAGE" / "T88_111").glob("*_t88_masked_gfc.hdr"))
    assert oasis1.scan_table(tmp_path, version="masked")["image"][0] == str(stripped)


def test_oasis1_headers_of_the_subjects_own_space_are_not_right() -> None:
    assert oasis1.orientation("subject") == "ASL"
    assert oasis1.orientation("masked") is oasis1.orientation("atlas") is None
    assert oasis1.orientation("subject", freesurfer="subjects") is None


def test_oasis1_files_missing_are_counted_and_the_first_ten_named(tmp_path: Path) -> None:
    for number in range(1, 14):
        oasis1_session(tmp_path / "disc1" / f"OAS1_{number:04d}_MR1")
    for number in range(1, 13):
        shutil.rmtree(tmp_path / "disc1" / f"OAS1_{number:04d}_MR1" / "PROCESSED")
    folder = tmp_path / "disc1" / "OAS1_0013_MR1" / "FSL_SEG"
    next(folder.glob("*.img")).unlink()
    text = refusal(oasis1, tmp_path)
    assert "25 of 52 files missing: disc1/OAS1_0001_MR1/PROCESSED/MPRAGE/T88_111/OAS1_0001_MR1_*_t88_masked_gfc" in text
    assert "OAS1_0005_MR1" in text
    assert "OAS1_0006_MR1" not in text
    for number in range(1, 13):
        shutil.rmtree(tmp_path / "disc1" / f"OAS1_{number:04d}_MR1")
    assert "1 of 4 files missing: disc1/OAS1_0013_MR1/FSL_SEG/OAS1_0013_MR1_mpr_n4_anon_111_t88" in refusal(
        oasis1, tmp_path
    )


def test_oasis1_compressed_images_count_as_there_and_are_read(tmp_path: Path) -> None:
    session = oasis1_session(tmp_path / "OAS1_0001_MR1")
    row = oasis1.scan_table(tmp_path).iloc[0]
    write_analyze(Path(row["image"]), brain()[0])
    for path in list(session.rglob("*.img")):
        path.with_suffix(".img.gz").write_bytes(gzip.compress(path.read_bytes()))
        path.unlink()
    assert oasis1.scan_table(tmp_path).iloc[0].equals(row)
    assert np.array_equal(read_image(row["image"]).data, brain()[0])


def test_oasis1_scan_that_is_there_twice(tmp_path: Path) -> None:
    oasis1_session(tmp_path / "disc1" / "OAS1_0001_MR1", averaged=3)
    oasis1_session(tmp_path / "disc1" / "OAS1_0001_MR1", averaged=4)
    text = refusal(oasis1, tmp_path)
    assert "OAS1_0001_MR1_mpr_n3_anon_111_t88_masked_gfc.hdr and OAS1_0001_MR1_mpr_n4" in text
    oasis1_session(tmp_path / "disc2" / "OAS1_0001_MR1")
    text = refusal(oasis1, tmp_path)
    assert f"OAS1_0001_MR1 in {tmp_path / 'disc1'} and in {tmp_path / 'disc2'}" in text


def test_oasis1_version_misspelt(tmp_path: Path) -> None:
    oasis1_session(tmp_path / "OAS1_0001_MR1")
    assert "version: found 'maskd'" in refusal(oasis1, tmp_path, version="maskd")


def freesurfer_folder(subjects: Path, name: str, lacking: str = "") -> None:
    volumes = {"orig", "T1", "brainmask", "aparc+aseg"} - {lacking}
    touch(*(subjects / name / "mri" / f"{volume}.mgz" for volume in volumes))


@pytest.mark.parametrize("disc", [".", "disc1"])
def test_oasis1_images_and_labels_are_freesurfers_where_it_is_given(tmp_path: Path, disc: str) -> None:
    for number in (1, 2):
        oasis1_session(tmp_path / "oasis" / "disc1" / f"OAS1_{number:04d}_MR1")
        freesurfer_folder(tmp_path / "subjects" / disc, f"OAS1_{number:04d}_MR1")
    freesurfer_folder(tmp_path / "subjects" / disc, "OAS1_0003_MR1", lacking="aparc+aseg")  # not asked for
    freesurfer_folder(tmp_path / "subjects", "fsaverage")
    table = oasis1.scan_table(tmp_path / "oasis", freesurfer=str(tmp_path / "subjects"))
    assert list(table["scan"]) == ["OAS1_0001_MR1", "OAS1_0002_MR1"]
    assert list(table["age"]) == ["74", "74"]
    mri = tmp_path / "subjects" / disc / "OAS1_0002_MR1" / "mri"
    for column, volume in (("image", "orig"), ("labels", "aparc+aseg"), ("mask", "brainmask")):
        assert table[column][1] == str(mri / f"{volume}.mgz")


def test_oasis1_scans_that_freesurfer_has_not_finished_are_counted_and_the_first_ten_named(tmp_path: Path) -> None:
    for number in range(1, 15):
        oasis1_session(tmp_path / "oasis" / "disc1" / f"OAS1_{number:04d}_MR1")
    for number in (3, 14):
        freesurfer_folder(tmp_path / "subjects", f"OAS1_{number:04d}_MR1", lacking="aparc+aseg" if number == 3 else "")
    text = refusal(oasis1, tmp_path / "oasis", freesurfer=tmp_path / "subjects")
    assert (
        "13 of 14 scans unfinished: OAS1_0001_MR1 (no folder), OAS1_0002_MR1 (no folder), OAS1_0003_MR1 (no ap" in text
    )
    assert "OAS1_0010_MR1" in text
    assert "OAS1_0011_MR1" not in text
    assert "a cohort of the source freesurfer" in text
    text = refusal(oasis1, tmp_path / "oasis", freesurfer=tmp_path / "nowhere")
    assert f"{tmp_path / 'nowhere'}: found no such folder" in text


# ------------------------------------------------------------------------------------------------- all of them


TREES = {
    "neurite_oasis": lambda folder: neurite_tree(folder, [1, 2]),
    "learn2reg_oasis": lambda folder: learn2reg_tree(folder, [1, 2, 3]),
    "oasis1": lambda folder: oasis1_session(folder / "disc1" / "OAS1_0001_MR1"),
    "freesurfer": lambda folder: freesurfer_folder(folder / "disc1", "OAS1_0001_MR1"),
}
SOURCES = {"neurite_oasis": neurite_oasis, "learn2reg_oasis": learn2reg_oasis, "oasis1": oasis1}


@pytest.mark.parametrize("tree", TREES)
@pytest.mark.parametrize("source", SOURCES)
def test_other_layout_is_answered_with_its_source(tmp_path: Path, source: str, tree: str) -> None:
    TREES[tree](tmp_path)
    assert recognised(source, tmp_path) == (source == tree)
    if source != tree:
        assert f"It looks like {tree}: name that as the source." in refusal(SOURCES[source], tmp_path)


@pytest.mark.parametrize(("source", "where"), [(name, module.WHERE) for name, module in SOURCES.items()])
def test_folder_that_is_missing_or_empty_is_answered_with_what_to_get(tmp_path: Path, source: str, where: str) -> None:
    nowhere = tmp_path / "nowhere"
    assert where.replace("<folder>", str(nowhere)) in refusal(SOURCES[source], nowhere)
    text = refusal(SOURCES[source], tmp_path)
    assert "an empty folder" in text
    assert where.replace("<folder>", str(tmp_path)) in text


def test_listing_scans_imports_no_heavy_library() -> None:
    code = (
        "import sys; from dmir.cohorts import freesurfer, learn2reg_oasis, neurite_oasis, oasis1;"
        "print([m for m in ('torch', 'scipy.ndimage', 'ants', 'SimpleITK', 'nibabel') if m in sys.modules])"
    )
    result = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert result.stdout.strip() == "[]"
