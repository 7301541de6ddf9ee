"""The memory plan of a rank that shares sequences with others. Imports no torch."""

from __future__ import annotations

from collections.abc import Callable
from functools import cache
from typing import Any, Final

import numpy as np

from attention.config import AttentionConfig
from attention.layout import build_layout
from attention.programs import tiles_of
from attention.sharding.plan import FetchStage, KeysPlan, RankPart, keys_plan
from attention.sharding.ranges import sight_of
from attention.sharding.rows import most_of_one, rows_received
from attention.sharding.shards import Shards, shards_of
from attention.sizes.shape import Shape
from attention.sizes.tiles import Extent
from planner.configs import Columns, columns_of
from planner.memory.cuda_process import FLOAT32
from planner.memory.dispatch import attention_of, bounded_cut, case_of, plan_of, shape_of
from planner.memory.machines import Cpu, Machine
from planner.memory.plans import multihead, tiles
from planner.memory.plans.head_exchange import head_exchange
from planner.memory.plans.kept_buffers import Kept
from planner.memory.plans.key_exchange import key_exchange
from planner.memory.plans.tiles import Case
from planner.memory.table import Plan, PlanTable, RankPlan
from planner.ranks.ring import exchange_of, ring_of
from planner.workload import Workload

AGREED: Final = 32
"""Numbers of each rank; see `attention.sharding.transport`."""
FEW_RANKS: Final = 8
"""Up to so many, all are planned."""
MOST_RANKS, MOST_TOKENS, MOST_LISTED = 16, 1 << 17, 1 << 16
"""Ranks, tokens, and blocks that a layout lists, up to which the calls of the ranks' programs are looked at;
beyond, their sizes are bounded in closed form."""
LIKE_STAGES: Final = 3


def fullest_rank(
    config: AttentionConfig, workload: Workload, machine: Machine, taken: Callable[[RankPlan], Any]
) -> RankPlan:
    """The plan of which most is `taken`: of all ranks, or where they are many, of those that hold or fetch
    most and of some others."""
    ranks = _fullest(config, workload)
    plans = (rank_plan(config, workload, machine, rank) for rank in ranks)
    return max(plans, key=taken)


def _fullest(config: AttentionConfig, workload: Workload) -> list[int]:
    """Ranks among which that with the highest peak is looked for."""
    world = ring_of(config, workload).world
    shards, causal = shards_of(config, workload.seq, world), workload.causal
    if exchange_of(config, workload) == "heads":  # they differ in tokens alone
        return sorted({0, min(1, world - 1), world - 1})
    if world <= FEW_RANKS and not is_vast(config, workload):
        return list(range(world))
    sight, ranks = sight_of(config, workload.seq, causal), np.arange(world)
    sizes: tuple[Any, ...] = (sight, shards, ranks, causal, workload.heads, workload.groups)
    counts = (rows_received(*sizes), most_of_one(*sizes))
    most = {int(np.argmax(np.broadcast_to(count, world))) for count in counts}
    some = {world // 2, max(world - 2, 0), world - 1}
    # Otherwise the first ranks fetch least, and their keys are not everybody's.
    if not causal or sight.shared or shards.zigzag:
        some |= {0, min(1, world - 1)}
    return sorted(most | some)


def is_vast(config: AttentionConfig, workload: Workload) -> bool:
    """Whether the calls of the ranks' programs are too many to look at."""
    if workload.seq > MOST_TOKENS or ring_of(config, workload).world > MOST_RANKS:
        return True
    columns = columns_of(config, workload.seq)
    if columns.variant != "block_sparse" or columns.token_edges:
        return False
    rows: Any = columns.rows(workload.causal)
    return bool(max(rows.span, rows.lists) * -(-workload.seq // rows.size) > MOST_LISTED)


def rank_plan(
    config: AttentionConfig, workload: Workload, machine: Machine, rank: int, *, warm: bool = False
) -> RankPlan:
    """The plan of one call of a rank, and in training of its backward. `warm`: of a second equal call."""
    world, batch = ring_of(config, workload)
    whole = workload.model_copy(update={"batch": batch, "gpus": 1})
    if world == 1:
        return RankPlan(plan_of(config, whole, machine, warm=warm), 0)
    shards = shards_of(config, workload.seq, world)
    alone = config.model_copy(update={"sharding": None})
    case = _own_case(alone, whole, machine, int(shards.tokens(rank)))
    if exchange_of(config, workload) == "heads":
        return RankPlan(_by_heads(alone, whole, machine, case, shards, rank, warm=warm), world - 1)
    vast = is_vast(config, workload)
    plan = _keys_plan(config, whole, machine, shards, rank, looks=not vast)
    bound, peers = None, len(_peers(plan))
    if vast:
        plan, bound = _shortened(plan), _bound(columns_of(config, whole.seq), plan.shape)
    kept = Kept(config.pool, config.pool_bytes, config.cache_entries, config.cache_bytes)
    table = PlanTable()
    if warm:
        _by_keys(config, PlanTable(), case, whole, plan, kept, bound, world, warm=False)
        kept.before(table)
    _by_keys(config, table, case, whole, plan, kept, bound, world, warm=warm)
    return RankPlan(table.done(), peers)


def _peers(plan: KeysPlan) -> set[int]:
    """Those that a rank sends to or hears from."""
    sources = [source for stage in plan.stages for fetch in stage.fetches for source in fetch.sources]
    sources += [source for stage in plan.stages for source in stage.deliveries]
    peers = {source.peer for source in sources}
    return peers | {guest.peer for guest in (*plan.guests, *plan.hosts)}


def _own_case(config: AttentionConfig, whole: Workload, machine: Machine, tokens: int) -> Case:
    """The case of a rank's own tokens of all heads."""
    own = whole.model_copy(update={"seq": max(tokens, 1), "documents": None})
    case = case_of(columns_of(config, own.seq), own, machine)
    return case._replace(shape=case.shape._replace(seq=tokens, causal=whole.causal))


def _keys_plan(
    config: AttentionConfig, whole: Workload, machine: Machine, shards: Shards, rank: int, *, looks: bool
) -> KeysPlan:
    """What a rank computes, fetches and sends, as `attention.sharding.module` has it."""
    tokens = max(int(shards.tokens(rank)), 1)
    own = whole.model_copy(update={"seq": tokens, "documents": None})
    shape = shape_of(columns_of(config, tokens), own, machine)
    shape = shape._replace(seq=whole.seq, origin=0, causal=whole.causal)
    layout = cache(lambda: build_layout(config, whole.seq, whole.causal))
    make = tiles_of(config, shape._replace(windows="none"), layout)
    documents = None if whole.documents is None else (whole.documents,)
    return keys_plan(config, shape, shards, rank, make, documents, looks=looks)


def _shortened(plan: KeysPlan) -> KeysPlan:
    """The plan with no more than three stages in succession that are alike: what is alive is the same in all
    that follow."""
    kept: list[FetchStage] = []
    runs = 0
    for stage in plan.stages:
        runs = runs + 1 if kept and _sizes(stage) == _sizes(kept[-1]) else 1
        if runs <= LIKE_STAGES:
            kept.append(stage)
    return plan._replace(stages=tuple(kept))


def _sizes(stage: FetchStage) -> tuple[Any, ...]:
    fetches = [
        (fetch.rows.total, fetch.rows.rate, [part.queries.stop - part.queries.start for part in fetch.parts])
        for fetch in stage.fetches
    ]
    return fetches, [(source.end - source.begin, source.rate) for source in stage.deliveries]


def _bound(columns: Columns, shape: Shape) -> Callable[[RankPart, Shape], Extent]:
    """A bound of the sizes of a part's calls, for the shape of its forward or backward pass."""
    extent_of = bounded_cut(columns, shape._replace(windows="none"))

    def bound(part: RankPart, part_shape: Shape) -> Extent:
        rows, queries = part.program.rows, part.queries.stop - part.queries.start
        whole = part_shape._replace(
            seq=shape.seq, origin=shape.seq - queries, kv_heads=shape.kv_heads, windows="none"
        )
        extent = extent_of(whole)
        kinds = tuple(
            kind._replace(
                keys=min(kind.keys, rows.total),
                sizes=tuple((views, tokens, min(keys, rows.total)) for views, tokens, keys in kind.sizes),
            )
            for kind in extent.kinds
        )
        return extent._replace(kinds=tuple(kind for kind in kinds if kind.exists))

    return bound


def _by_keys(
    config: AttentionConfig,
    table: PlanTable,
    case: Case,
    whole: Workload,
    plan: KeysPlan,
    kept: Kept,
    bound: Callable[[RankPart, Shape], Extent] | None,
    world: int,
    *,
    warm: bool,
) -> None:
    def attend(table: PlanTable, case: Case) -> None:
        _agree(table, case, world, warm=warm)
        key_exchange(table, case, plan, kept, bound)

    _planned(config, table, case, whole, attend)


def _agree(table: PlanTable, case: Case, world: int, *, warm: bool) -> None:
    """Adds what a call takes before anything is exchanged: what ranks tell each other, on the host; without
    tokens, ones to be checked in their place; on a GPU what opens the communicator of a first call."""
    shape, e = case.shape, case.shape.itemsize
    if not shape.seq:
        table.phase("checking the call")
        some = [case.batch * n * shape.head_dim * e for n in (shape.heads, shape.kv_heads, shape.kv_heads)]
        table.add(
            "a token of q, k and v", "temp_buffers", some, "B H D e, and B G D e: for a rank without any"
        )
        table.free("a token of q, k and v")
    if isinstance(case.machine, Cpu):
        table.phase("agreeing on the call")
        table.add("terms of the call", "comm_buffers", (8 * AGREED * world, 8 * AGREED), "256 W and 256")
        table.free("terms of the call")
    elif not (warm or case.run):
        table.phase("opening the communicator")
        table.add("first message", "comm_buffers", FLOAT32, "a number")
        table.free("first message")


def _planned(
    config: AttentionConfig, table: PlanTable, case: Case, whole: Workload, attend: multihead.AttentionAdder
) -> None:
    """Adds what a rank is given, its attention, and what is around that."""
    if whole.documents is not None:
        table.add("documents", "qkv", case.batch * whole.seq * tiles.NUMBER, "4 B S, in int32")
    outer = config.multihead
    if outer is None:
        tiles.inputs(table, case)
        attend(table, case)
    else:
        multihead.multihead(table, case, attend, bias=outer.bias, checkpoint=outer.checkpoint)


def _by_heads(
    config: AttentionConfig,
    whole: Workload,
    machine: Machine,
    case: Case,
    shards: Shards,
    rank: int,
    *,
    warm: bool,
) -> Plan:
    world = int(shards.world)
    heads, kv_heads = whole.heads // world, whole.groups // world
    share = whole.model_copy(update={"heads": heads, "kv_heads": kv_heads})
    part = config.model_copy(update={"multihead": None})
    if part.adaptive is not None:
        scorer = part.adaptive.model_copy(update={"num_heads": heads})
        part = part.model_copy(update={"adaptive": scorer})
    twin, attention = attention_of(part, share, machine)
    shape = twin.shape._replace(first_head=rank * heads)

    def attend(table: PlanTable, case: Case) -> None:
        _agree(table, case, world, warm=warm)
        own = twin._replace(shape=shape, warm=warm, runs=case.runs, run=case.run, ranks=world)
        head_exchange(table, case, own, world, attention)
        if part.adaptive is not None and table.holds("dq"):
            table.phase("backward, gradients of all heads of the scorer")
            nbytes = heads * world * whole.head_dim * (part.adaptive.score_dim or whole.head_dim)
            table.add("gradients of the scorer", "gradients", [nbytes * whole.itemsize] * 2, "2 H D E e")

    table = PlanTable()
    _planned(config, table, case, whole, attend)
    return table.done()
