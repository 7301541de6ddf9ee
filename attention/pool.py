"""Scratch buffers kept between calls, the caches beside them, and what happens when memory runs out.

    BufferPool               free buffers by size class, within a bound
    Buffers                  one pool and three caches: what modules with equal settings share
    with_emergency_release   out of memory: free all that, try once more, else one clear error

A pool serves one stream per device at a time. A buffer is reused in the order of the work that was
queued, without waiting for it, so two CUDA streams must not take turns on one pool.
"""

from __future__ import annotations

import os
import threading
import weakref
from collections import deque
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from math import prod
from typing import Any, ClassVar, NamedTuple, TypeVar

import torch
from torch import Tensor

from attention.cache import BoundedCache, CacheStats, K, V
from attention.config import AttentionConfig, Switch
from attention.errors import InputError
from attention.sizes.arena import POOL_FROM_TOKENS, bucket_bytes

T = TypeVar("T")

FREE_SHARE = 8
"""A pool without a bound of its own holds at most one part in this many of the free memory."""
FREE_IF_UNKNOWN = 2 << 30
"""Free bytes assumed on devices that do not tell."""


def free_bytes(device: torch.device) -> int | None:
    """Bytes that could be allocated on `device` now; None where the platform does not say.

    On CUDA that is what the driver has left, within this process's memory fraction, and what the
    caching allocator holds unused; fragmentation may keep a single request from getting all of it.
    """
    if device.type == "cuda":
        free, total = torch.cuda.mem_get_info(device)
        reserved = torch.cuda.memory_reserved(device)
        # Older torch can set this fraction and not tell it.
        fraction = getattr(torch.cuda, "get_per_process_memory_fraction", lambda device: 1.0)(device)
        allowed = int(total * fraction)
        unused = reserved - torch.cuda.memory_allocated(device)
        return min(free, max(allowed - reserved, 0)) + unused
    if device.type != "cpu":
        return None
    try:
        with open("/proc/meminfo") as lines:
            for line in lines:
                if line.startswith("MemAvailable:"):
                    return int(line.split()[1]) * 1024
    except OSError:
        pass  # not Linux
    try:
        return os.sysconf("SC_AVPHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")
    except (AttributeError, ValueError, OSError):  # no sysconf here, or it does not know
        return None


@dataclass(frozen=True)
class PoolStats:
    """The state of a pool: bytes that it holds and lent now (of whole buckets), and counts since it was
    made."""

    hits: int
    misses: int
    held_bytes: int
    lent_bytes: int
    peak_bytes: int
    """Most that was held and lent together."""
    buckets: tuple[tuple[int, int], ...]
    """(bytes, free buffers of that size), ascending."""


class _Class(NamedTuple):
    device: torch.device
    nbytes: int


class BufferPool:
    """Uninitialised tensors from buffers that are used again.

    `max_bytes` bounds the free buffers held, on all devices together. None: on each device, an eighth
    of what was free there when the pool last grew. 0: nothing is held and tensors get their exact
    size. Thread-safe. Free buffers are bare storages, so that no tensor's autograd or inference mode
    outlives its loan; lent buffers are known weakly, so that a tensor dropped without `give` is freed.
    """

    def __init__(self, max_bytes: int | None = None) -> None:
        self._max_bytes = max_bytes
        # Re-entrant, because the garbage collector may end a `lend` while this thread is in here.
        self._lock = threading.RLock()
        # Free buffers of each class with the time they came back, oldest first.
        self._free: dict[_Class, deque[tuple[int, torch.UntypedStorage]]] = {}
        self._lent: weakref.WeakKeyDictionary[torch.UntypedStorage, _Class] = weakref.WeakKeyDictionary()
        # Bytes held and bound when the platform was last asked what is free.
        self._bounds: dict[torch.device, tuple[int, int]] = {}
        self._clock = self._hits = self._misses = self._peak = 0

    @property
    def keeps(self) -> bool:
        """Whether buffers are held for later."""
        return self._max_bytes != 0

    def take(self, shape: Sequence[int], dtype: torch.dtype, device: torch.device | str) -> Tensor:
        """A contiguous uninitialised tensor, to be handed back by `give` or `lend` when it is done."""
        tensor = torch.empty(0, dtype=dtype, device=device)
        nbytes = prod(shape) * dtype.itemsize
        # The tensor's device and not the argument's: "cuda" has become the current "cuda:0".
        wanted = _Class(tensor.device, nbytes if self._max_bytes == 0 else bucket_bytes(nbytes))
        with self._lock:
            free = self._free.get(wanted)
            storage = free.pop()[1] if free else None  # the one used last is warm
        reused = storage is not None
        if storage is None:
            storage = torch.empty(wanted.nbytes, dtype=torch.uint8, device=wanted.device).untyped_storage()
        with self._lock:
            self._hits += reused
            self._misses += not reused
            self._lent[storage] = wanted
            self._peak = max(self._peak, self._held() + self._on_loan())
        return tensor.set_(storage, 0, tuple(shape), ())

    def give(self, tensor: Tensor, keep: bool = True) -> None:
        """Hands back what `take` returned (or any view of it), which must not be used any more; without
        `keep` the buffer is freed, because a larger one takes its place.

        That includes autograd: give nothing that a graph has saved. Over the bound, the least recently
        used free buffers go; a buffer larger than the bound is dropped at once.
        """
        storage = tensor.untyped_storage()
        bound = self._bound(tensor.device, storage.nbytes()) if keep else 0
        with self._lock:
            lent = self._lent.pop(storage, None)
            if lent is None:
                raise InputError(
                    f"a pool takes back each tensor it lent, once; got one of shape {list(tensor.shape)} on "
                    f"{tensor.device} that is not lent: it was given before or comes from elsewhere"
                )
            if 0 < lent.nbytes <= bound:
                self._clock += 1
                self._free.setdefault(lent, deque()).append((self._clock, storage))
            if not keep:
                return
            # Each device has its own dynamic bound; a bound in bytes is over all of them.
            self._shrink(bound, lent.device if self._max_bytes is None else None)

    @contextmanager
    def lend(self, shape: Sequence[int], dtype: torch.dtype, device: torch.device | str) -> Iterator[Tensor]:
        """`take` on entry and `give` on exit."""
        tensor = self.take(shape, dtype, device)
        try:
            yield tensor
        finally:
            self.give(tensor)

    def trim(self, max_bytes: int = 0) -> int:
        """Frees free buffers, least recently used first, until at most `max_bytes` are held; bytes freed."""
        with self._lock:
            self._bounds.clear()
            return self._shrink(max_bytes, None)

    @property
    def stats(self) -> PoolStats:
        with self._lock:
            counts: dict[int, int] = {}
            for kind, free in self._free.items():
                counts[kind.nbytes] = counts.get(kind.nbytes, 0) + len(free)
            return PoolStats(
                hits=self._hits,
                misses=self._misses,
                held_bytes=self._held(),
                lent_bytes=self._on_loan(),
                peak_bytes=self._peak,
                buckets=tuple(sorted((size, count) for size, count in counts.items() if count)),
            )

    def _bound(self, device: torch.device, nbytes: int) -> int:
        """The bound for a device to which `nbytes` come back. The platform is asked what is free only
        when the pool would hold more than when it was asked last: asking costs more than a buffer."""
        if self._max_bytes is not None:
            return self._max_bytes
        with self._lock:
            held = self._held(device) + nbytes
            largest, bound = self._bounds.get(device, (-1, 0))
        if held > largest:
            free = free_bytes(device)
            bound = (FREE_IF_UNKNOWN if free is None else free) // FREE_SHARE
            with self._lock:
                self._bounds[device] = (min(held, bound), bound)
        return bound

    def _held(self, device: torch.device | None = None) -> int:
        return sum(
            kind.nbytes * len(free) for kind, free in self._free.items() if device in (None, kind.device)
        )

    def _on_loan(self) -> int:
        return sum(kind.nbytes for kind in list(self._lent.values()))

    def _shrink(self, max_bytes: int, device: torch.device | None) -> int:
        """`trim` on one device, or with None on all together. Call it with the lock held."""
        before = held = self._held(device)
        while held > max_bytes:
            oldest = min(
                (kind for kind, free in self._free.items() if free and device in (None, kind.device)),
                key=lambda kind: self._free[kind][0][0],
            )
            self._free[oldest].popleft()
            held -= oldest.nbytes
        return before - held


def _kept_bytes(value: Any) -> int:
    """Bytes of what a cache keeps: tensors, layouts (anything with `nbytes`), tuples or lists of them."""
    if isinstance(value, (tuple, list)):
        return sum(_kept_bytes(part) for part in value)
    return int(value.nbytes)


class _SharedCache(BoundedCache[K, V]):
    """Builds outside inference mode: one module's evaluation may fill what another's training saves."""

    def get(self, key: K, build: Callable[[], V]) -> V:
        def build_normal() -> V:
            with torch.inference_mode(False):
                return build()

        return super().get(key, build_normal)


@dataclass(frozen=True)
class BuffersStats:
    """Statistics of the pool and of each cache."""

    pool: PoolStats
    layouts: CacheStats
    indices: CacheStats
    masks: CacheStats


class Buffers:
    """The memory that one module, or several with the same settings, keep between calls: a pool and three
    caches.

    Modules get theirs from `buffers_for`. Copies and pickles of a module share theirs the same way.
    """

    OFF: ClassVar[BufferPool] = BufferPool(0)
    """The pool of calls too short for one."""

    def __init__(
        self, *, switch: Switch = "auto", pool_bytes: int | None = None, cache_entries: int, cache_bytes: int
    ) -> None:
        self._settings = (switch, pool_bytes, cache_entries, cache_bytes)
        self._pool_from = POOL_FROM_TOKENS if switch == "auto" else 0
        self.pool = BufferPool(0 if switch == "off" else pool_bytes)

        def cache() -> BoundedCache[Any, Any]:
            return _SharedCache(max_entries=cache_entries, max_bytes=cache_bytes, size=_kept_bytes)

        self.layouts, self.indices, self.masks = cache(), cache(), cache()

    def pool_for(self, seq: int) -> BufferPool:
        """The pool for a call over `seq` tokens: the shared one, or one that holds nothing."""
        return self.pool if seq >= self._pool_from else self.OFF

    def release(self) -> int:
        """Frees all that is kept and not lent; the bytes freed."""
        return self.pool.trim() + self.layouts.clear() + self.indices.clear() + self.masks.clear()

    @property
    def stats(self) -> BuffersStats:
        return BuffersStats(self.pool.stats, self.layouts.stats, self.indices.stats, self.masks.stats)

    def __reduce__(self) -> tuple[Callable[..., Buffers], tuple[Any, ...]]:
        return _shared, self._settings


_sharing = threading.Lock()
_living: weakref.WeakValueDictionary[tuple[Any, ...], Buffers] = weakref.WeakValueDictionary()


def _shared(switch: Switch, pool_bytes: int | None, cache_entries: int, cache_bytes: int) -> Buffers:
    with _sharing:
        settings = (switch, pool_bytes, cache_entries, cache_bytes)
        buffers = _living.get(settings)
        if buffers is None:
            buffers = _living[settings] = Buffers(
                switch=switch, pool_bytes=pool_bytes, cache_entries=cache_entries, cache_bytes=cache_bytes
            )
        return buffers


def buffers_for(config: AttentionConfig) -> Buffers:
    """The `Buffers` of all living modules with these pool and cache settings; it dies with the last."""
    return _shared(config.pool, config.pool_bytes, config.cache_entries, config.cache_bytes)
