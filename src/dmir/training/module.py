"""One training step, as Lightning runs it."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import torch
from lightning.pytorch import LightningModule
from torch import nn

from dmir.errors import DmirError
from dmir.fields import shifted_displacement, warp
from dmir.training.data import ImageBank, derived_seed
from dmir.training.objective import displacement_of
from dmir.training.settings import TrainingSettings

STEP_STREAM = 1  # keeps the seeds of the steps apart from those of the passes through the pairs


class TrainingDiverged(DmirError):
    """The loss or its gradient became NaN or infinite."""


class RegistrationModule(LightningModule):
    """Loss and optimiser of a registration network.

    A batch is an int64 tensor (B, 2): the positions of the moving and the fixed images in the bank. Learning rate and
    random numbers are functions of the step, so that a training can be taken up at any step.

    Parameters
    ----------
    network
        (moving, fixed) -> displacement, (B, 1, D, H, W) twice -> (B, 3, D, H, W) voxels.
    bank
        Images of the training scans and the atlas.
    first_step
        Steps done in earlier sessions.
    """

    def __init__(self, network: nn.Module, bank: ImageBank, settings: TrainingSettings, first_step: int = 0) -> None:
        super().__init__()
        self.network = network
        self.run: Callable[..., torch.Tensor] = torch.compile(network) if settings.compile else network
        self.bank = bank
        self.settings = settings
        self.objective = settings.objective()
        self.first_step = first_step
        self._unread: list[tuple[int, torch.Tensor, list[torch.Tensor]]] = []

    @property
    def step(self) -> int:
        """Steps done, earlier sessions included."""
        return self.first_step + self.trainer.global_step

    def configure_optimizers(self) -> torch.optim.Optimizer:
        return torch.optim.Adam(self.network.parameters(), lr=self.settings.learning_rate_at(self.first_step))

    def transfer_batch_to_device(self, batch: torch.Tensor, device: torch.device, dataloader_idx: int) -> torch.Tensor:
        return batch  # positions in the bank, which are used on the host

    def on_train_batch_start(self, batch: torch.Tensor, batch_idx: int) -> None:
        seed = derived_seed(self.settings.seed, STEP_STREAM, self.step)
        torch.random.default_generator.manual_seed(seed)  # torch.manual_seed takes a millisecond with other devices
        if self.bank.device.type == "cuda":
            torch.cuda.manual_seed(seed)
        for group in self.trainer.optimizers[0].param_groups:
            group["lr"] = self.settings.learning_rate_at(self.step)

    def training_step(self, batch: torch.Tensor, batch_idx: int) -> torch.Tensor:
        moving = self.bank.images_of(batch[:, 0].tolist())
        fixed = self.bank.images_of(batch[:, 1].tolist())
        displacement = displacement_of(self.run, moving, fixed, self.settings.precision)
        sampled = displacement if self.settings.warp == "exact" else shifted_displacement(displacement)
        terms = self.objective(fixed, warp(moving, sampled), displacement)
        self._unread.append((self.step + 1, batch, [term.detach() for term in terms]))
        return terms[0]

    def configure_gradient_clipping(self, optimizer: torch.optim.Optimizer, *args: Any, **kwargs: Any) -> None:
        parameters = list(self.network.parameters())
        norm = nn.utils.get_total_norm([p.grad for p in parameters if p.grad is not None])
        if self.settings.gradient_clip:
            nn.utils.clip_grads_with_norm_(parameters, self.settings.gradient_clip, norm)
        self._unread[-1][2].append(norm)

    def read_terms(self) -> list[list[float]]:
        """Return loss, similarity, regularisation and gradient norm of every step since the last call.

        They wait on the device until then, because reading a number there stops the GPU's queue.

        Raises
        ------
        TrainingDiverged
            One of them is not finite; the first such step and its pairs are named.
        """
        if not self._unread:
            return []
        rows = torch.stack([torch.stack(terms) for _, _, terms in self._unread]).tolist()
        for (step, batch, _), row in zip(self._unread, rows, strict=True):
            if not all(map(math.isfinite, row)):
                names = self.bank.names
                pairs = ", ".join(f"{names[moving]} to {names[fixed]}" for moving, fixed in batch.tolist())
                raise TrainingDiverged(
                    f"Step {step} ({pairs}): the loss is {row[0]:g} (similarity {row[1]:g}, regularisation {row[2]:g})"
                    f" and its gradient's norm {row[3]:g}. Look at these images; a lower learning rate or"
                    " gradient_clip may help."
                )
        self._unread.clear()
        return rows
