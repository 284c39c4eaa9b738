rule pack_scans:
    input:
        images=training_images,
        labels=training_labels,
    output:
        images="<results>/models/{cohort}/packed/images.npy",
        labels="<results>/models/{cohort}/packed/labels.npy",
        record="<results>/models/{cohort}/packed/pack.json",
    log:
        "<logs>/pack_scans/{cohort}.log",
    benchmark:
        "<benchmarks>/pack_scans/{cohort}.tsv"
    conda:
        "../envs/dmir.yaml"
    threads: 2
    resources:
        mem_mb=growing(1000 + voxels // 25000),
        runtime=growing(60),
    params:
        scans=training_splits,
        precision=configuration.packed,
        code=code_hash("dmir.training.pack"),
    script:
        "../workflow/scripts/pack_scans.py"


rule train:
    input:
        images=rules.pack_scans.output.images,
        labels=rules.pack_scans.output.labels,
        record=rules.pack_scans.output.record,
        quality=quality_for_training,
    output:
        weights="<results>/models/{cohort}/{method}/{model}/model.safetensors",
        history="<results>/models/{cohort}/{method}/{model}/history.csv",
        summary="<results>/models/{cohort}/{method}/{model}/training.json",
    log:
        "<logs>/train/{cohort}/{method}/{model}.log",
    benchmark:
        "<benchmarks>/train/{cohort}/{method}/{model}.tsv"
    conda:
        "../envs/dmir.yaml"
    threads: training_threads()
    resources:
        gpu=training_gpus,
        mem_mb=growing(3000 + voxels // 200),
        runtime=growing(2880),
    params:
        settings=training_settings,
        splits=training_splits,
        # what has been trained so far is kept beside the models, under a name that changes with all it depends on;
        # Snakemake does not know of it, because it deletes declared outputs before a job starts again
        resume=subpath(output.weights, ancestor=3),
        code=network_code,
    script:
        "../workflow/scripts/train.py"
