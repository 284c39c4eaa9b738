"""How figures look: a colour a method, fonts that survive a column's width, files that are equal when figures are."""

from __future__ import annotations

import colorsys
import math
import zlib
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import matplotlib as mpl
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure

from dmir import registry
from dmir.report.origin import Origin, write_sidecar
from dmir.volumes import atomic_path

# Of rows that are no method of their own name; a method or network names its own (docs/own-method.md). All are of Okabe
# and Ito's palette (https://jfly.uni-koeln.de/color/), of Tol's, or a grey: told apart with any colour vision
ROWS = {
    "descent-fast": ("#ddcc77", "h"),
    "greedy": ("#332288", "D"),
    "convexadam": ("#117733", "H"),
    "caml-refined": ("#8b2500", "*"),  # the proposed one's, darker
}
_OWN = {name: (told.colour, told.marker) for name, told in registry.built_in_facts().items() if told.colour}
METHOD_COLOURS = {name: colour for name, (colour, _) in {**_OWN, **ROWS}.items()}
METHOD_MARKERS = {name: marker for name, (_, marker) in {**_OWN, **ROWS}.items() if marker}
# Tol's muted and vibrant schemes (https://sronpersonalpages.nl/~pault/), without what is close to the colours above
TOL_COLOURS = ("#882255", "#332288", "#999933", "#117733", "#aa4499", "#661100", "#6699cc", "#44aa99", "#555555")
OTHER_COLOURS = tuple(colour for colour in TOL_COLOURS if colour not in METHOD_COLOURS.values())
OTHER_MARKERS = "+x1"

PAGE_WIDTH = 7.2  # inches: two columns of a journal
COLUMN_WIDTH = 3.5
RC: dict[Any, Any] = {
    "font.family": "sans-serif",
    "font.sans-serif": ["DejaVu Sans"],  # comes with matplotlib: the same picture on every machine
    "font.size": 8,
    "axes.titlesize": 8,
    "axes.labelsize": 8,
    "xtick.labelsize": 7,
    "ytick.labelsize": 7,
    "legend.fontsize": 7,
    "legend.frameon": False,
    "axes.spines.top": False,
    "axes.spines.right": False,
    "axes.linewidth": 0.6,
    "xtick.major.width": 0.6,
    "ytick.major.width": 0.6,
    "lines.linewidth": 1.2,
    "grid.linewidth": 0.4,
    "grid.color": "#dddddd",
    "axes.axisbelow": True,
    "figure.facecolor": "white",
    "savefig.facecolor": "white",
}
VECTOR_RC: dict[Any, Any] = {"svg.fonttype": "none", "svg.hashsalt": "dmir", "pdf.fonttype": 42}


def method_colours(methods: Iterable[str]) -> dict[str, str]:
    """Return a colour for each method, always the same for a method that is known.

    The others get colours that no known method has: which one hangs on the name alone, unless two names of the same
    figure fall on one colour; then the alphabetically later moves on.
    """
    methods = list(dict.fromkeys(methods))
    colours = {method: METHOD_COLOURS[method] for method in methods if method in METHOD_COLOURS}
    for method in sorted(set(methods) - set(colours)):  # what a package's method or network names as its own
        own = registry.colour(method)
        if own is not None and own not in [*METHOD_COLOURS.values(), *colours.values()]:
            colours[method] = own
    free = [colour for colour in OTHER_COLOURS if colour not in colours.values()]
    for method in sorted(set(methods) - set(colours)):
        if free:
            wish = OTHER_COLOURS[zlib.crc32(method.encode()) % len(OTHER_COLOURS)]
            colours[method] = wish if wish in free else free[0]
            free.remove(colours[method])
        else:  # more methods than anyone can tell apart: any distinct hue will do
            colours[method] = mpl.colors.to_hex(colorsys.hsv_to_rgb((len(colours) * 0.618) % 1, 0.55, 0.6))
    return {method: colours[method] for method in methods}


def method_markers(methods: Iterable[str]) -> dict[str, str]:
    """Return a marker for each method, a second way beside the colour to tell them apart."""
    others = [method for method in sorted(set(methods)) if method not in METHOD_MARKERS]
    own = {method: registry.marker(method) for method in others}
    assigned = (method for method in others if not own[method])
    return {
        **METHOD_MARKERS,
        **{method: marker for method, marker in own.items() if marker},
        **{method: OTHER_MARKERS[i % len(OTHER_MARKERS)] for i, method in enumerate(assigned)},
    }


def new_figure(width: float, height: float, layout: Any = "constrained") -> Figure:
    """Return an empty figure, size in inches, that needs no display."""
    figure = Figure(figsize=(width, height), layout=layout)
    FigureCanvasAgg(figure)
    return figure


def legend_columns(entries: int, most: int) -> int:
    """Return how many columns a legend above a figure gets, ``most`` at the most: rows of about the same length."""
    return math.ceil(entries / math.ceil(entries / most))


def save_figure(figure: Figure, path: str | Path, *, origin: Origin | None = None) -> list[Path]:
    """Write a figure as .png (200 dpi), .svg (text stays text) and .pdf (fonts inside), each all at once.

    No date and no random identifiers go in: equal figures are equal files.

    Parameters
    ----------
    path
        Without a suffix.
    origin
        What the figure was made from: a line in each file, and a sidecar ``.json`` for all.

    Returns
    -------
    list of Path
        The files, in this order.
    """
    path = Path(path)
    written = []
    with mpl.rc_context(VECTOR_RC):
        for suffix, metadata in _metadata("" if origin is None else origin.line()).items():
            target = path.with_name(path.name + suffix)
            with atomic_path(target) as temporary:
                figure.savefig(temporary, format=suffix[1:], dpi=200, metadata=metadata)
            written.append(target)
    return written if origin is None else [*written, write_sidecar(origin, path, written)]


def _metadata(line: str) -> dict[str, dict[str, str | None]]:
    """Return what each format says about itself: the origin, and neither program nor date."""
    return {
        ".png": {"Software": None, **({"Description": line} if line else {})},
        ".svg": {"Date": None, "Creator": None, **({"Description": line} if line else {})},
        ".pdf": {"CreationDate": None, "Creator": None, "Producer": None, **({"Subject": line} if line else {})},
    }
