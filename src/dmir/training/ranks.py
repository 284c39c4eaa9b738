"""The processes of a training on several GPUs: this one leads, and one more for each further card follows.

Every process runs the same steps on its share of each step's pairs (Lightning's DDP averages their gradients), and
everything else happens in the leader alone: validation, history, state, results. The followers are started as
``python -m dmir.training.follower`` and not by forking or by starting the caller's own script again, which could be
anything. They end with the leader, however it ends: when the pipe that it holds is closed.
"""

from __future__ import annotations

import contextlib
import json
import logging
import os
import socket
import subprocess
import sys
import threading
from collections.abc import Iterator, Mapping
from typing import Any

log = logging.getLogger(__name__)


@contextlib.contextmanager
def followers(job: Mapping[str, Any], world_size: int) -> Iterator[None]:
    """Start the other processes of a training, and end them at the end.

    Parameters
    ----------
    job
        What they are to do, for :func:`dmir.training.follower.follow`: anything JSON can hold.
    world_size
        Processes in all. With one, nothing happens.
    """
    if world_size == 1:
        yield
        return
    environment = {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(_free_port()), "WORLD_SIZE": str(world_size)}
    started = [_start(job, {**environment, "LOCAL_RANK": str(rank)}) for rank in range(1, world_size)]
    ended = threading.Event()
    watcher = threading.Thread(target=_watch, args=(started, ended), daemon=True)
    watcher.start()
    try:
        with _environment({**environment, "LOCAL_RANK": "0"}):
            yield
    finally:
        ended.set()
        for process in started:
            assert process.stdin is not None
            process.stdin.close()
        for process in started:
            process.wait()
        watcher.join()


def _start(job: Mapping[str, Any], environment: Mapping[str, str]) -> subprocess.Popen[bytes]:
    command = [sys.executable, "-m", "dmir.training.follower"]
    process = subprocess.Popen(command, stdin=subprocess.PIPE, env={**os.environ, **environment})
    assert process.stdin is not None
    process.stdin.write(json.dumps(job).encode() + b"\n")
    process.stdin.flush()
    return process


def _watch(started: list[subprocess.Popen[bytes]], ended: threading.Event) -> None:
    """End this process if a follower is lost: the next step would wait for it for ever, within the GPU's queue."""
    while not ended.wait(0.5):
        for process in started:
            if process.poll() is not None and not ended.is_set():
                log.error(
                    "a process of this training ended with status %d: see above for its reason. The training stops, and"
                    " goes on from its last saved state when it is started again",
                    process.returncode,
                )
                logging.shutdown()
                os._exit(1)


@contextlib.contextmanager
def _environment(variables: Mapping[str, str]) -> Iterator[None]:
    before = {name: os.environ.get(name) for name in variables}
    os.environ.update(variables)
    try:
        yield
    finally:
        for name, value in before.items():
            if value is None:
                os.environ.pop(name, None)
            else:
                os.environ[name] = value


def _free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])
