"""The memory plan of a rank that shares a sequence by moving keys; see `attention/sharding/keys.py`, whose
steps these are. Imports no torch.

Letters as in `planner/memory/plans/tiles.py`, of the rank's own tokens; R rows of L lanes of what is fetched
or sent, Q queries of a part or of a visit.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import cache

from attention.sharding.parts import source_placement
from attention.sharding.plan import Fetch, FetchStage, Guest, KeysPlan, RankPart, all_if_many
from attention.sizes.shape import Shape
from attention.sizes.tiles import Extent
from planner.memory.plans import tiles
from planner.memory.plans.kept_buffers import Kept
from planner.memory.plans.rank_parts import GradientLines, OutputLines, RankCase, SumLines, part_backward
from planner.memory.plans.tiles import Case
from planner.memory.table import PlanTable


def key_exchange(
    table: PlanTable,
    case: Case,
    plan: KeysPlan,
    kept: Kept,
    bound: Callable[[RankPart, Shape], Extent] | None = None,
) -> None:
    """An attention of a rank over its own keys and those that it fetches: forward, and in training backward.
    `case`: of its own tokens. q, k and v are there; `kept` is what calls before have left. `bound`: of the
    sizes of a part's calls, where these are not looked at themselves."""
    parts = {part.number: part for part in plan.all_parts()}

    @cache
    def extent(number: int, backward: bool) -> Extent:
        program = parts[number].program
        shape = program.shape.backward() if backward else program.shape
        return program.extent(shape) if bound is None else bound(parts[number], shape)

    rank = RankCase(table, case, plan, kept, lambda part, backward: extent(part.number, backward))
    heads_first = _forward(rank)
    if plan.tokens:
        tiles.join_sinks(table, case)
    if not case.trains:
        table.free("log-sum-exp")
    elif case.goes_back(table):
        if plan.tokens:
            tiles.sinks_gradient(table, case)
        _backward(rank, heads_first)


def _forward(rank: RankCase) -> bool:
    """Up to out and its log-sum-exp; whether that lies as kernels of whole calls return it."""
    table, plan, e = rank.table, rank.plan, rank.e
    total = OutputLines(rank, plan.tokens, plan.wide_out, "out", "log-sum-exp")
    table.phase("forward, first messages")
    guests = [rank.numbers(guest.queries.stop) * e for guest in plan.guests]
    table.add("visiting queries", "comm_buffers", guests, "B Q H D e")
    ahead = _Ahead(rank, "forward")
    ahead.post()
    for own in plan.own:
        total.add(own.part, "own keys")
    answers = [_answer(rank, host) for host in plan.hosts]
    table.phase("forward, own keys done")
    table.add("answers to own queries", "comm_buffers", _flat(answers), "B Q H (D e + w)")
    answers_sent = False
    for number, stage in enumerate(plan.stages):
        ahead.arrived(number)
        if number == 0 and (plan.guests or plan.hosts):
            answers_sent = True
            for place, guest in enumerate(plan.guests):
                names = f"answer {place + 1}", f"answer {place + 1}, log-sum-exp"
                queries = guest.queries.stop
                visiting = OutputLines(rank, queries, all_if_many(len(guest.parts), queries), *names)
                for own in guest.parts:
                    visiting.add(own.part, "visiting queries")
                visiting.end()
            table.free("visiting queries")
        for place, fetch in enumerate(stage.fetches):
            for part in fetch.parts:
                total.add(part, f"keys of stage {number + 1}")
            ahead.used(number, place)
    if not answers_sent:
        table.free("visiting queries")
    for place, _ in enumerate(plan.guests if answers_sent else ()):
        table.free(f"answer {place + 1}", f"answer {place + 1}, log-sum-exp")
    for host in plan.hosts:
        total.merge(len(range(host.queries.start, host.queries.stop)))
    total.end()
    table.free("answers to own queries")
    return total.heads_first


def _answer(rank: RankCase, host: Guest) -> tuple[int, int]:
    queries = host.queries.stop - host.queries.start
    return rank.numbers(queries) * rank.e, rank.rows(queries) * rank.w


def _flat(pairs: Sequence[tuple[int, ...]]) -> tuple[int, ...]:
    return tuple(nbytes for pair in pairs for nbytes in pair)


class _Ahead:
    """What is fetched ahead, as `attention.sharding.keys` does it: lines of the stage that is used and of the
    next one."""

    def __init__(self, rank: RankCase, step: str) -> None:
        self._rank, self._step, self._number = rank, step, 0

    def post(self) -> None:
        rank, table, stages = self._rank, self._rank.table, self._rank.plan.stages
        if self._number >= len(stages):
            return
        stage, number = stages[self._number], self._number
        self._number += 1
        sent = [
            rank.placed(source_placement(source)) * rank.e
            for source in stage.deliveries
            for _ in range(2 * (source.rate > 1))
        ]
        table.add(_packed(number), "comm_buffers", sent, "B R L D e")
        for place, fetch in enumerate(stage.fetches):
            nbytes = rank.placed(fetch.rows) * rank.e
            table.add(_fetched(number, place), "ring", (nbytes, nbytes), "2 B R L D e")

    def arrived(self, number: int) -> None:
        """The stage is there, and the next one is posted."""
        table = self._rank.table
        table.free(_packed(number))
        table.phase(f"{self._step}, stage {number + 1} arrived")
        self.post()

    def used(self, number: int, place: int) -> None:
        """A fetch of the stage is not read any more."""
        self._rank.table.free(_fetched(number, place))
        self._rank.table.phase(f"{self._step}, stage {number + 1}, fetch {place + 1} used")


def _packed(number: int) -> str:
    return f"keys packed for stage {number + 1}"


def _fetched(number: int, place: int) -> str:
    return f"keys of fetch {place + 1}, stage {number + 1}"


def _backward(rank: RankCase, heads_first: bool) -> None:
    """From the gradient of out to dq, dk and dv; `heads_first`: how the log-sum-exp lies."""
    table, plan, e, w = rank.table, rank.plan, rank.e, rank.w
    heads, kv_heads = int(rank.case.shape.heads), int(rank.case.shape.kv_heads)
    dq = SumLines(rank, "dq", plan.tokens, heads, plan.wide_out, "gradients")
    dk, dv = (
        SumLines(rank, name, plan.tokens, kv_heads, plan.wide_keys, "gradients") for name in ("dk", "dv")
    )
    table.phase("backward, first messages")
    guests = [
        nbytes
        for guest in plan.guests
        for nbytes in (*[rank.numbers(guest.queries.stop) * e] * 3, rank.rows(guest.queries.stop) * w)
    ]
    table.add("visiting queries and gradients", "comm_buffers", guests, "B Q H (3 D e + w)")
    copied = [
        rank.rows(len(range(host.queries.start, host.queries.stop))) * w * heads_first for host in plan.hosts
    ]
    table.add("log-sum-exp of own queries that visit", "comm_buffers", copied, "B Q H w")
    ahead = _Ahead(rank, "backward")
    ahead.post()
    for own in plan.own:
        part_backward(rank, own.part, "own keys: ", (dq, dk, dv))
    travelling: list[str] = []
    for number, stage in enumerate(plan.stages):
        if number == 0:
            table.free("log-sum-exp of own queries that visit")
        ahead.arrived(number)
        sent: list[str] = []
        for place, fetch in enumerate(stage.fetches):
            sent += _fetch_backward(rank, number, place, fetch, (dq, dk, dv), ahead)
        if number:
            _take(rank, number - 1, (dq, dk, dv))
            table.free(*travelling)
            table.phase(f"backward, stage {number}, gradients taken")
        travelling = sent
        if number == 0:
            for place, guest in enumerate(plan.guests):
                name = f"gradient of visiting queries {place + 1}"
                wide = all_if_many(len(guest.parts), guest.queries.stop)
                visiting = SumLines(rank, name, guest.queries.stop, heads, wide, "comm_buffers")
                for own in guest.parts:
                    part_backward(rank, own.part, "visiting queries: ", (visiting, dk, dv))
                visiting.end(e)
                travelling.append(name)
        if number == 0:
            table.free("visiting queries and gradients")
        table.phase(f"backward, stage {number + 1}, gradients sent")
        _back(rank, number, stage)
    if plan.stages:
        _take(rank, len(plan.stages) - 1, (dq, dk, dv))
        table.free(*travelling)
    else:
        table.free("visiting queries and gradients", "log-sum-exp of own queries that visit")
    for total in (dq, dk, dv):
        total.end(e)


def _fetch_backward(
    rank: RankCase, number: int, place: int, fetch: Fetch, own: GradientLines, ahead: _Ahead
) -> list[str]:
    """The gradients of what was fetched; names of those, which travel."""
    plan = rank.plan
    wide = all_if_many(len(fetch.parts), fetch.rows.total)
    if plan.travels_wide:
        wide = ((0, fetch.rows.total),)
    names = [f"{name} of {_fetched(number, place)}" for name in ("dk", "dv")]
    lanes = fetch.rows.lanes(plan.shape)
    dk, dv = (SumLines(rank, name, fetch.rows.total, lanes, wide, "comm_buffers") for name in names)
    for part in fetch.parts:
        part_backward(rank, part, f"keys of stage {number + 1}: ", (own[0], dk, dv))
    ahead.used(number, place)
    for one in (dk, dv):
        one.end(rank.travel)
    if fetch.own is None:
        return names
    for total, name in zip(own[1:], tuple(names), strict=True):
        if fetch.rows.total == plan.tokens and total.numbers.takes(plan.tokens, rank.travel):
            total.numbers.begin(name)  # of own keys alone, so that nobody is sent any
            names.remove(name)
        else:
            total.merge(plan.tokens, rank.travel)
    return names


def _back(rank: RankCase, number: int, stage: FetchStage) -> None:
    """Adds where gradients of own keys, and in the first stage of own queries, arrive."""
    hosts = rank.plan.hosts if number == 0 else ()
    nbytes = [rank.numbers(host.queries.stop - host.queries.start) * rank.e for host in hosts]
    rank.table.add("gradients of own queries that arrive", "comm_buffers", nbytes, "B Q H D e")
    for place, source in enumerate(stage.deliveries):
        room = 2 * rank.placed(source_placement(source)) * rank.travel
        rank.table.add(_arriving(number, place), "comm_buffers", room, "2 B R L D e, or w")


def _arriving(number: int, place: int) -> str:
    return f"gradients that arrive of delivery {place + 1}, stage {number + 1}"


def _take(rank: RankCase, number: int, own: GradientLines) -> None:
    """Adds what arrived of a stage."""
    plan, table = rank.plan, rank.table
    for place, source in enumerate(plan.stages[number].deliveries):
        rows = source.end - source.begin if source.rate == 1 else 0
        for total in own[1:]:
            total.merge(rows, rank.travel, lane_tokens=-(-(source.end - source.begin) // source.rate))
        table.free(_arriving(number, place))
        table.phase(f"backward, stage {number + 1}, gradients {place + 1} added")
    for host in plan.hosts if number == 0 else ():
        own[0].merge(host.queries.stop - host.queries.start, rank.e)
    table.free("gradients of own queries that arrive")
    table.phase(f"backward, stage {number + 1}, all gradients added")
