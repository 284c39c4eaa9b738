"""Print the rule graph as the README shows it: `snakemake --rulegraph mermaid-js` by names, left to right.

The many tables and figures are one node each, or nobody could follow the arrows.
"""

import re
import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).parents[1]


def edges() -> list[tuple[str, str]]:
    """Return (rule, rule that uses what it makes) of the default configuration, without the rule all."""
    snakemake = [sys.executable, "-m", "snakemake", "--rulegraph", "mermaid-js"]
    run = subprocess.run(snakemake, cwd=ROOT, capture_output=True, text=True, check=True)
    names = dict(re.findall(r"(id\d+)\[(\w+)\]", run.stdout))
    pairs = [(names[a], names[b]) for a, b in re.findall(r"(id\d+) --> (id\d+)", run.stdout)]
    joined = {name: _node(name) for name in report_rules()}
    pairs = [(joined.get(a, a), joined.get(b, b)) for a, b in pairs if "all" not in (a, b)]
    return sorted({(a, b) for a, b in pairs if a != b})


def report_rules() -> list[str]:
    """Return the names of the rules that make tables, figures and the report."""
    text = (ROOT / "rules" / "report.smk").read_text()
    return re.findall(r"^rule (\w+):", text, re.MULTILINE)


def _node(rule: str) -> str:
    if rule in ("provenance", "report_page"):
        return rule
    return "tables" if rule.endswith("_table") else "figures"


if __name__ == "__main__":
    print("flowchart LR")
    for first, second in edges():
        print(f"    {first} --> {second}")
