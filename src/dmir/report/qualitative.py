"""The qualitative figure: one pair, every method, what the eye can judge."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from textwrap import fill
from typing import Any

import matplotlib as mpl
import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure

from dmir.report.examples import Example, require_one_pair
from dmir.report.names import method_name
from dmir.report.panels import Panel, checkerboard, draw_panel, draw_scale, shared_panels
from dmir.report.pictures import Pictures, make_pictures
from dmir.report.planes import Plane, affine_to_ras, brain_of, choose_plane, field_to_ras, scalar_to_ras
from dmir.report.style import PAGE_WIDTH, RC, new_figure

PAGE_HEIGHT = 9.4  # inches, what a caption leaves of a page
# inches: the names of the rows, a line of titles, between two panels, a scale with its numbers
NAMES, TITLE, GAP, SCALE = 0.44, 0.17, 0.04, 0.36
NAME_LENGTH = 14  # letters of a row's name in a line: a row is no longer than that
SHORTEST_ROW = 0.6  # inches: where all pictures of all planes would be smaller, there are fewer pictures
GROUPED = {"warped": "Warped", "displacement": "Grid", "jacobian": "Jacobian"}  # of a plane beside others
GROUP_GAP, BAR_WIDTH = 0.1, 1.6  # inches between two planes, of their scale
FEWER_LINES = 18  # of a deformed grid of that size


@dataclass(frozen=True)
class Block:
    """All rows of one plane: the images before registration, and one set of pictures a method."""

    plane: Plane
    moving: np.ndarray
    fixed: np.ndarray
    truth: Pictures | None
    methods: list[Pictures]


@mpl.rc_context(RC)
def qualitative_figure(
    examples: Sequence[Example],
    moving: np.ndarray,
    fixed: np.ndarray,
    *,
    planes: Sequence[str] = ("coronal",),
    index: Mapping[str, int] | None = None,
    truth: np.ndarray | None = None,
) -> Figure:
    """Draw one pair as each method registered it.

    First the moving and the fixed image, both in one checkerboard (or, where it is known, the true displacement), and
    their difference; then a row a method: the warped image, the deformed grid, the displacement's length,
    ``|warped - fixed|``, the Jacobian determinant (forward differences) and, where the truth is known, the endpoint
    error. The methods share all scales. Left and right follow the affine, and letters tell them.

    Several planes stand below one another as long as their panels remain readable on a page. Where there are too many
    methods for that, they stand side by side, and each shows the warped image, the deformed grid and the Jacobian.

    Parameters
    ----------
    examples
        One a method, in the order of the rows, all of the same pair on the same grid.
    moving, fixed
        The images (D, H, W) on that grid, the moving one before deformable registration.
    planes
        Of sagittal, coronal and axial, in the order in which they are shown.
    index
        The slice to cut, counted on the RAS grid, by plane; the brain's middle by default.
    truth
        The true field (3, D, H, W) in voxels.

    Raises
    ------
    InputError
        No example, examples of several pairs or grids, an image on another grid, or an unknown plane.
    """
    shapes = {"the moving image": moving.shape, "the fixed image": fixed.shape}
    require_one_pair(examples, shapes if truth is None else {**shapes, "the true field": truth.shape[1:]})
    blocks = _blocks(examples, moving, fixed, planes, index, truth)
    panels = shared_panels(
        [row for block in blocks for row in block.methods],
        [block.truth for block in blocks if block.truth is not None],
        [image for block in blocks for image in (block.fixed, block.moving)],
    )
    stacked = _lay_out(blocks, len(panels), len(examples))
    if len(blocks) == 1 or min(stacked.tall(block.plane) for block in blocks) >= SHORTEST_ROW:
        return _draw_stacked(stacked, blocks, panels, examples)
    return _draw_side_by_side(blocks, panels, examples)


def _blocks(
    examples: Sequence[Example],
    moving: np.ndarray,
    fixed: np.ndarray,
    planes: Sequence[str],
    index: Mapping[str, int] | None,
    truth: np.ndarray | None,
) -> list[Block]:
    native = np.asarray(examples[0].affine, dtype=np.float64)
    affine = affine_to_ras(native, fixed.shape)
    moving, fixed = scalar_to_ras(moving, native), scalar_to_ras(fixed, native)
    truth = None if truth is None else field_to_ras(truth, native)
    brain = brain_of(fixed)
    chosen = [choose_plane(name, brain | brain_of(moving), affine, index) for name in planes]
    rows: list[list[Pictures]] = [[] for _ in chosen]
    for example in examples:  # one field in memory at a time
        warped = scalar_to_ras(example.warped, native)
        displacement = field_to_ras(example.displacement, native)
        for plane, methods in zip(chosen, rows, strict=True):
            methods.append(make_pictures(plane, warped, displacement, fixed, brain, affine, truth))
    return [
        Block(
            plane=plane,
            moving=plane.cut(moving),
            fixed=plane.cut(fixed),
            truth=None if truth is None else make_pictures(plane, fixed, truth, fixed, brain, affine),
            methods=methods,
        )
        for plane, methods in zip(chosen, rows, strict=True)
    ]


@dataclass(frozen=True)
class _Page:
    """Places in inches from the upper left corner: panels touch whatever their number, and no room is lost."""

    figure: Figure

    def axis(self, left: float, top: float, width: float, height: float) -> Axes:
        wide, tall = self.figure.get_size_inches()
        return self.figure.add_axes((left / wide, 1 - (top + height) / tall, width / wide, height / tall))

    def title(self, text: str, left: float, top: float, **style: Any) -> None:
        """Write a line of its own, its middle in the middle of the line that begins at ``top``."""
        wide, tall = self.figure.get_size_inches()
        self.figure.text(left / wide, 1 - (top + TITLE / 2) / tall, text, va="center", **style)

    def name_row(self, text: str, top: float, height: float) -> None:
        width, tall = self.figure.get_size_inches()
        size = min(6.5, 20 / (text.count("\n") + 1))  # the margin holds three lines of it, or more smaller ones
        self.figure.text(
            (NAMES - 0.05) / width, 1 - (top + height / 2) / tall, text,
            rotation=90, ha="right", va="center", multialignment="center", fontsize=size,
        )  # fmt: skip


@dataclass(frozen=True)
class _Stack(_Page):
    """A page of equal columns, the planes below one another."""

    cell: float  # width of a panel

    def tall(self, plane: Plane) -> float:
        return self.cell * plane.size[1] / plane.size[0]

    def panel(self, column: int, top: float, height: float, inset: float = 0.0) -> Axes:
        """Add an axis in a column, narrower by ``inset`` of its width on either side."""
        left = NAMES + column * (self.cell + GAP) + inset * self.cell
        return self.axis(left, top, self.cell * (1 - 2 * inset), height)


def _lay_out(blocks: list[Block], columns: int, methods: int) -> _Stack:
    """Choose the panels' size: as large as the page's width and height allow."""
    proportions = sum(block.plane.size[1] / block.plane.size[0] for block in blocks) * (methods + 1)
    around = len(blocks) * (2 * TITLE + (methods + 1) * GAP) + SCALE
    across = NAMES + columns * GAP
    cell = min((PAGE_WIDTH - across) / columns, (PAGE_HEIGHT - around) / proportions)
    return _Stack(new_figure(across + columns * cell, around + proportions * cell, layout=None), cell)


def _draw_stacked(page: _Stack, blocks: list[Block], panels: list[Panel], examples: Sequence[Example]) -> Figure:
    """Draw every picture of every plane, a block of rows a plane."""
    top = TITLE
    for block in blocks:
        top = _draw_context(page, top, block, panels, examples[0])
        top += TITLE
        for number, (row, example) in enumerate(zip(block.methods, examples, strict=True)):
            page.name_row(_row_name(example), top, page.tall(block.plane))
            for column, panel in enumerate(panels):
                axis = page.panel(column, top, page.tall(block.plane))
                draw_panel(axis, getattr(row, panel.picture), panel, block.plane)
                if number == 0:
                    axis.set_title(panel.header, pad=2, fontsize=7)
            top += page.tall(block.plane) + GAP
        top += TITLE
    for column, panel in enumerate(panels):
        if panel.bar:
            draw_scale(page.panel(column, top - TITLE + 0.02, 0.07, inset=0.08), panel.scale)
    return page.figure


def _draw_context(page: _Stack, top: float, block: Block, panels: list[Panel], example: Example) -> float:
    """Draw the row of what there was before registration; return where the next row begins."""
    height = page.tall(block.plane)
    by_name = {panel.picture: (column, panel) for column, panel in enumerate(panels)}
    image, (_, error) = by_name["warped"][1], by_name["error"]
    shown: list[tuple[int, str, np.ndarray, Panel]] = [
        (0, "Moving", block.moving, image),
        (1, "Fixed", block.fixed, image),
        (by_name["error"][0], "|Moving − fixed|", np.abs(block.moving - block.fixed), error),
    ]
    if block.truth is None:
        shown.append((2, "Moving and fixed", checkerboard(block.moving, block.fixed), image))
    else:
        for name in ("magnitude", "jacobian"):
            column, panel = by_name[name]
            shown.append((column, "Truth", getattr(block.truth, name), panel))
    for column, title, picture, panel in shown:
        axis = page.panel(column, top, height)
        draw_panel(axis, picture, panel, block.plane)
        axis.set_title(title, pad=2, fontsize=7)
    free = page.panel(len(panels) - 1, top, height)
    free.set_axis_off()
    lines = [example.cohort, f"moving: {example.moving}", f"fixed: {example.fixed}", *block.plane.title.split(", ")]
    free.text(0, 0.5, "\n".join(lines), va="center", fontsize=6, linespacing=1.3, transform=free.transAxes)
    page.name_row("Before", top, height)
    return top + height + GAP


def _draw_side_by_side(blocks: list[Block], panels: list[Panel], examples: Sequence[Example]) -> Figure:
    """Draw a few pictures of every plane, the planes side by side, so that a method is one row."""
    methods = len(examples)
    shown = [panel for panel in panels if panel.picture in GROUPED]
    proportions = sum(block.plane.size[0] / block.plane.size[1] for block in blocks) * len(shown)
    across = NAMES + len(blocks) * len(shown) * GAP + (len(blocks) - 1) * GROUP_GAP
    first = 3 * TITLE  # below the pair, the plane and the headers
    around = first + TITLE + (methods + 1) * GAP + SCALE
    height = min((PAGE_WIDTH - across) / proportions, (PAGE_HEIGHT - around) / (methods + 1))
    page = _Page(new_figure(across + height * proportions, around + height * (methods + 1), layout=None))
    tops = [first, *(first + TITLE + row * (height + GAP) for row in range(1, methods + 1))]
    for top, name in zip(tops, ["Before", *map(_row_name, examples)], strict=True):
        page.name_row(name, top, height)
    pair = f"{examples[0].cohort}: {examples[0].moving} (moving) to {examples[0].fixed} (fixed)"
    page.title(pair, NAMES, 0, fontsize=7)
    left = NAMES
    for block in blocks:
        width = height * block.plane.size[0] / block.plane.size[1]
        middle = left + (len(shown) * (width + GAP) - GAP) / 2
        page.title(block.plane.title, middle, TITLE, ha="center", fontsize=8, fontweight="bold")
        for before, panel in zip(_context(block, shown), shown, strict=True):
            below = [(GROUPED[panel.picture], getattr(row, panel.picture), panel) for row in block.methods]
            for number, (top, (header, picture, scaled)) in enumerate(zip(tops, [before, *below], strict=True)):
                axis = page.axis(left, top, width, height)
                draw_panel(axis, picture, scaled, block.plane, grid_lines=FEWER_LINES, rasterized=True)
                if number < 2:
                    axis.set_title(header, pad=2, fontsize=6)
            left += width + GAP
        left += GROUP_GAP
    wide = page.figure.get_size_inches()[0]
    bar = page.axis(wide / 2 - BAR_WIDTH / 2, tops[-1] + height + GAP + 0.02, BAR_WIDTH, 0.07)
    draw_scale(bar, replace(shown[-1].scale, label="Jacobian determinant |J|, 1: volume kept, yellow: folded, ≤ 0"))
    return page.figure


def _context(block: Block, shown: list[Panel]) -> list[tuple[str, np.ndarray, Panel]]:
    """Return title, picture and scale of what there was before registration, above each of the three columns."""
    image, _, jacobian = shown
    if block.truth is None:
        third = ("Checkerboard", checkerboard(block.moving, block.fixed), image)
    else:
        third = ("True Jacobian", block.truth.jacobian, jacobian)
    return [("Moving", block.moving, image), ("Fixed", block.fixed, image), third]


def _row_name(example: Example) -> str:
    name = method_name(example.method, short=True)
    name = fill(name, NAME_LENGTH)
    return name if math.isnan(example.dice) else f"{name}\nDice {example.dice:.3f}"
