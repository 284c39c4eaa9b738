"""Tests, intervals and ranks: known numbers come out, and more pairs of a subject are no more subjects."""

from __future__ import annotations

import math

import numpy as np
import pandas as pd
import pytest
from matplotlib.text import Text
from scipy import stats

from dmir.config import parse_config
from dmir.config.base import ConfigError
from dmir.errors import InputError
from dmir.report.critical_difference import compare_ranks, critical_difference_figure, nemenyi_difference
from dmir.report.statistics import bootstrap_interval, holm, signed_rank, statistics_table, subject_scores
from dmir.report.style import save_figure
from dmir.report.tables import comparison_table, mark_differences
from dmir.report.writing import write_table

# Demsar 2006, table 5(a): q of the two-tailed Nemenyi test at 0.05 for 2 to 10 methods, rounded there
DEMSAR = [1.960, 2.343, 2.569, 2.728, 2.850, 2.949, 3.031, 3.102, 3.164]
FIELD_SCORES = (
    "nonpositive_jacobian_forward nonpositive_jacobian_central nondiffeomorphic_volume sdlogj tc_nearest tc_linear "
    "tc_deviation_nearest tc_deviation_linear endpoint_error seconds peak_memory_mb"
)


def tables(dice: dict[tuple[str, str], float | None], fixed: str = "atlas", folding: float = 0.0) -> tuple:
    """Return structures and pairs of one structure from (method or method/model, moving) -> Dice; None is a failure."""
    structures, pairs = [], []
    for (name, moving), value in dice.items():
        method, _, model = name.partition("/")
        key = {"cohort": "c1", "method": method, "model": model or "none", "moving": moving, "fixed": fixed}
        outcome = {"status": "failed", "reason": "crash"} if value is None else {"status": "ok", "reason": ""}
        numbers = dict.fromkeys(FIELD_SCORES.split(), math.nan if value is None else folding)
        pairs.append({**key, **outcome, **numbers})
        if value is not None:
            structures.append(
                {**key, "structure": 1, "name": "x", "labels": "nearest", "dice": value, "hd95": 5 - 4 * value}
            )
    return pd.DataFrame(structures), pd.DataFrame(pairs)


def scans_of(subjects: dict[str, str], atlases: tuple[str, ...] = ("atlas",)) -> pd.DataFrame:
    rows = [(scan, subject, "test") for scan, subject in subjects.items()] + [(a, a, "atlas") for a in atlases]
    return pd.DataFrame(rows, columns=["scan", "subject", "split"])


def cohort(subjects: int, shifts: dict[str, float], seed: int = 0) -> tuple:
    """Return structures, pairs and scans: Dice of a subject is its own level, a method's shift and a little noise."""
    generator = np.random.default_rng(seed)
    levels = generator.normal(0.7, 0.05, subjects)
    dice = {
        (method, f"s{i}"): levels[i] + shift + generator.normal(0, 0.004)
        for method, shift in shifts.items()
        for i in range(subjects)
    }
    return *tables(dice), scans_of({f"s{i}": f"s{i}" for i in range(subjects)})


def row(table: pd.DataFrame, method: str, score: str = "dice") -> dict:
    return table[(table["method"] == method) & (table["score"] == score)].iloc[0].to_dict()


def test_the_signed_rank_test_is_scipys_and_its_effect_is_kerbys():
    generator = np.random.default_rng(1)
    for n in (4, 9, 30, 80):
        differences = generator.normal(0.2, 1, n)
        test = signed_rank(differences)
        known = stats.wilcoxon(differences, alternative="two-sided", method="exact" if n <= 50 else "asymptotic")
        assert test.p == pytest.approx(known.pvalue)
        positive = stats.rankdata(np.abs(differences))[differences > 0].sum()
        assert test.rank_biserial == pytest.approx(2 * positive / (n * (n + 1) / 2) - 1)
    # by hand: ranks 1 2 3 4 5, W- = 5; {} 1 2 3 4 5 12 13 14 23 sum to 5 or less: 10 of 32 sign patterns, either side
    test = signed_rank(np.array([1.0, 2.0, 3.0, 4.0, -5.0]))
    assert (test.p, test.smallest_p) == (20 / 32, 2 / 32)
    assert test.rank_biserial == pytest.approx((10 - 5) / 15)


def test_ties_and_zeros_have_the_exact_p():
    # ranks of sizes 1 1 2: 1.5 1.5 3; W- = 1.5 or less in 3 of 8 sign patterns (none, the one, the other)
    test = signed_rank(np.array([1.0, -1.0, 2.0, 0.0, 0.0]))
    assert test.p == pytest.approx(2 * 3 / 8)
    assert test.smallest_p == 2 / 8  # the two zeros are dropped
    assert test.rank_biserial == pytest.approx((4.5 - 1.5) / 6)
    # what differs in the last digits of a float only is equal
    assert signed_rank(np.array([0.1 + 0.2 - 0.3, -1.0, 2.0])) == signed_rank(np.array([0.0, -1.0, 2.0]))


@pytest.mark.parametrize("n", [1, 2, 12, 60])
def test_equal_methods_have_p_1_and_no_effect(n):
    test = signed_rank(np.zeros(n))
    assert (test.p, test.smallest_p, test.rank_biserial) == (1, 1, 0)
    assert all(math.isnan(value) for value in vars(signed_rank(np.empty(0))).values())


@pytest.mark.parametrize(("n", "smallest"), [(4, 0.125), (5, 0.0625), (6, 0.03125)])
def test_the_smallest_p_is_what_agreeing_subjects_give(n, smallest):
    test = signed_rank(np.arange(1.0, n + 1))
    assert test.p == test.smallest_p == smallest
    assert test.rank_biserial == 1


def test_holm_by_hand():
    # 0.005 * 4, 0.01 * 3, 0.03 * 2, then 0.04 * 1 < 0.06
    np.testing.assert_allclose(holm(np.array([0.01, 0.04, 0.03, 0.005])), [0.03, 0.06, 0.06, 0.02])
    np.testing.assert_allclose(holm(np.array([0.9, 0.8])), [1, 1])
    np.testing.assert_allclose(holm(np.array([0.02, np.nan, 0.02])), [0.04, np.nan, 0.04])  # no test, no part of it


def test_intervals_are_scipys_and_always_the_same():
    values = np.random.default_rng(2).gamma(2.0, size=40)
    low, high = bootstrap_interval(values)
    known = stats.bootstrap((values,), np.mean, method="BCa", n_resamples=10_000, random_state=3).confidence_interval
    assert (low, high) == pytest.approx(tuple(known), abs=0.03)
    assert low < values.mean() < high
    assert high - values.mean() > values.mean() - low  # skewed to the right, as the values are
    assert bootstrap_interval(values) == (low, high)
    np.testing.assert_allclose(bootstrap_interval(-values), (-high, -low), atol=0.03)


def test_intervals_of_too_few_or_equal_values():
    assert all(math.isnan(end) for end in bootstrap_interval(np.array([0.5, 0.6])))
    assert bootstrap_interval(np.full(5, 0.25)) == (0.25, 0.25)
    low, high = bootstrap_interval(np.array([0.5, 0.6, 0.7]))
    assert 0.5 <= low < 0.6 < high <= 0.7


def test_intervals_cover_what_they_promise():
    generator = np.random.default_rng(4)
    ends = [bootstrap_interval(generator.normal(1.0, 1.0, 30), 1000) for _ in range(400)]
    assert 0.90 < np.mean([low < 1.0 < high for low, high in ends]) < 0.97


def test_the_table_holds_paired_differences_by_hand():
    dice = {("caml", "a"): 0.8, ("caml", "b"): 0.7, ("caml", "c"): 0.9}
    dice |= {("syn", "a"): 0.7, ("syn", "b"): 0.8, ("syn", "c"): 0.6}
    structures, pairs = tables(dice)
    table = statistics_table(structures, pairs, scans_of(dict(zip("abc", "abc", strict=True))), ["syn", "caml"], "caml")
    syn = row(table, "syn")
    assert (syn["subjects"], syn["subjects_both"]) == (3, 3)
    assert syn["mean"] == pytest.approx(0.7)
    assert syn["difference"] == pytest.approx((-0.1 + 0.1 - 0.3) / 3)
    assert syn["rank_biserial"] == pytest.approx((1.5 - 4.5) / 6)
    assert row(table, "syn", "hd95")["difference"] == pytest.approx(0.4)  # mm
    assert row(table, "syn", "nonpositive_jacobian_forward")["p"] == 1
    caml = row(table, "caml")
    assert caml["mean"] == pytest.approx(0.8)
    assert math.isnan(caml["p"]) and math.isnan(caml["difference"]) and pd.isna(caml["subjects_both"])


def test_more_pairs_of_a_subject_are_no_more_subjects():
    shifts = {"caml": 0.0, "syn": 0.01, "elastix": -0.02}
    structures, pairs, scans = cohort(7, shifts)
    once = statistics_table(structures, pairs, scans, list(shifts), "caml")
    again = [
        pd.concat([table, table.assign(fixed="atlas2"), table.assign(moving=table["moving"] + "-rescan")])
        for table in (structures, pairs)
    ]
    rescans = scans[scans["split"] == "test"].assign(scan=lambda table: table["scan"] + "-rescan")
    more = pd.concat([scans, rescans, scans_of({}, ("atlas2",))])
    twice = statistics_table(*again, more, list(shifts), "caml")
    pd.testing.assert_frame_equal(once, twice)
    # a second model of a network with the same scores is no subject either
    copies = [
        pd.concat([table, table[table["method"] == "caml"].assign(model="seed2")]) for table in (structures, pairs)
    ]
    seeds = statistics_table(*copies, scans, list(shifts), "caml")
    pd.testing.assert_frame_equal(once.drop(columns="mean_seed_sd"), seeds.drop(columns="mean_seed_sd"))


def test_seeds_have_a_spread_of_their_own():
    dice = {("caml/seed1", "a"): 0.6, ("caml/seed1", "b"): 0.8, ("caml/seed2", "a"): 0.7, ("caml/seed2", "b"): 0.9}
    structures, pairs = tables({**dice, ("syn", "a"): 0.5, ("syn", "b"): 0.6})
    table = statistics_table(structures, pairs, scans_of({"a": "a", "b": "b"}), ["syn", "caml"], "caml")
    assert row(table, "caml")["mean_seed_sd"] == pytest.approx(np.std([0.7, 0.8], ddof=1))
    assert math.isnan(row(table, "syn")["mean_seed_sd"])
    assert row(table, "syn")["difference"] == pytest.approx(0.55 - 0.75)


def test_only_what_both_methods_registered_is_compared():
    structures, pairs, scans = cohort(8, {"caml": 0.0, "syn": 0.01, "elastix": 0.0})
    lost = (pairs["method"] == "syn") & (pairs["moving"] == "s0")
    pairs = pairs.assign(status=pairs["status"].mask(lost, "failed"), reason=pairs["reason"].mask(lost, "crash"))
    table = statistics_table(structures, pairs, scans, ["caml", "syn", "elastix"], "caml")
    assert [row(table, m)["subjects"] for m in ("caml", "syn", "elastix")] == [8, 7, 8]
    assert [row(table, m)["subjects_both"] for m in ("syn", "elastix")] == [7, 8]
    wide = structures.pivot(index="moving", columns="method", values="dice").drop(index="s0")
    assert row(table, "syn")["difference"] == pytest.approx((wide["syn"] - wide["caml"]).mean())
    assert row(table, "syn")["p"] == pytest.approx(stats.wilcoxon(wide["syn"], wide["caml"]).pvalue)


def test_a_structure_that_one_method_lost_is_compared_for_neither():
    structures, pairs = tables({("caml", "a"): 0.9, ("syn", "a"): 0.8})
    small = structures.assign(structure=2, dice=[0.1, np.nan])  # syn's warp made it vanish
    scores = subject_scores(pd.concat([structures, small]), pairs, scans_of({"a": "a"}), "dice")
    assert scores.means(["caml"]).loc["a", "caml"] == pytest.approx(0.5)
    assert scores.means(["caml", "syn"]).loc["a"].to_dict() == {"caml": 0.9, "syn": 0.8}


def test_the_subject_of_a_pair_is_the_one_that_is_no_atlas():
    structures, pairs = tables({("syn", "atlas"): 0.5}, fixed="a")
    scores = subject_scores(structures, pairs, scans_of({"a": "person"}), "dice")
    assert list(scores.means(["syn"]).index) == ["person"] and not scores.shared
    structures, pairs = tables({("syn", "b"): 0.5, ("caml", "b"): 0.6}, fixed="a")
    scans = scans_of({"a": "one", "b": "two"})
    assert list(subject_scores(structures, pairs, scans, "dice").means(["syn"]).index) == ["two"]
    assert "not independent" in statistics_table(structures, pairs, scans, [], "caml").attrs["note"]


def test_what_cannot_be_tested_is_refused():
    structures, pairs, scans = cohort(3, {"caml": 0.0, "syn": 0.1})
    with pytest.raises(InputError, match="no row for s2"):
        statistics_table(structures, pairs, scans[scans["scan"] != "s2"], [], "caml")
    with pytest.raises(InputError, match=r"'voxelmorph'.*caml, syn"):
        statistics_table(structures, pairs, scans, [], "voxelmorph")
    two = pairs.assign(cohort=["c1"] * 3 + ["c2"] * 3)
    with pytest.raises(InputError, match="several in one table"):
        statistics_table(structures, two, scans, [], "caml")


@pytest.mark.parametrize("subjects", [1, 2, 4, 5])
def test_too_few_subjects_are_told_and_never_marked(subjects, tmp_path):
    structures, pairs, scans = cohort(subjects, {"caml": 0.0, "syn": 0.1, "elastix": -0.1})
    table = statistics_table(structures, pairs, scans, ["syn", "elastix", "caml"], "caml")
    smallest = 2.0 ** (1 - subjects)
    words = f"n = {subjects} (subjects that differ) is too small: the smallest p possible is {smallest:.3g}, "
    assert words + f"{min(1, 2 * smallest):.3g} after Holm's correction over 2 tests" in table.attrs["note"]
    assert table.attrs["daggers"] == {"p_holm": []}
    assert table["mean_low"].notna().any() == (subjects >= 3)
    marked = mark_differences(comparison_table(structures, pairs, ["syn", "elastix", "caml"]), table, "caml")
    assert f"c1: n = {subjects} subjects are too few" in marked.attrs["note"]
    for written in (table, marked):
        text = write_table(written, tmp_path / "table")[1].read_text()
        assert not [line for line in text.splitlines() if line.startswith("|") and "†" in line]


def test_what_differs_is_marked_in_both_tables(tmp_path):
    structures, pairs, scans = cohort(12, {"affine": -0.2, "syn": 0.1, "elastix": 0.0, "caml": 0.0})
    methods = ["affine", "syn", "elastix", "caml"]
    table = statistics_table(structures, pairs, scans, methods, "caml")
    assert row(table, "syn")["p_holm"] < 0.05 < row(table, "elastix")["p_holm"]
    assert row(table, "affine")["p_holm"] < 0.05
    csv, markdown, tex, html = write_table(table, tmp_path / "statistics_c1", caption="Differences.")
    lines = {
        line.split("|")[3].strip(): line for line in markdown.read_text().splitlines() if "| Dice (nearest)" in line
    }
    assert lines["SyN"].rstrip(" |").endswith("†") and "†" not in lines["Elastix"]
    assert r"\textsuperscript{\dag}" in tex.read_text() and tex.read_text().count(r"\midrule") == 3  # 3 scores
    assert "smallest_p_holm" in csv.read_text() and "Smallest" not in html.read_text()
    stored = pd.read_csv(csv)
    comparison = comparison_table(structures, pairs, methods)
    marked = mark_differences(comparison, stored, "caml")
    assert marked.attrs["daggers"] == {"dice": [0, 1], "hd95": [0, 1]}
    pd.testing.assert_frame_equal(marked, comparison)
    csv, markdown, tex, html = write_table(marked, tmp_path / "comparison")
    assert csv.read_text() == write_table(comparison, tmp_path / "plain")[0].read_text()
    rows = [line for line in markdown.read_text().splitlines() if line.startswith("| c1")]
    assert [line.count("†") for line in rows] == [2, 2, 0, 0]
    assert "† differs from CAML+RBSC+CARSC (proposed)" in html.read_text()


def test_a_cohort_in_which_nothing_differs_says_so():
    structures, pairs, scans = cohort(12, {"caml": 0.0, "syn": 0.0})
    table = statistics_table(structures, pairs, scans, [], "caml")
    note = mark_differences(comparison_table(structures, pairs, []), table, "caml").attrs["note"]
    assert "c1: no method differs significantly" in note and "†" not in note and "too small" not in table.attrs["note"]


def test_a_reference_that_failed_everywhere_leaves_no_test(tmp_path):
    structures, pairs = tables({("caml", "a"): None, ("syn", "a"): 0.5})
    table = statistics_table(structures, pairs, scans_of({"a": "a"}), ["syn", "caml"], "caml")
    assert row(table, "caml")["subjects"] == 0 and math.isnan(row(table, "caml")["mean"])
    assert table["p"].isna().all() and "No test" in table.attrs["note"]
    assert "| SyN" in write_table(table, tmp_path / "statistics_c1")[1].read_text()


@pytest.mark.parametrize(("methods", "q"), list(enumerate(DEMSAR, start=2)))
def test_nemenyis_quantiles_are_demsars(methods, q):
    # CD = q sqrt(k (k + 1) / (6 n)); his table is rounded, and two of its entries by one digit off
    assert nemenyi_difference(methods, 10) / math.sqrt(methods * (methods + 1) / 60) == pytest.approx(q, abs=1.1e-3)


def test_ranks_of_demsars_example():
    # Demsar 2006, table 6: AUC of C4.5 and three variants on 14 data sets
    auc = pd.DataFrame(
        [
            (0.763, 0.768, 0.771, 0.798), (0.599, 0.591, 0.590, 0.569), (0.954, 0.971, 0.968, 0.967),
            (0.628, 0.661, 0.654, 0.657), (0.882, 0.888, 0.886, 0.898), (0.936, 0.931, 0.916, 0.931),
            (0.661, 0.668, 0.609, 0.685), (0.583, 0.583, 0.563, 0.625), (0.775, 0.838, 0.866, 0.875),
            (1.000, 1.000, 1.000, 1.000), (0.940, 0.962, 0.965, 0.962), (0.619, 0.666, 0.614, 0.669),
            (0.972, 0.981, 0.9751, 0.975), (0.957, 0.978, 0.946, 0.970),
        ],
        columns=["C4.5", "C4.5+m", "C4.5+cf", "C4.5+m+cf"],
    )  # fmt: skip
    comparison = compare_ranks(auc)
    assert {m: round(r, 3) for m, r in comparison.ranks.items()} == {
        "C4.5+m+cf": 1.964, "C4.5+m": 2.0, "C4.5+cf": 2.893, "C4.5": 3.143,
    }  # fmt: skip
    assert comparison.critical_difference == pytest.approx(1.25, abs=0.005)
    assert comparison.chi_square == pytest.approx(stats.friedmanchisquare(*auc.to_numpy().T).statistic)
    assert comparison.p < 0.05 and comparison.groups == [(0, 3)]  # 3.143 - 1.964 < 1.25


def test_groups_are_the_largest_runs_within_the_critical_difference():
    generator = np.random.default_rng(5)
    values = pd.DataFrame({m: 0.7 - 0.05 * k + generator.normal(0, 0.04, 30) for k, m in enumerate("abcdef")})
    comparison = compare_ranks(values)
    ranks = list(comparison.ranks.values())
    assert ranks == sorted(ranks) and sum(ranks) == pytest.approx(6 * 7 / 2)
    for i in range(6):
        for j in range(i + 1, 6):
            joined = any(first <= i and j <= last for first, last in comparison.groups)
            assert joined == (ranks[j] - ranks[i] < comparison.critical_difference)
    assert not any(a != b and a[0] <= b[0] and b[1] <= a[1] for a in comparison.groups for b in comparison.groups)


def test_equal_methods_share_a_rank_and_a_group():
    values = pd.DataFrame(np.full((4, 3), 0.5), columns=list("abc"))
    comparison = compare_ranks(values)
    assert comparison.ranks == {"a": 2.0, "b": 2.0, "c": 2.0}
    assert (comparison.p, comparison.groups) == (1.0, [(0, 2)])


def texts(figure) -> list[str]:
    return [text.get_text() for text in figure.findobj(Text) if text.get_text()]


def test_the_figure_names_methods_subjects_and_tests(tmp_path):
    shifts = {"affine": -0.3, "syn": 0.02, "elastix": 0.0, "caml": 0.01, "caml-refined": 0.05}
    structures, pairs, scans = cohort(9, shifts)
    lost = (pairs["method"] == "syn") & (pairs["moving"] == "s0")
    pairs = pairs.assign(status=pairs["status"].mask(lost, "failed"))
    figure = critical_difference_figure(structures, pairs, scans, list(shifts))
    shown = texts(figure)
    assert "c1, Dice (nearest), n = 8 subjects" in shown  # one is not complete
    assert {"SyN", "Elastix", "Proposed", "Proposed +\nrefinement"} <= set(shown)
    assert "Affine only" not in shown
    assert f"CD = {nemenyi_difference(4, 8):.2f}" in shown
    assert any(text.startswith("Friedman χ²(3) = ") for text in shown)
    renderer = figure.canvas.get_renderer()
    for text in figure.findobj(Text):
        if text.get_text():
            extent = text.get_window_extent(renderer)
            assert extent.x0 >= 0 and extent.y0 >= 0 and extent.x1 <= figure.bbox.x1 and extent.y1 <= figure.bbox.y1
    assert figure.get_figwidth() == 3.5  # a column
    assert [path.suffix for path in save_figure(figure, tmp_path / "cd")] == [".png", ".svg", ".pdf"]


@pytest.mark.parametrize(("subjects", "methods"), [(1, 4), (5, 2)])
def test_no_ranking_says_why(subjects, methods, tmp_path):
    shifts = {"affine": -0.3, **{f"m{k}": 0.1 * k for k in range(methods)}}
    figure = critical_difference_figure(*cohort(subjects, shifts), list(shifts))
    assert len(texts(figure)) == 1
    assert "c1: no ranking" in texts(figure)[0] and f"there are {methods} and {subjects}" in texts(figure)[0]
    assert len(save_figure(figure, tmp_path / "cd")) == 3


@pytest.mark.parametrize(
    ("methods", "given", "expected"),
    [
        (["affine", "caml", "voxelmorph"], None, "caml"),
        (["affine", "voxelmorph", "transmorph", "syn"], None, "transmorph"),
        (["affine", "syn"], None, "syn"),
        (["affine", "caml", "syn"], "syn", "syn"),
    ],
)
def test_the_reference_is_the_proposed_method_unless_another_is_named(methods, given, expected):
    configuration = {"train_on": "a", "test_on": ["a"], "methods": methods, "cohorts": {"a": {"source": "simulated"}}}
    assert parse_config({**configuration, "report": {"reference": given}}, "test").reference() == expected
    with pytest.raises(ConfigError, match=r"report\.reference: 'vit_v_net' is no method"):
        parse_config({**configuration, "report": {"reference": "vit_v_net"}}, "test")
