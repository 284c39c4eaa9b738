"""A graphics card that is not there: what runs on it is done by the CPU, and only what a card permits is permitted.

A tensor on this card is one of torch's meta device, without contents, that has its contents beside it. To Python it
says that it lies on ``cuda:0``, so that the code under test goes a GPU's ways; every operation that it takes part in
comes here (:class:`Card`), is checked, and is done on the contents. So all numbers are real, and can be compared with
those of the CPU. What is checked, or written down with the place in ``dmir`` that asked for it:

- a tensor that was left on the CPU among others that are on the card, which a card refuses;
- reading a number, ``bool(tensor)``, a mask that selects: the host waits for the card (``waits``);
- copies onto the card and from it, and whether the host waits for them (``copies``);
- the types that products, sampling and all large results are made in (``types``).

Autocast is that of a card, by torch's own register of what it casts there.
"""

from __future__ import annotations

import contextlib
import sys
from collections import Counter
from collections.abc import Iterator
from functools import cache
from pathlib import Path
from unittest import mock

import torch
from torch.overrides import TorchFunctionMode
from torch.utils._python_dispatch import TorchDispatchMode

import dmir

CARD, HOST, META = torch.device("cuda", 0), torch.device("cpu"), torch.device("meta")
SOURCE = str(Path(dmir.__file__).parent)
aten = torch.ops.aten

BY_CONTENTS = {torch.Tag.data_dependent_output, torch.Tag.dynamic_output_shape}
INDEXING = {aten.index.Tensor, aten.index_put.default, aten.index_put_.default, aten._index_put_impl_.default}
FROM_NUMBERS = {"tensor", "as_tensor", "new_tensor"}
COPIES = {aten._to_copy.default, aten.copy_.default}

# torch/aten/src/ATen/autocast_mode.h: what a GPU's autocast brings to the lower precision, and to the widest of its
# arguments; everything else in its register goes to float32
LOWER = {"linear", "matmul", "mm", "bmm", "mv", "addmm", "addmv", "addr", "addbmm", "baddbmm", "einsum", "prelu"}
LOWER |= {f"conv{transposed}{n}d" for transposed in ("", "_transpose") for n in (1, 2, 3)}
LOWER |= {"convolution", "chain_matmul", "multi_dot", "scaled_dot_product_attention"}
WIDEST = {"addcdiv", "addcmul", "atan2", "bilinear", "cross", "dot", "vdot", "grid_sampler", "index_put", "tensordot"}
WIDEST |= {"scatter_add", "cat", "concat", "stack"}
PRODUCTS = {"convolution", "conv3d", "conv_transpose3d", "linear", "matmul", "mm", "bmm", "addmm", "baddbmm"}


class OnCard(torch.Tensor):
    """A tensor on the card; ``contents`` holds its numbers."""

    contents: torch.Tensor
    device, is_cuda, is_cpu, is_meta = CARD, True, False, False  # to Python

    @staticmethod
    def __new__(cls, contents: torch.Tensor) -> OnCard:
        layout = {"strides": contents.stride(), "storage_offset": contents.storage_offset()}
        with torch.inference_mode(False):  # a view of what was made outside of it is not of it either
            made = torch.Tensor._make_wrapper_subclass(cls, contents.shape, **layout, dtype=contents.dtype, device=META)
        made.contents = contents
        return made

    __torch_function__ = torch._C._disabled_torch_function_impl

    @classmethod
    def __torch_dispatch__(cls, func, types, args=(), kwargs=None):
        raise RuntimeError(f"{func} on the card, outside of it")  # a thread, perhaps, that does not know of it

    def __repr__(self) -> str:
        return f"OnCard({self.contents!r})"


class Card(TorchFunctionMode):
    """The card, while its context is open.

    Attributes
    ----------
    waits
        How often the host waited for a number, by the place in dmir that did.
    copies
        (direction ``"in"`` or ``"out"``, whether the host waits for it, place) -> how often.
    types
        (operation, type of its result, place) -> how often.
    """

    def __init__(self) -> None:
        super().__init__()
        self.waits: Counter[str] = Counter()
        self.copies: Counter[tuple[str, bool, str]] = Counter()
        self.types: Counter[tuple[str, torch.dtype, str]] = Counter()
        self.largest: Counter[torch.dtype] = Counter()
        self.pinned: set[int] = set()  # storages of the host's page-locked memory

    def forget(self) -> None:
        """Begin to count anew."""
        for counter in (self.waits, self.copies, self.types, self.largest):
            counter.clear()

    def put(self, tensor: torch.Tensor) -> OnCard:
        """Return a tensor with these contents on the card, uncounted."""
        return OnCard(tensor.detach().clone())

    def __torch_function__(self, func, types, args=(), kwargs=None):
        kwargs = dict(kwargs or {})
        first = args[0] if args else None
        if func is torch.device:
            return func(*args, **kwargs)
        name = getattr(func, "__name__", "")
        if name == "pin_memory":
            return self._page_locked(first.clone())
        if kwargs.pop("pin_memory", False):
            return self._page_locked(func(*args, **kwargs))
        args, kwargs = mapped(_from_card, (args, kwargs))
        device = kwargs.get("device")
        if name in FROM_NUMBERS and (device == META or (device is None and isinstance(first, OnCard))):
            kwargs.pop("device", None)
            made = func(first.contents if isinstance(first, OnCard) else first, *args[1:], **kwargs)
            self.copies["in", True, place()] += 1  # a list of numbers is never page-locked
            return OnCard(made)
        if name in READS and isinstance(first, OnCard):
            self.waits[place()] += 1
            return func(first.contents, *args[1:], **kwargs)
        if torch.is_autocast_enabled("cuda"):
            args, kwargs = cast(name, args, kwargs)
        return func(*args, **kwargs)

    def _page_locked(self, tensor: torch.Tensor) -> torch.Tensor:
        self.pinned.add(tensor.untyped_storage()._cdata)
        return tensor


READS = {"item", "tolist", "numpy", "__bool__", "__float__", "__int__", "__index__", "__array__"}


class Operations(TorchDispatchMode):
    """Does what the card is told to do, on the contents."""

    def __init__(self, card: Card) -> None:
        super().__init__()
        self.card = card

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        kwargs = dict(kwargs or {})
        tensors = tensors_in((args, kwargs))
        there = [tensor for tensor in tensors if isinstance(tensor, OnCard)]
        here = [tensor for tensor in tensors if not isinstance(tensor, OnCard)]
        target = kwargs.get("device")
        if target == META:
            kwargs["device"] = HOST
        stays = bool(there) if target is None else target == META
        if func in COPIES:
            stays = self._note_copy(func, args, kwargs, stays)
        elif there:
            self._check(func, args, here)
        own = {id(tensor.contents): tensor for tensor in there}
        shapes = [(tensor, tensor.contents.shape) for tensor in there]
        result = func(*mapped(contents, args), **mapped(contents, kwargs))
        assert all(tensor.contents.shape == shape for tensor, shape in shapes), f"{func} changes a shape in place"
        if not stays:
            return mapped(lambda leaf: own.get(id(leaf), leaf), result)
        name = func._overloadpacket.__name__

        def wrapped(leaf):
            if not isinstance(leaf, torch.Tensor):
                return leaf
            self.card.types[name, leaf.dtype, place()] += 1
            self.card.largest[leaf.dtype] = max(self.card.largest[leaf.dtype], leaf.numel())
            return own.get(id(leaf)) if id(leaf) in own else OnCard(leaf)

        return mapped(wrapped, result)

    def _note_copy(self, func, args, kwargs, stays: bool) -> bool:
        """Write a copy between host and card down; return whether its result lies on the card."""
        if func is aten.copy_.default:
            to, source = isinstance(args[0], OnCard), args[1]
            waits = not (args[2] if len(args) > 2 else kwargs.get("non_blocking", False))
            other = args[0]
        else:
            to, source, other = stays, args[0], None
            waits = not kwargs.get("non_blocking", False)
        if to != isinstance(source, OnCard):
            memory = source if to else other  # of the host
            locked = memory is not None and memory.untyped_storage()._cdata in self.card.pinned
            self.card.copies["in" if to else "out", waits or not locked, place()] += 1
        return to

    def _check(self, func, args, here: list[torch.Tensor]) -> None:
        """Refuse what a card refuses, and write down what the host waits for."""
        single = torch.Tag.pointwise in func.tags  # where a single number may lie on the host
        left = [tensor for tensor in here if not (single and tensor.dim() == 0)]
        if left:
            shapes = ", ".join(str(tuple(tensor.shape)) for tensor in left)
            raise RuntimeError(f"{func} in {place()}: tensors of the CPU ({shapes}) among those of the card")
        if func in INDEXING:
            chosen = [index for index in args[1] if index is not None]
            if any(index.dtype in (torch.bool, torch.uint8) for index in chosen):
                self.card.waits[place()] += 1
        elif BY_CONTENTS.intersection(func.tags):
            self.card.waits[place()] += 1


def mapped(function, tree):
    """Return arguments with a function of each that is no tuple, list or dictionary."""
    if isinstance(tree, dict):
        return {key: mapped(function, value) for key, value in tree.items()}
    if isinstance(tree, torch.Size) or not isinstance(tree, tuple | list):
        return function(tree)
    parts = [mapped(function, value) for value in tree]
    return parts if isinstance(tree, list) else tuple(parts)


def tensors_in(tree) -> list[torch.Tensor]:
    """Return the tensors among arguments."""
    if isinstance(tree, dict):
        tree = tree.values()
    elif not isinstance(tree, tuple | list):
        return [tree] if isinstance(tree, torch.Tensor) else []
    return [tensor for value in tree for tensor in tensors_in(value)]


def contents(leaf):
    """Return what a tensor of the card holds; anything else as it is."""
    return leaf.contents if isinstance(leaf, OnCard) else leaf


def place() -> str:
    """Return the innermost function of dmir that is running; of a gradient that torch computes, ``"backward"``."""
    frame = sys._getframe(1)
    while frame is not None:
        name = _name_of(frame.f_code)
        if name is not None:
            return name
        frame = frame.f_back
    return "backward"


@cache
def _name_of(code) -> str | None:
    if not code.co_filename.startswith(SOURCE):
        return None
    return f"{Path(code.co_filename).relative_to(SOURCE).with_suffix('').as_posix()}:{code.co_qualname}"


def _from_card(leaf):
    """Return torch's name for the card, where the card is named."""
    if isinstance(leaf, str) and leaf.startswith("cuda"):
        return META
    return META if isinstance(leaf, torch.device) and leaf.type == "cuda" else leaf


def cast(name: str, args, kwargs):
    """Do to the arguments what a card's autocast does."""
    floats = [tensor.dtype for tensor in tensors_in((args, kwargs)) if _is_cast(tensor)]
    wanted = policy(name)
    if wanted is None or not floats:
        return args, kwargs
    lower = torch.get_autocast_dtype("cuda")
    to = {"lower": lower, "float32": torch.float32}.get(wanted)
    if to is None:
        to = torch.float32 if torch.float32 in floats else lower
    return mapped(lambda leaf: leaf.to(to) if _is_cast(leaf) else leaf, (args, kwargs))


def _is_cast(leaf) -> bool:
    return isinstance(leaf, OnCard) and leaf.dtype in (torch.float32, torch.bfloat16, torch.float16)


@cache
def policy(name: str) -> str | None:
    """Return what a card's autocast does with the arguments of a function, None where it leaves them."""
    name = {"grid_sample": "grid_sampler"}.get(name, name.strip("_") if name.startswith("__") else name)
    name = {"rmatmul": "matmul", "rpow": "pow"}.get(name, name)
    if name in LOWER:
        return "lower"
    if name in WIDEST:
        return "widest"
    packet = getattr(aten, name, None)
    overloads = [] if packet is None else [getattr(packet, overload) for overload in packet.overloads()]
    keys = [overload.name() for overload in overloads if isinstance(overload, torch._ops.OpOverload)]
    cast_there = any(torch._C._dispatch_has_kernel_for_dispatch_key(key, "AutocastCUDA") for key in keys if known(key))
    return "float32" if cast_there else None


def known(key: str) -> bool:
    """Tell whether torch's register has an operation; a few of TorchScript's are not in it."""
    try:
        torch._C._dispatch_has_kernel_for_dispatch_key(key, "CPU")
    except RuntimeError:
        return False
    return True


@contextlib.contextmanager
def card() -> Iterator[Card]:
    """Have a card in this thread for as long as the context is open."""
    from dmir.training import objective

    answers = {
        "synchronize": lambda *_: None,
        "is_bf16_supported": lambda *_, **__: True,
        "max_memory_allocated": lambda *_: 0,
        "reset_peak_memory_stats": lambda *_: None,
        "empty_cache": lambda: None,
        "manual_seed": lambda _: None,
        "get_device_name": lambda *_: "a card that is not there",
    }
    objective.has_bfloat16.cache_clear()
    with contextlib.ExitStack() as stack:
        for name, answer in answers.items():
            stack.enter_context(mock.patch.object(torch.cuda, name, answer))
        stack.enter_context(mock.patch.object(torch.cuda.amp.common, "amp_definitely_not_available", lambda: False))
        there = stack.enter_context(Card())
        stack.enter_context(Operations(there))
        run = torch.autograd._engine_run_backward

        def backward(*arguments, **keywords):
            with there:  # torch closes the context for `backward`, which runs what is computed a second time
                return run(*arguments, **keywords)

        stack.enter_context(mock.patch.object(torch.autograd, "_engine_run_backward", backward))
        yield there
    objective.has_bfloat16.cache_clear()
