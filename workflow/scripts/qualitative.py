"""Draw one pair as every method registered it."""

from pathlib import Path

from dmir.job import job

with job(snakemake.log[0], snakemake.threads):
    from dmir.preprocess.truth import truth_of_pair
    from dmir.report.examples import load_example
    from dmir.report.origin import origin_of
    from dmir.report.qualitative import qualitative_figure
    from dmir.report.style import save_figure
    from dmir.volumes import read_image

    files, names = snakemake.input, snakemake.wildcards
    truths = {Path(path).parent.name: path for path in files.truths}
    figure = qualitative_figure(
        [load_example(path) for path in files.examples if Path(path).stat().st_size],  # empty: that method failed
        read_image(files.moving).data,
        read_image(files.fixed).data,
        planes=snakemake.params.planes,
        truth=truth_of_pair(truths, names.moving, names.fixed),
    )
    origin = origin_of(snakemake.input.provenance, snakemake.input, snakemake.params.code["modules"])
    save_figure(figure, Path(snakemake.output.png).with_suffix(""), origin=origin)
