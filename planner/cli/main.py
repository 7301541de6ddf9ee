"""The `planner` command."""

from __future__ import annotations

import contextlib
import errno
import os
import sys
import warnings
from collections.abc import Iterator
from typing import Any

import planner.cli.start  # noqa: F401 -- before all that takes longer without it
from planner.cli import choose, predict, programs, run, show  # noqa: F401 -- importing them registers them
from planner.cli.app import CRASHED, app
from planner.cli.options import say


def main() -> None:
    """Runs the command line and exits: 0 done, 1 a measured process crashed, or its results or standard
    output could not be written, 2 the request is wrong, 3 nothing fits, 130 interrupted."""
    _open_streams()
    usual = warnings.formatwarning

    def plainly(message: Warning | str, category: type[Warning], *where: Any, **line: Any) -> str:
        """This project's own, which are for who uses it, as a line like all others on stderr."""
        if category.__module__.partition(".")[0] in ("planner", "attention"):
            return f"planner: {message}\n"
        return usual(message, category, *where, **line)

    warnings.formatwarning = plainly
    stdout = sys.stdout
    if stdout is not None:
        sys.stdout = _Stdout(stdout)
    try:
        app(prog_name="planner")
    except _StdoutError as error:
        say(f"error: standard output cannot be written: {error}")
        sys.exit(CRASHED)
    finally:
        sys.stdout = stdout
        _give_up(sys.stdout)
        _give_up(sys.stderr)


class _StdoutError(Exception):
    """Standard output cannot be written; a closed pipe is no such error: its reader has had enough."""


class _Stdout:
    """A stream whose failures are told from those of files."""

    def __init__(self, stream: Any) -> None:
        self._stream = stream

    def __getattr__(self, name: str) -> Any:
        return getattr(self._stream, name)

    def write(self, text: str) -> int:
        with self._failures_apart():
            return int(self._stream.write(text))

    def flush(self) -> None:
        with self._failures_apart():
            self._stream.flush()

    @staticmethod
    @contextlib.contextmanager
    def _failures_apart() -> Iterator[None]:
        try:
            yield
        except OSError as error:
            if error.errno == errno.EPIPE:
                raise
            raise _StdoutError(error.strerror) from None


def _give_up(stream: Any) -> None:
    """Sends to nowhere what is not written yet and cannot be: Python would try again at its end."""
    try:
        if stream is not None:
            stream.flush()
    except OSError:
        null = os.open(os.devnull, os.O_WRONLY)
        os.dup2(null, stream.fileno())
        os.close(null)


def _open_streams() -> None:
    """A standard stream that is closed leads nowhere from here on: else the next file that is opened, a study
    say, has its number, and gets what is printed."""
    while (file := os.open(os.devnull, os.O_RDWR)) < 3:
        os.set_inheritable(file, True)
    os.close(file)
