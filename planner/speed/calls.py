"""The kernel calls of each program in closed form: of which kinds, how many of each, how large on average.
Ints, or arrays of many candidates. Imports no torch.

`attention/block_sparse.py`, `attention/dilated.py` and `attention/adaptive.py` write the programs; what is
left out here is that a last block or segment may be short, beside what it costs in tokens.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import NamedTuple

from attention.sizes.arrays import Amount, any_of, maximum, minimum, where
from attention.sizes.list_calls import (
    ListCalls,
    backward_cut_of,
    backward_sums,
    forward_cut_of,
    own_backward_cut,
)
from attention.sizes.row_bounds import Rows
from attention.sizes.shape import WIDE, Shape
from attention.sizes.tiles import grouped_heads
from attention.sizes.token_tiles import TokenRows, TokenWindow, token_rows
from attention.sizes.whole_calls import CallPart, WholeCall, by_cudnn, forward_cut
from planner.speed.gpu_kernels import visible_keys
from planner.speed.row_runs import Run, rounded_up


class Calls(NamedTuple):
    """Kernel calls of one kind in a pass over one batch item: N views of T queries and K keys for H heads,
    by their means."""

    number: Amount
    views: Amount
    heads: Amount
    queries: Amount
    keys: Amount
    spans: Amount = 1
    """Kernel calls over the same keys: query heads that share a kv head."""
    causal: Amount = 0
    """1 if the kernel's own causal mask applies, so that it computes about half the pairs."""
    later: Amount = 0
    """Share of the calls whose result is merged into an earlier one's."""
    step: Amount = 0
    """Tokens from one view's keys to the next; 0 if views share none."""
    unit: Amount = 0
    """Tokens of a gathered block; 0 of views."""
    largest: tuple[Amount, Amount] = (1, 1)
    """(views, keys) of the program's largest gather, by which backward cuts all."""
    groups: Amount | None = None
    """Key and value heads; None for as many as heads."""
    summed: Amount = 0
    """Of a call that the kernel gets as it is in backward: its rows of dk, of which as many are of dv, that
    are added to what is there."""
    cudnn: Amount = 0
    """1 if cuDNN's attention runs it."""
    held: Amount | None = None
    """Keys that lie under it where a query sees `keys` of them by its mask; None for `keys`."""

    @property
    def kv_heads(self) -> Amount:
        return self.heads if self.groups is None else self.groups


class Program(NamedTuple):
    """Calls and tiles of a pass over one batch item."""

    calls: list[Calls]
    tiles: Amount


def whole(shape: Shape, batch: int) -> Program:
    """Dense attention in one call, which takes the batch too."""
    causal, groups = int(shape.causal), shape.kv_heads
    call = Calls(1, batch, shape.heads, shape.queries, shape.seq, causal=causal, groups=groups)
    return Program([call], 0)


def whole_calls(
    calls: Sequence[WholeCall],
    shape: Shape,
    batch: int,
    kernel_keys: int,
    cut_of: Callable[[WholeCall, Shape], CallPart],
) -> Program:
    """Calls over the whole sequence by the kernel's own masks; `kernel_keys`: those that it takes at a
    time; `cut_of`: how calls are cut in this pass. See `attention/ops/whole_calls.py`."""
    kinds = []
    for call in calls:
        cut = cut_of(call, shape)
        heads, kv_heads = call.heads(shape), call.kv_heads(shape)
        views = maximum(call.views, 1)
        slices = rounded_up(maximum(call.queries, 1), cut.queries)
        parts = rounded_up(views, cut.views) * rounded_up(kv_heads, cut.kv_heads) * slices
        # All batch items are one call where that is all of the attention's tokens.
        together = call.covers(shape) * (parts == 1)
        lanes = where(cut.views < views, heads, heads / rounded_up(kv_heads, cut.kv_heads))
        queries, keys = maximum(call.queries, 1), maximum(call.keys, 1)
        kinds.append(
            Calls(
                call.exists * call.offsets * (parts + (1 / batch - parts) * together),
                where(together, batch * views, views / rounded_up(views, cut.views)),
                lanes,
                queries / slices,
                _visible(call, queries, keys, kernel_keys),
                causal=(call.left is None and call.right is not None) * 1,
                later=int(not call.first),
                groups=where(cut.views < views, kv_heads, kv_heads / rounded_up(kv_heads, cut.kv_heads)),
                summed=(1 - call.covers(shape)) * views * keys * kv_heads / parts,
                cudnn=by_cudnn(call, shape) * 1,
                held=keys,
            )
        )
    return Program(kinds, 0)


def over_lists(
    runs: Sequence[Run], calls: ListCalls, shape: Shape, batch: int, kernel_keys: int, *, backward: bool
) -> Program:
    """Calls over lists that lie one behind the other, and over the rows' own blocks where those are apart.
    See `attention/ops/list_calls.py`."""
    own = whole_calls(calls.own, shape, batch, kernel_keys, own_backward_cut if backward else forward_cut)
    kinds = list(own.calls)
    rows: Amount = 0
    blocks: Amount = 0
    for run in runs:
        rows, blocks = rows + run.rows, blocks + run.rows * run.width
    width = maximum(blocks / maximum(rows, 1) - (1 if calls.own else 0), 0)
    sums = backward_sums(calls, shape)
    for group in calls.groups:
        if backward:
            cut = backward_cut_of(calls, group, sums, shape)
            held = sums.kv_heads * calls.lanes_of_kv
            number = cut.number(group, held) * rounded_up(calls.lanes, held)
        else:
            cut = forward_cut_of(calls, group, shape)
            number = cut.number(group, calls.lanes)
        pairs = calls.lanes * group.rows / maximum(number, 1)
        keys = minimum(width, group.width) * calls.size
        kinds.append(
            Calls(
                number,
                pairs,
                1,
                calls.repeat * group.tokens,
                keys,
                later=int(bool(calls.own)),
                unit=calls.size,
                summed=pairs * keys,
            )
        )
    return Program(kinds, 0)


def _visible(call: WholeCall, queries: Amount, keys: Amount, kernel_keys: int) -> Amount:
    """Keys that a query sees of a call on average, as the kernel computes them. Those of a causal mask alone
    are counted where it is applied."""
    if call.left is None:
        return keys
    if call.right is None:  # the triangle behind, as the causal one is
        return (keys + kernel_keys) / 2
    return visible_keys(queries, keys, call.left, call.right, kernel_keys)


def flex(runs: Sequence[Run], rows: Rows, shape: Shape, batch: int) -> Program:
    """Compiled FlexAttention: one call over all blocks of the batch."""
    blocks = rounded_up(shape.seq, rows.size)
    width: Amount = 0
    for run in runs:
        width = width + run.rows * run.width
    seen = width / blocks * rows.size
    return Program([Calls(1, batch, shape.heads, shape.seq, seen, groups=shape.kv_heads, held=shape.seq)], 0)


def dilated(branches: Sequence[tuple[Amount, Amount]], shape: Shape) -> Program:
    """See `attention/dilated.py`; lengths and rates are no longer than the sequence."""
    calls: list[Calls] = []
    seq: Amount = shape.seq
    tile = minimum(shape.tile_tokens, seq)
    tiles = rounded_up(seq, tile)
    densest = maximum(*(seq / rate for _, rate in branches))
    first_found: Amount = 0
    for length, rate in branches:
        period, groups = grouped_heads(rate, shape)
        offsets: Amount = minimum(period, shape.heads)
        heads = shape.heads / offsets
        offsets = minimum(offsets, where(rate > length, length * (period // rate), offsets))
        # The first branch's parts are taken as they are: the one with the smallest rate.
        first = (seq / rate >= densest) * (1 - first_found)
        first_found = maximum(first_found, first)
        segments, tail = seq // length, seq % length
        inside = (length <= tile) * 1
        even = ((tile % length == 0) | (tiles == 1)) * 1
        complete = inside * where(even, segments, maximum(tiles * (tile - length + 1) // length, 0))
        positions: Amount = maximum(length / rate, 1)
        filled = minimum(tiles, complete)  # tiles with whole segments
        calls.append(
            Calls(
                offsets * filled,
                complete / maximum(filled, 1),
                heads,
                positions,
                positions,
                causal=int(shape.causal),
                later=1 - first,
                groups=groups,
            )
        )
        tokens = seq - complete * length
        pieces = where(inside * even, (tail > 0) * 1, tiles + (length % tile > 0) * segments)
        queries: Amount = tokens / maximum(pieces, 1) / rate
        # Of segments that are not one whole view, weighted by their tokens.
        keys = (tokens - tail) / maximum(tokens, 1) * positions + tail / maximum(tokens, 1) * tail / rate
        number = offsets * pieces
        later = 1 - first
        part = Calls(number, 1, heads, maximum(queries, 1), maximum(keys, 1), later=later, groups=groups)
        if shape.causal:
            calls.append(part._replace(keys=part.queries, causal=1))
            apart = rounded_up(tokens, maximum(length, 1))
            before = maximum(pieces - apart, 0)
            # Half of the segment's pairs less the halves that the parts have of their own.
            ahead = maximum(pieces * (keys - queries), 0)
            visible: Amount = ahead / 2 / maximum(before, 1)
            part = part._replace(number=offsets * before, keys=maximum(visible, 1), later=(before > 0) * 1)
        calls.append(_cut(part, shape))
    return Program(calls, tiles)


def block_sparse(runs: Sequence[Run], rows: Rows, shape: Shape) -> Program:
    """See `attention/block_sparse.py`."""
    calls: list[Calls] = []
    tiles: Amount = 0
    for run in runs:
        if not any_of(run.rows > 0):
            continue
        part = _lists(run, rows, shape) if run.kind == "list" else _spans(run, rows, shape)
        calls += part.calls
        tiles = tiles + part.tiles
    return Program(calls, tiles)


def _spans(run: Run, rows: Rows, shape: Shape) -> Program:
    """Rows of adjacent blocks."""
    size = shape.seq / rounded_up(shape.seq, rows.size)  # a last short block, spread over all
    together = shape.chunk_rows(rows)
    base = Calls(
        run.rows,
        1,
        shape.call_heads,
        size,
        run.width * size,
        spans=shape.heads // shape.call_heads,
        groups=shape.kv_heads,
    )
    if run.kind == "long":
        number = run.runs * rounded_up(run.rows / maximum(run.runs, 1), together)
        queries = run.rows / maximum(number, 1) * size
        return Program([_cut(base._replace(number=number, queries=maximum(queries, 1)), shape)], number)
    number, calls = run.rows, []
    wide: Amount = 0
    if run.kind == "slide":
        wide = shape.goes_wide(rows) * (run.width >= WIDE * together)
        number = run.runs * rounded_up(run.rows / maximum(run.runs, 1), shape.span_rows(rows))
        views = run.rows / maximum(number, 1)
        base = base._replace(number=number, views=views, step=size)
    narrow = base._replace(number=number * (1 - wide))
    if shape.causal:
        masked = shape.mask_blocks(rows)
        own = minimum(maximum(masked, 1), run.width)
        if run.kind == "single":  # widths from 1 on, evenly
            widest = maximum(2 * run.width - 1, 1)
            over = maximum(widest - maximum(masked, 1), 0)
            rest: Amount = over / widest
            left: Amount = (over + 1) / 2
            own = (run.width - rest * left) * 1
        else:
            left = maximum(run.width - own, 0)
            rest = (left > 0) * 1
        calls.append(narrow._replace(keys=own * size, causal=(masked == 0) * 1))
        narrow = narrow._replace(number=narrow.number * rest, keys=maximum(left, 1) * size, later=1)
    calls.append(_cut(narrow, shape))
    tiles = narrow.number if not shape.causal else number * (1 - wide)
    if any_of(wide > 0):
        split = rounded_up(run.rows, together) * wide
        tiles = tiles + split
        calls += _wide(run, split, size, shape)
    return Program(calls, tiles)


def _wide(run: Run, number: Amount, size: Amount, shape: Shape) -> list[Calls]:
    """Tiles of sliding rows, by what they share, and under a causal mask their own blocks."""
    rows = run.rows / maximum(number, 1)  # of a tile, on average
    base = Calls(
        number,
        1,
        shape.call_heads,
        rows * size,
        1,
        spans=shape.heads // shape.call_heads,
        groups=shape.kv_heads,
    )
    calls = _shared(base, rows, (run.width - int(shape.causal)) * size, size, shape)
    if shape.causal:
        calls.append(base._replace(views=rows, queries=size, keys=size, causal=1, later=1))
    return calls


def _shared(base: Calls, rows: Amount, width: Amount, size: Amount, shape: Shape) -> list[Calls]:
    """Tiles of so many rows of `size` queries that see `width` keys each, by what all of them share, each
    half of them, and so on; see `attention.block_sparse.shared_calls`."""
    number = base.number
    calls = [_cut(base._replace(keys=maximum(width - (rows - 1) * size, size)), shape)]
    level = 0
    while any_of(rows > 1.5 * 2**level):
        part = rows / 2 ** (level + 1)
        # Blocks that a half sees beyond what both see: as many as the other half has rows.
        exists = number * 2 ** (level + 1) * (part >= 0.75)
        calls.append(
            _cut(base._replace(number=exists, queries=part * size, keys=part * size, later=1), shape)
        )
        level += 1
    return calls


def _lists(run: Run, rows: Rows, shape: Shape) -> Program:
    """Rows whose blocks are gathered."""
    size = shape.seq / rounded_up(shape.seq, rows.size)
    step, cut = shape.chunk_rows(rows), shape.list_blocks(rows)
    number = run.runs * rounded_up(run.rows / maximum(run.runs, 1), step) * (run.rows > 0)
    repeat = 1 if rows.own else shape.heads // shape.call_heads
    base = Calls(
        number,
        run.rows / maximum(number, 1),
        shape.heads if rows.own else shape.call_heads,
        size,
        rows.size,
        repeat,
        groups=None if rows.own else shape.kv_heads,
        unit=rows.size,
        largest=(step, minimum(cut, shape.full_blocks(rows.size)) * rows.size),
    )
    calls = []
    width = run.width
    left = width
    if shape.causal:
        masked = shape.mask_blocks(rows)
        own = where(masked > 0, minimum(width, maximum(masked, 1), cut), 1)
        # Under no mask the row's own block is a view, else the list's end is a gather.
        alone = base._replace(
            number=number * (masked == 0),
            heads=shape.call_heads,
            keys=size,
            unit=0,
            causal=1,
            spans=shape.heads // shape.call_heads,
            groups=shape.kv_heads,
        )
        calls += [alone, base._replace(number=number * (masked > 0), keys=own * rows.size)]
        left = width - own
    parts = rounded_up(left, cut)
    each = left / maximum(parts, 1)
    later = where(parts > 0, 1 if shape.causal else (parts - 1) / maximum(parts, 1), 0)
    calls.append(base._replace(number=number * parts, keys=each * rows.size, later=later))
    return Program(calls, number)


def token_window(window: TokenWindow, shape: Shape) -> Program:
    """See `attention/token_window.py`."""
    rows = token_rows(window, shape)
    slide = minimum(rows.slide, rows.rows)
    stop = maximum(minimum(rows.slide_stop, rows.rows), slide)
    groups = ((0 * slide, slide, 1), (slide, stop, rows.together), (stop, rows.rows, 1))
    calls: list[Calls] = []
    tiles: Amount = 0
    for first, end, together in groups:
        part = _token_rows(rows, first, end, together, shape)
        calls += part.calls
        tiles = tiles + part.tiles
    there = rounded_up(rows.begin, rows.global_unit)
    unit: Amount = rows.begin / maximum(there, 1)
    base = Calls(
        there,
        1,
        shape.call_heads,
        maximum(unit, 1),
        1,
        spans=shape.heads // shape.call_heads,
        groups=shape.kv_heads,
    )
    if shape.causal:
        calls.append(base._replace(keys=base.queries, causal=1))
        middle: Amount = rows.begin / 2
        before = base._replace(number=maximum(there - 1, 0), keys=maximum(middle, 1), later=1)
        calls.append(_cut(before, shape))
    else:
        calls.append(_cut(base._replace(keys=shape.seq), shape))
    return Program(calls, tiles + there)


def _token_rows(rows: TokenRows, begin: Amount, end: Amount, together: Amount, shape: Shape) -> Program:
    """Rows begin..end, so many of them in a call: what they see grows or falls from one to the next, or is
    equally much."""
    count = maximum(end - begin, 0)
    tiles = rounded_up(count, together)
    ends = (rows.row(minimum(begin, maximum(rows.rows - 1, 0))), rows.row(maximum(end - 1, 0)))

    def mean(one: Amount, other: Amount) -> Amount:
        return maximum((one + other) / 2, 1)

    queries = mean(*(row.queries for row in ends))
    views = count / maximum(tiles, 1)
    base = Calls(
        tiles,
        views,
        shape.call_heads,
        queries,
        1,
        spans=shape.heads // shape.call_heads,
        groups=shape.kv_heads,
        step=rows.unit * (together > 1),
    )
    whole = base._replace(
        number=tiles * (1 - rows.cut), keys=mean(*(row.stop - row.first for row in ends)), later=0
    )
    # Of rows that are cut, those that see no end of their window have fewer calls.
    behind: Amount = sum((row.behind > 0) * 1 for row in ends) / 2
    before: Amount = sum((row.before > 0) * 1 for row in ends) / 2
    cut = base._replace(number=tiles * rows.cut)
    triangle = cut._replace(number=cut.number * behind, keys=queries, causal=1, step=0)
    edge = cut._replace(number=cut.number * before, keys=queries, later=1, step=0)
    width = mean(*(row.full_stop - row.full for row in ends))
    wide = rows.wide * (together > 1)
    middle = cut._replace(number=cut.number * (1 - wide), keys=width, later=1)
    shared: list[Calls] = []
    if any_of(wide > 0):
        tile = cut._replace(
            number=cut.number * wide, views=1, queries=maximum(views * queries, 1), step=0, later=1
        )
        shared = _shared(tile, views, width, queries, shape)
    columns = base._replace(
        number=tiles * (rows.begin > 0),
        views=1,
        queries=maximum(views * queries, 1),
        keys=maximum(rows.begin, 1),
        later=1,
        step=0,
    )
    return Program([whole, triangle, edge, _cut(middle, shape), *shared, _cut(columns, shape)], tiles)


def _cut(call: Calls, shape: Shape) -> Calls:
    """Calls with their keys cut to what a kernel may copy."""
    if not shape.packs:
        return call
    parts = rounded_up(call.keys, shape.pack_tokens(maximum(call.views, 1)))
    later = (parts - 1 + call.later) / maximum(parts, 1)
    return call._replace(number=call.number * parts, keys=call.keys / maximum(parts, 1), later=later)


def scoring(rows: Rows, shape: Shape, channels: Amount) -> tuple[Amount, Amount]:
    """(multiply-adds of an adaptive attention's scorer, pairs of blocks that it ranks)."""
    blocks = rounded_up(shape.seq, rows.size)
    ranked = shape.heads * blocks * blocks
    return 2 * shape.heads * blocks * shape.head_dim * channels + ranked * channels, ranked
