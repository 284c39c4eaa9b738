"""dmir score of results from elsewhere: the pipeline's numbers, whatever the convention, or no number at all."""

import json
import shlex
import shutil
from pathlib import Path

import numpy as np
import pandas as pd
import pytest
import torch
from scipy.ndimage import gaussian_filter

import dmir.metrics.elsewhere as elsewhere
from dmir.cli import main
from dmir.doubts import Doubt
from dmir.errors import InputError
from dmir.fields import onto_moving_grid, pair_field, save_field, warp_labels
from dmir.metrics import score_pair
from dmir.metrics.files import PAIR_KEYS, score_shard
from dmir.report.statistics import bootstrap_interval
from dmir.report.tables import comparison_table
from dmir.structures import load_structures
from dmir.tables import read_scores
from dmir.transforms import CONVENTIONS, Field, write
from dmir.volumes import Volume, read_labels, write_volume

ROOT = Path(__file__).parents[1]
SHAPE = (30, 34, 26)
TURN = np.array([[0.96, -0.28, 0, 0], [0.28, 0.96, 0, 0], [0, 0, 1.0, 0], [0, 0, 0, 1]])
FIXED = TURN @ np.array([[3.0, 0, 0, -40], [0, 0, 2.5, -50], [0, 2, 0, -30], [0, 0, 0, 1]])
MOVING = np.array([[0, -2.5, 0, 60], [2.5, 0, 0, -62], [0, 0, 3.0, -40], [0, 0, 0, 1.0]])
STRUCTURES = "lpba56"  # has the ids 21 to 24
UNKNOWN = ("nonpositive_jacobian_forward", "nondiffeomorphic_volume", "sdlogj", "endpoint_error")


def index(shape):
    return np.stack(np.meshgrid(*(np.arange(n) for n in shape), indexing="ij")).astype(float)


def four_structures(places):
    """Four structures of an ellipsoid, at places (3, D, H, W) in voxels of the fixed grid."""
    x, y, z = (place - centre for place, centre in zip(places, (15, 17, 13), strict=True))
    inside = (x / 11) ** 2 + (y / 13) ** 2 + (z / 9) ** 2 < 1
    return np.where(inside, 21 + (x > 0) + 2 * (y > -1), 0).astype(np.int16)


def field(seed, size=2.5):
    generator = np.random.default_rng(seed)
    smooth = np.stack([gaussian_filter(generator.normal(0, 1, SHAPE), 4) for _ in range(3)])
    return (smooth * size / np.abs(smooth).max()).astype(np.float32)


def write_case(folder, seed):
    """Write the labels of a moving scan on a grid of its own, and two fields to it: the good one and a worse one."""
    there = np.einsum("ij,j...->i...", (np.linalg.inv(FIXED) @ MOVING)[:3, :3], index((40, 40, 30)))
    there += (np.linalg.inv(FIXED) @ MOVING)[:3, 3].reshape(3, 1, 1, 1)
    shift = 2 * np.sin(there / 7 + seed)
    write_volume(folder / f"s{seed}_labels.nii.gz", Volume(four_structures(there + shift), MOVING))
    good = field(seed, 0.3) - 2 * np.sin(index(SHAPE) / 7 + seed).astype(np.float32)
    save_field(folder / f"good_s{seed}.nii.gz", good, FIXED)
    save_field(folder / f"poor_s{seed}.nii.gz", 0.3 * good, FIXED)
    return good


@pytest.fixture(scope="module")
def case(tmp_path_factory):
    folder = tmp_path_factory.mktemp("case")
    write_volume(folder / "atlas_labels.nii.gz", Volume(four_structures(index(SHAPE)), FIXED))
    fields = [write_case(folder, seed) for seed in range(3)]
    moving, sampling = read_labels(folder / "s0_labels.nii.gz"), onto_moving_grid(fields[0], FIXED, MOVING)
    labels = torch.from_numpy(moving.data)[None, None]
    for name in ("nearest", "linear"):
        warped = warp_labels(labels, torch.from_numpy(sampling)[None], name)[0, 0].numpy()
        write_volume(folder / f"warped_{name}.nii.gz", Volume(warped, FIXED))
    return folder


@pytest.fixture
def copy(case, tmp_path):
    return Path(shutil.copytree(case, tmp_path / "case"))


def rows_of(methods=("good", "poor"), scans=range(3)):
    return [
        {
            "method": method, "moving": f"s{k}", "fixed": "atlas", "field": f"{method}_s{k}.nii.gz",
            "moving_labels": f"s{k}_labels.nii.gz", "fixed_labels": "atlas_labels.nii.gz",
        }
        for method in methods for k in scans
    ]  # fmt: skip


def write_rows(folder, rows, name="mine.csv"):
    pd.DataFrame(rows).fillna("").to_csv(folder / name, index=False)
    return folder / name


def score(*arguments):
    return main(["score", *map(str, arguments)])


def one(folder, *arguments, moving=True):
    given = ["--fixed-labels", folder / "atlas_labels.nii.gz", "--structures", STRUCTURES, "--json"]
    given += ["--moving-labels", folder / "s0_labels.nii.gz"] if moving else []
    return score(*given, *arguments)


def printed(capsys):
    content = json.loads(capsys.readouterr().out)
    return pd.DataFrame(content["structures"]).set_index(["labels", "structure"]), content["pair"]


# --- one pair ---


def test_one_pair_has_the_scorers_own_scores(case, capsys):
    assert one(case, "--field", case / "good_s0.nii.gz") == 0
    table, pair = printed(capsys)
    moving, fixed = read_labels(case / "s0_labels.nii.gz"), read_labels(case / "atlas_labels.nii.gz")
    good = field(0, 0.3) - 2 * np.sin(index(SHAPE) / 7).astype(np.float32)
    structures = load_structures(STRUCTURES)
    own, own_pair = score_pair(good, FIXED, moving.data, fixed.data, structures, moving_affine=MOVING)
    own = own.set_index(["labels", "structure"])
    for name in ("dice", "hd95", "volume_ratio"):
        np.testing.assert_allclose(table[name].astype(float), own[name], atol=2e-3)
    assert pair["sdlogj"] == pytest.approx(own_pair["sdlogj"], abs=1e-4) and pair["endpoint_error"] is None
    assert pair["dice_before"] < own["dice"].mean() - 0.1


@pytest.mark.parametrize("convention", sorted(set(CONVENTIONS) - {"itk", "learn2reg"}))
def test_the_convention_of_a_field_changes_no_score(case, tmp_path, capsys, convention):
    assert one(case, "--field", case / "good_s0.nii.gz") == 0
    known = printed(capsys)
    grids = [read_labels(case / f"{name}_labels.nii.gz").grid for name in ("atlas", "s0")]
    good = field(0, 0.3) - 2 * np.sin(index(SHAPE) / 7).astype(np.float32)
    path = tmp_path / ("other.npz" if convention == "npz" else "other.nii.gz")
    try:
        write(path, Field(good, grids[0].affine), convention, grids[1])
    except InputError as error:  # AFNI's frame of a grid that is so oblique
        pytest.skip(str(error))
    assert one(case, "--field", path, "--from", convention) == 0
    table, pair = printed(capsys)
    for name in ("dice", "hd95", "volume_ratio"):
        np.testing.assert_allclose(table[name].astype(float), known[0][name].astype(float), atol=2e-3)
    assert pair["sdlogj"] == pytest.approx(known[1]["sdlogj"], abs=1e-3)


def test_a_field_that_nothing_proves_is_asked_for(case, tmp_path, capsys):
    import nibabel as nib

    steps = np.moveaxis(field(0, 1.0), 0, -1)  # RAS or LPS, mm or voxels: nobody can see it
    nib.save(nib.Nifti1Image(steps, FIXED), tmp_path / "steps.nii.gz")
    assert one(case, "--field", tmp_path / "steps.nii.gz") == 1
    error = capsys.readouterr().err
    assert error.startswith("Error: ") and "--from" in error and "steps.nii.gz" in error


@pytest.mark.parametrize("how", ["nearest", "linear"])
def test_warped_labels_alone_have_the_fields_overlap_and_nothing_of_the_field(case, capsys, how):
    assert one(case, "--field", case / "good_s0.nii.gz") == 0
    known, known_pair = printed(capsys)
    assert one(case, "--warped-labels", case / f"warped_{how}.nii.gz", "--interpolation", how) == 0
    table, pair = printed(capsys)
    assert set(table.index.get_level_values("labels")) == {how}
    columns = ["dice", "hd95", "volume_ratio", "components_change", "tunnels_change", "cavities_change"]
    pd.testing.assert_frame_equal(table.loc[how, columns].astype(float), known.loc[how, columns].astype(float))
    for name in (f"tc_{how}", f"topology_change_{how}", f"labels_vanished_{how}", "labels_missing", "dice_before"):
        assert pair[name] == known_pair[name]
    for name in (*UNKNOWN, "nonpositive_jacobian_central", f"topology_floor_{how}", "inverse_consistency_error"):
        assert pair[name] is None
    assert capsys.readouterr().err == ""


def test_without_the_moving_labels_a_lost_structure_is_not_known(case, tmp_path, capsys):
    warped = read_labels(case / "warped_nearest.nii.gz")
    lost = Volume(np.where(warped.data == 23, 0, warped.data).astype(np.int16), warped.affine)
    write_volume(tmp_path / "lost.nii.gz", lost)
    arguments = ("--warped-labels", tmp_path / "lost.nii.gz", "--interpolation", "nearest")
    assert one(case, *arguments) == 0
    table, pair = printed(capsys)
    assert table.loc[("nearest", 23), "dice"] == 0 and pair["labels_vanished_nearest"] == 1
    assert one(case, *arguments, moving=False) == 0
    captured = capsys.readouterr()
    content = json.loads(captured.out)
    rows = {row["structure"]: row for row in content["structures"]}
    assert rows[23]["dice"] is None and rows[21]["dice"] > 0.8 and rows[21]["volume_ratio"] is None
    assert all(content["pair"][name] is None for name in ("tc_nearest", "labels_vanished_nearest", "dice_before"))
    assert "1 structures of the fixed labels are not in it" in captured.err
    assert one(case, *arguments, "--strict", moving=False) == 1


def test_what_is_not_known_is_said_in_the_printed_table(case, capsys):
    arguments = ["--warped-labels", case / "warped_nearest.nii.gz", "--fixed-labels", case / "atlas_labels.nii.gz"]
    assert score(*arguments) == 0
    captured = capsys.readouterr()
    lines = {line.split("  ")[0]: line for line in captured.out.splitlines()}
    assert all(lines[name].endswith("not known") for name in UNKNOWN)
    assert "label 21" in captured.out  # no structure set was named: all labels that there are
    assert "how its labels were interpolated is not known; counted as nearest" in captured.err


def test_exchanged_scans_are_told(case, capsys):
    """The field of the other direction makes the labels worse than they were."""
    good = field(0, 0.3) - 2 * np.sin(index(SHAPE) / 7).astype(np.float32)
    save_field(case / "wrong_s0.nii.gz", -good, FIXED)
    assert one(case, "--field", case / "wrong_s0.nii.gz") == 0
    error = capsys.readouterr().err
    assert "makes 1 of 1 pairs worse" in error and "exchanged" in error
    assert one(case, "--field", case / "good_s0.nii.gz") == 0
    assert "worse" not in capsys.readouterr().err


def test_the_moving_or_the_fixed_file_in_place_of_the_warped_one_is_told(case, capsys):
    assert one(case, "--warped-labels", case / "atlas_labels.nii.gz", "--interpolation", "nearest") == 0
    assert "the same labels as the fixed ones" in capsys.readouterr().err


# --- a table ---


@pytest.fixture
def undrawn(monkeypatch):
    """Figures take seconds, and most tests look at none: an empty file for each."""

    def touch(_, path):
        path.parent.mkdir(exist_ok=True)
        path.with_name(f"{path.name}.png").touch()

    monkeypatch.setattr("dmir.report.elsewhere.save_figure", touch)


def test_a_table_has_the_numbers_of_the_pipeline(copy, capsys):
    """The same fields through the pipeline's own scoring and comparison."""
    rows = rows_of()
    assert score("--table", write_rows(copy, rows), "--structures", STRUCTURES, "--out", copy / "out") == 0
    out = capsys.readouterr().out
    given = [read_scores(copy / f"out/scores/{kind}.parquet") for kind in ("structures", "pairs")]
    labels = {f"s{k}": copy / f"s{k}_labels.nii.gz" for k in range(3)} | {"atlas": copy / "atlas_labels.nii.gz"}
    shards = []
    for method in ("good", "poor"):
        for k in range(3):
            target = pair_field(copy / method, f"s{k}", "atlas").with_suffix(".nii.gz")
            target.parent.mkdir(exist_ok=True)
            shutil.copy(copy / f"{method}_s{k}.nii.gz", target)
        records = [{**row, "cohort": "mine", "model": "none", "status": "ok", "reason": ""} for row in rows]
        records = [row for row in records if row["method"] == method]
        table = pd.DataFrame(records)[[*PAIR_KEYS, "status", "reason"]].assign(seconds=np.nan, peak_memory_mb=np.nan)
        table.to_csv(copy / f"{method}.csv", index=False)
        shard = {"fields": copy / method, "labels": labels, "truths": {}, "structures": STRUCTURES}
        shards.append(score_shard(copy / f"{method}.csv", **shard))
    own = [pd.concat(tables, ignore_index=True) for tables in zip(*shards, strict=True)]
    for mine, theirs in zip(given, own, strict=True):
        common = [name for name in theirs.columns if name in mine]
        assert len(common) > 10
        pd.testing.assert_frame_equal(mine[common], theirs[common], check_dtype=False)
    compared = comparison_table(*own, ["good", "poor"])
    written = pd.read_csv(copy / "out/tables/comparison.csv")
    pd.testing.assert_frame_equal(written, compared[list(written.columns)], check_dtype=False)
    assert written["dice"][0] > written["dice"][1] + 0.1 and "good" in out and "mean ± sd over pairs" in out
    for name in ("comparison", "statistics_mine", "dice_by_structure_mine", "topology", "failures"):
        assert all((copy / f"out/tables/{name}{suffix}").is_file() for suffix in (".csv", ".md", ".tex"))
    figures = ("dice_by_structure_mine", "critical_difference_mine", "dice_against_folding_mine")
    assert {path.stem for path in (copy / "out/figures").iterdir()} == set(figures)  # no times, no figure of them


def slabs(folder, subjects=7):
    """Write cubes of known overlap: method near moved them by 1 of 10 voxels, method far by 2, but by 4 for one."""
    fixed = np.zeros((20, 12, 12), np.int16)
    fixed[5:15, 2:10, 2:10] = 1
    write_volume(folder / "fixed.nii.gz", Volume(fixed, np.eye(4)))
    rows, known = [], {"near": [], "far": []}
    for k in range(subjects):
        for method, step in (("near", 1), ("far", 4 if k == 0 else 2)):
            write_volume(folder / f"{method}{k}.nii.gz", Volume(np.roll(fixed, step, axis=0), np.eye(4)))
            known[method].append((10 - step) / 10)
            row = {"method": method, "pair": f"00{k}", "fixed_labels": "fixed.nii.gz", "interpolation": "nearest"}
            rows.append({**row, "warped_labels": f"{method}{k}.nii.gz", "seconds": 2.0 + k})
    return rows, {name: np.array(values) for name, values in known.items()}


def test_known_overlaps_give_known_statistics(tmp_path, undrawn, capsys):
    rows, known = slabs(tmp_path)
    table = write_rows(tmp_path, rows, "cubes.csv")
    assert score("--table", table, "--out", tmp_path / "out", "--reference", "near") == 0
    captured = capsys.readouterr()
    assert captured.err == "" and "14 of 14 pairs of 2 methods" in captured.out
    compared = pd.read_csv(tmp_path / "out/tables/comparison.csv").set_index("method")
    assert compared.loc["near", "dice"] == pytest.approx(0.9) and compared.loc["near", "dice_sd"] == pytest.approx(0)
    assert compared.loc["far", "dice"] == pytest.approx((6 * 0.8 + 0.6) / 7)
    assert compared.loc["far", "dice_sd"] == pytest.approx(known["far"].std(ddof=1))
    # of the 352 voxels at the surface of a cube 64, more than a twentieth, are all the way off
    assert list(compared["hd95"]) == [1, pytest.approx((6 * 2 + 4) / 7)]
    assert list(compared["n"]) == [7, 7] and list(compared["seconds"]) == [5.0, 5.0]
    assert compared["sdlogj"].isna().all() and compared["dice_linear"].isna().all()
    tested = pd.read_csv(tmp_path / "out/tables/statistics_cubes.csv").set_index(["score", "method"])
    far = tested.loc[("dice", "far")]
    assert far["p"] == far["p_holm"] == pytest.approx(2 / 2**7)  # all seven agree
    assert far["subjects"] == far["subjects_both"] == 7 and far["rank_biserial"] == -1
    assert far["difference"] == pytest.approx((known["far"] - known["near"]).mean())
    assert (far["mean_low"], far["mean_high"]) == pytest.approx(bootstrap_interval(known["far"]))
    assert np.isnan(tested.loc[("nonpositive_jacobian_forward", "far"), "mean"])
    note = (tmp_path / "out/tables/comparison.md").read_text()
    assert "† differs from near" in note and "Scored from warped labels alone" in note
    pairs = pd.read_csv(tmp_path / "out/scores/pairs.csv", dtype=str, keep_default_na=False)
    assert list(pairs["moving"].unique()) == [f"00{k}" for k in range(7)]  # names stay names
    assert set(pairs["sdlogj"]) == {""}  # not known, never 0


def test_failed_and_missing_pairs_are_told_as_in_the_pipeline(copy, undrawn, capsys):
    rows = rows_of()
    rows[1] |= {"field": "", "reason": "out of memory"}
    del rows[5]  # poor has no row for s2
    broken = np.full((3, *SHAPE), np.nan, np.float32)
    save_field(copy / "good_s2.nii.gz", broken, FIXED)
    assert score("--table", write_rows(copy, rows), "--structures", STRUCTURES, "--out", copy / "out") == 0
    captured = capsys.readouterr()
    assert "poor has rows for 2 of the 3 pairs" in captured.err
    assert "good, s2 to atlas" in captured.err and "counted as a failed pair" in captured.err
    failures = pd.read_csv(copy / "out/tables/failures.csv").set_index(["method", "moving"])["reason"]
    assert failures["good", "s1"] == "out of memory" and "NaN" in failures["good", "s2"]
    assert failures["poor", "s2"] == "no record" and len(failures) == 3
    compared = pd.read_csv(copy / "out/tables/comparison.csv").set_index("method")
    assert compared["n"].to_dict() == {"good": 1, "poor": 2} and compared["failed"].to_dict() == {"good": 2, "poor": 1}
    assert "3 of 6 pairs of 2 methods were scored (tables/failures.md)" in captured.out
    assert score("--table", copy / "mine.csv", "--out", copy / "strict", "--strict") == 1
    assert not (copy / "strict").exists()


def test_methods_that_make_most_pairs_worse_are_told(copy, undrawn, capsys):
    for k in range(3):
        good = field(k, 0.3) - 2 * np.sin(index(SHAPE) / 7 + k).astype(np.float32)
        save_field(copy / f"poor_s{k}.nii.gz", -good, FIXED)
    assert score("--table", write_rows(copy, rows_of()), "--structures", STRUCTURES, "--out", copy / "out") == 0
    error = capsys.readouterr().err
    assert "poor makes 3 of 3 pairs worse" in error and "good makes" not in error
    record = json.loads((copy / "out/score.json").read_text())
    assert any("poor makes 3 of 3" in remark for remark in record["remarks"])


@pytest.mark.parametrize(
    ("pairs", "subjects", "atlases"),
    [
        ([("a", "t"), ("b", "t")], {"a": "a", "b": "b"}, {"t"}),
        ([("t", "a"), ("t", "b")], {"a": "a", "b": "b"}, {"t"}),
        ([("sub-1_ses-1", "t"), ("sub-1_ses-2", "t")], {"sub-1_ses-1": "sub-1", "sub-1_ses-2": "sub-1"}, {"t"}),
        ([("a", "b"), ("b", "a"), ("a", "c")], {"a": "a", "b": "b", "c": "c"}, set()),
        ([("a", "x"), ("b", "y")], {"a": "a", "b": "b"}, {"x", "y"}),
        ([("a", "a"), ("b", "b")], {"a": "a", "b": "b"}, {"a", "b"}),
    ],
)
def test_whose_a_pair_is(pairs, subjects, atlases):
    rows = pd.DataFrame(pairs, columns=["moving", "fixed"]).assign(cohort="c", subject="")
    scans = elsewhere.Registrations(Path("x.csv"), rows, {}).scans("c").set_index("scan")
    assert set(scans.index[scans["split"] == "atlas"]) == atlases
    assert {scan: scans.loc[scan, "subject"] for scan in subjects} == subjects


def test_subjects_that_are_named_are_the_unit(tmp_path, undrawn):
    rows, _ = slabs(tmp_path, 6)
    for row in rows:
        row["subject"] = "twin" if row["pair"] in ("000", "001") else row["pair"]
    assert score("--table", write_rows(tmp_path, rows), "--out", tmp_path / "out") == 0
    tested = pd.read_csv(tmp_path / "out/tables/statistics_mine.csv")
    assert set(tested["subjects"].dropna()) >= {5} and 6 not in set(tested["subjects"])


# --- what is wrong is found before anything is scored ---


def change(name, value, row=0):
    return lambda rows: rows[row].update({name: value})


WRONG = {
    "a row twice": (lambda rows: rows.append(dict(rows[0])), ["good, s0 to atlas 2 times", "rows 2, 8"]),
    "no file": (change("field", "nowhere.nii.gz"), ["1 of", "nowhere.nii.gz"]),
    "a column": (
        lambda rows: [row.update(warpd_labels="x") for row in rows],
        ["warpd", "Did you mean 'warped_labels'?"],
    ),
    "no labels": (change("moving_labels", ""), ["moving_labels", "row 2"]),
    "no fixed": (change("fixed_labels", ""), ["fixed_labels", "row 2"]),
    "another grid": (change("warped_labels", "s0_labels.nii.gz"), ["warped_labels: ", "grid of"]),
    "another field": (change("field", "small.nii.gz"), ["small.nii.gz", "30x34x26"]),
    "not a number": (change("seconds", "1,5"), ["'1,5' in the column seconds", "row 2"]),
    "an interpolation": (change("interpolation", "cubic"), ["'cubic'", "nearest, linear"]),
    "a convention": (change("convention", "itkk"), ["'itkk'", "Did you mean 'itk'?"]),
    "no structures": (change("structures", "lpba65"), ["structure sets"]),
    "no result": (lambda rows: [row.update(field="") for row in rows], ["no field and no warped labels"]),
    "a cohort": (change("cohort", "../up"), ["'../up'", "it names files"]),
    "some subjects": (change("subject", "x"), ["no subject in row"]),
    "a grey image": (change("fixed_labels", "series.nii.gz", 3), ["series.nii.gz", "3-D volume"]),
    "pair beside names": (lambda rows: [row.update(pair="p") for row in rows], ["pair beside moving"]),
}


@pytest.mark.parametrize("wrong", WRONG)
def test_a_wrong_table_is_one_line_before_anything_is_scored(copy, capsys, monkeypatch, wrong):
    save_field(copy / "small.nii.gz", np.zeros((3, 8, 8, 8), np.float32), FIXED)
    shutil.copy(copy / "good_s0.nii.gz", copy / "series.nii.gz")
    monkeypatch.setattr(elsewhere, "score_files", lambda *_, **__: pytest.fail("scored"))
    rows, (spoil, words) = rows_of(), WRONG[wrong]
    spoil(rows)
    assert score("--table", write_rows(copy, rows), "--out", copy / "out") == 1
    error = capsys.readouterr().err
    last = error.splitlines()[-1]
    assert last.startswith("Error: ") and "Traceback" not in error
    assert all(word in last for word in words), last
    assert not (copy / "out").exists() and not list(copy.glob(".writing*"))


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (["--field", "f"], ["--fixed-labels"]),
        (["--field", "f", "--fixed-labels", "l"], ["--moving-labels"]),
        ([], ["--field", "--warped-labels", "--table"]),
        (["--table", "mine.csv"], ["--out"]),
        (["--table", "mine.csv", "--field", "f", "--out", "o"], ["--field", "columns"]),
        (["--field", "f", "--out", "o"], ["--out", "--table"]),
        (["--table", "mine.csv", "--out", "o", "--reference", "godo"], ["--reference", "Did you mean 'good'?"]),
        (["--table", "mine.txt", "--out", "o"], ["mine.txt"]),
    ],
)
def test_options_that_do_not_belong_together(copy, capsys, monkeypatch, arguments, words):
    write_rows(copy, rows_of())
    monkeypatch.chdir(copy)
    assert score(*arguments) == 1
    error = capsys.readouterr().err
    assert error.startswith("Error: ") and len(error.splitlines()) == 1 and all(word in error for word in words)
    assert not (copy / "o").exists()


def test_one_file_for_several_rows_and_labels_that_differ_are_told(copy, capsys):
    rows = rows_of()
    rows[1]["field"] = rows[0]["field"]
    shutil.copy(copy / "atlas_labels.nii.gz", copy / "again_labels.nii.gz")
    rows[5]["fixed_labels"] = "again_labels.nii.gz"
    assert score("--table", write_rows(copy, rows), "--structures", STRUCTURES, "--out", copy / "out", "--strict") == 1
    error = capsys.readouterr().err
    assert "one file in the column field of several rows (2, 3)" in error and not (copy / "out").exists()
    with pytest.warns(Doubt, match="several fixed_labels of one pair, first s2 to atlas"):
        elsewhere.read_registrations(write_rows(copy, [rows[2], rows[5]]), STRUCTURES)


# --- the folder ---


def test_a_folder_holds_one_run_and_no_other_ones_are_touched(tmp_path, undrawn, capsys):
    rows, _ = slabs(tmp_path, 3)
    out = tmp_path / "out"
    assert score("--table", write_rows(tmp_path, rows, "first.csv"), "--out", out) == 0
    (out / "mine.txt").write_text("notes")
    assert (out / "figures/dice_against_time_first.png").is_file()
    without = [{name: value for name, value in row.items() if name != "seconds"} for row in rows]
    assert score("--table", write_rows(tmp_path, without, "second.csv"), "--out", out) == 0
    names = {path.name for path in out.rglob("*") if path.is_file()}
    assert not any("first" in name or "against_time" in name for name in names)
    assert (out / "mine.txt").read_text() == "notes" and (out / "tables/statistics_second.csv").is_file()
    files = json.loads((out / "score.json").read_text())["files"]
    assert {*files, "score.json", "mine.txt"} == {str(p.relative_to(out)) for p in out.rglob("*") if p.is_file()}
    assert not list(tmp_path.glob(".writing*"))
    capsys.readouterr()
    results = tmp_path / "results"
    (results / "tables").mkdir(parents=True)
    (results / "tables/comparison.csv").write_text("somebody's")
    assert score("--table", tmp_path / "first.csv", "--out", results) == 1
    assert "holds other files" in capsys.readouterr().err
    assert (results / "tables/comparison.csv").read_text() == "somebody's"


def test_a_record_cannot_name_files_of_others(tmp_path, capsys):
    rows, _ = slabs(tmp_path, 3)
    out, victim = tmp_path / "out", tmp_path / "victim.txt"
    out.mkdir()
    victim.write_text("precious")
    for name in ("../victim.txt", str(victim), "tables/../../victim.txt", ""):
        (out / "score.json").write_text(json.dumps({"made_by": "dmir score", "files": [name]}))
        assert score("--table", write_rows(tmp_path, rows), "--out", out) == 1
        assert "another program's record" in capsys.readouterr().err and victim.read_text() == "precious"


def test_a_run_that_fails_leaves_the_one_before(tmp_path, undrawn, monkeypatch):
    rows, _ = slabs(tmp_path, 3)
    out = tmp_path / "out"
    assert score("--table", write_rows(tmp_path, rows), "--out", out) == 0
    before = {path: path.read_bytes() for path in out.rglob("*") if path.is_file()}

    def breaks(*_, **__):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr("dmir.report.elsewhere.save_figure", breaks)
    assert score("--table", tmp_path / "mine.csv", "--out", out) == 1
    assert {path: path.read_bytes() for path in out.rglob("*") if path.is_file()} == before


# --- the page ---


def test_the_commands_of_the_page_run(copy, undrawn, monkeypatch, capsys):
    section = (ROOT / "docs/scores.md").read_text().split("## Results of other programs")[1].split("\n## ")[0]
    blocks = section.split("```")[1::2]
    (copy / "mine.csv").write_text(next(block for block in blocks if block.startswith("\nmethod,")).strip() + "\n")
    names = {"mine.nii.gz": "good_s0.nii.gz", "moving_labels.nii.gz": "s0_labels.nii.gz"}
    names |= {"fixed_labels.nii.gz": "atlas_labels.nii.gz", "warped_labels.nii.gz": "warped_nearest.nii.gz"}
    for name, source in names.items():
        shutil.copy(copy / source, copy / name)
    monkeypatch.chdir(copy)
    commands = [
        line for block in blocks for line in block.replace("\\\n", " ").splitlines() if line.startswith("dmir ")
    ]
    assert len(commands) >= 3
    for command in commands:
        assert main(shlex.split(command)[1:]) == 0, command
    assert (copy / "scored/tables/comparison.md").is_file()
