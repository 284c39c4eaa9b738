"""Free-form deformation by B-splines (Rueckert et al. 1999) with elastix (Klein et al. 2010)."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from types import MappingProxyType, ModuleType
from typing import Annotated, Any, Literal

import numpy as np
from pydantic import Field

from dmir.errors import DmirError, InputError, suggestion
from dmir.methods.geometry import geometry
from dmir.settings import MethodSettings, PairCost, Positive
from dmir.storage import temporary_folder
from dmir.volumes import Volume

TITLE = "Elastix"
PAPER = "Klein et al. 2010; B-splines of Rueckert et al. 1999"
COLOUR, MARKER = "#f0e442", "d"
METRICS = {
    "mutual_information": "AdvancedMattesMutualInformation",
    "normalised_correlation": "AdvancedNormalizedCorrelation",
}
STEP_SIZES = {"displacement_distribution": "DisplacementDistribution", "original": "Original"}
LONGEST_STEP = {"displacement_distribution": 0.5, "original": 1.0}  # voxels; a whole one of the former can run away
LIBRARIES = ("itk.itkElastixRegistrationMethodPython", "itk.itkTransformixFilterPython")
LARGEST_FIELD = 1e5  # mm; what elastix gives when its optimiser has run away

SAMPLE = 6e-6  # CPU seconds of an iteration and random sample
ONCE = (0.3, 1.3e-6)  # of a registration, and of a voxel of it: pyramids, the field
ORIGINAL = 1.4  # CPU seconds a level of the original estimate of the step size
TRIED_ITERATIONS = (5, 25)  # a level: what differs is the iterations', the rest is spent once


class Settings(MethodSettings):
    """Elastix (Klein et al. 2010): free-form B-splines."""

    metric: Literal["normalised_correlation", "mutual_information"] = "normalised_correlation"
    """Similarity."""
    final_grid_spacing: Positive = 10.0
    """Spacing of the control points in mm at the finest level."""
    resolutions: Annotated[int, Field(ge=1, le=8)] = 4
    """Levels."""
    iterations: Annotated[int, Field(ge=1)] = 150
    """Iterations a level."""
    samples: Annotated[int, Field(ge=100)] = 2048
    """Random samples an iteration."""
    bending_energy: Annotated[float, Field(ge=0)] = 1.0
    """Weight of the bending energy of the field."""
    step_size: Literal["displacement_distribution", "original"] = "displacement_distribution"
    """How the optimiser's step size is estimated: `original` takes seconds more a level and ends at the same Dice."""
    seed: int = 1
    """Of the random samples."""
    threads: Annotated[int, Field(ge=1)] = 1
    """Its result depends on the number of threads, so that this is a parameter and not a resource."""


def register(
    moving: Volume,
    fixed: Volume,
    *,
    metric: str = "normalised_correlation",
    final_grid_spacing: float = 10.0,
    resolutions: int = 4,
    iterations: int = 150,
    samples: int = 2048,
    bending_energy: float = 1.0,
    step_size: str = "displacement_distribution",
    seed: int = 1,
    threads: int = 1,
) -> np.ndarray:
    """Return the displacement field of elastix.

    The field is the same, bit by bit, on every run with one seed and one number of threads; it differs between
    numbers of threads.

    Parameters
    ----------
    moving, fixed
        Affinely aligned; each on its own grid or both on one.
    metric
        ``"normalised_correlation"``, or ``"mutual_information"`` (Mattes et al. 2003) for images of two kinds.
    final_grid_spacing
        Between control points at the finest level, mm.
    resolutions
        Levels, each with half the control-point spacing and half the smoothing of the one before.
    iterations
        A level, of adaptive stochastic gradient descent.
    samples
        Random points an iteration.
    bending_energy
        Weight of the bending energy penalty beside the metric's weight of 1; 0: none.
    step_size
        How the optimiser's step size is estimated, once a level: from the distribution of voxel displacements (Qiao et
        al. 2016), or as elastix does by default (``"original"``, Klein et al. 2009), which takes longer than all else
        at a coarse grid.
    seed
        Of the random points.
    threads
        Of ITK; part of the result.

    Returns
    -------
    numpy.ndarray
        float32 (3, D, H, W), voxels of the fixed grid: from a point of the fixed world to one of the moving world.

    Raises
    ------
    InputError
        A parameter or a grid that elastix cannot work with.
    DmirError
        elastix gave up.
    """
    if metric not in METRICS:
        raise InputError(
            "metric", found=f"'{metric}'", expected=" or ".join(METRICS), remedy=suggestion(str(metric), METRICS)
        )
    if step_size not in STEP_SIZES:
        expected = " or ".join(STEP_SIZES)
        raise InputError(
            "step_size", found=f"'{step_size}'", expected=expected, remedy=suggestion(str(step_size), STEP_SIZES)
        )
    import itk

    from dmir.fields import LPS, to_voxels  # torch: not for those who ask what there is

    # Not elastix's own number of threads: with two metrics at once it crashes there (ITKElastix issue 160).
    itk.MultiThreaderBase.SetGlobalDefaultNumberOfThreads(threads)
    fixed_image = _to_itk(itk, fixed, "the fixed image")
    moving_image = _to_itk(itk, moving, "the moving image")
    parameters = _parameters(
        metric=METRICS[metric],
        step_length=LONGEST_STEP[step_size] * float(np.mean([fixed.spacing, moving.spacing])),
        final_grid_spacing=final_grid_spacing,
        resolutions=resolutions,
        iterations=iterations,
        samples=samples,
        bending_energy=bending_energy,
        step_size=STEP_SIZES[step_size],
        seed=seed,
    )
    try:
        transform = _estimate(fixed_image, moving_image, parameters)
        with temporary_folder("elastix-") as folder:
            field = itk.array_from_image(_deformation_field(moving_image, transform, folder))
    except RuntimeError as error:
        raise DmirError(f"elastix failed: {_last_line(error)}") from error
    millimetres = np.transpose(field, (3, 2, 1, 0)) * LPS  # ITK's arrays run backwards
    if not np.abs(millimetres).max() < LARGEST_FIELD:  # not: NaN too
        raise DmirError("elastix failed: its field is not finite")
    return to_voxels(millimetres, fixed.affine).astype(np.float32)


def _estimate(fixed: Any, moving: Any, parameters: Any) -> Any:
    """Run elastix and return its transform parameters.

    ``itk.elastix_registration_method`` is the same call, but its lazy loading imports every module of ITK first,
    which takes longer than many a registration.
    """
    from itk.itkElastixRegistrationMethodPython import itkElastixRegistrationMethodIF3IF3

    elastix = itkElastixRegistrationMethodIF3IF3.New()
    elastix.SetFixedImage(fixed)
    elastix.SetMovingImage(moving)
    elastix.SetParameterObject(parameters)
    elastix.LogToConsoleOff()
    elastix.UpdateLargestPossibleRegion()
    return elastix.GetTransformParameterObject()


def _deformation_field(moving: Any, transform: Any, folder: str) -> Any:
    """Run transformix and return T(x) - x on the fixed grid, LPS mm."""
    from itk.itkTransformixFilterPython import itkTransformixFilterIF3

    transformix = itkTransformixFilterIF3.New()
    transformix.SetMovingImage(moving)
    transformix.SetTransformParameterObject(transform)
    transformix.SetComputeDeformationField(True)
    transformix.SetOutputDirectory(folder)  # it writes the field to a file as well: by default where we are
    transformix.LogToConsoleOff()
    transformix.UpdateLargestPossibleRegion()
    return transformix.GetOutputDeformationField()


def _parameters(
    *,
    metric: str,
    step_length: float,
    final_grid_spacing: float,
    resolutions: int,
    iterations: int,
    samples: int,
    bending_energy: float,
    step_size: str,
    seed: int,
) -> Any:
    """Return elastix's own B-spline settings with ours in place of some."""
    from itk.elxParameterObjectPython import elastixParameterObject

    parameters = elastixParameterObject.New()
    settings = dict(parameters.GetDefaultParameterMap("bspline", resolutions))
    settings |= {
        "FinalGridSpacingInPhysicalUnits": [str(final_grid_spacing)],
        "MaximumNumberOfIterations": [str(iterations)],
        # elastix's own default leaves axes out, so that the order in which a file stores them would change the result
        "MaximumStepLength": [str(step_length)],
        "ASGDParameterEstimationMethod": [step_size],
        "NumberOfSpatialSamples": [str(samples)],
        "RandomSeed": [str(seed)],
        "WriteResultImage": ["false"],  # it would be resampled by cubic B-splines; one warper serves all methods
    }
    if bending_energy > 0:
        settings["Metric"] = [metric, "TransformBendingEnergyPenalty"]
        settings["Metric1Weight"] = [str(bending_energy)]
    else:
        settings["Metric"] = [metric]
        settings["Registration"] = ["MultiResolutionRegistration"]
        del settings["Metric1Weight"]
    parameters.AddParameterMap(settings)
    return parameters


def _to_itk(itk: ModuleType, volume: Volume, name: str) -> Any:
    place = geometry(volume, name)
    image = itk.image_from_array(np.ascontiguousarray(volume.data.T, dtype=np.float32))
    image.SetOrigin(place.origin)
    image.SetSpacing(place.spacing)
    image.SetDirection(itk.matrix_from_array(np.ascontiguousarray(place.direction)))
    return image


def _last_line(error: Exception) -> str:
    lines = [line.strip() for line in str(error).splitlines() if line.strip()]
    return lines[-1] if lines else type(error).__name__


def cost(
    parameters: Mapping[str, Any],
    shape: Sequence[int],
    spacing: Sequence[float],
    measured: Mapping[str, float] = MappingProxyType({}),
) -> PairCost:
    """Return what a pair costs; ``iteration_s`` may be measured."""
    each = measured.get("iteration_s", SAMPLE * parameters["samples"])
    once = ONCE[0] + ONCE[1] * math.prod(shape)
    if parameters["step_size"] == "original":
        once += ORIGINAL * parameters["resolutions"]
    return PairCost(once + each * parameters["iterations"] * parameters["resolutions"])


def measure(
    parameters: Mapping[str, Any], seconds_of: Callable[[Mapping[str, Any]], float], shape: Sequence[int]
) -> dict[str, float]:
    """Return the seconds of one iteration, of one level."""
    taken = [seconds_of({**parameters, "iterations": iterations}) for iterations in TRIED_ITERATIONS]
    more = (TRIED_ITERATIONS[1] - TRIED_ITERATIONS[0]) * int(parameters["resolutions"])
    return {"iteration_s": max(taken[1] - taken[0], 0.0) / more}
