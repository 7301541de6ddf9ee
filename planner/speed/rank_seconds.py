"""Seconds of many candidates that ranks share, in closed form: about what `planner.speed.timeline` has of one
candidate rank by rank and step by step. Imports no torch.

T = max(own part, what is fetched) + fetched parts                                  forward
    max(own part, what is fetched) + fetched parts + gradients on their way back    backward

Where keys come in stages, each hides behind the part before it. Work of parts is a share of what one device
does, by pairs of queries and keys, or where kernels take the part as whole calls, that of such calls.
"""

from __future__ import annotations

from dataclasses import replace
from typing import Any, NamedTuple

import numpy as np

from attention.sharding.ranges import Sight, hull
from attention.sharding.rows import rows_received, stage_count
from attention.sharding.shards import Shards
from attention.sizes.arrays import Amount, Count, Floats, maximum, minimum, where
from attention.sizes.list_calls import calls_of_rows
from attention.sizes.shape import Shape
from planner.calibration import Rates
from planner.configs import Columns
from planner.memory.dispatch import calls_of, goes_apart, lists_of, shape_of
from planner.memory.machines import Cpu, Machine
from planner.memory.rank_peaks import shards_of_columns, sight_of_columns
from planner.ranks.links import Network
from planner.ranks.ring import exchanges_heads, ring_of, sharding_of, share_of
from planner.speed.call_time import check, kernel_of, pass_seconds
from planner.speed.rectangles import pairs_seen
from planner.speed.work import NAMES, Kernel, Totals, Work, kernel_on, shared, work_of, work_of_lists
from planner.workload import Workload


def rank_seconds(
    columns: Columns, workload: Workload, machine: Machine, rates: Rates, network: Network
) -> Floats:
    """[len(columns)], about the seconds of a warm call of the rank that takes longest; `workload.seq` is not
    read. ConfigError as of `planner.speed.seconds.seconds`."""
    check(workload, machine, rates)
    world, share = ring_of(columns, workload).world, share_of(columns, workload)
    if world == 1:
        total = sum(_passes(columns, share, machine, rates))
    elif exchanges_heads(columns):
        total = _by_heads(columns, workload, share, machine, rates, network, world)
    else:
        total = _by_keys(columns, share, machine, rates, network, world)
    return np.zeros(len(columns)) + total


def _passes(columns: Columns, share: Workload, machine: Machine, rates: Rates) -> tuple[Amount, Amount]:
    """Seconds of one device, forward and backward."""
    found = np.zeros((2, len(columns)))
    goes = np.broadcast_to(np.asarray(goes_apart(columns, share, machine), bool), len(columns))
    for apart in (False, True):
        which = np.flatnonzero(goes == apart)
        if which.size:
            some = columns if which.size == len(columns) else columns.take(which)
            work = work_of(some, share, machine, kernel_of(rates), apart=apart)
            found[:, which] = _timed(work, share, rates)
    return found[0], found[1]


def _timed(work: Work, share: Workload, rates: Rates) -> Floats:
    """[2, candidates], seconds of a forward and of a backward pass."""
    seconds = [pass_seconds(work.forward, rates.costs("forward", share.dtype), rates), 0.0]
    if work.backward is not None and share.mode == "training":
        seconds[1] = pass_seconds(work.backward, rates.costs("backward", share.dtype), rates)
    return np.stack(np.broadcast_arrays(*(np.atleast_1d(one) for one in seconds)))


# An exchange of heads.


def _by_heads(
    columns: Columns,
    workload: Workload,
    share: Workload,
    machine: Machine,
    rates: Rates,
    network: Network,
    world: int,
) -> Amount:
    computing = sum(_passes(columns, share, machine, rates))
    tokens = shards_of_columns(columns, world).tokens(0)
    part = share.batch * share.head_dim * share.itemsize * tokens
    heads = (share.heads, share.groups, share.groups)

    def waiting(count: int) -> Amount:
        return _to_all(network, world, count * part)

    # q, k and v to who has their heads, out back; in backward what belongs to each goes the other way.
    passes = 2 if workload.mode == "training" else 1
    return computing + passes * (sum(map(waiting, heads)) + waiting(share.heads))


def _to_all(network: Network, world: int, nbytes: Amount) -> Amount:
    """Seconds in which a rank exchanges so many bytes with each of the others."""
    near = min(network.node or world, world) - 1
    seconds = network.inside.seconds(near, near * nbytes, all_to_all=True)
    if network.between is None or near == world - 1:
        return seconds
    far = world - 1 - near
    return np.maximum(seconds, network.between.seconds(far, far * nbytes, all_to_all=True))


# An exchange of keys.


def _by_keys(
    columns: Columns, share: Workload, machine: Machine, rates: Rates, network: Network, world: int
) -> Amount:
    shards, causal = shards_of_columns(columns, world), share.causal
    rank = 0 if shards.zigzag else world - 1 if causal and columns.variant != "block_sparse" else world // 2
    met = _met(columns, share, shards, rank)
    forward, backward = _parts(columns, share, machine, rates, shards, rank, met)
    rows = rows_received(met.sight, shards, rank, causal, share.heads, share.groups)
    if share.documents is not None:
        rows = minimum(rows, shards.tokens(rank) * share.groups)
    pair = 2 * share.batch * share.head_dim
    fetching = _moved(network, world, maximum(met.peers, (rows > 0) * 1), pair * share.itemsize * rows)
    hides = not isinstance(machine, Cpu)
    staged = columns.variant in ("dense", "dilated")

    def together(own: Amount, fetched: Amount) -> Amount:
        if not hides:
            return own + fetched + fetching
        if staged:  # the last part hides nothing
            ahead = own + fetched * (1 - 1 / maximum(met.stages, 1))
            return own + fetched + maximum(fetching - ahead, 0)
        return maximum(own, fetching) + fetched

    total = together(*forward)
    if share.mode == "training":
        wide = max(share.itemsize, 4)
        travel = wide if sharding_of(columns).travel == "float32" else share.itemsize
        back = fetching * travel / share.itemsize
        # Gradients of a stage go back behind the part of the next.
        total = total + together(*backward) + (back / maximum(met.stages, 1) if staged and hides else back)
    return total


class _Met(NamedTuple):
    """What a rank's queries meet."""

    sight: Sight
    own: Amount
    """The share of the attention's pairs that is of own queries and own keys."""
    fetched: Amount
    """The share of them that is of own queries and fetched keys."""
    asked: Amount
    """Queries of all parts over fetched keys."""
    fetched_tokens: Count
    """Tokens that are fetched, or more, of dilated_sparse."""
    peers: Count
    """Ranks that it fetches from, where that comes in stages; else 1."""
    stages: Count


def _met(columns: Columns, share: Workload, shards: Shards, rank: int) -> _Met:
    causal, seq, world = share.causal, shards.seq, int(shards.world)
    sight, tokens = sight_of_columns(columns, causal), shards.tokens(rank)
    if (
        columns.pattern_type == "dilated_sparse"
    ):  # of which rows are alike, and own keys are among the fetched
        fetched_tokens = rows_received(sight, shards, rank, causal, 1, 1)
        return _Met(sight, 0.0 * tokens, tokens / np.asarray(seq), tokens, fetched_tokens, 1, 1)
    chunks = [rank, int(shards.chunks) - 1 - rank] if shards.zigzag else [rank]
    pieces = [(shards.edge(one), shards.edge(one + 1)) for one in chunks]
    every = (0, seq)

    def pairs(queries: tuple[Count, Count], keys: tuple[Count, Count]) -> Amount:
        return pairs_seen(sight, causal, queries, keys)

    whole = maximum(pairs(every, every), 1)
    own = sum(pairs(queries, keys) for queries in pieces for keys in pieces)
    fetched = sum(pairs(piece, every) for piece in pieces) - own
    if columns.variant == "dense":
        stages = rank if causal and not shards.zigzag else world - 1
        return _Met(sight, own / whole, fetched / whole, tokens * stages, 0, stages, stages)
    begin, end = pieces[0]
    hulls = [hull(band, seq, begin, end) for band in sight.bands]
    first, last = minimum(*(one for one, _ in hulls), end), maximum(*(one for _, one in hulls), begin)
    before = rank - shards.chunk(minimum(first, maximum(end - 1, 0)))
    behind = 0 * before if causal else shards.chunk(maximum(last - 1, begin)) - rank
    nearest = [hull(band, seq, shards.edge(max(rank - 1, 0)), begin) for band in sight.bands]
    asked = minimum(end, maximum(*(one for _, one in nearest), begin)) - begin
    if columns.variant == "dilated":
        after = [hull(band, seq, end, shards.edge(min(rank + 2, world))) for band in sight.bands]
        asked_behind = end - maximum(begin, minimum(*(one for one, _ in after), end))
        stages = stage_count(sight, shards, rank, causal)
        parts = stages + len(sight.bands)  # a stage, and what of it has a rate of its own
        every_asked = asked * minimum(before, parts) + asked_behind * minimum(behind, parts)
        return _Met(sight, own / whole, fetched / whole, every_asked, 0, before + behind, stages)
    sides = asked * (1 if causal else 2) + tokens * minimum(sight.shared, 1)
    return _Met(sight, own / whole, fetched / whole, sides * (fetched > 0), 0, 1, 1)


def _moved(network: Network, world: int, peers: Amount, nbytes: Amount) -> Amount:
    """Seconds of messages of so many bytes in all, of so many peers. Those of a rank at the edge of a node
    are in another one, if they are few."""
    if network.between is None or network.node is None or world <= network.node:
        return network.inside.seconds(peers, nbytes)
    each = nbytes / maximum(peers, 1)
    far = where(peers < network.node, minimum(peers, 1), peers - network.node + 1)
    near = peers - far
    return network.inside.seconds(near, each * near) + network.between.seconds(far, each * far)


def _parts(
    columns: Columns, share: Workload, machine: Machine, rates: Rates, shards: Shards, rank: int, met: _Met
) -> tuple[Floats, Floats]:
    """Seconds [own parts, parts over what is fetched] of a rank, forward and backward."""
    tokens: Any = maximum(shards.tokens(rank), 1)
    shape = shape_of(columns, share, machine)
    kernel = kernel_on(machine, kernel_of(rates), share)
    calls = None if share.documents is not None else calls_of(columns, shape)

    def work(columns: Columns, like: Shape) -> Work:
        return work_of(columns, share, machine, kernel, apart=False, like=like)

    def twin() -> Floats:
        """Of the whole attention, were it of calls over as many tokens as a rank has."""
        length: Any = tokens // (1 + shards.zigzag)
        alike = replace(columns, seq=length)
        sights = (sight_of_columns(alike, share.causal), met.sight)
        pairs = [
            pairs_seen(sight, share.causal, (0, end), (0, end))
            for sight, end in zip(sights, (length, shards.seq), strict=True)
        ]
        whole: Floats = _timed(work(alike, shape), share, rates) * (pairs[1] / maximum(pairs[0], 1))
        return whole

    if calls is not None and shape.windows == "any":  # all parts are whole calls
        moves = columns.variant == "dense" or columns.pattern_type == "local_window"
        each = twin() if moves else _timed(work(columns, shape), share, rates)
        own, fetched = each * met.own, each * met.fetched + _merged(met.asked, share, rates)
        return np.stack([own[0], fetched[0]]), np.stack([own[1], fetched[1]])
    lists = None if share.documents is not None else lists_of(columns, shape)
    if lists is not None:  # where shards end with blocks, as they mostly do
        listed = _listed(columns, share, shape, kernel, rates, tokens, met)
        nothing = np.zeros_like(listed)
        return np.stack([nothing[0], listed[0]]), np.stack([nothing[1], listed[1]])
    tiles = work(columns, shape._replace(windows="none", cudnn_from=0))

    def part(pairs: Amount, rows: Amount, passes: int) -> Floats:
        def portion(total: Totals) -> Totals:
            return shared(total, pairs, rows) | {"tokens": total["tokens"] * rows, "passes": passes}

        return _timed(Work(portion(tiles.forward), tiles.backward and portion(tiles.backward)), share, rates)

    seq: Any = np.asarray(shards.seq)
    own = part(met.own, tokens / seq, 1) * (met.own > 0)
    fetched = part(met.fetched, met.asked / seq, 0) * (met.fetched > 0)
    if columns.pattern_type != "dilated_sparse":
        fetched = fetched + _merged(met.asked, share, rates)
    if calls is not None:  # own parts that see what a sequence of their own would are whole calls
        own = np.where(np.asarray(_is_twin(columns, shards, rank), bool), twin() * met.own, own)
    return np.stack([own[0], fetched[0]]), np.stack([own[1], fetched[1]])


def _listed(
    columns: Columns, share: Workload, shape: Shape, kernel: Kernel, rates: Rates, tokens: Any, met: _Met
) -> Floats:
    """[2, candidates], seconds of a rank's part over lists of blocks: as large as its widest row all of
    them."""
    rows = columns.rows(share.causal)
    keys = tokens + met.fetched_tokens
    own = shape._replace(seq=keys, origin=keys - tokens)
    calls = calls_of_rows(rows, own, (keys - tokens) // rows.size)
    width = maximum(rows.lists, rows.span)
    work = work_of_lists(calls, width, own, share.batch, kernel, trains=share.mode == "training")
    return _timed(work, share, rates)


def _merged(asked: Amount, share: Workload, rates: Rates) -> Floats:
    """[2, candidates], seconds in which parts of so many queries are added to what is there, forward and
    backward."""
    numbers = share.batch * np.atleast_1d(asked) * share.heads * share.head_dim
    nothing: Totals = dict.fromkeys(NAMES, 0)
    added = Work(nothing | {"merged": numbers}, nothing | {"summed": numbers / 2})
    return _timed(added, share, rates)


def _is_twin(columns: Columns, shards: Shards, rank: int) -> Any:
    """`attention.sharding.whole_parts.is_twin` of candidates."""
    if columns.variant == "dense":
        return True
    begin, end = shards.edge(rank), shards.edge(rank + 1)
    if columns.variant == "dilated":
        twin: Any = True
        for length, rate in columns.branches:
            inside = (begin // length == (end - 1) // length) & (begin % length % rate == 0)
            twin = twin & where(length <= end - begin, begin % length == 0, inside)
        return twin
    return columns.pattern_type == "local_window" and (
        columns.token_edges | (begin % np.asarray(columns.block_size) == 0)
    )
