"""Draw structures of one pair as surfaces, before registration and after every method."""

from pathlib import Path

from dmir.job import job

with job(snakemake.log[0], snakemake.threads):
    from dmir.report.contours import contours_figure
    from dmir.report.examples import load_example
    from dmir.report.origin import origin_of
    from dmir.report.style import save_figure
    from dmir.structures import load_structures
    from dmir.volumes import read_labels

    files = snakemake.input
    figure = contours_figure(
        [load_example(path) for path in files.examples if Path(path).stat().st_size],  # empty: that method failed
        read_labels(files.moving_labels).data,
        read_labels(files.fixed_labels).data,
        load_structures(snakemake.params.structures).names,
        structures=snakemake.params.surfaces,
        interpolation=snakemake.params.labels,
    )
    origin = origin_of(snakemake.input.provenance, snakemake.input, snakemake.params.code["modules"])
    save_figure(figure, Path(snakemake.output.png).with_suffix(""), origin=origin)
