"""All that the rules ask for, in one object."""

from __future__ import annotations

from dmir.workflow.code import Code
from dmir.workflow.products import Products
from dmir.workflow.resources import Resources


class Run(Products, Resources, Code):
    """One configuration's workflow: its inputs, parameters, resources and code are methods of a job's wildcards."""
