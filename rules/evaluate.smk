rule score_shard:
    input:
        fields=paths.fields(),
        records=paths.records(),
        labels=run.labels_of_shard,
        truths=run.truths_of_shard,
        images=run.images_of_examples,
    output:
        structures=paths.scores_of_shard("structures"),
        pairs=paths.scores_of_shard("pairs"),
        examples=directory(paths.examples()),
    log:
        "<logs>/score_shard/{cohort}/{method}/{model}/{shard}.log",
    benchmark:
        "<benchmarks>/score_shard/{cohort}/{method}/{model}/{shard}.tsv"
    priority: 10  # before registrations: fields that are scored are deleted
    conda:
        "../envs/dmir.yaml"
    threads: 1
    resources:
        mem_mb=run.scoring_memory,
        runtime=growing(60),
    params:
        structures=run.structure_set,
        pairs=run.pairs_of_shard,
        examples=run.kept_examples,
        interpolations=configuration.scores.label_interpolation,
        code=code_hash("dmir.metrics"),
    script:
        "../workflow/scripts/score_shard.py"


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
