"""A replay of PyTorch's CUDA caching allocator: what it holds for a sequence of allocations and frees.

    found = replay([("q", 16 << 20), ("scratch", 3 << 20), ("scratch", 0)], cap=8 * 10**9)
    found.peak_allocated, found.peak_reserved, found.oom

Written from the behaviour of `c10/cuda/CUDACachingAllocator.cpp` (pytorch 001074d2) and
`c10/core/AllocatorConfig.h` (torch 2.13), whose constants are named beside ours. Left out: streams
(one stream, so a freed block can be reused at once), private pools of CUDA graphs, and callbacks that
free memory on a miss. Addresses are made up: a new segment lies above all older ones, where the
driver may choose otherwise, which matters only between free blocks of equal size.

Imports neither torch nor NumPy.
"""

from __future__ import annotations

import re
from bisect import bisect_left, insort
from collections.abc import Hashable, Sequence
from typing import Annotated, Any, Final, NamedTuple, Self

from pydantic import BeforeValidator, Field, model_validator

from attention.config import MIB, Positive, Value
from attention.errors import ConfigError

MIN_BLOCK: Final = 512  # kMinBlockSize: sizes are multiples of it
SMALL: Final = MIB  # kSmallSize: the largest request of the small pool
SMALL_SEGMENT: Final = 2 * MIB  # kSmallBuffer: segment, or expandable page, of the small pool
LARGE_REQUEST: Final = 10 * MIB  # kMinLargeAlloc: from here on a request gets a segment of its own size
ROUND_LARGE: Final = 2 * MIB  # kRoundLarge: what such a segment is rounded up to
SLOTS: Final = 16  # kRoundUpPowerOfTwoIntervals: request sizes from 1 MiB, doubling, to 64 GiB
_NO_LIMIT: Final = 1 << 62

Events = Sequence[tuple[Hashable, int | None]]
"""(key, bytes) allocates; (key, 0) or (key, None) frees."""

# Options torch knows that change nothing here: they are about pinned host memory, locks or graphs.
_WITHOUT_EFFECT: Final = {
    "pinned_use_background_threads", "pinned_max_round_threshold_mb", "pinned_max_cached_size_mb",
    "pinned_use_cuda_host_register", "pinned_num_register_threads", "pinned_reserve_segment_size_mb",
    "pinned_free_catch_all", "release_lock_on_cudamalloc", "graph_capture_record_stream_reuse",
}  # fmt: skip
_SIZES: Final = {
    "max_split_size_mb": "max_split_size",
    "max_non_split_rounding_mb": "max_non_split_rounding",
    "large_segment_size_mb": "large_segment_size",
}


def _slots(value: Any) -> Any:
    """One number of divisions stands for all slots; JSON brings a list."""
    if type(value) is int:
        return (value,) * SLOTS
    return tuple(value) if isinstance(value, list) else value


class AllocatorSettings(Value):
    """What `PYTORCH_CUDA_ALLOC_CONF` sets, as far as it decides about device memory. Sizes in bytes."""

    max_split_size: Positive | None = None
    """Blocks of this size or more are never split and serve only requests of this size or more;
    None for no limit. Whole MiB, at least `large_segment_size`."""
    max_non_split_rounding: Positive | None = None
    """A request of `max_split_size` or more takes a cached block less than this much larger; None for
    `large_segment_size`, which it cannot be below."""
    roundup_power2_divisions: Annotated[
        tuple[Annotated[int, Field(ge=0)], ...],
        BeforeValidator(_slots),
        Field(min_length=SLOTS, max_length=SLOTS),
    ] = (0,) * SLOTS
    """Steps between powers of two that requests are rounded up to, per slot: [1, 2) MiB and all below,
    [2, 4) MiB, and so on, the last for 32 GiB and above. Powers of two; 0 and 1 are off. A single
    number is meant for every slot."""
    expandable_segments: bool = False
    """One range of addresses per pool that grows and shrinks by pages, in place of separate segments."""
    garbage_collection_threshold: float = Field(default=0.0, ge=0.0, lt=1.0)
    """Fraction of the cap above which a miss first frees cached segments, oldest first; 0 for off."""
    large_segment_size: int = Field(default=20 * MIB, gt=LARGE_REQUEST)
    """Segment of requests between 1 and 10 MiB, and page of the expandable large pool. Whole MiB."""

    @model_validator(mode="after")
    def _agree(self) -> Self:
        for name in _SIZES.values():
            size = getattr(self, name)
            if size is not None and (size % MIB or size < self.large_segment_size):
                raise ValueError(
                    f"{name} must be whole MiB and at least large_segment_size, got {size} bytes with "
                    f"large_segment_size={self.large_segment_size}; choose e.g. {name}={64 * MIB}"
                )
        for divisions in self.roundup_power2_divisions:
            if divisions & (divisions - 1):
                raise ValueError(
                    f"roundup_power2_divisions must be powers of two, or 0 for off, got {divisions}; "
                    "choose e.g. 4"
                )
        return self

    @classmethod
    def parse(cls, text: str) -> Self:
        """Settings from the text of `PYTORCH_CUDA_ALLOC_CONF` or `PYTORCH_ALLOC_CONF`.

        Refuses what torch 2.13 refuses, and numbers that torch reads by their first digits (`64x`).
        """
        fields: dict[str, Any] = {}
        for option in re.split(r",(?![^\[]*\])", "".join(text.split()).removesuffix(",")):
            name, _, value = option.partition(":")
            if name in _SIZES:
                fields[_SIZES[name]] = _whole(name, value) * MIB
            elif name == "expandable_segments":
                if value not in ("True", "False"):
                    raise ConfigError(f"{name} must be True or False, got {value!r}; write {name}:True")
                fields[name] = value == "True"
            elif name == "garbage_collection_threshold":
                if not re.fullmatch(r"0?\.[0-9]*[1-9][0-9]*", value, re.ASCII):
                    raise ConfigError(f"{name} must be between 0 and 1, got {value!r}; write e.g. {name}:0.8")
                fields[name] = float(value)
            elif name == "roundup_power2_divisions":
                fields[name] = _parse_divisions(value)
            elif option and name not in _WITHOUT_EFFECT and option != "backend:native":
                known = ", ".join((*_SIZES, "expandable_segments", "garbage_collection_threshold"))
                raise ConfigError(
                    f"allocator option {option!r} cannot be replayed; remove it (known: {known}, "
                    "roundup_power2_divisions), and give a memory fraction as the cap of the replay"
                )
        return cls(**fields)

    def round_size(self, size: int) -> int:
        """Bytes of the block that a request of `size` bytes needs."""
        if size < MIN_BLOCK:
            return MIN_BLOCK
        exponent = size.bit_length() - 1
        divisions = self.roundup_power2_divisions[min(max(exponent - 20, 0), SLOTS - 1)]
        step = (1 << exponent) // divisions if divisions > 1 and size > MIN_BLOCK * divisions else MIN_BLOCK
        return -(-size // step) * step

    def segment_size(self, rounded: int) -> int:
        """Bytes asked of the driver when no cached block serves a request of `rounded` bytes."""
        if rounded <= SMALL:
            return SMALL_SEGMENT
        if rounded < LARGE_REQUEST:
            return self.large_segment_size
        return -(-rounded // ROUND_LARGE) * ROUND_LARGE


def _whole(name: str, text: str) -> int:
    if not re.fullmatch(r"[0-9]{1,12}", text, re.ASCII):
        raise ConfigError(f"{name} must be a whole number, got {text!r}; write e.g. {name}:64")
    return int(text)


def _parse_divisions(text: str) -> tuple[int, ...]:
    """`4`, or `[256:1,512:2,>:4]`: in MiB, the first also for all below it, `>` for all above the last.

    A slot between two that are named stays off, as in torch.
    """
    name = "roundup_power2_divisions"
    if not text.startswith("["):
        return (_whole(name, text),) * SLOTS
    if not text.endswith("]"):
        raise ConfigError(f"{name} has no closing bracket, got {text!r}; write e.g. [256:1,512:2,>:4]")
    slots, above = [0] * SLOTS, 0
    for position, pair in enumerate(text[1:-1].removesuffix(",").split(",") if text != "[]" else ()):
        start, _, value = pair.partition(":")
        divisions = _whole(name, value)
        if start == ">":
            slots[above:] = [divisions] * (SLOTS - above)
            continue
        mebibytes = _whole(name, start)
        if mebibytes.bit_count() != 1:
            raise ConfigError(
                f"{name}: intervals start at powers of two, got {start!r}; write e.g. 256:{value}"
            )
        slot = min(mebibytes.bit_length() - 1, SLOTS - 1)
        slots[slot] = divisions
        if position == 0:
            slots[:slot] = [divisions] * slot
        above = slot + 1
    return tuple(slots)


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

    def __init__(self, page: int, expandable: bool) -> None:
        self.page = page
        self.blocks: dict[int, Block] = {}
        self.free: list[tuple[int, int]] = []
        self.unmapped: list[int] = []
        self.top = 0
        self.searches = 0
        if expandable:
            # Torch reserves 1.125 times the card's memory in addresses; more than any card has is the
            # same, but for programs that fragment all of it.
            self.put(self.new(page << 40, mapped=False))

    def new(self, size: int, mapped: bool = True) -> Block:
        block = self.blocks[self.top] = Block(self.top, size, mapped)
        self.top += size
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

    `cap` is what `set_per_process_memory_fraction` or the card allows, in bytes: `reserved` never
    exceeds it. With expandable segments torch compares the fraction with the segment that it would
    open otherwise, and the card with the pages it maps; a cap here stands for both, so what fits here
    fits either way.
    """

    def __init__(self, settings: AllocatorSettings | None = None, cap: int | None = None) -> None:
        self.settings = settings or AllocatorSettings()
        self.cap = cap
        self.allocated = self.requested = self.reserved = 0
        self.peak_allocated = self.peak_requested = self.peak_reserved = 0
        self.retries = 0
        """Times that all cached segments were released, whether or not that helped (num_alloc_retries)."""
        self.next_cap: int | None = None
        """Up to below this cap everything so far would have gone the same way; None for any larger cap."""
        self._expandable = self.settings.expandable_segments
        self._max_split = self.settings.max_split_size or _NO_LIMIT
        self._slack = self.settings.max_non_split_rounding or self.settings.large_segment_size
        self._collects = cap is not None and self.settings.garbage_collection_threshold > 0
        self._small = _Pool(SMALL_SEGMENT, self._expandable)
        self._large = _Pool(self.settings.large_segment_size, self._expandable)

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
        if not self._allows(segment):
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
        if not self._allows(size):
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


def replay(events: Events, settings: AllocatorSettings | None = None, cap: int | None = None) -> Replay:
    """Runs `events` from an empty allocator to their end, or to where memory runs out."""
    allocator = Allocator(settings, cap)
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
