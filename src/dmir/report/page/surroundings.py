"""What the results were made with: machine, versions, configuration. No name of a machine or of a person."""

from __future__ import annotations

import os
import platform
from collections.abc import Mapping
from importlib import metadata
from pathlib import Path
from typing import Any

import torch
import yaml

import dmir

PACKAGES = (
    "torch", "lightning", "snakemake", "antspyx", "itk-elastix", "SimpleITK", "numpy", "pandas", "nibabel",
    "matplotlib",
)  # fmt: skip


def machine() -> list[tuple[str, str]]:
    """Return what is known of the machine that makes the page: (name, value)."""
    return [
        ("dmir", dmir.__version__),
        ("Python", f"{platform.python_implementation()} {platform.python_version()}"),
        ("Operating system", _operating_system()),
        ("Processor", f"{_processor()}, {os.cpu_count()} logical cores"),
        ("Graphics cards", ", ".join(_graphics_cards()) or "none that torch sees"),
    ]


def _operating_system() -> str:
    """Return distribution and kernel; :func:`platform.platform` has no host name in it."""
    try:
        distribution = platform.freedesktop_os_release().get("PRETTY_NAME", "")
    except OSError:
        distribution = ""
    return ", ".join(part for part in (distribution, platform.platform()) if part)


def _processor() -> str:
    try:
        lines = Path("/proc/cpuinfo").read_text(encoding="utf-8").splitlines()
    except OSError:
        lines = []
    names = [line.partition(":")[2].strip() for line in lines if line.startswith("model name")]
    return names[0] if names else platform.processor() or platform.machine()


def _graphics_cards() -> list[str]:
    """Return the names of the cards; without one, counting starts no CUDA."""
    return [torch.cuda.get_device_name(number) for number in range(torch.cuda.device_count())]


def versions() -> list[tuple[str, str]]:
    """Return the versions of the packages that numbers depend on."""
    found = []
    for name in PACKAGES:
        try:
            found.append((name, metadata.version(name)))
        except metadata.PackageNotFoundError:
            found.append((name, "not installed"))
    return found


def without_home(text: str) -> str:
    """Return a text with the home folder, which names a person, as ``~``."""
    home = str(Path.home())
    return text.replace(home, "~") if len(home) > 1 else text


def _plain(value: Any) -> Any:
    """Return nested mappings, lists and values that YAML has words for."""
    if isinstance(value, Mapping):
        return {str(key): _plain(item) for key, item in value.items()}
    if isinstance(value, list | tuple | set | frozenset):
        return [_plain(item) for item in value]
    return value if value is None or isinstance(value, bool | int | float | str) else str(value)


def configuration_text(configuration: Mapping[str, Any]) -> str:
    """Return the whole configuration as YAML."""
    text: str = yaml.safe_dump(_plain(configuration), sort_keys=False, allow_unicode=True)
    return without_home(text)


def revision_text(revision: str) -> str:
    """Return the revision in words: git's ``-dirty`` means files that no commit has."""
    if not revision:
        return "not known"
    clean = revision.removesuffix("-dirty")
    return f"{clean}, with uncommitted changes" if clean != revision else clean
