"""List what others published on the data sets that are tested."""

from pathlib import Path

from dmir.job import job

with job(snakemake.log[0], snakemake.threads):
    from dmir.report.origin import origin_of
    from dmir.report.published import published_table
    from dmir.report.writing import write_table

    table = published_table(snakemake.params.sources.values())
    caption = "Published figures."
    origin = origin_of(snakemake.input.provenance, snakemake.input, snakemake.params.code["modules"])
    write_table(table, Path(snakemake.output.csv).with_suffix(""), caption=caption, origin=origin)
