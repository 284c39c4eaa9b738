"""Print the rule graph as the README shows it: `snakemake --rulegraph mermaid-js` by names, left to right."""

import re
import subprocess
import sys
from pathlib import Path


def edges() -> list[tuple[str, str]]:
    """Return (rule, rule that uses what it makes) of the default configuration, without the rule all."""
    snakemake = [sys.executable, "-m", "snakemake", "--rulegraph", "mermaid-js"]
    run = subprocess.run(snakemake, cwd=Path(__file__).parents[1], capture_output=True, text=True, check=True)
    names = dict(re.findall(r"(id\d+)\[(\w+)\]", run.stdout))
    pairs = [(names[a], names[b]) for a, b in re.findall(r"(id\d+) --> (id\d+)", run.stdout)]
    return sorted(pair for pair in pairs if "all" not in pair)


if __name__ == "__main__":
    print("flowchart LR")
    for first, second in edges():
        print(f"    {first} --> {second}")
