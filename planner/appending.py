"""Adding to files of lines, so that a crash or a full disk costs what was being added and nothing else."""

from __future__ import annotations

import contextlib
import os


def append_whole(file: int, data: bytes) -> None:
    """Adds all of `data` at the end of an open file and returns when it is on disk; if that fails, with an
    OSError, the file is as it was. The caller holds the file's lock."""
    size = os.fstat(file).st_size
    left = data
    try:
        while left:  # one write, unless the system takes less
            left = left[os.write(file, left) :]
        os.fsync(file)
    except OSError:
        with contextlib.suppress(OSError):
            os.ftruncate(file, size)
        raise


def is_torn(file: int) -> bool:
    """Whether the last line has no end. The file is open for reading."""
    size = os.fstat(file).st_size
    return size > 0 and os.pread(file, 1, size - 1) != b"\n"
