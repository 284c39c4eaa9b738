"""The sections of the configuration: every key of theirs, its type, its default and what it means."""

from __future__ import annotations

from typing import Annotated, Any, Literal

from pydantic import Field, field_validator, model_validator

from dmir.config.base import unique_mistakes
from dmir.errors import suggestion
from dmir.networks import hyperparameter_names
from dmir.settings import MethodSettings, Model, Positive

Seed = Annotated[int, Field(ge=0, strict=True)]  # a model's name: seed1

Shape = tuple[Annotated[int, Field(ge=16)], Annotated[int, Field(ge=16)], Annotated[int, Field(ge=16)]]


class Grid(Model):
    """The grid on which a cohort is preprocessed; it is centred on the atlas's brain, its axes run RAS."""

    shape: Shape = (80, 96, 80)
    """Voxels along left-right, posterior-anterior, inferior-superior."""
    spacing: tuple[Positive, Positive, Positive] = (2.0, 2.0, 2.0)
    """Voxel size in mm; one number stands for three equal ones."""

    @field_validator("spacing", mode="before")
    @classmethod
    def _one_for_three(cls, value: Any) -> Any:
        return (value,) * 3 if isinstance(value, int | float | str) else value  # text: from the command line


class Preprocess(Model):
    """From a scan as it comes to a scan on the grid."""

    skull_strip: Literal["mask", "none", "deepbet"] = "mask"
    """`mask`: the cohort's own brain mask; `none`: the scans are stripped already; `deepbet`: its network."""
    denoise: bool = False
    """Non-local means (Coupe et al. 2008), within the brain, before N4."""
    bias_correction: bool = True
    """N4 (Tustison et al. 2010), within the brain."""
    bias_shrink: Annotated[int, Field(ge=1, le=8)] = 4
    """N4 estimates the field on an image this many times smaller."""
    affine: bool = True
    """Rigid, then affine registration to the atlas by mutual information (ANTs). Off: the headers are trusted."""
    affine_spacing: Annotated[float, Field(ge=1, le=8)] = 3.0
    """Voxel size in mm at which the affine is sought."""
    affine_seed: int = 1
    """Of the affine's random sampling."""
    histogram_match: bool = False
    """Match the histogram to the atlas's before the intensities are scaled."""
    lower: Annotated[float, Field(ge=0, lt=50)] = 0.5
    """This percentile of the brain's intensities becomes 0."""
    upper: Annotated[float, Field(gt=50, le=100)] = 99.5
    """This percentile of the brain's intensities becomes 1."""
    label_interpolation: Literal["nearest", "generic_label"] = "nearest"
    """How label maps come to the grid."""
    strict: bool = False
    """What is doubtful about a scan (its units, its place, its mask, what flags it) is an error, and not only told."""
    flagged: Literal["keep", "leave_out"] = "keep"
    """Scans that quality control flags: used like all others, or neither trained on nor registered."""


class Training(Model):
    """How networks are trained; each method's own `training` may differ."""

    steps: Annotated[int, Field(ge=1)] = 300
    """Optimiser steps."""
    validate_every: Annotated[int, Field(ge=1)] = 50
    """Steps between validations; also the most that a killed training loses."""
    learning_rate: Positive = 1e-4
    """Of Adam."""
    schedule: Literal["constant", "cosine", "polynomial"] = "constant"
    """How the learning rate goes to its end."""
    batch_size: Annotated[int, Field(ge=1)] = 1
    """Pairs a step."""
    gpus: Annotated[int, Field(ge=1)] = 1
    """Cards that share the pairs of each step, so that `batch_size` is a multiple of it."""
    gradient_clip: Annotated[float, Field(ge=0)] = 0.0
    """Largest norm of the gradient; 0: none."""
    similarity: Literal["lncc", "mse", "mutual_information"] = "lncc"
    """What is made alike."""
    window: Annotated[int, Field(ge=3)] = 9
    """Edge of the window of `lncc` in voxels, odd."""
    regularisation: Annotated[float, Field(ge=0)] = 1.0
    """Weight lambda of the diffusion of the field."""
    pairs: Literal["scan_to_atlas", "atlas_to_scan", "all"] = "scan_to_atlas"
    """Each training scan to each atlas, the reverse, or every ordered pair of training scans."""
    warp: Literal["exact", "shifted"] = "exact"
    """In the loss; `shifted`: that of the published code of XMorpher, TransMatch and TransMorph (OASIS)."""
    sampling: Literal["voxels", "random"] = "voxels"
    """Where the loss compares the images: at the voxels, or a random part of a voxel beside them, another each step."""
    smoothing: Annotated[float, Field(ge=0)] = 0.0
    """Of both images, for the loss alone: standard deviation of a Gaussian in voxels; 0: none."""
    keep: Literal["best", "last"] = "best"
    """Which weights: those with the best Dice on the validation scans, or the last."""
    compile: bool = False
    """Let torch write kernels for the network (`torch.compile`): minutes before the first step."""
    precision: Literal["float32", "tf32", "bf16"] = "float32"
    """Of the network; the loss, the field and the warp are float32 in all three."""
    deterministic: bool = True
    """Choose operations that give the same bits in every run; a GPU lacks some of them, which is said in the log."""

    @model_validator(mode="after")
    def _consistent(self) -> Training:
        if self.window % 2 == 0:
            raise ValueError(f"window: found {self.window}; expected an odd number")
        if self.batch_size % self.gpus:
            raise ValueError(f"gpus: found {self.gpus}; expected a divisor of batch_size, which is {self.batch_size}")
        return self


class Network(MethodSettings):
    """A network: which, its hyperparameters, and where its training differs from `training`."""

    algorithm: str
    """One of the networks of `dmir.networks` or of an installed package, or a file's: `my_network.py:MyNetwork`."""
    network: dict[str, Any] = {}
    """Hyperparameters of the network, by the names of its constructor."""
    training: dict[str, Any] = {}
    """Keys of `training` that differ for this method."""
    seeds: list[Seed] | None = Field(default=None, exclude=True)  # no trained model depends on what others there are
    """One model a seed, of this network alone; none: the seeds of all."""

    @model_validator(mode="after")
    def _known(self) -> Network:
        if self.seeds is not None and (problems := unique_mistakes("seeds", self.seeds)):
            raise ValueError("; ".join(problems))
        known = hyperparameter_names(self.algorithm)
        for key in self.network:
            if key not in known:
                raise ValueError(
                    f"network.{key}: {self.algorithm} has no such hyperparameter. {suggestion(key, known)}"
                )
        return self


class Scores(Model):
    """What is measured."""

    label_interpolation: list[Literal["nearest", "linear"]] = ["nearest", "linear"]
    """How label maps are warped, for every method; the first is the tables' (`linear`: one-hot linear + argmax)."""
    inverse_consistency: bool = True
    """Register the pairs of simulated cohorts the other way round too, and score how far there and back ends from the
    start: registration takes twice as long there."""

    @field_validator("label_interpolation")
    @classmethod
    def _at_least_one(cls, value: list[str]) -> list[str]:
        if not value or len(set(value)) != len(value):
            raise ValueError(f"found {value}; expected one or both of nearest, linear, the table's own first")
        return value


class Report(Model):
    """What is drawn and tested."""

    examples: Annotated[int, Field(ge=1, le=8)] = 1
    """Pairs that are drawn and can be looked at in the report: the first test scans of each cohort."""
    planes: list[Literal["axial", "coronal", "sagittal"]] = ["axial", "coronal", "sagittal"]
    """Planes of the qualitative figure; one plane alone shows displacement, difference and endpoint error too."""
    surfaces: dict[str, list[int]] = {}
    """Structures (ids) of the figure of surfaces, by cohort; by default some that are well known or large."""
    reference: str | None = None
    """The method that all others are tested against: `caml` where it is compared, else the last network, else the last
    method."""
    bootstrap: Annotated[int, Field(ge=1000, le=100_000)] = 10_000
    """Resamples of the subjects for the intervals of means and differences."""

    @field_validator("planes")
    @classmethod
    def _each_once(cls, value: list[str]) -> list[str]:
        if not value or len(set(value)) != len(value):
            raise ValueError(f"found {value}; expected one to three of axial, coronal, sagittal, each once")
        return value
