"""The `planner` command."""

from __future__ import annotations

import os

# Plugins of pydantic are looked for in every installed package; no command has a use for them.
os.environ.setdefault("PYDANTIC_DISABLE_PLUGINS", "__all__")

from planner import commands, commands_pictures  # noqa: F401 -- importing them registers them
from planner.command import app


def main() -> None:
    """Runs the command line and exits: 0 done, 1 a measured process crashed, 2 the request is wrong,
    3 nothing fits, 130 interrupted."""
    app(prog_name="planner")
