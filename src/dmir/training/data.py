"""The scans of a training, where the network can have them, and the order in which their pairs are seen.

Training on brain volumes is bound by the network, not by the data, if the data stays where the network is: a few
hundred scans of 160x192x224 voxels in half precision are some gigabytes. So the images are kept on the GPU when they
fit beside the training, narrow as they are packed, and become float32 there. When they do not fit they are fetched
from the pack's file while the batch before is computed. On the CPU they stay in the pack's file, of which all
trainings of a machine share one copy in memory: the kernel's page cache.
"""

from __future__ import annotations

import contextlib
import logging
import time
from collections.abc import Iterable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from itertools import permutations

import numpy as np
import torch
from torch.utils.data import Dataset

from dmir.errors import InputError
from dmir.training.pack import Pack, Scan, quantise, require_precision
from dmir.training.streaming import AHEAD, Prefetcher
from dmir.volumes import Grid, read_image, read_labels, require_same_grid

log = logging.getLogger(__name__)

SHARE_OF_GPU = 0.4  # of its free memory; the rest is for the network's activations
TYPES = {"float16": torch.float16, "uint8": torch.uint8, "float32": torch.float32}


@dataclass(eq=False)
class ImageBank:
    """Images and label maps of one grid, in memory or in the file of a pack.

    Attributes
    ----------
    names
        The scans; a position in this list names a scan everywhere in training.
    device
        Where the training wants the images.
    precision
        How images are kept until they are on the device: ``"float16"``, ``"uint8"`` or ``"float32"``.
    held
        The images (N, D, H, W) of that type, on the device or in host memory; None where they stay in the pack.
    pack, rows
        The pack, and the row of each scan in it.
    labels
        Label maps (1, 1, D, H, W) by position of their scan; structure ``structures[i]`` has the value i + 1.
    structures
        The ids of the structures that count in the Dice.
    waited_seconds
        How long the training has been waiting for images.
    """

    names: list[str]
    grid: Grid
    device: torch.device
    precision: str
    held: torch.Tensor | None = None
    pack: Pack | None = None
    rows: list[int] = field(default_factory=list)
    labels: dict[int, torch.Tensor] = field(default_factory=dict)
    structures: list[int] = field(default_factory=list)
    waited_seconds: float = 0.0
    _coming: Prefetcher | None = field(default=None, init=False, repr=False)

    @property
    def nbytes(self) -> int:
        """Bytes of all images as they are kept."""
        return len(self.names) * int(np.prod(self.grid.shape)) * TYPES[self.precision].itemsize

    @property
    def is_resident(self) -> bool:
        """Whether the images are in the memory of the device."""
        return self.held is not None and self.held.device.type == self.device.type

    def images_of(self, positions: Sequence[int]) -> torch.Tensor:
        """Return the images at these positions, float32 (B, 1, D, H, W) on the device."""
        start = time.monotonic()
        kept = self._fetch(positions)
        self.waited_seconds += time.monotonic() - start
        return as_float32(kept)[:, None]

    def pairs_of(self, pairs: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """Return the moving and the fixed images of the pairs (B, 2), float32 (B, 1, D, H, W) each on the device.

        Where :meth:`prefetch` announced these pairs they are ready; else they are fetched now.
        """
        positions = _moving_then_fixed(pairs)
        if self._coming is None:
            return self.images_of(positions[: len(pairs)]), self.images_of(positions[len(pairs) :])
        start = time.monotonic()
        kept = self._coming.take(positions)
        self.waited_seconds += time.monotonic() - start
        moving, fixed = as_float32(kept)[:, None].split(len(pairs))
        return moving, fixed

    @contextlib.contextmanager
    def prefetch(self, batches: Iterable[torch.Tensor], ahead: int = AHEAD) -> Iterator[None]:
        """Fetch, as long as the context is open, the pairs (B, 2) of coming steps while earlier ones are computed.

        ``pairs_of`` must then be asked for these batches in this order; ``images_of`` is free to be asked for anything
        in between. Where the images are in the device's memory there is nothing to fetch.
        """
        if self.is_resident:
            yield
            return
        with Prefetcher(self._fetch, map(_moving_then_fixed, batches), self.device, ahead) as self._coming:
            try:
                yield
            finally:
                self._coming = None

    def labels_of(self, position: int) -> torch.Tensor | None:
        """Return the label map (1, 1, D, H, W) at this position on the device, None for a scan without."""
        labels = self.labels.get(position)
        return None if labels is None else labels.to(self.device, non_blocking=True)

    def describe(self) -> str:
        """Return in a line what the bank holds, and where."""
        if self.pack is not None and self.held is None:
            place = f"streamed from {self.pack.file}"
        elif self.is_resident:
            place = "in the GPU's memory" if self.device.type == "cuda" else "in memory"
        else:
            place = "streamed from page-locked memory"
        size = "x".join(map(str, self.grid.shape))
        return f"{len(self.names)} scans of {size} voxels as {self.precision}, {self.nbytes / 1e9:.2f} GB, {place}"

    def _fetch(self, positions: Sequence[int]) -> torch.Tensor:
        """Return the images (B, D, H, W) as they are kept, on the device; any thread may ask."""
        if self.held is None:
            return self._read(positions).to(self.device, non_blocking=True)
        if len(positions) == 1 and self.is_resident:  # a view: nothing is copied
            return self.held[positions[0] : positions[0] + 1]
        chosen = torch.empty((len(positions), *self.grid.shape), dtype=self.held.dtype, device=self.device)
        for target, position in zip(chosen, positions, strict=True):
            target.copy_(self.held[position], non_blocking=True)
        return chosen

    def _read(self, positions: Sequence[int]) -> torch.Tensor:
        """Read images from the pack, into page-locked memory for a GPU, which torch keeps and uses again."""
        assert self.pack is not None
        size = (len(positions), *self.grid.shape)
        chosen = torch.empty(size, dtype=TYPES[self.precision], pin_memory=self.device.type == "cuda")
        self.pack.read_images([self.rows[position] for position in positions], chosen.numpy())
        return chosen


def as_float32(kept: torch.Tensor) -> torch.Tensor:
    """Return images as they are kept as float32 in [0, 1]; of uint8, 255 stands for 1."""
    return kept.float().div_(255) if kept.dtype == torch.uint8 else kept.float()


def _moving_then_fixed(pairs: torch.Tensor) -> list[int]:
    return [*pairs[:, 0].tolist(), *pairs[:, 1].tolist()]


def load_bank(
    train: Sequence[Scan],
    validation: Sequence[Scan],
    atlases: Sequence[Scan],
    *,
    device: torch.device,
    structures: Sequence[int] | None = None,
    threads: int = 1,
    pack: Pack | None = None,
    precision: str = "float16",
) -> ImageBank:
    """Make all scans of a training ready: those to train on, then those to validate on, then the atlases.

    Label maps are those of the validation scans and the atlases alone: training does not see labels. Whether the scans
    come from a pack or are read one by one, a training sees the same numbers, bit for bit.

    Parameters
    ----------
    structures
        Ids that count in the Dice; by default all that the atlases (without one, the validation scans) have.
    threads
        Files read at the same time.
    pack
        Where the scans are packed, more of them perhaps and in another order; None reads their files.
    precision
        How images that are read are kept, see :func:`~dmir.training.pack.quantise`; a pack has its own.

    Raises
    ------
    InputError
        A file cannot be read, or lies on another grid than the first one, or is not what was packed; the file is
        named.
    """
    start = time.monotonic()
    scans = [*(Scan(scan.name, scan.image) for scan in train), *validation, *atlases]
    if not scans:
        raise InputError("scans to train on", found="none", expected="at least 1")
    bank = _read_scans(scans, device, threads, precision) if pack is None else _open_scans(scans, device, pack)
    labelled = {position: scan for position, scan in enumerate(scans) if scan.labels is not None}
    _take_labels(bank, labelled, len(atlases), structures)
    log.info("%s; ready in %.1f s", bank.describe(), time.monotonic() - start)
    return bank


def _read_scans(scans: Sequence[Scan], device: torch.device, threads: int, precision: str) -> ImageBank:
    """Read the images of scans into the device's memory or, where that is too small, into the host's."""
    require_precision(precision)
    first = read_image(scans[0].image)
    bank = ImageBank([scan.name for scan in scans], first.grid, device, precision)
    bank.held = held = _room_for(bank)

    def read(position: int) -> None:
        path = scans[position].image
        image = read_image(path)
        require_same_grid(first, image, scans[0].image, path)
        held[position] = torch.from_numpy(quantise(image.data, precision, path))

    with ThreadPoolExecutor(max_workers=max(1, threads)) as pool:
        list(pool.map(read, range(len(scans))))
    return bank


def _open_scans(scans: Sequence[Scan], device: torch.device, pack: Pack) -> ImageBank:
    """Take the images of scans from a pack: into a GPU's memory where they fit, else as they are needed."""
    names = [scan.name for scan in scans]
    bank = ImageBank(names, pack.grid, device, pack.precision, pack=pack, rows=pack.rows_of(names))
    pack.require_fresh(scans)
    if device.type == "cuda" and _fits(bank):
        held = torch.empty((len(names), *pack.grid.shape), dtype=TYPES[pack.precision], device=device)
        for position in range(len(names)):
            held[position].copy_(bank._read([position])[0], non_blocking=True)
        bank.held = held
    return bank


def _room_for(bank: ImageBank) -> torch.Tensor:
    size, kind = (len(bank.names), *bank.grid.shape), TYPES[bank.precision]
    if bank.device.type == "cuda" and not _fits(bank):
        return torch.empty(size, dtype=kind, pin_memory=True)
    return torch.empty(size, dtype=kind, device=bank.device)


def _fits(bank: ImageBank) -> bool:
    free, _ = torch.cuda.mem_get_info(bank.device)
    return bank.nbytes <= SHARE_OF_GPU * free


def _take_labels(bank: ImageBank, scans: dict[int, Scan], atlases: int, structures: Sequence[int] | None) -> None:
    """Take the label maps of scans by position, the atlases' last; without two there is nothing to compare."""
    if len(scans) < 2:
        return
    maps = {position: _label_map(bank, scan) for position, scan in scans.items()}
    telling = list(scans)[-atlases:] if atlases else list(scans)
    found = np.unique(np.concatenate([np.unique(maps[position]) for position in telling]))
    ids = found[(found != 0) & (structures is None or np.isin(found, list(structures)))]
    if not ids.size:
        where, expected = str(scans[telling[-1]].labels), f"some of {sorted(structures or [])}"
        raise InputError(where, found="none of the structures asked for", expected=expected)
    bank.structures = [int(value) for value in ids]
    for position, values in maps.items():
        index = np.searchsorted(ids, values).clip(max=ids.size - 1)
        known = np.where(ids[index] == values, index + 1, 0)
        labels = torch.from_numpy(known.astype(np.uint8 if ids.size < 256 else np.int32))[None, None]
        bank.labels[position] = labels.to(bank.device) if bank.is_resident else labels


def _label_map(bank: ImageBank, scan: Scan) -> np.ndarray:
    """Return the label map (D, H, W) of a scan that has one, from the pack or from its file."""
    if bank.pack is not None:
        return bank.pack.labels_of(scan.name)
    assert scan.labels is not None
    volume = read_labels(scan.labels)
    require_same_grid(bank.grid, volume, "the images", scan.labels)
    return volume.data


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
        order = self._order  # taken once: another thread, which is steps ahead, may put the next pass there
        if order[0] != which_pass:
            generator = torch.Generator().manual_seed(derived_seed(self.seed, which_pass))
            order = self._order = (which_pass, torch.randperm(len(self.pairs), generator=generator))
        return self.pairs[order[1][offset]]


def derived_seed(seed: int, *numbers: int) -> int:
    """Return a seed for one purpose out of many, well mixed: neighbouring numbers give unrelated seeds."""
    return int(np.random.SeedSequence([seed, *numbers]).generate_state(1, np.uint64)[0] >> 1)
