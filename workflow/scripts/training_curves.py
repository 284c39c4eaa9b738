"""Draw the training curves of all models of a cohort."""

from pathlib import Path

from dmir.job import job

with job(snakemake.log[0], snakemake.threads):
    from dmir.report.curves import read_history, training_curves
    from dmir.report.style import save_figure

    paths = [Path(path) for path in snakemake.input.histories]
    histories = {(path.parts[-3], path.parts[-2]): read_history(path) for path in paths}
    save_figure(training_curves(histories), Path(snakemake.output.png).with_suffix(""))
