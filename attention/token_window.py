"""Windows that end at the token, and global tokens, as tiles of views. Imports no torch.

How rows are cut is in `attention/sizes/token_tiles.py`; with rows of one token no call needs a mask.
"""

from __future__ import annotations

from collections.abc import Iterator

from attention.block_sparse import head_spans
from attention.ops.program import Call, Tile
from attention.sizes.shape import Shape, Span
from attention.sizes.token_tiles import Row, TokenRows, TokenWindow, token_rows


def tiles(window: TokenWindow, shape: Shape) -> Iterator[Tile]:
    """The tiles of a window, in the order of their tokens."""
    rows = token_rows(window, shape)
    if shape.causal:
        yield from _causal_global_rows(rows, shape)
    else:
        for start in range(0, rows.begin, rows.global_unit):
            length = min(rows.global_unit, rows.begin - start)
            queries = head_spans(start, length, 1, 0, shape)
            calls = _by_keys(queries, 0, shape.seq, "global rows", shape)
            calls[0] = _first(calls[0])
            yield _tile(calls)
    number = 0
    while number < rows.rows:
        slides = rows.slide <= number < rows.slide_stop
        count = min(rows.together, rows.slide_stop - number) if slides else 1
        yield _window_tile(rows, number, count, "views" if slides else "view", shape)
        number += count


def _causal_global_rows(rows: TokenRows, shape: Shape) -> Iterator[Tile]:
    unit = rows.global_unit
    for start in range(0, rows.begin, unit):
        length = min(unit, rows.begin - start)
        queries = head_spans(start, length, 1, 0, shape)
        own = Span(start, length, heads=shape.kv_heads)
        kind = "global rows" if length == unit else "last global row"
        before = _by_keys(queries, 0, start, kind, shape) if start else []
        yield _tile([Call(queries, own, "global triangle", "causal", first=True), *before])


def _window_tile(rows: TokenRows, number: int, count: int, kind: str, shape: Shape) -> Tile:
    """Rows number, number + 1, ..., which slide if they are several."""
    row, step = rows.row(number), rows.unit
    if row.queries < step:
        kind = "last view"
    start = rows.begin + row.start
    queries = head_spans(start, row.queries, count, step, shape)

    def keys(first: int, stop: int) -> Span:
        return Span(rows.begin + first, stop - first, batch=count, batch_step=step, heads=shape.kv_heads)

    if rows.cut:
        calls = _cut_row(rows, row, queries, keys(row.full, row.full_stop), kind, shape)
    else:
        hides = row.start + row.queries - 1 > rows.left or row.start + rows.right + 1 < rows.tokens
        calls = [Call(queries, keys(row.first, row.stop), kind)]
        if hides and 
