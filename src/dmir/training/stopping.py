"""Stopping a training between two steps, where its state is whole: Ctrl-C and a scheduler's SIGTERM."""

from __future__ import annotations

import signal
import threading
from types import FrameType

EXIT_CODES = {signal.SIGINT: 130, signal.SIGTERM: 143}  # as a shell tells of a process that a signal ended


class Stopped(BaseException):
    """A training was asked to stop, and its state has been kept."""

    def __init__(self, signal_number: int) -> None:
        super().__init__(signal_number)
        self.signal_number = signal_number

    def as_exit(self) -> BaseException:
        """Return what a caller expects: an interrupt, or the exit of a terminated process."""
        if self.signal_number == signal.SIGINT:
            return KeyboardInterrupt()
        return SystemExit(EXIT_CODES[signal.SIGTERM])


class StopRequest:
    """Hears SIGINT and SIGTERM, and tells of them when asked; a second Ctrl-C interrupts at once."""

    def __init__(self) -> None:
        self.signal_number: int | None = None

    def listen(self) -> None:
        """Take the two signals, in the main thread (elsewhere they cannot be taken, and end the process as usual).

        Lightning puts back what stood before when its Trainer ends, for it takes SIGTERM itself. Its own handler is
        replaced because it speaks to the other processes of a training in the middle of a step.
        """
        if threading.current_thread() is threading.main_thread():
            for number in EXIT_CODES:
                signal.signal(number, self._note)

    def _note(self, number: int, frame: FrameType | None) -> None:
        if self.signal_number == number == signal.SIGINT:
            raise KeyboardInterrupt
        self.signal_number = number


def ignore_signals() -> None:
    """Leave both signals to the process that leads: a terminal and a scheduler send them to all."""
    for number in EXIT_CODES:
        signal.signal(number, signal.SIG_IGN)
