"""The share of a program's work that its last queries have: closed forms, ints or arrays of many candidates.
Imports no torch.

What the queries of a whole sequence would do is known (`planner/speed/calls.py`). Of it the last ones have as
much as they have of its pairs, and of its calls as many as of its queries, but one at least.
"""

from __future__ import annotations

from typing import Any, Final

from attention.sizes.arrays import Amount, ceil_div, minimum, row_blocks, where
from attention.sizes.shape import Shape
from attention.sizes.window import window_blocks, window_spans
from planner.configs import Columns

SAMPLES: Final = 16
"""Queries that stand for all, in the middle of as many equal parts."""


def pairs_share(columns: Columns, shape: Shape) -> Amount:
    """The share of all pairs that the queries of `shape` have."""
    every = _mean_keys(columns, shape, 0) * shape.seq
    return _mean_keys(columns, shape, shape.origin) * shape.queries / every


def _mean_keys(columns: Columns, shape: Shape, first: Amount) -> Amount:
    """Keys that a query from the `first` on sees, on average."""
    total: Amount = 0
    for sample in range(SAMPLES):
        total = total + _keys(columns, shape, first + (shape.seq - first) * (2 * sample + 1) // (2 * SAMPLES))
    return total / SAMPLES


def _keys(columns: Columns, shape: Shape, query: Amount) -> Amount:
    """Keys that a query's calls compute, on average over heads; blocks are whole."""
    untyped: Any = columns
    if columns.variant != "block_sparse":
        keys: Amount = 0
        for length, rate in shape.within(columns.branches):
            before = query % length
            inside = minimum(length, shape.seq - query + before)
            keys = keys + where(shape.causal, before + 1, inside) / (rate * rate)
        return keys
    size = 1 if columns.token_edges else untyped.block_size
    blocks, row = ceil_div(shape.seq, size), query // size
    if columns.pattern_type == "dilated_sparse":
        budget = row_blocks(untyped.sparsity_ratio, blocks)
        return minimum(budget, row + 1 if shape.causal else blocks) * size
    tokens = untyped.global_tokens if columns.pattern_type == "global_local" else 0
    side, shared = window_blocks(untyped.window, tokens, size, blocks, shape.causal)
    (_, apart), (start, stop) = window_spans(row, side, shared, blocks, shape.causal)
    return (apart + stop - start) * size
