"""Draw the mean ranks of the methods with the critical difference."""

from pathlib import Path

from dmir.job import job

with job(snakemake.log[0], snakemake.threads):
    from dmir.report.critical_difference import critical_difference_figure
    from dmir.report.origin import origin_of
    from dmir.report.style import save_figure
    from dmir.tables import read_scores, read_table

    cohort = snakemake.wildcards.cohort
    figure = critical_difference_figure(
        read_scores(snakemake.input.structures, cohort),
        read_scores(snakemake.input.pairs, cohort),
        read_table(snakemake.input.scans, dtype=str, keep_default_na=False),
        snakemake.params.methods,
        labels=snakemake.params.labels,
    )
    origin = origin_of(snakemake.input.provenance, snakemake.input, snakemake.params.code["modules"])
    save_figure(figure, Path(snakemake.output.png).with_suffix(""), origin=origin)
