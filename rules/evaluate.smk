rule score_shard:
    input:
        fields=paths.fields(),
        records=paths.records(),
        labels=run.labels_of_shard,
        truths=run.truths_of_shard,
    output:
        structures=paths.scores_of_shard("structures"),
        pairs=paths.scores_of_shard("pairs"),
    log:
        "<logs>/score_shard/{cohort}/{method}/{model}/{shard}.log",
    benchmark:
        "<benchmarks>/score_shard/{cohort}/{method}/{model}/{shard}.tsv"
    priority: 10  # before registrations: fields that are scored are deleted
    conda:
        "../envs/dmir.yaml"
    threads: 1
    resources:
        mem_mb=growing(1000 + run.voxels // 6000),
        runtime=growing(60),
    params:
        structures=run.structure_set,
        pairs=run.pairs_of_shard,
        interpolations=configuration.scores.label_interpolation,
        code=code_hash("dmir.metrics"),
    script:
        "../workflow/scripts/score_shard.py"


rule save_example:
    input:
        fields=run.fields_of_pair,
        moving=paths.preprocessed("image.nii.gz", scan="{moving}"),
        moving_labels=paths.preprocessed("labels.nii.gz", scan="{moving}"),
        fixed_labels=paths.preprocessed("labels.nii.gz", scan="{fixed}"),
    output:
        example=paths.example(),
    log:
        "<logs>/save_example/{cohort}/{method}/{model}/{moving}__{fixed}.log",
    benchmark:
        "<benchmarks>/save_example/{cohort}/{method}/{model}/{moving}__{fixed}.tsv"
    priority: 20
    conda:
        "../envs/dmir.yaml"
    threads: 1
    resources:
        mem_mb=growing(1500 + run.voxels // 2500),
        runtime=growing(10),
    params:
        code=code_hash("dmir.report.examples"),
    script:
        "../workflow/scripts/save_example.py"


rule free_fields:
    # that all who read the fields of a shard are done, where there are several: with a disk quota others wait for it
    input:
        run.readers_of_shard,
    output:
        touch(paths.shard_read()),
    localrule: True


rule gather_scores:
    input:
        structures=run.structure_scores,
        pairs=run.pair_scores,
    output:
        structures=paths.scores("structures.parquet"),
        structures_csv=paths.scores("structures.csv"),
        pairs=paths.scores("pairs.parquet"),
        pairs_csv=report(
            paths.scores("pairs.csv"),
            category="Scores",
            labels={"table": "every pair"},
            caption="../workflow/report/pairs.rst",
        ),
    log:
        "<logs>/gather_scores.log",
    benchmark:
        "<benchmarks>/gather_scores.tsv"
    conda:
        "../envs/dmir.yaml"
    threads: 1
    resources:
        mem_mb=growing(1000 + run.score_rows // 1500),
        runtime=growing(10),
    params:
        code=code_hash("dmir.metrics"),
    script:
        "../workflow/scripts/gather_scores.py"


use rule gather_scores as gather_study_scores with:
    output:
        structures=paths.scores("structures.parquet", "{study}"),
        structures_csv=paths.scores("structures.csv", "{study}"),
        pairs=paths.scores("pairs.parquet", "{study}"),
        pairs_csv=paths.scores("pairs.csv", "{study}"),
    log:
        "<logs>/gather_study_scores/{study}.log",
    benchmark:
        "<benchmarks>/gather_study_scores/{study}.tsv"
