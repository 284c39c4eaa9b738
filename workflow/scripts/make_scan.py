"""Make one scan of a cohort whose scans are simulated, painted, or kept in a form that is no image file."""

import importlib
from pathlib import Path

from dmir.job import job

with job(snakemake.log[0], snakemake.threads):
    from dmir.cohorts import SOURCES

    settings = dict(snakemake.params.settings)
    source = importlib.import_module(SOURCES[settings.pop("source")])
    if snakemake.input.get("original"):
        settings["original"] = snakemake.input.original
    source.write_scan(snakemake.wildcards.scan, Path(snakemake.output.image).parent, **settings)
