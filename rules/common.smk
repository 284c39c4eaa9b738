# What every stage knows: the checked configuration, the scans, the pairs and their shards.
import os
import re
import shlex
import shutil
import subprocess
import sys
from functools import cache
from math import ceil
from pathlib import Path

import yaml

# the library of this checkout, here and in every job, whatever environment a job runs in
sys.path.insert(0, str(Path(workflow.basedir) / "src"))
os.environ.update(PYTHONPATH=str(Path(workflow.basedir) / "src"))

from snakemake.exceptions import WorkflowError
from snakemake.io import flag

from dmir.cohorts import (
    SOURCES,
    check_pairs,
    check_unseen,
    default_orientation,
    reference_scan,
    scan_table,
)
from dmir.cohorts.pairs import registration_pairs
from dmir.config import CLASSICAL, Refinement, parse_config
from dmir.config.reading import read_yaml
from dmir.errors import DmirError
from dmir.planning import quota, shards
from dmir.planning.costs import voxels_of
from dmir.planning.jobs import size_of_table
from dmir.provenance import code_hash, code_record, file_hash, value_hash
from dmir.report.published import DATASETS, published_folder
from dmir.report.records import ages_known
from dmir.structures import structures_folder
from dmir.volumes import atomic_path

# what the report says it was made by; jobs, which read this file again, have both from the first process
os.environ.setdefault("DMIR_COMMAND", shlex.join(["snakemake", *sys.argv[1:]]))


def revision():
    """Return what git says of this checkout; nothing without git, or where it is no clone."""
    git = shutil.which("git")
    if git is None:
        return ""
    describe = [git, "-C", workflow.basedir, "describe", "--always", "--dirty"]
    return subprocess.run(describe, capture_output=True, text=True).stdout.strip()


if "DMIR_REVISION" not in os.environ:
    os.environ.update(DMIR_REVISION=revision())


def checked(function, *arguments, **parameters):
    """Call a function; a user's mistake ends the workflow with its message alone."""
    try:
        return function(*arguments, **parameters)
    except DmirError as error:
        print(f"Error: {error}", file=sys.stderr)
        sys.exit(1)


# of two equal keys Snakemake's own reader takes the last
for path in workflow.configfiles:
    checked(read_yaml, path)
configuration = checked(
    parse_config,
    dict(config),
    ", ".join(map(str, workflow.configfiles)) or "configuration",
)
used_cohorts = list(dict.fromkeys([configuration.train_on, *configuration.test_on]))
simulated_cohorts = [
    name for name in used_cohorts if configuration.cohorts[name].source == "simulated"
]
made_cohorts = [
    name for name in used_cohorts if configuration.cohorts[name].MADE is not None
]
models = [f"seed{seed}" for seed in configuration.seeds]
listing = {name: configuration.scan_parameters(name) for name in used_cohorts}
scans = {name: checked(scan_table, **listing[name]) for name in used_cohorts}
# what is asked for with every job is looked up in dictionaries, and made once: there are thousands of jobs
rows_of_scans = {
    name: {row["scan"]: row for row in table.to_dict("records")}
    for name, table in scans.items()
}
references = {
    name: checked(reference_scan, table, configuration.cohorts[name].reference)
    for name, table in scans.items()
}
for name in used_cohorts:
    checked(
        check_pairs,
        scans[name],
        listing[name]["pairs"],
        tested=name in configuration.test_on,
        trained=(
            configuration.trained_pairs() if name == configuration.train_on else []
        ),
    )
checked(
    check_unseen,
    scans,
    {name: configuration.origin(name) for name in used_cohorts},
    configuration.train_on,
)
pairs = {
    name: checked(registration_pairs, scans[name], listing[name]["pairs"])
    for name in configuration.test_on
}
networks = configuration.networks()
studies = {name: configuration.variants(name) for name in ("ablation", "lambda_study")}
studied = list(dict.fromkeys(row.name for rows_ in studies.values() for row in rows_))
sizes = {
    name: size_of_table(configuration, name, scans[name], len(pairs.get(name, [])))
    for name in used_cohorts
}
room_for_fields = checked(quota.room_for_fields, configuration, sizes)
score_rows = quota.score_rows(configuration, sizes)
voxels = voxels_of(configuration.grid.shape)


wildcard_constraints:
    # the longest first: in figures' names a cohort called a would else take a part of a_b
    cohort="|".join(map(re.escape, sorted(used_cohorts, key=len, reverse=True))),
    scan=r"[A-Za-z0-9][A-Za-z0-9._-]*",
    moving=r"[A-Za-z0-9][A-Za-z0-9._-]*",
    fixed=r"[A-Za-z0-9][A-Za-z0-9._-]*",
    method="|".join(
        map(re.escape, dict.fromkeys([*configuration.methods, *networks, *studied]))
    ),
    study="|".join(studies),
    model=r"none|seed\d+",
    shard=r"shard\d+",


def scans_of(cohort, *splits):
    """Return the names of a cohort's scans in some splits."""
    rows = rows_of_scans[cohort]
    return [scan for scan, row in rows.items() if row["split"] in splits]


settings_of_method = cache(configuration.method)
network_of = cache(configuration.network_of)


@cache
def shards_of(cohort, method):
    """Return the pairs (moving, fixed) of a cohort by shard: what one job of a method works through."""
    return shards.shards_of(configuration, method, pairs[cohort])


@cache
def shards_of_pairs(cohort, method):
    """Return pair -> the shard that holds it."""
    members = shards_of(cohort, method).items()
    return {pair: shard for shard, pairs_ in members for pair in pairs_}


@cache
def registration_turns():
    """Return run -> the run whose fields must be gone before it starts, so that all fit under the disk quota."""
    if room_for_fields is None:
        return {}
    main = quota.lanes(
        quota.field_shards(configuration, configuration.methods, sizes), room_for_fields
    )
    turns = dict(main.waits)
    for study in studies:
        methods = methods_of_study(study)
        own = [name for name in methods if name not in configuration.methods]
        if own:
            shards_ = quota.field_shards(configuration, own, sizes)
            turns |= quota.lanes_of_study(main, shards_, methods, room_for_fields).waits
    return turns


models_of = cache(configuration.models_of)


def runs(methods):
    """Return method/model of everything that registers a pair."""
    return [f"{method}/{model}" for method in methods for model in models_of(method)]


def shard_runs(methods):
    """Return cohort/method/model/shard of every registration job."""
    return [
        f"{cohort}/{method}/{model}/{shard}"
        for cohort in configuration.test_on
        for method in methods
        for model in models_of(method)
        for shard in shards_of(cohort, method)
    ]


def methods_of_study(study):
    """Return the methods that are the rows of a study, each once."""
    return list(dict.fromkeys(row.name for row in studies[study]))


def files_of_scan(wildcards):
    """Return the files of one scan as its cohort gives them; an absent label map or mask is left out."""
    row = rows_of_scans[wildcards.cohort][wildcards.scan]
    return {key: row[key] for key in ("image", "labels", "mask", "truth") if row[key]}


def original_of_scan(wildcards):
    """Return the file that a scan is made from, where there is one."""
    original = rows_of_scans[wildcards.cohort][wildcards.scan]["made_from"]
    return {"original": original} if original else {}


def source_of(cohort):
    return configuration.cohorts[cohort].source


def making_code(wildcards):
    """Return the hash of what making a scan depends on."""
    return code_hash(SOURCES[source_of(wildcards.cohort)])


def making_parameters(wildcards):
    """Return the source that makes a scan, and the keys that its making depends on."""
    cohort = configuration.cohorts[wildcards.cohort]
    return {
        "source": cohort.source,
        **{key: getattr(cohort, key) for key in cohort.MADE},
    }


def files_of_cohort(wildcards):
    """Return every file of a cohort."""
    table = scans[wildcards.cohort]
    return [
        path
        for key in ("image", "labels", "mask", "truth")
        for path in table[key]
        if path
    ]


def scan_records(wildcards):
    """Return the rows of a cohort's table of scans."""
    return scans[wildcards.cohort].fillna("").astype(str).to_dict("records")


def reference_of_scan(wildcards):
    """Return the preprocessed scan that a scan is aligned to; none for that scan itself."""
    cohort = wildcards.cohort
    reference = references[cohort]
    folder = f"{configuration.results}/preprocessed/{cohort}/{reference}"
    names = ("image.nii.gz", "labels.nii.gz", "affine.mat", "quality.json")
    return (
        {}
        if wildcards.scan == reference
        else {"reference": [f"{folder}/{name}" for name in names]}
    )


def quality_files_of(cohort, names):
    folder = f"{configuration.results}/preprocessed/{cohort}"
    return [f"{folder}/{scan}/quality.json" for scan in names]


def quality_files(wildcards):
    """Return the quality of every scan of a cohort."""
    return quality_files_of(wildcards.cohort, rows_of_scans[wildcards.cohort])


def preprocessed_images(wildcards):
    """Return every preprocessed image of a cohort."""
    folder = f"{configuration.results}/preprocessed/{wildcards.cohort}"
    return [f"{folder}/{scan}/image.nii.gz" for scan in rows_of_scans[wildcards.cohort]]


def splits_of_cohort(wildcards):
    """Return scan -> split of a whole cohort."""
    table = scans[wildcards.cohort]
    return dict(zip(table["scan"], table["split"]))


def reference_of_cohort(wildcards):
    return references[wildcards.cohort]


def leaves_out_flagged(cohort):
    """Tell whether scans that quality control flags are left out."""
    settings = configuration.preprocess_of(configuration.cohorts[cohort])
    return settings.flagged == "leave_out"


def preprocessed_for_training(wildcards, name):
    folder = f"{configuration.results}/preprocessed/{wildcards.cohort}"
    return [
        f"{folder}/{scan}/{name}.nii.gz"
        for scan in scans_of(wildcards.cohort, "train", "val", "atlas")
    ]


def training_images(wildcards):
    return preprocessed_for_training(wildcards, "image")


def training_labels(wildcards):
    return preprocessed_for_training(wildcards, "labels")


def quality_for_training(wildcards):
    """Return the quality of a training's scans, where it decides whether they are used."""
    return (
        quality_files_of(
            wildcards.cohort, scans_of(wildcards.cohort, "train", "val", "atlas")
        )
        if leaves_out_flagged(wildcards.cohort)
        else []
    )


def training_splits(wildcards):
    """Return scan -> split of what a training sees, in the order of its inputs."""
    rows = rows_of_scans[wildcards.cohort]
    return {
        scan: rows[scan]["split"]
        for scan in scans_of(wildcards.cohort, "train", "val", "atlas")
    }


def members_of_shard(wildcards):
    return shards_of(wildcards.cohort, wildcards.method)[wildcards.shard]


def pairs_of_shard(wildcards):
    """Return the pairs (moving, fixed) of a shard."""
    return [list(pair) for pair in members_of_shard(wildcards)]


def registered_pairs(wildcards):
    """Return the pairs of a shard, and after them the same the other way round where that is to be scored."""
    forward = pairs_of_shard(wildcards)
    both = (
        configuration.scores.inverse_consistency
        and wildcards.cohort in simulated_cohorts
    )
    backward = [[fixed, moving] for moving, fixed in forward] if both else []
    return [*forward, *(pair for pair in backward if pair not in forward)]


def scans_of_shard(wildcards):
    """Return the scans that a shard's pairs consist of, each once."""
    return list(
        dict.fromkeys(scan for pair in members_of_shard(wildcards) for scan in pair)
    )


def preprocessed_of_shard(wildcards, name):
    """Return one kind of preprocessed volume of each scan of a shard."""
    folder = f"{configuration.results}/preprocessed/{wildcards.cohort}"
    return [f"{folder}/{scan}/{name}.nii.gz" for scan in scans_of_shard(wildcards)]


def images_of_shard(wildcards):
    return preprocessed_of_shard(wildcards, "image")


def labels_of_shard(wildcards):
    return preprocessed_of_shard(wildcards, "labels")


def quality_of_shard(wildcards):
    """Return the quality of a shard's scans, where it decides whether they are used."""
    return (
        quality_files_of(wildcards.cohort, scans_of_shard(wildcards))
        if leaves_out_flagged(wildcards.cohort)
        else []
    )


def truths_of(cohort, names):
    """Return the true fields of scans, where the cohort is simulated; its reference is the truth's own space."""
    folder = f"{configuration.results}/preprocessed/{cohort}"
    return (
        [
            f"{folder}/{scan}/truth.nii.gz"
            for scan in names
            if rows_of_scans[cohort][scan]["truth"]
        ]
        if cohort in simulated_cohorts
        else []
    )


def true_fields(wildcards):
    """Return the true fields of a shard's scans."""
    return truths_of(wildcards.cohort, scans_of_shard(wildcards))


def pair_file(end, name):
    """Return the path of one preprocessed volume of a pair's end, moving or fixed, with its wildcards."""
    return f"{configuration.results}/preprocessed/{{cohort}}/{{{end}}}/{name}.nii.gz"


def truths_of_pair(wildcards):
    """Return the true fields of a pair's two scans, where the cohort is simulated."""
    return truths_of(wildcards.cohort, [wildcards.moving, wildcards.fixed])


def structure_set(wildcards):
    return configuration.cohorts[wildcards.cohort].structures


def structure_set_file(wildcards):
    return str(
        structures_folder()
        / f"{configuration.cohorts[wildcards.cohort].structures}.csv"
    )


def method_threads(wildcards):
    """Return the threads of a classical method: one, unless its result depends on them and so they are its parameter."""
    return getattr(settings_of_method(wildcards.method), "threads", 1)


def run_of(wildcards):
    """Return cohort/method/model/shard of a job."""
    return f"{wildcards.cohort}/{wildcards.method}/{wildcards.model}/{wildcards.shard}"


def examples_of_run(run):
    """Return the examples that are saved from the fields of a shard."""
    cohort, method, model, shard = run.split("/")
    if method not in configuration.methods or model != models_of(method)[0]:
        return []
    shard_of = shards_of_pairs(cohort, method)
    return [
        f"{configuration.results}/registered/{cohort}/{method}/{model}/example-{moving}__{fixed}.npz"
        for moving, fixed in example_pairs(cohort)
        if shard_of[moving, fixed] == shard
    ]


def readers_of_shard(wildcards):
    """Return what is made from the fields of a shard: they are gone when all of it is there."""
    run = run_of(wildcards)
    return [
        f"{configuration.results}/scores/{run}.pairs.parquet",
        *examples_of_run(run),
    ]


def turn_of_shard(wildcards):
    """Return the file that a registration waits for: what was made last of the fields that have its place on the disk.

    In Snakemake's records it has one name, whatever it is: else a registration that is done would run anew when the
    quota is set, changed or taken away. A file of Snakemake's own cache is recorded in this way.
    """
    before = registration_turns().get(run_of(wildcards))
    if before is None:
        path = workflow.main_snakefile  # it waits for nothing: this is always there
    elif examples_of_run(before):
        path = f"{configuration.results}/scores/{before}.read"
    else:
        path = f"{configuration.results}/scores/{before}.pairs.parquet"
    return flag(ancient(path), "sourcecache_entry", "room for the fields")


def fields_folder(path):
    """Declare a folder of fields; it is deleted after use unless the configuration keeps fields."""
    return directory(path) if configuration.keep_fields else temp(directory(path))


@cache
def settings_as_json(method):
    return settings_of_method(method).model_dump(mode="json")


def settings_of(wildcards):
    """Return the complete settings of a method, so that a change in one method reruns that method only."""
    return settings_as_json(wildcards.method)


def stated_orientation(wildcards):
    """Return the axis codes that replace those of a scan's files; what a job has made has a true header."""
    cohort = configuration.cohorts[wildcards.cohort]
    made = Path(configuration.results, "cohorts", wildcards.cohort)
    image = rows_of_scans[wildcards.cohort][wildcards.scan]["image"]
    if Path(image).is_relative_to(made):
        return None
    known = {key: getattr(cohort, key) for key in cohort.ORIENTED_BY}
    return cohort.orientation or default_orientation(cohort.source, **known)


@cache
def preprocess_settings_of(cohort_name):
    """Return the preprocessing of a cohort with its grid, and what its labels mean."""
    cohort = configuration.cohorts[cohort_name]
    settings = configuration.preprocess_of(cohort).model_dump(mode="json")
    del settings["flagged"]  # concerns those who use the scans
    return {
        **settings,
        **configuration.grid.model_dump(mode="json"),
        "label_map": cohort.label_map,
        "structures": cohort.structures,
    }


def preprocess_settings(wildcards):
    """Return what the preprocessing of a scan depends on."""
    return {
        **preprocess_settings_of(wildcards.cohort),
        "orientation": stated_orientation(wildcards),
    }


def network_code(wildcards):
    """Return the hash of what a training depends on: the training itself and the one network."""
    algorithm = settings_of_method(wildcards.method).algorithm
    return code_hash("dmir.training.loop", f"dmir.networks.{algorithm}")


def method_code(wildcards):
    """Return the hash of what a registration depends on."""
    settings = settings_of_method(wildcards.method)
    if settings.algorithm in CLASSICAL:
        return code_hash("dmir.methods.isolated", f"dmir.methods.{settings.algorithm}")
    network = settings_of_method(network_of(wildcards.method)).algorithm
    refinement = ["dmir.methods.refinement"] if isinstance(settings, Refinement) else []
    return code_hash("dmir.methods.network", f"dmir.networks.{network}", *refinement)


def scored_methods(wildcards):
    """Return the methods whose scores a table holds: those of a study, or all that are compared."""
    study = getattr(wildcards, "study", None)
    return methods_of_study(study) if study else configuration.methods


def scored_networks(wildcards):
    """Return the networks whose weights those methods use, each once."""
    used = map(network_of, scored_methods(wildcards))
    return [name for name in dict.fromkeys(used) if name is not None]


def numbers_hash(wildcards):
    """Return the hash of all in the configuration that scores depend on."""
    return value_hash(configuration.numbers(getattr(wildcards, "study", None)))


def scoring_code(wildcards):
    """Return the modules that made scores, from the scans to the numbers, with their hash."""
    settings = [settings_of_method(name) for name in scored_methods(wildcards)]
    trained = [settings_of_method(name) for name in scored_networks(wildcards)]
    modules = {
        "dmir.preprocess.files",
        "dmir.metrics",
        *(SOURCES[source_of(cohort)] for cohort in used_cohorts),
        *(f"dmir.methods.{s.algorithm}" for s in settings if s.algorithm in CLASSICAL),
        *("dmir.methods.refinement" for s in settings if isinstance(s, Refinement)),
        *(f"dmir.networks.{network.algorithm}" for network in trained),
        *(["dmir.training.loop", "dmir.methods.network"] if trained else []),
    }
    return code_record(*sorted(modules))


def weights_of_tables(wildcards):
    """Return the weights of every model that scored: of the methods that are compared, or of a study's."""
    folder = f"{configuration.results}/models/{configuration.train_on}"
    return [
        f"{folder}/{run}/model.safetensors" for run in runs(scored_networks(wildcards))
    ]


def weights_of_method(wildcards):
    """Return the weights that a network, or its refinement, registers with."""
    folder = f"{configuration.results}/models/{configuration.train_on}"
    network = network_of(wildcards.method)
    return f"{folder}/{network}/{wildcards.model}/model.safetensors"


def expected_weights(wildcards):
    """Return what the weights of a method must be of; weights of another configuration are refused."""
    network = settings_of_method(network_of(wildcards.method))
    return {
        "network": network.algorithm,
        "hyperparameters": network.network,
        "grid": configuration.grid.model_dump(mode="json"),
    }


def refinement_of_method(wildcards):
    """Return how a network's fields are refined; nothing for the network itself."""
    settings = settings_of_method(wildcards.method)
    return (
        settings.model_dump(mode="json", exclude={"algorithm", "of"})
        if isinstance(settings, Refinement)
        else {}
    )


def training_settings(wildcards):
    """Return what a trained network depends on: its settings, but not how many cards share the work."""
    settings = settings_of(wildcards)
    return {
        **settings,
        "training": {k: v for k, v in settings["training"].items() if k != "gpus"},
    }


def training_gpus(wildcards):
    return settings_of(wildcards)["training"]["gpus"]


def training_threads():
    """Share the cores among the trainings that can run at once."""
    cores = workflow.resource_settings.cores or 8  # none on a cluster
    return max(1, min(8, cores // max(1, len(networks) * len(models))))


def classical_runtime(wildcards, attempt):
    """Return the minutes of a shard of a classical method: as long as every pair may take, and longer each attempt."""
    return attempt * ceil(
        60 + len(registered_pairs(wildcards)) * configuration.timeout_minutes
    )


def growing(amount):
    """Return a resource that grows with each attempt: a job killed for want of it gets more the next time."""

    def of_attempt(wildcards, attempt):
        return amount * attempt

    return of_attempt


def tables():
    """Return the names of all tables."""
    unseen = [name for name in configuration.test_on if name != configuration.train_on]
    return [
        "comparison",
        *(["cross_cohort"] if unseen else []),
        "topology",
        "failures",
        *(["published"] if has_published_figures() else []),
        "preprocessing",
        *(
            f"{kind}_{cohort}"
            for kind in ("statistics", "structures", "dice_by_structure")
            for cohort in configuration.test_on
        ),
        *([f"trainings_{configuration.train_on}"] if networks else []),
    ]


def figures():
    """Return the names of all figures."""
    kinds = (
        "dice_by_structure",
        "critical_difference",
        "dice_against_time",
        "dice_against_folding",
    )
    return [
        *(f"{kind}_{cohort}" for cohort in configuration.test_on for kind in kinds),
        *(
            f"dice_against_age_{cohort}"
            for cohort in configuration.test_on
            if ages_known(scans[cohort])
        ),
        *(
            f"{kind}_{cohort}_{moving}__{fixed}"
            for cohort in configuration.test_on
            for moving, fixed in example_pairs(cohort)
            for kind in ("qualitative", "contours")
        ),
        *([f"training_curves_{configuration.train_on}"] if networks else []),
    ]


def example_pairs(cohort):
    """Return the pairs that are drawn: the first ones."""
    return pairs[cohort][: configuration.report.examples]


def shard_of_pair(wildcards):
    """Return the folder of fields that holds a pair."""
    pair = (wildcards.moving, wildcards.fixed)
    shard = shards_of_pairs(wildcards.cohort, wildcards.method)[pair]
    return f"{configuration.results}/registered/{wildcards.cohort}/{wildcards.method}/{wildcards.model}/{shard}"


def examples(wildcards):
    """Return the saved example of every method for one pair; of several seeds, the first."""
    return examples_of_pair(wildcards.cohort, wildcards.moving, wildcards.fixed)


def examples_of_pair(cohort, moving, fixed):
    folder = f"{configuration.results}/registered/{cohort}"
    return [
        f"{folder}/{method}/{models_of(method)[0]}/example-{moving}__{fixed}.npz"
        for method in configuration.methods
    ]


def pairs_of_page():
    """Return the pairs (cohort, moving, fixed) that the report shows."""
    return [
        [cohort, *pair]
        for cohort in configuration.test_on
        for pair in example_pairs(cohort)
    ]


def examples_of_page(wildcards):
    """Return what the report's viewer shows of every method, one file a pair and method."""
    return [path for pair in pairs_of_page() for path in examples_of_pair(*pair)]


def volumes_of_page(wildcards):
    """Return the images and label maps of the pairs that the report shows."""
    folder = f"{configuration.results}/preprocessed"
    return [
        f"{folder}/{cohort}/{scan}/{name}.nii.gz"
        for cohort, moving, fixed in pairs_of_page()
        for scan in (moving, fixed)
        for name in ("image", "labels")
    ]


def summaries_of_page(wildcards):
    """Return what was measured while the compared networks were trained."""
    return of_every_model(configuration.train_on, "training.json")


def score_files(wildcards, kind):
    """Return the scores of every shard: of one study's methods, or of all that are compared."""
    return [
        f"{configuration.results}/scores/{run}.{kind}.parquet"
        for run in shard_runs(scored_methods(wildcards))
    ]


def structure_scores(wildcards):
    return score_files(wildcards, "structures")


def pair_scores(wildcards):
    return score_files(wildcards, "pairs")


def training_summaries(wildcards):
    """Return what was measured while each model of a study was trained."""
    return [
        f"{configuration.results}/models/{configuration.train_on}/{run}/training.json"
        for run in runs(methods_of_study(wildcards.study))
    ]


def rows_of_study(wildcards):
    """Return method -> what a study changes in it."""
    return {row.name: row.changes for row in studies[wildcards.study]}


def of_every_model(cohort, name):
    """Return one file of every model of a cohort."""
    folder = f"{configuration.results}/models/{cohort}"
    return [f"{folder}/{run}/{name}" for run in runs(networks)]


def surfaces_of_cohort(wildcards):
    """Return the structures whose surfaces are drawn; None: some that are well known or large."""
    return configuration.report.surfaces.get(wildcards.cohort)


def source_of_cohort():
    """Return the source of every tested cohort: published figures are of data sets."""
    return {name: source_of(name) for name in configuration.test_on}


def published_files(*names):
    """Return tables of what others published."""
    return [str(published_folder() / f"{name}.csv") for name in names]


def has_published_figures():
    """Tell whether others published scores of a data set that is tested."""
    return bool(DATASETS.keys() & source_of_cohort().values())


def histories(wildcards):
    return of_every_model(wildcards.cohort, "history.csv")


def summaries(wildcards):
    """Return what was measured while each model was trained."""
    return of_every_model(wildcards.cohort, "training.json")


def report_files():
    """Return every file that the report shows."""
    results = configuration.results
    return [
        f"{results}/scores/pairs.csv",
        *(f"{results}/preprocessed/{cohort}/quality.csv" for cohort in used_cohorts),
        *(
            f"{results}/preprocessed/{cohort}/contact_sheet.png"
            for cohort in used_cohorts
        ),
        *(f"{results}/tables/{table}.html" for table in tables()),
        *(f"{results}/figures/{figure}.svg" for figure in figures()),
    ]


def finished_studies():
    """Return the studies whose table and figures are there."""
    return [
        study
        for study in studies
        if Path(configuration.results, "tables", f"{study}.html").exists()
        and Path(configuration.results, "figures", f"{study}.svg").exists()
    ]


def used_configuration():
    """Return the file that keeps the configuration as it was last used, command line included."""
    return Path(configuration.results, "configuration.yaml")


def keep_configuration():
    """Write the configuration beside the results before the first job: `dmir check` compares results with it."""
    if is_users_run():
        used_configuration().parent.mkdir(parents=True, exist_ok=True)
        with atomic_path(used_configuration()) as path:
            path.write_text(
                yaml.safe_dump(configuration.model_dump(mode="json"), sort_keys=False)
            )


def snakemake_again(*arguments):
    """Run Snakemake on this workflow once more, on the configuration as it was used and without its lock."""
    common = ["--snakefile", workflow.main_snakefile, "--nolock", "--quiet", "all"]
    settings = ["--workflow-profile", "none", "--configfile", used_configuration()]
    subprocess.run(
        [sys.executable, "-m", "snakemake", *common, *settings, *arguments],
        env={**os.environ, "DMIR_AGAIN": "yes"},
        check=True,
    )


def is_users_run():
    """Tell whether this is the process that the user started: neither a job nor what a hook runs."""
    return workflow.is_main_process and "DMIR_AGAIN" not in os.environ


def show_studies():
    """Make the report anew where a study has been finished since: it shows those that are there and asks for none."""
    page = Path(configuration.results, "report.html")
    tables_of_studies = [
        Path(configuration.results, "tables", f"{study}.html")
        for study in finished_studies()
    ]
    if is_users_run() and page.exists():
        made = page.stat().st_mtime
        if any(table.stat().st_mtime > made for table in tables_of_studies):
            snakemake_again(
                "--cores", "1", "--allowed-rules", "report_page", "--", page
            )


def write_snakemake_report():
    """Make Snakemake's own report after a run, once everything that it shows is there.

    It needs the records of finished jobs, so that no rule can make it.
    """
    if is_users_run() and all(Path(path).exists() for path in report_files()):
        report_path = Path(configuration.results, "snakemake-report.html")
        snakemake_again("--report", report_path, "--", "all", *finished_studies())
