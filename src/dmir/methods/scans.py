"""Registration of two scans as they come: aligned affinely, then by a method, one field for both steps and one back."""

from __future__ import annotations

import contextlib
import importlib
import time
import warnings
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import torch

from dmir.doubts import Doubt
from dmir.errors import InputError
from dmir.fields import folded_voxels, inverse_residual, invert, onto_moving_grid, warp, warp_labels
from dmir.methods.calling import describe, register
from dmir.methods.geometry import geometry
from dmir.methods.network_grid import network_grid
from dmir.preprocess import assess, brain_mask, estimate_affine, normalise, resample
from dmir.preprocess.cuts import Cut, align_cut, cut_planes, find_cuts, seen_on
from dmir.preprocess.quality import BRAIN_VOLUME, CUT_OFF
from dmir.structures import StructureSet, load_structures, structure_set_names
from dmir.training.weights import read_metadata
from dmir.volumes import Grid, Volume, read_image, read_labels, read_mask, reorient, require_same_grid

MARGIN = 6.0  # mm round both brains in which a field is sought; beyond, it goes on as it is at that border
MOST_RESIDUAL = 0.5  # voxels from the start after there and back: more is no inverse
KNOWN = 0.8  # of a label map's ids that a structure set must have, to tell which sides they are on
NAMES = ("moving", "fixed")
LEAVES_OUT = ("descent", "refinement")  # methods that know what a scan never saw
Tell = Callable[[str], None]


@dataclass(frozen=True)
class RegisteredScans:
    """What registering two scans gives.

    Attributes
    ----------
    displacement
        float32 (3, D, H, W) in voxels of the fixed grid: from the fixed scan to the moving scan in its own space.
    inverse
        float32 (3, d, h, w) in voxels of the moving grid, on that grid: from the moving scan to the fixed scan in its
        own space, the affine with it.
    warped
        The moving scan on the fixed grid, interpolated once.
    warped_labels
        Its label map there, where one was given.
    affine
        4x4, fixed world -> moving world (RAS mm): the affine part.
    fixed_labels_on_moving
        The fixed scan's label map on the moving scan's own grid, through the inverse, where one was given.
    facts
        Numbers, ready for JSON: ``similarity`` (inside the fixed brain, after the affine and after the deformation:
        ``correlation`` and ``mutual_information`` in nats), ``folds`` (places), ``inverse_residual`` (voxels:
        ``mean`` and ``worst`` in the brains, ``worst_outside`` of them, and how many are ``voxels_above_half``),
        ``quality`` of either scan as :func:`dmir.preprocess.assess` says, ``cuts`` (where a brain is cut off) and
        ``seconds`` by step.
    remarks
        What a person should know of this pair, a line each; each was told as it arose (:mod:`dmir.doubts`).
    work
        What the method saw and found.
    """

    displacement: np.ndarray
    inverse: np.ndarray
    warped: Volume
    warped_labels: Volume | None
    affine: np.ndarray
    fixed_labels_on_moving: Volume | None
    facts: dict[str, Any]
    remarks: tuple[str, ...]
    work: Work


@dataclass(frozen=True)
class Work:
    """What a method saw and found, on the grid that it worked on, whose axes run to the right, the front and the top.

    Attributes
    ----------
    moving
        After the affine, in [0, 1] and above 0 in the brain.
    fixed
        Likewise.
    warped
        The moving image warped.
    deformation
        float32 (3, D, H, W) in voxels: beyond the affine.
    """

    moving: Volume
    fixed: Volume
    warped: Volume
    deformation: np.ndarray

    @property
    def grid(self) -> Grid:
        return self.fixed.grid


def register_scans(
    moving: Volume,
    fixed: Volume,
    *,
    method: str = "descent",
    moving_labels: Volume | None = None,
    fixed_labels: Volume | None = None,
    align: bool = True,
    label_interpolation: str = "nearest",
    tell: Tell | None = None,
    watch: Callable[[int, int, int, float], None] | None = None,
    **parameters: Any,
) -> RegisteredScans:
    """Register a moving scan to a fixed one; both skull-stripped (zero outside the brain), each on its own grid.

    A method works on the part of the fixed scan's own grid that holds both brains; a network on a grid with the voxels
    and at least the shape of its training (:func:`~dmir.methods.network_grid.network_grid`), from which its field is
    brought to the fixed scan's. The order and the direction of the axes in the files change nothing. Where a brain is
    cut off (:func:`find_cuts`), what its scan never saw pulls neither the affine nor a descent.

    Parameters
    ----------
    method
        ``"descent"``, ``"affine"``, ``"syn"``, ``"elastix"``, or the path of a ``.safetensors`` file.
    moving_labels
        On the moving scan's grid.
    fixed_labels
        On the fixed scan's grid: they are brought to the moving scan.
    align
        Align affinely first; without it the headers are trusted.
    label_interpolation
        ``"nearest"`` or ``"linear"``, see :func:`dmir.fields.warp_labels`.
    tell
        Told the name of each step as it begins.
    watch
        Told of a descent, see :data:`dmir.methods.descent.Watch`.
    parameters
        Of the method.

    Raises
    ------
    InputError
        Labels lie on another grid, a scan is not stripped or its grid is sheared, the method or its weights cannot be
        used, or the affine finds nothing.
    """
    describe(method, **parameters)  # a mistake is told before minutes of work
    trained = _trained_grid(method, parameters)
    for name, scan, labels in zip(NAMES, (moving, fixed), (moving_labels, fixed_labels), strict=True):
        geometry(scan, f"the {name} image")  # of every method: no other program reads a field on a sheared grid
        if labels is not None:
            require_same_grid(scan, labels, f"the {name} image", f"the {name} labels")
    clock = _Clock(tell)
    with clock.step("affine"):
        images = [reorient(scan, "RAS") for scan in (moving, fixed)]
        brains = [_brain(image, name) for image, name in zip(images, NAMES, strict=True)]
        cuts = [find_cuts(brain.data) for brain in brains]
        matrix = _affine(images, brains, cuts) if align else np.eye(4)
        grid = _working_grid(brains, matrix) if trained is None else network_grid(trained, brains[1])
        there = [
            _on_grid(image, brain, grid, transform)
            for image, brain, transform in zip(images, brains, (matrix, np.eye(4)), strict=True)
        ]
        facts: dict[str, Any] = {"quality": _quality(brains, matrix, there, (moving_labels, fixed_labels))}
        facts["cuts"] = {name: [cut.side for cut in found] for name, found in zip(NAMES, cuts, strict=True)}
    remarks = list(_told(_of_scans(facts, method)))  # before minutes of work
    known: dict[str, Any] = {"watch": watch} if watch is not None and method in LEAVES_OUT else {}
    if any(cuts) and method in LEAVES_OUT:
        transforms = (matrix, np.eye(4))
        known["seen"] = tuple(seen_on(grid, *each) for each in zip(brains, cuts, transforms, strict=True))
    with clock.step("method"):
        deformation = register(there[0], there[1], method=method, **known, **parameters)
    with clock.step("inverse"):
        inverse, residual = _inverse(deformation, there)
    with clock.step("quality"):
        work = Work(there[0], there[1], _warped_image(there[0], deformation), deformation)
        facts |= _facts(work) | {"inverse_residual": residual}
    remarks += _told(_of_inverse(facts))
    with clock.step("warp"):
        result = _results(
            moving, fixed, work, inverse, matrix, moving_labels, fixed_labels, interpolation=label_interpolation
        )
    facts["seconds"] = clock.seconds
    return RegisteredScans(**result, affine=matrix, facts=facts, remarks=tuple(remarks), work=work)


class _Clock:
    """Seconds of wall time by step; each is told as it begins."""

    def __init__(self, tell: Tell | None) -> None:
        self.seconds: dict[str, float] = {}
        self._tell = tell

    @contextlib.contextmanager
    def step(self, name: str) -> Iterator[None]:
        if self._tell is not None:
            self._tell(name)
        start = time.perf_counter()
        yield
        self.seconds[name] = round(time.perf_counter() - start, 2)


def _trained_grid(method: str, parameters: dict[str, Any]) -> dict[str, Any] | None:
    """Return what a network's weights say of the grid of their training, None for a method that is no network."""
    weights = parameters.get("weights", method if str(method).endswith(".safetensors") else None)
    if weights is None:
        return None
    metadata = weights[1] if isinstance(weights, tuple) else read_metadata(weights)
    grid: dict[str, Any] = metadata["grid"]
    return grid


def _brain(image: Volume, name: str) -> Volume:
    """Return the mask of a stripped scan; what is not stripped is refused in the words of two scans, not a cohort's."""
    try:
        return brain_mask(image, None, method="none", where=name)
    except InputError as error:
        expected = "a stripped scan, zero outside the brain"
        raise InputError(error.where, found=error.found, expected=expected, remedy=how_to_strip(name)) from None


def how_to_strip(name: str) -> str:
    """Say what to do about a scan, ``"moving"`` or ``"fixed"``, that is a whole head."""
    return (
        f"Give its brain mask (--{name}-mask), or have a network find the brain (--skull-strip deepbet, which "
        "pip install 'dmir[deepbet]' brings)."
    )


def _affine(images: list[Volume], brains: list[Volume], cuts: list[list[Cut]]) -> np.ndarray:
    """Return the matrix that takes the fixed world to the moving one, whatever is cut off."""
    planes = [cut_planes(brain, found) for brain, found in zip(brains, cuts, strict=True)]
    return align_cut(partial(_affine_of, images), (brains[0], brains[1]), (planes[0], planes[1]))


def _affine_of(images: list[Volume], *brains: Volume) -> np.ndarray:
    moving, fixed = (
        Volume(normalise(image.data, brain.data, where=name), image.affine)
        for image, brain, name in zip(images, brains, NAMES, strict=True)
    )
    return estimate_affine(moving, brains[0], fixed)


# ---------------------------------------------------------------- grids


def _working_grid(brains: list[Volume], matrix: np.ndarray) -> Grid:
    """Return the part of the fixed scan's grid that holds both brains, and MARGIN round them."""
    moving, fixed = brains
    to_fixed = np.linalg.inv(fixed.affine) @ np.linalg.inv(matrix) @ moving.affine
    low, high = np.full(3, np.inf), np.full(3, -np.inf)
    for brain, way in ((moving, to_fixed), (fixed, np.eye(4))):
        places = _surface(brain.data) @ way[:3, :3].T + way[:3, 3]
        low, high = np.minimum(low, places.min(axis=0)), np.maximum(high, places.max(axis=0))
    margin = np.ceil(MARGIN / fixed.spacing)
    first = np.clip(np.floor(low) - margin, 0, np.array(fixed.shape) - 2).astype(int)
    last = np.clip(np.ceil(high) + margin, first + 1, np.array(fixed.shape) - 1).astype(int)
    depth, height, width = (int(n) for n in last - first + 1)
    affine = fixed.affine.copy()
    affine[:3, 3] = fixed.affine[:3, :3] @ first + fixed.affine[:3, 3]
    return Grid((depth, height, width), affine)


def _surface(brain: np.ndarray) -> np.ndarray:
    """Return the first and the last voxel (n, 3) of each line of a mask: no other one is outermost."""
    lines = np.argwhere(brain.any(axis=2))
    along = brain[lines[:, 0], lines[:, 1]]
    ends = (along.argmax(axis=1), brain.shape[2] - 1 - along[:, ::-1].argmax(axis=1))
    return np.concatenate([np.column_stack([lines, end]) for end in ends])


def _on_grid(image: Volume, brain: Volume, grid: Grid, transform: np.ndarray) -> Volume:
    """Resample an image once and bring its grey values to [0, 1], as preprocessing does."""
    mask = resample(Volume(brain.data.astype(np.float32), brain.affine), grid, transform).data > 0.5
    return Volume(normalise(resample(image, grid, transform).data, mask), grid.affine)


# ---------------------------------------------------------------- what is found out


def _inverse(deformation: np.ndarray, there: list[Volume]) -> tuple[np.ndarray, dict[str, float | int]]:
    """Return the inverse of a field on its grid and how far there and back ends from the start."""
    batch = _batch(deformation)
    inverse = invert(batch, tell=False)
    residual = inverse_residual(batch, inverse)[0].numpy()
    brain = (there[0].data > 0) | (there[1].data > 0)
    outside = float(residual[~brain].max()) if not brain.all() else 0.0
    told = {"mean": float(residual[brain].mean()), "worst": float(residual[brain].max()), "worst_outside": outside}
    wrong = int((residual[brain] > MOST_RESIDUAL).sum())
    return inverse[0].numpy(), {**{name: round(value, 4) for name, value in told.items()}, "voxels_above_half": wrong}


def _warped_image(image: Volume, deformation: np.ndarray) -> Volume:
    return Volume(warp(_batch(image.data[None]), _batch(deformation))[0, 0].numpy(), image.affine)


def _facts(work: Work) -> dict[str, Any]:
    """Return the similarity before and after, and the folds."""
    inside = work.fixed.data > 0
    similarity = {
        name: _similarity(image.data[inside], work.fixed.data[inside])
        for name, image in (("after_affine", work.moving), ("after", work.warped))
    }
    return {"similarity": similarity, "folds": folded_voxels(torch.from_numpy(work.deformation))}


def _similarity(values: np.ndarray, others: np.ndarray, bins: int = 32) -> dict[str, float]:
    """Return Pearson's correlation and the mutual information (nats, of a joint histogram) of grey values."""
    counts = np.histogram2d(values, others, bins)[0]
    joint = counts / counts.sum()
    apart = joint.sum(axis=1, keepdims=True) * joint.sum(axis=0, keepdims=True)
    some = joint > 0
    information = float((joint[some] * np.log(joint[some] / apart[some])).sum())
    correlation = float(np.corrcoef(values, others)[0, 1]) if np.ptp(values) and np.ptp(others) else 0.0
    return {"correlation": round(correlation, 5), "mutual_information": round(information, 5)}


def _quality(
    brains: list[Volume], matrix: np.ndarray, there: list[Volume], labels: Sequence[Volume | None]
) -> dict[str, Any]:
    """Return what the pipeline's quality control says of either scan; the fixed one is the atlas, also to itself."""
    masks = [Volume(image.data > 0, image.affine) for image in there]
    return {
        name: _judged(brain, transform, image, mask, there[1], masks[1], labels=own)
        for name, brain, transform, image, mask, own in zip(
            NAMES, brains, (matrix, np.eye(4)), there, masks, labels, strict=True
        )
    }


def _judged(brain: Volume, transform: np.ndarray, image: Volume, *others: Volume, labels: Volume | None) -> dict:
    """Return :func:`assess` of a scan; its sides are wrong where every structure set that its labels may be says so."""
    if labels is None or not (fitting := _fitting_sets(labels)):
        return assess(brain, transform, image, *others)
    on_grid = resample(labels, image.grid, transform, interpolation="nearest")
    judged = []
    for structures in fitting:
        known = np.where(np.isin(on_grid.data, structures.ids), on_grid.data, 0)
        judged.append(
            assess(brain, transform, image, *others, labels=Volume(known, on_grid.affine), structures=structures)
        )
    return min(judged, key=lambda quality: len(quality["flags"]))


def _fitting_sets(labels: Volume) -> list[StructureSet]:
    """Return the structure sets that know nearly all ids of a label map, and two sides."""
    found = np.unique(labels.data[labels.data > 0])
    every = [load_structures(name) for name in structure_set_names()]
    return [
        structures
        for structures in every
        if np.isin(found, structures.ids).mean() >= KNOWN and (structures.table["hemisphere"] == "left").any()
    ]


def _told(doubts: Iterable[Doubt]) -> Iterator[str]:
    """Warn of each, and yield what it says."""
    for each in doubts:
        warnings.warn(each, stacklevel=4)
        yield str(each)


def _of_scans(facts: dict[str, Any], method: str) -> Iterator[Doubt]:
    """Yield what is doubtful of either scan, with what is done about it."""
    for name in NAMES:
        for flag in facts["quality"][name]["flags"]:
            said = flag.replace("the atlas", "the fixed scan").replace(
                " (the cohort's keys orientation and label_map)", ""
            )
            if not flag.startswith(CUT_OFF):
                yield Doubt(name, said, "registered as it is, look at registration.png")
        for side in facts["cuts"][name]:
            done = "does not pull" if method in LEAVES_OUT else f"pulls {method} (it does not pull descent)"
            yield Doubt(name, f"{CUT_OFF} {side}", f"what was not scanned there {done}")


def _of_inverse(facts: dict[str, Any]) -> Iterator[Doubt]:
    """Yield what is doubtful of the inverse."""
    residual = facts["inverse_residual"]
    if residual["worst"] > MOST_RESIDUAL:
        found = (
            f"the field has none at {residual['voxels_above_half']:,} voxels of the brain, where there and back ends "
            f"up to {residual['worst']:.3g} voxels from the start (mean of the brain: {residual['mean']:.2g})"
        )
        yield Doubt("inverse", found, "do not trust what is brought back there")
    elif facts["folds"]:
        found = f"the field folds at {facts['folds']:,} places, where it has none"
        yield Doubt("inverse", found, "what is brought back jumps there")


# ---------------------------------------------------------------- fields and what they warp


def _results(
    moving: Volume,
    fixed: Volume,
    work: Work,
    inverse: np.ndarray,
    matrix: np.ndarray,
    moving_labels: Volume | None,
    fixed_labels: Volume | None,
    interpolation: str,
) -> dict[str, Any]:
    """Join deformation and affine, ``x -> matrix (x + u(x))``, and warp everything once, there and back."""
    to_moving = _Way(work.deformation, work.grid, fixed.grid, np.eye(4), matrix)
    to_fixed = _Way(inverse, work.grid, moving.grid, np.linalg.inv(matrix), np.eye(4))
    sampling = _batch(to_moving.in_voxels_of(moving.affine))
    return {
        "displacement": to_moving.in_voxels_of(fixed.affine),
        "inverse": to_fixed.in_voxels_of(moving.affine),
        "warped": Volume(warp(_batch(moving.data[None]), sampling)[0, 0].numpy(), fixed.affine),
        "warped_labels": None if moving_labels is None else _warped(moving_labels, sampling, fixed, interpolation),
        "fixed_labels_on_moving": None
        if fixed_labels is None
        else _warped(fixed_labels, _batch(to_fixed.in_voxels_of(fixed.affine)), moving, interpolation),
    }


class _Way:
    """Where a field takes the voxels of a grid: ``j -> after (x + u(x))`` with ``x = before (affine j)``, in the world.

    Beyond the field's own grid it goes on as it is at the border, as a shift.

    Parameters
    ----------
    field
        (3, d, h, w) in voxels.
    own, grid
        The field's grid, and the one from which the way starts.
    before, after
        4x4, world to world (RAS mm).
    """

    def __init__(self, field: np.ndarray, own: Grid, grid: Grid, before: np.ndarray, after: np.ndarray) -> None:
        self._to_own = np.linalg.inv(own.affine) @ before @ grid.affine
        self._to_world = after @ own.affine
        self._field = _field_at(field, self._to_own, grid.shape)

    def in_voxels_of(self, affine: np.ndarray) -> np.ndarray:
        """Return where that is less where it started, both as voxel indices, float32 (3, D, H, W).

        In the grid's own voxels it is a field; in another image's, what :func:`dmir.fields.warp` samples that by.
        """
        to_voxels = np.linalg.inv(affine) @ self._to_world
        beyond = to_voxels @ self._to_own - np.eye(4)
        result = np.empty_like(self._field)
        depth, height, width = result.shape[1:]
        for row in range(3):
            line = beyond[row, 1] * np.arange(height)[:, None] + beyond[row, 2] * np.arange(width) + beyond[row, 3]
            for plane in range(depth):
                moved = line + beyond[row, 0] * plane
                for axis in range(3):
                    if abs(to_voxels[row, axis]) > 1e-12:
                        moved += to_voxels[row, axis] * self._field[axis, plane]
                result[row, plane] = moved
        return result


def _field_at(field: np.ndarray, matrix: np.ndarray, shape: tuple[int, int, int]) -> np.ndarray:
    """Return a field (3, d, h, w) at ``matrix @ j`` for the voxels j of a grid, its components as they are.

    Where these are voxels of its own they are copied, else interpolated linearly.
    """
    nearest = np.round(matrix)
    turned = np.abs(nearest[:3, :3])
    if np.abs(matrix - nearest)[:3].max() * max(shape) < 1e-3 and (turned.sum(axis=0) == 1).all():
        source = turned.argmax(axis=1)  # which axis of the grid each axis of the field runs along
        indices = [
            np.clip(nearest[axis, source[axis]] * np.arange(shape[source[axis]]) + nearest[axis, 3], 0, n - 1)
            for axis, n in enumerate(field.shape[1:])
        ]
        picked = field[(slice(None), *np.ix_(*(index.astype(int) for index in indices)))]
        return np.ascontiguousarray(picked.transpose(0, *(1 + np.argsort(source))))
    places = onto_moving_grid(np.zeros((3, *shape), dtype=np.float32), np.eye(4), np.linalg.inv(matrix))
    return warp(_batch(field), _batch(places), padding="border")[0].numpy()


def _warped(labels: Volume, sampling: torch.Tensor, like: Volume, interpolation: str) -> Volume:
    data = warp_labels(_batch(labels.data[None]), sampling, interpolation)[0, 0].numpy()
    return Volume(data.astype(np.int32), like.affine)


def _batch(data: np.ndarray) -> torch.Tensor:
    return torch.from_numpy(np.ascontiguousarray(data))[None]


# ---------------------------------------------------------------- files


def read_stripped(path: str | Path, mask: str | Path | None, key: str, skull_strip: str | None = None) -> Volume:
    """Read a scan and set all outside its brain to zero.

    Parameters
    ----------
    mask
        Of the brain; without it the scan must be stripped already, or be stripped here.
    key
        What the scan is, ``"moving"`` or ``"fixed"``.
    skull_strip
        ``"deepbet"``: a network finds the brain, where no mask is given.

    Raises
    ------
    InputError
        As :func:`~dmir.volumes.read_image`; the mask leaves nothing; the scan is a whole head.
    """
    image = read_image(path, key)
    if mask is not None:
        inside = read_mask(mask, f"{key}_mask")
        require_same_grid(image, inside, path, mask)
        return _masked(image, inside, f"{key}_mask: {mask}")
    if skull_strip is not None:
        require_skull_strip(skull_strip)
        return _masked(image, brain_mask(image, None, method=skull_strip, where=key), f"{key}: {path}")
    brain = _brain(image, key)
    volume = float(brain.data.sum() * abs(np.linalg.det(image.affine[:3, :3])) / 1000)
    if volume > BRAIN_VOLUME[1]:
        raise InputError(
            f"{key}: {path}",
            found=f"{volume:.0f} ml that are not zero, which is a head and no brain",
            expected=f"a stripped scan, zero outside a brain of at most {BRAIN_VOLUME[1]:.0f} ml",
            remedy=how_to_strip(key),
        )
    return image


def _masked(image: Volume, inside: Volume, where: str) -> Volume:
    values = image.data[inside.data]
    if not np.ptp(values):
        raise InputError(
            where,
            found=f"a mask inside which the image is {values[0]:g} everywhere",
            expected="a mask of the brain",
            remedy="Look at both in a viewer: they may belong to two scans.",
        )
    return Volume(np.where(inside.data, image.data, 0), image.affine)


def require_skull_strip(name: str) -> None:
    """Refuse with InputError a way to strip skulls whose package is absent."""
    try:
        importlib.import_module(name)
    except ImportError as error:
        raise InputError(
            f"--skull-strip {name}",
            found=f"a package that cannot be imported ({error})",
            expected=f"the package {name}",
            remedy=f"Install it: pip install 'dmir[{name}]'. Or give brain masks (--moving-mask, --fixed-mask).",
        ) from None


def read_labels_of(scan: Volume, path: str | Path | None, key: str) -> Volume | None:
    """Read the label map of a scan that is read already, None where there is none; its grid must be the scan's."""
    if path is None:
        return None
    labels = read_labels(path, f"{key}_labels")
    require_same_grid(scan, labels, f"the {key} image", f"{key}_labels: {path}")
    return labels
