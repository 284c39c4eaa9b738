"""Programs that are started for one pair: that they end with who started them, how they ended, what they said last."""

from __future__ import annotations

import ctypes
import os
import signal
import sys
from pathlib import Path

KILLED = (signal.SIGKILL, signal.SIGTERM, signal.SIGINT, signal.SIGHUP, signal.SIGQUIT)  # signals that others send
PR_SET_PDEATHSIG = 1


def end_with_parent() -> None:
    """Let the kernel kill this process when the one that started it ends, on Linux; it may hear no other call."""
    if sys.platform == "linux":
        ctypes.CDLL(None).prctl(PR_SET_PDEATHSIG, signal.SIGKILL)


def signal_name(number: int) -> str:
    """Return ``"SIGSEGV"`` of 11, and ``"signal 99"`` of what has no name."""
    return next((known.name for known in signal.Signals if known == number), f"signal {number}")


def end_of(path: Path, most: int) -> tuple[str, bool]:
    """Return the last ``most`` bytes of a text file, stripped, and whether there is more before them."""
    with path.open("rb") as file:
        size = file.seek(0, os.SEEK_END)
        file.seek(max(0, size - most))
        return file.read().decode(errors="replace").strip(), size > most
