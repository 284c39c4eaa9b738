"""Draw Dice by structure and method."""

from pathlib import Path

from dmir.job import job

with job(snakemake.log[0], snakemake.threads):
    from dmir.report.boxplot import dice_boxplot
    from dmir.report.origin import origin_of
    from dmir.report.style import save_figure
    from dmir.tables import read_scores

    cohort = snakemake.wildcards.cohort
    scores = read_scores(snakemake.input.structures, cohort)
    figure = dice_boxplot(scores, snakemake.params.methods, labels=snakemake.params.labels, cohort=cohort)
    origin = origin_of(snakemake.input.provenance, snakemake.input, snakemake.params.code["modules"])
    save_figure(figure, Path(snakemake.output.png).with_suffix(""), origin=origin)
