rule register_classical:
    input:
        images=run.images_of_shard,
        quality=run.quality_of_shard,
        turn=turn_of_shard,
    output:
        fields=fields_folder(paths.fields()),
        records=paths.records(),
    log:
        "<logs>/register_classical/{cohort}/{method}/{model}/{shard}.log",
    benchmark:
        "<benchmarks>/register_classical/{cohort}/{method}/{model}/{shard}.tsv"
    wildcard_constraints:
        method=one_of(run.without_weights(card=False)),
        model="none",
    conda:
        "../envs/dmir.yaml"
    threads: run.method_threads
    resources:
        mem_mb=run.classical_memory,
        runtime=run.classical_runtime,
    params:
        pairs=run.registered_pairs,
        settings=run.parameters_of_method,
        timeout=configuration.timeout_minutes * 60,
        code=run.method_code,
    script:
        "../workflow/scripts/register_classical.py"


# what computes with torch takes a card where there is one
use rule register_classical as register_descent with:
    log:
        "<logs>/register_descent/{cohort}/{method}/{model}/{shard}.log",
    benchmark:
        "<benchmarks>/register_descent/{cohort}/{method}/{model}/{shard}.tsv"
    wildcard_constraints:
        method=one_of(run.without_weights(card=True)),
        model="none",
    resources:
        gpu=1,
        mem_mb=run.classical_memory,
        runtime=run.classical_runtime,


rule register_network:
    input:
        images=run.images_of_shard,
        quality=run.quality_of_shard,
        weights=run.weights_of_method,
        turn=turn_of_shard,
    output:
        fields=fields_folder(paths.fields()),
        records=paths.records(),
    log:
        "<logs>/register_network/{cohort}/{method}/{model}/{shard}.log",
    benchmark:
        "<benchmarks>/register_network/{cohort}/{method}/{model}/{shard}.tsv"
    wildcard_constraints:
        model=r"seed\d+",
    conda:
        "../envs/dmir.yaml"
    threads: 1
    resources:
        gpu=1,
        mem_mb=growing(2000 + run.voxels // 500),
        runtime=growing(120),
    params:
        pairs=run.registered_pairs,
        expected=run.expected_weights,
        refinement=run.refinement_of_method,
        code=run.method_code,
    script:
        "../workflow/scripts/register_network.py"
