"""BIDS trees and what pipelines add to them, in small trees of the same shape: what is listed, what is refused."""

from __future__ import annotations

import functools
import json
import warnings
from pathlib import Path

import numpy as np
import pytest

from dmir.cohorts import bids
from dmir.cohorts import table as tables
from dmir.doubts import Doubt
from dmir.errors import InputError
from dmir.structures import load_label_map, remap_labels
from dmir.volumes import Volume, read_image, read_labels, read_mask, same_grid, write_volume

DATA = Path(__file__).parents[2] / "shared" / "data" / "oasis_manual" / "1000"
FMRIPREP = (
    *("desc-preproc_T1w", "desc-brain_mask", "dseg", "desc-aseg_dseg", "desc-aparcaseg_dseg", "label-GM_probseg"),
    *("space-MNI152NLin2009cAsym_desc-preproc_T1w", "space-MNI152NLin2009cAsym_desc-brain_mask"),
    *("space-MNI152NLin2009cAsym_dseg", "space-MNI152NLin2009cAsym_res-2_desc-aparcaseg_dseg"),
)


@pytest.fixture(autouse=True)
def only_own_sources(monkeypatch: pytest.MonkeyPatch) -> None:
    """The messages must not depend on which other sources there are."""
    monkeypatch.setattr(
        "dmir.cohorts.sources.SOURCES", {name: f"dmir.cohorts.{name}" for name in ("table", "lpba40", "ixi", "bids")}
    )


@functools.cache
def brain() -> tuple[Volume, Volume, Volume]:
    """Return image, ids and mask: every eighth voxel of a real scan where there is one."""
    if DATA.is_dir():
        image, labels = read_image(DATA / "1000_T1w_brain.nii.gz"), read_labels(DATA / "1000_labels.nii.gz")
        affine = image.affine @ np.diag([8.0, 8, 8, 1])
        ids = remap_labels(labels.data[::8, ::8, ::8], load_label_map("neuromorphometrics_to_oasis28"))
        return Volume(image.data[::8, ::8, ::8], affine), Volume(ids, affine), Volume(ids > 0, affine)
    ids = np.random.default_rng(0).choice([0, 2, 3, 41, 42], (20, 24, 20)).astype(np.int32)
    return Volume(ids * 10.0, np.eye(4)), Volume(ids, np.eye(4)), Volume(ids > 0, np.eye(4))


def touch(folder: Path, *names: str) -> Path:
    """Make empty files anat/sub-..., each in the folder that its own name says; return the folder."""
    for name in names:
        folders = [part for part in name.split("_") if part.startswith(("sub-", "ses-"))]
        path = folder.joinpath(*folders, "anat", f"{name}.nii.gz")
        path.parent.mkdir(parents=True, exist_ok=True)
        path.touch()
    return folder


def files(table, scan: str, folder: Path) -> tuple[str, ...]:
    """Return image, labels and mask of a scan, from the folder."""
    row = table.set_index("scan").loc[scan]
    return tuple(row[key] and str(Path(row[key]).relative_to(folder)) for key in ("image", "labels", "mask"))


def refusal(folder: Path, **options) -> str:
    """Return what a folder is refused with."""
    with pytest.raises(InputError) as caught:
        bids.scan_table(folder, **options)
    return str(caught.value)


def test_raw_scans_are_listed_with_subject_session_and_age(tmp_path: Path) -> None:
    touch(tmp_path, "sub-02_T1w", "sub-01_ses-b_T1w", "sub-01_ses-a_run-2_T1w", "sub-01_ses-a_run-1_T1w")
    touch(tmp_path, "sub-02_T2w", "sub-02_acq-hi_T1w", "sub-02_desc-defaced_T1w")
    (tmp_path / "sub-03" / "func").mkdir(parents=True)
    (tmp_path / "participants.tsv").write_text("participant_id\tsex\tage\nsub-01\tF\t34.5\nsub-02\tM\tn/a\n")
    table = bids.scan_table(tmp_path, every="image")
    assert list(table["scan"]) == [
        "sub-01_ses-a_run-1",
        "sub-01_ses-a_run-2",
        "sub-01_ses-b",
        "sub-02",
        "sub-02_acq-hi",
    ]
    assert list(table["source_id"]) == list(table["scan"])
    assert list(table["subject"]) == ["sub-01"] * 3 + ["sub-02"] * 2
    assert list(table["session"]) == ["ses-a", "ses-a", "ses-b", "", ""]
    assert list(table["age"]) == ["34.5"] * 3 + [""] * 2
    assert files(table, "sub-01_ses-b", tmp_path) == ("sub-01/ses-b/anat/sub-01_ses-b_T1w.nii.gz", "", "")
    assert "split" not in table


def test_what_a_pipeline_made_is_taken_together(tmp_path: Path) -> None:
    touch(tmp_path, "sub-01_T1w", "sub-02_T1w")
    made = touch(tmp_path / "derivatives" / "fmriprep", *(f"sub-01_{name}" for name in FMRIPREP))
    table = bids.scan_table(tmp_path)
    assert files(table, "sub-01", made / "sub-01" / "anat") == (
        "sub-01_desc-preproc_T1w.nii.gz",
        "sub-01_desc-aparcaseg_dseg.nii.gz",
        "sub-01_desc-brain_mask.nii.gz",
    )
    assert files(table, "sub-02", tmp_path) == ("sub-02/anat/sub-02_T1w.nii.gz", "", "")


def test_a_pipelines_folder_by_itself(tmp_path: Path) -> None:
    made = touch(tmp_path / "fmriprep", *(f"sub-01_{name}" for name in FMRIPREP))
    (made / "dataset_description.json").write_text("{}")
    table = bids.scan_table(made)
    assert files(table, "sub-01", made / "sub-01" / "anat") == (
        "sub-01_desc-preproc_T1w.nii.gz",
        "sub-01_desc-aparcaseg_dseg.nii.gz",
        "sub-01_desc-brain_mask.nii.gz",
    )


@pytest.mark.parametrize(
    ("there", "taken"),
    [
        (("dseg", "desc-aseg_dseg", "desc-aparcaseg_dseg", "desc-manual_dseg"), "desc-aparcaseg_dseg"),
        (("dseg", "desc-aseg_dseg", "desc-manual_dseg"), "desc-aseg_dseg"),
        (("dseg", "desc-manual_dseg"), "dseg"),
        (("desc-manual_dseg",), "desc-manual_dseg"),
        (("space-T1w_dseg", "space-MNI152NLin6Asym_desc-aseg_dseg"), "space-T1w_dseg"),
        (("space-orig_desc-aseg_dseg", "dseg"), "space-orig_desc-aseg_dseg"),
        (("res-2_desc-aseg_dseg", "space-T1w_res-2_dseg", "space-fsaverage_dseg"), None),
    ],
)
def test_the_best_label_map_on_the_scans_grid_is_taken(tmp_path: Path, there: tuple[str, ...], taken: str) -> None:
    touch(tmp_path, "sub-01_T1w")
    touch(tmp_path / "derivatives" / "manual", *(f"sub-01_{name}" for name in there))
    labels = f"derivatives/manual/sub-01/anat/sub-01_{taken}.nii.gz" if taken else ""
    assert files(bids.scan_table(tmp_path), "sub-01", tmp_path) == ("sub-01/anat/sub-01_T1w.nii.gz", labels, "")


def test_label_maps_and_masks_of_the_raw_image_go_with_the_raw_image(tmp_path: Path) -> None:
    """Another pipeline's preprocessed image and its mask lie on another grid."""
    touch(tmp_path, "sub-01_T1w")
    touch(tmp_path / "derivatives" / "fmriprep", "sub-01_desc-preproc_T1w", "sub-01_desc-brain_mask")
    touch(tmp_path / "derivatives" / "manual", "sub-01_dseg")
    taken = ("sub-01/anat/sub-01_T1w.nii.gz", "derivatives/manual/sub-01/anat/sub-01_dseg.nii.gz")
    assert files(bids.scan_table(tmp_path), "sub-01", tmp_path) == (*taken, "")
    touch(tmp_path / "derivatives" / "masks", "sub-01_desc-brain_mask")
    mask = "derivatives/masks/sub-01/anat/sub-01_desc-brain_mask.nii.gz"
    assert files(bids.scan_table(tmp_path), "sub-01", tmp_path) == (*taken, mask)


def test_without_label_maps_the_image_goes_with_the_mask(tmp_path: Path) -> None:
    touch(tmp_path, "sub-01_T1w", "sub-02_T1w")
    made = tmp_path / "derivatives" / "smriprep"
    touch(made, "sub-01_desc-preproc_T1w", "sub-01_desc-brain_mask", "sub-02_desc-preproc_T1w")
    table = bids.scan_table(tmp_path)
    image, mask = "sub-01_desc-preproc_T1w.nii.gz", "sub-01_desc-brain_mask.nii.gz"
    assert files(table, "sub-01", made / "sub-01" / "anat") == (image, "", mask)
    assert files(table, "sub-02", tmp_path) == ("sub-02/anat/sub-02_T1w.nii.gz", "", "")


def test_each_run_gets_its_own_label_map(tmp_path: Path) -> None:
    scans = ("sub-01_ses-a_run-1", "sub-01_ses-a_run-2", "sub-01_ses-b")
    touch(tmp_path, *(f"{scan}_T1w" for scan in scans))
    made = touch(tmp_path / "derivatives" / "x", *(f"{scan}_dseg" for scan in scans))
    table = bids.scan_table(tmp_path, every="image").set_index("scan")
    for scan in scans:
        assert table.loc[scan, "labels"] == str(made / f"sub-01/{scan.split('_')[1]}/anat/{scan}_dseg.nii.gz")


def test_names_of_a_pipeline_may_say_less_where_one_scan_alone_is_meant(tmp_path: Path) -> None:
    touch(tmp_path, "sub-01_acq-mprage_run-1_T1w")
    touch(tmp_path / "derivatives" / "x", "sub-01_dseg")
    assert list(bids.scan_table(tmp_path)["labels"]) == [str(tmp_path / "derivatives/x/sub-01/anat/sub-01_dseg.nii.gz")]
    touch(tmp_path, "sub-01_acq-mprage_run-2_T1w")
    text = refusal(tmp_path)
    assert "sub-01_dseg.nii.gz may be of any of these scans" in text
    assert "run-1_T1w.nii.gz and " in text and "run-2_T1w.nii.gz" in text


def test_an_average_of_runs_or_sessions_stands_for_them(tmp_path: Path) -> None:
    touch(tmp_path, "sub-01_ses-a_T1w", "sub-01_ses-b_T1w", "sub-02_ses-a_T1w")
    made = touch(tmp_path / "derivatives" / "fmriprep", *(f"sub-01_{name}" for name in FMRIPREP))
    table = bids.scan_table(tmp_path)
    assert list(table["scan"]) == ["sub-01", "sub-02_ses-a"]
    assert files(table, "sub-01", made / "sub-01" / "anat")[0] == "sub-01_desc-preproc_T1w.nii.gz"
    touch(tmp_path / "derivatives" / "manual", "sub-01_ses-b_dseg")
    assert list(bids.scan_table(tmp_path)["scan"]) == ["sub-01", "sub-01_ses-b", "sub-02_ses-a"]


def test_label_maps_that_fit_equally_well_are_named_and_refused(tmp_path: Path) -> None:
    touch(tmp_path, "sub-01_T1w")
    for pipeline in ("fmriprep", "smriprep"):
        touch(tmp_path / "derivatives" / pipeline, "sub-01_desc-preproc_T1w", "sub-01_desc-aseg_dseg")
    text = refusal(tmp_path)
    assert "fit sub-01 as labels equally well" in text
    assert "fmriprep/sub-01/anat/sub-01_desc-aseg_dseg.nii.gz and " in text
    assert "smriprep/sub-01/anat/sub-01_desc-aseg_dseg.nii.gz" in text
    for pipeline in ("fmriprep", "smriprep"):
        table = bids.scan_table(tmp_path, derivatives=[pipeline])
        assert all(f"derivatives/{pipeline}/" in table.loc[0, column] for column in ("image", "labels"))
    assert files(bids.scan_table(tmp_path, derivatives=[]), "sub-01", tmp_path)[1:] == ("", "")


def test_masks_that_fit_equally_well_are_named_and_refused(tmp_path: Path) -> None:
    touch(tmp_path, "sub-01_T1w")
    for pipeline in ("a", "b"):
        touch(tmp_path / "derivatives" / pipeline, "sub-01_desc-brain_mask")
    assert "fit sub-01 as mask equally well" in refusal(tmp_path)


def test_an_unknown_pipeline(tmp_path: Path) -> None:
    touch(tmp_path, "sub-01_T1w")
    touch(tmp_path / "derivatives" / "fmriprep", "sub-01_dseg")
    assert "Did you mean 'fmriprep'" in refusal(tmp_path, derivatives=["fmriprp"])


def test_what_is_listed_can_be_read_and_lies_on_one_grid(tmp_path: Path) -> None:
    touch(tmp_path, "sub-01_T1w")
    anatomy = tmp_path / "derivatives" / "fmriprep" / "sub-01" / "anat"
    for name, volume in zip(("desc-preproc_T1w", "desc-aseg_dseg", "desc-brain_mask"), brain(), strict=True):
        write_volume(anatomy / f"sub-01_{name}.nii.gz", volume)
    row = bids.scan_table(tmp_path).iloc[0]
    image, labels, mask = read_image(row["image"]), read_labels(row["labels"]), read_mask(row["mask"])
    assert same_grid(image, labels) and same_grid(image, mask)
    np.testing.assert_array_equal(labels.data, brain()[1].data)


def test_files_that_were_not_fetched_are_counted_and_the_first_ten_named(tmp_path: Path) -> None:
    """DataLad leaves links to where the content would be."""
    touch(tmp_path, *(f"sub-{k:02d}_T1w" for k in range(15)))
    for k in range(12):
        path = tmp_path / f"sub-{k:02d}" / "anat" / f"sub-{k:02d}_T1w.nii.gz"
        path.unlink()
        path.symlink_to(tmp_path / ".git" / "annex" / f"{k}.nii.gz")
    text = refusal(tmp_path)
    assert "12 of 15 files missing: sub-00/anat/sub-00_T1w.nii.gz, " in text
    assert "sub-09_T1w" in text and "sub-10_T1w" not in text
    assert "datalad get" in text


def test_one_name_in_two_formats(tmp_path: Path) -> None:
    touch(tmp_path, "sub-01_T1w")
    (tmp_path / "sub-01" / "anat" / "sub-01_T1w.nii").touch()
    text = refusal(tmp_path)
    assert "sub-01_T1w twice" in text
    assert "sub-01_T1w.nii and " in text and "sub-01_T1w.nii.gz" in text


def test_trees_without_scans_and_other_layouts(tmp_path: Path) -> None:
    assert "no such folder" in refusal(tmp_path / "none")
    (tmp_path / "IXI002-Guys-0828-T1.nii.gz").touch()
    assert "looks like ixi" in refusal(tmp_path)
    (tmp_path / "dataset_description.json").write_text("{}")
    assert "no T1 image" in refusal(tmp_path)
    (tmp_path / "freesurfer" / "sub-01" / "mri").mkdir(parents=True)
    assert "another layout (sub-01)" in refusal(tmp_path / "freesurfer")


@pytest.mark.parametrize(
    ("text", "said"),
    [(b"id\tage\nsub-01\t3\n", "the columns id, age"), (b"\xff\xfe\x00\x80", "no table"), (b"", "no table")],
)
def test_unusable_lists_of_participants(tmp_path: Path, text: bytes, said: str) -> None:
    touch(tmp_path, "sub-01_T1w")
    (tmp_path / "participants.tsv").write_bytes(text)
    refused = refusal(tmp_path)
    assert "participants.tsv" in refused and said in refused


def test_participants_without_ages(tmp_path: Path) -> None:
    touch(tmp_path, "sub-01_T1w")
    (tmp_path / "participants.tsv").write_text("participant_id\tsex\nsub-01\tF\n")
    assert list(bids.scan_table(tmp_path)["age"]) == [""]


def test_a_large_tree_is_listed_whole(tmp_path: Path) -> None:
    touch(tmp_path, *(f"sub-{k:03d}_T1w" for k in range(450)))
    names = ("desc-preproc_T1w", "desc-brain_mask", "dseg", "desc-aseg_dseg")
    touch(tmp_path / "derivatives" / "fmriprep", *(f"sub-{k:03d}_{name}" for k in range(450) for name in names))
    assert len(bids.scan_table(tmp_path)) == 450


# --- one scan a session ---


def listed(folder: Path, **options) -> tuple[list[str], str]:
    """Return the names of the scans, and what was told, a line a doubt."""
    with warnings.catch_warnings(record=True) as told:
        warnings.simplefilter("always")
        scans = list(bids.scan_table(folder, **options)["scan"])
    assert all(isinstance(warning.message, Doubt) for warning in told)
    return scans, "\n".join(str(warning.message) for warning in told)


@pytest.mark.parametrize(
    ("there", "taken"),
    [
        (("part-mag", "part-phase", "rec-norm"), "part-mag"),
        (("part-mag", "part-phase"), "part-mag"),
        (("part-real", "part-imag", "part-mag", "part-phase", ""), ""),
        (("rec-norm", ""), ""),
        (("run-10", "run-2"), "run-2"),
        (("run-02", "run-01", "run-10"), "run-01"),
        (("echo-1", "echo-2", ""), ""),
        (("echo-2", "echo-1"), "echo-1"),
        (("inv-1", "inv-2", ""), ""),
        (("ce-gadolinium", ""), ""),
        (("acq-mprage", "acq-highres"), "acq-highres"),
        (("acq-mprage_run-1", "run-2"), "run-2"),
        (("ce-gadolinium_run-1", "acq-mprage_run-2"), "acq-mprage_run-2"),
        (("chunk-1", "chunk-2", "acq-whole"), "acq-whole"),
        (("acq-a_rec-b", "acq-a", "acq-b"), "acq-a"),
    ],
)
def test_one_image_of_a_session_is_the_scan_and_the_others_are_told(tmp_path: Path, there, taken: str) -> None:
    names = ["_".join(filter(None, ("sub-01_ses-1", entities))) for entities in there]
    touch(tmp_path, *(f"{name}_T1w" for name in names), "sub-01_ses-2_T1w", "sub-02_run-3_T1w")
    scans, told = listed(tmp_path)
    chosen = "_".join(filter(None, ("sub-01_ses-1", taken)))
    assert scans == [chosen, "sub-01_ses-2", "sub-02_run-3"]
    assert told.count("\n") == 0 and f"{len(there) - 1} images beside the one that is taken of a session: " in told
    assert all(f"{name}_T1w.nii.gz" in told for name in names if name != chosen)
    assert f"{chosen}_T1w" not in told


def test_phases_and_pieces_are_no_scans_even_where_every_image_is_one(tmp_path: Path) -> None:
    touch(tmp_path, "sub-01_part-mag_T1w", "sub-01_part-phase_T1w", "sub-01_run-1_T1w", "sub-01_chunk-1_T1w")
    scans, told = listed(tmp_path, every="image")
    assert scans == ["sub-01_part-mag", "sub-01_run-1"]
    assert "2 images beside" in told and "part-phase" in told and "chunk-1" in told
    for name in ("part-mag", "run-1"):
        (tmp_path / "sub-01" / "anat" / f"sub-01_{name}_T1w.nii.gz").unlink()
    assert "no T1 image of these entities: sub-01_chunk-1_T1w.nii.gz, sub-01_part-phase" in refusal(tmp_path)


def test_a_user_chooses_by_entities_and_is_told_of_nothing(tmp_path: Path) -> None:
    touch(tmp_path, "sub-01_acq-a_run-1_T1w", "sub-01_acq-b_run-01_T1w", "sub-01_T1w", "sub-02_acq-b_run-1_T1w")
    made = touch(tmp_path / "derivatives" / "x", "sub-01_acq-b_run-01_dseg", "sub-02_dseg")
    assert listed(tmp_path, entities={"acq": "b"}) == (["sub-01_acq-b_run-01", "sub-02_acq-b_run-1"], "")
    assert listed(tmp_path, entities={"acq": "b", "run": "1"})[0] == ["sub-01_acq-b_run-01", "sub-02_acq-b_run-1"]
    assert listed(tmp_path, entities={"acq": ""}) == (["sub-01"], "")
    labels = bids.scan_table(tmp_path, entities={"acq": "b"})["labels"]
    assert list(labels) == [
        str(made / "sub-01/anat/sub-01_acq-b_run-01_dseg.nii.gz"),
        str(made / "sub-02/anat/sub-02_dseg.nii.gz"),
    ]
    assert "no T1 image of these entities" in refusal(tmp_path, entities={"acq": "c"})
    assert "Did you mean 'session'" in refusal(tmp_path, every="sesion")


def test_an_image_with_a_label_map_comes_before_a_plainer_name(tmp_path: Path) -> None:
    touch(tmp_path, "sub-01_T1w", "sub-01_run-2_T1w")
    touch(tmp_path / "derivatives" / "manual", "sub-01_run-2_dseg")
    assert listed(tmp_path)[0] == ["sub-01_run-2"]


def test_label_maps_may_name_their_segmentation(tmp_path: Path) -> None:
    touch(tmp_path, "sub-01_T1w")
    touch(tmp_path / "derivatives" / "x", "sub-01_seg-aparcaseg_dseg", "sub-01_atlas-AAL_dseg", "sub-01_hemi-L_dseg")
    assert files(bids.scan_table(tmp_path), "sub-01", tmp_path)[1].endswith("sub-01_seg-aparcaseg_dseg.nii.gz")


# --- whose ages ---


def ages(folder: Path, participants: str, *names: str) -> tuple[dict[str, str], str]:
    """Return scan -> age, where it is known, and what was told."""
    touch(folder, *(f"{name}_T1w" for name in names))
    (folder / "participants.tsv").write_text(participants)
    with warnings.catch_warnings(record=True) as told:
        warnings.simplefilter("always")
        table = bids.scan_table(folder)
    found = {scan: age for scan, age in zip(table["scan"], table["age"], strict=True) if age}
    return found, "\n".join(str(warning.message) for warning in told)


def test_participants_are_found_by_names_that_differ_by_zeros_or_sub(tmp_path: Path) -> None:
    text = "participant_id\tage\n01\t20\n50772\t33\nSUB-3\t40\nsub-04\t41\n"
    found, told = ages(tmp_path, text, "sub-01", "sub-0050772", "sub-03", "sub-04", "sub-05")
    assert found == {"sub-01": "20", "sub-0050772": "33", "sub-03": "40", "sub-04": "41"}
    assert "ids of 3 of 5 subjects that differ by zeros, case or 'sub-' ('50772' for sub-0050772)" in told
    assert "no row that is surely one of 1 of 5 subjects (sub-05); their ages are not known" in told


def test_a_name_that_may_be_several_people_is_nobodys(tmp_path: Path) -> None:
    found, told = ages(tmp_path, "participant_id\tage\n1\t20\n01\t30\nsub-2\t40\n", "sub-001", "sub-2", "sub-02")
    assert found == {"sub-2": "40"}
    assert "2 of 3 subjects (sub-001, sub-02)" in told


def test_exact_names_come_first(tmp_path: Path) -> None:
    found, told = ages(tmp_path, "participant_id\tage\nsub-1\t20\nsub-01\t30\n", "sub-1", "sub-01")
    assert (found, told) == ({"sub-1": "20", "sub-01": "30"}, "")


def test_ages_that_are_no_numbers_are_told_and_the_usual_words_for_none_are_not(tmp_path: Path) -> None:
    text = "participant_id\tage\nsub-1\t89+\nsub-2\tn/a\nsub-3\t034Y\nsub-4\t999\nsub-5\t\nsub-6\t7.5\n"
    found, told = ages(tmp_path, text, *(f"sub-{k}" for k in range(1, 7)))
    assert found == {"sub-6": "7.5"}
    assert "3 ages that are no number of years (89+, 034Y, 999); taken as not known" in told


def test_ages_of_sessions(tmp_path: Path) -> None:
    names = ("sub-01_ses-1", "sub-01_ses-02", "sub-02_ses-1", "sub-03_ses-1", "sub-03_ses-2")
    rows = ("01\t1\t20", "sub-01\tses-1\t20", "sub-01\tses-2\t22", "sub-02\tses-1\t30", "sub-02\tses-1\t31")
    rows += ("sub-03\tses-1\t40", "sub-03\tses-2\t41")
    touch(tmp_path, *(f"{name}_T1w" for name in names))
    (tmp_path / "sub-03" / "sub-03_sessions.tsv").write_text("session_id\tage\nses-1\t45\nses-02\t46\n")
    found, told = ages(tmp_path, "\n".join(("participant_id\tsession_id\tage", *rows)) + "\n", *names)
    assert found == {"sub-01_ses-1": "20", "sub-01_ses-02": "22", "sub-03_ses-1": "45", "sub-03_ses-2": "46"}
    assert "several ages (30, 31) in rows of one person or session" in told


@pytest.mark.parametrize(
    ("unit", "age", "said"),
    [
        ("years", "24", ""),
        ("months", "2", "ages in months; turned into years"),
        ("days", "0.0657084", "ages in days; turned into years"),
        ("score", "", "the unit 'score' of ages; the ages are taken as not known"),
    ],
)
def test_ages_have_the_unit_that_the_tree_says(tmp_path: Path, unit: str, age: str, said: str) -> None:
    (tmp_path / "participants.json").write_text(json.dumps({"age": {"Units": unit, "Description": "age"}}))
    found, told = ages(tmp_path, "participant_id\tage\nsub-01\t24\n", "sub-01")
    assert found.get("sub-01", "") == age and said in told and bool(told) == bool(said)


def test_ages_of_a_table_of_files_are_told_too(tmp_path: Path) -> None:
    (tmp_path / "a.nii").touch()
    rows = ("a,a,a.nii,a.nii,89+", "b,b,a.nii,a.nii,n/a", "c,c,a.nii,a.nii,40")
    (tmp_path / "mine.csv").write_text("\n".join(("scan,subject,image,labels,age", *rows)) + "\n")
    with pytest.warns(Doubt, match=r"mine.csv: 1 ages that are no number of years \(89\+\); taken as not known"):
        assert list(tables.scan_table(tmp_path / "mine.csv")["age"]) == ["89+", "n/a", "40"]
