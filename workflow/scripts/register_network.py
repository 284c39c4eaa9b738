"""Register a shard of pairs with a trained network."""

import logging
from pathlib import Path

from dmir.job import job

with job(snakemake.log[0], snakemake.threads):
    logging.basicConfig(level=logging.INFO, format="%(asctime)s %(message)s")
    from dmir.methods.network import register_pairs
    from dmir.volumes import atomic_path

    fixed = Path(snakemake.input.fixed)
    folder = Path(snakemake.output.fields)
    folder.mkdir(parents=True, exist_ok=True)
    records = register_pairs(
        [(Path(path).parent.name, Path(path), fixed.parent.name, fixed) for path in snakemake.input.moving],
        folder,
        snakemake.input.weights,
        cohort=snakemake.wildcards.cohort,
        method=snakemake.wildcards.method,
        model=snakemake.wildcards.model,
    )
    with atomic_path(snakemake.output.records) as path:
        records.to_csv(path, index=False)
