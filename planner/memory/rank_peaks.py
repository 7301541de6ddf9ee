"""The least memory of many candidates that ranks share, in closed form: the plan of each, as
`planner.memory.sharded` has it of one, would take a second for a hundred. Imports no torch.

Where heads are exchanged it is the plan itself. Where keys are, it is what is alive at the same time as a
rank computes its own part, whose plan is that of one device over its own tokens, and as it adds the part of
the nearest rank. One rank is looked at, so that it is at most the peak of the fullest.

Letters as in `planner/memory/plans/tiles.py`: T own tokens of H heads and G kv heads, W ranks.
"""

from __future__ import annotations

from dataclasses import replace
from typing import Any, NamedTuple

import numpy as np

from attention.sharding.ranges import Sight, hull, sight
from attention.sharding.rows import rows_between, rows_received
from attention.sharding.shards import Shards, unit_of
from attention.sizes.arrays import Count, Ints, maximum, minimum, where
from planner.configs import Columns
from planner.memory.dispatch import attention_of_columns, case_of, goes_apart
from planner.memory.machines import Machine
from planner.memory.peaks import peaks
from planner.memory.plans import tiles
from planner.memory.plans.head_exchange import head_exchange
from planner.memory.table import PlanTable
from planner.ranks.ring import exchanges_heads, ring_of, sharding_of, share_of
from planner.workload import Workload


class RankPeaks(NamedTuple):
    """Of candidates that ranks share, an entry each."""

    least: Ints
    """Bytes at the peak of the fullest rank, or fewer."""
    peers: Ints
    """Ranks that it sends to or hears from, or fewer."""


def rank_peaks(columns: Columns, workload: Workload, machine: Machine) -> RankPeaks:
    """The figures of candidates on a workload of several GPUs; `workload.seq` is not read."""
    world = ring_of(columns, workload).world
    share = share_of(columns, workload)
    if world == 1:
        return RankPeaks(peaks(columns, share, machine), np.zeros(len(columns), np.int64))
    if exchanges_heads(columns):
        every = np.full(len(columns), world - 1)
        return RankPeaks(_by_heads(columns, workload, share, machine, world), every)
    return _by_keys(columns, share, machine, world)


def sight_of_columns(columns: Columns, causal: bool) -> Sight:
    """`attention.sharding.ranges.sight_of` of candidates."""
    untyped: Any = columns
    return sight(
        columns.variant,
        columns.pattern_type,
        untyped.seq,
        causal,
        size=untyped.block_size,
        window=untyped.window,
        global_tokens=untyped.global_tokens,
        ratio=untyped.sparsity_ratio,
        lengths=untyped.lengths,
        rates=untyped.rates,
        edges=columns.edges,
    )


def shards_of_columns(columns: Columns, world: int) -> Shards:
    """`attention.sharding.shards.shards_of` of candidates."""
    zigzag = sharding_of(columns).shards == "zigzag"
    seq: Any = columns.seq
    return Shards(seq, world, unit_of(seq, 2 * world if zigzag else world), zigzag)


def _by_heads(columns: Columns, workload: Workload, share: Workload, machine: Machine, world: int) -> Ints:
    """The plan of the first rank, which has most tokens."""
    found = np.empty(len(columns), np.int64)
    goes = np.broadcast_to(np.asarray(goes_apart(columns, share, machine), bool), len(columns))
    own = share.model_copy(update={"heads": workload.heads, "kv_heads": workload.groups, "documents": None})
    for apart in (True, False):
        which = np.flatnonzero(goes == apart)
        if not which.size:
            continue
        some = columns if which.size == len(columns) else columns.take(which)
        tokens: Any = shards_of_columns(some, world).tokens(0)
        case = case_of(replace(some, seq=tokens), own, machine)
        case = case._replace(shape=case.shape._replace(causal=share.causal, cudnn_from=0))
        twin, attention = attention_of_columns(some, share, machine, apart=apart)
        table = PlanTable()
        tiles.inputs(table, case)
        head_exchange(table, case, twin, world, attention)
        found[which] = table.done().peaks()
    return found


def _by_keys(columns: Columns, share: Workload, machine: Machine, world: int) -> RankPeaks:
    causal = share.causal
    shards = shards_of_columns(columns, world)
    rank = _looked_at(columns, causal, world)
    tokens: Any = maximum(shards.tokens(rank), 1)
    alone = share.model_copy(update={"documents": None})
    sizes = _Sizes.of(share, tokens, sharding_of(columns).travel == "float32")
    nobody = np.zeros(len(columns), np.int64)
    if share.documents is not None:  # which may keep ranks apart
        return RankPeaks(nobody + sizes.floor, nobody)
    own: Count = sizes.floor
    if columns.variant == "dense" or columns.pattern_type == "local_window":
        # Its own part is the attention of one device over its tokens, where blocks begin with them.
        begins = columns.variant == "dense" or columns.token_edges
        whole = begins | (shards.edge(rank) % np.asarray(columns.block_size) == 0)
        alike: Any = peaks(replace(columns, seq=tokens), alone, machine)
        own = where(whole, alike, own)
    near = _neighbours(columns, share, shards, rank)
    pair = 2 * share.batch * share.head_dim * share.itemsize
    fetched, next_fetched = pair * near.rows, pair * near.next_rows
    if columns.pattern_type == "dilated_sparse":  # own keys are copied to what is fetched
        return RankPeaks(nobody + sizes.floor + 2 * sizes.keys + fetched, nobody + near.peers)
    meeting = sizes.floor + fetched + next_fetched
    meeting = meeting + (sizes.wider(sizes.query) * near.wide_out) + near.asked * sizes.a_query
    if sizes.trains:
        meeting = meeting + sizes.wider(2 * sizes.keys) * near.wide_keys
        meeting = meeting + pair * near.nearest_rows * sizes.travel // share.itemsize
        if columns.variant == "dense" or columns.token_edges:
            # Where kernels take whole calls, a part takes about what as large a share of its own does.
            met = minimum(near.asked, near.nearest_rows // share.groups, tokens)
            meeting = meeting + maximum(own - sizes.floor, 0) * met // (tokens + tokens // 8)
    return RankPeaks(nobody + maximum(own + fetched, meeting * (near.asked > 0)), nobody + near.peers)


def _looked_at(columns: Columns, causal: bool, world: int) -> int:
    """The rank that is looked at: none that may have a last, short shard, nor one without neighbours."""
    if sharding_of(columns).shards == "zigzag":
        return 0
    return world // 2 if columns.variant == "dense" or not causal else max(world - 2, 1)


class _Sizes(NamedTuple):
    """Bytes of a rank."""

    query: Count
    """Of q, as of out."""
    keys: Count
    """Of k, as of v."""
    floor: Count
    """Of what is there when all is computed: q, k, v, out, its log-sum-exp, and the gradients of all but
    the last."""
    a_query: Count
    """Of a part's result for one query: out and log-sum-exp forward, or if it trains dq."""
    itemsize: int
    wide: int
    travel: int
    """Bytes of a number of a gradient that travels."""
    trains: bool

    @classmethod
    def of(cls, share: Workload, tokens: Count, travels_wide: bool) -> _Sizes:
        e, w, trains = share.itemsize, max(share.itemsize, 4), share.mode == "training"
        token = share.batch * share.head_dim * e
        query, keys = tokens * token * share.heads, tokens * token * share.groups
        lse = share.batch * share.heads * w
        floor = (2 * query + 2 * keys) * (1 + trains) + lse * tokens
        a_query = token * share.heads + lse * (not trains)
        return cls(query, keys, floor, a_query, e, w, w if travels_wide else e, trains)

    def wider(self, nbytes: Count) -> Count:
        """What so many bytes take more in single precision."""
        return nbytes * self.wide // self.itemsize - nbytes


class _Neighbours(NamedTuple):
    """What a rank has to do with the others."""

    rows: Count
    """Rows that it fetches in the first stage; see `attention.sharding.rows`."""
    next_rows: Count
    """Rows that it fetches in the second stage."""
    nearest_rows: Count
    """Rows that it fetches of the nearest rank."""
    asked: Count
    """Own queries that see those."""
    peers: Count
    wide_out: Count
    """Whether more than two parts meet in some of its queries, else 0."""
    wide_keys: Count
    """Whether more than two gradients meet in some of its keys, else 0."""


def _neighbours(columns: Columns, share: Workload, shards: Shards, rank: int) -> _Neighbours:
    causal, heads, groups = share.causal, share.heads, share.groups
    seen, world, seq = sight_of_columns(columns, causal), int(shards.world), shards.seq
    if columns.variant == "dense":
        rows, next_rows = (groups * shards.tokens((rank - back) % world) for back in (1, 2))
        stages = min(rank, world - 1) if causal and not shards.zigzag else world - 1
        asked = shards.edge(shards.chunks - rank) - shards.edge(shards.chunks - 1 - rank)
        asked = asked if shards.zigzag else shards.tokens(rank)
        after = world - 1 - rank if causal else world - 1
        return _Neighbours(
            rows,
            next_rows * (stages > 1),
            rows,
            asked,
            world - 1,
            stages > 1,
            not shards.zigzag and after > 1,
        )
    begin, end = shards.edge(rank), shards.edge(rank + 1)
    hulls = [hull(band, seq, begin, end) for band in seen.bands]
    first, last = minimum(*(one for one, _ in hulls), end), maximum(*(one for _, one in hulls), begin)
    before = rank - shards.chunk(minimum(first, maximum(end - 1, 0)))
    after = shards.chunk(maximum(last - 1, begin)) - rank
    back = [hull(band, seq, shards.edge(rank - 1), begin) for band in seen.bands]
    nearest = rows_between(seen, shards, rank, rank - 1, causal, heads, groups)
    asked = (minimum(end, maximum(*(one for _, one in back), begin)) - begin) * (nearest > 0)
    if columns.variant == "dilated":
        second = rank - 2 if causal else rank + 1
        there = 0 <= second < world
        more = rows_between(seen, shards, rank, second, causal, heads, groups) if there else 0 * nearest
        wide: Count = before > 1
        return _Neighbours(nearest, more, nearest, asked, before + after, wide, after > 1)
    rows = rows_received(seen, shards, rank, causal, heads, groups)
    if columns.pattern_type == "dilated_sparse":
        rows = rows * 0
    wide = 0 * asked
    if causal and columns.pattern_type == "global_local":
        # Its own keys, those of the window, and the first ones, which adjoin neither.
        wide = (seen.shared > 0) * (asked > 0) * (first > seen.shared)
        asked, nearest = where(wide, end - begin, asked), where(wide, 0, nearest)
    peers = (before > 0) * 1 + (after > 0)
    return _Neighbours(rows, 0 * rows, nearest, asked, peers, wide, 0 * wide)
