"""Draw Dice and folding against lambda."""

from pathlib import Path

from dmir.job import job

with job(snakemake.log[0], snakemake.threads):
    from dmir.report.origin import origin_of
    from dmir.report.studies import lambda_figure
    from dmir.report.style import save_figure
    from dmir.tables import read_table

    figure = lambda_figure(read_table(snakemake.input.table))
    origin = origin_of(snakemake.input.provenance, snakemake.input, snakemake.params.code["modules"])
    save_figure(figure, Path(snakemake.output.png).with_suffix(""), origin=origin)
