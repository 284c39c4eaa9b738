"""Make the tables and figures of one rule, each by its function."""

from dmir.job import job

with job(snakemake.log[0], snakemake.threads):
    from dmir.report.making import make

    make(snakemake.input, snakemake.params, snakemake.wildcards, snakemake.output)
