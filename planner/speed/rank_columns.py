"""Seconds of the ranks that share a sequence for many candidates at once, in closed form. Imports no torch.

What `planner.speed.timeline` has of one config, step by step and rank by rank, is here that of a few ranks,
and of one stage in which all that is fetched comes. An exchange of heads is exact.
"""

from __future__ import annotations

from dataclasses import replace
from typing import Any, Final

import numpy as np

from attention.config import AttentionConfig, ShardingConfig
from attention.errors import ConfigError
from attention.sharding.ranges import Sight, global_queries, hull, sight
from attention.sharding.rows import rows_received
from attention.sharding.shards import Shards, shards_of
from attention.sharding.traffic import Exchanged
from attention.sizes.arrays import Amount, Floats, minimum, where
from planner.calibration import Rates
from planner.configs import Columns
from planner.memory.dispatch import shape_of
from planner.memory.machines import Cpu, Machine
from planner.ranks.links import Network
from planner.speed.rank_work import heads_exchange
from planner.speed.rectangles import pairs_seen
from planner.speed.seconds import check, kernel_of, pass_seconds, seconds
from planner.speed.timeline import exchange_seconds, longest_rank
from planner.speed.work import shared, work_of
from planner.workload import Workload

_DEALT: Final = AttentionConfig(variant="dense")
"""All attentions but zigzag ones deal tokens alike."""


def rank_seconds(
    columns: Columns,
    workload: Workload,
    machine: Machine,
    rates: Rates,
    network: Network,
    exchange: Exchanged,
    *,
    zigzag: bool = False,
) -> Floats:
    """[len(columns)], seconds of a warm call of the longest rank, all GPUs sharing one sequence by this
    exchange; `zigzag`: with such shards, of dense attention. `workload.seq` is not read. ConfigError for
    documents, for projections, for keys of adaptive attention, and for heads that ranks cannot share."""
    check(workload, machine, rates)
    if workload.documents is not None or columns.multihead is not None:
        raise ConfigError(
            "seconds of many candidates on several GPUs are predicted without documents and projections"
        )
    if exchange == "heads":
        return _by_heads(columns, workload, machine, rates, network)
    if columns.variant == "adaptive":
        raise ConfigError("adaptive attention chooses its keys when it runs; exchange heads")
    if columns.variant == "dense":
        return _dense(columns, workload, machine, rates, network, zigzag)
    by_rank = _by_keys(columns, workload, machine, rates, network)
    return np.asarray(np.broadcast_to(np.maximum.reduce(by_rank), len(columns)), np.float64)


def _whole(workload: Workload) -> Workload:
    return workload.model_copy(update={"gpus": 1})


def _dealt(columns: Columns, world: int) -> Shards:
    """The shards of the candidates."""
    if not isinstance(columns.seq, np.ndarray):
        return shards_of(_DEALT, int(columns.seq), world)
    lengths, back = np.unique(columns.seq, return_inverse=True)
    units = np.array([shards_of(_DEALT, int(length), world).unit for length in lengths])
    untyped: Any = (columns.seq, world, units[back])
    return Shards(*untyped)


def _by_heads(
    columns: Columns, workload: Workload, machine: Machine, rates: Rates, network: Network
) -> Floats:
    world = workload.gpus
    if workload.groups % world:
        raise ConfigError(
            "an exchange of heads needs kv_heads that are a multiple of the ranks, got "
            f"{workload.groups} and {world} ranks"
        )
    heads, groups = workload.heads // world, workload.groups // world
    whole = _whole(workload)
    share = whole.model_copy(update={"heads": heads, "kv_heads": groups})
    computing = seconds(columns, share, machine, rates)

    def waits(seq: int) -> float:
        shards = shards_of(_DEALT, seq, world)
        # There and back, and as much again in backward.
        passes = 2 if workload.mode == "training" else 1
        each = (
            exchange_seconds(
                [heads_exchange(whole, shards, 0, count, gathers=gathers)], network, 0, all_to_all=True
            )
            for count, gathers in ((heads, True), (groups, True), (groups, True), (heads, False))
        )
        return passes * sum(each)

    lengths, back = np.unique(columns.seq, return_inverse=True)
    waiting: Floats = np.array([waits(int(length)) for length in lengths])[back.ravel()]
    return computing + waiting


def _dense(
    columns: Columns, workload: Workload, machine: Machine, rates: Rates, network: Network, zigzag: bool
) -> Floats:
    """Of dense attention, of which there are few: each as one config."""
    sharding = ShardingConfig(exchange="keys", shards="zigzag" if zigzag else "contiguous")
    found: dict[tuple[int, AttentionConfig], float] = {}
    answers = np.empty(len(columns))
    for at in range(len(columns)):
        sizes: Any = columns.seq
        seq = int(sizes[at]) if isinstance(sizes, np.ndarray) else int(sizes)
        config = columns.config(at, workload).model_copy(update={"sharding": sharding})
        if (seq, config) not in found:
            sized = workload.model_copy(update={"seq": seq})
            found[seq, config] = longest_rank(config, sized, machine, rates, network).seconds
        answers[at] = found[seq, config]
    return answers


def _by_keys(
    columns: Columns, workload: Workload, machine: Machine, rates: Rates, network: Network
) -> list[Amount]:
    """Seconds of some ranks, one of which takes longest."""
    untyped: Any = columns
    world, whole, causal, seq = workload.gpus, _whole(workload), workload.causal, untyped.seq
    shards = _dealt(columns, world)
    view = sight(
        columns.variant,
        columns.pattern_type,
        seq,
        causal,
        size=untyped.block_size,
        window=untyped.window,
        global_tokens=untyped.global_tokens,
        ratio=untyped.sparsity_ratio,
        lengths=untyped.lengths,
        rates=untyped.rates,
        edges=columns.edges,
    )
    own = replace(columns, seq=shards.fullest)
    shape = shape_of(own, whole, machine)._replace(cudnn_from=0)
    kernel, joins = kernel_of(rates), columns.pattern_type == "dilated_sparse"
    calls = columns.token_edges and columns.pattern_type == "local_window" and shape.windows == "any"
    peers = 1 if causal else 2
    hides = not isinstance(machine, Cpu) and not joins
    tiles = work_of(columns, whole, machine, kernel, apart=False, like=shape._replace(windows="none"))
    alone = work_of(own, whole, machine, kernel, apart=False, like=shape)
    everything = pairs_seen(view, causal, (0, seq), (0, seq))
    link = network.inside if network.between is None else network.between
    passes = [(tiles.forward, alone.forward, rates.costs("forward", whole.dtype), 0)]
    if tiles.backward is not None and alone.backward is not None:
        # Gradients go home behind nothing.
        passes.append((tiles.backward, alone.backward, rates.costs("backward", whole.dtype), 1))

    def of_rank(rank: int) -> Amount:
        begin, end = shards.edge(rank), shards.edge(rank + 1)
        rows: Amount = (end - begin) / seq
        nbytes = 2 * whole.batch * whole.head_dim * whole.itemsize
        received = rows_received(view, shards, rank, causal, whole.heads, whole.groups) * nbytes
        moving = (received > 0) * link.alpha + received / link.beta
        if joins:  # own keys and fetched ones are computed together
            inside, fetched, asking = rows, 0.0 * rows, 0.0 * rows
        else:
            own_pairs, others = _shares(view, seq, causal, begin, end)
            inside, fetched = own_pairs / everything, others / everything
            asking = _asking(view, shards, causal, begin, end)
        twin = _is_twin(columns, shape.windows, begin, end)
        total: Amount = 0
        for tiled, called, costs, returns in passes:
            mine = shared(tiled, inside, rows) | {"tokens": tiled["tokens"] * rows}
            either = pass_seconds(called, costs, rates), pass_seconds(mine, costs, rates)
            ours: Amount = np.where(twin, *either)
            rest = shared(tiled, fetched, asking) | {"passes": 0, "tokens": tiled["tokens"] * asking}
            if calls:  # whole calls of a kernel with such windows, one for each peer
                rest = shared(called, fetched / inside, asking / rows)
                rest |= {"passes": 0, "tokens": called["tokens"] * asking / rows, "launches": peers}
            rest["merged"] = rest["merged"] + whole.batch * asking * seq * whole.heads * whole.head_dim
            then = pass_seconds(rest, costs, rates) * (fetched > 0)
            before = np.maximum(ours, moving) if hides else ours + moving
            total = total + before + then + returns * moving
        return total

    return [of_rank(rank) for rank in sorted({min(1, world - 1), world // 2, world - 1})]


def _shares(view: Sight, seq: Any, causal: bool, begin: Any, end: Any) -> tuple[Amount, Amount]:
    """The pairs that a rank's queries have with its own keys, and those with keys of others."""
    own = pairs_seen(view, causal, (begin, end), (begin, end))
    others = pairs_seen(view, causal, (begin, end), (0, begin))
    if not causal:
        others = others + pairs_seen(view, causal, (begin, end), (end, seq))
        # Queries that see every key visit.
        others = others + global_queries(view, causal) * (end - begin)
    return own, others


def _asking(view: Sight, shards: Shards, causal: bool, begin: Any, end: Any) -> Amount:
    """The queries that a rank has and that see fetched keys, once for each peer that it fetches of, as a
    share of all."""
    reached: Amount = 0
    for band in view.bands:
        first, stop = hull(band, shards.seq, begin, end)
        peers = shards.chunk(begin) - shards.chunk(minimum(first, begin))
        if not causal:
            peers = peers + shards.chunk(np.maximum(stop, end) - 1) - shards.chunk(end - 1)
        # Of a window those within its reach; of a segment all of it.
        near = where(band.reach >= band.length, minimum(end - begin, band.length), band.reach)
        reached = np.maximum(reached, minimum(near, end - begin) * peers)
    shared_too = np.asarray((view.shared > 0) & (begin > 0))
    return (reached + where(shared_too, end - begin, 0)) / shards.seq  # type: ignore[arg-type]


def _is_twin(columns: Columns, windows: str, begin: Any, end: Any) -> Any:
    """Whether a rank's own part is whole calls; see `attention.sharding.whole_parts`."""
    if windows == "none":
        return np.zeros((), bool)
    untyped: Any = columns
    if columns.variant == "dilated":
        twin: Any = np.ones((), bool)
        for length, rate in columns.branches:
            within = (begin // length == (end - 1) // length) & (begin % length % rate == 0)
            twin = twin & np.where(length <= end - begin, begin % length == 0, within)
        return twin
    if columns.pattern_type != "local_window":
        return np.zeros((), bool)
    return np.ones((), bool) if columns.token_edges else np.asarray(begin % untyped.block_size == 0)
