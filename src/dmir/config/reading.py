"""Reading a configuration: from YAML to checked models, every mistake told at once."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import yaml
from pydantic import ValidationError

from dmir.config.base import ConfigError, mistakes
from dmir.config.models import Config
from dmir.errors import InputError


def parse_config(values: dict[str, Any], source: str = "configuration") -> Config:
    """Check a dictionary and return the configuration; ConfigError lists every mistake with its key."""
    try:
        return Config.model_validate(values)
    except ValidationError as error:
        raise ConfigError(source, mistakes(error)) from None


def read_config(path: str | Path) -> Config:
    """Read and check a YAML file."""
    path = Path(path)
    if not path.is_file():
        raise InputError(path, found="no such file", expected="a configuration in YAML", remedy="Check the path.")
    try:
        values = yaml.safe_load(path.read_text())
    except (yaml.YAMLError, UnicodeDecodeError) as error:
        raise InputError(path, found=f"text that is no YAML ({error})", expected="a configuration in YAML") from None
    if not isinstance(values, dict):
        raise InputError(path, found=type(values).__name__, expected="a dictionary of keys")
    return parse_config(values, str(path))
