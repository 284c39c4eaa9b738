"""What several files of tests share."""

import pytest
from workflow_runs import SMALL, TARGETS, checkout, snakemake


@pytest.fixture(scope="session")
def undisturbed(tmp_path_factory):
    """A finished run of the small configuration to which nothing happened: copy it, do not change it."""
    folder = checkout(tmp_path_factory.mktemp("undisturbed"), SMALL)
    snakemake(folder, *TARGETS)
    return folder
