"""Tables and figures: known numbers come out, nothing is dropped in silence, left is left."""

from __future__ import annotations

import math
import re
from csv import DictReader
from itertools import combinations
from pathlib import Path
from types import SimpleNamespace

import jinja2
import matplotlib as mpl
import numpy as np
import pandas as pd
import pytest
from docutils.core import publish_doctree
from docutils.nodes import system_message
from nibabel.orientations import apply_orientation, axcodes2ornt, inv_ornt_aff, ornt_transform
from skimage.color import rgb2lab

from dmir.errors import InputError
from dmir.report.boxplot import dice_boxplot, grouped_scores
from dmir.report.columns import COLUMNS, Column
from dmir.report.cross_cohort import cross_cohort_table
from dmir.report.curves import read_history, training_curves
from dmir.report.examples import Example, load_example, save_example
from dmir.report.layout import lay_out, rank_marks, rounded
from dmir.report.names import METHOD_NAMES, method_name, structure_group
from dmir.report.pictures import make_pictures
from dmir.report.planes import affine_to_ras, brain_of, choose_plane, field_to_ras, scalar_to_ras
from dmir.report.preprocessing import preprocessing_table
from dmir.report.qualitative import qualitative_figure
from dmir.report.style import METHOD_COLOURS, OTHER_COLOURS, method_colours, save_figure
from dmir.report.tables import (
    comparison_note,
    comparison_table,
    format_for_terminal,
    structure_scores,
    structure_table,
    training_table,
    write_table,
)
from dmir.report.tradeoffs import dice_against_folding, dice_against_time
from dmir.report.writing import tex_escape
from dmir.structures import load_structures

CAPTIONS = sorted((Path(__file__).parents[1] / "workflow" / "report").glob("*.rst"))
COMPARISON_COLUMNS = [
    "cohort", "method", "models", "n", "failed", "labels", "dice", "dice_sd", "dice_seed_sd", "dice_linear",
    "hd95", "hd95_sd", "nonpositive_jacobian_forward", "nonpositive_jacobian_central", "nondiffeomorphic_volume",
    "sdlogj", "tc", "tc_deviation", "endpoint_error", "endpoint_error_sd", "inverse_consistency_error", "seconds",
    "peak_memory_mb",
]  # fmt: skip


def pair(method: str, moving: str, *, model: str = "none", **scores: object) -> dict[str, object]:
    """Return one row of the table of pair scores."""
    failed = scores.get("status") == "failed"
    number = np.nan if failed else 0.5
    names = (
        "nonpositive_jacobian_forward nonpositive_jacobian_central nondiffeomorphic_volume sdlogj tc_nearest tc_linear"
    )
    return {
        "cohort": "c1", "method": method, "model": model, "moving": moving, "fixed": "atlas", "status": "ok",
        "reason": "", "seconds": number, "peak_memory_mb": number, "device": "cpu", "threads": 2,
        "endpoint_error": np.nan, **dict.fromkeys(names.split(), number),
        "tc_deviation_nearest": number, "tc_deviation_linear": number, **scores,
    }  # fmt: skip


def overlaps(method: str, moving: str, dice: list[float], *, model: str = "none", linear: float = 0.0) -> list[dict]:
    """Return the rows of the table of structure scores for one pair; structure k is number k + 1."""
    return [
        {
            "cohort": "c1", "method": method, "model": model, "moving": moving, "fixed": "atlas", "structure": k + 1,
            "name": f"{side} {thing}", "labels": labels, "dice": value + shift, "hd95": 10 * value, "volume_ratio": 1.0,
        }
        for labels, shift in (("nearest", 0.0), ("linear", linear))
        for k, (value, (side, thing)) in enumerate(
            zip(dice, [("left", "thalamus"), ("right", "thalamus"), ("left", "caudate")], strict=False)
        )
    ]  # fmt: skip


def by_method(table: pd.DataFrame) -> dict[str, dict]:
    return {row["method"]: row for row in table.to_dict("records")}


@pytest.fixture
def two_methods() -> tuple[pd.DataFrame, pd.DataFrame]:
    structures = pd.DataFrame(
        overlaps("affine", "a", [0.4, 0.6], linear=0.01)
        + overlaps("affine", "b", [0.6, 0.8], linear=0.01)
        + overlaps("syn", "a", [0.7, 0.9], linear=0.02)
        + overlaps("syn", "b", [0.5, np.nan], linear=0.02)
    )
    pairs = pd.DataFrame(
        [
            pair("syn", "a", seconds=3.0, peak_memory_mb=100.0, tc_nearest=0.9, endpoint_error=1.0),
            pair("syn", "b", seconds=5.0, peak_memory_mb=300.0, tc_nearest=1.0, endpoint_error=3.0),
            pair("affine", "a"),
            pair("affine", "b"),
        ]
    )
    return structures, pairs


def test_comparison_has_the_promised_columns_and_known_numbers(two_methods):
    table = comparison_table(*two_methods, ["affine", "syn"])
    assert list(table.columns) == COMPARISON_COLUMNS
    assert list(table["method"]) == ["affine", "syn"]
    syn = by_method(table)["syn"]
    # pair a: (0.7 + 0.9) / 2 = 0.8; pair b: 0.5, as the absent structure is left out
    assert syn["dice"] == pytest.approx(0.65)
    assert syn["dice_sd"] == pytest.approx(0.3 / np.sqrt(2))
    assert syn["dice_linear"] == pytest.approx(0.67)
    assert syn["hd95"] == pytest.approx(6.5)
    assert syn["endpoint_error"] == pytest.approx(2.0)
    assert syn["endpoint_error_sd"] == pytest.approx(np.sqrt(2))
    assert syn["tc"] == pytest.approx(0.95)
    assert syn["seconds"] == pytest.approx(4.0)
    assert syn["peak_memory_mb"] == 300.0
    assert (syn["n"], syn["failed"]) == (2, 0)
    assert np.isnan(syn["dice_seed_sd"])
    assert by_method(table)["affine"]["dice"] == pytest.approx(0.6)


def test_the_other_interpolation_becomes_the_primary_one(two_methods):
    table = comparison_table(*two_methods, ["syn"], primary="linear")
    syn = by_method(table)["syn"]
    assert syn["labels"] == "linear"
    assert syn["dice"] == pytest.approx(0.67)
    assert syn["dice_nearest"] == pytest.approx(0.65)
    assert "Dice (linear), mean ± sd ↑" in lay_out(table).headers
    assert "Dice (nearest) ↑" in lay_out(table).headers
    with pytest.raises(InputError, match="cubic"):
        comparison_table(*two_methods, ["syn"], primary="cubic")


def test_seeds_are_pooled_by_pair_before_the_pairs():
    dice = {("seed1", "a"): 0.6, ("seed1", "b"): 0.8, ("seed2", "a"): 0.7, ("seed2", "b"): 0.9}
    structures = pd.DataFrame([row for (m, p), d in dice.items() for row in overlaps("caml", p, [d, d], model=m)])
    pairs = pd.DataFrame([pair("caml", p, model=m, seconds=s) for s, (m, p) in enumerate(dice)])
    row = by_method(comparison_table(structures, pairs, ["caml"]))["caml"]
    assert row["dice"] == pytest.approx(0.75)
    assert row["dice_sd"] == pytest.approx(np.std([0.65, 0.85], ddof=1))
    assert row["dice_seed_sd"] == pytest.approx(np.std([0.7, 0.8], ddof=1))
    assert row["seconds"] == pytest.approx(np.median([(0 + 2) / 2, (1 + 3) / 2]))
    assert row["models"] == "seed1;seed2"
    assert row["n"] == 2


def test_failed_pairs_are_counted_and_told(two_methods, tmp_path):
    structures, pairs = two_methods
    lost = (pairs["method"] == "syn") & (pairs["moving"] == "b")
    pairs.loc[lost, ["status", "reason"]] = ["failed", "ended by signal 11"]
    structures = structures[~((structures["method"] == "syn") & (structures["moving"] == "b"))]
    table = comparison_table(structures, pairs, ["affine", "syn"])
    syn = by_method(table)["syn"]
    assert (syn["n"], syn["failed"]) == (1, 1)
    assert syn["dice"] == pytest.approx(0.8)
    assert np.isnan(syn["dice_sd"])
    assert by_method(table)["affine"]["n"] == 2
    write_table(table, tmp_path / "comparison")
    for suffix in (".md", ".tex"):
        text = (tmp_path / f"comparison{suffix}").read_text()
        assert "SyN 1 of 2 (not scored: ended by signal 11 (1))" in text
        assert "not compared on the same pairs" in text


def test_equal_pairs_carry_no_warning(two_methods):
    assert "not compared" not in comparison_note(*two_methods, ["affine", "syn"])
    assert "not scored" not in comparison_note(*two_methods, ["affine", "syn"])


def test_a_pair_without_a_record_and_one_that_a_seed_failed_are_failures():
    structures = pd.DataFrame(
        overlaps("syn", "a", [0.5]) + overlaps("syn", "b", [0.5]) + overlaps("elastix", "a", [0.5])
        + [row for m in ("seed1", "seed2") for row in overlaps("caml", "a", [0.7], model=m)]
        + overlaps("caml", "b", [0.9], model="seed1")
    )  # fmt: skip
    pairs = pd.DataFrame(
        [pair("syn", "a"), pair("syn", "b"), pair("elastix", "a")]
        + [pair("caml", "a", model=m) for m in ("seed1", "seed2")]
        + [pair("caml", "b", model="seed1"), pair("caml", "b", model="seed2", status="failed", reason="out of memory")]
    )
    rows = by_method(comparison_table(structures, pairs, ["syn", "elastix", "caml"]))
    assert {name: (row["n"], row["failed"]) for name, row in rows.items()} == {
        "syn": (2, 0),
        "elastix": (1, 1),
        "caml": (1, 1),
    }
    assert rows["caml"]["dice"] == pytest.approx(0.7)  # the pair that one seed lost counts for neither
    note = comparison_note(structures, pairs, ["syn", "elastix", "caml"])
    assert "Elastix 1 of 2 (not scored: no record (1))" in note
    assert "1 of 2 (not scored: out of memory (1))" in note


def test_a_method_that_failed_everywhere_keeps_its_row(two_methods):
    structures, pairs = two_methods
    pairs.loc[pairs["method"] == "syn", ["status", "reason"]] = ["failed", "crashed"]
    structures = structures[structures["method"] != "syn"]
    syn = by_method(comparison_table(structures, pairs, ["affine", "syn"]))["syn"]
    assert (syn["n"], syn["failed"]) == (0, 2)
    assert np.isnan(syn["dice"])
    assert np.isnan(syn["seconds"])


def test_absent_structures_are_counted_in_the_note(two_methods):
    note = comparison_note(*two_methods, ["affine", "syn"])
    assert "0 of 4 scores of Affine only; 1 of 4 scores of SyN (right thalamus)" in note


def test_cohorts_without_labels_are_compared_by_their_fields(two_methods):
    structures, pairs = two_methods
    table = comparison_table(structures[:0], pairs, ["affine", "syn"])
    assert table["dice"].isna().all()
    assert by_method(table)["syn"]["seconds"] == pytest.approx(4.0)
    assert not any("Dice" in header for header in lay_out(table).headers)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda s, p: (s.drop(columns="hd95"), p), "hd95"),
        (lambda s, p: (s, p.drop(columns="tc_nearest")), "tc_nearest"),
        (lambda s, p: (s, pd.concat([p, p[:1]])), "twice"),
        (lambda s, p: (s, p[:0]), "at least one pair"),
    ],
)
def test_score_tables_that_cannot_be_right_are_refused(two_methods, change, message):
    with pytest.raises(InputError, match=message):
        comparison_table(*change(*two_methods), ["syn"])


def test_note_names_devices_and_threads(two_methods):
    structures, pairs = two_methods
    pairs.loc[pairs["method"] == "affine", "device"] = "NVIDIA H100"
    note = comparison_note(structures, pairs, ["affine", "syn"])
    assert "Affine only: NVIDIA H100; SyN: cpu, 2 threads." in note


@pytest.mark.parametrize(
    ("value", "digits", "text"),
    [
        (0.12345, 3, "0.123"),
        (0.0, 3, "0.000"),
        (0.0002, 3, "<0.001"),
        (float("nan"), 3, ""),
        (1234.5, None, "1234"),
        (12.34, None, "12.3"),
        (0.01234, None, "0.0123"),
        (0.0, None, "0.00"),
        (2.5e-6, None, "2.50e-06"),
    ],
)
def test_rounding(value, digits, text):
    assert rounded(value, digits) == text


def test_marks_rank_what_is_printed():
    up, one = Column("Dice", digits=2, better="higher"), Column("TC", digits=2, better="one")
    everyone = [True] * 4
    assert rank_marks([0.701, 0.699, 0.65, 0.5], up, everyone) == ["best", "best", "second", ""]
    assert rank_marks([0.9, 0.7, np.nan, 0.5], up, [False, True, True, True]) == ["", "best", "", "second"]
    assert rank_marks([1.2, 0.95, 1.03, 0.5], one, everyone) == ["", "second", "best", ""]
    assert rank_marks([0.5, 0.5, np.nan, np.nan], up, everyone) == [""] * 4
    folding = Column("J", digits=3, better="lower")
    assert rank_marks([0.0, 0.0002, 0.3, 0.4], folding, everyone) == ["best", "second", "", ""]


@pytest.fixture
def comparison() -> pd.DataFrame:
    rows = [
        ("c1", "affine", 0.5, 0.01, 0.0, 0.001),
        ("c1", "syn", 0.71, 0.02, 0.0, 60.0),
        ("c1", "voxelmorph", 0.70, 0.03, 0.5, 0.2),
        ("c1", "my_net", 0.72, 0.04, 0.2, 0.3),
        ("c2", "syn", 0.68, 0.02, 0.0002, 61.0),
        ("c2", "voxelmorph", 0.65, 0.02, 0.6, 0.21),
    ]
    names = ["cohort", "method", "dice", "dice_sd", "nonpositive_jacobian_forward", "seconds"]
    table = pd.DataFrame(rows, columns=names).assign(labels="nearest", n=5, failed=0)
    table["endpoint_error"] = np.nan
    return table


def test_tex_marks_best_and_second_within_each_cohort(comparison, tmp_path):
    csv, md, tex, _ = write_table(comparison, tmp_path / "t", caption="50 % of a_b", note="R&D")
    assert (csv.name, md.name, tex.name) == ("t.csv", "t.md", "t.tex")
    text = tex.read_text()
    rows = [line for line in text.splitlines() if re.match(r"c[12] &", line)]
    assert r"\textbf{0.720 $\pm$ 0.040}" in rows[3]
    assert r"\underline{0.710 $\pm$ 0.020}" in rows[1]
    assert r"\textbf" not in rows[0]
    assert r"\underline" not in rows[0]  # the affine row is the starting point and not ranked
    assert r"\textbf{0.680 $\pm$ 0.020}" in rows[4]
    assert r"\textbf{\textless{}0.001}" in rows[4]
    assert r"my\_net" in rows[3]
    assert r"\caption{50 \% of a\_b}" in text
    assert r"R\&D\par" in text
    assert text.count(r"\midrule") == 2  # below the header, between the cohorts
    assert text.count("{") == text.count("}")
    columns = re.search(r"\\begin\{tabular\}\{(\w+)\}", text)[1]
    assert all(row.count(" & ") == len(columns) - 1 for row in rows)
    assert "Endpoint" not in text  # a column without a value says nothing


def test_tex_escapes_what_tex_would_interpret():
    assert tex_escape(r"a_b & 5% of {x}^2 ~ #1 $ \n") == (
        r"a\_b \& 5\% of \{x\}\textasciicircum{}2 \textasciitilde{} \#1 \$ \textbackslash{}n"
    )
    assert tex_escape("|J|≤0 ↓ ±") == r"\textbar{}J\textbar{}$\leq$0 $\downarrow$ $\pm$"


def test_markdown_parses_back_to_the_rounded_numbers(comparison, tmp_path):
    _, md, _, _ = write_table(comparison, tmp_path / "t", caption="Caption.", note="Note.")
    lines = [line for line in md.read_text().splitlines() if line.startswith("|")]
    assert len({len(line) for line in lines}) == 1  # aligned
    cells = [[cell.strip().replace("\\|", "|") for cell in re.split(r"(?<!\\)\|", line)[1:-1]] for line in lines]
    header, rows = cells[0], cells[2:]
    assert header == [
        "Cohort",
        "Method",
        "Dice (nearest), mean ± sd ↑",
        "|J|≤0, forward, % ↓",
        "Time (median), s a pair ↓",
        "n (pairs)",
    ]
    for row, (_, truth) in zip(rows, comparison.iterrows(), strict=True):
        mean, spread = map(float, row[2].strip("*").split(" ± "))
        assert mean == round(truth["dice"], 3)
        assert spread == round(truth["dice_sd"], 3)
        folding = row[3].strip("*")
        assert folding == "<0.001" or float(folding) == round(truth["nonpositive_jacobian_forward"], 3)
        assert row[1] == method_name(truth["method"])
    assert rows[3][2].startswith("**")


def test_csv_keeps_full_precision(comparison, tmp_path):
    comparison["dice"] += np.pi / 1e9
    csv, _, _, _ = write_table(comparison, tmp_path / "t")
    with csv.open() as file:
        rows = list(DictReader(file))
    assert [float(row["dice"]) for row in rows] == comparison["dice"].tolist()
    assert list(rows[0]) == list(comparison.columns)
    assert not list(tmp_path.glob(".writing*"))


def test_the_terminal_table_survives_the_csv(comparison, tmp_path):
    csv, _, _, _ = write_table(comparison, tmp_path / "t")
    text = format_for_terminal(pd.read_csv(csv))
    assert text == format_for_terminal(comparison)
    assert max(map(len, text.splitlines())) <= 110
    assert text.startswith("c1: mean ± sd over pairs, labels warped by nearest interpolation\n")
    assert re.search(r"^my_net +5 +0\.720 ± 0\.040\*", text, flags=re.MULTILINE)
    assert "c2: " in text


def test_every_known_column_that_ranks_says_its_direction():
    arrows = {"higher": "↑", "lower": "↓", "one": "best 1", "": ""}
    for column in COLUMNS.values():
        assert column.header.endswith(arrows[column.better])


def test_structures_by_method_rank_along_rows(two_methods, tmp_path):
    table = structure_scores(two_methods[0], ["affine", "syn"])
    assert list(table["structure"]) == [1, 2]
    assert table["syn"].tolist() == pytest.approx([0.6, 0.9])
    assert table["affine"].tolist() == pytest.approx([0.5, 0.7])
    assert list(table["n"]) == [2, 2]
    assert table["affine_sd"].tolist() == pytest.approx([0.2 / np.sqrt(2)] * 2)
    table["voxelmorph"] = [0.7, 0.8]
    _, _, tex, _ = write_table(table, tmp_path / "t")
    rows = [line for line in tex.read_text().splitlines() if line.startswith("c1 &")]
    assert r"\textbf{0.700}" in rows[0]
    assert r"\underline{0.600 $\pm$" in rows[0]
    assert r"\textbf{0.900}" in rows[1]


def test_a_structure_absent_from_every_pair_keeps_its_row(two_methods):
    structures = two_methods[0]
    structures.loc[structures["structure"] == 2, "dice"] = np.nan
    table = structure_scores(structures, ["affine", "syn"])
    assert list(table["n"]) == [2, 0]
    assert np.isnan(table.loc[1, "syn"])


@pytest.mark.parametrize(("name", "groups"), [("oasis28", 16), ("lpba56", 29)])
def test_structure_sets_pair_left_and_right(name, groups):
    structures = load_structures(name)
    table = structure_table(structures.table)
    assert len(table) == groups
    assert (table["left"].notna() == table["right"].notna()).all()
    ids = pd.concat([table["left"], table["right"], table["both"]]).dropna()
    assert sorted(ids) == sorted(structures.ids)


@pytest.mark.parametrize(
    ("name", "group"),
    [
        ("left cerebral white matter", "Cerebral white matter"),
        ("Right-VentralDC", "VentralDC"),
        ("L superior frontal gyrus", "Superior frontal gyrus"),
        ("ctx-lh-precuneus", "Ctx precuneus"),
        ("hippocampus_R", "Hippocampus"),
        ("CSF", "CSF"),
        ("brain stem", "Brain stem"),
    ],
)
def test_groups_by_name(name, group):
    assert structure_group(name) == group


def _as_seen(colour: str, matrix: np.ndarray) -> np.ndarray:
    rgb = np.array(mpl.colors.to_rgb(colour))
    linear = np.where(rgb <= 0.04045, rgb / 12.92, ((rgb + 0.055) / 1.055) ** 2.4)
    seen = np.clip(matrix @ linear, 0, 1)
    return rgb2lab(np.where(seen <= 0.0031308, seen * 12.92, 1.055 * seen ** (1 / 2.4) - 0.055)[None, None])[0, 0]


@pytest.mark.parametrize(
    "matrix",
    [
        np.eye(3),
        # Machado et al. 2009, severity 1.0: protanopia and deuteranopia
        np.array([[0.152286, 1.052583, -0.204868], [0.114503, 0.786281, 0.099216], [-0.003882, -0.048116, 1.051998]]),
        np.array([[0.367322, 0.860646, -0.227968], [0.280085, 0.672501, 0.047413], [-0.011820, 0.042940, 0.968881]]),
    ],
    ids=["normal", "protanopia", "deuteranopia"],
)
def test_method_colours_are_told_apart_with_any_vision(matrix):
    seen = {method: _as_seen(colour, matrix) for method, colour in METHOD_COLOURS.items()}
    nameless = {"refinement", "command", "fields", "fireants"}  # each row of them is another thing, or is not ours
    assert set(seen) == set(METHOD_NAMES) - nameless
    for (a, one), (b, other) in combinations(seen.items(), 2):
        assert np.linalg.norm(one - other) > 10, f"{a} and {b} look alike"


def test_a_method_always_has_its_colour():
    alone = method_colours(["caml", "net_a"])
    together = method_colours(["net_z", "syn", "net_a", "caml", "net_b"])
    assert alone["caml"] == together["caml"] == METHOD_COLOURS["caml"]
    assert together == {m: method_colours(["net_b", "caml", "net_a", "net_z", "syn"])[m] for m in together}
    assert method_colours(["net_a"])["net_a"] == alone["net_a"]
    many = method_colours([*METHOD_COLOURS, *(f"variant {i}" for i in range(12))])
    assert len(set(many.values())) == len(many)
    assert not set(OTHER_COLOURS) & set(METHOD_COLOURS.values())


def _history(best: int) -> pd.DataFrame:
    steps = np.arange(1, 101)
    dice = np.where(steps % 20 == 0, 0.6 - np.abs(steps - best) / 1000, np.nan)
    return pd.DataFrame(
        {"step": steps, "loss": 1 / steps, "similarity": 0.5 / steps, "regularisation": 0.5 / steps,
         "val_dice": dice, "seconds": steps * 0.1}
    )  # fmt: skip


def test_curves_mark_the_best_validation(tmp_path):
    figure = training_curves({("caml", "seed1"): _history(60), ("caml", "seed2"): _history(80)})
    lines = figure.axes[3].lines
    marked = [line.get_xdata()[0] for line in lines if line.get_marker() == "o"]
    assert marked == [60, 80]
    assert {line.get_linestyle() for line in lines if line.get_marker() != "o"} == {"-", "--"}
    assert {line.get_color() for line in lines} == {METHOD_COLOURS["caml"]}
    legend = [text.get_text() for text in figure.legends[0].get_texts()]
    assert legend == ["Proposed", "seed1", "seed2"]


def test_histories_are_read_or_refused(tmp_path):
    path = tmp_path / "history.csv"
    _history(60).to_csv(path, index=False)
    pd.testing.assert_frame_equal(read_history(path), _history(60))
    _history(60).drop(columns="val_dice").to_csv(path, index=False)
    with pytest.raises(InputError, match="val_dice"):
        read_history(path)
    path.write_text("")
    with pytest.raises(InputError, match="a complete table in CSV"):
        read_history(path)
    with pytest.raises(InputError, match="no such file"):
        read_history(tmp_path / "none.csv")
    with pytest.raises(InputError, match="at least one model"):
        training_curves({})


def test_figures_are_equal_files_and_their_text_is_text(tmp_path):
    for name in ("first", "second"):
        save_figure(
            training_curves({("caml", "seed1"): _history(60), ("my_net", "seed1"): _history(40)}), tmp_path / name
        )
    for suffix in (".svg", ".png"):
        first, second = ((tmp_path / f"{name}{suffix}").read_bytes() for name in ("first", "second"))
        assert first == second
    svg = (tmp_path / "first.svg").read_text()
    assert ">Validation Dice</text>" in svg
    assert ">my_net</text>" in svg
    assert "<dc:date>" not in svg


def test_box_plot_groups_average_left_and_right_by_pair(two_methods):
    scores = grouped_scores(two_methods[0])
    syn = scores[scores["method"] == "syn"].set_index("moving")["dice"]
    assert set(scores["group"]) == {"Thalamus"}
    assert syn["a"] == pytest.approx(0.8)
    assert syn["b"] == pytest.approx(0.5)  # the right one is absent


@pytest.mark.parametrize(("count", "rows"), [(16, 1), (17, 2), (29, 2)])
def test_box_plot_rows_order_and_colours(count, rows):
    generator = np.random.default_rng(0)
    structures = pd.DataFrame(
        [
            {**overlaps(method, f"p{p}", [0.0])[0], "name": f"left thing {k:02d}", "structure": k,
             "dice": 0.3 + 0.02 * k + generator.normal(0, 1e-3)}
            for method in ("syn", "caml") for p in range(3) for k in range(count)
        ]
    )  # fmt: skip
    figure = dice_boxplot(structures, ["caml", "syn"])
    assert len(figure.axes) == rows
    labels = [label.get_text() for axis in figure.axes for label in axis.get_xticklabels()]
    assert labels == [f"Thing {k:02d}" for k in reversed(range(count))]  # the best aligned first
    assert [text.get_text() for text in figure.legends[0].get_texts()] == ["Proposed", "SyN"]
    faces = [mpl.colors.to_hex(box.get_facecolor()) for box in figure.axes[0].patches if box.get_linewidth() == 0.3]
    assert faces.count(METHOD_COLOURS["caml"]) == faces.count(METHOD_COLOURS["syn"]) == len(figure.axes[0].get_xticks())


def test_box_plot_needs_one_cohort_and_a_score(two_methods):
    structures = two_methods[0]
    with pytest.raises(InputError, match="no Dice for cubic labels"):
        dice_boxplot(structures, ["syn"], labels="cubic")
    with pytest.raises(InputError, match="several"):
        dice_boxplot(pd.concat([structures, structures.assign(cohort="c2")]), ["syn"])


def test_tradeoffs_show_every_method_where_it_is(comparison):
    first = comparison[comparison["cohort"] == "c1"]
    for draw, column in ((dice_against_time, "seconds"), (dice_against_folding, "nonpositive_jacobian_forward")):
        figure = draw(comparison)
        assert [axis.get_title(loc="left") for axis in figure.axes] == ["c1", "c2"]
        points = [line for line in figure.axes[0].lines if len(line.get_xdata()) == 1]
        shown = {(float(line.get_xdata()[0]), float(line.get_ydata()[0])) for line in points}
        drawn = first[first["method"] != "affine"] if column == "seconds" else first[first[column] > 0]
        assert shown >= set(zip(drawn[column], drawn["dice"], strict=True))
        assert len(points) == (len(drawn) if column == "seconds" else len(first))
        low, high = figure.axes[0].get_xlim()
        assert low < drawn[column].min()
        assert high > drawn[column].max()


def test_methods_without_a_fold_stand_side_by_side_about_zero(comparison):
    column = "nonpositive_jacobian_forward"
    one = comparison[comparison["cohort"] == "c1"].head(1)
    folding = {"syn": 0.0, "caml": 0.0, "elastix": 0.02, "voxelmorph": 0.5}
    table = pd.concat([one.assign(**{"method": name, column: value}) for name, value in folding.items()])
    axis = dice_against_folding(table).axes[0]
    places = [float(line.get_xdata()[0]) for line in axis.lines]
    assert places == [-0.005, 0.005, 0.02, 0.5]
    assert axis.get_xlim()[0] < -0.005


def test_what_takes_no_time_is_a_line_and_does_not_stretch_the_axis(comparison):
    one = comparison[comparison["cohort"] == "c1"].head(1)
    seconds = {"affine": 1e-4, "syn": 13.5, "caml": 0.4}
    table = pd.concat([one.assign(method=name, seconds=value) for name, value in seconds.items()])
    figure = dice_against_time(table)
    assert figure.axes[0].get_xlim() == (0.1, 100)
    across = [line for line in figure.axes[0].lines if len(line.get_xdata()) == 2]
    assert [line.get_ydata()[0] for line in across] == [one["dice"].iloc[0]]
    assert [text.get_text() for text in figure.legends[0].get_texts()] == ["Affine only", "SyN", "Proposed"]


def _example(method: str = "syn", affine: np.ndarray | None = None, seed: int = 0) -> Example:
    generator = np.random.default_rng(seed)
    return Example(
        method=method,
        model="none",
        warped=generator.uniform(0, 1, (8, 9, 10)).astype(np.float32),
        displacement=generator.normal(0, 3, (3, 8, 9, 10)).astype(np.float32),
        affine=np.diag([2.0, 2.0, 2.0, 1.0]) if affine is None else affine,
        cohort="c1",
        moving="sub-é",
        fixed="atlas",
        dice=0.5,
    )


def test_examples_survive_the_disk(tmp_path):
    example = _example()
    save_example(tmp_path / "e.npz", example)
    back = load_example(tmp_path / "e.npz")
    assert (back.method, back.model, back.cohort, back.moving, back.fixed, back.dice) == (
        "syn", "none", "c1", "sub-é", "atlas", 0.5,
    )  # fmt: skip
    np.testing.assert_array_equal(back.affine, example.affine)
    np.testing.assert_allclose(back.warped, example.warped, atol=2**-11)
    np.testing.assert_allclose(back.displacement, example.displacement, rtol=2**-11, atol=1e-6)
    assert back.displacement.dtype == np.float32


def test_examples_that_are_damaged_foreign_or_infinite_are_refused(tmp_path):
    path = tmp_path / "e.npz"
    save_example(path, _example())
    path.write_bytes(path.read_bytes()[:-200])
    with pytest.raises(InputError, match="cannot be read"):
        load_example(path)
    path.write_bytes(b"")
    with pytest.raises(InputError, match="cannot be read"):
        load_example(path)
    np.savez(path, warped=np.zeros(3))
    with pytest.raises(InputError, match="displacement"):
        load_example(path)
    with pytest.raises(InputError, match="no such file"):
        load_example(tmp_path / "none.npz")
    broken = _example()
    broken.displacement[0, 0, 0, 0] = 1e6  # beyond half precision
    with pytest.raises(ValueError, match="finite"):
        save_example(tmp_path / "new.npz", broken)
    assert not (tmp_path / "new.npz").exists()
    with pytest.raises(ValueError, match="warped"):
        Example("syn", "none", np.zeros((4, 4, 4)), np.zeros((3, 4, 4, 5)), np.eye(4))


def test_examples_never_run_code(tmp_path):
    class Trap:
        def __reduce__(self):
            return (Path.touch, (tmp_path / "sprung",))

    entries = {name: np.float64(1) for name in ("format", "warped", "displacement", "affine", "dice")}
    np.savez(tmp_path / "e.npz", **entries, **dict.fromkeys(["cohort", "method", "model", "moving", "fixed"], Trap()))
    with pytest.raises(InputError, match="cannot be read"):
        load_example(tmp_path / "e.npz")
    assert not (tmp_path / "sprung").exists()


@pytest.fixture
def anatomy() -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """An image, a field and the affine of a RAS grid with unequal sides and voxels."""
    generator = np.random.default_rng(1)
    image = np.zeros((20, 24, 22), dtype=np.float32)
    image[3:17, 4:20, 5:18] = generator.uniform(0.2, 1, (14, 16, 13))
    field = generator.normal(0, 0.3, (3, *image.shape)).astype(np.float32)
    affine = np.array([[1.0, 0, 0, -9], [0, 1.5, 0, -20], [0, 0, 2.0, -30], [0, 0, 0, 1]])
    return image, field, affine


def _stored_as(codes: str, image: np.ndarray, field: np.ndarray, affine: np.ndarray) -> tuple[np.ndarray, ...]:
    """Return the same anatomy and field with the array axes running as the codes say."""
    transform = ornt_transform(axcodes2ornt("RAS"), axcodes2ornt(codes))
    stored = np.empty((3, *apply_orientation(image, transform).shape), dtype=field.dtype)
    for component, (axis, sign) in zip(field, transform, strict=True):
        stored[int(axis)] = sign * apply_orientation(component, transform)
    return apply_orientation(image, transform), stored, affine @ inv_ornt_aff(transform, image.shape)


@pytest.mark.parametrize("codes", ["RAS", "LPS", "LAS", "PIR", "SAL"])
@pytest.mark.parametrize("plane_name", ["coronal", "axial", "sagittal"])
def test_pictures_do_not_depend_on_how_the_array_is_stored(anatomy, codes, plane_name):
    image, field, affine = anatomy

    def pictures(image: np.ndarray, field: np.ndarray, affine: np.ndarray):
        ras = affine_to_ras(affine, image.shape)
        image, field = scalar_to_ras(image, affine), field_to_ras(field, affine)
        plane = choose_plane(plane_name, brain_of(image), ras, margin=2.0)
        return plane, make_pictures(plane, image, field, image * 0.5, brain_of(image), ras, truth=field * 0.5)

    plane, expected = pictures(image, field, affine)
    other, found = pictures(*_stored_as(codes, image, field, affine))
    assert other == plane
    for name in ("warped", "displacement", "magnitude", "error", "jacobian", "endpoint_error"):
        np.testing.assert_allclose(getattr(found, name), getattr(expected, name), atol=1e-6)


def test_right_is_right_front_is_front_and_up_is_up():
    affine = np.diag([1.0, 1.0, 1.0, 1.0])
    affine[:3, 3] = -10
    image = np.full((21, 21, 21), 0.1, dtype=np.float32)
    image[15, 10, 10], image[10, 15, 10], image[10, 10, 15] = (
        2,
        3,
        4,
    )  # to the right, the front and the top of the middle
    stored, _, stored_affine = _stored_as("LPS", image, np.zeros((3, 21, 21, 21), np.float32), affine)
    ras = scalar_to_ras(stored, stored_affine)
    centre = {"sagittal": 10, "coronal": 10, "axial": 10}
    for name, (right, up) in {"coronal": (2, 4), "axial": (2, 3), "sagittal": (3, 4)}.items():
        plane = choose_plane(name, np.ones(ras.shape, bool), affine, centre)
        picture = plane.cut(ras)
        assert picture[10, 15] == right
        assert picture[15, 10] == up
        assert plane.position == pytest.approx(0.0)


def test_pictures_of_known_fields(anatomy):
    image, _, affine = anatomy
    brain = np.ones(image.shape, dtype=bool)
    field = np.zeros((3, *image.shape), dtype=np.float32)
    field[0] = 0.2 * np.arange(20)[:, None, None]  # stretched by 1.2 from left to right
    field[1] = 2.0  # two voxels of 1.5 mm to the front
    truth = field.copy()
    truth[2] = 0.5  # half a voxel of 2 mm upwards
    plane = choose_plane("coronal", brain, affine, {"coronal": 7}, margin=0.0)
    pictures = make_pictures(plane, image, field, image, brain, affine, truth)
    assert pictures.warped.shape == (22, 20)
    np.testing.assert_allclose(pictures.jacobian, 1.2, rtol=1e-5)
    np.testing.assert_allclose(pictures.magnitude[0], np.hypot(0.2 * np.arange(20), 3.0), rtol=1e-5)
    np.testing.assert_allclose(pictures.endpoint_error, 1.0, rtol=1e-5)
    np.testing.assert_array_equal(pictures.error, 0)
    assert plane.size == (20.0, 44.0)


def test_planes_that_do_not_exist_are_refused(anatomy):
    image, _, affine = anatomy
    with pytest.raises(InputError, match="Did you mean 'coronal'"):
        choose_plane("coronel", brain_of(image), affine)
    with pytest.raises(InputError, match="a slice from 0 to 23"):
        choose_plane("coronal", brain_of(image), affine, {"coronal": 24})


def test_cross_cohort_table_sets_gains_against_each_other():
    rows = [
        ("home", "affine", 0.60), ("home", "syn", 0.80), ("home", "caml", 0.70), ("home", "worse", 0.605),
        ("away", "affine", 0.40), ("away", "syn", 0.55), ("away", "caml", 0.45), ("away", "worse", 0.41),
    ]  # fmt: skip
    columns = {"n": 4, "failed": 0, "dice_sd": 0.01, "labels": "nearest", "nonpositive_jacobian_forward": 0.0}
    comparison = pd.DataFrame(rows, columns=["cohort", "method", "dice"]).assign(**columns)
    table = cross_cohort_table(comparison, "home").set_index("method")
    assert set(table["cohort"]) == {"away"}
    assert table.loc["syn", "dice_gain"] == pytest.approx(0.15) and table.loc["syn", "gain_kept"] == pytest.approx(75)
    assert table.loc["caml", "gain_kept"] == pytest.approx(50) and table.loc["caml", "own_dice"] == 0.70
    assert table.loc["affine", "dice_gain"] == 0 and math.isnan(table.loc["affine", "gain_kept"])
    assert math.isnan(table.loc["worse", "gain_kept"])  # nothing was gained that could be kept
    without = cross_cohort_table(comparison[comparison["method"] != "affine"], "home")
    assert without["dice_gain"].isna().all()


def test_the_table_says_what_its_seconds_and_its_memory_are():
    note = comparison_note(pd.DataFrame(overlaps("syn", "a", [0.5])), pd.DataFrame([pair("syn", "a")]), ["syn"])
    for words in (
        "median over pairs of a warm",
        "transfers to and from a GPU",
        "reading, writing, training",
        "SyN: cpu, 2",
    ):
        assert words in note


def test_preprocessing_table_has_medians_and_the_worst():
    quality = pd.DataFrame(
        {
            "scan": list("abc"), "mask_overlap": [1.0, 0.95, 0.7], "ok": [True, True, False],
            "seconds": [3.0, 9.0, 11.0], "seconds_affine": [math.nan, 4.0, 6.0], "peak_memory_mb": [500, 700, 600],
            "warnings": [math.nan, "a: lengths in metres; converted", ""],
        }
    )  # fmt: skip
    table = preprocessing_table({"x": quality}, {"x": True})
    row = table.iloc[0]
    assert (row["scans"], row["flagged"], row["warned"], row["peak_memory_mb"]) == (3, 1, 1, 700)
    assert (row["mask_overlap"], row["mask_overlap_min"]) == (0.95, 0.7)
    assert (row["scan_seconds"], row["affine_seconds"]) == (9.0, 5.0)
    assert "denoise_seconds" not in table
    without = quality.drop(columns="seconds_affine").assign(seconds_resample=1.0)
    several = preprocessing_table({"as they come": without, "x": quality}, {})  # the first has no affine
    assert list(several.columns[-3:]) == ["affine_seconds", "resample_seconds", "peak_memory_mb"]
    assert "flagged scans of x are left out" in table.attrs["note"].lower()


def test_qualitative_figure_tells_methods_sides_and_scores(anatomy, tmp_path):
    image, field, affine = anatomy
    examples = [
        Example(m, "none", image * s, field * s, affine, "c1", "sub-1", "atlas", d)
        for m, s, d in (("affine", 0.0, 0.5), ("caml", 1.0, float("nan")))
    ]
    figure = qualitative_figure(examples, image * 0.9, image, planes=("coronal", "sagittal"), truth=field)
    width, height = figure.get_size_inches()
    assert width <= 7.21
    assert height <= 9.41
    save_figure(figure, tmp_path / "q")
    svg = (tmp_path / "q.svg").read_text()
    texts = re.findall(r">([^<>]+)</text>", svg)
    assert {"L", "R", "P", "A", "Proposed", "Affine only", "Dice 0.500", "Endpoint error", "moving: sub-1"} <= set(
        texts
    )
    assert "nan" not in " ".join(texts)
    without = qualitative_figure(examples, image * 0.9, image)
    headers = [axis.get_title() for axis in without.axes]
    assert "Endpoint error" not in headers
    assert "Moving and fixed" in headers


def test_qualitative_figure_refuses_what_does_not_belong_together(anatomy):
    image, field, affine = anatomy
    good = Example("syn", "none", image, field, affine, "c1", "sub-1", "atlas")
    other_pair = Example("caml", "none", image, field, affine, "c1", "sub-2", "atlas")
    other_grid = Example("caml", "none", image, field, affine * 2, "c1", "sub-1", "atlas")
    for examples, moving, message in (
        ([], image, "one example a method"),
        ([good, other_pair], image, "sub-2"),
        ([good, other_grid], image, "another affine"),
        ([good], image[1:], "moving image"),
    ):
        with pytest.raises(InputError, match=message):
            qualitative_figure(examples, moving, image)


@pytest.mark.parametrize("path", CAPTIONS, ids=lambda path: path.stem)
def test_captions_render_without_complaint(path):
    environment = jinja2.Environment(trim_blocks=True, lstrip_blocks=True, undefined=jinja2.StrictUndefined)
    job = SimpleNamespace(
        wildcards=SimpleNamespace(cohort="oasis", moving="sub-1", fixed="atlas", study="ablation"),
        params=SimpleNamespace(structures="oasis28", labels="nearest", reference="caml"),
        config={"methods": ["syn", "caml"], "train_on": "oasis", "test_on": ["oasis", "lpba40"]},
    )
    text = environment.from_string(path.read_text()).render(snakemake=job)
    document = publish_doctree(text, settings_overrides={"report_level": 5})
    assert not [node.astext() for node in document.findall(system_message)]
    assert "{{" not in text
    assert "{%" not in text
    if path.stem == "workflow":
        assert "This run compares syn, caml" in text
        assert "on oasis, lpba40" in text


def test_html_holds_the_cells_and_executes_nothing(tmp_path):
    table = pd.DataFrame({"cohort": ["c"] * 2, "method": ["<script>x</script>", "syn"], "dice": [0.5, 0.75]})
    page = write_table(table, tmp_path / "t", caption="A & B")[3].read_text()
    assert "<script>" not in page and "&lt;script&gt;" in page and "A &amp; B" in page
    assert "<b>0.750</b>" in page and "0.500" in page


def test_the_table_of_trainings_says_what_was_gained_and_what_it_cost():
    history = pd.DataFrame({"step": [0, 1, 2, 3, 4], "val_dice": [0.5, np.nan, 0.7, np.nan, 0.6]})
    summary = {"parameters": 12, "steps": 4, "kept_step": 2, "seconds": 10.0, "peak_memory_mb": 3.5}
    summary |= {"device": "cpu (x)", "threads": 1, "precision": "bf16", "waited_for_images_seconds": 0.25}
    table = training_table({("caml", "seed1"): (history, summary)})
    row = table.iloc[0]
    assert (row["val_dice_before"], row["val_dice"], row["kept_step"]) == (0.5, 0.7, 2)
    assert row["seconds_a_step"] == 2.5 and row["parameters"] == 12 and row["waited_percent"] == 2.5
    assert "bf16" in table.attrs["note"] and "cpu (x)" in table.attrs["note"]
    with pytest.raises(InputError, match="val_dice"):
        training_table({("caml", "seed1"): (history[["step"]], summary)})
    other, failed = {**summary, "pairs": "all"}, {"steps": 40, "failed": "no network"}
    table = training_table({("a", "1"): (history, {**summary, "pairs": "scan_to_atlas"}), ("b", "1"): (history, other)})
    assert "which differ here (all, scan_to_atlas)" in table.attrs["note"] and "failed" not in table.attrs["note"]
    table = training_table({("a", "1"): (history, summary), ("b", "seed1"): (history[:0], failed)})
    assert (
        table.loc[1, ["method", "steps"]].tolist() == ["b", 40]
        and table.loc[1, "parameters":].drop("steps").isna().all()
    )
    assert table.attrs["note"].endswith("The training of b/seed1 failed: no network")
