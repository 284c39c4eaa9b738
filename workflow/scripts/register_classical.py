"""Register a shard of pairs with a method without weights, in a process apart that may crash."""

import logging

from dmir.job import job

with job(snakemake.log[0], snakemake.threads):
    logging.basicConfig(level=logging.INFO, format="%(asctime)s %(message)s")
    from dmir.methods.isolated import register_pairs
    from dmir.methods.records import divide_pairs, write_records
    from dmir.preprocess.quality import flagged_scans

    files, params = snakemake.input, snakemake.params
    settings = dict(params.settings)
    pairs, left_out = divide_pairs(params.pairs, files.images, flagged_scans(files.quality))
    records = register_pairs(
        pairs,
        snakemake.output.fields,
        settings.pop("algorithm"),
        settings,
        threads=snakemake.threads,
        timeout=params.timeout,
        cohort=snakemake.wildcards.cohort,
    )
    names = {key: snakemake.wildcards[key] for key in ("cohort", "method", "model")}
    write_records(snakemake.output.records, records, left_out, **names)
