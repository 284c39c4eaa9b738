"""Any program: it is given two images and writes a field, in whatever convention (:mod:`dmir.transforms`).

No shell ever sees its arguments. It runs in a process group of its own, so that nothing of it is left when its time or
its memory is over; what it says goes into the job's log.
"""

from __future__ import annotations

import contextlib
import importlib.metadata
import math
import os
import re
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from types import MappingProxyType
from typing import TYPE_CHECKING, Annotated, Any

import numpy as np
from pydantic import Field, field_validator

from dmir.errors import DmirError, InputError, suggestion
from dmir.methods.processes import KILLED, end_of, end_with_parent, signal_name
from dmir.settings import MethodSettings, PairCost, Positive
from dmir.storage import plainly_named_folder
from dmir.volumes import Grid, Volume, describe_grid, same_grid, write_volume

if TYPE_CHECKING:
    from dmir.transforms import Transform

TITLE = "A program"
PLACES = ("moving", "fixed", "moving_mask", "fixed_mask", "field", "folder", "threads", "seed", "python")
CONVENTIONS = (
    *("itk", "lps-absolute", "ras", "spm", "fsl", "fsl-absolute", "afni", "voxels", "voxels-absolute"),
    *("learn2reg", "npz"),
)
CONTAINERS = ("apptainer", "singularity")
MOST_SAID = 2**16  # bytes of what a program said, from its end


class Settings(MethodSettings):
    """Any program that reads two images and writes a field; it is a row of the tables like any other.

    `{moving}` and `{fixed}` in its arguments become files (NIfTI, preprocessed, on one grid), `{moving_mask}` and
    `{fixed_mask}` masks of their brains, `{field}` the file that it is to write, `{folder}` a folder of its own for
    one pair, in which it is started, `{threads}` and `{seed}` numbers, `{python}` the Python that runs dmir. No shell
    looks at them. docs/own-method.md has an example; docs/security.md tells what it means.
    """

    arguments: Annotated[list[str], Field(min_length=1)]
    """The program and its arguments, each an entry of the list; files are found from the working directory."""
    file: str = "field.nii.gz"
    """Name of the field that it writes, in `{folder}`; the suffix says the format: .nii.gz, .npy, .npz, .h5, .mha."""
    field: str = "itk"
    """The convention of that field, a name of `dmir field info`: `itk` (steps in LPS mm), `voxels`, `learn2reg`, `fsl`,
    ...; a warped grid of coordinates is `voxels-absolute`, `spm` (RAS mm) or `lps-absolute`."""
    gpu: bool = False
    """It computes on a GPU: it is given one by CUDA_VISIBLE_DEVICES, and waits for it."""
    environment: dict[str, str] = Field({})
    """Variables of its environment, beside those that are there."""
    container: str | None = None
    """Image that it runs in, by apptainer or singularity: a file, or docker://...; it sees `{folder}` and the working
    directory."""
    packages: list[str] = Field([])
    """Python packages whose versions are part of it: with another version its pairs are registered anew. Of the program
    and of all files among its arguments that holds anyway."""
    memory_gb: Positive = 8.0
    """Most that it may take, with all that it starts, 10^9 bytes; then it is stopped, and the pair has failed."""
    threads: Annotated[int, Field(ge=1)] = 1
    """What `{threads}` is, and OMP_NUM_THREADS."""
    seed: int = 1
    """What `{seed}` is."""
    seconds: Positive = 60.0
    """That a pair takes, about: for the plan and for how many pairs one job registers."""

    @field_validator("arguments")
    @classmethod
    def _known_places(cls, value: list[str]) -> list[str]:
        for argument in value:
            for place in re.findall(r"\{(\w*)\}", argument):
                if place not in PLACES:
                    raise ValueError(f"found {{{place}}} in '{argument}'; no such place. {suggestion(place, PLACES)}")
        return value

    @field_validator("field")
    @classmethod
    def _known_convention(cls, value: str) -> str:
        if value not in CONVENTIONS:
            raise ValueError(f"found '{value}'; expected a convention. {suggestion(value, CONVENTIONS)}")
        return value

    @field_validator("file")
    @classmethod
    def _plain_name(cls, value: str) -> str:
        if not re.fullmatch(r"[A-Za-z0-9][A-Za-z0-9._-]*", value):
            raise ValueError(f"found '{value}'; expected a file's name, letters, digits, '.', '_' and '-'")
        return value


def register(
    moving: Volume,
    fixed: Volume,
    *,
    arguments: Sequence[str],
    file: str = "field.nii.gz",
    field: str = "itk",
    gpu: bool = False,
    environment: Mapping[str, str] = MappingProxyType({}),
    container: str | None = None,
    packages: Sequence[str] = (),
    memory_gb: float = 8.0,
    threads: int = 1,
    seed: int = 1,
    seconds: float = 60.0,
    limit: float | None = None,
    measured: dict[str, Any] | None = None,
) -> np.ndarray:
    """Return the field that a program writes.

    Parameters
    ----------
    moving, fixed
        On one grid, or each on its own where the convention allows it.
    arguments, file, field, gpu, environment, container, memory_gb, threads, seed
        See :class:`Settings`.
    packages, seconds
        Not used here: they tell when it runs anew, and how long.
    limit
        Seconds that it may take.
    measured
        Gets ``seconds`` (the program alone, files included) and ``peak_memory_mb`` (with all that it started).

    Returns
    -------
    numpy.ndarray
        float32 (3, D, H, W), voxels of the fixed grid.

    Raises
    ------
    DmirError
        The program is not there, fails, takes too long or too much memory, or writes no such field: in one line.
    """
    with plainly_named_folder("command-") as name:
        folder = Path(name)
        words = _words(arguments, _places(moving, fixed, folder, file, threads, seed, arguments))
        started = _in_container(words, container, folder, gpu)
        variables = _variables(environment, threads, gpu)
        taken = _run(started, folder, variables, limit, memory_gb, Path(words[0]).name)
        if measured is not None:
            measured |= taken
        return _read_field(folder / file, field, fixed.grid, moving.grid, Path(words[0]).name)


# --- what is started ---


def _places(
    moving: Volume, fixed: Volume, folder: Path, file: str, threads: int, seed: int, arguments: Sequence[str]
) -> dict[str, str]:
    """Write what the arguments ask for, and return place -> what stands there."""
    places = {"field": str(folder / file), "folder": str(folder), "threads": str(threads), "seed": str(seed)}
    places["python"] = sys.executable
    for name, volume in (("moving", moving), ("fixed", fixed)):
        if any(f"{{{name}}}" in argument for argument in arguments):
            write_volume(folder / f"{name}.nii", Volume(volume.data.astype(np.float32), volume.affine))
        if any(f"{{{name}_mask}}" in argument for argument in arguments):
            brain = (volume.data > volume.data.min()).astype(np.uint8)
            write_volume(folder / f"{name}_mask.nii", Volume(brain, volume.affine))
        places |= {name: str(folder / f"{name}.nii"), f"{name}_mask": str(folder / f"{name}_mask.nii")}
    return places


def _words(arguments: Sequence[str], places: Mapping[str, str]) -> list[str]:
    """Return the arguments with what stands for their places; files get their whole path, the program the one of it."""
    words = [re.sub(r"\{(\w+)\}", lambda match: places[match[1]], argument) for argument in arguments]
    words = [str(Path(word).absolute()) if Path(word).is_file() else word for word in words]
    program = shutil.which(words[0])
    if program is None:
        raise DmirError(f"found no program '{words[0]}'; expected one on the PATH, or the path of one")
    return [program, *words[1:]]


def _in_container(words: list[str], container: str | None, folder: Path, gpu: bool) -> list[str]:
    if container is None:
        return words
    program = next(filter(None, map(shutil.which, CONTAINERS)), None)
    if program is None:
        raise DmirError(f"found no {' or '.join(CONTAINERS)} on the PATH; expected one, to run {container}")
    image = str(Path(container).absolute()) if Path(container).is_file() else container
    seen = [option for path in (folder, Path.cwd()) for option in ("--bind", str(path))]
    return [program, "exec", *(["--nv"] if gpu else []), *seen, "--pwd", str(folder), image, *words]


def _variables(environment: Mapping[str, str], threads: int, gpu: bool) -> dict[str, str]:
    from dmir.job import THREAD_VARIABLES

    if gpu:
        from dmir.training.devices import lease_cards

        lease_cards()  # by CUDA_VISIBLE_DEVICES, for as long as this process lives
    library = str(Path(__file__).parents[2])  # is not the program's business
    paths = [path for path in os.environ.get("PYTHONPATH", "").split(os.pathsep) if path and path != library]
    own = {**os.environ, "PYTHONPATH": os.pathsep.join(paths)}
    return own | dict.fromkeys(THREAD_VARIABLES, str(threads)) | dict(environment)


def _run(
    words: list[str], folder: Path, variables: Mapping[str, str], limit: float | None, memory_gb: float, name: str
) -> dict[str, float]:
    """Run the program and return its seconds and its memory; DmirError where it fails."""
    output = folder / "output.txt"
    began, peak, reason = time.perf_counter(), 0.0, ""
    with output.open("wb") as file:
        try:
            process = subprocess.Popen(
                words,
                cwd=folder,
                env=dict(variables),
                stdin=subprocess.DEVNULL,
                stdout=file,
                stderr=subprocess.STDOUT,
                start_new_session=True,
                preexec_fn=end_with_parent,
            )
        except OSError as error:
            raise DmirError(f"{name} cannot be started: {error.strerror}") from error
        try:
            while process.poll() is None:
                resident, highest = _memory(process.pid)
                peak = max(peak, highest)
                spent = time.perf_counter() - began
                if resident > memory_gb * 1e9:
                    reason = f"{name} took more than memory_gb, {memory_gb:g} GB, and was stopped"
                    break
                if limit is not None and spent > limit:
                    reason = f"{name} was stopped after {limit:g} s"
                    break
                time.sleep(min(0.2, 0.01 + spent / 50))
            seconds = time.perf_counter() - began
        finally:
            _kill_group(process)
    said, _ = end_of(output, MOST_SAID)
    print(said, flush=True)
    last = said.splitlines()[-1].strip() if said else ""
    if not reason and process.returncode:
        reason = _ended(name, process.returncode)
    if reason:
        raise DmirError(f"{reason}: {last}" if last else reason)
    return {"seconds": seconds, "peak_memory_mb": peak / 2**20 or math.nan}  # not told where there is no /proc


def _ended(name: str, code: int) -> str:
    """Say how a program ended; OSError where somebody, or the system, killed it."""
    if code > 0:
        return f"{name} ended with status {code}"
    killed = f"{name} was killed by {signal_name(-code)}"
    if -code in KILLED:
        raise OSError(f"{killed}: by the system, for want of memory, or by somebody")
    return killed


def _kill_group(process: subprocess.Popen[bytes]) -> None:
    """End a program and all that it started."""
    with contextlib.suppress(ProcessLookupError):
        os.killpg(process.pid, signal.SIGKILL)
    process.wait()


def _memory(session: int) -> tuple[float, float]:
    """Return what the processes of a session hold, and the most that each of them held, in bytes; 0 where not told."""
    resident = highest = 0.0
    for entry in Path("/proc").glob("[0-9]*"):
        try:
            own = int((entry / "stat").read_text().rpartition(")")[2].split()[3])
            if own != session:
                continue
            told = dict(re.findall(r"^(VmRSS|VmHWM):\s+(\d+) kB", (entry / "status").read_text(), re.MULTILINE))
        except (OSError, ValueError, IndexError):  # it has ended
            continue
        resident += 1024.0 * int(told.get("VmRSS", 0))
        highest += 1024.0 * int(told.get("VmHWM", 0))
    return resident, highest


# --- what it wrote ---


def _read_field(path: Path, convention: str, fixed: Grid, moving: Grid, name: str) -> np.ndarray:
    """Read a program's field; DmirError where it is none on the fixed grid."""
    if not path.is_file():
        there = sorted(one.name for one in path.parent.iterdir() if one.name not in ("output.txt", path.name))
        raise DmirError(f"{name} wrote no {path.name}; in its folder are {', '.join(there) or 'no files'}")
    return read_displacement(path, convention, fixed, moving, f"{name}: {path.name}")


def read_displacement(path: Path, convention: str | None, fixed: Grid, moving: Grid, told: str) -> np.ndarray:
    """Return a field of a file, float32 (3, D, H, W), voxels of the fixed grid, on which it must lie.

    Raises
    ------
    InputError
        It is no field in this convention, or lies on another grid.
    """
    transform = read_transform(path, convention, told, fixed=fixed, moving=moving)
    own = transform.grid
    if own is not None and not same_grid(own, fixed):
        raise InputError(told, found=f"a field on another grid ({describe_grid(own)})", expected=describe_grid(fixed))
    return np.asarray(transform.on(fixed).displacement, dtype=np.float32)


def read_transform(path: Path, convention: str | None, told: str, **images: Grid) -> Transform:
    """Return the transform in a file, of which an error speaks as ``told``; ``images``: ``fixed`` and ``moving``."""
    from dmir.transforms import read

    try:
        return read(path, convention, **images)
    except InputError as error:
        where = told if error.where == str(path) else f"{told}: {error.where}"
        raise InputError(where, found=error.found, expected=error.expected, remedy=error.remedy) from None


# --- what it costs, and what it depends on ---


def cost(
    parameters: Mapping[str, Any],
    shape: Sequence[int],
    spacing: Sequence[float],
    measured: Mapping[str, float] = MappingProxyType({}),
) -> PairCost:
    """Return what the configuration says of a pair."""
    note = f"as `seconds` says; at most {parameters['memory_gb']:g} GB"
    return PairCost(float(parameters["seconds"]), 1e9 * parameters["memory_gb"], note)


def parts(parameters: Mapping[str, Any]) -> list[dict[str, Any]]:
    """Return what is measured for a plan: nothing, a plan runs no program."""
    return []


def runs(parameters: Mapping[str, Any]) -> str:
    """Say what would run."""
    words = list(parameters["arguments"])
    found = sys.executable if words[0] == "{python}" else shutil.which(words[0])
    within = f" in the container {parameters['container']}" if parameters["container"] else ""
    missing = "" if found or within else " (no such program here)"
    return f"program {' '.join(words)}{within}{missing}"


def state(parameters: Mapping[str, Any]) -> str:
    """Return a hash of the program, of files among its arguments, of its container, of its packages' versions."""
    from dmir.provenance import file_hash, value_hash

    found: dict[str, str] = {}
    first, *rest = parameters["arguments"]
    program = None if first == "{python}" else shutil.which(first)
    for path in [program, *rest, parameters["container"]]:
        if path is not None and Path(path).is_file():
            found[str(path)] = file_hash(path)
    for package in parameters["packages"]:
        try:
            found[package] = importlib.metadata.version(package)
        except importlib.metadata.PackageNotFoundError:
            found[package] = "not installed"
    return value_hash(found)
