rule register_classical:
    input:
        moving=moving_images,
        fixed=atlas_file("image"),
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
        mem_mb=2000 + voxels // 1500,
        runtime=720,
    params:
        settings=settings_of,
        timeout=configuration.timeout_minutes * 60,
        code=method_code,
    script:
        "../workflow/scripts/register_classical.py"


rule register_network:
    input:
        moving=moving_images,
        fixed=atlas_file("image"),
        weights=f"<results>/models/{configuration.train_on}/{{method}}/{{model}}/model.safetensors",
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
        mem_mb=2000 + voxels // 500,
        runtime=120,
    params:
        code=method_code,
    script:
        "../workflow/scripts/register_network.py"
