"""Affine alignment to the atlas, by ANTs: rigid, then affine, mutual information (Avants et al. 2011)."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
from scipy import ndimage

from dmir.errors import InputError, damaged
from dmir.preprocess.ants_images import FLIP, single_threaded_ants, to_ants
from dmir.preprocess.resample import resample
from dmir.storage import plainly_named_folder
from dmir.volumes import Grid, Volume, atomic_path

NAME = "AffineTransform_double_3_3"  # ITK's name of the transform, which is also the key in its .mat files


def estimate_affine(
    image: Volume,
    mask: Volume,
    atlas_image: Volume,
    *,
    spacing: float = 3.0,
    seed: int = 1,
    sampling: float = 0.2,
) -> np.ndarray:
    """Estimate the affine that takes the atlas's world to the scan's world.

    Both images are stripped and brought to a coarse isotropic grid first; those copies are only looked at, never kept.
    ANTs starts from the centres of mass, runs on one thread with a seed, and so gives the same matrix every time.

    Parameters
    ----------
    image, mask
        The scan's grey values and brain mask, on its own grid.
    atlas_image
        The atlas's grey values, zero outside the brain.
    spacing
        Voxel size in mm at which the two are compared.
    seed
        Of the metric's sampling.
    sampling
        Fraction of the voxels that the metric uses.

    Returns
    -------
    numpy.ndarray
        4x4, atlas world -> scan world (RAS mm): the pull-back with which the scan is resampled on the atlas's grid.

    Raises
    ------
    InputError
        ANTs found no transform.
    """
    ants = single_threaded_ants()
    stripped = Volume(np.where(mask.data, image.data, 0).astype(np.float32), image.affine)
    moving = to_ants(resample(stripped, _coarse_grid(stripped, spacing)))
    fixed = to_ants(resample(atlas_image, _coarse_grid(atlas_image, spacing)))
    before = ants.config._random_seed
    ants.config._random_seed = seed
    try:
        with plainly_named_folder("affine-") as folder:
            options: dict[str, Any] = {"aff_random_sampling_rate": sampling, "aff_metric": "mattes"}
            options |= {"aff_shrink_factors": (4, 2, 1), "aff_smoothing_sigmas": (2, 1, 0)}
            rigid = ants.registration(
                fixed, moving, "Rigid", outprefix=f"{folder}/rigid", aff_iterations=(100, 20, 0), **options
            )
            affine = ants.registration(
                fixed,
                moving,
                "Affine",
                outprefix=f"{folder}/affine",
                initial_transform=rigid["fwdtransforms"][0],
                aff_iterations=(100, 50, 10),
                **options,
            )
            return read_affine(affine["fwdtransforms"][0])
    except (RuntimeError, IndexError) as error:
        raise InputError(
            "affine alignment",
            found=f"no transform ({error})",
            expected="a scan that ANTs can align to the atlas",
            remedy="Look at the brain mask and the orientation of the scan.",
        ) from error
    finally:
        ants.config._random_seed = before


def _coarse_grid(volume: Volume, spacing: float) -> Grid:
    """Return an isotropic RAS grid over what is not zero, with a margin of four voxels."""
    box = ndimage.find_objects((volume.data != 0).astype(np.uint8))[0]
    low, high = [side.start for side in box], [side.stop - 1 for side in box]
    corners = np.stack(np.meshgrid(*zip(low, high, strict=True), indexing="ij"), axis=-1).reshape(-1, 3)
    world = corners @ volume.affine[:3, :3].T + volume.affine[:3, 3]
    depth, height, width = (int(n) for n in np.ceil((world.max(axis=0) - world.min(axis=0)) / spacing) + 9)
    affine = np.diag([spacing, spacing, spacing, 1.0])
    affine[:3, 3] = world.min(axis=0) - 4 * spacing
    return Grid((depth, height, width), affine)


def write_affine(path: str | Path, transform: np.ndarray) -> None:
    """Write a pull-back matrix (4x4, atlas world -> scan world, RAS mm) as ITK and ANTs do (``.mat``, LPS)."""
    from scipy.io import savemat

    lps = FLIP @ transform @ FLIP
    parameters = np.concatenate([lps[:3, :3].ravel(), lps[:3, 3]]).reshape(12, 1)
    with atomic_path(path) as temporary:
        # the order of the two matters: ITK takes the first for the parameters, the second for the centre
        savemat(str(temporary), {NAME: parameters, "fixed": np.zeros((3, 1))}, format="4", appendmat=False)


def read_affine(path: str | Path) -> np.ndarray:
    """Read a linear transform that ITK or ANTs wrote as ``.mat``.

    Returns
    -------
    numpy.ndarray
        4x4 pull-back matrix in RAS mm.

    Raises
    ------
    InputError
        No such file, or no affine in it.
    """
    from scipy.io import loadmat

    expected = "an affine transform as ITK and ANTs write it (.mat)"
    if not Path(path).is_file():
        raise InputError(path, found="no such file", expected=expected)
    try:
        content = {key: value.ravel() for key, value in loadmat(str(path), appendmat=False).items() if key[0] != "_"}
    except Exception as error:  # scipy raises several unrelated kinds for what is no .mat file
        found, remedy = f"a file that cannot be read ({type(error).__name__})", "It may be truncated: make it again."
        raise damaged(path, found=found, expected=expected, remedy=remedy) from error
    parameters = next((value for key, value in content.items() if key.startswith(("Affine", "MatrixOffset"))), None)
    if parameters is None or parameters.size != 12 or content.get("fixed", np.empty(0)).size != 3:
        raise InputError(path, found=f"entries {sorted(content)}", expected=expected)
    matrix, translation, centre = parameters[:9].reshape(3, 3), parameters[9:], content["fixed"]
    lps = np.eye(4)
    lps[:3, :3] = matrix
    lps[:3, 3] = translation + centre - matrix @ centre
    return FLIP @ lps @ FLIP
