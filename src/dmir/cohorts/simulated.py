"""The simulated cohort: subjects made from one real template, whose true deformation is known.

Each subject is the template seen through a random diffeomorphism (the anatomy), a random head pose and a random
scanner (orientation, spacing, matrix, contrast, bias field, noise), with a skull and a scalp painted round the brain.
What it can show: that the software works, and how large a method's true error is. What it cannot: there is one topology
and one texture, so it is no evidence about methods on real anatomies.

Coordinates. T is the template, x a point of its world, y a point of the scanner's world (both RAS mm), P the pose
(scanner to template world) and phi = exp(v) the anatomy. The subject is S(y) = T(phi(P y)), resampled once; the point
that corresponds to x is p(x) = P^-1 exp(-v)(x), and the stored truth is d(x) = p(x) - x on a grid of 2 mm.
"""

from __future__ import annotations

import re
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import pandas as pd

from dmir.cohorts.template import template, working_grid
from dmir.errors import InputError
from dmir.volumes import Volume, reorient, write_labels, write_volume

ATLAS = "template"
MAXIMUM_SUBJECTS = 100_000  # in a split: each is listed whenever a workflow is planned


@dataclass(frozen=True)
class SimulatedScan:
    """One simulated acquisition.

    Attributes
    ----------
    image, labels, mask
        int16 grey values of the whole head, int16 aparc+aseg ids, bool brain mask, on the scanner's grid.
    truth, truth_affine
        The displacement d(x) from each template point x to its place in the scanner's world: float32 (3, D, H, W) in
        voxels of its own grid, and that grid's 4x4 voxel-to-RAS matrix (template world, mm).
    pose
        4x4 matrix from the scanner's world to the template's (RAS mm), without the anatomy.
    age
        In years; older brains have larger ventricles.
    """

    image: Volume
    labels: Volume
    mask: Volume
    truth: np.ndarray
    truth_affine: np.ndarray
    pose: np.ndarray
    age: float


def scan_table(
    made: str | Path, *, train: int = 8, val: int = 2, test: int = 4, seed: int = 1, ageing: float = 0.4
) -> pd.DataFrame:
    """List the scans that a simulated cohort consists of, made or not.

    Parameters
    ----------
    made
        Where the files are or will be: ``<made>/<scan>/{image,labels,mask,truth}.nii.gz``.
    train, val, test
        Number of subjects in each split; the template is the atlas.
    seed
        Of the cohort; another seed gives other subjects.
    ageing
        Fraction of the subjects that are old, with enlarged ventricles.

    Raises
    ------
    InputError
        A number of subjects is negative or absurd.
    """
    sizes = {"train": train, "val": val, "test": test}
    for split, size in sizes.items():
        if not 0 <= size <= MAXIMUM_SUBJECTS:
            raise InputError(
                f"simulated cohort: {split}", found=str(size), expected=f"a number of subjects, 0 to {MAXIMUM_SUBJECTS}"
            )
    splits = ["atlas", *(split for split, size in sizes.items() for _ in range(size))]
    rows = []
    for number, split in enumerate(splits):
        scan = f"sub-{number:03d}" if number else ATLAS
        files = {key: str(Path(made) / scan / f"{key}.nii.gz") for key in ("image", "labels", "mask", "truth")}
        age = f"{subject_age(scan_seed(seed, scan), ageing):.0f}" if number else ""
        names = {"scan": scan, "subject": scan, "source_id": scan}
        rows.append({**names, "session": "1", "age": age, "split": split, **files})
    table = pd.DataFrame(rows)
    table.loc[table["scan"] == ATLAS, "truth"] = ""
    return table


def scan_seed(seed: int, scan: str) -> int:
    """Return the seed of one scan of a cohort, the same whatever the size of the cohort."""
    number = re.fullmatch(r"sub-(\d+)", scan)
    if number is None:
        raise InputError("simulated cohort", found=f"scan '{scan}'", expected=f"'{ATLAS}' or 'sub-<number>'")
    return int(np.random.SeedSequence([seed, int(number[1])]).generate_state(1)[0])


def subject_age(seed: int, ageing: float = 0.4) -> float:
    """Draw a subject's age: young adults, and a fraction ``ageing`` of 60 to 90 years."""
    generator = np.random.default_rng([seed, 0])
    old = generator.random() < ageing
    return round(float(generator.uniform(60, 90) if old else generator.uniform(18, 45)))


def write_scan(scan: str, folder: str | Path, *, seed: int = 1, ageing: float = 0.4, **parameters: float) -> None:
    """Make one scan of the table of :func:`scan_table` and write its files into ``folder``.

    The atlas is the template itself: already stripped, on its own grid, without a truth.

    Parameters
    ----------
    scan
        ``"template"`` or ``"sub-<number>"``.
    folder
        The scan's own folder; receives image, labels, mask and truth (``.nii.gz``).
    seed, ageing
        As given to :func:`scan_table`.
    **parameters
        Of :func:`simulate_scan`.
    """
    from dmir.fields import save_field

    folder = Path(folder)
    if scan == ATLAS:
        image, labels, mask = template()
    else:
        number = scan_seed(seed, scan)
        simulated = simulate_scan(number, age=subject_age(number, ageing), **parameters)
        image, labels, mask = simulated.image, simulated.labels, simulated.mask
        save_field(folder / "truth.nii.gz", simulated.truth, simulated.truth_affine)
    write_volume(folder / "image.nii.gz", image, np.int16)
    write_labels(folder / "labels.nii.gz", labels)
    write_volume(folder / "mask.nii.gz", mask)


def simulate_scan(
    seed: int,
    *,
    age: float | None = None,
    deformation_scale: float = 0.9,
    ventricle_enlargement: float = 5.0,
    rotation: float = 8.0,
    translation: float = 10.0,
    scaling: float = 0.05,
    shearing: float = 0.02,
    contrast: float = 0.04,
    gamma: float = 0.2,
    bias_field: float = 0.2,
    noise: float = 0.025,
) -> SimulatedScan:
    """Simulate one subject and its scan.

    Parameters
    ----------
    seed
        Everything random follows from it.
    age
        In years, drawn from the seed when not given; above 45 the ventricles grow.
    deformation_scale
        Of the anatomical variation; 0.9 gives pairs with the template as unlike as real subjects are.
    ventricle_enlargement
        Largest velocity towards the ventricles at 90 years, in mm.
    rotation, translation, scaling, shearing
        Largest head rotation (degrees) and shift (mm) along each axis, and largest deviation of size and shear.
    contrast
        Standard deviation of each structure's grey value; both sides of a structure share it.
    gamma
        Largest deviation of the exponent that the grey values are raised to.
    bias_field
        Standard deviation of the log of the receive field.
    noise
        Standard deviation of the Rician noise, white matter = 1.

    Returns
    -------
    SimulatedScan
    """
    from dmir.cohorts.acquisition import acquire, random_pose, random_scanner, receive
    from dmir.cohorts.anatomy import ageing_velocity, exponential, random_velocity, truth

    generator = np.random.default_rng([seed, 1])
    age = subject_age(seed) if age is None else age
    ageing = float(np.clip((age - 45) / 45, 0, 1.2))
    velocity = deformation_scale * random_velocity(generator) + ventricle_enlargement * ageing * ageing_velocity()
    pose = random_pose(generator, rotation, translation, scaling, shearing)
    native, orientation = random_scanner(generator, pose)
    grey, ids, mask = acquire(generator, exponential(velocity), pose, native, contrast)
    grey = receive(generator, grey, gamma, bias_field, noise)
    return SimulatedScan(
        image=reorient(Volume(grey, native.affine), orientation),
        labels=reorient(Volume(ids, native.affine), orientation),
        mask=reorient(Volume(mask, native.affine), orientation),
        truth=truth(exponential(-velocity), pose),
        truth_affine=working_grid().affine,
        pose=pose,
        age=age,
    )
