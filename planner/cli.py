"""The `planner` command."""

from __future__ import annotations

import planner.start  # noqa: F401 -- before all that takes longer without it
from planner import commands, commands_pictures  # noqa: F401 -- importing them registers them
from planner.command import app


def main() -> None:
    """Runs the command line and exits: 0 done, 1 a measured process crashed, 2 the request is wrong,
    3 nothing fits, 130 interrupted."""
    app(prog_name="planner")
