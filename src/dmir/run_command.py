"""``dmir run`` and ``dmir init``: the workflow from wherever dmir is installed, and a folder to run it in."""

from __future__ import annotations

import contextlib
import hashlib
import os
import re
import shlex
import shutil
import sys
import tempfile
from collections.abc import Sequence
from pathlib import Path

from dmir.errors import InputError, suggestion

# Snakemake's own words for how much runs at once; without any of them all cores of this machine are used
CORES = re.compile(r"--cores(=.*)?|-c\d*|--jobs(=.*)?|-j\d*")
PROFILE = "--workflow-profile"
README = """# A registration study

1. Put your scans into `scans/` and write a row for each into `scans/scans.csv`.
2. `dmir check config.yaml` tells what is wrong before anything runs, `dmir plan config.yaml` what it will cost.
3. `dmir run config.yaml` runs it; the report is `results/report.html`. The same command goes on after a stop.

On a cluster fill in `profiles/slurm/profile.yaml` and add `--workflow-profile profiles/slurm` to the last command.
Words after the configuration go to Snakemake: `dmir run config.yaml -n` tells what would run and why.
"""


def workflow_folder() -> Path:
    """Return the folder of the ``Snakefile``: inside the installed package, or the checkout."""
    packaged = Path(__file__).parent / "pipeline"
    folder = packaged if packaged.is_dir() else Path(__file__).parents[2]
    if not (folder / "Snakefile").is_file():
        raise InputError(folder, found="no Snakefile", expected="the workflow", remedy="Install dmir anew.")
    return folder


def run(config: Path, arguments: Sequence[str]) -> None:
    """Become Snakemake, on a configuration.

    Parameters
    ----------
    config
        The configuration.
    arguments
        For Snakemake: targets, and options. ``--workflow-profile`` may name a profile of the workflow's own.

    Raises
    ------
    InputError
        There is no such configuration or profile, or the configuration is one that Snakemake would run as a program.
    """
    from dmir.config.reading import read_yaml

    words = command(config, arguments)
    read_yaml(config)
    os.environ.setdefault("DMIR_COMMAND", shlex.join(["dmir", "run", str(config), *arguments]))
    sys.stdout.flush()
    os.execv(words[0], words)  # one process, so that Ctrl-C and signals reach it as they would without dmir


def command(config: Path, arguments: Sequence[str]) -> list[str]:
    """Return Snakemake's command line for :func:`run`."""
    if not config.is_file():
        raise InputError(
            config,
            found="a folder" if config.is_dir() else "no such file",
            expected="a configuration",
            remedy="`dmir init FOLDER` lays out a project with one.",
        )
    folder = workflow_folder()
    given = list(arguments)
    if PROFILE in given[:-1]:
        place = given.index(PROFILE) + 1
        given[place] = str(_profile(folder, given[place]))
    elif not any(word.startswith(f"{PROFILE}=") for word in given):
        own = Path("profiles", "default")
        given += [PROFILE, str(own if own.is_dir() else folder / "profiles" / "default")]
    if not any(CORES.fullmatch(word) for word in arguments) and PROFILE not in arguments:
        given += ["--cores", "all"]
    # targets first: Snakemake takes every word after --configfile for one more configuration
    snakemake = [plain_python(), "-P", "-m", "snakemake"]
    return [*snakemake, *given, "--snakefile", str(folder / "Snakefile"), "--configfile", str(config)]


def plain_python() -> str:
    """Return the path of this Python, by a link where it has a blank: Snakemake starts scripts without quoting it."""
    if shlex.quote(sys.executable) == sys.executable:
        return sys.executable
    python = Path(sys.executable)
    cache = Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache", "dmir")
    if shlex.quote(str(cache)) != str(cache):
        cache = Path(tempfile.mkdtemp(prefix="dmir-"))
    cache.mkdir(parents=True, exist_ok=True)
    environment = python.parents[1]
    link = cache / f"environment-{hashlib.sha256(os.fsencode(environment)).hexdigest()[:12]}"
    with contextlib.suppress(FileExistsError):
        link.symlink_to(environment)
    return str(link / "bin" / python.name)


def _profile(folder: Path, name: str) -> Path:
    """Return the folder of a profile: the one that is named, or the workflow's own of that name."""
    own = folder / "profiles" / name.removeprefix("profiles/")
    if name == "none" or Path(name).is_dir():
        return Path(name)
    if not own.is_dir():
        known = sorted(path.name for path in (folder / "profiles").iterdir() if path.is_dir())
        raise InputError(PROFILE, found=f"'{name}'", expected="a profile", remedy=suggestion(name, known))
    return own


def init(folder: Path) -> list[Path]:
    """Lay out a project: a configuration to fill in, a table of scans, profiles, what to do next.

    Parameters
    ----------
    folder
        To be made; one that is there must be empty.

    Returns
    -------
    list of Path
        The files.

    Raises
    ------
    InputError
        The folder is a file, or not empty.
    """
    if folder.exists() and (not folder.is_dir() or any(folder.iterdir())):
        raise InputError(
            folder,
            found="a folder that is not empty" if folder.is_dir() else "a file",
            expected="a new folder",
            remedy="Name another one: nothing is overwritten.",
        )
    workflow = workflow_folder()
    examples = workflow / "config" / "examples"
    lines = (examples / "own-data.yaml").read_text(encoding="utf-8").splitlines(keepends=True)
    lines = lines[next(i for i, line in enumerate(lines) if not line.startswith("#")) :]  # how to copy it
    text = "# Every key: `dmir docs --folder .` writes them down.\n" + "".join(lines)
    text = text.replace("results: results/mine", "results: results").replace("root: my-scans", "root: scans")
    (folder / "scans").mkdir(parents=True, exist_ok=True)
    (folder / "config.yaml").write_text(
        "# Every key: `dmir docs --folder .` writes them down.\n" + text, encoding="utf-8"
    )
    shutil.copy(examples / "scans.csv", folder / "scans" / "scans.csv")
    shutil.copytree(workflow / "profiles" / "slurm", folder / "profiles" / "slurm")
    (folder / "README.md").write_text(README, encoding="utf-8")
    return sorted(path for path in folder.rglob("*") if path.is_file())
