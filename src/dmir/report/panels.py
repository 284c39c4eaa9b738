"""The panels of the qualitative figure: which picture, in which colours, on which shared scale."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import matplotlib as mpl
import numpy as np
from matplotlib.axes import Axes
from matplotlib.cm import ScalarMappable
from matplotlib.collections import LineCollection
from matplotlib.colors import Colormap, Normalize
from matplotlib.ticker import FixedLocator, MaxNLocator

from dmir.report.pictures import Pictures
from dmir.report.planes import SIDES, Plane

GRID_LINES = 26  # across the wider side of a deformed grid
FOLDED = "#ffd300"  # a colour that the diverging map does not have
JACOBIAN_COLOURS = mpl.colormaps["RdBu_r"].with_extremes(under=FOLDED)


@dataclass(frozen=True)
class Scale:
    """A colour scale that all rows share: its label, colours, range, and ticks where they are not free."""

    label: str
    colours: Colormap
    range: Normalize
    ticks: tuple[float, ...] = ()


@dataclass(frozen=True)
class Panel:
    """One column of the figure: the attribute of :class:`Pictures` it shows, its header, its scale.

    ``bar`` tells whether a reader needs the scale drawn.
    """

    picture: str
    header: str
    scale: Scale
    bar: bool = True


def shared_panels(rows: Sequence[Pictures], truths: Sequence[Pictures], images: Sequence[np.ndarray]) -> list[Panel]:
    """Return the columns, with scales that hold for every row; an endpoint error only where the truth is known.

    Parameters
    ----------
    rows
        Every method's pictures in every plane.
    truths
        The true field's pictures in every plane; empty where it is not known.
    images
        The pictures of the fixed and the moving image, by turns, in every plane.
    """
    before = [np.abs(moving - fixed) for moving, fixed in zip(images[1::2], images[::2], strict=True)]
    lengths = [row.magnitude for row in (*rows, *truths)]
    grey = Scale("", mpl.colormaps["gray"], Normalize(0, _highest(images)))
    panels = [
        Panel("warped", "Warped moving", grey, bar=False),
        Panel("displacement", "Deformed grid", grey, bar=False),
        Panel("magnitude", "Displacement", Scale("mm", mpl.colormaps["viridis"], Normalize(0, _highest(lengths)))),
        Panel("error", "|Warped − fixed|", Scale("grey value", mpl.colormaps["magma"], Normalize(0, _highest(before)))),
        Panel("jacobian", "Jacobian", Scale("|J|, yellow: ≤ 0", JACOBIAN_COLOURS, Normalize(0, 2), (0, 1, 2))),
    ]
    errors = [row.endpoint_error for row in rows if row.endpoint_error is not None]
    if errors:
        distance = Scale("mm", mpl.colormaps["cividis"], Normalize(0, _highest(errors)))
        panels.append(Panel("endpoint_error", "Endpoint error", distance))
    return panels


def _highest(pictures: Sequence[np.ndarray]) -> float:
    """Return what the top of a scale stands for: nearly the highest value, so that one voxel does not darken all."""
    values = np.concatenate([np.ma.masked_array(picture).compressed() for picture in pictures])
    return max(float(np.percentile(values, 99.5)), 1e-6) if len(values) else 1.0


def draw_panel(
    axis: Axes,
    picture: np.ndarray,
    panel: Panel,
    plane: Plane,
    *,
    grid_lines: int = GRID_LINES,
    rasterized: bool = False,
) -> None:
    """Draw one picture in its place and proportions.

    Parameters
    ----------
    grid_lines
        How many lines a deformed grid has across its wider side.
    rasterized
        Keep a deformed grid as pixels in vector formats: thirty of them are megabytes of lines.
    """
    axis.set_axis_off()
    if panel.picture == "displacement":
        _draw_grid(axis, picture, plane, grid_lines, rasterized)
        return
    # exactly zero is a fold too, but only what lies below the range takes the colour of folds
    shown = np.ma.where(picture <= 0, -1.0, picture) if panel.picture == "jacobian" else picture
    axis.imshow(
        shown,
        cmap=panel.scale.colours,
        norm=panel.scale.range,
        origin="lower",
        aspect="auto",
        interpolation="nearest" if panel.picture == "jacobian" else "bilinear",
    )
    if panel.picture == "warped":
        _draw_sides(axis, plane)


def _draw_grid(axis: Axes, displacement: np.ndarray, plane: Plane, count: int, rasterized: bool) -> None:
    """Draw the lines x + u(x) = where each line of the fixed grid finds its moving voxels, in the plane."""
    rows, columns = displacement.shape[1:]
    vertical, horizontal = np.meshgrid(np.arange(rows), np.arange(columns), indexing="ij")
    points = np.stack([horizontal + displacement[0], vertical + displacement[1]], axis=-1)
    wider = max(range(2), key=lambda side: plane.size[side])
    step = max(2, round((columns, rows)[wider] / count))
    lines = [*points[step // 2 :: step], *points[:, step // 2 :: step].transpose(1, 0, 2)]
    axis.add_collection(LineCollection(lines, colors="#333333", linewidths=0.35, rasterized=rasterized))
    axis.set_xlim(-0.5, columns - 0.5)
    axis.set_ylim(-0.5, rows - 0.5)


def _draw_sides(axis: Axes, plane: Plane) -> None:
    # a pale box instead of an outline keeps the letters text in an SVG
    box = {"facecolor": "black", "alpha": 0.4, "linewidth": 0, "pad": 0.8}
    for place, side in zip((0.03, 0.97), SIDES[plane.name], strict=True):
        axis.text(
            place, 0.97, side, transform=axis.transAxes, color="white", fontsize=6,
            ha="left" if place < 0.5 else "right", va="top", bbox=box,
        )  # fmt: skip


def draw_scale(axis: Axes, scale: Scale) -> None:
    """Draw a colour scale along an axis, with few ticks and its unit."""
    bar = axis.figure.colorbar(ScalarMappable(scale.range, scale.colours), cax=axis, orientation="horizontal")
    bar.outline.set_linewidth(0.4)
    bar.locator = FixedLocator(scale.ticks) if scale.ticks else MaxNLocator(3)
    bar.update_ticks()
    axis.tick_params(labelsize=6, length=2, pad=1)
    axis.set_xlabel(scale.label, fontsize=6, labelpad=1)


def checkerboard(first: np.ndarray, second: np.ndarray, tiles: int = 6) -> np.ndarray:
    """Return a picture whose tiles come from two pictures by turns: edges break where they do not fit."""
    tile = max(1, max(first.shape) // tiles)
    rows, columns = np.indices(first.shape)
    return np.where((rows // tile + columns // tile) % 2 == 0, first, second)
