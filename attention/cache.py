"""A bounded cache that keeps a value from its key's second use on. Imports no torch.

A shape seen once (the one odd batch at the end of an epoch) costs nothing to keep, because it is
not kept; a shape seen twice will be seen again.
"""

from __future__ import annotations

import threading
from collections import OrderedDict
from collections.abc import Callable, Hashable
from dataclasses import dataclass
from typing import Generic, TypeVar

K = TypeVar("K", bound=Hashable)
V = TypeVar("V")


@dataclass(frozen=True)
class CacheStats:
    """The state of a cache and its counts since it was made; hits + misses is the calls of `get`."""

    entries: int
    bytes: int
    hits: int
    misses: int
    evictions: int


class BoundedCache(Generic[K, V]):
    """Values by key: at most `max_entries` of them and `max_bytes` in all, least recently used out first.

    Values are shared between all who ask, so nobody may change them. Thread-safe. A bound of 0 turns
    the cache off: every `get` builds and nothing is kept.
    """

    def __init__(self, *, max_entries: int, max_bytes: int, size: Callable[[V], int]) -> None:
        self._max_entries = max_entries
        self._max_bytes = max_bytes
        self._size = size
        self._lock = threading.Lock()
        self._stored: OrderedDict[K, tuple[V, int]] = OrderedDict()
        # Keys that missed lately, oldest first, as many as the cache may have entries: a key that
        # returns only after so many others would have been evicted by them anyway.
        self._seen: OrderedDict[K, None] = OrderedDict()
        self._bytes = self._hits = self._misses = self._evictions = 0

    def get(self, key: K, build: Callable[[], V]) -> V:
        """The value stored for `key`, or else `build()`, which is stored if `key` was asked for before.

        `build` runs outside the lock: threads that miss together build together, and the value that
        was stored first is what all of them return. A value larger than `max_bytes` is not stored.
        """
        with self._lock:
            if key in self._stored:
                self._hits += 1
                self._stored.move_to_end(key)
                return self._stored[key][0]
            self._misses += 1
            returning = self._remember(key)
        value = build()
        if not returning:
            return value
        size = self._size(value)
        return self._store(key, value, size) if size <= self._max_bytes else value

    def clear(self) -> int:
        """Forgets all values and all keys seen; the bytes that were held."""
        with self._lock:
            freed, self._bytes = self._bytes, 0
            self._stored.clear()
            self._seen.clear()
            return freed

    @property
    def stats(self) -> CacheStats:
        with self._lock:
            return CacheStats(
                entries=len(self._stored),
                bytes=self._bytes,
                hits=self._hits,
                misses=self._misses,
                evictions=self._evictions,
            )

    def _remember(self, key: K) -> bool:
        """Whether `key` missed before; it has now. False when the cache is off."""
        if not self._max_entries or not self._max_bytes:
            return False
        returning = key in self._seen
        self._seen[key] = None
        self._seen.move_to_end(key)
        if len(self._seen) > self._max_entries:
            self._seen.popitem(last=False)
        return returning

    def _store(self, key: K, value: V, size: int) -> V:
        with self._lock:
            if key in self._stored:  # another thread was faster
                return self._stored[key][0]
            self._stored[key] = (value, size)
            self._bytes += size
            while len(self._stored) > self._max_entries or self._bytes > self._max_bytes:
                _, (_, evicted) = self._stored.popitem(last=False)
                self._bytes -= evicted
                self._evictions += 1
        return value
