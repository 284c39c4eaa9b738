"""Print the rule graph as docs/workflow.md shows it: `snakemake --rulegraph mermaid-js`, a box for each stage.

A rule belongs to the stage whose file it is in, and what makes tables and figures is apart from the report page, which
shows them: a person can follow the arrows between seven boxes.
"""

import re
import subprocess
import sys
from collections.abc import Mapping
from pathlib import Path

from snakemake_logger_plugin_dmir.progress import stage_of, stages_of

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
    stages = stages_of(ROOT)
    found = {(stage_of_box(a, stages), stage_of_box(b, stages)) for a, b in pairs if "all" not in (a, b)}
    order = list(STAGES)
    return sorted(((a, b) for a, b in found if a != b), key=lambda edge: [order.index(stage) for stage in edge])


def stage_of_box(rule: str, stages: Mapping[str, str]) -> str:
    """Return the stage of a rule; tables and figures are made for the report and not by it."""
    stage = stage_of(rule, stages)
    return "products" if stage == "report" and rule != "report_page" else stage


if __name__ == "__main__":
    print("flowchart LR")
    for stage, title in STAGES.items():
        print(f"    {stage}[{title}]")
    for first, second in edges():
        print(f"    {first} --> {second}")
