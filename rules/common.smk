# What every stage knows: the checked configuration, the scans, the pairs and their shards.
import os
import re
import subprocess
import sys
from pathlib import Path

import yaml

# the library of this checkout, here and in every job, whatever environment a job runs in
sys.path.insert(0, str(Path(workflow.basedir) / "src"))
os.environ.update(PYTHONPATH=str(Path(workflow.basedir) / "src"))

from snakemake.exceptions import WorkflowError

from dmir.cohorts import scan_table
from dmir.config import CLASSICAL, parse_config
from dmir.errors import DmirError
from dmir.provenance import code_hash
from dmir.structures import structures_folder
from dmir.volumes import atomic_path


def checked(function, *arguments, **parameters):
    """Call a function; a user's mistake ends the workflow with its message alone."""
    try:
        return function(*arguments, **parameters)
    except DmirError as error:
        print(f"Error: {error}", file=sys.stderr)
        sys.exit(1)


def table_of_scans(name):
    """Return the scans of a cohort, read from its table or, for simulated ones, known by their number."""
    cohort = configuration.cohorts[name]
    if cohort.source == "simulated":
        folder = Path(configuration.results, "cohorts", name)
        return scan_table(
            "simulated",
            folder=folder,
            train=cohort.train,
            val=cohort.val,
            test=cohort.test,
            seed=cohort.seed,
        )
    return scan_table("table", path=configuration.table_path(cohort))


configuration = checked(
    parse_config,
    dict(config),
    ", ".join(map(str, workflow.configfiles)) or "configuration",
)
used_cohorts = list(dict.fromkeys([configuration.train_on, *configuration.test_on]))
simulated_cohorts = [
    name for name in used_cohorts if configuration.cohorts[name].source == "simulated"
]
models = [f"seed{seed}" for seed in configuration.seeds]
scans = {
    name: checked(table_of_scans, name).set_index("scan", drop=False)
    for name in used_cohorts
}
atlases = {
    name: table.index[table["split"] == "atlas"][0] for name, table in scans.items()
}
networks = configuration.networks()
studies = {name: configuration.variants(name) for name in ("ablation", "lambda_study")}
studied = list(dict.fromkeys(row.name for rows_ in studies.values() for row in rows_))
voxels = (
    configuration.grid.shape[0]
    * configuration.grid.shape[1]
    * configuration.grid.shape[2]
)


wildcard_constraints:
    cohort="|".join(used_cohorts),
    scan=r"[A-Za-z0-9][A-Za-z0-9._-]*",
    method="|".join(map(re.escape, dict.fromkeys([*configuration.methods, *studied]))),
    study="|".join(studies),
    model=r"none|seed\d+",
    shard=r"shard\d+",


def scans_of(cohort, *splits):
    """Return the names of a cohort's scans in some splits."""
    table = scans[cohort]
    return list(table.index[table["split"].isin(splits)])


def shards_of(cohort):
    """Return the test scans of a cohort by shard, a shard being the pairs that one job works through."""
    test = scans_of(cohort, "test")
    size = configuration.pairs_per_job
    return {
        f"shard{k // size:03d}": test[k : k + size] for k in range(0, len(test), size)
    }


shards = {name: shards_of(name) for name in configuration.test_on}


def runs(methods):
    """Return method/model of everything that registers a pair, a network once a seed."""
    return [
        f"{method}/{model}"
        for method in methods
        for model in (models if method in [*networks, *studied] else ["none"])
    ]


def shard_runs(methods):
    """Return cohort/method/model/shard of every registration job."""
    return [
        f"{cohort}/{run}/{shard}"
        for cohort in configuration.test_on
        for run in runs(methods)
        for shard in shards[cohort]
    ]


def methods_of_study(study):
    """Return the methods that are the rows of a study, each once."""
    return list(dict.fromkeys(row.name for row in studies[study]))


def files_of_scan(wildcards):
    """Return the files of one scan as its cohort gives them; an absent label map or mask is left out."""
    row = scans[wildcards.cohort].loc[wildcards.scan]
    return {key: row[key] for key in ("image", "labels", "mask", "truth") if row[key]}


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


def atlas_of_scan(wildcards):
    """Return the preprocessed atlas that a scan is aligned to; none for the atlas itself."""
    cohort = wildcards.cohort
    atlas = atlases[cohort]
    folder = f"{configuration.results}/preprocessed/{cohort}/{atlas}"
    return (
        {}
        if wildcards.scan == atlas
        else {
            "atlas": [
                f"{folder}/{name}"
                for name in (
                    "image.nii.gz",
                    "labels.nii.gz",
                    "affine.mat",
                    "quality.json",
                )
            ]
        }
    )


def quality_files(wildcards):
    folder = f"{configuration.results}/preprocessed/{wildcards.cohort}"
    return [f"{folder}/{scan}/quality.json" for scan in scans[wildcards.cohort].index]


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


def training_splits(wildcards):
    """Return scan -> split of what a training sees, in the order of its inputs."""
    table = scans[wildcards.cohort]
    return {
        scan: str(table.loc[scan, "split"])
        for scan in scans_of(wildcards.cohort, "train", "val", "atlas")
    }


def preprocessed_of_shard(wildcards, name):
    """Return one kind of preprocessed volume of each moving scan of a shard."""
    folder = f"{configuration.results}/preprocessed/{wildcards.cohort}"
    return [
        f"{folder}/{scan}/{name}.nii.gz"
        for scan in shards[wildcards.cohort][wildcards.shard]
    ]


def moving_images(wildcards):
    return preprocessed_of_shard(wildcards, "image")


def moving_labels(wildcards):
    return preprocessed_of_shard(wildcards, "labels")


def true_fields(wildcards):
    """Return the true fields of a shard's pairs, where the cohort is simulated."""
    return (
        preprocessed_of_shard(wildcards, "truth")
        if wildcards.cohort in simulated_cohorts
        else []
    )


def scan_file(name):
    """Return the path of one preprocessed volume of a scan, with its wildcards."""
    return f"{configuration.results}/preprocessed/{{cohort}}/{{scan}}/{name}.nii.gz"


def truth_of_scan(wildcards):
    """Return the true field of one pair, where the cohort is simulated."""
    folder = f"{configuration.results}/preprocessed/{wildcards.cohort}/{wildcards.scan}"
    return [f"{folder}/truth.nii.gz"] if wildcards.cohort in simulated_cohorts else []


def structure_set(wildcards):
    return configuration.cohorts[wildcards.cohort].structures


def structure_set_file(wildcards):
    return str(
        structures_folder()
        / f"{configuration.cohorts[wildcards.cohort].structures}.csv"
    )


def method_threads(wildcards):
    """Return the threads of a classical method: one, unless its result depends on them and so they are its parameter."""
    return getattr(configuration.method(wildcards.method), "threads", 1)


def atlas_file(name):
    """Return a function that gives one preprocessed volume of a cohort's atlas."""

    def path(wildcards):
        cohort = wildcards.cohort
        return f"{configuration.results}/preprocessed/{cohort}/{atlases[cohort]}/{name}.nii.gz"

    return path


def fields_folder(path):
    """Declare a folder of fields; it is deleted after use unless the configuration keeps fields."""
    return directory(path) if configuration.keep_fields else temp(directory(path))


def settings_of(wildcards):
    """Return the complete settings of a method, so that a change in one method reruns that method only."""
    return configuration.method(wildcards.method).model_dump(mode="json")


def cohort_settings(wildcards):
    return configuration.cohorts[wildcards.cohort].model_dump(mode="json")


def preprocess_settings(wildcards):
    """Return the preprocessing of a cohort with its grid and its label map."""
    cohort = configuration.cohorts[wildcards.cohort]
    return {
        **configuration.preprocess_of(cohort).model_dump(mode="json"),
        **configuration.grid.model_dump(mode="json"),
        "label_map": cohort.label_map,
    }


def network_code(wildcards):
    """Return the hash of what a training depends on: the training itself and the one network."""
    algorithm = configuration.method(wildcards.method).algorithm
    return code_hash("dmir.training.loop", f"dmir.networks.{algorithm}")


def method_code(wildcards):
    """Return the hash of what a registration depends on."""
    algorithm = configuration.method(wildcards.method).algorithm
    if algorithm in CLASSICAL:
        return code_hash("dmir.methods.isolated", f"dmir.methods.{algorithm}")
    return code_hash("dmir.methods.network", f"dmir.networks.{algorithm}")


def training_threads():
    """Share the cores among the trainings that can run at once."""
    cores = workflow.resource_settings.cores or 8  # none on a cluster
    return max(1, min(8, cores // max(1, len(networks) * len(models))))


def tables():
    """Return the names of all tables."""
    return [
        "comparison",
        *(
            f"{kind}_{cohort}"
            for kind in ("structures", "dice_by_structure")
            for cohort in configuration.test_on
        ),
        *([f"trainings_{configuration.train_on}"] if networks else []),
    ]


def figures():
    """Return the names of all figures."""
    kinds = ("dice_by_structure", "dice_against_time", "dice_against_folding")
    return [
        *(f"{kind}_{cohort}" for cohort in configuration.test_on for kind in kinds),
        *(
            f"qualitative_{cohort}_{scan}"
            for cohort in configuration.test_on
            for scan in example_scans(cohort)
        ),
        *([f"training_curves_{configuration.train_on}"] if networks else []),
    ]


def example_scans(cohort):
    """Return the moving scans of the pairs that are drawn."""
    return scans_of(cohort, "test")[: configuration.report.examples]


def shard_of_scan(wildcards):
    """Return the folder of fields that holds the pair of a moving scan."""
    shard = next(
        name
        for name, members in shards[wildcards.cohort].items()
        if wildcards.scan in members
    )
    return f"{configuration.results}/registered/{wildcards.cohort}/{wildcards.method}/{wildcards.model}/{shard}"


def examples(wildcards):
    """Return the saved example of every method for one pair; of several seeds, the first."""
    folder = f"{configuration.results}/registered/{wildcards.cohort}"
    return [
        f"{folder}/{method}/{models[0] if method in networks else 'none'}/example-{wildcards.scan}.npz"
        for method in configuration.methods
    ]


def score_files(wildcards, kind):
    """Return the scores of every shard: of one study's methods, or of all that are compared."""
    study = getattr(wildcards, "study", None)
    methods = methods_of_study(study) if study else configuration.methods
    return [
        f"{configuration.results}/scores/{run}.{kind}.parquet"
        for run in shard_runs(methods)
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


def of_every_model(wildcards, name):
    """Return one file of every model of a cohort."""
    folder = f"{configuration.results}/models/{wildcards.cohort}"
    return [f"{folder}/{run}/{name}" for run in runs(networks)]


def histories(wildcards):
    return of_every_model(wildcards, "history.csv")


def summaries(wildcards):
    """Return what was measured while each model was trained."""
    return of_every_model(wildcards, "training.json")


def report_files():
    """Return every file that the report shows."""
    results = configuration.results
    return [
        f"{results}/scores/pairs.csv",
        *(f"{results}/preprocessed/{cohort}/quality.csv" for cohort in used_cohorts),
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


def write_report():
    """Make Snakemake's own report after a run, once everything that it shows is there.

    It needs the records of finished jobs, so that no rule can make it. It is given the configuration as it was used,
    command line included, which stays beside the results.
    """
    if not workflow.is_main_process or not all(
        Path(path).exists() for path in report_files()
    ):
        return
    used, report_path = Path(configuration.results, "configuration.yaml"), Path(
        configuration.results, "report.html"
    )
    with atomic_path(used) as path:
        path.write_text(
            yaml.safe_dump(configuration.model_dump(mode="json"), sort_keys=False)
        )
    snakemake = [
        sys.executable,
        "-m",
        "snakemake",
        "--snakefile",
        workflow.main_snakefile,
        "--nolock",
        "--quiet",
        "all",
    ]
    subprocess.run(
        [
            *snakemake,
            "--workflow-profile",
            "none",
            "--configfile",
            used,
            "--report",
            report_path,
            "--",
            "all",
            *finished_studies(),
        ],
        check=True,
    )
