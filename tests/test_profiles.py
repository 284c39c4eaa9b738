"""The profiles name rules that there are, and the one for a workstation keeps its cards apart."""

import itertools
import re
import subprocess
import sys
from pathlib import Path

import pytest
import yaml
from workflow_runs import SMALL, checkout, environment, lease_of

from dmir.report import products

ROOT = Path(__file__).parents[1]
STAGES = ("cohort", "preprocess", "train", "register", "evaluate", "report")


def profile(name):
    return yaml.safe_load((ROOT / "profiles" / name / "profile.yaml").read_text())


def rules_of(*names):
    text = "".join((ROOT / "rules" / f"{name}.smk").read_text() for name in names)
    found = re.findall(r"^(?:use )?rule (\w+)(?: as (\w+))?", text, re.MULTILINE)
    made = {*products.rules()} if "report" in names else set()
    return {alias or name for name, alias in found} | made


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
    assert set(profile(name)["set-resources"]) == {"train", "register_network", "register_descent"}


@pytest.mark.pipeline
def test_three_trainings_on_a_workstation_of_two_cards_never_share_one(tmp_path):
    """The cards are made up, and torch computes on the CPU; the profile allows more jobs than there are cards."""
    cohort = {"source": "simulated", "train": 1, "val": 1, "test": 1}
    training = {**SMALL["training"], "steps": 40, "validate_every": 20}
    settings = {"methods": ["affine", "voxelmorph"], "seeds": [1, 2, 3], "training": training}
    folder = checkout(tmp_path, {**SMALL, **settings, "cohorts": {"simulated": cohort}})
    profile_given = ["--workflow-profile", "profiles/workstation", "--cores", "3"]
    result = subprocess.run(
        [Path(sys.executable).parent / "snakemake", "train_all", *profile_given],
        cwd=folder,
        capture_output=True,
        text=True,
        env=environment(GPU_POOL="0,1", GPU_LEASE_DIR=str(tmp_path / "lease")),
        timeout=600,
    )
    assert result.returncode == 0, (result.stdout + result.stderr)[-6000:]
    logs = [folder / f"results/logs/train/simulated/voxelmorph/seed{seed}.log" for seed in (1, 2, 3)]
    leases = [lease_of(log) for log in logs]
    together = 0
    for one, other in itertools.combinations(leases, 2):
        overlap = one[1] < other[2] and other[1] < one[2]
        together += overlap
        assert not (overlap and one[0] & other[0]), leases
    assert together >= 1, leases
    assert set.union(*(cards for cards, _, _ in leases)) == {"0", "1"}
