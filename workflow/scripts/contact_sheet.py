"""Draw all preprocessed scans of a cohort on one sheet, to be checked at a glance."""

from pathlib import Path

from dmir.job import job

with job(snakemake.log[0], snakemake.threads):
    from dmir.preprocess.contact_sheet import contact_sheet
    from dmir.preprocess.files import quality_table
    from dmir.volumes import atomic_path

    files, params = snakemake.input, snakemake.params
    figure = contact_sheet(
        {Path(path).parent.name: Path(path) for path in files.images},
        quality_table({Path(path).parent.name: path for path in files.scans}),
        splits=params.splits,
        reference=params.reference,
        cohort=snakemake.wildcards.cohort,
    )
    with atomic_path(snakemake.output.png) as path:
        figure.savefig(path, dpi=2 * figure.dpi)
