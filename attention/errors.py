"""The exception tree of the whole project. Every error a user can cause is one of these.

AttentionPlannerError
+-- ConfigError          a configuration that cannot be right   (also a ValueError)
+-- InputError           tensors that do not fit a configuration (also a ValueError)
+-- UnavailableError     known, but not to be had here: a backend, a variant, a device
+-- OutOfMemoryError     memory ran out, with requested and available bytes
+-- DistributedError     another rank did not do its part of a call     (also a RuntimeError)
+-- StorageError         what was found could not be kept: a full disk, a database that is gone, a lock
"""

from __future__ import annotations

from functools import partial
from typing import Any


class AttentionPlannerError(Exception):
    """Root of the tree: catch this to catch everything the project raises on purpose."""


class ConfigError(AttentionPlannerError, ValueError):
    """A configuration that cannot be right: what was asked, what arrived, what to do."""


class InputError(AttentionPlannerError, ValueError):
    """Tensors that do not fit the configuration, found before anything is allocated."""


class UnavailableError(AttentionPlannerError, RuntimeError):
    """Something this project knows but cannot give here; the message says where it is to be had."""


class StorageError(AttentionPlannerError):
    """A right request failed at what keeps its results. What was kept before is whole, and the same call goes
    on from there."""


class OutOfMemoryError(AttentionPlannerError, MemoryError):
    """Memory ran out. `requested` and `available` are bytes, None where the platform did not say."""

    def __init__(self, message: str, *, requested: int | None, available: int | None) -> None:
        super().__init__(message)
        self.requested = requested
        self.available = available

    def __reduce__(self) -> tuple[Any, ...]:
        # Keyword-only arguments do not survive pickling by themselves, and errors cross processes.
        return partial(type(self), requested=self.requested, available=self.available), self.args


class DistributedError(AttentionPlannerError, RuntimeError):
    """Another rank did not do its part of a call in time. Ranks are those of the whole job, as its launcher
    numbers them."""

    def __init__(
        self,
        message: str,
        *,
        rank: int,
        peers: tuple[int, ...],
        missing: tuple[int, ...],
        step: str,
        nbytes: int,
        seconds: float,
    ) -> None:
        super().__init__(message)
        self.rank = rank
        """The rank that tells."""
        self.peers = peers
        """Those that it waited for."""
        self.missing = missing
        """Those that were not heard of in the moment after it failed; the cause is among them, if it is a
        rank that died, stopped or never came. Others may still wait, or compute, and not know yet."""
        self.step = step
        """What it waited in."""
        self.nbytes = nbytes
        """Bytes that were to go to and come from those peers."""
        self.seconds = seconds
        """Time that it had waited."""

    def __reduce__(self) -> tuple[Any, ...]:
        fields = ("rank", "peers", "missing", "step", "nbytes", "seconds")
        return partial(type(self), **{name: getattr(self, name) for name in fields}), self.args


def shortened(text: str, maximum: int) -> str:
    """The text, its middle left out where it has more than `maximum` characters: an error says at the
    beginning what was asked, and at the end what to do."""
    if len(text) <= maximum:
        return text
    end = maximum // 3
    return (
        f"{text[: maximum - end]} [... {len(text) - maximum:,} characters more ...] {text[len(text) - end :]}"
    )
