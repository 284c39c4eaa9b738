"""What several files of tests share."""

import os

import pytest
from workflow_runs import SMALL, TARGETS, checkout, snakemake

from dmir.job import THREAD_VARIABLES


@pytest.fixture(scope="session")
def undisturbed(tmp_path_factory):
    """A finished run of the small configuration to which nothing happened: copy it, do not change it."""
    folder = checkout(tmp_path_factory.mktemp("undisturbed"), SMALL)
    snakemake(folder, *TARGETS)
    return folder


@pytest.fixture(autouse=True)
def _threads_of_a_command_stay_its_own(monkeypatch):
    """A command sets the threads of its process; here it shares one with other tests, and ITK reads them once."""
    for variable in (*THREAD_VARIABLES, "OMP_WAIT_POLICY"):
        if variable in os.environ:
            monkeypatch.setenv(variable, os.environ[variable])  # as it is: to be put back
        else:
            monkeypatch.setenv(variable, "1")
            monkeypatch.delenv(variable)
