"""Names that look like something else: what a table or a configuration holds as a name is read back as that name."""

from __future__ import annotations

import re
from pathlib import Path

import numpy as np
import pandas as pd
import pytest
import yaml
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from dmir.cli import main
from dmir.cohorts import scan_table
from dmir.cohorts.layout import read_text_table
from dmir.cohorts.pairs import registration_pairs
from dmir.config.base import ConfigError
from dmir.config.reading import parse_config, read_config, read_yaml
from dmir.fields import pair_field, save_field
from dmir.methods.records import MEASURED, write_records
from dmir.metrics.files import score_shard
from dmir.report.page.summary import read_comparison, summarise
from dmir.report.statistics import statistics_table
from dmir.report.tables import comparison_table
from dmir.report.writing import write_table
from dmir.structures import load_structures
from dmir.tables import read_scores, read_table, write_scores
from dmir.volumes import Volume, write_volume

ROOT = Path(__file__).parents[1]
# what pandas, YAML or R would rather make a number, a date, a truth value or nothing of
NAMES = ("007", "1_2344", "None", "NA", "nan", "NaN", "null", "yes", "True", "2021", "1e5", "0x10", "2021-01-02")
NAMES_OF_FILES = tuple(name for name in NAMES if name != "NaN")  # which some file systems do not tell from nan
names = st.sampled_from(NAMES) | st.from_regex(r"[A-Za-z0-9][A-Za-z0-9._-]{0,20}", fullmatch=True)
TRIED = 50
many = settings(max_examples=TRIED, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])


@many
@given(st.lists(names, min_size=1, max_size=6), st.lists(st.floats(allow_nan=True), min_size=6, max_size=6))
def test_names_and_numbers_go_through_every_kind_of_table(tmp_path, found, numbers):
    table = pd.DataFrame(dict.fromkeys(("cohort", "method", "name", "scan"), found)).assign(dice=numbers[: len(found)])
    table.to_csv(tmp_path / "table.csv", index=False)
    pd.testing.assert_frame_equal(read_table(tmp_path / "table.csv"), table, check_exact=False, rtol=1e-15)
    text = read_table(tmp_path / "table.csv", text=True)
    assert text["scan"].tolist() == found and all(isinstance(entry, str) for entry in text["dice"])
    assert read_text_table(tmp_path / "table.csv", "a table")["scan"].tolist() == found
    write_scores(tmp_path / "table.parquet", table)
    pd.testing.assert_frame_equal(read_scores(tmp_path / "table.parquet"), table)
    assert set(read_scores(tmp_path / "table.parquet", found[0])["cohort"]) == {found[0]}


@many
@given(st.lists(names, min_size=1, max_size=4, unique_by=str.lower))
def test_names_go_through_the_configuration_as_it_is_written_beside_the_results(tmp_path, found):
    (tmp_path / "config.yaml").write_text(yaml.safe_dump(configuration(found)))
    first = read_config(tmp_path / "config.yaml")
    assert (first.train_on, first.test_on, first.methods) == (found[0], found, found)
    assert list(first.cohorts) == sorted(found) and first.cohorts[found[0]].exclude == found
    (tmp_path / "configuration.yaml").write_text(yaml.safe_dump(first.model_dump(mode="json"), sort_keys=False))
    assert read_config(tmp_path / "configuration.yaml") == first


def configuration(found):
    """Return a configuration in which everything that a user names has one of some names."""
    cohort = {"source": "table", "table": "scans.csv", "structures": "oasis28", "exclude": found, "reference": found[0]}
    return {
        **{"train_on": found[0], "test_on": found, "methods": found, "cohorts": dict.fromkeys(sorted(found), cohort)},
        "settings": {name: {"algorithm": "affine"} for name in found},
    }


@pytest.mark.parametrize(
    ("text", "told"),
    [
        ("exclude: [007]", "exclude[0]: found 007, of which YAML makes 7; .* in quotes: '007'"),
        ("seeds: [010]", r"seeds\[0\]: found 010, of which YAML makes 8; expected a decimal number"),
        ("0x10: {}", "0x10: found 0x10, of which YAML makes 16"),
        ("a: 1:30", "a: found 1:30, of which YAML makes 90"),
        ("a: 1:30.5", "a: found 1:30.5, of which YAML makes 90.5"),
        ("a: 0b11", "a: found 0b11, of which YAML makes 3"),
    ],
)
def test_numbers_that_yaml_reads_on_another_base_are_refused(tmp_path, text, told):
    """Of 010 it makes 8; nobody who writes that means it."""
    (tmp_path / "config.yaml").write_text(text)
    with pytest.raises(ConfigError, match=told.replace("exclude[", r"exclude\[").replace("0]:", r"0\]:", 1)):
        read_yaml(tmp_path / "config.yaml")


def test_decimal_numbers_and_quoted_names_are_not_touched(tmp_path):
    (tmp_path / "config.yaml").write_text("a: [0, -3, 1_000, 0.5, 1.5e-3, '007', \"0x10\", '1:30', yes, -0]\n")
    assert read_yaml(tmp_path / "config.yaml")["a"] == [0, -3, 1000, 0.5, 1.5e-3, "007", "0x10", "1:30", True, 0]


@pytest.mark.parametrize("value", ["2021", "1_2344", "yes", "2021-01-02", ".5"])
def test_what_yaml_makes_of_a_name_is_refused_with_what_helps(value):
    changed = yaml.safe_load(value)
    assert not isinstance(changed, str)
    for values in ({**configuration(["a"]), "train_on": changed}, {**configuration(["a"]), "test_on": [changed]}):
        with pytest.raises(ConfigError, match=r"(train|test)_on.*: found .*; expected text; put a name into quotes"):
            parse_config(values)
    with pytest.raises(ConfigError, match=r"cohorts: found the key .*; expected text; put a name into quotes"):
        parse_config({**configuration(["a"]), "cohorts": {changed: {}}})


def test_names_go_from_the_table_of_files_to_the_report(tmp_path, capsys):
    """The chain of the pipeline, on cubes: the list of scans, a shard's records, its scores, all tables, the page."""
    cohort, methods, atlas = "2021", ["None", "1e5"], "0777"
    table = scan_table("table", path=files_named(tmp_path, atlas))
    assert table["scan"].tolist() == [atlas, *NAMES_OF_FILES] == table["subject"].tolist()
    (tmp_path / "cohorts" / cohort).mkdir(parents=True)
    table.to_csv(tmp_path / "cohorts" / cohort / "scans.csv", index=False)
    scans = read_table(tmp_path / "cohorts" / cohort / "scans.csv", text=True)
    pd.testing.assert_frame_equal(scans, table)
    pairs = registration_pairs(scans)
    assert pairs == [(name, atlas) for name in NAMES_OF_FILES]

    parts = [shard(tmp_path, table, cohort, method, pairs) for method in methods]
    structures, scored = (pd.concat(part, ignore_index=True) for part in zip(*parts, strict=True))
    assert set(scored["cohort"]) == {cohort} and set(scored["fixed"]) == {atlas}
    assert scored.set_index("moving")["status"].to_dict() == {
        name: "left out" if name == "007" else "ok" for name in NAMES_OF_FILES
    }
    scored.to_csv(tmp_path / "pairs.csv", index=False)
    pd.testing.assert_frame_equal(read_table(tmp_path / "pairs.csv"), scored, check_dtype=False)

    write_table(comparison_table(structures, scored, methods), tmp_path / "tables" / "comparison")
    tests = statistics_table(structures, scored, scans, methods, methods[0], resamples=50)
    write_table(tests, tmp_path / "tables" / f"statistics_{cohort}")
    comparison = read_comparison(tmp_path)
    assert comparison is not None
    assert comparison[["cohort", "method"]].to_numpy().tolist() == [[cohort, method] for method in methods]
    assert comparison["n"].tolist() == [len(NAMES_OF_FILES) - 1] * 2 and (comparison["dice"] == 1).all()
    assert set(read_table(tmp_path / "tables" / f"statistics_{cohort}.csv")["method"]) == set(methods)
    page = summarise(tmp_path, {"train_on": cohort, "test_on": [cohort]}, methods, {}, "nearest", methods[0])
    assert page.facts[0].splits == f"{len(NAMES_OF_FILES)} test, 1 atlas" and len(page.cohorts) == 1
    assert main(["table", str(tmp_path / "tables" / "comparison.csv")]) == 0
    shown = capsys.readouterr().out
    assert all(f"\n{word} " in shown for word in (*methods, f"{cohort}: mean"))


def files_named(folder, atlas):
    """Write cubes of two structures as scans, and the table that names them; return the table."""
    labels = np.zeros((6, 6, 6), np.int16)
    labels[1:3, 1:5, 1:5], labels[3:5, 1:5, 1:5] = 2, 41
    rows = ["scan,subject,split,image,labels"]
    for name in (atlas, *NAMES_OF_FILES):
        write_volume(folder / f"{name}_labels.nii.gz", Volume(labels, np.eye(4)))
        image = np.random.default_rng(len(rows)).random(labels.shape, np.float32)
        write_volume(folder / f"{name}.nii.gz", Volume(image, np.eye(4)))
        split = "atlas" if name == atlas else "test"
        rows.append(f"{name},{name},{split},{name}.nii.gz,{name}_labels.nii.gz")
    (folder / "files.csv").write_text("\n".join(rows) + "\n")
    return folder / "files.csv"


def shard(folder, table, cohort, method, pairs):
    """Return the scores of a shard of zero fields, read back; the first pair was left out."""
    fields = folder / cohort / method
    fields.mkdir(parents=True)
    for moving, fixed in pairs[1:]:
        save_field(pair_field(fields, moving, fixed), np.zeros((3, 6, 6, 6), np.float32), np.eye(4))
    done = pd.DataFrame(pairs[1:], columns=["moving", "fixed"]).assign(status="ok", reason="", device="cpu", threads=1)
    done = done.assign(**dict.fromkeys(MEASURED, 1.5))
    left_out = [{"moving": pairs[0][0], "fixed": pairs[0][1], "status": "left out", "reason": "NA is flagged"}]
    run_as = {"cohort": cohort, "method": method, "model": "none"}
    write_records(folder / f"{method}.csv", done, left_out, **run_as)
    labels = dict(zip(table["scan"], table["labels"], strict=True))
    found = score_shard(
        folder / f"{method}.csv", fields=fields, labels=labels, truths={}, structures="oasis28", pairs=pairs
    )
    back = []
    for number, scores in enumerate(found):
        write_scores(folder / f"{method}-{number}.parquet", scores)
        back.append(read_scores(folder / f"{method}-{number}.parquet", cohort))
    return back


def test_a_structure_may_have_any_name(tmp_path, monkeypatch):
    rows = [f"{number},{name},both,#000000,none" for number, name in enumerate(NAMES, 1)]
    (tmp_path / "mine.csv").write_text("\n".join(["id,name,hemisphere,colour,source", *rows]) + "\n")
    monkeypatch.setattr("dmir.structures.structures_folder", lambda: tmp_path)
    assert load_structures("mine").names == dict(enumerate(NAMES, 1))


def test_nothing_else_reads_tables_and_configurations():
    """Other readers would make numbers of names again."""
    readers = {
        r"\bread_csv\(": {"src/dmir/tables.py", "src/dmir/cohorts/layout.py"},
        r"\bread_parquet\(": {"src/dmir/tables.py"},
        r"yaml\.(safe_|full_)?load\(": {
            *("src/dmir/config/reading.py", "benchmarks/networks.py", "benchmarks/scale.py")  # these two: numbers
        },
    }
    files = [path for folder in ("src", "workflow", "rules", "benchmarks") for path in (ROOT / folder).rglob("*")]
    sources = [path for path in [*files, ROOT / "Snakefile"] if path.suffix in (".py", ".smk", "")]
    for pattern, allowed in readers.items():
        found = {
            str(path.relative_to(ROOT))
            for path in sources
            if path.is_file() and re.search(pattern, path.read_text(encoding="utf-8"))
        }
        assert found == allowed, pattern
