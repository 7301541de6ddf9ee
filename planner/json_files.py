"""Files that a user names, read for every command alike. Imports no torch."""

from __future__ import annotations

import contextlib
import os
import select
import stat
import sys
from collections.abc import Iterator
from contextvars import ContextVar
from pathlib import Path
from typing import Any, Final

from pydantic_core import from_json

from attention.errors import ConfigError

MOST_BYTES: Final = 1 << 25
"""Of a file; the answers of tuning take some kilobytes a trial."""
PATIENCE: Final = 2.0
"""Seconds until it is said that a pipe is waited for."""

_kept: ContextVar[dict[tuple[int, int], bytes] | None] = ContextVar("kept", default=None)


@contextlib.contextmanager
def reading_once() -> Iterator[None]:
    """Within it every file is read once, however often it is named: a pipe gives what it has only once."""
    token = _kept.set({})
    try:
        yield
    finally:
        _kept.reset(token)


def read_json(path: Path, named: str = "") -> Any:
    """What a file holds; ConfigError where it cannot be read or is no JSON. `named`: the option it was given
    to, for the message."""
    data = read_bytes(path, named)
    try:
        return from_json(data)
    except ValueError as error:
        raise ConfigError(f"{named}{path} is no JSON: {error}") from None


def read_bytes(path: Path, named: str = "") -> bytes:
    """The bytes of a file, or all that a pipe gives; ConfigError where it cannot be read, where it has more
    than MOST_BYTES, and for a pipe that nobody writes into."""
    try:
        # Opening a pipe waits for a writer, who may never come.
        file = os.open(path, os.O_RDONLY | os.O_NONBLOCK | os.O_CLOEXEC)
    except (OSError, ValueError) as error:
        raise ConfigError(f"{named}{path} cannot be read: {_why(error)}") from None
    try:
        about = os.fstat(file)
        kept, key = _kept.get(), (about.st_dev, about.st_ino)
        if kept is not None and key in kept:
            return kept[key]
        data = _all(file, about, f"{named}{path}")
    except OSError as error:
        raise ConfigError(f"{named}{path} cannot be read: {_why(error)}") from None
    finally:
        os.close(file)
    if kept is not None:
        kept[key] = data
    return data


def _why(error: OSError | ValueError) -> str:
    return (isinstance(error, OSError) and error.strerror) or str(error)


def _all(file: int, about: os.stat_result, name: str) -> bytes:
    plain = stat.S_ISREG(about.st_mode)
    os.set_blocking(file, True)
    found = bytearray()
    while len(found) <= MOST_BYTES and about.st_size <= MOST_BYTES:
        if not plain and not found:
            _say_if_waiting(file, name)
        part = os.read(file, 1 << 20)
        if not part:
            break
        found += part
    else:
        raise ConfigError(f"{name} has more than {MOST_BYTES:,} bytes, which no config and no answer takes")
    if not found and stat.S_ISFIFO(about.st_mode):
        raise ConfigError(f"{name} is a pipe that nobody has written into; start what writes first")
    return bytes(found)


def _say_if_waiting(file: int, name: str) -> None:
    poll = select.poll()
    poll.register(file, select.POLLIN)
    if not poll.poll(PATIENCE * 1000):
        print(f"planner: waiting for what is written into {name}", file=sys.stderr, flush=True)
