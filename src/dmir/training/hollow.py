"""Tensors without contents: a network runs on them in seconds at any size, so that its cost can be counted."""

from __future__ import annotations

import contextlib
import functools
import sys
from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import torch
from torch._subclasses.fake_tensor import FakeTensor, FakeTensorMode, in_kernel_invocation_manager

BY_CONTENTS = {torch.Tag.dynamic_output_shape, torch.Tag.data_dependent_output}


class HollowTensors(FakeTensorMode):
    """torch's ``FakeTensorMode``, with a memory of what each operation makes of which shapes.

    A network asks for the same operation on the same shapes over and over, slab by slab and block by block. torch
    works out the shape of each result anew, or finds it in a store that serves much more than this: both take most of
    the time. Here the second time is a look into a dictionary.
    """

    def __init__(self) -> None:
        super().__init__(allow_non_fake_inputs=True)
        self._results: dict[Any, Callable[[Sequence[Any]], Any]] = {}

    def __torch_dispatch__(
        self, func: Any, types: Any, args: Sequence[Any] = (), kwargs: Mapping[str, Any] | None = None
    ) -> Any:
        if func is torch.ops.prim.device.default and not self.in_kernel_invocation:
            return args[0].fake_device
        if func is torch.ops.aten.set_.source_Storage_storage_offset:  # torch's own way keeps the storage for ever
            with in_kernel_invocation_manager(self):
                func(*args)
            return args[0]
        key = None if self.in_kernel_invocation else _signature(func, args, kwargs or {})
        make = self._results.get(key)
        if make is not None:
            return make(args)
        result = super().__torch_dispatch__(func, types, args, kwargs or {})
        if key is not None and not BY_CONTENTS.intersection(func.tags):
            make = self._maker(func, args, result)
            if make is not None:
                self._results[key] = make
        return result

    def _maker(self, func: Any, args: Sequence[Any], result: Any) -> Callable[[Sequence[Any]], Any] | None:
        """Return what makes this result of other arguments of the same shapes; None where that is not simple."""
        if result is args[0]:
            return _first
        if func._schema.is_mutable:
            return None
        several = isinstance(result, tuple | list)
        outputs = list(result) if several else [result]
        if not all(isinstance(output, FakeTensor) and output.constant is None for output in outputs):
            return None
        given = {arg.untyped_storage()._cdata for arg in args if isinstance(arg, FakeTensor)}
        if not any(output.untyped_storage()._cdata in given for output in outputs):
            layouts = [(output.shape, output.stride(), output.dtype, output.fake_device) for output in outputs]
            return functools.partial(self._fresh, layouts, several)
        if several or not isinstance(args[0], FakeTensor):
            return None
        if result.untyped_storage()._cdata != args[0].untyped_storage()._cdata:
            return None
        layout = (result.storage_offset(), result.shape, result.stride())
        return functools.partial(self._view, layout, result.dtype, result.fake_device)

    def _fresh(self, layouts: Sequence[Any], several: bool, args: Sequence[Any]) -> Any:
        made = [
            FakeTensor(self, torch.empty_strided(shape, stride, dtype=dtype, device="meta"), device)
            for shape, stride, dtype, device in layouts
        ]
        return tuple(made) if several else made[0]

    def _view(self, layout: Any, dtype: torch.dtype, device: torch.device, args: Sequence[Any]) -> Any:
        storage = args[0].untyped_storage()
        view = torch.empty(0, dtype=dtype, device="meta")
        with in_kernel_invocation_manager(self):
            view.set_(storage, *layout)
        return FakeTensor(self, view, device)


def _first(args: Sequence[Any]) -> Any:
    return args[0]


def _signature(func: Any, args: Sequence[Any], kwargs: Mapping[str, Any]) -> Any:
    """Return all that the shape of a result follows from, or None where an argument is not of a simple kind."""
    if not args or not isinstance(args[0], FakeTensor | list | tuple):
        return None
    parts: list[Any] = [func]
    for value in (*args, *kwargs.items()):
        if not _add(value, parts):
            return None
    return tuple(parts)


def _add(value: Any, parts: list[Any]) -> bool:
    if isinstance(value, FakeTensor):
        if value.constant is not None:
            return False
        parts += (value.shape, value.stride(), value.storage_offset(), value.dtype, value.fake_device)
        return True
    if isinstance(value, torch.Tensor):
        return False
    if isinstance(value, tuple | list):
        parts.append(len(value))
        return all(_add(item, parts) for item in value)
    parts += (type(value), value)  # the type too: 1, 1.0 and True are equal, but not to torch
    return isinstance(value, int | float | str | None | torch.dtype | torch.device | torch.layout | torch.memory_format)


@contextlib.contextmanager
def hollow_tensors() -> Iterator[None]:
    """Give every new tensor of this thread a shape, a type and a place, but no contents.

    Functions that networks remember the results of work as ever, with contents: their results follow from shapes
    alone, are small, and are used again by networks that compute, so that nothing without contents may get among
    them. torch's modes hold for one thread; these functions run in another.
    """
    modules = [module for name, module in sys.modules.items() if name.startswith("dmir.networks.")]
    found = [
        (module, name, function)
        for module in modules
        for name, function in vars(module).items()
        if hasattr(function, "cache_clear")
    ]
    with ThreadPoolExecutor(max_workers=1) as thread:

        def apart(function: Callable[..., Any], *arguments: Any) -> Any:
            return thread.submit(function, *arguments).result()

        for module, name, function in found:
            setattr(module, name, functools.partial(apart, function))
        try:
            with HollowTensors():
                yield
        finally:
            for module, name, function in found:
                setattr(module, name, function)
