"""Put the scores of all shards together."""

from dmir.job import job

with job(snakemake.log[0], snakemake.threads):
    import pandas as pd

    from dmir.volumes import atomic_path

    for kind in ("structures", "pairs"):
        table = pd.concat([pd.read_parquet(path) for path in snakemake.input[kind]], ignore_index=True)
        with atomic_path(snakemake.output[kind]) as path:
            table.to_parquet(path, index=False)
        with atomic_path(snakemake.output[f"{kind}_csv"]) as path:
            table.to_csv(path, index=False)
