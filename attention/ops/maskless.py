"""Attention without masks: tiles whose calls compute no pair that does not see each other. No tensors.

A kernel hides a key by giving it the weight zero, and zero times NaN or infinity is NaN: a query would
learn of a key that it may not see. Here a causal triangle of T queries is halved: the later half of the
queries sees all keys of the earlier half, and either half is a triangle again. All rectangles of one
size lie at even distances, so that they are the views of one call. Many small calls take several times
as long; `attention/ops/execute.py` says when they are worth it.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import NamedTuple

from attention.ops.program import Call, Tile
from attention.sizes.shape import Shape, Span


def maskless(tile: Tile, shape: Shape) -> Tile:
    """The tile without `causal`, `diagonal` and `band` calls. (Of a `tail` call's hidden positions nothing is
    left: `attention.ops.views.fetch`.)"""
    calls = [part for call in tile.calls for part in _parts(call, shape)]
    return Tile(tile.start, tile.stop, tuple(calls), merge=True)


def _parts(call: Call, shape: Shape) -> Iterator[Call]:
    # A part is taken as it is only where it comes before all others: with infinite numbers in it, adding
    # it to nothing is not the same.
    queries, keys = call.queries, call.keys
    if call.mask == "band":
        assert isinstance(keys, Span)
        yield from _band(call, keys)
        return
    if call.mask not in ("causal", "diagonal"):
        yield call
        return
    if call.mask == "causal":
        assert isinstance(keys, Span)
        own = [(queries, keys)]
    elif isinstance(keys, Span):
        own = [(queries, keys.cut(call.edge, keys.length))]
    else:
        own = [_own_blocks(queries[0], shape)]
    for spans, block in own:
        yield from _triangle(spans, block, call.kind, call.first)
    if call.mask == "diagonal" and call.edge:
        # The last block of a list is the queries' own, so that what is before has no end of the sequence.
        yield Call(queries, keys.cut(0, call.edge), call.kind)


def _band(call: Call, keys: Span) -> Iterator[Call]:
    """Query by query: the queries of a view are views of one each, as far as those see equally many keys."""
    span = call.queries[0]
    for t in range(span.length):
        begin, end = call.seen(t)
        queries = tuple(span.cut(t, t + 1) for span in call.queries)
        yield Call(queries, keys.cut(begin, end), call.kind, first=call.first)


def _own_blocks(queries: Span, shape: Shape) -> tuple[tuple[Span, ...], Span]:
    """(queries, keys) of the blocks that queries with lists of keys are themselves in."""
    spans = tuple(
        queries._replace(head=head, heads=shape.call_heads, head_step=step)
        for head, step in shape.head_groups()
    )
    return spans, queries._replace(head=0, heads=shape.kv_heads, head_step=1)


class _Rectangles(NamedTuple):
    """`height` queries from position `query` of every view, and `width` keys from position `key`; and those
    further on by height + width, `copies` in all (by one, where a single query meets itself)."""

    query: int
    key: int
    height: int
    width: int
    copies: int


def _triangle(queries: tuple[Span, ...], keys: Span, kind: str, first: bool) -> Iterator[Call]:
    """Calls in which query t of every view sees keys 0..t."""
    length = keys.length
    yield from _calls(queries, keys, kind, _Rectangles(0, 0, 1, 1, length), first)
    half = 1
    while half < length:
        pairs, rest = divmod(length, 2 * half)
        yield from _calls(queries, keys, kind, _Rectangles(half, 0, half, half, pairs))
        if rest > half:
            begin = pairs * 2 * half
            yield from _calls(queries, keys, kind, _Rectangles(begin + half, begin, rest - half, half, 1))
        half *= 2


def _calls(
    queries: tuple[Span, ...], keys: Span, kind: str, rectangles: _Rectangles, first: bool = False
) -> Iterator[Call]:
    """Calls over the rectangles of a triangle."""
    query, key, height, width, copies = rectangles
    apart = 1 if query == key else height + width

    def spread(span: Span, begin: int, length: int) -> list[Span]:
        step = apart * span.step
        start = span.start + begin * span.step
        if span.batch == 1 or copies * step == span.batch_step:
            places = span._replace(start=start, length=length, batch=span.batch * copies, batch_step=step)
            return [places] if copies else []
        if span.batch <= copies:
            return [
                span._replace(start=start + n * span.batch_step, length=length, batch=copies, batch_step=step)
                for n in range(span.batch)
            ]
        return [span._replace(start=start + n * step, length=length) for n in range(copies)]

    for *parts, visible in zip(
        *(spread(span, query, height) for span in queries), spread(keys, key, width), strict=True
    ):
        yield Call(tuple(parts), visible, kind, first=first)
