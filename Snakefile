from snakemake.utils import min_version

min_version("9.19")

# A configuration file stands by itself: one given on the command line replaces the default one, so that a
# published setting never inherits a demonstration's.
if not workflow.config_settings.configfiles:

    configfile: "config/config.yaml"


pathvars:
    results=config.get("results", "results"),
    logs="<results>/logs",
    benchmarks="<results>/benchmarks",


# jobs run in it with `--sdm apptainer`, and only then: profiles/README.md
container: "envs/dmir.sif"


report: "workflow/report/workflow.rst"


include: "rules/common.smk"
include: "rules/run.smk"
include: "rules/cohort.smk"
include: "rules/preprocess.smk"
include: "rules/train.smk"
include: "rules/register.smk"
include: "rules/evaluate.smk"
include: "rules/report.smk"


rule cohort_all:
    input:
        collect(paths.scans(), cohort=run.cohorts),
    localrule: True


rule preprocess_all:
    input:
        collect(paths.quality(), cohort=run.cohorts),
        collect(paths.contact_sheet(), cohort=run.cohorts),
    localrule: True


rule train_all:
    input:
        run.of_every_model(configuration.train_on, "model.safetensors"),
    localrule: True


rule register_all:
    input:
        run.records_of_comparison(),
    localrule: True


rule evaluate_all:
    input:
        paths.scores("structures.parquet"),
        paths.scores("pairs.parquet"),
    localrule: True


rule report_all:
    input:
        collect(paths.table("{table}.csv"), table=run.tables()),
        collect(paths.figure("{figure}.png"), figure=run.figures()),
        paths.report(),
    localrule: True


rule ablation:
    input:
        paths.table("ablation.csv"),
        paths.figure("ablation.png"),
    localrule: True


rule lambda_study:
    input:
        paths.table("lambda_study.csv"),
        paths.figure("lambda_study.png"),
    localrule: True


rule all:
    default_target: True
    input:
        rules.cohort_all.input,
        rules.preprocess_all.input,
        rules.report_all.input,
    localrule: True


onstart:
    begin_jobs()


onsuccess:
    finish()
