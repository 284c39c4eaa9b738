"""Draw the proposed network from the network itself: ``docs/figures/architecture.svg`` and ``.png``.

    python docs/figures/draw_architecture.py

Every number in the figure is read from ``build("caml", (160, 192, 224))`` while it works on tensors without contents,
so that the figure cannot say anything else than the network does.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import matplotlib as mpl
import torch
from matplotlib.axes import Axes
from matplotlib.colors import to_rgb
from matplotlib.figure import Figure
from matplotlib.patches import Circle, FancyArrowPatch, FancyBboxPatch, Rectangle
from torch import nn
from torch._subclasses.fake_tensor import FakeTensorMode

from dmir.networks import build
from dmir.networks.attention import WindowMultiheadCrossAttention
from dmir.networks.blocks import ResidualBlock
from dmir.networks.caml import CAML, CascadeAttention
from dmir.networks.fusion import AttentionLevel
from dmir.report.style import RC, new_figure, save_figure

SHAPE = (160, 192, 224)
WIDTH, HEIGHT = 10.2, 8.45  # inches; the axes count in inches too

# Okabe and Ito's palette
CONVOLUTION, ATTENTION, RESIDUAL, CASCADE = "#56b4e9", "#d55e00", "#009e73", "#cc79a7"
FIELD, IMAGE, QUERY, KEY, INK = "#e69f00", "#8c8c8c", "#0072b2", "#d55e00", "#222222"

TOP = 6.93  # height of the row of images and fields
ROW = 0.56  # from level to level
BOX = 0.36  # height of a level's box
ENCODER, SKIP, DECODER = 0.0, 1.48, 2.36  # left edges within a stage
LEVEL_WIDTH, SKIP_WIDTH = 1.26, 0.66
STAGES = (1.42, 6.34)  # left edges
CASCADE_WIDTH = 0.92
Point = tuple[float, float]


# --- what the network says of itself ---


@dataclass(frozen=True)
class Sizes:
    """What one module works on: its grid, its channels, and, of cross attention, its blocks and heads."""

    grid: tuple[int, ...]
    channels: int
    depth: int = 0
    heads: int = 0


@dataclass(frozen=True)
class Anatomy:
    """The sizes of a stage, level by level from full resolution, and of what links the stages."""

    encoder: list[Sizes]
    decoder: list[Sizes]
    residual_skips: int
    cascaded: int
    components: int
    window: tuple[int, ...]
    margin: tuple[int, ...]
    parameters: int

    @property
    def levels(self) -> list[str]:
        """The levels' names: 1, 1/2, ..."""
        return [f"1/{2**index}" if index else "1" for index in range(len(self.encoder))]


def read_anatomy(shape: tuple[int, int, int] = SHAPE) -> Anatomy:
    """Build the network and let its first stage register two images, all without contents; note each level."""
    shapes: dict[str, tuple[int, ...]] = {}

    def note(name: str) -> Any:
        return lambda module, inputs, output: shapes.update({name: tuple(output.shape)})

    with FakeTensorMode(), torch.no_grad():
        network = build("caml", shape).eval()
        assert isinstance(network, CAML) and network.second is not None
        encoder, decoder = network.first.encoder, network.first.decoder
        names = ["detail_full", "detail_half", *(f"levels.{index}" for index in range(len(encoder.levels)))]
        upward = ["to_full", "to_half", *(f"levels.{index}" for index in range(len(decoder.levels)))]
        parts = {f"encoder {name}": encoder.get_submodule(name) for name in names}
        parts |= {f"decoder {name}": decoder.get_submodule(name) for name in upward} | {"head": decoder.head}
        for name, part in parts.items():
            part.register_forward_hook(note(name))
        network.first(torch.empty(1, 1, *shape), torch.empty(1, 1, *shape))
    assert _signature(decoder) == _signature(network.second.decoder), "the figure draws equal stages"
    attention = next(m for m in encoder.modules() if isinstance(m, WindowMultiheadCrossAttention))
    return Anatomy(
        encoder=[_sizes(parts[f"encoder {name}"], shapes[f"encoder {name}"]) for name in names],
        decoder=[_sizes(parts[f"decoder {name}"], shapes[f"decoder {name}"]) for name in upward],
        residual_skips=sum(isinstance(module, ResidualBlock) for module in decoder.modules()),
        cascaded=sum(isinstance(module, CascadeAttention) for module in network.second.encoder.modules()),
        components=shapes["head"][1],
        window=attention.window,
        margin=attention.margin,
        parameters=sum(p.numel() for p in network.parameters()),
    )


def _signature(module: nn.Module) -> list[tuple[str, torch.Size]]:
    return [(name, p.shape) for name, p in module.named_parameters()]


def _sizes(part: nn.Module, shape: tuple[int, ...]) -> Sizes:
    if not isinstance(part, AttentionLevel):  # a volume (B, C, D, H, W)
        return Sizes(shape[2:], shape[1])
    heads = next(m.heads for m in part.modules() if isinstance(m, WindowMultiheadCrossAttention))
    return Sizes(shape[1:4], shape[4], len(part.blocks), heads)  # tokens (B, D, H, W, C)


def level_label(sizes: Sizes) -> str:
    """Return what stands at the left of a level, beside its name."""
    grid = "×".join(map(str, sizes.grid))
    return grid + (f"\n{math.prod(sizes.grid):,} tokens" if sizes.heads else "")


def box_label(sizes: Sizes) -> str:
    """Return what stands in the box of a level."""
    if sizes.heads:
        return f"CAML ×{sizes.depth}\n{sizes.channels} ch, {sizes.heads} heads"
    return f"convolution\n{sizes.channels} ch"


# --- what is drawn with ---


def tint(colour: str, strength: float = 0.22) -> tuple[float, float, float]:
    """Mix a colour with white."""
    red, green, blue = (1 - strength * (1 - part) for part in to_rgb(colour))
    return red, green, blue


def box(
    axes: Axes, corner: Point, size: Point, text: str, colour: str, twin: bool = False, fontsize: float = 8.0
) -> None:
    """Draw a rounded box with its text; a twin has a second one behind it."""
    x, y = corner
    style = "round,pad=0,rounding_size=0.05"
    for shift in ((0.05, 0.05), (0.0, 0.0)) if twin else ((0.0, 0.0),):
        axes.add_patch(
            FancyBboxPatch(
                (x + shift[0], y + shift[1]), *size, boxstyle=style, facecolor=tint(colour), edgecolor=colour, lw=1.0
            )
        )
    write(axes, (x + size[0] / 2, y + size[1] / 2), text, fontsize=fontsize)


def write(axes: Axes, place: Point, text: str, **style: Any) -> None:
    """Write text, centred unless told otherwise."""
    style = {"ha": "center", "va": "center", "color": INK, "fontsize": 7.5, "linespacing": 1.15, **style}
    if "\n" not in text and style["va"] == "center":  # a word's descenders are not to lift it above its neighbours
        style["va"] = "center_baseline"
        place = (place[0], place[1] + 0.0022 * style["fontsize"])
    axes.text(*place, text, **style)


def arrow(axes: Axes, *points: Point, colour: str = INK, dashed: bool = False, curve: float = 0.0) -> None:
    """Draw an arrow along a line of points; with two points it may be curved."""
    line: dict[str, Any] = {"color": colour, "lw": 1.0, "linestyle": (0, (3, 1.5)) if dashed else "-"}
    if len(points) > 2:
        axes.plot(*zip(*points[:-1], strict=True), solid_joinstyle="round", solid_capstyle="butt", zorder=1, **line)
    axes.add_patch(
        FancyArrowPatch(
            *points[-2:],
            arrowstyle="-|>,head_length=3.2,head_width=1.6",
            connectionstyle=f"arc3,rad={curve}",
            shrinkA=0,
            shrinkB=0,
            mutation_scale=1,
            zorder=1,
            **line,
        )
    )


def node(axes: Axes, centre: Point, sign: str, colour: str = INK) -> None:
    """Draw a small circle with a sign: a sum or a product."""
    axes.add_patch(Circle(centre, 0.085, facecolor="white", edgecolor=colour, lw=1.0, zorder=2))
    axes.plot(*centre, marker={"+": "+", "×": "x"}[sign], color=colour, markersize=5.5, markeredgewidth=1.0, zorder=3)


def heading(axes: Axes, place: Point, letter: str, text: str) -> None:
    """Write a panel's letter and title."""
    write(axes, place, letter, fontsize=11, fontweight="bold", ha="left")
    write(axes, (place[0] + 0.2, place[1]), text, fontsize=9, ha="left")


# --- panel a: the two stages ---


def level_height(index: int) -> float:
    """Return the lower edge of a level's boxes."""
    return TOP - 0.78 - ROW * index


def draw_levels(axes: Axes, anatomy: Anatomy) -> None:
    """Draw the levels' bands and names across both stages."""
    for index, (name, sizes) in enumerate(zip(anatomy.levels, anatomy.encoder, strict=True)):
        y = level_height(index)
        if index % 2 == 0:
            band = (0.08, y - (ROW - BOX) / 2 + 0.02)
            axes.add_patch(Rectangle(band, WIDTH - 0.16, ROW, facecolor="#f4f4f4", edgecolor="none", zorder=0))
        write(axes, (0.16, y + BOX / 2 + 0.02), name, fontsize=8.5, fontweight="bold", ha="left")
        write(axes, (0.88, y + BOX / 2 + 0.02), level_label(sizes), fontsize=7.5)


def draw_stage(axes: Axes, anatomy: Anatomy, left: float, number: int) -> None:
    """Draw the encoder, the skips and the decoder of a stage."""
    last = len(anatomy.encoder) - 1
    encoder, skip, decoder = left + ENCODER, left + SKIP, left + DECODER
    middle = LEVEL_WIDTH / 2
    for index, sizes in enumerate(anatomy.encoder):
        y = level_height(index)
        colour = ATTENTION if sizes.heads else CONVOLUTION
        box(axes, (encoder, y), (LEVEL_WIDTH, BOX), box_label(sizes), colour, twin=True)
        if index < last:
            arrow(axes, (encoder + middle, y), (encoder + middle, y - ROW + BOX + 0.05))
        if index and anatomy.encoder[index].heads:  # the finer level, max-pooled
            arrow(axes, (encoder + 0.2, y + ROW), (encoder + 0.2, y + BOX + 0.05), colour=ATTENTION, dashed=True)
    for index, sizes in enumerate(anatomy.decoder):
        y = level_height(index)
        colour = ATTENTION if sizes.heads else CONVOLUTION
        box(axes, (decoder, y), (LEVEL_WIDTH, BOX), box_label(sizes), colour, twin=bool(sizes.heads))
        box(axes, (skip, y + 0.06), (SKIP_WIDTH, BOX - 0.12), "RBSC", RESIDUAL, twin=True, fontsize=7.5)
        arrow(axes, (encoder + LEVEL_WIDTH + 0.05, y + BOX / 2), (skip, y + BOX / 2))
        arrow(axes, (skip + SKIP_WIDTH + 0.05, y + BOX / 2), (decoder, y + BOX / 2))
        if index < last - 1:
            below = y - ROW + BOX + (0.05 if anatomy.decoder[index + 1].heads else 0.0)
            arrow(axes, (decoder + middle, below), (decoder + middle, y))
        if sizes.heads == 0 and anatomy.decoder[index + 1].heads:
            write(axes, (decoder + middle + 0.06, y - 0.082), "side by side", fontsize=7, ha="left")
    bottom = level_height(last) + BOX / 2
    arrow(
        axes,
        (encoder + LEVEL_WIDTH + 0.05, bottom),
        (decoder + middle, bottom),
        (decoder + middle, level_height(last - 1)),
    )
    write(axes, (skip + SKIP_WIDTH / 2, bottom + 0.09), f"stage {number}", fontsize=9, fontweight="bold")


def draw_images_and_fields(axes: Axes, anatomy: Anatomy) -> None:
    """Draw what goes into the stages and what comes out: images, fields, warp and composition."""
    first, second = STAGES
    height, half = 0.28, LEVEL_WIDTH / 2
    inputs = {first: ("moving", "fixed"), second: ("warped", "fixed")}
    for left, (moving, fixed) in inputs.items():
        for x, text in ((left - 0.06, moving), (left + half + 0.06, fixed)):
            box(axes, (x, TOP), (0.6, height), text, IMAGE)
            arrow(axes, (x + 0.3, TOP), (x + 0.3, level_height(0) + BOX + 0.05))
    for left, text in ((first, "u₁"), (second, "u₂")):
        middle = left + DECODER + half
        box(axes, (middle - 0.26, TOP), (0.52, height), text, FIELD, fontsize=9)
        arrow(axes, (middle, level_height(0) + BOX), (middle, TOP))
        write(
            axes,
            (middle + 0.06, (level_height(0) + BOX + TOP) / 2),
            f"head, {anatomy.components} ch",
            fontsize=7.5,
            ha="left",
        )
    middle = first + DECODER + half
    warp = (second + first + DECODER + LEVEL_WIDTH) / 2
    box(axes, (warp - 0.3, TOP), (0.6, height), "warp", FIELD)
    box(axes, (warp - 0.3, TOP + 0.45), (0.6, height), "moving", IMAGE)
    arrow(axes, (warp, TOP + 0.45), (warp, TOP + height))
    arrow(axes, (middle + 0.26, TOP + height / 2), (warp - 0.3, TOP + height / 2))
    arrow(axes, (warp + 0.3, TOP + height / 2), (second - 0.06, TOP + height / 2))
    lane = TOP + 0.98
    right = second + DECODER + half
    box(axes, (right - 1.05, lane - 0.15), (1.66, 0.3), "u(x) = u₂(x) + u₁(x + u₂(x))", FIELD)
    arrow(axes, (middle, TOP + height), (middle, lane), (right - 1.05, lane))
    arrow(axes, (right, TOP + height), (right, lane - 0.15))
    grid = "×".join(map(str, anatomy.decoder[0].grid))
    write(
        axes,
        (right - 0.08, TOP + 0.55),
        f"displacement ({anatomy.components}, {grid}), voxels",
        fontsize=7.5,
        ha="right",
    )


def draw_cascade(axes: Axes, anatomy: Anatomy) -> None:
    """Draw what stage 1 hands to stage 2, level by level."""
    start = STAGES[0] + DECODER + LEVEL_WIDTH
    x = (start + 0.05 + STAGES[1]) / 2 - CASCADE_WIDTH / 2
    coarsest = len(anatomy.decoder) - anatomy.cascaded
    for index in range(coarsest, len(anatomy.decoder)):
        y = level_height(index)
        box(axes, (x, y), (CASCADE_WIDTH, BOX), "residual block\n+ gate", CASCADE, twin=True, fontsize=7.5)
        arrow(axes, (start + 0.05, y + BOX / 2), (x, y + BOX / 2))
        arrow(axes, (x + CASCADE_WIDTH + 0.05, y + BOX / 2), (STAGES[1], y + BOX / 2))
    write(axes, (x + CASCADE_WIDTH / 2, level_height(coarsest) + BOX + 0.2), "CARSC", fontsize=8, fontweight="bold")
    note = "moving tokens\nwarped by u₁"
    write(axes, (x + CASCADE_WIDTH / 2, level_height(len(anatomy.decoder)) + BOX / 2), note, fontsize=7.5)


# --- panel b: the feature fusion module ---


def draw_fusion(axes: Axes) -> None:
    """Draw a CAML block: four cross-attention computations with one set of weights, fusion, perceptron."""
    rows = (2.42, 1.92, 1.28, 0.78)  # centres of: moving <- finer fixed, moving <- fixed, fixed <- moving, ...
    inputs = ("finer fixed", "moving", "fixed", "finer moving")
    answers = ("moving ← finer fixed", "moving ← fixed", "fixed ← moving", "fixed ← finer moving")
    frame = FancyBboxPatch((1.94, 0.5), 1.34, 2.26, boxstyle="round,pad=0,rounding_size=0.06")
    frame.set(facecolor="none", edgecolor=ATTENTION, linewidth=1.0, linestyle=(0, (1, 1.5)))
    axes.add_patch(frame)
    write(axes, (2.61, 1.6), "one set of weights", fontsize=7, color="#a34700", style="italic")
    for y, source, answer in zip(rows, inputs, answers, strict=True):
        finer = source.startswith("finer")
        box(axes, (0.1, y - 0.14), (0.74, 0.28), source, IMAGE, fontsize=7)
        box(
            axes,
            (0.97, y - 0.17),
            (0.66, 0.34),
            "max-pool,\nnorm, linear" if finer else "norm",
            ATTENTION,
            fontsize=6.5,
        )
        box(axes, (2.02, y - 0.19), (1.18, 0.38), f"W-MCA\n{answer}", ATTENTION, fontsize=7)
        arrow(axes, (0.84, y), (0.97, y))
    for asking, answering, across, up in ((1, 2, 0, 0.07), (2, 1, 3, -0.07)):  # up: away from the other image's rows
        arrow(axes, (1.63, rows[asking]), (2.02, rows[asking] + up), colour=QUERY)
        arrow(axes, (1.63, rows[asking]), (2.02, rows[across] - up), colour=QUERY)
        arrow(axes, (1.63, rows[answering]), (2.02, rows[asking] - up), colour=KEY)
        arrow(axes, (1.63, rows[across]), (2.02, rows[across] + up), colour=KEY)
    for name, (upper, lower), side in (("moving", rows[:2], 1), ("fixed", rows[2:], -1)):
        draw_sums(axes, name, (upper, lower), side)
    write(axes, (0.97, 0.48), "query", fontsize=7, color=QUERY, ha="left", fontweight="bold")
    write(axes, (1.35, 0.48), "key, value", fontsize=7, color=KEY, ha="left", fontweight="bold")
    note = "finer: the encoder's next finer level, in the decoder too; for the finest, the convolutions above it"
    write(axes, (0.1, 0.31), note, fontsize=7, ha="left")


def draw_sums(axes: Axes, name: str, rows: Point, side: int) -> None:
    """Draw how one image's two answers are fused, added and passed through the perceptron."""
    y = sum(rows) / 2
    box(axes, (3.38, y - 0.19), (0.48, 0.38), "fusion,\nlinear", ATTENTION, fontsize=7)
    for row in rows:
        arrow(axes, (3.2, row), (3.38, y + (0.08 if row > y else -0.08)))
    node(axes, (4.05, y), "+")
    write(axes, (4.05, y + side * 0.42), name, fontsize=7)
    arrow(axes, (4.05, y + side * 0.34), (4.05, y + side * 0.085))
    arrow(axes, (3.86, y), (3.965, y))
    box(axes, (4.29, y - 0.19), (0.66, 0.38), "norm,\nperceptron", ATTENTION, fontsize=7)
    arrow(axes, (4.135, y), (4.29, y))
    node(axes, (5.14, y), "+")
    arrow(axes, (4.95, y), (5.055, y))
    arrow(axes, (4.2, y), (4.2, y + side * 0.3), (5.14, y + side * 0.3), (5.14, y + side * 0.085))
    arrow(axes, (5.225, y), (5.38, y))


# --- panel c: windows ---


def draw_windows(axes: Axes, anatomy: Anatomy, left: float) -> None:
    """Draw a slice of tokens with base windows, and the search windows round them in the other image."""
    cell, extent = 0.094, 10
    base, margin = anatomy.window[1:], anatomy.margin[1:]
    bottom, right = 1.52, left + 1.1
    corners = [
        (base[0], extent - 2 * base[1]),
        (extent - base[0], 0),
    ]  # of an inner base window, and of one at the border
    for x, title in ((left, "queries: moving"), (right, "keys, values: fixed")):
        write(axes, (x + extent * cell / 2, bottom + extent * cell + 0.12), title, fontsize=7)
        for i, j in ((i, j) for i in range(extent) for j in range(extent)):
            place = (x + i * cell, bottom + j * cell)
            axes.add_patch(Rectangle(place, cell, cell, facecolor="white", edgecolor="#cccccc", lw=0.4, zorder=1))
    for i, j in corners:
        size = [cell * (edge + 2 * more) for edge, more in zip(base, margin, strict=True)]
        place = (right + (i - margin[0]) * cell, bottom + (j - margin[1]) * cell)
        draw_search_window(axes, place, size, (right, bottom), extent * cell)
        for x in (left, right):
            place = (x + i * cell, bottom + j * cell)
            style: dict[str, Any] = {
                "facecolor": tint(QUERY, 0.6) if x == left else "none",
                "edgecolor": QUERY,
                "lw": 1.2,
                "zorder": 3,
            }
            axes.add_patch(Rectangle(place, cell * base[0], cell * base[1], **style))
    for line, text in enumerate(window_notes(anatomy)):
        write(axes, (left, 1.2 - 0.18 * line), text, fontsize=7, ha="left", va="top")


def draw_search_window(axes: Axes, place: Point, size: Sequence[float], grid: Point, edge: float) -> None:
    """Draw a search window; what lies beyond the grid is hatched."""
    axes.add_patch(Rectangle(place, *size, facecolor="white", edgecolor=KEY, lw=0.0, hatch="//////", zorder=0.5))
    low = [max(p, g) for p, g in zip(place, grid, strict=True)]
    high = [min(p + s, g + edge) for p, s, g in zip(place, size, grid, strict=True)]
    inside = (low[0], low[1]), high[0] - low[0], high[1] - low[1]
    axes.add_patch(Rectangle(*inside, facecolor=(*to_rgb(KEY), 0.25), edgecolor="none", zorder=2))
    axes.add_patch(Rectangle(place, *size, facecolor="none", edgecolor=KEY, lw=1.2, zorder=3))


def window_notes(anatomy: Anatomy) -> list[str]:
    """Return the lines under the windows."""
    search = [edge + 2 * more for edge, more in zip(anatomy.window, anatomy.margin, strict=True)]
    keys = math.prod(search)
    in_corner = keys - math.prod(edge + more for edge, more in zip(anatomy.window, anatomy.margin, strict=True))
    return [
        f"WD: base windows {'×'.join(map(str, anatomy.window))}, {math.prod(anatomy.window)} queries",
        f"WAD: search windows {'×'.join(map(str, search))}, {keys} keys",
        "W-MCA: softmax(Q Kᵀ / √d) V in each head",
        f"keys beyond the border (hatched) have no weight;\nin a corner {in_corner} of {keys}",
    ]


# --- panel d: residual block and gate ---


def draw_residual_block(axes: Axes, x: float) -> None:
    """Draw RBSC's block, from top to bottom."""
    write(axes, (x, 2.68), "residual block", fontsize=7.5)
    heights = (2.12, 1.74, 1.36)
    for y, text in zip(heights, ("conv 3×3×3", "LeakyReLU", "conv 3×3×3"), strict=True):
        box(axes, (x - 0.33, y), (0.66, 0.24), text, RESIDUAL, fontsize=7)
    arrow(axes, (x, 2.56), (x, 2.36))
    arrow(axes, (x, 2.12), (x, 1.98))
    arrow(axes, (x, 1.74), (x, 1.6))
    arrow(axes, (x, 1.36), (x, 1.165))
    node(axes, (x, 1.08), "+")
    arrow(axes, (x, 2.47), (x - 0.45, 2.47), (x - 0.45, 1.08), (x - 0.085, 1.08))
    arrow(axes, (x, 0.995), (x, 0.8))


def draw_gate(axes: Axes, x: float) -> None:
    """Draw CARSC's gate, from top to bottom: stage 2 decides how much of stage 1 comes in."""
    write(axes, (x, 2.68), "gate", fontsize=7.5)
    for place, text in ((x - 0.27, "stage 1"), (x + 0.27, "stage 2")):
        write(axes, (place, 2.5), text, fontsize=7)
        box(axes, (place - 0.21, 2.02), (0.42, 0.24), "linear", CASCADE, fontsize=7)
        arrow(axes, (place, 2.43), (place, 2.26))
        arrow(axes, (place, 2.02), (place, 1.9))
    box(axes, (x - 0.42, 1.52), (0.84, 0.38), "sum, ReLU,\nlinear, sigmoid", CASCADE, fontsize=7)
    node(axes, (x, 1.26), "×")
    arrow(axes, (x, 1.52), (x, 1.345))
    arrow(axes, (x - 0.27, 2.37), (x - 0.57, 2.37), (x - 0.57, 1.26), (x - 0.085, 1.26))
    node(axes, (x, 0.98), "+")
    arrow(axes, (x, 1.175), (x, 1.065))
    arrow(axes, (x + 0.27, 2.37), (x + 0.57, 2.37), (x + 0.57, 0.98), (x + 0.085, 0.98))
    arrow(axes, (x, 0.895), (x, 0.75))


def draw_legend(axes: Axes) -> None:
    """Explain colours, doubled boxes and dashed arrows."""
    x = 0.16
    entries = {
        "convolutions": CONVOLUTION,
        "cross attention (CAML)": ATTENTION,
        "residual skip (RBSC)": RESIDUAL,
        "cascade (CARSC)": CASCADE,
        "field, warp": FIELD,
    }
    for text, colour in entries.items():
        box(axes, (x, 0.06), (0.2, 0.12), "", colour)
        write(axes, (x + 0.26, 0.115), text, fontsize=7, ha="left")
        x += 0.4 + 0.0515 * len(text)
    box(axes, (x, 0.04), (0.2, 0.12), "", IMAGE, twin=True)
    write(axes, (x + 0.31, 0.115), "moving and fixed, shared weights", fontsize=7, ha="left")
    x += 2.12
    arrow(axes, (x, 0.115), (x + 0.3, 0.115), colour=ATTENTION, dashed=True)
    write(axes, (x + 0.36, 0.115), "finer level, max-pooled", fontsize=7, ha="left")


def draw(anatomy: Anatomy) -> Figure:
    """Draw the network."""
    with mpl.rc_context(RC):
        figure = new_figure(WIDTH, HEIGHT, layout="none")
        axes = figure.add_axes((0.0, 0.0, 1.0, 1.0))
        axes.set(xlim=(0, WIDTH), ylim=(0, HEIGHT), aspect="equal")
        axes.axis("off")
        heading(
            axes,
            (0.1, HEIGHT - 0.16),
            "a",
            f"two stages, each with a twin encoder and decoder: {anatomy.parameters:,} parameters",
        )
        draw_levels(axes, anatomy)
        for number, left in enumerate(STAGES, start=1):
            draw_stage(axes, anatomy, left, number)
        draw_images_and_fields(axes, anatomy)
        draw_cascade(axes, anatomy)
        heading(axes, (0.1, 3.0), "b", "CAML: the feature fusion module and its block")
        draw_fusion(axes)
        heading(axes, (5.55, 3.0), "c", "windows (a slice)")
        draw_windows(axes, anatomy, 5.58)
        heading(axes, (7.95, 3.0), "d", "RBSC and CARSC")
        draw_residual_block(axes, 8.42)
        draw_gate(axes, 9.52)
        draw_legend(axes)
    return figure


def main() -> None:
    """Read the network, draw it, write both files."""
    for path in save_figure(draw(read_anatomy()), Path(__file__).with_name("architecture")):
        print(path.name)


if __name__ == "__main__":
    main()
