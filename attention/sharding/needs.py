"""Which tokens a rank wants of its peers, and when. Imports no torch.

A *range* (begin, end, rate) of tokens stands for all of them if rate is 1; otherwise, for each query head h,
for those tokens p of it with p % rate == h % rate.
"""

from __future__ import annotations

import math
from bisect import bisect_left, bisect_right
from collections.abc import Iterable, Iterator, Sequence
from itertools import accumulate, pairwise
from typing import NamedTuple

import numpy as np

from attention.config import AttentionConfig
from attention.errors import ConfigError
from attention.layout import is_dilated_sparse, kept_columns
from attention.sharding.shards import Shards
from attention.sizes.arrays import Count, ceil_div, minimum
from attention.sizes.window import window_blocks

Packing = Sequence[Sequence[int]]
"""Tokens of each document of each batch item, or of all items if there is one."""
Range = tuple[int, int, int]


class Source(NamedTuple):
    """The tokens begin..end of one peer, inside one piece of its shard, as keys and values: all of them for
    rate 1; for more, those p of each query head h with p % rate == h % rate."""

    peer: int
    begin: int
    end: int
    rate: int


class Visit(NamedTuple):
    """The tokens begin..end of one peer, inside one piece of its shard, as queries over a rank's own keys."""

    peer: int
    begin: int
    end: int


Stages = tuple[tuple[Source, ...], ...]


def stages(
    config: AttentionConfig, shards: Shards, rank: int, causal: bool, documents: Packing | None = None
) -> Stages:
    """What a rank fetches, in the order in which it is used: never its own tokens, and each token once.

    There are as many stages on every rank of the world, some of them empty. In stage j of dense attention a
    rank's source is the rank j + 1 before it, of those in a ring; in that of dilated attention so too if
    causal, otherwise the nearest rank, the one before it and the one behind it by turns. Others have one
    stage. Sources of a stage ascend.

    Fetched is what some query of the rank sees, and more than that only so:
    - Each branch of dilated attention reaches from the begin of the segment of the rank's first token to the
      end of that of its last one. Where several reach, the rate is the greatest common divisor of theirs, but
      1 if segments are no multiple of that.
    - Documents cut this to those of the rank's first and last token, whichever batch item has more.
    """
    staged: list[list[Source]] = [[] for _ in range(_steps(config, shards, causal))]
    for source in _cut(shards, _wanted(config, shards, rank, causal, documents)):
        if source.peer != rank:
            staged[_step(config, shards, causal, rank, source.peer)].append(source)
    return tuple(map(tuple, staged))


def deliveries(
    config: AttentionConfig, shards: Shards, rank: int, causal: bool, documents: Packing | None = None
) -> Stages:
    """What a rank sends in each of the `stages` of its peers: sources whose `peer` is who fetches them, and
    whose tokens are the rank's own. The peer's sources of a stage ascend, and so do the peers."""
    staged: list[list[Source]] = [[] for _ in range(_steps(config, shards, causal))]
    own = shards.pieces(rank)
    for peer in range(shards.world):
        if peer != rank and own:
            wanted = _wanted(config, shards, peer, causal, documents)
            sources = _cut(shards, _inside(wanted, own))
            staged[_step(config, shards, causal, peer, rank)] += [s._replace(peer=peer) for s in sources]
    return tuple(map(tuple, staged))


def visits(
    config: AttentionConfig, shards: Shards, rank: int, causal: bool, documents: Packing | None = None
) -> tuple[Visit, ...]:
    """The queries of peers that a rank computes over its own keys: global tokens that see every key. Their
    owner merges what comes back; in its `stages` it fetches nothing for them."""
    end = _global_queries(config, shards.seq, causal)
    hulls = [_documents_of(documents, shards.seq, *piece) for piece in shards.pieces(rank)]
    ranges = _disjoint([(begin, min(stop, end), 1, 0) for begin, stop in hulls if begin < end])
    return tuple(Visit(*source[:3]) for source in _cut(shards, ranges) if source.peer != rank)


def visitors(
    config: AttentionConfig, shards: Shards, rank: int, causal: bool, documents: Packing | None = None
) -> tuple[Visit, ...]:
    """The `visits` of a rank's queries at its peers: their `peer` is who computes them."""
    if not shards.pieces(rank) or shards.pieces(rank)[0][0] >= _global_queries(config, shards.seq, causal):
        return ()
    others = (peer for peer in range(shards.world) if peer != rank)
    return tuple(
        visit._replace(peer=peer)
        for peer in others
        for visit in visits(config, shards, peer, causal, documents)
        if visit.peer == rank
    )


# Stages


def _steps(config: AttentionConfig, shards: Shards, causal: bool) -> int:
    """How many stages there are."""
    peers = shards.world - 1
    if config.variant == "dense":
        return peers
    if config.variant == "dilated":
        return peers if causal else 2 * peers
    return min(peers, 1)


def _step(config: AttentionConfig, shards: Shards, causal: bool, rank: int, peer: int) -> int:
    """The stage in which a rank fetches of a peer."""
    if config.variant == "dense" or (config.variant == "dilated" and causal):
        return (rank - peer) % shards.world - 1
    if config.variant == "dilated":
        return 2 * (abs(rank - peer) - 1) + (peer > rank)
    return 0


# Ranges


def _wanted(
    config: AttentionConfig, shards: Shards, rank: int, causal: bool, documents: Packing | None
) -> list[Range]:
    """The tokens that the queries of a rank see, its own among them: ranges that ascend and are disjoint."""
    wanted = []
    for piece in shards.pieces(rank):
        begin, end = max(piece[0], _global_queries(config, shards.seq, causal)), piece[1]
        if begin < end:
            first, stop = _documents_of(documents, shards.seq, begin, end)
            permitted = first, min(stop, end) if causal else stop
            wanted.append(_inside(_seen(config, shards.seq, begin, end, causal), [permitted]))
    if len(wanted) < 2:
        return wanted[0] if wanted else []
    return _disjoint([(*part, 0) for ranges in wanted for part in ranges])


def _global_queries(config: AttentionConfig, seq: int, causal: bool) -> int:
    """The first tokens, which are queries that see every key and travel to them."""
    return 0 if causal else _window(config, seq, causal)[2]


def _window(config: AttentionConfig, seq: Count, causal: bool) -> tuple[Count, Count, Count]:
    """(tokens a block, tokens that a window reaches beyond a query's block, global tokens). A window that
    ends at the token is one of blocks of a token; other attentions have none, and no global tokens."""
    pattern = config.pattern
    if config.variant != "block_sparse" or pattern is None or is_dilated_sparse(config):
        return 1, 0, 0
    size = 1 if config.token_edges else pattern.block_size
    tokens = pattern.global_tokens if pattern.pattern_type == "global_local" else 0
    side, shared = window_blocks(pattern.local_window_size, tokens, size, ceil_div(seq, size), causal)
    return size, side * size, minimum(shared * size, seq)


def _seen(config: AttentionConfig, seq: int, begin: int, end: int, causal: bool) -> list[Range]:
    """The tokens that the queries begin..end see, as ranges that ascend and are disjoint; if causal, some
    behind the queries may be among them."""
    if config.variant == "dense":
        return [(0, seq, 1)]
    if config.variant == "dilated":
        return _disjoint(_hulls(config, seq, begin, end))
    if config.variant == "adaptive":
        raise ConfigError(
            "variant 'adaptive' chooses its keys when it runs, so nobody knows before who needs which; use "
            "exchange='heads'"
        )
    if is_dilated_sparse(config):
        return _listed(config, seq, begin, end, causal)
    size, reach, shared = _window(config, seq, causal)
    first, stop = begin // size * size - reach, ceil_div(end, size) * size + reach
    return _disjoint([(0, shared, 1, 0), (max(first, 0), min(stop, seq), 1, 0)])


def _hulls(config: AttentionConfig, seq: int, begin: int, end: int) -> list[tuple[int, int, int, int]]:
    """(begin, end, rate, period) of each branch of a dilated attention: where the segments of the queries
    begin..end lie, and of how many tokens they are, or 0 if one is all."""
    hulls = []
    for length, rate in config.branches:
        first, stop = begin // length * length, ceil_div(end, length) * length
        hulls.append((first, min(stop, seq), rate, length if length < seq else 0))
    return hulls


def _disjoint(hulls: Iterable[tuple[int, int, int, int]]) -> list[Range]:
    """The union of (begin, end, rate, period), of each the tokens p with p % period % rate == h % rate, as
    ranges that ascend and are disjoint, of the rate that all of them have in common."""
    hulls = [hull for hull in hulls if hull[0] < hull[1]]
    ranges: list[Range] = []
    for begin, end in pairwise(sorted({edge for hull in hulls for edge in hull[:2]})):
        here = [hull for hull in hulls if hull[0] <= begin and end <= hull[1]]
        rate = math.gcd(*(hull[2] for hull in here))
        if any(period % rate for *_, period in here):
            rate = 1
        if ranges and ranges[-1][1:] == (begin, rate):
            ranges[-1] = (ranges[-1][0], end, rate)
        elif here:
            ranges.append((begin, end, rate))
    return ranges


def _listed(config: AttentionConfig, seq: int, begin: int, end: int, causal: bool) -> list[Range]:
    """The blocks that the rows of a dilated_sparse layout with the queries begin..end keep, in runs."""
    assert config.pattern is not None
    size = config.pattern.block_size
    rows = np.arange(begin // size, ceil_div(end, size))
    blocks = kept_columns(config, seq, causal, rows)
    breaks = np.flatnonzero(np.diff(blocks) > 1)
    firsts = blocks[np.concatenate([[0], breaks + 1])].tolist()
    lasts = blocks[np.concatenate([breaks, [-1]])].tolist()
    return [(first * size, min((last + 1) * size, seq), 1) for first, last in zip(firsts, lasts, strict=True)]


def _documents_of(documents: Packing | None, seq: int, begin: int, end: int) -> tuple[int, int]:
    """From where to where the documents of the tokens begin..end go, of the batch items together; the whole
    sequence without documents."""
    if documents is None:
        return 0, seq
    edges = [[0, *accumulate(lengths)] for lengths in documents]
    firsts = (item[bisect_right(item, begin) - 1] for item in edges)
    lasts = (item[bisect_left(item, end)] for item in edges)
    return min(firsts), max(lasts)


def _inside(ranges: Iterable[Range], bounds: Sequence[tuple[int, int]]) -> list[Range]:
    """What of ascending ranges lies within bounds, which ascend too and do not meet."""
    return [
        (max(begin, low), min(end, high), rate)
        for begin, end, rate in ranges
        for low, high in bounds
        if begin < high and low < end
    ]


def _cut(shards: Shards, ranges: Iterable[Range]) -> Iterator[Source]:
    """The ranges, cut to the pieces of those who hold their tokens."""
    for begin, end, rate in ranges:
        chunk = shards.chunk(begin)
        while begin < end:
            chunk += 1
            stop = min(shards.edge(chunk), end)
            if begin < stop:
                yield Source(shards.holder(chunk - 1), begin, stop, rate)
            begin = max(begin, stop)
