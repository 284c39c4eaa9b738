"""One training step, as Lightning runs it."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from lightning.pytorch import LightningModule
from torch import nn

from dmir.errors import DmirError
from dmir.training.comparison import compared
from dmir.training.data import ImageBank, derived_seed
from dmir.training.objective import displacement_of
from dmir.training.settings import TrainingSettings

STEP_STREAM = 1  # keeps the seeds of the steps apart from those of the passes through the pairs


class TrainingDiverged(DmirError):
    """The loss or its gradient became NaN or infinite.

    ``step`` is the first such step; ``terms`` are those of the steps before it that nobody had read yet.
    """

    def __init__(self, message: str, step: int, terms: list[list[float]]) -> None:
        super().__init__(message)
        self.step = step
        self.terms = terms


class RegistrationModule(LightningModule):
    """Loss and optimiser of a registration network.

    A batch is an int64 tensor (B, 2): the positions of a step's moving and fixed images in the bank. Each of several
    processes takes an equal share. Learning rate and random numbers are functions of the step, so that a training can
    be taken up at any step.

    From the first step whose loss or gradient is not finite, no step changes the weights any more: the flag stays on
    the device, as looking at it would stop the GPU's queue, and :meth:`read_terms` finds it.

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
        self._diverged = torch.zeros((), device=bank.device)  # 1 from the first step that is not finite

    @property
    def step(self) -> int:
        """Steps done, earlier sessions included."""
        return self.first_step + self.trainer.global_step

    def configure_optimizers(self) -> torch.optim.Optimizer:
        # fused: one kernel for all weights, and the only form that skips a step without being waited for
        return torch.optim.Adam(
            self.network.parameters(), lr=self.settings.learning_rate_at(self.first_step), fused=True
        )

    def transfer_batch_to_device(self, batch: torch.Tensor, device: torch.device, dataloader_idx: int) -> torch.Tensor:
        return batch  # positions in the bank, which are used on the host

    def on_train_batch_start(self, batch: torch.Tensor, batch_idx: int) -> None:
        rank = [self.global_rank] if self.global_rank else []  # the first process draws what a single one would
        seed = derived_seed(self.settings.seed, STEP_STREAM, self.step, *rank)
        torch.random.default_generator.manual_seed(seed)  # torch.manual_seed takes a millisecond with other devices
        if self.bank.device.type == "cuda":
            torch.cuda.manual_seed(seed)
        for group in self.trainer.optimizers[0].param_groups:
            group["lr"] = self.settings.learning_rate_at(self.step)

    def training_step(self, batch: torch.Tensor, batch_idx: int) -> torch.Tensor:
        moving, fixed = self.bank.pairs_of(batch[self.global_rank :: self.trainer.world_size])
        displacement = displacement_of(self.run, moving, fixed, self.settings.precision)
        images = compared(moving, fixed, displacement, self.settings, self.settings.offset_at(self.step))
        terms = self.objective(*images, displacement)
        self._unread.append((self.step + 1, batch, [term.detach() for term in terms]))
        return terms[0]

    def configure_gradient_clipping(self, optimizer: torch.optim.Optimizer, *args: Any, **kwargs: Any) -> None:
        parameters = list(self.network.parameters())
        norm = nn.utils.get_total_norm([p.grad for p in parameters if p.grad is not None])
        if self.settings.gradient_clip:
            nn.utils.clip_grads_with_norm_(parameters, self.settings.gradient_clip, norm)
        terms = self._unread[-1][2]
        terms.append(norm)
        # a loss that is not finite always shows in the gradients, which are the same in all processes
        self._diverged = torch.maximum(self._diverged, (~torch.isfinite(norm)).float())
        optimizer.found_inf = self._diverged  # type: ignore[attr-defined]  # how torch's own scaler skips a step

    def read_terms(self) -> list[list[float]]:
        """Return loss, similarity, regularisation and gradient norm of every step since the last call.

        They wait on the device until then, because reading a number there stops the GPU's queue. Of several processes
        all must call; the numbers are means over the pairs of the step.

        Raises
        ------
        TrainingDiverged
            One of them is not finite; the first such step and its pairs are named.
        """
        if not self._unread:
            return []
        rows = torch.stack([torch.stack(terms) for _, _, terms in self._unread])
        shares = self.trainer.strategy.all_gather(rows) if self._is_shared() else rows[None]  # (processes, steps, 4)
        finite = torch.isfinite(shares).all(dim=2).tolist()
        for number, (step, batch, _) in enumerate(self._unread):
            bad = [rank for rank in range(len(finite)) if not finite[rank][number]]
            if bad:
                # a NaN of one process is in the gradient of all: the losses tell which one it was
                losses = torch.isfinite(shares[:, number, :3]).all(dim=1).tolist()
                guilty = [rank for rank in bad if not losses[rank]] or bad
                pairs = torch.cat([batch[rank :: len(finite)] for rank in guilty])
                message = self._what_diverged(step, pairs, shares[guilty[0], number].tolist())
                raise TrainingDiverged(message, step, shares[:, :number].mean(dim=0).tolist())
        self._unread.clear()
        means: list[list[float]] = shares.mean(dim=0).tolist()
        return means

    def _is_shared(self) -> bool:
        return self._trainer is not None and self._trainer.world_size > 1

    def _what_diverged(self, step: int, pairs: torch.Tensor, row: list[float]) -> str:
        names = self.bank.names
        named = ", ".join(f"{names[moving]} to {names[fixed]}" for moving, fixed in pairs.tolist())
        return (
            f"Step {step} ({named}): the loss is {row[0]:g} (similarity {row[1]:g}, regularisation {row[2]:g}) and its"
            f" gradient's norm {row[3]:g}. Look at these images; a lower training.learning_rate or a"
            " training.gradient_clip may help."
        )
