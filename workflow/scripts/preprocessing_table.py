"""Say what the preprocessing of every cohort cost and how it went."""

from pathlib import Path

from dmir.job import job

with job(snakemake.log[0], snakemake.threads):
    from dmir.report.origin import origin_of
    from dmir.report.preprocessing import preprocessing_table
    from dmir.report.writing import write_table
    from dmir.tables import read_table

    qualities = {Path(path).parent.name: read_table(path) for path in snakemake.input.quality}
    table = preprocessing_table(qualities, snakemake.params.left_out)
    caption = "Preprocessing of every cohort."
    origin = origin_of(snakemake.input.provenance, snakemake.input, snakemake.params.code["modules"])
    write_table(table, Path(snakemake.output.csv).with_suffix(""), caption=caption, origin=origin)
