"""How many rows of keys ranks exchange, in closed forms of ints, or of arrays that broadcast for all ranks at
once or many attentions of one kind. Imports no torch.

A row is the key of a token and a kv head; as many rows of values go with them. Of a source of rate 1 each
token has a row of each kv head. Of another rate each kv head has a *lane* for every remainder h % rate of the
query heads that read it, and each lane as many rows: the last may be of no token, and is sent all the same.

`attention.sharding.needs` tells the same a source at a time, but for two things: of dilated_sparse these are
upper bounds, and where two branches of one rate meet in mid-stride, a row more a lane may be counted.
"""

from __future__ import annotations

from typing import Final

from attention.sharding.ranges import Range, Sight, global_queries, seen
from attention.sharding.shards import Shards
from attention.sizes.arrays import Count, ceil_div, maximum, minimum, where

STAGE_SHARE: Final = 4
"""Of what a rank holds, a stage of dilated attention brings at least one part in so many, where that is to
be had: if up to so many query heads read a kv head, rows for as much as its own keys."""


def source_rows(tokens: Count, rate: Count, heads: Count, kv_heads: Count) -> Count:
    """Rows of so many tokens of one source."""
    # Consecutive query heads read a kv head, so that their remainders differ until they have had all.
    return ceil_div(tokens, rate) * kv_heads * minimum(heads // kv_heads, rate)


def rows_between(
    sight: Sight, shards: Shards, rank: Count, peer: Count, causal: bool, heads: Count, kv_heads: Count
) -> Count:
    """Rows that a rank receives of a peer; 0 of itself."""
    chunks = (peer, shards.chunks - 1 - peer) if shards.zigzag else (peer,)
    rows: Count = 0
    for begin, end, rate in _wanted(sight, shards, rank, causal):
        for chunk in chunks:
            low, high = maximum(shards.edge(chunk), begin), minimum(shards.edge(chunk + 1), end)
            rows = rows + source_rows(maximum(high - low, 0), rate, heads, kv_heads)
    return rows * (rank != peer)


def rows_received(
    sight: Sight, shards: Shards, rank: Count, causal: bool, heads: Count, kv_heads: Count
) -> Count:
    """Rows that a rank receives of all its peers."""
    wanted = _wanted(sight, shards, rank, causal)
    if shards.zigzag:
        # All of one rate, and the rank's own tokens are among them, if it has any.
        tokens = sum(maximum(end - begin, 0) for begin, end, _ in wanted)
        return maximum(tokens - shards.tokens(rank), 0) * kv_heads
    before, behind = _beside(shards, rank, wanted)
    return _rows_of_all(shards, before + behind, heads, kv_heads)


def _rows_of_all(shards: Shards, ranges: list[Range], heads: Count, kv_heads: Count) -> Count:
    """Rows that ranges are, a source for each rank of contiguous shards that holds some of one."""
    rows: Count = 0
    for begin, end, rate in ranges:
        first, last = shards.chunk(begin), shards.chunk(maximum(end - 1, begin))
        # Chunks between the first and the last are of two lengths.
        each, more = shards.deal
        between = maximum(last - first - 1, 0)
        longer = minimum(maximum(more - first - 1, 0), between)
        sizes = (
            (1, minimum(shards.edge(first + 1), end) - begin),
            (last > first, end - shards.edge(last)),
            (longer, (each + 1) * shards.unit),
            (between - longer, each * shards.unit),
        )
        for count, tokens in sizes:
            rows = rows + count * source_rows(tokens, rate, heads, kv_heads) * (begin < end)
    return rows


def most_of_one(
    sight: Sight, shards: Shards, rank: Count, causal: bool, heads: Count, kv_heads: Count
) -> Count:
    """The most rows that a rank receives of one peer: an upper bound, and what the nearest peer sends where
    shards are equal, and segments and shards multiples of each other and of the rates."""
    total = rows_received(sight, shards, rank, causal, heads, kv_heads)
    if shards.zigzag:
        return minimum(total, shards.fullest * kv_heads)
    wanted = _wanted(sight, shards, rank, causal)
    before, behind = _beside(shards, rank, wanted)
    begin, end = shards.edge(rank), shards.edge(rank + 1)
    most: Count = 0
    # What a rank sees gets denser from far to near: no peer has more than the fullest one would have nearest.
    for ranges, low, high in (
        (before, begin - shards.fullest, begin),
        (behind[::-1], end, end + shards.fullest),
    ):
        rows, densest = 0 * begin, shards.seq
        for first, stop, rate in ranges:
            # Should it be denser farther off, because segments there are no multiple of a rate, that counts.
            densest = minimum(densest, where(first < stop, rate, shards.seq))
            tokens = maximum(minimum(stop, high) - maximum(first, low), 0)
            rows = rows + source_rows(tokens, densest, heads, kv_heads)
            # Of each range a peer may begin in mid-stride.
            cut = (first % rate > 0) | (shards.unit % rate > 0) | ((stop % rate > 0) & (stop < shards.seq))
            rows = rows + source_rows(1 * (cut & (first < stop)), rate, heads, kv_heads)
        most = maximum(most, rows)
    return minimum(total, most + minimum(sight.shared, shards.fullest) * kv_heads)


def stage_of(sight: Sight, shards: Shards, rank: Count, peer: Count, causal: bool) -> Count:
    """The stage in which a rank of contiguous shards fetches of a peer in dilated attention: nearest first,
    as many peers a stage as bring one part in `STAGE_SHARE` of a shard, or what one of them may bring."""
    return rows_nearer(sight, shards, rank, peer, causal) // _stage_rows(sight, shards, rank, causal)


def stage_count(sight: Sight, shards: Shards, rank: Count, causal: bool) -> Count:
    """The stages in which a rank of contiguous shards fetches in dilated attention, or more."""
    rows = rows_received(sight, shards, rank, causal, 1, 1)
    return ceil_div(rows, _stage_rows(sight, shards, rank, causal))


def rows_nearer(sight: Sight, shards: Shards, rank: Count, peer: Count, causal: bool) -> Count:
    """Rows of a lane that a rank of contiguous shards receives of peers that are nearer than a peer: of two
    as far, the one before the rank is."""
    apart = maximum(rank - peer, peer - rank)
    low = shards.edge(maximum(rank - apart + (peer < rank), 0))
    high = shards.edge(minimum(rank + apart, shards.world))
    before, behind = _beside(shards, rank, _wanted(sight, shards, rank, causal))
    nearer = [(maximum(begin, low), minimum(end, high), rate) for begin, end, rate in before + behind]
    return _rows_of_all(shards, nearer, 1, 1)


def _stage_rows(sight: Sight, shards: Shards, rank: Count, causal: bool) -> Count:
    """Rows of a lane that the peers of a stage bring before there is another one."""
    nearest = most_of_one(sight, shards, rank, causal, 1, 1)
    return maximum(nearest, ceil_div(shards.fullest, STAGE_SHARE))


def _wanted(sight: Sight, shards: Shards, rank: Count, causal: bool) -> list[Range]:
    """What the queries of a rank see, its own tokens among it; ranges that ascend, some of them empty."""
    begin, end = shards.edge(rank), shards.edge(rank + 1)
    if shards.zigzag:
        end = maximum(end, shards.edge(shards.chunks - rank) * (shards.tokens(rank) > end - begin))
    begin = maximum(begin, global_queries(sight, causal))
    limit = where(begin < end, end if causal else shards.seq, 0)
    return [(low, minimum(high, limit), rate) for low, high, rate in seen(sight, shards.seq, begin, end)]


def _beside(shards: Shards, rank: Count, ranges: list[Range]) -> tuple[list[Range], list[Range]]:
    """What of ranges lies before the tokens of a rank of contiguous shards, and what behind them."""
    begin, end = shards.edge(rank), shards.edge(rank + 1)
    before = [(low, minimum(high, begin), rate) for low, high, rate in ranges]
    return before, [(maximum(low, end), high, rate) for low, high, rate in ranges]
