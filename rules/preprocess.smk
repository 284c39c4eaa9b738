# a rule for each batch of scans: preprocess_scans_simulated_train000, ...
for batch in run.batches:

    rule:
        name:
            f"preprocess_scans_{batch.cohort}_{batch.name}"
        input:
            files=run.files_of_batch(batch),
            reference=run.reference_of_batch(batch),
        output:
            run.preprocessed_files(batch),
        log:
            f"<logs>/preprocess_scans/{batch.cohort}/{batch.name}.log",
        benchmark:
            f"<benchmarks>/preprocess_scans/{batch.cohort}/{batch.name}.tsv"
        conda:
            "../envs/dmir.yaml"
        threads: 1
        resources:
            mem_mb=growing(3000),  # 0.9 GB was measured for 160x192x160 voxels; whole heads and deepbet take more
            runtime=growing(20 + 2 * len(batch.scans)),
        params:
            scans=run.preprocessed_scans(batch),
            settings=run.preprocess_settings(batch.cohort),
            code=code_hash("dmir.preprocess.files"),
        script:
            "../workflow/scripts/preprocess_scans.py"


rule gather_quality:
    input:
        images=run.preprocessed_images,
        scans=run.quality_files,
    output:
        table=report(
            paths.quality(),
            category="Preprocessing",
            labels={"cohort": "{cohort}", "table": "quality of every scan"},
            caption="../workflow/report/quality.rst",
        ),
        sheet=report(
            paths.contact_sheet(),
            category="Preprocessing",
            labels={"cohort": "{cohort}", "figure": "contact sheet"},
            caption="../workflow/report/contact_sheet.rst",
        ),
    log:
        "<logs>/gather_quality/{cohort}.log",
    benchmark:
        "<benchmarks>/gather_quality/{cohort}.tsv"
    conda:
        "../envs/dmir.yaml"
    threads: 1
    resources:
        mem_mb=growing(2000),
        runtime=growing(30),
    params:
        splits=run.splits_of_cohort,
        reference=run.reference_of_cohort,
        code=code_hash("dmir.preprocess.files", "dmir.preprocess.contact_sheet"),
    script:
        "../workflow/scripts/gather_quality.py"
