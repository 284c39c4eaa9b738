"""What is doubtful and yet can be gone on with: told once, in one place, with what was done about it.

A doubt is a Python warning, so that a notebook shows it where it arises, and :mod:`warnings` can silence it or make it
an error. Commands and jobs tell it in one line (:func:`told_doubts`), and refuse to go on where they are to be strict.
"""

from __future__ import annotations

import contextlib
import sys
import warnings
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from dmir.errors import DmirError, InputError


class Doubt(DmirError, UserWarning):
    """Something that a user gave may not be what it seems.

    Parameters
    ----------
    where
        The file, or what it is to the user.
    found
        What is doubtful about it.
    done
        What was done all the same.
    """

    def __init__(self, where: str | Path, found: str, done: str) -> None:
        self.where, self.found, self.done = str(where), found, done
        super().__init__(f"{where}: {found}; {done}")

    def __reduce__(self) -> tuple:
        return (Doubt, (self.where, self.found, self.done))


def doubt(where: str | Path, *, found: str, done: str) -> None:
    """Warn of a :class:`Doubt`."""
    warnings.warn(Doubt(where, found, done), stacklevel=3)


@contextlib.contextmanager
def told_doubts(strict: bool = False) -> Iterator[list[str]]:
    """Tell doubts on the standard error, a line each and each once, and yield the growing list of those told.

    Parameters
    ----------
    strict
        The first doubt is an error.

    Raises
    ------
    InputError
        There is a doubt, where none is wanted.
    """
    told: list[str] = []
    with warnings.catch_warnings():
        others = warnings.showwarning

        def show(message: Warning | str, *where: Any, **how: Any) -> None:
            if not isinstance(message, Doubt):
                others(message, *where, **how)
            elif str(message) not in told:
                told.append(str(message))
                print(f"Warning: {message}", file=sys.stderr, flush=True)

        warnings.showwarning = show
        warnings.simplefilter("error" if strict else "always", Doubt)
        try:
            yield told
        except Doubt as error:
            raise InputError(
                error.where,
                found=error.found,
                expected="nothing doubtful, as strict asks",
                remedy=f"Without strict: {error.done}.",
            ) from None
