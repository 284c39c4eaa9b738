"""The command ``dmir register``: two scans in, one folder out, and what a person at a terminal wants to know meanwhile.

Everything is written into a folder beside the one that is asked for, and only then moved there: a registration that
fails leaves nothing, and one that succeeds leaves nothing of the one before.
"""

from __future__ import annotations

import argparse
import json
import math
import platform
import sys
import time
from concurrent.futures import ThreadPoolExecutor
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import TYPE_CHECKING, Any

from rich.console import Console
from rich.progress import BarColumn, Progress, TextColumn, TimeElapsedColumn

import dmir
from dmir import registry
from dmir.doubts import told_doubts
from dmir.errors import InputError
from dmir.storage import replaced_files, require_folder

if TYPE_CHECKING:
    from dmir.methods.scans import RegisteredScans
    from dmir.volumes import Volume

RECORD = "registration.json"  # written last and removed first: where it is, the folder holds a whole registration
WRITTEN = (
    "field.nii.gz",
    "inverse_field.nii.gz",
    "affine.mat",
    "warped.nii.gz",
    "warped_labels.nii.gz",
    "fixed_labels_on_moving.nii.gz",
    "registration.png",
    RECORD,
)
"""All that this command ever writes."""
LIBRARIES = ("torch", "numpy", "scipy", "nibabel", "antspyx")
STEPS = {
    "affine": "affine alignment",
    "method": "registration",
    "inverse": "inverse",
    "quality": "quality control",
    "warp": "warping",
    "write": "writing",
}


def run(options: argparse.Namespace, threads: int) -> None:
    """Register two scans and write the folder."""
    with told_doubts(options.strict) as told:
        _run(options, threads, told)


def _run(options: argparse.Namespace, threads: int, told: list[str]) -> None:
    from dmir.methods.scans import read_labels_of, read_stripped, register_scans

    started = time.perf_counter()
    require_folder(options.out)
    method, parameters = chosen_method(options)
    moving = read_stripped(options.moving, options.moving_mask, "moving", options.skull_strip)
    fixed = read_stripped(options.fixed, options.fixed_mask, "fixed", options.skull_strip)
    labels = {
        f"{name}_labels": read_labels_of(scan, getattr(options, f"{name}_labels"), name)
        for name, scan in (("moving", moving), ("fixed", fixed))
    }
    reading = round(time.perf_counter() - started, 2)
    with Watcher(_stage_names(method, parameters, fixed)) as watcher:
        result = register_scans(
            moving,
            fixed,
            method=method,
            **labels,
            align=not options.no_affine,
            label_interpolation=options.label_interpolation,
            tell=watcher.begin,
            watch=watcher.watch,
            **parameters,
        )
        watcher.begin("write")
        record = _record(options, method, parameters, threads, result)
        record["seconds"] = {"read": reading, **result.facts["seconds"]}
        record["remarks"] = list(told)
        with replaced_files(options.out, WRITTEN, RECORD) as folder:
            _write(folder, result, moving, fixed, record, threads, started)
            names = [name for name in WRITTEN if (folder / name).is_file()]
    print(f"{options.out}: {', '.join(names)}")


# ---------------------------------------------------------------- what is asked for


def chosen_method(options: argparse.Namespace) -> tuple[str, dict[str, Any]]:
    """Return the method and its parameters, of the command line and of a file of settings.

    Raises
    ------
    InputError, ConfigError
        They contradict each other, or a parameter cannot be used.
    """
    settings = _read_settings(options.settings)
    named = settings.pop("algorithm", None)
    method = options.method or named or "descent"
    if named is not None and method != named:
        raise InputError(
            f"--method {method}", found=f"algorithm: {named} in {options.settings}", expected="one method in both"
        )
    network = str(method).endswith(".safetensors")
    if options.refine is not None:
        if not network:
            found, expected = f"with --method {method}", "a network's model.safetensors, whose field is refined"
            raise InputError("--refine", found=found, expected=expected)
        parameters = _checked("refinement", settings, options.settings)
        return "refinement", {"weights": method, **parameters, **_refining(options.refine, parameters)}
    if network and settings:
        raise InputError(
            options.settings,
            found=f"parameters ({', '.join(settings)})",
            expected="none: a network was trained with its own",
            remedy="With --refine they are those of the descent that refines its field.",
        )
    parameters = _checked(method, settings, options.settings)
    if method == "elastix" and options.threads is not None:
        parameters["threads"] = options.threads
    return method, parameters


def _has_settings(method: str) -> bool:
    """Tell whether it is a method with settings: not the weights of a network."""
    return not str(method).endswith(".safetensors") and registry.find(method, where="method").kind == "method"


def _read_settings(path: Path | None) -> dict[str, Any]:
    if path is None:
        return {}
    from dmir.config.reading import read_yaml

    return dict(read_yaml(path))


def _checked(method: str, settings: dict[str, Any], source: Path | None) -> dict[str, Any]:
    """Return the parameters as the configuration's model of that method checks them; only those that were given."""
    if not settings:
        return {}
    from pydantic import ValidationError

    from dmir.config.base import ConfigError, mistakes

    if not _has_settings(method):
        return settings
    fixed = {"algorithm": method} | ({"of": "the network"} if method == "refinement" else {})
    try:
        model = registry.settings_model(method).model_validate({**settings, **fixed})
    except ValidationError as error:
        raise ConfigError(str(source), mistakes(error)) from None
    values = model.model_dump(mode="json", exclude=set(fixed))
    return {name: value for name, value in values.items() if name in settings}


def _refining(steps: int, parameters: dict[str, Any]) -> dict[str, Any]:
    """Return the stages of a refinement of at most so many steps each; fewer than none: as many as they have."""
    if steps < 0:
        return {}
    from dataclasses import replace

    from dmir.methods.stages import REFINING, stages_of

    stages = stages_of(parameters.get("stages", REFINING))
    return {"stages": [replace(stage, steps=min(steps, stage.steps)) for stage in stages] if steps else []}


def _stage_names(method: str, parameters: dict[str, Any], fixed: Volume) -> list[str]:
    """Return what to call the stages of a descent; no other method tells of any."""
    if method not in ("descent", "refinement"):
        return []
    from dmir.methods.stages import REFINING, STAGES, levels

    stages = parameters.get("stages", STAGES if method == "descent" else REFINING)
    done = levels(stages, fixed.shape, fixed.spacing.tolist())
    return [f"stage {number} of {len(done)}, {stage.voxel:g} mm" for number, (stage, _) in enumerate(done, 1)]


# ---------------------------------------------------------------- how far it is


class Watcher:
    """Tells on the standard error how far a registration is: a bar on a terminal, a line a step in a log.

    Parameters
    ----------
    stages
        Names of the stages of a descent.
    """

    def __init__(self, stages: list[str]) -> None:
        self._stages, self._step, self._since = stages, "", time.perf_counter()
        self._last: tuple[int, int, float] | None = None
        self._bar: Progress | None = None
        if sys.stderr.isatty():
            columns = (TextColumn("{task.description}"), BarColumn(), TextColumn("{task.fields[told]}"))
            self._bar = Progress(*columns, TimeElapsedColumn(), console=Console(stderr=True), transient=True)
            self._bar.add_task("", total=None, told="")

    def __enter__(self) -> Watcher:
        if self._bar is not None:
            self._bar.start()
        return self

    def __exit__(self, kind: type[BaseException] | None, *_: object) -> None:
        if self._bar is not None:
            self._bar.stop()
        elif kind is None:
            self._end()

    def begin(self, step: str) -> None:
        """Tell that a step begins."""
        if self._bar is not None:
            self._bar.reset(self._bar.task_ids[0], total=None, description=STEPS[step], told="")
        elif self._step:
            self._end()
        self._step, self._since = step, time.perf_counter()

    def watch(self, stage: int, step: int, steps: int, similarity: float) -> None:
        """Tell of a step of a descent, as :data:`dmir.methods.descent.Watch`."""
        name = self._stages[stage] if stage < len(self._stages) else f"stage {stage + 1}"
        if self._bar is not None:
            task = self._bar.task_ids[0]
            self._bar.update(task, description=name, total=steps, completed=step)
            if not math.isnan(similarity):
                self._bar.update(task, told=f"step {step}/{steps}, similarity {similarity:.4f}")
            return
        if self._last is not None and self._last[0] != stage:
            self._tell_stage()
        reached = self._last[2] if math.isnan(similarity) and self._last is not None else similarity
        self._last = (stage, step, reached)

    def _tell_stage(self) -> None:
        if self._last is not None:
            stage, step, similarity = self._last
            name = self._stages[stage] if stage < len(self._stages) else f"stage {stage + 1}"
            print(f"{name}: {step} steps, similarity {similarity:.4f}", file=sys.stderr, flush=True)
            self._last = None

    def _end(self) -> None:
        self._tell_stage()
        print(f"{STEPS[self._step]}: {time.perf_counter() - self._since:.1f} s", file=sys.stderr, flush=True)


# ---------------------------------------------------------------- the folder


def _write(
    folder: Path,
    result: RegisteredScans,
    moving: Volume,
    fixed: Volume,
    record: dict[str, Any],
    threads: int,
    started: float,
) -> None:
    """Write all files beside one another, for zlib works without Python's lock, and the record at the end."""
    from dmir.fields import save_field
    from dmir.preprocess import write_affine
    from dmir.report.registration import draw_registration
    from dmir.volumes import write_volume

    begun = time.perf_counter()
    volumes = {
        "warped.nii.gz": result.warped,
        "warped_labels.nii.gz": result.warped_labels,
        "fixed_labels_on_moving.nii.gz": result.fixed_labels_on_moving,
    }
    with ThreadPoolExecutor(max(1, threads)) as pool:
        waiting = [
            pool.submit(save_field, folder / "field.nii.gz", result.displacement, fixed.affine),
            pool.submit(save_field, folder / "inverse_field.nii.gz", result.inverse, moving.affine),
            *(pool.submit(write_volume, folder / name, volume) for name, volume in volumes.items() if volume),
        ]
        write_affine(folder / "affine.mat", result.affine)
        draw_registration(folder / "registration.png", result, method=record["method"])
        for job in waiting:
            job.result()
    record["seconds"] |= {
        "write": round(time.perf_counter() - begun, 2),
        "total": round(time.perf_counter() - started, 2),
    }
    (folder / RECORD).write_text(json.dumps(record, indent=2, allow_nan=False) + "\n")


def _record(
    options: argparse.Namespace, method: str, parameters: dict[str, Any], threads: int, result: RegisteredScans
) -> dict[str, Any]:
    """Return what registration.json holds but the seconds, which go on."""
    given = ("moving", "fixed", "moving_mask", "fixed_mask", "moving_labels", "fixed_labels", "skull_strip")
    facts = {name: value for name, value in result.facts.items() if name != "seconds"}
    return {
        "method": "network" if method.endswith(".safetensors") else method,
        "parameters": _all_parameters(method, parameters),
        "versions": _versions(method),
        "inputs": {name: str(value) for name in given if (value := getattr(options, name)) is not None},
        "affine": None if options.no_affine else result.affine.tolist(),
        "label_interpolation": options.label_interpolation,
        "threads": threads,
        **facts,
    }


def _all_parameters(method: str, parameters: dict[str, Any]) -> dict[str, Any]:
    """Return all parameters of a method, defaults included, as ``--settings`` takes them; of a network its file."""
    from dataclasses import asdict

    from dmir.methods.stages import Stage
    from dmir.provenance import file_hash

    plain: dict[str, Any] = {
        name: [asdict(item) if isinstance(item, Stage) else item for item in value] if name == "stages" else value
        for name, value in parameters.items()
    }
    weights = plain.get("weights", method if method.endswith(".safetensors") else None)
    if weights is not None:
        return {**plain, "weights": str(weights), "weights_hash": file_hash(weights)}
    if not _has_settings(method):
        return plain
    return registry.settings_model(method).model_validate({"algorithm": method, **plain}).model_dump(mode="json")


def _versions(method: str) -> dict[str, str]:
    found = {"dmir": dmir.__version__, "python": platform.python_version()}
    for name in (*LIBRARIES, *(("itk-elastix",) if method == "elastix" else ())):
        try:
            found[name] = version(name)
        except PackageNotFoundError:
            found[name] = "unknown"
    return found
