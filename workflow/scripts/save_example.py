"""Keep one registered pair for the figures, in little space; a pair that failed leaves an empty file."""

from pathlib import Path

from dmir.job import job

with job(snakemake.log[0], snakemake.threads):
    from dmir.fields import pair_field
    from dmir.report.examples import example_of, save_example

    files, names = snakemake.input, snakemake.wildcards
    field = pair_field(files.fields, names.moving, names.fixed)
    if field.is_file():
        example = example_of(
            field,
            files.moving,
            files.moving_labels,
            files.fixed_labels,
            method=names.method,
            model=names.model,
            cohort=names.cohort,
            moving_scan=names.moving,
            fixed_scan=names.fixed,
        )
        save_example(snakemake.output.example, example)
    else:
        print(f"{field.name} failed: there is nothing to keep")
        Path(snakemake.output.example).touch()
