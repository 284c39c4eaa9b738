"""The scans of a training, in memory once, and the order in which their pairs are seen.

Training on brain volumes is bound by the network, not by the data, if the data stays where the network is: a few
hundred scans of 160x192x224 voxels are some ten gigabytes. So every image is read once, and kept on the GPU when it
fits beside the training, in page-locked memory when it does not.
"""

from __future__ import annotations

import logging
import time
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from itertools import permutations
from pathlib import Path

import numpy as np
import torch
from torch.utils.data import Dataset

from dmir.errors import InputError
from dmir.volumes import Grid, read_image, read_labels, require_same_grid

log = logging.getLogger(__name__)

SHARE_OF_GPU = 0.4  # of its free memory; the rest is for the network's activations


@dataclass(frozen=True)
class Scan:
    """A preprocessed scan: its name, its image file, and its label map where there is one."""

    name: str
    image: Path
    labels: Path | None = None


@dataclass
class ImageBank:
    """Images and label maps of one grid, in memory.

    Attributes
    ----------
    names
        The scans, in the order of ``images``.
    images
        float32 (N, 1, D, H, W), on the training device or in host memory.
    labels
        Label maps (1, 1, D, H, W) by position of their scan; structure ``structures[i]`` has the value i + 1.
    structures
        The ids of the structures that count in the Dice.
    """

    names: list[str]
    images: torch.Tensor
    grid: Grid
    device: torch.device
    labels: dict[int, torch.Tensor] = field(default_factory=dict)
    structures: list[int] = field(default_factory=list)

    def images_of(self, positions: Sequence[int]) -> torch.Tensor:
        """Return the images at these positions, (B, 1, D, H, W) on the device."""
        if len(positions) == 1:  # a view: nothing is copied when the bank is on the device
            chosen = self.images[positions[0] : positions[0] + 1]
        else:
            chosen = torch.stack([self.images[position] for position in positions])
        return chosen.to(self.device, non_blocking=True)

    def labels_of(self, position: int) -> torch.Tensor | None:
        """Return the label map (1, 1, D, H, W) at this position on the device, None for a scan without."""
        labels = self.labels.get(position)
        return None if labels is None else labels.to(self.device, non_blocking=True)


def load_bank(
    train: Sequence[Scan],
    validation: Sequence[Scan],
    atlases: Sequence[Scan],
    *,
    device: torch.device,
    structures: Sequence[int] | None = None,
    threads: int = 1,
) -> ImageBank:
    """Read all scans of a training: those to train on, then those to validate on, then the atlases.

    Label maps are read of the validation scans and the atlases alone: training does not see labels.

    Parameters
    ----------
    structures
        Ids that count in the Dice; by default all that the atlases (without one, the validation scans) have.
    threads
        Files read at the same time.

    Raises
    ------
    InputError
        A file cannot be read, or lies on another grid than the first one; the file is named.
    """
    start = time.monotonic()
    scans = [*train, *validation, *atlases]
    if not scans:
        raise InputError("scans to train on", found="none", expected="at least 1")
    first = read_image(scans[0].image)
    bank = ImageBank([scan.name for scan in scans], _room_for(len(scans), first.shape, device), first.grid, device)

    def read(position: int) -> None:
        image = read_image(scans[position].image)
        require_same_grid(first, image, scans[0].image, scans[position].image)
        bank.images[position, 0] = torch.from_numpy(np.ascontiguousarray(image.data, dtype=np.float32))

    with ThreadPoolExecutor(max_workers=max(1, threads)) as pool:
        list(pool.map(read, range(len(scans))))
    scored = range(len(train), len(scans))
    _read_label_maps(bank, [(k, scans[k].labels) for k in scored], len(atlases), structures)
    log.info(
        "%d scans of %s voxels read in %.1f s, kept in %s memory (%.2f GB)",
        len(scans),
        "x".join(map(str, first.shape)),
        time.monotonic() - start,
        "the GPU's" if bank.images.is_cuda else "host",
        bank.images.nbytes / 1e9,
    )
    return bank


def _room_for(count: int, shape: tuple[int, int, int], device: torch.device) -> torch.Tensor:
    size = (count, 1, *shape)
    if device.type == "cuda":
        free, _ = torch.cuda.mem_get_info(device)
        if 4 * int(np.prod(size)) <= SHARE_OF_GPU * free:
            return torch.empty(size, device=device)
        return torch.empty(size, pin_memory=True)
    return torch.empty(size, device=device)


def _read_label_maps(
    bank: ImageBank, files: list[tuple[int, Path | None]], atlases: int, structures: Sequence[int] | None
) -> None:
    """Read label maps (position, file), the atlases' last; without two to compare there is nothing to score."""
    given = [(position, path) for position, path in files if path is not None]
    if len(given) < 2:
        return
    volumes = {position: read_labels(path) for position, path in given}
    for position, path in given:
        require_same_grid(bank.grid, volumes[position], "the images", path)
    telling = [position for position, _ in given[-atlases:]] if atlases else list(volumes)
    values = np.unique(np.concatenate([np.unique(volumes[position].data) for position in telling]))
    ids = values[(values != 0) & (structures is None or np.isin(values, list(structures)))]
    if not ids.size:
        found = "none of the structures asked for"
        raise InputError(given[-1][1], found=found, expected=f"some of {sorted(structures or [])}")
    bank.structures = [int(value) for value in ids]
    for position, volume in volumes.items():
        index = np.searchsorted(ids, volume.data).clip(max=ids.size - 1)
        known = np.where(ids[index] == volume.data, index + 1, 0)
        labels = torch.from_numpy(known.astype(np.uint8 if ids.size < 256 else np.int32))[None, None]
        bank.labels[position] = labels.to(bank.images.device)


def training_pairs(scans: Sequence[int], atlases: Sequence[int], kind: str) -> torch.Tensor:
    """Return the pairs (moving, fixed) to train on, as positions in the bank, int64 (P, 2).

    Parameters
    ----------
    scans, atlases
        Positions of the training scans and of the atlases.
    kind
        ``"scan_to_atlas"``: each scan to each atlas; ``"atlas_to_scan"``: the reverse; ``"all"``: all ordered pairs of
        two different scans.

    Raises
    ------
    InputError
        No pair can be made.
    """
    if kind == "all":
        pairs = list(permutations(scans, 2))
    else:
        pairs = [_directed(scan, atlas, kind) for atlas in atlases for scan in scans]
    if not pairs:
        found = f"{len(scans)} scans and {len(atlases)} atlases"
        expected = "two scans" if kind == "all" else "a scan and an atlas"
        raise InputError("scans to train on", found=found, expected=f"at least {expected}, because pairs is {kind}")
    return torch.tensor(pairs)


def validation_pairs(scans: Sequence[int], atlases: Sequence[int], kind: str) -> list[tuple[int, int]]:
    """Return the pairs (moving, fixed) to validate on, of the same kind; maybe none.

    Of ``"all"`` each scan is taken once to the next one, the last to the first: all ordered pairs would cost more than
    the training between two validations.
    """
    if kind == "all":
        return [
            (scan, following)
            for scan, following in zip(scans, [*scans[1:], *scans[:1]], strict=True)
            if scan != following
        ]
    return [_directed(scan, atlas, kind) for atlas in atlases for scan in scans]


def _directed(scan: int, atlas: int, kind: str) -> tuple[int, int]:
    return (scan, atlas) if kind == "scan_to_atlas" else (atlas, scan)


class PairSchedule(Dataset):
    """Which pairs each training step sees: a function of the seed and the step alone.

    The pairs are gone through again and again, each pass in an order of its own. As nothing is drawn along the way,
    a training taken up at any step sees what an unbroken one would have seen, and validating more often changes
    nothing.

    Parameters
    ----------
    pairs
        int64 (P, 2) of (moving, fixed).
    steps, batch_size
        Item ``step`` is an int64 tensor (batch_size, 2).
    """

    def __init__(self, pairs: torch.Tensor, steps: int, batch_size: int, seed: int) -> None:
        self.pairs = pairs
        self.steps = steps
        self.batch_size = batch_size
        self.seed = seed
        self._order: tuple[int, torch.Tensor] = (-1, torch.empty(0))

    def __len__(self) -> int:
        return self.steps

    def __getitem__(self, step: int) -> torch.Tensor:
        return torch.stack([self._at(step * self.batch_size + i) for i in range(self.batch_size)])

    def _at(self, position: int) -> torch.Tensor:
        which_pass, offset = divmod(position, len(self.pairs))
        if self._order[0] != which_pass:
            generator = torch.Generator().manual_seed(derived_seed(self.seed, which_pass))
            self._order = (which_pass, torch.randperm(len(self.pairs), generator=generator))
        return self.pairs[self._order[1][offset]]


def derived_seed(seed: int, *numbers: int) -> int:
    """Return a seed for one purpose out of many, well mixed: neighbouring numbers give unrelated seeds."""
    return int(np.random.SeedSequence([seed, *numbers]).generate_state(1, np.uint64)[0] >> 1)
