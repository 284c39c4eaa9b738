"""Whatever this project writes means the same to nibabel, ITK, ANTs and nitransforms: values, places and directions.

On a pair with all difficulties at once: oblique, anisotropic, no axis where RAS has it, odd shapes, origins elsewhere,
a grid of its own for either scan.
"""

import ants
import nibabel as nib
import numpy as np
import pandas as pd
import pytest
import SimpleITK as sitk
from nitransforms.base import ImageGrid
from nitransforms.io.itk import ITKDisplacementsField, ITKLinearTransform
from nitransforms.nonlinear import DenseFieldTransform
from scipy.ndimage import map_coordinates
from test_transforms import LPS, rotated, same, world

from dmir.cli import main
from dmir.transforms import read
from dmir.volumes import Grid, Volume, read_image, read_labels, write_volume


def centred(shape, angles, axes, spacing, centre):
    affine = rotated(angles, axes, spacing, (0, 0, 0))
    affine[:3, 3] = np.array(centre) - affine[:3, :3] @ ((np.array(shape) - 1) / 2)
    return Grid(shape, affine)


FIXED = centred((41, 47, 37), (8, -5, 11), (-1, 3, 2), (4.1, 3.3, 4.7), (21, -33, 14))
MOVING = centred((45, 35, 49), (-4, 9, 3), (3, -2, 1), (3.9, 5.3, 3.2), (12, -25, 9))
VOLUMES = ("warped", "warped_labels", "fixed_labels_on_moving", "jacobian", "native")
FIELDS = ("field", "inverse_field")


def brain(grid, shift, wave):
    """Image and labels of a brain of about 1200 ml, shifted and bent."""
    places = world(grid) - np.reshape(np.array([21.0, -33, 14]) + shift, (3, 1, 1, 1))
    x, y, z = places - wave * np.sin(np.roll(places, 1, axis=0) / 25)
    inside = (x / 62) ** 2 + (y / 76) ** 2 + (z / 60) ** 2 < 1
    image = 100 + 40 * np.sin(x / 9 + 1) * np.cos(y / 11) + 30 * np.sin(z / 8 + y / 30)
    labels = np.where(x < 0, 2, 41) + 1000 * (z > 0)
    return np.where(inside, image, 0).astype(np.float32), np.where(inside, labels, 0).astype(np.int32)


@pytest.fixture(scope="module")
def out(tmp_path_factory):
    """A folder with a registration, a determinant map and a volume in a scan's own space."""
    folder = tmp_path_factory.mktemp("written")
    for name, grid, shift, wave in (("fixed", FIXED, 0, 0), ("moving", MOVING, np.array([-6.0, 5, -4]), 4.0)):
        image, labels = brain(grid, shift, wave)
        write_volume(folder / f"{name}.nii.gz", Volume(image, grid.affine))
        write_volume(folder / f"{name}_labels.nii.gz", Volume(labels, grid.affine))
    paths = [part for name in ("moving", "fixed", "moving-labels", "fixed-labels")
             for part in (f"--{name}", str(folder / f"{name.replace('-', '_')}.nii.gz"))]  # fmt: skip
    assert main(["register", *paths, "--out", str(folder), "--threads", "1"]) == 0
    assert main(["field", "jacobian", str(folder / "field.nii.gz"), "--out", str(folder / "jacobian.nii.gz")]) == 0
    # a scan's preprocessed folder: its image on the cohort's grid and the way from there to the scan
    write_volume(folder / "image.nii.gz", read_image(folder / "warped.nii.gz"))
    native = ["--volume", str(folder / "warped_labels.nii.gz"), "--like", str(folder / "moving.nii.gz")]
    assert main(["native", "--preprocessed", str(folder), *native, "--out", str(folder / "native.nii.gz")]) == 0
    return folder


def corners(shape):
    return [(0, 0, 0), (shape[0] - 1, 0, 0), (0, shape[1] - 1, 0), (0, 0, shape[2] - 1), tuple(n - 1 for n in shape)]


@pytest.mark.parametrize("name", [*VOLUMES, *FIELDS])
def test_every_reader_finds_the_same_voxels_in_the_same_places(out, name):
    path = str(out / f"{name}.nii.gz")
    grid = MOVING if name in ("fixed_labels_on_moving", "inverse_field", "native") else FIXED
    theirs, itk, image = nib.load(path), sitk.ReadImage(path), ants.image_read(path)
    values = np.asanyarray(theirs.dataobj)
    assert len(np.unique(values)) >= 5
    vectors = name in FIELDS
    of_itk = sitk.GetArrayFromImage(itk)
    np.testing.assert_array_equal(of_itk.transpose(2, 1, 0, 3) if vectors else of_itk.T, values.squeeze())
    np.testing.assert_array_equal(image.numpy(), values.squeeze())
    assert image.components == itk.GetNumberOfComponentsPerPixel() == (3 if vectors else 1)
    assert theirs.header.get_xyzt_units()[0] == "mm"
    same(theirs.header.get_qform(), grid.affine, 1e-3)
    same(ImageGrid(path).affine, grid.affine, 1e-4)
    for corner in corners(grid.shape):
        place = nib.affines.apply_affine(grid.affine, corner)
        same(nib.affines.apply_affine(theirs.affine, corner), place, 1e-3)
        same(np.array(itk.TransformIndexToPhysicalPoint(corner)) * LPS, place, 1e-3)
        same((image.direction @ (image.spacing * np.array(corner)) + image.origin) * LPS, place, 1e-3)


@pytest.mark.parametrize("name", FIELDS)
def test_every_reader_moves_points_as_the_field_does(out, name):
    path, grid = str(out / f"{name}.nii.gz"), MOVING if name == "inverse_field" else FIXED
    points = world(grid)[:, 3:-3:5, 3:-3:5, 3:-3:5].reshape(3, -1).T
    expected = read(path).at(points)
    assert np.linalg.norm(expected - points, axis=1).max() > 5
    itk = sitk.DisplacementFieldTransform(sitk.ReadImage(path, sitk.sitkVectorFloat64))
    same([np.array(itk.TransformPoint(tuple(p * LPS))) * LPS for p in points], expected, 1e-3)
    same(DenseFieldTransform(ITKDisplacementsField.from_image(nib.load(path))).map(points), expected, 1e-3)
    table = pd.DataFrame(points * LPS, columns=["x", "y", "z"])
    same(ants.apply_transforms_to_points(3, table, [path])[["x", "y", "z"]].to_numpy() * LPS, expected, 1e-3)


def test_every_reader_moves_points_as_the_affine_does(out):
    path, points = str(out / "affine.mat"), world(FIXED)[:, ::9, ::9, ::9].reshape(3, -1).T
    expected = read(path).at(points)
    assert np.linalg.norm(expected - points, axis=1).max() > 5
    itk, theirs = sitk.ReadTransform(path), ants.read_transform(path)
    same([np.array(itk.TransformPoint(tuple(p * LPS))) * LPS for p in points], expected, 1e-4)
    same([np.array(theirs.apply_to_point(list(p * LPS))) * LPS for p in points], expected, 1e-3)
    matrix = ITKLinearTransform.from_filename(path).to_ras()
    same(points @ matrix[:3, :3].T + matrix[:3, 3], expected, 1e-3)


def sampled(image, place, order):
    """An image at places of its own world (3, ...), by scipy."""
    back = np.linalg.inv(image.affine)
    index = np.einsum("ij,j...->i...", back[:3, :3], place) + back[:3, 3].reshape(3, *[1] * (place.ndim - 1))
    return map_coordinates(np.asarray(image.dataobj, dtype=np.float64), index, order=order, mode="grid-constant")


def places_by(out, name, grid):
    """Where a field takes every voxel of its grid, by ITK."""
    itk = sitk.DisplacementFieldTransform(sitk.ReadImage(str(out / f"{name}.nii.gz"), sitk.sitkVectorFloat64))
    points = world(grid).reshape(3, -1).T * LPS
    return (np.array([itk.TransformPoint(tuple(p)) for p in points]) * LPS).T.reshape(3, *grid.shape)


def test_what_was_warped_is_what_the_written_field_warps(out):
    fixed, moving = (ants.image_read(str(out / f"{name}.nii.gz")) for name in ("fixed", "moving"))
    field, inverse = (str(out / f"{name}.nii.gz") for name in FIELDS)
    ours = read_image(out / "warped.nii.gz").data
    # the affine and the field are applied in one: within interpolation, and but for where a scan's border cuts
    place = places_by(out, "field", FIXED)
    same(ours, sampled(nib.load(out / "moving.nii.gz"), place, 1), 2e-2)
    close = np.abs(ours - ants.apply_transforms(fixed, moving, [field]).numpy()) < 2e-2
    assert close.mean() > 0.995
    for name, image, ways, like in (("warped_labels", "moving_labels", [field], fixed),
                                    ("fixed_labels_on_moving", "fixed_labels", [inverse], moving)):  # fmt: skip
        labels = ants.image_read(str(out / f"{image}.nii.gz"))
        theirs = ants.apply_transforms(like, labels, ways, interpolator="nearestNeighbor").numpy()
        found = read_labels(out / f"{name}.nii.gz").data
        assert set(np.unique(found)) == {0, 2, 41, 1002, 1041}
        assert (found == theirs).mean() > 0.999


def test_a_volume_in_a_scans_own_space_is_what_the_affine_gives(out):
    labels = ants.image_read(str(out / "warped_labels.nii.gz"))
    theirs = ants.apply_transforms(
        ants.image_read(str(out / "moving.nii.gz")), labels, [str(out / "affine.mat")], whichtoinvert=[True],
        interpolator="nearestNeighbor",
    )  # fmt: skip
    found = read_labels(out / "native.nii.gz").data
    assert (found == theirs.numpy()).mean() > 0.999 and found.any()


def test_determinants_are_those_of_the_written_field(out):
    """By numpy's differences, in the world."""
    stored = nib.load(out / "field.nii.gz")
    place = np.moveaxis(stored.get_fdata()[..., 0, :] * LPS, -1, 0) + world(FIXED)
    along_axes = np.stack([np.stack(np.gradient(component)) for component in place])  # [component, axis]
    matrix = np.einsum("ca...,ab->...cb", along_axes, np.linalg.inv(FIXED.affine[:3, :3]))
    found = nib.load(out / "jacobian.nii.gz").get_fdata()
    assert found.std() > 0.02
    same(found, np.linalg.det(matrix), 1e-3)


@pytest.mark.parametrize("kind", ["fsl", "afni", "spm", "voxels", "ras", "itk"])
def test_converted_fields_are_volumes_to_every_reader(out, kind, tmp_path):
    """What the vectors mean is of the programs they are for; where they are is the same to all."""
    path = str(tmp_path / f"{kind}.nii.gz")
    images = ["--fixed", str(out / "fixed.nii.gz"), "--moving", str(out / "moving.nii.gz")]
    assert main(["field", "convert", str(out / "field.nii.gz"), *images, "--to", kind, "--out", path]) == 0
    theirs = nib.load(path)
    same(theirs.affine, FIXED.affine, 1e-4)
    values = np.asanyarray(theirs.dataobj).squeeze()
    assert values.shape == (*FIXED.shape, 3)
    itk = sitk.ReadImage(path)
    of_itk = sitk.GetArrayFromImage(itk)
    of_itk = of_itk.transpose(2, 1, 0, 3) if of_itk.shape[-1] == 3 else of_itk.T
    np.testing.assert_array_equal(of_itk, values * LPS if kind == "ras" else values)  # ITK turns these to LPS by itself
    corner = tuple(n - 1 for n in FIXED.shape)
    index = corner if itk.GetDimension() == 3 else (*corner, 0)
    place = nib.affines.apply_affine(FIXED.affine, corner)
    same(np.array(itk.TransformIndexToPhysicalPoint(index))[:3] * LPS, place, 1e-3)
    back = read(path, moving=out / "moving.nii.gz")
    assert back.convention == kind
    points = world(FIXED)[:, ::9, ::9, ::9].reshape(3, -1).T
    same(back.at(points), read(out / "field.nii.gz").at(points), 1e-3)
