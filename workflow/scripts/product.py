"""Make one table or figure of the report: the one that the rule is named after."""

from dmir.job import job

with job(snakemake.log[0], snakemake.threads):
    from dmir.report.making import make

    make(snakemake.rule, snakemake.input, snakemake.params, snakemake.wildcards, snakemake.output)
