"""How many bytes a rank and each of its peers send each other. Imports no torch."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Sequence
from itertools import chain
from typing import Any, Literal, NamedTuple

import numpy as np

from attention.config import AttentionConfig
from attention.sharding.needs import Packing, Stages, Visit, deliveries, stages, visitors, visits
from attention.sharding.ranges import global_queries, sight_of
from attention.sharding.rows import rows_received, source_rows
from attention.sharding.shards import Shards

PeerBytes = dict[int, tuple[int, int]]
Exchanged = Literal["keys", "heads"]


class Traffic(NamedTuple):
    """What a rank exchanges in a call: {peer: (bytes sent, bytes received)} of all peers that there is
    anything for. What ranks say to agree on a call is not counted."""

    forward: PeerBytes
    backward: PeerBytes
    """Empty without a backward pass."""


def travels_wide(config: AttentionConfig) -> bool:
    """Whether gradients travel in single precision."""
    return config.sharding is not None and config.sharding.travel == "float32"


def traffic(
    config: AttentionConfig,
    shards: Shards,
    rank: int,
    causal: bool,
    *,
    batch: int,
    heads: int,
    kv_heads: int,
    head_dim: int,
    itemsize: int,
    training: bool,
    exchange: Exchanged,
    documents: Packing | None = None,
) -> Traffic:
    """The traffic of a rank, from sizes alone. `heads` and `kv_heads` are of the whole attention, and the
    world divides both where heads are exchanged.

    keys: forward, the keys and values of each source go to who fetches it. Queries that visit go to the keys,
    and their output and log-sum-exp come back. Backward, keys and values are fetched again and their
    gradients go to the owner. Visiting queries go again, with the output, its gradient and the log-sum-exp,
    and their gradient comes back. Gradients travel in the type of the tensors, or where travel="float32" in
    at least single precision.

    heads: forward, each rank sends the queries, keys and values of its tokens to who has their heads, and
    gets the output back. Backward, the gradient of the output goes there, and those of the others come back.
    """
    # (a rank's own to each peer, what each peer has for it), and for one of them the bytes that go there and
    # those that come back for it.
    goods: list[tuple[Counter[int], Counter[int]]]
    forward: list[tuple[int, int]]
    if exchange == "heads":
        part = batch * head_dim * itemsize
        inputs, output = part * (heads + 2 * kv_heads) // shards.world, part * heads // shards.world
        peers = [peer for peer in range(shards.world) if peer != rank]
        own = Counter({peer: shards.tokens(rank) for peer in peers})
        goods = [(own, Counter({peer: shards.tokens(peer) for peer in peers}))]
        forward, backward = [(inputs, output)], [(output, inputs)]
    else:
        plan = config, shards, rank, causal, documents
        goods = [
            (_rows(deliveries(*plan), heads, kv_heads), _rows(stages(*plan), heads, kv_heads)),
            (_queries(visitors(*plan)), _queries(visits(*plan))),
        ]
        wide = max(itemsize, 4)
        travel = wide if travels_wide(config) else itemsize
        pair, query, lse = 2 * batch * head_dim, batch * heads * head_dim, batch * heads * wide
        forward = [(pair * itemsize, 0), (query * itemsize, query * itemsize + lse)]
        backward = [(pair * itemsize, pair * travel), (3 * query * itemsize + lse, query * travel)]
    return Traffic(_bytes(goods, forward), _bytes(goods, backward) if training else {})


def fewer_bytes(
    config: AttentionConfig,
    shards: Shards,
    causal: bool,
    *,
    heads: int,
    kv_heads: int,
    head_dim: int,
    itemsize: int,
) -> Exchanged:
    """The exchange that moves fewer bytes forward, of all ranks together: keys, unless the world divides the
    kv heads and it is heads. Of dilated_sparse, keys count as an upper bound of them. Not for adaptive."""
    if kv_heads % shards.world:
        return "keys"
    sight, ranks = sight_of(config, shards.seq, causal), np.arange(shards.world)
    rows: Any = rows_received(sight, shards, ranks, causal, heads, kv_heads)  # type: ignore[arg-type]
    keys = 2 * head_dim * itemsize * int(rows.sum())
    visits = global_queries(sight, causal) * shards.chunk(shards.seq - 1)
    keys += visits * heads * (2 * head_dim * itemsize + max(itemsize, 4))
    numbers = (heads + kv_heads) * 2 * head_dim * (shards.world - 1) // shards.world
    return "heads" if shards.seq * numbers * itemsize < keys else "keys"


def _rows(stages: Stages, heads: int, kv_heads: int) -> Counter[int]:
    """The rows of all sources of each peer."""
    rows: Counter[int] = Counter()
    for peer, begin, end, rate in chain.from_iterable(stages):
        rows[peer] += source_rows(end - begin, rate, heads, kv_heads)
    return rows


def _queries(visits: Iterable[Visit]) -> Counter[int]:
    """The query tokens of all visits of each peer."""
    tokens: Counter[int] = Counter()
    for peer, begin, end in visits:
        tokens[peer] += end - begin
    return tokens


def _bytes(goods: Sequence[tuple[Counter[int], Counter[int]]], costs: Sequence[tuple[int, int]]) -> PeerBytes:
    """(sent, received) for each peer with anything to send or receive."""
    sent: Counter[int] = Counter()
    received: Counter[int] = Counter()
    for (own, theirs), (there, back) in zip(goods, costs, strict=True):
        for counts, going, coming in ((own, sent, received), (theirs, received, sent)):
            for peer, count in counts.items():
                going[peer] += count * there
                coming[peer] += count * back
    return {peer: (sent[peer], received[peer]) for peer in sorted(sent) if sent[peer] or received[peer]}
