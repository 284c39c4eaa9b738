"""List the registrations that failed."""

from pathlib import Path

from dmir.job import job

with job(snakemake.log[0], snakemake.threads):
    from dmir.report.failures import failures_table
    from dmir.report.origin import origin_of
    from dmir.report.writing import write_table
    from dmir.tables import read_scores

    table = failures_table(read_scores(snakemake.input.pairs), snakemake.params.methods)
    caption = "Registrations that failed."
    origin = origin_of(snakemake.input.provenance, snakemake.input, snakemake.params.code["modules"])
    write_table(table, Path(snakemake.output.csv).with_suffix(""), caption=caption, origin=origin)
