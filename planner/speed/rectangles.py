"""How many pairs of a query and a key an attention has between some queries and some keys: closed forms,
without which a rank's share of the work would be counted tile by tile. Imports no torch.

Pairs are those that kernels compute, on average over heads, the later half of a block on the diagonal left
out. Of windows whose edges are blocks they are those of a window that ends half a block farther; of
dilated_sparse a few rows stand for all.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from functools import lru_cache
from itertools import accumulate
from typing import Final

import numpy as np

from attention.config import AttentionConfig
from attention.layout import columns_by_row, is_dilated_sparse
from attention.sharding.ranges import Band, Sight, global_queries, sight_of
from attention.sizes.arrays import Amount, Count, Ints, any_of, maximum, minimum
from planner.sampling import golden

SAMPLES: Final = 32
"""Rows of blocks that stand for all of some queries."""

TokenRange = tuple[int, int]
"""(first, one past the last)."""


def pairs(
    config: AttentionConfig,
    seq: int,
    causal: bool,
    queries: TokenRange,
    keys: TokenRange,
    documents: tuple[int, ...] | None = None,
) -> float:
    """Pairs of one head, on average, of some queries and some keys of a sequence of `seq` tokens.
    `documents`: lengths of those that are packed into it, if they are."""
    return float(
        sum(
            _listed(config, seq, causal, asking, seen)
            if is_dilated_sparse(config)
            else pairs_seen(sight_of(config, seq, causal), causal, asking, seen)
            for asking, seen in _together(queries, keys, documents)
        )
    )


def _together(
    queries: TokenRange, keys: TokenRange, documents: tuple[int, ...] | None
) -> Iterator[tuple[TokenRange, TokenRange]]:
    """(queries, keys) of each document, of those that have some of both."""
    ends = [*accumulate(documents)] if documents else [max(queries[1], keys[1])]
    for begin, end in zip([0, *ends], ends, strict=False):
        asking = max(queries[0], begin), min(queries[1], end)
        seen = max(keys[0], begin), min(keys[1], end)
        if asking[0] < asking[1] and seen[0] < seen[1]:
            yield asking, seen


def pairs_seen(sight: Sight, causal: bool, queries: tuple[Count, Count], keys: tuple[Count, Count]) -> Amount:
    """Pairs of all but dilated_sparse; tokens and sight may be arrays that broadcast, for many attentions."""
    (first, stop), (begin, end) = queries, keys
    apart = global_queries(sight, causal)
    total: Amount = 0
    if not isinstance(apart, int) or apart:  # those that see every key
        total = maximum(minimum(stop, apart) - first, 0) * (end - begin)
        first = minimum(maximum(first, apart), stop)
    shared = minimum(end, sight.shared)
    if not isinstance(shared, int) or shared > begin:
        total = total + _corners(_triangle if causal else _square, first, stop, begin, maximum(shared, begin))
        begin = maximum(begin, shared)
    for band in sight.bands:
        total = total + _band(band, causal, first, stop, begin, maximum(end, begin))
    return total


def _band(band: Band, causal: bool, first: Count, stop: Count, begin: Count, end: Count) -> Amount:
    """Pairs that one band shows."""
    if not any_of(band.reach < band.length):

        def before(query: Count, key: Count) -> Amount:
            return _segments(band.length, causal, query, key)
    else:
        # Queries of a block are half a block from its begin, on average, and from its end.
        left = band.reach + band.size // 2
        right = 0 if causal else band.reach + (band.size - 1) // 2

        def before(query: Count, key: Count) -> Amount:
            return _up_to(right, query, key) - _up_to(-left - 1, query, key)

    return _corners(before, first, stop, begin, end) / (band.rate * band.rate)


def _corners(
    before: Callable[[Count, Count], Amount], first: Count, stop: Count, begin: Count, end: Count
) -> Amount:
    """Pairs of a rectangle, from those of queries and keys `before` some tokens."""
    return before(stop, end) - before(first, end) - before(stop, begin) + before(first, begin)


def _square(query: Count, key: Count) -> Amount:
    return query * key


def _triangle(query: Count, key: Count) -> Amount:
    return _up_to(0, query, key)


def _segments(length: Count, causal: bool, query: Count, key: Count) -> Amount:
    """Pairs of the queries and keys before some tokens that are of one segment."""
    whole = minimum(query, key) // length
    asking = minimum(query - whole * length, length)
    seen = minimum(key - whole * length, length)
    if not causal:
        return whole * length * length + asking * seen
    return whole * (length * (length + 1) // 2) + _up_to(0, asking, seen)


def _up_to(apart: Count, query: Count, key: Count) -> Amount:
    """Pairs of the queries and keys before some tokens where the key is at most so far behind the query."""

    def below(n: Count) -> Amount:
        # The sum of all t up to n, of those above `key` as much as that.
        inside = minimum(maximum(n, 0), key)
        return inside * (inside + 1) // 2 + maximum(n - key, 0) * key

    return below(apart + query) - below(apart)


def _listed(config: AttentionConfig, seq: int, causal: bool, queries: TokenRange, keys: TokenRange) -> float:
    """Pairs of dilated_sparse."""
    assert config.pattern is not None
    size = config.pattern.block_size
    rows, begins = _sampled(config, seq, causal, queries[0] // size, -(-queries[1] // size))
    each = np.minimum(np.minimum(begins + size, seq), keys[1]) - np.maximum(begins, keys[0])
    seen = float(np.maximum(each, 0).sum())
    if causal:  # of its own block a row computes half
        seen -= size / 2 * float(((keys[0] <= rows) & (rows < keys[1])).sum())
    return seen / len(rows) * (queries[1] - queries[0])


@lru_cache(maxsize=64)
def _sampled(config: AttentionConfig, seq: int, causal: bool, first: int, stop: int) -> tuple[Ints, Ints]:
    """(first tokens of some of the rows first..stop, first tokens of the blocks that those keep)."""
    assert config.pattern is not None
    # Without a period, which segments have.
    places = golden(np.arange(min(SAMPLES, stop - first)), 0.5)
    rows = first + (places * (stop - first)).astype(np.int64)
    columns = columns_by_row(config, seq, causal, rows).astype(np.int64)
    return rows * config.pattern.block_size, columns * config.pattern.block_size
