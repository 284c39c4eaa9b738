"""Make some scans of a cohort whose scans are simulated, painted, or kept in a form that is no image file."""

import importlib
from functools import partial
from pathlib import Path

from dmir.job import do_each, job

with job(snakemake.log[0], snakemake.threads):
    from dmir.cohorts import SOURCES

    settings = dict(snakemake.params.settings)
    write_scan = importlib.import_module(SOURCES[settings.pop("source")]).write_scan
    cohort = Path(snakemake.output[0]).parents[1]
    scans = snakemake.params.scans
    do_each({scan: partial(write_scan, scan, cohort / scan, **its, **settings) for scan, its in scans.items()})
