"""Files as people have them: each is read for what it is, or told, or refused by name. docs/files.md is the table."""

import gzip
import json
import re
import shutil
import warnings
from pathlib import Path

import nibabel as nib
import numpy as np
import pandas as pd
import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from scipy.ndimage import gaussian_filter
from test_field_command import ROUND_TRIPS
from test_names import TRIED

from dmir.cli import main
from dmir.doubts import Doubt, told_doubts
from dmir.errors import InputError
from dmir.fields import load_field, save_field, warp_labels, warp_labels_each
from dmir.methods import register
from dmir.methods.isolated import register_isolated
from dmir.methods.scans import register_scans
from dmir.metrics import score_pair
from dmir.metrics.files import score_files
from dmir.preprocess import native_files, resample, write_affine
from dmir.preprocess.files import preprocess_files, quality_table
from dmir.storage import plainly_named_folder
from dmir.structures import StructureSet, positions, remap_labels
from dmir.volumes import (
    Volume,
    decide_mask,
    read_image,
    read_labels,
    read_mask,
    reorient,
    write_labels,
    write_volume,
)

SHAPE, SPACING = (32, 36, 30), 4.0
LARGE = 576073732  # no float32 holds it
FLIP = np.diag([-1.0, -1.0, 1.0, 1.0])  # RAS <-> LPS
EXAMPLES = {"ids of label maps": 40, "affines with units": 8}


def tried(what):
    return settings(
        max_examples=EXAMPLES[what], deadline=None, suppress_health_check=list(HealthCheck), derandomize=True
    )


def affine_of(spacing=SPACING):
    affine = np.diag([spacing, spacing, spacing, 1.0])
    affine[:3, 3] = -spacing * (np.array(SHAPE) - 1) / 2
    return affine


def brain(cut=None):
    """Return image, labels 2 (left) and 41 (right) and mask of a brain of 1000 ml."""
    x, y, z = SPACING * (np.indices(SHAPE) - (np.reshape(SHAPE, (3, 1, 1, 1)) - 1) / 2)
    mask = (x / 58) ** 2 + (y / 66) ** 2 + (z / 54) ** 2 < 1
    image = np.where(mask, 100 + 40 * np.sin(x / 9 + 1) * np.cos(y / 11) + 30 * np.sin(z / 8 + y / 30), 0)
    labels = np.where(mask, np.where(x < 0, 2, 41), 0)
    if cut is not None:
        image[:, :, cut:] = labels[:, :, cut:] = mask[:, :, cut:] = 0
    return image.astype(np.float32), labels.astype(np.int32), mask


def save(path, data, affine=None, unit="mm", codes=(0, 2), qform=None):
    """Write a NIfTI with what its header says of itself."""
    affine = affine_of() if affine is None else affine
    image = nib.Nifti1Image(data, affine, dtype=data.dtype)
    image.header.set_xyzt_units(unit)
    image.header.set_qform(affine if qform is None else qform, 1)
    image.header.set_sform(affine, 1)
    content = bytearray(image.to_bytes())
    content[252:256] = np.array(codes, np.int16).tobytes()  # nibabel would mend them
    path.write_bytes(gzip.compress(bytes(content), 1) if path.suffix == ".gz" else content)
    return path


def as_itk_reads(path):
    """Return the 4x4 voxel-to-RAS affine that ITK finds in a file."""
    import SimpleITK as sitk

    reader = sitk.ImageFileReader()
    reader.SetFileName(str(path))
    reader.ReadImageInformation()
    affine = np.eye(4)
    affine[:3, :3] = np.reshape(reader.GetDirection()[:9], (3, 3)) if reader.GetDimension() == 3 else np.eye(3)
    affine[:3, :3] *= reader.GetSpacing()[:3]
    affine[:3, 3] = reader.GetOrigin()[:3]
    return FLIP @ affine


def doubts_of(function, *arguments, **keywords):
    """Return what a function gives, and what it tells."""
    with told_doubts() as told:
        return function(*arguments, **keywords), told


# ---------------------------------------------------------------- ids of label maps


@pytest.mark.parametrize("dtype", [torch.int32, torch.int64, torch.uint8, torch.int16])
@pytest.mark.parametrize("interpolation", ["nearest", "linear"])
def test_warping_keeps_the_largest_ids_of_a_type(dtype, interpolation):
    largest = torch.iinfo(dtype).max
    ids = torch.tensor([0, 1, largest, largest - 1, min(largest, 2**24 + 1)], dtype=dtype)
    labels = ids[torch.randint(0, 5, (1, 1, 7, 8, 9), generator=torch.Generator().manual_seed(0))]
    still = torch.zeros(1, 3, 7, 8, 9)
    assert torch.equal(warp_labels(labels, still, interpolation), labels)
    both = warp_labels_each(labels, still, ["nearest", "linear"])
    assert torch.equal(both[interpolation], labels) and both[interpolation].dtype == dtype
    step = still.clone()
    step[:, 1] = 2.0
    moved = warp_labels(labels, step, interpolation)
    assert torch.equal(moved[:, :, :, :-2], labels[:, :, :, 2:]) and not moved[:, :, :, -2:].any()


ids_of_int32 = st.one_of(st.integers(1, 2**31 - 1), st.sampled_from([2**15, 2**16 + 17, 2**24 + 1, LARGE, 2**31 - 1]))


@tried("ids of label maps")
@given(
    st.lists(ids_of_int32, min_size=2, max_size=6, unique=True), st.sampled_from(["i4", "u4", "i8", "f8"]), st.data()
)
def test_every_id_comes_out_as_it_went_in(tmp_path_factory, ids, kind, data):
    """Each path that a label map can take: files, resampling, preprocessing, back, both warps, scores, tables."""
    folder, affine = tmp_path_factory.getbasetemp() / "ids", np.diag([2.0, 2.0, 2.0, 1.0])
    folder.mkdir(exist_ok=True)
    chosen = np.array([0, *ids], dtype=np.int64)
    seed = data.draw(st.integers(0, 2**16))
    coarse = chosen[np.random.default_rng(seed).integers(0, len(chosen), (4, 4, 4))]
    coarse.flat[: len(chosen)] = chosen  # each is there
    labels = coarse.repeat(2, 0).repeat(2, 1).repeat(2, 2)
    read = read_labels(save(folder / "labels.nii", labels.astype(kind), affine))
    np.testing.assert_array_equal(read.data, labels)
    write_labels(folder / "written.nii.gz", read)
    np.testing.assert_array_equal(read_labels(folder / "written.nii.gz").data, labels)
    for interpolation in ("nearest", "generic_label"):
        np.testing.assert_array_equal(resample(read, read.grid, interpolation=interpolation).data, labels)
    write_volume(folder / "image.nii.gz", Volume(1 + np.arange(512.0, dtype=np.float32).reshape(8, 8, 8), affine))
    write_affine(folder / "affine.mat", np.eye(4))
    paths = {"volume": folder / "written.nii.gz", "like": folder / "image.nii.gz"}
    native_files(folder / "native.nii.gz", preprocessed=folder, **paths)
    np.testing.assert_array_equal(read_labels(folder / "native.nii.gz").data, labels)
    assert remap_labels(labels, {ids[0]: ids[1]}).max() == ids[1]
    np.testing.assert_array_equal(positions(labels, ids) > 0, labels > 0)
    table = pd.DataFrame({"id": ids, "name": [f"s{i}" for i in ids], "hemisphere": "both"})
    scores, _ = score_pair(
        np.zeros((3, 8, 8, 8), np.float32), affine, labels, labels, StructureSet("all", table), topology=False
    )
    assert scores["structure"].tolist() == ids * 2 and (scores["dice"] == 1).all()
    scores.to_csv(folder / "scores.csv", index=False)
    assert pd.read_csv(folder / "scores.csv")["structure"].tolist() == ids * 2


def test_preprocessing_keeps_ids_that_int16_does_not_hold(tmp_path):
    image, labels, mask = brain()
    labels = np.where(labels == 2, 2**16 + 17, np.where(labels == 41, LARGE, 0))  # 65553 became 17, the hippocampus
    for name, data in (("image", image), ("labels", labels.astype(np.int32)), ("mask", mask.astype(np.uint8))):
        save(tmp_path / f"{name}.nii.gz", data)
    files = {name: tmp_path / f"{name}.nii.gz" for name in ("image", "labels", "mask")}
    for interpolation in ("nearest", "generic_label"):
        options = {"shape": SHAPE, "spacing": (SPACING,) * 3, "bias_correction": False}
        preprocess_files(tmp_path / "out", **files, **options, label_interpolation=interpolation)
        assert np.unique(read_labels(tmp_path / "out" / "labels.nii.gz").data).tolist() == [0, 2**16 + 17, LARGE]


@pytest.mark.parametrize("interpolation", ["nearest", "linear"])
def test_register_keeps_an_id_that_float32_does_not_hold(tmp_path, interpolation):
    image, labels, _ = brain()
    for name, data in (("image", image), ("labels", np.where(labels == 2, LARGE, labels))):
        save(tmp_path / f"{name}.nii.gz", data)
    scan, both = ["--moving", "--fixed"], ["--moving-labels", "--fixed-labels"]
    paths = [(flag, tmp_path / "image.nii.gz") for flag in scan] + [(flag, tmp_path / "labels.nii.gz") for flag in both]
    command = ["register", "--no-affine", "--method", "affine", "--label-interpolation", interpolation]
    assert main([*command, "--out", str(tmp_path / "out"), *(str(part) for pair in paths for part in pair)]) == 0
    for name in ("warped_labels", "fixed_labels_on_moving"):
        assert np.unique(read_labels(tmp_path / "out" / f"{name}.nii.gz").data).tolist() == [0, 41, LARGE]


def test_what_a_label_map_cannot_hold_is_refused_or_told(tmp_path):
    labels = np.zeros((4, 5, 6))
    labels[1:3] = 2**24 + 2
    _, told = doubts_of(read_labels, save(tmp_path / "single.nii", labels.astype(np.float32)))
    assert len(told) == 1 and "ids up to 16777218 as float32" in told[0]
    assert doubts_of(read_labels, save(tmp_path / "double.nii", labels))[1] == []
    labels[1] = 2**31
    for kind in ("f8", "i8", "u8"):
        with pytest.raises(InputError, match="ids from 0 to 2147483648"):
            read_labels(save(tmp_path / "beyond.nii", labels.astype(kind)))
    image = nib.Nifti1Image(np.arange(120, dtype=np.int16).reshape(4, 5, 6), np.eye(4))
    image.header.set_slope_inter(3, 0)
    nib.save(image, tmp_path / "scaled.nii")  # nibabel divides by the slope, and rounds
    read = read_labels(tmp_path / "scaled.nii")
    assert set(np.unique(read.data)) <= {3 * n for n in range(120)}
    header = bytearray((tmp_path / "scaled.nii").read_bytes())
    header[112:116] = np.float32(0.3).tobytes()
    (tmp_path / "scaled.nii").write_bytes(header)
    with pytest.raises(InputError, match="not whole numbers"):
        read_labels(tmp_path / "scaled.nii")


# ---------------------------------------------------------------- masks


def test_a_mask_is_decided_at_half_of_its_range():
    _, labels, mask = brain()
    soft = gaussian_filter(mask.astype(np.float32), 1)
    certain = {
        "binary": mask.astype(np.uint8),
        "bytes": mask * 255,
        "scaled": mask * (1 - 3e-6) + 3e-6,
        "signed": 2.0 * mask - 1,
    }
    for name, values in certain.items():
        inside, told = doubts_of(decide_mask, np.asarray(values), name)
        assert (inside == mask).all() and told == [], name
    inside, told = doubts_of(decide_mask, soft, "a probability")
    assert (inside == (soft > soft.max() / 2 + soft.min() / 2)).all() and told == []
    for scale in (100, 255, 3.7):
        values = np.round(scale * soft) if scale > 10 else scale * soft
        values[values == values.max()] = scale
        inside, told = doubts_of(decide_mask, values, "soft")
        assert (inside == (values > scale / 2)).all() and len(told) == 1 and "neither binary nor a prob" in told[0]
    inside, told = doubts_of(decide_mask, labels, "labels")
    assert (inside == mask).all() and len(told) == 1 and "all that is not 0 counts as inside" in told[0]
    assert decide_mask(np.ones((3, 3, 3)), "whole").all()
    for values, found in ((np.zeros((3, 3, 3)), "an empty mask"), (np.full((3, 3, 3), np.nan), "NaN or infinite")):
        with pytest.raises(InputError, match=found):
            decide_mask(values, "none")


def test_a_mask_whose_background_is_a_little_above_zero(tmp_path):
    """Slope and intercept of stored integers make 3e-6 of 0: that is no brain, in a mask or round a stripped scan."""
    image, _, mask = brain()
    drifted = mask.astype(float)
    drifted[0, 0, 0] = -0.495
    stored = nib.Nifti1Image(drifted, affine_of())
    stored.set_data_dtype(np.int16)
    nib.save(stored, tmp_path / "mask.nii.gz")
    assert (np.asarray(nib.load(tmp_path / "mask.nii.gz").dataobj) > 0).mean() > 0.99
    found, told = doubts_of(read_mask, tmp_path / "mask.nii.gz")
    assert (found.data == mask).all() and "what is above 0.2525 counts as inside" in told[0]
    grey = np.where(mask, image, 0).astype(float)
    grey[0, 0, 0] = -0.4 * grey.max()
    stored = nib.Nifti1Image(grey, affine_of())
    stored.set_data_dtype(np.int16)
    nib.save(stored, tmp_path / "stripped.nii.gz")
    assert (read_image(tmp_path / "stripped.nii.gz").data != 0).mean() > 0.99
    options = {"shape": SHAPE, "spacing": (SPACING,) * 3, "bias_correction": False, "skull_strip": "none"}
    preprocess_files(tmp_path / "out", image=tmp_path / "stripped.nii.gz", **options)
    volume = json.loads((tmp_path / "out" / "quality.json").read_text())["brain_volume_ml"]
    assert volume == pytest.approx(mask.sum() * SPACING**3 / 1000, rel=0.001)


# ---------------------------------------------------------------- units and places


@pytest.mark.parametrize(("unit", "factor"), [("micron", 1000.0), ("meter", 0.001)])
def test_the_unit_of_a_header_holds_everywhere(tmp_path, unit, factor):
    image, labels, _ = brain()
    scaled = affine_of()
    scaled[:3] *= factor
    volume, told = doubts_of(read_image, save(tmp_path / "image.nii.gz", image, scaled, unit))
    np.testing.assert_allclose(volume.affine, affine_of(), rtol=1e-6)
    np.testing.assert_allclose(as_itk_reads(tmp_path / "image.nii.gz"), volume.affine, rtol=1e-6)
    assert len(told) == 1 and told[0].endswith("as its header says; converted to millimetres")
    save(tmp_path / "labels.nii.gz", labels, scaled, unit)
    save_field(tmp_path / "field.nii.gz", np.full((3, *SHAPE), 1, np.float32), affine_of())
    scores, _ = score_files(
        *[tmp_path / f"{n}.nii.gz" for n in ("field", "labels", "labels")], "oasis28", topology=False
    )
    in_mm = scores.query("structure == 2")["hd95"].iloc[0]
    assert SPACING <= in_mm <= 2 * SPACING
    write_volume(tmp_path / "written.nii.gz", volume)
    assert nib.load(tmp_path / "written.nii.gz").header.get_xyzt_units()[0] == "mm"
    np.testing.assert_allclose(as_itk_reads(tmp_path / "written.nii.gz"), volume.affine, rtol=1e-6)


@pytest.mark.parametrize(("unit", "factor"), [("micron", 1000.0), ("meter", 0.001)])
def test_the_unit_of_a_field_holds_for_its_vectors_too(tmp_path, unit, factor):
    wave = np.sin(np.indices(SHAPE) / 4).astype(np.float32)
    save_field(tmp_path / "mm.nii", wave, affine_of())
    plain = nib.load(tmp_path / "mm.nii")
    scaled = affine_of()
    scaled[:3] *= factor
    other = nib.Nifti1Image(np.asarray(plain.dataobj) * np.float32(factor), scaled, plain.header)
    other.header.set_xyzt_units(unit)
    other.header.set_sform(scaled, 2)
    nib.save(other, tmp_path / "other.nii")
    (field, affine), told = doubts_of(load_field, tmp_path / "other.nii")
    np.testing.assert_allclose(affine, affine_of(), rtol=1e-6)
    np.testing.assert_allclose(field, wave, atol=1e-5)
    assert len(told) == 1


TILTED = np.array([[0.0, -1.9, 0.3, 40.0], [2.0, 0, 0, -30], [0, 0.3, 1.9, -20], [0, 0, 0, 1]])
TILTED[:3, :3] = np.linalg.qr(TILTED[:3, :3])[0] * SPACING


@pytest.mark.parametrize("codes", [(0, 0), (0, 1), (1, 0), (1, 1), (1, 2), (2, 4), (3, 1)], ids=str)
def test_a_place_is_read_as_itk_reads_it_and_told_where_it_is_doubtful(tmp_path, codes):
    path = save(tmp_path / "image.nii.gz", brain()[0], affine_of(), codes=codes, qform=TILTED)
    volume, told = doubts_of(read_image, path)
    np.testing.assert_allclose(as_itk_reads(path), volume.affine, atol=1e-4)
    doubtful = max(codes) == 0 or min(codes) > 0
    assert len(told) == doubtful
    if doubtful:
        expected = "no place in the world" if max(codes) == 0 else "two places in the world"
        assert f"image.nii.gz: {expected}" in told[0] and "taken, as ITK does" in told[0]
    assert doubts_of(read_image, path, orientation="RAS")[1] == []  # the user has said what counts
    write_volume(tmp_path / "beside.nii.gz", volume)
    np.testing.assert_allclose(as_itk_reads(tmp_path / "beside.nii.gz"), volume.affine, atol=1e-4)
    assert doubts_of(read_image, tmp_path / "beside.nii.gz")[1] == []


def test_two_places_that_are_one_are_not_doubtful(tmp_path):
    near = affine_of()
    near[:3, 3] += 0.01  # what float32 and quaternions make of a matrix
    path = save(tmp_path / "image.nii", brain()[0], affine_of(), codes=(1, 1), qform=near)
    assert doubts_of(read_image, path)[1] == []


def test_ants_applies_a_field_onto_a_scan_without_a_place_as_we_do(tmp_path):
    import ants

    image = brain()[0]
    save(tmp_path / "fixed.nii.gz", image, codes=(0, 0))
    fixed = doubts_of(read_image, tmp_path / "fixed.nii.gz")[0]
    moving = Volume(np.roll(image, 1, axis=0), fixed.affine)
    write_volume(tmp_path / "moving.nii.gz", moving)
    field = np.zeros((3, *SHAPE), np.float32)
    field[0] = 1
    save_field(tmp_path / "field.nii.gz", field, fixed.affine)
    paths = [str(tmp_path / f"{name}.nii.gz") for name in ("fixed", "moving", "field")]
    warped = ants.apply_transforms(ants.image_read(paths[0]), ants.image_read(paths[1]), [paths[2]]).numpy()
    np.testing.assert_allclose(warped[1:-1], image[1:-1], atol=0.01)


@pytest.mark.parametrize("kind", [nib.AnalyzeImage, nib.MGHImage])
def test_other_formats_without_a_place_are_told(tmp_path, kind):
    data = brain()[0]
    path = tmp_path / ("image.mgh" if kind is nib.MGHImage else "image.img")
    nib.save(kind(data, np.diag([-4.0, 4, 4, 1])), path)
    if kind is nib.MGHImage:
        assert doubts_of(read_image, path)[1] == []
        content = bytearray(path.read_bytes())
        content[28:30] = b"\0\0"
        path.write_bytes(content)
    volume, told = doubts_of(read_image, path)
    assert len(told) == 1 and "no place in the world" in told[0]
    assert volume.orientation == ("LIA" if kind is nib.MGHImage else "LAS")
    assert ("axes L, I and A" if kind is nib.MGHImage else "axes LAS") in told[0]


def test_a_spacing_that_is_told_twice_is_read_as_itk_reads_it(tmp_path):
    """Slope of the sform and pixdim do not agree: what a program leaves that changes one of them."""
    path = save(tmp_path / "image.nii", brain()[0], affine_of(), codes=(0, 1), qform=TILTED)
    content = bytearray(path.read_bytes())
    content[80:92] = np.array([4, 3, 2], np.float32).tobytes()
    path.write_bytes(content)
    volume, told = doubts_of(read_image, path)
    np.testing.assert_allclose(as_itk_reads(path), volume.affine, atol=1e-4)
    assert len(told) == 1 and "voxels of 4x4x4 in its sform and of 4x3x2 in its pixdim, which counts here" in told[0]


# ---------------------------------------------------------------- formats and names


@pytest.mark.parametrize("name", ["a.nii", "a.nii.gz", "A.NII.GZ", "A.NII", "noend"])
@pytest.mark.parametrize("compressed", [True, False])
def test_a_name_says_nothing_of_what_a_file_is(tmp_path, name, compressed):
    content = nib.Nifti1Image(brain()[0], affine_of()).to_bytes()
    path = tmp_path / name
    path.write_bytes(gzip.compress(content, 1) if compressed else content)
    volume = read_image(path)
    np.testing.assert_array_equal(volume.data, brain()[0])
    np.testing.assert_allclose(volume.affine, affine_of())


@pytest.mark.parametrize("name", ["a.mgh", "a.mgz", "A.MGZ"])
@pytest.mark.parametrize("compressed", [True, False])
def test_an_mgh_file_too(tmp_path, name, compressed):
    content = nib.MGHImage(brain()[0], affine_of()).to_bytes()
    (tmp_path / name).write_bytes(gzip.compress(content, 1) if compressed else content)
    np.testing.assert_array_equal(read_image(tmp_path / name).data, brain()[0])


@pytest.mark.parametrize(
    "ends", [(".hdr", ".img"), (".hdr", ".img.gz"), (".HDR", ".IMG"), (".hdr.gz", ".img.gz")], ids=str
)
@pytest.mark.parametrize("compressed", [True, False])
def test_a_pair_too(tmp_path, ends, compressed):
    nib.save(nib.Nifti1Pair(brain()[0], affine_of()), tmp_path / "from.img")
    paths = [tmp_path / f"a{end}" for end in ends]
    for end, path in zip((".hdr", ".img"), paths, strict=True):
        content = (tmp_path / "from").with_suffix(end).read_bytes()
        path.write_bytes(gzip.compress(content, 1) if compressed else content)
    for path in paths:
        volume = read_image(path)
        np.testing.assert_array_equal(volume.data, brain()[0])
        np.testing.assert_allclose(volume.affine, affine_of())


@pytest.mark.parametrize(
    ("content", "found"),
    [
        (b"", "an empty file"),
        (gzip.compress(gzip.compress(bytes(400))), "a gzip file within a gzip file"),
        (b"PK\3\4" + bytes(400), "a zip archive"),
        (b"BZh9" + bytes(400), "a bzip2 file"),
        (bytes(128) + b"DICM" + bytes(400), "a DICOM file"),
        (b"NRRD0004\n" + bytes(400), "an NRRD file"),
        (b"version https://git-lfs.github.com/spec/v1\noid sha256:0\n", "a pointer of Git LFS"),
        (b"/annex/objects/MD5E-s1--0.nii.gz\n", "a pointer of git-annex"),
        (b"<!DOCTYPE html><html>404</html>", "a web page"),
    ],
    ids=lambda value: value if isinstance(value, str) else "",
)
def test_what_is_no_volume_is_named(tmp_path, content, found):
    path = tmp_path / "scan.nii.gz"
    path.write_bytes(content)
    with pytest.raises(InputError, match=found) as error:
        read_image(path)
    assert "scan.nii.gz" in str(error.value) and "truncated" not in str(error.value)


@pytest.mark.parametrize("method", ["affine", "syn", "elastix", "descent"])
def test_a_sheared_scan_is_refused_whatever_the_method(method):
    image = brain()[0]
    sheared = affine_of()
    sheared[:3, 1] += 0.2 * sheared[:3, 0]
    for pair in (
        (Volume(image, sheared), Volume(image, affine_of())),
        (Volume(image, affine_of()), Volume(image, sheared)),
    ):
        with pytest.raises(InputError, match="axes are not at right angles"):
            register_scans(*pair, method=method)


def test_ants_works_in_a_folder_with_any_name(tmp_path, monkeypatch):
    folder = tmp_path / "a folder, [with] marks"
    folder.mkdir()
    monkeypatch.setattr("tempfile.tempdir", str(folder))
    with plainly_named_folder("x-") as name:
        assert " " not in name and "," not in name and "[" not in name
        (Path(name) / "y").write_text("z")
        assert next(folder.glob("x-*/y")).read_text() == "z"
    image = brain()[0] / 200
    moving, fixed = (Volume(data, affine_of()) for data in (np.roll(image, 1, axis=0), image))
    result = register_scans(moving, fixed, method="syn", iterations=(2, 0, 0))
    np.testing.assert_allclose(result.affine[:3, 3], [SPACING, 0, 0], atol=0.5)
    assert list(folder.iterdir()) == []


# ---------------------------------------------------------------- what was not scanned


@pytest.fixture(scope="module")
def cohort(tmp_path_factory):
    """Two preprocessed scans: the whole brain as the atlas, and one that is cut off at its top."""
    folder = tmp_path_factory.mktemp("cohort")
    for name, cut in (("whole", None), ("clipped", 22)):
        image, labels, mask = brain(cut)
        for kind, data in (("image", image), ("labels", labels), ("mask", mask.astype(np.uint8))):
            save(folder / f"{name}_{kind}.nii.gz", data)
        files = {kind: folder / f"{name}_{kind}.nii.gz" for kind in ("image", "labels", "mask")}
        options = {
            "shape": SHAPE,
            "spacing": (SPACING,) * 3,
            "bias_correction": False,
            "structures": "oasis28",
            "affine_spacing": 6.0,
        }
        atlas = None if name == "whole" else folder / "whole"
        preprocess_files(folder / name, atlas=atlas, **files, **options)
    return folder


def test_a_clipped_brain_is_flagged_and_its_affine_is_not_pulled(cohort):
    quality = {name: json.loads((cohort / name / "quality.json").read_text()) for name in ("whole", "clipped")}
    assert quality["whole"]["cut_off"] == [] and quality["whole"]["cut_planes"] == []
    assert quality["clipped"]["cut_off"] == ["top"]
    assert "the brain is cut off at its top" in quality["clipped"]["flags"]
    (plane,) = quality["clipped"]["cut_planes"]
    height = -plane[3] / plane[2]  # mm, where the last plane of the scan lies in the atlas's world
    assert height == pytest.approx(SPACING * (21 - (SHAPE[2] - 1) / 2), abs=2.5)
    table = quality_table({name: cohort / name / "quality.json" for name in ("whole", "clipped")})
    assert table["cut_off"].tolist() == ["", "top"] and "cut_planes" not in table


def test_what_a_scan_of_the_pipeline_never_saw_does_not_pull(cohort, tmp_path):
    """Without the knowledge the fixed brain's top is filled from below."""
    stages = {"stages": [{"voxel": 8, "steps": 15}], "margin": 8.0}
    pulled = {}
    for name in ("known", "unknown"):
        shutil.copytree(cohort / "clipped", tmp_path / name)
        if name == "unknown":
            (tmp_path / name / "quality.json").unlink()
        paths = [folder / "image.nii.gz" for folder in (tmp_path / name, cohort / "whole")]
        record = register_isolated(*paths, tmp_path / f"{name}.nii", "descent", stages)
        assert record["status"] == "ok", record["reason"]
        field, _ = load_field(tmp_path / f"{name}.nii")
        fixed = read_image(paths[1]).data
        beyond = (fixed > 0) & (np.arange(SHAPE[2]) >= 23)
        pulled[name] = float(np.abs(field[2][beyond]).mean())
    assert pulled["known"] < 0.2 * pulled["unknown"] and pulled["unknown"] > 0.3


# ---------------------------------------------------------------- doubts


def test_a_doubt_is_a_warning_a_line_or_an_error(tmp_path, capsys):
    path = save(tmp_path / "image.nii.gz", brain()[0], codes=(0, 0))
    with pytest.warns(Doubt, match="no place in the world"):
        read_image(path)
    with told_doubts() as told:
        read_image(path)
        read_image(path)
    assert len(told) == 1 and capsys.readouterr().err.splitlines() == [f"Warning: {told[0]}"]
    with pytest.raises(InputError, match="nothing doubtful, as strict asks"), told_doubts(strict=True):
        read_image(path)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        read_image(save(tmp_path / "plain.nii.gz", brain()[0]))


def test_register_tells_and_notes_its_doubts_and_strict_writes_nothing(tmp_path, capsys):
    image, labels, _ = brain()
    save(tmp_path / "fixed.nii.gz", image)
    save(tmp_path / "moving.nii.gz", image[::-1].copy(), codes=(1, 1))
    save(tmp_path / "labels.nii.gz", labels[::-1].copy())
    command = ["register", "--no-affine", "--method", "affine"]
    command += ["--moving", str(tmp_path / "moving.nii.gz"), "--fixed", str(tmp_path / "fixed.nii.gz")]
    command += ["--moving-labels", str(tmp_path / "labels.nii.gz"), "--out", str(tmp_path / "out")]
    assert main([*command, "--strict"]) == 1
    error = capsys.readouterr().err
    assert "nothing doubtful, as strict asks" in error and not (tmp_path / "out").exists()
    assert main(command) == 0
    told = [line.removeprefix("Warning: ") for line in capsys.readouterr().err.splitlines() if "Warning" in line]
    assert any("left structures lie on the right" in line for line in told)
    assert json.loads((tmp_path / "out" / "registration.json").read_text())["remarks"] == told


def test_register_says_that_a_head_is_none(tmp_path, capsys):
    """Air is zero round a head: it passes for stripped, but not for the fixed scan's brain."""
    image, _, mask = brain()
    head = image + ((gaussian_filter(mask.astype(np.float32), 2.5) > 0.02) & ~mask) * 80
    save(tmp_path / "fixed.nii.gz", image)
    save(tmp_path / "labels.nii.gz", mask.astype(np.uint8))
    save(tmp_path / "moving.nii.gz", head.astype(np.float32))
    paths = ["--moving", str(tmp_path / "moving.nii.gz"), "--fixed", str(tmp_path / "fixed.nii.gz")]
    assert main(["register", "--no-affine", "--method", "affine", *paths, "--out", str(tmp_path / "out")]) == 0
    assert "Warning: moving: brain masks overlap by a Dice of 0." in capsys.readouterr().err
    options = {"shape": tuple(n + 8 for n in SHAPE), "spacing": (SPACING,) * 3, "bias_correction": False}
    options |= {"skull_strip": "none", "labels": tmp_path / "labels.nii.gz"}
    preprocess_files(tmp_path / "atlas", image=tmp_path / "fixed.nii.gz", **options)
    options |= {"atlas": tmp_path / "atlas", "affine": False}
    with pytest.raises(InputError, match="brain masks overlap"):
        preprocess_files(tmp_path / "scan", image=tmp_path / "moving.nii.gz", strict=True, **options)
    assert not (tmp_path / "scan").exists()


def test_preprocessing_notes_doubts_in_the_table_of_quality(tmp_path, capsys):
    image, labels, mask = brain()
    scaled = affine_of()
    scaled[:3] *= 1000
    save(tmp_path / "image.nii.gz", image, scaled, "micron")
    save(tmp_path / "mask.nii.gz", (labels + mask).astype(np.uint8))
    options = {"image": tmp_path / "image.nii.gz", "mask": tmp_path / "mask.nii.gz", "bias_correction": False}
    options |= {"shape": SHAPE, "spacing": (SPACING,) * 3}
    preprocess_files(tmp_path / "out", **options)
    (row,) = quality_table({"a": tmp_path / "out" / "quality.json"}).to_dict("records")
    assert row["warnings"].count("; converted to millimetres") == 1 and "counts as inside" in row["warnings"]
    for line in capsys.readouterr().err.splitlines():
        assert line.removeprefix("Warning: ") in row["warnings"] or "used all the same" in line
    with pytest.raises(InputError, match="lengths in micrometres"):
        preprocess_files(tmp_path / "strict", strict=True, **options)
    assert not (tmp_path / "strict").exists()


def test_a_mirrored_label_map_is_told_where_it_is_scored(tmp_path, capsys):
    _, labels, _ = brain()
    for orientation in ("RAS", "PIL"):
        for name, data in (("right", labels), ("mirrored", labels[::-1].copy())):
            write_labels(tmp_path / f"{name}.nii.gz", reorient(Volume(data, affine_of()), orientation))
        grid = read_labels(tmp_path / "right.nii.gz").grid
        save_field(tmp_path / "field.nii.gz", np.ones((3, *grid.shape), np.float32), grid.affine)
        paths = {"--field": "field", "--moving-labels": "mirrored", "--fixed-labels": "right"}
        command = ["score", "--structures", "oasis28"]
        command += [str(part) for flag, name in paths.items() for part in (flag, tmp_path / f"{name}.nii.gz")]
        assert main(command) == 0
        (line,) = [line for line in capsys.readouterr().err.splitlines() if "left structures" in line]
        assert line.startswith(f"Warning: {tmp_path / 'mirrored.nii.gz'}: 1 of 1 left structures lie on the right")
        assert main([*command, "--strict"]) == 1
        assert capsys.readouterr().err.startswith("Error: ")


# ---------------------------------------------------------------- there and back


rotations = st.tuples(*(st.floats(-0.3, 0.3) for _ in range(3)))
shifts = st.tuples(*(st.floats(-12, 12) for _ in range(3)))
axes = st.sampled_from(["RAS", "LPS", "LIA", "PSR", "AIL"])


@tried("affines with units")
@given(
    rotations, shifts, axes, st.sampled_from([("mm", 1.0), ("micron", 1e3), ("meter", 1e-3)]), st.sampled_from([0, 1])
)
def test_wherever_a_scan_lies_in_any_unit_it_comes_back(tmp_path_factory, angles, shift, orientation, unit, code):
    """Through reading, preprocessing, registration and back: what a header says changes the grid, never the brain."""
    from scipy.spatial.transform import Rotation

    folder = tmp_path_factory.getbasetemp() / "there"
    shutil.rmtree(folder, ignore_errors=True)
    folder.mkdir()
    image, labels, _ = brain()
    pose = np.eye(4)
    pose[:3, :3], pose[:3, 3] = Rotation.from_euler("xyz", angles).as_matrix(), shift
    names = {"image": image, "labels": labels}
    for name, data in names.items():
        volume = reorient(Volume(data, affine_of()), orientation)
        world = np.diag([unit[1]] * 3 + [1.0]) @ pose @ volume.affine
        save(folder / f"{name}.nii.gz", volume.data, world, unit[0], codes=(1, code))
        save(folder / f"atlas_{name}.nii.gz", data)
    with told_doubts():
        moving = read_image(folder / "image.nii.gz")
        np.testing.assert_allclose(as_itk_reads(folder / "image.nii.gz"), moving.affine, atol=1e-3)
        np.testing.assert_allclose(moving.spacing, SPACING, rtol=1e-5)
        options = {"shape": SHAPE, "spacing": (SPACING,) * 3, "bias_correction": False, "skull_strip": "none"}
        files = {name: folder / f"atlas_{name}.nii.gz" for name in names}
        preprocess_files(folder / "atlas", **files, **options)
        files = {name: folder / f"{name}.nii.gz" for name in names}
        preprocess_files(folder / "scan", atlas=folder / "atlas", affine_spacing=6.0, **files, **options)
        paths = [folder / name / "image.nii.gz" for name in ("scan", "atlas")]
        there = [read_image(path) for path in paths]
        assert not register(*there, method="affine").any()
        assert np.corrcoef(*(volume.data.ravel() for volume in there))[0, 1] > 0.97
        found = read_labels(folder / "scan" / "labels.nii.gz").data
        atlas = read_labels(folder / "atlas" / "labels.nii.gz").data
        assert 2 * (found * (found == atlas) > 0).sum() / ((found > 0).sum() + (atlas > 0).sum()) > 0.93
        like = {"like": folder / "image.nii.gz", "volume": folder / "scan" / "labels.nii.gz"}
        native_files(folder / "native.nii.gz", preprocessed=folder / "scan", **like)
        back, own = read_labels(folder / "native.nii.gz"), read_labels(folder / "labels.nii.gz")
    np.testing.assert_allclose(as_itk_reads(folder / "native.nii.gz"), moving.affine, atol=1e-3)
    np.testing.assert_allclose(back.affine, own.affine, atol=1e-3)
    same = (back.data == own.data) & (own.data > 0)
    assert 2 * same.sum() / ((back.data > 0).sum() + (own.data > 0).sum()) > 0.93


def test_the_page_tells_how_many_cases_were_tried_and_names_tests_that_exist():
    text = (Path(__file__).parents[1] / "docs" / "files.md").read_text()
    told = {name: int(count) for name, count in re.findall(r"^\| ([^|]+?) \| (\d+) \|$", text, re.MULTILINE)}
    assert told == EXAMPLES | {
        "fields through `dmir field convert` into any convention and back, on any grids": ROUND_TRIPS,
        "names and numbers through every kind of table": TRIED,
        "names through a configuration as it is written beside the results": TRIED,
    }
    named = re.findall(r"::(test_\w+)", text)
    files = "".join(path.read_text() for path in Path(__file__).parent.glob("test_*.py"))
    assert named and set(named) <= set(re.findall(r"^def (test_\w+)", files, re.MULTILINE))
