"""What the rules ask for, without Snakemake: paths, inputs, parameters, resources, code, tables and figures."""

import inspect
import json
import re
import subprocess
import sys
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace

import pytest
from workflow_runs import SMALL, checkout, snakemake

from dmir import provenance
from dmir.config import parse_config
from dmir.errors import DmirError, InputError
from dmir.planning import quota
from dmir.planning.batches import scans_per_batch
from dmir.provenance import imported_modules
from dmir.report import making
from dmir.report.products import PRODUCTS, Product, product, rules
from dmir.workflow import Run
from dmir.workflow.paths import Paths
from dmir.workflow.products import code_of
from dmir.workflow.resources import growing

ROOT = Path(__file__).parents[1]
SPLITS = {"a": "train", "b": "train", "c": "val", "d": "test", "e": "test", "f": "test", "t": "atlas"}
OWN = {"source": "table", "table": "own/scans.csv", "structures": "oasis28"}
TWIN = {**OWN, "split": "twin.csv"}
FINE = {"algorithm": "refinement", "of": "caml"}
WILDCARDS = ("cohort", "scan", "method", "model", "shard", "moving", "fixed")


def at(**names):
    """A job's wildcards, as Snakemake gives them: attributes."""
    return SimpleNamespace(**names)


def write_table(folder, splits, **columns):
    """Write a table of scans with empty files, which nothing here reads."""
    folder.mkdir(exist_ok=True)
    header = ["scan", "subject", "split", "image", "labels", *columns]
    lines = [",".join(header)]
    for name, split in splits.items():
        for kind in ("image", "labels"):
            (folder / f"{name}-{kind}.nii.gz").touch()
        own = [str(column.get(name, "")) for column in columns.values()]
        lines.append(",".join([name, name, split, f"{name}-image.nii.gz", f"{name}-labels.nii.gz", *own]))
    (folder / "scans.csv").write_text("\n".join(lines) + "\n")


def configuration(folder, **changes):
    """A cohort of seven scans, a simulated one, a classical method, two networks and a refinement, and both studies."""
    values = {
        "root": str(folder),
        "train_on": "own",
        "test_on": ["own"],
        "methods": ["affine", "syn", "descent", "voxelmorph", "caml", "fine"],
        "pairs_per_job": 2,
        "seeds": [1, 2],
        "grid": {"shape": [32, 40, 32], "spacing": 6.0},
        "cohorts": {
            "own": OWN,
            "sim": {"source": "simulated", "train": 1, "val": 1, "test": 2},
        },
        "settings": {"fine": FINE},
        "ablation": {"switches": ["rbsc"]},
        "lambda_study": {"methods": ["voxelmorph"], "values": [1.0, 4.0]},
    }
    return parse_config({**values, **changes})


@pytest.fixture
def make_run(tmp_path):
    write_table(tmp_path / "own", SPLITS)
    return lambda **changes: Run(configuration(tmp_path, **changes))


@pytest.fixture
def run(make_run):
    return make_run()


# --- without Snakemake ---


def test_neither_snakemake_nor_what_a_jobs_start_has_no_time_for_is_imported():
    """Every job reads the Snakefile again, and so imports this package before its own work."""
    heavy = ("snakemake", "torch", "matplotlib", "lightning", "ants", "SimpleITK")
    code = f"import sys, dmir.workflow, dmir.workflow.session; print([m for m in {heavy} if m in sys.modules])"
    printed = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout
    assert printed.strip() == "[]"


# --- paths ---


def path_methods():
    return [(name, method) for name, method in inspect.getmembers(Paths, inspect.isfunction) if name[0] != "_"]


def test_a_path_is_its_pattern_with_the_names_put_in():
    names = {name: f"the-{name}" for name in WILDCARDS}
    found = 0
    for name, method in path_methods():
        parameters = list(inspect.signature(method).parameters)[1:]
        open_ones = [parameter for parameter in parameters if parameter in WILDCARDS]
        others = {parameter: "x" for parameter in parameters if parameter in ("file", "kind")}
        pattern = getattr(Paths("<results>"), name)(**others)
        path = getattr(Paths("some/where"), name)(**others, **{key: names[key] for key in open_ones})
        assert pattern.startswith("<results>/")
        if open_ones:
            assert path == pattern.replace("<results>", "some/where").format(**names), name
            found += 1
    assert found >= 8


def test_no_two_kinds_of_results_share_a_path():
    patterns = [
        getattr(Paths("r"), name)(*["file"] * ("file" in inspect.signature(method).parameters))
        for name, method in path_methods()
        if "kind" not in inspect.signature(method).parameters
    ]
    assert len({re.sub(r"{\w+}", "*", pattern) for pattern in patterns}) == len(patterns)


def test_scores_and_provenance_of_a_study_stand_beside_those_of_the_comparison():
    paths = Paths("r")
    assert paths.scores("pairs.parquet") == "r/scores/pairs.parquet"
    assert paths.scores("pairs.parquet", "ablation") == "r/scores/ablation.pairs.parquet"
    assert (paths.provenance(), paths.provenance("ablation")) == ("r/provenance/run.json", "r/provenance/ablation.json")


def test_rules_hold_no_path_of_their_own():
    """What is under results/ is written in paths.py; logs and benchmarks have Snakemake's own places."""
    for path in [ROOT / "Snakefile", *(ROOT / "rules").glob("*.smk")]:
        assert "<results>/" not in path.read_text().replace('logs="<results>/logs"', "").replace(
            'benchmarks="<results>/benchmarks"', ""
        ), path


# --- scans, pairs, shards and their inputs ---


def test_every_pair_is_in_one_shard_and_its_job_reads_its_scans_alone(run):
    assert run.pairs["own"] == [("d", "t"), ("e", "t"), ("f", "t")]
    members = run.shards_of("own", "syn")
    assert members == {"shard000": [("d", "t"), ("e", "t")], "shard001": [("f", "t")]}
    first = at(cohort="own", method="syn", model="none", shard="shard000")
    assert run.images_of_shard(first) == [f"results/preprocessed/own/{scan}/image.nii.gz" for scan in ("d", "t", "e")]
    assert run.labels_of_shard(first) == [path.replace("image", "labels") for path in run.images_of_shard(first)]
    assert run.pairs_of_shard(first) == run.registered_pairs(first) == [["d", "t"], ["e", "t"]]
    for pair, shard in run.shard_of_pair("own", "syn").items():
        assert pair in members[shard]


def test_pairs_of_a_simulated_cohort_are_registered_both_ways_and_know_their_truth(make_run):
    run = make_run(test_on=["sim"], train_on="sim", pairs_per_job=None)
    job = at(cohort="sim", method="syn", model="none", shard="shard000")
    forward = run.pairs_of_shard(job)
    assert run.registered_pairs(job) == [*forward, *([fixed, moving] for moving, fixed in forward)]
    moving, fixed = forward[0]
    assert run.truths_of_pair(at(cohort="sim", moving=moving, fixed=fixed)) == [
        f"results/preprocessed/sim/{moving}/truth.nii.gz"
    ]
    once = make_run(test_on=["sim"], train_on="sim", pairs_per_job=None, scores={"inverse_consistency": False})
    assert once.registered_pairs(job) == forward


def batches(run, cohort):
    return {batch.name: batch for batch in run.batches if batch.cohort == cohort}


def test_a_batch_is_aligned_to_its_cohorts_reference_and_the_reference_to_nothing(run):
    own = batches(run, "own")
    assert own["reference"].scans == ("t",) and run.reference_of_batch(own["reference"]) == []
    files = run.reference_of_batch(own["test000"])
    assert [Path(path).name for path in files] == ["image.nii.gz", "labels.nii.gz", "affine.mat", "quality.json"]
    assert {Path(path).parent.name for path in files} == {"t"}


def test_a_batch_has_scans_of_one_split_and_one_that_is_added_touches_no_other_split(make_run, tmp_path):
    before = batches(make_run(scans_per_job=2), "own")
    assert {name: "".join(batch.scans) for name, batch in before.items()} == {
        **{"reference": "t", "train000": "ab", "val000": "c", "test000": "de", "test001": "f"},
    }
    write_table(tmp_path / "own", {**SPLITS, "g": "test"})
    after = batches(make_run(scans_per_job=2), "own")
    assert {name for name in after if after[name] != before[name]} == {"test001"}
    write_table(tmp_path / "own", {f"s{k:02d}": "test" for k in range(40)} | SPLITS)
    sizes = [len(batch.scans) for name, batch in batches(make_run(), "own").items() if name.startswith("test")]
    assert sum(sizes) == 43 and max(sizes) == scans_per_batch(make_run().configuration, "own") == sizes[0] > 10


def test_a_batchs_files_are_those_of_its_scans_and_a_simulated_scan_has_its_truth(make_run):
    run = make_run(test_on=["own", "sim"])
    own, simulated = batches(run, "own"), batches(run, "sim")
    assert [Path(path).name for path in run.files_of_batch(own["val000"])] == ["c-image.nii.gz", "c-labels.nii.gz"]
    assert {batch.cohort for batch in run.batches_made} == {"sim"}
    for batch in simulated.values():
        made = {path.removeprefix("<results>/") for path in run.made_files(batch)}
        assert made == {path.removeprefix("results/") for path in run.files_of_batch(batch)}
        truths = {path for path in run.preprocessed_files(batch) if path.endswith("truth.nii.gz")}
        assert len(truths) == (0 if batch.name == "reference" else len(batch.scans))
    assert run.made_scans(simulated["test000"]) == {"sub-003": {}, "sub-004": {}}


def test_a_training_reads_no_test_scan(run):
    job = at(cohort="own", method="caml", model="seed1")
    assert [Path(path).parent.name for path in run.training_images(job)] == ["a", "b", "c", "t"]
    assert run.training_splits(job) == {"a": "train", "b": "train", "c": "val", "t": "atlas"}
    assert run.quality_for_training(job) == []


def test_quality_is_read_where_it_decides_who_takes_part(make_run):
    run = make_run(preprocess={"flagged": "leave_out"})
    job = at(cohort="own", method="syn", model="none", shard="shard001")
    assert run.quality_of_shard(job) == [f"results/preprocessed/own/{scan}/quality.json" for scan in ("f", "t")]
    assert len(run.quality_for_training(job)) == 4
    assert "flagged" not in run.preprocess_settings("own")


def test_a_refinement_registers_with_the_weights_of_what_it_refines(run):
    weights = {name: run.weights_of_method(at(method=name, model="seed2")) for name in ("caml", "fine")}
    assert set(weights.values()) == {"results/models/own/caml/seed2/model.safetensors"}
    assert run.refinement_of_method(at(method="caml")) == {} != run.refinement_of_method(at(method="fine"))


def test_every_registration_is_scored_once_and_a_studys_apart(run):
    every = run.pair_scores(at())
    assert len(every) == len(set(every)) == 2 * (3 + 3 * 2)  # shards, of three methods and of three with two seeds
    assert [path.replace("registered", "scores") for path in run.records_of_comparison()] == [
        path.replace(".pairs.parquet", ".csv") for path in every
    ]
    study = run.pair_scores(at(study="ablation"))
    assert {path.split("/")[3] for path in study} == {"caml", "caml-without-rbsc"}
    assert {path.split("/")[3] for path in run.weights_of_scores(at())} == {"voxelmorph", "caml"}


def test_examples_are_of_the_first_seed_and_of_the_shard_that_holds_their_pair(run):
    first = at(cohort="own", method="caml", model="seed1", shard="shard000")
    assert run.kept_examples(first)["pairs"] == [["d", "t"]]
    assert run.images_of_examples(first) == ["results/preprocessed/own/d/image.nii.gz"]
    for other in ({"model": "seed2", "shard": "shard000"}, {"model": "seed1", "shard": "shard001"}):
        job = at(cohort="own", method="caml", **other)
        assert run.kept_examples(job) == {} and run.images_of_examples(job) == []
        assert run.scoring_memory(job, 2) < run.scoring_memory(first, 2)
    names = at(cohort="own", method="caml", model="seed1", moving="d", fixed="t")
    assert "results/registered/own/caml/seed1/examples-shard000" in run.examples(names)
    assert len(run.examples(names)) == len(run.configuration.methods)


def test_without_a_quota_nothing_waits_and_with_one_each_waits_for_a_place(make_run):
    job = at(cohort="own", method="syn", model="none", shard="shard001")
    assert make_run().turn_of_shard(job) is None
    unbounded = make_run(methods=["affine", "syn"])
    staying = sum(quota.staying_bytes(unbounded.configuration, unbounded.sizes).values())
    fields_of_a_pair = 12 * unbounded.voxels
    tight = make_run(methods=["affine", "syn"], disk_quota_gb=(staying + 2.5 * fields_of_a_pair) / 1e9)
    turns = [tight.turn_of_shard(at(cohort="own", method=m, model="none", shard=s)) for m, s in PLACES]
    assert turns[0] is None and all(turns[1:])
    assert turns[1] == "results/scores/own/affine/none/shard000.pairs.parquet"
    assert turns[2] == "results/scores/own/affine/none/shard001.pairs.parquet"


PLACES = [("affine", "shard000"), ("affine", "shard001"), ("syn", "shard000"), ("syn", "shard001")]


def test_wildcards_match_what_there_is_and_the_longest_cohort_first(make_run, tmp_path):
    other = {name + "2": split for name, split in SPLITS.items()}
    write_table(tmp_path / "second", other)
    cohorts = {
        name: {"source": "table", "table": f"{folder}/scans.csv", "structures": "oasis28"}
        for name, folder in (("own", "own"), ("own_b", "second"))
    }
    constraints = make_run(cohorts=cohorts, test_on=["own", "own_b"]).constraints
    assert re.match(constraints["cohort"], "own_b_x")[0] == "own_b"
    for name in ("syn", "caml-without-rbsc", "voxelmorph-lambda-4"):
        assert re.fullmatch(constraints["method"], name)
    assert not re.fullmatch(constraints["method"], "elastix")
    assert not re.fullmatch(constraints["scan"], "../x") and not re.fullmatch(constraints["model"], "seed")


def test_methods_that_take_a_card_are_told_from_those_that_do_not(run):
    assert run.without_weights(card=False) == ["affine", "syn"]
    assert run.without_weights(card=True) == ["descent"]


# --- parameters ---


def parameters(run):
    """Return rule -> what its jobs are given, as far as it depends on one method or scan."""
    methods = run.configuration.methods
    return {
        **{f"register {m}": run.parameters_of_method(at(method=m)) for m in methods if run.network_of(m) is None},
        **{f"train {m}": run.training_settings(at(method=m)) for m in run.networks},
        **{f"weights {m}": run.expected_weights(at(method=m)) for m in methods if run.network_of(m)},
        **{f"refine {m}": run.refinement_of_method(at(method=m)) for m in methods if run.network_of(m)},
        "preprocess": run.preprocess_settings("own"),
        "scores": run.numbers_hash(at()),
    }


@pytest.mark.parametrize(
    ("changes", "expected"),
    [
        ({"settings": {"syn": {"iterations": [1]}, "fine": FINE}}, {"register syn"}),
        ({"settings": {"fine": {**FINE, "noise": 0.1}}}, {"refine fine"}),
        ({"training": {"steps": 7}}, {"train voxelmorph", "train caml"}),
        ({"training": {"gpus": 2, "batch_size": 2}}, {"train voxelmorph", "train caml"}),
        ({"preprocess": {"lower": 1.0}}, {"preprocess"}),
        ({"timeout_minutes": 5}, set()),
        ({"keep_fields": True}, None),
    ],
)
def test_a_key_changes_the_parameters_of_what_it_concerns(make_run, changes, expected):
    before, after = parameters(make_run()), parameters(make_run(**changes))
    changed = {name for name in before if json.dumps(before[name]) != json.dumps(after[name])}
    assert changed == (set() if expected is None else {*expected, "scores"})


def test_how_many_cards_share_a_training_does_not_make_another_one(make_run):
    job = at(method="caml")
    one, two = (make_run(training={"batch_size": 2, "gpus": gpus}) for gpus in (1, 2))
    assert one.training_settings(job) == two.training_settings(job)
    assert (one.training_gpus(job), two.training_gpus(job)) == (1, 2)


def test_axes_are_stated_of_files_and_not_of_what_a_job_has_made(make_run):
    cohorts = {
        "own": {**OWN, "orientation": "LPS"},
        "sim": {"source": "simulated", "train": 1, "val": 1, "test": 2, "orientation": "LPS"},
    }
    run = make_run(cohorts=cohorts, test_on=["own", "sim"])
    axes = {name: run.preprocessed_scans(batches(run, name)["test000"]).values() for name in ("own", "sim")}
    assert {name: {its["orientation"] for its in scans} for name, scans in axes.items()} == {
        **{"own": {"LPS"}, "sim": {None}},
    }


# --- resources ---


def test_resources_grow_with_the_attempt_and_the_pairs(run):
    assert [growing(500)(at(), attempt) for attempt in (1, 2, 3)] == [500, 1000, 1500]
    long, short = (at(cohort="own", method="syn", model="none", shard=f"shard00{k}") for k in (0, 1))
    assert run.classical_runtime(long, 1) == 60 + 2 * 120
    assert run.classical_runtime(short, 2) == 2 * (60 + 120)


def test_memory_grows_with_the_grid_and_the_scores(make_run):
    small, large = make_run(), make_run(grid={"shape": [160, 192, 224]})
    drawn, listed = product("contours"), product("failures_table")
    assert large.memory_of(drawn) - small.memory_of(drawn) == large.voxels // 3000 - small.voxels // 3000 > 0
    assert large.memory_of(listed) == small.memory_of(listed)
    many = make_run(seeds=list(range(90)))
    assert many.memory_of(product("comparison_table")) - small.memory_of(product("comparison_table")) > 10


def test_trainings_share_the_cores_of_a_machine(make_run):
    run = make_run()  # two networks, two seeds
    assert [run.training_threads(cores) for cores in (1, 4, 16, 64, None)] == [1, 1, 4, 8, 2]
    assert make_run(seeds=[1]).training_threads(4) == 2


def test_threads_are_a_methods_own_where_its_result_depends_on_them(make_run):
    run = make_run(methods=["elastix", "syn"], settings={"elastix": {"threads": 3}})
    assert [run.method_threads(at(method=name)) for name in ("elastix", "syn")] == [3, 1]


# --- code ---


@pytest.fixture
def change(monkeypatch):
    """A function after which a module counts as changed, and all others as they were."""
    meaning = provenance._meaning

    def changed(module):
        monkeypatch.setattr(provenance, "_meaning", lambda path: meaning(path) + "x" * (path == module))
        provenance.code_hash.cache_clear()

    yield changed
    monkeypatch.undo()
    provenance.code_hash.cache_clear()


def hashes(run):
    """Return job -> the hash of its code, as a run that begins now finds it."""
    run.code_of_method.cache_clear()
    return {
        **{f"register {m}": run.method_code(at(method=m)) for m in run.configuration.methods},
        **{f"train {m}": run.network_code(at(method=m)) for m in run.networks},
        **{f"make {c}": run.making_code(c) for c in ("own", "sim")},
        "provenance": run.scoring_code(at())["hash"],
        **{its.name: code_of(its)["hash"] for its in PRODUCTS},
    }


@pytest.mark.parametrize(
    ("module", "expected"),
    [
        ("networks/caml.py", {"register caml", "register fine", "train caml", "provenance"}),
        ("networks/voxelmorph.py", {"register voxelmorph", "train voxelmorph", "provenance"}),
        ("methods/syn.py", {"register syn", "provenance"}),
        ("methods/refinement.py", {"register fine", "provenance"}),
        ("cohorts/simulated.py", {"make sim", "provenance"}),
        ("report/topology.py", {"topology_table"}),
        ("report/age.py", {"dice_against_age"}),
        ("report/products.py", set()),
        ("report/making.py", set()),
        ("workflow/facts.py", set()),
        ("planning/quota.py", set()),
    ],
)
def test_a_changed_module_reruns_what_it_concerns_and_nothing_else(make_run, change, module, expected):
    run = make_run(test_on=["own", "sim"])
    before = hashes(run)
    change(provenance.ROOT / module)
    after = hashes(run)
    assert {name for name in before if before[name] != after[name]} == expected


def another(files, params, names):
    return files.pairs


def test_a_products_function_is_part_of_its_code_and_of_no_others(monkeypatch):
    before = {p.name: code_of(p)["hash"] for p in PRODUCTS}

    def changed():
        return {p.name for p in PRODUCTS if code_of(p)["hash"] != before[p.name]}

    with monkeypatch.context() as patch:
        patch.setattr(making, "failures_table", another)
        assert changed() == {"failures_table"}
    with monkeypatch.context() as patch:
        patch.setattr(making, "registered_examples", another)
        assert changed() == {"qualitative", "contours"}
    assert changed() == set()


def test_a_studys_scores_depend_on_its_own_methods(run):
    comparison, study = (set(run.scoring_code(job)["modules"]) for job in (at(), at(study="lambda_study")))
    assert {"dmir.methods.syn", "dmir.methods.refinement", "dmir.networks.caml"} <= comparison
    assert "dmir.networks.voxelmorph" in study and not {"dmir.methods.syn", "dmir.networks.caml"} & study


# --- tables and figures ---


def test_what_is_made_follows_from_what_is_compared(make_run, tmp_path):
    run = make_run()
    assert run.tables() == [
        *("comparison", "statistics_own", "topology", "dice_by_structure_own", "trainings_own", "preprocessing"),
        *("failures", "structures_own"),
    ]
    assert run.figures() == [
        *("dice_by_structure_own", "critical_difference_own", "dice_against_time_own", "dice_against_folding_own"),
        *("qualitative_own_d__t", "contours_own_d__t", "training_curves_own"),
    ]
    write_table(tmp_path / "own", SPLITS, age={"d": 30, "e": 40})
    more = make_run(methods=["affine", "syn"], test_on=["own", "sim"], report={"examples": 2})
    assert "cross_cohort" in more.tables() and "trainings_own" not in more.tables()
    assert [name for name in more.figures() if "age" in name] == ["dice_against_age_own", "dice_against_age_sim"]
    assert [name for name in more.figures() if name.startswith(("qualitative_own", "contours_own"))] == [
        *("qualitative_own_d__t", "contours_own_d__t", "qualitative_own_e__t", "contours_own_e__t")
    ]


def test_published_figures_are_shown_where_there_are_any(make_run, tmp_path):
    for name in ("S01", "S02"):
        folder = tmp_path / "lpba" / "delineation_space" / name
        folder.mkdir(parents=True)
        for kind in ("skullstripped", "structure.label"):
            (folder / f"{name}.delineation.{kind}.nii.gz").touch()
    (tmp_path / "lpba.csv").write_text("scan,split\nS01,atlas\nS02,test\n")
    cohorts = {"own": OWN, "lpba": {"source": "lpba40", "folder": "lpba", "split": "lpba.csv"}}
    assert "published" in make_run(cohorts=cohorts, test_on=["own", "lpba"]).tables()
    assert "published" not in make_run(cohorts=cohorts).tables()


@pytest.mark.parametrize("its", PRODUCTS, ids=lambda its: its.name)
def test_an_entry_is_complete(run, its):
    function = getattr(making, its.name)
    assert list(inspect.signature(function).parameters) == ["files", "params", "names"]
    source = inspect.getsource(function)
    assert set(re.findall(r"\bfiles\.(\w+)", source)) <= {*its.needs}
    assert set(re.findall(r"\bparams\.(\w+)", source)) == {*its.params} - (
        {*re.findall(r"{(\w+)}", str(its.caption))} - set(re.findall(r"\bparams\.(\w+)", source))
    )
    imported = set(re.findall(r"from (dmir\.report\.\w+) import", source)) - {"dmir.report.examples"}
    assert imported <= imported_modules(*its.modules)
    assert its.needs and set(run.needs_of(its)) == {*its.needs, "provenance"}
    assert set(run.params_of(its)) == {*its.params, "code"}
    assert (ROOT / "workflow" / "report" / f"{its.text}.rst").is_file()


def test_products_differ_in_name_and_files():
    names = [its.name for its in PRODUCTS]
    files = [file for its in PRODUCTS for file in its.files]
    assert len(set(names)) == len(names) and len(set(files)) == len(files)


def test_logs_have_a_folder_for_each_wildcard_and_pairs_stay_together():
    logs = {name: product(name).log for name in ("comparison_table", "statistics_table", "study_table", "qualitative")}
    assert list(logs.values()) == [
        *("comparison_tables", "cohort_products/{cohort}", "study_table/{study}"),
        "pictures/{cohort}/{moving}__{fixed}",
    ]


def test_kin_are_of_the_same_and_a_rule_makes_those_that_there_are(run):
    assert {len(kin) for kin in rules().values()} > {1}
    for kin in rules().values():
        assert len({(tuple(its.wildcards), its.study) for its in kin}) == 1
        made = {file.split("{")[0] for its in kin for file in its.files}
        needed = [str(path).replace("<results>/", "") for path in run.needs_of(*kin).values()]
        assert not [path for path in needed if path.split("{")[0] in made]
    assert [its.name for its in run.product_rules()["comparison_tables"]] == [
        *("comparison_table", "topology_table", "failures_table")
    ]  # nothing is published on this cohort


def test_what_kin_need_and_are_given_is_what_each_needs_and_is_given(run):
    kin = rules()["pictures"]
    assert set(run.needs_of(*kin)) == {name for its in kin for name in run.needs_of(its)}
    assert set(run.params_of(*kin)) == {name for its in kin for name in run.params_of(its)}
    assert set(run.params_of(*kin)["code"]) == {"qualitative", "contours"}
    assert run.memory_of(*kin) == max(map(run.memory_of, kin))


def test_a_studys_table_and_figure_have_its_own_words_and_scores(run):
    table, figure = product("study_table"), product("ablation_figure")
    assert table.caption_for("ablation") != table.caption_for("lambda_study")
    assert run.needs_of(table)["pairs"] == "<results>/scores/{study}.pairs.parquet"
    assert run.needs_of(figure) == {
        "study": "<results>/tables/ablation.csv",
        "provenance": "<results>/provenance/ablation.json",
    }
    assert {Path(path).parts[3] for path in run.summaries(at(study="ablation"))} == {"caml", "caml-without-rbsc"}


def test_a_studys_results_are_on_the_page_once_they_are_there(make_run, tmp_path):
    run = make_run(results=str(tmp_path / "results"))
    assert run.page_params()["tables"] == run.tables()
    paths = run.paths
    for path in (paths.table("ablation.html"), paths.figure("ablation.svg"), paths.table("lambda_study.html")):
        Path(path).parent.mkdir(parents=True, exist_ok=True)
        Path(path).touch()
    assert run.finished_studies() == ["ablation"]
    assert run.page_params()["figures"] == [*run.figures(), "ablation"]
    assert not any("ablation" in path for path in run.page_files()["tables"])


def test_a_title_and_a_place_on_the_page_come_with_the_entry():
    places = {"folder": "tables", "pattern": "my_{cohort}"}
    its = Product(name="my_table", **places, needs=("pairs",), modules=(), title="Mine", label="mine")
    assert its.titles == {"my": "Mine"} and its.labels == {"table": "mine", "cohort": "{cohort}"}
    assert its.files[0] == "tables/my_{cohort}.html" and its.log == "my_table/{cohort}"
    assert replace(its, folder="figures").files[0] == "figures/my_{cohort}.svg"


def test_making_writes_every_file_with_its_caption_and_what_it_was_made_from(run, tmp_path):
    its = product("structure_table")
    record = {key: {} for key in ("configuration", "code", "data", "weights")} | {"modules": []}
    (tmp_path / "provenance").mkdir()
    record_file = tmp_path / "provenance" / "run.json"
    record_file.write_text(json.dumps(record))
    files = at(structure_set=run.structure_set_file(at(cohort="own")), provenance=str(record_file), pairs="of kin")
    outputs = [str(tmp_path / file.format(cohort="own.b")) for file in its.files]
    (tmp_path / "tables").mkdir()
    params = at(structures="oasis28", code={its.name: code_of(its)})
    making.make(files, params, at(cohort="own.b"), outputs)
    assert all(Path(path).stat().st_size for path in outputs) and len(outputs) == 5
    assert Path(outputs[2]).read_text().startswith("Structures of own.b (oasis28).\n")
    sidecar = json.loads(Path(outputs[4]).read_text())
    assert list(sidecar["inputs"]) == ["oasis28.csv"] and sidecar["modules"] == sorted(its.modules)


def test_kin_that_fail_are_told_by_their_names_and_the_others_are_made(run, tmp_path, capsys):
    first, second, third = (product(name) for name in ("topology_table", "structure_table", "failures_table"))
    record = {key: {} for key in ("configuration", "code", "data", "weights")} | {"modules": []}
    (tmp_path / "run.json").write_text(json.dumps(record))
    files = at(
        structures="none.parquet",
        pairs="nor.parquet",
        structure_set=run.structure_set_file(at(cohort="own")),
        provenance=str(tmp_path / "run.json"),
    )
    outputs = [str(tmp_path / file.format(cohort="own")) for its in (first, second, third) for file in its.files]
    (tmp_path / "tables").mkdir()
    params = at(structures="oasis28", methods=["syn"], code={its.name: code_of(its) for its in (first, second, third)})
    with pytest.raises(DmirError) as refused:
        making.make(files, params, at(cohort="own"), outputs)
    told = str(refused.value).splitlines()
    assert [line.split(": ")[:2] for line in told] == [
        ["topology_table", "none.parquet"],
        ["Error", "failures_table"],
    ]
    assert {path.name for path in (tmp_path / "tables").iterdir()} == {Path(path).name for path in outputs[5:10]}
    assert capsys.readouterr().out.split() == ["topology_table", "structure_table", "failures_table"]


NEW_ENTRY = """
    _table(
        name="pairs_table",
        pattern="pairs_{cohort}",
        of="cohort",
        needs=("pairs",),
        modules=(_WRITING,),
        title="Pairs",
        caption="Pairs of {cohort}.",
        label="pairs",
    ),
)
"""
NEW_FUNCTION = '''

def pairs_table(files: Files, params: Asked, names: Asked) -> pd.DataFrame:
    """List the pairs."""
    from dmir.tables import read_scores

    return read_scores(files.pairs, names.cohort)[["moving", "fixed"]]
'''


@pytest.mark.pipeline
def test_a_table_is_an_entry_and_a_function(tmp_path):
    folder = checkout(tmp_path, SMALL)
    products, functions = (folder / "src" / "dmir" / "report" / f"{name}.py" for name in ("products", "making"))
    registry = products.read_text()
    assert registry.count("\n)\n") == 1
    products.write_text(registry.replace("\n)\n", NEW_ENTRY))
    functions.write_text(functions.read_text() + NEW_FUNCTION)
    assert "pairs_table" in snakemake(folder, "--list-rules").split()
    text = snakemake(folder, "report_all", "-n")
    assert re.search(r"^pairs_table +1$", text, re.MULTILINE)
    assert "results/tables/pairs_simulated.tex" in text and "results/logs/pairs_table/simulated.log" in text


# --- bad input ---


@pytest.mark.parametrize(
    ("changes", "where", "said"),
    [
        ({"cohorts": {"own": {**OWN, "table": "none.csv"}}}, "none.csv", "no such"),
        ({"cohorts": {"own": {**OWN, "reference": "x"}}}, "reference", "'x'"),
        ({"disk_quota_gb": 0.001}, "disk_quota_gb", "at least"),
        ({"test_on": ["own", "twin"], "cohorts": {"own": OWN, "twin": TWIN}}, "cohorts.twin", "trained on in own"),
    ],
)
def test_bad_input_is_one_message_that_names_its_place(make_run, tmp_path, changes, where, said):
    (tmp_path / "twin.csv").write_text("scan,split\na,test\nt,atlas\n")
    with pytest.raises(InputError) as refused:
        make_run(**changes)
    assert where in refused.value.where and said in str(refused.value)
