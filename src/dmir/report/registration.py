"""The picture of one registration: what it had to do, what it did, and whether anatomy came to lie on anatomy."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

import matplotlib as mpl
import numpy as np
import torch
from matplotlib.axes import Axes
from matplotlib.cm import ScalarMappable
from matplotlib.colors import LogNorm
from matplotlib.figure import Figure
from matplotlib.ticker import FixedFormatter, FixedLocator, NullLocator
from skimage.feature import canny

from dmir.fields import jacobian_determinant
from dmir.report.names import method_name
from dmir.report.panels import JACOBIAN_COLOURS
from dmir.report.planes import SIDES, Plane, affine_to_ras, brain_of, choose_plane, field_to_ras, scalar_to_ras
from dmir.report.style import RC, new_figure
from dmir.volumes import atomic_path

if TYPE_CHECKING:
    from dmir.methods.scans import RegisteredScans

PLANES = ("sagittal", "coronal", "axial")
TITLES = ("Fixed", "Moving, affine", "Moving, warped", "Warped, edges of fixed", "Jacobian determinant")
WIDTH = 9.0  # inches
NAME, HEAD, TITLE, GAP, SCALE = 0.22, 0.28, 0.2, 0.05, 0.5  # inches: row names, headline, titles, gaps, colour bar
EDGES = "#e69f00"  # Okabe and Ito's orange
SMOOTHING = 1.5  # mm, standard deviation of the Gaussian before edges are looked for
STRONG, WEAK = 0.88, 0.75  # quantiles of the gradient at which an edge begins and goes on
LEAST = 0.25  # times: the determinant that the colours begin at; they end at its inverse
DOTS = 200  # an inch


@dataclass(frozen=True)
class _Row:
    """The pictures of one plane, rows from bottom to top."""

    plane: Plane
    images: tuple[np.ndarray, ...]
    edges: np.ndarray
    determinant: np.ndarray


def draw_registration(path: str | Path, result: RegisteredScans, *, method: str) -> None:
    """Write the picture of a registration as .png.

    Parameters
    ----------
    result
        Of :func:`dmir.methods.scans.register_scans`.
    method
        Its name, for the headline.
    """
    similarity = result.facts["similarity"]
    before, after = (similarity[name]["correlation"] for name in ("after_affine", "after"))
    folds = result.facts["folds"]
    folded = "no folds" if not folds else f"folds at {folds:,} places"
    headline = f"{method_name(method)}: correlation {before:.3f} after the affine, {after:.3f} warped; {folded}"
    work = result.work
    images = (work.fixed.data, work.moving.data, work.warped.data)
    figure = registration_figure(*images, work.deformation, work.grid.affine, headline=headline)
    with atomic_path(path) as temporary:
        figure.savefig(temporary, format="png", dpi=DOTS, metadata={"Software": None})


@mpl.rc_context(RC)
def registration_figure(
    fixed: np.ndarray,
    aligned: np.ndarray,
    warped: np.ndarray,
    deformation: np.ndarray,
    affine: np.ndarray,
    *,
    headline: str = "",
) -> Figure:
    """Draw one registration in three planes through the fixed brain.

    A row a plane: the fixed image, the moving one after the affine, the warped one, the warped one with the fixed
    image's edges on it, and the Jacobian determinant of the deformation (without the affine) on a logarithmic scale:
    blue shrinks, red grows, yellow folds. Left and right follow the affine, and letters tell them.

    Parameters
    ----------
    fixed, aligned, warped
        Images (D, H, W) on the fixed grid, zero outside the brain.
    deformation
        float32 (3, D, H, W) in voxels.
    affine
        4x4 voxel-to-RAS matrix of the fixed grid, mm.
    headline
        Above all of it.
    """
    rows = _rows((fixed, aligned, warped), deformation, affine)
    panel = (WIDTH - NAME - GAP * len(TITLES)) / len(TITLES)
    # all pictures on one scale, as wide as the widest
    scale = panel / max(row.plane.size[0] for row in rows)
    heights = [row.plane.size[1] * scale for row in rows]
    figure = new_figure(WIDTH, HEAD + TITLE + sum(heights) + GAP * len(heights) + SCALE, layout=None)
    figure.text(0.5, 1 - HEAD / 2 / figure.get_figheight(), headline, ha="center", va="center", fontsize=9)
    colours = LogNorm(LEAST, 1 / LEAST)
    tops = [_highest([row.images[k] for row in rows]) for k in range(3)]
    top = HEAD + TITLE
    for number, (row, height) in enumerate(zip(rows, heights, strict=True)):
        wide, tall = figure.get_size_inches()
        figure.text(0.02 / wide, 1 - (top + height / 2) / tall, row.plane.title, rotation=90, va="center", fontsize=7)
        for column, title in enumerate(TITLES):
            left = NAME + column * (panel + GAP)
            axis = figure.add_axes((left / wide, 1 - (top + height) / tall, panel / wide, height / tall))
            _draw(axis, row, column, tops, colours)
            if number == 0:
                axis.set_title(title, pad=3)
        top += height + GAP
    _draw_scale(figure, colours, NAME + (len(TITLES) - 1) * (panel + GAP), panel)
    return figure


def _rows(images: Sequence[np.ndarray], deformation: np.ndarray, affine: np.ndarray) -> list[_Row]:
    turned = [scalar_to_ras(image, affine) for image in images]
    field = field_to_ras(deformation, affine)
    grid = affine_to_ras(affine, images[0].shape)
    brain = brain_of(turned[0])
    shown = brain | (turned[1] > 0) | (turned[2] > 0)
    middles = {name: choose_plane(name, brain, grid).index for name in PLANES}
    rows = []
    for name in PLANES:
        plane = choose_plane(name, shown, grid, middles)
        pictures = [plane.cut(image) for image in turned]
        inside = plane.cut(brain)
        determinant = np.ma.masked_where(~inside, _determinant(plane, field))
        rows.append(_Row(plane, tuple(pictures), _edges(pictures[0], inside, plane), determinant))
    return rows


def _determinant(plane: Plane, field: np.ndarray) -> np.ndarray:
    """Return the central determinants on a plane; at the border of the grid, where there are none, 1."""
    first = min(max(plane.index - 1, 0), field.shape[plane.axis + 1] - 3)
    slab = np.take(field, range(first, first + 3), axis=plane.axis + 1)
    inner = jacobian_determinant(torch.from_numpy(np.ascontiguousarray(slab))[None])[0].numpy()
    middle = np.pad(np.take(inner, 0, axis=plane.axis), 1, constant_values=1.0)
    (left, right), (bottom, top) = plane.window
    picture: np.ndarray = middle[left:right, bottom:top].T
    return picture


def _edges(picture: np.ndarray, inside: np.ndarray, plane: Plane) -> np.ndarray:
    """Return where the fixed image has edges, bool, one voxel thin."""
    if not inside.any() or not np.ptp(picture):
        return np.zeros(picture.shape, dtype=bool)
    scaled = picture / max(float(np.percentile(picture[inside], 99.5)), 1e-6)
    edges: np.ndarray = canny(
        np.clip(scaled, 0, 1).astype(float),
        sigma=SMOOTHING / float(np.mean(plane.spacing)),
        low_threshold=WEAK,
        high_threshold=STRONG,
        use_quantiles=True,
    )
    return edges


def _highest(pictures: Sequence[np.ndarray]) -> float:
    """Return the grey value that is white: nearly the highest, so that one voxel does not darken all."""
    values = np.concatenate([picture[picture > 0] for picture in pictures])
    return float(np.percentile(values, 99.5)) if len(values) else 1.0


def _draw(axis: Axes, row: _Row, column: int, tops: Sequence[float], colours: LogNorm) -> None:
    axis.set_facecolor("black")
    axis.set_xticks([])
    axis.set_yticks([])
    axis.spines[:].set_visible(False)
    image = min(column, 2)
    if column < 4:
        axis.imshow(row.images[image], cmap="gray", vmin=0, vmax=tops[image], origin="lower", interpolation="bilinear")
    if column == 3:
        shown = np.ma.masked_where(~row.edges, row.edges.astype(float))
        axis.imshow(shown, cmap=mpl.colors.ListedColormap([EDGES]), origin="lower", interpolation="nearest")
    if column == 4:
        axis.set_facecolor("white")
        # what lies below the range has the colour of folds, so that nothing else may
        shown = np.ma.where(row.determinant <= 0, LEAST / 2, np.ma.clip(row.determinant, LEAST, None))
        axis.imshow(shown, cmap=JACOBIAN_COLOURS, norm=colours, origin="lower", interpolation="nearest")
    axis.set_aspect(row.plane.spacing[1] / row.plane.spacing[0])
    axis.set_anchor("C")
    if column == 0:
        box = {"facecolor": "black", "alpha": 0.4, "linewidth": 0, "pad": 0.8}
        for place, side in zip((0.03, 0.97), SIDES[row.plane.name], strict=True):
            axis.text(
                place, 0.97, side, transform=axis.transAxes, color="white", fontsize=7,
                ha="left" if place < 0.5 else "right", va="top", bbox=box,
            )  # fmt: skip


def _draw_scale(figure: Figure, colours: LogNorm, left: float, width: float) -> None:
    """Draw the determinants' colours below their column."""
    wide, tall = figure.get_size_inches()
    axis = figure.add_axes(((left + 0.1) / wide, (SCALE - 0.14) / tall, (width - 0.2) / wide, 0.09 / tall))
    bar = figure.colorbar(ScalarMappable(colours, JACOBIAN_COLOURS), cax=axis, orientation="horizontal")
    bar.outline.set_linewidth(0.4)
    bar.locator, bar.minorlocator = FixedLocator([0.25, 0.5, 1, 2, 4]), NullLocator()
    bar.formatter = FixedFormatter(["¼", "½", "1", "2", "4"])
    bar.update_ticks()
    axis.tick_params(labelsize=7, length=2, pad=1)
    axis.set_xlabel("volume, times; yellow: folded", fontsize=7, labelpad=1)
