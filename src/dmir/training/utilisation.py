"""How busy the GPUs were: :class:`GpuUtilisation`."""

from __future__ import annotations

import contextlib
import os
import shutil
import statistics
import subprocess
import threading
from collections.abc import Sequence

IDLE_BELOW = 50  # percent


class GpuUtilisation:
    """Asks ``nvidia-smi`` every few seconds how busy this process' cards are, as long as the context is open.

    The driver's utilisation is the share of its last sample period (up to a second) in which a kernel ran; it tells
    that a GPU had nothing to do, not how well its units were filled. Where there is no ``nvidia-smi`` nothing is
    sampled; nothing here ever raises.

    Parameters
    ----------
    cards
        Indices or UUIDs; by default those of ``CUDA_VISIBLE_DEVICES``, and all of the machine where it is not set.
    every
        Seconds between two samples.

    Examples
    --------
    >>> with GpuUtilisation(cards=[]) as utilisation:
    ...     pass
    >>> utilisation.summary()
    {}
    """

    def __init__(self, cards: Sequence[str] | None = None, every: float = 5.0) -> None:
        if cards is None:
            listed = os.environ.get("CUDA_VISIBLE_DEVICES")
            cards = (
                None
                if listed is None
                else [card.strip() for card in listed.split(",") if card.strip() not in ("", "-1")]
            )
        self.cards = cards
        self.every = every
        self.percent: list[float] = []  # a number a sample and card
        self.memory_mb: list[float] = []
        self._closed = threading.Event()
        self._thread: threading.Thread | None = None

    def __enter__(self) -> GpuUtilisation:
        program = shutil.which("nvidia-smi")
        if program is not None and (self.cards is None or self.cards):
            command = [program, "--query-gpu=utilization.gpu,memory.used", "--format=csv,noheader,nounits"]
            if self.cards is not None:
                command.append(f"--id={','.join(self.cards)}")
            self._closed.clear()
            self._thread = threading.Thread(target=self._work, args=(command,), name="GPU utilisation", daemon=True)
            self._thread.start()
        return self

    def __exit__(self, *exception: object) -> None:
        self._closed.set()
        if self._thread is not None:
            self._thread.join(timeout=10)
            self._thread = None

    def summary(self) -> dict[str, float]:
        """Return mean and median utilisation in percent, the share of samples below 50 %, and the peak memory in MB.

        Empty where nothing was sampled.
        """
        percent = list(self.percent)
        if not percent:
            return {}
        return {
            "gpu_utilisation_mean": round(statistics.fmean(percent), 1),
            "gpu_utilisation_median": statistics.median(percent),
            "gpu_share_below_half": round(sum(value < IDLE_BELOW for value in percent) / len(percent), 4),
            "gpu_memory_used_mb": round(max(self.memory_mb) * 2**20 / 1e6, 1),  # of all processes on the card
            "gpu_samples": len(percent),
        }

    def _work(self, command: list[str]) -> None:
        while not self._closed.wait(self.every):
            with contextlib.suppress(OSError, subprocess.SubprocessError):
                answer = subprocess.run(command, capture_output=True, text=True, timeout=30, check=True)
                self._note(answer.stdout)

    def _note(self, answer: str) -> None:
        """Keep the numbers of one answer, a line a card; a card that does not tell ("[N/A]") has none."""
        for line in answer.splitlines():
            with contextlib.suppress(ValueError):
                percent, memory = map(float, line.split(","))
                self.percent.append(percent)
                self.memory_mb.append(memory)
