"""List the trainings of a cohort's models: what each cost, and what it brought."""

from pathlib import Path

from dmir.job import job

with job(snakemake.log[0], snakemake.threads):
    from dmir.report.curves import read_history
    from dmir.report.origin import origin_of
    from dmir.report.tables import training_table
    from dmir.report.writing import write_table
    from dmir.tables import read_record

    models = {}
    for history, summary in zip(map(Path, snakemake.input.histories), snakemake.input.summaries, strict=True):
        records = read_record(summary)
        models[history.parts[-3], history.parts[-2]] = read_history(history), records
    caption = f"Trainings on {snakemake.wildcards.cohort}."
    table = training_table(models)
    origin = origin_of(snakemake.input.provenance, snakemake.input, snakemake.params.code["modules"])
    write_table(table, Path(snakemake.output.csv).with_suffix(""), caption=caption, origin=origin)
