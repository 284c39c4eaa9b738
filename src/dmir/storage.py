"""The disk that results are written to: what can be wrong with it, in one message, and what its times must be.

Libraries tell of a full disk in words of their own: an ``OSError`` with a number, a ``RuntimeError`` of torch or ITK,
an exception of safetensors. Here all of them become one :class:`~dmir.errors.StorageError` that names the file.
"""

from __future__ import annotations

import contextlib
import errno
import fcntl
import os
import re
import shutil
import tempfile
import time
from collections.abc import Iterable, Iterator
from pathlib import Path

from dmir.errors import DmirError, InputError, StorageError

REASONS = {
    errno.ENOSPC: "the disk is full",
    errno.EDQUOT: "the disk quota is used up",
    errno.EFBIG: "the file would be larger than this disk, or this user's limit, allows",
    errno.EROFS: "the file system is read-only",
    errno.EACCES: "this user may not read or write it",
    errno.EPERM: "this user may not read or write it",
    errno.EIO: "the disk reports an error",
    errno.ESTALE: "the network file system has lost it",
}
REMEDIES = {
    errno.ENOSPC: "Make room on this disk",
    errno.EDQUOT: "Make room, or ask for more",
    errno.EFBIG: "Raise the limit (ulimit -f), or choose another disk",
    errno.EROFS: "Mount it for writing",
    errno.EACCES: "Give this user the right",
    errno.EPERM: "Give this user the right",
    errno.EIO: "Look after the disk",
    errno.ESTALE: "Mount it anew",
}
GO_ON = "and start the same command again: what is finished is kept, and nothing half-written is left."
ROOM = 2**20  # bytes: a disk without a mebibyte is full
LEFTOVER = ".writing-"  # how a file is called while it is written
SKEW = 60  # seconds that clocks of a network differ by, and nobody minds


def storage_error(error: BaseException, path: str | Path) -> StorageError | None:
    """Return the message of an exception that tells of a disk; None where it tells of something else.

    Parameters
    ----------
    error
        The exception, or one that was raised because of the one that tells.
    path
        What was written, as long as the exception names no other file.
    """
    seen: list[BaseException] = []
    cause: BaseException | None = error
    while cause is not None and cause not in seen and not isinstance(cause, DmirError):
        number = _number(cause)
        if number is not None:
            named = getattr(cause, "filename", None)
            return _told(number, path if named is None or _is_temporary(named, path) else os.fsdecode(named))
        seen.append(cause)
        cause = cause.__cause__ or (None if cause.__suppress_context__ else cause.__context__)
    return None


def _number(error: BaseException) -> int | None:
    """Return the number of the system's error that an exception tells of, by its number or by its words."""
    number = getattr(error, "errno", None)
    if isinstance(error, OSError) and number is not None:
        return number if number in REASONS else None
    words = str(error)
    return next((number for number in REASONS if os.strerror(number) in words), None)


def _is_temporary(named: str | bytes | int, path: str | Path) -> bool:
    """Tell whether a name is the temporary one of a file, which says nothing to a user."""
    return isinstance(named, int) or Path(os.fsdecode(named)).name.endswith(f"-{Path(path).name}")


def _told(number: int, path: str | Path) -> StorageError:
    details = [os.strerror(number)]
    if number == errno.ENOSPC:
        with contextlib.suppress(OSError):
            usage = shutil.disk_usage(_existing(Path(path)))
            details.append(f"{usage.free / 1e6:.2f} of {usage.total / 1e6:.0f} MB are free")
    return StorageError(path, reason=f"{REASONS[number]} ({'; '.join(details)})", remedy=f"{REMEDIES[number]} {GO_ON}")


def _existing(path: Path) -> Path:
    """Return the path, or the nearest folder above it that exists."""
    return next(folder for folder in (path.absolute(), *path.absolute().parents) if folder.exists())


@contextlib.contextmanager
def told_as_storage(path: str | Path, folder: str | Path | None = None) -> Iterator[None]:
    """Tell an exception as a :class:`StorageError` where a disk is to blame; others pass.

    Parameters
    ----------
    path
        What is being written, for the message.
    folder
        Where it is being written, at this moment: an exception whose words tell nothing is held against the room that
        is left there. By default the folder of ``path``.
    """
    try:
        yield
    except DmirError:
        raise
    except Exception as error:
        told = storage_error(error, path)
        if told is None and not isinstance(error, OSError):
            told = _without_room(Path(path).parent if folder is None else Path(folder), path)
        if told is None:
            raise
        raise told from error


def _without_room(folder: Path, path: str | Path) -> StorageError | None:
    """Return the message where not even a mebibyte can be written into a folder."""
    try:
        with tempfile.TemporaryFile(dir=folder) as file:
            file.write(b"\1" * ROOM)
            file.flush()
            os.fsync(file.fileno())
    except OSError as error:
        return storage_error(error, path)
    return None


@contextlib.contextmanager
def temporary_folder(prefix: str) -> Iterator[str]:
    """Yield a temporary folder, as :class:`tempfile.TemporaryDirectory`, for libraries that write files of their own.

    Raises
    ------
    StorageError
        Something failed in there while not even a mebibyte was left: few of these libraries tell of a full disk.
    """
    with tempfile.TemporaryDirectory(prefix=prefix) as name:
        try:
            yield name
        except StorageError:
            raise
        except Exception as error:
            told = storage_error(error, name) or _without_room(Path(name), f"{name} (TMPDIR says where)")
            if told is None:
                raise
            raise told from error


@contextlib.contextmanager
def plainly_named_folder(prefix: str) -> Iterator[str]:
    """Yield a :func:`temporary_folder` for ANTs, to which blanks, commas and brackets in a name are marks of language.

    Where the system's temporary folder has such a name, the kernel lends another one for the same folder.

    Raises
    ------
    InputError
        It has such a name, and this system lends none.
    """
    with temporary_folder(prefix) as name:
        if re.fullmatch(r"[\w./+-]+", name, re.ASCII):
            yield name
            return
        descriptor = os.open(name, os.O_RDONLY)
        try:
            lent = f"/proc/self/fd/{descriptor}"
            if not Path(lent).is_dir():
                raise InputError(
                    f"TMPDIR: {Path(name).parent}",
                    found="a name with blanks or other marks that ANTs cannot read",
                    expected="letters, digits and . _ + - alone",
                    remedy="Set TMPDIR to another folder.",
                )
            yield lent
        finally:
            os.close(descriptor)


def require_writable(folder: str | Path) -> None:
    """Refuse with StorageError a folder that nothing can be written into; nothing is written to find out.

    A folder that is not there yet is judged by the nearest one above it that is.
    """
    existing = _existing(Path(folder))
    if not os.access(existing, os.W_OK | os.X_OK):
        read_only = os.statvfs(existing).f_flag & os.ST_RDONLY
        raise _told(errno.EROFS if read_only else errno.EACCES, folder)


def require_folder(out: Path) -> None:
    """Refuse, before anything is computed, a folder that cannot be one or that nothing can be written into."""
    if out.exists() and not out.is_dir():
        raise InputError(f"--out {out}", found="a file", expected="a folder, which is made where there is none")
    require_writable(out)


@contextlib.contextmanager
def replaced_files(out: Path, earlier: Iterable[str], record: str) -> Iterator[Path]:
    """Yield a folder whose files take the place of an earlier command's in ``out`` at the end, all or none.

    Parameters
    ----------
    out
        It is made where there is none; other files in it stay.
    earlier
        All that the command may have written there before, relative to it.
    record
        The file that tells that the others are whole: it goes first and comes last.
    """
    with told_as_storage(out):
        out.parent.mkdir(parents=True, exist_ok=True)
        folder = Path(tempfile.mkdtemp(prefix=LEFTOVER, dir=out.parent))
        try:
            yield folder
            out.mkdir(exist_ok=True)
            for name in (record, *earlier):
                (out / name).unlink(missing_ok=True)
            written = [path for path in _all_files(folder) if path.is_file()]
            for path in sorted(written, key=lambda path: path == folder / record):
                target = out / path.relative_to(folder)
                target.parent.mkdir(exist_ok=True, parents=True)
                path.replace(target)
        finally:
            shutil.rmtree(folder, ignore_errors=True)


def settle_times(folder: str | Path, now: float | None = None) -> list[Path]:
    """Give files of a folder whose time of change lies in the future the present one; return them.

    Snakemake refuses what a job made as long as an input is younger than it: after a clock was ahead, every job that
    reads a file of that time would be done in vain until the time has come. The files were made before now, whatever
    their times tell, so that the present is the latest that can be true. Which of them is younger than another one
    stays as it was (to within their number of microseconds).

    Parameters
    ----------
    folder
        The pipeline's own results, never a user's data: see :func:`require_past`.
    now
        Seconds since 1970; by default what the clock says.

    Raises
    ------
    StorageError
        The times cannot be changed.
    """
    present = time.time() if now is None else now
    ahead = []
    for path in _all_files(Path(folder)):
        with contextlib.suppress(FileNotFoundError):
            if (changed := path.lstat().st_mtime) > present + SKEW:
                ahead.append((changed, path))
    for place, (_, path) in enumerate(sorted(ahead)):
        moment = present - 1e-6 * (len(ahead) - place)
        with told_as_storage(path):
            os.utime(path, (moment, moment), follow_symlinks=False)
    return [path for _, path in sorted(ahead)]


def _all_files(folder: Path) -> Iterator[Path]:
    """Yield all files and folders below a folder; folders are outputs too."""
    for root, folders, files in os.walk(folder):
        for name in (*folders, *files):
            yield Path(root, name)


def require_past(paths: Iterable[str | Path], now: float | None = None) -> None:
    """Refuse with InputError a user's file whose time of change lies in the future; a missing file is not looked at.

    Every job that reads it would be done and then refused by Snakemake, for the same reason as :func:`settle_times`.
    """
    present = time.time() if now is None else now
    for path in paths:
        with contextlib.suppress(FileNotFoundError):
            changed = Path(path).stat().st_mtime
            if changed > present + SKEW:
                found = time.strftime("%Y-%m-%d %H:%M:%S", time.localtime(changed))
                raise InputError(
                    path,
                    found=f"a time of change in the future ({found})",
                    expected="one before now, as what is made from it must not be older",
                    remedy=f"Compare the clock with `date`; if it is right, run: touch '{path}'",
                )


@contextlib.contextmanager
def temporary_beside(path: Path) -> Iterator[Path]:
    """Yield an empty file beside a path, and remove it at the end if it is still there.

    A process that is killed leaves it; the next one that writes the same file clears it away. The kernel's lock on it
    tells whether its writer lives.
    """
    _clear_leftovers(path)
    descriptor, name = tempfile.mkstemp(dir=path.parent, prefix=LEFTOVER, suffix=f"-{path.name}")
    try:
        with contextlib.suppress(OSError):  # a file system without locks
            fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
        yield Path(name)
    finally:
        os.close(descriptor)
        with contextlib.suppress(OSError):
            Path(name).unlink(missing_ok=True)


def _clear_leftovers(path: Path) -> None:
    """Remove what killed writers of a file left beside it."""
    leftover = re.compile(rf"{re.escape(LEFTOVER)}[a-z0-9_]{{8}}-{re.escape(path.name)}")
    with os.scandir(path.parent) as entries:
        found = [Path(entry.path) for entry in entries if leftover.fullmatch(entry.name)]
    for file in found:
        with contextlib.suppress(OSError), file.open("r+b") as opened:
            fcntl.flock(opened, fcntl.LOCK_EX | fcntl.LOCK_NB)  # OSError: its writer is alive
            file.unlink()
