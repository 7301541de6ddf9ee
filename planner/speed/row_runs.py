"""The rows of block-sparse patterns by how they are computed: how many are alike, and how wide they are on
average. Closed forms of `attention/layout.py`; ints, or arrays of many patterns. Imports no torch.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Final, Literal, NamedTuple

from attention.config import PatternType
from attention.sizes.arrays import Amount, any_of, ceil_div, lcm, maximum, minimum, row_blocks, where
from attention.sizes.row_bounds import Rows
from attention.sizes.window import window_blocks
from planner.sampling import golden

SAMPLES: Final = 16
"""Rows of a dilated_sparse pattern that are looked at, spread evenly over every segment length."""


class Run(NamedTuple):
    """Rows that are computed in the same way, with mean sizes."""

    kind: Literal["single", "slide", "long", "list"]
    """Adjacent blocks: of a width of their own; of equal width, moving on by one block a row; the same for
    all rows. Or lists."""
    rows: Amount
    width: Amount
    """Blocks of a row."""
    runs: Amount = 1
    """Groups of consecutive rows that may share a call."""


def runs_of(
    kind: PatternType | None,
    rows: Rows,
    seq: Amount,
    causal: bool,
    *,
    window: Amount,
    global_tokens: Amount,
    ratio: float,
    lengths: Sequence[Amount],
    rates: Sequence[Amount],
) -> list[Run]:
    """The runs of a pattern by its fields, of which it reads its own; `rows`: its widest."""
    size = rows.size
    blocks = ceil_div(seq, size)
    if kind == "dilated_sparse":
        branches = [
            (minimum(maximum(length // size, 1), blocks), minimum(rate, blocks))
            for length, rate in zip(lengths, rates, strict=True)
        ]
        return _dilated_sparse(blocks, rows, row_blocks(ratio, blocks), branches, causal)
    tokens = global_tokens if kind == "global_local" else 0
    side, shared = window_blocks(window, tokens, size, blocks, causal)
    return _window_causal(blocks, side, shared) if causal else _window(blocks, side, shared)


def _window(blocks: Amount, side: Amount, shared: Amount) -> list[Run]:
    """Rows below `shared` see everything; row i sees those blocks and i - side to i + side."""
    n, local = blocks, (shared == 0) * 1
    inside = local * maximum(n - 2 * side, 0)
    # Rows whose window, with the shared blocks, spans everything.
    first = maximum(n - 1 - side, shared)
    last = minimum(shared + side, n - 1)
    full = where(inside > 0, 0 * n, maximum(last - first + 1, 0))
    # Rows behind the shared blocks that reach back to them, each one block wider than the one before.
    growing = maximum(minimum(shared + side, n - 1, n - 2 - side) - shared + 1, 0) * (inside == 0)
    ends = where(inside > 0, 2 * minimum(side, n), where(local, n - full, growing))
    wide = where(
        inside > 0,
        (3 * side + 1) / 2,
        where(local, (minimum(side, n) + n) / 2, shared + side + 1 + (growing - 1) / 2),
    )
    lists = (1 - local) * maximum(n - 1 - shared - side, 0)
    steady = (1 - local) * maximum(n - shared - 2 * side - 1, 0)
    shrinking = lists - steady
    return [
        Run("slide", inside, 2 * side + 1),
        Run("single", ends, wide, ends),
        Run("long", shared + full, n, 1 + (shared > 0) * (full > 0)),
        Run("list", steady, shared + 2 * side + 1),
        Run("list", shrinking, shared + 2 * side + 1 - (shrinking + 1) / 2, shrinking),
    ]


def _window_causal(blocks: Amount, side: Amount, shared: Amount) -> list[Run]:
    """Row i sees i - side to i, and the blocks below `shared`."""
    local = (shared == 0) * 1
    growing = minimum(where(local, side, shared + side + 1), blocks)
    rest = blocks - growing
    return [
        Run("single", growing, (growing + 1) / 2, growing),
        Run("slide", rest * local, side + 1),
        Run("list", rest * (1 - local), shared + side + 1),
    ]


def _dilated_sparse(
    blocks: Amount, rows: Rows, budget: Amount, branches: list[tuple[Amount, Amount]], causal: bool
) -> list[Run]:
    """Runs of dilated_sparse: with rates of 1 alone, windows within segments (here, the longest); else
    lists."""
    listed, width, runs = (rows.lists > 0) * 1, blocks, 1 + 0 * blocks
    if any_of(listed):
        width, runs = _sampled(blocks, budget, branches, causal)
    near = (1 - listed) * blocks
    longest = maximum(*(length for length, _ in branches))
    segments: Amount = maximum(blocks / longest, 1)
    widest: Amount = minimum(rows.span, longest)
    whole = (widest >= longest) * 1
    lists = Run("list", listed * blocks, width, runs)
    if causal:
        growing = minimum(near, segments * where(whole, widest, widest - 1))
        return [
            Run("single", growing, where(whole, (widest + 1) / 2, widest / 2), growing),
            Run("slide", near - growing, widest, segments),
            lists,
        ]
    held = where(whole, near, minimum(near, segments * 2 * ((widest + 1) // 2)))
    return [
        Run("long", held, widest, where(whole, segments, 2 * segments)),
        Run("slide", near - held, widest, segments),
        lists,
    ]


def _sampled(
    blocks: Amount, budget: Amount, branches: list[tuple[Amount, Amount]], causal: bool
) -> tuple[Amount, Amount]:
    """(mean blocks a row, groups of consecutive rows of equal width), from SAMPLES rows and their next."""
    shared = [
        [1.0 * lcm(rate, other) for _, other in branches[:index]] for index, (_, rate) in enumerate(branches)
    ]
    sizes = [(1.0 * length, 1.0 * rate) for length, rate in branches]
    last, total, changes = blocks - 1.0, 0.0 * blocks, 0.0 * blocks
    for sample in range(SAMPLES):
        row = rounded_down(golden(sample, 0.5) * blocks)
        here = minimum(_offsets(row, blocks, sizes, shared, causal) + 1, budget)
        after = minimum(_offsets(minimum(row + 1, last), blocks, sizes, shared, causal) + 1, budget)
        total = total + here
        changes = changes + (here != after)
    return total / SAMPLES, minimum(1 + changes / SAMPLES * blocks, blocks)


def _offsets(
    row: Amount, blocks: Amount, sizes: list[tuple[Amount, Amount]], shared: list[list[Amount]], causal: bool
) -> Amount:
    """Offsets, 0 apart, that the branches (length, rate) offer a row. What a branch shares with earlier ones,
    `shared` steps apart, is taken to be what it shares with the one it shares most with: exact where each
    rate divides the next."""
    left = [row - length * rounded_down(row / length) for length, _ in sizes]
    sides: list[list[Amount]] = [left]
    if not causal:
        rooms = zip(left, sizes, strict=True)
        sides.append([minimum(length, blocks - row + place) - 1 - place for place, (length, _) in rooms])
    total: Amount = 0
    for side in sides:
        for index, (room, (_, rate)) in enumerate(zip(side, sizes, strict=True)):
            total = total + rounded_down(room / rate)
            overlap: Amount = 0
            for other, step in zip(side, shared[index], strict=False):
                overlap = maximum(overlap, rounded_down(minimum(room, other) / step))
            total = total - overlap
    return total


def rounded_down(value: Amount) -> Amount:
    """The largest whole number up to a float or up to each of an array: faster than dividing ints."""
    if isinstance(value, int | float):
        return float(math.floor(value))
    import numpy as np  # which a single config does not need

    return np.floor(value)


def rounded_up(a: Amount, b: Amount) -> Amount:
    """a / b rounded up, of numbers below 2^53."""
    share = a / b
    if isinstance(share, int | float):
        return float(math.ceil(share))
    import numpy as np

    return np.ceil(share)
