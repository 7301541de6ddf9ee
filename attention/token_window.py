"""Windows that end at the token, and global tokens, as tiles of views. Imports no torch.

How rows are cut is in `attention/sizes/token_tiles.py`.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace

from attention.block_sparse import head_spans, shared_calls
from attention.ops.program import Call, Tile
from attention.sizes.shape import Shape, Span
from attention.sizes.token_tiles import TokenRows, TokenWindow, token_rows


def tiles(window: TokenWindow, shape: Shape) -> Iterator[Tile]:
    """The tiles of a window, in the order of their tokens."""
    rows = token_rows(window, shape)
    for start in range(min(shape.origin, rows.begin), rows.begin, rows.global_unit):
        yield _global_tile(start, min(rows.global_unit, rows.begin - start), rows.global_unit, shape)
    number = 0
    while number < rows.rows:
        slides = rows.slide <= number < rows.slide_stop
        count = min(rows.together, rows.slide_stop - number) if slides else 1
        yield _window_tile(rows, number, count, shape)
        number += count


def _global_tile(start: int, length: int, unit: int, shape: Shape) -> Tile:
    """Global tokens as queries, over all keys or, if causal, over those up to their own."""
    queries = head_spans(start, length, 1, 0, shape)
    if not shape.causal:
        return _tile(_seen(queries, Span(0, shape.seq, heads=shape.kv_heads), "global rows", shape))
    own = Call(queries, Span(start, length, heads=shape.kv_heads), "global triangle", "causal")
    kind = "global rows" if length == unit else "last global row"
    return _tile([own, *_seen(queries, Span(0, start, heads=shape.kv_heads), kind, shape)])


def _window_tile(rows: TokenRows, number: int, count: int, shape: Shape) -> Tile:
    """Rows number, number + 1, ..., which slide if they are several."""
    row, unit = rows.row(number), rows.unit
    start = rows.begin + row.start
    queries = head_spans(start, row.queries, count, unit, shape)
    short = row.queries < unit
    edge, kind = ("last edge", "last view") if short else ("edge", "views" if count > 1 else "view")

    def keys(first: int, stop: int) -> Span:
        return Span(rows.begin + first, stop - first, batch=count, batch_step=unit, heads=shape.kv_heads)

    def band(first: int, stop: int, kind: str, column: int) -> Call:
        return Call(queries, keys(first, stop), kind, "band", column=column, band=rows.band)

    calls: list[Call] = []
    column = max(rows.left - row.start, 0)
    hides = row.start + row.queries - 1 > rows.left or row.start + rows.right + 1 < rows.tokens
    if not rows.cut and hides:
        calls.append(band(row.first, row.stop, kind, column))
    else:
        if row.behind == row.queries:
            calls.append(Call(queries, keys(row.full_stop, row.stop), "triangle", "causal"))
        elif row.behind:
            calls.append(band(row.full_stop, row.stop, edge, unit))
        if row.before:
            calls.append(band(row.first, row.full, edge, column))
        middle = keys(row.full, row.full_stop)
        if rows.wide and count > 1:
            calls += shared_calls(start, count, unit, middle.pick(0, 1), shape)
        else:
            calls += _seen(queries, middle, kind, shape)
    tokens = head_spans(start, (count - 1) * unit + row.queries, 1, 0, shape)
    calls += _seen(tokens, Span(0, rows.begin, heads=shape.kv_heads), "global columns", shape)
    return _tile(calls)


def _seen(queries: tuple[Span, ...], keys: Span, kind: str, shape: Shape) -> list[Call]:
    """Calls of queries that see all of the keys, cut to what a kernel may copy."""
    return [Call(queries, part, kind) for part in shape.key_ranges(keys)]


def _tile(calls: list[Call]) -> Tile:
    calls[0] = replace(calls[0], first=True)
    queries = calls[0].queries[0]
    return Tile(queries.start, queries.stop, tuple(calls), merge=len(calls) > 1)
