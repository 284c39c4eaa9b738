"""The sources of scans by their names, each imported when it is asked, and which of them recognises a folder."""

from __future__ import annotations

import importlib
from pathlib import Path
from types import ModuleType
from typing import Any

import pandas as pd

from dmir.errors import InputError, suggestion

SOURCES = {
    "simulated": "dmir.cohorts.simulated",
    "donors": "dmir.cohorts.donors",
    "table": "dmir.cohorts.table",
    "neurite_oasis": "dmir.cohorts.neurite_oasis",
    "learn2reg_oasis": "dmir.cohorts.learn2reg_oasis",
    "oasis1": "dmir.cohorts.oasis1",
    "freesurfer": "dmir.cohorts.freesurfer",
    "lpba40": "dmir.cohorts.lpba40",
    "ixi": "dmir.cohorts.ixi",
    "bids": "dmir.cohorts.bids",
}


def source_table(source: str, **parameters: Any) -> pd.DataFrame:
    """Return the scans that a source finds, in its own order, maybe without a split; InputError as it says."""
    if source not in SOURCES:
        raise InputError(
            "source", found=f"'{source}'", expected="a source of scans", remedy=suggestion(source, SOURCES)
        )
    return importlib.import_module(SOURCES[source]).scan_table(**parameters)


def folder_sources() -> list[str]:
    """Return the sources that read a folder of scans in a known layout."""
    return [name for name, module in SOURCES.items() if hasattr(importlib.import_module(module), "recognises")]


def default_orientation(source: str, **parameters: Any) -> str | None:
    """Return the axis codes that a source states for its files because their headers cannot be trusted, or None.

    A source has a constant ``ORIENTATION``, or a function ``orientation`` of its parameters, or neither.
    """
    module = importlib.import_module(SOURCES[source])
    if hasattr(module, "orientation"):
        return module.orientation(**parameters)
    return getattr(module, "ORIENTATION", None)


def require_layout(folder: str | Path, source: str) -> Path:
    """Return the folder as a path when it has the layout of a source.

    Raises
    ------
    InputError
        There is no such folder, or it looks different; the message says what to get and where, or which other source
        recognises the folder.
    """
    folder = Path(folder)
    module = importlib.import_module(SOURCES[source])
    expected = f"a folder as the source {source} has it"
    if not folder.is_dir():
        raise InputError(folder, found="no such folder", expected=expected, remedy=_where(module, folder))
    if module.recognises(folder):
        return folder
    others = [name for name in SOURCES if name != source and recognised(name, folder)]
    remedy = f"It looks like {' or '.join(others)}: name that as the source." if others else _where(module, folder)
    names = sorted(path.name for path in folder.iterdir())
    inside = ", ".join(names[:5]) + (", ..." if len(names) > 5 else "")
    raise InputError(folder, found=f"another layout ({inside or 'an empty folder'})", expected=expected, remedy=remedy)


def _where(module: ModuleType, folder: Path) -> str:
    """Tell what to get and where, and how the folder at hand must then look."""
    return str(module.WHERE).replace("<folder>", str(folder))


def recognised(source: str, folder: Path) -> bool:
    """Tell whether a folder has the layout of a source; a source that reads no folder recognises none."""
    recognises = getattr(importlib.import_module(SOURCES[source]), "recognises", None)
    return bool(recognises and recognises(folder))
