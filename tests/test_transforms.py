"""Transforms of other programs: read, against ITK, nitransforms, fslpy (of FSL), surfa (of FreeSurfer)."""

import nibabel as nib
import numpy as np
import pytest
import SimpleITK as sitk
from nitransforms.io.afni import AFNILinearTransform
from nitransforms.io.fsl import FSLLinearTransform
from nitransforms.io.itk import ITKDisplacementsField
from nitransforms.io.lta import FSLinearTransform
from nitransforms.linear import Affine as TheirAffine
from nitransforms.nonlinear import DenseFieldTransform
from scipy.ndimage import map_coordinates, zoom

from dmir.errors import InputError
from dmir.fields import load_field, save_field, to_voxels, warp
from dmir.transforms import CONVENTIONS, Affine, Field, Transform, compose, read
from dmir.transforms.conventions import empty_image, encoded
from dmir.volumes import Grid, Volume, write_volume

LPS = np.array([-1.0, -1.0, 1.0])


def rotated(angles, signed_axes, spacing, origin):
    """An affine: axes permuted and turned, then rotated by angles (degrees) round x, y, z."""
    matrix = np.eye(3)
    for axis, angle in enumerate(np.radians(angles)):
        turn = np.eye(3)
        i, j = (k for k in range(3) if k != axis)
        turn[i, i] = turn[j, j] = np.cos(angle)
        turn[i, j], turn[j, i] = -np.sin(angle), np.sin(angle)
        matrix = turn @ matrix
    permuted = np.zeros((3, 3))
    for column, axis in enumerate(signed_axes):
        permuted[abs(axis) - 1, column] = np.sign(axis)
    affine = np.eye(4)
    affine[:3, :3] = matrix @ permuted @ np.diag(spacing)
    affine[:3, 3] = origin
    return affine


# oblique, anisotropic, no axis where RAS has it, odd shapes, origins elsewhere; determinants of either sign
FIXED = Grid((13, 17, 11), rotated((8, -5, 11), (-1, 3, 2), (2.1, 1.3, 1.7), (21, -33, 14)))
MOVING = Grid((15, 12, 19), rotated((-4, 9, 3), (3, -2, 1), (1.9, 2.3, 1.2), (-2, -13, 19)))
STRAIGHT = Grid((13, 17, 11), rotated((0, 0, 0), (-1, 3, 2), (2.1, 1.3, 1.7), (21, -33, 14)))
assert np.linalg.det(FIXED.affine[:3, :3]) > 0 > np.linalg.det(STRAIGHT.affine[:3, :3] @ np.diag([-1, 1, 1]))
assert np.linalg.det(MOVING.affine[:3, :3]) > 0
LEFT_HANDED = Grid((13, 17, 11), FIXED.affine @ np.diag([1, 1, -1, 1]))


def indices(grid):
    return np.stack(np.meshgrid(*(np.arange(n) for n in grid.shape), indexing="ij")).astype(np.float64)


def world(grid):
    """RAS mm of every voxel, (3, D, H, W)."""
    return np.einsum("ij,jdhw->idhw", grid.affine[:3, :3], indices(grid)) + grid.affine[:3, 3].reshape(3, 1, 1, 1)


def displaced(grid, amplitude=2.0):
    """A smooth map's step in RAS mm, a small affine in it, (3, D, H, W)."""
    x = world(grid) / 9.0
    waves = np.stack([np.sin(x[1] + 0.3), np.cos(x[2] - x[0]), np.sin(x[0] * 0.7 + x[1] * 0.4)])
    linear = np.array([[0.03, 0.05, 0], [-0.04, -0.02, 0.01], [0.02, 0, 0.04]])
    return (
        amplitude * waves + np.einsum("ij,jdhw->idhw", linear, x * 9) + np.array([3.0, -2.0, 1.0]).reshape(3, 1, 1, 1)
    )


def vector_image(vectors, grid, fifth=True, intent=0, **fields):
    """A NIfTI image of (3, D, H, W)."""
    data = np.moveaxis(vectors, 0, -1).astype(np.float32)
    image = nib.Nifti1Image(data[..., None, :] if fifth else data, grid.affine)
    image.header["intent_code"] = intent
    for name, value in fields.items():
        image.header[name] = value
    return image


def saved(tmp_path, image, name="field.nii.gz"):
    nib.save(image, tmp_path / name)
    return tmp_path / name


def steps_found(transform):
    """What was read, as steps in RAS mm."""
    field = transform.on()
    return np.einsum("ij,jdhw->idhw", field.affine[:3, :3], field.displacement)


def same(found, expected, tolerance=2e-4):
    np.testing.assert_allclose(found, expected, atol=tolerance, rtol=0)


# ---------------------------------------------------------------- fields


def test_a_field_of_itk_moves_points_as_itk_does(tmp_path):
    path = saved(tmp_path, vector_image(displaced(FIXED) * LPS.reshape(3, 1, 1, 1), FIXED, intent=1007))
    found = read(path)
    assert (found.convention, found.known_by) == ("itk", "a vector image with five axes")
    same(steps_found(found), displaced(FIXED))
    itk = sitk.DisplacementFieldTransform(sitk.ReadImage(str(path), sitk.sitkVectorFloat64))
    inside = world(FIXED)[:, 2:-2, 2:-2, 2:-2].reshape(3, -1).T[::37] + 0.4
    same(found.at(inside), [np.array(itk.TransformPoint(tuple(p * LPS))) * LPS for p in inside])
    theirs = DenseFieldTransform(ITKDisplacementsField.from_image(nib.load(path)), is_deltas=True)
    centres = world(FIXED)[:, 1:-1, 1:-1, 1:-1].reshape(3, -1).T[::37]  # between them it interpolates by splines
    same(found.at(centres), theirs.map(centres))
    for suffix in ("mha", "nrrd"):
        sitk.WriteImage(sitk.ReadImage(str(path)), str(tmp_path / f"field.{suffix}"))
        same(steps_found(read(tmp_path / f"field.{suffix}")), displaced(FIXED))


@pytest.mark.parametrize("grid", [FIXED, LEFT_HANDED], ids=["neurological", "radiological"])
@pytest.mark.parametrize("kind", ["relative", "absolute"])
def test_a_field_of_fnirt_moves_points_as_fsl_does(tmp_path, grid, kind):
    from fsl.data.image import Image
    from fsl.transform.nonlinear import DeformationField, convertDeformationSpace

    moved = world(grid) + displaced(grid)
    reference, source = (Image(np.zeros(g.shape, np.uint8), xform=g.affine) for g in (grid, MOVING))
    of_world = DeformationField(np.moveaxis(moved, 0, -1), source, reference, srcSpace="world", refSpace="world",
                                defType="absolute", xform=grid.affine)  # fmt: skip
    theirs = convertDeformationSpace(of_world, "fsl", "fsl")
    data = np.asarray(theirs[:])
    if kind == "relative":
        from fsl.transform.nonlinear import convertDeformationType

        data = convertDeformationType(theirs, "relative")
    path = saved(tmp_path, vector_image(np.moveaxis(data, -1, 0), grid, fifth=False, intent=2006))
    with pytest.raises(InputError, match="--moving"):
        read(path, "fsl" if kind == "relative" else "fsl-absolute")
    same(steps_found(read(path, "fsl" if kind == "relative" else "fsl-absolute", moving=MOVING)), displaced(grid))
    assert read(path, moving=MOVING).convention == ("fsl" if kind == "relative" else "fsl-absolute")
    assert read(path, moving=MOVING).known_by == "FNIRT's intent code"


@pytest.mark.parametrize("name", ["abs_crs", "disp_crs", "abs_ras", "disp_ras"])
def test_a_field_of_freesurfer_is_what_freesurfer_says(name):
    import surfa

    def geometry(grid):
        return surfa.ImageGeometry(grid.shape, vox2world=grid.affine)

    places = np.moveaxis(world(FIXED) + displaced(FIXED), 0, -1).astype(np.float32)
    warp_ = surfa.Warp(places, geometry(MOVING), geometry(FIXED), format=surfa.Warp.Format.abs_ras)
    theirs = warp_.convert(getattr(surfa.Warp.Format, name)).data
    ours = {"abs_crs": "voxels-absolute", "disp_crs": "voxels", "abs_ras": "spm", "disp_ras": "ras"}[name]
    displacement = to_voxels(displaced(FIXED), FIXED.affine)
    same(np.moveaxis(encoded(displacement, CONVENTIONS[ours], FIXED, MOVING), 0, -1), theirs, 1e-3)


def test_a_displacement_by_its_intent_is_ras_as_itk_has_it(tmp_path):
    """NIfTI has two intents for vectors: ITK, since 5.3, takes one as it is and turns the other to LPS."""
    path = saved(tmp_path, vector_image(displaced(FIXED), FIXED, intent=1006))
    assert read(path).convention == "ras"
    same(steps_found(read(path)), displaced(FIXED))
    itk = sitk.DisplacementFieldTransform(sitk.ReadImage(str(path), sitk.sitkVectorFloat64))
    inside = world(FIXED)[:, 2:-2, 2:-2, 2:-2].reshape(3, -1).T[::37]
    same(read(path).at(inside), [np.array(itk.TransformPoint(tuple(p * LPS))) * LPS for p in inside])
    with pytest.raises(InputError, match="another kind: ras"):
        load_field(path)


@pytest.mark.parametrize("suffix", ["mgz", "nii.gz"])
@pytest.mark.parametrize("name", ["abs_crs", "disp_crs", "abs_ras", "disp_ras"])
def test_a_warp_of_freesurfer_says_what_it_is(tmp_path, name, suffix):
    import surfa

    places = np.moveaxis(world(FIXED) + displaced(FIXED), 0, -1).astype(np.float32)
    fixed, moving = (surfa.ImageGeometry(grid.shape, vox2world=grid.affine) for grid in (FIXED, MOVING))
    warp_ = surfa.Warp(places, moving, fixed, format=surfa.Warp.Format.abs_ras)
    warp_.convert(getattr(surfa.Warp.Format, name)).save(str(tmp_path / f"warp.{suffix}"))
    found = read(tmp_path / f"warp.{suffix}")
    kinds = {"abs_crs": "voxels-absolute", "disp_crs": "voxels", "abs_ras": "spm", "disp_ras": "ras"}
    assert found.convention == ("ras" if suffix == "nii.gz" else kinds[name])  # in NIfTI it keeps nothing else
    assert found.known_by == "what FreeSurfer's warp says of itself" and not found.assumed
    same(steps_found(found), displaced(FIXED), 5e-4)
    content = (tmp_path / f"warp.{suffix}").read_bytes()
    (tmp_path / f"cut.{suffix}").write_bytes(content[: len(content) // 2])
    with pytest.raises(InputError, match="cut"):
        read(tmp_path / f"cut.{suffix}")


def test_afni_leaves_obliqueness_out_of_both_images(tmp_path):
    lps = displaced(STRAIGHT) * LPS.reshape(3, 1, 1, 1)
    image = vector_image(lps, STRAIGHT)
    image.header.extensions.append(nib.nifti1.Nifti1Extension(4, b"<AFNI_attributes />"))
    found = read(saved(tmp_path, image))
    assert found.convention == "afni" and len(found.assumed) == 1
    same(steps_found(found), displaced(STRAIGHT))
    image = vector_image(lps, FIXED)
    image.header.extensions.append(nib.nifti1.Nifti1Extension(4, b"<AFNI_attributes />"))
    path = saved(tmp_path, image)
    with pytest.raises(InputError, match="--moving"):
        read(path)
    # a constant step is a translation, of which nitransforms knows what AFNI makes of it
    step = np.array([1.5, -2.5, 0.75])
    constant = np.broadcast_to(step.reshape(3, 1, 1, 1), (3, *FIXED.shape))
    image = vector_image(constant, FIXED)
    image.header.extensions.append(nib.nifti1.Nifti1Extension(4, b"<AFNI_attributes />"))
    found = read(saved(tmp_path, image), moving=MOVING)
    line = "1 0 0 {} 0 1 0 {} 0 0 1 {}".format(*step)
    matrix = AFNILinearTransform.from_string(line).to_ras(moving=empty_image(MOVING), reference=empty_image(FIXED))
    points = world(FIXED).reshape(3, -1).T[::101]
    same(found.at(points), TheirAffine(matrix).map(points), 1e-3)


def test_a_grid_without_nearest_axes_is_no_grid_of_afni():
    grid = Grid((4, 4, 4), rotated((0, 40, -40), (1, 2, 3), (1, 1, 1), (0, 0, 0)))
    with pytest.raises(InputError, match="so oblique"):
        encoded(np.zeros((3, *FIXED.shape), np.float32), CONVENTIONS["afni"], FIXED, grid)


def test_spm_and_niftyreg_are_not_taken_for_itk(tmp_path):
    places = world(FIXED) + displaced(FIXED)
    for name, fields in {"described": {"descrip": b"Deformation"}, "plain": {}}.items():
        found = read(saved(tmp_path, vector_image(places, FIXED, intent=1007, **fields), f"y_{name}.nii"))
        assert found.convention == "spm"
        same(steps_found(found), displaced(FIXED))
        with pytest.raises(InputError, match="another kind: spm"):
            load_field(tmp_path / f"y_{name}.nii")
    fields = {"intent_name": b"NREG_TRANS", "intent_p1": 1}
    found = read(saved(tmp_path, vector_image(displaced(FIXED), FIXED, intent=1007, **fields)))
    assert found.convention == "ras"
    same(steps_found(found), displaced(FIXED))
    with pytest.raises(InputError, match="splines or velocities"):
        read(saved(tmp_path, vector_image(displaced(FIXED), FIXED, intent=1007, **{**fields, "intent_p1": 2})))


@pytest.mark.parametrize(
    ("kind", "stored"),
    [
        ("itk", lambda: displaced(FIXED) * LPS.reshape(3, 1, 1, 1)),
        ("ras", lambda: displaced(FIXED)),
        ("voxels", lambda: to_voxels(displaced(FIXED), FIXED.affine)),
    ],
)
def test_what_nothing_proves_is_asked_for_and_the_candidates_are_named(tmp_path, kind, stored):
    path = saved(tmp_path, vector_image(stored(), FIXED, fifth=False))
    with pytest.raises(InputError, match="--from") as error:
        read(path)
    message = str(error.value)
    assert all(f"{name} = " in message for name in ("itk", "ras", "fsl", "afni", "voxels"))
    assert "spm = " not in message  # that they are no places can be seen
    found = read(path, kind)
    same(steps_found(found), displaced(FIXED))
    assert found.known_by == "what you say"
    with pytest.raises(InputError, match=r"--from"):
        load_field(path)
    assert any("no likely registration" in line for line in read(path, "spm").assumed)


def test_a_step_of_twice_the_size_is_not_guessed(tmp_path):
    """Places in LPS and steps that double everything are the same numbers."""
    path = saved(tmp_path, vector_image(world(FIXED) * LPS.reshape(3, 1, 1, 1), FIXED, intent=1007))
    with pytest.raises(InputError, match=r"do not fit.*itk = .*lps-absolute = "):
        read(path)


def test_spline_coefficients_and_velocities_are_refused_with_what_to_do(tmp_path):
    with pytest.raises(InputError, match="fnirtfileutils"):
        read(saved(tmp_path, vector_image(displaced(FIXED), FIXED, fifth=False, intent=2007)))
    with pytest.raises(InputError, match="velocity"):
        read(saved(tmp_path, vector_image(displaced(FIXED), FIXED, intent=1007, descrip=b"Flow Field")))
    with pytest.raises(InputError, match="DIPY"):
        read(saved(tmp_path, nib.Nifti1Image(np.zeros((4, 5, 6, 3, 2), np.float32), np.eye(4))))
    (tmp_path / "talairach.m3z").write_bytes(b"x")
    with pytest.raises(InputError, match="mri_warp_convert"):
        read(tmp_path / "talairach.m3z")
    with pytest.raises(InputError, match="Did you mean 'itk'"):
        read(saved(tmp_path, vector_image(displaced(FIXED), FIXED)), "itkk")


def test_arrays_of_learn2reg_and_voxelmorph(tmp_path):
    displacement = to_voxels(displaced(FIXED), FIXED.affine)
    half = np.stack([zoom(one, 0.5, order=2) for one in displacement]).astype(np.float16)
    np.savez(tmp_path / "disp_0001_0002.npz", half)
    with pytest.raises(InputError, match="--fixed"):
        read(tmp_path / "disp_0001_0002.npz")
    with pytest.raises(InputError, match="half as many"):  # of odd numbers there are no halves
        read(tmp_path / "disp_0001_0002.npz", fixed=FIXED)
    # as its evaluation warps
    even = Grid((12, 16, 10), FIXED.affine)
    halved = half[:, :6, :8, :5]
    np.savez(tmp_path / "even.npz", halved)
    found = read(tmp_path / "even.npz", fixed=even)
    assert found.convention == "learn2reg" and "half" in found.known_by
    field = found.on()
    full = np.array([zoom(one.astype("float32"), 2, order=2) for one in halved])
    same(field.displacement, full, 1e-6)
    image = np.random.default_rng(0).random(even.shape).astype(np.float32)
    theirs = map_coordinates(image, indices(even) + full, order=1, mode="grid-constant")
    import torch

    ours = warp(torch.from_numpy(image)[None, None], torch.from_numpy(field.displacement)[None])[0, 0]
    same(ours.numpy(), theirs, 1e-4)

    np.savez(tmp_path / "warp.npz", vol=np.moveaxis(displacement, 0, -1))
    found = read(tmp_path / "warp.npz", fixed=FIXED)
    assert found.convention == "voxels" and "VoxelMorph" in found.known_by
    same(steps_found(found), displaced(FIXED))
    np.save(tmp_path / "warp.npy", displacement)
    with pytest.raises(InputError, match="--from"):
        read(tmp_path / "warp.npy", fixed=FIXED)
    same(steps_found(read(tmp_path / "warp.npy", "voxels", fixed=FIXED)), displaced(FIXED))
    np.savez(tmp_path / "wrong.npz", displacement[:, :-2])
    with pytest.raises(InputError, match="13x17x11"):
        read(tmp_path / "wrong.npz", fixed=FIXED)


def test_voxels_count_on_the_moving_images_own_grid(tmp_path):
    write_volume(tmp_path / "moving.nii.gz", Volume(np.ones(MOVING.shape, np.float32), MOVING.affine))
    there = np.linalg.inv(MOVING.affine)
    place = world(FIXED) + displaced(FIXED)
    steps = np.einsum("ij,jdhw->idhw", there[:3, :3], place) + there[:3, 3].reshape(3, 1, 1, 1) - indices(FIXED)
    path = saved(tmp_path, vector_image(steps, FIXED, fifth=False))
    same(steps_found(read(path, "voxels", moving=tmp_path / "moving.nii.gz")), displaced(FIXED), 1e-3)


def test_our_own_field_is_known_whatever_is_in_it(tmp_path):
    """A field with an affine that turns the head round is no likely one; ours says what it is."""
    turned = np.einsum("ij,jdhw->idhw", np.diag([-2.0, -2.0, 0]), world(FIXED))
    save_field(tmp_path / "field.nii.gz", to_voxels(turned, FIXED.affine), FIXED.affine)
    same(steps_found(read(tmp_path / "field.nii.gz")), turned)
    load_field(tmp_path / "field.nii.gz")


# ---------------------------------------------------------------- affines and composites

MATRIX = rotated((6, -9, 4), (1, 2, 3), (1.05, 0.93, 1.02), (4, -7, 11))  # fixed world to moving world


def test_affines_of_itk_fsl_freesurfer_and_afni(tmp_path):
    lps = np.diag([*LPS, 1]) @ MATRIX @ np.diag([*LPS, 1])
    affine = sitk.AffineTransform(3)
    affine.SetMatrix(lps[:3, :3].ravel())
    affine.SetCenter((3.0, 1.0, -8.0))
    affine.SetTranslation(lps[:3, 3] - np.array((3, 1, -8)) + lps[:3, :3] @ (3, 1, -8))
    for name in ("affine.txt", "affine.tfm", "affine.mat", "affine.h5"):
        sitk.WriteTransform(affine, str(tmp_path / name))
        same(read(tmp_path / name).steps[0].matrix, MATRIX, 1e-6)
    images = {"moving": empty_image(MOVING), "reference": empty_image(FIXED)}
    grids = {"moving": MOVING, "fixed": FIXED}
    (tmp_path / "fsl.mat").write_text(FSLLinearTransform.from_ras(MATRIX, **images).to_string())
    with pytest.raises(InputError, match="--from fsl or --from ras"):
        read(tmp_path / "fsl.mat")
    with pytest.raises(InputError, match="--moving IMAGE"):
        read(tmp_path / "fsl.mat", "fsl", fixed=FIXED)
    same(read(tmp_path / "fsl.mat", "fsl", **grids).steps[0].matrix, MATRIX, 1e-5)
    np.savetxt(tmp_path / "ras.mat", MATRIX)
    same(read(tmp_path / "ras.mat", "ras").steps[0].matrix, MATRIX, 1e-9)
    (tmp_path / "a.lta").write_text(FSLinearTransform.from_ras(MATRIX, **images).to_string())
    same(read(tmp_path / "a.lta").steps[0].matrix, MATRIX, 1e-5)
    (tmp_path / "a.aff12.1D").write_text(AFNILinearTransform.from_ras(MATRIX, **images).to_string())
    same(read(tmp_path / "a.aff12.1D", **grids).steps[0].matrix, MATRIX, 1e-4)
    with pytest.raises(InputError, match="no other convention than afni"):
        read(tmp_path / "a.aff12.1D", "itk", **grids)


def test_a_matrix_of_fsl_maps_as_fsl_says(tmp_path):
    from fsl.data.image import Image
    from fsl.transform.flirt import toFlirt

    source, reference = (Image(np.zeros(g.shape, np.uint8), xform=g.affine) for g in (MOVING, LEFT_HANDED))
    np.savetxt(tmp_path / "a.mat", toFlirt(np.linalg.inv(MATRIX), source, reference, "world", "world"))
    same(read(tmp_path / "a.mat", "fsl", fixed=LEFT_HANDED, moving=MOVING).steps[0].matrix, MATRIX, 1e-5)


def test_a_composite_of_itk_is_taken_apart_in_order(tmp_path):
    lps = np.diag([*LPS, 1]) @ MATRIX @ np.diag([*LPS, 1])
    affine = sitk.AffineTransform(3)
    affine.SetMatrix(lps[:3, :3].ravel())
    affine.SetTranslation(lps[:3, 3])
    image = saved(tmp_path, vector_image(displaced(FIXED) * LPS.reshape(3, 1, 1, 1), FIXED, intent=1007))
    field = sitk.DisplacementFieldTransform(sitk.ReadImage(str(image), sitk.sitkVectorFloat64))
    both = sitk.CompositeTransform([affine, field])  # the last one is applied first
    sitk.WriteTransform(both, str(tmp_path / "both.h5"))
    found = read(tmp_path / "both.h5")
    assert [type(step) for step in found.steps] == [Field, Affine]
    inside = world(FIXED)[:, 2:-2, 2:-2, 2:-2].reshape(3, -1).T[::41] + 0.2
    expected = [np.array(both.TransformPoint(tuple(p * LPS))) * LPS for p in inside]
    same(found.at(inside), expected)
    same(compose([read(image), Transform((Affine(MATRIX),))]).at(inside), expected)
    whole = found.on()  # in one field, at its own voxels
    places = world(FIXED) + np.einsum("ij,jdhw->idhw", FIXED.affine[:3, :3], whole.displacement)
    same(places.reshape(3, -1).T, found.at(world(FIXED).reshape(3, -1).T), 1e-3)


def test_splines_of_itk_lie_on_the_fixed_grid(tmp_path):
    spline = sitk.BSplineTransformInitializer(sitk.ReadImage(str(saved(tmp_path, empty_image(FIXED)))), [3, 3, 3])
    spline.SetParameters(np.random.default_rng(1).normal(size=len(spline.GetParameters())))
    sitk.WriteTransform(spline, str(tmp_path / "spline.tfm"))
    with pytest.raises(InputError, match="--fixed"):
        read(tmp_path / "spline.tfm")
    points = world(FIXED).reshape(3, -1).T[::97]
    found = read(tmp_path / "spline.tfm", fixed=FIXED).at(points)
    same(found, [np.array(spline.TransformPoint(tuple(p * LPS))) * LPS for p in points], 1e-3)


def test_what_is_no_transform_is_refused(tmp_path):
    for name in ("a.mat", "a.txt", "a.tfm", "a.h5", "a.lta", "a.aff12.1D", "a.npz", "a.mha", "a.nii.gz"):
        (tmp_path / name).write_bytes(b"nothing of the kind")
        with pytest.raises(InputError, match="a\\."):
            read(tmp_path / name, fixed=FIXED, moving=MOVING)
    with pytest.raises(InputError, match="no such file"):
        read(tmp_path / "missing.nii.gz")
