"""A rank's attention as parts: some of its queries over the keys of one source. Imports no torch.

A part is the program of the whole sequence cut to a section, its own queries and the source's keys, with
tokens counted by where they lie in the source's tensor. Whatever runs the program of one device runs a part.
"""

from __future__ import annotations

from bisect import bisect_right
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import replace
from functools import partial
from itertools import chain, takewhile
from typing import NamedTuple

import numpy as np

from attention.ops.extent import extent_of
from attention.ops.program import Call, Gather, Tile, Tiles
from attention.sections import TokenSection, clipped, sections_of
from attention.sharding.needs import Source
from attention.sizes.arrays import Ints
from attention.sizes.shape import Shape, Span
from attention.sizes.tiles import Extent


class Placement(NamedTuple):
    """Where a source's keys lie in its tensor [rows, lanes, D]: token t of `runs` (first token, one past the
    last, first row), which are in order, at row first row + (t - first token) // rate. At rate 1 a lane is a
    kv head. At rate r it is a kv head for query heads h of one remainder h % r, and holds tokens of that
    remainder alone: lanes are query heads where a group has no two of one remainder, else r a kv head."""

    runs: tuple[tuple[int, int, int], ...]
    total: int
    rate: int = 1

    def row(self, token: int) -> int:
        """The row of a token."""
        run = self.runs[bisect_right(self.runs, token, key=lambda one: one[0]) - 1]
        assert run[0] <= token < run[1], (token, self)
        return run[2] + (token - run[0]) // self.rate

    def blocks(self, blocks: Ints, size: int) -> Ints:
        """The blocks of rows that blocks of the sequence are."""
        if len(self.runs) == 1:
            begin, _, row = self.runs[0]
            return blocks + (row - begin) // size
        begins, rows = (np.array([run[n] for run in self.runs]) for n in (0, 2))
        runs = np.searchsorted(begins, blocks * size, side="right") - 1
        moved: Ints = blocks + ((rows - begins) // size)[runs]
        return moved

    def has_blocks(self, size: int) -> bool:
        """Whether blocks of the sequence are blocks of rows."""
        return all((row - begin) % size == 0 for begin, _, row in self.runs)

    def of(self, begin: int, end: int) -> slice:
        """The rows of tokens that follow each other."""
        first = self.row(begin)
        return slice(first, first + -(-(end - begin) // self.rate))

    def lanes(self, shape: Shape) -> int:
        """Lanes of its tensor, for a whole sequence's shape."""
        return int(shape.kv_heads) * lanes_per_head(self.rate, int(shape.heads // shape.kv_heads))


def lanes_per_head(rate: int, repeat: int) -> int:
    """Lanes of a kv head that `repeat` query heads read, at a rate."""
    return min(rate, repeat)


def own_placement(begin: int, end: int) -> Placement:
    """The rows of tokens begin..end, one after the other."""
    return Placement(((begin, end, 0),), end - begin)


def source_placement(source: Source) -> Placement:
    """The rows of one source."""
    begin, end, rate = source[1:]
    return Placement(((begin, end, 0),), -(-(end - begin) // rate), rate)


def joined_placement(
    sources: Sequence[Source], pieces: Sequence[tuple[int, int]] = (), unit: int = 1
) -> tuple[Placement, int | None]:
    """(rows of sources that ascend and have one rate, and of own `pieces` among them, in one tensor; the row
    at which those begin, if there are any). Blocks of `unit` tokens of the sequence are blocks of rows.
    Sources that adjoin, and begin in stride, are one run."""
    rate = sources[0].rate if sources else 1
    ranges = sorted([(begin, end) for _, begin, end, _ in sources] + list(pieces))
    runs: list[tuple[int, int, int]] = []
    total = 0
    for begin, end in ranges:
        if runs and runs[-1][1] == begin and (begin - runs[-1][0]) % rate == 0:
            runs[-1] = (runs[-1][0], end, runs[-1][2])
        else:
            total += (begin - total) % unit
            runs.append((begin, end, total))
        total += -(-(end - begin) // rate)
    rows = Placement(tuple(runs), total, rate)
    return rows, rows.row(pieces[0][0]) if pieces else None


class PartProgram:
    """A program of the whole sequence cut to some queries and to the keys of a source, tokens as its rows."""

    def __init__(
        self,
        make: Callable[[Shape], Iterable[Tile]],
        queries: tuple[int, int],
        rows: Placement,
        whole: Shape,
        documents: Sequence[Sequence[int]] | None = None,
    ) -> None:
        """`make` makes the whole program's tiles; `queries`: (first, one past the last) token; `whole`: the
        shape of the whole sequence; `documents`: lengths of each batch item's, or of all if there is one."""
        self._make, self.queries, self.rows, self._whole = make, queries, rows, whole
        keys = (rows.runs[0][0], rows.runs[-1][1])
        lengths = documents or ((int(whole.seq),),)
        items = [_sections(item, queries, keys) for item in lengths]
        self._programs = {
            sections: Tiles(partial(self._cut_tiles, sections), with_backward=False) for sections in items
        }
        self._items = [self._programs[sections] for sections in items]
        own = any(begin <= queries[0] < end for begin, end, _ in rows.runs)
        # A query's place is that of its own key, where that is there.
        self._origin = rows.row(queries[0]) if own else rows.total - (queries[1] - queries[0])

    @property
    def shape(self) -> Shape:
        """The sizes of the part, for the executor. Its queries are not the last of its keys."""
        return self._whole._replace(
            seq=self.rows.total, origin=self._origin, kv_heads=self.rows.lanes(self._whole)
        )

    def tiles(self, item: int, shape: Shape) -> Iterable[Tile]:
        """The tiles of a batch item, cut for `shape`: that of the part or its `backward()`."""
        program = self._items[item if len(self._items) > 1 else 0]
        return program(item, shape)

    def extent(self, shape: Shape) -> Extent:
        """The largest sizes of its calls, of any batch item."""
        tiles = (program(0, shape) for program in self._programs.values())
        return extent_of(chain.from_iterable(tiles), shape)

    def exists(self) -> bool:
        """Whether any query sees any of the keys."""
        shape = self.shape
        return any(next(iter(program(0, shape)), None) for program in self._programs.values())

    def _cut_tiles(self, sections: Sequence[TokenSection], shape: Shape) -> Iterator[Tile]:
        whole = shape._replace(seq=self._whole.seq, origin=self.queries[0], kv_heads=self._whole.kv_heads)
        made = takewhile(lambda tile: tile.start < self.queries[1], self._make(whole))
        for tile in clipped(made, sections, whole, self.rows.has_blocks):
            yield self._placed(tile)

    def _placed(self, tile: Tile) -> Tile:
        """The tile with tokens as rows."""
        move = self._origin - self.queries[0]
        calls = tuple(self._placed_call(call, move) for call in tile.calls)
        return Tile(tile.start + move, tile.stop + move, calls, tile.merge)

    def _placed_call(self, call: Call, move: int) -> Call:
        queries = tuple(span._replace(start=span.start + move) for span in call.queries)
        keys = call.keys
        if isinstance(keys, Gather):
            placed_blocks = self.rows.blocks(keys.blocks, keys.size)
            return replace(call, queries=queries, keys=Gather(placed_blocks, keys.size, keys.heads))
        rate = self.rows.rate
        placed = keys._replace(start=self.rows.row(keys.start))
        if rate > 1:
            placed = placed._replace(step=keys.step // rate, batch_step=keys.batch_step // rate)
            head, step = self._lanes(call.queries[0], keys)
            placed = placed._replace(head=head, head_step=step)
        return replace(call, queries=queries, keys=placed)

    def _lanes(self, queries: Span, keys: Span) -> tuple[int, int]:
        """(first lane, from one to the next) of a call's keys at a rate above 1."""
        repeat = int(self._whole.heads // self._whole.kv_heads)
        if lanes_per_head(self.rows.rate, repeat) == repeat:
            return queries.head, queries.head_step  # a lane for each query head
        rate = self.rows.rate
        return keys.head * rate + queries.head % rate, keys.head_step * rate


def _sections(
    lengths: Sequence[int], queries: tuple[int, int], keys: tuple[int, int]
) -> tuple[TokenSection, ...]:
    """The sections of documents, cut to some queries and keys."""
    cut = (
        TokenSection(
            max(one.start, queries[0]),
            min(one.stop, queries[1]),
            max(one.begin, keys[0]),
            min(one.end, keys[1]),
        )
        for one in sections_of(lengths, 0)
    )
    return tuple(one for one in cut if one.start < one.stop and one.begin < one.end)
