"""Gather the quality of every scan of a cohort in a table, and draw them all on one sheet, to be looked at."""

from pathlib import Path

from dmir.job import job

with job(snakemake.log[0], snakemake.threads):
    from dmir.preprocess.contact_sheet import contact_sheet
    from dmir.preprocess.files import quality_table
    from dmir.volumes import atomic_path

    files, params = snakemake.input, snakemake.params
    table = quality_table({Path(path).parent.name: path for path in files.scans})
    with atomic_path(snakemake.output.table) as path:
        table.to_csv(path, index=False)
    figure = contact_sheet(
        {Path(path).parent.name: Path(path) for path in files.images},
        table,
        splits=params.splits,
        reference=params.reference,
        cohort=snakemake.wildcards.cohort,
    )
    with atomic_path(snakemake.output.sheet) as path:
        figure.savefig(path, dpi=2 * figure.dpi)
