rule train:
    input:
        images=training_images,
        labels=training_labels,
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
        gpu=1,
        mem_mb=3000 + voxels // 200,
        runtime=2880,
    params:
        settings=settings_of,
        splits=training_splits,
        # what has been trained so far is kept beside the models, under a name that changes with all it depends on;
        # Snakemake does not know of it, because it deletes declared outputs before a job starts again
        resume=subpath(output.weights, ancestor=3),
        code=network_code,
    script:
        "../workflow/scripts/train.py"
