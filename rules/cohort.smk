ruleorder: simulate_scan > make_scan


rule make_scan:
    input:
        unpack(run.original_of_scan),
    output:
        image=paths.made("image.nii.gz"),
        labels=paths.made("labels.nii.gz"),
        mask=paths.made("mask.nii.gz"),
    log:
        "<logs>/make_scan/{cohort}/{scan}.log",
    benchmark:
        "<benchmarks>/make_scan/{cohort}/{scan}.tsv"
    wildcard_constraints:
        cohort=one_of(run.made),
    conda:
        "../envs/dmir.yaml"
    threads: 1
    resources:
        mem_mb=growing(4000),
        runtime=growing(10),
    params:
        settings=run.making_parameters,
        code=run.making_code,
    script:
        "../workflow/scripts/make_scan.py"


use rule make_scan as simulate_scan with:
    output:
        image=paths.made("image.nii.gz"),
        labels=paths.made("labels.nii.gz"),
        mask=paths.made("mask.nii.gz"),
        truth=paths.made("truth.nii.gz"),
    log:
        "<logs>/simulate_scan/{cohort}/{scan}.log",
    benchmark:
        "<benchmarks>/simulate_scan/{cohort}/{scan}.tsv"
    wildcard_constraints:
        cohort=one_of(run.simulated),
        scan=r"sub-\d+",


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
