"""Which GPU this process may use, and how many threads.

A scheduler's count of GPUs says how many jobs run at once, not which card each of them gets: left alone, all of them
take the first one. So each process takes a lease of a card before it touches CUDA: a lock on one file per card. The
kernel drops the lock when the process ends, however it ends, so a killed job never leaves a card behind. A batch
system's job has the cards that it was assigned (``CUDA_VISIBLE_DEVICES``), without a lease, and no others: what the
driver lists beside them is other people's.

A card that should be there and is not ends the work with a message (:class:`GpuUnusable`). It never goes on on the
CPU by itself: that would take weeks, and give other numbers than the rest of a comparison.

The lease is a gentlemen's agreement between processes of this library on one machine; the folder of its lock files
(``GPU_LEASE_DIR``, default in the temporary folder) must not be on a network file system.
"""

from __future__ import annotations

import contextlib
import fcntl
import functools
import logging
import os
import random
import re
import resource
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import TYPE_CHECKING

from dmir.errors import DmirError, InputError
from dmir.runs import BATCH_JOB_VARIABLES

if TYPE_CHECKING:
    import torch  # imported in the functions: a lease is taken without it, and before it sees the cards

log = logging.getLogger(__name__)

COUNTED_CARDS_VARIABLES = ("SLURM_GPUS_ON_NODE", "SLURM_JOB_GPUS", "SLURM_STEP_GPUS")  # set for jobs that have cards
NO_CARDS = ("", "-1", "NoDevFiles")  # entries of CUDA_VISIBLE_DEVICES that are none
NO_DEVICES_FOUND = 6  # nvidia-smi's status: the driver works, and there is no GPU
ON_THE_CPU = "An empty GPU_POOL in the environment (`GPU_POOL= snakemake ...`) says that the CPU is to be used."
GPU_FAILURE = re.compile(r"CUDA (driver )?error|cuDNN error|CU(DNN|BLAS|FFT|SOLVER)_STATUS_|NCCL")  # in torch's words
_leased: dict[str, int] = {}  # card -> descriptor of its locked file, held until the process ends


class NoFreeCard(DmirError):
    """No GPU became free within the time that the caller was ready to wait."""


class GpuUnusable(DmirError):
    """A GPU that should be there is not, or has stopped working."""


def visible_cards() -> list[str]:
    """Return the cards to choose from: ``GPU_POOL``, else ``CUDA_VISIBLE_DEVICES``, else all that the driver lists.

    The driver's list holds UUIDs, which name the same card whatever ``CUDA_DEVICE_ORDER`` says. An empty list means
    that there is no GPU here. In a job of a batch system the driver is not asked.

    Raises
    ------
    GpuUnusable
        The driver is there and fails, as it does when a card is lost; or a batch system counts this job's cards
        without saying which they are.
    """
    listed = os.environ.get("GPU_POOL", os.environ.get("CUDA_VISIBLE_DEVICES"))
    if listed is not None:
        return _cards_in(listed)
    if batch_system() is None:
        return _cards_of_driver()
    counted = [variable for variable in COUNTED_CARDS_VARIABLES if os.environ.get(variable, "0") != "0"]
    if counted:
        raise GpuUnusable(
            f"The batch system gave this job GPUs ({counted[0]}={os.environ[counted[0]]}) without saying which: "
            "CUDA_VISIBLE_DEVICES is not set. Name the node's cards in GPU_POOL, for jobs of this pipeline to lease, "
            f"or have the cluster's gres.conf name their device files. {ON_THE_CPU}"
        )
    return []


def batch_system() -> str | None:
    """Return the variable that tells that this is a batch system's job; None where it is none."""
    return next((variable for variable in BATCH_JOB_VARIABLES if variable in os.environ), None)


def _cards_in(listed: str) -> list[str]:
    return [card.strip() for card in listed.split(",") if card.strip() not in NO_CARDS]


def _cards_of_driver() -> list[str]:
    try:
        answer = subprocess.run(
            ["nvidia-smi", "--query-gpu=uuid", "--format=csv,noheader"], capture_output=True, text=True, timeout=60
        )
    except FileNotFoundError:
        return []
    except (OSError, subprocess.SubprocessError) as error:
        raise GpuUnusable(f"The GPUs' driver does not answer ({error}). {ON_THE_CPU}") from None
    if answer.returncode == NO_DEVICES_FOUND:
        return []
    if answer.returncode:
        told = " ".join((answer.stdout + answer.stderr).split())[:300]
        raise GpuUnusable(
            f"The GPUs' driver does not work (nvidia-smi: {told or f'status {answer.returncode}'}). A card that is lost"
            f" comes back when the machine is started anew; GPU_POOL=... names those to use without it. {ON_THE_CPU}"
        )
    return answer.stdout.split()


def lease_cards(count: int = 1, timeout: float | None = None) -> list[str]:
    """Take ``count`` GPUs for as long as this process lives, and show CUDA only these.

    Waits for cards that other processes hold. Call it before torch initialises CUDA; a second call returns the cards
    that the process already has.

    Parameters
    ----------
    count
        Number of cards.
    timeout
        Seconds to wait for a free card; None waits for ever.

    Returns
    -------
    list of str
        The cards, as ``CUDA_VISIBLE_DEVICES`` now lists them; empty where there is no GPU.

    Raises
    ------
    InputError
        More cards are asked for than the machine has, or than a batch system gave.
    NoFreeCard
        The time is over.
    GpuUnusable
        The driver fails, or a batch system does not say which cards it gave.
    """
    if len(_leased) >= count:
        return list(_leased)
    assigned = _cards_in(os.environ.get("CUDA_VISIBLE_DEVICES", ""))
    if assigned and batch_system() is not None:
        return _assigned(assigned, count)
    cards = visible_cards()
    if not cards:
        return []
    if count > len(cards):
        raise InputError("GPUs", found=f"{len(cards)} ({', '.join(cards)})", expected=f"at least {count}")
    _leased.update(_wait_for(cards, count, timeout))
    os.environ["CUDA_VISIBLE_DEVICES"] = ",".join(_leased)
    return list(_leased)


def _assigned(cards: list[str], count: int) -> list[str]:
    """Return the cards that a batch system gave this job; InputError where it gave fewer than the job is to use."""
    if len(cards) < count:
        raise InputError(
            "GPUs",
            found=f"{len(cards)} assigned by the batch system ({', '.join(cards)})",
            expected=f"at least {count}",
            remedy="The rule's resource gpu and the key training.gpus must agree.",
        )
    log.info("GPU %s assigned by the batch system", ", ".join(cards))
    return cards


def _wait_for(cards: list[str], count: int, timeout: float | None) -> dict[str, int]:
    folder = Path(os.environ.get("GPU_LEASE_DIR") or Path(tempfile.gettempdir()) / "dmir-gpu-lease")
    if not folder.is_dir():
        folder.mkdir(parents=True, exist_ok=True)
        folder.chmod(0o1777)  # shared by all users, whatever this one's umask
    start, told = time.monotonic(), False
    while True:
        with _gate(folder):
            leased = _try_to_lock(folder, cards, count)
        waited = time.monotonic() - start
        if leased:
            log.info("GPU %s leased by process %d after %.1f s", ", ".join(leased), os.getpid(), waited)
            return leased
        if timeout is not None and waited > timeout:
            raise NoFreeCard(f"No {count} free GPU(s) among {', '.join(cards)} within {timeout:g} s.")
        if not told:
            log.warning("all GPUs (%s) are in use: waiting for %d of them", ", ".join(cards), count)
            told = True
        time.sleep(random.uniform(0.1, 0.3))


@contextlib.contextmanager
def _gate(folder: Path) -> Iterator[None]:
    """Let one process at a time collect cards: two that want two each never hold one each and wait for ever."""
    gate = _open(folder / "gate")
    try:
        fcntl.flock(gate, fcntl.LOCK_EX)
        yield
    finally:
        os.close(gate)


def _try_to_lock(folder: Path, cards: list[str], count: int) -> dict[str, int]:
    """Lock ``count`` cards, or none."""
    locked: dict[str, int] = {}
    for card in cards:
        descriptor = _open(folder / card.replace("/", "_"))
        try:
            fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            os.close(descriptor)
            continue
        locked[card] = descriptor
        if len(locked) == count:
            return locked
    for descriptor in locked.values():
        os.close(descriptor)
    return {}


def _open(path: Path) -> int:
    # Kernels with fs.protected_regular refuse O_CREAT on another user's file in a sticky folder, so open it first.
    flags = os.O_RDWR | os.O_NOFOLLOW | os.O_CLOEXEC
    while True:
        with contextlib.suppress(FileNotFoundError):
            return os.open(path, flags)
        with contextlib.suppress(FileExistsError):
            descriptor = os.open(path, flags | os.O_CREAT | os.O_EXCL, 0o666)
            os.fchmod(descriptor, 0o666)
            return descriptor


def choose_device(device: str | torch.device | None = None, timeout: float | None = None) -> torch.device:
    """Return the device to compute on, with a leased GPU where there is one.

    Parameters
    ----------
    device
        None or ``"auto"``: a free GPU, else the CPU (said once in the log). ``"cpu"``. ``"cuda"``: a free GPU, or an
        error. ``"cuda:1"``: that very card, without a lease.
    timeout
        Seconds to wait for a free card; None waits for ever.

    Raises
    ------
    InputError
        A GPU is asked for and there is none.
    GpuUnusable
        There should be one, and torch cannot use it.
    """
    return choose_devices(device, 1, timeout)[0]


def choose_devices(
    device: str | torch.device | None = None, count: int = 1, timeout: float | None = None
) -> list[torch.device]:
    """Return ``count`` GPUs to compute on together, as :func:`choose_device`; one device, the CPU, where there is none.

    Raises
    ------
    InputError
        More GPUs are asked for than the machine has, or one by its name and several at once.
    GpuUnusable
        There should be that many, and torch cannot use them.
    """
    import torch

    if isinstance(device, torch.device) or device not in (None, "auto", "cuda"):
        named = torch.device(device)
        if count > 1 and named.type == "cuda":
            raise InputError("device", found=f"{named} and {count} GPUs", expected="'auto' or 'cuda' for several")
        return [named]
    cards = _free_cards(count, timeout)
    if not isinstance(cards, str):
        return cards
    if device == "cuda":
        raise InputError("device", found=cards, expected="a GPU, as 'cuda' asks for", remedy="Use 'auto' or 'cpu'.")
    _say_once(f"computing on the CPU: {cards}")
    return [torch.device("cpu")]


def _free_cards(count: int, timeout: float | None) -> list[torch.device] | str:
    """Return the leased cards as torch names them, or the reason why there are none."""
    import torch

    # Cards that are listed by hand are leased even by a torch that cannot use them: the list says how many may run.
    if not torch.backends.cuda.is_built() and not os.environ.get("GPU_POOL"):
        return "this torch is built without CUDA"
    if torch.cuda.is_initialized() and not _leased:
        log.warning("CUDA was in use before a GPU could be leased: other processes may share the card")
        return [torch.device("cuda", torch.cuda.current_device())]
    cards = lease_cards(count, timeout)
    if not cards:
        return _why_none()
    if not torch.backends.cuda.is_built():
        return "this torch is built without CUDA"
    usable = torch.cuda.device_count()
    if usable < count:
        raise GpuUnusable(
            f"GPU {', '.join(cards)}: torch can use {usable} of the {count} that this job is to have. "
            f"{_driver_now()} Is the card still there, the driver recent enough for this torch, and "
            f"GPU_POOL, where it is set, a list of cards that there are? {ON_THE_CPU}"
        )
    return [torch.device("cuda", number) for number in range(count)]


def _why_none() -> str:
    system = batch_system()
    if system is None or "GPU_POOL" in os.environ:
        return "no GPU here"
    return f"the batch system ({system} is set) has assigned no GPU to this job"


def _driver_now() -> str:
    """Return a sentence on the cards that the driver lists at this moment."""
    try:
        cards = _cards_of_driver()
    except GpuUnusable as error:
        return str(error)
    return f"The driver lists {', '.join(cards) or 'no GPU'} now."


@contextlib.contextmanager
def gpu_failures_told(then: Callable[[], str]) -> Iterator[None]:
    """Turn what torch says of a GPU that has stopped working into a message for the user.

    After such an error nothing more can be computed on the card by this process. Memory that ran out is none.

    Parameters
    ----------
    then
        Returns a sentence that says how to go on.

    Raises
    ------
    GpuUnusable
        torch raised an ``AcceleratorError``, or a ``RuntimeError`` in the words of CUDA or its libraries.
    """
    import torch

    try:
        yield
    except torch.OutOfMemoryError:
        raise
    except RuntimeError as error:
        if not isinstance(error, torch.AcceleratorError) and GPU_FAILURE.search(str(error)) is None:
            raise
        cards = ", ".join(_leased) or os.environ.get("CUDA_VISIBLE_DEVICES") or "in use"
        told = str(error).strip().splitlines()[0].rstrip(". ")
        raise GpuUnusable(
            f"GPU {cards} stopped working: {told}. {_driver_now()} {then()} If it happens again on this card, leave it "
            "out: GPU_POOL=... names those to use. Nothing goes on on the CPU by itself."
        ) from error


@functools.cache
def _say_once(message: str) -> None:
    log.info(message)


def set_threads(threads: int | None) -> int:
    """Let torch use so many threads (None leaves its choice, which follows ``OMP_NUM_THREADS``); return the number."""
    import torch

    if threads is not None and threads != torch.get_num_threads():
        torch.set_num_threads(threads)
    return torch.get_num_threads()


def device_name(device: torch.device) -> str:
    """Return what the device is called in tables: the GPU's model, or ``"cpu"``."""
    import torch

    return torch.cuda.get_device_name(device) if device.type == "cuda" else device.type


def peak_memory_mb(device: torch.device) -> float:
    """Return the peak memory in MB (10^6 bytes) that counts on this device.

    On a GPU: what torch's allocator had given out at most since the last reset. On the CPU: the largest resident set
    of this process since its start, libraries and everything it loaded included.
    """
    if device.type == "cuda":
        import torch

        return torch.cuda.max_memory_allocated(device) / 1e6
    status = Path("/proc/self/status")
    if status.is_file():
        # preferred to getrusage, whose figure starts with the resident set of the process that started this one
        for line in status.read_text().splitlines():
            if line.startswith("VmHWM:"):
                return int(line.split()[1]) * 1024 / 1e6
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return peak / 1e6 if sys.platform == "darwin" else peak * 1024 / 1e6


def reset_peak_memory(device: torch.device | None = None) -> bool:
    """Let the peak of :func:`peak_memory_mb` begin anew; False where the system cannot. None: of this process."""
    if device is not None and device.type == "cuda":
        import torch

        torch.cuda.reset_peak_memory_stats(device)
        return True
    try:
        Path("/proc/self/clear_refs").write_text("5")  # Linux: the peak becomes what is resident now
    except OSError:
        return False
    return True
