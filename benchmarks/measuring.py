"""What the benchmarks share: a process a row, medians of warm repeats, peak memory, and one table.

A row is measured in a process of its own: the largest resident set of a process never falls, a crash or want of memory
is one failed row, and nothing that an earlier row left in a cache speaks for a later one.
"""

from __future__ import annotations

import argparse
import json
import os
import re
import signal
import statistics
import subprocess
import sys
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import pandas as pd
import torch
import torch.nn.functional as F

from dmir.errors import DmirError, InputError
from dmir.training.devices import peak_memory_mb
from dmir.volumes import atomic_path

OUT_SUFFIXES = (".csv", ".md")


# --- the process that asks ---


def measure_apart(script: str | Path, row: dict[str, Any], threads: int, timeout: float) -> dict[str, Any]:
    """Let ``script --row`` measure one row in a process of its own.

    Returns
    -------
    dict
        What the script found, or ``{"failed": reason}``.
    """
    command = [sys.executable, str(script), "--row", json.dumps(row)]
    environment = {**os.environ, "OMP_NUM_THREADS": str(threads), "MKL_NUM_THREADS": str(threads)}
    try:
        run = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=timeout)
    except subprocess.TimeoutExpired:
        return {"failed": f"not done after {timeout:g} s"}
    if run.returncode:
        return {"failed": _reason(run.returncode, run.stderr)}
    found: dict[str, Any] = json.loads(run.stdout.splitlines()[-1])
    return found


def _reason(status: int, errors: str) -> str:
    if status < 0:
        name = signal.Signals(-status).name
        return f"ended by {name}" + (", as when memory runs out" if name == "SIGKILL" else "")
    # the line that names the exception; some exceptions go on for many lines after it
    named = [line for line in errors.splitlines() if re.match(r"[\w.]+(Error|Exception|Input|Interrupt)\w*: ", line)]
    lines = named or [line for line in errors.splitlines() if line.strip()]
    return lines[-1].strip().removeprefix("Error: ")[:120] if lines else f"exit status {status}"


def run_main(main: Callable[[], None]) -> int:
    """Run a script; a user's mistake is one message and status 1."""
    try:
        main()
    except DmirError as error:
        print(f"Error: {error}", file=sys.stderr)
        return 1
    return 0


def add_common_arguments(parser: argparse.ArgumentParser) -> None:
    """Add what every benchmark can be asked."""
    parser.add_argument("--device", default="auto", help="auto (default), cpu, cuda or cuda:<number>")
    parser.add_argument("--threads", type=int, default=1, help="threads of torch (default 1)")
    parser.add_argument("--repeats", type=int, default=3, help="warm runs, of which the median counts (default 3)")
    parser.add_argument("--timeout", type=float, default=1800, help="seconds that a row may take (default 1800)")
    parser.add_argument("--out", type=Path, help="write the table here too: .csv or .md")
    parser.add_argument("--row", help=argparse.SUPPRESS)  # how a script calls itself for one row


def check_common(options: argparse.Namespace) -> None:
    """Refuse, before anything is measured, what could not be measured or written."""
    if options.repeats < 1 or options.threads < 1:
        found = f"{options.repeats}, {options.threads}"
        raise InputError("--repeats, --threads", found=found, expected="at least 1")
    if options.out is not None and options.out.suffix not in OUT_SUFFIXES:
        raise InputError("--out", found=str(options.out), expected=f"a name in {' or '.join(OUT_SUFFIXES)}")


def parse_shape(text: str) -> tuple[int, int, int]:
    """Read ``"80x96x80"``.

    Raises
    ------
    InputError
        It is not three numbers of voxels.
    """
    if not re.fullmatch(r"[1-9]\d*(x[1-9]\d*){2}", text):
        raise InputError("grid", found=repr(text), expected="three numbers of voxels, as in 80x96x80")
    depth, height, width = map(int, text.split("x"))
    return depth, height, width


def tell(message: str) -> None:
    """Say how far the benchmark is, beside the table."""
    print(message, file=sys.stderr, flush=True)


def print_table(table: pd.DataFrame, out: Path | None) -> None:
    """Print a table as Markdown, without the columns that hold nothing, and write it if asked: in CSV every digit."""
    table = table.dropna(axis="columns", how="all")
    sides = ["left" if any(isinstance(value, str) for value in column) else "right" for _, column in table.items()]
    cells = table.apply(lambda column: column.map(_shown))
    shown = cells.to_markdown(index=False, disable_numparse=True, colalign=sides)
    print(shown)
    if out is None:
        return
    with atomic_path(out) as temporary:
        if out.suffix == ".csv":
            table.to_csv(temporary, index=False)
        else:
            Path(temporary).write_text(shown + "\n", encoding="utf-8")


def _shown(value: Any) -> str:
    if isinstance(value, str):
        return value
    if pd.isna(value):
        return ""
    if isinstance(value, float) and not value.is_integer():
        return f"{value:,.0f}" if abs(value) >= 1000 else f"{value:.3g}"
    return f"{value:,.0f}"


# --- the process that measures ---


def idle_memory_mb(device: torch.device) -> float:
    """Return the memory in MB of a process that has loaded everything and computed something, but holds nothing."""
    image = torch.rand(1, 8, 8, 8, 8, device=device, requires_grad=True)
    weight = torch.rand(8, 8, 3, 3, 3, device=device)
    heads = image.flatten(3)
    answer = F.scaled_dot_product_attention(heads, heads, heads)
    (F.conv3d(image, weight, padding=1).sum() + answer.sum()).backward()
    del image, weight, heads, answer
    if device.type == "cuda":
        torch.cuda.empty_cache()
        torch.cuda.reset_peak_memory_stats(device)
        return torch.cuda.memory_allocated(device) / 1e6
    status = Path("/proc/self/status")
    resident = re.search(r"VmRSS:\s+(\d+) kB", status.read_text()) if status.is_file() else None
    return int(resident[1]) * 1024 / 1e6 if resident else peak_memory_mb(device)


def measure(call: Callable[[], object], repeats: int, device: torch.device, idle_mb: float) -> dict[str, float | None]:
    """Time a computation after one run that does not count, and tell its peak memory.

    Returns
    -------
    dict
        ``s``: median of the wall seconds of the repeats. ``cpu_s``: of the process's CPU seconds; None on a GPU.
        ``mb``: peak of all runs over ``idle_mb``, in 10^6 bytes: torch's allocator on a GPU, the resident set on the
        CPU, where it never falls: measure what takes less first. ``first_s``: seconds of the first run.
    """
    on_cpu = device.type == "cpu"
    if not on_cpu:
        torch.cuda.reset_peak_memory_stats(device)
    seconds, cpu_seconds = zip(*(_clock(call, device) for _ in range(repeats + 1)), strict=True)
    return {
        "s": statistics.median(seconds[1:]),
        "cpu_s": statistics.median(cpu_seconds[1:]) if on_cpu else None,
        "mb": max(peak_memory_mb(device) - idle_mb, 0.0),
        "first_s": seconds[0],
    }


def _clock(call: Callable[[], object], device: torch.device) -> tuple[float, float]:
    _synchronise(device)
    start, cpu_start = time.perf_counter(), time.process_time()
    call()
    _synchronise(device)
    return time.perf_counter() - start, time.process_time() - cpu_start


def _synchronise(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize(device)


def smooth_images(shape: Sequence[int], device: torch.device | str = "cpu") -> tuple[torch.Tensor, torch.Tensor]:
    """Return a moving and a fixed image of smoothed noise in [0, 1], (1, 1, *shape) each, the same every time."""
    random = torch.Generator().manual_seed(1)
    noise = F.avg_pool3d(torch.rand(2, 1, *shape, generator=random), 3, 1, 1)
    moving, fixed = (2 * noise - 0.5).clamp(0.0, 1.0).to(device).split(1)
    return moving, fixed
