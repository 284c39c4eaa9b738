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
    records = register_pairs(
        [(Path(path).parent.name, Path(path), fixed.parent.name, fixed) for path in snakemake.input.moving],
        snakemake.output.fields,
        settings.pop("algorithm"),
        settings,
        threads=snakemake.threads,
        timeout=snakemake.params.timeout,
        cohort=snakemake.wildcards.cohort,
        model=snakemake.wildcards.model,
    )
    records["method"] = snakemake.wildcards.method  # its name in the configuration, not its algorithm's
    with atomic_path(snakemake.output.records) as path:
        records.to_csv(path, index=False)
