"""Registration methods side by side: Dice, HD95, folds, CPU seconds and memory, of every pair in a process of its own.

    python benchmarks/registration.py --out results/registration                       # two simulated scans, embedded
    python benchmarks/registration.py --results results --out results/registration     # embedded cohorts of `make demo`
    python benchmarks/registration.py --pairs pairs.csv --out results/registration \\
        --methods affine syn descent descent-fast=config/descent-fast.yaml greedy convexadam
    python benchmarks/registration.py --results results --cohorts lpba40 --scans S02 S03 --atlas S01 --out lpba40
    python benchmarks/registration.py --grid 160x192x224 --device cuda --methods affine descent --out results/card

A table of pairs has the columns cohort, moving, fixed (names), moving_image, fixed_image, moving_labels, fixed_labels
(files, relative to the table) and, if it likes, structures (for instance lpba56; none: every label of the fixed map).
Images are preprocessed: stripped, aligned affinely, on one grid.

A method is affine, syn, elastix, descent, greedy (of `pip install picsl-greedy`), convexadam (of `pip install --no-deps
convexadam SimpleITK`), or NAME=FILE.yaml, where the file has the key `algorithm`, one of those, and its parameters. syn
here is CC, radius 2, iterations (40, 20, 0): no step at full resolution. What is not installed is left out and told.

Into the folder --out go
records.csv
    A row a pair and method, written as soon as it is done. What is there with the same parameters and threads is not
    done again, except with --again; of each method the parameters of its newest row count.
table.csv, table.md
    Mean and standard deviation over the pairs. Folds in %, where the fixed scan has labels: det <= 0 by forward and by
    central differences, and the non-diffeomorphic volume; `places` of the whole grid by dmir.fields.folded_voxels.
    Beside --reference the difference in Dice, Wilcoxon's signed-rank p, and how many pairs are better.
figure.png, .svg, .pdf
    Dice against CPU seconds: dots are pairs, large marks their means; affine, which takes none, is a line.
settings.json
    Versions, processor, threads and all parameters.

cpu_s, wall_s
    Of the registration alone: no imports, no files. On a machine that does other things read the former.
peak_mb, idle_mb
    Largest resident set of the process in 10^6 bytes, and what libraries and images alone take of it.

With --device cuda methods that know a graphics card compute there, and each pair a second time, warm, which is the one
that counts: ``wall_s`` from host memory to host memory, ``peak_mb`` what torch's allocator gave out.

gflop, moved_gb, roofline_s, roofline_share, bound
    What it was, counted on the card itself (``dmir.training.cost``), the least seconds that the card's measured peaks
    allow for it, and how much of that speed was reached.
"""

from __future__ import annotations

import argparse
import json
import platform
import re
import sys
import tempfile
from collections.abc import Iterable, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor, as_completed
from dataclasses import dataclass, field
from itertools import product
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import pandas as pd
import torch
from measuring import measure_apart, parse_shape, run_main, tell
from pair import describe, knows_cards, missing_library, version_of

from dmir.cohorts import simulated
from dmir.cohorts.pairs import registration_pairs
from dmir.config.reading import read_yaml
from dmir.errors import InputError
from dmir.fields import folded_voxels
from dmir.metrics import score_pair
from dmir.preprocess.files import preprocess_files
from dmir.report.names import method_name
from dmir.report.statistics import signed_rank
from dmir.report.style import PAGE_WIDTH, RC, method_colours, method_markers, mpl, new_figure, save_figure
from dmir.structures import StructureSet, load_structures
from dmir.tables import read_table
from dmir.volumes import atomic_path, read_labels

METHODS = ("affine", "syn", "descent", "greedy", "convexadam")
PARAMETERS: dict[str, dict[str, Any]] = {"syn": {"metric": "CC", "radius": 2, "iterations": [40, 20, 0]}}
NAMES = {"greedy": "greedy", "convexadam": "ConvexAdam"}
PAIR = ["cohort", "moving", "fixed"]
FILES = ["moving_image", "fixed_image", "moving_labels", "fixed_labels"]
RUN = ["method", "algorithm", "parameters", "library", "threads", "device"]
SCORES = ["structures", "dice", "hd95", "forward", "central", "volume", "places", "sdlogj"]
SPENT = ["cpu_s", "wall_s", "peak_mb", "idle_mb"]
CARD = ["gflop", "moved_gb", "roofline_s", "roofline_share", "bound"]
COLUMNS = [*PAIR, *RUN, "status", "reason", *SCORES, *SPENT, *CARD]
MEANS = [name for name in [*SCORES, *SPENT, "roofline_share"] if name != "structures"]
SIMULATED = {"label_map": "aparc+aseg_to_oasis28", "structures": "oasis28"}
GRID = {"shape": (56, 68, 56), "spacing": (3.0, 3.0, 3.0)}  # as config/config.yaml


# --- pairs ---


@dataclass(frozen=True)
class Pair:
    """Two preprocessed scans by name and file, and the structures to score, by the name of their table or none."""

    cohort: str
    moving: str
    fixed: str
    moving_image: Path
    fixed_image: Path
    moving_labels: Path
    fixed_labels: Path
    structures: str = ""


def table_pairs(path: Path) -> list[Pair]:
    """Read a table of pairs; InputError for one that lacks a column or a file."""
    table = read_table(path, text=True)
    lacking = [name for name in [*PAIR, *FILES] if name not in table]
    if lacking:
        raise InputError(path, found=f"no columns {', '.join(lacking)}", expected=", ".join([*PAIR, *FILES]))
    pairs = []
    for row in table.to_dict("records"):
        files = [path.parent / row[name] for name in FILES]
        for file in files:
            if not file.is_file():
                raise InputError(path, found=f"{file}, which is no file", expected="files relative to the table")
        pairs.append(Pair(*(row[name] for name in PAIR), *files, row.get("structures", "")))
    return pairs


def results_pairs(results: Path, cohorts: Sequence[str], scans: Sequence[str], atlases: Sequence[str]) -> list[Pair]:
    """Return pairs of scans to atlases of a results folder: those named, or the test scans and atlases of its split."""
    folder, settings = results / "preprocessed", results / "configuration.yaml"
    found = sorted(path.name for path in folder.iterdir() if path.is_dir()) if folder.is_dir() else []
    if not found or set(cohorts) - set(found):
        raise InputError("--results, --cohorts", found=f"in {folder}: {found}", expected=str(cohorts or "cohorts"))
    known = read_yaml(settings)["cohorts"] if settings.is_file() else {}
    pairs = []
    for cohort in cohorts or found:
        there = {path.name for path in (folder / cohort).iterdir()}
        table = results / "cohorts" / cohort / "scans.csv"
        split = read_table(table, text=True) if table.is_file() else None
        names = registration_pairs(split) if split is not None else []
        moving = [scan for scan in scans if scan in there] or list(dict.fromkeys(moving for moving, _ in names))
        fixed = [scan for scan in atlases if scan in there] or list(dict.fromkeys(fixed for _, fixed in names))
        if not moving or not fixed:
            raise InputError(f"pairs of {cohort}", found=f"no {table}", expected="it, or --scans and --atlas of each")
        structures = known.get(cohort, {}).get("structures") or ""
        pairs += [scan_pair(folder / cohort, *each, structures) for each in product(moving, fixed)]
    missing = {*scans, *atlases} - {name for pair in pairs for name in (pair.moving, pair.fixed)}
    if missing:
        raise InputError("--scans, --atlas", found=", ".join(sorted(missing)), expected="scans of these cohorts")
    return pairs


def scan_pair(folder: Path, moving: str, fixed: str, structures: str) -> Pair:
    """Return two scans of a cohort's folder as a pair."""
    files = [folder / scan / f"{kind}.nii.gz" for kind in ("image", "labels") for scan in (moving, fixed)]
    return Pair(folder.name, moving, fixed, *files, structures)


def embedded_pairs(folder: Path, grid: Mapping[str, Any] = GRID) -> list[Pair]:
    """Make two simulated scans and the template on a grid, and return their pairs."""
    made, done = folder / "scans", folder / "preprocessed" / "simulated"
    table = simulated.scan_table(made, train=0, val=0, test=2)
    for row in table.to_dict("records"):
        scan = row["scan"]
        if not (done / scan / "quality.json").is_file():
            tell(f"{scan} is simulated and preprocessed")
            simulated.write_scan(scan, made / scan)
            files = {key: row[key] for key in ("image", "labels", "mask")}
            atlas = None if scan == simulated.ATLAS else done / simulated.ATLAS
            preprocess_files(done / scan, **files, atlas=atlas, **SIMULATED, **grid)
    return [scan_pair(done, *names, SIMULATED["structures"]) for names in registration_pairs(table)]


# --- methods ---


@dataclass(frozen=True)
class Method:
    """An algorithm with parameters, by the name that it has in the table."""

    name: str
    algorithm: str
    parameters: dict[str, Any] = field(default_factory=dict)

    def run(self, threads: int, device: str = "cpu") -> dict[str, Any]:
        """Return the columns of a record that say what was run."""
        told = describe(self.algorithm, self.parameters)
        place = device if knows_cards(self.algorithm) else "cpu"
        values = (self.name, self.algorithm, told, version_of(self.algorithm), threads, place)
        return dict(zip(RUN, values, strict=True))


def parse_method(text: str) -> Method:
    """Read ``NAME`` or ``NAME=FILE.yaml``; InputError for what is neither."""
    name, given, path = text.partition("=")
    if not given:
        return Method(name, name, PARAMETERS.get(name, {}))
    values = read_yaml(path)
    if "algorithm" not in values:
        raise InputError(f"method {name}", found=f"{path} without it", expected="the key algorithm, and parameters")
    return Method(name, values.pop("algorithm"), values)


def available(texts: Sequence[str]) -> list[Method]:
    """Return the methods that can be run here, and tell of the others."""
    methods = []
    for method in map(parse_method, dict.fromkeys(texts)):
        lacking = missing_library(method.algorithm)
        if lacking:
            tell(f"{method.name} is left out: {lacking} is not installed")
        else:
            methods.append(method)
    return methods


# --- records ---


def run_all(pairs: Sequence[Pair], methods: Sequence[Method], options: argparse.Namespace) -> pd.DataFrame:
    """Register and score what has no record yet; return all records of the folder."""
    path = options.out / "records.csv"
    records = read_records(path)
    runs = {method.name: method.run(options.threads, options.device) for method in methods}
    jobs = [(pair, method, runs[method.name]) for pair in pairs for method in methods]
    todo = [job for job in jobs if options.again or not is_done(records, job[0], job[2])]
    if len(todo) < len(jobs):
        tell(f"{len(jobs) - len(todo)} of {len(jobs)} registrations have a record: --again does them again")
    with ThreadPoolExecutor(max_workers=options.workers) as pool:
        futures = [pool.submit(register_and_score, *job, options.timeout) for job in todo]
        try:
            for number, future in enumerate(as_completed(futures), start=1):
                record = future.result()
                records = pd.concat([records, pd.DataFrame([record], columns=COLUMNS)], ignore_index=True)
                with atomic_path(path) as temporary:
                    records.to_csv(temporary, index=False)
                tell(f"{number}/{len(todo)} {told(record)}")
        except BaseException:  # an interrupt too: what has not begun does not begin
            pool.shutdown(wait=False, cancel_futures=True)
            raise
    return records


def seconds_of(devices: Iterable[str]) -> tuple[str, str]:
    """Return the column of the seconds that count on these devices, and what it is called."""
    return ("wall_s", "seconds a pair") if set(devices) - {"cpu"} else ("cpu_s", "CPU seconds a pair")


def read_records(path: Path) -> pd.DataFrame:
    """Read the records of a folder; none where there is no such file."""
    if not path.is_file():
        return pd.DataFrame()
    records = read_table(path).fillna({"parameters": ""})  # of a method that has none
    # a table that is older than the column was made on a processor
    return records if "device" in records else records.assign(device="cpu")


def told(record: dict[str, Any]) -> str:
    """Return a record in one line."""
    name = f"{record['cohort']} {record['moving']} to {record['fixed']} {record['method']}"
    if record["status"] != "ok":
        return f"{name} failed: {record['reason']}"
    return f"{name}: Dice {record['dice']:.4f}, {record[seconds_of([record['device']])[0]]:.3g} s"


def is_done(records: pd.DataFrame, pair: Pair, run: dict[str, Any]) -> bool:
    """Tell whether a pair has a record of a method with these parameters and threads that did not fail."""
    if records.empty:
        return False
    wanted = {**{name: getattr(pair, name) for name in PAIR}, **run, "status": "ok"}
    same = [records[name] == value for name, value in wanted.items() if name != "library"]
    return bool(np.logical_and.reduce(same).any())


def register_and_score(pair: Pair, method: Method, run: dict[str, Any], timeout: float) -> dict[str, Any]:
    """Register a pair in a process of its own, score its field in this one, and return the record."""
    record = {**{name: getattr(pair, name) for name in PAIR}, **run, "status": "ok", "reason": ""}
    with tempfile.TemporaryDirectory(prefix="registration-") as folder:
        path = Path(folder) / "field.npy"
        row = {"algorithm": method.algorithm, "parameters": method.parameters}
        row |= {"threads": run["threads"], "device": run["device"]}
        row |= {"moving": str(pair.moving_image), "fixed": str(pair.fixed_image), "field": str(path)}
        script = Path(__file__).with_name("pair.py")
        found = measure_apart(script, row, run["threads"], timeout)
        if "failed" in found:
            return record | {"status": "failed", "reason": found["failed"]}
        return record | found | scores(np.load(path, allow_pickle=False), pair)


def scores(displacement: np.ndarray, pair: Pair) -> dict[str, Any]:
    """Return the scores of a field (3, D, H, W); labels are warped nearest."""
    moving, fixed = read_labels(pair.moving_labels), read_labels(pair.fixed_labels)
    if pair.structures:
        structures = load_structures(pair.structures)
    else:
        ids = [int(label) for label in np.unique(fixed.data) if label > 0]
        structures = StructureSet("all", pd.DataFrame({"id": ids, "name": [str(label) for label in ids]}))
    table, told = score_pair(
        displacement, fixed.affine, moving.data, fixed.data, structures, interpolations=("nearest",), topology=False
    )
    return {
        "structures": int(table["dice"].notna().sum()),
        "dice": float(table["dice"].mean()),
        "hd95": float(table["hd95"].mean()),
        "forward": told["nonpositive_jacobian_forward"],
        "central": told["nonpositive_jacobian_central"],
        "volume": told["nondiffeomorphic_volume"],
        "places": folded_voxels(torch.from_numpy(displacement)),
        "sdlogj": told["sdlogj"],
    }


# --- tables ---


def newest(records: pd.DataFrame) -> pd.DataFrame:
    """Return the last record of each pair and method, of those with the method's newest parameters and threads."""
    kept = []
    for _, rows in records.groupby("method", sort=False):
        last = rows.iloc[-1]
        alike = rows[(rows["parameters"] == last["parameters"]) & (rows["threads"] == last["threads"])]
        kept.append(alike if len(alike) else rows.iloc[[-1]])
    return pd.concat(kept).drop_duplicates([*PAIR, "method"], keep="last").reset_index(drop=True)


def summary(records: pd.DataFrame, reference: str) -> pd.DataFrame:
    """Return a row a cohort and method: means, standard deviations (``_sd``), and what it is beside the reference."""
    rows = []
    for (cohort, method), group in records.groupby(["cohort", "method"], sort=False):
        done = group[group["status"] == "ok"]
        row = {"cohort": cohort, "method": method, "n": len(done), "failed": len(group) - len(done)}
        for name in MEANS:
            row |= {name: done[name].mean(), f"{name}_sd": done[name].std()}
        rows.append(row | beside(records, str(cohort), str(method), reference))
    return pd.DataFrame(rows)


def beside(records: pd.DataFrame, cohort: str, method: str, reference: str) -> dict[str, Any]:
    """Return the mean difference in Dice to the reference over the pairs of both, its p, and the pairs won."""
    own = records[(records["cohort"] == cohort) & (records["status"] == "ok")]
    dice = own.pivot(index=["moving", "fixed"], columns="method", values="dice")
    if method == reference or not {method, reference} <= set(dice.columns):
        return {"difference": np.nan, "p": np.nan, "wins": ""}
    differences = (dice[method] - dice[reference]).dropna()
    wins = f"{int((differences > 0).sum())}/{len(differences)}"
    return {"difference": differences.mean(), "p": signed_rank(differences.to_numpy()).p, "wins": wins}


SHOWN = {  # column of table.md -> column of table.csv, its digits
    "Dice": ("dice", 4),
    "HD95, mm": ("hd95", 2),
    "forward, %": ("forward", 4),
    "central, %": ("central", 4),
    "volume, %": ("volume", 4),
    "places": ("places", 0),
    "SDlogJ": ("sdlogj", 3),
    "CPU s": ("cpu_s", 1),
    "wall s": ("wall_s", 1),
    "peak MB": ("peak_mb", 0),
    "idle MB": ("idle_mb", 0),
    "of the roofline": ("roofline_share", 2),
}


def markdown(table: pd.DataFrame, settings: dict[str, Any], reference: str) -> str:
    """Return the table, mean ± sd, and beneath it how its numbers came about."""
    cells = table[["cohort", "n"]].copy()
    cells.insert(1, "method", [label(name) for name in table["method"]])
    for shown, (name, digits) in SHOWN.items():
        pairs = zip(table[name], table[f"{name}_sd"], strict=True)
        column = [mean_and_sd(mean, spread, digits) for mean, spread in pairs]
        if any(column):
            cells[shown] = column
    if table["difference"].notna().any():
        cells[f"Dice - {label(reference)}"] = [number(value, "+.4f") for value in table["difference"]]
        cells["p"] = [number(value, ".3g") for value in table["p"]]
        cells["pairs won"] = table["wins"]
    if table["failed"].any():
        cells["failed"] = table["failed"]
    sides = ["left", "left", *["right"] * (cells.shape[1] - 2)]
    lines = [cells.to_markdown(index=False, disable_numparse=True, colalign=sides), ""]
    lines += ["Mean ± standard deviation over the pairs; labels warped nearest; p: Wilcoxon's signed-rank test.", ""]
    lines += [f"- {name}: {value}" for name, value in settings.items() if name != "methods"]
    for name, run in settings["methods"].items():
        said = f"{run['library']}: `{run['parameters']}`" if run["parameters"] else "the zero field"
        lines.append(f"- {label(name)}: {said}")
    return "\n".join(lines) + "\n"


def mean_and_sd(mean: float, spread: float, digits: int) -> str:
    """Return ``mean ± sd``; of one pair the mean alone, and 0 where all are 0."""
    if np.isnan(mean):
        return ""
    if mean == 0:
        return "0"
    return f"{mean:,.{digits}f}" + ("" if np.isnan(spread) else f" ± {spread:,.{digits}f}")


def number(value: float, form: str) -> str:
    """Return a number in a format, nothing for NaN."""
    return "" if np.isnan(value) else format(value, form)


def label(method: str) -> str:
    """Return what a method is called in table and figure."""
    return NAMES.get(method) or method_name(method, short=True)


def settings_of(records: pd.DataFrame) -> dict[str, Any]:
    """Return what the records were made with."""
    cpu = Path("/proc/cpuinfo")
    model = re.search(r"model name\s*: (.*)", cpu.read_text()) if cpu.is_file() else None
    runs = records.drop_duplicates("method", keep="last").fillna({name: "" for name in RUN if name != "threads"})
    return {
        "processor": model[1] if model else platform.processor(),
        "threads": sorted({int(threads) for threads in runs["threads"]}),
        "python": platform.python_version(),
        "torch": torch.__version__,
        "methods": {row["method"]: {key: row[key] for key in RUN[1:]} for row in runs.to_dict("records")},
    }


# --- figure ---


def draw(records: pd.DataFrame, path: Path) -> None:
    """Draw Dice against CPU seconds, a panel a cohort."""
    records = records[records["status"] == "ok"]
    cohorts = list(dict.fromkeys(records["cohort"]))
    if not cohorts:
        return
    names = list(dict.fromkeys(records["method"]))
    style = {name: (colour, method_markers(names)[name]) for name, colour in method_colours(names).items()}
    with mpl.rc_context(RC):
        width = min(PAGE_WIDTH, 4.2 * len(cohorts))
        figure = new_figure(width, 3.4)
        panels = figure.subplots(1, len(cohorts), squeeze=False)[0]
        points = [draw_panel(panel, records, cohort, style) for panel, cohort in zip(panels, cohorts, strict=True)]
        panels[0].set_ylabel("Dice, mean over structures")
        figure.canvas.draw()
        figure.set_layout_engine("none")
        for panel, found in zip(panels, points, strict=True):
            place_labels(panel, found)
        save_figure(figure, path)


Point = tuple[float, float, str, str]  # of a panel: CPU seconds, Dice, label, colour


def draw_panel(panel: Any, records: pd.DataFrame, cohort: str, style: dict[str, tuple[str, str]]) -> list[Point]:
    """Draw one cohort; return its means, to be labelled."""
    own, points = records[records["cohort"] == cohort], []
    clock, called = seconds_of(records["device"])
    pairs = own.groupby(["moving", "fixed"]).ngroups
    panel.set_title(f"{cohort}, {pairs} pair{'s' if pairs > 1 else ''}")
    panel.set_xscale("log")
    panel.set_xlabel(called)
    panel.grid(axis="y")
    for name, rows in own.groupby("method", sort=False):
        colour, marker = style[str(name)]
        mean = rows["dice"].mean()
        if (rows["algorithm"] == "affine").all():
            panel.axhline(mean, color=colour, linestyle="--", zorder=1)
            panel.annotate(
                f"{label(str(name))} {mean:.3f}",
                (0, mean),
                (3, 3),
                xycoords=panel.get_yaxis_transform(),
                textcoords="offset points",
                fontsize=7,
                color="#777777",
            )
            continue
        panel.scatter(rows[clock], rows["dice"], s=7, color=colour, alpha=0.45, linewidths=0, zorder=2)
        centre = rows[clock].mean()
        panel.scatter(centre, mean, s=60, color=colour, marker=marker, edgecolors="white", linewidths=0.8, zorder=4)
        points.append((centre, mean, f"{label(str(name))} {mean:.3f}", legible(colour)))
    widen(panel, own.loc[own["algorithm"] != "affine", clock])
    return points


def legible(colour: str) -> str:
    """Return a colour, darker where it is too light for letters."""
    red, green, blue = mpl.colors.to_rgb(colour)
    lightness = 0.3 * red + 0.59 * green + 0.11 * blue
    shade = min(1.0, 0.45 / lightness) if lightness > 0 else 1.0
    darker: str = mpl.colors.to_hex([shade * part for part in (red, green, blue)])
    return darker


def widen(panel: Any, seconds: pd.Series) -> None:
    """Give the axis of seconds room for labels, and plain numbers."""
    if len(seconds):
        low, high = max(seconds.min(), 1e-3), max(seconds.max(), 1e-3)
        panel.set_xlim(low / 2.5, high * 3)
    panel.xaxis.set_major_locator(mpl.ticker.LogLocator(subs=(1.0, 2.0, 5.0)))
    panel.xaxis.set_major_formatter(mpl.ticker.FuncFormatter(lambda value, _: f"{value:g}"))
    panel.xaxis.set_minor_locator(mpl.ticker.NullLocator())


def place_labels(panel: Any, points: Sequence[Point]) -> None:
    """Write each label where it covers least of what is there: other labels and marks above all, then dots."""
    renderer = panel.figure.canvas.get_renderer()
    scale = panel.figure.dpi / 72
    marks = [panel.transData.transform(point[:2]) for point in points]
    dots = np.concatenate([panel.transData.transform(each.get_offsets()) for each in panel.collections] or [[]])
    texts = [text.get_window_extent(renderer) for text in panel.texts]
    for place, (seconds, dice, text, colour) in enumerate(points):
        others = [mark for number, mark in enumerate(marks) if number != place]
        note = panel.annotate(
            text, (seconds, dice), (0, 0), textcoords="offset points", fontsize=7, color=colour, zorder=5
        )

        def cost(spot: Spot, note: Any = note, others: Sequence[Any] = others) -> float:
            note.set(position=spot.offset, ha=spot.ha, va=spot.va)
            box = note.get_window_extent(renderer).padded(scale)
            covered = 100 * sum(box.overlaps(other) for other in texts)
            covered += 50 * sum(box.padded(4 * scale).contains(*mark) for mark in others)
            covered += 3 * sum(box.contains(*dot) for dot in dots)
            inside = panel.bbox.x0 <= box.x0 and box.x1 <= panel.bbox.x1 and panel.bbox.y0 <= box.y0
            return spot.distance + covered + (0 if inside and box.y1 <= panel.bbox.y1 else 200)

        best = min(spots(), key=cost)
        note.set(position=best.offset, ha=best.ha, va=best.va)
        texts.append(note.get_window_extent(renderer))


class Spot(NamedTuple):
    """A place for a label: how far from its mark, the offset in points, and how the text is aligned there."""

    distance: float
    offset: tuple[float, float]
    ha: str
    va: str


def spots() -> Iterator[Spot]:
    """Yield places round a mark, right of it first."""
    sides = ((1, 0), (-1, 0), (0, 1), (0, -1), (1, 1), (-1, 1), (1, -1), (-1, -1))
    for distance, (x, y) in product((7, 13, 20, 28), sides):
        along = distance * (0.7 if x and y else 1.0)
        ha, va = ("center", "left", "right")[x], ("center", "bottom", "top")[y]
        yield Spot(distance / 7 + (0.2 if x and y else 0.0), (x * along, y * along), ha, va)


# --- what is asked ---


def main(arguments: Sequence[str] | None = None) -> None:
    """Measure what the command line asks for, and write records, table and figure."""
    options = _parser().parse_args(arguments)
    if min(options.threads, options.workers) < 1:
        raise InputError("--threads, --workers", found=f"{options.threads}, {options.workers}", expected="at least 1")
    torch.set_num_threads(options.threads)
    methods = available(options.methods)
    if options.pairs:
        pairs = table_pairs(options.pairs)
    elif options.results:
        pairs = results_pairs(options.results, options.cohorts, options.scans, options.atlas)
    else:
        grid = {"shape": parse_shape(options.grid), "spacing": (options.spacing,) * 3} if options.grid else GRID
        pairs = embedded_pairs(options.out / "embedded", grid)
    options.out.mkdir(parents=True, exist_ok=True)
    records = run_all(pairs, methods, options)
    if records.empty:
        raise InputError("--methods", found="none that can be run here", expected=", ".join(METHODS))
    write(newest(records), options.out, options.reference)


def write(records: pd.DataFrame, out: Path, reference: str) -> None:
    """Write tables, figure and settings of records, and print the table."""
    table, settings = summary(records, reference), settings_of(records)
    shown = markdown(table, settings, reference)
    with atomic_path(out / "table.csv") as temporary:
        table.to_csv(temporary, index=False)
    for name, text in (("table.md", shown), ("settings.json", json.dumps(settings, indent=2) + "\n")):
        with atomic_path(out / name) as temporary:
            Path(temporary).write_text(text, encoding="utf-8")
    draw(records, out / "figure")
    print(shown)


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter, allow_abbrev=False
    )
    source = parser.add_mutually_exclusive_group()
    source.add_argument("--pairs", type=Path, help="table of pairs (default: two simulated scans to their template)")
    source.add_argument("--results", type=Path, help="results folder of the pipeline, instead")
    parser.add_argument("--cohorts", nargs="+", default=[], help="of that folder (default: all)")
    parser.add_argument("--scans", nargs="+", default=[], help="of those cohorts (default: the test scans)")
    parser.add_argument("--atlas", nargs="+", default=[], help="of those cohorts (default: the atlas of each)")
    parser.add_argument("--grid", help="of the simulated scans, for instance 160x192x224 (default 56x68x56 of 3 mm)")
    parser.add_argument("--spacing", type=float, default=1.0, help="of that grid, mm (default 1)")
    parser.add_argument("--device", default="cpu", help="cpu (default), or cuda for methods that know a card")
    parser.add_argument("--methods", nargs="+", default=METHODS, help=f"(default: {' '.join(METHODS)})")
    parser.add_argument("--reference", default="greedy", help="method that others are compared with (default greedy)")
    parser.add_argument("--threads", type=int, default=1, help="of each registration (default 1)")
    parser.add_argument("--workers", type=int, default=1, help="registrations at a time (default 1)")
    parser.add_argument("--timeout", type=float, default=3600, help="seconds that one may take (default 3600)")
    parser.add_argument("--again", action="store_true", help="do again what has a record")
    parser.add_argument("--out", type=Path, required=True, help="folder of what is written")
    return parser


if __name__ == "__main__":
    sys.exit(run_main(main))
