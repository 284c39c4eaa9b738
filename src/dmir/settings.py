"""What a method tells of itself: the base of its settings, and what a pair costs."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Annotated, Any, ClassVar

from pydantic import BaseModel, ConfigDict, Field

Positive = Annotated[float, Field(gt=0)]


class Model(BaseModel):
    """Base of all settings: unknown keys, NaN and Inf are refused, and a docstring below a field documents it."""

    model_config = ConfigDict(extra="forbid", frozen=True, use_attribute_docstrings=True, allow_inf_nan=False)


class MethodSettings(Model):
    """Base of the settings of a method or network: what can stand under its name in ``settings``."""

    given_only: ClassVar[bool] = False
    """Whether the method is given only what a configuration has: it then has its own defaults, maybe computed ones."""

    algorithm: str = ""

    def parameters(self) -> dict[str, Any]:
        """Return what the method is given, as JSON has it."""
        return self.model_dump(mode="json", exclude={"algorithm"}, exclude_unset=self.given_only)


@dataclass(frozen=True)
class PairCost:
    """What registering one pair costs, known before anything runs.

    Attributes
    ----------
    seconds
        On one core, the field not yet written.
    memory_bytes
        Largest resident set; None: not known.
    note
        What to mind.
    gpu_moved_gb, gpu_kernels
        What a GPU moves at least, 10^9 bytes, and how many kernels it is given; None: it does not compute on one.
    """

    seconds: float
    memory_bytes: float | None = None
    note: str = ""
    gpu_moved_gb: float | None = None
    gpu_kernels: int = 0
