"""Images that are fetched while the batch before is computed: :class:`Prefetcher`."""

from __future__ import annotations

import contextlib
import queue
import threading
import time
from collections.abc import Callable, Iterable, Sequence

import torch

AHEAD = 3  # batches: one that is used next, and two against a disk that is slow for once


class Prefetcher:
    """Fetches batches in the order in which they will be asked for, some of them ahead, in a thread of its own.

    On a GPU the thread fetches on a stream of its own, so that reading and copying go on beside the computation, and
    hands a batch on when it lies on the device as a whole: time that nobody waited was really hidden.

    Parameters
    ----------
    fetch
        Positions -> images on the device. Called in the thread.
    batches
        The positions of each batch that will be asked for, in that order; gone through in the thread.
    device
        Where the images are wanted.
    ahead
        Batches that are kept ready, at most.
    """

    def __init__(
        self,
        fetch: Callable[[list[int]], torch.Tensor],
        batches: Iterable[Sequence[int]],
        device: torch.device,
        ahead: int = AHEAD,
    ) -> None:
        self.waited_seconds = 0.0
        self._fetch, self._batches, self._device = fetch, batches, device
        self._free = threading.Semaphore(ahead)
        self._closed = threading.Event()
        self._ready: queue.SimpleQueue[tuple[list[int], torch.Tensor] | BaseException] = queue.SimpleQueue()
        self._failure: BaseException | None = None
        self._thread = threading.Thread(target=self._work, name="prefetch of images", daemon=True)
        self._thread.start()

    def take(self, positions: Sequence[int]) -> torch.Tensor:
        """Return the next batch, which must be these positions; waits until it is there.

        Raises
        ------
        BaseException
            What fetching or going through the batches raised.
        RuntimeError
            Other positions come next, or none, or it is closed.
        """
        if self._failure is not None:
            raise self._failure
        if self._closed.is_set():
            raise RuntimeError("images are asked for after the fetching was closed")
        start = time.monotonic()
        item = self._ready.get()
        self.waited_seconds += time.monotonic() - start
        if isinstance(item, BaseException):
            self._failure = item
            raise item
        self._free.release()
        announced, images = item
        if announced != list(positions):
            raise RuntimeError(f"the images {announced} were announced as next, and {list(positions)} are asked for")
        if images.is_cuda:
            # its memory belongs to the thread's stream, which must not use it again before this stream is done with it
            images.record_stream(torch.cuda.current_stream(self._device))
        return images

    def close(self) -> None:
        """End the thread, whatever is left to fetch."""
        self._closed.set()
        self._free.release()
        self._thread.join()

    def __enter__(self) -> Prefetcher:
        return self

    def __exit__(self, *exception: object) -> None:
        self.close()

    def _work(self) -> None:
        try:
            stream = torch.cuda.Stream(self._device) if self._device.type == "cuda" else None
            for batch in self._batches:
                self._free.acquire()
                if self._closed.is_set():
                    return
                positions = list(batch)
                self._ready.put((positions, self._fetch_on(stream, positions)))
            self._ready.put(RuntimeError("more images are asked for than were announced"))
        except BaseException as error:  # raised where the images are waited for
            self._ready.put(error)

    def _fetch_on(self, stream: torch.cuda.Stream | None, positions: list[int]) -> torch.Tensor:
        with torch.cuda.stream(stream) if stream else contextlib.nullcontext():
            images = self._fetch(positions)
        if stream:
            stream.synchronize()  # the thread waits, and lets the interpreter go on meanwhile
        return images
