"""A bounded cache keeps what is used twice, within its bounds, and the least recently used goes first."""

from __future__ import annotations

import subprocess
import sys
import threading
from collections import OrderedDict

import pytest
from hypothesis import given
from hypothesis import strategies as st

from attention.cache import BoundedCache, CacheStats


class Builder:
    """Builds values of a stated size and counts how often."""

    def __init__(self) -> None:
        self.calls = 0

    def __call__(self, size: int) -> bytes:
        self.calls += 1
        return bytes(size)


def made(max_entries: int = 3, max_bytes: int = 100) -> BoundedCache[str, bytes]:
    return BoundedCache(max_entries=max_entries, max_bytes=max_bytes, size=len)


def test_a_value_is_kept_from_its_second_use_on():
    cache, build = made(), Builder()
    for _ in range(4):
        assert cache.get("key", lambda: build(10)) == bytes(10)
    assert build.calls == 2
    assert cache.stats == CacheStats(entries=1, bytes=10, hits=2, misses=2, evictions=0)


def test_keys_used_once_leave_nothing_behind_however_many():
    cache = made()
    for key in range(1000):
        cache.get(str(key), lambda: b"x")
    assert cache.stats == CacheStats(entries=0, bytes=0, hits=0, misses=1000, evictions=0)
    assert len(cache._seen) == 3


def test_a_none_is_a_value_like_others():
    cache: BoundedCache[str, None] = BoundedCache(max_entries=1, max_bytes=1, size=lambda _: 0)
    built = []
    for _ in range(3):
        cache.get("key", lambda: built.append(1))
    assert len(built) == 2


def test_a_value_larger_than_the_bound_is_never_kept_and_evicts_nothing():
    cache = made(max_bytes=100)
    for key, size in (("small", 100), ("large", 101)) * 3:
        cache.get(key, lambda: bytes(size))  # noqa: B023
    assert cache.stats == CacheStats(entries=1, bytes=100, hits=1, misses=5, evictions=0)


@pytest.mark.parametrize("max_entries, max_bytes", [(0, 100), (3, 0)])
def test_a_bound_of_zero_turns_it_off(max_entries, max_bytes):
    cache = made(max_entries, max_bytes)
    for _ in range(3):
        cache.get("key", lambda: b"")
    assert cache.stats == CacheStats(entries=0, bytes=0, hits=0, misses=3, evictions=0)


def test_clear_says_what_it_freed_and_forgets_the_keys_seen():
    cache, build = made(), Builder()
    for key in ("kept", "kept", "seen"):
        cache.get(key, lambda: build(7))
    assert cache.clear() == 7
    assert cache.clear() == 0
    for key in ("kept", "seen"):
        cache.get(key, lambda: build(7))
    assert cache.stats.entries == 0


def test_a_failing_build_passes_through_and_the_cache_works_on():
    cache = made()
    for _ in range(2):
        with pytest.raises(ZeroDivisionError):
            cache.get("key", lambda: bytes(1 // 0))
    assert cache.get("key", lambda: b"x") == b"x"
    assert cache.stats.entries == 1


def test_build_may_use_the_cache_itself():
    cache = made()
    for _ in range(3):
        assert cache.get("outer", lambda: cache.get("inner", lambda: b"x") * 2) == b"xx"
    assert cache.stats.entries == 2


@given(
    max_entries=st.integers(0, 4), max_bytes=st.integers(0, 12), keys=st.lists(st.integers(0, 7), max_size=60)
)
def test_it_does_what_two_ordered_dicts_do(max_entries, max_bytes, keys):
    cache: BoundedCache[int, bytes] = BoundedCache(max_entries=max_entries, max_bytes=max_bytes, size=len)
    stored: OrderedDict[int, int] = OrderedDict()
    seen: list[int] = []
    hits = evictions = 0
    for key in keys:  # a value is as large as its key
        assert cache.get(key, lambda: bytes(key)) == bytes(key)  # noqa: B023
        if key in stored:
            hits += 1
            stored.move_to_end(key)
            continue
        if key in seen and key <= max_bytes:
            stored[key] = key
            while len(stored) > max_entries or sum(stored.values()) > max_bytes:
                stored.popitem(last=False)
                evictions += 1
        if max_entries and max_bytes:
            seen = [*(old for old in seen if old != key), key][-max_entries:]
        assert len(stored) <= max_entries
        assert sum(stored.values()) <= max_bytes
    assert cache.stats == CacheStats(
        entries=len(stored),
        bytes=sum(stored.values()),
        hits=hits,
        misses=len(keys) - hits,
        evictions=evictions,
    )


def test_threads_that_miss_together_all_get_the_value_stored_first():
    cache: BoundedCache[str, object] = BoundedCache(max_entries=1, max_bytes=1, size=lambda _: 1)
    cache.get("key", object)
    together = threading.Barrier(4)
    got = []

    def build() -> object:
        together.wait(timeout=10)  # passes only if all four build at once, so outside the lock
        return object()

    threads = [threading.Thread(target=lambda: got.append(cache.get("key", build))) for _ in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert len({id(value) for value in got}) == 1
    assert cache.stats.entries == cache.stats.bytes == 1


def test_the_cache_does_not_import_torch():
    code = "import sys, attention.cache; sys.exit('torch' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0
