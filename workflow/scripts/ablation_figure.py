"""Draw the ablation."""

from pathlib import Path

from dmir.job import job

with job(snakemake.log[0], snakemake.threads):
    import pandas as pd

    from dmir.report.origin import origin_of
    from dmir.report.studies import ablation_figure
    from dmir.report.style import save_figure

    figure = ablation_figure(pd.read_csv(snakemake.input.table), snakemake.params.switches)
    origin = origin_of(snakemake.input.provenance, snakemake.input, snakemake.params.code["modules"])
    save_figure(figure, Path(snakemake.output.png).with_suffix(""), origin=origin)
