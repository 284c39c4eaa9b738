rule register_classical:
    input:
        images=images_of_shard,
        quality=quality_of_shard,
        turn=turn_of_shard,
    output:
        fields=fields_folder("<results>/registered/{cohort}/{method}/{model}/{shard}"),
        records="<results>/registered/{cohort}/{method}/{model}/{shard}.csv",
    log:
        "<logs>/register_classical/{cohort}/{method}/{model}/{shard}.log",
    benchmark:
        "<benchmarks>/register_classical/{cohort}/{method}/{model}/{shard}.tsv"
    wildcard_constraints:
        model="none",
    conda:
        "../envs/dmir.yaml"
    threads: method_threads
    resources:
        mem_mb=growing(2000 + voxels // 1500),
        runtime=classical_runtime,
    params:
        pairs=registered_pairs,
        settings=settings_of,
        timeout=configuration.timeout_minutes * 60,
        code=method_code,
    script:
        "../workflow/scripts/register_classical.py"


rule register_network:
    input:
        images=images_of_shard,
        quality=quality_of_shard,
        weights=weights_of_method,
        turn=turn_of_shard,
    output:
        fields=fields_folder("<results>/registered/{cohort}/{method}/{model}/{shard}"),
        records="<results>/registered/{cohort}/{method}/{model}/{shard}.csv",
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
        mem_mb=growing(2000 + voxels // 500),
        runtime=growing(120),
    params:
        pairs=registered_pairs,
        expected=expected_weights,
        refinement=refinement_of_method,
        code=method_code,
    script:
        "../workflow/scripts/register_network.py"
