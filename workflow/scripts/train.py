"""Train one network on one cohort, on one card if there is one."""

import logging
from pathlib import Path

from dmir.job import job

with job(snakemake.log[0], snakemake.threads):
    logging.basicConfig(level=logging.INFO, format="%(asctime)s %(message)s")
    from dmir.preprocess.quality import flagged_scans
    from dmir.training import Scan, fingerprint, train

    params, files = snakemake.params, snakemake.input
    flagged = flagged_scans(files.quality)
    for scan, reason in flagged.items():
        logging.warning("%s is left out: %s", scan, reason)
    scans = {"train": [], "val": [], "atlas": []}
    for (scan, split), image, labels in zip(params.splits.items(), files.images, files.labels, strict=True):
        if scan not in flagged:
            scans[split].append(Scan(scan, Path(image), Path(labels) if split != "train" else None))
    # the state of an unfinished training belongs to these images, this code and these settings, and to no others
    key = {
        "of": dict(snakemake.wildcards.items()),
        "code": params.code,
        "settings": params.settings,
        "images": [(str(path), Path(path).stat().st_mtime_ns) for path in files.images],
        "left out": [*flagged],
    }
    train(
        params.settings["algorithm"],
        params.settings["network"],
        scans["train"],
        scans["val"],
        scans["atlas"],
        cohort=snakemake.wildcards.cohort,
        output=Path(snakemake.output.weights).parent,
        resume_folder=Path(params.resume, ".resume"),
        resume_key=fingerprint(key),
        threads=snakemake.threads,
        seed=int(snakemake.wildcards.model.removeprefix("seed")),
        **params.settings["training"],
    )
