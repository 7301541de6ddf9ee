"""The memory plan of a rank that shares a sequence by moving keys; see `attention/sharding/keys.py`, whose
steps these are. Imports no torch.

Letters as in `planner/memory/plans/tiles.py`, of the rank's own tokens; R rows of L lanes of what is fetched
or sent, Q queries of a part or of a visit.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import cache
from typing import NamedTuple

from attention.sharding.parts import Placement, source_placement
from attention.sharding.plan import Fetch, FetchStage, Guest, KeysPlan, Ranges, RankPart, all_if_many
from attention.sharding.whole_parts import WholePart, joining
from attention.sizes.arena import arena_bytes, bucket_bytes
from attention.sizes.shape import Shape
from attention.sizes.tiles import Extent, backward_sizes, forward_sizes
from attention.sizes.whole_calls import backward_cut
from planner.memory.plans import list_calls, tiles, whole_calls
from planner.memory.plans.tiles import Case
from planner.memory.table import PlanTable, PrefixedTable

MaskSize = tuple[int, int, bool, int]
"""(queries, keys, whether it is a band, bytes of a number)."""
APART = 1 << 62
"""Numbers from one to the next of what is never in one piece."""
End = Callable[[], None]
"""Ends the use of a buffer."""


class Kept:
    """What a pool and a cache of masks hold: of the parts of a rank before this one, and of calls before."""

    def __init__(self, pool: str, pool_bytes: int | None, cache_entries: int, cache_bytes: int) -> None:
        self._pool, self._pool_bytes = pool, pool_bytes
        self._cache_entries, self._cache_bytes = cache_entries, cache_bytes
        self.arenas: list[int] = []
        """Bytes of each buffer, the one used last at the end."""
        self.masks: dict[MaskSize, int] = {}
        """Bytes of each that is kept, the one used last at the end."""
        self._seen: set[MaskSize] = set()

    def before(self, table: PlanTable) -> None:
        """Adds what calls before have left."""
        for nbytes in self.arenas:
            table.add(_arena_name(nbytes), "memory_pool", nbytes, "a pool's buffer, of the call before")
        for mask, nbytes in self.masks.items():
            table.add(_mask_name(mask), "pattern_cache", nbytes, "attention/sizes/tiles.py Extent.mask")

    def begin(self, table: PlanTable, own: int, other: int, seq: int, formula: str) -> End:
        """Adds a pass's arena over so many keys, `other` being that of the training step's other pass;
        returns what ends its use."""
        pooled = bool(tiles.pooled(self._pool, self._pool_bytes, seq))
        nbytes = int(bucket_bytes(max(own, other))) if pooled else own
        if not own:
            return lambda: None
        if pooled and nbytes in self.arenas:
            self.arenas.remove(nbytes)  # to be the last
            self.arenas.append(nbytes)
            return lambda: None
        table.add("arena", "workspace", nbytes, formula)

        def end() -> None:
            table.free("arena")
            if not pooled or (self._pool_bytes is not None and nbytes > self._pool_bytes):
                return
            table.phase("arena kept")
            self.arenas.append(nbytes)
            table.add(_arena_name(nbytes), "memory_pool", nbytes, "a pool's buffer, for what follows")
            while self._pool_bytes is not None and sum(self.arenas) > self._pool_bytes:
                table.free(_arena_name(self.arenas.pop(0)))

        return end

    def mask(self, table: PlanTable, mask: MaskSize) -> End:
        """Adds a pass's mask; returns what ends its use."""
        queries, keys, _, number = mask
        nbytes = queries * keys * number
        if not nbytes or mask in self.masks:
            return lambda: None
        formula = "attention/sizes/tiles.py Extent.mask"
        if self._cache_entries and mask in self._seen and nbytes <= self._cache_bytes:
            self.masks[mask] = nbytes
            table.add(_mask_name(mask), "pattern_cache", nbytes, formula)
            return lambda: None
        self._seen.add(mask)
        table.add("mask", "masks", nbytes, formula)
        return lambda: table.free("mask")


def _arena_name(nbytes: int) -> str:
    return f"arena of {nbytes:,} bytes kept by the pool"


def _mask_name(mask: MaskSize) -> str:
    return f"mask of {mask[0]:,} by {mask[1]:,}, kept"


class _Rank(NamedTuple):
    """What the steps of a rank's plan need."""

    table: PlanTable
    case: Case
    """Of the rank's own tokens."""
    plan: KeysPlan
    kept: Kept
    extent: Callable[[RankPart, bool], Extent]
    """The largest sizes of a part's calls, forward or backward."""

    @property
    def e(self) -> int:
        return self.case.shape.itemsize

    @property
    def w(self) -> int:
        return self.case.shape.wide

    def rows(self, queries: int) -> int:
        """Queries of all batch items and heads."""
        return int(self.case.batch * queries * self.case.shape.heads)

    def numbers(self, queries: int) -> int:
        """Numbers of so many queries, or of their output."""
        return self.rows(queries) * int(self.case.shape.head_dim)

    def key_numbers(self, rows: int, lanes: int) -> int:
        """Numbers of so many rows of keys."""
        return int(self.case.batch * rows * lanes * self.case.shape.head_dim)

    def placed(self, rows: Placement) -> int:
        """Numbers of keys that lie so."""
        return self.key_numbers(rows.total, rows.lanes(self.plan.shape))

    @property
    def travel(self) -> int:
        """Bytes of a number of a gradient that travels."""
        return self.w if self.plan.travels_wide else self.e


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

    rank = _Rank(table, case, plan, kept, lambda part, backward: extent(part.number, backward))
    heads_first = _forward(rank)
    if plan.tokens:
        tiles.join_sinks(table, case)
    if not case.trains:
        table.free("log-sum-exp")
    elif case.goes_back(table):
        if plan.tokens:
            tiles.sinks_gradient(table, case)
        _backward(rank, heads_first)


def _forward(rank: _Rank) -> bool:
    """Up to out and its log-sum-exp; whether that lies as kernels of whole calls return it."""
    table, plan, e = rank.table, rank.plan, rank.e
    total = _Output(rank, plan.tokens, plan.wide_out, "out", "log-sum-exp")
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
                visiting = _Output(rank, queries, all_if_many(len(guest.parts), queries), *names)
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


def _answer(rank: _Rank, host: Guest) -> tuple[int, int]:
    queries = host.queries.stop - host.queries.start
    return rank.numbers(queries) * rank.e, rank.rows(queries) * rank.w


def _flat(pairs: Sequence[tuple[int, ...]]) -> tuple[int, ...]:
    return tuple(nbytes for pair in pairs for nbytes in pair)


class _Ahead:
    """What is fetched ahead, as `attention.sharding.keys` does it: lines of the stage that is used and of the
    next one."""

    def __init__(self, rank: _Rank, step: str) -> None:
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


class _Numbers:
    """Lines of `attention.sharding.sums`: numbers of tokens, some in single precision."""

    def __init__(self, rank: _Rank, tokens: int, each: int, wide: Ranges, name: str, component: str) -> None:
        """`each`: numbers of a token of all batch items."""
        self._rank, self.tokens, self._each = rank, tokens, each
        self.name, self._component = name, component
        self._wide = wide if rank.e < rank.w else ()
        self.all_wide = self._wide == ((0, tokens),)
        self.is_begun = False

    @property
    def is_mixed(self) -> bool:
        """Whether some tokens alone are in single precision."""
        return bool(self._wide) and not self.all_wide

    @property
    def own(self) -> int:
        """Bytes of a number, but for what is in single precision beside others."""
        return self._rank.w if self.all_wide else self._rank.e

    @property
    def _wide_name(self) -> str:
        return f"{self.name} in single precision"

    def takes(self, tokens: int, number: int) -> bool:
        """Whether they may begin with so many tokens in numbers of so many bytes."""
        return not self.is_begun and tokens == self.tokens and number == self.own

    def begin(self, part: str | None = None) -> None:
        """Begins, with a part of that name, if nothing has begun."""
        table = self._rank.table
        if self.is_begun:
            return
        self.is_begun = True
        name = self._wide_name if self.all_wide else self.name
        component = "temp_buffers" if self.all_wide else self._component
        if part is None:
            formula = "B S H D w" if self.all_wide else "B S H D e"
            table.add(name, component, self.tokens * self._each * self.own, formula)
        else:
            table.rename(part, name, component)
        if self.is_mixed:
            table.phase(f"{self.name}, some of it in single precision")
            nbytes = [(end - begin) * self._each * self._rank.w for begin, end in self._wide]
            table.add(self._wide_name, "temp_buffers", nbytes, "B S H D w of some tokens")

    def end(self, number: int) -> None:
        """They are complete, and have numbers of so many bytes."""
        table = self._rank.table
        self.begin()
        if self.is_mixed:
            table.free(self._wide_name)
        if not self.all_wide:
            return
        if number == self.own:
            table.rename(self._wide_name, self.name, self._component)
            return
        table.phase(f"{self.name}, rounded")
        table.add(self.name, self._component, self.tokens * self._each * number, "B S H D e")
        table.free(self._wide_name)


class _Output:
    """Lines of `attention.sharding.sums.Output`."""

    def __init__(self, rank: _Rank, tokens: int, wide: Ranges, name: str, lse_name: str) -> None:
        self._rank, self._name, self._lse_name = rank, name, lse_name
        self._numbers = _Numbers(rank, tokens, rank.numbers(1), wide, name, self._component("output"))
        self.heads_first = False
        """Whether the log-sum-exp lies as kernels of whole calls return it."""

    def add(self, part: RankPart, name: str) -> None:
        """Adds a part, which is computed first."""
        rank, table = self._rank, self._rank.table
        if part.whole is not None:
            self._join(part.whole, f"{name}: ")
            return
        queries = part.queries.stop - part.queries.start
        out, lse = _part_forward(rank, part, f"{name}: ")
        if self._numbers.takes(queries, rank.e):
            self.heads_first = part.listed is not None and self._has_order
            self._begin(out, lse)
            return
        self.merge(queries)
        table.free(out, lse)
        table.phase(f"{name} merged")

    def _join(self, part: WholePart, prefix: str) -> None:
        """Adds a part of whole calls."""
        rank, calls = self._rank, part.calls
        table, case = PrefixedTable(rank.table, prefix), rank.case._replace(shape=part.shape, trains=False)
        self.heads_first |= self._has_order and not self._numbers.is_begun
        if self._numbers.takes(int(part.shape.queries), rank.e) and calls[0].covers(part.shape):
            whole_calls.forward(table, case, calls[:1])
            self._begin(f"{prefix}out", f"{prefix}log-sum-exp")
            calls = calls[1:]
        else:
            table.phase("before it is merged")
            self._begin()
        for call in joining(calls):
            whole_calls.forward_parts(table, case, call)
        table.phase("merged")

    @property
    def _has_order(self) -> bool:
        """Whether heads before tokens is another order than tokens before heads."""
        return bool(self._rank.case.shape.heads > 1 and self._numbers.tokens > 1)

    def merge(self, queries: int) -> None:
        """Merges the output of queries that is there."""
        rank, table = self._rank, self._rank.table
        table.phase(f"{self._name}, merging")
        self._begin()
        rows = min(rank.plan.slab_tokens, queries) * int(rank.case.shape.heads)
        share, slab = rows * rank.w, rows * int(rank.case.shape.head_dim) * rank.w
        total, part = slab * (self._numbers.own < rank.w), slab * (rank.e < rank.w)
        name = f"scratch of the merge, {self._name}"
        table.add(name, "workspace", (share, total, max(share, part)), "T H w, and twice T H D w in 16 bits")
        table.free(name)

    def end(self) -> None:
        """The sum is complete."""
        self._begin()
        self._numbers.end(self._rank.e)
        if self.heads_first and self._name != "out":  # it travels tokens before heads
            table = self._rank.table
            table.phase(f"{self._lse_name} in the order of out")
            table.rename(self._lse_name, f"{self._lse_name} of a kernel", "temp_buffers")
            self._add_lse()
            table.free(f"{self._lse_name} of a kernel")

    def _begin(self, out: str | None = None, lse: str | None = None) -> None:
        """Begins, with a part of these names, if nothing has begun."""
        numbers = self._numbers
        if numbers.is_begun:
            return
        numbers.begin(out)
        if lse is None:
            self._add_lse()
        else:
            self._rank.table.rename(lse, self._lse_name, self._component("saved_for_backward"))

    def _add_lse(self) -> None:
        nbytes = self._rank.rows(self._numbers.tokens) * self._rank.w
        self._rank.table.add(self._lse_name, self._component("saved_for_backward"), nbytes, "B S H w")

    def _component(self, own: str) -> str:
        """That of own results; visitors' travel."""
        if self._name != "out":
            return "comm_buffers"
        return own if own == "output" or self._rank.case.trains else "temp_buffers"


def _part_forward(rank: _Rank, part: RankPart, prefix: str) -> tuple[str, str]:
    """Computes a part of tiles or of lists; names of its output and log-sum-exp."""
    table, case = PrefixedTable(rank.table, prefix), rank.case
    names = f"{prefix}out", f"{prefix}log-sum-exp"
    if part.listed is not None:
        list_calls.forward(table, case._replace(shape=part.listed.shape, trains=False), part.listed.calls)
        return names
    shape, queries = part.program.shape, part.queries.stop - part.queries.start
    extent = rank.extent(part, False)
    ends: list[End] = []

    def begin() -> None:
        table.add("out", "temp_buffers", rank.numbers(queries) * rank.e, "B Q H D e")
        table.add("log-sum-exp", "temp_buffers", rank.rows(queries) * rank.w, "B Q H w")
        forward, backward = _arenas(rank, part)
        formula = "attention/sizes/tiles.py forward_sizes"
        ends.append(rank.kept.begin(rank.table, forward, backward, int(shape.seq), formula))
        ends.append(rank.kept.mask(rank.table, (*_ints(extent.mask), extent.band, rank.e)))

    tiles.forward_calls(table, case._replace(shape=shape), extent, begin)
    for end in reversed(ends):
        end()
    return names


def _ints(pair: tuple[object, object]) -> tuple[int, int]:
    return int(pair[0]), int(pair[1])  # type: ignore[call-overload]


def _arenas(rank: _Rank, part: RankPart) -> tuple[int, int]:
    """Bytes that the forward pass and the backward pass of a part reserve."""
    shape: Shape = part.program.shape
    forward = int(arena_bytes(forward_sizes(rank.extent(part, False), shape, keeps_lse=True)))
    if not rank.case.trains:
        return forward, 0
    return forward, int(arena_bytes(backward_sizes(rank.extent(part, True), shape.backward())))


def _backward(rank: _Rank, heads_first: bool) -> None:
    """From the gradient of out to dq, dk and dv; `heads_first`: how the log-sum-exp lies."""
    table, plan, e, w = rank.table, rank.plan, rank.e, rank.w
    heads, kv_heads = int(rank.case.shape.heads), int(rank.case.shape.kv_heads)
    dq = _Sum(rank, "dq", plan.tokens, heads, plan.wide_out, "gradients")
    dk, dv = (_Sum(rank, name, plan.tokens, kv_heads, plan.wide_keys, "gradients") for name in ("dk", "dv"))
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
        _part_backward(rank, own.part, "own keys: ", (dq, dk, dv))
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
                visiting = _Sum(rank, name, guest.queries.stop, heads, wide, "comm_buffers")
                for own in guest.parts:
                    _part_backward(rank, own.part, "visiting queries: ", (visiting, dk, dv))
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
    rank: _Rank, number: int, place: int, fetch: Fetch, own: tuple[_Sum, _Sum, _Sum], ahead: _Ahead
) -> list[str]:
    """The gradients of what was fetched; names of those, which travel."""
    plan = rank.plan
    wide = all_if_many(len(fetch.parts), fetch.rows.total)
    if plan.travels_wide:
        wide = ((0, fetch.rows.total),)
    names = [f"{name} of {_fetched(number, place)}" for name in ("dk", "dv")]
    lanes = fetch.rows.lanes(plan.shape)
    dk, dv = (_Sum(rank, name, fetch.rows.total, lanes, wide, "comm_buffers") for name in names)
    for part in fetch.parts:
        _part_backward(rank, part, f"keys of stage {number + 1}: ", (own[0], dk, dv))
    ahead.used(number, place)
    for one in (dk, dv):
        one.end(rank.travel)
    if fetch.own is not None:
        for total in own[1:]:
            total.merge(plan.tokens, rank.travel)
    return names


def _back(rank: _Rank, number: int, stage: FetchStage) -> None:
    """Adds where gradients of own keys, and in the first stage of own queries, arrive."""
    hosts = rank.plan.hosts if number == 0 else ()
    nbytes = [rank.numbers(host.queries.stop - host.queries.start) * rank.e for host in hosts]
    rank.table.add("gradients of own queries that arrive", "comm_buffers", nbytes, "B Q H D e")
    for place, source in enumerate(stage.deliveries):
        room = 2 * rank.placed(source_placement(source)) * rank.travel
        rank.table.add(_arriving(number, place), "comm_buffers", room, "2 B R L D e, or w")


def _arriving(number: int, place: int) -> str:
    return f"gradients that arrive of delivery {place + 1}, stage {number + 1}"


def _take(rank: _Rank, number: int, own: tuple[_Sum, _Sum, _Sum]) -> None:
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


class _Sum:
    """Lines of `attention.sharding.sums.Sum`, of R rows and L lanes."""

    def __init__(self, rank: _Rank, name: str, rows: int, lanes: int, wide: Ranges, component: str) -> None:
        self._rank, self._name, self._lanes = rank, name, lanes
        self.visits = component == "comm_buffers"
        """Whether it travels."""
        self.numbers = _Numbers(rank, rows, rank.key_numbers(1, lanes), wide, name, component)

    def add(self, part: str, rows: int, number: int) -> None:
        """Adds a part of that name, which is gone then."""
        if self.numbers.takes(rows, number):
            self.numbers.begin(part)
            return
        self.merge(rows, number)
        self._rank.table.free(part)

    def merge(self, rows: int, number: int, lane_tokens: int = 0) -> None:
        """Adds so many rows of a part that is there, or tokens of one lane at a time."""
        rank, table = self._rank, self._rank.table
        table.phase(f"{self._name}, adding")
        self.numbers.begin()
        slab = min(rank.plan.slab_tokens, rows) * self._lanes * int(rank.case.shape.head_dim)
        if not rows:
            slab = lane_tokens * int(rank.case.shape.head_dim)
        name = f"scratch of the sum, {self._name}"
        widens = number != self.numbers.own or self.numbers.is_mixed
        table.add(name, "workspace", slab * rank.w * widens, "T L D w")
        table.free(name)

    def end(self, number: int) -> None:
        """The sum is complete, and has numbers of so many bytes."""
        self.numbers.end(number)


def _part_backward(rank: _Rank, part: RankPart, prefix: str, sums: tuple[_Sum, _Sum, _Sum]) -> None:
    """Computes a part's gradients and adds them."""
    if part.whole is not None:
        _join_backward(rank, part.whole, prefix, sums)
        return
    table, case = PrefixedTable(rank.table, prefix), rank.case
    queries, rows = part.queries.stop - part.queries.start, part.program.rows
    number = rank.travel if part.listed is None else rank.e
    if part.listed is not None:
        list_calls.backward(table, case._replace(shape=part.listed.shape), part.listed.calls)
        _add_gradients(rank, part, prefix, sums, number)
        return
    shape = part.program.shape
    extent = rank.extent(part, True)
    ends: list[End] = []

    def begin() -> None:
        table.add("dq", "temp_buffers", rank.numbers(queries) * rank.e, "B Q H D e")
        for name in ("dk", "dv"):
            table.add(name, "temp_buffers", rank.placed(rows) * number, "B R L D e, or w")
        back = shape.backward()
        sizes = backward_sizes(extent, back)
        sizes["slab"] = sizes["slab"] * (number // rank.e)
        own, other = int(arena_bytes(sizes)), _arenas(rank, part)[0]
        formula = "attention/sizes/tiles.py backward_sizes"
        ends.append(rank.kept.begin(rank.table, own, other, int(shape.seq), formula))
        in_kernel = shape.wide if shape.widens else rank.e
        ends.append(rank.kept.mask(rank.table, (*_ints(extent.mask), extent.band, in_kernel)))

    tiles.backward_calls(table, case._replace(shape=shape), extent, begin)
    for end in reversed(ends):
        end()
    _add_gradients(rank, part, prefix, sums, number)


def _add_gradients(
    rank: _Rank, part: RankPart, prefix: str, sums: tuple[_Sum, _Sum, _Sum], number: int
) -> None:
    """Adds the gradients of a part that are there, those of its keys in numbers of so many bytes."""
    rows = part.program.rows.total
    counts = (part.queries.stop - part.queries.start, rows, rows)
    for total, name, count, size in zip(
        sums, ("dq", "dk", "dv"), counts, (rank.e, number, number), strict=True
    ):
        total.add(prefix + name, count, size)
    rank.table.phase(f"{prefix}gradients added")


def _join_backward(rank: _Rank, part: WholePart, prefix: str, sums: tuple[_Sum, _Sum, _Sum]) -> None:
    """Adds the gradients of a part of whole calls."""
    table, calls = PrefixedTable(rank.table, prefix), part.calls
    # A row of a head is of all own tokens, and visiting queries come tokens before heads.
    row = APART if sums[0].visits else rank.plan.tokens
    case = rank.case._replace(shape=part.shape, lse_row=row)
    counts = (int(part.shape.queries), int(part.shape.seq), int(part.shape.seq))
    takes = all(total.numbers.takes(count, rank.e) for total, count in zip(sums, counts, strict=True))
    if takes and whole_calls.is_one(calls[0], backward_cut(calls[0], part.shape), case):
        whole_calls.backward(table, case, calls[:1])
        for total, name in zip(sums, ("dq", "dk", "dv"), strict=True):
            total.numbers.begin(prefix + name)
        calls = calls[1:]
    table.phase("before gradients are added")
    for total in sums:
        total.numbers.begin()
    for call in joining(calls):
        whole_calls.backward_parts(table, case, call)
    table.phase("gradients added")
