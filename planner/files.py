"""Files that a user names: read whole and once, written whole or not at all, added to. Imports no torch."""

from __future__ import annotations

import contextlib
import errno
import os
import select
import stat
import sys
from collections.abc import Iterator
from contextvars import ContextVar
from pathlib import Path
from typing import Any, Final

from pydantic_core import from_json

from attention.errors import AttentionPlannerError, ConfigError

MOST_BYTES: Final = 1 << 25
"""Most bytes of a file; the answers of tuning take some kilobytes a trial."""
PATIENCE: Final = 2.0
"""Seconds until it is said that a pipe is waited for."""

_LINKS: Final = 40
"""Links that are followed, as the system does."""

_contents: ContextVar[dict[tuple[int, int], bytes] | None] = ContextVar("contents", default=None)


@contextlib.contextmanager
def reading_once() -> Iterator[None]:
    """Within it every file is read once, however often it is named: a pipe gives what it has only once."""
    token = _contents.set({})
    try:
        yield
    finally:
        _contents.reset(token)


def cache_folder() -> Path:
    """Where what can be made again is kept: `$XDG_CACHE_HOME/attention-planner`, by default in ~/.cache."""
    given = os.environ.get("XDG_CACHE_HOME", "")
    # As the XDG specification has it, a relative path is as none.
    base = Path(given) if given.startswith("/") else Path.home() / ".cache"
    return base / "attention-planner"


def read_json(path: Path, named: str = "") -> Any:
    """The JSON data of a file; ConfigError where it cannot be read or is no JSON. `named`: the option that
    named the file, for the message."""
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
        contents, key = _contents.get(), (about.st_dev, about.st_ino)
        if contents is not None and key in contents:
            return contents[key]
        data = _all(file, about, f"{named}{path}")
    except OSError as error:
        raise ConfigError(f"{named}{path} cannot be read: {_why(error)}") from None
    finally:
        os.close(file)
    if contents is not None:
        contents[key] = data
    return data


def _why(error: OSError | ValueError) -> str:
    return (isinstance(error, OSError) and error.strerror) or str(error)


def _all(file: int, about: os.stat_result, name: str) -> bytes:
    plain = stat.S_ISREG(about.st_mode)
    os.set_blocking(file, True)
    data = bytearray()
    while len(data) <= MOST_BYTES and about.st_size <= MOST_BYTES:
        if not plain and not data:
            _say_if_waiting(file, name)
        part = os.read(file, 1 << 20)
        if not part:
            break
        data += part
    else:
        raise ConfigError(f"{name} has more than {MOST_BYTES:,} bytes, which no config and no answer takes")
    if not data and stat.S_ISFIFO(about.st_mode):
        raise ConfigError(f"{name} is a pipe that nobody has written into; start what writes first")
    return bytes(data)


def _say_if_waiting(file: int, name: str) -> None:
    poll = select.poll()
    poll.register(file, select.POLLIN)
    if not poll.poll(PATIENCE * 1000):
        print(f"planner: waiting for what is written into {name}", file=sys.stderr, flush=True)


def make_folder(path: Path, what: str) -> None:
    """Makes the folder that a file is to be in; AttentionPlannerError saying what cannot be kept there."""
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise AttentionPlannerError(
            f"{what} cannot be kept: {path.parent} cannot be made ({error.strerror}); name another file"
        ) from error


def write_whole(path: Path, data: bytes, what: str) -> None:
    """The file appears whole or not at all, and until then keeps what it had; `what`: the option that named
    it, for the AttentionPlannerError.

    A link stays and its target is written. A file that is there keeps its mode. What is no file (a device, a
    pipe, this process's /dev/stdout) is written into.
    """
    try:
        _write(path, data)
    except OSError as error:
        raise AttentionPlannerError(f"{what} {path} cannot be written: {_why_unwritten(error)}") from None
    except ValueError as error:  # a name that no file can have
        raise AttentionPlannerError(f"{what} {str(path)!r} cannot be written: {error}") from None


def _why_unwritten(error: OSError) -> str:
    return "nobody reads from it" if error.errno == errno.ENXIO else _why(error)


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
