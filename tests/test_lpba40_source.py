"""LPBA40 as LONI publishes it and as copies have it, in small trees of the same shape: what is listed, what refused."""

from __future__ import annotations

import functools
import gzip
from pathlib import Path

import nibabel as nib
import numpy as np
import pytest

from dmir.cohorts import lpba40
from dmir.errors import InputError
from dmir.structures import load_structures
from dmir.volumes import read_image, read_labels, same_grid, with_orientation

DATA = Path(__file__).parents[2] / "shared" / "data" / "lpba40"
needs_data = pytest.mark.skipif(not DATA.is_dir(), reason="needs ../shared/data/lpba40")
DELINEATION = ("S{:02d}.delineation.skullstripped", "S{:02d}.delineation.structure.label")
NATIVE = ("S{:02d}.native.brain.bfc", "tissue/S{:02d}.native.tissue")


@pytest.fixture(autouse=True)
def only_own_sources(monkeypatch: pytest.MonkeyPatch) -> None:
    """The messages must not depend on which other sources there are."""
    monkeypatch.setattr(
        "dmir.cohorts.sources.SOURCES", {name: f"dmir.cohorts.{name}" for name in ("table", "lpba40", "ixi", "bids")}
    )


@functools.cache
def brain() -> tuple[np.ndarray, np.ndarray]:
    """Return an image (int16) and LPBA40's ids (uint8), every eighth voxel of a real scan where there is one."""
    if DATA.is_dir():
        stem = "S01/S01.delineation"
        image, labels = (
            np.asarray(nib.load(DATA / f"{stem}.{name}.nii.gz").dataobj)[::8, ::8, ::8]
            for name in ("skullstripped", "structure.label")
        )
        return image, labels
    generator = np.random.default_rng(0)
    labels = generator.choice([0, *load_structures("lpba56").ids], (20, 24, 20)).astype(np.uint8)
    return np.where(labels > 0, 500, 0).astype(np.int16), labels


def write(path: Path, data: np.ndarray, ending: str) -> None:
    """Write a volume: as published (Analyze, big-endian, an axis of length one, the image compressed) or as NIfTI."""
    path.parent.mkdir(parents=True, exist_ok=True)
    if ending.startswith(".nii"):
        nib.save(nib.Nifti1Image(data, np.diag([-8.0, -8, 8, 1])), f"{path}{ending}")
        return
    image = nib.AnalyzeImage(data[..., None], np.diag([-8.0, 8, 8, 1]), nib.AnalyzeHeader(endianness=">"))
    nib.save(image, f"{path}.img")
    if ending == ".img.gz":
        plain = path.with_name(f"{path.name}.img")
        path.with_name(f"{path.name}.img.gz").write_bytes(gzip.compress(plain.read_bytes()))
        plain.unlink()


def tree(folder: Path, scans=(1, 2, 3), names=DELINEATION, ending: str = ".img.gz") -> Path:
    """Build a space of LPBA40."""
    for number in scans:
        for name, data in zip(names, brain(), strict=True):
            write(folder / f"S{number:02d}" / name.format(number), data, ending)
    return folder


def refusal(folder: Path, **options) -> str:
    """Return what a folder is refused with."""
    with pytest.raises(InputError) as caught:
        lpba40.scan_table(folder, **options)
    return str(caught.value)


@pytest.mark.parametrize("ending", [".img.gz", ".img", ".nii.gz", ".nii"])
@pytest.mark.parametrize("given", ["", "LPBA40", "LPBA40/delineation_space"])
def test_scans_are_listed_in_every_form_and_place(tmp_path: Path, ending: str, given: str) -> None:
    inside = "" if not given else "LPBA40/delineation_space"
    tree(tmp_path / inside, scans=(40, 1, 12), ending=ending)
    (tmp_path / inside / "lpba40.label.xml").touch()
    table = lpba40.scan_table(tmp_path / given)
    assert list(table["scan"]) == list(table["subject"]) == list(table["source_id"]) == ["S01", "S12", "S40"]
    assert set(table["mask"]) == set(table["session"]) == set(table["age"]) == {""}
    assert table.loc[1, "image"] == str(tmp_path / inside / f"S12/S12.delineation.skullstripped{ending}")
    assert table.loc[1, "labels"] == str(tmp_path / inside / f"S12/S12.delineation.structure.label{ending}")
    assert "split" not in table


@pytest.mark.parametrize("ending", [".img.gz", ".nii.gz"])
def test_what_is_listed_can_be_read_and_lies_on_one_grid(tmp_path: Path, ending: str) -> None:
    row = lpba40.scan_table(tree(tmp_path, ending=ending)).iloc[0]
    image, labels = read_image(row["image"]), read_labels(row["labels"])
    assert same_grid(image, labels)
    assert (image.data == brain()[0]).all()
    assert (labels.data == brain()[1]).all()
    assert set(np.unique(labels.data)) - {0} <= set(load_structures("lpba56").ids)


def test_native_space_has_tissue_classes(tmp_path: Path) -> None:
    tree(tmp_path / "LPBA40" / "delineation_space")
    tree(tmp_path / "LPBA40" / "native_space", scans=(1, 2), names=NATIVE)
    table = lpba40.scan_table(tmp_path / "LPBA40", space="native")
    assert list(table["scan"]) == ["S01", "S02"]
    folder = tmp_path / "LPBA40" / "native_space" / "S02"
    assert table.loc[1, "image"] == str(folder / "S02.native.brain.bfc.img.gz")
    assert table.loc[1, "labels"] == str(folder / "tissue" / "S02.native.tissue.img.gz")
    assert lpba40.scan_table(tmp_path / "LPBA40" / "native_space", space="native").equals(table)
    assert read_image(table.loc[1, "image"]).shape == read_labels(table.loc[1, "labels"]).shape


def test_native_space_of_a_tree_that_has_none(tmp_path: Path) -> None:
    text = refusal(tree(tmp_path), space="native")
    assert "6 of 6 volumes missing: S01/S01.native.brain.bfc, S01/tissue/S01.native.tissue" in text
    assert "LPBA40_Subjects_Native_Space_MRI_data_and_masks.zip" in text


def test_scans_that_lack_a_file_are_counted_and_the_first_ten_named(tmp_path: Path) -> None:
    tree(tmp_path, scans=range(1, 16))
    for number in range(1, 13):
        next((tmp_path / f"S{number:02d}").glob("*label.img.gz")).unlink()
    text = refusal(tmp_path)
    assert "12 of 30 volumes missing: S01/S01.delineation.structure.label, " in text
    assert "S10/S10" in text
    assert "S11/S11" not in text


def test_an_image_without_its_header_is_missing(tmp_path: Path) -> None:
    tree(tmp_path)
    (tmp_path / "S02" / "S02.delineation.skullstripped.hdr").unlink()
    assert "1 of 6 volumes missing: S02/S02.delineation.skullstripped.hdr;" in refusal(tmp_path)


def test_a_volume_in_two_forms_is_refused(tmp_path: Path) -> None:
    tree(tmp_path)
    write(tmp_path / "S02" / "S02.delineation.skullstripped", brain()[0], ".nii.gz")
    text = refusal(tmp_path)
    assert "S02.delineation.skullstripped.nii.gz and S02.delineation.skullstripped.img.gz" in text
    assert "expected one" in text


def test_a_tree_without_scans(tmp_path: Path) -> None:
    (tmp_path / "delineation_space").mkdir()
    assert "no scan in delineation space" in refusal(tmp_path)


def test_a_missing_folder_tells_what_to_get(tmp_path: Path) -> None:
    text = refusal(tmp_path / "LPBA40")
    assert "no such folder" in text
    assert "LPBA40_Subjects_Delineation_Space_MRI_and_label_files.zip" in text


def test_another_layout_is_named(tmp_path: Path) -> None:
    (tmp_path / "IXI002-Guys-0828-T1.nii.gz").touch()
    assert "looks like ixi" in refusal(tmp_path)
    other = tmp_path / "other"
    (other / "S01").mkdir(parents=True)
    (other / "S01" / "T1.nii.gz").touch()  # folders of this name are everywhere
    assert "another layout (S01)" in refusal(other)


def test_a_misspelt_space(tmp_path: Path) -> None:
    assert "Did you mean 'delineation'" in refusal(tree(tmp_path), space="delineaton")


@needs_data
def test_the_copies_are_listed() -> None:
    table = lpba40.scan_table(DATA)
    assert len(table) == 36
    assert not {"S07", "S08", "S09", "S10"} & set(table["scan"])
    assert all(Path(path).is_file() for column in ("image", "labels") for path in table[column])


@needs_data
@pytest.mark.parametrize("scan", ["S01", "S26", "S40"])
def test_stated_axes_put_left_left_front_front_and_top_up(scan: str) -> None:
    path = DATA / scan / f"{scan}.delineation.structure.label.nii.gz"
    labels = read_labels(path)
    assert labels.orientation == "LPS"  # what the copies' headers say is not true
    labels = with_orientation(labels, lpba40.ORIENTATION)
    voxels = np.argwhere(labels.data > 0)
    ids = labels.data[labels.data > 0]
    world = voxels @ labels.affine[:3, :3].T + labels.affine[:3, 3]
    centre = {i: world[ids == i].mean(axis=0) for i in load_structures("lpba56").ids}
    for left in (i for i in centre if i % 2 == 1 and i < 181):
        assert centre[left][0] < centre[left + 1][0], left
    for side in (0, 1):
        assert centre[23 + side][1] > centre[61 + side][1] + 80  # middle frontal before superior occipital
        assert centre[43 + side][2] > centre[85 + side][2] + 40  # superior parietal above inferior temporal
    assert centre[181][1] < centre[182][1]  # the cerebellum behind the brainstem
