"""What a network is worth while it is trained: the mean Dice of the validation pairs."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import nn

from dmir.fields import warp, warp_labels
from dmir.training.data import ImageBank
from dmir.training.objective import Objective, displacement_of


@dataclass(frozen=True)
class Validation:
    """Mean loss over the validation pairs, and mean Dice over those with labels (NaN without)."""

    loss: float
    dice: float

    @property
    def score(self) -> tuple[float, float]:
        """What the best weights maximise: the Dice; between equals, and without labels, the negative loss.

        Equals are common: a field that moves nothing by half a voxel leaves the Dice of nearest neighbours as it was.
        """
        dice, gain = (-math.inf if math.isnan(value) else value for value in (self.dice, -self.loss))
        return dice, gain


@torch.no_grad()
def validate(
    network: nn.Module, bank: ImageBank, pairs: Sequence[tuple[int, int]], objective: Objective, precision: str
) -> Validation:
    """Register every pair (moving, fixed) of the bank and average; the network's mode is put back.

    Labels are warped with nearest neighbours. A structure that one of the two label maps lacks does not count in
    that pair.
    """
    was_training = network.training
    network.eval()
    losses, scores = [], []
    for moving_position, fixed_position in pairs:
        moving, fixed = bank.images_of([moving_position]), bank.images_of([fixed_position])
        displacement = displacement_of(network, moving, fixed, precision)
        losses.append(float(objective(fixed, warp(moving, displacement), displacement)[0]))
        moving_labels, fixed_labels = bank.labels_of(moving_position), bank.labels_of(fixed_position)
        if moving_labels is not None and fixed_labels is not None:
            scores.append(mean_dice(warp_labels(moving_labels, displacement), fixed_labels, len(bank.structures)))
    network.train(was_training)
    scores = [score for score in scores if not math.isnan(score)]
    return Validation(sum(losses) / len(losses), sum(scores) / len(scores) if scores else math.nan)


def mean_dice(first: torch.Tensor, second: torch.Tensor, structures: int) -> float:
    """Return the mean over structures of 2 |A and B| / (|A| + |B|) (Dice 1945); NaN when no structure is in both maps.

    Parameters
    ----------
    first, second
        Label maps of one shape with the values 0 (background) ... ``structures``.
    """
    first, second = first.flatten().long(), second.flatten().long()
    count = structures + 1
    sizes = torch.bincount(first, minlength=count), torch.bincount(second, minlength=count)
    common = torch.bincount(first[first == second], minlength=count)
    present = (sizes[0] > 0) & (sizes[1] > 0)
    present[0] = False
    if not present.any():
        return math.nan
    return float((2.0 * common.double() / (sizes[0] + sizes[1]).double())[present].mean())
