"""Structures: named labels, in sets that are tables, and the maps between label schemes, which are tables too."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from importlib import resources
from pathlib import Path

import numpy as np
import pandas as pd

from dmir.errors import InputError, suggestion


@dataclass(frozen=True)
class StructureSet:
    """The structures that a cohort is scored on.

    Attributes
    ----------
    name
        For instance ``"oasis28"``.
    table
        One row a structure: ``id``, ``name``, ``hemisphere`` (left, right or both), ``colour`` (#rrggbb), ``source``.
    """

    name: str
    table: pd.DataFrame

    @property
    def ids(self) -> list[int]:
        return [int(i) for i in self.table["id"]]

    @property
    def names(self) -> dict[int, str]:
        return dict(zip(self.ids, self.table["name"], strict=True))


def resources_folder() -> Path:
    """Return the folder of what is data: inside the installed package, or ``resources`` of a checkout."""
    packaged = Path(str(resources.files("dmir"))) / "resources"
    return packaged if packaged.is_dir() else Path(__file__).parents[2] / "resources"


def structures_folder() -> Path:
    """Return the folder of the tables of structures."""
    return resources_folder() / "structures"


def _table(folder: Path, name: str, key: str, columns: set[str]) -> pd.DataFrame:
    path = folder / f"{name}.csv"
    known = [p.stem for p in folder.glob("*.csv")]
    if name not in known:  # and not the path of some other file
        raise InputError(
            key,
            found=f"'{name}'",
            expected="the name of a table in resources/structures",
            remedy=suggestion(name, known),
        )
    table = pd.read_csv(path)
    missing = columns - set(table.columns)
    if missing:
        raise InputError(path, found=f"columns {list(table.columns)}", expected=f"also {sorted(missing)}")
    return table


def structure_set_names() -> list[str]:
    """Return the names of all structure sets."""
    return sorted(p.stem for p in structures_folder().glob("*.csv"))


def label_map_names() -> list[str]:
    """Return the names of all label maps."""
    return sorted(p.stem for p in (structures_folder() / "maps").glob("*.csv"))


def load_structures(name: str) -> StructureSet:
    """Return the structure set of that name; InputError with a suggestion when there is none."""
    columns = {"id", "name", "hemisphere", "colour", "source"}
    return StructureSet(name, _table(structures_folder(), name, "structures", columns))


def load_label_map(name: str) -> dict[int, int]:
    """Return a map from a label scheme's ids to a structure set's ids; InputError when there is none of that name."""
    table = _table(structures_folder() / "maps", name, "label_map", {"source_id", "source_name", "id"})
    return {int(s): int(i) for s, i in zip(table["source_id"], table["id"], strict=True)}


def remap_labels(labels: np.ndarray, mapping: Mapping[int, int]) -> np.ndarray:
    """Replace each id by what it maps to; ids that are not in the map become 0. Any shape, int32 out."""
    beyond = max(mapping, default=0) + 1  # one place for all higher ids: a single voxel can have an id of billions
    lookup = np.zeros(beyond + 1, dtype=np.int32)
    for source, target in mapping.items():
        lookup[source] = target
    return lookup[np.clip(labels, 0, beyond)]
