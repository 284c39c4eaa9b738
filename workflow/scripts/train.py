"""Train one network on one cohort, on one card if there is one."""

import logging
from pathlib import Path

from dmir.job import job

with job(snakemake.log[0], snakemake.threads):
    logging.basicConfig(level=logging.INFO, format="%(asctime)s %(message)s")
    from dmir.training import Scan, fingerprint, train

    params, files = snakemake.params, snakemake.input
    scans = {"train": [], "val": [], "atlas": []}
    for (scan, split), image, labels in zip(params.splits.items(), files.images, files.labels, strict=True):
        scans[split].append(Scan(scan, Path(image), Path(labels) if split != "train" else None))
    # the state of an unfinished training belongs to these images, this code and these settings, and to no others
    images = [(str(path), Path(path).stat().st_mtime_ns) for path in files.images]
    wildcards = dict(snakemake.wildcards.items())
    train(
        params.settings["algorithm"],
        params.settings["network"],
        scans["train"],
        scans["val"],
        scans["atlas"][0],
        cohort=snakemake.wildcards.cohort,
        output=Path(snakemake.output.weights).parent,
        resume_folder=Path(params.resume, ".resume"),
        resume_key=fingerprint({"of": wildcards, "code": params.code, "settings": params.settings, "images": images}),
        threads=snakemake.threads,
        seed=int(snakemake.wildcards.model.removeprefix("seed")),
        **params.settings["training"],
    )
