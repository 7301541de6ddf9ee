"""Dense and dilated attention as tiles of strided views. Imports no torch.

Branch (s, r): head h takes positions p of each segment with (p mod s) mod r == h mod r. Those are
tokens `segment + o + t r` for heads `o, o + r, ...`: a strided view, with nothing to copy. Dense
attention is the branch (seq, 1). Heads are counted from `first_head` of the shape on.

Queries are cut into tiles, and a tile goes through all branches before the next tile begins, so
that what is held at a time does not depend on the number of branches.
"""

from __future__ import annotations

from collections.abc import Iterator

from attention.ops.program import Call, Mask, Tile
from attention.sizes.shape import Shape, Span
from attention.sizes.tiles import branch_kind, grouped_heads


def tiles(branches: tuple[tuple[int, int], ...], shape: Shape) -> Iterator[Tile]:
    """The tiles of a dilated attention, smallest rates first."""
    ordered = sorted(branches, key=lambda branch: branch[1])
    for start in range(shape.origin, shape.seq, shape.tile_tokens):
        stop = min(start + shape.tile_tokens, shape.seq)
        calls = tuple(
            call
            for order, (length, rate) in enumerate(ordered)
            for call in _branch_calls(order, length, rate, start, stop, shape)
        )
        yield Tile(start, stop, calls, merge=not all(call.first for call in calls))


def _branch_calls(order: int, length: int, rate: int, start: int, stop: int, shape: Shape) -> Iterator[Call]:
    """Calls of one branch for the queries of tokens start..stop; `order`: its place among the branches."""
    repeat = shape.heads // shape.kv_heads
    kind, first = branch_kind(order), order == 0
    period, kv_heads = grouped_heads(rate, shape)
    for head in range(min(period, shape.heads)):
        heads = len(range(head, shape.heads, period))
        queries = Span(0, 0, step=rate, head=head, heads=heads, head_step=period)
        if period % repeat:  # the heads of a group are in one call
            keys = queries._replace(head=0, heads=kv_heads, head_step=1)
        else:
            keys = queries._replace(head=head // repeat, head_step=period // repeat)
        offset = (shape.first_head + head) % rate
        segment = start - start % length
        while segment < stop:
            whole = _whole_segments(segment, length, start, stop, shape.seq)
            if whole:
                count = _positions(offset, length, rate)
                views = {"start": segment + offset, "length": count, "batch": whole, "batch_step": length}
                if count:
                    mask: Mask = "causal" if shape.causal else "none"
                    yield Call((queries._replace(**views),), keys._replace(**views), kind, mask, first)
                segment += whole * length
                continue
            end = min(segment + length, shape.seq)
            skip = _positions(offset, max(start - segment, 0), rate)
            count = _positions(offset, min(stop, end) - segment, rate) - skip
            if count > 0:
                part = queries._replace(start=segment + offset + skip * rate, length=count)
                visible = keys._replace(start=segment + offset)
                if shape.causal:
                    own = keys._replace(start=part.start, length=count)
                    yield Call((part,), own, kind, "causal", first)
                    visible = visible._replace(length=skip)
                else:
                    visible = visible._replace(length=_positions(offset, end - segment, rate))
                for n, keys_part in enumerate(shape.key_ranges(visible)):
                    alone = first and n == 0 and not shape.causal
                    yield Call((part,), keys_part, branch_kind(order, before=shape.causal), "none", alone)
            segment = end


def _whole_segments(segment: int, length: int, start: int, stop: int, seq: int) -> int:
    """How many full segments from `segment` on lie inside the tile start..stop."""
    if segment < start:
        return 0
    return (min(stop, seq) - segment) // length


def _positions(offset: int, length: int, rate: int) -> int:
    """How many of the positions offset, offset + rate, ... lie below `length`."""
    return max(-(-(length - offset) // rate), 0)
