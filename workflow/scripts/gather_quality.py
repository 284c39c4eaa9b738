"""Gather the quality of every scan of a cohort in one table."""

from pathlib import Path

from dmir.job import job

with job(snakemake.log[0], snakemake.threads):
    from dmir.preprocess.files import quality_table
    from dmir.volumes import atomic_path

    with atomic_path(snakemake.output.table) as path:
        quality_table({Path(p).parent.name: p for p in snakemake.input.scans}).to_csv(path, index=False)
