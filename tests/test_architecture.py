"""The drawn architecture and the table of sizes say what the network is."""

import importlib.util
import itertools
import math
import re
import sys
from pathlib import Path
from xml.etree import ElementTree

import pytest
from matplotlib.text import Text

ROOT = Path(__file__).parents[1]
SCRIPT = ROOT / "docs" / "figures" / "draw_architecture.py"


@pytest.fixture(scope="module")
def script():
    spec = importlib.util.spec_from_file_location("draw_architecture", SCRIPT)
    module = importlib.util.module_from_spec(spec)
    sys.modules["draw_architecture"] = module  # dataclasses look their module up
    spec.loader.exec_module(module)
    yield module
    del sys.modules["draw_architecture"]


@pytest.fixture(scope="module")
def anatomy(script):
    return script.read_anatomy()


@pytest.fixture(scope="module")
def figure(script, anatomy):
    return script.draw(anatomy)


def texts(figure):
    return [text for text in figure.findobj(Text) if text.get_text() and text.get_visible()]


def lines(figure):
    return sorted(line for text in texts(figure) for line in text.get_text().split("\n"))


def table_of_sizes():
    """The rows of the table in docs/method.md, level -> cells."""
    section = (ROOT / "docs" / "method.md").read_text().split("## Sizes at 160x192x224")[1]
    table = [line for line in section.split("\n\n")[2].splitlines() if line.startswith("|")]
    header, _, *rows = ([cell.strip() for cell in row.strip("|").split("|")] for row in table)
    return {row[0]: dict(zip(header, row, strict=True)) for row in rows}


def channels(cell):
    """The only number in a shape such as (2B, ..., 48) that is no multiple of the batch."""
    return int(re.search(r"(?<![\dB])(\d+)(?!B|\d)", cell)[1])


def test_the_network_has_the_sizes_of_the_method_page(anatomy):
    table = table_of_sizes()
    assert [*anatomy.levels, "field"] == list(table)
    for index, (name, sizes) in enumerate(zip(anatomy.levels, anatomy.encoder, strict=True)):
        row = table[name]
        assert row["grid"] == "x".join(map(str, sizes.grid))
        assert channels(row["encoder"]) == sizes.channels
        assert row["encoder"].startswith("(2B, ...") == bool(sizes.heads)  # tokens: channels last
        if index < len(anatomy.decoder):
            assert anatomy.decoder[index].grid == sizes.grid
            assert channels(row["decoder"]) == anatomy.decoder[index].channels
        else:
            assert row["decoder"] == ""
        if sizes.heads:
            windows = [math.ceil(n / edge) for n, edge in zip(sizes.grid, anatomy.window, strict=True)]
            keys = math.prod(w + 2 * m for w, m in zip(anatomy.window, anatomy.margin, strict=True))
            numbers = [row[column] for column in ("tokens", "base windows", "keys a window")]
            assert numbers == [f"{n:,}" for n in (math.prod(sizes.grid), math.prod(windows), keys)]
    assert table["field"]["grid"] == table["1"]["grid"]
    assert channels(table["field"]["decoder"]) == anatomy.components


def test_every_size_stands_in_the_figure(figure, anatomy):
    shown = [text.get_text() for text in texts(figure)]
    for stages, part in ((2, anatomy.encoder), (2, anatomy.decoder)):
        for sizes in part:
            label = f"{sizes.channels} ch" + (f", {sizes.heads} heads" if sizes.heads else "")
            above = f"CAML ×{sizes.depth}" if sizes.heads else "convolution"
            assert shown.count(f"{above}\n{label}") >= stages
    for name, sizes in zip(anatomy.levels, anatomy.encoder, strict=True):
        assert name in shown
        assert any(text.startswith("×".join(map(str, sizes.grid))) for text in shown)
    assert any(f"{anatomy.parameters:,}" in text for text in shown)
    assert shown.count("RBSC") == 2 * anatomy.residual_skips == 2 * len(anatomy.decoder)
    assert shown.count("residual block\n+ gate") == anatomy.cascaded == 3
    assert "WAD: search windows 6×6×6, 216 keys" in shown
    assert any("152 of 216" in text for text in shown)  # 6^3 less the 4^3 inside


def test_no_text_touches_another_or_leaves_the_figure(figure):
    renderer = figure.canvas.get_renderer()
    boxes = [(text.get_text(), text.get_window_extent(renderer)) for text in texts(figure)]
    for text, extent in boxes:
        assert extent.x0 > 0 and extent.y0 > 0, text
        assert extent.x1 < figure.bbox.x1 and extent.y1 < figure.bbox.y1, text
    touching = [(a, b) for (a, one), (b, other) in itertools.combinations(boxes, 2) if one.overlaps(other)]
    assert touching == []


def test_the_drawing_is_the_same_every_time_and_the_one_that_is_shown(script, anatomy, figure):
    assert lines(script.draw(anatomy)) == lines(figure)
    tree = ElementTree.parse(SCRIPT.with_name("architecture.svg"))
    shown = ["".join(text.itertext()).strip() for text in tree.iter("{http://www.w3.org/2000/svg}text")]
    assert sorted(shown) == lines(figure), "run `make architecture`"
    assert SCRIPT.with_name("architecture.png").is_file()
