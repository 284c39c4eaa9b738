"""Score the fields of a shard of pairs, and keep some for the figures; a pair that failed keeps its reason."""

from pathlib import Path

from dmir.job import job

with job(snakemake.log[0], snakemake.threads):
    import torch

    torch.set_num_threads(snakemake.threads)
    from dmir.metrics.files import score_shard
    from dmir.report.examples import keep_examples
    from dmir.tables import write_scores

    files, params, names = snakemake.input, snakemake.params, snakemake.wildcards
    images, labels = ({Path(path).parent.name: path for path in paths} for paths in (files.images, files.labels))
    structures, pairs = score_shard(
        files.records,
        fields=files.fields,
        labels=labels,
        truths={Path(path).parent.name: path for path in files.truths},
        structures=params.structures,
        pairs=params.pairs,
        interpolations=params.interpolations,
    )
    run_as = {"cohort": names.cohort, "method": names.method, "model": names.model}
    kept = params.examples.get("pairs", [])
    keep_examples(snakemake.output.examples, kept, files.fields, images, labels, **run_as)
    for table, output in ((structures, snakemake.output.structures), (pairs, snakemake.output.pairs)):
        write_scores(output, table)
