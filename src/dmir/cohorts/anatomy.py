"""The anatomy of a simulated subject: a random diffeomorphism of the template, and the truth that follows from it."""

from __future__ import annotations

import numpy as np
import torch
from scipy import ndimage

from dmir.cohorts.template import SPACING, template, working_grid
from dmir.fields import integrate

SIGMAS = (24.0, 10.0, 5.0)  # mm, smoothness of the three scales of anatomical variation
AMPLITUDES = (2.5, 1.35, 0.6)  # mm, standard deviation of the velocity at each of them
VENTRICLES = (4, 5, 14, 43, 44)


def random_velocity(generator: np.random.Generator) -> np.ndarray:
    """Draw a stationary velocity field: noise smoothed at three scales.

    Returns
    -------
    numpy.ndarray
        float32 (3, D, H, W) in mm on the working grid.
    """
    shape = working_grid().shape
    velocity = np.zeros((3, *shape), dtype=np.float32)
    for sigma, amplitude in zip(SIGMAS, AMPLITUDES, strict=True):
        for component in velocity:
            white = generator.standard_normal(shape, dtype=np.float32)
            smooth = ndimage.gaussian_filter(white, sigma / SPACING, mode="wrap", truncate=3)
            component += amplitude / smooth.std() * smooth
    return velocity


def ageing_velocity() -> np.ndarray:
    """Return the velocity (3, D, H, W), at most 1 mm long, that enlarges the ventricles.

    The anatomy pulls back, so the velocity points into the ventricles: up the gradient of their smoothed mask.
    """
    labels, grid = template()[1], working_grid()
    to_labels = np.linalg.inv(labels.affine) @ grid.affine
    ventricles = np.isin(labels.data, VENTRICLES).astype(np.float32)
    smooth = ndimage.affine_transform(ventricles, to_labels, output_shape=grid.shape, order=1)
    smooth = ndimage.gaussian_filter(smooth, 4.0 / SPACING)
    gradient = np.stack(np.gradient(smooth)).astype(np.float32)
    return gradient / np.sqrt((gradient**2).sum(axis=0)).max()


def exponential(velocity: np.ndarray) -> np.ndarray:
    """Return exp(v) - id in mm, of a velocity (3, D, H, W) in mm on the working grid."""
    voxels = torch.from_numpy(np.asarray(velocity / SPACING, dtype=np.float32))[None]
    return integrate(voxels, steps=7)[0].numpy() * SPACING


def truth(backward: np.ndarray, pose: np.ndarray) -> np.ndarray:
    """Return d(x) = P^-1 (x + w(x)) - x, where x + w(x) = exp(-v)(x).

    Parameters
    ----------
    backward
        w: (3, D, H, W) in mm on the working grid.
    pose
        P: 4x4, scanner world -> template world (RAS mm).

    Returns
    -------
    numpy.ndarray
        float32 (3, D, H, W) in voxels of the working grid.
    """
    inverse, grid = np.linalg.inv(pose), working_grid()
    axes = [origin + SPACING * np.arange(n) for origin, n in zip(grid.affine[:3, 3], grid.shape, strict=True)]
    point = np.stack(np.meshgrid(*axes, indexing="ij"))
    target = np.einsum("ij,jdhw->idhw", inverse[:3, :3], point + backward) + inverse[:3, 3].reshape(3, 1, 1, 1)
    return ((target - point) / SPACING).astype(np.float32)
