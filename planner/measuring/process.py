"""The process that measures, seen from outside: how it is started, waited for and read. Imports no torch; the
process does.

It gets tasks on stdin and answers, a JSON object a line, in a file of its own; what it or a library prints
goes elsewhere and is kept for diagnosis only. So whatever happens to it, out of memory, a crash or a hang,
is an `Ended` and leaves the caller as it was.
"""

from __future__ import annotations

import fcntl
import json
import os
import signal
import subprocess
import sys
import tempfile
from collections.abc import Mapping
from pathlib import Path
from typing import IO, Any, Literal, NamedTuple

TAIL = 4000
"""Characters of the process's output that are looked at when it failed."""


class Ended(NamedTuple):
    """How a process, or one task of it, ended."""

    code: int
    timed_out: bool
    answer: dict[str, Any]
    """The lines of its answer, later over earlier."""
    tail: str
    """The end of what it printed."""


def command(entry: Literal["main", "serve"], answer: int) -> list[str]:
    """The command that starts an entry of `planner.measuring.child`, which answers to the file descriptor
    `answer`. The process finds this very checkout, whatever its working directory holds."""
    start = (
        "import sys; root, answer = sys.argv[1:]; root in sys.path or sys.path.insert(0, root); "
        f"from planner.measuring.child import {entry}; {entry}(int(answer))"
    )
    return [sys.executable, "-P", "-c", start, str(Path(__file__).resolve().parents[2]), str(answer)]


def run(task: str, timeout: float, variables: Mapping[str, str] | None = None) -> Ended:
    """Does one task in a session of its own, which is killed whole if it takes too long or if anything
    (Ctrl-C) ends the wait. `variables`: its environment, None for that of this process."""
    with tempfile.TemporaryFile() as answer, tempfile.TemporaryFile() as log:
        handed = above_standard(answer.fileno())
        try:
            process = subprocess.Popen(
                command("main", handed),
                stdin=subprocess.PIPE,
                stdout=log,
                stderr=log,
                pass_fds=(handed,),
                env=variables,
                start_new_session=True,
            )
        finally:
            os.close(handed)
        timed_out = False
        try:
            process.communicate(task.encode(), timeout)
        except subprocess.TimeoutExpired:
            timed_out = True
        finally:
            if process.poll() is None:
                os.killpg(process.pid, signal.SIGKILL)
                process.wait()
            if process.stdin:
                process.stdin.close()
        return Ended(process.returncode, timed_out, _lines(answer), tail(log))


def above_standard(file: int) -> int:
    """Another descriptor of an open file, above those of the standard streams: where one of these is closed,
    what is opened gets its number, and a child has that number for the stream."""
    return fcntl.fcntl(file, fcntl.F_DUPFD_CLOEXEC, 3)


def tail(log: IO[bytes]) -> str:
    """The end of what a process printed."""
    log.seek(max(log.seek(0, os.SEEK_END) - TAIL, 0))
    return log.read().decode(errors="replace").strip()


def _lines(answer: IO[bytes]) -> dict[str, Any]:
    """All whole lines of an answer as one object; a process that is killed may leave half a line."""
    answer.seek(0)
    merged: dict[str, Any] = {}
    for line in answer.read().splitlines():
        try:
            merged |= json.loads(line)
        except ValueError:
            break
    return merged
