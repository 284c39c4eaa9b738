"""Draw the training curves of all models of a cohort."""

from pathlib import Path

from dmir.job import job

with job(snakemake.log[0], snakemake.threads):
    from dmir.report.curves import read_history, training_curves
    from dmir.report.origin import origin_of
    from dmir.report.style import save_figure

    paths = [Path(path) for path in snakemake.input.histories]
    histories = {(path.parts[-3], path.parts[-2]): read_history(path) for path in paths}
    figure = training_curves(histories)
    origin = origin_of(snakemake.input.provenance, snakemake.input, snakemake.params.code["modules"])
    save_figure(figure, Path(snakemake.output.png).with_suffix(""), origin=origin)
