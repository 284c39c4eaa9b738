"""The ablation and the lambda study: which networks they train, and what their tables and figures say."""

from __future__ import annotations

import itertools
from pathlib import Path

import numpy as np
import pandas as pd
import pytest
import yaml

from dmir.cli import main
from dmir.config import ConfigError, parse_config, read_config
from dmir.errors import InputError
from dmir.methods import register
from dmir.report.names import method_name
from dmir.report.studies import ablation_figure, lambda_figure, study_table
from dmir.report.writing import write_table
from dmir.training import Scan, read_metadata, train
from dmir.volumes import Volume, write_volume

ROOT = Path(__file__).parents[1]
SWITCHES = ("caml", "rbsc", "carsc")
MINIMAL = {
    "train_on": "simulated",
    "test_on": ["simulated"],
    "methods": ["caml"],
    "cohorts": {"simulated": {"source": "simulated"}},
}


def configuration(**changes: object):
    return parse_config({**MINIMAL, **changes}, "test")


def scores(dice: dict[str, list[float]], cohort: str = "c1") -> tuple[pd.DataFrame, pd.DataFrame]:
    """Return the tables of structure and pair scores of methods with these Dice, a pair each."""
    structures, pairs = [], []
    for method, values in dice.items():
        for place, value in enumerate(values):
            key = {"cohort": cohort, "method": method, "model": "seed1", "moving": f"s{place}", "fixed": "atlas"}
            for labels in ("nearest", "linear"):
                structures.append({**key, "structure": 1, "name": "a", "labels": labels, "dice": value, "hd95": 1.0})
            numbers = ["nonpositive_jacobian_forward", "nonpositive_jacobian_central", "nondiffeomorphic_volume"]
            numbers += ["sdlogj", "tc_nearest", "tc_linear", "tc_deviation_nearest", "tc_deviation_linear"]
            more = {"status": "ok", "reason": "", "seconds": 2.0, "peak_memory_mb": 100.0, "endpoint_error": np.nan}
            pairs.append({**key, **dict.fromkeys(numbers, 0.25), **more, "device": "cpu", "threads": 1})
    return pd.DataFrame(structures), pd.DataFrame(pairs)


def summary(parameters: int, seconds: float = 60.0, seed: int = 1) -> dict[str, object]:
    return {
        "parameters": parameters, "seconds": seconds, "peak_memory_mb": 900.0, "peak_memory_of": "the process",
        "device": "cpu", "threads": 1, "steps": 300, "seed": seed,
    }  # fmt: skip


# --- which networks ---


def test_the_ablation_is_every_combination_once_from_none_to_all():
    rows = configuration().variants("ablation")
    combinations = [tuple(row.changes[switch] for switch in SWITCHES) for row in rows]
    assert sorted(combinations) == sorted(itertools.product((False, True), repeat=3))
    assert [sum(on) for on in combinations] == [0, 1, 1, 1, 2, 2, 2, 3]
    assert len({row.name for row in rows}) == 8


@pytest.mark.parametrize("on", list(itertools.product((False, True), repeat=3)))
def test_every_combination_trains_and_registers(on, tmp_path):
    """One step of training from images on disk, and a registration with the weights that it leaves there."""
    switches = dict(zip(SWITCHES, on, strict=True))
    images = np.random.default_rng(0).random((2, 16, 20, 12), dtype=np.float32)
    volumes = [Volume(image, np.eye(4)) for image in images]
    scans = [Scan(name, tmp_path / f"{name}.nii.gz") for name in ("moving", "fixed")]
    for scan, volume in zip(scans, volumes, strict=True):
        write_volume(scan.image, volume)
    small = {"detail_channels": [4, 4], "channels": [4, 8], "depths": [1, 1], "heads": [1, 2]}
    settings = {"steps": 1, "validate_every": 1, "window": 3, "threads": 1, "device": "cpu", "keep": "last"}
    result = train("caml", {**small, **switches}, scans[:1], [], [scans[1]], output=tmp_path, **settings)
    field = register(*volumes, method=str(result.weights))
    assert field.shape == (3, 16, 20, 12) and np.isfinite(field).all() and np.abs(field).max() > 0
    hyperparameters = read_metadata(result.weights)["hyperparameters"]
    assert {switch: hyperparameters[switch] for switch in SWITCHES} == switches


def test_what_a_study_leaves_as_it_is_is_not_trained_twice():
    given = configuration(training={"regularisation": 0.5}, lambda_study={"values": [0.5, 2.0]})
    assert given.variants("ablation")[-1].name == "caml"
    assert [row.name for row in given.variants("lambda_study")] == ["caml", "caml-lambda-2"]
    shortened = configuration(ablation={"training": {"steps": 10}})
    assert shortened.variants("ablation")[-1].name == "caml-complete"
    assert shortened.method("caml-complete").training["steps"] == 10


def test_a_variant_is_the_method_with_one_thing_changed():
    own = {"network": {"channels": [8, 16], "depths": [1, 1], "heads": [1, 2]}, "training": {"learning_rate": 0.01}}
    given = configuration(settings={"caml": own}, training={"steps": 77, "regularisation": 3.0})
    without = given.method("caml-without-rbsc-carsc")
    assert without.network == {**own["network"], "rbsc": False, "carsc": False}
    assert (without.training["learning_rate"], without.training["steps"]) == (0.01, 77)
    assert without.training["regularisation"] == 3.0
    assert given.method("caml-lambda-0.25").training == {**given.method("caml").training, "regularisation": 0.25}


def test_a_switch_that_the_method_itself_turns_off_is_turned_on_for_the_study():
    given = configuration(settings={"caml": {"network": {"carsc": False}}})
    rows = {tuple(row.changes.values()): row for row in given.variants("ablation")}
    assert rows[True, True, False].name == "caml"
    assert given.method(rows[True, True, True].name).network == {"carsc": True}


def test_a_row_of_a_study_can_be_a_method_of_the_comparison():
    assert configuration(methods=["caml", "caml-without-carsc"]).networks() == ["caml", "caml-without-carsc"]


@pytest.mark.parametrize(
    ("changes", "told"),
    [
        ({"ablation": {"method": "syn"}}, "'syn' is no network"),
        ({"ablation": {"switches": ["rbcs"]}}, "Did you mean 'rbsc'?"),
        ({"ablation": {"switches": []}}, "expected one to four"),
        ({"ablation": {"swiches": ["rbsc"]}}, "Did you mean 'switches'?"),
        ({"lambda_study": {"values": [1.0, 1.0]}}, "each once"),
        ({"lambda_study": {"values": [-1.0]}}, "-1"),
        ({"lambda_study": {"training": {"stepps": 3}}}, "Did you mean 'steps'?"),
        ({"lambda_study": {"methods": ["camel"]}}, "Did you mean 'caml'?"),
        ({"methods": ["caml", "caml-without-rbcs"]}, "is no algorithm"),
    ],
)
def test_a_mistake_in_a_study_is_told_with_its_key(changes, told):
    with pytest.raises(ConfigError) as error:
        configuration(**changes)
    assert told in str(error.value)


def test_check_builds_what_the_studies_would_train(tmp_path, capsys):
    path = tmp_path / "wrong.yaml"
    path.write_text(yaml.safe_dump({**MINIMAL, "ablation": {"switches": ["depths"]}}))
    assert main(["check", str(path)]) == 1
    assert "caml-without-depths" in capsys.readouterr().err


@pytest.mark.parametrize("name", ["config.yaml", "paper.yaml"])
def test_the_committed_configurations_hold_both_studies(name):
    given = read_config(ROOT / "config" / name)
    assert len(given.variants("ablation")) == 8
    assert len({row.changes["regularisation"] for row in given.variants("lambda_study")}) >= 4


# --- tables and figures ---


def ablation(cohorts: tuple[str, ...] = ("c1",)) -> pd.DataFrame:
    rows = {row.name: row.changes for row in configuration().variants("ablation")}
    dice = {name: [0.6 + 0.01 * place, 0.7 + 0.01 * place] for place, name in enumerate(rows)}
    parts = [scores(dice, cohort) for cohort in cohorts]
    structures, pairs = (pd.concat(tables, ignore_index=True) for tables in zip(*parts, strict=True))
    summaries = {name: [summary(100 + place)] for place, name in enumerate(rows)}
    return study_table(structures, pairs, rows, summaries)


def test_the_table_of_the_ablation_says_what_is_on_what_it_brings_and_what_it_costs(tmp_path):
    table = ablation()
    assert len(table) == 8
    assert table[["CAML", "RBSC", "CARSC"]].sum(axis=1).tolist() == [0, 1, 1, 1, 2, 2, 2, 3]
    assert table["dice"].tolist() == pytest.approx([0.65 + 0.01 * place for place in range(8)])
    assert table["parameters"].tolist() == [100 + place for place in range(8)]
    assert set(table["training_seconds"]) == {60.0} and set(table["n"]) == {2}
    csv, markdown, tex, _ = write_table(table, tmp_path / "ablation", caption="Ablation")
    assert pd.read_csv(csv)["RBSC"].tolist() == table["RBSC"].tolist()
    assert "✓" in markdown.read_text() and "300 steps" in markdown.read_text()
    assert r"$\checkmark$" in tex.read_text() and "amssymb" in tex.read_text()


def test_the_cost_of_several_seeds_is_their_mean_time_and_highest_memory():
    structures, pairs = scores({"caml": [0.5]})
    more = {"caml": [summary(5, 10.0), {**summary(5, 30.0, seed=2), "peak_memory_mb": 1000.0}]}
    table = study_table(structures, pairs, {"caml": {"rbsc": True}}, more)
    assert table.loc[0, ["training_seconds", "training_memory_mb"]].tolist() == [20.0, 1000.0]
    with pytest.raises(InputError, match="caml"):
        study_table(structures, pairs, {"caml": {"rbsc": True}}, {"caml": []})


def test_the_figure_of_the_ablation_has_a_dot_a_part_and_combination():
    table = ablation(("c1", "c2"))
    figure = ablation_figure(table, SWITCHES)
    assert len(figure.axes) == 10
    dots = figure.axes[-1].collections
    assert len(dots) == 3
    for line, name in zip(dots, ("CAML", "RBSC", "CARSC"), strict=True):
        black = line.get_facecolors()[:, 0] == 0
        assert black.tolist() == table.loc[table["cohort"] == "c2", name].tolist()
    assert [axis.get_ylabel() for axis in figure.axes[:8:2]] == ["Dice", "|J|≤0, %", "s a pair", "training, MB"]
    assert [label.get_text() for label in figure.axes[8].get_yticklabels()] == ["CAML", "RBSC", "CARSC"]
    heights = [bar.get_height() for bar in figure.axes[4].patches]
    assert heights == [2.0] * 8  # seconds a pair


def test_the_figure_of_lambda_has_a_line_a_network_in_its_own_colour():
    given = configuration(lambda_study={"methods": ["voxelmorph", "caml"], "values": [0.0, 0.5, 1.0, 2.0]})
    rows = {row.name: row.changes for row in given.variants("lambda_study")}
    structures, pairs = scores({name: [0.5 + 0.01 * place] for place, name in enumerate(rows)})
    table = study_table(structures, pairs, rows, {name: [summary(9)] for name in rows})
    figure = lambda_figure(table)
    lines = {line.get_label(): line for line in figure.axes[0].lines}
    assert list(lines) == ["VoxelMorph", "Proposed"]
    assert [line.get_color() for line in lines.values()] == ["#56b4e9", "#d55e00"]
    np.testing.assert_allclose(lines["Proposed"].get_xdata(), [0.0, 0.5, 1.0, 2.0])
    np.testing.assert_allclose(lines["Proposed"].get_ydata(), [0.54, 0.55, 0.56, 0.57])


def test_variants_have_names_that_readers_understand():
    assert method_name("caml-without-caml-carsc") == "Proposed without CAML, CARSC"
    assert method_name("voxelmorph-lambda-0.25") == "VoxelMorph, λ = 0.25"
    assert method_name("mine-without-doubt") == "mine-without-doubt"
