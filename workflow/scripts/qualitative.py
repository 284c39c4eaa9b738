"""Draw one pair as every method registered it."""

from pathlib import Path

from dmir.job import job

with job(snakemake.log[0], snakemake.threads):
    from dmir.fields import load_field
    from dmir.report.examples import load_example
    from dmir.report.qualitative import qualitative_figure
    from dmir.report.style import save_figure
    from dmir.volumes import read_image

    files = snakemake.input
    figure = qualitative_figure(
        [load_example(path) for path in files.examples if Path(path).stat().st_size],  # empty: that method failed
        read_image(files.moving).data,
        read_image(files.fixed).data,
        planes=[snakemake.params.plane],
        truth=load_field(files.truth[0])[0] if files.truth else None,
    )
    save_figure(figure, Path(snakemake.output.png).with_suffix(""))
