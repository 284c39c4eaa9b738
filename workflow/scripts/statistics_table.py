"""Test every method of a cohort against the reference."""

from pathlib import Path

from dmir.job import job

with job(snakemake.log[0], snakemake.threads):
    import pandas as pd

    from dmir.report.statistics import statistics_table
    from dmir.report.writing import write_table

    cohort = snakemake.wildcards.cohort
    structures, pairs = pd.read_parquet(snakemake.input.structures), pd.read_parquet(snakemake.input.pairs)
    table = statistics_table(
        structures[structures["cohort"] == cohort],
        pairs[pairs["cohort"] == cohort],
        pd.read_csv(snakemake.input.scans, dtype=str, keep_default_na=False),
        snakemake.params.methods,
        snakemake.params.reference,
        labels=snakemake.params.labels,
        resamples=snakemake.params.resamples,
    )
    caption = f"Differences between the methods, {cohort}."
    write_table(table, Path(snakemake.output.csv).with_suffix(""), caption=caption)
