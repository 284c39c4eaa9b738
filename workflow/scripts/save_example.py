"""Keep one registered pair for the figures, in little space; a pair that failed leaves an empty file."""

from pathlib import Path

from dmir.job import job

with job(snakemake.log[0], snakemake.threads):
    import numpy as np
    import torch

    from dmir.fields import load_field, warp, warp_labels
    from dmir.metrics import dice
    from dmir.report.examples import Example, save_example
    from dmir.volumes import read_image, read_labels

    files, names = snakemake.input, snakemake.wildcards
    fixed_name = Path(files.fixed).parent.name
    field = Path(files.fields, f"{names.scan}__{fixed_name}.nii.gz")
    if not field.is_file():
        print(f"{field.name} failed: there is nothing to keep")
        Path(snakemake.output.example).touch()
        raise SystemExit(0)
    displacement, affine = load_field(field)
    batch = torch.from_numpy(displacement)[None]
    moving = torch.from_numpy(read_image(files.moving).data)[None, None]
    moving_labels = torch.from_numpy(read_labels(files.moving_labels).data)[None, None]
    fixed_labels = read_labels(files.fixed_labels).data
    warped_labels = warp_labels(moving_labels, batch)[0, 0].numpy()
    structures = [int(i) for i in np.unique(fixed_labels) if i]
    save_example(
        snakemake.output.example,
        Example(
            method=names.method,
            model=names.model,
            warped=warp(moving, batch)[0, 0].numpy(),
            displacement=displacement,
            affine=affine,
            cohort=names.cohort,
            moving=names.scan,
            fixed=fixed_name,
            dice=float(np.nanmean(list(dice(warped_labels, fixed_labels, structures).values()))),
        ),
    )
