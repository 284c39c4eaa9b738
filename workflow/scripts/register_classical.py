"""Register a shard of pairs with a classical method, each pair in a process of its own."""

import logging
from pathlib import Path

from dmir.job import job

with job(snakemake.log[0], snakemake.threads):
    logging.basicConfig(level=logging.INFO, format="%(asctime)s %(message)s")
    from dmir.methods.isolated import register_pairs
    from dmir.volumes import atomic_path

    settings = dict(snakemake.params.settings)
    fixed = Path(snakemake.input.fixed)
    folder = Path(snakemake.output.fields)
    folder.mkdir(parents=True, exist_ok=True)
    records = register_pairs(
        [(Path(path).parent.name, Path(path), fixed.parent.name, fixed) for path in snakemake.input.moving],
        folder,
        settings.pop("algorithm"),
        settings,
        threads=snakemake.threads,
        timeout=snakemake.params.timeout,
    )
    for key in ("model", "method", "cohort"):
        records[key] = snakemake.wildcards[key]
    with atomic_path(snakemake.output.records) as path:
        records.to_csv(path, index=False)
