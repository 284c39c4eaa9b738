"""One call of Snakemake: what is done before its first job and after its last, beside the jobs themselves."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
from pathlib import Path

import yaml

from dmir.errors import InputError
from dmir.volumes import atomic_path
from dmir.workflow.run import Run

AGAIN = "DMIR_AGAIN"  # set where a finished run calls Snakemake once more
IMAGE = "envs/dmir.sif"


def revision(folder: str | Path) -> str:
    """Return what git says of a checkout; nothing without git, or where it is no clone."""
    git = shutil.which("git")
    if git is None:
        return ""
    describe = [git, "-C", str(folder), "describe", "--always", "--dirty"]
    return subprocess.run(describe, capture_output=True, text=True).stdout.strip()


def require_image() -> None:
    """Refuse to begin where jobs are to run in an image that is not there; Apptainer would say so of every job."""
    if not Path(IMAGE).is_file():
        raise InputError(
            IMAGE,
            found="no such file",
            expected="the image that --sdm apptainer runs the jobs in",
            remedy=f"Make it: `apptainer build {IMAGE} envs/dmir.def`.",
        )


def keep_configuration(run: Run) -> None:
    """Write the configuration beside the results before the first job: `dmir check` compares results with it."""
    kept = Path(run.paths.configuration())
    kept.parent.mkdir(parents=True, exist_ok=True)
    with atomic_path(kept) as path:
        path.write_text(yaml.safe_dump(run.configuration.model_dump(mode="json"), sort_keys=False))


def show_studies(run: Run, snakefile: str) -> None:
    """Make the report anew where a study has been finished since: it shows those that are there and asks for none."""
    page = Path(run.paths.report())
    if page.exists():
        made = page.stat().st_mtime
        tables = [Path(run.paths.table(f"{study}.html")) for study in run.finished_studies()]
        if any(table.stat().st_mtime > made for table in tables):
            _snakemake(run, snakefile, "--cores", "1", "--allowed-rules", "report_page", "--", str(page))


def write_snakemake_report(run: Run, snakefile: str) -> None:
    """Make Snakemake's own report after a run, once everything that it shows is there.

    It needs the records of finished jobs, so that no rule can make it.
    """
    if all(Path(path).exists() for path in run.report_files()):
        report = run.paths.snakemake_report()
        _snakemake(run, snakefile, "--report", report, "--", "all", *run.finished_studies())


def _snakemake(run: Run, snakefile: str, *arguments: str) -> None:
    """Run Snakemake on this workflow once more, on the configuration as it was used and without its lock."""
    common = ["--snakefile", snakefile, "--nolock", "--quiet", "all"]
    settings = ["--workflow-profile", "none", "--configfile", run.paths.configuration()]
    subprocess.run(
        [sys.executable, "-m", "snakemake", *common, *settings, *arguments],
        env={**os.environ, AGAIN: "yes"},
        check=True,
    )
