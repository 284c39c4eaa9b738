"""A process that follows the one that leads a training on several GPUs: ``python -m dmir.training.follower``.

:func:`dmir.training.ranks.followers` starts it, writes its job into its pipe, and ends it by closing that.
"""

from __future__ import annotations

import json
import logging
import os
import sys
import threading
from collections.abc import Mapping
from functools import partial
from typing import Any


def follow(job: Mapping[str, Any], rank: int) -> None:
    """Do the steps of a training together with the process that leads it."""
    from dmir.training.devices import gpu_failures_told
    from dmir.training.resume import how_to_go_on
    from dmir.training.session import Session

    session = Session.of_job(job, rank)
    with gpu_failures_told(partial(how_to_go_on, session.resume)), session.running():
        bank, built, state = session.prepare()
        session.fit(built, bank, state, None)


def _end_with_the_leader() -> None:
    sys.stdin.buffer.read()  # returns when the leader has closed the pipe, or is no more
    os._exit(0)


def main() -> None:
    """Follow: do the leader's steps on this process's share of the pairs."""
    from dmir.errors import DmirError
    from dmir.training.stopping import ignore_signals

    ignore_signals()
    logging.basicConfig(level=logging.WARNING, format="%(asctime)s %(message)s")
    job = json.loads(sys.stdin.buffer.readline())
    threading.Thread(target=_end_with_the_leader, daemon=True).start()
    try:
        follow(job, int(os.environ["LOCAL_RANK"]))
    except DmirError as error:
        print(f"Error: {error}", file=sys.stderr)
        sys.exit(1)
    threading.Event().wait()  # the leader validates, writes, and ends this process


if __name__ == "__main__":
    main()
