"""Files that commands write beside what they print."""

from __future__ import annotations

import contextlib
import errno
import os
import stat
from pathlib import Path

from attention.errors import AttentionPlannerError

_LINKS = 40
"""Links that are followed, as the system does."""


def write_whole(path: Path, data: bytes, what: str) -> None:
    """The file appears whole or not at all, and until then keeps what it had; `what`: the option that named
    it, for the AttentionPlannerError.

    A link stays and its target is written. A file that is there keeps its mode. What is no file (a device, a
    pipe, this process's /dev/stdout) is written into.
    """
    try:
        _write(path, data)
    except OSError as error:
        raise AttentionPlannerError(f"{what} {path} cannot be written: {_why(error)}") from None
    except ValueError as error:  # a name that no file can have
        raise AttentionPlannerError(f"{what} {str(path)!r} cannot be written: {error}") from None


def _why(error: OSError) -> str:
    if error.errno == errno.ENXIO:
        return "nobody reads from it"
    return error.strerror or str(error)


def _write(path: Path, data: bytes) -> None:
    own = _descriptor(path)
    if own is not None:
        # Opened by its name, a file that stdout goes to would be written from its beginning.
        _into(os.dup(own), data)
        return
    try:
        mode = path.stat().st_mode
    except FileNotFoundError:
        mode = None
    if mode is not None and not stat.S_ISREG(mode):
        # Without a reader a pipe would keep us waiting.
        file = os.open(path, os.O_WRONLY | os.O_NONBLOCK | os.O_CLOEXEC)
        os.set_blocking(file, True)
        _into(file, data)
        return
    target = Path(os.path.realpath(path))
    if mode is not None and not os.access(target, os.W_OK):
        raise PermissionError(errno.EACCES, os.strerror(errno.EACCES))
    _replace(target, data, mode)


def _descriptor(path: Path) -> int | None:
    """The number of the open file of this process that /dev/stdout, /dev/fd/3 and the like stand for."""
    for _ in range(_LINKS):
        folder = os.path.realpath(path.parent)
        if folder == f"/proc/{os.getpid()}/fd" and path.name.isdecimal():
            return int(path.name)
        if not path.is_symlink():
            break
        path = Path(folder, os.readlink(path))
    return None


def _into(file: int, data: bytes) -> None:
    """All of it into an open file, which is closed."""
    with open(file, "wb") as stream:
        stream.write(data)


def _replace(target: Path, data: bytes, mode: int | None) -> None:
    fresh, file = _fresh(target.parent)
    try:
        if mode is not None:
            os.fchmod(file, stat.S_IMODE(mode))
        with open(file, "wb") as stream:
            stream.write(data)
            stream.flush()
            os.fsync(file)
        fresh.replace(target)
    except BaseException:
        with contextlib.suppress(OSError):
            fresh.unlink()
        raise


def _fresh(folder: Path) -> tuple[Path, int]:
    """A new file in the folder, open."""
    while True:
        path = folder / f".{os.urandom(8).hex()}.new"
        with contextlib.suppress(FileExistsError):
            return path, os.open(path, os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_CLOEXEC, 0o666)
