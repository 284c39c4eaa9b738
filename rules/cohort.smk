# a rule for each batch of scans: make_scans_simulated_train000, ...
for batch in run.batches_made:

    rule:
        name:
            f"make_scans_{batch.cohort}_{batch.name}"
        input:
            run.originals_of(batch),
        output:
            run.made_files(batch),
        log:
            f"<logs>/make_scans/{batch.cohort}/{batch.name}.log",
        benchmark:
            f"<benchmarks>/make_scans/{batch.cohort}/{batch.name}.tsv"
        conda:
            "../envs/dmir.yaml"
        threads: 1
        resources:
            mem_mb=growing(4000),
            runtime=growing(10 + len(batch.scans)),
        params:
            scans=run.made_scans(batch),
            settings=run.making_parameters(batch.cohort),
            code=run.making_code(batch.cohort),
        script:
            "../workflow/scripts/make_scans.py"


rule list_scans:
    input:
        files=run.files_of_cohort,
    output:
        table=paths.scans(),
    log:
        "<logs>/list_scans/{cohort}.log",
    benchmark:
        "<benchmarks>/list_scans/{cohort}.tsv"
    conda:
        "../envs/dmir.yaml"
    threads: 1
    resources:
        mem_mb=growing(500),
        runtime=growing(5),
    params:
        scans=run.scan_records,
        code=code_hash("dmir.cohorts"),
    script:
        "../workflow/scripts/list_scans.py"
