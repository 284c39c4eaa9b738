"""Bring one scan, or the atlas, to the cohort's grid."""

from pathlib import Path

from dmir.job import job

with job(snakemake.log[0], snakemake.threads):
    from dmir.preprocess.files import preprocess_files

    files = snakemake.input
    preprocess_files(
        Path(snakemake.output.image).parent,
        image=files.image,
        labels=files.get("labels"),
        mask=files.get("mask"),
        truth=files.get("truth"),
        atlas=Path(files.reference[0]).parent if files.get("reference") else None,
        **snakemake.params.settings,
    )
