"""The configuration: its models, its checks, and the schema and table of keys that are generated from them.

Lists say *what runs*, dictionaries only hold parameters: ``methods`` names the rows of the tables, ``settings`` holds
the parameters of each name. Every misspelt key is refused with a suggestion. Nothing here imports torch or an imaging
library, so that a workflow is parsed in a fraction of a second.
"""

from __future__ import annotations

from dmir.config.base import ConfigError
from dmir.config.models import Config, Network, Refinement
from dmir.config.reading import parse_config, read_config

__all__ = [
    "Config",
    "ConfigError",
    "Network",
    "Refinement",
    "parse_config",
    "read_config",
]
