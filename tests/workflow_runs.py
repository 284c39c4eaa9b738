"""Running the workflow as a user does, in a copy of this checkout: for the tests of the pipeline and of its faults."""

import os
import re
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import pandas as pd
import yaml

ROOT = Path(__file__).parents[1]
PARTS = ("Snakefile", "rules", "workflow", "src", "resources", "config", "profiles", "envs")

# every stage, a classical method and a network, in about a minute on two cores
SMALL = {
    "train_on": "simulated",
    "test_on": ["simulated"],
    "methods": ["affine", "syn", "voxelmorph"],
    "grid": {"shape": [32, 40, 32], "spacing": 6.0},
    "cohorts": {"simulated": {"source": "simulated", "train": 1, "val": 1, "test": 2}},
    "training": {"steps": 8, "validate_every": 2, "learning_rate": 1e-3, "window": 5},
    "settings": {
        "syn": {"iterations": [10, 5, 0]},
        "voxelmorph": {"network": {"encoder": [4, 8, 8, 8], "decoder": [8, 8, 8, 8, 8, 4, 4]}},
    },
}
TABLES = ["comparison", "statistics_simulated", "topology", "dice_by_structure_simulated", "failures"]
TARGETS = [f"results/tables/{name}.csv" for name in TABLES]
MEASURED = ("seconds", "peak_memory_mb")  # columns that differ between any two runs


def checkout(folder, configuration):
    """Copy the workflow, as a clone would be, and give it a configuration."""
    for part in PARTS:
        source = ROOT / part
        if source.is_dir():
            shutil.copytree(source, folder / part, ignore=shutil.ignore_patterns("__pycache__"))
        else:
            shutil.copy(source, folder / part)
    write_config(folder, configuration)
    return folder


def write_config(folder, configuration):
    (folder / "config" / "config.yaml").write_text(yaml.safe_dump(configuration))


def command(*arguments):
    # targets come first: --resources takes all the words that follow it
    return [str(Path(sys.executable).parent / "snakemake"), *arguments, "--cores", "2", "--resources", "gpu=2"]


def environment(**variables):
    """All that Snakemake says is wanted here; what it says to a person is the subject of test_terminal.py."""
    return {**os.environ, "PYTHONPATH": "", "PYTHONUNBUFFERED": "1", "DMIR_VERBOSE": "1", **variables}


def snakemake(folder, *arguments, succeeds=True, **variables):
    result = subprocess.run(
        command(*arguments), cwd=folder, capture_output=True, text=True, env=environment(**variables), timeout=1200
    )
    text = result.stdout + result.stderr
    assert (result.returncode == 0) == succeeds, text[-6000:]
    return text


def hear_ctrl_c():
    signal.signal(signal.SIGINT, signal.SIG_DFL)  # a shell's background jobs inherit that it is ignored


def start(folder, log, *arguments, **variables):
    """Start a run in a process group of its own, as a terminal does."""
    return start_in_session(command(*arguments), folder, log, environment(**variables))


def start_in_session(words, folder, log, variables):
    with log.open("wb") as file:
        return subprocess.Popen(
            words,
            cwd=folder,
            stdout=file,
            stderr=file,
            env=variables,
            start_new_session=True,
            preexec_fn=hear_ctrl_c,
        )


def wait_for(condition, process, log, seconds=400):
    end = time.monotonic() + seconds
    while not condition():
        assert process.poll() is None, f"ended too early:\n{log.read_text()[-6000:]}"
        assert time.monotonic() < end, f"waited in vain:\n{log.read_text()[-6000:]}"
        time.sleep(0.2)


def jobs(text):
    """Return rule -> how often, from what a dry run prints."""
    return {m[1]: int(m[2]) for m in re.finditer(r"^(\w+) +(\d+)$", text, re.MULTILINE) if m[1] != "total"}


def lease_of(log):
    """Return the cards that a job leased, and from when to when it was at work on them, from its log."""
    text = log.read_text()
    leased = re.search(r"^(\S+ \S+) GPU (.+) leased by process \d+ after", text, re.MULTILINE)
    assert leased is not None, text
    times = [pd.Timestamp(m.replace(",", ".")) for m in re.findall(r"^\d{4}-\S+ \d{2}:\S+", text, re.MULTILINE)]
    return set(leased[2].split(", ")), pd.Timestamp(leased[1].replace(",", ".")), times[-1]


def final_tables(folder):
    """Return name -> the bytes of every final table, but for the seconds and the memory that a run took."""
    return {name: _without_what_was_measured(folder / path) for name, path in zip(TABLES, TARGETS, strict=True)}


def _without_what_was_measured(path):
    table = pd.read_csv(path, dtype=str, keep_default_na=False)
    return table.drop(columns=[name for name in MEASURED if name in table.columns]).to_csv(index=False).encode()


STAGES = ("cohorts", "preprocessed", "models", "registered", "scores", "tables")


def copy_without(finished, folder, *patterns):
    """Copy a finished run with its times and Snakemake's records, without some of its results."""
    subprocess.run(["cp", "-a", f"{finished}/.", str(folder)], check=True)
    remove(folder, *patterns)
    return folder


def copy_up_to(stage, finished, folder):
    """Copy a finished run as it was before a stage, with all that Snakemake remembers of the stages before it."""
    return copy_without(finished, folder, *STAGES[STAGES.index(stage) :])


def remove(folder, *patterns):
    """Remove some of a run's results."""
    for pattern in patterns:
        for path in folder.glob(f"results/{pattern}"):
            shutil.rmtree(path) if path.is_dir() else path.unlink()


def processes_in(folder):
    """Return process -> command line of every process that works in a folder."""
    found = {}
    for entry in Path("/proc").iterdir():
        if entry.name.isdigit():
            try:
                if (entry / "cwd").readlink() == folder:
                    found[int(entry.name)] = (entry / "cmdline").read_bytes().replace(b"\0", b" ").decode()
            except OSError:  # it has ended, or has become a zombie
                continue
    return found
