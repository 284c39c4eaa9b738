"""Make the report: one page with tables, figures, pairs to look at and what all was made from."""

import os
from pathlib import Path

from dmir.job import job

with job(snakemake.log[0], snakemake.threads):
    from dmir.report.page import write_page

    params = snakemake.params
    write_page(
        Path(snakemake.output[0]).parent,
        snakemake.output[0],
        configuration=params.configuration,
        tables=params.tables,
        figures=params.figures,
        pairs=params.pairs,
        examples=params.examples,
        methods=params.methods,
        models=params.models,
        command=os.environ.get("DMIR_COMMAND", ""),
        revision=os.environ.get("DMIR_REVISION", ""),
        label_interpolation=params.labels,
        reference=params.reference,
    )
