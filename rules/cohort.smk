rule simulate_scan:
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
        cohort="|".join(simulated_cohorts) or "no-simulated-cohort",
        scan=r"sub-\d+",
    conda:
        "../envs/dmir.yaml"
    threads: 1
    resources:
        mem_mb=4000,
        runtime=10,
    params:
        cohort=cohort_settings,
        code=code_hash("dmir.cohorts.simulated"),
    script:
        "../workflow/scripts/simulate_scan.py"


use rule simulate_scan as extract_template with:
    output:
        image="<results>/cohorts/{cohort}/{scan}/image.nii.gz",
        labels="<results>/cohorts/{cohort}/{scan}/labels.nii.gz",
        mask="<results>/cohorts/{cohort}/{scan}/mask.nii.gz",
    log:
        "<logs>/extract_template/{cohort}/{scan}.log",
    benchmark:
        "<benchmarks>/extract_template/{cohort}/{scan}.tsv"
    wildcard_constraints:
        cohort="|".join(simulated_cohorts) or "no-simulated-cohort",
        scan="template",


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
        mem_mb=500,
        runtime=5,
    params:
        scans=scan_records,
        code=code_hash("dmir.cohorts"),
    script:
        "../workflow/scripts/list_scans.py"
