"""What a training minimises, and in which precision."""

from __future__ import annotations

import contextlib
import logging
import os
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import cache
from typing import Any

import torch

from dmir import losses
from dmir.errors import InputError

log = logging.getLogger(__name__)


class NoNetwork(InputError):
    """A class that does not do what a network does."""


PRECISIONS = ("float32", "tf32", "bf16")


@dataclass(frozen=True)
class Objective:
    """loss = dissimilarity + regularisation * diffusion.

    The dissimilarity is -LNCC, the mean squared error, or minus the mutual information (Balakrishnan et al. 2019,
    equations 3 to 7).

    Parameters
    ----------
    similarity
        A name of ``dmir.losses.SIMILARITIES``: ``"lncc"``, ``"mse"`` or ``"mutual_information"``.
    window
        Edge of the LNCC's cube in voxels.
    regularisation
        lambda, the factor of the field's diffusion energy.
    """

    similarity: str = "lncc"
    window: int = 9
    regularisation: float = 1.0

    def __call__(
        self, fixed: torch.Tensor, warped: torch.Tensor, displacement: torch.Tensor
    ) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
        """Return the loss, the similarity as its name says (the MSE falls, the others rise) and the diffusion energy.

        Parameters
        ----------
        fixed, warped
            (B, 1, D, H, W).
        displacement
            (B, 3, D, H, W) in voxels.
        """
        # Bfloat16 has three digits: local variances and differences of neighbouring displacements drown in it.
        with torch.autocast(device_type=fixed.device.type, enabled=False):
            fixed, warped, displacement = fixed.float(), warped.float(), displacement.float()
            options = {"window": self.window} if self.similarity == "lncc" else {}
            similarity = losses.SIMILARITIES[self.similarity](fixed, warped, **options)
            dissimilarity = similarity if self.similarity == "mse" else -similarity
            diffusion = losses.diffusion(displacement)
            return dissimilarity + self.regularisation * diffusion, similarity, diffusion


def displacement_of(
    network: Callable[..., torch.Tensor], moving: torch.Tensor, fixed: torch.Tensor, precision: str
) -> torch.Tensor:
    """Run the network, with its matrix products and convolutions in bfloat16 if asked; the field is float32.

    Parameters
    ----------
    moving, fixed
        float32 (B, 1, D, H, W).
    precision
        ``"float32"``, ``"tf32"`` (the same here, see :func:`arithmetic`) or ``"bf16"``.

    Returns
    -------
    torch.Tensor
        (B, 3, D, H, W) in voxels.

    Raises
    ------
    NoNetwork
        What comes out is no field of this pair, or the images were written to.
    """
    before = _written(moving, fixed)
    bfloat16 = precision == "bf16" and has_bfloat16(moving.device.type)
    with torch.autocast(device_type=moving.device.type, dtype=torch.bfloat16, enabled=bfloat16):
        displacement = network(moving, fixed)
    _require_field(displacement, moving)
    if _written(moving, fixed) != before:
        raise NoNetwork(
            "the network",
            found="one that changes the images that it is given",
            expected="one that leaves them as they are: they belong to other pairs too",
            remedy="Work on copies of them, or not in place.",
        )
    return displacement.float()


def _written(*images: torch.Tensor) -> tuple[int, ...]:
    """Return how often each image was written to, as torch counts it."""
    return tuple(0 if image.is_inference() else image._version for image in images)


def _require_field(displacement: Any, moving: torch.Tensor) -> None:
    """Raise NoNetwork for what is no displacement of a pair: another kind of thing, another shape, whole numbers."""
    expected = (moving.shape[0], 3, *moving.shape[2:])
    if not isinstance(displacement, torch.Tensor):
        found = type(displacement).__name__
    elif tuple(displacement.shape) != expected:
        found = f"a field of the shape {tuple(displacement.shape)}"
    elif displacement.dtype not in (torch.float32, torch.bfloat16, torch.float16):
        found = f"a field of {displacement.dtype}"
    else:
        return
    raise NoNetwork("the network", found=found, expected=f"a float32 tensor {expected}, the displacement in voxels")


@cache
def has_bfloat16(device_type: str) -> bool:
    """Tell whether a kind of device computes in bfloat16; where it would only imitate it, float32 is faster."""
    if device_type == "cuda":
        supported = torch.cuda.is_bf16_supported(including_emulation=False)
    else:  # torch has no public question for this
        supported = bool(getattr(torch.ops.mkldnn, "_is_mkldnn_bf16_supported", lambda: False)())
    if not supported:
        log.warning("this %s has no bfloat16 arithmetic: float32 is used instead, which takes longer", device_type)
    return supported


@contextlib.contextmanager
def arithmetic(precision: str, deterministic: bool = False) -> Iterator[None]:
    """Set torch's global switches for the time of a computation, and put them back.

    ``"float32"`` means it: on recent GPUs torch would round the inputs of convolutions to TF32 (10 bits) by itself.
    ``"tf32"`` allows that, for matrix products too. With ``deterministic``, torch takes algorithms that give the same
    bits every time where it has them and warns where it has none (on GPUs the gradients of ``grid_sample`` and of
    average pooling; on the CPU nothing is missing).
    """
    cudnn, matmul = torch.backends.cudnn, torch.backends.cuda.matmul
    before = (
        cudnn.allow_tf32,
        matmul.allow_tf32,
        cudnn.benchmark,
        torch.are_deterministic_algorithms_enabled(),
        torch.is_deterministic_algorithms_warn_only_enabled(),
    )
    cudnn.allow_tf32 = matmul.allow_tf32 = precision == "tf32"
    cudnn.benchmark = not deterministic  # the shapes never change: worth one search for the fastest algorithm
    if deterministic:
        os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")  # read by cuBLAS when it starts
        torch.use_deterministic_algorithms(True, warn_only=True)
    # with those algorithms torch also fills each new tensor, for nothing: none is read before it is written
    torch.utils.deterministic.fill_uninitialized_memory = False  # type: ignore[attr-defined]
    try:
        yield
    finally:
        cudnn.allow_tf32, matmul.allow_tf32, cudnn.benchmark = before[:3]
        if deterministic:  # otherwise nothing was changed, and asking imports torch's compiler, which takes a second
            torch.use_deterministic_algorithms(before[3], warn_only=before[4])
