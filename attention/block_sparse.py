"""Block-sparse attention as tiles: overlapping views where a row's blocks are adjacent, gathers
where they are not. Imports no torch.

Consecutive rows join into one call if their keys move on by the same number of blocks a row (0: the
same keys for all, so their queries are one long view; 1: a sliding window) or, for gathers, if their
lists are equally long. A list too long for the workspace is cut, and its parts are merged.
"""

from __future__ import annotations

import itertools
from collections.abc import Iterator
from dataclasses import replace

import numpy as np
import numpy.typing as npt

from attention.layout import Layout
from attention.ops.program import Call, Gather, Mask, Tile
from attention.sizes.row_bounds import Rows
from attention.sizes.shape import WIDE, Shape, Span


def tiles(layout: Layout, rows: Rows, shape: Shape) -> Iterator[Tile]:
    """The tiles of a layout, in row order, from the row of the first query on. `rows`: its widest."""
    counts = layout.counts
    begins, ends = layout.row_ptr[:-1], layout.row_ptr[1:]
    firsts = layout.cols[begins].astype(np.int64)
    adjacent = (layout.cols[ends - 1].astype(np.int64) - firsts + 1 == counts) & (rows.span > 0)
    begin = shape.origin // rows.size
    for first, last, shift in _groups(layout, counts, firsts, adjacent):
        if last <= begin:
            continue
        first = max(first, begin)
        width = int(counts[first])
        if adjacent[first]:
            yield from _span_tiles(rows, int(firsts[first]), width, first, last, shift, shape)
        else:
            lists = layout.cols[begins[first] : ends[last - 1]].astype(np.int64).reshape(-1, width)
            yield from gather_tiles(lists, first, rows, shape)


def _groups(
    layout: Layout,
    counts: npt.NDArray[np.int64],
    firsts: npt.NDArray[np.int64],
    adjacent: npt.NDArray[np.bool_],
) -> Iterator[tuple[int, int, int]]:
    """(first row, one past the last row, shift in blocks a row) of rows that share a call."""
    rows = layout.blocks
    ends_at_tail = layout.cols[layout.row_ptr[1:] - 1] == rows - 1
    kind = np.stack([counts, adjacent, ends_at_tail, np.arange(rows) == rows - 1])
    # Step i leads from row i to row i + 1. Gathers join whatever their first blocks are.
    shift = np.where(adjacent[1:], np.diff(firsts), 0)
    # Two rows on either side of a segment's end may be further apart: their keys share nothing.
    joins = (kind[:, 1:] == kind[:, :-1]).all(axis=0) & (shift >= 0) & (shift <= 1)
    alike = np.where(joins, shift, -1)
    run_ends = np.append(np.flatnonzero(np.diff(alike)) + 1, rows - 1)
    row = 0
    while row < rows:
        stop = row + 1
        if stop < rows and joins[row]:
            stop = int(run_ends[np.searchsorted(run_ends, row, side="right")]) + 1
        yield row, stop, int(shift[row]) if stop > row + 1 else 0
        row = stop


def _span_tiles(
    rows: Rows, key: int, width: int, first: int, last: int, shift: int, shape: Shape
) -> Iterator[Tile]:
    """Rows first..last, whose keys are `width` adjacent blocks from block `key`, moving on by `shift`."""
    size = rows.size
    queries = min(size, shape.seq - first * size)
    keys = Span(key * size, min((key + width) * size, shape.seq) - key * size, heads=shape.kv_heads)
    together = shape.chunk_rows(rows)
    if shift == 0:  # one long view of queries over the same keys
        stop = min(last * size, shape.seq)
        for start in range(first * size, stop, together * size):
            end = min(start + together * size, stop)
            short = "last view" if shape.causal and end - start < size else "view"
            kind = "long view" if end - start > size else short
            yield _span_tile(head_spans(start, end - start, 1, 0, shape), keys, kind, rows, shape)
        return
    if shift == 1 and shape.goes_wide(rows) and width >= WIDE * together:
        for row in range(first, last, together):
            yield _wide_tile(key + row - first, width, row, min(row + together, last), size, shape)
        return
    together = shape.span_rows(rows)
    for row in range(first, last, together):
        views = min(together, last - row)
        moved = keys._replace(
            start=keys.start + (row - first) * shift * size, batch=views, batch_step=shift * size
        )
        yield _span_tile(head_spans(row * size, queries, views, size, shape), moved, "views", rows, shape)


def _wide_tile(key: int, width: int, first: int, last: int, size: int, shape: Shape) -> Tile:
    """Rows first..last, row r seeing `width` blocks from block `key + r - first`, by what they share. Under
    `causal` each row's own block is a part by itself."""
    width -= shape.causal
    keys = Span(key * size, width * size, heads=shape.kv_heads)
    calls = list(shared_calls(first * size, last - first, size, keys, shape))
    calls[0] = replace(calls[0], first=True)
    if shape.causal:
        own = head_spans(first * size, size, last - first, size, shape)
        keys = Span(first * size, size, batch=last - first, batch_step=size, heads=shape.kv_heads)
        calls.append(Call(own, keys, "own blocks", "causal"))
    return Tile(first * size, last * size, tuple(calls), merge=len(calls) > 1)


def shared_calls(start: int, count: int, size: int, keys: Span, shape: Shape) -> Iterator[Call]:
    """Calls of `count` rows of `size` queries from token `start` on, of which the first sees `keys` and each
    other as many, `size` further on than the one before: over what all see, then over what each half of the
    rows sees in common beyond, and so on. Kernels are faster the more queries they get at once."""

    def part(begin: int, end: int, low: int, high: int) -> Iterator[Call]:
        """Rows begin..end over tokens low..high."""
        queries = head_spans(start + begin * size, (end - begin) * size, 1, 0, shape)
        for some in shape.key_ranges(keys._replace(start=low, length=high - low)):
            yield Call(queries, some, "long view")

    def halves(begin: int, end: int) -> Iterator[Call]:
        if end - begin < 2:
            return
        middle = (begin + end) // 2
        low, high = keys.start, keys.start + keys.length  # row r sees r * size further on
        yield from part(begin, middle, low + (middle - 1) * size, low + (end - 1) * size)
        yield from part(middle, end, high + begin * size, high + middle * size)
        yield from halves(begin, middle)
        yield from halves(middle, end)

    yield from part(0, count, keys.start + (count - 1) * size, keys.start + keys.length)
    yield from halves(0, count)


def _span_tile(queries: tuple[Span, ...], keys: Span, kind: str, rows: Rows, shape: Shape) -> Tile:
    """A tile of queries over a span of keys, whose last block is their own if causal."""
    calls = []
    if shape.causal:
        own, masked = queries[0].length, shape.mask_blocks(rows)
        last = min(keys.length, own + max(masked - 1, 0) * rows.size)
        if last > shape.pack_tokens(keys.batch):
            last = own
        begin = keys.length - last
        last_keys = keys.cut(begin, keys.length)
        if masked:
            calls.append(Call(queries, last_keys, kind, "diagonal", first=True))
        else:
            calls.append(Call(queries, last_keys, "own blocks", "causal", first=True))
        keys = keys.cut(0, begin)
    for part in shape.key_ranges(keys):
        calls.append(Call(queries, part, kind, first=not calls))
    return Tile(queries[0].start, queries[0].stop, tuple(calls), merge=len(calls) > 1)


def gather_tiles(lists: npt.NDArray[np.int64], first: int, rows: Rows, shape: Shape) -> Iterator[Tile]:
    """Rows from `first` on with equally long ascending lists of key blocks: [rows, A] shared by all
    heads, or [rows, H, A], one list a query head."""
    size, width = rows.size, lists.shape[-1]
    queries = min(size, shape.seq - first * size)
    step, cut = shape.chunk_rows(rows), shape.list_blocks(rows)
    tail = (shape.seq - 1) // size if shape.seq % size else -1
    masked = shape.mask_blocks(rows)
    for row in range(0, len(lists), step):
        part = lists[row : row + step]
        views, start = len(part), (first + row) * size
        by_group = head_spans(start, queries, views, size, shape)
        spans = by_group
        if rows.own:
            spans = (Span(start, queries, batch=views, batch_step=size, heads=shape.heads),)

        def gather(begin: int, end: int, part: npt.NDArray[np.int64] = part) -> Gather:
            return Gather(part[..., begin:end], size, shape.heads)

        calls = []
        end = width
        if shape.causal and not masked:  # the queries' own block
            own = Span(start, queries, batch=views, batch_step=size, heads=shape.kv_heads)
            calls.append(Call(by_group, own, "own blocks", "causal", first=True))
            end -= 1
        elif shape.causal:
            end -= min(width, masked, cut)
            calls.append(Call(spans, gather(end, width), "lists", "diagonal", first=True))
        for begin in range(0, end, cut):
            keys = gather(begin, min(begin + cut, end))
            mask: Mask = "tail" if (keys.blocks[..., -1] == tail).any() else "none"
            calls.append(Call(spans, keys, "lists", mask, first=not calls))
        stop = start + (views - 1) * size + queries
        yield Tile(start, stop, tuple(calls), merge=len(calls) > 1)


def chosen_tiles(lists: npt.NDArray[np.int64], widest: Rows, shape: Shape) -> Iterator[Tile]:
    """Tiles of one batch item from [H, blocks, kept] lists: rows of equal count together, and the
    last row, whose queries may be fewer, by itself."""
    rows = lists.transpose(1, 0, 2)
    counts = (rows[:, 0] >= 0).sum(axis=-1)
    alone = np.arange(len(rows)) == len(rows) - 1
    breaks = np.flatnonzero((np.diff(counts) != 0) | alone[1:]) + 1
    for first, last in itertools.pairwise([0, *breaks.tolist(), len(rows)]):
        yield from gather_tiles(rows[first:last, :, : counts[first]], first, widest, shape)


def head_spans(start: int, length: int, batch: int, step: int, shape: Shape) -> tuple[Span, ...]:
    """Query spans over the keys of all kv heads: one of all heads where the kernel takes groups, else one
    for each query head of a group."""
    return tuple(
        Span(start, length, batch=batch, batch_step=step, head=head, heads=shape.call_heads, head_step=repeat)
        for head, repeat in shape.head_groups()
    )
