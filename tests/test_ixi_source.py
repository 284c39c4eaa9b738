"""IXI in its three forms, in small trees of the same shape, and pickles that want to be more than arrays."""

from __future__ import annotations

import functools
import os
import pickle
import struct
import tracemalloc
from pathlib import Path

import numpy as np
import pytest

from dmir.cohorts import ixi
from dmir.cohorts.pickles import MAXIMUM_INSTRUCTIONS, read_arrays
from dmir.errors import InputError
from dmir.structures import load_label_map, remap_labels
from dmir.volumes import Volume, read_image, read_labels, read_mask, reorient, same_grid, write_volume

DATA = Path(__file__).parents[2] / "shared" / "data" / "oasis_manual" / "1000"
SUBJECTS = {"Train": (0, 4, 10), "Val": (2,), "Test": (1, 3)}


@pytest.fixture(autouse=True)
def only_own_sources(monkeypatch: pytest.MonkeyPatch) -> None:
    """The messages must not depend on which other sources there are."""
    monkeypatch.setattr(
        "dmir.cohorts.sources.SOURCES", {name: f"dmir.cohorts.{name}" for name in ("table", "lpba40", "ixi", "bids")}
    )


@functools.cache
def brain() -> tuple[np.ndarray, np.ndarray]:
    """Return an image in [0, 1] and FreeSurfer's ids along L, I, A: every eighth voxel of a real scan, or numbers."""
    if DATA.is_dir():
        image = reorient(read_image(DATA / "1000_T1w_brain.nii.gz"), "LIA").data[::8, ::8, ::8]
        labels = reorient(read_labels(DATA / "1000_labels.nii.gz"), "LIA").data[::8, ::8, ::8]
        ids = remap_labels(labels, load_label_map("neuromorphometrics_to_oasis28")).astype(np.int16)
        return np.where(ids > 0, image / image.max(), 0).astype(np.float32), ids
    generator = np.random.default_rng(0)
    ids = generator.choice([0, 2, 3, 41, 42, 10, 49], (20, 24, 28)).astype(np.int16)
    return (generator.random(ids.shape) * (ids > 0)).astype(np.float32), ids


def pickles(folder: Path, subjects=SUBJECTS, **options) -> Path:
    """Build TransMorph's IXI_data."""
    for split, numbers in subjects.items():
        (folder / split).mkdir(parents=True)
        for number in numbers:
            (folder / split / f"subject_{number}.pkl").write_bytes(pickle.dumps(brain(), **options))
    (folder / "atlas.pkl").write_bytes(pickle.dumps(brain(), **options))
    return folder


def converted(folder: Path, kind: str = "_seg") -> Path:
    """Build the same as NIfTI."""
    names = [folder / "atlas", *(folder / split / f"subject_{n}" for split, ns in SUBJECTS.items() for n in ns)]
    for name in names:
        write_volume(name.with_name(f"{name.name}.nii.gz"), Volume(brain()[0], np.eye(4)))
        if kind:
            write_volume(name.with_name(f"{name.name}{kind}.nii.gz"), Volume(brain()[1], np.eye(4)))
    return folder


def refusal(folder: Path, **options) -> str:
    """Return what a folder is refused with."""
    with pytest.raises(InputError) as caught:
        ixi.scan_table(folder, **options)
    return str(caught.value)


def pickle_refusal(path: Path, data: bytes) -> str:
    """Return what a pickle is refused with."""
    path.write_bytes(data)
    with pytest.raises(InputError) as caught:
        read_arrays(path)
    assert str(path) in str(caught.value)
    return str(caught.value)


def written_by_numpy_1(data: bytes) -> bytes:
    """Return a small pickle as numpy 1 writes it, whose modules have other names."""
    if data[:1] == b"\x80" and data[1] >= 4:
        data = data[:2] + data[11:] if data[2:3] == b"\x95" else data  # the frame's length would not fit any more
        for part in (b"multiarray", b"numeric"):
            new, old = b"numpy._core." + part, b"numpy.core." + part
            data = data.replace(bytes([0x8C, len(new)]) + new, bytes([0x8C, len(old)]) + old)
    data = data.replace(b"cnumpy._core", b"cnumpy.core")
    assert b"_core" not in data
    return data


# the three forms


def test_pickles_are_listed_with_their_split(tmp_path: Path) -> None:
    table = ixi.scan_table(pickles(tmp_path / "IXI_data"), made=tmp_path / "made")
    assert list(table["scan"]) == ["atlas", *(f"subject_{n}" for n in (0, 1, 2, 3, 4, 10))]
    assert list(table["split"]) == ["atlas", "train", "test", "val", "test", "train", "train"]
    assert list(table["subject"]) == list(table["source_id"]) == list(table["scan"])
    row = table.iloc[3]
    assert row["made_from"] == str(tmp_path / "IXI_data" / "Val" / "subject_2.pkl")
    assert row["image"] == str(tmp_path / "made" / "subject_2" / "image.nii.gz")
    assert row["labels"] == str(tmp_path / "made" / "subject_2" / "labels.nii.gz")
    assert row["mask"] == str(tmp_path / "made" / "subject_2" / "mask.nii.gz")


def test_the_files_of_a_pickle_are_what_the_table_says(tmp_path: Path) -> None:
    row = ixi.scan_table(pickles(tmp_path / "IXI_data"), made=tmp_path / "made").iloc[2]
    ixi.write_scan(row["scan"], tmp_path / "made" / row["scan"], original=row["made_from"])
    image, labels, mask = read_image(row["image"]), read_labels(row["labels"]), read_mask(row["mask"])
    assert image.orientation == "LIA"
    assert list(image.spacing) == [1, 1, 1]
    assert same_grid(image, labels) and same_grid(image, mask)
    np.testing.assert_array_equal(image.data, brain()[0])
    np.testing.assert_array_equal(labels.data, brain()[1])
    np.testing.assert_array_equal(mask.data, brain()[0] > 0)


def test_left_lies_left_in_what_is_made_of_a_pickle(tmp_path: Path) -> None:
    """FreeSurfer's 2 is left, 41 is right; the arrays of this test are along L, I, A."""
    if not DATA.is_dir():
        pytest.skip("needs ../shared/data/oasis_manual")
    ixi.write_scan("atlas", tmp_path, original=pickles(tmp_path / "IXI_data") / "atlas.pkl")
    labels = reorient(read_labels(tmp_path / "labels.nii.gz"), "RAS").data
    assert np.argwhere(labels == 2)[:, 0].mean() < np.argwhere(labels == 41)[:, 0].mean() - 3
    assert np.argwhere(labels == 16)[:, 2].mean() < np.argwhere(labels == 10)[:, 2].mean()  # brainstem, thalamus
    assert np.argwhere(labels == 8)[:, 1].mean() < np.argwhere(labels == 11)[:, 1].mean()  # cerebellum, caudate


def test_other_axes_can_be_stated(tmp_path: Path) -> None:
    original = pickles(tmp_path / "IXI_data") / "atlas.pkl"
    ixi.write_scan("atlas", tmp_path / "made", original=original, orientation="RSP")
    assert read_image(tmp_path / "made" / "image.nii.gz").orientation == "RSP"
    with pytest.raises(InputError, match="orientation: found 'LIL'"):
        ixi.write_scan("atlas", tmp_path / "made", original=original, orientation="LIL")


def test_pickles_need_a_folder_for_what_is_made_of_them(tmp_path: Path) -> None:
    assert "made: found none" in refusal(pickles(tmp_path))


@pytest.mark.parametrize("kind", ["_seg", "_labels", ""])
def test_nifti_files_are_listed_with_their_split(tmp_path: Path, kind: str) -> None:
    table = ixi.scan_table(converted(tmp_path, kind))
    assert list(table["split"]) == ["atlas", "train", "test", "val", "test", "train", "train"]
    assert "made_from" not in table
    row = table.iloc[1]
    assert row["image"] == str(tmp_path / "Train" / "subject_0.nii.gz")
    assert row["labels"] == (str(tmp_path / "Train" / f"subject_0{kind}.nii.gz") if kind else "")
    if kind:
        assert same_grid(read_image(row["image"]), read_labels(row["labels"]))


def test_published_scans_have_neither_labels_nor_split(tmp_path: Path) -> None:
    for name in ("IXI012-HH-1211", "IXI002-Guys-0828", "IXI035-IOP-0873"):
        write_volume(tmp_path / f"{name}-T1.nii.gz", Volume(brain()[0], np.eye(4)))
    (tmp_path / "IXI002-Guys-0828-T2.nii.gz").touch()
    (tmp_path / "IXI.xls").touch()
    table = ixi.scan_table(tmp_path)
    assert list(table["scan"]) == ["IXI002-Guys-0828", "IXI012-HH-1211", "IXI035-IOP-0873"]
    assert list(table["subject"]) == ["IXI002", "IXI012", "IXI035"]
    assert set(table["labels"]) == set(table["mask"]) == {""}
    assert "split" not in table
    assert read_image(table.loc[0, "image"]).shape == brain()[0].shape


def test_the_form_can_be_chosen_where_there_are_two(tmp_path: Path) -> None:
    converted(pickles(tmp_path))
    assert "several forms" in refusal(tmp_path, made=tmp_path)
    assert ixi.scan_table(tmp_path, form="nifti").loc[0, "image"] == str(tmp_path / "atlas.nii.gz")
    assert ixi.scan_table(tmp_path, form="pickles", made="m").loc[0, "made_from"] == str(tmp_path / "atlas.pkl")


def test_a_form_that_is_not_there(tmp_path: Path) -> None:
    assert "no scan in the form nifti" in refusal(pickles(tmp_path), form="nifti")
    assert "Did you mean 'pickles'" in refusal(tmp_path, form="pickle")


def test_half_downloaded_trees(tmp_path: Path) -> None:
    pickles(tmp_path / "a", {"Train": (0, 4)})
    assert "no subject in Val, Test" in refusal(tmp_path / "a", made="m")
    pickles(tmp_path / "b")
    (tmp_path / "b" / "atlas.pkl").unlink()
    assert "1 of 1 files missing: atlas.pkl" in refusal(tmp_path / "b", made="m")
    converted(tmp_path / "c")
    for name in ("atlas.nii.gz", "Train/subject_4_seg.nii.gz", "Test/subject_3.nii.gz"):
        (tmp_path / "c" / name).unlink()
    text = refusal(tmp_path / "c")
    assert "3 of 14 files missing" in text
    assert all(name in text for name in ("atlas.nii.gz", "Train/subject_4_seg.nii.gz", "Test/subject_3.nii.gz"))


def test_a_subject_in_two_splits_is_refused(tmp_path: Path) -> None:
    pickles(tmp_path, {**SUBJECTS, "Val": (2, 4)})
    assert "subject_4 twice: Train/subject_4.pkl and Val/subject_4.pkl" in refusal(tmp_path, made="m")


def test_folders_of_another_layout(tmp_path: Path) -> None:
    assert "no such folder" in refusal(tmp_path / "none")
    assert "IXI-T1.tar" in refusal(tmp_path)  # empty
    (tmp_path / "delineation_space").mkdir()
    assert "looks like lpba40" in refusal(tmp_path)


def test_a_whole_cohort_is_listed_by_split(tmp_path: Path) -> None:
    for split, numbers in {"Train": range(403), "Val": range(403, 461), "Test": range(461, 576)}.items():
        (tmp_path / split).mkdir()
        for number in numbers:
            (tmp_path / split / f"subject_{number}.pkl").touch()
    (tmp_path / "atlas.pkl").touch()
    table = ixi.scan_table(tmp_path, made="made")
    assert table["split"].value_counts().to_dict() == {"train": 403, "test": 115, "val": 58, "atlas": 1}


@pytest.mark.parametrize(
    ("content", "said"),
    [
        (np.ones((3, 4, 5), np.float32), "1 arrays"),
        ((np.ones((3, 4, 5)),) * 4, "4 arrays"),
        ((np.ones((4, 5)), np.ones((4, 5))), "shape (4, 5)"),
        ((np.ones((3, 4, 5)), np.full((3, 4, 5), 0.5)), "not whole numbers"),
        ((np.ones((3, 4, 5)), np.full((3, 4, 5), np.nan)), "not whole numbers"),
    ],
)
def test_pickles_that_are_no_scan(tmp_path: Path, content: object, said: str) -> None:
    (tmp_path / "subject_1.pkl").write_bytes(pickle.dumps(content))
    with pytest.raises(InputError) as caught:
        ixi.write_scan("subject_1", tmp_path / "made", original=tmp_path / "subject_1.pkl")
    assert said in str(caught.value)
    assert "subject_1.pkl" in str(caught.value)
    assert not (tmp_path / "made").exists()


# pickles of arrays


@pytest.mark.parametrize("protocol", range(6))
@pytest.mark.parametrize("numpy_1", [False, True])
def test_arrays_of_every_kind_come_back(tmp_path: Path, protocol: int, numpy_1: bool) -> None:
    numbers = np.random.default_rng(0).integers(0, 200, (3, 4, 5))
    for kind in ("b1", "u1", "i2", "<i4", ">i4", "i8", "f2", "f4", ">f8"):
        plain = numbers.astype(kind)
        arrays = (plain, np.asfortranarray(plain), np.ascontiguousarray(plain.transpose(1, 0, 2)).transpose(1, 0, 2))
        data = pickle.dumps(list(arrays) if kind == "f4" else arrays, protocol)
        (tmp_path / "a.pkl").write_bytes(written_by_numpy_1(data) if numpy_1 else data)
        again = read_arrays(tmp_path / "a.pkl")
        assert len(again) == 3
        for before, after in zip(arrays, again, strict=True):
            np.testing.assert_array_equal(before, after)
            assert before.dtype == after.dtype


def test_one_array_and_an_array_from_a_file_in_place(tmp_path: Path) -> None:
    np.save(tmp_path / "a.npy", brain()[0])
    mapped = np.load(tmp_path / "a.npy", mmap_mode="r")
    (tmp_path / "a.pkl").write_bytes(pickle.dumps(mapped, protocol=4))
    (array,) = read_arrays(tmp_path / "a.pkl")
    np.testing.assert_array_equal(array, brain()[0])


def test_arrays_of_unequal_shapes(tmp_path: Path) -> None:
    text = pickle_refusal(tmp_path / "a.pkl", pickle.dumps((np.ones((2, 3)), np.ones((3, 2)))))
    assert "different shapes: (2, 3), (3, 2)" in text
    assert "no array" in pickle_refusal(tmp_path / "a.pkl", pickle.dumps(()))


@pytest.mark.parametrize("protocol", range(6))
def test_every_truncated_pickle_is_refused(tmp_path: Path, protocol: int) -> None:
    data = pickle.dumps((np.ones((2, 3), np.float32), np.ones((2, 3), np.int16)), protocol)
    for length in range(len(data)):
        assert "complete pickle" in pickle_refusal(tmp_path / "a.pkl", data[:length])


@pytest.mark.filterwarnings("ignore:invalid escape sequence:DeprecationWarning")
def test_damaged_pickles_are_refused_or_still_arrays(tmp_path: Path) -> None:
    generator = np.random.default_rng(0)
    outcomes = set()
    for protocol in (0, 2, 4, 5):
        whole = pickle.dumps((np.ones((2, 3), np.float32), np.ones((2, 3), np.int16)), protocol)
        for _ in range(300):
            data = bytearray(whole)
            for place in generator.integers(0, len(data), 3):
                data[place] = generator.integers(0, 256)
            (tmp_path / "a.pkl").write_bytes(data)
            try:
                outcomes.add(type(read_arrays(tmp_path / "a.pkl")[0]))
            except InputError:
                outcomes.add(InputError)
    assert outcomes == {np.ndarray, InputError}


def test_files_that_are_no_pickle(tmp_path: Path) -> None:
    assert "cannot be read" in pickle_refusal(tmp_path / "a.pkl", b"")
    assert "complete pickle" in pickle_refusal(tmp_path / "a.pkl", b"<html>not found</html>")
    with pytest.raises(InputError, match="no such file"):
        read_arrays(tmp_path / "none.pkl")


# pickles that want to be more than arrays


class Calls:
    """Pickles to a call."""

    def __init__(self, function, *arguments: object) -> None:
        self.call = function, arguments

    def __reduce__(self):
        return self.call


@pytest.mark.parametrize("protocol", range(6))
@pytest.mark.parametrize("where", ["alone", "beside an array", "inside", "as the state of an array"])
def test_programs_are_not_run_and_named(tmp_path: Path, protocol: int, where: str) -> None:
    marker = tmp_path / "marker"
    programs = {
        f"{os.system.__module__}.system": Calls(os.system, f"touch {marker}"),
        "eval": Calls(eval, f"open({str(marker)!r}, 'w')"),
        "exec": Calls(exec, f"open({str(marker)!r}, 'w')"),
        "getattr": Calls(getattr, "", "join"),
        "open": Calls(open, str(marker), "w"),
        "_io": Calls(Path.touch, marker),
        "fromfile": Calls(np.fromfile, str(tmp_path)),
    }
    if where == "beside an array":
        array = np.ones((2, 3), np.float32)
    for name, program in programs.items():
        if where == "alone":
            content: object = program
        elif where == "beside an array":
            content = (array, program)
        elif where == "inside":
            content = [[[program]]]
        else:
            content = Calls(np._core.multiarray._reconstruct, np.ndarray, (0,), program)
        text = pickle_refusal(tmp_path / "a.pkl", pickle.dumps(content, protocol))
        if name != "_io":
            assert "a call of" in text and name in text, text
        assert "Nothing of it was run" in text
        assert not marker.exists()


def stack_global(module: str, name: str) -> bytes:
    return b"".join(b"\x8c" + bytes([len(word)]) + word.encode() for word in (module, name)) + b"\x93"


@pytest.mark.parametrize(
    ("module", "name"),
    [
        ("os", "system"),
        ("numpy", "ndarray.tofile"),
        ("numpy", "os.system"),
        ("numpy.core.multiarray", "_reconstruct.__globals__"),
        ("numpy.core.multiarray", "scalar"),
        ("numpy._core._core.multiarray", "_reconstruct"),
        ("numpy.core.multiarray\n", "_reconstruct"),
        ("numpy.core.records", "fromfile"),
        ("_codecs", "decode"),
        ("builtins", "bytes"),
        ("copyreg", "_reconstructor"),
        ("dmir.cohorts.pickles", "_Name"),
    ],
)
def test_names_beside_the_allowed_ones_are_refused(tmp_path: Path, module: str, name: str) -> None:
    text = pickle_refusal(tmp_path / "a.pkl", b"\x80\x04" + stack_global(module, name) + b")R.")
    assert f"a call of {module}.{name}" in text


@pytest.mark.parametrize(
    ("data", "said"),
    [
        (b"(S'touch x'\nios\nsystem\n.", "the instruction STRING"),
        (b"(ios\nsystem\n.", "the instruction INST 'os system'"),
        (b"(cos\nsystem\no.", "the instruction OBJ"),
        (b"Pname\n.", "the instruction PERSID 'name'"),
        (b"\x82\x01.", "the instruction EXT1 1"),
        (b"\x80\x02cnumpy\nndarray\n)\x81.", "the instruction NEWOBJ"),
        (b"\x80\x04\x8f.", "the instruction EMPTY_SET"),
        (b"}.", "the instruction EMPTY_DICT"),
        (b"\x80\x05\x97.", "the instruction NEXT_BUFFER"),
        (b"cnumpy\nndarray\n(NNtb.", "a change of what it calls"),
        (b"cnumpy\nndarray\n.", "'name' instead of an array"),
        (b"cnumpy\nndarray\n)R.", "an array without numbers"),
        (b"I1\n.", "'int' instead of an array"),
    ],
)
def test_instructions_that_arrays_do_not_need(tmp_path: Path, data: bytes, said: str) -> None:
    assert said in pickle_refusal(tmp_path / "a.pkl", data)


@pytest.mark.parametrize(
    ("content", "said"),
    [
        (np.array([[1, "a"], [None, True]], dtype=object), "the type 'O8'"),
        (np.array(["abc", "de"]), "the type 'U3'"),
        (np.zeros(3, "V6"), "the type 'V6'"),
        (np.zeros(3, "M8[D]"), "the type 'M8'"),
        (np.zeros(3, complex), "the type 'c16'"),
        (np.zeros((0, 3)), "the shape (0, 3)"),
        ([1, 2, 3], "instead of an array"),
        ((np.ones(3), "name"), "instead of an array"),
        (((np.ones(3),),), "'tuple' instead of an array"),
        ({"image": np.ones(3)}, "the instruction EMPTY_DICT"),
        (np.zeros(3, [("a", "f4"), ("b", "i2")]), "the instruction EMPTY_DICT"),  # its fields
    ],
)
def test_contents_that_are_no_arrays_of_numbers(tmp_path: Path, content: object, said: str) -> None:
    assert said in pickle_refusal(tmp_path / "a.pkl", pickle.dumps(content, 4))


def array_state(shape: tuple, kind: str, raw: bytes) -> bytes:
    """Return a pickle of an array with a state of one's own."""

    class State:
        def __reduce__(self):
            return np._core.multiarray._reconstruct, (np.ndarray, (0,), b"b"), (1, shape, np.dtype(kind), False, raw)

    return pickle.dumps(State(), 4)


@pytest.mark.parametrize("shape", [(10**6, 10**6), (2**40,), (7,), (1, 1), (-2, -4), (2**300,), (True, 8)])
def test_arrays_that_claim_what_the_file_has_not(tmp_path: Path, shape: tuple) -> None:
    tracemalloc.start()
    text = pickle_refusal(tmp_path / "a.pkl", array_state(shape, "u1", b"12345678"))
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert "claims" in text or "the shape" in text
    assert peak < 10e6


@pytest.mark.parametrize(
    "data",
    [
        b"\x80\x04\x8e" + struct.pack("<Q", 2**40) + b"abc.",  # BINBYTES8
        b"\x80\x05\x96" + struct.pack("<Q", 2**40) + b"abc.",  # BYTEARRAY8
        b"\x80\x04\x95" + struct.pack("<Q", 2**40) + b"N.",  # FRAME
        b"Nr" + struct.pack("<I", 2**31 - 1) + b".",  # LONG_BINPUT: memory for all places up to this one
        b"Np2147483647\n.",  # PUT
        b"N0" * MAXIMUM_INSTRUCTIONS + b"N.",
    ],
)
def test_claims_of_length_take_no_memory(tmp_path: Path, data: bytes) -> None:
    tracemalloc.start()
    pickle_refusal(tmp_path / "a.pkl", data)
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert peak < 10e6


def test_what_is_nested_a_thousand_laughs_deep_is_refused_and_not_walked_through(tmp_path: Path) -> None:
    """Each tuple holds the one before twice: 2**100 leaves for whoever walks through or hashes them."""
    laughs = b"\x80\x04)" + b"\x942\x86" * 100
    assert "the instruction DUP" in pickle_refusal(tmp_path / "a.pkl", laughs + b".")
    doubled = b"\x80\x04)" + b"".join(b"\x94h" + bytes([k]) + b"\x86" for k in range(100))
    assert "'tuple' instead of an array" in pickle_refusal(tmp_path / "a.pkl", doubled + b".")
    assert "EMPTY_DICT" in pickle_refusal(tmp_path / "a.pkl", doubled + b"}" + b"h\x05NsN.")


def test_one_text_cannot_be_made_into_many_bytes(tmp_path: Path) -> None:
    text = b"X" + struct.pack("<I", 10**6) + b"a" * 10**6 + b"q\x00"
    encode = b"c_codecs\nencode\nq\x01X\x06\x00\x00\x00latin1q\x02"
    repeated = b"h\x01h\x00h\x02\x86R" * 100
    tracemalloc.start()
    said = pickle_refusal(tmp_path / "a.pkl", b"\x80\x02" + text + encode + repeated + b".")
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert "more bytes than the file has" in said
    assert peak < 10e6
