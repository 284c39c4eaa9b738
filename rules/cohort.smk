ruleorder: simulate_scan > make_scan


rule make_scan:
    input:
        unpack(original_of_scan),
    output:
        image="<results>/cohorts/{cohort}/{scan}/image.nii.gz",
        labels="<results>/cohorts/{cohort}/{scan}/labels.nii.gz",
        mask="<results>/cohorts/{cohort}/{scan}/mask.nii.gz",
    log:
        "<logs>/make_scan/{cohort}/{scan}.log",
    benchmark:
        "<benchmarks>/make_scan/{cohort}/{scan}.tsv"
    wildcard_constraints:
        cohort="|".join(made_cohorts) or "no-such-cohort",
    conda:
        "../envs/dmir.yaml"
    threads: 1
    resources:
        mem_mb=growing(4000),
        runtime=growing(10),
    params:
        settings=making_parameters,
        code=making_code,
    script:
        "../workflow/scripts/make_scan.py"


use rule make_scan as simulate_scan with:
    output:
        image="<results>/cohorts/{cohort}/{scan}/image.nii.gz",
        labels="<results>/cohorts/{cohort}/{scan}/labels.nii.gz",
        mask="<results>/cohorts/{cohort}/{scan}/mask.nii.gz",
        truth="<results>/cohorts/{cohort}/{scan}/truth.nii.gz",
    log:
        "<logs>/simulate_scan/{cohort}/{scan}.log",
    benchmark:
        "<benchmarks>/simulate_scan/{cohort}/{scan}.tsv"
    wildcard_constraints:
        cohort="|".join(simulated_cohorts) or "no-such-cohort",
        scan=r"sub-\d+",


rule list_scans:
    input:
        files=files_of_cohort,
    output:
        table="<results>/cohorts/{cohort}/scans.csv",
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
        scans=scan_records,
        code=code_hash("dmir.cohorts"),
    script:
        "../workflow/scripts/list_scans.py"
