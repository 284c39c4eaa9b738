r"""How a descent finds the field of a pair (:mod:`dmir.methods.descent`): on tensors, a stage after the other.

The field u of a pair is sought by steepest ascent of a similarity, in small steps that are *composed*
(Christensen et al. 1996; Avants et al. 2008; Yushkevich et al. 2016, greedy; Jena et al. 2024, FireANTs): with
:math:`\phi(x) = x + u(x)`, the warped image :math:`w = m \circ \phi` and the similarity's derivative g by w,

.. math:: v = s \, \frac{G_\sigma * F}{\max |G_\sigma * F|}, \quad F = |g \nabla w|^{p-1} g \nabla w, \qquad
    \phi \leftarrow G_\tau * \left( \phi \circ (\mathrm{id} + v) \right)

A step v is smooth and at most a voxel long, so that id + v does not fold, and neither does what is composed of such
steps. :class:`~dmir.methods.stages.Stage` has its numbers; docs/descent.md says how they were found.
"""

from __future__ import annotations

import logging
import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F

from dmir.errors import InputError
from dmir.fields import compose_step, folded_voxels, onto_moving_grid, warp
from dmir.filters import (
    gaussian,
    gaussian_weights,
    in_slabs,
    numbers,
    sampled,
    smooth_across_planes,
    smooth_in_planes,
)
from dmir.methods.stages import STAGES, Factors, Stage, Watch, levels
from dmir.similarity import Similarity, similarity_of
from dmir.training.devices import choose_device, gpu_failures_told
from dmir.volumes import Volume, same_grid

POSITIVE = 1e-3  # what a determinant is at least, so that rounding in a file makes none of them zero
WIDTHS = (0.3, 0.4, 0.5, 0.7, 1.0, 1.5, 2.0, 3.0, 4.0)  # voxels: by how much a field that folds is smoothed
HALVINGS = 2  # of a step that made the images less alike, before a stage ends

log = logging.getLogger(__name__)


@dataclass(frozen=True)
class Descended:
    """What a descent gives.

    Attributes
    ----------
    displacement
        float32 (3, D, H, W), voxels of the images.
    similarity
        Per voxel (voxel of the stage, mm; before; after) of each stage.
    steps
        That each stage took.
    """

    displacement: torch.Tensor
    similarity: tuple[tuple[float, float, float], ...]
    steps: tuple[int, ...]


@gpu_failures_told(lambda: "The same command, given again, registers this pair anew.")
def register_volumes(
    moving: Volume,
    fixed: Volume,
    device: str | torch.device | None = None,
    *,
    start: np.ndarray | None = None,
    seen: tuple[np.ndarray | None, np.ndarray | None] = (None, None),
    **options: Any,
) -> np.ndarray:
    """Return the field that takes the moving image to the fixed one: :func:`dmir.methods.descent.register`.

    Other parameters are those of :func:`find_field`.
    """
    for image, name in ((moving, "the moving image"), (fixed, "the fixed image")):
        _require_content(image, name)
    target = choose_device(device)
    there, moving_seen = _on_fixed_grid(moving, seen[0], fixed)
    if np.min(there) == np.max(there):
        raise InputError(
            "the moving image",
            found="nothing of it within the fixed image's grid",
            expected="two images that overlap",
            remedy="Align them affinely first.",
        )

    def on_device(data: np.ndarray) -> torch.Tensor:
        return torch.from_numpy(np.ascontiguousarray(data, np.float32)).to(target)

    maps = (None if map_ is None else on_device(map_)[None] for map_ in (moving_seen, seen[1]))
    found = find_field(
        on_device(_in_range(there))[None],
        on_device(_in_range(fixed.data))[None],
        fixed.spacing.tolist(),
        start=None if start is None else on_device(start),
        seen=(next(maps), next(maps)),
        **options,
    )
    return found.displacement.cpu().numpy()


def find_field(
    moving: torch.Tensor,
    fixed: torch.Tensor,
    spacing: Sequence[float],
    *,
    stages: Sequence[Stage | Mapping[str, Any]] = STAGES,
    margin: float = 4.0,
    start: torch.Tensor | None = None,
    seen: tuple[torch.Tensor | None, torch.Tensor | None] = (None, None),
    **options: Any,
) -> Descended:
    """Descend (:func:`descend`) within the box of both brains, from a start and to an end that do not fold.

    Other parameters and the result are those of :func:`descend`.

    Parameters
    ----------
    margin
        Round both brains, mm; beyond, the field goes on as it is at that border.
    """
    box = (slice(None), *_box([moving, fixed], spacing, margin))
    found = descend(
        moving[box].contiguous(),
        fixed[box].contiguous(),
        spacing,
        stages=stages,
        start=None if start is None else unfolded(start[box].contiguous()),
        seen=(None if seen[0] is None else seen[0][box], None if seen[1] is None else seen[1][box]),
        **options,
    )
    for (voxel, before, after), steps in zip(found.similarity, found.steps, strict=True):
        log.info("%g mm: %d steps, similarity %.4f -> %.4f", voxel, steps, before, after)
    within = unfolded(found.displacement, "the descent")
    margins = [(part.start, n - part.stop) for part, n in zip(box[1:], fixed.shape[1:], strict=True)]
    padding = [n for pair in reversed(margins) for n in pair]
    return replace(found, displacement=F.pad(within[None], padding, mode="replicate")[0])


def unfolded(displacement: torch.Tensor, source: str = "the start") -> torch.Tensor:
    """Smooth a field (3, D, H, W) just as much as it takes for its determinants to be positive; mostly not at all."""
    folds = left = folded_voxels(displacement, POSITIVE)
    result = displacement
    for sigma in WIDTHS:
        if not left:
            break
        result = gaussian(displacement, sigma)
        left = folded_voxels(result, POSITIVE)
        log.info("%s folds at %d places; smoothed by %g voxels, at %d", source, folds, sigma, left)
    return result


def _require_content(image: Volume, name: str) -> None:
    """Raise InputError for an image that there is nothing to be registered by."""
    low, high = float(np.min(image.data)), float(np.max(image.data))
    if not (math.isfinite(low) and math.isfinite(high)):
        raise InputError(name, found="values that are NaN or infinite", expected="finite grey values")
    if low == high:
        raise InputError(
            name,
            found=f"the value {low:g} everywhere",
            expected="an image with contrast",
            remedy="Is it the right file, and does its mask lie on the brain?",
        )


def _on_fixed_grid(moving: Volume, seen: np.ndarray | None, fixed: Volume) -> tuple[np.ndarray, np.ndarray | None]:
    """Resample the moving image onto the fixed grid, linearly, and what was scanned of it; None: all of that grid."""
    if same_grid(moving, fixed):
        return moving.data, seen
    none = np.zeros((3, *fixed.shape), dtype=np.float32)
    sampling = torch.from_numpy(onto_moving_grid(none, fixed.affine, moving.affine))[None]

    def there(data: np.ndarray) -> np.ndarray:
        return warp(torch.from_numpy(np.ascontiguousarray(data, np.float32))[None, None], sampling)[0, 0].numpy()

    darkest = float(np.min(moving.data))  # what lies outside is background, not black
    scanned = there(np.ones(moving.shape) if seen is None else seen) > 0.999
    return there(moving.data - darkest) + darkest, None if scanned.all() else scanned


def _in_range(data: np.ndarray) -> np.ndarray:
    """Bring grey values to [0, 1] where they are not."""
    low, high = float(np.min(data)), float(np.max(data))
    if low >= 0 and 0.5 <= high <= 1:
        return data.astype(np.float32)
    return ((data - low) / (high - low)).astype(np.float32)


def _box(images: Sequence[torch.Tensor], spacing: Sequence[float], margin: float) -> tuple[slice, slice, slice]:
    """Return the box round what is brighter than the darkest value in either image, and a margin (mm) round it."""
    inside = torch.stack([image[0] > image.amin() for image in images]).any(0)
    box = []
    for axis, size in enumerate(spacing):
        first, second = (other for other in range(3) if other != axis)
        places = inside.any(dim=second).any(dim=first).nonzero()[:, 0]
        more = math.ceil(margin / size)
        box.append(slice(max(0, int(places[0]) - more), min(inside.shape[axis], int(places[-1]) + 1 + more)))
    return box[0], box[1], box[2]


def descend(
    moving: torch.Tensor,
    fixed: torch.Tensor,
    spacing: Sequence[float] = (1.0, 1.0, 1.0),
    *,
    stages: Sequence[Stage | Mapping[str, Any]] = STAGES,
    similarity: str = "lncc",
    noise: float = 0.005,
    tolerance: float = 5e-4,
    check_every: int = 5,
    pyramid_smoothing: float = 0.3,
    start: torch.Tensor | None = None,
    seen: tuple[torch.Tensor | None, torch.Tensor | None] = (None, None),
    watch: Watch | None = None,
) -> Descended:
    """Find the field that makes two images alike, from a field that is given or from none.

    Parameters
    ----------
    moving, fixed
        float32 (1, D, H, W) on one grid and one device, in [0, 1].
    spacing
        Of their voxels, mm.
    stages
        In their order.
    similarity
        Of :data:`dmir.losses.SIMILARITIES`.
    noise
        Standard deviation of grey values below which a window of the local correlation is flat and says nothing.
    tolerance
        A stage ends when the similarity has grown by less than this share of itself in ``check_every`` steps.
    check_every
        Steps between two looks at the similarity. Where it has fallen, the field goes back to the one before and the
        steps are halved. On a GPU the loop waits for the card at no other time.
    pyramid_smoothing
        Standard deviation of the Gaussian that an image is sampled through for coarser voxels, in those.
    start
        float32 (3, D, H, W), voxels.
    seen
        Of the moving and of the fixed image, (1, D, H, W): 1 where it was scanned. What one scan never saw does not
        pull. None: everywhere.

    Returns
    -------
    Descended
        The same bits every time on a CPU, with any number of threads.
    """
    with torch.inference_mode():
        shape = tuple(fixed.shape[1:])
        field: torch.Tensor | None = start
        factors: Factors = (1.0, 1.0, 1.0)
        told, taken, volumes = [], [], (moving, fixed, *seen)
        coarse: tuple[torch.Tensor | None, ...] = volumes
        made = factors
        for number, (stage, wanted) in enumerate(levels(stages, shape, spacing)):
            if wanted != made:
                coarse, made = tuple(_coarse(volume, wanted, pyramid_smoothing) for volume in volumes), wanted
            level = _Level(coarse, similarity, stage.window, noise)
            field, factors = _between(field, shape, factors, wanted, fixed), wanted
            field, values, steps = _run(level, field, stage, tolerance, check_every, _watch_of(watch, number, stage))
            told.append((stage.voxel, *values))
            taken.append(steps)
        field = _between(field, shape, factors, (1.0, 1.0, 1.0), fixed)
    return Descended(field, tuple(told), tuple(taken))


def _watch_of(watch: Watch | None, number: int, stage: Stage) -> Callable[[int, float], None]:
    def told(step: int, value: float) -> None:
        if watch is not None:
            watch(number, step, stage.steps, value)

    return told


def _places(length: int, factor: float, device: torch.device) -> torch.Tensor:
    """Return where the voxels of a coarser axis lie on the axis of the images: in its middle, ``factor`` apart."""
    count = math.ceil(length / factor)
    first = (length - 1 - factor * (count - 1)) / 2
    return torch.arange(count, device=device, dtype=torch.float32) * factor + first


def _between(
    field: torch.Tensor | None,
    shape: Sequence[int],
    before: Sequence[float],
    wanted: Sequence[float],
    like: torch.Tensor,
) -> torch.Tensor:
    """Bring a field from the voxels of one level to those of another; none is no displacement."""
    there = [_places(length, factor, like.device) for length, factor in zip(shape, wanted, strict=True)]
    if field is None:
        return like.new_zeros(3, *(len(places) for places in there))
    if tuple(before) == tuple(wanted):
        return field.clone()
    here = [_places(length, factor, like.device) for length, factor in zip(shape, before, strict=True)]
    places = [(to - own[0]) / factor for to, own, factor in zip(there, here, before, strict=True)]
    ratio = [old / new for old, new in zip(before, wanted, strict=True)]
    blur = [0.5 / r if r < 1 else 0.0 for r in ratio]
    coarser = sampled(field, places, blur) if max(blur) > 0 else sampled(field, places)
    return coarser.mul_(numbers(ratio, coarser).view(3, 1, 1, 1))


def _coarse(volume: torch.Tensor | None, factors: Factors, smoothing: float) -> torch.Tensor | None:
    """Return a volume (1, D, H, W) on voxels that are so many times larger."""
    if volume is None:
        return None
    places = [_places(n, factor, volume.device) for n, factor in zip(volume.shape[1:], factors, strict=True)]
    return sampled(volume, places, [smoothing * factor if factor > 1 else 0.0 for factor in factors])


class _Level:
    """The moving and the fixed image and what was seen of either on the voxels of a stage, and what compares them."""

    def __init__(self, volumes: Sequence[torch.Tensor | None], similarity: str, window: int, noise: float) -> None:
        moving, fixed, self.moving_seen, fixed_seen = volumes
        assert moving is not None and fixed is not None
        self.moving = moving
        self.similarity: Similarity = similarity_of(similarity, fixed, window, noise, fixed_seen)

    def look(self, field: torch.Tensor) -> torch.Tensor:
        """Warp the moving image and return it, (1, D, H, W); the similarity knows it then."""
        warped = warp(self.moving[None], field[None])[0]
        seen = None if self.moving_seen is None else warp(self.moving_seen[None], field[None], padding="border")[0]
        self.similarity.prepare(warped, seen)
        return warped


def _run(
    level: _Level,
    field: torch.Tensor,
    stage: Stage,
    tolerance: float,
    check_every: int,
    told: Callable[[int, float], None],
) -> tuple[torch.Tensor, tuple[float, float], int]:
    """Return the field after a stage, the similarity per voxel before and after it, and the steps that it took."""
    stepper = _Stepper(level, field, stage)
    best, first, highest = field.clone(), math.nan, -math.inf
    step, halvings, back = 0, 0, False
    while True:
        last = step == stage.steps
        value = stepper.look() if last else stepper.find()
        looks = last or step % check_every == 0
        reached = float(value) / level.moving.numel() if looks else math.nan
        told(step, reached)
        if looks and not back:
            first = reached if step == 0 else first
            grown, highest = reached - highest, max(highest, reached)
            if grown < 0:  # too long a step for what is left: back to where it was better
                field.copy_(best)
                halvings, back = halvings + 1, True
                if last or halvings > HALVINGS:
                    break
                stepper.shorten()
                continue
            best.copy_(field)
            if grown < tolerance * abs(reached):
                break
        if last:
            break
        back = False
        stepper.advance()
        step += 1
    return field, (first, highest), step


class _Stepper:
    """Moves a field (3, D, H, W) step by step, in place; it has all memory that a step needs."""

    def __init__(self, level: _Level, field: torch.Tensor, stage: Stage) -> None:
        self.level, self.field, self.stage = level, field, stage
        self.length = stage.step
        self.update, self.half_done = torch.empty_like(field), torch.empty_like(field)
        self.velocity = torch.zeros_like(field) if stage.momentum > 0 else None
        self.update_weights = gaussian_weights(stage.update_smoothing)
        self.field_weights = gaussian_weights(stage.field_smoothing)

    def shorten(self) -> None:
        """Take steps of half the length from here on, and none of what was learnt of the direction."""
        self.length /= 2
        if self.velocity is not None:
            self.velocity.zero_()

    def look(self) -> torch.Tensor:
        """Return the similarity's sum over the voxels, a scalar on the device."""
        self.level.look(self.field)
        return torch.cat(in_slabs(lambda *part: self.level.similarity.slab(*part)[0], self.field)).double().sum()

    def find(self) -> torch.Tensor:
        """Find the next step, and return the similarity where it starts from."""
        warped = self.level.look(self.field)
        values = in_slabs(lambda start, end: self._forces(warped, start, end), self.field)
        self.longest = torch.stack(in_slabs(self._directions, self.field)).amax().sqrt()
        return torch.cat(values).double().sum()

    def advance(self) -> None:
        """Take the step: compose the field with it, and smooth the field."""
        self.update.mul_(self.length / self.longest.clamp(min=torch.finfo(torch.float32).tiny))
        in_slabs(self._compose, self.field)
        in_slabs(self._smooth, self.field)

    def _forces(self, warped: torch.Tensor, start: int, end: int) -> torch.Tensor:
        """Leave the forces, smoothed within their planes, and return the similarity of each plane."""
        values, force = self.level.similarity.force(warped, start, end, self.stage.compression)
        self.half_done[:, start:end] = smooth_in_planes(force, self.update_weights)
        return values

    def _directions(self, start: int, end: int) -> torch.Tensor:
        """Leave the step but for its length, and return the square of the longest displacement in it."""
        part = self.update[:, start:end]
        part.copy_(smooth_across_planes(self.half_done, self.update_weights, start, end))
        if self.velocity is not None:
            part.add_(self.velocity[:, start:end], alpha=self.stage.momentum)
            self.velocity[:, start:end] = part
        return part.square().sum(0).amax()

    def _compose(self, start: int, end: int) -> None:
        moved = compose_step(self.field, self.update, start, end)
        self.half_done[:, start:end] = smooth_in_planes(moved, self.field_weights)

    def _smooth(self, start: int, end: int) -> None:
        self.field[:, start:end] = smooth_across_planes(self.half_done, self.field_weights, start, end)
