"""An attention over lists of blocks as few kernel calls, where flash attention takes sequences of different
lengths that lie one behind the other.

A row is the queries of one block, a *lane* the heads that share a row's list: a kv head with the query heads
that read it, or one query head where each has lists of its own. Each row and lane is a *pair*: a sequence
whose queries are those of its heads, one head after the other, and whose keys are its list's blocks. Some
lanes and rows together are a *part*, which is one kernel call. Under a causal mask the rows' own blocks are
calls of their own, whose results the lists are merged into, so that no list needs a mask.

Sizes are ints, or NumPy arrays for many configs at once. Imports no torch.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import NamedTuple

from attention.config import AttentionConfig
from attention.sizes.arrays import Count, any_of, ceil_div, maximum, minimum, up, where
from attention.sizes.row_bounds import Rows, rows_of
from attention.sizes.shape import MOST_VIEWS, Shape
from attention.sizes.whole_calls import (
    CHANNELS,
    PART_SHARE,
    PART_WORKSPACES,
    SINGLE,
    CallPart,
    WholeCall,
    backward_cut,
    block_window_calls,
    floor_bytes,
)

INDEX = 8
"""Bytes of a number in an index."""
SUMMED_QUERIES = 128
"""Queries of dq in single precision that flash attention's backward adds to those of each sequence."""


class ListRows(NamedTuple):
    """Rows of blocks with equally many queries."""

    name: str
    first: Count
    rows: Count
    tokens: Count
    """Of a row."""
    width: Count
    """Most blocks of a list that are gathered; 0 where there is nothing to gather."""

    @property
    def exists(self) -> Count:
        return (self.rows > 0) * (self.width > 0) * 1


class ListCalls(NamedTuple):
    """Sizes of an attention over lists."""

    size: Count
    """Tokens a block, at most those of the sequence."""
    lanes: Count
    repeat: Count
    """Query heads of a lane."""
    lanes_of_kv: Count
    """Lanes that read a kv head."""
    own: tuple[WholeCall, ...]
    """Calls over the rows' own blocks, where those are apart from the lists."""
    groups: tuple[ListRows, ListRows]
    """All rows but a short last one, and that one."""
    seen: Count
    """Most rows of a lane that list one block. A bound."""
    before: Count = 0
    """Blocks of keys before the first row's own."""

    def blocks(self, shape: Shape) -> Count:
        """Of a sequence, a short last one too."""
        return ceil_div(shape.seq, self.size)

    def sequences(self, lanes: Count, rows: Count, shape: Shape) -> Count:
        """That a part of so many lanes and rows has at most: its pairs, and what their lists copy beyond the
        end."""
        beyond = minimum(rows, self.seen) * (shape.seq % self.size > 0) * (not self.own)
        return lanes * (rows + beyond)


class ListPart(NamedTuple):
    """What a kernel is given at once."""

    lanes: range
    rows: range
    tokens: int
    """Queries of a head in a row."""
    blocks: slice
    """Of each list; all of them, or some of the one list that there is."""
    first: bool
    """Whether nothing came before in these queries."""


class ListCut(NamedTuple):
    """How parts are cut."""

    lanes: Count
    rows: Count
    blocks: Count
    """Fewer than a list has only where one list is too long for the room."""

    def number(self, group: ListRows, lanes: Count) -> Count:
        """Parts of a group over so many lanes; of whole lists at least as many as there are."""
        parts = ceil_div(lanes, self.lanes) * ceil_div(group.rows, self.rows)
        return parts * ceil_div(maximum(group.width, 1), self.blocks) * group.exists


def list_calls(config: AttentionConfig, shape: Shape) -> ListCalls | None:
    """The sizes of an attention over lists where `shape.windows` is "any"; None for another."""
    pattern = config.pattern
    if shape.windows != "any" or pattern is None:
        return None
    if config.variant == "block_sparse" and pattern.pattern_type != "dilated_sparse":
        return None
    return calls_of_rows(rows_of(config, shape.seq, shape.causal), shape)


def calls_of_rows(rows: Rows, shape: Shape, before: Count = 0) -> ListCalls:
    """The sizes from the widest rows of a layout, or of what is chosen. `before`: blocks of keys before the
    own one of the first query, if queries are those of some keys."""
    size = minimum(rows.size, shape.seq)
    whole, short = shape.queries // size, shape.queries % size
    blocks = ceil_div(shape.seq, size)
    full, widest = maximum(rows.span, rows.full_lists), maximum(rows.span, rows.lists)
    if shape.causal:  # of what a row sees, its own block is a call by itself
        full, widest = minimum(full, shape.seq // size) - 1, minimum(widest, blocks) - 1
    else:
        full = widest = minimum(widest, blocks)
    lanes = shape.heads if rows.own else shape.kv_heads
    asking = shape._replace(seq=shape.queries, origin=0)
    own = tuple(
        call._replace(start=call.start + shape.origin, key_start=call.key_start + before * size)
        for call in (block_window_calls(size, 0, 0, asking) if shape.causal else ())
    )
    return ListCalls(
        size,
        lanes,
        shape.heads // lanes,
        lanes // shape.kv_heads,
        tuple(call for call in own if any_of(call.exists)),
        (
            ListRows("lists", 0, whole, size, full),
            ListRows("last lists", whole, (short > 0) * 1, short, widest),
        ),
        rows.seen,
        before,
    )


def own_backward_cut(call: WholeCall, shape: Shape) -> CallPart:
    """Parts of the calls over own blocks, which take about as much room as those of lists: two thirds for the
    kernel's scratch, the rest for what it returns."""
    return backward_cut(call, shape, part_room(shape, backward=True) * 2 // 3)


def part_room(shape: Shape, *, backward: bool) -> Count:
    """Bytes that a part may take, in backward with the sums of dk and dv: a share of q, k, v and out, and of
    their gradients."""
    return PART_WORKSPACES * shape.workspace + floor_bytes(shape) // PART_SHARE * (2 if backward else 1)


def forward_pair(calls: ListCalls, group: ListRows, shape: Shape) -> Count:
    """Bytes that a pair takes at most: its keys and values, and their index or its queries and results."""
    keys, queries = group.width * calls.size, calls.repeat * group.tokens
    dim, e, padded = shape.head_dim, shape.itemsize, up(shape.head_dim, CHANNELS)
    pads = (2 * keys + queries) * padded * e * (padded > dim)
    rows = queries * ((dim + padded) * e + 2 * SINGLE) + pads
    return 2 * keys * dim * e + maximum(INDEX * keys, rows)


def backward_pair(calls: ListCalls, group: ListRows, shape: Shape) -> Count:
    """As `forward_pair`, with gradients and the kernel's sums of dq."""
    keys, queries = group.width * calls.size, calls.repeat * group.tokens
    dim, e, padded = shape.head_dim, shape.itemsize, up(shape.head_dim, CHANNELS)
    pads = (2 * keys + 3 * queries) * padded * e * (padded > dim)
    sums = (queries + SUMMED_QUERIES) * (up(dim, 32) + 1) * SINGLE
    rows = queries * (3 * dim * e + SINGLE) + (queries + 2 * keys) * padded * e + pads + sums
    return 2 * keys * dim * e + maximum(INDEX * keys, rows)


def forward_cut_of(calls: ListCalls, group: ListRows, shape: Shape) -> ListCut:
    """Parts of the forward pass, over any lanes."""
    return _cut(group, forward_pair(calls, group, shape), part_room(shape, backward=False), calls.lanes)


class ListSums(NamedTuple):
    """The sums of dk and dv that backward holds at once."""

    kv_heads: Count
    itemsize: Count
    """Bytes of a number: in single precision or better, but where those of one kv head would be too many."""

    def bytes_of_each(self, calls: ListCalls, shape: Shape) -> Count:
        """Of dk, and of dv."""
        return self.kv_heads * calls.blocks(shape) * calls.size * shape.head_dim * self.itemsize


def backward_sums(calls: ListCalls, shape: Shape) -> ListSums:
    """Of one kv head, or of several where all their lists are one part."""
    room = part_room(shape, backward=True)
    narrow, wide = (
        2 * ListSums(1, itemsize).bytes_of_each(calls, shape) for itemsize in (shape.itemsize, shape.wide)
    )
    fits = 5 * wide <= 4 * room  # the rest is for parts
    main = calls.groups[0]
    a_head = where(fits, wide, narrow) + calls.lanes_of_kv * main.rows * backward_pair(calls, main, shape)
    kv_heads = minimum(maximum(room // a_head, 1), shape.kv_heads)
    return ListSums(_even(shape.kv_heads, kv_heads), where(fits, shape.wide, shape.itemsize))


def backward_cut_of(calls: ListCalls, group: ListRows, sums: ListSums, shape: Shape) -> ListCut:
    """Parts of the backward pass, over the lanes of the kv heads whose sums are held."""
    room = part_room(shape, backward=True) - 2 * sums.bytes_of_each(calls, shape)
    lanes = sums.kv_heads * calls.lanes_of_kv
    return _cut(group, backward_pair(calls, group, shape), maximum(room, shape.workspace), lanes)


def _cut(group: ListRows, a_pair: Count, room: Count, lanes: Count) -> ListCut:
    """Pairs of `a_pair` bytes that fit the room, as many rows as there are first; parts are equally large."""
    rows, a_pair = maximum(group.rows, 1), maximum(a_pair, 1)
    pairs = minimum(room // a_pair, MOST_VIEWS // 2)
    few = maximum(pairs, 1)
    width = maximum(group.width, 1)
    return ListCut(
        _even(lanes, minimum(maximum(few // rows, 1), lanes)),
        _even(rows, minimum(few, rows)),
        where(pairs > 0, width, maximum(width * room // a_pair, 1)),
    )


def _even(total: Count, most: Count) -> Count:
    """The size of parts of at most `most` each that differ little."""
    return ceil_div(total, ceil_div(total, most))


def parts(calls: ListCalls, group: ListRows, cut: ListCut, lanes: range) -> Iterator[ListPart]:
    """The parts of a group over some lanes; of ints."""
    if not group.exists:
        return
    for lane in range(lanes.start, lanes.stop, cut.lanes):
        some = range(lane, min(lane + cut.lanes, lanes.stop))
        stop = group.first + group.rows
        for row in range(group.first, stop, cut.rows):
            for block in range(0, group.width, cut.blocks):
                yield ListPart(
                    some,
                    range(row, min(row + cut.rows, stop)),
                    group.tokens,
                    slice(block, block + cut.blocks),
                    first=block == 0 and not calls.own,
                )
