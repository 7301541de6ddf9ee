"""Measurements kept as lines of JSON, and looked up instead of measured again.

A file of records is only ever appended to, by any number of processes at once, and what a crash or a
full disk leaves of a line costs that line alone.
"""

from __future__ import annotations

import contextlib
import fcntl
import os
import warnings
from collections.abc import Iterable, Iterator
from pathlib import Path

from attention.config import AttentionConfig
from attention.errors import AttentionPlannerError, ConfigError, StorageError
from planner.files import append_whole, is_torn
from planner.measuring.measure import Device, Measurement
from planner.workload import Workload


class RecordWarning(UserWarning):
    """A line of a file of records is no measurement and was left out."""


def append(path: str | Path, measurement: Measurement) -> None:
    """Adds one record and returns when it is on disk; StorageError if it could not be written, another
    AttentionPlannerError if the file cannot be opened.

    A record that was not kept leaves the file as it was.
    """
    line = measurement.to_json().encode() + b"\n"
    try:
        # Read and write: whether the last line was torn has to be read.
        with _opened(path, os.O_RDWR | os.O_APPEND | os.O_CREAT, fcntl.LOCK_EX) as file:
            try:
                append_whole(file, b"\n" + line if is_torn(file) else line)
            except OSError as error:
                raise StorageError(_not_kept(path, error)) from error
    except OSError as error:
        raise AttentionPlannerError(_not_kept(path, error)) from error


def _not_kept(path: str | Path, error: OSError) -> str:
    return (
        f"the record was not kept: writing {path} failed ({error.strerror}); make room or choose another "
        "file, and measure again"
    )


def read(path: str | Path) -> list[Measurement]:
    """All records of a file, oldest first. A line that is none is left out with a RecordWarning."""
    try:
        with _opened(path, os.O_RDONLY, fcntl.LOCK_SH) as file, os.fdopen(os.dup(file), "rb") as stream:
            lines = stream.read().split(b"\n")
    except OSError as error:
        raise AttentionPlannerError(f"records cannot be read from {path}: {error.strerror}") from error
    measurements = []
    for number, line in enumerate(lines, 1):
        if not line.strip():
            continue
        try:
            measurements.append(Measurement.from_json(line))
        except ConfigError as error:
            warnings.warn(
                f"{path}, line {number} is no measurement and is left out: {str(error)[:200]}",
                RecordWarning,
                stacklevel=2,
            )
    return measurements


class RecordedRuns:
    """The newest measurement of each config, workload, device and cap, by date, then by order."""

    def __init__(self, measurements: Iterable[Measurement]) -> None:
        ordered = sorted(measurements, key=lambda m: m.environment.date)
        self._newest = {(m.config, m.workload, m.device, m.cap_bytes): m for m in ordered}

    def get(
        self,
        config: AttentionConfig,
        workload: Workload,
        device: Device = "cpu",
        *,
        cap_bytes: int | None = None,
    ) -> Measurement | None:
        """The newest measurement of this; None if there is none."""
        return self._newest.get((config, workload, device, cap_bytes))

    def __len__(self) -> int:
        return len(self._newest)

    def __iter__(self) -> Iterator[Measurement]:
        return iter(self._newest.values())


def replay(path: str | Path) -> RecordedRuns:
    """The records of a file, for looking up."""
    return RecordedRuns(read(path))


@contextlib.contextmanager
def _opened(path: str | Path, flags: int, lock: int) -> Iterator[int]:
    """A file descriptor with a lock on the file, both let go at the end."""
    file = os.open(path, flags | os.O_CLOEXEC, 0o644)
    try:
        fcntl.flock(file, lock)
        yield file
    finally:
        os.close(file)
