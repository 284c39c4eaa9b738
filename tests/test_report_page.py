"""The report page: what it says is what the tables say, what it shows is what was registered, and it asks nobody."""

from __future__ import annotations

import base64
import gzip
import json
import math
import re
import shutil
from dataclasses import dataclass
from html.parser import HTMLParser
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pandas as pd
import pytest
import torch

from dmir.errors import InputError
from dmir.fields import warp, warp_labels
from dmir.metrics import dice
from dmir.report import products
from dmir.report.examples import Example, example_file, save_example
from dmir.report.page import ASSETS, write_page
from dmir.report.page import viewer as viewer_module
from dmir.report.page.contents import proportion, read_figures, read_table, split_name
from dmir.report.page.summary import _with_seeds, summarise
from dmir.report.page.surroundings import configuration_text, revision_text, versions
from dmir.report.page.times import OWN_RULE, RULES, duration, read_times, read_trainings
from dmir.report.page.viewer import (
    OUTSIDE,
    compact_labels,
    encode_jacobian,
    jacobian_colours,
    pack_pairs,
    reduce_image,
    reduce_jacobian,
    reduce_labels,
    structure_colours,
)
from dmir.report.panels import FOLDED
from dmir.report.planes import window_of
from dmir.report.style import new_figure, save_figure
from dmir.report.writing import write_table
from dmir.structures import StructureSet
from dmir.volumes import Volume, write_volume

SHAPE = (24, 28, 20)
SPACING = (2.0, 1.5, 3.0)
AFFINE = np.array([[2.0, 0, 0, -23.0], [0, 1.5, 0, -20.0], [0, 0, 3.0, -28.5], [0, 0, 0, 1.0]])
FOLD = (14, 12, 9)  # the only voxel that folds
HOSTILE = "<img src=x onerror=alert(1)>&\"'"
NAMES = {1: "left caudate", 2: "right <b>caudate</b>", 3: "brain stem"}


def toy_volumes() -> SimpleNamespace:
    """Two ellipsoids with a gradient in grey, three structures in boxes, and a field that shifts and folds once."""
    x, y, z = np.indices(SHAPE)
    brain = ((x - 11.5) / 9) ** 2 + ((y - 13.5) / 11) ** 2 + ((z - 9.5) / 7) ** 2 <= 1
    fixed = np.where(brain, 0.2 + 0.03 * x, 0).astype(np.float32)
    moving = np.where(brain, 0.9 - 0.02 * y, 0).astype(np.float32)
    moving[brain & (x == 11) & (y == 13)] = 1.0
    fixed_labels = np.zeros(SHAPE, np.int32)
    fixed_labels[5:10, 10:16, 7:12], fixed_labels[14:19, 10:16, 7:12], fixed_labels[10:13, 6:9, 5:8] = 1, 2, 3
    moving_labels = np.roll(fixed_labels, 1, axis=0)
    displacement = np.zeros((3, *SHAPE), np.float32)
    displacement[0, FOLD[0] + 1, FOLD[1], FOLD[2]] = -2  # det is 1 + du0/dx0: -1 at FOLD, 3 beyond it
    return SimpleNamespace(
        brain=brain,
        fixed=fixed,
        moving=moving,
        fixed_labels=fixed_labels,
        moving_labels=moving_labels,
        field=displacement,
    )


def write_pair(
    results: Path,
    toy: SimpleNamespace,
    *,
    cohort: str = "toy",
    moving: str = "a",
    fixed: str = "b",
    flip: bool = False,
) -> None:
    """Write the scans and the examples of two methods; ``flip`` stores all as LPS, which is the same in the world."""

    def stored(volume: np.ndarray) -> np.ndarray:
        return np.ascontiguousarray(volume[::-1, ::-1]) if flip else volume

    affine = AFFINE.copy()
    if flip:
        affine[:3, 3] += AFFINE[:3, :2] @ (np.array(SHAPE[:2]) - 1)
        affine[:, :2] *= -1
    folder = results / "preprocessed" / cohort
    for scan, image, labels in ((moving, toy.moving, toy.moving_labels), (fixed, toy.fixed, toy.fixed_labels)):
        write_volume(folder / scan / "image.nii.gz", Volume(stored(image), affine))
        write_volume(folder / scan / "labels.nii.gz", Volume(stored(labels), affine))
    for method, model, field in (("affine", "none", np.zeros_like(toy.field)), ("caml", "seed1", toy.field)):
        displacement = np.stack([stored(component) for component in field])
        displacement[:2] *= -1 if flip else 1
        batch = torch.from_numpy(displacement)[None]
        image, labels = stored(toy.moving), stored(toy.moving_labels)
        warped_labels = warp_labels(torch.from_numpy(labels)[None, None], batch)[0, 0].numpy()
        example = Example(
            method=method,
            model=model,
            warped=warp(torch.from_numpy(image)[None, None], batch)[0, 0].numpy(),
            displacement=displacement,
            affine=affine,
            cohort=cohort,
            moving=moving,
            fixed=fixed,
            dice=float(np.mean(list(dice(warped_labels, stored(toy.fixed_labels), [1, 2, 3]).values()))),
        )
        folder = results / "registered" / cohort / method / model / "examples-shard000"
        folder.mkdir(parents=True, exist_ok=True)
        save_example(example_file(folder, moving, fixed), example)


def configuration(cohort: str = "toy") -> dict:
    return {
        "methods": ["affine", "caml"],
        "train_on": cohort,
        "test_on": [cohort],
        "seeds": [1, 2],
        "grid": {"shape": list(SHAPE), "spacing": list(SPACING)},
        "cohorts": {cohort: {"structures": "three"}},
    }


def examples_of(results: Path, cohort: str = "toy", models=(("affine", "none"), ("caml", "seed1"))) -> list[Path]:
    """Return the folders of the examples of one pair, of each method's model."""
    return [results / "registered" / cohort / method / model / "examples-shard000" for method, model in models]


def pack_toy(results: Path, **changes) -> viewer_module.Viewer:
    arguments = {
        "pairs": [("toy", "a", "b")],
        "methods": ["affine", "caml"],
        "examples": [examples_of(results)],
        "configuration": configuration(),
        **changes,
    }
    return pack_pairs(results, **arguments)


def unpack(viewer: viewer_module.Viewer, name: str, shape: list[int]) -> np.ndarray:
    """Undo the packing by hand: base64, gzip, first axis fastest."""
    return np.frombuffer(gzip.decompress(base64.b64decode(viewer.volumes[name])), np.uint8).reshape(shape, order="F")


@pytest.fixture(autouse=True)
def structure_names(monkeypatch):
    """A structure set of three, one with a name that is no friend of pages."""

    def load(name: str) -> StructureSet:
        if name != "three":
            raise InputError("structures", found=name, expected="three")
        return StructureSet(name, pd.DataFrame({"id": list(NAMES), "name": list(NAMES.values())}))

    monkeypatch.setattr(viewer_module, "load_structures", load)


# ---- volumes ----


def test_packed_volumes_are_the_voxels_of_the_scans_and_of_the_registration(tmp_path):
    toy = toy_volumes()
    write_pair(tmp_path, toy)
    viewer = pack_toy(tmp_path)
    pair = viewer.facts["pairs"][0]
    assert viewer.factor == 1 and pair["spacing"] == list(SPACING)
    corner = np.linalg.solve(AFFINE, [*(line[3] for line in pair["affine"]), 1])[:3].round().astype(int)
    # 6 mm are 3, 4 and 2 voxels around a brain that reaches from 3 to 20, 3 to 24 and 3 to 16
    assert corner.tolist() == [0, 0, 1] and pair["shape"] == [24, 28, 18]
    window = tuple(slice(c, c + n) for c, n in zip(corner, pair["shape"], strict=True))
    assert pair["grey"] == [0.0, 1.0]
    for name in ("moving", "fixed"):
        shown = unpack(viewer, pair["volumes"][name], pair["shape"])
        assert np.array_equal(shown, np.round(255 * getattr(toy, name)[window]).astype(np.uint8)), name
        labels = unpack(viewer, pair["volumes"][f"{name}Labels"], pair["shape"])
        assert np.array_equal(labels, getattr(toy, f"{name}_labels")[window]), name
    assert pair["structures"] == ["", *NAMES.values()]
    affine, caml = pair["methods"]
    assert (affine["state"], affine["name"], caml["name"]) == ("ok", "Affine only", "Proposed")
    # half precision keeps images to 1/4096
    same = unpack(viewer, affine["volumes"]["warped"], pair["shape"]).astype(int)
    assert np.abs(same - unpack(viewer, pair["volumes"]["moving"], pair["shape"])).max() <= 1
    batch = torch.from_numpy(toy.field)[None]
    warped = warp_labels(torch.from_numpy(toy.moving_labels)[None, None], batch)[0, 0].numpy()
    assert np.array_equal(unpack(viewer, caml["volumes"]["warpedLabels"], pair["shape"]), warped[window])
    jacobian = unpack(viewer, caml["volumes"]["jacobian"], pair["shape"])
    assert [tuple(place) for place in np.argwhere(jacobian == 0) + corner] == [FOLD]
    assert jacobian[FOLD[0] + 1, FOLD[1], FOLD[2] - 1] == 253  # 3 is beyond the scale
    assert np.array_equal(jacobian == OUTSIDE, ~toy.brain[window])
    assert set(np.unique(unpack(viewer, affine["volumes"]["jacobian"], pair["shape"]))) == {100, OUTSIDE}
    overlap = np.mean(list(dice(warped, toy.fixed_labels, [1, 2, 3]).values()))
    assert caml["dice"] == pytest.approx(overlap) and caml["dice"] != affine["dice"]


def test_scans_stored_the_other_way_round_show_the_same(tmp_path):
    toy = toy_volumes()
    # away from the fold only: forward differences are taken towards right and front, whatever the storage
    write_pair(tmp_path / "ras", toy)
    write_pair(tmp_path / "lps", toy, flip=True)
    ras, lps = pack_toy(tmp_path / "ras"), pack_toy(tmp_path / "lps")
    assert ras.facts == lps.facts
    assert ras.volumes == lps.volumes


def test_linear_labels_have_their_own_dice(tmp_path):
    toy = toy_volumes()
    toy.field += 0.4  # on a corner of a box nearest finds the box, and most of the weight is outside
    write_pair(tmp_path, toy)
    nearest, linear = (pack_toy(tmp_path, interpolation=name).facts["pairs"][0] for name in ("nearest", "linear"))
    labels = torch.from_numpy(toy.moving_labels)[None, None]
    # the field as the example keeps it, in half precision
    field = torch.from_numpy(toy.field.astype(np.float16).astype(np.float32))[None]
    warped = warp_labels(labels, field, "linear")[0, 0].numpy()
    expected = np.mean(list(dice(warped, toy.fixed_labels, [1, 2, 3]).values()))
    assert linear["methods"][1]["dice"] == pytest.approx(expected)
    assert linear["methods"][1]["dice"] != nearest["methods"][1]["dice"]


def test_a_small_budget_reduces_and_keeps_the_fold_and_the_place(tmp_path):
    toy = toy_volumes()
    noise = np.random.default_rng(0).random(SHAPE).astype(np.float32)  # cannot be packed
    toy.moving, toy.fixed = np.where(toy.brain, noise, 0), np.where(toy.brain, 1 - noise, 0)
    write_pair(tmp_path, toy)
    whole = pack_toy(tmp_path)
    budget = whole.packed_bytes // 3
    viewer = pack_toy(tmp_path, budget_bytes=budget)
    pair = viewer.facts["pairs"][0]
    assert viewer.factor == viewer.facts["factor"] == 2 and viewer.packed_bytes <= budget
    assert pair["shape"] == [12, 14, 9] and pair["spacing"] == [4.0, 3.0, 6.0]
    # the first voxel is the middle of the first block of eight
    assert [line[3] for line in pair["affine"]] == pytest.approx([-22.0, -19.25, -24.0])
    low, high = pair["grey"]
    fixed = toy.fixed[:, :, 1:19].reshape(12, 2, 14, 2, 9, 2).mean(axis=(1, 3, 5))
    shown = unpack(viewer, pair["volumes"]["fixed"], pair["shape"])
    assert np.array_equal(shown, np.round(255 * (fixed - low) / (high - low)).astype(np.uint8))
    labels = unpack(viewer, pair["volumes"]["fixedLabels"], pair["shape"])
    assert np.array_equal(labels, toy.fixed_labels[1::2, 1::2, 2:19:2])
    jacobian = unpack(viewer, pair["methods"][1]["volumes"]["jacobian"], pair["shape"])
    assert np.argwhere(jacobian == 0).tolist() == [[FOLD[0] // 2, FOLD[1] // 2, (FOLD[2] - 1) // 2]]


def test_blocks_that_are_not_whole_are_filled_with_what_is_there():
    line = np.arange(5, dtype=np.float32)[:, None, None] * np.ones((5, 1, 1), np.float32)
    assert reduce_image(line, 2)[:, 0, 0].tolist() == [0.5, 2.5, 4.0]
    assert reduce_labels(line.astype(np.uint8), 3)[:, 0, 0].tolist() == [1, 4]
    brain = line < 3
    determinant = np.where(line == 2, -0.5, 1.0).astype(np.float32)
    mean, inside = reduce_jacobian(determinant, brain, 2)
    assert mean[:2, 0, 0].tolist() == [1.0, -0.5] and inside[:, 0, 0].tolist() == [True, True, False]


def test_determinants_and_colours_have_their_codes():
    values = np.array([-1.0, 0.0, 1e-6, 0.5, 1.0, 2.0, 9.0, 1.0])
    codes = encode_jacobian(values, np.array([True] * 7 + [False]))
    assert codes.tolist() == [0, 0, 1, 50, 100, 200, 253, OUTSIDE]
    colours = jacobian_colours()
    assert len(colours) == len(structure_colours()) == 256
    assert colours[0] == FOLDED and FOLDED not in colours[1:]
    assert len(set(structure_colours())) == 256
    red, _, blue = (int(colours[100][i : i + 2], 16) for i in (1, 3, 5))
    assert min(red, blue) > 230  # what keeps its volume is white
    assert colours[200] == colours[253]


def test_many_structures_share_the_last_code_and_large_ones_keep_theirs():
    labels = np.repeat(np.arange(301), 2)
    labels = np.append(labels, [300, 300])
    ids, encode = compact_labels(labels)
    assert len(ids) == 254 and 300 in ids
    codes = encode(np.array([0, 300, ids[0], 299]))
    assert codes.tolist() == [0, 254, 1, 255]


def test_the_window_is_the_brain_with_a_margin_in_millimetres():
    mask = np.zeros((30, 30, 30), bool)
    mask[10:20, 2, 15] = True
    assert window_of(mask, np.array([1.0, 2.0, 4.0])) == (slice(4, 26), slice(0, 6), slice(13, 18))


def test_failed_and_missing_examples_and_missing_scans_are_told(tmp_path):
    write_pair(tmp_path, toy_volumes())
    (tmp_path / "registered/toy/caml/seed1/examples-shard000/a__b.npz").write_bytes(b"")
    viewer = pack_toy(
        tmp_path,
        pairs=[("toy", "a", "b"), ("toy", "c", "b")],
        methods=["affine", "caml", "syn"],
        examples=[examples_of(tmp_path, models=(("affine", "none"), ("caml", "seed1"), ("syn", "none")))] * 2,
    )
    assert [method["state"] for method in viewer.facts["pairs"][0]["methods"]] == ["ok", "failed", "missing"]
    assert len(viewer.facts["pairs"]) == 1
    assert viewer.missing == (
        "toy: c → b cannot be shown: there is no preprocessed/toy/c/image.nii.gz, preprocessed/toy/c/labels.nii.gz.",
    )


def test_a_pair_on_two_grids_is_refused(tmp_path):
    toy = toy_volumes()
    write_pair(tmp_path, toy)
    write_volume(tmp_path / "preprocessed/toy/a/image.nii.gz", Volume(toy.moving[1:], AFFINE))
    with pytest.raises(InputError, match="grid"):
        pack_toy(tmp_path)


# ---- summary ----


def comparison(rows: list[tuple], cohort: str = "toy") -> pd.DataFrame:
    columns = ["method", "dice", "failed", "nonpositive_jacobian_forward", "seconds"]
    table = pd.DataFrame(rows, columns=columns)
    return table.assign(cohort=cohort, n=10 - table["failed"], labels="nearest", dice_sd=0.02, hd95=3.0)


def statistics(rows: list[tuple], subjects: int, smallest: float, cohort: str = "toy") -> pd.DataFrame:
    table = pd.DataFrame(rows, columns=["method", "mean", "difference", "p_holm"])
    tested = table["p_holm"].notna()
    return table.assign(
        cohort=cohort, score="dice", labels="nearest", subjects=subjects, mean_low=table["mean"] - 0.01,
        mean_high=table["mean"] + 0.01, subjects_both=np.where(tested, subjects, np.nan),
        difference_low=table["difference"] - 0.005, difference_high=table["difference"] + 0.005,
        p=table["p_holm"] / 2, smallest_p=np.where(tested, smallest / 2, np.nan),
        smallest_p_holm=np.where(tested, smallest, np.nan),
    )  # fmt: skip


def told(results: Path, scores: pd.DataFrame, tests: pd.DataFrame | None, methods: list[str] | None = None):
    folder = results / "tables"
    folder.mkdir(parents=True, exist_ok=True)
    scores.to_csv(folder / "comparison.csv", index=False)
    if tests is not None:
        tests.to_csv(folder / "statistics_toy.csv", index=False)
    methods = methods or list(scores["method"])
    models = {m: "none" if m in ("affine", "syn") else "seed1" for m in methods}
    return summarise(results, configuration(), methods, models, "nearest", "caml")


ROWS = [
    ("affine", 0.60, 0, 0.0, 0.0001),
    ("syn", 0.78, 0, 0.0, 12.0),
    ("voxelmorph", 0.59, 0, 0.25, 0.05),
    ("caml", 0.70, 0, 0.0, 0.4),
]
TESTS = [("affine", 0.60, -0.1, 0.01), ("syn", 0.78, 0.08, 0.01), ("voxelmorph", 0.59, -0.11, 0.02)]


def test_seeds_that_one_network_has_for_itself_are_told():
    settings = {"caml": {"seeds": [1, 2, 3]}, "pyramid": {"seeds": [1]}, "transmorph": {"network": {}}}
    words = _with_seeds({"seeds": [1], "settings": settings}, ["voxelmorph", "transmorph", "pyramid", "caml"])
    assert words == " with seed 1, Proposed with seeds 1, 2 and 3"
    assert _with_seeds({}, ["caml"]) == ""


def test_the_summary_says_who_is_best_by_how_much_and_how_sure(tmp_path):
    summary = told(tmp_path, comparison(ROWS), statistics([*TESTS, ("caml", 0.70, np.nan, np.nan)], 10, 0.006))
    assert summary.cohorts[0].sentences == (
        "SyN has the highest mean Dice: 0.780 (95 % interval 0.770 to 0.790, 10 subjects).",
        "SyN differs from Proposed by +0.080 (95 % interval +0.075 to +0.085), "
        "over the 10 subjects that both registered.",
        "That is significant (p = 0.01 after Holm's correction).",
        "Also significantly different from Proposed: VoxelMorph lower.",
        "Below the affine starting point (0.600): VoxelMorph.",
        "VoxelMorph is the fastest, 0.0500 s a pair (median); SyN the slowest, 12.0 s.",
        "No voxel folds with SyN and Proposed; most fold with VoxelMorph: 0.250 % (|J| ≤ 0, forward differences).",
    )
    assert summary.overall == ("No registration failed.",)
    assert summary.run == (
        "4 methods on 1 cohort (toy): Affine only, SyN, VoxelMorph and Proposed.",
        "Proposed stands for CAML+RBSC+CARSC (proposed).",
        "Every scan lies on a grid of 24 × 28 × 20 voxels of 2 × 1.5 × 3 mm.",
        "Networks were trained on toy with seeds 1 and 2.",
        "Labels are warped by nearest interpolation for every method, unless a column names another.",
    )
    rows = summary.cohorts[0].rows
    assert [(row.name, row.winner, row.note) for row in rows] == [
        ("SyN", True, ""), ("Proposed", False, "reference"),
        ("Affine only", False, "starting point"), ("VoxelMorph", False, ""),
    ]  # fmt: skip
    assert rows[0].p == "0.010 †" and rows[0].difference == "+0.080" and rows[1].p == ""
    assert summary.cohorts[0].axis == ("0.55", "0.80")
    assert rows[0].dot == pytest.approx(92) and rows[0].left == pytest.approx(88) and rows[0].width == pytest.approx(8)


def test_with_few_subjects_the_summary_says_that_nothing_can_be_shown(tmp_path):
    few = statistics([*TESTS, ("caml", 0.70, np.nan, np.nan)], 4, 0.375).assign(p_holm=0.375)
    sentences = told(tmp_path, comparison(ROWS), few).cohorts[0].sentences
    assert sentences[2] == (
        "4 subjects are too few: no difference from Proposed can be shown on this cohort, however large. "
        "The smallest p possible is 0.188, and 0.375 after Holm's correction."
    )
    assert not any("ignificant" in sentence for sentence in sentences)


def test_a_tie_a_reference_that_is_best_and_a_difference_that_may_be_chance(tmp_path):
    rows = [*ROWS[:3], ("caml", 0.7804, 0, 0.0, 0.4)]
    tests = statistics([("syn", 0.78, -0.001, 0.6), ("caml", 0.7804, np.nan, np.nan)], 10, 0.006)
    sentences = told(tmp_path, comparison(rows), tests).cohorts[0].sentences
    assert sentences[0] == "Proposed and SyN share the highest mean Dice, 0.780."
    assert sentences[2] == "That is not significant (p = 0.6 after Holm's correction): it may be chance."
    assert sentences[3] == "No other method differs significantly from Proposed."
    rows = [*ROWS[:3], ("caml", 0.8, 0, 0.0, 0.4)]
    tests = statistics([("syn", 0.78, -0.02, 0.0004), ("caml", 0.8, np.nan, np.nan)], 20, 1e-5)
    sentences = told(tmp_path, comparison(rows), tests).cohorts[0].sentences
    assert sentences[0].startswith("Proposed has the highest mean Dice: 0.800")
    assert sentences[1].startswith(
        "Next is SyN, 0.780; it differs from Proposed by −0.020 (95 % interval −0.025 to −0.015)"
    )
    assert sentences[2] == "That is significant (p < 0.001 after Holm's correction)."


def test_affine_never_wins_and_failures_are_counted(tmp_path):
    rows = [("affine", 0.9, 0, 0.0, 0.0001), ("syn", 0.7, 3, 0.0, 5.0), ("caml", 0.6, 1, 0.0, 0.4)]
    summary = told(tmp_path, comparison(rows), None, ["affine", "syn", "caml", "elastix"])
    sentences = summary.cohorts[0].sentences
    assert sentences[0] == "SyN has the highest mean Dice: 0.700."
    assert sentences[1] == "SyN differs from Proposed by +0.100 in mean Dice."
    assert sentences[2] == "There is no test: whether that is more than chance is not known."
    assert "Below the affine starting point (0.900): SyN and Proposed." in sentences
    assert summary.overall[0] == (
        "Failed registrations: SyN 3 of 10 pairs of toy; Proposed 1 of 10 pairs of toy. "
        "There the methods are not compared on the same pairs: each mean is over the method's own."
    )
    assert summary.overall[1] == "Not in the comparison table: Elastix."
    assert summary.cohorts[0].interval_kind == "± standard deviation over pairs"


def test_all_pairs_failed_and_no_fold_anywhere(tmp_path):
    rows = [("affine", 0.5, 0, 0.0, 0.1), ("syn", np.nan, 10, np.nan, np.nan)]
    assert told(tmp_path, comparison(rows), None).cohorts[0].sentences == ("No method has a Dice on this cohort.",)
    rows = [*ROWS[:2], ("caml", np.nan, 10, np.nan, np.nan)]
    sentences = told(tmp_path, comparison(rows), None).cohorts[0].sentences
    assert sentences[1] == "Proposed, against which the others are tested, has no Dice on this cohort."
    sentences = told(tmp_path, comparison([row for row in ROWS if row[0] != "voxelmorph"]), None).cohorts[0].sentences
    assert sentences[-1] == "No voxel folds with any method (|J| ≤ 0, forward differences)."


def test_cohorts_are_counted_by_their_scans(tmp_path):
    folder = tmp_path / "cohorts" / "toy"
    folder.mkdir(parents=True)
    splits = ["atlas", "test", "train", "train", "val"]
    pd.DataFrame({"scan": list("abcde"), "split": splits}).to_csv(folder / "scans.csv", index=False)
    facts = told(tmp_path, comparison(ROWS), None).facts[0]
    assert (facts.scans, facts.splits, facts.pairs) == ("5", "2 train, 1 val, 1 test, 1 atlas", "10")
    assert (facts.role, facts.structures) == ("training and test", "three")


# ---- run times, trainings, surroundings ----


def write_benchmark(path: Path, *rows: tuple[str, str, str]) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    header = "s\th:m:s\tmax_rss\tmax_vms\tmax_uss\tmax_pss\tio_in\tio_out\tmean_load\tcpu_time\n"
    lines = [f"{s}\t0:00:01\t{rss}\t0\t0\t0\t0\t0\t0\t{cpu}\n" for s, rss, cpu in rows]
    path.write_text(header + "".join(lines))


def test_run_times_add_up_by_rule_in_the_order_of_the_data_flow(tmp_path):
    folder = tmp_path / "benchmarks"
    write_benchmark(folder / "comparison_tables.tsv", ("2.0", "100.5", "1.5"))
    write_benchmark(folder / "train" / "c" / "caml" / "seed1.tsv", ("60.5", "900", "100.25"))
    write_benchmark(folder / "train" / "c" / "vit" / "seed1.tsv", ("30", "1200", "20"))
    write_benchmark(folder / "preprocess_scans" / "c" / "a.tsv", ("0.2", "-", "-"))
    write_benchmark(folder / "preprocess_scans" / "c" / "b.tsv", ("1.3", "NaN", "NA"))
    write_benchmark(folder / "aaa_unknown.tsv", ("1", "10", "1"), ("2", "30", "2"))  # a job that was repeated
    write_benchmark(folder / "pack_scans" / "c.tsv", ("0.3", "0.47", "0.00"))
    write_benchmark(folder / "report_page.tsv", ("9", "10", "1"))  # of the page before this one
    *rows, total = read_times(tmp_path)
    assert [row.rule for row in rows] == ["preprocess_scans", "pack_scans", "train", "comparison_tables", "aaa_unknown"]
    scan, packed, train, _, unknown = rows
    assert (scan.jobs, scan.seconds, scan.cpu_seconds, scan.unmeasured) == (2, 1.5, 0.0, 2) and math.isnan(scan.peak_mb)
    assert packed.unmeasured == 1
    assert (train.jobs, train.seconds, train.longest, train.cpu_seconds, train.peak_mb) == (2, 90.5, 60.5, 120.25, 1200)
    assert (unknown.jobs, unknown.seconds, unknown.peak_mb) == (1, 3, 30)
    assert (total.rule, total.jobs, total.unmeasured, total.longest) == ("total", 7, 3, 60.5)
    assert total.seconds == pytest.approx(97.3) and total.cpu_seconds == pytest.approx(124.75)
    assert read_times(tmp_path / "nowhere") == []


def test_every_rule_that_is_measured_has_its_place():
    """A rule that the page does not know would stand last, whatever it is."""
    files = (Path(__file__).parents[1] / "rules").glob("*.smk")
    measured = {name for file in files for name in re.findall(r'"<benchmarks>/(\w+)', file.read_text())}
    assert measured - {OWN_RULE} | products.rules().keys() == set(RULES)


@pytest.mark.parametrize(
    ("seconds", "text"),
    [(0, "0.0 s"), (9.94, "9.9 s"), (59.4, "59 s"), (59.6, "1 min 0 s"), (3599.7, "1 h 0 min"), (math.nan, "")],
)
def test_durations_are_said_as_people_say_them(seconds, text):
    assert duration(seconds) == text


def test_trainings_are_listed_where_no_table_has_them(tmp_path):
    for cohort in ("told", "untold"):
        path = tmp_path / "models" / cohort / "caml" / "seed1" / "training.json"
        path.parent.mkdir(parents=True)
        path.write_text(json.dumps({"parameters": 12, "steps": 3, "seconds": 4.5, "device": "cpu"}))
    (tmp_path / "tables").mkdir()
    (tmp_path / "tables" / "trainings_told.html").write_text("<table></table>")
    (training,) = read_trainings(tmp_path, ["trainings_told", "trainings_untold"])  # the second is not there
    assert (training.cohort, training.parameters, training.memory_mb) == ("untold", 12, None)


def test_revision_configuration_and_versions(monkeypatch, tmp_path):
    assert revision_text("v1-2-gabc-dirty") == "v1-2-gabc, with uncommitted changes"
    assert revision_text("v1") == "v1" and revision_text("") == "not known"
    monkeypatch.setattr(Path, "home", lambda: Path("/home/somebody"))
    text = configuration_text({"root": Path("/home/somebody/data"), "seeds": (1, 2), "λ": None})
    assert text == "root: ~/data\nseeds:\n- 1\n- 2\nλ: null\n"
    assert dict(versions())["numpy"] == np.__version__


# ---- the page without a browser ----


def write_tables(results: Path, cohort: str = "toy") -> list[str]:
    scores = pd.DataFrame(
        {
            "cohort": cohort,
            "method": ["affine", "syn", "elastix", "voxelmorph", "caml"],
            "n": 10,
            "failed": 0,
            "labels": "nearest",
            "dice": [0.6, 0.78, 0.7754, 0.59, 0.7],
            "dice_sd": 0.02,
            "nondiffeomorphic_volume": [0.0, 0.0001, 0.5, np.nan, 0.001],
            "seconds": [1e-5, 12.0, 9.5, 0.05, 100.0],
        }
    )
    write_table(scores, results / "tables" / "comparison", "All <methods>.", "First.\n\nSecond & last.")
    structures = pd.DataFrame({"structure": range(1, 21), "name": [f"structure {HOSTILE} {i}" for i in range(1, 21)]})
    write_table(structures, results / "tables" / f"structures_{cohort}", "Structures.")
    return ["comparison", f"structures_{cohort}", "ablation"]


def write_figures(results: Path) -> list[str]:
    folder = results / "figures"
    figure = new_figure(3, 2)
    figure.subplots().plot([0, 1])
    save_figure(figure, folder / "dice_against_time_toy")
    save_figure(figure, folder / "qualitative_toy_a__b")
    padding = "<!-- " + "x" * 500_000 + " -->"
    path = folder / "qualitative_toy_a__b.svg"
    path.write_text(path.read_text() + padding)
    return ["dice_against_time_toy", "qualitative_toy_a__b", "mystery_toy"]


def write_toy_page(results: Path) -> Path:
    tables, figures = write_tables(results), write_figures(results)
    write_pair(results, toy_volumes())
    other = toy_volumes()
    other.fixed, other.moving = other.moving, np.sqrt(other.fixed)
    write_pair(results, other, moving="c", fixed="d")
    write_benchmark(results / "benchmarks" / "train" / "toy" / "caml" / "seed1.tsv", ("60", "900", "100"))
    write_benchmark(results / "benchmarks" / "list_scans.tsv", ("2", "90", "1"))
    sidecar = {"made_from": dict.fromkeys(("configuration", "code", "data", "weights"), "0123456789abcdef")}
    (results / "tables" / "comparison.json").write_text(json.dumps({**sidecar, "inputs": {"a": "b", "c": "d"}}))
    return write_page(
        results,
        results / "report.html",
        configuration=configuration(),
        tables=tables,
        figures=figures,
        pairs=[("toy", "a", "b"), ("toy", "c", "d")],
        examples=[examples_of(results)] * 2,
        methods=["affine", "caml"],
        models={"affine": "none", "caml": "seed1"},
        command="snakemake --cores 2 --config 'a=<b>'",
        revision="v0-dirty",
    )


class Reader(HTMLParser):
    """Every tag with its attributes, and the text outside of scripts and style."""

    def __init__(self, page: Path) -> None:
        super().__init__()
        self.tags: list[tuple[str, dict]] = []
        self.text = ""
        self._silent = False
        self.feed(page.read_text(encoding="utf-8"))

    def handle_starttag(self, tag, attributes):
        self.tags.append((tag, dict(attributes)))
        self._silent = tag in ("script", "style")

    def handle_endtag(self, tag):
        self._silent = False

    def handle_data(self, data):
        self.text += "" if self._silent else data


@pytest.fixture(scope="module")
def page(tmp_path_factory):
    with pytest.MonkeyPatch.context() as patch:
        load = lambda name: StructureSet(name, pd.DataFrame({"id": list(NAMES), "name": list(NAMES.values())}))  # noqa: E731
        patch.setattr(viewer_module, "load_structures", load)
        return write_toy_page(tmp_path_factory.mktemp("results with <space>"))


def test_the_page_needs_no_other_file_and_no_network(page):
    reader = Reader(page)
    for tag, attributes in reader.tags:
        for name in ("src", "href", "data", "poster", "srcset", "action"):
            target = attributes.get(name) or "#"
            allowed = target.startswith(("#", "data:image/")) or (tag == "a" and "://" not in target)
            assert allowed, (tag, name, target[:80])
    assert not [tag for tag, _ in reader.tags if tag in ("link", "iframe", "object", "embed", "base")]
    style = (ASSETS / "page.css").read_text()
    assert "url(" not in style and "@import" not in style
    for script in ("page.js", "viewer.js"):
        code = (ASSETS / script).read_text()
        assert not re.search(r"https?://|fetch\(|XMLHttpRequest|WebSocket|import\(|innerHTML|eval\(", code)
        assert "</script" not in code
    policy = next(a["content"] for tag, a in reader.tags if a.get("http-equiv") == "Content-Security-Policy")
    assert policy.startswith("default-src 'none'; img-src data:;") and policy.count("sha256-") == 2


def test_links_lead_to_the_files_beside_the_page(page):
    links = [attributes["href"] for tag, attributes in Reader(page).tags if tag == "a"]
    files = [link for link in links if not link.startswith("#")]
    assert "tables/comparison.csv" in files and "figures/qualitative_toy_a__b.pdf" in files
    assert all((page.parent / link).is_file() for link in files)
    anchors = {attributes.get("id") for _, attributes in Reader(page).tags}
    assert all(link[1:] in anchors for link in links if link.startswith("#"))


def test_the_page_names_what_is_missing_and_tells_where_all_is_from(page):
    text = Reader(page).text
    assert "There is no tables/ablation.html." in text
    assert "There is no figures/mystery_toy.svg and no figures/mystery_toy.png." in text
    assert "no readable structures_toy.json" in text and "0123456789abcdef" in text
    assert "snakemake --cores 2 --config 'a=<b>'" in text
    assert "v0, with uncommitted changes" in text
    assert "no cohorts/toy/scans.csv" in text
    assert "First." in text and "Second & last." in text
    assert "To keep the page small" not in text


def test_large_vector_figures_are_shown_as_pixels(page):
    (group,) = read_figures(
        page.parent, ["dice_against_time_toy", "qualitative_toy_a__b"], ["toy"], page.parent / "report.html"
    )
    plot, picture = group.items
    assert plot.picture.startswith("data:image/svg+xml;base64,")
    assert picture.picture.startswith("data:image/png;base64,")
    assert picture.title == "One pair, every method: a → b"
    for suffix in (".png", ".svg"):
        path = page.parent / "figures" / f"dice_against_time_toy{suffix}"
        assert proportion(path) == pytest.approx(1.5, abs=0.02)


def test_tables_are_read_cell_by_cell_with_their_marks(page):
    table = read_table(page.parent / "tables", "comparison", "t", page)
    assert table.caption == "All <methods>." and table.notes == ("First.", "Second & last.")
    assert [header.text for header in table.headers[:3]] == ["Cohort", "Method", "n (pairs)"]
    row = {header.text: cell for header, cell in zip(table.headers, table.rows[1], strict=True)}
    assert row["Dice (nearest), mean ± sd ↑"].text == "0.780 ± 0.020"
    assert row["Dice (nearest), mean ± sd ↑"].mark == "best"
    assert row["Non-diffeomorphic volume, % ↓"].text == "<0.001" and row["Method"].numeric is False
    assert table.leading == 2 and not table.grouped  # cohort and method
    structures = read_table(page.parent / "tables", "structures_toy", "t", page)
    assert [header.text for header in structures.headers[: structures.leading]] == ["Id", "Structure"]


def test_names_of_tables_and_figures_are_taken_apart():
    kinds = ["dice_by_structure", "qualitative", "structures"]
    assert split_name("dice_by_structure_my_cohort", kinds, ["my", "my_cohort"]) == ("dice_by_structure", "my_cohort")
    assert split_name("qualitative_my_s__t", kinds, ["my", "my_s"]) == ("qualitative", "my_s")
    assert split_name("mystery_my", kinds, ["my"]) == ("mystery", "my")
    assert split_name("mystery", kinds, ["my"]) == ("mystery", "")


def test_hostile_names_stay_text(tmp_path, monkeypatch):
    name = "<img src=x onerror=alert(1)>"
    end = "</script><script>alert(2)</script>"
    names = pd.DataFrame({"id": [1, 2, 3], "name": [end, end, end]})
    monkeypatch.setattr(viewer_module, "load_structures", lambda set_name: StructureSet(set_name, names))
    scores = comparison([("affine", 0.5, 0, 0.0, 0.1), (name, 0.7, 0, 0.0, 0.2)], cohort=name)
    write_table(scores, tmp_path / "tables" / "comparison", name)
    write_pair(tmp_path, toy_volumes(), cohort=name, moving="a&b", fixed=name)
    page = write_page(
        tmp_path, tmp_path / "report.html", configuration={**configuration(name), "note": end},
        tables=["comparison", name], figures=[name], pairs=[(name, "a&b", name)], methods=["affine", name],
        examples=[examples_of(tmp_path, name, (("affine", "none"), (name, "seed1")))],
        models={"affine": "none", name: "seed1"}, command=end, revision=name,
    )  # fmt: skip
    reader = Reader(page)
    kinds = [attributes.get("type", "") for tag, attributes in reader.tags if tag == "script"]
    there = pack_toy(tmp_path, pairs=[(name, "a&b", name)], examples=[examples_of(tmp_path, name)])
    volumes = len(there.volumes) - 3  # only one method is there
    assert kinds == ["application/json", "", "", *["application/octet-stream"] * volumes]
    assert not [tag for tag, attributes in reader.tags if any(key.startswith("on") for key in attributes)]
    assert not [tag for tag, _ in reader.tags if tag == "img"]
    assert f"{name} is the only method that is ranked: mean Dice 0.700." in reader.text
    assert end in reader.text  # as the command


def test_nothing_at_all_makes_a_page_that_says_so(tmp_path):
    page = write_page(
        tmp_path / "empty", tmp_path / "report.html", configuration={}, tables=["comparison"], figures=["ablation"],
        pairs=[("toy", "a", "b")], methods=["syn"], models={"syn": "none"},
        examples=[[tmp_path]], command="", revision="",
    )  # fmt: skip
    text = Reader(page).text
    for sentence in (
        "There is no tables/comparison.csv: nothing can be said of who is best.",
        "There is no tables/comparison.html.",
        "There is no figures/ablation.svg and no figures/ablation.png.",
        "There is no pair to show.",
        "There are no benchmark files: run times are not known.",
        "The command is not known.",
    ):
        assert sentence in text


def test_a_reduced_page_says_so(tmp_path):
    write_pair(tmp_path, toy_volumes())
    page = write_page(
        tmp_path, tmp_path / "report.html", configuration=configuration(), tables=[], figures=[],
        pairs=[("toy", "a", "b")], methods=["affine", "caml"], models={"affine": "none", "caml": "seed1"},
        examples=[examples_of(tmp_path)],
        command="", revision="", budget_bytes=3000,
    )  # fmt: skip
    reader = Reader(page)
    assert re.search(r"one voxel here stands for (\d) × \1 × \1 of the grid", reader.text)
    sizes = re.findall(r'<script type="application/octet-stream" id="volume-\d+">([^<]*)</script>', page.read_text())
    assert len(sizes) == 10 and sum(map(len, sizes)) <= 3000


# ---- the page in a browser ----


@dataclass
class Window:
    """A page in Chromium, with the few things that a reader does."""

    driver: object
    page: Path

    def run(self, script: str, *arguments):
        return self.driver.execute_script(script, *arguments)

    def find(self, selector: str):
        return self.driver.find_element("css selector", selector)

    def texts(self, selector: str) -> list[str]:
        return [element.text for element in self.driver.find_elements("css selector", selector)]

    def wait(self, script: str) -> None:
        """Wait until a script returns true, and until two more frames are drawn."""
        done = self.driver.execute_async_script(
            "const done = arguments[arguments.length - 1]; let left = 600;"
            f"const ask = () => {{ const good = (() => {{ {script} }})();"
            "if (good || !(left -= 1)) requestAnimationFrame(() => requestAnimationFrame(() => done(good)));"
            "else requestAnimationFrame(ask); }; ask();"
        )
        assert done, script

    def choose(self, name: str, value: str) -> None:
        """Choose of a list, or move a slider, and wait for the picture."""
        kind = "change" if name in ("pair", "method", "overlay") else "input"
        self.run(
            "const e = document.getElementById(arguments[0]); e.value = arguments[1];"
            "e.dispatchEvent(new Event(arguments[2], {bubbles: true}))",
            f"viewer-{name}", str(value), kind,
        )  # fmt: skip
        self.wait("return document.getElementById('viewer').dataset.state === 'ready'")

    def pixel(self, plane: str, place: tuple[int, int], size: tuple[int, int]) -> list[int]:
        """Return the colour (red, green, blue) in the middle of a voxel, from the left and the bottom of a plane."""
        return self.run(
            "const c = document.getElementById('viewer-' + arguments[0]); const [u, v, nu, nv] = arguments[1];"
            "const x = Math.floor((u + .5) / nu * c.width), y = Math.floor((1 - (v + .5) / nv) * c.height);"
            "return [...c.getContext('2d').getImageData(x, y, 1, 1).data].slice(0, 3)",
            plane, [*place, *size],
        )  # fmt: skip

    def place(self) -> list[int]:
        """Return the voxel at the crosshair."""
        return [
            int(self.find(f"#viewer-{plane}").get_attribute("aria-valuenow"))
            for plane in ("sagittal", "coronal", "axial")
        ]

    def walk(self, plane: str, target: int) -> None:
        """Go to a slice with the arrow keys."""
        from selenium.webdriver.common.keys import Keys

        canvas = self.find(f"#viewer-{plane}")
        steps = target - int(canvas.get_attribute("aria-valuenow"))
        if steps:
            canvas.send_keys(*([Keys.ARROW_UP if steps > 0 else Keys.ARROW_DOWN] * abs(steps)))
            self.wait(f"return document.getElementById('viewer-{plane}').getAttribute('aria-valuenow') === '{target}'")

    def requests(self) -> list[str]:
        """Return every address that the page asked for."""
        messages = [json.loads(entry["message"])["message"] for entry in self.driver.get_log("performance")]
        sent = [m["params"] for m in messages if m["method"] == "Network.requestWillBeSent"]
        return [request["request"]["url"] for request in sent if request["documentURL"] == self.page.as_uri()]


@pytest.fixture(scope="module")
def browser(tmp_path_factory):
    webdriver = pytest.importorskip("selenium.webdriver", reason="selenium is not installed: no browser tests")
    binary = shutil.which("chromium") or shutil.which("chromium-browser") or shutil.which("google-chrome")
    driver = shutil.which("chromedriver")
    if not binary or not driver:
        pytest.skip("no Chromium with chromedriver on PATH: the page is not tried in a browser")
    from selenium.webdriver.chrome.service import Service

    options = webdriver.ChromeOptions()
    options.binary_location = binary
    for argument in (
        "headless=new", "no-sandbox", "disable-gpu", "disable-dev-shm-usage", "no-first-run",
        "disable-background-networking", "disable-component-update", "disable-sync", "window-size=1280,900",
        f"user-data-dir={tmp_path_factory.mktemp('profile')}",
    ):  # fmt: skip
        options.add_argument(f"--{argument}")
    options.set_capability("goog:loggingPrefs", {"browser": "ALL", "performance": "ALL"})
    browser = webdriver.Chrome(options=options, service=Service(driver))
    browser.set_script_timeout(20)
    yield browser
    browser.quit()


@pytest.fixture
def window(browser, page):
    """The page, freshly opened."""
    for kind in ("browser", "performance"):
        browser.get_log(kind)  # what is of an earlier page
    browser.get(page.as_uri())
    return Window(browser, page)


@pytest.fixture
def viewer(window):
    """The page with its viewer in sight and its volumes unpacked, cross in the middle, no overlay."""
    window.run("document.getElementById('pairs').scrollIntoView()")
    window.wait("return document.getElementById('viewer').dataset.state === 'ready'")
    return window


def pairs_of(page: Path) -> list[dict]:
    return json.loads(re.search(r'id="viewer-facts">(.*?)</script>', page.read_text(), re.DOTALL)[1])["pairs"]


def unpack_page(page: Path, facts: dict) -> dict[str, np.ndarray]:
    """Return the volumes of a pair of the page, unpacked by hand."""
    text = page.read_text()
    names = dict(facts["volumes"])
    for method in facts["methods"]:
        names |= {f"{method['method']}.{kind}": name for kind, name in method["volumes"].items()}

    def read(name: str) -> np.ndarray:
        packed = re.search(rf'id="{name}">([^<]*)<', text)[1]
        return np.frombuffer(gzip.decompress(base64.b64decode(packed)), np.uint8).reshape(facts["shape"], order="F")

    return {key: read(name) for key, name in names.items()}


@pytest.fixture(scope="module")
def facts(page):
    return pairs_of(page)[0]


@pytest.fixture(scope="module")
def voxels(page, facts):
    return unpack_page(page, facts)


def test_the_page_opens_without_an_error_and_asks_no_network(viewer):
    viewer.choose("overlay", "jacobian")
    assert viewer.driver.get_log("browser") == []
    asked = viewer.requests()
    assert asked[0] == viewer.page.as_uri()
    assert all(address.startswith("data:") for address in asked[1:]), asked
    assert (
        viewer.run("return performance.getEntriesByType('resource').filter(e => !e.name.startsWith('data:')).length")
        == 0
    )
    assert viewer.run("return document.documentElement.scrollWidth <= innerWidth")
    assert viewer.run("return [...document.images].every(image => image.src.startsWith('data:'))")


def test_volumes_are_unpacked_only_when_the_viewer_is_near(window):
    assert window.find("#viewer").get_attribute("data-state") == "waiting"


def test_a_click_on_a_header_sorts_and_a_second_one_reverses(window):
    methods = lambda: [row.split("\t")[0] for row in window.texts("#table-comparison tbody td:nth-child(2)")]  # noqa: E731
    before = methods()

    def header(place: int):
        return window.find(f"#table-comparison th:nth-child({place})")

    header(4).find_element("css selector", "button").click()  # Dice, mean ± sd
    assert header(4).get_attribute("aria-sort") == "ascending"
    ascending = methods()
    assert ascending == ["VoxelMorph", "Affine only", "CAML+RBSC+CARSC (proposed)", "Elastix", "SyN"]
    header(4).find_element("css selector", "button").click()
    assert header(4).get_attribute("aria-sort") == "descending" and methods() == ascending[::-1]
    # <0.001 is less than 0.001 and more than 0.000; the empty cell is last both ways
    from selenium.webdriver.common.keys import Keys

    button = header(5).find_element("css selector", "button")
    button.send_keys(Keys.ENTER)
    assert header(4).get_attribute("aria-sort") == "none"
    assert methods() == ["Affine only", "SyN", "CAML+RBSC+CARSC (proposed)", "Elastix", "VoxelMorph"]
    button.send_keys(Keys.SPACE)
    assert methods() == ["Elastix", "CAML+RBSC+CARSC (proposed)", "SyN", "Affine only", "VoxelMorph"]
    header(6).find_element("css selector", "button").click()  # 1.00e-05, 0.05, 9.5, 12, 100
    assert methods() == ["Affine only", "VoxelMorph", "Elastix", "SyN", "CAML+RBSC+CARSC (proposed)"]
    header(1).find_element("css selector", "button").click()  # all equal: the order stays
    assert methods() == ["Affine only", "VoxelMorph", "Elastix", "SyN", "CAML+RBSC+CARSC (proposed)"]
    assert sorted(before) == sorted(methods())


def test_run_times_sort_by_their_seconds_and_the_total_stays_below(window):
    window.find("#times th:nth-child(3) button").click()
    assert window.texts("#times tbody th") == ["list_scans", "train"]  # 2.0 s before 1 min 0 s
    assert window.texts("#times tfoot th") == ["total"]


def test_the_filter_shows_the_rows_that_have_the_words(window):
    details = window.run("return document.getElementById('table-structures_toy').closest('details')")
    details.find_element("css selector", "summary").click()
    field = details.find_element("css selector", ".filter")
    field.send_keys("STRUCTURE 17")
    assert details.find_element("css selector", ".count").text == "1 of 20 rows"
    shown = [row.text for row in details.find_elements("css selector", "tbody tr") if row.is_displayed()]
    assert shown == [f"17 structure {HOSTILE} 17"]
    field.clear()
    field.send_keys("x")
    assert details.find_element("css selector", ".count").text == "20 of 20 rows"


def test_a_figure_is_enlarged_and_closed_again(window):
    from selenium.webdriver.common.keys import Keys

    button = window.find("#figure-dice_against_time_toy .enlarge")
    button.click()
    dialog = window.find("#enlarged")
    assert dialog.is_displayed()
    assert "Dice against time." in dialog.text
    window.wait("return document.querySelector('#enlarged img').naturalWidth > 0")
    dialog.find_element("css selector", "button").click()
    assert not dialog.is_displayed()
    button.send_keys(Keys.ENTER)
    assert dialog.is_displayed()
    window.driver.switch_to.active_element.send_keys(Keys.ESCAPE)
    assert not dialog.is_displayed()


def test_the_slider_runs_from_moving_over_warped_to_fixed(viewer, facts, voxels):
    assert viewer.texts("#viewer-method option") == ["Affine only", "Proposed"]
    assert viewer.find("#viewer-method").get_attribute("value") == "1"  # the reference
    shape = facts["shape"]
    x, y, z = viewer.place()
    assert [x, y, z] == [size // 2 for size in shape]
    places = [(8, 10), (15, 11), (9, 15), (17, 7)]
    ends = {"0": "moving", "1": "caml.warped", "2": "fixed"}
    for blend, name in ends.items():
        viewer.choose("blend", blend)
        volume = voxels[name]
        pictures = {"axial": volume[:, :, z], "coronal": volume[:, y, :], "sagittal": volume[x, :, :]}
        for plane, picture in pictures.items():
            for place in places:
                assert viewer.pixel(plane, place, picture.shape) == [picture[place]] * 3, (name, plane, place)
    viewer.choose("blend", 1.5)
    for u, v in places:
        expected = (int(voxels["caml.warped"][u, v, z]) + int(voxels["fixed"][u, v, z])) / 2
        assert viewer.pixel("axial", (u, v), (shape[0], shape[1]))[0] == pytest.approx(expected, abs=1)
    viewer.find("[data-blend='0']").click()
    assert viewer.find("#viewer-blend").get_attribute("value") == "0"
    assert viewer.find("#viewer-blend").get_attribute("aria-valuetext") == "moving"


def test_another_pair_and_another_method_bring_their_own_images(viewer, page):
    facts = pairs_of(page)[1]
    other = unpack_page(page, facts)
    place, z, size = (8, 10), facts["shape"][2] // 2, (facts["shape"][0], facts["shape"][1])
    assert viewer.texts("#viewer-pair option") == ["toy: a → b", "toy: c → d"]
    viewer.choose("method", "0")
    viewer.choose("pair", "1")
    assert viewer.find("#viewer-method").get_attribute("value") == "0"  # the method stays
    for blend, name in {"0": "moving", "1": "affine.warped", "2": "fixed"}.items():
        viewer.choose("blend", blend)
        assert viewer.pixel("axial", place, size) == [other[name][*place, z]] * 3
    assert len({int(other[name][*place, z]) for name in ("moving", "fixed")}) == 2
    viewer.choose("pair", "0")
    viewer.choose("blend", "2")
    assert viewer.pixel("axial", place, size) == [unpack_page(page, pairs_of(page)[0])["fixed"][*place, z]] * 3


def test_planes_have_the_proportions_of_millimetres_and_left_is_left(viewer, facts):
    millimetres = [n * s for n, s in zip(facts["shape"], facts["spacing"], strict=True)]
    for plane, (u, v) in {"axial": (0, 1), "coronal": (0, 2), "sagittal": (1, 2)}.items():
        canvas = viewer.find(f"#viewer-{plane}")
        proportion = canvas.size["width"] / canvas.size["height"]
        assert proportion == pytest.approx(millimetres[u] / millimetres[v], rel=0.02), plane
    # the left caudate (x from 5 to 9) lies in the left half of the axial plane
    viewer.walk("axial", 8)
    viewer.choose("overlay", "fixedLabels")
    viewer.choose("opacity", 1)
    left, right = (viewer.pixel("axial", (u, 11), (facts["shape"][0], facts["shape"][1])) for u in (6, 16))
    colours = structure_colours()
    assert [left, right] == [[int(colours[code][i : i + 2], 16) for i in (1, 3, 5)] for code in (1, 2)]


def test_a_click_moves_the_other_planes_and_the_read_out(viewer, facts, voxels):
    from selenium.webdriver.common.action_chains import ActionChains

    viewer.walk("axial", 8)
    target = (16, 12)
    canvas = viewer.find("#viewer-axial")
    across, up = ((place + 0.5) / size for place, size in zip(target, facts["shape"], strict=False))
    width, height = canvas.size["width"], canvas.size["height"]
    ActionChains(viewer.driver).move_to_element_with_offset(
        canvas, round((across - 0.5) * width), round((0.5 - up) * height)
    ).click().perform()
    viewer.wait("return document.getElementById('viewer-sagittal').getAttribute('aria-valuenow') === '16'")
    assert viewer.place() == [16, 12, 8]
    position = np.array(facts["affine"]) @ [16, 12, 8, 1]
    shown = ", ".join(f"{axis} {value:.1f}" for axis, value in zip("xyz", position, strict=True)) + " mm"
    assert viewer.find("#readout-position").text == shown.replace("-", "\N{MINUS SIGN}")
    assert viewer.find("#viewer-sagittal-place").text == f"sagittal, x = {position[0]:.1f} mm"
    for name, key in (("moving", "movingLabels"), ("warped", "caml.warpedLabels"), ("fixed", "fixedLabels")):
        code = int(voxels[key][16, 12, 8])
        assert viewer.find(f"#readout-{name}-label").text == NAMES[code] == "right <b>caudate</b>"
    greys = [voxels[key][16, 12, 8] / 255 for key in ("moving", "caml.warped", "fixed")]
    read = [float(viewer.find(f"#readout-{name}").text) for name in ("moving", "warped", "fixed")]
    assert read == pytest.approx(greys, rel=0.01)
    assert viewer.find("#readout-jacobian").text == "1.00"
    assert viewer.find("#readout-dice").text == f"{facts['methods'][1]['dice']:.3f}"
    # the sagittal plane now cuts x = 16
    grey = int(voxels["caml.warped"][16, 16, 5])
    assert viewer.pixel("sagittal", (16, 5), (facts["shape"][1], facts["shape"][2])) == [grey] * 3


def test_the_jacobian_shows_the_fold_of_the_chosen_method_only(viewer, facts):
    fold = (FOLD[0], FOLD[1], FOLD[2] - 1)  # one slice is cut off below
    size = (facts["shape"][0], facts["shape"][1])
    viewer.walk("axial", fold[2])
    viewer.walk("sagittal", 3)
    viewer.walk("coronal", 3)
    viewer.choose("overlay", "jacobian")
    yellow = [int(FOLDED[i : i + 2], 16) for i in (1, 3, 5)]
    assert viewer.pixel("axial", fold[:2], size) == yellow
    around = [viewer.pixel("axial", (fold[0] + i, fold[1] + j), size) for i, j in ((-1, 0), (1, 0), (0, 1), (0, -1))]
    assert yellow not in around
    assert "folded: |J| ≤ 0" in viewer.find("#viewer-legend").text
    viewer.choose("method", "0")
    assert viewer.pixel("axial", fold[:2], size) != yellow
    assert viewer.find("#readout-dice").text == f"{facts['methods'][0]['dice']:.3f}"


def test_outlines_are_drawn_where_structures_end(viewer, facts):
    viewer.walk("axial", 8)
    viewer.choose("opacity", 1)
    count = (
        "const c = document.getElementById('viewer-axial'); const d = c.getContext('2d')"
        ".getImageData(0, 0, c.width, c.height).data; const found = [0, 0];"
        "for (let i = 0; i < d.length; i += 4) { found[0] += d[i] === 86 && d[i + 1] === 180 && d[i + 2] === 233;"
        "found[1] += d[i] === 230 && d[i + 1] === 159 && d[i + 2] === 0; } return found"
    )
    assert viewer.run(count) == [0, 0]
    viewer.choose("overlay", "outlines")
    fixed, warped = viewer.run(count)
    assert fixed > 50 and warped > 50


def test_keys_and_the_wheel_go_through_the_slices(viewer, facts):
    from selenium.webdriver.common.keys import Keys

    x, y, z = viewer.place()
    axial = viewer.find("#viewer-axial")
    axial.send_keys(Keys.ARROW_UP)
    viewer.wait(f"return document.getElementById('viewer-axial').getAttribute('aria-valuenow') === '{z + 1}'")
    axial.send_keys(Keys.ARROW_LEFT, Keys.ARROW_LEFT, Keys.ARROW_LEFT)
    viewer.wait(f"return document.getElementById('viewer-axial').getAttribute('aria-valuenow') === '{z - 2}'")
    axial.send_keys(Keys.END)
    last = facts["shape"][2] - 1
    viewer.wait(f"return document.getElementById('viewer-axial').getAttribute('aria-valuenow') === '{last}'")
    axial.send_keys(Keys.ARROW_UP)  # there is none beyond
    viewer.wait("return true")
    assert viewer.place() == [x, y, last]
    viewer.run(
        "document.getElementById('viewer-coronal')"
        ".dispatchEvent(new WheelEvent('wheel', {deltaY: -100, cancelable: true}))"
    )
    viewer.wait(f"return document.getElementById('viewer-coronal').getAttribute('aria-valuenow') === '{y + 2}'")


def test_a_narrow_window_folds_the_contents_and_does_not_scroll_sideways(browser, page):
    browser.execute_cdp_cmd(
        "Emulation.setDeviceMetricsOverride", {"width": 420, "height": 800, "deviceScaleFactor": 1, "mobile": True}
    )
    try:
        browser.get(page.as_uri())
        window = Window(browser, page)
        assert not window.run("return document.querySelector('nav.contents details').open")
        window.run("document.getElementById('pairs').scrollIntoView()")
        window.wait("return document.getElementById('viewer').dataset.state === 'ready'")
        assert window.run("return document.documentElement.scrollWidth <= innerWidth")
    finally:
        browser.execute_cdp_cmd("Emulation.clearDeviceMetricsOverride", {})


def test_a_failed_method_is_named_and_the_two_scans_are_still_shown(browser, tmp_path):
    write_pair(tmp_path, toy_volumes())
    (tmp_path / "registered/toy/caml/seed1/examples-shard000/a__b.npz").write_bytes(b"")
    page = write_page(
        tmp_path, tmp_path / "report.html", configuration=configuration(), tables=[], figures=[],
        pairs=[("toy", "a", "b")], methods=["affine", "caml"], models={"affine": "none", "caml": "seed1"},
        examples=[examples_of(tmp_path)],
        command="", revision="",
    )  # fmt: skip
    browser.get(page.as_uri())
    window = Window(browser, page)
    window.run("document.getElementById('pairs').scrollIntoView()")
    window.wait("return document.getElementById('viewer').dataset.state === 'ready'")
    assert window.find("#viewer-message").text == "Proposed failed on this pair: there is no warped image."
    assert window.texts("#viewer-method option") == ["Affine only", "Proposed (failed)"]
    assert window.find("#readout-warped").text == "" and window.find("#readout-fixed").text != ""
    window.choose("method", "0")
    assert not window.find("#viewer-message").is_displayed()
    assert window.find("#readout-warped").text != ""
