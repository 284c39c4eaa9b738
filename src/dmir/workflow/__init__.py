"""What the rules ask for: a :class:`Run` knows the inputs, parameters, resources and code of every job.

Nothing here knows Snakemake. A job's wildcards are whatever has their names as attributes, so that all of it can be
asked for, and tested, by itself.
"""

from dmir.workflow.run import Run

__all__ = ["Run"]
