rule comparison_table:
    input:
        structures="<results>/scores/structures.parquet",
        pairs="<results>/scores/pairs.parquet",
        statistics=collect(
            "<results>/tables/statistics_{cohort}.csv", cohort=configuration.test_on
        ),
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
    log:
        "<logs>/comparison_table.log",
    benchmark:
        "<benchmarks>/comparison_table.tsv"
    conda:
        "../envs/dmir.yaml"
    threads: 1
    resources:
        mem_mb=1000,
        runtime=10,
    params:
        methods=configuration.methods,
        labels=configuration.scores.label_interpolation[0],
        reference=configuration.reference(),
        code=code_hash("dmir.report.tables", "dmir.report.writing"),
    script:
        "../workflow/scripts/comparison_table.py"


rule statistics_table:
    input:
        structures="<results>/scores/structures.parquet",
        pairs="<results>/scores/pairs.parquet",
        scans="<results>/cohorts/{cohort}/scans.csv",
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
    log:
        "<logs>/statistics_table/{cohort}.log",
    benchmark:
        "<benchmarks>/statistics_table/{cohort}.tsv"
    conda:
        "../envs/dmir.yaml"
    threads: 1
    resources:
        mem_mb=2000,
        runtime=10,
    params:
        methods=configuration.methods,
        labels=configuration.scores.label_interpolation[0],
        reference=configuration.reference(),
        resamples=configuration.report.bootstrap,
        code=code_hash("dmir.report.statistics", "dmir.report.writing"),
    script:
        "../workflow/scripts/statistics_table.py"


rule cross_cohort_table:
    input:
        table="<results>/tables/comparison.csv",
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
    log:
        "<logs>/cross_cohort_table.log",
    benchmark:
        "<benchmarks>/cross_cohort_table.tsv"
    conda:
        "../envs/dmir.yaml"
    threads: 1
    resources:
        mem_mb=1000,
        runtime=10,
    params:
        trained_on=configuration.train_on,
        code=code_hash("dmir.report.cross_cohort", "dmir.report.writing"),
    script:
        "../workflow/scripts/cross_cohort_table.py"


rule preprocessing_table:
    input:
        quality=collect(
            "<results>/preprocessed/{cohort}/quality.csv", cohort=used_cohorts
        ),
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
    log:
        "<logs>/preprocessing_table.log",
    benchmark:
        "<benchmarks>/preprocessing_table.tsv"
    conda:
        "../envs/dmir.yaml"
    threads: 1
    resources:
        mem_mb=1000,
        runtime=10,
    params:
        left_out={name: leaves_out_flagged(name) for name in used_cohorts},
        code=code_hash("dmir.report.preprocessing", "dmir.report.writing"),
    script:
        "../workflow/scripts/preprocessing_table.py"


rule structure_table:
    input:
        table=structure_set_file,
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
    log:
        "<logs>/structure_table/{cohort}.log",
    benchmark:
        "<benchmarks>/structure_table/{cohort}.tsv"
    conda:
        "../envs/dmir.yaml"
    threads: 1
    resources:
        mem_mb=1000,
        runtime=10,
    params:
        structures=structure_set,
        code=code_hash("dmir.report.tables", "dmir.report.writing"),
    script:
        "../workflow/scripts/structure_table.py"


rule dice_by_structure_table:
    input:
        structures="<results>/scores/structures.parquet",
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
    log:
        "<logs>/dice_by_structure_table/{cohort}.log",
    benchmark:
        "<benchmarks>/dice_by_structure_table/{cohort}.tsv"
    conda:
        "../envs/dmir.yaml"
    threads: 1
    resources:
        mem_mb=1000,
        runtime=10,
    params:
        methods=configuration.methods,
        labels=configuration.scores.label_interpolation[0],
        code=code_hash("dmir.report.tables", "dmir.report.writing"),
    script:
        "../workflow/scripts/dice_by_structure_table.py"


rule dice_by_structure:
    input:
        structures="<results>/scores/structures.parquet",
    output:
        png="<results>/figures/dice_by_structure_{cohort}.png",
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
        mem_mb=2000,
        runtime=10,
    params:
        methods=configuration.methods,
        labels=configuration.scores.label_interpolation[0],
        code=code_hash("dmir.report.boxplot"),
    script:
        "../workflow/scripts/dice_by_structure.py"


rule critical_difference:
    input:
        structures="<results>/scores/structures.parquet",
        pairs="<results>/scores/pairs.parquet",
        scans="<results>/cohorts/{cohort}/scans.csv",
    output:
        png="<results>/figures/critical_difference_{cohort}.png",
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
        mem_mb=2000,
        runtime=10,
    params:
        methods=configuration.methods,
        labels=configuration.scores.label_interpolation[0],
        code=code_hash("dmir.report.critical_difference"),
    script:
        "../workflow/scripts/critical_difference.py"


rule dice_against_time:
    input:
        table="<results>/tables/comparison.csv",
    output:
        png="<results>/figures/dice_against_time_{cohort}.png",
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
        mem_mb=2000,
        runtime=10,
    params:
        code=code_hash("dmir.report.tradeoffs"),
    script:
        "../workflow/scripts/dice_against_time.py"


rule dice_against_folding:
    input:
        table="<results>/tables/comparison.csv",
    output:
        png="<results>/figures/dice_against_folding_{cohort}.png",
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
        mem_mb=2000,
        runtime=10,
    params:
        code=code_hash("dmir.report.tradeoffs"),
    script:
        "../workflow/scripts/dice_against_folding.py"


rule training_table:
    input:
        histories=histories,
        summaries=summaries,
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
    log:
        "<logs>/training_table/{cohort}.log",
    benchmark:
        "<benchmarks>/training_table/{cohort}.tsv"
    conda:
        "../envs/dmir.yaml"
    threads: 1
    resources:
        mem_mb=1000,
        runtime=10,
    params:
        code=code_hash(
            "dmir.report.tables", "dmir.report.curves", "dmir.report.writing"
        ),
    script:
        "../workflow/scripts/training_table.py"


rule training_curves:
    input:
        histories=histories,
    output:
        png="<results>/figures/training_curves_{cohort}.png",
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
        mem_mb=2000,
        runtime=10,
    params:
        code=code_hash("dmir.report.curves"),
    script:
        "../workflow/scripts/training_curves.py"


rule qualitative:
    input:
        examples=examples,
        moving=pair_file("moving", "image"),
        fixed=pair_file("fixed", "image"),
        truths=truths_of_pair,
    output:
        png="<results>/figures/qualitative_{cohort}_{moving}__{fixed}.png",
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
        mem_mb=2000,
        runtime=10,
    params:
        plane=configuration.report.plane,
        code=code_hash("dmir.report.qualitative"),
    script:
        "../workflow/scripts/qualitative.py"


rule study_table:
    input:
        structures="<results>/scores/{study}.structures.parquet",
        pairs="<results>/scores/{study}.pairs.parquet",
        summaries=training_summaries,
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
    log:
        "<logs>/study_table/{study}.log",
    benchmark:
        "<benchmarks>/study_table/{study}.tsv"
    conda:
        "../envs/dmir.yaml"
    threads: 1
    resources:
        mem_mb=1000,
        runtime=10,
    params:
        rows=rows_of_study,
        labels=configuration.scores.label_interpolation[0],
        code=code_hash("dmir.report.studies", "dmir.report.writing"),
    script:
        "../workflow/scripts/study_table.py"


rule ablation_figure:
    input:
        table="<results>/tables/ablation.csv",
    output:
        png="<results>/figures/ablation.png",
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
        mem_mb=2000,
        runtime=10,
    params:
        switches=configuration.ablation.switches,
        code=code_hash("dmir.report.studies"),
    script:
        "../workflow/scripts/ablation_figure.py"


rule lambda_figure:
    input:
        table="<results>/tables/lambda_study.csv",
    output:
        png="<results>/figures/lambda_study.png",
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
        mem_mb=2000,
        runtime=10,
    params:
        code=code_hash("dmir.report.studies"),
    script:
        "../workflow/scripts/lambda_figure.py"
