"""Write the table of a cohort's scans, once all their files are there."""

from dmir.job import job

with job(snakemake.log[0], snakemake.threads):
    import pandas as pd

    from dmir.volumes import atomic_path

    with atomic_path(snakemake.output.table) as path:
        pd.DataFrame(snakemake.params.scans).to_csv(path, index=False)
