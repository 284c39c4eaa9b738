"""Compare all methods on all cohorts."""

from pathlib import Path

from dmir.job import job

with job(snakemake.log[0], snakemake.threads):
    import pandas as pd

    from dmir.report.origin import origin_of
    from dmir.report.tables import comparison_table, mark_differences
    from dmir.report.writing import write_table
    from dmir.tables import read_scores, read_table

    table = comparison_table(
        read_scores(snakemake.input.structures),
        read_scores(snakemake.input.pairs),
        snakemake.params.methods,
        snakemake.params.labels,
        sources=snakemake.params.sources,
    )
    names = {"cohort": str, "method": str}
    statistics = pd.concat([read_table(path, dtype=names) for path in snakemake.input.statistics], ignore_index=True)
    table = mark_differences(table, statistics, snakemake.params.reference)
    caption = "Comparison of the registration methods."
    origin = origin_of(snakemake.input.provenance, snakemake.input, snakemake.params.code["modules"])
    write_table(table, Path(snakemake.output.csv).with_suffix(""), caption=caption, origin=origin)
