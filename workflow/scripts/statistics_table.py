"""Test every method of a cohort against the reference."""

from pathlib import Path

from dmir.job import job

with job(snakemake.log[0], snakemake.threads):
    from dmir.report.origin import origin_of
    from dmir.report.statistics import statistics_table
    from dmir.report.writing import write_table
    from dmir.tables import read_scores, read_table

    cohort = snakemake.wildcards.cohort
    table = statistics_table(
        read_scores(snakemake.input.structures, cohort),
        read_scores(snakemake.input.pairs, cohort),
        read_table(snakemake.input.scans, dtype=str, keep_default_na=False),
        snakemake.params.methods,
        snakemake.params.reference,
        labels=snakemake.params.labels,
        resamples=snakemake.params.resamples,
    )
    caption = f"Differences between the methods, {cohort}."
    origin = origin_of(snakemake.input.provenance, snakemake.input, snakemake.params.code["modules"])
    write_table(table, Path(snakemake.output.csv).with_suffix(""), caption=caption, origin=origin)
