"""List the structures that a cohort is scored on."""

from pathlib import Path

from dmir.job import job

with job(snakemake.log[0], snakemake.threads):
    from dmir.report.origin import origin_of
    from dmir.report.tables import structure_table
    from dmir.report.writing import write_table
    from dmir.structures import load_structures

    structures = load_structures(snakemake.params.structures)
    caption = f"Structures of {snakemake.wildcards.cohort} ({structures.name})."
    table = structure_table(structures.table)
    origin = origin_of(snakemake.input.provenance, snakemake.input, snakemake.params.code["modules"])
    write_table(table, Path(snakemake.output.csv).with_suffix(""), caption=caption, origin=origin)
