"""Compare the methods structure by structure."""

from pathlib import Path

from dmir.job import job

with job(snakemake.log[0], snakemake.threads):
    from dmir.report.origin import origin_of
    from dmir.report.tables import structure_scores
    from dmir.report.writing import write_table
    from dmir.tables import read_scores

    scores = read_scores(snakemake.input.structures, snakemake.wildcards.cohort)
    table = structure_scores(scores, snakemake.params.methods, labels=snakemake.params.labels)
    caption = f"Dice by structure, {snakemake.wildcards.cohort} ({snakemake.params.labels} labels)."
    origin = origin_of(snakemake.input.provenance, snakemake.input, snakemake.params.code["modules"])
    write_table(table, Path(snakemake.output.csv).with_suffix(""), caption=caption, origin=origin)
