"""Structures: named labels, in sets that are tables, and the maps between label schemes, which are tables too."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from importlib import resources
from pathlib import Path

import numpy as np
import pandas as pd

from dmir.doubts import doubt
from dmir.errors import InputError, suggestion
from dmir.tables import read_table
from dmir.volumes import Volume, read_labels

MOST_STRUCTURES = 1024  # of a set that is made from label maps: more are grey values
LOOKED_UP = 2**20  # the highest id for which a table is made


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
    table = read_table(path)
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


def structures_of_ids(found: Iterable[int]) -> StructureSet:
    """Return a set of the structures that label maps were found to have, named by their ids; 0 is none.

    Raises
    ------
    InputError
        There are more ids than any parcellation has.
    """
    ids = sorted(set(map(int, found)) - {0})
    if len(ids) > MOST_STRUCTURES:
        raise InputError(
            "structures",
            found=f"no name, and label maps with {len(ids)} different ids",
            expected=f"at most {MOST_STRUCTURES} structures",
            remedy="Check that these are label maps, or name the structures that are to be scored.",
        )
    rows = {"id": ids, "name": [f"label {number}" for number in ids], "hemisphere": "both", "colour": "", "source": ""}
    return StructureSet("labels", pd.DataFrame(rows))


def load_label_map(name: str) -> dict[int, int]:
    """Return a map from a label scheme's ids to a structure set's ids; InputError when there is none of that name."""
    table = _table(structures_folder() / "maps", name, "label_map", {"source_id", "source_name", "id"})
    return {int(s): int(i) for s, i in zip(table["source_id"], table["id"], strict=True)}


def read_structures(
    path: str | Path, structures: str | None, label_map: str | None = None, *, orientation: str | None = None
) -> Volume:
    """Read a label map as one of a structure set, and tell where its ids are hardly those.

    Parameters
    ----------
    path
        The label map.
    structures
        Name of the set; None: nobody knows what the ids mean.
    label_map
        Name of the map from the file's ids to those of the set; None: they are the same.
    orientation
        As for :func:`dmir.volumes.read_labels`.

    Raises
    ------
    InputError
        The file is unusable, or has none of the structures.
    """
    volume = read_labels(path, orientation=orientation)
    ids = present_ids(volume.data)
    mapping = None if label_map is None else load_label_map(label_map)
    data = volume.data if mapping is None else remap_labels(volume.data, mapping)
    chosen = None if structures is None else load_structures(structures)
    meant = set(present_ids(data)) if chosen is None else set(present_ids(data)) & set(chosen.ids)
    if ids and not meant:
        raise InputError(
            f"labels: {path}",
            found=f"ids that {label_map or structures} does not know ({_some(ids)}){_fitting(ids, structures)}",
            expected=f"ids of the scheme that {'label_map' if label_map else 'structures'} names",
            remedy="Choose another label_map or structure set; no label_map if the ids are the structures' own.",
        )
    if ids and chosen is not None and (told := misfit(ids, chosen, mapping)):
        doubt(path, found=told, done="used as it is")
    return Volume(data, volume.affine)


def present_ids(labels: np.ndarray) -> list[int]:
    """Return the ids of a label map but 0."""
    return [int(number) for number in np.unique(labels[labels != 0])]


def misfit(ids: Sequence[int], structures: StructureSet, mapping: Mapping[int, int] | None = None) -> str:
    """Say that ids are hardly those of a structure set, and which set they fit; "" where they may be its own.

    Parameters
    ----------
    ids
        Of label maps, without 0.
    structures
        What they are taken for.
    mapping
        From these ids to the set's; None: they are the same.
    """
    targets = dict.fromkeys(structures.ids) if mapping is None else mapping  # what is known
    unknown = [number for number in ids if number not in targets]
    own = {number if mapping is None else mapping.get(number) for number in ids}
    absent = len(set(structures.ids) - own)
    wrong = []
    if 2 * absent > len(structures.ids):
        wrong.append(f"{absent} of the {len(structures.ids)} structures of {structures.name} absent")
    if 2 * len(unknown) > len(ids):
        wrong.append(f"{len(unknown)} of its {len(ids)} labels unknown ({_some(unknown)})")
    doubtful = wrong and (mapping is None or 2 * len(unknown) > len(ids))
    return " and ".join(wrong) + (_fitting(ids, structures.name) if doubtful else "")


def _fitting(ids: Sequence[int], structures: str | None) -> str:
    """Name the structure set that ids fit, and the label map from them to the other; "" where that is the same set."""
    best = _best(set(ids), {name: set(load_structures(name).ids) for name in structure_set_names()})
    if not best or best == structures:
        return ""
    maps = {name: set(load_label_map(name)) for name in label_map_names() if name.endswith(f"_to_{structures}")}
    over = _best(set(ids), maps)
    return f"; the ids fit structures: {best}" + (f", or label_map: {over}" if over else "")


def _best(ids: set[int], sets: Mapping[str, set[int]]) -> str:
    """Return the name of the set that knows most of the ids, and of several such the one that is most like them."""
    known = {name: len(ids & own) / len(ids) for name, own in sets.items()}
    least = max(0.5, 0.9 * max(known.values(), default=0.0))
    alike = {name: len(ids & sets[name]) / len(ids | sets[name]) for name, part in known.items() if part >= least}
    return max(alike, key=alike.__getitem__) if alike else ""


def _some(ids: Sequence[int], most: int = 8) -> str:
    return ", ".join(map(str, ids[:most])) + (", ..." if len(ids) > most else "")


def remap_labels(labels: np.ndarray, mapping: Mapping[int, int]) -> np.ndarray:
    """Replace each id by what it maps to; ids that are not in the map become 0. Any shape, int32 out."""
    return _replaced(labels, list(mapping), np.array(list(mapping.values()), dtype=np.int32))


def positions(labels: np.ndarray, ids: Sequence[int]) -> np.ndarray:
    """Replace each id by its position in ``ids`` plus one, in the smallest type that holds it, all others by 0."""
    return _replaced(labels, ids, np.arange(1, len(ids) + 1, dtype=np.min_scalar_type(len(ids))))


def _replaced(labels: np.ndarray, ids: Sequence[int], targets: np.ndarray) -> np.ndarray:
    """Replace ids from 0 on by their targets, all others by 0; whatever the ids, it takes no memory but the result's.

    Up to LOOKED_UP a table is the fastest, with one place for all that is beyond it: an id can be billions.
    """
    highest = max(ids, default=0)
    if highest < LOOKED_UP:
        table = np.zeros(highest + 2, dtype=targets.dtype)
        table[list(ids)] = targets
        within = labels.min(initial=0) >= 0 and labels.max(initial=0) <= highest + 1
        return table[labels if within else np.clip(labels, 0, highest + 1)]
    order = np.argsort(ids)
    ascending = np.asarray(ids, dtype=np.int64)[order]
    place = np.minimum(np.searchsorted(ascending, labels), len(ids) - 1)
    return np.where(ascending[place] == labels, targets[order][place], targets.dtype.type(0))
