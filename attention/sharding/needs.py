"""Which tokens a rank wants of its peers, and when. Imports no torch."""

from __future__ import annotations

from bisect import bisect_left, bisect_right
from collections.abc import Iterable, Iterator, Sequence
from functools import lru_cache
from itertools import accumulate
from typing import Any, NamedTuple

import numpy as np

from attention.config import AttentionConfig
from attention.layout import is_dilated_sparse, kept_columns, kept_hull
from attention.sharding.ranges import Range, global_queries, hull, seen, sight_of
from attention.sharding.rows import rows_between, stage_count, stage_of
from attention.sharding.shards import Shards
from attention.sizes.arrays import Ints, ceil_div

Packing = Sequence[Sequence[int]]
"""Tokens of each document of each batch item, or of all items if there is one."""


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
    config: AttentionConfig,
    shards: Shards,
    rank: int,
    causal: bool,
    documents: Packing | None = None,
    *,
    looks: bool = True,
) -> Stages:
    """What a rank fetches, in the order in which it is used: never its own tokens, and each token once.

    There are as many stages on every rank of the world, some of them empty. In stage j of dense attention a
    rank's source is the rank j + 1 before it, of those in a ring. A stage of dilated attention has several
    peers, nearest first (`attention.sharding.rows.stage_of`). Others have one stage. Sources of a stage
    ascend.

    Fetched is what some query of the rank sees, and more than that only so:
    - Each branch of dilated attention reaches from the begin of the segment of the rank's first token to the
      end of that of its last one. Where several reach, the rate is the greatest common divisor of theirs, but
      1 if segments are no multiple of that.
    - Documents cut this to those of the rank's first and last token, whichever batch item has more.

    Unless it `looks` at all rows of a dilated_sparse layout, all is fetched between the farthest blocks that
    some of them keep.
    """
    wanted = _wanted(config, shards, rank, causal, documents, looks=looks)
    sources = [source for source in _cut(shards, wanted) if source.peer != rank]
    steps = _steps(config, shards, causal, rank, np.array([source.peer for source in sources], np.int64))
    return _staged(config, shards, causal, zip(steps, sources, strict=True))


def deliveries(
    config: AttentionConfig,
    shards: Shards,
    rank: int,
    causal: bool,
    documents: Packing | None = None,
    *,
    looks: bool = True,
) -> Stages:
    """What a rank sends in each of the `stages` of its peers: sources whose `peer` is who fetches them, and
    whose tokens are the rank's own. The peer's sources of a stage ascend, and so do the peers."""
    sight, ranks, own = sight_of(config, shards.seq, causal), np.arange(shards.world), shards.pieces(rank)
    # An upper bound, so that of many ranks those that fetch nothing here are not asked what they want.
    rows: Any = rows_between(sight, shards, ranks, rank, causal, 1, 1)  # type: ignore[arg-type]
    peers = np.flatnonzero(rows)
    given: list[tuple[int, Source]] = []
    for step, peer in zip(_steps(config, shards, causal, peers, rank), peers.tolist(), strict=True):
        wanted = _wanted(config, shards, peer, causal, documents, looks=looks)
        sources = _cut(shards, _inside(wanted, own))
        given += [(step, source._replace(peer=peer)) for source in sources]
    return _staged(config, shards, causal, given)


def visits(
    config: AttentionConfig, shards: Shards, rank: int, causal: bool, documents: Packing | None = None
) -> tuple[Visit, ...]:
    """The queries of peers that a rank computes over its own keys: global tokens that see every key. Their
    owner merges what comes back; in its `stages` it fetches nothing for them."""
    end = global_queries(sight_of(config, shards.seq, causal), causal)
    hulls = (_documents_of(documents, shards.seq, *piece) for piece in shards.pieces(rank))
    ranges = _merged((begin, min(stop, end), 1) for begin, stop in hulls)
    return tuple(Visit(*source[:3]) for source in _cut(shards, ranges) if source.peer != rank)


def visitors(
    config: AttentionConfig, shards: Shards, rank: int, causal: bool, documents: Packing | None = None
) -> tuple[Visit, ...]:
    """The `visits` of a rank's queries at its peers: their `peer` is who computes them."""
    others = (peer for peer in range(shards.world) if peer != rank)
    return tuple(
        visit._replace(peer=peer)
        for peer in others
        for visit in visits(config, shards, peer, causal, documents)
        if visit.peer == rank
    )


def asking(
    config: AttentionConfig, seq: int, queries: tuple[int, int], keys: tuple[int, int], causal: bool
) -> tuple[int, int]:
    """(first, one past the last) of those among some queries that may see one of some keys, both given
    likewise: the others see none. None may if it is empty."""
    sight = sight_of(config, seq, causal)
    (first, stop), (begin, end) = queries, keys
    if begin >= sight.shared:
        hulls = [hull(band, seq, begin, end) for band in sight.bands]
        stop = min(stop, max(last for _, last in hulls))
        if first >= global_queries(sight, causal):
            first = max(first, min(earliest for earliest, _ in hulls))
    return max(first, begin) if causal else first, stop


# Stages


def _staged(
    config: AttentionConfig, shards: Shards, causal: bool, sources: Iterable[tuple[int, Source]]
) -> Stages:
    """The stages of sources, each of which comes with that which it is in."""
    staged: list[list[Source]] = [[] for _ in range(_stage_count(config, shards, causal))]
    for step, source in sources:
        staged[step].append(source)
    return tuple(map(tuple, staged))


@lru_cache(maxsize=64)
def _stage_count(config: AttentionConfig, shards: Shards, causal: bool) -> int:
    """How many stages there are."""
    peers = shards.world - 1
    if config.variant == "dilated":
        sight, ranks = sight_of(config, shards.seq, causal), np.arange(shards.world)
        return int(np.max(stage_count(sight, shards, ranks, causal)))  # type: ignore[arg-type]
    return peers if config.variant == "dense" else min(peers, 1)


def _steps(
    config: AttentionConfig, shards: Shards, causal: bool, rank: int | Ints, peer: int | Ints
) -> list[int]:
    """The stages in which a rank fetches of peers, or ranks of a peer."""
    ranks, peers = np.broadcast_arrays(rank, peer)
    if config.variant == "dense":
        steps = (ranks - peers) % shards.world - 1
    elif config.variant == "dilated":
        sight = sight_of(config, shards.seq, causal)
        steps = np.broadcast_to(stage_of(sight, shards, ranks, peers, causal), ranks.shape)  # type: ignore[arg-type]
    else:
        steps = np.zeros_like(ranks)
    some: list[int] = steps.tolist()
    return some


# Ranges


def _wanted(
    config: AttentionConfig,
    shards: Shards,
    rank: int,
    causal: bool,
    documents: Packing | None,
    *,
    looks: bool,
) -> list[Range]:
    """What the queries of a rank see, its own tokens among it: ranges that ascend and are disjoint, none of
    them empty."""
    sight = sight_of(config, shards.seq, causal)
    wanted: list[Range] = []
    for piece in shards.pieces(rank):
        begin, end = max(piece[0], global_queries(sight, causal)), piece[1]
        if begin < end:
            first, stop = _documents_of(documents, shards.seq, begin, end)
            permitted = first, min(stop, end) if causal else stop
            if is_dilated_sparse(config):
                ranges = (_listed if looks else _between)(config, shards.seq, begin, end, causal)
            else:
                ranges = seen(sight, shards.seq, begin, end)
            wanted += _inside(ranges, [permitted])
    return _merged(wanted)


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


@lru_cache(maxsize=4096)
def _between(config: AttentionConfig, seq: int, begin: int, end: int, causal: bool) -> list[Range]:
    """One range of about all that `_listed` has."""
    assert config.pattern is not None
    size = config.pattern.block_size
    first, stop = kept_hull(config, seq, causal, (begin // size, ceil_div(end, size)))
    return [(first * size, min(stop * size, seq), 1)]


def _documents_of(documents: Packing | None, seq: int, begin: int, end: int) -> tuple[int, int]:
    """From where to where the documents of the tokens begin..end go, of the batch items together; the whole
    sequence without documents."""
    if documents is None:
        return 0, seq
    edges = [[0, *accumulate(lengths)] for lengths in documents]
    firsts = (item[bisect_right(item, begin) - 1] for item in edges)
    lasts = (item[bisect_left(item, end)] for item in edges)
    return min(firsts), max(lasts)


def _merged(ranges: Iterable[Range]) -> list[Range]:
    """The ranges, none of them empty, those of one rate that meet as one."""
    merged: list[Range] = []
    for begin, end, rate in sorted(ranges):
        if begin < end and merged and merged[-1][2] == rate and begin <= merged[-1][1]:
            merged[-1] = (merged[-1][0], max(end, merged[-1][1]), rate)
        elif begin < end:
            merged.append((begin, end, rate))
    return merged


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
