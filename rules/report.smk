rule provenance:
    input:
        data=collect("<results>/cohorts/{cohort}/scans.csv", cohort=used_cohorts),
        weights=weights_of_tables,
    output:
        "<results>/provenance/run.json",
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
        configuration=numbers_hash,
        scoring=scoring_code,
        code=code_hash("dmir.report.origin"),
    script:
        "../workflow/scripts/provenance.py"


use rule provenance as study_provenance with:
    output:
        "<results>/provenance/{study}.json",
    log:
        "<logs>/study_provenance/{study}.log",
    benchmark:
        "<benchmarks>/study_provenance/{study}.tsv"


rule comparison_table:
    input:
        structures="<results>/scores/structures.parquet",
        pairs="<results>/scores/pairs.parquet",
        statistics=collect(
            "<results>/tables/statistics_{cohort}.csv", cohort=configuration.test_on
        ),
        published=published_files("protocols", "scores"),
        provenance="<results>/provenance/run.json",
    output:
        html=report(
            "<results>/tables/comparison.html",
            category="Tables",
            labels={"table": "comparison of all methods"},
            caption="../workflow/report/comparison.rst",
        ),
        csv="<results>/tables/comparison.csv",
        md="<results>/tables/comparison.md",
        tex="<results>/tables/comparison.tex",
        json="<results>/tables/comparison.json",
    log:
        "<logs>/comparison_table.log",
    benchmark:
        "<benchmarks>/comparison_table.tsv"
    conda:
        "../envs/dmir.yaml"
    threads: 1
    resources:
        mem_mb=growing(1000 + score_rows // 1500),
        runtime=growing(10),
    params:
        methods=configuration.methods,
        labels=configuration.scores.label_interpolation[0],
        reference=configuration.reference(),
        sources=source_of_cohort(),
        code=code_record("dmir.report.tables", "dmir.report.writing"),
    script:
        "../workflow/scripts/comparison_table.py"


rule statistics_table:
    input:
        structures="<results>/scores/structures.parquet",
        pairs="<results>/scores/pairs.parquet",
        scans="<results>/cohorts/{cohort}/scans.csv",
        provenance="<results>/provenance/run.json",
    output:
        html=report(
            "<results>/tables/statistics_{cohort}.html",
            category="Tables",
            labels={"table": "statistics", "cohort": "{cohort}"},
            caption="../workflow/report/statistics.rst",
        ),
        csv="<results>/tables/statistics_{cohort}.csv",
        md="<results>/tables/statistics_{cohort}.md",
        tex="<results>/tables/statistics_{cohort}.tex",
        json="<results>/tables/statistics_{cohort}.json",
    log:
        "<logs>/statistics_table/{cohort}.log",
    benchmark:
        "<benchmarks>/statistics_table/{cohort}.tsv"
    conda:
        "../envs/dmir.yaml"
    threads: 1
    resources:
        mem_mb=growing(2000 + score_rows // 1500),
        runtime=growing(10),
    params:
        methods=configuration.methods,
        labels=configuration.scores.label_interpolation[0],
        reference=configuration.reference(),
        resamples=configuration.report.bootstrap,
        code=code_record("dmir.report.statistics", "dmir.report.writing"),
    script:
        "../workflow/scripts/statistics_table.py"


rule topology_table:
    input:
        structures="<results>/scores/structures.parquet",
        pairs="<results>/scores/pairs.parquet",
        provenance="<results>/provenance/run.json",
    output:
        html=report(
            "<results>/tables/topology.html",
            category="Tables",
            labels={"table": "topology of the warped labels"},
            caption="../workflow/report/topology.rst",
        ),
        csv="<results>/tables/topology.csv",
        md="<results>/tables/topology.md",
        tex="<results>/tables/topology.tex",
        json="<results>/tables/topology.json",
    log:
        "<logs>/topology_table.log",
    benchmark:
        "<benchmarks>/topology_table.tsv"
    conda:
        "../envs/dmir.yaml"
    threads: 1
    resources:
        mem_mb=growing(1000 + score_rows // 1500),
        runtime=growing(10),
    params:
        methods=configuration.methods,
        code=code_record("dmir.report.topology", "dmir.report.writing"),
    script:
        "../workflow/scripts/topology_table.py"


rule failures_table:
    input:
        pairs="<results>/scores/pairs.parquet",
        provenance="<results>/provenance/run.json",
    output:
        html=report(
            "<results>/tables/failures.html",
            category="Tables",
            labels={"table": "registrations that failed"},
            caption="../workflow/report/failures.rst",
        ),
        csv="<results>/tables/failures.csv",
        md="<results>/tables/failures.md",
        tex="<results>/tables/failures.tex",
        json="<results>/tables/failures.json",
    log:
        "<logs>/failures_table.log",
    benchmark:
        "<benchmarks>/failures_table.tsv"
    conda:
        "../envs/dmir.yaml"
    threads: 1
    resources:
        mem_mb=growing(1000),
        runtime=growing(10),
    params:
        methods=configuration.methods,
        code=code_record("dmir.report.failures", "dmir.report.writing"),
    script:
        "../workflow/scripts/failures_table.py"


rule published_table:
    input:
        figures=published_files("protocols", "scores"),
        provenance="<results>/provenance/run.json",
    output:
        html=report(
            "<results>/tables/published.html",
            category="Tables",
            labels={"table": "published figures"},
            caption="../workflow/report/published.rst",
        ),
        csv="<results>/tables/published.csv",
        md="<results>/tables/published.md",
        tex="<results>/tables/published.tex",
        json="<results>/tables/published.json",
    log:
        "<logs>/published_table.log",
    benchmark:
        "<benchmarks>/published_table.tsv"
    conda:
        "../envs/dmir.yaml"
    threads: 1
    resources:
        mem_mb=growing(1000),
        runtime=growing(10),
    params:
        sources=source_of_cohort(),
        code=code_record("dmir.report.published", "dmir.report.writing"),
    script:
        "../workflow/scripts/published_table.py"


rule cross_cohort_table:
    input:
        table="<results>/tables/comparison.csv",
        provenance="<results>/provenance/run.json",
    output:
        html=report(
            "<results>/tables/cross_cohort.html",
            category="Tables",
            labels={"table": "unseen cohorts"},
            caption="../workflow/report/cross_cohort.rst",
        ),
        csv="<results>/tables/cross_cohort.csv",
        md="<results>/tables/cross_cohort.md",
        tex="<results>/tables/cross_cohort.tex",
        json="<results>/tables/cross_cohort.json",
    log:
        "<logs>/cross_cohort_table.log",
    benchmark:
        "<benchmarks>/cross_cohort_table.tsv"
    conda:
        "../envs/dmir.yaml"
    threads: 1
    resources:
        mem_mb=growing(1000),
        runtime=growing(10),
    params:
        trained_on=configuration.train_on,
        code=code_record("dmir.report.cross_cohort", "dmir.report.writing"),
    script:
        "../workflow/scripts/cross_cohort_table.py"


rule preprocessing_table:
    input:
        quality=collect(
            "<results>/preprocessed/{cohort}/quality.csv", cohort=used_cohorts
        ),
        provenance="<results>/provenance/run.json",
    output:
        html=report(
            "<results>/tables/preprocessing.html",
            category="Preprocessing",
            labels={"table": "cost and overlap"},
            caption="../workflow/report/preprocessing.rst",
        ),
        csv="<results>/tables/preprocessing.csv",
        md="<results>/tables/preprocessing.md",
        tex="<results>/tables/preprocessing.tex",
        json="<results>/tables/preprocessing.json",
    log:
        "<logs>/preprocessing_table.log",
    benchmark:
        "<benchmarks>/preprocessing_table.tsv"
    conda:
        "../envs/dmir.yaml"
    threads: 1
    resources:
        mem_mb=growing(1000),
        runtime=growing(10),
    params:
        left_out={name: leaves_out_flagged(name) for name in used_cohorts},
        code=code_record("dmir.report.preprocessing", "dmir.report.writing"),
    script:
        "../workflow/scripts/preprocessing_table.py"


rule structure_table:
    input:
        table=structure_set_file,
        provenance="<results>/provenance/run.json",
    output:
        html=report(
            "<results>/tables/structures_{cohort}.html",
            category="Tables",
            labels={"table": "structures", "cohort": "{cohort}"},
            caption="../workflow/report/structures.rst",
        ),
        csv="<results>/tables/structures_{cohort}.csv",
        md="<results>/tables/structures_{cohort}.md",
        tex="<results>/tables/structures_{cohort}.tex",
        json="<results>/tables/structures_{cohort}.json",
    log:
        "<logs>/structure_table/{cohort}.log",
    benchmark:
        "<benchmarks>/structure_table/{cohort}.tsv"
    conda:
        "../envs/dmir.yaml"
    threads: 1
    resources:
        mem_mb=growing(1000),
        runtime=growing(10),
    params:
        structures=structure_set,
        code=code_record("dmir.report.tables", "dmir.report.writing"),
    script:
        "../workflow/scripts/structure_table.py"


rule dice_by_structure_table:
    input:
        structures="<results>/scores/structures.parquet",
        provenance="<results>/provenance/run.json",
    output:
        html=report(
            "<results>/tables/dice_by_structure_{cohort}.html",
            category="Tables",
            labels={"table": "Dice by structure", "cohort": "{cohort}"},
            caption="../workflow/report/dice_by_structure.rst",
        ),
        csv="<results>/tables/dice_by_structure_{cohort}.csv",
        md="<results>/tables/dice_by_structure_{cohort}.md",
        tex="<results>/tables/dice_by_structure_{cohort}.tex",
        json="<results>/tables/dice_by_structure_{cohort}.json",
    log:
        "<logs>/dice_by_structure_table/{cohort}.log",
    benchmark:
        "<benchmarks>/dice_by_structure_table/{cohort}.tsv"
    conda:
        "../envs/dmir.yaml"
    threads: 1
    resources:
        mem_mb=growing(1000 + score_rows // 1500),
        runtime=growing(10),
    params:
        methods=configuration.methods,
        labels=configuration.scores.label_interpolation[0],
        code=code_record("dmir.report.tables", "dmir.report.writing"),
    script:
        "../workflow/scripts/dice_by_structure_table.py"


rule dice_by_structure:
    input:
        structures="<results>/scores/structures.parquet",
        provenance="<results>/provenance/run.json",
    output:
        png="<results>/figures/dice_by_structure_{cohort}.png",
        pdf="<results>/figures/dice_by_structure_{cohort}.pdf",
        json="<results>/figures/dice_by_structure_{cohort}.json",
        svg=report(
            "<results>/figures/dice_by_structure_{cohort}.svg",
            category="Figures",
            labels={"figure": "Dice by structure", "cohort": "{cohort}"},
            caption="../workflow/report/dice_by_structure.rst",
        ),
    log:
        "<logs>/dice_by_structure/{cohort}.log",
    benchmark:
        "<benchmarks>/dice_by_structure/{cohort}.tsv"
    conda:
        "../envs/dmir.yaml"
    threads: 1
    resources:
        mem_mb=growing(2000 + score_rows // 1500),
        runtime=growing(10),
    params:
        methods=configuration.methods,
        labels=configuration.scores.label_interpolation[0],
        code=code_record("dmir.report.boxplot"),
    script:
        "../workflow/scripts/dice_by_structure.py"


rule critical_difference:
    input:
        structures="<results>/scores/structures.parquet",
        pairs="<results>/scores/pairs.parquet",
        scans="<results>/cohorts/{cohort}/scans.csv",
        provenance="<results>/provenance/run.json",
    output:
        png="<results>/figures/critical_difference_{cohort}.png",
        pdf="<results>/figures/critical_difference_{cohort}.pdf",
        json="<results>/figures/critical_difference_{cohort}.json",
        svg=report(
            "<results>/figures/critical_difference_{cohort}.svg",
            category="Figures",
            labels={"figure": "critical difference", "cohort": "{cohort}"},
            caption="../workflow/report/critical_difference.rst",
        ),
    log:
        "<logs>/critical_difference/{cohort}.log",
    benchmark:
        "<benchmarks>/critical_difference/{cohort}.tsv"
    conda:
        "../envs/dmir.yaml"
    threads: 1
    resources:
        mem_mb=growing(2000 + score_rows // 1500),
        runtime=growing(10),
    params:
        methods=configuration.methods,
        labels=configuration.scores.label_interpolation[0],
        code=code_record("dmir.report.critical_difference"),
    script:
        "../workflow/scripts/critical_difference.py"


rule dice_against_age:
    input:
        structures="<results>/scores/structures.parquet",
        pairs="<results>/scores/pairs.parquet",
        scans="<results>/cohorts/{cohort}/scans.csv",
        provenance="<results>/provenance/run.json",
    output:
        png="<results>/figures/dice_against_age_{cohort}.png",
        pdf="<results>/figures/dice_against_age_{cohort}.pdf",
        json="<results>/figures/dice_against_age_{cohort}.json",
        svg=report(
            "<results>/figures/dice_against_age_{cohort}.svg",
            category="Figures",
            labels={"figure": "Dice against age", "cohort": "{cohort}"},
            caption="../workflow/report/dice_against_age.rst",
        ),
    log:
        "<logs>/dice_against_age/{cohort}.log",
    benchmark:
        "<benchmarks>/dice_against_age/{cohort}.tsv"
    conda:
        "../envs/dmir.yaml"
    threads: 1
    resources:
        mem_mb=growing(2000 + score_rows // 1500),
        runtime=growing(10),
    params:
        methods=configuration.methods,
        labels=configuration.scores.label_interpolation[0],
        code=code_record("dmir.report.age"),
    script:
        "../workflow/scripts/dice_against_age.py"


rule dice_against_time:
    input:
        table="<results>/tables/comparison.csv",
        provenance="<results>/provenance/run.json",
    output:
        png="<results>/figures/dice_against_time_{cohort}.png",
        pdf="<results>/figures/dice_against_time_{cohort}.pdf",
        json="<results>/figures/dice_against_time_{cohort}.json",
        svg=report(
            "<results>/figures/dice_against_time_{cohort}.svg",
            category="Figures",
            labels={"figure": "Dice against time", "cohort": "{cohort}"},
            caption="../workflow/report/dice_against_time.rst",
        ),
    log:
        "<logs>/dice_against_time/{cohort}.log",
    benchmark:
        "<benchmarks>/dice_against_time/{cohort}.tsv"
    conda:
        "../envs/dmir.yaml"
    threads: 1
    resources:
        mem_mb=growing(2000),
        runtime=growing(10),
    params:
        code=code_record("dmir.report.tradeoffs"),
    script:
        "../workflow/scripts/dice_against_time.py"


rule dice_against_folding:
    input:
        table="<results>/tables/comparison.csv",
        provenance="<results>/provenance/run.json",
    output:
        png="<results>/figures/dice_against_folding_{cohort}.png",
        pdf="<results>/figures/dice_against_folding_{cohort}.pdf",
        json="<results>/figures/dice_against_folding_{cohort}.json",
        svg=report(
            "<results>/figures/dice_against_folding_{cohort}.svg",
            category="Figures",
            labels={"figure": "Dice against folding", "cohort": "{cohort}"},
            caption="../workflow/report/dice_against_folding.rst",
        ),
    log:
        "<logs>/dice_against_folding/{cohort}.log",
    benchmark:
        "<benchmarks>/dice_against_folding/{cohort}.tsv"
    conda:
        "../envs/dmir.yaml"
    threads: 1
    resources:
        mem_mb=growing(2000),
        runtime=growing(10),
    params:
        code=code_record("dmir.report.tradeoffs"),
    script:
        "../workflow/scripts/dice_against_folding.py"


rule training_table:
    input:
        histories=histories,
        summaries=summaries,
        provenance="<results>/provenance/run.json",
    output:
        html=report(
            "<results>/tables/trainings_{cohort}.html",
            category="Training",
            labels={"table": "trainings", "cohort": "{cohort}"},
            caption="../workflow/report/training_table.rst",
        ),
        csv="<results>/tables/trainings_{cohort}.csv",
        md="<results>/tables/trainings_{cohort}.md",
        tex="<results>/tables/trainings_{cohort}.tex",
        json="<results>/tables/trainings_{cohort}.json",
    log:
        "<logs>/training_table/{cohort}.log",
    benchmark:
        "<benchmarks>/training_table/{cohort}.tsv"
    conda:
        "../envs/dmir.yaml"
    threads: 1
    resources:
        mem_mb=growing(1000),
        runtime=growing(10),
    params:
        code=code_record(
            "dmir.report.tables", "dmir.report.curves", "dmir.report.writing"
        ),
    script:
        "../workflow/scripts/training_table.py"


rule training_curves:
    input:
        histories=histories,
        provenance="<results>/provenance/run.json",
    output:
        png="<results>/figures/training_curves_{cohort}.png",
        pdf="<results>/figures/training_curves_{cohort}.pdf",
        json="<results>/figures/training_curves_{cohort}.json",
        svg=report(
            "<results>/figures/training_curves_{cohort}.svg",
            category="Training",
            labels={"figure": "training curves", "cohort": "{cohort}"},
            caption="../workflow/report/training_curves.rst",
        ),
    log:
        "<logs>/training_curves/{cohort}.log",
    benchmark:
        "<benchmarks>/training_curves/{cohort}.tsv"
    conda:
        "../envs/dmir.yaml"
    threads: 1
    resources:
        mem_mb=growing(2000),
        runtime=growing(10),
    params:
        code=code_record("dmir.report.curves"),
    script:
        "../workflow/scripts/training_curves.py"


rule qualitative:
    input:
        examples=examples,
        moving=pair_file("moving", "image"),
        fixed=pair_file("fixed", "image"),
        truths=truths_of_pair,
        provenance="<results>/provenance/run.json",
    output:
        png="<results>/figures/qualitative_{cohort}_{moving}__{fixed}.png",
        pdf="<results>/figures/qualitative_{cohort}_{moving}__{fixed}.pdf",
        json="<results>/figures/qualitative_{cohort}_{moving}__{fixed}.json",
        svg=report(
            "<results>/figures/qualitative_{cohort}_{moving}__{fixed}.svg",
            category="Figures",
            labels={
                "figure": "qualitative",
                "cohort": "{cohort}",
                "moving": "{moving}",
                "fixed": "{fixed}",
            },
            caption="../workflow/report/qualitative.rst",
        ),
    log:
        "<logs>/qualitative/{cohort}/{moving}__{fixed}.log",
    benchmark:
        "<benchmarks>/qualitative/{cohort}/{moving}__{fixed}.tsv"
    conda:
        "../envs/dmir.yaml"
    threads: 1
    resources:
        mem_mb=growing(2000 + voxels // 3000),
        runtime=growing(10),
    params:
        planes=configuration.report.planes,
        code=code_record("dmir.report.qualitative"),
    script:
        "../workflow/scripts/qualitative.py"


rule contours:
    input:
        examples=examples,
        moving_labels=pair_file("moving", "labels"),
        fixed_labels=pair_file("fixed", "labels"),
        provenance="<results>/provenance/run.json",
    output:
        png="<results>/figures/contours_{cohort}_{moving}__{fixed}.png",
        pdf="<results>/figures/contours_{cohort}_{moving}__{fixed}.pdf",
        json="<results>/figures/contours_{cohort}_{moving}__{fixed}.json",
        svg=report(
            "<results>/figures/contours_{cohort}_{moving}__{fixed}.svg",
            category="Figures",
            labels={
                "figure": "surfaces",
                "cohort": "{cohort}",
                "moving": "{moving}",
                "fixed": "{fixed}",
            },
            caption="../workflow/report/contours.rst",
        ),
    log:
        "<logs>/contours/{cohort}/{moving}__{fixed}.log",
    benchmark:
        "<benchmarks>/contours/{cohort}/{moving}__{fixed}.tsv"
    conda:
        "../envs/dmir.yaml"
    threads: 1
    resources:
        mem_mb=growing(2000 + voxels // 3000),
        runtime=growing(10),
    params:
        structures=structure_set,
        surfaces=surfaces_of_cohort,
        labels=configuration.scores.label_interpolation[0],
        code=code_record("dmir.report.contours"),
    script:
        "../workflow/scripts/contours.py"


rule study_table:
    input:
        structures="<results>/scores/{study}.structures.parquet",
        pairs="<results>/scores/{study}.pairs.parquet",
        summaries=training_summaries,
        published=published_files("ablation"),
        provenance="<results>/provenance/{study}.json",
    output:
        html=report(
            "<results>/tables/{study}.html",
            category="Studies",
            labels={"table": "{study}"},
            caption="../workflow/report/study_table.rst",
        ),
        csv="<results>/tables/{study}.csv",
        md="<results>/tables/{study}.md",
        tex="<results>/tables/{study}.tex",
        json="<results>/tables/{study}.json",
    log:
        "<logs>/study_table/{study}.log",
    benchmark:
        "<benchmarks>/study_table/{study}.tsv"
    conda:
        "../envs/dmir.yaml"
    threads: 1
    resources:
        mem_mb=growing(1000 + score_rows // 1500),
        runtime=growing(10),
    params:
        rows=rows_of_study,
        labels=configuration.scores.label_interpolation[0],
        code=code_record("dmir.report.studies", "dmir.report.writing"),
    script:
        "../workflow/scripts/study_table.py"


rule ablation_figure:
    input:
        table="<results>/tables/ablation.csv",
        provenance="<results>/provenance/ablation.json",
    output:
        png="<results>/figures/ablation.png",
        pdf="<results>/figures/ablation.pdf",
        json="<results>/figures/ablation.json",
        svg=report(
            "<results>/figures/ablation.svg",
            category="Studies",
            labels={"figure": "ablation"},
            caption="../workflow/report/ablation.rst",
        ),
    log:
        "<logs>/ablation_figure.log",
    benchmark:
        "<benchmarks>/ablation_figure.tsv"
    conda:
        "../envs/dmir.yaml"
    threads: 1
    resources:
        mem_mb=growing(2000),
        runtime=growing(10),
    params:
        switches=configuration.ablation.switches,
        code=code_record("dmir.report.studies"),
    script:
        "../workflow/scripts/ablation_figure.py"


rule lambda_figure:
    input:
        table="<results>/tables/lambda_study.csv",
        provenance="<results>/provenance/lambda_study.json",
    output:
        png="<results>/figures/lambda_study.png",
        pdf="<results>/figures/lambda_study.pdf",
        json="<results>/figures/lambda_study.json",
        svg=report(
            "<results>/figures/lambda_study.svg",
            category="Studies",
            labels={"figure": "lambda study"},
            caption="../workflow/report/lambda_study.rst",
        ),
    log:
        "<logs>/lambda_figure.log",
    benchmark:
        "<benchmarks>/lambda_figure.tsv"
    conda:
        "../envs/dmir.yaml"
    threads: 1
    resources:
        mem_mb=growing(2000),
        runtime=growing(10),
    params:
        code=code_record("dmir.report.studies"),
    script:
        "../workflow/scripts/lambda_figure.py"


rule report_page:
    input:
        tables=collect("<results>/tables/{table}.html", table=tables()),
        csv=collect("<results>/tables/{table}.csv", table=tables()),
        figures=collect(
            "<results>/figures/{figure}.{suffix}",
            figure=figures(),
            suffix=["svg", "png", "json"],
        ),
        origins=collect("<results>/tables/{table}.json", table=tables()),
        scans=collect("<results>/cohorts/{cohort}/scans.csv", cohort=used_cohorts),
        examples=examples_of_page,
        volumes=volumes_of_page,
        summaries=summaries_of_page,
    output:
        "<results>/report.html",
    log:
        "<logs>/report_page.log",
    benchmark:
        "<benchmarks>/report_page.tsv"
    conda:
        "../envs/dmir.yaml"
    threads: 1
    resources:
        mem_mb=growing(1500 + voxels // 1200),
        runtime=growing(30),
    params:
        configuration=configuration.model_dump(mode="json"),
        tables=tables() + finished_studies(),
        figures=figures() + finished_studies(),
        pairs=pairs_of_page(),
        methods=configuration.methods,
        models={method: models_of(method)[0] for method in configuration.methods},
        labels=configuration.scores.label_interpolation[0],
        reference=configuration.reference(),
        assets=file_hash(Path(workflow.basedir, "src/dmir/report/page/assets")),
        code=code_hash("dmir.report.page"),
    script:
        "../workflow/scripts/report_page.py"
