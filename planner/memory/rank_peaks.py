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
from attention.sharding.rows import rows_between, rows_received, stage_of
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
    """The plan of the rank with most tokens."""
    found = np.empty(len(columns), np.int64)
    goes = np.broadcast_to(np.asarray(goes_apart(columns, share, machine), bool), len(columns))
    own = share.model_copy(update={"heads": workload.heads, "kv_heads": workload.groups, "documents": None})
    for apart in (True, False):
        which = np.flatnonzero(goes == apart)
        if not which.size:
            continue
        some = columns if which.size == len(columns) else columns.take(which)
        tokens: Any = shards_of_columns(some, world).fullest
        case = case_of(replace(some, seq=tokens), own, machine)
        case = case._replace(shape=case.shape._replace(causal=share.causal))
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
    cuts = share.mode == "training" and machine.windows(share.head_dim, share.itemsize) == "any"
    if (columns.variant == "dense" or columns.pattern_type == "local_window") and not cuts:
        # Its own part is the attention of one device over its tokens, where blocks begin with them; but for
        # a backward pass of whole calls, of which those of a rank's parts are shorter.
        begins = columns.variant == "dense" or columns.token_edges
        whole = begins | (shards.edge(rank) % np.asarray(columns.block_size) == 0)
        alike: Any = peaks(replace(columns, seq=tokens), alone, machine)
        own = where(whole, alike, own)
    near = _neighbours(columns, share, shards, rank)
    pair = 2 * share.batch * share.head_dim * share.itemsize
    fetched, next_fetched = pair * near.rows, pair * near.next_rows
    if columns.pattern_type == "dilated_sparse":  # own keys are copied to what is fetched
        return RankPeaks(nobody + sizes.floor + 2 * sizes.keys + fetched, nobody + near.peers)
    meeting = sizes.floor + fetched + next_fetched + sizes.wider(share.heads * near.wide_out)
    if sizes.trains:
        meeting = meeting + sizes.wider(2 * share.groups * near.wide_keys)
        meeting = meeting + pair * near.nearest_rows * sizes.travel // share.itemsize
    least = maximum(own + fetched, meeting * (near.rows > 0))
    return RankPeaks(nobody + least, nobody + near.peers)


def _looked_at(columns: Columns, causal: bool, world: int) -> int:
    """The rank that is looked at: none that may have a last, short shard, nor one without neighbours."""
    if sharding_of(columns).shards == "zigzag":
        return 0
    return world // 2 if columns.variant == "dense" or not causal else max(world - 2, 1)


class _Sizes(NamedTuple):
    """Bytes of a rank."""

    token: Count
    """Of a token of one head."""
    keys: Count
    """Of k, as of v."""
    floor: Count
    """Of what is there when all is computed: q, k, v, out, its log-sum-exp, and their gradients."""
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
        floor = (2 * query + 2 * keys) * (1 + trains) + share.batch * share.heads * w * tokens
        return cls(token, keys, floor, e, w, w if travels_wide else e, trains)

    def wider(self, tokens: Count) -> Count:
        """What so many tokens of a head take more in single precision."""
        return self.token * tokens * self.wide // self.itemsize - self.token * tokens


class _Neighbours(NamedTuple):
    """What a rank has to do with the others."""

    rows: Count
    """Rows that it fetches in the first stage; see `attention.sharding.rows`."""
    next_rows: Count
    """Rows that it fetches in the second stage."""
    nearest_rows: Count
    """Rows that it fetches of the nearest rank, where their gradients are there with all else."""
    peers: Count
    wide_out: Count
    """Own queries in which more than two parts meet, at least."""
    wide_keys: Count
    """Own keys in whose gradients more than two parts meet, at least."""


def _neighbours(columns: Columns, share: Workload, shards: Shards, rank: int) -> _Neighbours:
    causal, heads, groups = share.causal, share.heads, share.groups
    seen, world, seq = sight_of_columns(columns, causal), int(shards.world), shards.seq
    tokens = shards.tokens(rank)
    if columns.variant == "dense":
        rows, next_rows = (groups * shards.tokens((rank - back) % world) for back in (1, 2))
        stages = rank if causal and not shards.zigzag else world - 1
        after = world - 1 - rank if causal else world - 1
        wide_keys = tokens * (after > 1 and not shards.zigzag)
        return _Neighbours(rows, next_rows * (stages > 1), rows, world - 1, tokens * (stages > 1), wide_keys)
    begin, end = shards.edge(rank), shards.edge(rank + 1)
    first, last = _hull(seen, seq, begin, end)
    before = rank - shards.chunk(minimum(first, maximum(end - 1, 0)))
    after = shards.chunk(maximum(last - 1, begin)) - rank
    if columns.variant == "dilated":
        nearest = rows_between(seen, shards, rank, rank - 1, causal, heads, groups)
        second = rank - 2 if causal else rank + 1
        there = 0 <= second < world
        more = rows_between(seen, shards, rank, second, causal, heads, groups) if there else 0 * nearest
        together = (stage_of(seen, shards, rank, second, causal) == 0) if there else 0 * begin
        asked, giving = 0 * begin, 0 * begin
        if rank > 1:  # what is fetched of both in one stage may be one part
            apart = stage_of(seen, shards, rank, rank - 2, causal) > 0
            asked = apart * (
                minimum(_hull(seen, seq, shards.edge(rank - 2), shards.edge(rank - 1))[1], end) - begin
            )
        if rank + 2 < world:
            giving = end - maximum(_hull(seen, seq, shards.edge(rank + 2), shards.edge(rank + 3))[0], begin)
        wide = (_at_least(asked, tokens), _at_least(giving, tokens))
        first, later = nearest + more * together, more * (1 - together)
        return _Neighbours(first, later, nearest, before + after, *wide)
    rows = rows_received(seen, shards, rank, causal, heads, groups)
    peers = (before > 0) * 1 + (after > 0)
    if columns.pattern_type == "dilated_sparse":  # of which that is an upper bound
        rows = rows * 0
    nearest = rows * (columns.pattern_type == "local_window")
    return _Neighbours(rows, 0 * rows, nearest, peers, 0 * rows, 0 * rows)


def _hull(seen: Sight, seq: Count, begin: Count, end: Count) -> tuple[Count, Count]:
    """`attention.sharding.ranges.hull` of all bands."""
    hulls = [hull(band, seq, begin, end) for band in seen.bands]
    return minimum(*(one for one, _ in hulls), end), maximum(*(one for _, one in hulls), begin)


def _at_least(wide: Count, tokens: Count) -> Count:
    """Tokens that are kept in single precision where so many need it: all, where those are most."""
    return where(2 * wide > tokens, tokens, maximum(wide, 0))
