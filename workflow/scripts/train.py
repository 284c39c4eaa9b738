"""Train one network on one cohort, on its cards if there are any."""

import logging
from pathlib import Path

from dmir.job import job

with job(snakemake.log[0], snakemake.threads):
    logging.basicConfig(level=logging.INFO, format="%(asctime)s %(message)s")
    from dmir.preprocess.quality import flagged_scans
    from dmir.training import failure_kept, fingerprint, open_pack, train

    params, files = snakemake.params, snakemake.input
    flagged = flagged_scans(files.quality)
    for scan, reason in flagged.items():
        logging.warning("%s is left out: %s", scan, reason)
    pack = open_pack(Path(files.record).parent)
    scans = {
        split: [pack.scan(scan) for scan, its in params.splits.items() if its == split and scan not in flagged]
        for split in ("train", "val", "atlas")
    }
    # the state of an unfinished training belongs to these images, this code and these settings, and to no others
    key = {
        "of": dict(snakemake.wildcards.items()),
        "code": params.code,
        "settings": params.settings,
        "images": Path(files.record).read_text(),
        "left out": [*flagged],
    }
    network, hyperparameters, settings = (params.settings[name] for name in ("algorithm", "network", "training"))
    output, cohort = Path(snakemake.output.weights).parent, snakemake.wildcards.cohort
    seed = int(snakemake.wildcards.model.removeprefix("seed"))
    with failure_kept(network, hyperparameters, pack.grid, output, cohort=cohort, seed=seed, settings=settings):
        train(
            network,
            hyperparameters,
            scans["train"],
            scans["val"],
            scans["atlas"],
            pack=pack,
            cohort=cohort,
            method=snakemake.wildcards.method,
            output=output,
            resume_folder=Path(params.resume, ".resume"),
            resume_key=fingerprint(key),
            threads=snakemake.threads,
            gpus=snakemake.resources.gpu,
            seed=seed,
            **settings,
        )
