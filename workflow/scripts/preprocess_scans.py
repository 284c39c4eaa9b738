"""Bring some scans, or the atlas, to the cohort's grid."""

from functools import partial
from pathlib import Path

from dmir.job import do_each, job

with job(snakemake.log[0], snakemake.threads):
    from dmir.preprocess.files import preprocess_files

    reference, settings = snakemake.input.reference, snakemake.params.settings
    one = partial(preprocess_files, atlas=Path(reference[0]).parent if reference else None, **settings)
    cohort = Path(snakemake.output[0]).parents[1]
    do_each({scan: partial(one, cohort / scan, **its) for scan, its in snakemake.params.scans.items()})
