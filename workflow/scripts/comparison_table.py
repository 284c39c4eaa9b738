"""Compare all methods on all cohorts."""

from pathlib import Path

from dmir.job import job

with job(snakemake.log[0], snakemake.threads):
    import pandas as pd

    from dmir.report.tables import comparison_table
    from dmir.report.writing import write_table

    table = comparison_table(
        pd.read_parquet(snakemake.input.structures),
        pd.read_parquet(snakemake.input.pairs),
        snakemake.params.methods,
        snakemake.params.labels,
    )
    write_table(table, Path(snakemake.output.csv).with_suffix(""), caption="Comparison of the registration methods.")
