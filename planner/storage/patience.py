"""Waiting for what another worker or a database has to let go: said, and not for ever."""

from __future__ import annotations

import warnings
from time import monotonic, sleep
from typing import Final

from attention.errors import StorageError

PATIENCE: Final = 60.0
"""Seconds that a lock or a database is waited for."""
QUIET: Final = 1.0
"""Seconds of them in which nothing is said."""


class StorageWarning(UserWarning):
    """Something is waited for, or a storage was found broken and read all the same."""


class Patience:
    """One wait. `what`: what is waited for; `advice`: what to do if it was in vain."""

    def __init__(self, what: str, advice: str) -> None:
        self._what, self._advice = what, advice
        self._began, self._pause, self._warned = monotonic(), 0.001, False

    def wait(self, why: str = "") -> None:
        """Waits a moment, longer each time; StorageError when it took too long. `why`: as of now."""
        waited = monotonic() - self._began
        if waited > PATIENCE:
            reason = f" ({why})" if why else ""
            raise StorageError(f"waited {PATIENCE:g} s for {self._what}, in vain{reason}; {self._advice}")
        if waited > QUIET and not self._warned:
            self._warned = True
            message = f"waiting for {self._what} (up to {PATIENCE:g} s)" + (f": {why}" if why else "")
            warnings.warn(message, StorageWarning, stacklevel=3)
        sleep(self._pause)
        self._pause = min(2 * self._pause, 0.25)
