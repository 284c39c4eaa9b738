"""Errors that a user can mend: one clear message, shown without a traceback."""

from __future__ import annotations

import difflib
import os
import shlex
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


class StorageError(DmirError):
    """Something cannot be written: the disk is full, read-only or broken. Not a fault of what was to be written.

    Parameters
    ----------
    where
        The file or the folder.
    reason
        Why, in a user's words, with the system's own.
    remedy
        What to do about it.
    """

    def __init__(self, where: str | Path, *, reason: str, remedy: str) -> None:
        self.where = str(where)
        self.reason = reason
        self.remedy = remedy
        super().__init__(f"{where}: {reason}. {remedy}")

    def __reduce__(self) -> tuple:
        return (_rebuild_storage, (self.where, self.reason, self.remedy))


def _rebuild_storage(where: str, reason: str, remedy: str) -> StorageError:
    return StorageError(where, reason=reason, remedy=remedy)


def _rebuild(where: str, found: str, expected: str, remedy: str) -> InputError:
    return InputError(where, found=found, expected=expected, remedy=remedy)


def suggestion(word: str, known: Iterable[str]) -> str:
    """Return ``"Did you mean 'x'?"`` for a misspelt word, or the list of what is known."""
    names = sorted(known)
    close = difflib.get_close_matches(word, names, n=1, cutoff=0.6)
    return f"Did you mean '{close[0]}'?" if close else f"Known: {', '.join(names)}."


RESULTS = "DMIR_RESULTS"  # the folder of which all files are made by this very pipeline; processes hand it on


def made_below(folder: str | Path | None) -> None:
    """Name the folder of a pipeline's results, so that messages can tell its files from a user's; None: there is none.

    :func:`damaged` then tells how such a file is made anew, in this process and in those that it starts.
    """
    if folder is None:
        os.environ.pop(RESULTS, None)
    else:
        os.environ[RESULTS] = str(Path(folder).absolute())


def damaged(where: str | Path, *, found: str, expected: str, remedy: str, path: str | Path | None = None) -> InputError:
    """Return the error of a file that is cut short or otherwise damaged.

    Parameters
    ----------
    where, found, expected
        As for :class:`InputError`.
    remedy
        What a user can do about a file of his own; a file of the pipeline is deleted, and the next run makes it anew.
    path
        The file, if ``where`` says more than that.
    """
    file = Path(where if path is None else path)
    if RESULTS in os.environ and file.absolute().is_relative_to(os.environ[RESULTS]):
        shown = file.relative_to(Path.cwd()) if file.is_relative_to(Path.cwd()) else file
        remedy = (
            "It is one of the pipeline's own files, which is made anew once it is gone. Run this, and then the same"
            f" command again: rm {shlex.quote(str(shown))}"
        )
    return InputError(where, found=found, expected=expected, remedy=remedy)
