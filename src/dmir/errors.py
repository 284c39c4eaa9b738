"""Errors that a user can mend: one clear message, shown without a traceback."""

from __future__ import annotations

import difflib
from collections.abc import Iterable
from pathlib import Path


class DmirError(Exception):
    """A failure whose message alone tells the user what happened and what to do."""


class InputError(DmirError):
    """Something that the user gave is not usable.

    Parameters
    ----------
    where
        The file, the configuration key or the argument at fault.
    found, expected
        What was there and what should have been there.
    remedy
        What to do about it.
    """

    def __init__(self, where: str | Path, *, found: str, expected: str, remedy: str = "") -> None:
        self.where = str(where)
        self.found = found
        self.expected = expected
        self.remedy = remedy
        message = f"{where}: found {found}; expected {expected}."
        super().__init__(f"{message} {remedy}" if remedy else message)

    def __reduce__(self) -> tuple:
        # exceptions with keyword arguments do not survive pickling between processes by themselves
        return (_rebuild, (self.where, self.found, self.expected, self.remedy))


def _rebuild(where: str, found: str, expected: str, remedy: str) -> InputError:
    return InputError(where, found=found, expected=expected, remedy=remedy)


def suggestion(word: str, known: Iterable[str]) -> str:
    """Return ``"Did you mean 'x'?"`` for a misspelt word, or the list of what is known."""
    names = sorted(known)
    close = difflib.get_close_matches(word, names, n=1, cutoff=0.6)
    return f"Did you mean '{close[0]}'?" if close else f"Known: {', '.join(names)}."
