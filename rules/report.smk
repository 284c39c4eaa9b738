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


# a rule for each table and figure of src/dmir/report/products.py, by its name: comparison_table, qualitative, ...
for product in PRODUCTS:

    rule:
        name:
            product.name
        input:
            **run.needs_of(product),
        output:
            report(
                paths.product(product.files[0]),
                category=product.category,
                labels=product.labels,
                caption=(
                    f"../workflow/report/{product.text}.rst" if product.text else None
                ),
            ),
            *map(paths.product, product.files[1:]),
        log:
            f"<logs>/{product.log}.log",
        benchmark:
            f"<benchmarks>/{product.log}.tsv"
        conda:
            "../envs/dmir.yaml"
        threads: 1
        resources:
            mem_mb=growing(run.memory_of(product)),
            runtime=growing(10),
        params:
            **run.params_of(product),
        script:
            "../workflow/scripts/product.py"


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
