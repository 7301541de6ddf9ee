"""The widest rows of a block-sparse layout, in closed form: what sizes its calls. Imports no torch.

A row is what one query block attends to. Sizes are ints, or NumPy arrays for many patterns at once.
"""

from __future__ import annotations

import itertools
from collections.abc import Sequence
from functools import reduce
from typing import NamedTuple

from attention.config import AttentionConfig, Edges, PatternType
from attention.sizes.arrays import Count, any_of, ceil_div, each, lcm, maximum, minimum, row_blocks, where
from attention.sizes.window import window_blocks


class Rows(NamedTuple):
    """The widest rows of a layout, in blocks. Bounds: no row is wider, and in regular layouts some are
    as wide."""

    size: Count
    """Tokens a block."""
    span: Count
    """Blocks of rows whose blocks are adjacent; 0 if there are none, or rows are mixed beyond telling: then
    all count as lists."""
    lists: Count
    """Blocks of the other rows; 0 if there are none."""
    full_lists: Count
    """`lists` without the last row where that is short: under a causal mask it sees most."""
    alike: Count
    """Most consecutive rows that see the same adjacent blocks."""
    slides: Count
    """1 if rows follow each other whose adjacent blocks move on by one, else 0."""
    many: Count = 1 << 62
    """Most rows that are lists."""
    own: bool = False
    """Whether every head has lists of its own."""
    moves: bool = False
    """Whether the lists of consecutive rows differ by one block only."""
    seen: Count = 1 << 62
    """Most rows that see one block. A bound; exact for windows."""


def rows_of(config: AttentionConfig, seq: int, causal: bool) -> Rows:
    """The widest rows of the layout of a block_sparse config, or of what an adaptive one chooses."""
    pattern = config.pattern
    assert pattern is not None
    if config.variant == "adaptive":
        blocks = ceil_div(seq, pattern.block_size)
        return chosen_rows(pattern.block_size, row_blocks(pattern.sparsity_ratio, blocks))
    return pattern_rows(
        pattern.pattern_type,
        pattern.block_size,
        seq,
        causal,
        window=pattern.local_window_size,
        global_tokens=pattern.global_tokens,
        ratio=pattern.sparsity_ratio,
        lengths=config.segment_lengths,
        rates=config.dilation_rates,
        edges=pattern.edges,
    )


def pattern_rows(
    kind: PatternType | None,
    size: Count,
    seq: Count,
    causal: bool,
    *,
    window: Count,
    global_tokens: Count,
    ratio: float,
    lengths: Sequence[Count],
    rates: Sequence[Count],
    edges: Edges = "block",
) -> Rows:
    """The widest rows of a block_sparse pattern from its fields, of which its kind reads its own. Lengths are
    in tokens."""
    blocks = ceil_div(seq, size)
    if kind == "dilated_sparse":
        in_blocks = [length // size for length in lengths]
        short = seq % size > 0
        return dilated_sparse_rows(size, blocks, row_blocks(ratio, blocks), in_blocks, rates, causal, short)
    return window_rows(size, blocks, window, global_tokens if kind == "global_local" else 0, causal, edges)


def chosen_rows(size: Count, kept: Count) -> Rows:
    """The widest rows of an adaptive attention, all of which keep `kept` blocks at most."""
    return Rows(size, span=0 * kept, lists=kept, full_lists=kept, alike=0 * kept, slides=0 * kept, own=True)


def window_rows(
    size: Count, blocks: Count, window: Count, global_tokens: Count, causal: bool, edges: Edges = "block"
) -> Rows:
    """The widest rows of local_window (no global tokens) and global_local: closed forms of the rule in
    `attention/sizes/window.py`."""
    side, shared = window_blocks(window, global_tokens, size, blocks, causal, edges)
    if causal:
        apart = (shared > 0) * (blocks - 1 > shared + side)
        return Rows(
            size,
            span=minimum(shared + side + 1, blocks),
            lists=(shared + side + 1) * apart,
            full_lists=(shared + side + 1) * apart,
            alike=1 + 0 * blocks,
            slides=(shared == 0) * (blocks - side >= 2),
            many=maximum(blocks - 1 - shared - side, 0),
            moves=True,
            seen=where(shared > 0, blocks, minimum(side + 1, blocks)),
        )
    full = 2 * side + 1
    apart = (shared > 0) * (blocks - 1 - side > shared)
    lists = (shared + minimum(full, blocks - shared - 1)) * apart
    # Rows that see everything: the global ones, and those whose window reaches the end and, towards the
    # beginning, the global blocks. Where these follow upon the global ones, all are consecutive.
    first, last = maximum(blocks - 1 - side, 0), minimum(side + shared, blocks - 1)
    everything = maximum(shared, last - first + 1, (first <= shared) * (last + 1))
    span = where(shared > 0, blocks, minimum(full, blocks))
    return Rows(
        size,
        span=span,
        lists=lists,
        full_lists=lists,
        alike=maximum(everything, 1),
        slides=(shared == 0) * (blocks - 2 * side >= 2),
        many=maximum(blocks - 1 - shared - side, 0),
        moves=True,
        seen=span,
    )


def dilated_sparse_rows(
    size: Count,
    blocks: Count,
    budget: Count,
    lengths: Sequence[Count],
    rates: Sequence[Count],
    causal: bool,
    short: Count,
) -> Rows:
    """The widest rows of dilated_sparse; lengths and rates of the branches are in blocks. `short`: whether
    the last block is."""
    lengths = [minimum(length, blocks) for length in lengths]
    longest = maximum(*lengths)
    near = reduce(lambda a, b: a * b, [(rate == 1) * 1 for rate in rates])  # every row is adjacent
    regular, others = _others(lengths, rates)
    # Where segments nest, some row is at the end of all of them: of the longest, which may be the last row.
    last_apart = (longest == blocks) * causal * (short > 0)
    # What one branch alone offers a row that is at the end of its segment, or else the last but one.
    at_least = maximum(*(_alone(length, rate, blocks) for length, rate in zip(lengths, rates, strict=True)))
    widest = full = minimum(maximum(1 + others, at_least), blocks)
    unknown = (budget > at_least) * maximum(1 - regular, last_apart * (1 - near))
    if any_of(unknown):
        from attention.layout import widest_rows  # loads NumPy, which few configs need

        def rows_of_one(blocks: int, *sides: int) -> tuple[int, int]:
            pairs = zip(sides[: len(lengths)], sides[len(lengths) :], strict=True)
            return widest_rows(tuple(pairs), blocks, causal)

        counted = each(rows_of_one, unknown, (widest, full), blocks, *lengths, *rates)
        widest, full = counted[0], where(short * causal > 0, counted[1], counted[0])
    widest, full = minimum(budget, widest), minimum(budget, full)
    # Rows at an end of a segment see the same blocks until the window leaves that end: half a window, or up
    # to a whole one where segments of several lengths share it, of which some end on one side.
    half = where(longest == minimum(*lengths), budget // 2 + 1, budget)
    alike = 1 + 0 * widest if causal else where(budget < longest, half, longest)
    # A row goes at most `widest` - 1 steps along a branch, at a segment's end all of them to one side.
    steps = (widest - 1) * (1 if causal else 2)
    along = (minimum(steps, (length - 1) // rate) for length, rate in zip(lengths, rates, strict=True))
    return Rows(
        size,
        widest * near,
        widest * (1 - near),
        full * (1 - near),
        alike * near,
        (widest < longest) * near,
        seen=minimum(sum(along, 1), blocks),
    )


def _alone(length: Count, rate: Count, blocks: Count) -> Count:
    """Blocks of the widest row but the last that a single branch makes."""
    return where(length < blocks, length - 1, maximum(blocks - 2, 0)) // rate + 1


def _others(lengths: Sequence[Count], rates: Sequence[Count]) -> tuple[Count, Count]:
    """(1 if segments nest and rates divide them, else 0; offsets, 0 apart, that the branches then offer the
    widest row): what is in the first, in the second, and so on, less what is in two of them, and so on."""
    order = list(zip(lengths, rates, strict=True))
    regular: Count = 1
    for length, _ in order:
        for other, rate in order:
            nested = (length % other == 0) | (other % length == 0)
            regular = regular * nested * (length % rate == 0)
    total: Count = 0
    for count in range(1, len(order) + 1):
        for chosen in itertools.combinations(order, count):
            inside = minimum(*(length for length, _ in chosen))
            step = reduce(lcm, (rate for _, rate in chosen))
            overlap = (inside - 1) // step
            total = total + (overlap if count % 2 else -overlap)
    return regular, total
