"""Put the scores of all shards together."""

from dmir.job import job

with job(snakemake.log[0], snakemake.threads):
    import pandas as pd

    from dmir.tables import read_scores, write_scores
    from dmir.volumes import atomic_path

    for kind in ("structures", "pairs"):
        table = pd.concat([read_scores(path) for path in snakemake.input[kind]], ignore_index=True)
        write_scores(snakemake.output[kind], table)
        with atomic_path(snakemake.output[f"{kind}_csv"]) as path:
            table.to_csv(path, index=False)
