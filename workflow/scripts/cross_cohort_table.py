"""Compare the methods on cohorts that the networks have not seen."""

from pathlib import Path

from dmir.job import job

with job(snakemake.log[0], snakemake.threads):
    from dmir.report.cross_cohort import cross_cohort_table
    from dmir.report.origin import origin_of
    from dmir.report.writing import write_table
    from dmir.tables import read_table

    table = cross_cohort_table(read_table(snakemake.input.table), snakemake.params.trained_on)
    caption = f"Methods on cohorts other than {snakemake.params.trained_on}, which the networks were trained on."
    origin = origin_of(snakemake.input.provenance, snakemake.input, snakemake.params.code["modules"])
    write_table(table, Path(snakemake.output.csv).with_suffix(""), caption=caption, origin=origin)
