"""The `planner` command."""

from __future__ import annotations

import os

from planner import commands, commands_pictures  # noqa: F401 -- importing them registers them
from planner.command import app


def main() -> None:
    """Runs the command line and exits: 0 done, 1 a measured process crashed or its results could
    not be kept, 2 the request is wrong, 3 nothing fits, 130 interrupted."""
    _open_streams()
    app(prog_name="planner")


def _open_streams() -> None:
    """A standard stream that is closed leads nowhere from here on: else the next file that is opened, a study
    say, has its number, and gets what is printed."""
    while (file := os.open(os.devnull, os.O_RDWR)) < 3:
        os.set_inheritable(file, True)
    os.close(file)
