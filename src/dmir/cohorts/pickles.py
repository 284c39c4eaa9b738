"""Pickles of numpy arrays, read without trusting them: a pickle is a program, and this runs none of it.

Three fences stand around the pickle machine. The file's instructions are looked through first: only those that arrays
in tuples or lists need, and not many more of them than arrays need. What the pickle asks for by name is answered with
stand-ins that only collect numbers, or not at all. An array is made only where its bytes are in the file, as many as it
claims, and uses them in place: what is read takes a few times the memory of the file, whatever is in it.
"""

from __future__ import annotations

import io
import math
import pickle
import pickletools
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np

from dmir.errors import InputError
from dmir.volumes import MAXIMUM_VOXELS

INSTRUCTIONS = """
PROTO FRAME STOP MARK POP GLOBAL STACK_GLOBAL REDUCE BUILD TUPLE EMPTY_TUPLE TUPLE1 TUPLE2 TUPLE3
LIST EMPTY_LIST APPEND APPENDS NONE NEWTRUE NEWFALSE INT LONG LONG1 BININT BININT1 BININT2
SHORT_BINBYTES BINBYTES BINBYTES8 BYTEARRAY8 UNICODE SHORT_BINUNICODE BINUNICODE BINUNICODE8
PUT BINPUT LONG_BINPUT MEMOIZE GET BINGET LONG_BINGET
"""
MAXIMUM_INSTRUCTIONS = 10_000  # a pickle of two arrays has about sixty
TYPE = re.compile(r"[biuf][1248]")


def read_arrays(path: str | Path) -> tuple[np.ndarray, ...]:
    """Read a pickle that holds one numpy array, or a tuple or list of arrays of one shape.

    Parameters
    ----------
    path
        A pickle of any protocol (0 to 5), written by any numpy from 1 on with Python 3.

    Returns
    -------
    tuple of numpy.ndarray
        The arrays: bool, integers or floats in the file's byte order. They are not meant to be written to.

    Raises
    ------
    InputError
        The file is missing, truncated or no pickle; it asks for anything but arrays (nothing of that is run); it holds
        something else, objects, arrays of unequal shapes, or arrays that claim more numbers than the file has.
    """
    path = Path(path)
    if not path.is_file():
        raise InputError(path, found="no such file", expected="a pickle of numpy arrays", remedy="Check the path.")
    data = path.read_bytes()
    try:
        _check_instructions(data)
        content = _ArrayUnpickler(data).load()
        items = content if isinstance(content, tuple | list) else (content,)
        arrays = tuple(_array(item) for item in items)
    except _RefusedError as error:
        raise InputError(
            path,
            found=f"a pickle with {error}",
            expected="numpy arrays alone",
            remedy="Nothing of it was run. A pickle can run any program when it is loaded: do not load it otherwise.",
        ) from error
    except Exception as error:  # pickle may raise any kind for a damaged file
        raise InputError(
            path,
            found=f"a pickle that cannot be read ({type(error).__name__}: {error})",
            expected="a complete pickle of numpy arrays",
            remedy="It may be truncated: copy or download it again.",
        ) from error
    shapes = list(dict.fromkeys(array.shape for array in arrays))
    if len(shapes) != 1:
        found = f"arrays of different shapes: {', '.join(map(str, shapes))}" if shapes else "no array"
        raise InputError(path, found=found, expected="one array, or several of one shape")
    return arrays


class _RefusedError(Exception):
    """The pickle is readable, but holds what it should not."""


def _check_instructions(data: bytes) -> None:
    """Refuse, before anything is loaded, a pickle that does what arrays do not need.

    Dictionaries and sets are among this: their keys are hashed, which can take for ever. Places in the memo are limited
    because memory is taken for all places up to the highest.
    """
    allowed = set(INSTRUCTIONS.split())
    for count, (opcode, argument, _) in enumerate(pickletools.genops(io.BytesIO(data))):
        if opcode.name not in allowed:
            raise _RefusedError(f"the instruction {opcode.name}{'' if argument is None else f' {argument!r:.100}'}")
        place = int(argument or 0) if "PUT" in opcode.name else 0
        if max(count, place) >= MAXIMUM_INSTRUCTIONS:
            raise _RefusedError(f"more than {MAXIMUM_INSTRUCTIONS} instructions or places")


class _ArrayUnpickler(pickle.Unpickler):
    """Gives the pickle stand-ins for the few names that arrays need."""

    def __init__(self, data: bytes) -> None:
        super().__init__(io.BytesIO(data))
        self._left = 2 * len(data)

    def find_class(self, module: str, name: str) -> Any:
        home = re.sub(r"^numpy\._core\.", "numpy.core.", module)  # where numpy 2 has it
        allowed: dict[tuple[str, str], Callable[..., Any]] = {
            ("numpy", "ndarray"): _Array,
            ("numpy", "memmap"): _Array,  # an array that was read from a file in place
            ("numpy", "dtype"): _Type,
            ("numpy.core.multiarray", "_reconstruct"): _Array,
            ("numpy.core.numeric", "_frombuffer"): _from_buffer,
            ("_codecs", "encode"): self._encode,
        }
        if (home, name) not in allowed:
            raise _RefusedError(f"a call of {module}.{name}")
        return _Name(allowed[home, name])

    def _encode(self, text: Any, encoding: Any) -> bytes:
        """Stand for _codecs.encode, by which protocols before 3 keep bytes; the same text can be encoded often."""
        if not isinstance(text, str) or encoding != "latin1":
            raise _RefusedError("a call of _codecs.encode that arrays do not need")
        self._left -= len(text)
        if self._left < 0:
            raise _RefusedError("more bytes than the file has")
        return text.encode("latin1")


class _Name:
    """A name that a pickle may ask for, with what is called instead; the pickle cannot change it."""

    __slots__ = ("_make",)

    def __init__(self, make: Callable[..., Any]) -> None:
        self._make = make

    def __call__(self, *arguments: Any) -> Any:
        return self._make(*arguments)

    def __setstate__(self, state: object) -> None:
        raise _RefusedError("a change of what it calls")


class _Type:
    """Stands for a numpy.dtype: bool, integer or float of a size, and its byte order."""

    __slots__ = ("dtype",)

    def __init__(self, code: str, *_: object) -> None:
        if not isinstance(code, str) or not TYPE.fullmatch(code):
            raise _RefusedError(f"an array of the type {code!r:.20} (O stands for objects)")
        self.dtype = np.dtype(code)

    def __setstate__(self, state: tuple) -> None:
        if state[1] not in ("<", ">", "|", "=") or any(state[2:5]):
            raise _RefusedError("an array of a compound type")
        self.dtype = self.dtype.newbyteorder(state[1])


class _Array:
    """Stands for a numpy.ndarray until its bytes are there."""

    __slots__ = ("content",)

    def __init__(self, *_: object) -> None:
        self.content: np.ndarray | None = None

    def __setstate__(self, state: tuple) -> None:
        _, shape, kind, fortran, buffer = state
        self.content = _numbers(buffer, kind, shape, "F" if fortran else "C")


def _from_buffer(buffer: Any, kind: Any, shape: Any, order: str, axes: Any = None) -> _Array:
    """Stand for numpy's function of this name, which protocol 5 calls."""
    array = _Array()
    content = _numbers(buffer, kind, shape, "F" if order == "F" else "C")
    array.content = content if axes is None else content.transpose(axes)
    return array


def _numbers(buffer: Any, kind: Any, shape: Any, order: Any) -> np.ndarray:
    """Make an array of bytes that are there; refuse one that claims more or fewer of them."""
    if not isinstance(kind, _Type) or not isinstance(buffer, bytes | bytearray):
        raise _RefusedError("an array of objects")
    if not isinstance(shape, tuple) or not all(type(n) is int and n > 0 for n in shape):
        raise _RefusedError(f"an array of the shape {shape!r:.100}")
    count = math.prod(shape)
    if count > MAXIMUM_VOXELS or count * kind.dtype.itemsize != len(buffer):
        raise _RefusedError(f"an array that claims {shape!r:.100} numbers and has {len(buffer)} bytes")
    return np.frombuffer(buffer, kind.dtype).reshape(shape, order=order)


def _array(item: Any) -> np.ndarray:
    if not isinstance(item, _Array):
        raise _RefusedError(f"'{type(item).__name__.strip('_').lower()}' instead of an array")
    if item.content is None:
        raise _RefusedError("an array without numbers")
    return item.content
