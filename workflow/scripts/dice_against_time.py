"""Draw Dice against time."""

from pathlib import Path

from dmir.job import job

with job(snakemake.log[0], snakemake.threads):
    from dmir.report.origin import origin_of
    from dmir.report.style import save_figure
    from dmir.report.tradeoffs import dice_against_time
    from dmir.tables import read_table

    table = read_table(snakemake.input.table)
    table = table[table["cohort"] == snakemake.wildcards.cohort]
    figure = dice_against_time(table)
    origin = origin_of(snakemake.input.provenance, snakemake.input, snakemake.params.code["modules"])
    save_figure(figure, Path(snakemake.output.png).with_suffix(""), origin=origin)
