"""The extent of a program from its calls themselves: of programs that no closed form knows. No torch."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from functools import lru_cache

from attention.ops.program import Call, Gather, Tile
from attention.sizes.shape import Shape, Span
from attention.sizes.tiles import Cut, Extent, Kind, cut


def kind_of(call: Call, shape: Shape, merge: bool) -> Kind:
    """A call as a kind of its own; `merge`: whether its tile merges."""
    span, keys = call.queries[0], call.keys
    gathers = isinstance(keys, Gather)
    apart = isinstance(keys, Gather) and keys.blocks.ndim > 2
    groups: int | None = None
    if isinstance(keys, Span):
        groups = keys.heads
    elif not apart:
        groups = min(span.heads, shape.kv_heads)
    hides = call.mask == "band" or (call.mask == "diagonal" and call.edge < keys.length - 1)
    masked = span.length * hides
    if call.mask == "tail":
        masked = span.batch * (span.heads if apart else 1)
    together = span.batch == 1 or span.batch_step == span.length
    return Kind(
        call.kind,
        span.heads,
        span.batch,
        span.length,
        keys.length,
        keys.unit,
        gathers,
        step=keys.batch_step if isinstance(keys, Span) else None,
        whole=call.mask == "causal",
        dense=(span.heads == shape.heads and span.step == 1 and together) * 1,
        masked=masked,
        own=apart,
        later=span.batch * span.length * (merge and not call.first),
        largest=(span.batch, keys.length),
        groups=groups,
    )


def extent_of(tiles: Iterable[Tile], shape: Shape) -> Extent:
    """The extent of tiles: each size of call is a kind, numbered within those of its name."""
    kinds: dict[Kind, None] = {}
    tokens = rows = band = edge = 0
    merges = False
    bands = False
    for tile in tiles:
        tokens, merges = max(tokens, tile.stop - tile.start), merges or tile.merge
        for call in tile.calls:
            kind = kind_of(call, shape, tile.merge)
            kinds[kind] = None
            if call.mask == "band":
                bands, band = True, call.band
                rows = max(rows, call.queries[0].length, call.column + call.keys.length - call.band)
            elif call.mask == "diagonal" and kind.masked:
                # Where the queries' own block is short, its positions past the end count too.
                rows, edge = max(rows, call.keys.length - call.edge), max(edge, call.edge)
    numbers: dict[str, int] = {}
    named = []
    for kind in kinds:
        number = numbers[kind.name] = numbers.get(kind.name, 0) + 1
        named.append(kind._replace(name=f"{kind.name} {number}"))
    mask = (rows, rows + (band if bands else edge)) if rows else (0, 0)
    return Extent(tokens, tuple(named), merges * 1, mask, band=bands)


@lru_cache(maxsize=4096)
def own_cut(kind: Kind, shape: Shape) -> Cut:
    """How backward cuts a call that is a kind of its own."""
    return cut(kind, shape)


def cut_of(call: Call, shape: Shape, cuts: Mapping[str, Cut] | None) -> Cut:
    """How backward cuts a call: as the largest of its kind, or by its own sizes where there are no kinds."""
    if cuts is not None:
        return cuts[call.kind]
    return own_cut(kind_of(call, shape, merge=False), shape)
