"""Tell whether anything has changed since `make demo` was done: 0 where nothing has, so that it need not look closer.

Code, configuration and results are compared by name, size and time of change. `--remember` notes how they are now.
"""

import hashlib
import json
import sys
from pathlib import Path

PARTS = ("Snakefile", "rules", "workflow", "src", "config", "profiles", "resources", "results")
NOTE = Path(".snakemake/demo-done.json")


def state() -> dict[str, str]:
    """Return part -> a hash of the names, sizes and times of its files; a part that is not there has none."""
    found = {}
    for part in map(Path, PARTS):
        files = [part] if part.is_file() else sorted(path for path in part.rglob("*") if path.is_file())
        lines = [
            f"{path}\0{path.stat().st_size}\0{path.stat().st_mtime_ns}\n" for path in files if path.suffix != ".pyc"
        ]
        if lines:
            found[str(part)] = hashlib.sha256("".join(lines).encode()).hexdigest()
    return found


def main() -> int:
    """Compare, or remember."""
    if "--remember" in sys.argv:
        NOTE.parent.mkdir(exist_ok=True)
        NOTE.write_text(json.dumps(state()))
        return 0
    try:
        noted = json.loads(NOTE.read_text())
    except (OSError, ValueError):
        return 1
    if noted != state():
        return 1
    print("Everything is done, and nothing has changed since.")
    return 0


if __name__ == "__main__":
    sys.exit(main())
