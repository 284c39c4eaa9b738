"""The tables of a paper: topology, failures, published figures; unequal n is told, and LaTeX gets what it can read."""

from __future__ import annotations

import math
import re
from functools import cache
from itertools import product
from pathlib import Path

import numpy as np
import pandas as pd
import pytest

from dmir.config.cohorts import COHORT_MODELS, source_of
from dmir.errors import InputError
from dmir.metrics import score_pair
from dmir.report.columns import COLUMNS
from dmir.report.cross_cohort import cross_cohort_table
from dmir.report.failures import failures_table
from dmir.report.layout import lay_out, rounded
from dmir.report.names import METHOD_NAMES
from dmir.report.published import (
    DATASETS,
    closest_protocol,
    published_effects,
    published_for,
    published_scores,
    published_table,
)
from dmir.report.studies import study_table
from dmir.report.tables import comparison_table, structure_scores, structure_table, write_table
from dmir.report.topology import topology_table
from dmir.report.writing import to_markdown
from dmir.structures import load_structures

ROOT = Path(__file__).parents[1]
HOSTILE = r"a_b & c% \input{/etc/passwd} {"
TABLES = ("comparison", "topology", "failures", "by_structure", "cross_cohort", "lambda")
FOLDING = ["nonpositive_jacobian_forward", "nonpositive_jacobian_central", "nondiffeomorphic_volume", "sdlogj"]
Record = dict[str, object]


def pair(method: str, moving: str, *, cohort: str = "c1", model: str = "none", **scores: object) -> Record:
    """Return one row of the table of pair scores, both interpolations; ``change`` is nearest's, linear's is double."""
    change = float(str(scores.pop("change", 6.0)))
    failed = scores.get("status") == "failed"
    record: Record = {"cohort": cohort, "method": method, "model": model, "moving": moving, "fixed": "atlas"}
    record |= {"status": "ok", "reason": "", "device": "cpu", "threads": 1, "seconds": 1.0, "peak_memory_mb": 100.0}
    numbers: Record = {**dict.fromkeys(FOLDING, 0.25), "endpoint_error": np.nan}
    for labels, factor in (("nearest", 1), ("linear", 2)):
        numbers |= {f"tc_{labels}": 1.1, f"tc_deviation_{labels}": 0.2, f"labels_vanished_{labels}": 0}
        numbers |= {f"topology_change_{labels}": factor * change, f"topology_floor_{labels}": 2.0}
        numbers |= {f"topology_change_structures_{labels}": 2, f"topology_floor_structures_{labels}": 1}
    return record | (dict.fromkeys(numbers, np.nan) if failed else numbers) | scores


def overlaps(method: str, moving: str, dice: list[float], *, cohort: str = "c1", model: str = "none") -> list[Record]:
    """Return the rows of the table of structure scores of one pair; the first structure loses what others gain."""
    return [
        {
            "cohort": cohort, "method": method, "model": model, "moving": moving, "fixed": "atlas",
            "structure": k + 1, "name": f"thing {k + 1}", "labels": labels, "dice": value, "hd95": 1.0,
            "components_change": 1.0, "tunnels_change": 2.0 if k else -4.0, "cavities_change": 0.0,
        }
        for labels, (k, value) in product(("nearest", "linear"), enumerate(dice))
    ]  # fmt: skip


def run(
    methods: list[str], moving: str = "ab", cohorts: tuple[str, ...] = ("c1",), lost: tuple[str, ...] = ()
) -> tuple[pd.DataFrame, pd.DataFrame]:
    """Return the score tables of methods on pairs; ``lost`` names method/cohort/moving that crashed."""
    structures: list[Record] = []
    pairs = []
    for (place, method), cohort, scan in product(enumerate(methods), cohorts, moving):
        if f"{method}/{cohort}/{scan}" in lost:
            pairs.append(pair(method, scan, cohort=cohort, status="failed", reason="crashed"))
        else:
            pairs.append(pair(method, scan, cohort=cohort))
            structures += overlaps(method, scan, [0.5 + 0.1 * place, 0.6 + 0.1 * place], cohort=cohort)
    return pd.DataFrame(structures), pd.DataFrame(pairs)


def note_of(table: pd.DataFrame) -> str:
    return str(table.attrs["note"])


# --- topology ---


def test_topology_is_averaged_over_models_and_then_over_pairs():
    structures = pd.DataFrame(
        [row for m, s in product(("seed1", "seed2"), "ab") for row in overlaps("caml", s, [0.5, 0.5], model=m)]
    )
    changes = {("seed1", "a"): 4.0, ("seed2", "a"): 8.0, ("seed1", "b"): 10.0, ("seed2", "b"): 20.0}
    pairs = pd.DataFrame([pair("caml", s, model=m, change=change) for (m, s), change in changes.items()])
    table = topology_table(structures, pairs, ["caml"]).set_index("labels")
    assert list(table.index) == ["nearest", "linear"]
    assert table["topology_change"].tolist() == [(6 + 15) / 2, 6 + 15]
    assert table.loc["nearest", "topology_change_sd"] == pytest.approx(9 / math.sqrt(2))
    parts = ["components_change", "tunnels_change", "cavities_change"]
    assert table.loc["nearest", parts].tolist() == [2.0, 6.0, 0.0]  # 1 + 1, |-4| + 2, none: nothing cancels
    assert table["structures_scored"].tolist() == [2, 2] and table["n"].tolist() == [2, 2]
    assert table["topology_floor"].tolist() == [2.0, 2.0] and table["tc"].tolist() == pytest.approx([1.1, 1.1])


def test_the_parts_of_a_change_of_topology_add_up_to_it():
    """Scores of the scorer itself: what it counts a structure is what it counts a pair."""
    generator = np.random.default_rng(0)
    labels = np.kron(generator.integers(0, 4, (6, 6, 6)), np.ones((3, 3, 3), int))
    ids = load_structures("tissue3")
    field = generator.normal(0, 1.2, (3, *labels.shape)).astype(np.float32)
    structures, scores = score_pair(field, np.eye(4), labels, np.roll(labels, 1, 0), ids)
    key = {"cohort": "c", "method": "syn", "model": "none", "moving": "a", "fixed": "b"}
    record = {**key, "status": "ok", "reason": "", "seconds": 1.0, "peak_memory_mb": 1.0, **scores}
    table = topology_table(structures.assign(**key), pd.DataFrame([record]), ["syn"])
    for _, row in table.iterrows():
        parts = row["components_change"] + row["tunnels_change"] + row["cavities_change"]
        assert parts == row["topology_change"] == scores[f"topology_change_{row['labels']}"] > 0
        assert row["structures_scored"] == 3 and row["tc"] == scores[f"tc_{row['labels']}"]


def test_both_interpolations_stand_in_a_column_and_are_not_ranked_together(tmp_path):
    structures, pairs = run(["affine", "syn", "caml"])
    pairs.loc[pairs["method"] == "syn", "tc_nearest"] = 1.02  # the best of nearest
    pairs.loc[pairs["method"] == "caml", "tc_linear"] = 1.05  # the best of linear, though worse than that
    pairs.loc[pairs["method"] == "affine", ["tc_nearest", "tc_linear"]] = 1.0
    table = topology_table(structures, pairs, ["affine", "syn", "caml"])
    sheet = lay_out(table)
    assert sheet.headers[:5] == ["Cohort", "Labels", "Method", "n (pairs)", "TC, best 1"]
    assert not any("{" in header or "nearest" in header for header in sheet.headers)
    assert [row[1] for row in sheet.cells] == ["nearest"] * 3 + ["linear"] * 3
    assert [marks[4] for marks in sheet.marks] == ["", "best", "second", "", "second", "best"]
    assert sheet.breaks == {3}
    alone = lay_out(table[table["labels"] == "linear"])
    assert "Labels" not in alone.headers and "TC (linear), best 1" in alone.headers
    change = alone.headers.index("Topology change (linear), a pair, mean ± sd")
    assert {marks[change] for marks in alone.marks} == {""}  # who moves nothing changes nothing: no rank
    note = note_of(table)
    for words in ("26-connected", "6-connected", "without any fold", "does not fold", "Affine only is the starting"):
        assert words in note
    assert len(write_table(table, tmp_path / "topology")) == 4


def test_a_pair_that_failed_is_out_of_the_topology_and_told():
    structures, pairs = run(["syn", "caml"], lost=("syn/c1/b",))
    pairs.loc[(pairs["method"] == "caml") & (pairs["moving"] == "b"), "topology_change_nearest"] = 100.0
    table = topology_table(structures, pairs, ["syn", "caml", "elastix"]).set_index(["labels", "method"])
    assert table.loc["nearest"][["n", "failed"]].to_numpy().tolist() == [[1, 1], [2, 0], [0, 2]]
    assert table.loc[("nearest", "syn"), "topology_change"] == 6.0
    assert table.loc[("nearest", "caml"), "topology_change"] == 53.0
    assert "SyN 1 of 2 (not scored: crashed (1))" in note_of(table)
    assert "Elastix 0 of 2 (not scored: no record (2))" in note_of(table)


def test_scores_without_topology_or_with_a_pair_twice_are_refused():
    structures, pairs = run(["syn"])
    without = pairs.drop(columns=[name for name in pairs if name.startswith("topology_")])
    with pytest.raises(InputError, match="scores of topology"):
        topology_table(structures, without, ["syn"])
    with pytest.raises(InputError, match="tunnels_change"):
        topology_table(structures.drop(columns="tunnels_change"), pairs, ["syn"])
    with pytest.raises(InputError, match="twice"):
        topology_table(structures, pd.concat([pairs, pairs[:1]]), ["syn"])
    one = topology_table(structures, pairs.drop(columns=[n for n in pairs if n.endswith("_linear")]), ["syn"])
    assert one["labels"].tolist() == ["nearest"]


def test_scans_without_labels_have_a_topology_table_without_numbers(tmp_path):
    structures, pairs = run(["syn"])
    pairs = pairs.assign(**dict.fromkeys((n for n in pairs if n.startswith(("topology_", "tc_"))), np.nan))
    table = topology_table(structures[:0], pairs, ["syn"])
    assert table["topology_change"].isna().all() and table["n"].tolist() == [2, 2]
    write_table(table, tmp_path / "t")


# --- failures ---


def test_each_registration_that_failed_is_a_row_with_its_reason():
    pairs = pd.DataFrame(
        [pair("syn", "a"), pair("syn", "b", status="failed", reason="ended by signal 11\nTraceback")]
        + [pair("caml", s, model=m) for m, s in (("seed1", "a"), ("seed1", "b"), ("seed2", "a"))]
        + [pair("syn", "a", cohort="c2"), pair("caml", "a", cohort="c2", status="failed", reason="")]
    )
    table = failures_table(pairs, ["syn", "caml", "elastix"])
    assert [tuple(row) for row in table.itertuples(index=False)] == [
        ("c1", "syn", "none", "b", "atlas", "ended by signal 11 Traceback"),
        ("c1", "caml", "seed2", "b", "atlas", "no record"),
        ("c1", "elastix", "", "a", "atlas", "no record"),
        ("c1", "elastix", "", "b", "atlas", "no record"),
        ("c2", "caml", "none", "a", "atlas", "not told"),
        ("c2", "elastix", "", "a", "atlas", "no record"),
    ]
    assert "6 of 11 registrations of 3 methods failed" in note_of(table)
    assert "CAML+RBSC+CARSC (proposed) 1 of 2 (not scored: no record (1))" in note_of(table)
    with pytest.raises(InputError, match="twice"):
        failures_table(pd.concat([pairs, pairs[:1]]), [])


def test_no_failure_is_an_empty_table_that_says_so_in_every_format(tmp_path):
    table = failures_table(run(["syn", "caml", "elastix"], cohorts=("c1", "c2"))[1], ["syn", "caml", "elastix"])
    assert table.empty
    csv, md, tex, html = write_table(table, tmp_path / "failures", caption="Failures.")
    assert csv.read_text() == "cohort,method,model,moving,fixed,reason\n"
    for path in (md, tex, html):
        text = path.read_text()
        assert "All 12 registrations of 3 methods succeeded" in text
        assert "Moving scan" in text and "Reason" in text
    assert sum(line.startswith("|") for line in md.read_text().splitlines()) == 2
    check_tex(tex.read_text())


# --- unequal n ---


def test_a_method_that_has_no_record_at_all_keeps_its_row():
    structures, pairs = run(["affine", "syn"])
    row = comparison_table(structures, pairs, ["affine", "syn", "elastix"]).iloc[-1]
    assert (row["method"], row["n"], row["failed"]) == ("elastix", 0, 2) and math.isnan(row["dice"])


def test_dice_by_structure_says_which_methods_have_fewer_pairs_and_where():
    structures, _ = run(["syn", "elastix", "caml"], moving="abc", lost=("syn/c1/b",))
    alone = (structures["method"] == "caml") & (structures["moving"] == "c") & (structures["structure"] == 2)
    structures.loc[alone, "dice"] = np.nan
    table = structure_scores(structures, ["syn", "elastix", "caml", "transmorph"])
    assert table["n"].tolist() == [3, 3]
    note = note_of(table)
    assert "SyN 2 of 3 pairs (all structures)" in note
    assert "CAML+RBSC+CARSC (proposed) 2 of 3 pairs (thing 2)" in note
    assert "Elastix" not in note
    assert "Without any score: TransMorph." in note
    complete = note_of(structure_scores(run(["syn", "caml"])[0], ["syn", "caml"]))
    assert "Fewer" not in complete and "Without" not in complete


def test_dice_by_structure_judges_all_seeds_on_the_same_pairs():
    rows = [row for m, s in product(("seed1", "seed2"), "ab") for row in overlaps("caml", s, [0.5], model=m)]
    structures = pd.DataFrame(rows + overlaps("syn", "a", [0.6]) + overlaps("syn", "b", [0.6]))
    structures.loc[structures["moving"] == "b", "dice"] += 0.3
    lost = (structures["model"] == "seed2") & (structures["moving"] == "b")
    table = structure_scores(structures[~lost], ["syn", "caml"])
    assert table.loc[0, "caml"] == pytest.approx(0.5)  # pair b, which one seed lost, counts for neither
    assert "1 of 2 pairs" in note_of(table)


def test_the_cross_cohort_table_says_where_pairs_are_missing():
    methods = ["affine", "syn", "caml"]
    lost = ("syn/home/a", "caml/away/b")
    comparison = comparison_table(*run(methods, cohorts=("home", "away"), lost=lost), methods)
    table = cross_cohort_table(comparison, "home")
    assert table.set_index("method")["n"].to_dict() == {"affine": 2, "syn": 2, "caml": 1}
    told = "home (own cohort): SyN 1 of 2; away: CAML+RBSC+CARSC (proposed) 1 of 2."
    assert told in note_of(table)
    assert "Dice (nearest), mean ± sd ↑" in lay_out(table).headers
    complete = comparison_table(*run(methods, cohorts=("home", "away")), methods)
    assert "Pairs scored" not in note_of(cross_cohort_table(complete, "home"))


def test_a_loss_on_the_other_cohort_is_no_share_of_a_gain():
    columns = {"n": 4, "failed": 0, "dice_sd": 0.01, "labels": "nearest", "nonpositive_jacobian_forward": 0.0}
    rows = [("home", "affine", 0.6), ("home", "syn", 0.62), ("away", "affine", 0.5), ("away", "syn", 0.45)]
    table = cross_cohort_table(pd.DataFrame(rows, columns=["cohort", "method", "dice"]).assign(**columns), "home")
    assert math.isnan(table.set_index("method").loc["syn", "gain_kept"])


# --- the ablation beside the paper's prose ---

COMBINATIONS = {
    "caml" + ("-without-" + "-".join(n for n, on in zip(("caml", "rbsc", "carsc"), given, strict=True) if not on))
    * (not all(given)): dict(zip(("caml", "rbsc", "carsc"), given, strict=True))
    for given in product((False, True), repeat=3)
}  # fmt: skip
SUMMARY = {
    "parameters": 1, "seconds": 1.0, "peak_memory_mb": 9.0, "peak_memory_of": "the process", "device": "cpu",
    "threads": 1, "steps": 3, "seed": 1,
}  # fmt: skip


def ablation(lost: tuple[str, ...] = ()) -> pd.DataFrame:
    structures, pairs = run(list(COMBINATIONS), lost=lost)
    worth = {"caml": 0.01, "rbsc": 0.02, "carsc": 0.04}
    for method, parts in COMBINATIONS.items():
        dice = 0.6 + sum(worth[name] for name, on in parts.items() if on) + (0.08 if all(parts.values()) else 0)
        structures.loc[structures["method"] == method, "dice"] = dice
    return study_table(structures, pairs, COMBINATIONS, {name: [SUMMARY] for name in COMBINATIONS})


def test_the_ablation_has_gains_losses_and_the_effects_that_the_paper_tells(tmp_path):
    table = ablation()
    rows = {frozenset(name for name in ("CAML", "RBSC", "CARSC") if row[name]): row for row in table.to_dict("records")}
    both = rows[frozenset({"RBSC", "CARSC"})]
    assert both["dice_gain_over_none"] == pytest.approx(6.0)  # 0.66 - 0.60, in points
    assert both["dice_loss_without"] == pytest.approx(14.0)  # complete 0.75, with CAML alone 0.61
    published = {"+".join(sorted(parts)): row["published_dice_gain"] for parts, row in rows.items()}
    assert {parts: value for parts, value in published.items() if not math.isnan(value)} == {
        "RBSC": 0.6, "CAML": 0.5, "CARSC+RBSC": 1.7, "CAML+CARSC": 1.3, "CAML+RBSC": 1.0,
    }  # fmt: skip
    assert all(math.isnan(rows[frozenset()][name]) for name in ("dice_gain_over_none", "dice_loss_without"))
    sheet = lay_out(table)
    column = sheet.headers.index("Published effect (IDA-230692), % of Dice")
    assert {marks[column] for marks in sheet.marks} == {""}
    assert "CARSC 1.6 %, RBSC+CARSC 4 %, CAML+CARSC 3 %" in note_of(table)
    check_tex(write_table(table, tmp_path / "ablation")[2].read_text())


def test_an_ablation_tells_its_failures_and_one_of_other_parts_has_no_published_effect():
    table = ablation(lost=("caml-without-rbsc/c1/b",))
    assert "Proposed without RBSC 1 of 2 (not scored: crashed (1))" in note_of(table)
    assert table.set_index("method").loc["caml-without-rbsc", "n"] == 1
    structures, pairs = run(["caml", "caml-without-x"])
    rows = {"caml-without-x": {"x": False}, "caml": {"x": True}}
    other = study_table(structures, pairs, rows, {name: [SUMMARY] for name in rows})
    assert other["published_dice_gain"].isna().all() and "Published" not in note_of(other)
    assert not any("Published" in header for header in lay_out(other).headers)
    values = {"caml": {"network": "caml", "regularisation": 1.0}}
    assert "dice_gain_over_none" not in study_table(structures, pairs[:2], values, {"caml": [SUMMARY]})


# --- published figures ---


def test_every_published_figure_names_its_source_and_is_a_possible_number():
    table = published_scores()
    for column in ("protocol", "dataset", "method", "score", "printed", "citation", "obtained", "scored_on"):
        assert (table[column] != "").all(), column
    assert not table.duplicated(["protocol", "method", "score"]).any()
    dice = table[table["score"] == "dice"]
    assert dice["value"].between(0.2, 0.9).all()
    assert set(table["ours"]) - {""} <= set(METHOD_NAMES)
    assert set(table["labels"]) <= {"", "nearest", "linear"}
    assert (published_effects()["citation"].str.contains("10.3233/IDA-230692")).all()


@pytest.mark.parametrize(
    ("source", "method", "protocol", "score", "value"),
    [
        ("lpba40", "voxelmorph", "lpba40_voxelmorph_torch", "dice", 0.6855),
        ("lpba40", "syn", "lpba40_voxelmorph_torch", "dice", 0.6939),
        ("ixi", "transmatch", "ixi_transmatch", "dice", 0.7599),
        ("ixi", "voxelmorph", "ixi_transmorph", "nonpositive_jacobian", 1.522),  # the second of their two sizes
        ("learn2reg_oasis", "voxelmorph", "oasis_revisited", "dice", 0.7647),
        ("neurite_oasis", "transmorph", "oasis_revisited", "nondiffeomorphic_volume", 0.83),
        ("oasis1", "affine", "oasis_revisited", "dice", 0.5759),
    ],
)
def test_published_figures_that_are_known(source, method, protocol, score, value):
    table = published_for(source)
    found = table[(table["ours"] == method) & (table["protocol"] == protocol) & (table["score"] == score)]
    assert found["value"].tolist() == [value]


def test_percent_become_shares_and_bounds_stay_bounds():
    table = published_scores().set_index(["protocol", "method", "score"])
    assert table.loc[("brain_dysnet", "XMorpher", "dice"), "value"] == pytest.approx(0.712)
    bound = table.loc[("ixi_transmorph", "SyN", "nonpositive_jacobian")]
    assert (bound["printed"], bound["value"]) == ("<0.0001", 0.0001)


def test_only_the_data_sets_themselves_have_published_figures():
    sources = {source_of(model) for model in COHORT_MODELS}
    assert set(DATASETS) <= sources
    for source in sources - set(DATASETS):  # a folder of FreeSurfer's, a table: any scans
        assert published_for(source).empty
    assert set(published_for("lpba40")["dataset"]) == {"LPBA40"}


def test_the_closest_protocol_is_the_one_of_the_same_interpolation():
    figures = published_for("ixi")
    transmorph = figures[(figures["ours"] == "transmorph") & (figures["score"] == "dice")]
    assert closest_protocol(transmorph, "linear")["value"] == 0.753
    assert closest_protocol(transmorph, "nearest")["value"] == 0.7443  # not known comes before known to be another
    labelled = transmorph.assign(supervision=["images only", "label maps"])
    assert closest_protocol(labelled, "linear")["value"] == 0.7443
    validated = transmorph.assign(scored_on=["validation", "test"])
    assert closest_protocol(validated, "nearest")["value"] == 0.753


def test_published_dice_stands_beside_ours_unranked_and_with_its_source(tmp_path):
    methods = ["affine", "syn", "transmorph", "caml"]
    structures, pairs = run(methods, cohorts=("mine", "brains"))
    plain = comparison_table(structures, pairs, methods)
    table = comparison_table(structures, pairs, methods, sources={"mine": "table", "brains": "ixi"})
    pd.testing.assert_frame_equal(table[plain.columns], plain)  # our numbers are as without
    brains = table[table["cohort"] == "brains"].set_index("method")
    assert brains["published_dice"].dropna().to_dict() == {"affine": 0.386, "syn": 0.6365, "transmorph": 0.7443}
    assert brains["published_source"].tolist() == ["[1]", "[2]", "[2]", ""]
    assert table.loc[table["cohort"] == "mine", "published_dice"].isna().all()
    sheet = lay_out(table)
    column = sheet.headers.index("Dice, published")
    assert {marks[column] for marks in sheet.marks} == {""}
    assert sheet.cells[5][column] == "0.6365"  # with the digits that were published
    note = note_of(table)
    assert "[1] Chen et al. 2022, TransMorph" in note and "[2] Chen, Zheng and Gee 2024, TransMatch" in note
    assert "30 structures; 115 test scans" in note
    assert "Here: brains (ixi) 2 structures, 2 pairs, labels warped by nearest interpolation." in note
    assert "not ranked" in note
    check_tex(write_table(table, tmp_path / "comparison")[2].read_text())


def test_a_run_without_published_figures_shows_no_such_column():
    structures, pairs = run(["syn"])
    table = comparison_table(structures, pairs, ["syn"], sources={"c1": "simulated"})
    assert not {"Dice, published", "Source"} & set(lay_out(table).headers)
    assert "ublished" not in note_of(table)


def test_the_table_of_published_figures_lists_the_data_sets_of_a_run(tmp_path):
    assert set(published_table(["lpba40", "donors"])["dataset"]) == {"LPBA40"}
    none = published_table(["simulated"])
    assert none.empty and "None of the cohorts" in note_of(none)
    for number, table in enumerate((none, published_table())):
        check_tex(write_table(table, tmp_path / f"published_{number}")[2].read_text())
    everything = published_table()
    keys = list(dict.fromkeys(everything["published_source"]))
    assert keys == [f"[{k + 1}]" for k in range(len(keys))]
    assert all(f"\n\n{key} " in note_of(everything) for key in keys)
    row = everything[(everything["method"] == "SyN") & (everything["published_source"] == "[6]")].iloc[0]
    assert (row["published_dice"], row["published_nonpositive_jacobian"]) == ("0.645", "<0.0001")


def test_the_page_of_published_figures_is_the_data():
    table = published_table()
    page = (ROOT / "docs" / "published.md").read_text(encoding="utf-8")
    assert page.endswith(to_markdown(lay_out(table), note=note_of(table)))
    effects = published_effects().set_index(["parts", "score"])["value"]
    assert (
        f"| RBSC + CARSC | {effects['rbsc+carsc', 'dice']} | up to {effects['rbsc+carsc', 'nonpositive_jacobian']} |"
        in page
    )


# --- what a reader sees ---


def test_a_time_that_is_a_clock_s_noise_shows_as_a_bound():
    structures, pairs = run(["affine", "syn"])
    pairs.loc[pairs["method"] == "affine", "seconds"] = 9.83e-5
    table = comparison_table(structures, pairs, ["affine", "syn"])
    sheet = lay_out(table)
    assert sheet.cells[0][sheet.headers.index("Time (median), s a pair ↓")] == "<0.001"
    assert table.loc[0, "seconds"] == pytest.approx(9.83e-5)  # the number itself stays in the csv
    assert "Affine only is found in the preprocessing" in note_of(table)
    assert "Measured on: every method: cpu, 1 thread." in note_of(table)
    assert rounded(2.5e-6, None) == "2.50e-06" and rounded(2.5e-6, None, 0.001) == "<0.001"
    assert rounded(0.0, None, 0.001) == "0.00" and rounded(-1.0, None, 0.001) == "-1.00"


def check_tex(text: str) -> None:
    """Hold a table to what LaTeX reads: braces balanced, cells of a row as many as columns, nothing of its own left."""
    lines = [line for line in text.splitlines() if not line.startswith("% ")]
    body = "\n".join(lines).replace("{!}{%\n", "{!}{\n")
    known = {
        "begin", "end", "centering", "caption", "label", "resizebox", "ifdim", "width", "linewidth", "else", "fi",
        "toprule", "midrule", "bottomrule", "par", "smallskip", "footnotesize", "textbf", "underline", "shortstack",
        "textbackslash", "textasciitilde", "textasciicircum", "textbar", "textless", "textgreater", "pm", "leq",
        "uparrow", "downarrow", "rightarrow", "times", "lambda", "ldots", "checkmark", "textsuperscript", "dag",
    }  # fmt: skip
    escaped = re.sub(r"\\[\\&%$#_{}]", "", body)
    assert set(re.findall(r"\\([a-zA-Z]+)", escaped)) <= known
    depth = 0
    for character in escaped:
        depth += (character == "{") - (character == "}")
        assert depth >= 0
    assert depth == 0
    bare = re.sub(r"\\label\{[^}]*\}", "", escaped)
    assert not set("%#_~^") & set(bare) and bare.count("$") % 2 == 0
    assert bare.isascii()
    columns = re.search(r"\\begin\{tabular\}\{([lr]+)\}", body)[1]
    table = body[body.index(r"\toprule") : body.index(r"\bottomrule")]
    rows = [line for line in table.splitlines() if line.endswith(r" \\")]
    assert rows
    assert all(len(re.findall(r"(?<!\\)&", row)) == len(columns) - 1 for row in rows)


@cache
def _tables(cohort: str, name: str) -> dict[str, pd.DataFrame]:
    """Return every table of a run whose cohort, method, structure, scan and reasons have such a name."""
    methods = ["affine", "syn", name]
    structures, pairs = run(methods, cohorts=(cohort, "other"), lost=(f"{name}/{cohort}/a",))
    structures["name"] = structures["name"].str.replace("thing", name)
    pairs.loc[pairs["status"] == "failed", "reason"] = name
    comparison = comparison_table(structures, pairs, methods, sources={cohort: "ixi", "other": "lpba40"})
    sets = pd.DataFrame({"id": [1, 2], "name": [f"left {name}", f"right {name}"], "hemisphere": ["left", "right"]})
    return {
        "comparison": comparison,
        "topology": topology_table(structures, pairs, methods),
        "failures": failures_table(pairs, methods),
        "by_structure": structure_scores(structures, methods),
        "cross_cohort": cross_cohort_table(comparison, "other"),
        "structures": structure_table(sets),
        "lambda": study_table(
            structures, pairs, {m: {"network": m, "regularisation": 1.0} for m in methods},
            {m: [SUMMARY] for m in methods},
        ),
    }  # fmt: skip


@pytest.mark.parametrize(
    "table", ["comparison", "topology", "failures", "by_structure", "cross_cohort", "structures", "lambda"]
)
@pytest.mark.parametrize("name", ["c1", HOSTILE], ids=["plain", "hostile"])
def test_latex_reads_every_table_whatever_names_it_has(table, name, tmp_path):
    made = _tables(name, name)[table]
    text = write_table(made, tmp_path / table, caption=f"Of {name}.")[2].read_text()
    check_tex(text)
    assert r"\input" not in text
    if name == HOSTILE:
        assert r"a\_b \& c\% \textbackslash{}input\{/etc/passwd\} \{" in text


@pytest.mark.parametrize("table", TABLES)
def test_every_column_of_a_table_has_a_header_for_readers(table):
    made = _tables("c1", "caml")[table]
    own = {"affine", "syn", "caml"} if table == "by_structure" else set()
    assert {str(name).removesuffix("_sd") for name in made.columns} - own - {"dice_seed"} <= set(COLUMNS)
