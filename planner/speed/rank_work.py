"""What a rank that shares sequences with others computes, step by step, and what it exchanges meanwhile.
Imports no torch.

The steps are those of `attention/sharding/keys.py`, where each is posted before the compute that can hide it,
and of `attention/sharding/heads.py`, which waits for what it exchanges. Where kernels take a part as whole
calls, its work is theirs. Of other parts it is a share of what one device's tiles would do, by pairs.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Sequence
from dataclasses import replace
from functools import cached_property
from typing import NamedTuple

from attention.config import AttentionConfig
from attention.sharding.needs import Source, Visit, asking, deliveries, stages, visitors, visits
from attention.sharding.parts import Placement, joined_placement, own_placement
from attention.sharding.plan import adjoining, is_joined
from attention.sharding.rows import source_rows
from attention.sharding.shards import Shards, shards_of
from attention.sharding.traffic import Exchanged, PeerBytes
from attention.sharding.whole_parts import WholePart, joining, listed_part, whole_part
from attention.sizes.arrays import minimum
from planner.configs import columns_of
from planner.memory.dispatch import goes_apart, shape_of
from planner.memory.machines import Machine
from planner.memory.sharded import is_vast
from planner.ranks.ring import exchange_of, ring_of, sharding_of
from planner.speed.rectangles import TokenRange, pairs
from planner.speed.work import (
    NAMES,
    Kernel,
    Totals,
    Work,
    cudnn_faster,
    shared,
    work_of,
    work_of_calls,
    work_of_lists,
)
from planner.workload import Workload


class RankStep(NamedTuple):
    """What a rank computes, and what is on its way meanwhile; the step ends when both are done."""

    totals: Totals
    exchanges: tuple[PeerBytes, ...] = ()
    """Each {peer: (bytes sent, bytes received)}."""


Steps = tuple[RankStep, ...]


class RankWork(NamedTuple):
    """A rank's call."""

    exchange: Exchanged
    forward: Steps
    backward: Steps
    """Empty in inference."""


def work_of_rank(
    config: AttentionConfig, workload: Workload, machine: Machine, kernel: Kernel, rank: int
) -> RankWork:
    """The work of a rank of a ring in one call, and in training in its backward."""
    world, batch = ring_of(config, workload)
    whole = workload.model_copy(update={"batch": batch, "gpus": 1})
    shards = shards_of(config, workload.seq, world)
    exchange = exchange_of(config, workload)
    maker = _by_heads if exchange == "heads" or world == 1 else _by_keys
    forward, backward = maker(config, whole, machine, kernel, shards, rank)
    if config.multihead is not None:
        forward, backward = _between_projections(config, whole, int(shards.tokens(rank)), forward, backward)
    return RankWork(exchange, forward, backward)


def _between_projections(
    config: AttentionConfig, whole: Workload, tokens: int, forward: Steps, backward: Steps
) -> tuple[Steps, Steps]:
    """The steps, with the projections of a rank's own tokens, and where those are checkpointed, with the
    forward pass once more."""
    wide = whole.heads * whole.head_dim
    products = 2 * whole.batch * tokens * wide * (wide + whole.groups * whole.head_dim)
    ahead = (*forward, RankStep(_totals(matmul=products)))
    if not backward:
        return ahead, ()
    again = ahead if config.multihead and config.multihead.checkpoint else ()
    return ahead, (*again, *backward, RankStep(_totals(matmul=2 * products)))


# An exchange of heads.


def heads_exchange(whole: Workload, shards: Shards, rank: int, count: int, *, gathers: bool) -> PeerBytes:
    """An exchange of so many heads a rank: those of all tokens for all of own tokens, or (not `gathers`) the
    other way round."""
    own, part = int(shards.tokens(rank)), whole.batch * count * whole.head_dim * whole.itemsize
    peers: PeerBytes = {}
    for peer in range(int(shards.world)):
        sent, received = own * part, int(shards.tokens(peer)) * part
        if peer != rank and (sent or received):
            peers[peer] = (sent, received) if gathers else (received, sent)
    return peers


def _by_heads(
    config: AttentionConfig, whole: Workload, machine: Machine, kernel: Kernel, shards: Shards, rank: int
) -> tuple[Steps, Steps]:
    world = int(shards.world)
    heads, groups = whole.heads // world, whole.groups // world
    columns = replace(columns_of(config, whole.seq), multihead=None)
    share = whole.model_copy(update={"heads": heads, "kv_heads": groups})
    apart = bool(goes_apart(columns, share, machine))
    work = work_of(columns, share, machine, kernel, apart=apart)

    def waiting(count: int, *, gathers: bool) -> RankStep:
        peers = heads_exchange(whole, shards, rank, count, gathers=gathers)
        return RankStep(_totals(), (peers,) if peers else ())

    def between(gathered: Sequence[int], totals: Totals, returned: Sequence[int]) -> Steps:
        before = (waiting(count, gathers=True) for count in gathered)
        return (*before, RankStep(totals), *(waiting(count, gathers=False) for count in returned))

    forward = between((heads, groups, groups), work.forward, (heads,))
    if work.backward is None:
        return forward, ()
    return forward, between((heads,), work.backward, (heads, groups, groups))


# An exchange of keys.


class _Parts:
    """The work of parts of a rank: some queries over some keys."""

    def __init__(
        self, config: AttentionConfig, whole: Workload, machine: Machine, kernel: Kernel, tokens: int
    ) -> None:
        self.config, self._whole, self._kernel = config, whole, kernel
        own = whole.model_copy(update={"seq": max(tokens, 1), "documents": None})
        shape = shape_of(columns_of(config, own.seq), own, machine)
        self._shape = shape._replace(seq=whole.seq, origin=0, causal=whole.causal)
        self._machine, self._cudnn_faster = machine, cudnn_faster(machine)
        self.trains = whole.mode == "training"
        self._of_calls: dict[tuple[WholePart, bool], Work] = {}

    @cached_property
    def _all(self) -> tuple[Work, float]:
        """(work, pairs) of one device's tiles, of which other parts than whole calls have a share."""
        whole, everything = self._whole, (0, self._whole.seq)
        columns = replace(columns_of(self.config, whole.seq), multihead=None)
        tiled = self._shape._replace(windows="none", cudnn_from=0)
        work = work_of(columns, whole, self._machine, self._kernel, apart=False, like=tiled)
        return work, pairs(self.config, whole.seq, whole.causal, everything, everything, whole.documents)

    def queries_of(self, queries: TokenRange, rows: Placement) -> TokenRange | None:
        """Those of some queries that may see what lies in rows."""
        tokens = rows.runs[0][0], rows.runs[-1][1]
        first, stop = asking(self.config, self._whole.seq, queries, tokens, self._whole.causal)
        return (first, stop) if first < stop else None

    def work(self, queries: TokenRange, rows: Placement, *, merges: bool) -> Work | None:
        """The work of queries over rows, where there is some; `merges`: into what those queries have."""
        whole, asked = self._whole, self.queries_of(queries, rows)
        if asked is None:
            return None
        part = None if whole.documents else whole_part(self.config, asked, rows, self._shape)
        if part is not None:
            return self._of_part(part, merges) if part.calls else None
        seen = (run[:2] for run in rows.runs)
        count = sum(
            pairs(self.config, whole.seq, whole.causal, asked, keys, whole.documents) for keys in seen
        )
        if not count:
            return None
        listed = None if whole.documents else listed_part(self.config, asked, rows, self._shape)
        if listed is not None:
            size = int(listed.calls.size)
            width = count / (asked[1] - asked[0]) / size + whole.causal / 2  # half of a row's own block
            ahead, back = work_of_lists(
                listed.calls, width, listed.shape, whole.batch, self._kernel, trains=self.trains
            )
            return Work(ahead | {"passes": 0}, back and back | {"passes": 0})
        ahead, back = self._share(count / self._all[1], (asked[1] - asked[0]) / whole.seq)
        numbers = whole.batch * (asked[1] - asked[0]) * whole.heads * whole.head_dim
        ahead = ahead | {"passes": 0, "merged": ahead["merged"] + numbers * merges}
        return Work(ahead, back and back | {"passes": 0, "summed": back["summed"] + numbers / 2 * merges})

    def _of_part(self, part: WholePart, merges: bool) -> Work:
        """The work of a part's whole calls: many parts have the same."""
        if (part, merges) not in self._of_calls:
            self._of_calls[part, merges] = self._of_whole(part, merges)
        return self._of_calls[part, merges]

    def _of_whole(self, part: WholePart, merges: bool) -> Work:
        batch, shape = self._whole.batch, part.shape
        calls = joining(part.calls) if merges else part.calls
        ahead, back = work_of_calls(
            calls, shape, batch, self._kernel, trains=self.trains, faster=self._cudnn_faster
        )
        queries = sum(call.offsets * call.views * call.queries * call.heads(shape) for call in calls)
        keys = sum(call.offsets * call.views * call.keys * call.kv_heads(shape) for call in calls)
        each = batch * shape.head_dim
        # What no call touches is not read.
        few = {"passes": 0, "tokens": minimum(ahead["tokens"], 2 * each * (queries + keys))}
        if back is not None:
            # A number of dq, where those of dk count with as many of dv.
            back = back | few | {"summed": back["summed"] + each * queries / 2 * merges}
        return Work(ahead | few, back)

    def _share(self, count: float, rows: float) -> Work:
        """So large a share of what one device's tiles do."""

        def share(total: Totals) -> Totals:
            return shared(total, count, rows) | {"tokens": total["tokens"] * rows}

        forward, backward = self._all[0]
        return Work(share(forward), backward and share(backward))


def _by_keys(
    config: AttentionConfig, whole: Workload, machine: Machine, kernel: Kernel, shards: Shards, rank: int
) -> tuple[Steps, Steps]:
    packing = (whole.documents,) if whole.documents else None
    plan = config, shards, rank, whole.causal, packing
    pieces = shards.pieces(rank)
    parts = _Parts(config, whole, machine, kernel, int(shards.tokens(rank)))
    joins = is_joined(config)
    going, coming = visitors(*plan), visits(*plan)
    # Own queries that visit see fetched keys elsewhere.
    visited = max((visit.end for visit in going), default=0)

    own = [
        parts.work(queries, own_placement(*keys), merges=keys != queries)
        for queries in pieces
        for keys in pieces
        if not joins
    ]
    fetched: list[list[Work | None]] = []
    looks = not is_vast(config, whole.model_copy(update={"gpus": shards.world}))
    taken = stages(*plan, looks=looks)
    for sources in taken:
        unit = config.pattern.block_size if joins and config.pattern else 1
        groups = [list(sources)] if joins else adjoining(sources)
        rows = [
            joined_placement(group, pieces if joins else (), unit)[0] for group in groups if group or joins
        ]
        fetched.append(
            [
                parts.work((max(begin, min(visited, end)), end), one, merges=not joins)
                for one in rows
                for begin, end in pieces
                if one.runs
            ]
        )
    guests = [
        parts.work((visit.begin, visit.end), own_placement(*keys), merges=False)
        for visit in coming
        for keys in pieces
    ]

    tokens, numbers = whole.batch * whole.head_dim, max(whole.itemsize, 4)
    travel = numbers if sharding_of(config).travel == "float32" else whole.itemsize
    query, lse = tokens * whole.heads * whole.itemsize, whole.batch * whole.heads * numbers
    asked = _peer_bytes(_queries(going), _queries(coming), 1)
    keys = [
        (_rows(given, whole), _rows(sources, whole))
        for given, sources in zip(deliveries(*plan, looks=looks), taken, strict=True)
    ]

    def fetches(nbytes: int) -> list[PeerBytes]:
        """Keys and values of each stage, and of what comes after the last."""
        return [*(_peer_bytes(sent, received, nbytes) for sent, received in keys), {}]

    begin = _totals(passes=1)
    ahead = fetches(2 * tokens * whole.itemsize)
    steps = [RankStep(_sum([begin, *_of(own)]), _present(ahead[0], _times(asked, query)))]
    for number, works in enumerate(fetched):
        meanwhile = ahead[number + 1]
        if number == 0 and asked:
            steps.append(RankStep(_sum(_of(guests)), _present(meanwhile)))
            meanwhile = _times(_turned(asked), query + lse)
        steps.append(RankStep(_sum(_of(works)), _present(meanwhile)))
    if not parts.trains:
        return tuple(steps), ()

    back = [RankStep(_sum([begin, *_of(own, -1)]), _present(ahead[0], _times(asked, 3 * query + lse)))]
    returns: tuple[PeerBytes, ...] = ()
    for number, (works, (sent, received)) in enumerate(zip(fetched, keys, strict=True)):
        computed = [*_of(works, -1), *(_of(guests, -1) if number == 0 else ())]
        # What peers have of own keys' gradients is added when it is back.
        computed.append(_totals(summed=tokens * sent.total()))
        back.append(RankStep(_sum(computed), (*_present(ahead[number + 1]), *returns)))
        returns = (_peer_bytes(received, sent, 2 * tokens * travel),)
        if number == 0:
            returns += (_times(_turned(asked), query // whole.itemsize * travel),)
        returns = _present(*returns)
    return tuple(steps), (*back, RankStep(_totals(), returns))


def _totals(**counts: float) -> Totals:
    return dict.fromkeys(NAMES, 0) | counts


def _sum(totals: Iterable[Totals]) -> Totals:
    every = list(totals)
    return {name: sum(one[name] for one in every) for name in NAMES} if len(every) != 1 else every[0]


def _of(works: Iterable[Work | None], which: int = 0) -> list[Totals]:
    """The totals of a pass, forward or (-1) backward."""
    return [totals for work in works if work is not None and (totals := work[which]) is not None]


def _rows(sources: Sequence[Source], whole: Workload) -> Counter[int]:
    """The rows of sources by peer; see `attention.sharding.rows`."""
    rows: Counter[int] = Counter()
    for peer, begin, end, rate in sources:
        rows[peer] += source_rows(end - begin, rate, whole.heads, whole.groups)
    return rows


def _queries(visits: Iterable[Visit]) -> Counter[int]:
    tokens: Counter[int] = Counter()
    for peer, begin, end in visits:
        tokens[peer] += end - begin
    return tokens


def _peer_bytes(sent: Counter[int], received: Counter[int], nbytes: int) -> PeerBytes:
    """So many bytes for each of what is sent to peers and received of them."""
    return {
        peer: (sent[peer] * nbytes, received[peer] * nbytes)
        for peer in sorted({*sent, *received})
        if sent[peer] or received[peer]
    }


def _times(peers: PeerBytes, nbytes: int) -> PeerBytes:
    return {peer: (sent * nbytes, received * nbytes) for peer, (sent, received) in peers.items()}


def _turned(peers: PeerBytes) -> PeerBytes:
    """What comes back."""
    return {peer: (received, sent) for peer, (sent, received) in peers.items()}


def _present(*exchanges: PeerBytes) -> tuple[PeerBytes, ...]:
    """The exchanges in which there is something."""
    return tuple(one for one in exchanges if one)
