"""Figures of one pair and of age: surfaces have the bodies' size, planes fit a page, unknown ages are counted."""

from __future__ import annotations

import math
import re
from dataclasses import replace
from pathlib import Path

import numpy as np
import pandas as pd
import pytest
import torch
import yaml
from matplotlib.collections import LineCollection
from mpl_toolkits.mplot3d import Axes3D, proj3d
from mpl_toolkits.mplot3d.art3d import Poly3DCollection
from nibabel.orientations import apply_orientation, axcodes2ornt, inv_ornt_aff, ornt_transform
from scipy.stats import spearmanr

from dmir.errors import InputError
from dmir.fields import warp_labels
from dmir.metrics import dice
from dmir.report.age import age_figure, age_trend, subject_ages
from dmir.report.contours import KNOWN_COLOURS, VIEW, choose_structures, contours_figure, structure_surface
from dmir.report.examples import Example
from dmir.report.qualitative import PAGE_HEIGHT, qualitative_figure
from dmir.report.records import ages_known
from dmir.report.statistics import subject_scores
from dmir.report.style import PAGE_WIDTH, save_figure
from dmir.structures import load_structures, structure_set_names

PLANES = ("axial", "coronal", "sagittal")
DEFAULT = Path(__file__).parents[1] / "config" / "config.yaml"
ALL = tuple(yaml.safe_load(DEFAULT.read_text())["methods"])


# --- surfaces


def _ellipsoid(semiaxes: tuple[float, ...], codes: str = "LPS") -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Return the label map 7 inside an ellipsoid on a grid of unequal voxels, its affine and the middle (RAS mm)."""
    spacing, shape, middle = np.array([1.0, 1.5, 2.0]), (64, 48, 40), np.array([5.0, -12.0, 20.0])
    affine = np.diag([*spacing, 1.0])
    affine[:3, 3] = middle - (np.array(shape) - 1) / 2 * spacing + 0.3
    points = np.stack(np.meshgrid(*map(np.arange, shape), indexing="ij"), -1) @ affine[:3, :3].T + affine[:3, 3]
    labels = np.where((((points - middle) / semiaxes) ** 2).sum(-1) <= 1, 7, 0).astype(np.int32)
    transform = ornt_transform(axcodes2ornt("RAS"), axcodes2ornt(codes))
    return apply_orientation(labels, transform), affine @ inv_ornt_aff(transform, shape), middle


@pytest.mark.parametrize("codes", ["RAS", "LPS", "LAS", "PIR"])
def test_a_sphere_has_its_volume_area_and_place_in_mm(codes):
    labels, affine, middle = _ellipsoid((20, 20, 20), codes)
    surface = structure_surface(labels, 7, affine)
    # positive however the grid is mirrored: triangles are counter-clockwise seen from outside
    assert surface.volume == pytest.approx(4 / 3 * math.pi * 20**3, rel=0.03)
    assert surface.area == pytest.approx(4 * math.pi * 20**2, rel=0.03)
    np.testing.assert_allclose(surface.vertices.mean(axis=0), middle, atol=0.1)
    outwards = surface.triangles.mean(axis=1) - middle
    assert (np.einsum("mk,mk->m", surface.normals, outwards) > 0).all()


def test_an_ellipsoid_lies_along_the_axes_of_the_body():
    semiaxes = (12, 18, 24)
    labels, affine, middle = _ellipsoid(semiaxes, "LPS")
    surface = structure_surface(labels, 7, affine)
    np.testing.assert_allclose(np.abs(surface.vertices - middle).max(axis=0), semiaxes, atol=1.0)
    assert surface.volume == pytest.approx(4 / 3 * math.pi * 12 * 18 * 24, rel=0.04)
    coarse = structure_surface(labels, 7, affine, step=2)
    assert len(coarse.faces) < len(surface.faces) / 3
    assert coarse.volume == pytest.approx(surface.volume, rel=0.08)


def test_a_surface_at_the_border_of_the_grid_is_closed():
    cube = np.ones((12, 12, 12), dtype=np.int32)
    surface = structure_surface(cube, 1, np.eye(4))
    assert surface.volume == pytest.approx(12**3, rel=0.05)
    edges = np.sort(np.concatenate([surface.faces[:, [0, 1]], surface.faces[:, [1, 2]], surface.faces[:, [2, 0]]]))
    assert (np.unique(edges, axis=0, return_counts=True)[1] == 2).all()


def test_what_is_absent_or_too_thin_has_no_surface():
    labels = np.zeros((9, 9, 9), dtype=np.int32)
    labels[4, 4, 4] = 3
    assert structure_surface(labels, 2, np.eye(4)) is None
    assert structure_surface(labels, 3, np.eye(4)) is None


CHOSEN = {
    "oasis28": "caudate hippocampus lateral-ventricle putamen thalamus",
    "seg35": "caudate hippocampus lateral-ventricle putamen thalamus",
    "ixi30": "caudate hippocampus lateral-ventricle putamen thalamus",
    "dk112": "caudate hippocampus lateral-ventricle putamen thalamus",
    "neuromorphometrics": "caudate hippocampus lateral-ventricle putamen thalamus",
    "dk82": "caudate hippocampus putamen thalamus",
    "lpba54": "caudate hippocampus putamen",
    "lpba56": "caudate hippocampus putamen",
}


@pytest.mark.parametrize("name", structure_set_names())
def test_structures_that_readers_know_are_chosen(name):
    structures = load_structures(name)
    every = np.array(structures.ids, dtype=np.int32).reshape(-1, 1, 1)
    chosen = {structures.names[i] for i in choose_structures(structures.names, every)}
    if name == "tissue3":
        assert chosen == {"cerebrospinal fluid"}
    else:
        known = CHOSEN[name].replace("-", " ").replace("lateral ventricle", "lateral_ventricle").split()
        groups = [group.replace("_", " ") for group in known]
        assert chosen == {f"{side} {group}" for side in ("left", "right") for group in groups}


def test_without_those_the_largest_are_chosen_that_are_not_cortex():
    names = {
        1: "left cerebral cortex", 2: "white matter", **{i: f"nucleus {i}" for i in range(3, 12)}, 12: "caudate",
    }  # fmt: skip
    labels = np.repeat(np.arange(1, 12), [500, 400, 3, 9, 4, 8, 5, 7, 6, 2, 1]).reshape(-1, 1, 1)
    assert choose_structures(names, labels) == [4, 6, 8, 9, 7, 5]  # the caudate is absent
    assert choose_structures({1: "cortex", 2: "white matter"}, labels) == [1, 2]  # rather than nothing


# --- the figure of surfaces

NAMES = {1: "left caudate", 2: "right caudate", 3: "left putamen", 4: "third ventricle"}


@pytest.fixture
def bodies() -> tuple[list[Example], np.ndarray, np.ndarray]:
    """Three balls in the fixed scan, two voxels further to the front in the moving one, and four methods."""
    points = np.stack(np.meshgrid(*[np.arange(n) for n in (36, 30, 24)], indexing="ij"), -1)
    fixed, moving = (np.zeros((36, 30, 24), dtype=np.int32) for _ in range(2))
    for structure, centre in {1: (9, 10, 12), 2: (26, 10, 12), 3: (9, 21, 12)}.items():
        for labels, shift in ((fixed, 0), (moving, 2)):
            labels[np.linalg.norm(points - centre - np.array([0, shift, 0]), axis=-1) < 5] = structure
    affine = np.diag([2.0, 2.0, 2.0, 1.0])
    field = np.zeros((3, 36, 30, 24), dtype=np.float32)
    field[1] = 2.0
    examples = [
        Example(method, "none", fixed.astype(np.float32), field * part, affine, "c1", "sub-1", "atlas")
        for method, part in (("affine", 0.0), ("syn", 1.0), ("voxelmorph", 0.4), ("caml", 0.7))
    ]
    return examples, moving, fixed


def _texts(figure) -> list[str]:
    return [text.get_text() for text in figure.texts]


@pytest.mark.parametrize("interpolation", ["nearest", "linear"])
def test_titles_have_the_dice_of_what_is_drawn(bodies, interpolation):
    examples, moving, fixed = bodies
    figure = contours_figure(examples, moving, fixed, NAMES, structures=[1, 3], interpolation=interpolation)
    titles = [text for text in _texts(figure) if "Dice" in text]
    expected = [("Before", moving)]
    for name, example in zip(("SyN", "VoxelMorph", "Proposed"), examples[1:], strict=True):
        field = torch.from_numpy(example.displacement)[None]
        expected.append((name, warp_labels(torch.from_numpy(moving)[None, None], field, interpolation)[0, 0].numpy()))
    assert titles == [
        f"{name}\nDice {np.mean(list(dice(labels, fixed, [1, 3]).values())):.3f}" for name, labels in expected
    ]
    assert titles[1] == "SyN\nDice 1.000"  # the field undoes the shift
    assert sum(isinstance(axis, Axes3D) for axis in figure.axes) == 4  # affine is "Before" already


def test_surfaces_stay_within_their_panels_and_letters_tell_directions(bodies):
    examples, moving, fixed = bodies
    figure = contours_figure(examples, moving, fixed, NAMES, structures=[1, 2, 3])
    figure.canvas.draw()
    width, height = figure.get_size_inches()
    assert width == PAGE_WIDTH
    affine = examples[0].affine
    surfaces = [structure_surface(labels, i, affine) for labels in (moving, fixed) for i in (1, 2, 3)]
    vertices = np.concatenate([surface.vertices for surface in surfaces]).T
    panels = [axis for axis in figure.axes if isinstance(axis, Axes3D)]
    for place, axis in enumerate(panels):
        (collection,) = (c for c in axis.collections if isinstance(c, Poly3DCollection))
        assert collection.get_rasterized()
        flat = np.stack(proj3d.proj_transform(*vertices, axis.get_proj())[:2], -1)
        seen = axis.transData.transform(flat) / figure.dpi  # inches
        box = axis.get_position()
        column = PAGE_WIDTH / 4
        part = (seen - [place * column, box.y0 * height]) / [column, box.height * height]
        assert part.min() >= 0
        assert part.max() <= 1
        assert np.ptp(part, axis=0).max() > 0.9  # as large as fits
        np.testing.assert_allclose(flat, np.stack(proj3d.proj_transform(*vertices, panels[0].get_proj())[:2], -1))
    texts = [t.get_window_extent() for t in (*figure.texts, *figure.axes[-1].texts, *figure.legends[0].get_texts())]
    assert not [(a, b) for i, a in enumerate(texts) for b in texts[:i] if a.overlaps(b)]
    assert all(t.x0 >= 0 and t.y0 >= 0 and t.x1 <= figure.bbox.x1 and t.y1 <= figure.bbox.y1 for t in texts)
    # a step to the right of the body goes in the panels where the letters say
    small = figure.axes[-1]
    letters = {text.get_text(): np.array(text.get_position()) for text in small.texts}
    assert set(letters) == set("LRPAIS")
    matrix = panels[0].get_proj()
    for direction, (back, front) in enumerate(("LR", "PA", "IS")):
        ends = np.array([[36.0, 30, 24], np.array([36.0, 30, 24]) + np.eye(3)[direction]]).T
        x, y, _ = proj3d.proj_transform(*ends, matrix)
        seen = np.array([x[1] - x[0], y[1] - y[0]])
        named = letters[front] - letters[back]
        assert seen @ named / np.linalg.norm(seen) / np.linalg.norm(named) == pytest.approx(1, abs=1e-3)
    np.testing.assert_allclose(VIEW @ VIEW.T, np.eye(3), atol=1e-12)


def test_left_and_right_share_a_colour_that_the_legend_names(bodies):
    examples, moving, fixed = bodies
    legend = contours_figure(examples, moving, fixed, NAMES, structures=[1, 2, 3]).legends[0]
    assert [text.get_text() for text in legend.get_texts()] == ["Caudate", "Putamen", "Fixed scan"]
    colours = [patch.get_facecolor()[:3] for patch in legend.get_patches()[:2]]
    named = [tuple(int(KNOWN_COLOURS[n][i : i + 2], 16) / 255 for i in (1, 3, 5)) for n in ("caudate", "putamen")]
    np.testing.assert_allclose(colours, named)


def test_what_a_scan_lacks_is_left_out_and_told(bodies):
    examples, moving, fixed = bodies
    without = np.where(moving == 3, 0, moving)
    figure = contours_figure(examples, without, fixed, NAMES, structures=[1, 3, 4])
    headline = _texts(figure)[0].replace("\n", " ")
    assert headline.startswith("c1: sub-1 (moving) to atlas (fixed). Left out: left putamen (not in the moving scan)")
    assert "third ventricle (not in the moving and the fixed scan)" in headline
    assert f"Before\nDice {dice(without, fixed, [1])[1]:.3f}" in _texts(figure)
    with pytest.raises(InputError, match="third ventricle: not in the moving and the fixed scan"):
        contours_figure(examples, moving, fixed, NAMES, structures=[4])
    with pytest.raises(InputError, match="structures: found 9"):
        contours_figure(examples, moving, fixed, NAMES, structures=[9])
    with pytest.raises(InputError, match="the moving label map"):
        contours_figure(examples, moving[1:], fixed, NAMES)
    with pytest.raises(InputError, match="one example a method"):
        contours_figure([], moving, fixed, NAMES)


def test_a_structure_that_a_method_loses_overlaps_by_nothing(bodies):
    examples, moving, fixed = bodies
    away = replace(examples[1], displacement=np.full_like(examples[1].displacement, 100.0))
    figure = contours_figure([examples[0], away], moving, fixed, NAMES, structures=[1])
    assert "SyN\nDice 0.000" in _texts(figure)


def test_equal_surfaces_are_equal_files(bodies, tmp_path):
    examples, moving, fixed = bodies
    for name in ("a", "b"):
        save_figure(contours_figure(examples[:2], moving, fixed, NAMES), tmp_path / name)
    for suffix in (".png", ".svg"):
        assert (tmp_path / f"a{suffix}").read_bytes() == (tmp_path / f"b{suffix}").read_bytes()


# --- three planes


@pytest.fixture
def brain() -> tuple[np.ndarray, np.ndarray]:
    """An egg of a brain on a LPS grid of 4 mm, and its affine."""
    affine = np.diag([-4.0, -4.0, 4.0, 1.0])
    affine[:3, 3] = [72, 90, -70]
    points = np.stack(np.meshgrid(*[np.arange(n) for n in (36, 45, 36)], indexing="ij"), -1) - [18, 22, 18]
    inside = ((points / [16, 20, 15]) ** 2).sum(-1) <= 1
    return np.where(inside, 0.5, 0).astype(np.float32), affine


def _examples(image: np.ndarray, affine: np.ndarray, methods: tuple[str, ...] = ALL) -> list[Example]:
    field = np.random.default_rng(3).normal(0, 0.6, (3, *image.shape)).astype(np.float32)
    return [
        Example(method, "none", image, field * i / len(methods), affine, "c1", "sub-1", "atlas", 0.6 + i / 100)
        for i, method in enumerate(methods)
    ]


@pytest.mark.parametrize("with_truth", [False, True])
def test_all_methods_in_three_planes_fit_a_page(brain, with_truth):
    image, affine = brain
    examples = _examples(image, affine)
    truth = examples[-1].displacement if with_truth else None
    figure = qualitative_figure(examples, image, image, planes=PLANES, truth=truth)
    width, height = figure.get_size_inches()
    assert width <= PAGE_WIDTH + 0.01
    assert height <= PAGE_HEIGHT + 0.01
    panels, scales = figure.axes[:-1], figure.axes[-1:]
    assert len(panels) == 3 * 3 * (len(ALL) + 1)
    boxes = np.array([axis.get_position().extents * [width, height, width, height] for axis in figure.axes])
    first, second = np.triu_indices(len(boxes), 1)
    across = np.minimum(boxes[first, 2], boxes[second, 2]) - np.maximum(boxes[first, 0], boxes[second, 0])
    along = np.minimum(boxes[first, 3], boxes[second, 3]) - np.maximum(boxes[first, 1], boxes[second, 1])
    assert not ((across > 1e-6) & (along > 1e-6)).any()
    assert (boxes[:-1, 3] - boxes[:-1, 1] > 0.6).all()  # inches: readable
    # nothing that is written leaves the page or runs into another text
    figure.canvas.draw()
    renderer = figure.canvas.get_renderer()
    words = [t for t in (*figure.texts, *(axis.title for axis in panels), scales[0].xaxis.label) if t.get_text()]
    extents = [text.get_window_extent(renderer) for text in words]
    assert all(e.x0 >= 0 and e.y0 >= 0 for e in extents)
    assert all(e.x1 <= figure.bbox.x1 and e.y1 <= figure.bbox.y1 for e in extents)
    assert not [(a, b) for i, a in enumerate(extents) for b in extents[:i] if a.overlaps(b)]


def test_every_plane_has_image_grid_and_jacobian_and_names_its_sides(brain):
    image, affine = brain
    figure = qualitative_figure(_examples(image, affine), image, image, planes=PLANES)
    texts = " ".join(_texts(figure))
    for name in ("axial, z = ", "coronal, y = ", "sagittal, x = ", "Affine only\nDice 0.600", "c1: sub-1 (moving)"):
        assert name in texts
    titles = [axis.get_title() for axis in figure.axes]
    for header in ("Warped", "Grid", "Jacobian", "Moving", "Fixed", "Checkerboard"):
        assert titles.count(header) == 3
    letters = [text.get_text() for axis in figure.axes for text in axis.texts]
    assert {letter: letters.count(letter) for letter in "LRPA"} == {"L": 30, "R": 30, "P": 15, "A": 15}
    assert "yellow: folded" in figure.axes[-1].get_xlabel()
    grids = [c for axis in figure.axes[:-1] for c in axis.collections if isinstance(c, LineCollection)]
    assert len(grids) == 3 * len(ALL)
    assert all(lines.get_rasterized() for lines in grids)
    jacobians = [axis.images[0] for axis in figure.axes[:-1] if axis.images and axis.images[0].norm.vmax == 2]
    assert len(jacobians) == 3 * len(ALL)
    assert {(picture.norm.vmin, picture.norm.vmax) for picture in jacobians} == {(0, 2)}  # centred at 1
    folds = sum(int((picture.get_array() == -1).sum()) for picture in jacobians)
    assert folds > 0  # what folds takes the colour beneath the scale


def test_the_slice_that_is_asked_for_is_shown(brain):
    image, affine = brain  # LPS: RAS x = 35 - i, y = 44 - j
    image = image.copy()
    image[12, 17, 20] = 9.0  # x = 23, y = 27, z = 20 on the RAS grid
    shown = {"axial": 20, "coronal": 27, "sagittal": 23}
    for index, seen in ((shown, True), ({name: i + 2 for name, i in shown.items()}, False)):
        figure = qualitative_figure(_examples(image, affine, ALL[:5]), image, image, planes=PLANES, index=index)
        warped = [axis.images[0].get_array() for axis in figure.axes if axis.get_title() == "Warped"]
        assert [bool(picture.max() == 9.0) for picture in warped] == [seen] * 3
    assert "axial, z = 18 mm" in _texts(figure)  # slice 22 of 4 mm, from -70 mm


def test_few_methods_keep_all_pictures_in_every_plane(brain):
    image, affine = brain
    figure = qualitative_figure(_examples(image, affine, ALL[:2]), image, image, planes=PLANES)
    assert [axis.get_title() for axis in figure.axes].count("|Warped − fixed|") == 3
    one = qualitative_figure(_examples(image, affine), image, image, planes=["axial"])
    assert [axis.get_title() for axis in one.axes].count("|Warped − fixed|") == 1


def test_equal_planes_are_equal_files(brain, tmp_path):
    image, affine = brain
    for name in ("a", "b"):
        figure = qualitative_figure(_examples(image, affine, ALL[:5]), image, image, planes=PLANES)
        save_figure(figure, tmp_path / name)
    assert (tmp_path / "a.svg").read_bytes() == (tmp_path / "b.svg").read_bytes()
    assert (tmp_path / "a.png").read_bytes() == (tmp_path / "b.png").read_bytes()


# --- age


def _cohort(ages: list[str], dice_of: dict[str, list[float]]) -> tuple[pd.DataFrame, pd.DataFrame, pd.DataFrame]:
    """Return the scores of one structure and the scans of a cohort whose subjects have these ages."""
    scans = pd.DataFrame(
        [("atlas", "atlas", "", "atlas"), *((f"s{i}", f"s{i}", age, "test") for i, age in enumerate(ages))],
        columns=["scan", "subject", "age", "split"],
    )
    structures, pairs = [], []
    for method, values in dice_of.items():
        for i, value in enumerate(values):
            key = {"cohort": "c1", "method": method, "model": "none", "moving": f"s{i}", "fixed": "atlas"}
            for labels, shift in (("nearest", 0.0), ("linear", 0.1)):
                structures.append(
                    {**key, "structure": 1, "name": "x", "labels": labels, "dice": value + shift, "hd95": 1.0}
                )
            fields = ["nonpositive_jacobian_forward", "nonpositive_jacobian_central", "nondiffeomorphic_volume"]
            fields += ["sdlogj", "endpoint_error", "seconds", "peak_memory_mb"]
            tc = [f"tc_{kind}{labels}" for kind in ("", "deviation_") for labels in ("nearest", "linear")]
            pairs.append({**key, "status": "ok", "reason": "", **dict.fromkeys([*fields, *tc], 1.0)})
    return pd.DataFrame(structures), pd.DataFrame(pairs), scans


def test_rho_and_trend_of_numbers_by_hand():
    ages = np.array([20.0, 30, 40, 50, 60])
    trend = age_trend(ages, np.array([0.9, 0.8, 0.85, 0.7, 0.6]))
    assert trend.rho == pytest.approx(1 - 6 * (0 + 1 + 1 + 0 + 0) / (5 * 24) - 2 * (1 - 6 * 2 / 120))  # -0.9
    assert math.isnan(trend.slope)  # with five subjects one of them would decide
    assert math.isnan(age_trend(ages[:4], np.array([0.9, 0.8, 0.85, 0.7])).rho)
    line = 0.9 - 0.002 * np.arange(20.0, 80, 5)
    line[3] = 0.1  # one that failed does not turn the line
    trend = age_trend(np.arange(20.0, 80, 5), line)
    assert trend.slope == pytest.approx(-0.002)
    assert trend.intercept == pytest.approx(np.median(line) + 0.002 * 47.5)
    assert trend.rho == pytest.approx(spearmanr(np.arange(12), line).statistic)
    assert math.isnan(age_trend(np.full(12, 40.0), line).slope)
    assert math.isnan(age_trend(ages, np.full(5, 0.5)).rho)


def _points(figure, label: str) -> tuple[np.ndarray, np.ndarray]:
    (line,) = (line for line in figure.axes[0].lines if str(line.get_label()).startswith(label))
    return np.asarray(line.get_xdata(), float), np.asarray(line.get_ydata(), float)


def test_subjects_are_drawn_at_their_age_and_those_without_are_counted():
    values = {"syn": [0.8, 0.7, 0.6, 0.5, 0.4, 0.3, 0.2], "caml": [0.9, 0.7, 0.8, 0.5, 0.6, 0.3, 0.2]}
    ages = ["20", "34", "", "50", "n/a", "64.5", "80"]
    figure = age_figure(*_cohort(ages, values), ["syn", "caml"])
    x, y = _points(figure, "SyN")
    np.testing.assert_allclose(x, [20, 34, 50, 64.5, 80], atol=1.0)
    np.testing.assert_allclose(y, [0.8, 0.7, 0.5, 0.3, 0.2])
    assert "2 of 7 subjects left out: age not known" in figure.axes[0].get_xlabel()
    legend = figure.legends[0]
    assert [text.get_text() for text in legend.get_texts()] == ["SyN, ρ = −1.00", "Proposed, ρ = −1.00"]
    assert "n = 5 subjects" in legend.get_title().get_text()
    _, linear = _points(age_figure(*_cohort(ages, values), ["syn"], labels="linear"), "SyN")
    np.testing.assert_allclose(linear, y + 0.1)


def test_rho_and_trends_wait_for_enough_subjects():
    generator = np.random.default_rng(0)
    for n, lines, with_rho in ((4, 0, False), (9, 0, True), (10, 1, True)):
        figure = age_figure(*_cohort([str(30 + 3 * i) for i in range(n)], {"syn": list(generator.random(n))}), [])
        assert ("ρ" in figure.legends[0].get_texts()[0].get_text()) == with_rho
        assert len(figure.axes[0].lines) == 1 + lines


def test_all_methods_stand_side_by_side_and_subjects_do_not_mix():
    ages = ["30", "31", "33", "60", "60"]
    values = {method: [0.5 + 0.01 * i] * 5 for i, method in enumerate(ALL)}
    figure = age_figure(*_cohort(ages, values), list(ALL))
    points = np.array([line.get_xdata() for line in figure.axes[0].lines])  # (method, subject)
    assert len(np.unique(points[:, 0])) == len(ALL)
    assert points[:, 0].max() < points[:, 1].min()
    np.testing.assert_allclose(points.mean(axis=0), [30, 31, 33, 60, 60])
    labels = [text.get_text() for text in figure.legends[0].get_texts()]
    assert labels == ["Affine only", "SyN", "Elastix", "Descent", "VoxelMorph", "ViT-V-Net", "TransMorph", "XMorpher",
                      "TransMatch", "Pyramid", "Proposed", "Proposed + refinement"]  # fmt: skip


def test_a_cohort_without_ages_says_so(tmp_path):
    structures, pairs, scans = _cohort(["", "old", "999"], {"syn": [0.5, 0.6, 0.7]})
    assert not ages_known(scans)
    for table in (scans, scans.drop(columns="age")):
        figure = age_figure(structures, pairs, table, ["syn"])
        assert [text.get_text() for text in figure.axes[0].texts] == ["c1: no ages known for this cohort"]
    assert not ages_known(scans.drop(columns="age"))
    assert ages_known(scans.assign(age="40"))
    assert not ages_known(scans.assign(age=["40", "", "", ""]))  # the atlas's alone
    save_figure(figure, tmp_path / "a")
    assert "no ages known" in re.sub(r"<[^>]+>", "", (tmp_path / "a.svg").read_text())


def test_ages_of_a_subject_with_several_scans_are_averaged():
    structures, pairs, scans = _cohort(["40", "44", "60"], {"syn": [0.5, 0.7, 0.9]})
    scans = scans.assign(subject=["atlas", "a", "a", "b"])
    ages = subject_ages(subject_scores(structures, pairs, scans, "dice"), scans)
    assert ages.to_dict() == {"a": 42.0, "b": 60.0}
    # pairs from an atlas belong to the fixed scan's subject
    turned = {"moving": "fixed", "fixed": "moving"}
    scores = subject_scores(structures.rename(columns=turned), pairs.rename(columns=turned), scans, "dice")
    assert subject_ages(scores, scans).to_dict() == {"a": 42.0, "b": 60.0}


def test_equal_ages_are_equal_files(tmp_path: Path):
    cohort = _cohort(["30", "40"], {"syn": [0.5, 0.6]})
    for name in ("a", "b"):
        save_figure(age_figure(*cohort, ["syn"]), tmp_path / name)
    assert (tmp_path / "a.svg").read_bytes() == (tmp_path / "b.svg").read_bytes()
    assert (tmp_path / "a.png").read_bytes() == (tmp_path / "b.png").read_bytes()
