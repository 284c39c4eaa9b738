"""Tables and figures say what they were made from, and `dmir check` whether it is still so."""

import json
import shutil

import matplotlib as mpl
import pandas as pd
import pytest
import yaml
from PIL import Image

from dmir import provenance
from dmir.cli import main
from dmir.config import parse_config
from dmir.errors import InputError
from dmir.provenance import file_hash, value_hash
from dmir.report.agreement import check_results
from dmir.report.origin import origin_of, read_provenance, record_provenance
from dmir.report.style import new_figure, save_figure
from dmir.report.writing import write_table

VALUES = {
    "train_on": "own",
    "test_on": ["own"],
    "methods": ["affine", "voxelmorph"],
    "cohorts": {"own": {"source": "table", "table": "scans.csv", "structures": "lpba56"}},
}
WEIGHTS = "models/own/voxelmorph/seed1/model.safetensors"


@pytest.fixture
def results(tmp_path):
    """A folder of results with one table and one figure, as the pipeline leaves it."""
    folder = tmp_path / "results"
    scans, weights, scores = (folder / name for name in ("cohorts/own/scans.csv", WEIGHTS, "scores/pairs.csv"))
    for path, text in ((scans, "scan,subject\na,a\n"), (weights, "0.5"), (scores, "dice\n0.7\n")):
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(text)
    make(folder)
    return folder


def make(folder):
    configuration = parse_config(VALUES)
    (folder / "configuration.yaml").write_text(yaml.safe_dump(configuration.model_dump(mode="json")))
    record = record_provenance(
        value_hash(configuration.numbers()),
        ["dmir.metrics", "dmir.methods.affine"],
        [folder / "cohorts/own/scans.csv"],
        [folder / WEIGHTS],
        folder,
    )
    path = folder / "provenance" / "run.json"
    for name in ("provenance", "tables", "figures"):
        (folder / name).mkdir(exist_ok=True)
    path.write_text(json.dumps(record))
    inputs = [folder / "scores/pairs.csv", path]
    table = pd.DataFrame({"cohort": ["own"], "method": ["affine"], "dice": [0.7]})
    origin = origin_of(path, inputs, ["dmir.report.tables"])
    write_table(table, folder / "tables" / "comparison", caption="All.", origin=origin)
    figure = new_figure(2, 1)
    figure.add_subplot().plot([0, 1])
    save_figure(figure, folder / "figures" / "curve", origin=origin_of(path, inputs, ["dmir.report.curves"]))


def problems(folder, configuration=None):
    return {found.name: " ".join(found.problems) for found in check_results(folder, configuration)}


def test_what_was_just_made_agrees(results, capsys):
    assert problems(results) == {"tables/comparison": "", "figures/curve": ""}
    assert main(["check", str(results)]) == 0
    assert "2 tables and figures agree with configuration, code, data and weights" in capsys.readouterr().out


def test_every_file_carries_the_hashes(results):
    """In each format's own way; a CSV has none, its sidecar speaks for it."""
    sidecar = json.loads((results / "tables/comparison.json").read_text())
    hashes = sidecar["made_from"]
    assert set(hashes) == {"configuration", "code", "data", "weights"}
    for name in ("comparison.md", "comparison.tex", "comparison.html"):
        assert all(value in (results / "tables" / name).read_text() for value in hashes.values()), name
    assert sidecar["files"]["comparison.csv"] == file_hash(results / "tables/comparison.csv")
    assert sidecar["inputs"] == {"scores/pairs.csv": file_hash(results / "scores/pairs.csv")}
    drawn = json.loads((results / "figures/curve.json").read_text())["made_from"]
    assert all(value in Image.open(results / "figures/curve.png").text["Description"] for value in drawn.values())
    assert all(value in (results / "figures/curve.svg").read_text() for value in drawn.values())
    assert drawn["code"].encode() in (results / "figures/curve.pdf").read_bytes()
    assert drawn["code"] != hashes["code"]  # other modules made it
    assert {key: drawn[key] for key in ("data", "weights")} == {key: hashes[key] for key in ("data", "weights")}


def test_the_tex_with_its_origin_is_still_a_comment_and_the_csv_a_csv(results):
    last = (results / "tables/comparison.tex").read_text().splitlines()[-1]
    assert last.startswith("% dmir: configuration ")
    assert list(pd.read_csv(results / "tables/comparison.csv")) == ["cohort", "method", "dice"]


@pytest.mark.parametrize(
    ("file", "text", "expected"),
    [
        (
            "tables/comparison.csv",
            "cohort,method,dice\nown,affine,0.9\n",
            "changed by hand since it was made: comparison",
        ),
        ("scores/pairs.csv", "dice\n0.8\n", "made from another: scores/pairs.csv"),
        (WEIGHTS, "0.6", f"weights changed since: {WEIGHTS}"),
        ("cohorts/own/scans.csv", "scan,subject\nb,b\n", "data changed since: cohorts/own/scans.csv"),
    ],
)
def test_what_changed_is_named(results, file, text, expected, capsys):
    (results / file).write_text(text)
    found = problems(results)
    assert expected in found["tables/comparison"]
    assert ("figures/curve" in file or expected in found["figures/curve"]) or file.startswith("tables")
    assert main(["check", str(results)]) == 1
    told = capsys.readouterr()
    assert expected in told.out
    assert "do not agree" in told.err
    assert "Traceback" not in told.err


def test_another_configuration_is_told_but_not_how_it_is_drawn(results, tmp_path):
    drawn = parse_config({**VALUES, "report": {"examples": 2}, "results": "elsewhere", "keep_fields": True})
    assert problems(results, drawn) == {"tables/comparison": "", "figures/curve": ""}
    longer = {**VALUES, "training": {"steps": 7}}
    assert "made with another configuration" in problems(results, parse_config(longer))["tables/comparison"]
    (tmp_path / "other.yaml").write_text(yaml.safe_dump(longer))
    assert main(["check", str(results), "--config", str(tmp_path / "other.yaml")]) == 1


def test_new_weights_with_a_new_record_make_an_old_table_stale(results):
    """The table is older than the record: both hashes are told."""
    sidecar = (results / "tables/comparison.json").read_text()
    (results / WEIGHTS).write_text("0.7")
    make(results)
    assert problems(results)["tables/comparison"] == ""
    (results / "tables/comparison.json").write_text(sidecar)
    assert "made from other weights" in problems(results)["tables/comparison"]


def forget_code():
    """Let what was read of the code be read again: in a process the code does not change."""
    for function in vars(provenance).values():
        if hasattr(function, "cache_clear"):
            function.cache_clear()


@pytest.mark.parametrize(
    ("module", "expected"),
    [
        ("metrics/overlap.py", "made from scores of other code: dmir.metrics.overlap"),
        ("report/tables.py", "made by other code: dmir.report.tables"),
    ],
)
def test_changed_code_is_named(results, tmp_path, monkeypatch, module, expected):
    copy = tmp_path / "dmir"
    shutil.copytree(provenance.ROOT, copy, ignore=shutil.ignore_patterns("__pycache__"))
    monkeypatch.setattr(provenance, "ROOT", copy)
    forget_code()
    assert problems(results)["tables/comparison"] == ""
    (copy / module).write_text((copy / module).read_text() + "\nNEW = 1\n")
    forget_code()
    found = problems(results)
    forget_code()
    assert expected in found["tables/comparison"]
    assert bool(found["figures/curve"]) == module.startswith("metrics")  # a figure is not made by the code of tables


def test_what_is_gone_is_no_disagreement_but_told(results, capsys):
    (results / WEIGHTS).unlink()
    assert main(["check", str(results)]) == 0
    assert f"could not be compared: {WEIGHTS} is gone" in capsys.readouterr().out


def test_a_table_without_a_record_and_a_folder_without_tables(results, tmp_path):
    (results / "tables/comparison.json").unlink()
    assert "carries no record" in problems(results)["tables/comparison"]
    (results / "figures/curve.json").write_text("{")
    assert "cannot be read" in problems(results)["figures/curve"]
    with pytest.raises(InputError, match="the folder of results of a finished run"):
        check_results(tmp_path)


def test_another_file_is_no_record(tmp_path):
    (tmp_path / "run.json").write_text("[1]")
    with pytest.raises(InputError, match="another JSON file"):
        read_provenance(tmp_path / "run.json")
    with pytest.raises(InputError, match="no readable record"):
        read_provenance(tmp_path / "no.json")


def test_figures_of_one_origin_are_equal_files(results, tmp_path):
    origin = origin_of(results / "provenance/run.json", [results / "scores/pairs.csv"], ["dmir.report.curves"])
    written = []
    for name in ("first", "second"):
        (tmp_path / name).mkdir()
        figure = new_figure(2, 1)
        figure.add_subplot().plot([0, 1])
        written.append(save_figure(figure, tmp_path / name / "f", origin=origin))
    assert [path.suffix for path in written[0]] == [".png", ".svg", ".pdf", ".json"]
    assert all(a.read_bytes() == b.read_bytes() for a, b in zip(*written, strict=True))
    assert mpl.rcParams["pdf.fonttype"] == 3  # the settings are the figure's, not everybody's
