"""All there is to do on a graphics card, in one command that goes on where it stopped: tests, benchmarks, trainings.

    make gpu                                                   # 25 minutes at most; the same again for what is left
    make gpu SCANS=scans.zip MINUTES=9                         # trainings too, on scans that were packed into one file
    python benchmarks/gpu.py --pack results --cohort oasis --file scans.zip    # that file, where the scans are

It does, in this order, what is not done yet, and writes down each step as it ends:

tests
    Those marked ``gpu`` (tests/test_gpu.py): the CPU's numbers to stated tolerances, and what only a card can show.
networks
    benchmarks/networks.py at 160x192x224: forward pass and training step of every network in bf16, float32 and TF32,
    beside the least time that the card's own measured peaks allow (``roofline_share``).
registration
    benchmarks/registration.py at 160x192x224: the descents on the card, beside that least time as well.
trainings
    Every network of config/paper.yaml, with its settings, on the packed scans; what time is left is shared equally.
    A training that is stopped goes on in the next call.

Without a card it says what it would do and ends with status 0.

Files, all of them small, in --out
----------------------------------
state.json, summary.md
    Each step: done, stopped or failed and why, its seconds, the card. The next call does again what failed.
tests.xml; networks.csv; registration.csv, registration.md; trainings.csv; log.txt
    JUnit's report; the tables; the histories of all trainings; all that was printed.

What is large (unpacked scans, states of trainings, weights) stays in --work, which a later call needs to go on.
"""

from __future__ import annotations

import argparse
import json
import os
import shutil
import signal
import subprocess
import sys
import tempfile
import time
import zipfile
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any
from xml.etree import ElementTree

import pandas as pd
from measuring import parse_shape, run_main, tell

from dmir.config import Network, read_config
from dmir.errors import InputError, suggestion
from dmir.tables import read_table
from dmir.training.devices import visible_cards
from dmir.training.pack import IMAGES, LABELS, RECORD, Scan, open_pack, pack_scans
from dmir.volumes import atomic_path

ROOT = Path(__file__).parents[1]
PAPER = ROOT / "config" / "paper.yaml"
PRECISIONS = ("bf16", "float32", "tf32")  # the most wanted first
SPLIT = "split.json"
PARTS = ("train", "val", "atlas")
KINDS = ("tests", "networks", "registration", "trainings")
ENDING = 45.0  # seconds that a step has to end in, once it is told to
SLICE = 60.0  # seconds that a training must have to be worth its start


@dataclass(frozen=True)
class Step:
    """One thing to do: a command, the least seconds that are worth beginning it with, and what it left, told in a line.

    ``told`` gathers what the command wrote into the folder of results. It raises ValueError where that is no success.
    """

    name: str
    seconds: float
    command: list[str]
    told: Callable[[], str]

    @property
    def kind(self) -> str:
        return self.name.split()[0]


# --- what there is to do ---


def steps_of(options: argparse.Namespace) -> list[Step]:
    """List all steps, those that are done included."""
    known = read_config(PAPER).networks()
    names = options.networks.split(",") if options.networks else [*known]
    for name in names:
        if name not in known:
            raise InputError("--networks", found=repr(name), expected="a known name", remedy=suggestion(name, known))
    steps = [tests(options)]
    steps += [network(options, name, precision) for precision in PRECISIONS for name in names]
    steps.append(registration(options))
    if options.scans is not None:
        steps += [training(options, name) for name in names]
    return [step for step in steps if step.kind in options.only]


def python(script: str, *arguments: Any) -> list[str]:
    """Return the command that runs a script of this folder."""
    return [sys.executable, str(Path(__file__).with_name(script)), *map(str, arguments)]


def tests(options: argparse.Namespace) -> Step:
    report = options.out / "tests.xml"
    command = [sys.executable, "-m", "pytest", "-m", "gpu", "-p", "no:cacheprovider", str(ROOT / "tests/test_gpu.py")]

    def told() -> str:
        suite = ElementTree.parse(report).getroot().find("testsuite")
        assert suite is not None
        counts = {name: int(suite.get(name, 0)) for name in ("tests", "failures", "errors", "skipped")}
        text = ", ".join(f"{count} {name}" for name, count in counts.items())
        if counts["failures"] or counts["errors"] or counts["skipped"] == counts["tests"]:
            raise ValueError(text)
        return text

    return Step("tests", 120.0, [*command, f"--junitxml={report}", "-q"], told)


def network(options: argparse.Namespace, name: str, precision: str) -> Step:
    folder = options.work / "networks"
    table = folder / f"{name}-{precision}.csv"
    asked = ["--networks", name, "--grids", options.grid, "--dtypes", precision, "--step", "--device", options.device]

    def told() -> str:
        row = read_table(table).iloc[0]
        if isinstance(row.get("failed"), str) and row["failed"]:
            raise ValueError(row["failed"])
        gather(sorted(folder.glob("*.csv")), options.out / "networks.csv")
        shares = f"{row['roofline_share']:.2f} and {row['step_roofline_share']:.2f} of the roofline"
        return f"forward {row['forward_s']:.3g} s, step {row['step_s']:.3g} s: {shares}"

    return Step(f"networks {name} {precision}", 60.0, python("networks.py", *asked, "--out", table), told)


def registration(options: argparse.Namespace) -> Step:
    folder = options.work / "registration"
    methods = ["affine", "descent", f"descent-fast={ROOT / 'config/descent-fast.yaml'}"]
    place = "host" if options.device == "cpu" else options.device
    asked = ["--grid", options.grid, "--spacing", options.spacing, "--device", place, "--methods", *methods]

    def told() -> str:
        shutil.copy(folder / "records.csv", options.out / "registration.csv")
        shutil.copy(folder / "table.md", options.out / "registration.md")
        records = read_table(folder / "records.csv")
        if (records["status"] != "ok").any():
            raise ValueError(records.loc[records["status"] != "ok", "reason"].iloc[0])
        own = records[records["method"] == "descent"]
        return f"descent {own['wall_s'].mean():.3g} s, {own['roofline_share'].mean():.2f} of the roofline"

    return Step("registration", 240.0, python("registration.py", *asked, "--out", folder), told)


def training(options: argparse.Namespace, name: str) -> Step:
    folder = options.work / "trainings"
    asked = ["--train", name, "--scans", options.scans, "--work", options.work, "--steps", options.steps]

    def told() -> str:
        histories = sorted(folder.glob("*/history.csv"))
        gather(histories, options.out / "trainings.csv", network=lambda path: path.parent.name)
        if not (folder / name / "training.json").is_file():
            own = [read_table(path)["step"].iloc[-1] for path in histories if path.parent.name == name]
            raise ValueError(f"at step {own[0]} of {options.steps}" if own else "before it wrote anything")
        summary = json.loads((folder / name / "training.json").read_text())
        return f"Dice {summary['val_dice'] or float('nan'):.4f} at step {summary['kept_step']} of {options.steps}"

    return Step(f"trainings {name}", SLICE, python("gpu.py", *asked, "--device", options.device), told)


def gather(paths: Sequence[Path], to: Path, **columns: Callable[[Path], Any]) -> None:
    """Join tables into one, with columns that follow from where each lies."""
    tables = [read_table(path).assign(**{name: of(path) for name, of in columns.items()}) for path in paths]
    if tables:
        with atomic_path(to) as temporary:
            pd.concat(tables, ignore_index=True).to_csv(temporary, index=False)


# --- what was done ---


class State:
    """What became of each step, in a file that is whole at any time."""

    def __init__(self, folder: Path) -> None:
        self.folder, self.path = folder, folder / "state.json"
        self.steps: dict[str, dict[str, Any]] = {}
        if self.path.is_file():
            try:
                self.steps = json.loads(self.path.read_text(encoding="utf-8"))["steps"]
            except (ValueError, KeyError, TypeError) as error:
                remedy = "Delete it, and all steps are done anew."
                raise InputError(
                    self.path, found=f"{error}", expected="what this script wrote", remedy=remedy
                ) from None

    def is_done(self, step: Step) -> bool:
        return self.steps.get(step.name, {}).get("status") == "done"

    def note(self, step: Step, status: str, seconds: float, told: str, place: str) -> None:
        """Write down what became of a step; the seconds of a training add up."""
        before = self.steps.get(step.name, {}).get("seconds", 0.0) if step.kind == "trainings" else 0.0
        record = {"status": status, "seconds": round(before + seconds, 1), "told": told, "device": place}
        self.steps[step.name] = {**record, "ended": time.strftime("%Y-%m-%dT%H:%M:%S%z")}
        with atomic_path(self.path) as temporary:
            temporary.write_text(json.dumps({"steps": self.steps}, indent=1) + "\n", encoding="utf-8")
        rows = [{"step": name, **record} for name, record in self.steps.items()]
        with atomic_path(self.folder / "summary.md") as temporary:
            temporary.write_text(pd.DataFrame(rows).to_markdown(index=False) + "\n", encoding="utf-8")


# --- the doing ---


def run(step: Step, seconds: float, options: argparse.Namespace) -> tuple[str, str]:
    """Let a step run for so long; return ``done``, ``stopped`` or ``failed``, and what it told."""
    log = options.out / "log.txt"
    environment = {**os.environ, "DMIR_TEST_DEVICE": options.device}
    with log.open("a", encoding="utf-8") as file:
        print(f"\n=== {step.name}: {' '.join(step.command)}", file=file, flush=True)
        begun = file.tell()
        group = subprocess.Popen(
            step.command, stdout=file, stderr=subprocess.STDOUT, env=environment, cwd=ROOT, start_new_session=True
        )
        try:
            over = False
            group.wait(timeout=seconds)
        except subprocess.TimeoutExpired:
            over = True
        finally:  # an interrupt too: nothing goes on on the card
            end(group)
    try:
        told = step.told()
    except (OSError, LookupError, ValueError, InputError) as error:  # not all that it should have written is there
        told, complete = " ".join(str(error).split()), False
    else:
        complete = group.returncode == 0
    if complete:
        return "done", told
    if over:
        return "stopped", f"the time was over, {told}"
    return "failed", told if group.returncode == 0 or step.kind == "tests" else last_line(log, begun)


def end(group: subprocess.Popen[bytes]) -> None:
    """End a command and all that it started: politely, so that a training keeps its state, and then at once."""
    for number, patience in ((signal.SIGTERM, ENDING), (signal.SIGKILL, None)):
        try:
            os.killpg(group.pid, number)
            group.wait(timeout=patience)
        except ProcessLookupError:
            return
        except subprocess.TimeoutExpired:
            continue


def last_line(log: Path, begun: int) -> str:
    """Return the last line that a command printed."""
    with log.open("rb") as file:
        file.seek(begun)
        lines = file.read().decode("utf-8", errors="replace").strip().splitlines()
    return lines[-1].strip()[:300] if lines else "it said nothing"


def do_all(steps: Sequence[Step], state: State, options: argparse.Namespace, place: str) -> None:
    """Do what is left, as long as there is time."""
    deadline = time.monotonic() + 60 * options.minutes - ENDING
    todo = [step for step in steps if options.again or not state.is_done(step)]
    if len(todo) < len(steps):
        tell(f"{len(steps) - len(todo)} of {len(steps)} steps are done: --again does them again")
    for number, step in enumerate(todo):
        left = deadline - time.monotonic()
        if left < step.seconds:
            tell(f"{step.name}: not begun, for {max(left, 0):.0f} s are left and it wants {step.seconds:.0f}")
            continue
        alike = sum(later.kind == "trainings" for later in todo[number:])
        start = time.monotonic()
        status, told = run(step, max(left / alike, SLICE) if step.kind == "trainings" else left, options)
        state.note(step, status, time.monotonic() - start, told, place)
        tell(f"{step.name}: {status}, {told}")


def tell_plan(steps: Sequence[Step], state: State, options: argparse.Namespace, reason: str) -> None:
    """Say what would be done with a card."""
    print(f"{reason}: nothing is done. With a card this would take up to {options.minutes:g} minutes for:")
    for kind in options.only:
        own = [step for step in steps if step.kind == kind]
        names = ", ".join(dict.fromkeys(step.name.split()[1] for step in own if " " in step.name))
        done = sum(state.is_done(step) for step in own)
        if own:
            at = "" if kind == "tests" else f" at {options.grid}"
            several = f": {names} ({len(own)} steps)" if names else ""
            print(f"- {kind}{at}{several}" + (f", of which {done} are done" if done else ""))
    if options.scans is None and "trainings" in options.only:
        print("- no trainings: none without SCANS=FILE, which `python benchmarks/gpu.py --pack` makes")
    print(f"Results would go to {options.out}.")


def why_not(device: str) -> str | None:
    """Return why nothing can be done here; None where a card, or the processor that is asked for, can be used.

    No card is leased: the processes that compute do that.
    """
    import torch

    if device == "cpu":
        return None
    if not torch.backends.cuda.is_built():
        return "No GPU: this torch is built without CUDA"
    return None if visible_cards() else "No GPU here"


def name_of(device: str) -> str:
    """Return what the cards are called, without touching CUDA."""
    if device == "cpu":
        return "cpu"
    answer = subprocess.run(["nvidia-smi", "--query-gpu=name", "--format=csv,noheader"], capture_output=True, text=True)
    return ", ".join(dict.fromkeys(answer.stdout.strip().splitlines())) or "a GPU"


# --- scans in one file ---


def pack_file(options: argparse.Namespace) -> None:
    """Pack the scans of a cohort that the pipeline has preprocessed into one file, with who is to be learned from."""
    results, cohort = options.pack, options.cohort
    table = results / "cohorts" / cohort / "scans.csv"
    if not table.is_file():
        raise InputError("--pack, --cohort", found=f"no {table}", expected="a results folder and a cohort in it")
    scans = read_table(table)
    split = {part: list(scans.loc[scans["split"] == part, "scan"]) for part in PARTS}
    split["train"] = split["train"][: options.most]
    folder = results / "preprocessed" / cohort
    # a training does not see the labels of what it trains on
    chosen = [
        Scan(name, folder / name / "image.nii.gz", None if part == "train" else folder / name / "labels.nii.gz")
        for part in PARTS
        for name in split[part]
    ]
    with tempfile.TemporaryDirectory(prefix="pack-", dir=options.file.parent) as made:
        pack_scans(made, chosen, precision="uint8", threads=os.cpu_count() or 1)
        (Path(made) / SPLIT).write_text(json.dumps(split, indent=1) + "\n", encoding="utf-8")
        with atomic_path(options.file) as temporary, zipfile.ZipFile(temporary, "w", zipfile.ZIP_DEFLATED) as archive:
            for path in sorted(Path(made).iterdir()):
                archive.write(path, path.name)
    size = options.file.stat().st_size / 1e6
    print(f"{len(chosen)} scans of {cohort} in {options.file}, {size:.1f} MB")


def unpack_file(path: Path, work: Path) -> Path:
    """Unpack such a file once, and return the folder.

    Raises
    ------
    InputError
        It is no such file.
    """
    folder = work / f"scans-{path.stem}-{path.stat().st_size}"
    if (folder / SPLIT).is_file():
        return folder
    expected = f"what `python benchmarks/gpu.py --pack` makes: {IMAGES}, {LABELS}, {RECORD}, {SPLIT}"
    try:
        with zipfile.ZipFile(path) as archive:
            names = set(archive.namelist())
            if not {IMAGES, RECORD, SPLIT} <= names <= {IMAGES, LABELS, RECORD, SPLIT}:
                raise InputError(path, found=", ".join(sorted(names)[:8]) or "nothing", expected=expected)
            folder.mkdir(parents=True, exist_ok=True)
            for name in sorted(names, key=lambda name: name == SPLIT):  # last what says that all is there
                with atomic_path(folder / name) as temporary, archive.open(name) as source, temporary.open("wb") as to:
                    shutil.copyfileobj(source, to, 2**20)
    except (OSError, zipfile.BadZipFile) as error:
        raise InputError(path, found=str(error), expected=expected) from None
    return folder


def train_one(options: argparse.Namespace) -> None:
    """Train a network of the paper's configuration for so many steps, from where it was stopped."""
    from dmir.training import train

    folder = unpack_file(options.scans, options.work)
    pack, split = open_pack(folder), json.loads((folder / SPLIT).read_text(encoding="utf-8"))
    configured = read_config(PAPER).method(options.train)
    assert isinstance(configured, Network)
    settings = {**configured.training, "steps": options.steps, "validate_every": max(1, options.steps // 20)}
    gpus = settings.pop("gpus")
    train(
        configured.algorithm,
        dict(configured.network),
        *([pack.scan(name) for name in split[part]] for part in PARTS),
        pack=pack,
        cohort=options.scans.stem,
        method=options.train,
        output=options.work / "trainings" / options.train,
        resume_folder=options.work / "states",
        device=options.device,
        gpus=gpus,
        **settings,
    )


# --- what is asked ---


def main(arguments: Sequence[str] | None = None) -> None:
    """Do what the command line asks for."""
    options = _parser().parse_args(arguments)
    for name in ("scans", "out", "work"):  # commands run in the project's folder
        if getattr(options, name) is not None:
            setattr(options, name, getattr(options, name).resolve())
    if options.pack is not None:
        if options.cohort is None or options.file is None:
            raise InputError("--pack", found="no --cohort or no --file", expected="both, as in --help")
        return pack_file(options)
    if options.train is not None:
        return train_one(options)
    parse_shape(options.grid)
    options.only = [kind for kind in KINDS if kind in options.only]
    if options.scans is not None and not options.scans.is_file():
        raise InputError(options.scans, found="no such file", expected="packed scans", remedy="See --help.")
    steps, state, reason = steps_of(options), State(options.out), why_not(options.device)
    if reason is not None:
        return tell_plan(steps, state, options, reason)
    for folder in (options.out, options.work / "networks"):
        folder.mkdir(parents=True, exist_ok=True)
    if options.scans is not None:
        unpack_file(options.scans, options.work)  # a mistake is told before anything is begun
    return do_all(steps, state, options, name_of(options.device))


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter, allow_abbrev=False
    )
    results = ROOT / "benchmarks" / "results"
    parser.add_argument("--minutes", type=float, default=25.0, help="that all may take (default 25)")
    parser.add_argument("--scans", type=Path, help="file of packed scans to train on (default: no trainings)")
    parser.add_argument("--out", type=Path, default=results / "gpu", help="folder of results (default: %(default)s)")
    parser.add_argument("--work", type=Path, default=results / "gpu-work", help="of what is large (%(default)s)")
    parser.add_argument("--only", nargs="+", choices=KINDS, default=KINDS, help="default: all")
    parser.add_argument("--networks", help="names, separated by commas (default: those of config/paper.yaml)")
    parser.add_argument("--grid", default="160x192x224", help="of the benchmarks (default 160x192x224)")
    parser.add_argument("--spacing", type=float, default=1.0, help="of the registrations' grid, mm (default 1)")
    parser.add_argument("--steps", type=int, default=5000, help="of each training (default 5000)")
    parser.add_argument(
        "--device", choices=("cuda", "cpu"), default="cuda", help="cpu: to try this script without a card"
    )
    parser.add_argument("--again", action="store_true", help="do again what is done")
    packing = parser.add_argument_group("to make the file of scans")
    packing.add_argument("--pack", type=Path, help="results folder of the pipeline")
    packing.add_argument("--cohort", help="of that folder")
    packing.add_argument("--file", type=Path, help="to be written, .zip")
    packing.add_argument("--most", type=int, help="training scans at most (default: all); one takes 2 to 3 MB at 1 mm")
    parser.add_argument("--train", help=argparse.SUPPRESS)  # how the script calls itself for one training
    return parser


if __name__ == "__main__":
    sys.exit(run_main(main))
