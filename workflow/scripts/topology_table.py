"""Compare what the methods do to the topology of structures."""

from pathlib import Path

from dmir.job import job

with job(snakemake.log[0], snakemake.threads):
    from dmir.report.origin import origin_of
    from dmir.report.topology import topology_table
    from dmir.report.writing import write_table
    from dmir.tables import read_scores

    table = topology_table(
        read_scores(snakemake.input.structures), read_scores(snakemake.input.pairs), snakemake.params.methods
    )
    caption = "Changes of the structures' volumes and topology."
    origin = origin_of(snakemake.input.provenance, snakemake.input, snakemake.params.code["modules"])
    write_table(table, Path(snakemake.output.csv).with_suffix(""), caption=caption, origin=origin)
