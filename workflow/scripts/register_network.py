"""Register a shard of pairs with a trained network."""

import logging
from pathlib import Path

from dmir.job import job

with job(snakemake.log[0], snakemake.threads):
    logging.basicConfig(level=logging.INFO, format="%(asctime)s %(message)s")
    from dmir.methods.network import register_pairs
    from dmir.methods.records import divide_pairs, write_records
    from dmir.preprocess.quality import flagged_scans

    files = snakemake.input
    folder = Path(snakemake.output.fields)
    folder.mkdir(parents=True, exist_ok=True)
    pairs, left_out = divide_pairs(snakemake.params.pairs, files.images, flagged_scans(files.quality))
    records = register_pairs(pairs, folder, files.weights)
    names = {key: snakemake.wildcards[key] for key in ("cohort", "method", "model")}
    write_records(snakemake.output.records, records, left_out, **names)
