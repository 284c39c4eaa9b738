"""Print the rule graph as docs/workflow.md shows it: `snakemake --rulegraph mermaid-js`, a box for each stage.

A rule belongs to the stage whose file it is in, and what makes tables and figures is apart from the report page, which
shows them: a person can follow the arrows between seven boxes.
"""

import re
import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).parents[1]
STAGES = {
    "cohort": "find or simulate the scans",
    "preprocess": "preprocess",
    "train": "train the networks",
    "register": "register",
    "evaluate": "score",
    "products": "tables and figures",
    "report": "report",
}


def edges() -> list[tuple[str, str]]:
    """Return (stage, stage that uses what it makes) of the default configuration, in the order of the data flow."""
    snakemake = [sys.executable, "-m", "snakemake", "--rulegraph", "mermaid-js"]
    run = subprocess.run(snakemake, cwd=ROOT, capture_output=True, text=True, check=True)
    rules = dict(re.findall(r"(id\d+)\[(\w+)\]", run.stdout))
    pairs = [(rules[a], rules[b]) for a, b in re.findall(r"(id\d+) --> (id\d+)", run.stdout)]
    stages = stage_of_rule()
    found = {(stages.get(a, "products"), stages.get(b, "products")) for a, b in pairs if "all" not in (a, b)}
    order = list(STAGES)
    return sorted(((a, b) for a, b in found if a != b), key=lambda edge: [order.index(stage) for stage in edge])


def stage_of_rule() -> dict[str, str]:
    """Return rule -> stage, but for the tables and figures, which are made for the report and not by it."""
    stages = {}
    for stage in STAGES:
        path = ROOT / "rules" / f"{stage}.smk"
        text = path.read_text() if path.is_file() else ""
        rules = re.findall(r"^(?:use rule \w+ as|rule) (\w+)", text, re.MULTILINE)
        stages |= dict.fromkeys(rules, stage)
    return {rule: stage for rule, stage in stages.items() if "provenance" not in rule}


if __name__ == "__main__":
    print("flowchart LR")
    for stage, title in STAGES.items():
        print(f"    {stage}[{title}]")
    for first, second in edges():
        print(f"    {first} --> {second}")
