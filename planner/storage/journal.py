"""A study's journal file, in Optuna's format and under Optuna's lock. Imports Optuna, no torch.

Optuna's own backend adds to a torn line, reads nothing from there on, and waits for locks whose owners are
gone. This one sets a torn line aside before it adds another, reads around what is broken, and takes over what
the dead left; workers with Optuna's backend may use the same file at the same time.
"""

from __future__ import annotations

import contextlib
import errno
import fcntl
import json
import os
import stat
import time
import warnings
from collections import deque
from collections.abc import Callable, Iterable, Iterator, Sequence
from pathlib import Path
from typing import Any, Final

from optuna.storages.journal import BaseJournalBackend

from attention.errors import ConfigError, StorageError
from planner.files import append_whole, is_torn
from planner.storage.patience import Patience, StorageWarning

GRACE: Final = 30.0
"""Seconds after which Optuna takes a lock for left behind."""
LOOKED_AT: Final = 1 << 20
"""Bytes of a file by which it is told whether it is a journal."""

Log = dict[str, Any]

_NEEDED: Final[tuple[tuple[str, ...], ...]] = (
    ("study_name", "directions"),
    ("study_id",),
    ("study_id", "user_attr"),
    ("study_id", "system_attr"),
    ("study_id", "datetime_start"),
    ("trial_id", "param_name", "param_value_internal", "distribution"),
    ("trial_id", "state", "values"),
    ("trial_id", "step", "intermediate_value"),
    ("trial_id", "user_attr"),
    ("trial_id", "system_attr"),
    (),
)
"""Keys of an entry besides its operation and its worker, by the operation's number."""
_CREATE_STUDY, _CREATE_TRIAL = 0, 4
_BEGIN: Final = b'{"op_code":'
"""The beginning of every line that Optuna writes."""


class Journal(BaseJournalBackend):
    """One journal file; made, if it is not there. ConfigError if the file is something else.

    Not for several threads at once (`JournalStorage` sees to that); for several processes it is.
    """

    def __init__(self, path: str | Path, *, reads: bool = False) -> None:
        """`reads`: nothing will be added; a file that is not there is not made then."""
        # Absolute, so that whoever changes folders still finds the file and its lock.
        self.path = os.path.abspath(path)
        _refuse_others(self.path)
        if not reads:
            os.close(os.open(self.path, os.O_WRONLY | os.O_CREAT | os.O_CLOEXEC, 0o644))
        self._start_over()

    def _start_over(self) -> None:
        self._count = _Count()
        self._offset, self._lines = 0, 0
        """How far the file was read."""
        self._first = 0
        self._logs: deque[Log] = deque()
        """Entries that were read and may be asked for again; `_first` is the number of the first of them."""

    def read_logs(self, log_number_from: int) -> Iterator[Log]:
        """All entries from that number on. A line that is broken is left out with a StorageWarning; one that
        has no end yet may be just being written, and comes later."""
        if log_number_from < self._first:
            self._start_over()
        self._logs.extend(self._new())
        while self._logs and self._first < log_number_from:
            self._logs.popleft()
            self._first += 1
        return iter(list(self._logs))

    def _new(self) -> list[Log]:
        """Entries that were added since the last time."""
        file = os.open(self.path, os.O_RDONLY | os.O_CLOEXEC)
        with os.fdopen(file, "rb") as stream:
            # Whoever sets a torn line aside must not do so in the midst of this.
            self._flock(file, fcntl.LOCK_SH)
            stream.seek(self._offset)
            whole, end, _ = stream.read().rpartition(b"\n")
        if not end:
            return []
        lines = whole.split(b"\n")
        logs, broken = logs_of(lines, self._count)
        if broken:
            first = self._lines + broken[0] + 1
            many = f"line {first} is" if len(broken) == 1 else f"{len(broken)} lines from line {first} on are"
            warnings.warn(
                f"{self.path}: {many} broken; what can be read of the journal is used",
                StorageWarning,
                stacklevel=2,
            )
        self._offset += len(whole) + 1
        self._lines += len(lines)
        return logs

    def append_logs(self, logs: list[Log]) -> None:
        """Adds entries and returns when they are on disk; StorageError if they could not be kept."""
        data = b"".join(json.dumps(log, separators=(",", ":")).encode() + b"\n" for log in logs)
        try:
            with self._locked() as file:
                self._mend(file)
                append_whole(file, data)
        except OSError as error:
            raise StorageError(
                f"the study was not kept: writing {self.path} failed ({error.strerror}); what is there "
                "already is whole: make room, and the same command goes on"
            ) from error

    def _mend(self, file: int) -> None:
        """Ends the last line, if a crash left it without an end: it is only that which is missing, or what
        there is of it goes to a file beside the journal."""
        if not is_torn(file):
            return
        size = os.fstat(file).st_size
        begin, piece = size, b""
        while begin and b"\n" not in piece:
            begin = max(begin - (1 << 16), 0)
            piece = os.pread(file, size - begin, begin)
        piece = piece[piece.rfind(b"\n") + 1 :]
        if _entry(piece) is not None:
            append_whole(file, b"\n")
            return
        aside = f"{self.path}.torn"
        torn = os.open(aside, os.O_WRONLY | os.O_APPEND | os.O_CREAT | os.O_CLOEXEC, 0o644)
        try:
            append_whole(torn, piece + b"\n")
        finally:
            os.close(torn)
        os.ftruncate(file, size - len(piece))
        warnings.warn(
            f"{self.path} ended in the midst of a line, as a crash or a full disk leaves it; its "
            f"{len(piece)} bytes were set aside in {aside}",
            StorageWarning,
            stacklevel=2,
        )

    # Locks.

    @contextlib.contextmanager
    def _locked(self) -> Iterator[int]:
        """The journal, open and ours alone.

        Workers of this version exclude each other by a lock that the system drops when its owner dies, and
        hold Optuna's link too for those that know only that. So a link of ours that is found under the
        system's lock is of a dead worker.
        """
        file = os.open(self.path, os.O_RDWR | os.O_APPEND | os.O_CREAT | os.O_CLOEXEC, 0o644)
        try:
            alone = self._flock(file, fcntl.LOCK_EX)
            link = f"{self.path}.lock"
            self._link(link, alone)
            try:
                yield file
            finally:
                with contextlib.suppress(FileNotFoundError):
                    os.unlink(link)
        finally:
            os.close(file)

    def _flock(self, file: int, how: int) -> bool:
        """Whether the file system has such locks; returns when this one is had."""

        def had() -> bool:
            try:
                fcntl.flock(file, how | fcntl.LOCK_NB)
            except BlockingIOError:
                return False
            return True

        try:
            self._until(had, f"another worker that has {self.path} locked")
        except OSError as error:
            if error.errno in (errno.ENOLCK, errno.ENOSYS, errno.EOPNOTSUPP):
                return False
            raise
        return True

    def _link(self, link: str, alone: bool) -> None:
        """Makes Optuna's link, where there is none of a living worker. `alone`: no other worker of this
        version can have one."""
        folder, name = os.path.split(self.path)
        # It leads to the journal, as Optuna asks of it, by a way that only this version goes.
        mine = os.path.join(folder, os.curdir, name)
        watched: tuple[tuple[int, int], float] | None = None

        def had() -> bool:
            nonlocal watched
            with contextlib.suppress(FileExistsError):
                os.symlink(mine, link)
                return True
            try:
                there = os.lstat(link)
                of_ours = stat.S_ISLNK(there.st_mode) and os.readlink(link) == mine
            except FileNotFoundError:
                return False  # let go just now
            if not stat.S_ISLNK(there.st_mode) and there.st_size:
                return False  # whatever it is, it is no lock, and somebody's
            which = (there.st_ino, there.st_mtime_ns)
            if watched is None or watched[0] != which:
                watched = which, time.monotonic()
            old = max(time.time() - there.st_mtime, time.monotonic() - watched[1]) > GRACE
            if old or (alone and of_ours):
                with contextlib.suppress(FileNotFoundError):
                    os.unlink(link)
            return False

        self._until(had, f"{link}, which a worker holds or left when it was killed")

    def _until(self, had: Callable[[], bool], what: str) -> None:
        patience = Patience(what, "see which worker still runs, and begin again")
        while not had():
            patience.wait()


# Lines.


class _Count:
    """How many studies and trials there are by the entries so far; their ids are their places in order."""

    def __init__(self) -> None:
        self.made = {"study_id": 0, "trial_id": 0}
        self.names: dict[int, str] = {}

    def add(self, log: Log) -> None:
        if log["op_code"] == _CREATE_STUDY and log["study_name"] not in self.names.values():
            self.names[self.made["study_id"]] = log["study_name"]
            self.made["study_id"] += 1
        elif log["op_code"] == 1:
            self.names.pop(log["study_id"], None)
        elif log["op_code"] == _CREATE_TRIAL and log["study_id"] in self.names:
            self.made["trial_id"] += 1


def logs_of(lines: Sequence[bytes], count: _Count) -> tuple[list[Log], list[int]]:
    """(the entries of these lines, which of the lines are broken).

    An entry that was added to a torn line is still one. Where a lost line must have begun a study or a trial,
    because a later entry is about one more than there are, another stands in for it: what follows is about
    the same trials as before.
    """
    logs: list[Log] = []
    broken: list[int] = []
    gap: int | None = None
    for number, line in enumerate(lines):
        log = _entry(line)
        if log is None:
            if not line.strip():
                continue
            broken.append(number)
            gap = len(logs)
            log = _last_entry(line)
            if log is None:
                continue
        if gap is not None:
            for which in ("study_id", "trial_id"):
                while count.made[which] <= log.get(which, -1):
                    stands_in = _stand_in(which, count, logs[:gap])
                    count.add(stands_in)
                    logs.insert(gap, stands_in)
                    gap += 1
        count.add(log)
        logs.append(log)
    return logs, broken


def _stand_in(which: str, count: _Count, before: Iterable[Log]) -> Log:
    """An entry that stands for a lost line: a study under a name of its own, or a trial that runs."""
    if which == "study_id" or not count.names:
        name = f"lost {count.made['study_id']}"
        return {"op_code": _CREATE_STUDY, "worker_id": "lost", "study_name": name, "directions": [1]}
    studies = [log["study_id"] for log in before if log["op_code"] == _CREATE_TRIAL]
    study = next((one for one in reversed(studies) if one in count.names), max(count.names))
    when = "1970-01-01T00:00:00+00:00"
    return {"op_code": _CREATE_TRIAL, "worker_id": "lost", "study_id": study, "datetime_start": when}


def _entry(line: bytes) -> Log | None:
    """The entry on a whole line; None if it is none of a journal."""
    try:
        log = json.loads(line)
    except (ValueError, RecursionError):
        return None
    if not isinstance(log, dict) or not isinstance(log.get("worker_id"), str):
        return None
    code = log.get("op_code")
    if type(code) is not int or not 0 <= code < len(_NEEDED) or not all(key in log for key in _NEEDED[code]):
        return None
    ids = [log[key] for key in ("study_id", "trial_id") if key in log]
    return log if all(type(one) is int and one >= 0 for one in ids) else None


def _last_entry(line: bytes) -> Log | None:
    """The entry that a broken line ends with, if it does."""
    begin = line.rfind(_BEGIN)
    while begin > 0:
        log = _entry(line[begin:])
        if log is not None:
            return log
        begin = line.rfind(_BEGIN, 0, begin)
    return None


def _refuse_others(path: str) -> None:
    """ConfigError if there is a file that is no journal: adding to it would spoil it."""
    try:
        mode = os.stat(path).st_mode
    except FileNotFoundError:
        return
    what = None if stat.S_ISREG(mode) else "no ordinary file"
    if what is None:
        with open(path, "rb") as file:
            what = _looks_like(file.read(LOOKED_AT))
    if what is not None:
        raise ConfigError(
            f"storage {path} is {what}, and no journal of trials: name another file, one that is not there "
            "yet is made; a database is named by a URL, e.g. sqlite:///studies.db"
        )


def _looks_like(data: bytes) -> str | None:
    """A description of a file by its beginning; None if it is a journal."""
    lines = data.split(b"\n")
    # The first line may be all there is, and torn.
    begun = data[: len(_BEGIN)] == _BEGIN[: len(data)]
    if begun or any(_entry(line) or _last_entry(line) for line in lines):
        return None
    if data.startswith(b"SQLite format 3"):
        return "a database of SQLite (write sqlite:/// before its name)"
    if b'"config"' in lines[0] and b'"workload"' in lines[0]:
        return "a file of records"
    start = lines[0][:40].decode(errors="replace")
    return f"a file that begins with {start!r}"


__all__ = ["Journal", "logs_of"]
