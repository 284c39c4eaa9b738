"""A network on its device: one pair brought there, registered, and its field brought back."""

from __future__ import annotations

import contextlib
import logging
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any

import numpy as np
import torch
from torch import nn

from dmir.errors import DmirError
from dmir.training.devices import device_name
from dmir.training.objective import displacement_of
from dmir.volumes import Grid, Volume

log = logging.getLogger(__name__)

Refine = Callable[..., torch.Tensor]  # moving, fixed, displacement, spacing, and perhaps what was seen
"""(moving, fixed, displacement, spacing) -> displacement: (1, 1, D, H, W) twice and (1, 3, D, H, W), voxels; mm."""


@contextlib.contextmanager
def memory_explained(pair: str, shape: Sequence[int], device: torch.device) -> Iterator[None]:
    """Say of memory that does not suffice which pair wants it, and which keys make it less."""
    try:
        yield
    except (torch.OutOfMemoryError, MemoryError) as error:
        if device.type == "cuda":
            torch.cuda.empty_cache()  # the next pair finds the card as this one did
        raise DmirError(
            f"{pair}, {'x'.join(map(str, shape))} voxels: out of memory on {device_name(device)}. "
            "A smaller `grid.shape` needs less, and `precision` bf16 on a device that has it; `checkpointing` saves "
            f"nothing here, because only training keeps what lies between the layers. ({' '.join(str(error).split())})"
        ) from error


class Computer:
    """A network on its device, and the fixed image that it has there."""

    def __init__(self, network: nn.Module, device: torch.device, precision: str, refine: Refine | None) -> None:
        self.network = network
        self.device = device
        self.precision = precision
        self.refine = refine
        self._host: torch.Tensor | None = None
        self._there: torch.Tensor | None = None
        self._transfer_seconds = 0.0

    def register(
        self,
        moving: torch.Tensor,
        fixed: torch.Tensor,
        spacing: Sequence[float],
        seen: Sequence[torch.Tensor | None] = (None, None),
    ) -> tuple[torch.Tensor, float]:
        """Register one pair of host tensors (1, 1, D, H, W), with voxels of so many mm.

        What a scan never saw, (1, D, H, W), does not pull where the field is refined.

        Returns
        -------
        displacement, seconds
            float32 (3, D, H, W) in host memory, and the seconds from host memory to host memory, with nothing left in
            the GPU's queue.

        Raises
        ------
        DmirError
            The field is not finite.
        """
        fixed_seconds = self._put_there(fixed)
        on_gpu = self.device.type == "cuda"
        # page-locked memory is slow to come the first time and torch keeps it: it is no part of one pair
        held = torch.empty(3, *moving.shape[2:], pin_memory=True) if on_gpu else None
        start = self._now()
        moving_there = moving.to(self.device, non_blocking=True)
        with torch.inference_mode():
            displacement = displacement_of(self.network, moving_there, self._there, self.precision)  # type: ignore[arg-type]
        if self.refine is not None:
            known = {"seen": tuple(map(self._brought, seen))} if any(map_ is not None for map_ in seen) else {}
            displacement = self.refine(moving_there, self._there, displacement, spacing, **known)
        result = displacement[0] if held is None else held.copy_(displacement[0], non_blocking=True)
        seconds = self._now() - start + fixed_seconds
        bad = int(displacement.numel() - displacement.isfinite().sum())
        if bad:
            raise DmirError(f"The network's field has {bad} values that are NaN or infinite.")
        return result, seconds

    def _brought(self, volume: torch.Tensor | None) -> torch.Tensor | None:
        return None if volume is None else volume.to(self.device)

    def _put_there(self, fixed: torch.Tensor) -> float:
        """Have the fixed image on the device, and return the seconds that this takes, or took when it came."""
        if self._host is not fixed:
            self._there = None  # two at a time are never needed
            start = self._now()
            self._there = fixed.to(self.device, non_blocking=True)
            self._transfer_seconds = self._now() - start
            self._host = fixed
        return self._transfer_seconds

    def _now(self) -> float:
        """Return the time when all that the device was told to do is done."""
        if self.device.type == "cuda":
            torch.cuda.synchronize(self.device)
        return time.perf_counter()


def to_tensor(image: Volume, device: torch.device) -> torch.Tensor:
    """Return an image as (1, 1, D, H, W) in host memory, page-locked where a GPU is to fetch it."""
    tensor = torch.from_numpy(np.ascontiguousarray(image.data, np.float32))[None, None]
    return tensor.pin_memory() if device.type == "cuda" else tensor


def warn_of_spacing(metadata: Mapping[str, Any], fixed: Volume | Grid) -> bool:
    """Warn when the images' voxels are not those of the training; tell whether there was a reason to."""
    trained = np.asarray(metadata["grid"]["spacing"])
    differs = not np.allclose(trained, fixed.spacing, atol=1e-3)
    if differs:
        log.warning(
            "%s was trained on voxels of %s mm, and these are %s mm: what it learnt of sizes does not hold",
            metadata["network"],
            "x".join(f"{s:.3g}" for s in trained),
            "x".join(f"{s:.3g}" for s in fixed.spacing),
        )
    return differs
