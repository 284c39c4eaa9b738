"""Structures as surfaces: how the moving scan's fit into the fixed scan's, before and after registration."""

from __future__ import annotations

import re
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from textwrap import fill

import matplotlib as mpl
import numpy as np
import torch
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.patches import Patch
from mpl_toolkits.mplot3d import Axes3D  # type: ignore[import-untyped]
from mpl_toolkits.mplot3d.art3d import Poly3DCollection  # type: ignore[import-untyped]
from scipy import ndimage
from skimage.measure import marching_cubes

from dmir.errors import InputError
from dmir.fields import warp_labels
from dmir.metrics import dice
from dmir.metrics.boxes import bounding_box
from dmir.report.examples import Example, require_one_pair
from dmir.report.names import REFERENCE_METHODS, method_name, structure_group
from dmir.report.style import PAGE_WIDTH, RC, TOL_COLOURS, new_figure

# what most sets have, what readers know, and what is smooth enough to be seen on a small picture
PREFERRED = r"(lateral ventricle|thalamus|caudate|putamen|hippocampus)( proper| nucleus)?"
UNSUITED = r"cortex|cortical|matter|cerebrum"  # they hide all others
MOST = 6  # structures, where none is preferred
SMOOTHING = 0.6  # sides of a cube: rounds the steps of a mask
DETAIL = 2.0  # mm: what a small picture can show
COLUMNS = 4
ELEVATION, AZIMUTH = 22.0, 55.0  # degrees: seen from the front, a little from the right and from above
LIGHT = np.array([0.15, 0.45, 0.88])  # where light comes from, RAS
AMBIENT = 0.35  # share of the light that comes from everywhere
# Okabe and Ito's palette (https://jfly.uni-koeln.de/color/), what is neither grey nor close to it
KNOWN_COLOURS = {
    "lateral ventricle": "#0072b2",
    "thalamus": "#f0e442",
    "caudate": "#009e73",
    "putamen": "#cc79a7",
    "hippocampus": "#d55e00",
}
COLOURS = (*KNOWN_COLOURS.values(), "#56b4e9", "#e69f00", *TOL_COLOURS)
FIXED_COLOUR = (0.45, 0.45, 0.45, 0.16)
TOP, HEADLINE = 0.25, 0.12  # inches of height: above the panels, and each further line there
TITLE, LEGEND = 0.3, 0.62
WIDTH, LOWEST, HIGHEST = PAGE_WIDTH / COLUMNS, 1.0, 1.7  # of a panel, and what its height may be


def view_axes(elevation: float, azimuth: float) -> np.ndarray:
    """Return what points to the right, up and to the viewer (3, 3), a row each, RAS, of mplot3d's view in degrees."""
    e, a = np.radians([elevation, azimuth])
    return np.array(
        [
            [-np.sin(a), np.cos(a), 0.0],
            [-np.sin(e) * np.cos(a), -np.sin(e) * np.sin(a), np.cos(e)],
            [np.cos(e) * np.cos(a), np.cos(e) * np.sin(a), np.sin(e)],
        ]
    )


ZOOM = 0.5 / 0.2974  # mplot3d shows half the side of a cube as so much of its square, and leaves the rest to ticks
VIEW = view_axes(ELEVATION, AZIMUTH)


@dataclass(frozen=True, eq=False)
class Surface:
    """A closed surface of triangles.

    Attributes
    ----------
    vertices
        (n, 3), RAS mm.
    faces
        (m, 3): the vertices of each triangle, counter-clockwise seen from outside.
    """

    vertices: np.ndarray
    faces: np.ndarray

    @property
    def triangles(self) -> np.ndarray:
        """The corners (m, 3, 3) of each triangle, RAS mm."""
        corners: np.ndarray = self.vertices[self.faces]
        return corners

    @property
    def normals(self) -> np.ndarray:
        """A vector (m, 3) a triangle: it points outwards and is twice as long as the triangle is large, mm^2."""
        first, second, third = self.triangles.transpose(1, 0, 2)
        return np.cross(second - first, third - first)

    @property
    def area(self) -> float:
        """The area, mm^2."""
        return float(np.linalg.norm(self.normals, axis=1).sum() / 2)

    @property
    def volume(self) -> float:
        """The volume inside, mm^3, by the divergence theorem: sum of a . (b x c) / 6 over the triangles."""
        return float(np.einsum("mk,mk->", self.triangles[:, 0], self.normals) / 6)


def structure_surface(labels: np.ndarray, structure: int, affine: np.ndarray, step: int = 1) -> Surface | None:
    """Return the surface of one structure: marching cubes at one half of its smoothed mask.

    Parameters
    ----------
    labels
        Label map (D, H, W).
    structure
        Its id.
    affine
        4x4 voxel-to-RAS matrix, mm.
    step
        Voxels a cube: larger ones give fewer triangles.

    Returns
    -------
    Surface or None
        None where the structure is absent, or too thin to have a surface.

    References
    ----------
    T. Lewiner et al., Efficient implementation of marching cubes' cases with topological guarantees, Journal of
    Graphics Tools 8(2), 2003.
    """
    mask = labels == structure
    if not mask.any():
        return None
    box = bounding_box(mask)
    margin = 3 * step  # no smoothed mask reaches further, and a surface at the grid's border is closed
    smooth = ndimage.gaussian_filter(np.pad(mask[box].astype(np.float32), margin), SMOOTHING * step)
    if smooth.max() <= 0.5:
        return None
    vertices, faces, _, _ = marching_cubes(smooth, 0.5, step_size=step)
    vertices = vertices - margin + [side.start for side in box]
    if np.linalg.det(affine[:3, :3]) > 0:
        faces = faces[:, ::-1]  # scikit-image's triangles are clockwise; a mirrored grid turns them over
    return Surface(vertices @ affine[:3, :3].T + affine[:3, 3], faces)


def choose_structures(names: Mapping[int, str], labels: np.ndarray) -> list[int]:
    """Return the structures to draw where nobody chose: what readers know, or else what is large.

    Lateral ventricles, thalamus, caudate, putamen and hippocampus, as far as they are present; where none is, the six
    largest that are not cortex or white matter.

    Parameters
    ----------
    names
        id -> name of every structure of the set.
    labels
        A label map (D, H, W).
    """
    voxels = {structure: int(np.count_nonzero(labels == structure)) for structure in names}
    present = [structure for structure in names if voxels[structure]]
    preferred = [i for i in present if re.fullmatch(PREFERRED, structure_group(names[i]), re.IGNORECASE)]
    if preferred:
        return preferred
    suited = [i for i in present if not re.search(UNSUITED, names[i], re.IGNORECASE)] or present
    return sorted(suited, key=lambda structure: -voxels[structure])[:MOST]


@mpl.rc_context(RC)
def contours_figure(
    examples: Sequence[Example],
    moving_labels: np.ndarray,
    fixed_labels: np.ndarray,
    names: Mapping[int, str],
    *,
    structures: Sequence[int] | None = None,
    interpolation: str = "nearest",
) -> Figure:
    """Draw structures of one pair as surfaces: the moving scan's in colour within the fixed scan's in grey.

    The first panel is before deformable registration, then comes one a method; each names the mean Dice of what is
    drawn. Left and right have one colour. All panels have one view, one light and one scale; letters tell directions.

    Parameters
    ----------
    examples
        One a method, in the order of the panels, all of the same pair on the same grid. A method that only is the
        starting point of the others is the first panel already.
    moving_labels, fixed_labels
        Label maps (D, H, W) on that grid, the moving one before deformable registration.
    names
        id -> name of the structures.
    structures
        Ids of those to draw; :func:`choose_structures` by default. One that either scan lacks is left out, and the
        figure says so.
    interpolation
        How labels are warped: nearest or linear.

    Raises
    ------
    InputError
        No example, examples of several pairs or grids, a label map on another grid, a structure that the set does not
        have, or none that both scans have.
    """
    shapes = {"the moving label map": moving_labels.shape, "the fixed label map": fixed_labels.shape}
    require_one_pair(examples, shapes)
    wanted = choose_structures(names, fixed_labels) if structures is None else list(structures)
    drawn, left_out = _present(wanted, moving_labels, fixed_labels, names)
    affine = np.asarray(examples[0].affine, dtype=np.float64)
    step = max(1, round(DETAIL / float(np.linalg.norm(affine[:3, :3], axis=0).min())))

    def surfaces(labels: np.ndarray) -> dict[int, Surface]:
        found = {structure: structure_surface(labels, structure, affine, step) for structure in drawn}
        return {structure: surface for structure, surface in found.items() if surface is not None}

    fixed = surfaces(fixed_labels)
    panels = []
    for title, labels in _warped(examples, moving_labels, interpolation):
        overlap = np.nan_to_num(list(dice(labels, fixed_labels, drawn).values()))  # one that vanished overlaps by 0
        panels.append((f"{title}\nDice {overlap.mean():.3f}", surfaces(labels)))
    return _draw(panels, fixed, _colours(drawn, names), _headline(examples[0], left_out))


def _present(
    wanted: Sequence[int], moving_labels: np.ndarray, fixed_labels: np.ndarray, names: Mapping[int, str]
) -> tuple[list[int], dict[str, str]]:
    """Return the structures that both scans have, and by name why the others are left out."""
    unknown = sorted(set(wanted) - set(names))
    if unknown:
        known = ", ".join(map(str, names))
        raise InputError("structures", found=", ".join(map(str, unknown)), expected=f"ids of the set: {known}")
    drawn, left_out = [], {}
    for structure in dict.fromkeys(wanted):
        scans = {"moving": moving_labels, "fixed": fixed_labels}
        without = [scan for scan, labels in scans.items() if not (labels == structure).any()]
        if without:
            left_out[names[structure]] = f"not in the {' and the '.join(without)} scan"
        else:
            drawn.append(structure)
    if not drawn:
        found = "; ".join(f"{name}: {why}" for name, why in left_out.items()) or "no structure"
        raise InputError(
            "structures", found=found, expected="at least one structure that both scans have",
            remedy="Choose others, or check the label maps.",
        )  # fmt: skip
    return drawn, left_out


def _warped(examples: Sequence[Example], labels: np.ndarray, interpolation: str) -> Iterator[tuple[str, np.ndarray]]:
    """Yield the title and the label map of each panel, one at a time."""
    yield "Before", labels
    batch = torch.from_numpy(np.ascontiguousarray(labels))[None, None]
    for example in examples:
        if example.method not in REFERENCE_METHODS:
            displacement = torch.from_numpy(np.ascontiguousarray(example.displacement))[None]
            warped = warp_labels(batch, displacement, interpolation)[0, 0].numpy()
            yield method_name(example.method, short=True), warped


def _colours(drawn: Sequence[int], names: Mapping[int, str]) -> dict[int, tuple[str, str]]:
    """Return the group, for the legend, and the colour of each structure; left and right share both."""
    groups = list(dict.fromkeys(structure_group(names[structure]) for structure in drawn))
    known = {group: re.fullmatch(PREFERRED, group, re.IGNORECASE) for group in groups}
    colours = {group: KNOWN_COLOURS[match[1].lower()] for group, match in known.items() if match}
    free = [colour for colour in COLOURS if colour not in colours.values()]
    others = [group for group in groups if group not in colours]
    colours |= {group: free[place % len(free)] for place, group in enumerate(others)}
    return {structure: (group, colours[group]) for structure in drawn for group in [structure_group(names[structure])]}


def _headline(example: Example, left_out: Mapping[str, str]) -> str:
    pair = f"{example.cohort}: {example.moving} (moving) to {example.fixed} (fixed)"
    without = "; ".join(f"{name} ({why})" for name, why in left_out.items())
    return fill(f"{pair}. Left out: {without}", 120) if without else pair


@dataclass(frozen=True)
class _Frame:
    """What all panels show: a cube around ``centre`` (RAS mm) of half a side ``radius``, ``height`` inches tall."""

    centre: np.ndarray
    radius: float
    height: float


def _frame(surfaces: Iterable[Surface]) -> _Frame:
    """Frame all surfaces as they are seen, as large as a panel's width allows."""
    seen = np.concatenate([surface.vertices for surface in surfaces]) @ VIEW.T
    lowest, highest = seen.min(axis=0), seen.max(axis=0)
    wide, tall, _ = 1.04 * (highest - lowest) / 2
    height = float(np.clip(WIDTH * tall / wide, LOWEST, HIGHEST))
    return _Frame((lowest + highest) / 2 @ VIEW, max(float(tall), float(wide) * height / WIDTH), height)


def _draw(
    panels: Sequence[tuple[str, dict[int, Surface]]],
    fixed: dict[int, Surface],
    colours: Mapping[int, tuple[str, str]],
    headline: str,
) -> Figure:
    """Draw the panels, and below them the names of the colours and of the directions."""
    frame = _frame([surface for surfaces in (fixed, *(drawn for _, drawn in panels)) for surface in surfaces.values()])
    top, row_height = TOP + HEADLINE * headline.count("\n"), TITLE + frame.height
    height = top - (-len(panels) // COLUMNS) * row_height + LEGEND
    figure = new_figure(PAGE_WIDTH, height, layout=None)
    figure.text(0.01, 1 - 0.04 / height, headline, va="top", fontsize=7)
    for place, (title, surfaces) in enumerate(panels):
        row, column = divmod(place, COLUMNS)
        middle, under = (column + 0.5) / COLUMNS, top + row * row_height
        figure.text(middle, 1 - (under + TITLE / 2) / height, title, ha="center", va="center", fontsize=7)
        # mplot3d draws into a square; what is wider than that is not clipped
        side = frame.height / PAGE_WIDTH
        bottom = 1 - (under + row_height) / height
        axis = figure.add_axes((middle - side / 2, bottom, side, frame.height / height), projection="3d")
        _draw_surfaces(axis, surfaces, fixed, colours, frame)
    handles = [Patch(color=colour, label=group) for group, colour in dict(colours.values()).items()]
    handles.append(Patch(facecolor=mpl.colors.to_rgba(FIXED_COLOUR, 0.4), label="Fixed scan"))
    figure.legend(handles=handles, loc="center left", bbox_to_anchor=(0.12, LEGEND / 2 / height), ncols=4)
    _draw_directions(figure.add_axes((0.01, 0, LEGEND / PAGE_WIDTH, LEGEND / height)))
    return figure


def _draw_surfaces(
    axis: Axes3D,
    moving: dict[int, Surface],
    fixed: dict[int, Surface],
    colours: Mapping[int, tuple[str, str]],
    frame: _Frame,
) -> None:
    """Draw all surfaces of a panel at once: triangles of one collection hide one another as they should."""
    shown = [(surface, FIXED_COLOUR) for surface in fixed.values()]
    shown += [(surface, mpl.colors.to_rgba(colours[structure][1])) for structure, surface in moving.items()]
    triangles, faces = zip(*(_facing(surface, colour) for surface, colour in shown), strict=True)
    collection = Poly3DCollection(
        np.concatenate(triangles), facecolors=np.concatenate(faces), linewidths=0, antialiased=False, rasterized=True
    )
    collection.set_clip_on(False)
    axis.add_collection3d(collection, autolim=False)
    axis.set_proj_type("ortho")
    axis.view_init(ELEVATION, AZIMUTH)
    limits = [(middle - frame.radius, middle + frame.radius) for middle in frame.centre]
    axis.set(xlim=limits[0], ylim=limits[1], zlim=limits[2])
    axis.set_box_aspect((1, 1, 1), zoom=ZOOM)
    axis.set_axis_off()


def _facing(surface: Surface, colour: tuple[float, float, float, float]) -> tuple[np.ndarray, np.ndarray]:
    """Return the triangles that the viewer sees, and their colours (RGBA): Lambert's law with light all around."""
    lengths = np.linalg.norm(surface.normals, axis=1, keepdims=True)
    normals = surface.normals / np.maximum(lengths, 1e-12)
    seen = normals @ VIEW[2] > 0
    light = AMBIENT + (1 - AMBIENT) * np.clip(normals[seen] @ (LIGHT / np.linalg.norm(LIGHT)), 0, 1)
    faces = np.tile(np.asarray(colour), (int(seen.sum()), 1))
    faces[:, :3] *= light[:, None]
    return surface.triangles[seen], faces


def _draw_directions(axis: Axes) -> None:
    """Draw the three axes of the body as the panels show them, with letters at their ends."""
    axis.set(xlim=(-1.6, 1.6), ylim=(-1.6, 1.6), aspect="equal")
    axis.set_axis_off()
    for direction, (negative, positive) in enumerate((("L", "R"), ("P", "A"), ("I", "S"))):
        right, up = VIEW[:2, direction]
        axis.plot([-right, right], [-up, up], color="#555555", linewidth=0.7)
        length = np.hypot(right, up)
        for letter, sign in ((negative, -1), (positive, 1)):
            place = sign * (1 + 0.3 / length)
            axis.text(place * right, place * up, letter, ha="center", va="center", fontsize=6.5)
