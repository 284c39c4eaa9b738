"""Everything that reads, given files that lie: refused with a message, nothing executed, bounded memory.

The number of generated cases stands in :data:`EXAMPLES` and, compared with it here, in ``docs/security.md``. With
``DMIR_FUZZ=10`` there are ten times as many.
"""

from __future__ import annotations

import ast
import contextlib
import copy
import gzip
import io
import json
import os
import pickle
import re
import struct
import subprocess
import sys
import tracemalloc
import zipfile
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import nibabel as nib
import numpy as np
import pandas as pd
import pytest
import torch
import yaml
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from markupsafe import Markup
from safetensors.torch import save_file

from dmir import networks
from dmir.cohorts import SAFE_NAME, check_scan_table, scan_table
from dmir.cohorts.layout import MAXIMUM_BYTES, MAXIMUM_CELLS, MAXIMUM_COLUMNS
from dmir.cohorts.pickles import read_arrays
from dmir.cohorts.splits import apply_split
from dmir.config import Config, ConfigError, parse_config, read_config, sections
from dmir.config.reading import MAXIMUM_ENTRIES, read_yaml
from dmir.errors import DmirError, InputError
from dmir.fields import load_field, save_field
from dmir.report.page.document import write_page
from dmir.report.writing import write_table
from dmir.structures import load_structures, remap_labels
from dmir.training.resume import ResumeFile, TrainingState
from dmir.training.weights import LARGEST, load_weights, read_metadata, save_weights
from dmir.transforms import read as read_transform
from dmir.volumes import (
    BESIDE_VOXELS,
    MAXIMUM_VOXELS,
    Grid,
    describe_grid,
    read_image,
    read_labels,
    read_mask,
    reorient,
    write_volume,
)
from dmir.workflow.facts import SCAN_NAME

ROOT = Path(__file__).parents[1]
# generated cases by property; each is a row of docs/security.md
EXAMPLES = {
    "NIfTI headers with changed bytes": 400,
    "MGH headers with changed bytes": 200,
    "files of random bytes": 300,
    "field headers with changed bytes": 200,
    "pickles with changed bytes": 300,
    "weights with changed bytes": 150,
    "weights with a changed description": 40,
    "resume files with changed bytes": 60,
    "names of scans": 300,
    "tables of random text": 200,
    "configurations with a changed leaf or key": 300,
    "configurations of random text": 200,
}
TIMES = int(os.environ.get("DMIR_FUZZ", "1"))
PEAK = 32 * 2**20  # bytes that reading a small hostile file may take at any time
SHAPE = (4, 5, 6)
AFFINE = np.array([[-1.5, 0, 0, 10], [0, 0, 1.5, -3], [0, 1.5, 0, 7], [0, 0, 0, 1.0]])
READERS: tuple[Callable, ...] = (read_image, read_labels, read_mask)
SHELL = ("; touch ran", "$(touch ran)", "`touch ran`", "a|touch ran", "a\ntouch ran", "'", '"', "-rf", "*", "~", "")
PATHS = ("..", "../x", "/etc/passwd", "a/../../b", "a/b", ".hidden", "C:\\x", "a\0b", "a" * 101, "a" * 5000)


def tried(name: str) -> Callable[[Callable], Callable]:
    """Give a property as many cases as :data:`EXAMPLES` says, the same ones in every run."""
    return settings(
        max_examples=EXAMPLES[name] * TIMES,
        deadline=None,
        derandomize=True,
        database=None,
        suppress_health_check=list(HealthCheck),
    )


def short(value: object) -> str:
    """Name a parameter; some are a megabyte long."""
    return f"{value:.20}" if isinstance(value, str) else type(value).__name__


@contextlib.contextmanager
def bounded(peak: int = PEAK) -> Iterator[None]:
    """Fail where more memory is taken at once; numpy, bytes and what nibabel allocates are all counted."""
    tracemalloc.start()
    try:
        yield
        assert tracemalloc.get_traced_memory()[1] < peak
    finally:
        tracemalloc.stop()


def refusal(function: Callable, *arguments: Any, named: str = "") -> str:
    with bounded(), pytest.raises(DmirError) as caught:
        function(*arguments)
    text = str(caught.value)
    assert named in text, text
    if isinstance(caught.value, InputError):
        assert caught.value.found and caught.value.expected
    return text


def nifti(data: np.ndarray | None = None, affine: np.ndarray = AFFINE, **header: Any) -> bytes:
    """Return a NIfTI file whose header says something else than what it should."""
    data = np.arange(120, dtype=np.int16).reshape(SHAPE) if data is None else data
    image = nib.Nifti1Image(data, affine)
    raw = image.to_bytes()
    fields = np.frombuffer(raw[:348], dtype=image.header.template_dtype).copy()
    for key, value in header.items():
        fields[key][0] = value
    return fields.tobytes() + raw[348:]


def mgh() -> bytes:
    return nib.MGHImage(np.arange(120, dtype=np.int16).reshape(SHAPE), AFFINE).to_bytes()


def field() -> np.ndarray:
    return np.random.default_rng(0).normal(size=(3, *SHAPE)).astype(np.float32)


def changed(raw: bytes, changes: list[tuple[int, int]]) -> bytes:
    copied = bytearray(raw)
    for place, value in changes:
        copied[place % len(copied)] = value
    return bytes(copied)


def changes(within: int) -> st.SearchStrategy:
    """One to four bytes somewhere in the first ones; 0, 127, 128 and 255 make the largest claims."""
    byte = st.one_of(st.sampled_from([0, 1, 127, 128, 255]), st.integers(0, 255))
    return st.lists(st.tuples(st.integers(0, within - 1), byte), min_size=1, max_size=4)


def read_or_refuse(path: Path, readers: tuple[Callable, ...] = READERS) -> None:
    """Read, or refuse by an InputError and nothing else; what comes back is fit to be used."""
    for reader in readers:
        with bounded(), contextlib.suppress(InputError):
            volume = reader(path)
            assert min(volume.shape) >= 2 and np.isfinite(volume.data).all()
            assert len(volume.orientation) == 3 and describe_grid(volume)
            assert reorient(volume).orientation == "RAS"


# images


@pytest.mark.parametrize("ending", [".nii", ".nii.gz"])
@pytest.mark.parametrize(
    ("header", "said"),
    [
        ({"dim": [3, 30000, 30000, 30000, 1, 1, 1, 1]}, "claims (30000, 30000, 30000) voxels"),
        ({"dim": [3, 10000, 10000, 10000, 1, 1, 1, 1]}, "claims (10000, 10000, 10000) voxels"),  # 10^12
        ({"dim": [3, 1000, 1000, 1000, 1, 1, 1, 1]}, "1000x1000x1000 voxels in a file of"),
        ({"dim": [3, 4, -5, 6, 1, 1, 1, 1]}, "4x-5x6"),
        ({"dim": [3, -4, -5, 6, 1, 1, 1, 1]}, "-4x-5x6"),
        ({"dim": [3, 0, 5, 6, 1, 1, 1, 1]}, "0x5x6"),
        ({"dim": [0, 4, 5, 6, 1, 1, 1, 1]}, ""),
        ({"dim": [-3, 4, 5, 6, 1, 1, 1, 1]}, ""),
        ({"dim": [4, 4, 5, 6, 30000, 1, 1, 1]}, "30000 volumes in one file"),
        ({"dim": [7, 4, 5, 6, 32767, 32767, 32767, 32767]}, "an array of shape"),
        ({"datatype": 999}, "cannot be read"),
        ({"datatype": 32, "bitpix": 64}, "complex64"),
        ({"datatype": 128, "bitpix": 24}, "voxels of the type"),  # RGB
        ({"datatype": 1792, "bitpix": 128}, "voxels of the type complex128"),
        ({"vox_offset": 1e30}, ""),
        ({"vox_offset": -1e30}, ""),
        ({"vox_offset": np.nan}, ""),
        ({"vox_offset": 1e9}, ""),
        ({"scl_slope": np.inf, "scl_inter": np.nan}, ""),
        ({"srow_x": [np.nan, 0, 0, 0], "sform_code": 1}, "affine that cannot be inverted"),
        ({"srow_y": [0, np.inf, 0, 0], "sform_code": 1}, "affine that cannot be inverted"),
        ({"srow_x": [1e30, 0, 0, 0], "sform_code": 1}, "affine that cannot be inverted"),
        ({"srow_x": [0, 0, 0, 0], "sform_code": 1}, "affine that cannot be inverted"),
    ],
    ids=short,
)
def test_headers_of_what_no_scan_is(tmp_path, header, said, ending):
    path, raw = tmp_path / f"lie{ending}", nifti(**header)
    path.write_bytes(gzip.compress(raw) if ending == ".nii.gz" else raw)
    for reader in READERS:
        if "scl_slope" not in header:  # that is refused or left out, as nibabel says
            assert said in refusal(reader, path, named=path.name)
    read_or_refuse(path)


def test_a_header_of_a_terabyte_behind_a_hundred_bytes(tmp_path):
    path = tmp_path / "short.nii"
    path.write_bytes(nifti(dim=[3, 10000, 10000, 10000, 1, 1, 1, 1])[:100])
    refusal(read_image, path, named="short.nii")


def test_wrong_bits_a_voxel_change_nothing(tmp_path):
    """The type of the voxels says how large they are; that alone is used."""
    path = tmp_path / "bits.nii"
    path.write_bytes(nifti(bitpix=8))
    np.testing.assert_array_equal(read_image(path).data.ravel(), np.arange(120))


def test_gzip_that_becomes_more_than_its_header_says(tmp_path):
    path = tmp_path / "bomb.nii.gz"
    path.write_bytes(gzip.compress(nifti(np.arange(8, dtype=np.int16).reshape(2, 2, 2)) + bytes(40_000_000)))
    assert "more than 4 MiB follow" in refusal(read_image, path, named="bomb.nii.gz")
    plain = tmp_path / "long.nii"
    plain.write_bytes(nifti() + bytes(BESIDE_VOXELS + 1))
    assert "bytes behind the 4x5x6 voxels" in refusal(read_image, plain, named="long.nii")
    plain.write_bytes(nifti() + bytes(1000))  # a footer is no bomb
    assert read_image(plain).shape == SHAPE


BOMBS = """
import gzip, resource, struct, sys
from pathlib import Path
import numpy as np, nibabel as nib
from dmir.errors import InputError
from dmir.volumes import read_image

folder, extensions, large = Path(sys.argv[1]), struct.pack("<4B", 1, 0, 0, 0), 300_000_000
header = nib.Nifti1Image(np.zeros((9, 9, 9), np.uint8), np.eye(4)).to_bytes()[:348]
fields = np.frombuffer(header, nib.Nifti1Header.template_dtype)
def write(name, parts, **changes):
    copied = fields.copy()
    for key, value in changes.items():
        copied[key][0] = value
    with gzip.open(folder / name, "wb", 1) as file:
        for part in (copied.tobytes(), *parts):
            file.write(part)
    return folder / name
zeros = [bytes(10_000_000)] * (large // 10_000_000)
paths = [
    write("behind.nii.gz", [bytes(4), *zeros]),
    write("extension.nii.gz", [extensions, struct.pack("<2i", large, 6), *zeros], vox_offset=large + 352),
    write("negative.nii.gz", [extensions, struct.pack("<2i", 0, 6), *zeros], vox_offset=1e6),
    write("pair.hdr.gz", [extensions, struct.pack("<2i", large, 6), *zeros], magic=b"ni1"),
    write("claim.nii.gz", [bytes(4)], dim=[3, 1000, 1000, 1000, 1, 1, 1, 1]),
]
write("pair.img.gz", zeros, magic=b"ni1")
before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
for path in paths:
    try:
        read_image(path)
    except InputError as error:
        assert path.name.split(".")[0] in str(error), error
    else:
        raise SystemExit(f"{path.name} was read")
print(resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before)
"""


def test_bombs_do_not_fill_the_memory_of_the_process(tmp_path):
    """Files of 2 MB that become 300 MB, as voxels, as one extension, as one of unlimited length: resident memory."""
    done = subprocess.run([sys.executable, "-c", BOMBS, tmp_path], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert int(done.stdout) < 32 * 1024  # KiB


@pytest.mark.parametrize("kind", ["plain", "gzip", "field"])
def test_every_prefix_of_a_volume_is_refused(tmp_path, kind):
    path = tmp_path / ("cut.nii.gz" if kind == "gzip" else "cut.nii")
    if kind == "field":
        save_field(path, field()[:, :2, :2, :2], AFFINE)
    else:
        small = nifti(np.arange(8, dtype=np.int16).reshape(2, 2, 2))
        path.write_bytes(gzip.compress(small) if kind == "gzip" else small)
    raw, reader = path.read_bytes(), load_field if kind == "field" else read_image
    reader(path)
    for length in range(len(raw)):
        path.write_bytes(raw[:length])
        with pytest.raises(InputError, match=r"cut\.nii"):
            reader(path)


@tried("NIfTI headers with changed bytes")
@given(changes(352), st.booleans(), st.sampled_from(READERS))
def test_changed_bytes_of_a_nifti_header(tmp_path_factory, where, compressed, reader):
    path = tmp_path_factory.getbasetemp() / ("changed.nii.gz" if compressed else "changed.nii")
    raw = changed(nifti(), where)
    path.write_bytes(gzip.compress(raw, 1) if compressed else raw)
    read_or_refuse(path, (reader,))


@tried("MGH headers with changed bytes")
@given(changes(284), st.booleans(), st.sampled_from(READERS))
def test_changed_bytes_of_an_mgh_header(tmp_path_factory, where, compressed, reader):
    path = tmp_path_factory.getbasetemp() / ("changed.mgz" if compressed else "changed.mgh")
    raw = changed(mgh(), where)
    path.write_bytes(gzip.compress(raw, 1) if compressed else raw)
    read_or_refuse(path, (reader,))


@tried("files of random bytes")
@given(
    st.binary(max_size=600),
    st.sampled_from([b"", nifti()[:352], b"\x1f\x8b\x08", gzip.compress(nifti())[:60], mgh()[:284]]),
    st.sampled_from([".nii", ".nii.gz", ".mgh", ".mgz", ".hdr", ".img.gz", ".gii", ".dtseries.nii", ".HEAD", ".mnc"]),
    st.sampled_from(READERS),
)
def test_files_of_random_bytes(tmp_path_factory, content, start, ending, reader):
    path = tmp_path_factory.getbasetemp() / f"noise{ending}"
    path.write_bytes(start + content)
    read_or_refuse(path, (reader,))
    with bounded(), contextlib.suppress(InputError):
        load_field(path)
    path.unlink()


def test_kinds_of_files_that_are_no_volumes_are_not_parsed(tmp_path):
    """GIFTI is XML: ten entities of ten entities each are billions of letters for who expands them."""
    entities = "".join(f'<!ENTITY a{n} "{f"&a{n - 1};" * 10}">' for n in range(1, 12))
    path = tmp_path / "laughs.gii"
    path.write_text(f'<?xml version="1.0"?><!DOCTYPE GIFTI [<!ENTITY a0 "ha">{entities}]><GIFTI>&a11;</GIFTI>')
    assert "an XML file" in refusal(read_image, path, named="laughs.gii")


def test_ids_of_billions_take_no_memory(tmp_path):
    labels = np.zeros(SHAPE, np.int32)
    labels[0, 0, 0], labels[1, 1, 1] = 2**31 - 1, 7
    with bounded():
        assert remap_labels(labels, {7: 3})[1, 1, 1] == 3 and remap_labels(labels, {7: 3}).sum() == 3
    for value in (-1.0, 2.0**31, 1e300):
        path = tmp_path / "ids.nii"
        path.write_bytes(nifti(np.where(labels == 7, value, 1.0)))
        assert "ids from" in refusal(read_labels, path, named="ids.nii")


def test_names_of_files_are_names_and_no_commands(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    for number, name in enumerate(name for name in SHELL if "/" not in name):
        path = tmp_path / f"{number}{name}.nii.gz"
        path.write_bytes(gzip.compress(nifti()))
        assert read_image(path).shape == SHAPE
        save_field(path, field(), AFFINE)
        assert load_field(path)[0].shape == (3, *SHAPE)
    assert not (tmp_path / "ran").exists()


# displacement fields


@pytest.mark.parametrize(
    ("header", "said"),
    [
        ({"dim": [5, 30000, 30000, 30000, 1, 3, 1, 1]}, "claims (30000, 30000, 30000, 1, 3) voxels"),
        ({"dim": [5, 500, 500, 500, 1, 3, 1, 1]}, "500x500x500x1x3 voxels in a file of"),
        ({"dim": [5, 4, -5, 6, 1, 3, 1, 1]}, "4x-5x6x1x3"),
        ({"dim": [5, 4, 5, 0, 1, 3, 1, 1]}, "4x5x0x1x3"),
        ({"dim": [5, 4, 5, 6, 1, 2, 1, 1]}, "(D, H, W, 1, 3)"),
        ({"dim": [3, 4, 5, 18, 1, 1, 1, 1]}, "(D, H, W, 1, 3)"),
        ({"srow_x": [np.nan, 0, 0, 0]}, "affine that cannot be inverted"),
        ({"srow_x": [0, 0, 0, 0]}, "affine that cannot be inverted"),
        ({"datatype": 32, "bitpix": 64}, "complex64"),
        ({"scl_slope": 1e38, "scl_inter": 0}, "NaN or infinite"),
    ],
    ids=short,
)
def test_fields_of_what_no_field_is(tmp_path, header, said):
    path = tmp_path / "field.nii"
    save_field(path, 1000 * field(), AFFINE)
    raw = path.read_bytes()
    fields = np.frombuffer(raw[:348], nib.Nifti1Header.template_dtype).copy()
    for key, value in header.items():
        fields[key][0] = value
    path.write_bytes(fields.tobytes() + raw[348:])
    assert said in refusal(load_field, path, named="field.nii")


@tried("field headers with changed bytes")
@given(changes(352))
def test_changed_bytes_of_a_field_header(tmp_path_factory, where):
    path = tmp_path_factory.getbasetemp() / "field.nii"
    save_field(path, field(), AFFINE)
    path.write_bytes(changed(path.read_bytes(), where))
    with bounded(), contextlib.suppress(InputError):
        displacement, affine = load_field(path)
        assert displacement.shape[0] == 3 and np.isfinite(displacement).all() and np.isfinite(affine).all()


# what can hold code


class Runs:
    """Pickles to a call that leaves a file behind."""

    def __init__(self, marker: Path) -> None:
        self.marker = marker

    def __reduce__(self):
        return Path.touch, (self.marker,)


@tried("pickles with changed bytes")
@given(changes(400), st.integers(0, 5), st.booleans())
def test_changed_bytes_of_a_pickle(tmp_path_factory, where, protocol, program):
    folder = tmp_path_factory.getbasetemp()
    path, marker = folder / "a.pkl", folder / "it ran"
    arrays = (np.ones((2, 3), np.float32), np.ones((2, 3), np.int16))
    path.write_bytes(changed(pickle.dumps((*arrays, Runs(marker)) if program else arrays, protocol), where))
    with bounded(), contextlib.suppress(InputError):
        assert all(array.dtype.kind in "biuf" for array in read_arrays(path))
    assert not marker.exists()


SMALL = {"encoder": [4, 4], "decoder": [4, 4, 4], "integration_steps": 0}


def small_network() -> torch.nn.Module:
    return networks.build("voxelmorph", (16, 16, 16), **SMALL)


@pytest.fixture(scope="module", autouse=True)
def _torch_has_what_it_loads_late():
    """The first network without memory has torch import more than any file here takes."""
    with torch.device("meta"):
        small_network()


def small_weights(path: Path) -> bytes:
    torch.manual_seed(0)
    network = small_network()
    grid = Grid((16, 16, 16), np.eye(4))
    save_weights(path, network, name="voxelmorph", hyperparameters=network.hyperparameters, grid=grid)
    return path.read_bytes()


@pytest.mark.parametrize("length", [2**63, 2**40, 10**8 + 1, 10**6])
def test_safetensors_with_an_absurd_header(tmp_path, length):
    path = tmp_path / "model.safetensors"
    path.write_bytes(struct.pack("<Q", length) + b'{"a":{"dtype":"F32","shape":[1099511627776],"data_offsets":[0,8]}}')
    assert "not safetensors" in refusal(load_weights, path, named="model.safetensors")
    body = b'{"a":{"dtype":"F32","shape":[1099511627776],"data_offsets":[0,8]}}'
    path.write_bytes(struct.pack("<Q", len(body)) + body + bytes(8))
    assert "not safetensors" in refusal(load_weights, path, named="model.safetensors")


def test_checkpoints_with_code_are_not_run(tmp_path):
    marker, path = tmp_path / "it ran", tmp_path / "model.safetensors"
    for write in (lambda: torch.save(Runs(marker), path), lambda: path.write_bytes(pickle.dumps(Runs(marker)))):
        write()
        assert "never read: they can run code" in refusal(load_weights, path)
        resume = ResumeFile(tmp_path, "key", "settings")
        resume.path.parent.mkdir(exist_ok=True)
        resume.path.write_bytes(path.read_bytes())
        assert resume.load(small_network()).step == 0
        assert not marker.exists()


@tried("weights with changed bytes")
@given(changes(1500))
def test_changed_bytes_of_weights(tmp_path_factory, where):
    folder = tmp_path_factory.getbasetemp()
    if not (folder / "whole.safetensors").exists():
        small_weights(folder / "whole.safetensors")
    path = folder / "model.safetensors"
    path.write_bytes(changed((folder / "whole.safetensors").read_bytes(), where))
    with bounded(), contextlib.suppress(InputError):
        assert load_weights(path)[1]["network"] == "voxelmorph"


def described(path: Path, change: Callable[[dict], object]) -> Path:
    """Write weights whose description is changed."""
    small_weights(path)
    metadata = read_metadata(path)
    result = change(metadata)
    save_file(
        {key: value.contiguous() for key, value in small_network().state_dict().items()},
        path,
        metadata={"dmir": result if isinstance(result, str) else json.dumps(metadata)},
    )
    return path


@pytest.mark.parametrize(
    ("change", "said"),
    [
        (lambda m: "{", "no JSON"),
        (lambda m: "[" * 100_000, "no JSON"),
        (lambda m: "[]", "list instead of keys"),
        (lambda m: m.pop("network") and None, "no usable network"),
        (lambda m: m.update(network="os.system"), "os.system"),
        (lambda m: m["hyperparameters"].update(encoder=[10**9, 10**9]), "encoder = [1000000000, 1000000000]"),
        (lambda m: m["hyperparameters"].update(encoder=[LARGEST] * 64), ""),
        (lambda m: m["hyperparameters"].update(encoder=[4] * 65), "encoder"),
        (lambda m: m["hyperparameters"].update(encoder=[LARGEST, LARGEST]), "of another shape"),  # 68 GB of weights
        (lambda m: m["hyperparameters"].update(__class__=1), "__class__"),
        (lambda m: m["grid"].update(shape=[10**5, 10**5, 10**5]), "a grid of 100000x100000x100000"),
        (lambda m: m["grid"].update(shape=[-16, 16, 16]), "the grid"),
        (lambda m: m["grid"].update(shape="abc"), "the grid"),
    ],
    ids=short,
)
def test_weights_that_say_what_no_network_is(tmp_path, change, said):
    assert said in refusal(load_weights, described(tmp_path / "model.safetensors", change), named="model.safetensors")


JSON = st.recursive(
    st.none() | st.booleans() | st.integers(-(2**70), 2**70) | st.floats() | st.text(max_size=8),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=5), inner, max_size=3),
    max_leaves=5,
)


def leaves(values: Any, path: tuple = ()) -> list[tuple]:
    """Return the paths to everything inside."""
    items: list = list(values.items()) if isinstance(values, dict) else []
    items += list(enumerate(values)) if isinstance(values, list) else []
    return [place for key, value in items for place in [(*path, key), *leaves(value, (*path, key))]]


def inside(values: Any, path: tuple) -> Any:
    for key in path:
        values = values[key]
    return values


@tried("weights with a changed description")
@given(st.integers(0, 10**6), JSON)
def test_changed_descriptions_of_weights(tmp_path_factory, place, value):
    def change(metadata: dict) -> None:
        places = leaves(metadata)
        *path, key = places[place % len(places)]
        inside(metadata, tuple(path))[key] = value

    path = described(tmp_path_factory.getbasetemp() / "described.safetensors", change)
    with bounded(), contextlib.suppress(InputError):
        load_weights(path)


def resume_of(folder: Path) -> ResumeFile:
    resume = ResumeFile(folder, "key", "settings")
    resume.save(TrainingState(step=3, network=small_network().state_dict()))
    return resume


@tried("resume files with changed bytes")
@given(st.lists(st.tuples(st.integers(0, 10**6), st.integers(0, 255)), min_size=1, max_size=40))
def test_changed_bytes_of_a_resume_file(tmp_path_factory, where):
    resume = resume_of(tmp_path_factory.getbasetemp())
    whole = small_network()
    assert resume.load(whole).step == 3
    resume.path.write_bytes(changed(resume.path.read_bytes(), where))
    network = small_network()
    with bounded():
        state = resume.load(network)
    if state.step:  # what was changed does not matter
        assert state.step == 3
        for name, value in whole.state_dict().items():
            torch.testing.assert_close(network.state_dict()[name], value, rtol=0, atol=0)


def test_a_resume_file_that_becomes_more_than_it_is(tmp_path, caplog):
    resume = resume_of(tmp_path)
    assert resume.load(small_network()).step == 3
    with zipfile.ZipFile(resume.path) as whole, zipfile.ZipFile(tmp_path / "packed", "w", zipfile.ZIP_DEFLATED) as new:
        for part in whole.infolist():
            new.writestr(part.filename, whole.read(part))
    (tmp_path / "packed").replace(resume.path)
    assert resume.load(small_network()).step == 0 and "compressed parts" in caplog.text
    torch.save({"settings": "settings", "best": None, "network": {"a": 1}}, resume.path)
    assert resume.load(small_network()).step == 0


FORBIDDEN = {
    *("eval", "exec", "os.system", "os.popen", "__import__", "subprocess.getoutput", "subprocess.getstatusoutput"),
    *("pickle.load", "pickle.loads", "pickle.Unpickler", "marshal.load", "marshal.loads", "shelve.open"),
    *("joblib.load", "pd.read_pickle", "yaml.load", "yaml.full_load", "yaml.unsafe_load", "yaml.load_all"),
    *("tarfile.open", "shutil.unpack_archive", "torch.hub.load", "torch.jit.load", "dill.load", "cloudpickle.load"),
}
NEEDS = {
    "torch.load": ("weights_only", True),
    "np.load": ("allow_pickle", False),
    "numpy.load": ("allow_pickle", False),
}
# file and what it may: the class there finds no name but its own stand-ins
ALLOWED = {("src/dmir/cohorts/pickles.py", "pickle.Unpickler")}


def dangers(source: str, name: str) -> list[str]:
    """Return the calls and bases of a program that could run what a file holds."""
    found = []
    for node in ast.walk(ast.parse(source)):
        called = [node.func] if isinstance(node, ast.Call) else node.bases if isinstance(node, ast.ClassDef) else []
        for word in map(ast.unparse, called):
            keywords = {k.arg: k.value for k in node.keywords}
            needed, value = NEEDS.get(word, ("", None))
            given_value = keywords.get(needed)
            wrong = word in FORBIDDEN and (name, word) not in ALLOWED
            wrong &= not (word == "__import__" and isinstance(node.args[0], ast.Constant))
            wrong |= bool(needed) and not (isinstance(given_value, ast.Constant) and given_value.value is value)
            wrong |= "shell" in keywords and ast.unparse(keywords["shell"]) != "False"
            wrong |= word == "np.loadtxt" and "converters" in keywords
            found += [f"{name}:{node.lineno}: {word}"] if wrong else []
    return found


def test_the_search_for_what_runs_files_finds_it():
    for line in (
        "pickle.loads(x)",
        "torch.load(p)",
        "torch.load(p, weights_only=False)",
        "np.load(p, allow_pickle=True)",
        "np.load(p)",
        "yaml.load(t, Loader=yaml.Loader)",
        "eval(t)",
        "subprocess.run(c, shell=True)",
        "class U(pickle.Unpickler): pass",
    ):
        assert dangers(line, "x.py"), line
    assert not dangers("torch.load(p, weights_only=True); yaml.safe_load(t); net.eval(); subprocess.run(['a'])", "x.py")


def test_nothing_of_the_project_can_run_what_it_reads():
    """Every Python file, and the Python of Snakemake's: no pickle, no eval, no shell; no rule with a shell command."""
    files = [path for folder in ("src", "workflow", "benchmarks", "docs") for path in (ROOT / folder).rglob("*.py")]
    assert len(files) > 150
    found = [danger for path in files for danger in dangers(path.read_text(), str(path.relative_to(ROOT)))]
    assert not found, found
    rules = [ROOT / "Snakefile", *(ROOT / "rules").glob("*.smk")]
    words = r"\b(eval|exec|os\.system|pickle\.loads?|yaml\.(full_|unsafe_)?load)\(|shell=True|^\s*shell\s*:|\bshell\("
    for path in rules:
        assert not re.findall(words, path.read_text(), re.MULTILINE), path


# tables and folders of scans


def scans(**columns: Any) -> pd.DataFrame:
    row = {"scan": "a", "subject": "a", "split": "atlas", "image": "a.nii", "labels": "a.nii"}
    return pd.DataFrame([{**row, **columns}])


@pytest.mark.parametrize("name", [*SHELL, *PATHS], ids=short)
def test_names_that_would_be_paths_or_commands(name):
    assert "scan names" in refusal(check_scan_table, scans(scan=name), "table.csv", named="table.csv")
    assert len(refusal(check_scan_table, scans(scan=name), "table.csv")) < 1000


@tried("names of scans")
@given(st.text(max_size=120))
def test_a_name_is_refused_or_is_one_part_of_a_path(name):
    with contextlib.suppress(InputError):
        check_scan_table(scans(scan=name), "table.csv")
        assert Path(name).parts == (name,) and re.fullmatch(SCAN_NAME, name) and SAFE_NAME.fullmatch(name)


def test_control_characters_in_other_columns():
    for value in ("a\nb", "\x1b[31mred", "a\0b", "\u202eright to left"):
        assert "control characters" in refusal(check_scan_table, scans(subject=value), "table.csv", named="subject")
    check_scan_table(scans(subject="=cmd|'/c calc'!A1"), "table.csv")  # text, and written as text


def cohort_table(folder: Path, content: bytes) -> Path:
    (folder / "table.csv").write_bytes(content)
    return folder / "table.csv"


@pytest.mark.parametrize(
    ("content", "said"),
    [
        (b"scan,subject,image,labels\na\0,a,a.nii,a.nii\n", "NUL"),
        (b"scan,subject,image,labels\n\xff\xfe,a,a.nii,a.nii\n", "text that is no table"),
        (b"", "text that is no table"),
        (b"\n" * 100, "text that is no table"),
        (b"a," * 10**6 + b"\n1,2\n", f"1000001 columns are more than {MAXIMUM_COLUMNS}"),
        (b"a," * 1000 + b"\n1,2\n", "unknown column"),
        (b"a," * 1000 + b"\n" + b"1\n" * 10_000, f"more than {MAXIMUM_CELLS}"),
        (b"scan,subject,image,labels\na,a,a,a,a\n", "text that is no table"),
        (b"scan,subject,image,labels\n" + b"x" * MAXIMUM_BYTES, f"at most {MAXIMUM_BYTES} bytes"),
        (b'scan,subject,image,labels\n"a,a,a,a\n' + b"b,b,b,b\n" * 100, "text that is no table"),
        (b"scan,subject,image,labels,split\n../../a,a,table.csv,table.csv,atlas\n", "scan names '../../a'"),
        (b"scan,subject,image,labels,split\n/etc/x,a,table.csv,table.csv,atlas\n", "scan names '/etc/x'"),
        (b"scan,subject,image,labels,split\n$(touch ran),a,table.csv,table.csv,atlas\n", "scan names '$(touch ran)'"),
        (b"scan,subject,image,labels,split\na,a,$(touch ran),table.csv,atlas\n", "files missing"),
        (b"scan,subject,image,labels,split\n=cmd|' /C calc'!A0,a,table.csv,table.csv,atlas\n", "scan names"),
    ],
    ids=short,
)
def test_tables_of_what_no_cohort_is(tmp_path, monkeypatch, content, said):
    monkeypatch.chdir(tmp_path)
    with bounded(5 * MAXIMUM_BYTES), pytest.raises(InputError) as caught:
        scan_table("table", path=cohort_table(tmp_path, content))
    assert said in str(caught.value) and "table.csv" in str(caught.value) and len(str(caught.value)) < 2000
    assert not (tmp_path / "ran").exists()


@tried("tables of random text")
@given(
    st.sampled_from([b"", b"scan,subject,image,labels,split\n", b"scan,split\n", b"\xef\xbb\xbfscan,split\r\n"]),
    st.one_of(st.binary(max_size=80), st.text(alphabet='ab,"\n\r#\t ', max_size=80).map(str.encode)),
)
def test_tables_of_random_text(tmp_path_factory, start, content):
    path = cohort_table(tmp_path_factory.getbasetemp(), start + content)
    with contextlib.suppress(InputError):
        check_scan_table(scan_table("table", path=path), path)
    with contextlib.suppress(InputError):
        apply_split(scans(), path, "cohort")


def test_folders_that_link_to_one_another_have_an_end(tmp_path):
    """Nine links to the folder itself: 9^40 paths for who follows them all."""
    for source, inner in (("freesurfer", "s01/mri"), ("oasis1", "OAS1_0001_MR1/PROCESSED")):
        folder = tmp_path / source
        (folder / inner).mkdir(parents=True)
        for disc in range(1, 10):
            (folder / f"disc{disc}").symlink_to(folder, target_is_directory=True)
        (folder / "disc10").symlink_to(folder / "disc10")
        refusal(lambda name, where: scan_table(name, folder=where), source, folder, named=str(folder))


@pytest.mark.parametrize(
    "path", ["../../../etc/passwd", "imagesTr/../../x.nii.gz", "..\\..\\x.nii.gz", "a\0b"], ids=short
)
def test_a_description_of_a_data_set_leads_nowhere_else(tmp_path, path):
    description = {"training": [{"image": path, "label": path}]}
    (tmp_path / "OASIS_dataset.json").write_text(json.dumps(description))
    text = refusal(lambda: scan_table("learn2reg_oasis", folder=tmp_path), named="OASIS_dataset.json")
    assert "a path inside the folder" in text


@pytest.mark.parametrize("text", ["[" * 10**5, "1" * 10**5, '{"training": 1e999}', "{"], ids=short)
def test_descriptions_that_are_no_json(tmp_path, text):
    (tmp_path / "OASIS_dataset.json").write_text(text)
    refusal(lambda: scan_table("learn2reg_oasis", folder=tmp_path), named="OASIS_dataset.json")


def test_millions_of_subjects_are_not_listed(tmp_path):
    refusal(lambda: scan_table("simulated", made=tmp_path, train=10**12), named="train")


def test_names_of_structure_sets_are_no_paths(tmp_path):
    (tmp_path / "x.csv").write_text("id,name,hemisphere,colour,source\n1,a,left,#000000,me\n")
    refusal(load_structures, os.path.relpath(tmp_path / "x", ROOT / "resources" / "structures"), named="structures")


# configurations

DEFAULT = yaml.safe_load((ROOT / "config" / "config.yaml").read_text())


@pytest.fixture(scope="module", autouse=True)
def _hyperparameters_are_read_once():
    """Each checked configuration reads the source of its networks: here thousands are checked."""
    with pytest.MonkeyPatch.context() as patch:
        known = {name: networks.hyperparameter_names(name) for name in networks.network_names()}
        original = networks.hyperparameter_names
        patch.setattr(sections, "hyperparameter_names", lambda name: known.get(name) or original(name))
        yield


LAUGHS = "a0: &a0 [ha, ha]\n" + "".join(f"a{n}: &a{n} [{', '.join([f'*a{n - 1}'] * 9)}]\n" for n in range(1, 12))
MERGES = "a0: &a0 {k: 1}\n" + "".join(f"a{n}: &a{n}\n  <<: [{', '.join([f'*a{n - 1}'] * 9)}]\n" for n in range(1, 12))


@pytest.mark.parametrize(
    ("text", "said"),
    [
        ("results: !!python/object/apply:os.system ['touch ran']\n", "no YAML"),
        ("results: !!python/name:os.system\n", "no YAML"),
        ("results: !!python/object/new:pathlib.Path ['ran']\n", "no YAML"),
        ("results: !!python/module:antigravity\n", "no YAML"),
        (LAUGHS, f"more than {MAXIMUM_ENTRIES} entries"),
        (MERGES, f"more than {MAXIMUM_ENTRIES} entries"),
        ("a: &a [*a]\n", f"more than {MAXIMUM_ENTRIES} entries"),
        ("a: " + "[" * 5000 + "]" * 5000, "without end"),
        ("a: " + "[" * 40 + "]" * 40, "without end"),
        ("a: [" + "1, " * 25_000 + "1]", "65536 bytes"),
        ("training: {steps: 3}\nresults: x\ntraining: {steps: 4}\n", "training: found twice, in lines 1 and 3"),
        ("training:\n  steps: 3\n  window: 7\n  steps: 4\n", "training.steps: found twice, in lines 2 and 4"),
        ("seeds: [" + "9" * 5000 + "]", "no YAML"),
        ("results: 2001-99-99\n", "no YAML"),
        ("results: !!binary x\n", "no YAML"),
        ("? [a, b]\n: 1\n", "no YAML"),
        ("a: \0\n", "no YAML"),
        ("[1, 2]\n", "a dictionary of keys"),
        ("__use_yte__: true\nresults: ?open('ran', 'w') and 'x'\n", "runs what the file holds as Python"),
        ("", "a dictionary of keys"),
    ],
    ids=short,
)
def test_yaml_that_is_no_configuration(tmp_path, monkeypatch, text, said):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "mine.yaml").write_text(text)
    with bounded(64 * 2**20), pytest.raises(DmirError) as caught:
        read_config("mine.yaml")
    assert said in str(caught.value) and "mine.yaml" in str(caught.value)
    assert not (tmp_path / "ran").exists()


@pytest.mark.parametrize(
    ("path", "value", "key"),
    [
        (("training", "learning_rate"), float("nan"), "training.learning_rate"),
        (("training", "learning_rate"), "nan", "training.learning_rate"),
        (("timeout_minutes",), float("inf"), "timeout_minutes"),
        (("timeout_minutes",), "inf", "timeout_minutes"),
        (("settings", "xmorpher", "network", "drop_path"), float("nan"), "settings.xmorpher.network.drop_path"),
        (("seeds",), [10**30], "seeds"),
        (("training", "steps"), 16**9000, "training.steps"),
        (("grid", "shape"), [10**5, 10**5, 10**5], "grid.shape"),
        (("results",), "x; rm -rf y", "results"),
        (("results",), "$(touch ran)", "results"),
        (("results",), "`touch ran`", "results"),
        (("results",), "{cohort}", "results"),
        (("results",), "-rf", "results"),
        (("results",), "a\nb", "results"),
        (("root",), "a|b", "root"),
        (("cohorts", "donors", "split"), "$HOME/x.csv", "cohorts.donors.split"),
        (("cohorts", "a;b"), {"source": "donors"}, "a;b"),
        (("cohorts", "../a"), {"source": "donors"}, "../a"),
        (("cohorts", "a\nb"), {"source": "donors"}, "cohorts"),
        (("settings", "$(x)"), {"algorithm": "syn"}, "$(x)"),
        (("settings", "a" * 5000), {"algorithm": "syn"}, "settings"),
        (("results",), "x" * 5000, "results"),
        (("methods",), ["syn", "a b"], "a b"),
        (("results",), [[[[[[[[[[[[[[[[[[[[[[1]]]]]]]]]]]]]]]]]]]]]], "results"),
    ],
    ids=short,
)
def test_values_that_no_configuration_has(path, value, key):
    values = copy.deepcopy(DEFAULT)
    *outer, last = path
    inside(values, tuple(outer))[last] = value
    text = refusal(parse_config, values, named=key)
    assert len(text) < 2000


def test_a_dictionary_of_dictionaries_of_itself_is_refused_at_once():
    """What Snakemake reads comes here without a file: aliases are the same objects many times."""
    value: Any = "ha"
    for _ in range(15):
        value = [value] * 9
    assert "expected at most" in refusal(parse_config, {**DEFAULT, "settings": {"syn": value}})
    assert "expected at most" in refusal(parse_config, {**DEFAULT, "methods": [{}] * (MAXIMUM_ENTRIES + 1)})


@tried("configurations with a changed leaf or key")
@given(st.integers(0, 10**6), st.sampled_from(["replace", "delete", "rename", "add"]), JSON, st.text(max_size=12))
def test_changed_configurations(place, how, value, name):
    values = copy.deepcopy(DEFAULT)
    places = leaves(values)
    *path, key = places[place % len(places)]
    around = inside(values, tuple(path))
    if how == "replace":
        around[key] = value
    elif isinstance(around, list):
        around.append(value) if how == "add" else around.pop(key)
    elif how == "add":
        around[name] = value
    else:
        removed = around.pop(key)
        around.update({name: removed} if how == "rename" else {})
    try:
        assert isinstance(parse_config(values, "mine.yaml"), Config)
    except ConfigError as error:
        keys = {str(part) for place in [*places, *leaves(values)] for part in place} | set(Config.model_fields)
        assert error.problems and len(str(error)) < 20_000
        for problem in error.problems:
            assert ": " in problem and any(part.split(".")[0] in problem for part in keys if part), problem


@tried("configurations of random text")
@given(
    st.one_of(
        st.binary(max_size=200),
        st.text(alphabet="ab:-[]{}&*!|>?'\"%@`#,.0123456789 \n\t<~=_", max_size=60).map(str.encode),
    )
)
def test_configurations_of_random_text(tmp_path_factory, content):
    path = tmp_path_factory.getbasetemp() / "noise.yaml"
    path.write_bytes(content)
    with bounded(), contextlib.suppress(DmirError):
        assert isinstance(read_yaml(path), dict)


# what is written from names

INJECTIONS = (
    r"\input{/etc/passwd}",
    r"\write18{touch ran}",
    "^^5cinput{/etc/passwd}",
    r"$\catcode`\%=11 %",
    "</script><script>alert(1)</script>",
    "<img src=x onerror=alert(1)>",
    "a|b|c",
    "-->",
    "](javascript:alert(1))",
    "=cmd|' /C calc'!A0",
)


@pytest.mark.parametrize("name", INJECTIONS, ids=short)
def test_names_are_text_in_tables(tmp_path, name):
    table = pd.DataFrame({"cohort": [name, "b"], "method": [name, "syn"], "dice": [0.5, 0.6], "labels": "nearest"})
    csv, markdown, tex, html = (
        path.read_text() for path in write_table(table, tmp_path / "t", caption=name, note=name)
    )
    commands = set(re.findall(r"\\[A-Za-z]+|\\.", tex))
    assert not commands & {r"\input", r"\write", r"\catcode", r"\openout", r"\immediate"} and "^^" not in tex
    assert "<script" not in html and "<img" not in html
    # csv is data: programs that compute what begins with = are told in docs/security.md
    assert pd.read_csv(io.StringIO(csv))["method"].tolist() == [name, "syn"]
    rows = [line for line in markdown.splitlines() if line.startswith("|")]
    assert len({len(re.findall(r"(?<!\\)\|", row)) for row in rows}) == 1 and len(rows) == 4


@pytest.mark.parametrize("name", INJECTIONS, ids=short)
def test_names_are_text_in_the_page(tmp_path, name):
    page = write_page(
        tmp_path,
        tmp_path / "report.html",
        configuration={"cohorts": {name: {"source": name, "structures": "oasis28"}}, "methods": [name]},
        tables=[],
        figures=[],
        pairs=[],
        examples=[],
        methods=[name],
        models={name: "none"},
        command=name,
        revision=name,
    )
    text = page.read_text()
    assert "<script>alert" not in text and "</script><script>a" not in text and "<img src=x" not in text
    assert Markup.escape(name) in text  # it is shown, as text


# the page that tells of all this


def test_fields_in_numpys_files(tmp_path, monkeypatch):
    grid = Grid(SHAPE, AFFINE)
    np.save(tmp_path / "objects.npy", np.array([{}], dtype=object), allow_pickle=True)
    np.savez(tmp_path / "objects.npz", np.array([{}], dtype=object))
    np.savez(tmp_path / "nan.npz", displacement=np.full((3, *SHAPE), np.nan), affine=np.eye(4))
    np.savez(tmp_path / "flat.npz", displacement=np.zeros((3, *SHAPE)), affine=np.zeros((4, 4)))
    np.savez(tmp_path / "two.npz", np.zeros((3, *SHAPE)), np.zeros((3, *SHAPE)))
    for path in tmp_path.iterdir():
        with pytest.raises(InputError, match=path.stem):
            read_transform(path, fixed=grid)
    monkeypatch.setattr("dmir.transforms.arrays.MOST_BYTES", 1000)
    np.savez_compressed(tmp_path / "zeros.npz", np.zeros((3, *SHAPE), np.float32))
    with pytest.raises(InputError, match="more bytes than a field has"):
        read_transform(tmp_path / "zeros.npz", fixed=grid)


def test_the_documented_numbers_are_those_of_the_tests():
    text = (ROOT / "docs" / "security.md").read_text()
    told = {name: int(number) for name, number in re.findall(r"^\| ([^|]+?) \| (\d+) \|$", text, re.MULTILINE)}
    assert told == {**EXAMPLES, "all": sum(EXAMPLES.values())}
    assert f"{MAXIMUM_VOXELS} voxels" in text and f"{PEAK // 2**20} MiB" in text
    tests = {node.name for node in ast.parse(Path(__file__).read_text()).body if isinstance(node, ast.FunctionDef)}
    named = set(re.findall(r"`(test_\w+)`", text))
    everywhere = "".join(path.read_text() for path in Path(__file__).parent.glob("test_*.py"))
    there = set(re.findall(r"^def (test_\w+)", everywhere, re.MULTILINE))
    assert named <= there, named - there
    assert {name for name in tests if name.startswith("test_")} <= named


def test_a_volume_as_it_should_be_is_still_read(tmp_path):
    """The other side of all refusals: extensions, footers, both byte orders, two files, one axis more."""
    data = np.arange(120, dtype=np.int16).reshape(SHAPE)
    image = nib.Nifti1Image(data[..., None], AFFINE)
    image.header.extensions.append(nib.nifti1.Nifti1Extension("comment", b"a" * 100_000))
    paths = [tmp_path / name for name in ("a.nii", "a.nii.gz", "b.hdr", "c.mgz", "d.nii")]
    for path in paths[:2]:
        nib.save(image, path)
    nib.save(nib.Nifti1Pair(data, AFFINE), tmp_path / "b.img")
    nib.save(nib.MGHImage(data, AFFINE), paths[3])
    nib.save(nib.Nifti2Image(data, AFFINE, nib.Nifti2Header(endianness=">")), paths[4])
    for path in paths:
        np.testing.assert_array_equal(read_image(path).data, data)
    write_volume(tmp_path / "e.nii.gz", read_image(paths[0]))
    np.testing.assert_array_equal(read_image(tmp_path / "e.nii.gz").data, data)
