"""Pack the preprocessed scans of a training into files that every training of the cohort maps into memory."""

import logging
from pathlib import Path

from dmir.job import job

with job(snakemake.log[0], snakemake.threads):
    logging.basicConfig(level=logging.INFO, format="%(asctime)s %(message)s")
    from dmir.training import Scan
    from dmir.training.pack import pack_scans

    files, params = snakemake.input, snakemake.params
    scans = [
        # a training does not see the labels of what it trains on
        Scan(scan, Path(image), Path(labels) if split != "train" else None)
        for (scan, split), image, labels in zip(params.scans.items(), files.images, files.labels, strict=True)
    ]
    folder = Path(snakemake.output.record).parent
    pack_scans(folder, scans, precision=params.precision, threads=snakemake.threads)
