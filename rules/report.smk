rule provenance:
    input:
        data=collect(paths.scans(), cohort=run.cohorts),
        weights=run.weights_of_scores,
    output:
        paths.provenance(),
    log:
        "<logs>/provenance.log",
    benchmark:
        "<benchmarks>/provenance.tsv"
    conda:
        "../envs/dmir.yaml"
    threads: 1
    resources:
        mem_mb=growing(500),
        runtime=growing(10),
    params:
        configuration=run.numbers_hash,
        scoring=run.scoring_code,
        code=code_hash("dmir.report.origin"),
    script:
        "../workflow/scripts/provenance.py"


use rule provenance as study_provenance with:
    output:
        paths.provenance("{study}"),
    log:
        "<logs>/study_provenance/{study}.log",
    benchmark:
        "<benchmarks>/study_provenance/{study}.tsv"


# the tables and figures of src/dmir/report/products.py; kin share a rule: comparison_tables, pictures, ...
for name, kin in run.product_rules().items():

    rule:
        name:
            name
        input:
            **run.needs_of(*kin),
        output:
            *shown_in_report(kin),
        log:
            f"<logs>/{kin[0].log}.log",
        benchmark:
            f"<benchmarks>/{kin[0].log}.tsv"
        conda:
            "../envs/dmir.yaml"
        threads: 1
        resources:
            mem_mb=growing(run.memory_of(*kin)),
            runtime=growing(10),
        params:
            **run.params_of(*kin),
        script:
            "../workflow/scripts/products.py"


rule report_page:
    input:
        **run.page_files(),
    output:
        paths.report(),
    log:
        "<logs>/report_page.log",
    benchmark:
        "<benchmarks>/report_page.tsv"
    conda:
        "../envs/dmir.yaml"
    threads: 1
    resources:
        mem_mb=growing(1500 + run.voxels // 1200),
        runtime=growing(30),
    params:
        **run.page_params(),
    script:
        "../workflow/scripts/report_page.py"
