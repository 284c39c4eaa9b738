"""The qualitative figure: one pair, every method, what the eye can judge."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from textwrap import fill

import matplotlib as mpl
import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure

from dmir.errors import InputError
from dmir.report.examples import Example
from dmir.report.names import method_name
from dmir.report.panels import Panel, checkerboard, draw_panel, draw_scale, shared_panels
from dmir.report.pictures import Pictures, make_pictures
from dmir.report.planes import Plane, affine_to_ras, brain_of, choose_plane, field_to_ras, scalar_to_ras
from dmir.report.style import PAGE_WIDTH, RC, new_figure

PAGE_HEIGHT = 9.4  # inches, what a caption leaves of a page
# inches: the names of the rows, a line of titles, between two panels, a scale with its numbers
NAMES, TITLE, GAP, SCALE = 0.44, 0.17, 0.04, 0.36
NAME_LENGTH = 14  # letters of a row's name in a line: a row is no longer than that


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

    Parameters
    ----------
    examples
        One a method, in the order of the rows, all of the same pair on the same grid.
    moving, fixed
        The images (D, H, W) on that grid, the moving one before deformable registration.
    planes
        Of sagittal, coronal and axial; each is a block of rows. More than one suits a few methods only.
    index
        The slice to cut, counted on the RAS grid, by plane; the brain's middle by default.
    truth
        The true field (3, D, H, W) in voxels.

    Raises
    ------
    InputError
        No example, examples of several pairs or grids, an image on another grid, or an unknown plane.
    """
    _check(examples, moving, fixed, truth)
    blocks = _blocks(examples, moving, fixed, planes, index, truth)
    panels = shared_panels(
        [row for block in blocks for row in block.methods],
        [block.truth for block in blocks if block.truth is not None],
        [image for block in blocks for image in (block.fixed, block.moving)],
    )
    page = _lay_out(blocks, len(panels), len(examples))
    top = TITLE
    for block in blocks:
        top = _draw_context(page, top, block, panels, examples[0])
        top += TITLE
        for number, (row, example) in enumerate(zip(block.methods, examples, strict=True)):
            page.name_row(_row_name(example), top, page.tall(block.plane))
            for column, panel in enumerate(panels):
                axis = page.axis(column, top, page.tall(block.plane))
                draw_panel(axis, getattr(row, panel.picture), panel, block.plane)
                if number == 0:
                    axis.set_title(panel.header, pad=2, fontsize=7)
            top += page.tall(block.plane) + GAP
        top += TITLE
    for column, panel in enumerate(panels):
        if panel.bar:
            draw_scale(page.axis(column, top - TITLE + 0.02, 0.07, inset=0.08), panel.scale)
    return page.figure


def _check(examples: Sequence[Example], moving: np.ndarray, fixed: np.ndarray, truth: np.ndarray | None) -> None:
    if not examples:
        raise InputError("examples", found="none", expected="one example a method")
    first = examples[0]
    for example in examples[1:]:
        where = f"the example of {example.method}"
        if (example.moving, example.fixed) != (first.moving, first.fixed):
            found, expected = (f"the pair {e.moving} to {e.fixed}" for e in (example, first))
            raise InputError(where, found=found, expected=f"{expected}, as the other examples")
        if not np.allclose(example.affine, first.affine, atol=1e-3):
            raise InputError(where, found="another affine", expected="the grid of the other examples")
    shapes = {f"the example of {example.method}": example.warped.shape for example in examples}
    shapes |= {"the moving image": moving.shape, "the fixed image": fixed.shape}
    if truth is not None:
        shapes["the true field"] = truth.shape[1:]
    for where, shape in shapes.items():
        if shape != first.warped.shape:
            raise InputError(where, found=f"shape {shape}", expected=f"the grid of the examples, {first.warped.shape}")


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
    cell: float  # width of a panel

    def tall(self, plane: Plane) -> float:
        return self.cell * plane.size[1] / plane.size[0]

    def axis(self, column: int, top: float, height: float, inset: float = 0.0) -> Axes:
        """Add an axis in a column, narrower by ``inset`` of its width on either side."""
        width, tall = self.figure.get_size_inches()
        left = NAMES + column * (self.cell + GAP) + inset * self.cell
        return self.figure.add_axes(
            (left / width, 1 - (top + height) / tall, self.cell * (1 - 2 * inset) / width, height / tall)
        )

    def name_row(self, text: str, top: float, height: float) -> None:
        width, tall = self.figure.get_size_inches()
        self.figure.text(
            (NAMES - 0.05) / width, 1 - (top + height / 2) / tall, text,
            rotation=90, ha="right", va="center", multialignment="center", fontsize=6.5,
        )  # fmt: skip


def _lay_out(blocks: list[Block], columns: int, methods: int) -> _Page:
    """Choose the panels' size: as large as the page's width and height allow."""
    proportions = sum(block.plane.size[1] / block.plane.size[0] for block in blocks) * (methods + 1)
    around = len(blocks) * (2 * TITLE + (methods + 1) * GAP) + SCALE
    across = NAMES + columns * GAP
    cell = min((PAGE_WIDTH - across) / columns, (PAGE_HEIGHT - around) / proportions)
    return _Page(new_figure(across + columns * cell, around + proportions * cell, layout=None), cell)


def _draw_context(page: _Page, top: float, block: Block, panels: list[Panel], example: Example) -> float:
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
        axis = page.axis(column, top, height)
        draw_panel(axis, picture, panel, block.plane)
        axis.set_title(title, pad=2, fontsize=7)
    free = page.axis(len(panels) - 1, top, height)
    free.set_axis_off()
    lines = [example.cohort, f"moving: {example.moving}", f"fixed: {example.fixed}", *block.plane.title.split(", ")]
    free.text(0, 0.5, "\n".join(lines), va="center", fontsize=6, linespacing=1.3, transform=free.transAxes)
    page.name_row("Before", top, height)
    return top + height + GAP


def _row_name(example: Example) -> str:
    name = method_name(example.method, short=True)
    name = fill(name, NAME_LENGTH)
    return name if math.isnan(example.dice) else f"{name}\nDice {example.dice:.3f}"
