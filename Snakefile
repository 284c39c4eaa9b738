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
        collect("<results>/cohorts/{cohort}/scans.csv", cohort=used_cohorts),
    localrule: True


rule preprocess_all:
    input:
        collect("<results>/preprocessed/{cohort}/quality.csv", cohort=used_cohorts),
        collect(
            "<results>/preprocessed/{cohort}/contact_sheet.png", cohort=used_cohorts
        ),
    localrule: True


rule train_all:
    input:
        collect(
            "<results>/models/{cohort}/{method}/{model}/model.safetensors",
            cohort=configuration.train_on,
            method=configuration.networks(),
            model=models,
        ),
    localrule: True


rule register_all:
    input:
        collect("<results>/registered/{run}.csv", run=shard_runs(configuration.methods)),
    localrule: True


rule evaluate_all:
    input:
        "<results>/scores/structures.parquet",
        "<results>/scores/pairs.parquet",
    localrule: True


rule report_all:
    input:
        collect("<results>/tables/{table}.csv", table=tables()),
        collect("<results>/figures/{figure}.png", figure=figures()),
        "<results>/report.html",
    localrule: True


rule ablation:
    input:
        "<results>/tables/ablation.csv",
        "<results>/figures/ablation.png",
    localrule: True


rule lambda_study:
    input:
        "<results>/tables/lambda_study.csv",
        "<results>/figures/lambda_study.png",
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
    show_studies()
    write_snakemake_report()
