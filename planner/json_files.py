"""JSON files that a user names, read for every command alike. Imports no torch."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from pydantic_core import from_json

from attention.errors import ConfigError


def read_json(path: Path, named: str = "") -> Any:
    """What a file holds; ConfigError where it cannot be read or is no JSON. `named`: the option it was given
    to, for the message."""
    try:
        text = path.read_bytes()
    except OSError as error:
        raise ConfigError(f"{named}{path} cannot be read: {error.strerror}") from None
    try:
        return from_json(text)
    except ValueError as error:
        raise ConfigError(f"{named}{path} is no JSON: {error}") from None
