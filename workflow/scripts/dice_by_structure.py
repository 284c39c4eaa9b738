"""Draw Dice by structure and method."""

from pathlib import Path

from dmir.job import job

with job(snakemake.log[0], snakemake.threads):
    import pandas as pd

    from dmir.report.boxplot import dice_boxplot
    from dmir.report.origin import origin_of
    from dmir.report.style import save_figure

    cohort = snakemake.wildcards.cohort
    scores = pd.read_parquet(snakemake.input.structures, filters=[("cohort", "==", cohort)])
    figure = dice_boxplot(scores, snakemake.params.methods, labels=snakemake.params.labels, cohort=cohort)
    origin = origin_of(snakemake.input.provenance, snakemake.input, snakemake.params.code["modules"])
    save_figure(figure, Path(snakemake.output.png).with_suffix(""), origin=origin)
