"""Score the fields of a shard of pairs; a pair that failed keeps its reason."""

from pathlib import Path

from dmir.job import job

with job(snakemake.log[0], snakemake.threads):
    import torch

    torch.set_num_threads(snakemake.threads)
    from dmir.metrics.files import score_shard
    from dmir.tables import write_scores

    files = snakemake.input
    structures, pairs = score_shard(
        files.records,
        fields=files.fields,
        labels={Path(path).parent.name: path for path in files.labels},
        truths={Path(path).parent.name: path for path in files.truths},
        structures=snakemake.params.structures,
        pairs=snakemake.params.pairs,
        interpolations=snakemake.params.interpolations,
    )
    for table, output in ((structures, snakemake.output.structures), (pairs, snakemake.output.pairs)):
        write_scores(output, table)
