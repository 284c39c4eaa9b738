"""Compare the rows of a study: the ablation, or lambda."""

from pathlib import Path

from dmir.job import job

with job(snakemake.log[0], snakemake.threads):
    from dmir.report.origin import origin_of
    from dmir.report.studies import study_table
    from dmir.report.writing import write_table
    from dmir.tables import read_record, read_scores

    summaries = {}
    for path in map(Path, snakemake.input.summaries):
        summaries.setdefault(path.parts[-3], []).append(read_record(path))
    table = study_table(
        read_scores(snakemake.input.structures),
        read_scores(snakemake.input.pairs),
        snakemake.params.rows,
        summaries,
        snakemake.params.labels,
    )
    captions = {"ablation": "Ablation: every combination of the parts.", "lambda_study": "The regularisation's weight."}
    caption = captions[snakemake.wildcards.study]
    origin = origin_of(snakemake.input.provenance, snakemake.input, snakemake.params.code["modules"])
    write_table(table, Path(snakemake.output.csv).with_suffix(""), caption=caption, origin=origin)
