"""What leaves dmir.volumes is checked: every kind of bad file has its message."""

import gzip

import nibabel as nib
import numpy as np
import pytest

from dmir.errors import InputError
from dmir.volumes import (
    Grid,
    Volume,
    atomic_path,
    read_image,
    read_labels,
    read_mask,
    reorient,
    require_same_grid,
    same_grid,
    write_volume,
)

AFFINE = np.array([[0, 0, 1.5, -20], [-1.0, 0, 0, 30], [0, 2.0, 0, -10], [0, 0, 0, 1]])


def save(path, data, affine=AFFINE):
    nib.save(nib.Nifti1Image(data, affine), path)
    return path


def image(shape=(8, 9, 10)):
    return np.random.default_rng(0).normal(size=shape).astype(np.float32)


def message(function, *arguments):
    with pytest.raises(InputError) as caught:
        function(*arguments)
    return str(caught.value)


def test_a_volume_comes_back_as_it_was_written(tmp_path):
    volume = Volume(image(), AFFINE)
    write_volume(tmp_path / "a.nii.gz", volume)
    again = read_image(tmp_path / "a.nii.gz")
    np.testing.assert_array_equal(again.data, volume.data)
    np.testing.assert_allclose(again.affine, AFFINE, atol=1e-6)


def test_equal_volumes_are_equal_files(tmp_path):
    for name in "ab":
        write_volume(tmp_path / f"{name}.nii.gz", Volume(image(), AFFINE))
    assert (tmp_path / "a.nii.gz").read_bytes() == (tmp_path / "b.nii.gz").read_bytes()


def test_one_volume_in_four_dimensions_is_accepted_and_many_are_not(tmp_path):
    one = save(tmp_path / "one.nii.gz", image()[..., None])
    assert read_image(one).shape == (8, 9, 10)
    many = save(tmp_path / "many.nii.gz", np.stack([image()] * 3, axis=-1))
    text = message(read_image, many)
    assert "many.nii.gz" in text and "3 volumes" in text and "one 3-D volume" in text


def test_a_truncated_file_is_named(tmp_path):
    path = save(tmp_path / "cut.nii.gz", image((20, 20, 20)))
    path.write_bytes(path.read_bytes()[:2000])
    assert "cut.nii.gz" in message(read_image, path) and "truncated" in message(read_image, path)
    text = tmp_path / "text.nii.gz"
    text.write_bytes(gzip.compress(b"hello"))
    assert "cannot be read" in message(read_image, text)
    assert "no such file" in message(read_image, tmp_path / "none.nii.gz")


@pytest.mark.parametrize("value", [np.nan, np.inf])
def test_values_that_are_not_finite_are_counted(tmp_path, value):
    data = image()
    data[1, 2, 3] = data[4, 5, 6] = value
    assert "2 voxels that are NaN or infinite" in message(read_image, save(tmp_path / "bad.nii.gz", data))


def test_a_constant_image_is_refused(tmp_path):
    path = save(tmp_path / "flat.nii.gz", np.full((5, 5, 5), 7, np.int16))
    assert "constant image (every voxel is 7)" in message(read_image, path)


def test_masks_and_label_maps(tmp_path):
    assert "empty mask" in message(read_mask, save(tmp_path / "mask.nii.gz", np.zeros((5, 5, 5), np.uint8)))
    assert "no labelled voxel" in message(read_labels, save(tmp_path / "l.nii.gz", np.zeros((5, 5, 5), np.int16)))
    assert "whole numbers" in message(read_labels, save(tmp_path / "f.nii.gz", image()))
    data = np.zeros((5, 5, 5), np.float32)
    data[2, 2, 2] = 42
    assert read_labels(save(tmp_path / "ok.nii.gz", data)).data[2, 2, 2] == 42


def test_a_header_that_lies_about_its_size_is_refused_before_memory_is_taken(tmp_path):
    path = save(tmp_path / "huge.nii", image())
    raw = bytearray(path.read_bytes())
    raw[42:48] = np.array([30000, 30000, 30000], np.int16).tobytes()  # dim[1..3] of the NIfTI header
    path.write_bytes(raw)
    assert "claims (30000, 30000, 30000) voxels" in message(read_image, path)


@pytest.mark.parametrize("orientation", ["RAS", "LPS", "PIR", "SLA"])
def test_reorienting_moves_axes_and_keeps_every_point(orientation):
    volume = Volume(image(), AFFINE)
    turned = reorient(volume, orientation)
    assert turned.orientation == orientation
    index = np.array([1, 2, 3])
    world = turned.affine @ [*index, 1]
    back = np.round(np.linalg.inv(AFFINE) @ world)[:3].astype(int)
    assert turned.data[tuple(index)] == volume.data[tuple(back)]
    np.testing.assert_array_equal(reorient(turned, volume.orientation).data, volume.data)


def test_grids_are_compared_where_they_differ_most():
    a = Grid((100, 100, 100), np.eye(4))
    assert same_grid(a, Grid((100, 100, 100), np.eye(4)))
    stretched = np.diag([1.001, 1, 1, 1])  # a tenth of a millimetre at the far corner only
    assert not same_grid(a, Grid((100, 100, 100), stretched))
    assert not same_grid(a, Grid((100, 100, 101), np.eye(4)))


def test_labels_on_another_grid_are_refused_with_both_grids_told():
    with pytest.raises(InputError) as caught:
        require_same_grid(Volume(image(), AFFINE), Volume(image((8, 9, 11)), AFFINE), "t1.nii.gz", "seg.nii.gz")
    text = str(caught.value)
    assert "seg.nii.gz" in text and "8x9x11" in text and "8x9x10" in text and "nearest" in text


def test_nothing_half_written_stays(tmp_path):
    target = tmp_path / "x.txt"
    target.write_text("old")
    with pytest.raises(RuntimeError), atomic_path(target) as path:
        path.write_text("new")
        raise RuntimeError
    assert target.read_text() == "old" and [p.name for p in tmp_path.iterdir()] == ["x.txt"]
    with atomic_path(target) as path:
        path.write_text("new")
    assert target.read_text() == "new" and [p.name for p in tmp_path.iterdir()] == ["x.txt"]


def save_analyze(folder, name, data, endianness="<", ending=".img.gz"):
    """Write an Analyze pair of which the image alone is compressed, as LPBA40 is published."""
    header = nib.AnalyzeHeader(endianness=endianness)
    nib.save(nib.AnalyzeImage(data, np.diag([-2.0, 2, 3, 1]), header), folder / f"{name}.img")
    if ending == ".img.gz":
        (folder / f"{name}.img.gz").write_bytes(gzip.compress((folder / f"{name}.img").read_bytes()))
        (folder / f"{name}.img").unlink()
    return folder / f"{name}.hdr"


@pytest.mark.parametrize("endianness", "<>")
@pytest.mark.parametrize("ending", [".img", ".img.gz"])
def test_an_analyze_pair_is_read_by_either_of_its_names(tmp_path, endianness, ending):
    data = np.random.default_rng(0).integers(0, 3000, (6, 7, 8, 1)).astype(np.int16)
    header = save_analyze(tmp_path, "S01.delineation.skullstripped", data, endianness, ending)
    image_file = header.with_suffix(ending)
    assert sorted(tmp_path.iterdir()) == sorted([header, image_file])
    for path in (header, image_file):
        volume = read_image(path)
        np.testing.assert_array_equal(volume.data, data[..., 0])
        assert volume.orientation == "LAS"  # what nibabel takes Analyze for
        np.testing.assert_allclose(volume.spacing, [2, 2, 3])


def test_a_compressed_pair_reads_like_the_plain_one(tmp_path):
    """The header decides what it is: an SPM origin, or NIfTI's own affine, is kept."""
    data = np.arange(120, dtype=np.int16).reshape(4, 5, 6)
    for name, kind in (("spm", nib.Spm99AnalyzeImage), ("nifti", nib.Nifti1Pair)):
        nib.save(kind(data, AFFINE if kind is nib.Nifti1Pair else np.diag([-1.0, 1, 1, 1])), tmp_path / f"{name}.img")
        plain = read_image(tmp_path / f"{name}.hdr")
        raw = (tmp_path / f"{name}.img").read_bytes()
        (tmp_path / f"{name}.img").unlink()
        (tmp_path / f"{name}.img.gz").write_bytes(gzip.compress(raw))
        compressed = read_image(tmp_path / f"{name}.hdr")
        np.testing.assert_array_equal(compressed.data, plain.data)
        np.testing.assert_array_equal(compressed.affine, plain.affine)
    np.testing.assert_allclose(compressed.affine, AFFINE, atol=1e-6)


def test_a_pair_without_its_partner_names_it(tmp_path):
    header = save_analyze(tmp_path, "a", np.ones((4, 5, 6), np.int16))
    image_file = header.with_suffix(".img.gz")
    header.rename(tmp_path / "elsewhere")
    assert "a.img.gz: found no a.hdr or a.hdr.gz beside it" in message(read_image, image_file)
    (tmp_path / "elsewhere").rename(header)
    image_file.unlink()
    assert "a.hdr: found no a.img or a.img.gz beside it" in message(read_labels, header)


def test_a_damaged_half_of_a_pair_is_found(tmp_path):
    header = save_analyze(tmp_path, "a", image((9, 9, 9)))
    image_file = header.with_suffix(".img.gz")
    whole = image_file.read_bytes()
    image_file.write_bytes(whole[: len(whole) // 2])
    assert "a.hdr with a.img.gz" in message(read_image, header) and "truncated" in message(read_image, header)
    image_file.write_bytes(whole)
    header.write_bytes(header.read_bytes()[:100])
    assert "a.hdr with a.img.gz" in message(read_image, image_file) and "no header" in message(read_image, image_file)
