"""Programs of tiles cut to sections: to the last queries of a sequence, and to documents. Imports no torch.

A program is written for all pairs of a sequence. A section is some of its queries and the keys that they may
see as far as the pattern lets them: the queries that there are, a document's tokens. Views of a call that
lose nothing stay together, and the others get calls of their own. Of a triangle whose first queries are cut
off, a rectangle and a smaller triangle are left.
"""

from __future__ import annotations

from bisect import bisect_right
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import replace
from functools import partial
from itertools import chain, groupby, pairwise
from typing import NamedTuple

import numpy as np

from attention.ops.extent import extent_of
from attention.ops.program import Call, Gather, Tile, Tiles
from attention.sizes.shape import Shape, Span
from attention.sizes.tiles import Extent

FEW_RUNS = 4
"""Most runs of adjacent blocks in what is left of a list that are read where they are; else it is copied."""


class TokenSection(NamedTuple):
    """Queries `start` to `stop` of a sequence, which see no keys but `begin` to `end`."""

    start: int
    stop: int
    begin: int
    end: int


def sections_of(lengths: Sequence[int], origin: int) -> tuple[TokenSection, ...]:
    """The sections of documents of these lengths, one after the other, whose queries begin at `origin`."""
    edges = [0]
    for length in lengths:
        edges.append(edges[-1] + length)
    return tuple(
        TokenSection(max(begin, origin), end, begin, end) for begin, end in pairwise(edges) if end > origin
    )


def clipped(
    tiles: Iterable[Tile], sections: Sequence[TokenSection], shape: Shape, lists: Callable[[int], bool] = bool
) -> Iterator[Tile]:
    """The tiles cut to sections, which come in the order of their queries; one for each that a tile meets.
    `lists`: whether keys may be listed by blocks of a size; those of any may by default."""
    stops = [section.stop for section in sections]
    for tile in tiles:
        at = bisect_right(stops, tile.start)
        while at < len(sections) and sections[at].start < tile.stop:
            section = sections[at]
            at += 1
            fits = all(lists(call.keys.size) for call in tile.calls if isinstance(call.keys, Gather))
            # One query needs no mask.
            if tile.stop - tile.start > 1 and fits and _holds(section, tile, shape.seq):
                yield tile
                continue
            start, stop = max(tile.start, section.start), min(tile.stop, section.stop)
            calls: list[Call] = []
            for call in tile.calls:
                calls += _clipped_call(call, section, shape, lists)
            if calls:
                calls = _ordered(_joined(calls, shape))
                yield Tile(start, stop, tuple(calls), merge=not all(call.first for call in calls))


def _holds(section: TokenSection, tile: Tile, seq: int) -> bool:
    """Whether a tile has no query and no key that is outside of a section."""
    if tile.start < section.start or tile.stop > section.stop:
        return False
    if section.begin == 0 and section.end == seq:
        return True
    bounds = (_key_bounds(call.keys, seq) for call in tile.calls)
    return all(section.begin <= begin and end <= section.end for begin, end in bounds)


def _key_bounds(keys: Span | Gather, seq: int) -> tuple[int, int]:
    """(first, one past the last) token among keys."""
    if isinstance(keys, Span):
        return keys.start, keys.stop
    return int(keys.blocks.min()) * keys.size, min((int(keys.blocks.max()) + 1) * keys.size, seq)


class _View(NamedTuple):
    """What a section leaves of a call's view: queries `first` to `stop` of it and keys `begin` to `end`."""

    first: int
    stop: int
    begin: int
    end: int


def _clipped_call(
    call: Call, section: TokenSection, shape: Shape, lists: Callable[[int], bool]
) -> list[Call]:
    span, keys = call.queries[0], call.keys
    views = range(span.batch)
    queries = [_inside(span, n, section.start, section.stop) for n in views]
    if isinstance(keys, Gather):
        return _clipped_lists(call, queries, section, shape, lists=lists(keys.size))
    parts: list[Call] = []
    cuts = [_View(*queries[n], *_inside(keys, n, section.begin, section.end)) for n in views]
    for cut, group in groupby(views, key=cuts.__getitem__):
        if cut.first >= cut.stop or cut.begin >= cut.end:
            continue
        some = list(group)
        picked = call
        if len(some) < len(views):
            low, high = some[0], some[-1] + 1
            picked = replace(
                call, queries=tuple(one.pick(low, high) for one in call.queries), keys=keys.pick(low, high)
            )
        parts += _of_view(picked, cut)
    return parts


def _inside(span: Span, view: int, begin: int, end: int) -> tuple[int, int]:
    """(first, one past the last) position of a view whose token is one of begin..end."""
    base = span.start + view * span.batch_step
    first, stop = (max(-((base - edge) // span.step), 0) for edge in (begin, end))
    return min(first, span.length), min(stop, span.length)


def _of_view(call: Call, cut: _View) -> list[Call]:
    """A call over spans cut alike in all its views."""
    keys = call.keys
    assert isinstance(keys, Span)
    first, stop, begin, end = cut

    def part(low: int, high: int, left: int, right: int, **changes: object) -> list[Call]:
        """Queries low..high over keys left..right."""
        if low >= high or left >= right:
            return []
        some = tuple(one.cut(low, high) for one in call.queries)
        return [replace(call, queries=some, keys=keys.cut(left, right), **changes)]  # type: ignore[arg-type]

    if (first, stop, begin, end) == (0, call.queries[0].length, 0, keys.length) and stop - first > 1:
        return [call]
    if call.mask == "none":
        return part(first, stop, begin, end)
    if call.mask == "band":
        return _of_band(call, cut)
    if call.mask == "diagonal" and stop - first > 1 and end >= stop + call.edge:
        # The last keys that the queries see are their own.
        return part(first, stop, begin, stop + call.edge)
    # A triangle: query t sees keys up to t + edge.
    edge = call.edge
    corner = max(first + edge, begin)
    seen = part(first, stop, begin, min(corner, end), mask="none")
    last = min(stop + edge, end)
    if corner < last:
        seen += part(corner - edge, last - edge, corner, last, mask="causal" if last - corner > 1 else "none")
        seen += part(last - edge, stop, corner, last, mask="none")
    return seen


def _of_band(call: Call, cut: _View) -> list[Call]:
    """A call under a `band` mask: query t sees the keys at columns t to t + band."""
    keys = call.keys
    assert isinstance(keys, Span)
    first, stop, begin, end = cut
    # A query that sees none of the keys has no place in a call: kernels give it a log-sum-exp of their own.
    first, stop = max(first, call.column + begin - call.band), min(stop, call.column + end)
    begin = max(begin, first - call.column)
    end = min(end, stop + call.band - call.column)
    if begin >= end or first >= stop:
        return []
    queries, column = stop - first, call.column + begin - first
    whole = column >= queries - 1 and column + end - begin - 1 <= call.band
    some = tuple(one.cut(first, stop) for one in call.queries)
    cut_call = replace(call, queries=some, keys=keys.cut(begin, end), column=column)
    return [replace(cut_call, mask="none", column=0, band=0) if whole else cut_call]


def _clipped_lists(
    call: Call, queries: Sequence[tuple[int, int]], section: TokenSection, shape: Shape, *, lists: bool
) -> list[Call]:
    """A call over lists that all heads share. Rows that lose nothing stay together; of the others the blocks
    that are whole are listed again, and those that are cut are spans: without `lists` all blocks."""
    keys = call.keys
    assert isinstance(keys, Gather)
    size, length = keys.size, call.queries[0].length
    blocks = keys.blocks
    assert blocks.ndim == 2
    ends = np.minimum((blocks + 1) * size, shape.seq)
    inside = (blocks * size >= section.begin) & (ends <= section.end)
    kept = [lists and queries[n] == (0, length) and bool(inside[n].all()) for n in range(len(queries))]
    parts: list[Call] = []
    for whole, group in groupby(range(len(queries)), key=kept.__getitem__):
        some = list(group)
        if whole:
            low, high = some[0], some[-1] + 1
            picked = tuple(one.pick(low, high) for one in call.queries)
            parts.append(replace(call, queries=picked, keys=Gather(blocks[low:high], size, keys.heads)))
            continue
        for n in some:
            parts += _of_list(call, n, queries[n], section, shape, lists=lists)
    return parts


def _of_list(
    call: Call, row: int, queries: tuple[int, int], section: TokenSection, shape: Shape, *, lists: bool
) -> Iterator[Call]:
    """What a section leaves of one row of a call over lists."""
    keys = call.keys
    assert isinstance(keys, Gather)
    first, stop = queries
    if first >= stop:
        return
    blocks, size = keys.blocks[row], keys.size
    picked = tuple(one.pick(row, row + 1) for one in call.queries)
    if call.mask == "diagonal":  # the last block is the queries' own
        begin = int(blocks[-1]) * size
        own = Span(begin, picked[0].length, heads=shape.kv_heads)
        cut = _View(first, stop, *_inside(own, 0, section.begin, section.end))
        yield from _of_view(replace(call, queries=picked, keys=own, mask="causal"), cut)
        blocks = blocks[:-1]
    some = tuple(one.cut(first, stop) for one in picked)
    rest = replace(call, queries=some, mask="none")
    begins = np.maximum(blocks * size, section.begin)
    ends = np.minimum(np.minimum((blocks + 1) * size, shape.seq), section.end)
    left = begins < ends
    blocks, begins, ends = blocks[left], begins[left], ends[left]
    if not len(blocks):
        return
    breaks = np.flatnonzero(begins[1:] != ends[:-1]) + 1
    runs = list(pairwise([0, *breaks.tolist(), len(blocks)]))
    spans = [(int(begins[low]), int(ends[high - 1])) for low, high in runs]
    if len(runs) > FEW_RUNS and lists:
        whole = ends - begins == size
        yield replace(rest, keys=Gather(blocks[whole][None], size, keys.heads))
        spans = [(int(a), int(b)) for a, b in zip(begins[~whole], ends[~whole], strict=True)]
    for begin, end in spans:
        for part in shape.key_ranges(Span(begin, end - begin, heads=shape.kv_heads)):
            yield replace(rest, keys=part)


def _joined(calls: list[Call], shape: Shape) -> list[Call]:
    """The calls; those of equal queries that see all of adjoining keys are one, as far as kernels copy."""
    joined: list[Call] = []
    for call in calls:
        for n, other in enumerate(joined):
            keys = _union(other, call)
            if keys is not None and keys.length <= shape.pack_tokens(1):
                joined[n] = replace(other, keys=keys)
                break
        else:
            joined.append(call)
    return joined


def _union(one: Call, other: Call) -> Span | None:
    """The keys of two calls as one span; None if they are none."""
    a, b = one.keys, other.keys
    if one.mask != "none" or other.mask != "none" or one.queries != other.queries:
        return None
    if not (isinstance(a, Span) and isinstance(b, Span)) or a.batch > 1 or b.batch > 1:
        return None
    low, high = (a, b) if a.start < b.start else (b, a)
    joins = low.start + low.length * low.step == high.start
    if not joins or low._replace(start=0, length=0) != high._replace(start=0, length=0):
        return None
    return low._replace(length=low.length + high.length)


def _ordered(calls: Sequence[Call]) -> list[Call]:
    """The calls, `first` where none came before in some query of theirs."""
    before: dict[tuple[int, int, int], list[tuple[int, int]]] = {}
    ordered = []
    for call in calls:
        span = call.queries[0]
        start, stop = span.start, span.stop
        met = any(
            _share_heads(heads, one) and any(low < stop and start < high for low, high in ranges)
            for one in map(_heads, call.queries)
            for heads, ranges in before.items()
        )
        for one in map(_heads, call.queries):
            before.setdefault(one, []).append((start, stop))
        ordered.append(call if call.first != met else replace(call, first=not met))
    return ordered


def _heads(span: Span) -> tuple[int, int, int]:
    return span.head, span.heads, span.head_step


def _share_heads(one: tuple[int, int, int], other: tuple[int, int, int]) -> bool:
    """Whether two sets of (first head, heads, step) may have heads in common."""
    (head, _, step), (other_head, _, other_step) = one, other
    return step != other_step or head % step == other_head % step


class CutProgram:
    """A program cut to the documents of each batch item and to the last queries of the sequence."""

    def __init__(
        self, make: Callable[[Shape], Iterable[Tile]], lengths: Sequence[Sequence[int]], origin: int
    ) -> None:
        """`make` makes the whole program's tiles, cut for a shape; `lengths`: of the documents of each batch
        item, or of all if there is one."""
        items = [sections_of(item, origin) for item in lengths]
        self._programs = {
            sections: Tiles(partial(_cut_tiles, make, sections), with_backward=False) for sections in items
        }
        self._items = [self._programs[sections] for sections in items]

    def tiles(self, item: int, shape: Shape) -> Iterable[Tile]:
        """The tiles of a batch item."""
        program = self._items[item if len(self._items) > 1 else 0]
        return program(item, shape)

    def extent(self, shape: Shape) -> Extent:
        """The largest sizes of its calls, of any batch item."""
        tiles = (program(0, shape) for program in self._programs.values())
        return extent_of(chain.from_iterable(tiles), shape)


def _cut_tiles(
    make: Callable[[Shape], Iterable[Tile]], sections: Sequence[TokenSection], shape: Shape
) -> Iterator[Tile]:
    return clipped(make(shape), sections, shape)
