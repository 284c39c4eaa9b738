"""The contact sheet: the preprocessed scans of a cohort in one picture, to be checked in a minute."""

from __future__ import annotations

import math
from collections.abc import Mapping
from pathlib import Path

import numpy as np
import pandas as pd
from matplotlib.axes import Axes
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure
from matplotlib.patches import Rectangle
from scipy import ndimage

from dmir.volumes import read_image

MOST_TILES = 600  # of more scans some are shown: a picture of thousands is opened by no viewer, and looked at by nobody
THUMBNAIL = 100  # pixels along the longest edge of a plane, at most
GAP, CAPTION = 6, 22  # pixels between tiles, and for the words above each
DPI = 100
FLAGGED, OUTLINE = "#D55E00", np.array([0.34, 0.71, 0.91])  # vermilion and sky blue (Okabe and Ito 2008)


def contact_sheet(
    images: Mapping[str, str | Path],
    quality: pd.DataFrame,
    *,
    splits: Mapping[str, str],
    reference: str,
    cohort: str = "",
) -> Figure:
    """Draw three planes of each scan under the outline of the reference's brain; flagged scans come first.

    Of more than :data:`MOST_TILES` scans those are shown that are flagged, and of the others some at equal distances.

    Parameters
    ----------
    images
        Preprocessed image, all on one grid, by scan.
    quality
        From :func:`dmir.preprocess.files.quality_table`.
    splits
        What each scan is for.
    reference
        The scan that the others are aligned to.

    Returns
    -------
    matplotlib.figure.Figure
        Whose pixels are those of the planes; save it with its own ``dpi``.
    """
    rows = quality.set_index("scan").sort_values("ok", kind="stable")
    first = read_image(images[reference])
    step = math.ceil(max(first.shape) / THUMBNAIL)
    outline = [_edge(plane > 0) for plane in _planes(first.data, step)]
    shown = _shown(list(rows.index[~rows["ok"]]), list(rows.index[rows["ok"]]))
    tiles = {scan: _tile(_planes(read_image(images[scan]).data, step), outline) for scan in shown}
    height, width = next(iter(tiles.values())).shape[:2]
    columns = _columns(len(tiles), width + GAP, height + CAPTION + GAP)
    flagged = int((~rows["ok"]).sum())
    voxels = "x".join(map(str, first.shape))
    part = "" if len(tiles) == len(rows) else f"{len(tiles)} of "
    title = (
        f"{cohort}: {part}{len(rows)} scans on {voxels} voxels of {first.spacing[0]:.3g} mm, {flagged} flagged\n"
        f"Blue: the brain of {reference}, to which all are aligned; Dice: with that brain. Left is on the left."
    )
    figure, axes = _canvas(columns * (width + GAP), math.ceil(len(tiles) / columns) * (height + CAPTION + GAP), title)
    for place, (scan, tile) in enumerate(tiles.items()):
        left = GAP / 2 + place % columns * (width + GAP)
        top = place // columns * (height + CAPTION + GAP)
        row = rows.loc[scan]
        axes.imshow(tile, extent=(left, left + width, top + CAPTION + height, top + CAPTION), interpolation="none")
        words = f"{scan} ({splits.get(scan, '')})  Dice {row['mask_overlap']:.3f}"
        colour = "black" if row["ok"] else FLAGGED
        axes.text(left, top + 9, words, fontsize=7, color=colour, va="center", clip_on=True)
        if not row["ok"]:
            reason = str(row["flags"])[: max(width // 4, 20)]
            axes.text(left, top + 17, reason, fontsize=5, color=FLAGGED, va="center", clip_on=True)
            corner = (left - 1, top + CAPTION - 1)
            axes.add_patch(Rectangle(corner, width + 2, height + 2, fill=False, edgecolor=FLAGGED, linewidth=2))
    return figure


def _shown(flagged: list[str], others: list[str]) -> list[str]:
    """Return the scans that get a tile."""
    first = flagged[:MOST_TILES]
    count = min(len(others), MOST_TILES - len(first))
    return [*first, *(others[k * len(others) // count] for k in range(count))]


def _planes(data: np.ndarray, step: int) -> list[np.ndarray]:
    """Return the middle axial, coronal and sagittal plane, up or front at the top; left is left in the first two."""
    middle = [n // 2 for n in data.shape]
    planes = (data[:, :, middle[2]], data[:, middle[1], :], data[middle[0], :, :])
    return [plane[::step, ::step].T[::-1] for plane in planes]


def _edge(mask: np.ndarray) -> np.ndarray:
    return mask & ~ndimage.binary_erosion(mask)


def _tile(planes: list[np.ndarray], outline: list[np.ndarray]) -> np.ndarray:
    """Return the planes side by side, (h, w, 3) in [0, 1]."""
    height, width = max(p.shape[0] for p in planes), sum(p.shape[1] for p in planes)
    tile = np.zeros((height, width, 3))
    left = 0
    for plane, edge in zip(planes, outline, strict=True):
        top = (height - plane.shape[0]) // 2
        part = tile[top : top + plane.shape[0], left : left + plane.shape[1]]
        part[:] = np.clip(plane, 0, 1)[..., None]
        part[edge] = OUTLINE
        left += plane.shape[1]
    return tile


def _columns(count: int, width: int, height: int) -> int:
    """Return the number of columns that makes the sheet about 4:3, and no fewer than the title needs."""
    return max(1, min(count, max(round(math.sqrt(count * 4 / 3 * height / width)), math.ceil(700 / width))))


def _canvas(width: int, height: int, title: str) -> tuple[Figure, Axes]:
    """Return a figure whose data coordinates are pixels, y downwards, with a title above."""
    head = 40
    figure = Figure(figsize=(width / DPI, (height + head) / DPI), dpi=DPI, facecolor="white")
    FigureCanvasAgg(figure)
    axes = figure.add_axes((0, 0, 1, height / (height + head)))
    axes.set_xlim(0, width)
    axes.set_ylim(height, 0)
    axes.set_axis_off()
    size = min(9.0, 1.45 * width / max(map(len, title.splitlines())))
    figure.text(0.004, 1 - head / 2 / (height + head), title, fontsize=size, va="center")
    return figure, axes
