"""Networks of which only the shapes are wanted: what they are made of is known without a number of theirs."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch.overrides import TorchFunctionMode

DRAWN = ("normal_", "uniform_")


class _NothingDrawn(TorchFunctionMode):
    """Leaves undone what would fill a tensor with random numbers."""

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if getattr(func, "__name__", "") in DRAWN:
            return args[0] if args else kwargs["tensor"]
        return func(*args, **(kwargs or {}))


@contextmanager
def shapes_alone() -> Iterator[None]:
    """Build what is built within on torch's meta device, without contents.

    Nothing is drawn either, which is not for the numbers' sake: the first random number of a tensor without contents
    imports torch's compiler, and that takes over a second.
    """
    with torch.device("meta"), _NothingDrawn():
        yield
