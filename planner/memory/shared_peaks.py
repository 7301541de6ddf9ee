"""Memory peaks of many candidates that ranks share, bounded in closed form. Imports no torch.

One candidate's plan (`planner.memory.sharded`) looks at the calls of each part; here the largest that parts,
stages and messages can be are added up as if they all came together.
"""

from __future__ import annotations

from dataclasses import replace
from typing import Any, Final, Literal, NamedTuple

import numpy as np

from attention.sharding.plan import SLAB_SHARE, SLAB_TOKENS
from attention.sharding.ranges import Sight, global_queries, sight
from attention.sharding.rows import most_of_one, rows_received, rows_sent
from attention.sharding.shards import FULLEST, Shards
from attention.sizes.arena import arena_bytes, bucket_bytes
from attention.sizes.arrays import Count, Ints, ceil_div, maximum, minimum, where
from attention.sizes.shape import Shape
from attention.sizes.tiles import SUM_BYTES, backward_sizes, forward_sizes, sums_in_full
from attention.sizes.whole_calls import floor_bytes
from planner.configs import Columns
from planner.memory.dispatch import bounded_cut, calls_of, case_of, goes_apart, planned
from planner.memory.machines import Machine
from planner.memory.plans import tiles, whole_calls
from planner.memory.plans.tiles import Case
from planner.memory.table import PlanTable
from planner.workload import Workload

RANKS: Final = 16
"""Ranks that are looked at, of many."""
ARENAS: Final = 3
"""Sizes of arenas that the pool may keep for a rank's parts."""


def shared_peaks(
    columns: Columns,
    workload: Workload,
    machine: Machine,
    world: int,
    *,
    exchange: Literal["keys", "heads"],
    zigzag: bool = False,
    travels_wide: bool = False,
) -> Ints:
    """Upper bounds of the bytes at the peak of the fullest of `world` ranks, for each candidate. `workload`
    is of one ring, and its `gpus` are not read; nor is its `seq`."""
    workload = workload.model_copy(update={"gpus": 1})
    untyped: Any = columns
    shards = Shards(untyped.seq, world, unit_of(columns, world), zigzag)
    own = _own_case(columns, workload, machine, shards)
    if exchange == "heads":
        peaks = _by_heads(columns, workload, own, shards)
    else:
        peaks = _by_keys(columns, workload, own, shards, travels_wide=travels_wide)
    return np.broadcast_to(np.asarray(peaks, np.int64), len(columns)).copy()


def unit_of(columns: Any, world: int) -> Count:
    """Tokens in which candidates are dealt, as `attention.sharding.shards.shards_of` has it."""
    size: Count = columns.block_size
    if columns.variant in ("block_sparse", "adaptive"):
        return size
    unit: Count = 1
    above, below = FULLEST
    for length in columns.lengths if columns.variant == "dilated" else ():
        length = minimum(length, columns.seq)
        even = Shards(columns.seq, world, length).tokens(0) * world * below <= columns.seq * above
        unit = maximum(unit, where(even, length, 1))
    return unit


def _own_case(columns: Columns, workload: Workload, machine: Machine, shards: Shards) -> Case:
    """The case of the fullest rank's tokens of all heads."""
    own = workload.model_copy(update={"documents": None})
    case = case_of(replace(columns, seq=shards.fullest), own, machine)
    return case._replace(shape=case.shape._replace(causal=workload.causal, cudnn_from=0))


def _given(case: Case, workload: Workload, seq: Count) -> Count:
    """What a rank is given: q, k, v, in training the gradient of out, documents and sinks."""
    e = case.shape.itemsize
    given = (case.channels * (1 + case.trains) + 2 * case.kv_channels) * e
    given = given + workload.sinks * case.shape.heads * e
    return given + (workload.documents is not None) * case.batch * seq * tiles.NUMBER


def _by_heads(columns: Columns, workload: Workload, own: Case, shards: Shards) -> Count:
    world: Any = shards.world
    share = workload.model_copy(
        update={"heads": workload.heads // world, "kv_heads": workload.groups // world}
    )
    e = own.shape.itemsize
    q, kv = own.channels * e, own.kv_channels * e
    given = _given(own, workload, 0)
    whole = case_of(columns, share, own.machine)
    whole_q, whole_kv = whole.channels * e, whole.kv_channels * e
    alone = replace(columns, multihead=None)
    goes = np.broadcast_to(np.asarray(goes_apart(alone, share, own.machine), bool), len(columns))
    twin: Any = np.empty(len(columns), np.int64)
    for apart in (True, False):
        which = np.flatnonzero(goes == apart)
        if which.size:
            some = alone if which.size == len(columns) else alone.take(which)
            twin[which] = planned(some, share, own.machine, apart=apart).peaks()
    # Its gradient of out is there; out of own tokens was made before backward.
    inside = twin + given + q * own.trains
    forward = given + whole_q + 2 * whole_kv + q
    after = given + q + whole_q + (whole_q + 2 * whole_kv + own.lse_bytes) * own.trains + q
    backward = (given + q + whole_q + 2 * whole_kv + q + 2 * kv + maximum(q, kv)) * own.trains
    return maximum(inside, forward, after, backward)


class _Rows(NamedTuple):
    """Rows of keys of the fullest rank, of each kv head or lane."""

    fetched: Count
    """In the stage that is worked on and the next one."""
    stage: Count
    """In the larger of them."""
    packed: Count
    """Copied to be sent, for a stage."""
    arriving: Count
    """Of which gradients arrive after a stage."""
    queries: Count
    """Own tokens that ask for what is fetched at once."""
    wide: Count
    """1 if more than two parts may meet in a query, else 0."""
    wide_keys: Count
    """1 if more than two gradients may meet in a key, else 0."""
    stages: Count
    """1 if several stages follow each other, else 0."""


def _rows(columns: Any, workload: Workload, own: Case, shards: Shards, sees: Sight) -> _Rows:
    seq, world, causal = shards.seq, int(shards.world), workload.causal
    heads, kv_heads = own.shape.heads, own.shape.kv_heads
    ranks: Any = np.unique(np.linspace(0, world - 1, min(world, RANKS)).astype(np.int64))[:, None]
    sizes: tuple[Any, ...] = (sees, shards, ranks, causal, heads, kv_heads)
    received = np.max(np.atleast_2d(rows_received(*sizes)), axis=0)
    tokens = shards.fullest
    if columns.variant in ("dense", "dilated"):
        most = np.max(np.atleast_2d(most_of_one(*sizes)), axis=0)
        rated: Count = 0
        for rate in columns.rates if columns.variant == "dilated" else ():
            rated = maximum(rated, (rate > 1) * 1)
        wide = (world > 2 or shards.zigzag) * (received > 0)
        return _Rows(minimum(received, 2 * most), most, most * rated, most, tokens, wide, wide, 1)
    reach: Count = 0
    for band in sees.bands:
        reach = maximum(reach, minimum(band.reach, band.length))
    if columns.pattern_type == "dilated_sparse":
        room = received + (tokens + shards.unit) * kv_heads
        peers = minimum(ceil_div(reach, maximum(seq // world - shards.unit, 1)) + 1, world - 1)
        arriving = peers * tokens * kv_heads * (1 if causal else 2)
        return _Rows(room, room, 0, minimum(arriving, (world - 1) * tokens * kv_heads), tokens, 0, 1, 0)
    sent = np.max(np.atleast_2d(rows_sent(sees, shards, ranks, causal, kv_heads)), axis=0)
    queries = where(sees.shared > 0, tokens, minimum(tokens, reach + shards.unit))
    # Halos of both sides meet where a rank has few tokens, and so do those for several ranks behind.
    few = (1 if causal else 2) * (reach + shards.unit) > seq // world - shards.unit
    wide = maximum((sees.shared > 0) * 1, few * 1)
    return _Rows(received, received, 0, sent, queries, wide, wide, 0)


def _by_keys(columns: Any, workload: Workload, own: Case, shards: Shards, *, travels_wide: bool) -> Count:
    sees = sight(
        columns.variant,
        columns.pattern_type,
        shards.seq,
        workload.causal,
        size=columns.block_size,
        window=columns.window,
        global_tokens=columns.global_tokens,
        ratio=columns.sparsity_ratio,
        lengths=columns.lengths,
        rates=columns.rates,
        edges=columns.edges,
    )
    rows = _rows(columns, workload, own, shards, sees)
    shape, e, w = own.shape, own.shape.itemsize, own.shape.wide
    pair = 2 * own.batch * shape.head_dim
    q, kv, lse = own.channels, 2 * own.kv_channels, own.lse_bytes
    given = _given(own, workload, shards.seq)
    visiting = own.batch * minimum(global_queries(sees, workload.causal), shards.seq) * shape.heads
    hosted = visiting * (shards.world - 1)
    forward, backward, kept = _scratch(
        columns, own, shards, maximum(rows.stage, shards.fullest * own.shape.kv_heads)
    )
    slab = maximum(floor_bytes(shape) // SLAB_SHARE, SLAB_TOKENS * shape.heads * shape.head_dim * w)
    merge = 2 * slab * (e < w) + 2 * slab // maximum(shape.head_dim, 1)
    fetched = pair * e * (rows.fetched + rows.packed)
    number, of_keys = where(rows.wide, w, e), where(rows.wide_keys, w, e)
    dim = shape.head_dim
    # A part that is not all that there is lies beside the sum.
    asking = own.batch * rows.queries * shape.heads
    again = where((number > e) | shards.zigzag, q * e + lse, asking * (shape.head_dim * e + w))
    answers = visiting * (2 * dim * e + w) + hosted * (dim * e + w)
    first = q * number + lse + fetched + answers + kept + again + maximum(forward, merge)
    last = q * (number + e * (number > e)) + lse
    peak = maximum(first, last)
    if own.trains:
        travel = w if travels_wide else e
        sums = q * number + kv * of_keys
        part = where(number > e, q * e, asking * dim * e) + kv * travel * (of_keys > e)
        of_stage = pair * rows.stage * (travel + w * rows.wide * (e < w))
        gradients = pair * travel * (rows.stage * rows.stages + rows.arriving)
        visitors = visiting * (4 * dim * e + dim * w + w) + hosted * dim * e
        total = q * e + lse + sums + fetched + part + of_stage + gradients + visitors + kept
        peak = maximum(peak, total + maximum(backward, merge))
    return given + peak


def _scratch(columns: Any, own: Case, shards: Shards, stage: Count) -> tuple[Count, Count, Count]:
    """What the calls of a part of so many rows of keys at most take beside its results, forward and backward,
    and what the pool keeps."""
    tokens, shape = shards.fullest, own.shape
    tiled: Shape = shape._replace(seq=shards.seq, origin=shards.seq - tokens, windows="none")
    extent_of = bounded_cut(columns, tiled)
    extent = extent_of(tiled)
    arenas = [arena_bytes(forward_sizes(extent, tiled, keeps_lse=True))]
    back = tiled.backward()
    if own.trains:
        # Of few keys, as a part has them, sums are kept over all tiles.
        narrow = shape.itemsize < shape.wide
        part = minimum(stage * shape.head_dim * shape.wide, SUM_BYTES) * narrow * (1 - sums_in_full(back))
        arenas.append(arena_bytes(backward_sizes(extent_of(back), back)) + 2 * part)
    arena = maximum(*arenas) if len(arenas) > 1 else arenas[0]
    pooled = tiles.pooled(columns.pool, columns.pool_bytes, shards.seq)
    arena = where(pooled, bucket_bytes(arena), arena)
    masks: Count = extent.mask[0] * extent.mask[1] * shape.itemsize
    case = own._replace(shape=tiled)
    forward, backward = PlanTable(), PlanTable()
    tiles.forward_calls(forward, case, extent, lambda: None)
    taken: list[Any] = [forward.done().peaks()]
    if own.trains:
        extent = extent_of(back)
        masks = masks + extent.mask[0] * extent.mask[1] * shape.wide
        tiles.backward_calls(backward, case, extent, lambda: None)
        taken.append(backward.done().peaks())
    calls = calls_of(columns, shape)
    if calls is not None:
        results = own.channels * shape.itemsize + own.lse_bytes
        gradients = (own.channels + 2 * own.kv_channels) * shape.itemsize
        for n, (add, less) in enumerate(((whole_calls.forward, results), (whole_calls.backward, gradients))):
            if n < len(taken):
                table = PlanTable()
                add(table, own, calls)
                whole: Any = table.done().peaks()
                taken[n] = maximum(taken[n], whole - less)
    return taken[0] + arena, taken[-1] + arena, masks + pooled * (ARENAS - 1) * arena
