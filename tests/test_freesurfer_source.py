"""What FreeSurfer and FastSurfer leave behind, as small trees of the same shape: what is listed, what is refused."""

from __future__ import annotations

import functools
from pathlib import Path

import nibabel as nib
import numpy as np
import pytest

from dmir.cohorts import freesurfer
from dmir.cohorts.sources import recognised
from dmir.errors import InputError
from dmir.structures import load_label_map, remap_labels
from dmir.volumes import read_image, read_labels, read_mask, same_grid

DATA = Path(__file__).parents[2] / "shared" / "data" / "oasis_manual" / "1000"
CONFORMED = np.array([[-1.0, 0, 0, 128], [0, 0, 1, -128], [0, -1, 0, 128], [0, 0, 0, 1]])
FREESURFER = (
    *("rawavg", "orig", "nu", "T1", "brainmask", "norm", "brain", "brain.finalsurfs", "aseg", "aparc+aseg"),
    *("aparc.DKTatlas+aseg", "aparc.a2009s+aseg", "wmparc", "ribbon"),
)
FASTSURFER_SEG_ONLY = ("orig", "orig_nu", "mask", "aseg.auto_noCCseg", "aparc.DKTatlas+aseg.deep")
FASTSURFER_SURFACES = (
    *(*FASTSURFER_SEG_ONLY, "nu", "T1", "norm", "brain", "brain.finalsurfs", "aseg", "aseg.auto"),
    *("aparc.DKTatlas+aseg.deep.withCC", "aparc.DKTatlas+aseg.mapped", "brainmask", "wmparc.DKTatlas.mapped"),
)


@functools.cache
def brain() -> tuple[np.ndarray, np.ndarray]:
    """Return a stripped image (uint8) and FreeSurfer ids, every eighth voxel of a real scan where there is one."""
    if DATA.is_dir():
        image, labels = (
            np.asarray(nib.load(DATA / f"1000_{name}.nii.gz").dataobj)[::8, ::8, ::8]
            for name in ("T1w_brain", "labels")
        )
        ids = remap_labels(labels, load_label_map("neuromorphometrics_to_oasis28"))
        return np.ceil(image / image.max() * 110).astype(np.uint8), ids
    generator = np.random.default_rng(0)
    ids = generator.choice([0, 2, 41, 10, 49, 1012, 2035], (21, 27, 21)).astype(np.int32)
    return np.where(ids > 0, 80, 0).astype(np.uint8), ids


def subject(folder: Path, volumes=FREESURFER, ending: str = ".mgz") -> Path:
    """Build a subject's folder with empty volumes, and return its mri/."""
    for part in ("label", "mri/orig", "mri/transforms", "scripts", "stats", "surf", "tmp", "touch"):
        (folder / part).mkdir(parents=True, exist_ok=True)
    (folder / "mri" / "orig" / "001.mgz").touch()
    (folder / "mri" / "transforms" / "talairach.xfm").touch()
    for volume in volumes:
        (folder / "mri" / f"{volume}{ending}").touch()
    return folder / "mri"


def refusal(folder: Path, **options) -> str:
    """Return what a folder is refused with."""
    with pytest.raises(InputError) as caught:
        freesurfer.scan_table(folder, **options)
    return str(caught.value)


def files(folder: Path, **options) -> list[tuple[str, str, str]]:
    """Return the names of each scan's image, labels and mask."""
    table = freesurfer.scan_table(folder, **options)
    assert all(Path(path).is_file() for column in ("image", "labels", "mask") for path in table[column] if path)
    return [
        tuple(Path(path).name for path in row) for row in table[["image", "labels", "mask"]].itertuples(index=False)
    ]


def test_scans_of_a_subjects_dir_are_listed_by_name(tmp_path: Path) -> None:
    for name in ("sub-02_ses-1", "OAS1_0061_MR2", "bert", "OAS1_0061_MR1"):
        subject(tmp_path / name)
    (tmp_path / "sample-001.mgz").touch()
    table = freesurfer.scan_table(tmp_path)
    assert set(table.columns) == {"scan", "subject", "session", "age", "image", "labels", "mask", "source_id"}
    assert list(table["scan"]) == list(table["source_id"]) == ["OAS1_0061_MR1", "OAS1_0061_MR2", "bert", "sub-02_ses-1"]
    assert list(table["subject"]) == ["OAS1_0061", "OAS1_0061", "bert", "sub-02"]
    assert list(table["session"]) == ["MR1", "MR2", "", "ses-1"]
    assert set(table["age"]) == {""}
    assert table["image"][2] == str(tmp_path / "bert" / "mri" / "orig.mgz")
    assert table["labels"][2] == str(tmp_path / "bert" / "mri" / "aparc+aseg.mgz")
    assert table["mask"][2] == str(tmp_path / "bert" / "mri" / "brainmask.mgz")


def test_what_freesurfer_puts_there_itself_is_left_out(tmp_path: Path) -> None:
    for name in (
        "fsaverage",
        "fsaverage5",
        "fsaverage_sym",
        "lh.EC_average",
        "rh.EC_average",
        "V1_average",
        "cvs_avg35",
    ):
        subject(tmp_path / name)
    subject(tmp_path / ".trash")
    (tmp_path / "logs").mkdir()
    assert not recognised("freesurfer", tmp_path)
    subject(tmp_path / "bert")
    assert list(freesurfer.scan_table(tmp_path)["scan"]) == ["bert"]


def test_image_labels_and_mask_are_on_one_grid(tmp_path: Path) -> None:
    image, ids = brain()
    mri = subject(tmp_path / "bert")
    head = np.where(image > 0, image, 5)
    for name, data in (("orig", head), ("aparc+aseg", ids.astype(np.int32)), ("brainmask", image)):
        nib.save(nib.MGHImage(data, CONFORMED), mri / f"{name}.mgz")
    row = freesurfer.scan_table(tmp_path).iloc[0]
    read, labels, mask = read_image(row["image"]), read_labels(row["labels"]), read_mask(row["mask"])
    assert read.orientation == "LIA"
    assert same_grid(read, labels)
    assert same_grid(read, mask)
    assert np.array_equal(read.data, head)
    assert np.array_equal(labels.data, ids)
    assert np.array_equal(mask.data, image > 0)


def test_fastsurfer_without_surfaces(tmp_path: Path) -> None:
    for name in ("a", "b"):
        subject(tmp_path / name, FASTSURFER_SEG_ONLY)
    assert files(tmp_path) == [("orig.mgz", "aparc.DKTatlas+aseg.deep.mgz", "mask.mgz")] * 2


def test_fastsurfer_with_surfaces_links_its_labels_to_freesurfers_name(tmp_path: Path) -> None:
    mri = subject(tmp_path / "a", FASTSURFER_SURFACES)
    (mri / "aparc+aseg.mgz").symlink_to("aparc.DKTatlas+aseg.mapped.mgz")
    assert files(tmp_path) == [("orig.mgz", "aparc+aseg.mgz", "brainmask.mgz")]
    (mri / "aparc+aseg.mgz").unlink()  # links get lost in copies
    assert files(tmp_path) == [("orig.mgz", "aparc.DKTatlas+aseg.mapped.mgz", "brainmask.mgz")]
    (mri / "aparc+aseg.mgz").symlink_to("elsewhere.mgz")
    assert files(tmp_path)[0][1] == "aparc.DKTatlas+aseg.mapped.mgz"


def test_all_label_maps_are_made_in_the_same_way(tmp_path: Path) -> None:
    """Labels before and after the surfaces differ along the cortex: they do not stand for each other unasked."""
    subject(tmp_path / "a", FASTSURFER_SURFACES)
    subject(tmp_path / "b", FASTSURFER_SEG_ONLY)
    text = refusal(tmp_path)
    assert "1 of 2 scans unfinished: b (no aparc.DKTatlas+aseg.mapped)" in text
    assert "name labels that all have (aparc.DKTatlas+aseg.deep)" in text
    chosen = files(tmp_path, labels="aparc.DKTatlas+aseg.deep")
    assert [labels for _, labels, _ in chosen] == ["aparc.DKTatlas+aseg.deep.mgz"] * 2


@pytest.mark.parametrize("name", ["aparc.a2009s+aseg", "aparc.a2009s+aseg.mgz"])
def test_labels_may_be_another_volume(tmp_path: Path, name: str) -> None:
    subject(tmp_path / "a")
    assert files(tmp_path, labels=name) == [("orig.mgz", "aparc.a2009s+aseg.mgz", "brainmask.mgz")]


@pytest.mark.parametrize(
    ("image", "mask"), [("T1", "brainmask.mgz"), ("norm", ""), ("brain", ""), ("brain.finalsurfs", "")]
)
def test_stripped_images_need_no_mask(tmp_path: Path, image: str, mask: str) -> None:
    subject(tmp_path / "a")
    assert files(tmp_path, image=image) == [(f"{image}.mgz", "aparc+aseg.mgz", mask)]
    for name in freesurfer.MASKS:
        (tmp_path / "a" / "mri" / f"{name}.mgz").unlink(missing_ok=True)
    if mask:
        assert "a (no brainmask or mask)" in refusal(tmp_path, image=image)
    else:
        assert files(tmp_path, image=image) == [(f"{image}.mgz", "aparc+aseg.mgz", "")]


@pytest.mark.parametrize(("key", "name", "meant"), [("image", "nrom", "norm"), ("labels", "aparc.aseg", "aparc+aseg")])
def test_volume_misspelt(tmp_path: Path, key: str, name: str, meant: str) -> None:
    subject(tmp_path / "a")
    text = refusal(tmp_path, **{key: name})
    assert text.startswith(f"{key}: {tmp_path}: found '{name}'")
    assert f"Did you mean '{meant}'?" in text


def test_nifti_is_accepted_and_mgz_goes_first(tmp_path: Path) -> None:
    mri = subject(tmp_path / "a", ending=".nii.gz")
    assert files(tmp_path) == [("orig.nii.gz", "aparc+aseg.nii.gz", "brainmask.nii.gz")]
    (mri / "orig.mgz").touch()
    assert files(tmp_path)[0][0] == "orig.mgz"


def test_unfinished_scans_are_counted_and_the_first_ten_named(tmp_path: Path) -> None:
    for number in range(1, 21):
        mri = subject(tmp_path / f"s{number:02d}")
        if number > 7:
            (mri / "aparc+aseg.mgz").unlink()
    subject(tmp_path / "s08", volumes=())
    (tmp_path / "s09" / "mri" / "brainmask.mgz").unlink()
    text = refusal(tmp_path)
    assert "13 of 20 scans unfinished: s08 (no aparc+aseg), s09 (no aparc+aseg, no brainmask or mask), s10" in text
    assert "s17 (no aparc+aseg), ..." in text
    assert "s18" not in text


def test_nothing_finished_at_all(tmp_path: Path) -> None:
    for name in ("a", "b"):
        subject(tmp_path / name, volumes=())
    assert "2 of 2 scans unfinished: a (no orig, no aparc+aseg, no brainmask or mask), b" in refusal(tmp_path)


def test_longitudinal_scans_are_of_one_person_and_templates_are_left_out(tmp_path: Path) -> None:
    for name in ("anna_1", "anna_2", "anna_1.long.anna", "anna_2.long.anna", "anna", "bert"):
        subject(tmp_path / name)
    for name in ("OAS1_0080_MR2.long.base80", "carl_1.long.carl", "carl_2.long.carl"):  # no template beside them
        subject(tmp_path / name)
    (tmp_path / "anna" / "base-tps").write_text("anna_1\nanna_2\n")
    table = freesurfer.scan_table(tmp_path).set_index("scan")
    assert dict(table["subject"]) == {
        "anna_1": "anna",
        "anna_1.long.anna": "anna",
        "anna_2": "anna",
        "anna_2.long.anna": "anna",
        "bert": "bert",
        "carl_1.long.carl": "carl",
        "carl_2.long.carl": "carl",
        "OAS1_0080_MR2.long.base80": "OAS1_0080",
    }
    assert table["session"]["OAS1_0080_MR2.long.base80"] == "MR2"


def test_fastsurfers_time_points_are_of_one_person_and_listed_once(tmp_path: Path) -> None:
    """It keeps them under their own names; people link FreeSurfer's names to them."""
    for name in ("anna_1", "anna_2", "anna"):
        subject(tmp_path / name, FASTSURFER_SEG_ONLY)
    (tmp_path / "anna" / "base-tps.fastsurfer").write_text("anna_1\nanna_2\n")
    (tmp_path / "anna_1.long.anna").symlink_to("anna_1")
    table = freesurfer.scan_table(tmp_path)
    assert list(table["scan"]) == ["anna_1", "anna_2"]
    assert list(table["subject"]) == ["anna", "anna"]


def test_scans_may_lie_in_discs_once(tmp_path: Path) -> None:
    subject(tmp_path / "disc2" / "OAS1_0001_MR1")
    subject(tmp_path / "disc1" / "OAS1_0043_MR1")
    assert list(freesurfer.scan_table(tmp_path)["scan"]) == ["OAS1_0001_MR1", "OAS1_0043_MR1"]
    subject(tmp_path / "disc3" / "OAS1_0001_MR1")
    text = refusal(tmp_path)
    assert f"{tmp_path / 'disc2' / 'OAS1_0001_MR1'} and {tmp_path / 'disc3' / 'OAS1_0001_MR1'}" in text


def test_other_layout_is_answered_with_its_source(tmp_path: Path) -> None:
    (tmp_path / "OASIS_OAS1_0001_MR1").mkdir()
    assert "It looks like neurite_oasis: name that as the source." in refusal(tmp_path)


def test_folder_that_is_missing_or_empty_is_answered_with_what_to_get(tmp_path: Path) -> None:
    nowhere = tmp_path / "nowhere"
    assert freesurfer.WHERE.replace("<folder>", str(nowhere)) in refusal(nowhere)
    what = freesurfer.WHERE.replace("<folder>", str(tmp_path))
    assert f"an empty folder); expected a folder as the source freesurfer has it. {what}" in refusal(tmp_path)
