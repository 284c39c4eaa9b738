"""Register a shard of pairs with a trained network, and refine its fields where that is the method."""

import logging
from functools import partial
from pathlib import Path

from dmir.job import job

with job(snakemake.log[0], snakemake.threads):
    logging.basicConfig(level=logging.INFO, format="%(asctime)s %(message)s")
    from dmir.methods.network import register_pairs
    from dmir.methods.records import divide_pairs, write_records
    from dmir.preprocess.quality import flagged_scans

    files, params = snakemake.input, snakemake.params
    refine = None
    if params.refinement:
        from dmir.methods import refinement

        refine = partial(refinement.refine, **params.refinement)
    folder = Path(snakemake.output.fields)
    folder.mkdir(parents=True, exist_ok=True)
    pairs, left_out = divide_pairs(params.pairs, files.images, flagged_scans(files.quality))
    records = register_pairs(
        pairs,
        folder,
        files.weights,
        refine=refine,
        expected=params.expected,
    )
    names = {key: snakemake.wildcards[key] for key in ("cohort", "method", "model")}
    write_records(snakemake.output.records, records, left_out, **names)
