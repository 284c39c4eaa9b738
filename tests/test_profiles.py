"""The profiles name rules that there are."""

import re
from pathlib import Path

import pytest
import yaml

ROOT = Path(__file__).parents[1]
STAGES = ("cohort", "preprocess", "train", "register", "evaluate", "report")


def profile(name):
    return yaml.safe_load((ROOT / "profiles" / name / "profile.yaml").read_text())


def rules_of(*names):
    text = "".join((ROOT / "rules" / f"{name}.smk").read_text() for name in names)
    found = re.findall(r"^(?:use )?rule (\w+)(?: as (\w+))?", text, re.MULTILINE)
    return {alias or name for name, alias in found}


def test_every_table_and_figure_is_in_a_group_on_slurm():
    grouped = {entry.split("=")[0] for entry in profile("slurm")["groups"]}
    assert grouped == rules_of("report") | {"gather_scores", "gather_study_scores"}


@pytest.mark.parametrize("name", ["slurm", "lsf", "sge"])
def test_what_a_profile_sets_for_a_rule_is_of_a_rule_that_there_is(name):
    settings = profile(name)
    arrays = settings.get("slurm-array-jobs", "train").split(",")
    assert {*settings["set-resources"], *settings["set-threads"], *arrays} <= rules_of(*STAGES)


@pytest.mark.parametrize("name", ["slurm", "lsf", "sge"])
def test_a_cluster_lets_as_many_gpu_jobs_run_as_it_has_cards(name):
    assert "resources" not in profile(name)  # a limit there is one of the whole cluster
    assert set(profile(name)["set-resources"]) == {"train", "register_network"}
