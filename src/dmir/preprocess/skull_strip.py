"""Skull stripping: where is the brain?"""

from __future__ import annotations

from pathlib import Path

import numpy as np
from scipy import ndimage

from dmir.errors import InputError, suggestion
from dmir.storage import temporary_folder
from dmir.volumes import Volume, decide_mask, read_mask, reorient, require_same_grid, same_grid, write_volume

METHODS = ("mask", "none", "deepbet")


def brain_mask(image: Volume, mask: Volume | None = None, *, method: str = "mask", where: str = "scan") -> Volume:
    """Return the brain mask of a scan, bool on the image's grid.

    Parameters
    ----------
    image
        Grey values (D, H, W).
    mask
        The mask that came with the scan, if any.
    method
        ``"mask"``: the given mask. ``"none"``: the image is stripped already, the brain is where it is not zero.
        ``"deepbet"``: a network finds it (Fisch et al. 2024); the package must be installed.
    where
        The scan's name, for error messages.

    Raises
    ------
    InputError
        The method is unknown, its mask missing, empty or on another grid, the image not stripped, or deepbet absent.
    """
    if method == "mask":
        found = _given(image, mask, where)
    elif method == "none":
        found = _nonzero(image, where)
    elif method == "deepbet":
        found = _deepbet(image, where)
    else:
        raise InputError(
            "skull_strip", found=f"'{method}'", expected="a way to strip skulls", remedy=suggestion(method, METHODS)
        )
    if not found.data.any():
        raise InputError(
            f"{where}: brain mask",
            found="no voxel inside",
            expected="a mask that covers the brain",
            remedy="Check the mask, or choose another skull_strip.",
        )
    return found


def _given(image: Volume, mask: Volume | None, where: str) -> Volume:
    if mask is None:
        raise InputError(
            f"{where}: mask",
            found="no mask",
            expected="a brain mask, because skull_strip is 'mask'",
            remedy="Name one in the scan table, or set skull_strip to 'none' (stripped already) or 'deepbet'.",
        )
    require_same_grid(image, mask, f"{where}: image", f"{where}: mask")
    return Volume(decide_mask(mask.data, f"{where}: mask"), image.affine)


def _nonzero(image: Volume, where: str) -> Volume:
    # slope and intercept of stored integers make a background of 0 a little more or less: half a step of 16 bits
    brain = np.abs(image.data) > np.abs(image.data).max() * 2.0**-16
    if brain.mean() > 0.95:
        raise InputError(
            f"{where}: image",
            found=f"{100 * brain.mean():.0f} % of the voxels not zero",
            expected="a stripped image, zero outside the brain, because skull_strip is 'none'",
            remedy="Give a mask and set skull_strip to 'mask', or set it to 'deepbet'.",
        )
    return Volume(ndimage.binary_fill_holes(brain), image.affine)


def _deepbet(image: Volume, where: str) -> Volume:
    try:
        from deepbet import run_bet
    except ImportError as error:
        raise InputError(
            "skull_strip",
            found="'deepbet', which is not installed",
            expected="the package deepbet",
            remedy="Install it (pip install deepbet), or set skull_strip to 'mask' or 'none'.",
        ) from error
    with temporary_folder("deepbet-") as folder:
        scan, result = Path(folder) / "scan.nii.gz", Path(folder) / "mask.nii.gz"
        write_volume(scan, image, np.float32)
        run_bet([str(scan)], mask_paths=[str(result)], no_gpu=True, skip_broken=False)
        mask = read_mask(result, f"{where}: deepbet's mask")
    if not same_grid(image, mask, tolerance=1e-2):  # it may have written canonical axes
        mask = reorient(mask, image.orientation)
    return _given(image, mask, where)
