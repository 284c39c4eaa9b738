"""``dmir field``: its commands against ANTs, FSL's own mathematics and facts, on oblique grids that are not RAS."""

import json
from pathlib import Path

import ants
import nibabel as nib
import numpy as np
import pandas as pd
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from nitransforms.io.fsl import FSLLinearTransform
from nitransforms.io.lta import FSLinearTransform
from test_transforms import FIXED, LPS, MATRIX, MOVING, displaced, rotated, same, world

from dmir.cli import main
from dmir.fields import load_field, save_field, to_voxels
from dmir.preprocess import write_affine
from dmir.transforms import CONVENTIONS, Field, read, write
from dmir.transforms.conventions import empty_image
from dmir.transforms.points import read_points
from dmir.volumes import Grid, Volume, read_image, read_labels, write_volume


@pytest.fixture
def folder(tmp_path, monkeypatch):
    """A field, its moving image and label map, and the fixed image."""
    monkeypatch.chdir(tmp_path)
    save_field("field.nii.gz", to_voxels(displaced(FIXED), FIXED.affine), FIXED.affine)
    x = world(MOVING) / 7
    image = 100 + 50 * np.sin(x[0]) * np.cos(x[1] + 0.3) + 20 * np.sin(x[2])
    write_volume("moving.nii.gz", Volume(image.astype(np.float32), MOVING.affine))
    write_volume("labels.nii.gz", Volume((1 + (image > 100) + 2 * (x[0] > 1)).astype(np.int32), MOVING.affine))
    write_volume("fixed.nii.gz", Volume(np.ones(FIXED.shape, np.float32), FIXED.affine))
    np.savetxt("ras.txt", MATRIX)
    return tmp_path


def run(command):
    assert main(["field", *command.split()]) == 0


def refused(command, capsys):
    """The message of a command that must fail and leave no file that was not there."""
    capsys.readouterr()
    assert main(["field", *command.split()]) == 1
    message = capsys.readouterr().err
    assert message.startswith(("Error: ", "Warning: ")) and "Traceback" not in message
    return message


# ---------------------------------------------------------------- info, convert


def test_info_tells_kind_proof_grid_lengths_and_folds(folder, capsys):
    run("info field.nii.gz --json")
    told = json.loads(capsys.readouterr().out)
    assert told["convention"] == "itk" and "dmir" in told["known by"] and told["folds"] == 0
    length = np.linalg.norm(displaced(FIXED), axis=0)
    assert told["length, mm"]["mean"] == pytest.approx(length.mean(), rel=1e-4)
    assert told["length, mm"]["largest"] == pytest.approx(length.max(), rel=1e-4)
    assert "13x17x11 voxels of 2.1x1.3x1.7 mm, axes LSA" in told["grid"]
    run("info ras.txt --from ras")
    assert "matrix" in capsys.readouterr().out
    assert "--from fsl or --from ras" in refused("info ras.txt", capsys)
    assert "no such file" in refused("info missing.nii.gz", capsys)


def test_what_is_assumed_is_told_on_the_standard_error(folder, capsys):
    np.save("warp.npy", to_voxels(displaced(FIXED), FIXED.affine).astype(np.float32))
    run("convert warp.npy --from voxels --fixed fixed.nii.gz --out itk.nii.gz")
    assert "Warning: warp.npy: the moving image is taken for one on the fixed image's grid" in capsys.readouterr().err
    same(load_field("itk.nii.gz")[0], load_field("field.nii.gz")[0], 1e-4)


def test_nothing_is_written_where_something_is_missing(folder, capsys):
    assert "--moving IMAGE" in refused("convert field.nii.gz --to fsl --out fsl.nii.gz", capsys)
    assert "Did you mean 'afni'" in refused("convert field.nii.gz --to afnii --out a.nii.gz", capsys)
    assert ".npz" in refused("convert field.nii.gz --to npz --out a.nii.gz", capsys)
    assert "even numbers" in refused("convert field.nii.gz --to learn2reg --moving fixed.nii.gz --out half.npz", capsys)
    assert not {path.name for path in folder.iterdir()} & {"fsl.nii.gz", "a.nii.gz", "half.npz"}


def test_what_learn2reg_loses_is_told(folder, capsys):
    even = Grid((12, 16, 10), FIXED.affine)
    save_field("even.nii.gz", to_voxels(displaced(even), even.affine), even.affine)
    write_volume("even_image.nii.gz", Volume(np.ones(even.shape, np.float32), even.affine))
    run("convert even.nii.gz --to learn2reg --moving even_image.nii.gz --out half.npz")
    warned = capsys.readouterr().err
    lost = read("half.npz", fixed=even, moving=even).on().displacement - load_field("even.nii.gz")[0]
    length = np.linalg.norm(np.einsum("ij,jdhw->idhw", even.affine[:3, :3], lost), axis=0)
    assert f"{length.mean():.3g} mm on average and up to {length.max():.3g} mm" in warned


@st.composite
def grids(draw):
    """Grids of any orientation, handedness, obliqueness, spacing and place."""
    axes = draw(st.permutations([1, 2, 3]))
    signs = draw(st.lists(st.sampled_from([-1, 1]), min_size=3, max_size=3))
    angles = draw(st.lists(st.floats(-20, 20), min_size=3, max_size=3))
    spacing = draw(st.lists(st.floats(0.4, 4), min_size=3, max_size=3))
    origin = draw(st.lists(st.floats(-150, 150), min_size=3, max_size=3))
    shape = tuple(draw(st.lists(st.sampled_from([4, 6, 8, 5]), min_size=3, max_size=3)))
    return Grid(shape, rotated(angles, [s * a for s, a in zip(signs, axes, strict=True)], spacing, origin))


ROUND_TRIPS = 60


@settings(max_examples=ROUND_TRIPS, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(fixed=grids(), moving=grids(), there=st.sampled_from(sorted(set(CONVENTIONS) - {"learn2reg"})), data=st.data())
def test_a_field_comes_back_from_any_convention(tmp_path, fixed, moving, there, data):
    amplitude = data.draw(st.floats(0, 20))
    seed = data.draw(st.integers(0, 2**16))
    displacement = (amplitude * np.random.default_rng(seed).normal(size=(3, *fixed.shape))).astype(np.float32)
    suffix = {"npz": "npz"}.get(there, "nii")
    for name, grid in (("fixed", fixed), ("moving", moving)):
        nib.save(empty_image(grid), tmp_path / f"{name}.nii")
    save_field(tmp_path / "start.nii", displacement, fixed.affine)
    images = f"--fixed {tmp_path}/fixed.nii --moving {tmp_path}/moving.nii"
    run(f"convert {tmp_path}/start.nii --to {there} --out {tmp_path}/there.{suffix} {images}")
    run(f"convert {tmp_path}/there.{suffix} --out {tmp_path}/back.nii {images}")
    found, affine = load_field(tmp_path / "back.nii")
    same(affine, fixed.affine, 1e-4)
    # float32 keeps 7 digits of what is stored: places far from the origin, or in voxels of another grid
    reach = np.abs(world(fixed)).max() + np.abs(world(moving)).max() + 20 * np.abs(displacement).max() + 100
    same(np.einsum("ij,jdhw->idhw", affine[:3, :3], found - displacement), 0 * displacement, 4e-6 * reach)


# ---------------------------------------------------------------- invert


def test_the_inverse_lies_on_the_moving_grid_and_undoes_the_field(folder, capsys):
    run("invert field.nii.gz --moving moving.nii.gz --out back.nii.gz")
    told = capsys.readouterr()
    assert "come from beyond the field's grid" in told.err and "0.00" in told.out
    back, forth = read("back.nii.gz"), read("field.nii.gz")
    same(back.grid.affine, MOVING.affine, 1e-5)
    places = world(MOVING).reshape(3, -1).T
    arrived = back.at(places)
    inside = forth.within(arrived)
    assert 500 < inside.sum() < len(places)
    same(forth.at(arrived)[inside], places[inside], 3e-3)


def test_the_inverse_of_a_field_with_a_large_affine_in_it(folder):
    turned = rotated((20, -35, 50), (1, 2, 3), (1.2, 0.8, 1.1), (9, -4, 6))
    centre = world(FIXED).reshape(3, -1).mean(axis=1)
    turned[:3, 3] = centre - turned[:3, :3] @ centre
    place = np.einsum("ij,jdhw->idhw", turned[:3, :3], world(FIXED) + displaced(FIXED, 1.0))
    step = place + turned[:3, 3].reshape(3, 1, 1, 1) - world(FIXED)
    save_field("turned.nii.gz", to_voxels(step, FIXED.affine), FIXED.affine)
    run("invert turned.nii.gz --moving moving.nii.gz --out back.nii.gz")
    places = world(MOVING).reshape(3, -1).T
    arrived = read("back.nii.gz").at(places)
    inside = read("turned.nii.gz").within(arrived)
    assert inside.sum() > 300
    same(read("turned.nii.gz").at(arrived)[inside], places[inside], 3e-3)


def test_a_field_that_folds_is_told_and_its_inverse_says_so(folder, capsys):
    """It has several inverses: there and back ends at the start, and what is brought back jumps all the same."""
    shape = (48, 12, 12)
    u = np.zeros((3, *shape), np.float32)
    u[0] = 6 * np.sin(2 * np.pi * np.arange(shape[0]) / 16).reshape(-1, 1, 1)
    save_field("folded.nii.gz", u, np.eye(4))
    run("invert folded.nii.gz --out back.nii.gz")
    assert "folds at" in capsys.readouterr().err
    assert "folds at" in nib.load("back.nii.gz").header["descrip"].item().decode()
    assert read("back.nii.gz").convention == "itk"


def test_a_field_without_an_inverse_is_not_inverted(folder, capsys):
    noise = 3 * np.random.default_rng(0).normal(size=(3, 12, 11, 10)).astype(np.float32)
    save_field("noise.nii.gz", noise, np.eye(4))
    message = refused("invert noise.nii.gz --out back.nii.gz", capsys)
    assert "has no inverse at" in message and "folds at" in message
    assert not (folder / "back.nii.gz").exists()
    allowed = message.split("--allow-residual ")[1].split()[0]
    run(f"invert noise.nii.gz --out back.nii.gz --allow-residual {allowed}")
    assert "do not trust it there" in capsys.readouterr().err
    assert "no inverse at" in nib.load("back.nii.gz").header["descrip"].item().decode()
    assert read("back.nii.gz").convention == "itk"


def test_strict_makes_what_is_told_an_error(folder, capsys):
    np.save("warp.npy", to_voxels(displaced(FIXED), FIXED.affine).astype(np.float32))
    for command in (
        "convert warp.npy --from voxels --fixed fixed.nii.gz --out strict.nii.gz --strict",
        "invert field.nii.gz --out strict.nii.gz --strict",
        "compose field.nii.gz field.nii.gz --out strict.nii.gz --strict",
    ):
        assert "nothing doubtful" in refused(command, capsys)
    assert not (folder / "strict.nii.gz").exists()


def test_affines_alone_stay_affines(folder):
    run("invert ras.txt --from ras --out back.mat")
    same(read("back.mat").steps[0].matrix, np.linalg.inv(MATRIX), 1e-6)
    run("compose ras:ras.txt back.mat --out one.mat")
    same(read("one.mat").steps[0].matrix, np.eye(4), 1e-6)


# ---------------------------------------------------------------- compose


def test_a_composition_is_that_of_ants(folder):
    write_affine("affine.mat", MATRIX)
    run("compose field.nii.gz affine.mat --out both.nii.gz")
    fixed, moving = ants.image_read("fixed.nii.gz"), ants.image_read("moving.nii.gz")
    theirs = ants.apply_transforms(fixed, moving, ["field.nii.gz", "affine.mat"], compose="theirs")
    same(load_field("both.nii.gz")[0], read(theirs).on().displacement, 2e-4)
    run("compose affine.mat field.nii.gz --fixed fixed.nii.gz --out other.nii.gz")
    names = ["affine.mat", "field.nii.gz"]
    theirs = ants.apply_transforms(fixed, moving, names, whichtoinvert=[False, False], compose="other")
    inside = read("field.nii.gz").within(read("affine.mat").at(world(FIXED).reshape(3, -1).T)).reshape(FIXED.shape)
    assert 500 < inside.sum() < inside.size
    same(load_field("other.nii.gz")[0][:, inside], read(theirs).on().displacement[:, inside], 2e-4)


def test_a_chain_of_three_programs(folder):
    """FNIRT's field from the fixed image to one between, FLIRT's matrix from there, and FreeSurfer's."""
    between = Grid((14, 16, 12), rotated((3, 2, -7), (2, 1, -3), (1.8, 1.6, 2.0), (0, -40, 50)))
    second = rotated((-3, 5, 8), (1, 2, 3), (1, 1, 1), (2, 1, -3))
    write_volume("between.nii.gz", Volume(np.ones(between.shape, np.float32), between.affine))
    write("fnirt.nii.gz", Field(load_field("field.nii.gz")[0], FIXED.affine), "fsl", between)
    images = {"moving": empty_image(MOVING), "reference": empty_image(between)}
    (folder / "flirt.mat").write_text(FSLLinearTransform.from_ras(MATRIX, **images).to_string())
    (folder / "fs.lta").write_text(FSLinearTransform.from_ras(second).to_string())
    run("compose fnirt.nii.gz fsl:flirt.mat fs.lta --out all.nii.gz"
        " --images fixed.nii.gz between.nii.gz moving.nii.gz moving.nii.gz")  # fmt: skip
    points = world(FIXED).reshape(3, -1).T
    expected = points + displaced(FIXED).reshape(3, -1).T
    for matrix in (MATRIX, second):
        expected = expected @ matrix[:3, :3].T + matrix[:3, 3]
    same(read("all.nii.gz").at(points), expected, 1e-3)


# ---------------------------------------------------------------- apply


def test_images_and_labels_are_warped_as_ants_does(folder, capsys):
    run("apply field.nii.gz moving.nii.gz --out warped.nii.gz")
    run("apply field.nii.gz labels.nii.gz --labels --out warped_labels.nii.gz")
    fixed = ants.image_read("fixed.nii.gz")
    theirs = ants.apply_transforms(fixed, ants.image_read("moving.nii.gz"), ["field.nii.gz"])
    ours = read_image("warped.nii.gz")
    same(ours.affine, FIXED.affine, 1e-5)
    both = (ours.data > 0) & (theirs.numpy() > 0)
    inside = read("field.nii.gz").at(world(FIXED).reshape(3, -1).T)
    back = np.linalg.inv(MOVING.affine)
    voxel = inside @ back[:3, :3].T + back[:3, 3]
    inside = ((voxel > 0) & (voxel < np.array(MOVING.shape) - 1)).all(axis=1).reshape(FIXED.shape)
    assert (both[inside]).all() and inside.sum() > 500
    same(ours.data[inside], theirs.numpy()[inside], 2e-3)
    theirs = ants.apply_transforms(
        fixed, ants.image_read("labels.nii.gz"), ["field.nii.gz"], interpolator="nearestNeighbor"
    )
    assert (read_labels("warped_labels.nii.gz").data[inside] == theirs.numpy()[inside]).mean() > 0.999
    far = np.eye(4)
    far[:3, 3] = 1000
    write_volume("far.nii.gz", Volume(np.arange(27.0, dtype=np.float32).reshape(3, 3, 3), far))
    assert "nothing lands" in refused("apply field.nii.gz far.nii.gz --out far_warped.nii.gz", capsys)
    assert not (folder / "far_warped.nii.gz").exists()


def test_a_landmark_goes_where_the_image_that_shows_it_goes(folder):
    """A bright spot of the moving image, warped, lies where its point was taken: by the inverse of the pull-back."""
    landmark = np.array([6.0, -27.0, 30.0])
    squared = ((world(MOVING) - landmark.reshape(3, 1, 1, 1)) ** 2).sum(axis=0)
    write_volume("spot.nii.gz", Volume(np.exp(-squared / 18).astype(np.float32), MOVING.affine))
    run("apply field.nii.gz spot.nii.gz --out spot_warped.nii.gz")
    weight = read_image("spot_warped.nii.gz").data.astype(float) ** 3
    centre = (world(FIXED) * weight).sum(axis=(1, 2, 3)) / weight.sum()
    (folder / "points.csv").write_text("name,x,y,z,size\n007,{},{},{},1_2\n".format(*landmark))
    run("apply field.nii.gz points.csv --coordinates ras --out moved.csv")
    moved = read_points("moved.csv", "ras").places[0]
    same(moved, centre, 0.35)
    assert np.linalg.norm(moved - landmark) > 2.5  # the other direction would be twice as far away
    assert (folder / "moved.csv").read_text().splitlines()[1].startswith("007,")
    assert (folder / "moved.csv").read_text().splitlines()[1].endswith(",1_2")


def test_points_go_there_and_back_in_every_kind_of_coordinates(folder, capsys):
    rng = np.random.default_rng(5)
    inside = world(FIXED)[:, 3:-3, 3:-3, 3:-3].reshape(3, -1).T[rng.permutation(100)[:20]]
    expected = read("field.nii.gz").at(inside)
    theirs = ants.apply_transforms_to_points(3, pd.DataFrame(inside * LPS, columns=["x", "y", "z"]), ["field.nii.gz"])
    same(theirs[["x", "y", "z"]].to_numpy() * LPS, expected, 1e-3)
    back = np.linalg.inv(FIXED.affine)
    of_kind = {"ras": inside, "lps": inside * LPS, "voxels": inside @ back[:3, :3].T + back[:3, 3]}
    for kind, places in of_kind.items():
        table = "x,y,z\n" + "".join("{},{},{}\n".format(*place) for place in places)
        (folder / "fixed.csv").write_text(table)
        options = f"--coordinates {kind} --moving moving.nii.gz"
        run(f"apply field.nii.gz fixed.csv --of-fixed {options} --out moving.csv")
        same(read_points("moving.csv", kind).in_world(MOVING), expected, 1e-3)
        run(f"apply field.nii.gz moving.csv {options} --out back.csv")
        same(read_points("back.csv", kind).places, places, 2e-3)


def test_points_of_slicer_say_their_own_coordinates(folder, capsys):
    text = (
        "# Markups fiducial file version = 4.11\n# CoordinateSystem = {}\n"
        "# columns = id,x,y,z,ow,ox,oy,oz,vis,sel,lock,label,desc,associatedNodeID\n"
        "1,{},{},{},0,0,0,1,1,1,0,F-1,,vtkMRMLScalarVolumeNode1\n"
    )
    point = np.array([6.0, -27.0, 30.0])
    (folder / "ras.fcsv").write_text(text.format("0", *point))
    (folder / "lps.fcsv").write_text(text.format("LPS", *(point * LPS)))
    for name in ("ras", "lps"):
        run(f"apply field.nii.gz {name}.fcsv --out moved_{name}.fcsv")
        lines = (folder / f"moved_{name}.fcsv").read_text().splitlines()
        assert lines[:3] == text.splitlines()[:1] + (folder / f"{name}.fcsv").read_text().splitlines()[1:3]
        assert lines[3].endswith("F-1,,vtkMRMLScalarVolumeNode1")
    same(read_points("moved_ras.fcsv").places, read_points("moved_lps.fcsv").places * LPS, 1e-5)
    assert "--coordinates lps" in refused("apply field.nii.gz ras.fcsv --coordinates lps --out a.fcsv", capsys)


def test_points_that_cannot_be_taken_are_named(folder, capsys):
    (folder / "points.csv").write_text("x,y,z\n6,-27,30\n600,0,0\n")
    assert ": 2;" in refused("apply field.nii.gz points.csv --coordinates ras --out moved.csv", capsys)
    assert ": 2;" in refused("apply field.nii.gz points.csv --coordinates ras --of-fixed --out moved.csv", capsys)
    assert "--coordinates" in refused("apply field.nii.gz points.csv --out moved.csv", capsys)
    for table, said in {
        "a,b\n1,2\n": "columns a, b",
        "x,y,z\n1,2,k\n": "point 1: 1,2,k",
        "x,y,z\n": "no points",
    }.items():
        (folder / "wrong.csv").write_text(table)
        assert said in refused("apply field.nii.gz wrong.csv --coordinates ras --out moved.csv", capsys)
    assert not (folder / "moved.csv").exists()


# ---------------------------------------------------------------- jacobian


def test_determinants_are_those_of_ants(folder, capsys):
    # of a quadratic map, of which the differences of second order are exact, as are ANTs' of fourth order
    x = world(FIXED) / 20
    save_field(
        "quadratic.nii.gz", to_voxels(2 * np.stack([x[0] * x[1], x[2] ** 2, x[1] * x[0]]), FIXED.affine), FIXED.affine
    )
    run("jacobian quadratic.nii.gz --out jacobian.nii.gz --json")
    told = json.loads(capsys.readouterr().out)
    ours = read_image("jacobian.nii.gz")
    theirs = ants.create_jacobian_determinant_image(ants.image_read("fixed.nii.gz"), "quadratic.nii.gz").numpy()
    inner = (slice(2, -2),) * 3
    same(ours.data[inner], theirs[inner], 1e-4)
    assert np.ptp(ours.data[inner]) > 0.05
    assert told["determinant"]["smallest"] == pytest.approx(float(ours.data.min()))
    linear = np.einsum("ij,jdhw->idhw", rotated((4, 3, 2), (1, 2, 3), (1.1, 0.9, 1.2), (0, 0, 0))[:3, :3], world(FIXED))
    save_field("linear.nii.gz", to_voxels(linear - world(FIXED), FIXED.affine), FIXED.affine)
    run("jacobian linear.nii.gz --out linear_jacobian.nii.gz")
    same(nib.load("linear_jacobian.nii.gz").get_fdata(), np.full(FIXED.shape, 1.1 * 0.9 * 1.2), 1e-4)


# ---------------------------------------------------------------- the page


def test_the_commands_of_the_page_run(folder):
    """Every command and the Python of docs/field.md, as they stand there."""
    page = (Path(__file__).parents[1] / "docs" / "field.md").read_text()
    between = Grid((14, 16, 12), rotated((3, 2, -7), (2, 1, -3), (1.8, 1.6, 2.0), (0, -40, 50)))
    write_volume("between.nii.gz", Volume(np.ones(between.shape, np.float32), between.affine))
    field = Field(load_field("field.nii.gz")[0], FIXED.affine)
    write("fnirt.nii.gz", field, "fsl", between)
    images = {"moving": empty_image(MOVING), "reference": empty_image(between)}
    (folder / "flirt.mat").write_text(FSLLinearTransform.from_ras(MATRIX, **images).to_string())
    (folder / "landmarks.csv").write_text("x,y,z\n6,-27,30\n")
    write_affine("affine.mat", MATRIX)
    (folder / "field.nii.gz").rename("warp.nii.gz")
    blocks = [part.split("```")[0] for part in page.split("```\n")[1::2]]
    lines = [line for block in blocks for line in block.splitlines() if line.startswith("dmir")]
    commands = [line.removeprefix("dmir field ") for line in lines]
    assert len(commands) == 10
    for command in commands:
        run(command)
    found = {}
    exec(page.split("```python\n")[1].split("```")[0], found)
    same(found["back"], [[6.0, -27.0, 30.0]], 1e-3)
    assert all(f"`{name}`" in page for name in CONVENTIONS)
