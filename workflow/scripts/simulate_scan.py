"""Make one simulated scan, or write the template it is made from."""

from pathlib import Path

from dmir.job import job

with job(snakemake.log[0], snakemake.threads):
    from dmir.cohorts.simulated import write_scan

    cohort = snakemake.params.cohort
    write_scan(
        snakemake.wildcards.scan,
        Path(snakemake.output.image).parent,
        seed=cohort["seed"],
        deformation_scale=cohort["deformation_scale"],
    )
