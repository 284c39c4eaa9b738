ruleorder: preprocess_simulated_scan > preprocess_scan


rule preprocess_scan:
    input:
        unpack(files_of_scan),
        unpack(reference_of_scan),
    output:
        image="<results>/preprocessed/{cohort}/{scan}/image.nii.gz",
        labels="<results>/preprocessed/{cohort}/{scan}/labels.nii.gz",
        affine="<results>/preprocessed/{cohort}/{scan}/affine.mat",
        quality="<results>/preprocessed/{cohort}/{scan}/quality.json",
    log:
        "<logs>/preprocess_scan/{cohort}/{scan}.log",
    benchmark:
        "<benchmarks>/preprocess_scan/{cohort}/{scan}.tsv"
    conda:
        "../envs/dmir.yaml"
    threads: 1
    resources:
        mem_mb=growing(3000),  # 0.9 GB was measured for 160x192x160 voxels; whole heads and deepbet take more
        runtime=growing(20),
    params:
        settings=preprocess_settings,
        code=code_hash("dmir.preprocess.files"),
    script:
        "../workflow/scripts/preprocess_scan.py"


use rule preprocess_scan as preprocess_simulated_scan with:
    output:
        image="<results>/preprocessed/{cohort}/{scan}/image.nii.gz",
        labels="<results>/preprocessed/{cohort}/{scan}/labels.nii.gz",
        affine="<results>/preprocessed/{cohort}/{scan}/affine.mat",
        quality="<results>/preprocessed/{cohort}/{scan}/quality.json",
        truth="<results>/preprocessed/{cohort}/{scan}/truth.nii.gz",
    log:
        "<logs>/preprocess_simulated_scan/{cohort}/{scan}.log",
    benchmark:
        "<benchmarks>/preprocess_simulated_scan/{cohort}/{scan}.tsv"
    wildcard_constraints:
        cohort="|".join(simulated_cohorts) or "no-such-cohort",
        scan=r"sub-\d+",


rule gather_quality:
    input:
        scans=quality_files,
    output:
        table=report(
            "<results>/preprocessed/{cohort}/quality.csv",
            category="Preprocessing",
            labels={"cohort": "{cohort}", "table": "quality of every scan"},
            caption="../workflow/report/quality.rst",
        ),
    log:
        "<logs>/gather_quality/{cohort}.log",
    benchmark:
        "<benchmarks>/gather_quality/{cohort}.tsv"
    conda:
        "../envs/dmir.yaml"
    threads: 1
    resources:
        mem_mb=growing(500),
        runtime=growing(5),
    params:
        code=code_hash("dmir.preprocess.files"),
    script:
        "../workflow/scripts/gather_quality.py"


rule contact_sheet:
    input:
        images=preprocessed_images,
        scans=quality_files,
    output:
        png=report(
            "<results>/preprocessed/{cohort}/contact_sheet.png",
            category="Preprocessing",
            labels={"cohort": "{cohort}", "figure": "contact sheet"},
            caption="../workflow/report/contact_sheet.rst",
        ),
    log:
        "<logs>/contact_sheet/{cohort}.log",
    benchmark:
        "<benchmarks>/contact_sheet/{cohort}.tsv"
    conda:
        "../envs/dmir.yaml"
    threads: 1
    resources:
        mem_mb=growing(2000),
        runtime=growing(30),
    params:
        splits=splits_of_cohort,
        reference=reference_of_cohort,
        code=code_hash("dmir.preprocess.contact_sheet"),
    script:
        "../workflow/scripts/contact_sheet.py"
