rule pack_scans:
    input:
        images=run.training_images,
        labels=run.training_labels,
    output:
        images=paths.packed("images.npy"),
        labels=paths.packed("labels.npy"),
        record=paths.packed("pack.json"),
    log:
        "<logs>/pack_scans/{cohort}.log",
    benchmark:
        "<benchmarks>/pack_scans/{cohort}.tsv"
    priority: 5  # trainings wait for it
    conda:
        "../envs/dmir.yaml"
    threads: 1
    resources:
        mem_mb=growing(1000 + run.voxels // 25000),
        runtime=growing(60),
    params:
        scans=run.training_splits,
        precision=configuration.packed,
        code=code_hash("dmir.training.pack"),
    script:
        "../workflow/scripts/pack_scans.py"


rule train:
    input:
        images=rules.pack_scans.output.images,
        labels=rules.pack_scans.output.labels,
        record=rules.pack_scans.output.record,
        quality=run.quality_for_training,
    output:
        weights=paths.model("model.safetensors"),
        history=paths.model("history.csv"),
        summary=paths.model("training.json"),
    log:
        "<logs>/train/{cohort}/{method}/{model}.log",
    benchmark:
        "<benchmarks>/train/{cohort}/{method}/{model}.tsv"
    priority: 5  # before registrations: what takes longest is not to be what is waited for at the end
    conda:
        "../envs/dmir.yaml"
    threads: run.training_threads(workflow.resource_settings.cores)
    resources:
        gpu=run.training_gpus,
        mem_mb=growing(3000 + run.voxels // 200),
        runtime=growing(2880),
    params:
        settings=run.training_settings,
        splits=run.training_splits,
        # what has been trained so far is kept beside the models, under a name that changes with all it depends on;
        # Snakemake does not know of it, because it deletes declared outputs before a job starts again
        resume=subpath(output.weights, ancestor=3),
        code=run.network_code,
    script:
        "../workflow/scripts/train.py"
