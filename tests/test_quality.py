"""Quality control: sides, noise, the contact sheet, and scans that are flagged."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pandas as pd
import pytest
from matplotlib.patches import Rectangle
from scipy import ndimage

from dmir.errors import InputError
from dmir.fields import save_field
from dmir.methods.records import COLUMNS, divide_pairs, write_records
from dmir.metrics import endpoint_error
from dmir.preprocess import denoise, preprocess_atlas
from dmir.preprocess.contact_sheet import MOST_TILES, _shown, contact_sheet
from dmir.preprocess.denoise import noise_level
from dmir.preprocess.files import preprocess_files, quality_table
from dmir.preprocess.quality import flagged_scans
from dmir.preprocess.truth import truth_of_pair
from dmir.structures import load_structures
from dmir.volumes import Volume, read_labels, with_orientation, write_volume

SHAPE = (30, 34, 28)
AFFINE = np.diag([2.0, 2.0, 2.0, 1.0])


def head(left: int = 17, right: int = 53) -> tuple[Volume, Volume, Volume]:
    """Return a ball with texture, two blobs of labels (in RAS: left at small x) and its mask, 2 mm."""
    axes = np.meshgrid(*(np.linspace(-1.3, 1.3, n) for n in SHAPE), indexing="ij")
    mask = sum(a**2 for a in axes) < 1
    texture = ndimage.gaussian_filter(np.random.default_rng(0).standard_normal(SHAPE), 2)
    labels = np.where(mask & (axes[0] < -0.3), left, 0) + np.where(mask & (axes[0] > 0.3), right, 0)
    image = np.where(mask, 100 + 500 * texture, 0).astype(np.float32)
    return Volume(image, AFFINE), Volume(labels.astype(np.int32), AFFINE), Volume(mask, AFFINE)


# ---------------------------------------------------------------- orientation and sides


def test_stating_an_orientation_changes_the_world_and_not_the_data() -> None:
    volume = Volume(np.arange(2 * 3 * 4.0).reshape(2, 3, 4), np.diag([1.0, 2.0, 3.0, 1.0]))
    stated = with_orientation(volume, "LSP")
    assert stated.orientation == "LSP"
    assert stated.data is volume.data
    np.testing.assert_array_equal(stated.spacing, [1, 2, 3])
    middle = [0.5, 1, 1.5, 1]
    np.testing.assert_allclose(stated.affine @ middle, volume.affine @ middle)
    np.testing.assert_allclose(with_orientation(stated, "RAS").affine, volume.affine)


@pytest.mark.parametrize("codes", ["LL", "LRS", "XYZ", "LPSA"])
def test_codes_that_are_no_orientation(codes: str) -> None:
    with pytest.raises(InputError, match="three axis codes"):
        with_orientation(head()[0], codes)


def test_a_mirrored_scan_is_flagged_and_stating_its_orientation_mends_it(tmp_path: Path) -> None:
    image, labels, mask = head(left=53, right=17)  # by the header, what is called left lies on the right
    files = {"image": image, "labels": labels, "mask": mask}
    for name, volume in files.items():
        write_volume(tmp_path / f"{name}.nii.gz", volume)
    quality = {}
    for orientation in (None, "LAS"):
        preprocess_files(
            tmp_path / str(orientation),
            **{name: tmp_path / f"{name}.nii.gz" for name in files},
            structures="oasis28",
            orientation=orientation,
            shape=SHAPE,
            bias_correction=False,
        )
        quality[orientation] = json.loads((tmp_path / str(orientation) / "quality.json").read_text())
    assert [quality[key]["sides_swapped"] for key in (None, "LAS")] == [1, 0]
    assert [quality[key]["structures_found"] for key in (None, "LAS")] == [2, 2]
    assert any("1 of 1 left structures lie on the right" in flag for flag in quality[None]["flags"])
    assert not any("left structures" in flag for flag in quality["LAS"]["flags"])
    mended = read_labels(tmp_path / "LAS" / "labels.nii.gz")
    assert np.argwhere(mended.data == 17)[:, 0].mean() < np.argwhere(mended.data == 53)[:, 0].mean()


# ---------------------------------------------------------------- noise


def test_noise_is_measured_and_reduced_and_edges_stay() -> None:
    image, _, mask = head()
    step = np.where(np.arange(SHAPE[0])[:, None, None] < 15, 100.0, 200.0) * mask.data
    noisy = Volume((step + np.random.default_rng(1).normal(0, 8, SHAPE)).astype(np.float32), image.affine)
    inner = ndimage.binary_erosion(mask.data, iterations=2)
    half = inner & (np.arange(SHAPE[0])[:, None, None] < 12)
    assert noise_level(noisy.data, half) == pytest.approx(8, rel=0.1)
    clean = denoise(noisy, mask)
    error = (clean.data - step)[inner]
    assert error.std() < 0.5 * 8
    assert abs(error[np.abs(np.argwhere(inner)[:, 0] - 14.5) < 1].mean()) < 2  # the edge has not moved
    np.testing.assert_array_equal(clean.data[~mask.data], noisy.data[~mask.data])


def test_an_image_without_noise_stays_as_it_is() -> None:
    image, _, mask = head()
    flat = Volume(np.where(mask.data, 100, 0).astype(np.float32), image.affine)
    np.testing.assert_array_equal(denoise(flat, mask).data, flat.data)


# ---------------------------------------------------------------- tables and the contact sheet


def test_quality_table_has_the_seconds_of_each_step(tmp_path: Path) -> None:
    image, labels, mask = head()
    result = preprocess_atlas(image, labels, mask, shape=SHAPE, structures=load_structures("oasis28"), denoise=True)
    result.write(tmp_path / "a")
    assert set(result.quality["seconds"]) == {
        *("skull_strip", "denoise", "bias_field", "resample", "normalise", "quality"),
    }
    table = quality_table({"a": tmp_path / "a" / "quality.json"})
    assert table.loc[0, "seconds"] == pytest.approx(sum(result.quality["seconds"].values()), abs=0.01)
    assert list(table.columns[-2:]) == ["ok", "flags"]
    assert flagged_scans([tmp_path / "a" / "quality.json"])["a"].startswith("brain volume")  # a ball of 22 mm


def test_contact_sheet_shows_every_scan_once_and_flagged_ones_first(tmp_path: Path) -> None:
    image, _, mask = head()
    scaled = Volume(np.where(mask.data, np.clip(image.data / 300, 0.01, 1), 0).astype(np.float32), AFFINE)
    scans = [f"s{k}" for k in range(7)]
    for scan in scans:
        write_volume(tmp_path / scan / "image.nii.gz", scaled)
    quality = pd.DataFrame({"scan": scans, "mask_overlap": 0.9, "ok": True, "flags": ""})
    quality.loc[4, ["ok", "flags"]] = [False, "too small"]
    figure = contact_sheet(
        {scan: tmp_path / scan / "image.nii.gz" for scan in scans},
        quality,
        splits=dict.fromkeys(scans, "test"),
        reference="s0",
        cohort="balls",
    )
    axes = figure.axes[0]
    titles = [text.get_text() for text in axes.texts]
    assert [title.split()[0] for title in titles if "Dice" in title] == ["s4", "s0", "s1", "s2", "s3", "s5", "s6"]
    assert titles[1] == "too small"
    assert len(axes.images) == 7
    assert len([patch for patch in axes.patches if isinstance(patch, Rectangle)]) == 1
    assert "7 scans" in figure.texts[0].get_text() and "1 flagged" in figure.texts[0].get_text()
    shown = axes.images[0].get_array()
    assert shown.shape == (SHAPE[1], 2 * SHAPE[0] + SHAPE[1], 3)  # axial (x, y), coronal (x, z), sagittal (y, z)
    axial = scaled.data[:, :, SHAPE[2] // 2].T[::-1]
    inside = ndimage.binary_erosion(axial > 0)  # the rim is painted blue
    np.testing.assert_allclose(shown[:, : SHAPE[0], 0][inside], axial[inside], atol=1e-6)


def test_of_thousands_of_scans_the_contact_sheet_shows_the_flagged_and_some_at_equal_distances() -> None:
    flagged, others = [f"f{k}" for k in range(30)], [f"s{k:04d}" for k in range(4970)]
    shown = _shown(flagged, others)
    assert shown[:30] == flagged
    assert len(shown) == len(set(shown)) == MOST_TILES
    places = np.array([int(scan[1:]) for scan in shown[30:]])
    assert set(np.diff(places)) == {8, 9} and places[0] == 0  # 4970 / 570 = 8.7
    assert _shown(flagged[:2], others[:3]) == ["f0", "f1", "s0000", "s0001", "s0002"]
    assert _shown([f"f{k}" for k in range(700)], others) == [f"f{k}" for k in range(MOST_TILES)]
    assert _shown(flagged, []) == flagged


# ---------------------------------------------------------------- pairs that are left out


def test_pairs_of_flagged_scans_are_rows_with_their_reason(tmp_path: Path) -> None:
    images = [tmp_path / scan / "image.nii.gz" for scan in "abc"]
    pairs, left_out = divide_pairs([("a", "c"), ("b", "c"), ("c", "b")], images, {"b": "too small"})
    assert pairs == [("a", images[0], "c", images[2])]
    assert [(row["moving"], row["fixed"], row["status"]) for row in left_out] == [
        ("b", "c", "left out"),
        ("c", "b", "left out"),
    ]
    records = pd.DataFrame([dict.fromkeys(COLUMNS, "") | {"moving": "a", "fixed": "c", "status": "ok"}])
    write_records(tmp_path / "records.csv", records, left_out, cohort="x", method="syn", model="none")
    table = pd.read_csv(tmp_path / "records.csv")
    assert list(table.columns) == list(COLUMNS)
    assert list(table["status"]) == ["ok", "left out", "left out"]
    assert (table["method"] == "syn").all()
    assert "b is flagged: too small" in table.loc[1, "reason"]


# ---------------------------------------------------------------- the truth of a pair


def test_truth_between_two_scans_goes_through_the_template(tmp_path: Path) -> None:
    shift = {"m": (2.0, 0.0, -1.0), "f": (0.5, 1.0, 0.0)}
    files = {}
    for scan, by in shift.items():
        files[scan] = tmp_path / f"{scan}.nii.gz"
        field = np.broadcast_to(np.float32(by).reshape(3, 1, 1, 1), (3, *SHAPE)).copy()
        save_field(files[scan], field, AFFINE)
    centre = (slice(None), *(n // 2 for n in SHAPE))
    np.testing.assert_allclose(truth_of_pair(files, "m", "template")[centre], shift["m"], atol=1e-5)
    np.testing.assert_allclose(truth_of_pair(files, "template", "f")[centre], -np.float32(shift["f"]), atol=1e-3)
    between = np.subtract(shift["m"], shift["f"])
    np.testing.assert_allclose(truth_of_pair(files, "m", "f")[centre], between, atol=1e-3)
    assert truth_of_pair({}, "m", "f") is None


def test_where_a_truth_has_no_inverse_the_pair_has_no_truth(tmp_path):
    noise = np.zeros((3, 12, 11, 10), np.float32)
    noise[:, 3:8, 3:8, 3:8] = 3 * np.random.default_rng(0).normal(size=(3, 5, 5, 5))
    save_field(tmp_path / "noise.nii.gz", noise, np.eye(4))
    truth = truth_of_pair({"f": tmp_path / "noise.nii.gz"}, "template", "f")
    known = np.isfinite(truth).all(axis=0)
    assert 0 < (~known).sum() < known.size / 2
    error = endpoint_error(np.zeros_like(noise), truth, np.eye(4))
    assert len(error) == known.sum() and np.isfinite(error).all()
    assert np.isnan(endpoint_error(noise, np.full_like(noise, np.nan), np.eye(4))).all()
