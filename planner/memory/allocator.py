"""A replay of PyTorch's CUDA caching allocator: what it holds for a sequence of allocations and frees.

    found = replay([("q", 16 << 20), ("scratch", 3 << 20), ("scratch", 0)], cap=8 * 10**9)
    found.peak_allocated, found.peak_reserved, found.oom

Written from the behaviour of `c10/cuda/CUDACachingAllocator.cpp` (pytorch 001074d2). Left out: streams
(one stream, so a freed block can be reused at once), private pools of CUDA graphs, and callbacks that
free memory on a miss. Addresses are made up: a new segment lies above all older ones, where the
driver may choose otherwise, which matters only between free blocks of equal size.

Imports neither torch nor NumPy.
"""

from __future__ import annotations

from bisect import bisect_left, insort
from collections.abc import Hashable, Sequence
from typing import Final, Literal, NamedTuple

from planner.memory.allocator_settings import MIN_BLOCK, ROUND_LARGE, SMALL, SMALL_SEGMENT, AllocatorSettings

_NO_LIMIT: Final = 1 << 62

Events = Sequence[tuple[Hashable, int | None]]
"""(key, bytes) allocates; (key, 0) or (key, None) frees."""
Limit = Literal["either", "card", "fraction"]
"""What a cap is of: see `Allocator`."""


class Block:
    """A piece of a segment: in use, cached (`free`), or addresses without memory (not `mapped`)."""

    __slots__ = ("address", "born", "free", "mapped", "next", "prev", "requested", "size")

    def __init__(self, address: int, size: int, mapped: bool = True) -> None:
        self.address = address
        self.size = size
        self.mapped = mapped
        self.free = False
        self.prev: Block | None = None
        self.next: Block | None = None
        self.requested = 0
        self.born = 0  # the pool's count of searches when the block was cached last

    @property
    def whole(self) -> bool:
        """Whether the block is all of its segment."""
        return self.prev is None and self.next is None


class _Pool:
    """The blocks of one pool: by address, cached ones by (size, address), unmapped ones by address."""

    def __init__(self, page: int, addresses: int | None) -> None:
        self.page = page
        self.addresses = addresses
        self.blocks: dict[int, Block] = {}
        self.free: list[tuple[int, int]] = []
        self.unmapped: list[int] = []
        self.top = 0
        self.searches = 0
        if addresses is not None:
            self.extend()

    def new(self, size: int, mapped: bool = True) -> Block:
        block = self.blocks[self.top] = Block(self.top, size, mapped)
        self.top += size
        return block

    def extend(self) -> Block:
        """A range of addresses without memory, in whole pages."""
        assert self.addresses is not None
        block = self.new(-(-self.addresses // self.page) * self.page, mapped=False)
        self.put(block)
        return block

    def put(self, block: Block) -> None:
        """Lists a block that is not in use, merged with neighbours of its kind."""
        for near in (block.prev, block.next):
            if near is None or not near.free or near.mapped != block.mapped:
                continue
            self.take(near)
            del self.blocks[max(near.address, block.address)]
            if near is block.prev:
                block.address = near.address
                block.prev = near.prev
                if near.prev is not None:
                    near.prev.next = block
                self.blocks[block.address] = block
            else:
                block.next = near.next
                if near.next is not None:
                    near.next.prev = block
            block.size += near.size
        block.free = True
        block.born = self.searches
        if block.mapped:
            insort(self.free, (block.size, block.address))
        else:
            insort(self.unmapped, block.address)

    def take(self, block: Block) -> None:
        """Removes a block from its list."""
        block.free = False
        if block.mapped:
            del self.free[bisect_left(self.free, (block.size, block.address))]
        else:
            del self.unmapped[bisect_left(self.unmapped, block.address)]

    def cut(self, block: Block, size: int) -> Block:
        """Shortens an unlisted block to `size` bytes; the rest, unlisted too."""
        rest = self.blocks[block.address + size] = Block(
            block.address + size, block.size - size, block.mapped
        )
        rest.prev, rest.next = block, block.next
        if block.next is not None:
            block.next.prev = rest
        block.next = rest
        block.size = size
        return rest


class Allocator:
    """The allocator's state, one call at a time; `replay` is the usual way in.

    `cap` is what `set_per_process_memory_fraction` or the card allows, in bytes, as `limit` says. They differ
    in two ways. With expandable segments torch compares the fraction with the segment that it would open
    otherwise, and never again as it maps pages, so that `reserved` can exceed it; the card counts the pages
    alone. And garbage is collected only under a fraction. A cap by `either` stands for both: `reserved` never
    exceeds it, and what fits fits either way, up to the garbage that a card would not collect.

    `memory` is all that the card has. Expandable segments take nine eighths of it in addresses, and as much
    again when these are too fragmented, which happens on cards of a few hundred MiB; None for no end of them.
    """

    def __init__(
        self,
        settings: AllocatorSettings | None = None,
        cap: int | None = None,
        limit: Limit = "either",
        memory: int | None = None,
    ) -> None:
        self.settings = settings or AllocatorSettings()
        self.cap = cap
        self.limit = limit
        self.allocated = self.requested = self.reserved = 0
        self.peak_allocated = self.peak_requested = self.peak_reserved = 0
        self.retries = 0
        """Times that all cached segments were released, whether or not that helped (num_alloc_retries)."""
        self.next_cap: int | None = None
        """Up to below this cap everything so far would have gone the same way; None for any larger cap."""
        self._expandable = self.settings.expandable_segments
        self._max_split = self.settings.max_split_size or _NO_LIMIT
        self._slack = self.settings.max_non_split_rounding or self.settings.large_segment_size
        self._collects = limit != "card" and self.settings.garbage_collection_threshold > 0
        addresses = (_NO_LIMIT if memory is None else memory + memory // 8) if self._expandable else None
        self._small = _Pool(SMALL_SEGMENT, addresses)
        self._large = _Pool(self.settings.large_segment_size, addresses)

    def allocate(self, requested: int) -> Block | None:
        """The block for `requested` > 0 bytes, or None where memory runs out.

        A block too small to split counts as allocated in full.
        """
        size = self.settings.round_size(requested)
        small = size <= SMALL
        pool = self._small if small else self._large
        block = self._find(pool, size) or self._miss(pool, size)
        if block is None:
            return None
        rest = block.size - size
        if rest >= MIN_BLOCK if small or self._expandable else size < self._max_split and rest > SMALL:
            pool.put(pool.cut(block, size))
        block.requested = requested
        self.allocated += block.size
        self.requested += requested
        self.peak_allocated = max(self.peak_allocated, self.allocated)
        self.peak_requested = max(self.peak_requested, self.requested)
        return block

    def free(self, block: Block) -> None:
        """Caches a block that `allocate` gave."""
        self.allocated -= block.size
        self.requested -= block.requested
        pool = self._small if self._small.blocks.get(block.address) is block else self._large
        pool.put(block)

    def release(self) -> None:
        """Gives back all segments, or pages, that are free as a whole (`torch.cuda.empty_cache`)."""
        for pool in (self._large, self._small):
            for _, address in list(pool.free):
                block = pool.blocks[address]
                if self._expandable:
                    self._unmap(pool, block)
                elif block.whole:
                    self._drop(pool, block)

    def segments(self) -> list[list[Block]]:
        """The blocks of each segment in order; with expandable segments, of each mapped stretch."""
        found = []
        for pool in (self._small, self._large):
            for block in pool.blocks.values():
                if block.mapped and (block.prev is None or not block.prev.mapped):
                    found.append([block])
                    while (follower := found[-1][-1].next) is not None and follower.mapped:
                        found[-1].append(follower)
        return found

    def _find(self, pool: _Pool, size: int) -> Block | None:
        """The smallest cached block that serves, the lowest of equals; delisted. None for a miss."""
        pool.searches += 1
        free = pool.free
        at = bisect_left(free, (size, -1))
        if at == len(free):
            return None
        if self._expandable:
            # A block that can grow counts with what it can grow to, so that it is kept for later.
            while at + 1 < len(free) and _reach(pool, free[at + 1]) < _reach(pool, free[at]):
                at += 1
        found, address = free[at]
        if found >= self._max_split if size < self._max_split else found >= size + self._slack:
            return None
        block = pool.blocks[address]
        pool.take(block)
        return block

    def _miss(self, pool: _Pool, size: int) -> Block | None:
        self._collect_garbage()
        block = self._open(pool, size)
        if block is None and self._release_oversize(pool, size):
            block = self._open(pool, size)
        if block is None:
            self.release()
            self.retries += 1
            block = self._open(pool, size)
        return block

    def _open(self, pool: _Pool, size: int) -> Block | None:
        """A new segment, or a stretch of newly mapped pages, of at least `size` bytes, if the cap allows."""
        segment = self.settings.segment_size(size)
        if not (self._expandable and self.limit == "card") and not self._allows(segment):
            return None
        if self._expandable:
            return self._extend(pool, size)
        self._reserve(segment)
        return pool.new(segment)

    def _allows(self, more: int) -> bool:
        needed = self.reserved + more
        if self.cap is None or needed <= self.cap:
            return True
        self.next_cap = min(needed, self.next_cap or needed)
        return False

    def _reserve(self, more: int) -> None:
        self.reserved += more
        self.peak_reserved = max(self.peak_reserved, self.reserved)

    def _drop(self, pool: _Pool, block: Block) -> None:
        pool.take(block)
        del pool.blocks[block.address]
        self.reserved -= block.size

    def _extend(self, pool: _Pool, size: int) -> Block | None:
        """Maps pages at the lowest address where `size` bytes are free or unmapped."""
        for address in pool.unmapped:
            block = pool.blocks[address]
            if block.prev is not None and block.prev.free:
                block = block.prev
            room, last = block.size, block.next
            while room < size and last is not None and last.free:
                room, last = room + last.size, last.next
            if room >= size:
                break
        else:
            block = pool.extend()
        if not block.mapped and not self._map(pool, block, min(block.size, size)):
            return None
        while block.size < size:
            gap = block.next
            assert gap is not None  # there is room, so addresses follow
            if not self._map(pool, gap, min(gap.size, size - block.size)):
                return None
            block = gap  # which swallowed the block before it
        pool.take(block)
        return block

    def _map(self, pool: _Pool, block: Block, size: int) -> bool:
        """Backs the beginning of an unmapped block by whole pages and caches it; False if over the cap."""
        size = -(-size // pool.page) * pool.page
        if self.limit != "fraction" and not self._allows(size):
            return False
        pool.take(block)
        if size < block.size:
            pool.put(pool.cut(block, size))
        block.mapped = True
        pool.put(block)
        self._reserve(size)
        return True

    def _unmap(self, pool: _Pool, block: Block) -> None:
        """Gives back the whole pages inside a cached block."""
        start = -(-block.address // pool.page) * pool.page
        size = (block.address + block.size) // pool.page * pool.page - start
        if size <= 0:
            return
        pool.take(block)
        if start > block.address:
            before, block = block, pool.cut(block, start - block.address)
            pool.put(before)
        if size < block.size:
            pool.put(pool.cut(block, size))
        block.mapped = False
        pool.put(block)
        self.reserved -= size

    def _release_oversize(self, pool: _Pool, size: int) -> bool:
        """Frees one oversize block that would do, or the largest until there is enough; whether there is.

        Oversize blocks are never split, so each is a segment. Torch has no such step for expandable
        segments: it stops with an internal error where one of them would be freed here.
        """
        if self._max_split == _NO_LIMIT or self._expandable:
            return False
        at = bisect_left(pool.free, (size, -1))  # oversize, or it would have been taken
        if at < len(pool.free):
            self._drop(pool, pool.blocks[pool.free[at][1]])
            return True
        released = 0
        while released < size and pool.free and pool.free[-1][0] >= self._max_split:
            released += pool.free[-1][0]
            self._drop(pool, pool.blocks[pool.free[-1][1]])
        return released >= size

    def _collect_garbage(self) -> None:
        """Over the threshold, frees large segments of at least the mean age, until it is kept."""
        if not self._collects or self.cap is None:
            return
        excess = self.reserved - int(self.settings.garbage_collection_threshold * self.cap)
        pool = self._large
        cached = [block for _, address in pool.free if (block := pool.blocks[address]).whole]
        if excess <= 0 or not cached:
            return
        # Any larger cap may collect less; steps of a page keep a search over caps finite.
        self.next_cap = min(self.cap + ROUND_LARGE, self.next_cap or self.cap + ROUND_LARGE)
        while excess > 0 and cached:
            mean = sum(block.born for block in cached) / len(cached)
            for block in cached:
                if block.born <= mean:
                    excess -= block.size
                    self._drop(pool, block)
            cached = [block for block in cached if block.born > mean]


def _reach(pool: _Pool, entry: tuple[int, int]) -> int:
    after = pool.blocks[entry[1]].next
    return entry[0] + (after.size if after is not None and not after.mapped else 0)


class Oom(NamedTuple):
    """Where memory ran out, with everything that could be released released."""

    event: int
    """Index of the event."""
    key: Hashable
    requested: int
    """Bytes asked for."""
    allocated: int
    reserved: int
    next_cap: int
    """Smallest cap under which anything would have gone otherwise: below it, memory runs out here too."""


class Replay(NamedTuple):
    """What a sequence of events came to, up to its end or to where memory ran out. In bytes."""

    peak_allocated: int
    peak_reserved: int
    peak_requested: int
    reserved: int
    """Held at the end, cached segments included."""
    retries: int
    """Times that all cached segments were released to make room."""
    oom: Oom | None


def replay(
    events: Events,
    settings: AllocatorSettings | None = None,
    cap: int | None = None,
    limit: Limit = "either",
    memory: int | None = None,
) -> Replay:
    """Runs `events` from an empty allocator to their end, or to where memory runs out; see `Allocator`."""
    allocator = Allocator(settings, cap, limit, memory)
    live: dict[Hashable, Block] = {}
    oom = None
    for index, (key, size) in enumerate(events):
        if (key in live) == bool(size) or (size or 0) < 0:
            raise ValueError(
                f"event {index} is ({key!r}, {size!r}) while {key!r} is {'' if key in live else 'not '}live; "
                "allocate a key once, with a positive size, before it is freed"
            )
        if not size:
            allocator.free(live.pop(key))
        elif (block := allocator.allocate(size)) is not None:
            live[key] = block
        else:
            assert allocator.next_cap is not None  # only a cap ends in failure
            oom = Oom(index, key, size, allocator.allocated, allocator.reserved, allocator.next_cap)
            break
    peaks = allocator.peak_allocated, allocator.peak_reserved, allocator.peak_requested
    return Replay(*peaks, allocator.reserved, allocator.retries, oom)


def fits(events: Events, cap: int, settings: AllocatorSettings | None = None) -> bool:
    """Whether `events` run to their end under `cap` bytes."""
    return replay(events, settings, cap).oom is None


def smallest_cap(events: Events, settings: AllocatorSettings | None = None) -> int:
    """The smallest cap, in bytes, under which `events` run to their end.

    Every smaller cap fails (with garbage collection: every one tried, at most 2 MiB apart). It can lie
    below the peak_allocated of a replay without a cap, which may fill larger blocks. A larger cap can fail
    again: with more room a small buffer may settle in a segment that would have been released. None fails
    from peak_reserved on; with expandable segments, from peak_reserved plus the largest segment; with
    garbage collection, from peak_reserved / threshold. So this does not bisect: it goes up from what the
    events hold live, through the caps that change anything.
    """
    cap = replay(events, settings).peak_requested
    while (oom := replay(events, settings, cap).oom) is not None:
        cap = oom.next_cap
    return cap
