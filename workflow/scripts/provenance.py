"""Record what the scores of a run depend on: configuration, code, data and weights."""

from pathlib import Path

from dmir.job import job

with job(snakemake.log[0], snakemake.threads):
    import json

    from dmir.report.origin import record_provenance
    from dmir.volumes import atomic_path

    record = record_provenance(
        snakemake.params.configuration,
        snakemake.params.scoring["modules"],
        snakemake.input.data,
        snakemake.input.weights,
        Path(snakemake.output[0]).parent.parent,
    )
    with atomic_path(snakemake.output[0]) as path:
        path.write_text(json.dumps(record, indent=1) + "\n", encoding="utf-8")
