"""SyN, symmetric normalisation (Avants et al. 2008), by ANTs: the deformable part alone, from the identity."""

from __future__ import annotations

import math
import os
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from types import MappingProxyType
from typing import Annotated, Any, Literal

import numpy as np
from pydantic import Field

from dmir.errors import DmirError, InputError, suggestion
from dmir.methods.geometry import geometry
from dmir.settings import MethodSettings, PairCost, Positive
from dmir.storage import plainly_named_folder
from dmir.volumes import Volume

TITLE = "SyN"
PAPER = "Avants et al. 2008, of ANTs"
COLOUR, MARKER = "#000000", "s"
LIBRARIES = ("ants",)
METRICS = ("CC", "mattes", "meansquares")
SEED = "ANTS_RANDOM_SEED"

VOXEL_ITERATION = (2.3e-6, 2.7e-7)  # CPU seconds a + b (2 radius + 1)^2 of CC, at 48^3 and 80^3 voxels; others take a
BYTES_A_VOXEL = 450  # its largest resident set at 1 mm, float64
FULL_ITERATIONS = 3  # of a trial, at full resolution, where the time goes; two at each coarser level


class Settings(MethodSettings):
    """SyN of ANTs (Avants et al. 2008), deformable part only: the pairs are affinely aligned."""

    metric: Literal["CC", "mattes", "meansquares"] = "CC"
    """Similarity: cross-correlation, mutual information or mean squares."""
    radius: Annotated[int, Field(ge=1)] = 2
    """Radius of the window of `CC` in voxels."""
    bins: Annotated[int, Field(ge=8)] = 32
    """Histogram bins of `mattes`."""
    iterations: list[Annotated[int, Field(ge=0)]] = Field([40, 20, 2])
    """Iterations a level, from the coarsest to full resolution."""
    gradient_step: Positive = 0.3
    """Length of a step."""
    flow_sigma: Annotated[float, Field(ge=0)] = 3.0
    """Smoothing of the update field."""
    total_sigma: Annotated[float, Field(ge=0)] = 0.0
    """Smoothing of the total field."""
    mask_margin: Annotated[int, Field(ge=0)] | None = 2
    """The metric is computed within the fixed brain and so many voxels round it; none: everywhere."""
    single_precision: bool = False
    """Compute in float32 instead of float64."""
    seed: int = 1
    """Of ITK's random numbers."""


def register(
    moving: Volume,
    fixed: Volume,
    *,
    metric: str = "CC",
    radius: int = 2,
    bins: int = 32,
    iterations: Sequence[int] = (40, 20, 2),
    gradient_step: float = 0.3,
    flow_sigma: float = 3.0,
    total_sigma: float = 0.0,
    mask_margin: int | None = 2,
    single_precision: bool = False,
    seed: int = 1,
) -> np.ndarray:
    """Return the displacement field of SyN.

    With ``metric="CC"`` the field is the same, bit by bit, on every run and with any number of threads; with
    ``"mattes"`` it is the same on every run with one number of threads.

    Parameters
    ----------
    moving, fixed
        Affinely aligned; each on its own grid or both on one.
    metric
        ``"CC"``, local cross-correlation; ``"mattes"``, mutual information; ``"meansquares"``.
    radius
        Of the window of ``"CC"``, voxels.
    bins
        Of the histogram of ``"mattes"``.
    iterations
        A level, from the coarsest to full resolution. Each level halves the voxels of the one before; the last costs
        eight times the one before it, so most of the time goes where the least is left to gain.
    gradient_step, flow_sigma, total_sigma
        Length of a step (voxels), variance with which the update and the total field are smoothed (voxels).
    mask_margin
        The metric looks only at the fixed image's foreground, what is brighter than its darkest value, and this many
        voxels round it. On a stripped brain that halves the time and does not change the scores. None: everywhere.
    single_precision
        float32 inside ANTs: less memory, not less time.
    seed
        Of ANTs. No metric draws random numbers here.

    Returns
    -------
    numpy.ndarray
        float32 (3, D, H, W), voxels of the fixed grid: from a point of the fixed world to one of the moving world.

    Raises
    ------
    InputError
        A parameter or a grid that ANTs cannot work with.
    DmirError
        ANTs gave no field.
    """
    _check(metric, iterations)
    import ants

    from dmir.fields import load_field  # torch: not for those who ask what there is

    images = [_to_ants(volume, name) for volume, name in ((fixed, "the fixed image"), (moving, "the moving image"))]
    options: dict[str, Any] = {}
    if mask_margin is not None:
        options = {"mask": images[0].new_image_like(_foreground(fixed.data, mask_margin)), "mask_all_stages": True}
    # ANTs finds its results by the names' beginning: anything that lies there already would be taken for one
    with plainly_named_folder("syn-") as folder, _environment(SEED, str(seed)):
        try:
            result = ants.registration(
                *images,
                type_of_transform="SyNOnly",
                initial_transform="Identity",
                outprefix=str(Path(folder) / "syn"),
                syn_metric=metric,
                syn_sampling=bins if metric == "mattes" else radius,
                reg_iterations=tuple(iterations),
                grad_step=gradient_step,
                flow_sigma=flow_sigma,
                total_sigma=total_sigma,
                singleprecision=single_precision,
                **options,
            )
        except RuntimeError as error:
            raise DmirError(f"SyN failed: {error}") from error
        warps = [path for path in result["fwdtransforms"] if path.endswith("Warp.nii.gz")]
        if len(warps) != 1:
            raise DmirError(f"SyN gave {len(warps)} fields instead of one")
        displacement, _ = load_field(warps[0])
    return displacement


def _check(metric: str, iterations: Sequence[int]) -> None:
    if metric not in METRICS:
        raise InputError(
            "metric", found=f"'{metric}'", expected=", ".join(METRICS), remedy=suggestion(str(metric), METRICS)
        )
    if not iterations or not any(iterations) or min(iterations) < 0:
        raise InputError("iterations", found=f"{list(iterations)}", expected="a number a level, not all of them 0")


def _foreground(image: np.ndarray, margin: int) -> np.ndarray:
    """Return float32 1 at what is brighter than the darkest value and ``margin`` voxels round it, else 0."""
    from scipy.ndimage import binary_dilation

    bright = image > image.min()
    return (binary_dilation(bright, iterations=margin) if margin else bright).astype(np.float32)


def _to_ants(volume: Volume, name: str) -> Any:
    import ants

    place = geometry(volume, name)
    return ants.from_numpy(
        volume.data.astype(np.float32), origin=place.origin, spacing=place.spacing, direction=place.direction
    )


@contextmanager
def _environment(name: str, value: str) -> Iterator[None]:
    """Set an environment variable for a while; ANTs takes its seed from one."""
    before = os.environ.get(name)
    os.environ[name] = value
    try:
        yield
    finally:
        if before is None:
            del os.environ[name]
        else:
            os.environ[name] = before


def voxel_iterations(shape: Sequence[int], iterations: Sequence[int]) -> float:
    """Return how many voxels SyN works on in all its iterations, if none of its levels converges early."""
    levels = len(iterations)
    return math.prod(shape) * sum(count / 8 ** (levels - 1 - level) for level, count in enumerate(iterations))


def cost(
    parameters: Mapping[str, Any],
    shape: Sequence[int],
    spacing: Sequence[float],
    measured: Mapping[str, float] = MappingProxyType({}),
) -> PairCost:
    """Return what a pair costs; ``voxel_iteration_s`` may be measured."""
    by_radius = VOXEL_ITERATION[1] * (2 * parameters["radius"] + 1) ** 2
    each = VOXEL_ITERATION[0] + (by_radius if parameters["metric"] == "CC" else 0.0)
    seconds = measured.get("voxel_iteration_s", each) * voxel_iterations(shape, parameters["iterations"])
    return PairCost(seconds, BYTES_A_VOXEL * math.prod(shape), "at most: levels may converge before")


def measure(
    parameters: Mapping[str, Any], seconds_of: Callable[[Mapping[str, Any]], float], shape: Sequence[int]
) -> dict[str, float]:
    """Return the seconds of one voxel in one iteration; all levels and what is done once are in them."""
    iterations = [2] * (len(parameters["iterations"]) - 1) + [FULL_ITERATIONS]
    taken = seconds_of({**parameters, "iterations": iterations})
    return {"voxel_iteration_s": taken / voxel_iterations(shape, iterations)}
