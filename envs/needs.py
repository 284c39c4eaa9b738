"""Tell what `make demo` needs before it begins, and refuse where there is no room for it; needs Python alone.

`python envs/needs.py --memory` prints the MB that its jobs may have together on this machine.
"""

import os
import shutil
import sys
from pathlib import Path

MEMORY_GB = 3.0  # of the largest jobs that run side by side on two cores, and Snakemake
PACKAGES_GB, RESULTS_GB = 3.2, 0.5  # of disk: .venv, and what a run writes
OWN_MB = 500  # of Snakemake itself


def memory_mb() -> int:
    """Return the memory that is free here, or that the container leaves."""
    text = Path("/proc/meminfo").read_text() if Path("/proc/meminfo").is_file() else ""
    free = [int(line.split()[1]) // 1024 for line in text.splitlines() if line.startswith("MemAvailable:")]
    limit = Path("/sys/fs/cgroup/memory.max")
    if limit.is_file() and (words := limit.read_text().split()) and words[0].isdigit():
        used = Path("/sys/fs/cgroup/memory.current")
        free.append((int(words[0]) - (int(used.read_text()) if used.is_file() else 0)) // 2**20)
    return min(free, default=os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES") // 2**20)


def main() -> int:
    """Print what is needed; 1 where the disk has no room for it."""
    free = memory_mb()
    if "--memory" in sys.argv:
        print(max(1000, free - OWN_MB))
        return 0
    if Path("results/report.html").is_file() and Path(".venv/.installed").is_file():
        return 0
    installed = Path(".venv/.installed").is_file()
    disk = RESULTS_GB + (0 if installed else PACKAGES_GB)
    room = shutil.disk_usage(".").free / 1e9
    network = "" if installed else ", and the network while it installs its packages into .venv (once)"
    print(f"Needs {MEMORY_GB:.0f} GB of memory and {disk:.1f} GB of disk{network}.", flush=True)
    if free < 1000 * MEMORY_GB:
        print(
            f"Only {free / 1000:.1f} GB of memory are free here: jobs that do not fit wait for one another.", flush=True
        )
    if room < disk:
        print(
            f"Error: {room:.1f} GB are free on this disk. Make room, or copy this folder to another one.",
            file=sys.stderr,
        )
        return 1
    return 0


if __name__ == "__main__":
    sys.exit(main())
