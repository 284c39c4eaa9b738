"""The plan of a configuration: its counts are the pipeline's, its sums add up, its words say where numbers are from."""

import json
from pathlib import Path

import pandas as pd
import pytest
import torch

from dmir import cli
from dmir.config import parse_config, read_config
from dmir.methods import syn
from dmir.planning import network_costs, trial
from dmir.planning import plan as planning
from dmir.planning.device_speed import DeviceSpeed, measure_speed, roofline, roofline_seconds
from dmir.planning.jobs import CohortSize, cohort_size, used_cohorts
from dmir.planning.plan import Plan, Stage
from dmir.planning.rows import Planner
from dmir.planning.writing import describe
from dmir.training.cost import Cost
from dmir.workflow import Run

ROOT = Path(__file__).parents[1]
SPEED = DeviceSpeed("a device", {"float32": 1.0, "tf32": 1.0, "bf16": 2.0}, bandwidth=10.0)
VOXELMORPH = {"network": {"encoder": [4, 8], "decoder": [8, 8, 4], "integration_steps": 0}}


@pytest.fixture
def small(tmp_path):
    """A configuration with one network, on a grid of 16 x 20 x 24."""
    text = f"""
results: {tmp_path}/results
train_on: simulated
test_on: [simulated, donors]
methods: [affine, syn, elastix, voxelmorph, refined]
seeds: [1, 2]
pairs_per_job: 3
grid: {{shape: [16, 20, 24], spacing: 8.0}}
cohorts:
  simulated: {{source: simulated, train: 3, val: 1, test: 4}}
  donors: {{source: donors}}
training: {{steps: 10, validate_every: 5}}
settings:
  syn: {{iterations: [40, 20], radius: 2}}
  voxelmorph: {{network: {{encoder: [4, 8], decoder: [8, 8, 4], integration_steps: 0}}}}
  refined: {{algorithm: refinement, of: voxelmorph, stages: [{{voxel: 8, steps: 5}}]}}
"""
    path = tmp_path / "config.yaml"
    path.write_text(text)
    return path


@pytest.fixture
def fast(monkeypatch):
    monkeypatch.setattr(planning, "measure_speed", lambda device: SPEED)
    monkeypatch.setattr(planning, "choose_device", lambda device: torch.device("cpu"))


def cost(gflop, moved_gb, kernels=0):
    return Cost(gflop, moved_gb, 0.0, kernels, 0)


def stage(name, number, gpu_s, jobs=1, cpu_s=1.0):
    return Stage(name, "", jobs, number, "step", cpu_s, "scaled", gpu_s, "roofline")


# --- the roofline ---


def test_the_roofline_is_the_larger_of_arithmetic_and_memory():
    assert roofline(cost(4000.0, 10.0), SPEED, "bf16").bound == "arithmetic"
    assert roofline_seconds(cost(4000.0, 10.0), SPEED, "bf16") == 2.0
    found = roofline(cost(1000.0, 30.0), SPEED, "float32")
    assert (found.seconds, found.bound) == (3.0, "memory")


def test_peaks_of_this_machine_are_plausible():
    speed = measure_speed(torch.device("cpu"))
    assert 0.001 < speed.teraflops["float32"] < 100
    assert speed.teraflops["tf32"] == speed.teraflops["float32"]
    assert 0.1 < speed.bandwidth < 10_000


# --- what there is to do ---


def test_without_data_the_split_tells_how_much_there_will_be():
    """The sizes that the published protocol states: 145 scans to 4 atlases, 35 to 5."""
    configuration = read_config(ROOT / "config" / "paper.yaml").model_copy(update={"root": "no such folder"})
    sizes = {name: cohort_size(configuration, name) for name in used_cohorts(configuration)}
    assert sizes["oasis"].scans == {"train": 255, "val": 1, "test": 145, "atlas": 4}
    assert (sizes["oasis"].pairs, sizes["lpba40"].pairs) == (580, 175)
    assert sizes["oasis"].known_from == "split"
    assert "found no such folder" in sizes["oasis"].problem


def test_a_cohort_that_nothing_is_known_of_is_left_out_and_said(tmp_path):
    values = {"train_on": "own", "test_on": ["own"], "methods": ["affine"]}
    table = {"source": "table", "table": str(tmp_path / "scans.csv"), "structures": "lpba56"}
    size = cohort_size(parse_config({**values, "cohorts": {"own": table}}), "own")
    assert (size.total, size.pairs, size.known_from) == (0, 0, "nothing")
    assert "scans.csv" in size.problem


# --- the plan ---


def test_the_plan_counts_what_the_pipeline_does(small, fast):
    found = planning.plan(read_config(small), measured=False)
    rows = found.table().set_index(["stage", "what"])
    assert rows.loc[("preprocess", "simulated"), "jobs"] == 4  # the atlas, and each split
    assert rows.loc[("train", "voxelmorph"), ["jobs", "number"]].tolist() == [2, 20]
    assert rows.loc[("register", "syn on simulated"), ["jobs", "number"]].tolist() == [2, 8]  # there and back
    assert rows.loc[("register", "voxelmorph on donors"), ["jobs", "number"]].tolist() == [4, 10]
    # affine, syn and elastix once, the network and its refinement once a seed
    assert rows.loc[("score", "simulated"), ["jobs", "number"]].tolist() == [2 * 7, 4 * 7]
    assert set(rows.loc["train", "cpu_basis"]) == {"roofline"}
    assert set(rows.loc["score", "cpu_basis"]) == {"constant"}
    network, refined = (rows.loc[("register", f"{name} on simulated")] for name in ("voxelmorph", "refined"))
    assert refined["cpu_s"] > network["cpu_s"]
    assert refined["note"] == "voxelmorph, then at most 5 steps of descent"
    assert found.disk["one field"] == pytest.approx(4 * 3 * 16 * 20 * 24 / 1e9)
    # image float16 and label map int16 of 3 training scans, 1 of val and the atlas
    assert found.disk["stays: images that the trainings share"] == pytest.approx((2 + 2) * 5 * 16 * 20 * 24 / 1e9)


def test_what_was_measured_is_scaled_by_the_roofline(small, fast, monkeypatch):
    """A network that reaches a tenth of the roofline on the small grid is taken to reach it on the whole."""
    configuration = read_config(small)
    settings = configuration.method("voxelmorph")
    whole = network_costs._count_one((settings, (32, 40, 48), "cpu"))
    half = network_costs._count_one((settings, (16, 20, 24), "cpu"))
    answer = {
        "step_s": 10 * roofline_seconds(half.step, SPEED, "float32"),
        "inference_s": 5 * roofline_seconds(half.inference, SPEED, "float32"),
    }
    found = network_costs._scaled(settings, whole, half, answer, SPEED, False)
    assert found.step == pytest.approx(10 * roofline_seconds(whole.step, SPEED, "float32"))
    assert found.inference == pytest.approx(5 * roofline_seconds(whole.inference, SPEED, "float32"))
    assert found.basis == "scaled"
    assert network_costs._scaled(settings, whole, None, {}, SPEED, False).basis == "roofline"


def test_the_grid_to_measure_fits_into_time_and_memory(monkeypatch):
    monkeypatch.setattr(network_costs, "free_memory", lambda device: 10e9)
    shape, cpu = (160, 192, 224), torch.device("cpu")
    assert network_costs._grid_to_measure(shape, 0.01, 1e9, cpu, 10.0) == shape
    assert network_costs._grid_to_measure(shape, 0.01, 15e9, cpu, 10.0) == (120, 144, 168)
    assert network_costs._grid_to_measure(shape, 1.0, 1e9, cpu, 4.0) == (80, 96, 112)
    assert network_costs._grid_to_measure(shape, 1e6, 1e9, cpu, 4.0) == (32, 32, 34)
    assert network_costs._grid_to_measure(shape, 1e6, 1e13, cpu, 4.0) is None


def test_a_job_is_never_divided_among_cards():
    stages = [stage("train", 1, 3600.0), stage("train", 4, 900.0, jobs=4), stage("register", 2, 1800.0, jobs=2)]
    plan = Plan(stages, {}, SPEED, SPEED, threads=1, gpus=2, disk={})
    assert plan.gpu_wall_hours() == pytest.approx(1.0 + 0.5)  # 1 h beside 4 x 1/4 h; then 2 x 1/2 h side by side
    alone = Plan(stages, {}, SPEED, SPEED, threads=1, gpus=1, disk={})
    assert alone.gpu_wall_hours() == pytest.approx(1.0 + 1.0 + 1.0)
    many = Plan(stages, {}, SPEED, SPEED, threads=1, gpus=100, disk={})
    assert many.gpu_wall_hours() == pytest.approx(1.0 + 0.5)  # the longest training bounds it


def test_syns_work_halves_its_grid_from_level_to_level():
    assert syn.voxel_iterations((8, 8, 8), [160, 80, 40]) == 512 * (160 / 64 + 80 / 8 + 40)


@pytest.mark.parametrize(
    ("kind", "request_"),
    [
        ("score", {"structures": "tissue3", "interpolations": ["nearest"], "shape": (12, 14, 16)}),
        (
            "network",
            {"algorithm": "voxelmorph", "hyperparameters": VOXELMORPH["network"], "shape": (16, 16, 16)}
            | {"training": {"similarity": "mse", "gpus": 1}, "device": "cpu", "seconds": 0.1},
        ),
    ],
)
def test_a_short_run_gives_positive_seconds(kind, request_):
    found = trial.KINDS[kind](**request_, threads=1)
    assert found
    assert all(seconds > 0 for seconds in found.values())


# --- what the user reads ---


def test_the_command_prints_table_totals_and_notes(small, fast, capsys, tmp_path):
    out = tmp_path / "plan.csv"
    assert cli.main(["plan", str(small), "--no-measure", "--gpus", "2", "--out", str(out)]) == 0
    printed = capsys.readouterr().out
    assert "cohorts.simulated: 1 atlas, 3 train, 1 val, 4 test scans; 4 pairs to register" in printed
    # the atlas and three splits, of the donors the atlas and the others; a network and two seeds;
    # three methods once and two a seed, on two shards of each cohort
    assert "jobs: preprocess 6, train 2, register 28, score 28; 64 in all" in printed
    assert "GPU-hours, trainings and registrations: at least" in printed
    assert "stays: preprocessed scans" in printed
    assert "GPU: none at hand; the GPU's columns are lower bounds" in printed
    assert "networks on 2 such cards: at least" in printed
    assert list(pd.read_csv(out)["stage"].unique()) == ["preprocess", "train", "register", "score"]


def test_a_network_has_its_own_seeds(small, fast, capsys):
    other = "voxelmorph: {seeds: [4, 5, 6, 7], network"
    small.write_text(small.read_text().replace("voxelmorph: {network", other))
    configuration = read_config(small)
    assert configuration.models_of("voxelmorph") == configuration.models_of("refined") == [f"seed{n}" for n in "4567"]
    assert cli.main(["plan", str(small), "--no-measure"]) == 0
    # three methods once and two four times, on two shards of each cohort
    assert "train 4, register 44, score 44" in capsys.readouterr().out


def test_what_a_training_depends_on_are_not_its_seeds(small):
    without = read_config(small)
    small.write_text(small.read_text().replace("voxelmorph: {network", "voxelmorph: {seeds: [3], network"))
    assert Run(read_config(small)).settings_as_json("voxelmorph") == Run(without).settings_as_json("voxelmorph")


def test_json_holds_everything(small, fast, capsys):
    assert cli.main(["plan", str(small), "--no-measure", "--json"]) == 0
    content = json.loads(capsys.readouterr().out)
    assert content["device"]["device"] == "a device"
    assert {row["cpu_basis"] for row in content["stages"]} == {"constant", "roofline"}


def test_a_pair_that_takes_longer_than_its_limit_is_a_note():
    size = CohortSize({"test": 1, "atlas": 1}, 1, 1, "data")
    paper = read_config(ROOT / "config" / "paper.yaml")
    configuration = paper.model_copy(update={"timeout_minutes": 100})
    cpu = torch.device("cpu")
    planner = Planner(configuration, {"oasis": size}, {}, {}, SPEED, SPEED, cpu, threads=1, budget=0.0)
    found = [planner._classical("syn", "oasis", size)]
    assert found[0].cpu_s > 6000
    text = describe(Plan(found, {}, SPEED, SPEED, 1, 1, {}, planner.notes(found)))
    assert "more than timeout_minutes (100) allows; its levels may converge before" in text


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--out", "plan.txt"], "a name in .csv or .md"),
        (["--gpus", "0"], "--gpus: found 0"),
        (["--seconds", "0"], "0.0"),
    ],
)
def test_what_cannot_be_planned_is_refused_before_anything_is_measured(small, capsys, arguments, message):
    assert cli.main(["plan", str(small), *arguments]) == 1
    assert message in capsys.readouterr().err
