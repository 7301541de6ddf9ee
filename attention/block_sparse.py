"""Block-sparse attention as tiles: overlapping views where a row's blocks are adjacent, gathers
where they are not. Imports no torch.

Consecutive rows join into one call if their keys move on by the same number of blocks a row (0: the
same keys for all, so their queries are one long view; 1: a sliding window) or, for gathers, if their
lists are equally long. A list too long for the workspace is cut, and its parts are merged.
"""

from __future__ import annotations

from collections.abc import Iterator

import numpy as np
import numpy.typing as npt

from attention.layout import Layout
from attention.ops.program import Call, Gather, Mask, Shape, Span, Tile

TALL = 1024
"""Queries that make a kernel call fast; more do not help."""
WIDE = 4
"""Rows share what they see if it is at least this many times as many blocks as there are rows."""
MOST_VIEWS = 65_535
"""CUDA grids end here: views of one call."""


def tiles(layout: Layout, shape: Shape) -> Iterator[Tile]:
    """The tiles of a layout, in row order."""
    counts = layout.counts
    begins, ends = layout.row_ptr[:-1], layout.row_ptr[1:]
    firsts = layout.cols[begins].astype(np.int64)
    adjacent = layout.cols[ends - 1].astype(np.int64) - firsts + 1 == counts
    for first, last, shift in _groups(layout, counts, firsts, adjacent):
        if adjacent[first]:
            yield from _span_tiles(layout, int(firsts[first]), int(counts[first]), first, last, shift, shape)
        else:
            width = int(counts[first])
            lists = layout.cols[begins[first] : ends[last - 1]].astype(np.int64).reshape(-1, width)
            yield from gather_tiles(lists, first, layout.block_size, shape)


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
    joins = (kind[:, 1:] == kind[:, :-1]).all(axis=0) & (shift >= 0)
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
    layout: Layout, key: int, width: int, first: int, last: int, shift: int, shape: Shape
) -> Iterator[Tile]:
    """Rows first..last, whose keys are `width` adjacent blocks from block `key`, moving on by `shift`."""
    size = layout.block_size
    queries = min(size, shape.seq - first * size)
    keys = Span(key * size, min((key + width) * size, shape.seq) - key * size, heads=shape.kv_heads)
    if shift == 0:  # one long view of queries over the same keys
        stop = min(last * size, shape.seq)
        for start in range(first * size, stop, max(shape.tile_tokens // size, 1) * size):
            end = min(start + max(shape.tile_tokens // size, 1) * size, stop)
            yield _span_tile(_head_spans(start, end - start, 1, 0, shape), keys, shape)
        return
    rows = max(TALL // size, 1)
    if shift == 1 and rows > 1 and width >= WIDE * rows:
        for row in range(first, last, rows):
            yield _wide_tile(key + row - first, width, row, min(row + rows, last), size, shape)
        return
    together = shape.fast // (queries * shape.token_bytes)
    if shape.packs:
        together = min(together, shape.pack_bytes // (2 * keys.length * shape.kv_token_bytes))
    together = min(max(together, 1), MOST_VIEWS)
    for row in range(first, last, together):
        views = min(together, last - row)
        moved = keys._replace(
            start=keys.start + (row - first) * shift * size, batch=views, batch_step=shift * size
        )
        yield _span_tile(_head_spans(row * size, queries, views, size, shape), moved, shape)


def _wide_tile(key: int, width: int, first: int, last: int, size: int, shape: Shape) -> Tile:
    """Rows first..last, row r seeing `width` blocks from block `key + r - first`, by what they share:
    the blocks that all see, then what each half of the rows sees in common, and so on. Kernels are
    faster the more queries they get at once. Under `causal` each row's own block is a part by itself."""
    width -= shape.causal
    calls: list[Call] = []

    def add(begin: int, end: int, low: int, high: int) -> None:
        """Rows begin..end over blocks low..high."""
        queries = _head_spans(begin * size, (end - begin) * size, 1, 0, shape)
        for part in shape.key_ranges(Span(low * size, (high - low) * size, heads=shape.kv_heads)):
            calls.append(Call(queries, part, first=not calls))

    def halve(begin: int, end: int) -> None:
        if end - begin < 2:
            return
        middle = (begin + end) // 2
        at = key - first  # row r sees blocks at + r ..
        add(begin, middle, at + middle - 1, at + end - 1)
        add(middle, end, at + begin + width, at + middle + width)
        halve(begin, middle)
        halve(middle, end)

    add(first, last, key + last - first - 1, key + width)
    halve(first, last)
    if shape.causal:
        own = _head_spans(first * size, size, last - first, size, shape)
        keys = Span(first * size, size, batch=last - first, batch_step=size, heads=shape.kv_heads)
        calls.append(Call(own, keys, "causal"))
    return Tile(first * size, last * size, tuple(calls), merge=len(calls) > 1)


def _span_tile(queries: tuple[Span, ...], keys: Span, shape: Shape) -> Tile:
    """A tile of queries over a span of keys, whose last block is their own if causal."""
    *before, last = shape.key_ranges(keys, tail=queries[0].length)
    calls = [Call(queries, last, "diagonal" if shape.causal else "none", first=True)]
    calls += [Call(queries, part) for part in before]
    return Tile(queries[0].start, queries[0].stop, tuple(calls), merge=len(calls) > 1)


def gather_tiles(lists: npt.NDArray[np.int64], first: int, size: int, shape: Shape) -> Iterator[Tile]:
    """Rows from `first` on with equally long ascending lists of key blocks: [rows, A] shared by all
    heads, or [rows, H, A], one list a query head."""
    shared = lists.ndim == 2
    rows, width = lists.shape[0], lists.shape[-1]
    queries = min(size, shape.seq - first * size)
    limit = shape.list_bytes
    block_bytes = 2 * size * (shape.kv_token_bytes if shared else shape.token_bytes)
    together = limit // (width * block_bytes + queries * shape.token_bytes)
    tail = (shape.seq - 1) // size if shape.seq % size else -1
    step = max(min(together, MOST_VIEWS), 1)
    for row in range(0, rows, step):
        part = lists[row : row + step]
        start = (first + row) * size
        spans = (
            _head_spans(start, queries, len(part), size, shape)
            if shared
            else (Span(start, queries, batch=len(part), batch_step=size, heads=shape.heads),)
        )
        cut = width if together else max(limit // block_bytes, 1)
        calls = []
        for begin in range(0, width, cut):
            blocks = part[..., begin : begin + cut]
            mask: Mask = "none"
            if shape.causal and begin + cut >= width:
                mask = "diagonal"
            elif (blocks[..., -1] == tail).any():
                mask = "tail"
            calls.append(Call(spans, Gather(blocks, size, shape.heads), mask, first=begin == 0))
        stop = start + (len(part) - 1) * size + queries
        yield Tile(start, stop, tuple(calls), merge=len(calls) > 1)


def _head_spans(start: int, length: int, batch: int, step: int, shape: Shape) -> tuple[Span, ...]:
    """Query spans that read kv heads 0, 1, ...: one for each query head of a group."""
    return tuple(
        Span(start, length, batch=batch, batch_step=step, head=head, heads=shape.kv_heads, head_step=repeat)
        for head, repeat in shape.head_groups()
    )
