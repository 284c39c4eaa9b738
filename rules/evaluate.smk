rule score_shard:
    input:
        fields="<results>/registered/{cohort}/{method}/{model}/{shard}",
        records="<results>/registered/{cohort}/{method}/{model}/{shard}.csv",
        labels=labels_of_shard,
        truths=true_fields,
    output:
        structures="<results>/scores/{cohort}/{method}/{model}/{shard}.structures.parquet",
        pairs="<results>/scores/{cohort}/{method}/{model}/{shard}.pairs.parquet",
    log:
        "<logs>/score_shard/{cohort}/{method}/{model}/{shard}.log",
    benchmark:
        "<benchmarks>/score_shard/{cohort}/{method}/{model}/{shard}.tsv"
    priority: 10  # before registrations: fields that are scored are deleted
    conda:
        "../envs/dmir.yaml"
    threads: 1
    resources:
        mem_mb=growing(1000 + voxels // 6000),
        runtime=growing(60),
    params:
        structures=structure_set,
        pairs=pairs_of_shard,
        interpolations=configuration.scores.label_interpolation,
        code=code_hash("dmir.metrics"),
    script:
        "../workflow/scripts/score_shard.py"


rule save_example:
    input:
        fields=shard_of_pair,
        moving=pair_file("moving", "image"),
        moving_labels=pair_file("moving", "labels"),
        fixed_labels=pair_file("fixed", "labels"),
    output:
        example="<results>/registered/{cohort}/{method}/{model}/example-{moving}__{fixed}.npz",
    log:
        "<logs>/save_example/{cohort}/{method}/{model}/{moving}__{fixed}.log",
    benchmark:
        "<benchmarks>/save_example/{cohort}/{method}/{model}/{moving}__{fixed}.tsv"
    priority: 20
    conda:
        "../envs/dmir.yaml"
    threads: 1
    resources:
        mem_mb=growing(1500 + voxels // 2500),
        runtime=growing(10),
    params:
        code=code_hash("dmir.report.examples"),
    script:
        "../workflow/scripts/save_example.py"


rule free_fields:
    # that all who read the fields of a shard are done, where there are several: with a disk quota others wait for it
    input:
        readers_of_shard,
    output:
        touch("<results>/scores/{cohort}/{method}/{model}/{shard}.read"),
    localrule: True


rule gather_scores:
    input:
        structures=structure_scores,
        pairs=pair_scores,
    output:
        structures="<results>/scores/structures.parquet",
        structures_csv="<results>/scores/structures.csv",
        pairs="<results>/scores/pairs.parquet",
        pairs_csv=report(
            "<results>/scores/pairs.csv",
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
        mem_mb=growing(1000 + score_rows // 1500),
        runtime=growing(10),
    params:
        code=code_hash("dmir.metrics"),
    script:
        "../workflow/scripts/gather_scores.py"


use rule gather_scores as gather_study_scores with:
    output:
        structures="<results>/scores/{study}.structures.parquet",
        structures_csv="<results>/scores/{study}.structures.csv",
        pairs="<results>/scores/{study}.pairs.parquet",
        pairs_csv="<results>/scores/{study}.pairs.csv",
    log:
        "<logs>/gather_study_scores/{study}.log",
    benchmark:
        "<benchmarks>/gather_study_scores/{study}.tsv"
