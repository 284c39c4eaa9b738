"""The configuration: every mistake is found at once, named by its key, with a suggestion."""

import copy
import dataclasses
import importlib
import inspect
import io
import json
from pathlib import Path

import pandas as pd
import pytest
import yaml

from dmir import registry
from dmir.cli import main
from dmir.cohorts.splits import splits_folder
from dmir.config import ConfigError, Network, parse_config, read_config
from dmir.config.documents import json_schema, readme
from dmir.config.models import Preprocess, Training
from dmir.networks import hyperparameter_names, network_names
from dmir.preprocess import preprocess_scan
from dmir.training import TrainingSettings

ROOT = Path(__file__).parents[1]
DEFAULT = yaml.safe_load((ROOT / "config" / "config.yaml").read_text())


def problems(change):
    values = copy.deepcopy(DEFAULT)
    change(values)
    with pytest.raises(ConfigError) as caught:
        parse_config(values, "mine.yaml")
    assert str(caught.value).startswith("mine.yaml: ")
    return caught.value.problems


def put(*path_and_value):
    *path, key, value = path_and_value

    def change(values):
        for part in path:
            values = values.setdefault(part, {})
        values[key] = value

    return change


@pytest.mark.parametrize(
    ("change", "key", "words"),
    [
        (put("metods", []), "metods", "Did you mean 'methods'?"),
        (put("training", "stpes", 3), "training.stpes", "Did you mean 'steps'?"),
        (put("grid", "spaceing", 3), "grid.spaceing", "Did you mean 'spacing'?"),
        (put("cohorts", "simulated", "tset", 3), "cohorts.simulated.tset", "Did you mean 'test'?"),
        (put("settings", "syn", "radios", 3), "settings.syn.radios", "Did you mean 'radius'?"),
        (put("settings", "caml", "network", "chanels", [8]), "settings.caml", "Did you mean 'channels'?"),
        (put("settings", "caml", "training", "stepps", 8), "settings.caml.stepps", "Did you mean 'steps'?"),
        (put("cohorts", "simulated", "preprocess", "skul_strip", "mask"), "skul_strip", "Did you mean 'skull_strip'?"),
        (put("methods", ["sin"]), "settings.sin", "Did you mean 'syn'?"),
        (put("cohorts", "simulated", "structures", "oasis82"), "structures", "Did you mean 'oasis28'?"),
        (put("train_on", "simulatd"), "train_on", "Did you mean 'simulated'?"),
        (put("scores", "label_interpolation", ["cubic"]), "label_interpolation", "cubic"),
        (put("training", "window", 8), "training", "odd"),
        (put("training", "learning_rate", -1), "training.learning_rate", "greater than 0"),
        (put("methods", []), "methods", "empty list"),
        (put("methods", ["syn", "syn"]), "methods", "more than once"),
        (put("seeds", list(range(200))), "for each of the seeds", "expected at most 1000"),
        (put("settings", "caml", "seeds", list(range(200))), "for each of the seeds", "expected at most 1000"),
        (put("seeds", [-1]), "seeds.0", "greater than or equal to 0"),
        (put("seeds", [True]), "seeds.0", "found True"),
        (put("settings", "caml", "seeds", []), "settings.caml", "empty list"),
        (put("settings", "caml", "seeds", [2, 2]), "settings.caml", "2 stands there more than once"),
        (put("settings", "../x", {"algorithm": "syn"}), "../x", "letters, digits"),
        (put("report", {"planes": ["axial", "axial"]}), "report.planes", "each once"),
        (put("report", {"surfaces": {"simulatd": [10]}}), "report.surfaces", "Did you mean 'simulated'?"),
        (
            put("report", {"surfaces": {"simulated": [10, 9]}}),
            "report.surfaces.simulated",
            "no structure of oasis28: 9",
        ),
        (put("report", {"surfaces": {"donors": []}}), "report.surfaces.donors", "an empty list"),
    ],
)
def test_a_mistake_is_named_by_its_key_and_a_spelling_is_suggested(change, key, words):
    found = problems(change)
    assert len(found) == 1
    assert key in found[0] and words in found[0]


def test_all_mistakes_are_told_at_once():
    def change(values):
        values["metods"] = 1
        values["training"]["stpes"] = 3
        values["grid"]["spacing"] = -1

    assert len(problems(change)) >= 3


def test_a_missing_key_says_so():
    values = {key: value for key, value in DEFAULT.items() if key != "train_on"}
    with pytest.raises(ConfigError, match="train_on: found nothing; this key is required"):
        parse_config(values)


def test_what_scores_depend_on_is_neither_a_place_nor_a_drawing():
    """Two runs of the same numbers in other folders have equal hashes; another window has not; a study has its key."""
    values = copy.deepcopy(DEFAULT)
    numbers = parse_config(values).numbers()
    places = {"results": "elsewhere", "keep_fields": True, "pairs_per_job": 1, "disk_quota_gb": 50}
    places |= {"report": {"examples": 2}}
    assert parse_config({**values, **places, "lambda_study": {"methods": ["caml"], "values": [1]}}).numbers() == numbers
    assert parse_config({**values, "training": {**values["training"], "window": 5}}).numbers() != numbers
    changed = parse_config({**values, "ablation": {"method": "caml", "switches": ["caml"]}})
    assert changed.numbers() == numbers
    assert changed.numbers("ablation") != parse_config(values).numbers("ablation")


def test_a_methods_training_is_the_common_one_and_its_own():
    values = copy.deepcopy(DEFAULT)
    values["settings"]["caml_long"] = {"algorithm": "caml", "training": {"steps": 7}}
    configuration = parse_config(values)
    own, common = configuration.method("caml_long"), configuration.method("caml")
    assert isinstance(own, Network) and isinstance(common, Network)
    assert own.training["steps"] == 7
    assert own.training["learning_rate"] == common.training["learning_rate"] == DEFAULT["training"]["learning_rate"]
    assert common.training["steps"] == DEFAULT["training"]["steps"]


@pytest.mark.parametrize("name", ["config.yaml", "paper.yaml"])
def test_committed_configurations_are_valid(name):
    assert read_config(ROOT / "config" / name).methods


def test_generated_documents_are_in_step():
    assert (ROOT / "config" / "config.schema.json").read_text() == json_schema(), "run `dmir docs`"
    assert (ROOT / "config" / "README.md").read_text() == readme(), "run `dmir docs`"
    assert json.loads(json_schema())["additionalProperties"] is False


@pytest.mark.parametrize("name", ["syn", "elastix"])
def test_settings_of_a_classical_method_are_its_parameters_with_the_same_defaults(name):
    register = importlib.import_module(f"dmir.methods.{name}").register
    keywords = {p.name: p.default for p in inspect.signature(register).parameters.values() if p.kind is p.KEYWORD_ONLY}
    fields = {
        key: field.default for key, field in registry.settings_model(name).model_fields.items() if key != "algorithm"
    }
    assert {key: _plain(value) for key, value in fields.items()} == {key: _plain(v) for key, v in keywords.items()}


def _plain(value):
    return list(value) if isinstance(value, tuple) else value


def test_training_and_preprocessing_settings_are_parameters_of_the_library():
    training = {field.name for field in dataclasses.fields(TrainingSettings)} - {"seed"}
    assert set(Training.model_fields) - {"gpus"} == training  # how many cards share the work changes no result
    keywords = set(inspect.signature(preprocess_scan).parameters)
    own = {"image", "labels", "mask", "atlas", "structures", "where"}
    others = {"flagged", "strict"}  # concern those who use the scans, and who read their files
    assert set(Preprocess.model_fields) - others == keywords - own


def test_cards_that_cannot_share_a_steps_pairs_are_refused():
    with pytest.raises(ConfigError, match=r"gpus: found 2; expected a divisor of batch_size, which is 3"):
        parse_config({**DEFAULT, "training": {"gpus": 2, "batch_size": 3}})
    assert parse_config({**DEFAULT, "training": {"gpus": 2, "batch_size": 4}}).training.gpus == 2


def test_the_default_networks_can_be_built():
    """Names and values of hyperparameters reach the constructors."""
    configuration = parse_config(DEFAULT)
    assert set(configuration.networks()) <= set(network_names())
    for name in configuration.networks():
        settings = configuration.method(name)
        assert isinstance(settings, Network)
        assert set(settings.network) <= set(hyperparameter_names(settings.algorithm))


def test_check_answers_on_the_command_line(tmp_path, capsys):
    assert main(["check", str(ROOT / "config" / "config.yaml")]) == 0
    assert "nothing wrong found" in capsys.readouterr().out
    wrong = tmp_path / "wrong.yaml"
    wrong.write_text((ROOT / "config" / "config.yaml").read_text().replace("steps:", "stpes:"))
    assert main(["check", str(wrong)]) == 1
    error = capsys.readouterr().err
    assert "training.stpes" in error and "'steps'" in error and "Traceback" not in error


def test_check_names_a_hyperparameter_value_that_makes_no_network(tmp_path, capsys):
    values = copy.deepcopy(DEFAULT)
    values["settings"]["voxelmorph"]["network"]["encoder"] = []
    path = tmp_path / "bad.yaml"
    path.write_text(yaml.safe_dump(values))
    assert main(["check", str(path)]) == 1
    assert "settings.voxelmorph.network" in capsys.readouterr().err


def test_check_says_what_the_papers_comparison_needs_and_where_to_get_it(monkeypatch, tmp_path, capsys):
    monkeypatch.chdir(tmp_path)
    assert main(["check", str(ROOT / "config" / "paper.yaml")]) == 1
    error = capsys.readouterr().err
    assert "2 mistakes" in error and "Traceback" not in error
    for words in ("data/oasis: found no such folder", "neurite-oasis.v1.0.tar", "md5", "data/oasis/subjects.txt"):
        assert words in error
    for words in ("data/lpba40: found no such folder", "LPBA40_Subjects_Delineation_Space", "loni.usc.edu"):
        assert words in error


def test_the_papers_comparison_with_its_data_in_place(monkeypatch, tmp_path, capsys):
    """All names of both data sets, no content: what is listed, split and paired is the published protocol."""
    scans = pd.read_csv(splits_folder() / "neurite_oasis_hsganet.csv", comment="#")["scan"]
    oasis, lpba = tmp_path / "data" / "oasis", tmp_path / "data" / "lpba40" / "delineation_space"
    for scan in scans:
        (oasis / f"OASIS_{scan}").mkdir(parents=True)
        for name in ("aligned_norm", "aligned_seg35"):
            (oasis / f"OASIS_{scan}" / f"{name}.nii.gz").touch()
    (oasis / "subjects.txt").write_text("".join(f"OASIS_{scan}\n" for scan in scans))
    for name in (f"S{k:02d}" for k in range(1, 41)):
        (lpba / name).mkdir(parents=True)
        for kind in ("skullstripped", "structure.label"):
            for ending in ("hdr", "img.gz"):
                (lpba / name / f"{name}.delineation.{kind}.{ending}").touch()
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr("dmir.cli._building", lambda *_: [])  # networks of 160x192x224 are tested elsewhere
    monkeypatch.setattr("dmir.cli._look_at_labels", lambda *_: None)  # in empty files there is nothing to look at
    assert main(["check", str(ROOT / "config" / "paper.yaml")]) == 0
    told = capsys.readouterr().out
    assert "255 train" in told and "145 test" in told and "4 atlas" in told and "580 pairs" in told
    assert "35 test" in told and "5 atlas" in told and "175 pairs" in told
    (lpba / "S07" / "S07.delineation.skullstripped.img.gz").unlink()
    assert main(["check", str(ROOT / "config" / "paper.yaml")]) == 1
    assert "S07.delineation.skullstripped" in capsys.readouterr().err


def test_the_example_of_five_scans_in_a_folder(monkeypatch, tmp_path, capsys):
    examples = ROOT / "config" / "examples"
    folder = tmp_path / "my-scans"
    folder.mkdir()
    table = pd.read_csv(examples / "scans.csv", dtype=str)
    assert len(table) == 5
    table.to_csv(folder / "scans.csv", index=False)
    monkeypatch.chdir(tmp_path)
    assert main(["check", str(examples / "own-data.yaml")]) == 1
    assert "15 of 15 files missing: my-scans/s01_T1w.nii.gz" in capsys.readouterr().err
    for name in table[["image", "labels", "mask"]].to_numpy().ravel():
        (folder / name).touch()
    monkeypatch.setattr("dmir.cli._look_at_labels", lambda *_: None)
    assert main(["check", str(examples / "own-data.yaml")]) == 0
    assert "1 atlas, 4 test scans of 5 subjects; 4 pairs" in capsys.readouterr().out


def test_scans_prints_a_table_to_be_split_by_hand(tmp_path, capsys):
    for name in ("S01", "S02"):
        (tmp_path / name).mkdir()
        for kind in ("skullstripped", "structure.label"):
            (tmp_path / name / f"{name}.delineation.{kind}.nii.gz").touch()
    assert main(["scans", "lpba40", str(tmp_path)]) == 0
    table = pd.read_csv(io.StringIO(capsys.readouterr().out))
    assert list(table["scan"]) == ["S01", "S02"]
    assert table["image"][1] == str(tmp_path / "S02" / "S02.delineation.skullstripped.nii.gz")
    assert main(["scans", "lpba4", str(tmp_path)]) == 1
    assert "Did you mean 'lpba40'" in capsys.readouterr().err


def test_yaml_tags_build_nothing(tmp_path, capsys):
    path = tmp_path / "tag.yaml"
    path.write_text("methods: !!python/object/apply:os.system ['echo hacked']\n")
    assert main(["check", str(path)]) == 1
    captured = capsys.readouterr()
    assert "no YAML" in captured.err and "hacked" not in captured.out
