ruleorder: preprocess_simulated_scan > preprocess_scan


rule preprocess_scan:
    input:
        unpack(run.files_of_scan),
        unpack(run.reference_of_scan),
    output:
        image=paths.preprocessed("image.nii.gz"),
        labels=paths.preprocessed("labels.nii.gz"),
        affine=paths.preprocessed("affine.mat"),
        quality=paths.preprocessed("quality.json"),
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
        settings=run.preprocess_settings,
        code=code_hash("dmir.preprocess.files"),
    script:
        "../workflow/scripts/preprocess_scan.py"


use rule preprocess_scan as preprocess_simulated_scan with:
    output:
        image=paths.preprocessed("image.nii.gz"),
        labels=paths.preprocessed("labels.nii.gz"),
        affine=paths.preprocessed("affine.mat"),
        quality=paths.preprocessed("quality.json"),
        truth=paths.preprocessed("truth.nii.gz"),
    log:
        "<logs>/preprocess_simulated_scan/{cohort}/{scan}.log",
    benchmark:
        "<benchmarks>/preprocess_simulated_scan/{cohort}/{scan}.tsv"
    wildcard_constraints:
        cohort=one_of(run.simulated),
        scan=r"sub-\d+",


rule gather_quality:
    input:
        scans=run.quality_files,
    output:
        table=report(
            paths.quality(),
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
        images=run.preprocessed_images,
        scans=run.quality_files,
    output:
        png=report(
            paths.contact_sheet(),
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
        splits=run.splits_of_cohort,
        reference=run.reference_of_cohort,
        code=code_hash("dmir.preprocess.contact_sheet"),
    script:
        "../workflow/scripts/contact_sheet.py"
