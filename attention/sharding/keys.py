"""Attention over shards by moving keys: every rank computes its own queries, over its own keys and over what
it fetches of its peers, stage by stage; the parts meet by their log-sum-exp. Gradients of fetched keys go
straight to their owner, who adds them stage by stage, in the same order each time.

Each stage is posted before the compute that can hide it. Keys are fetched again for the backward pass, so
that nothing beside q, k, v, out and the log-sum-exp of the rank's own tokens is saved. Global queries, which
see every key, travel to the keys instead.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager
from typing import Any, NamedTuple, Protocol

import torch
from torch import Tensor

from attention.config import AttentionConfig
from attention.layout import Layout
from attention.ops.backward import Gradients, final
from attention.ops.execute import Problem, Reserves, backward_pass, forward_pass
from attention.ops.kernels import lse_dtype
from attention.ops.learned_sinks import add_sinks, sinks_gradient
from attention.ops.list_calls import BlockLists, shared_lists
from attention.out_of_memory import with_emergency_release
from attention.pool import Buffers
from attention.sharding.part_calls import Sums, join_backward, join_forward
from attention.sharding.parts import source_placement
from attention.sharding.plan import FetchStage, Guest, KeysPlan, RankPart, all_if_many
from attention.sharding.sums import Output, Sum, packed
from attention.sharding.whole_parts import ListedPart
from attention.sizes.arrays import Ints
from attention.sizes.shape import Shape

Messages = Sequence[tuple[int, Tensor]]
"""Each with its peer."""
KeysAndValues = tuple[Tensor, Tensor]


class Posted(Protocol):
    """Messages on their way."""

    def wait(self) -> None: ...


class Exchange(Protocol):
    """What carries messages between the ranks of a group; see `attention.sharding.transport`."""

    def exchange(
        self, sends: Sequence[tuple[int, Tensor]], receives: Sequence[tuple[int, Tensor]], step: str
    ) -> Posted: ...

    def whole(self, step: str) -> AbstractContextManager[None]:
        """What is done between exchanges: an error in it lets peers know."""
        ...


class KeysProblem(NamedTuple):
    """A rank's attention over shards, and what running it needs."""

    plan: KeysPlan
    parts: tuple[Problem, ...]
    """Of each part, by its number."""
    buffers: Buffers


def keys_problem(
    plan: KeysPlan, config: AttentionConfig, layout: Callable[[], Layout], scale: float, buffers: Buffers
) -> KeysProblem:
    """The problem of a plan. `layout`: of the whole sequence, asked for where parts are lists."""
    parts = sorted(plan.all_parts(), key=lambda part: part.number)
    problems = tuple(_part_problem(part, config, layout, scale, buffers) for part in parts)
    return KeysProblem(plan, problems, buffers)


def _part_problem(
    part: RankPart, config: AttentionConfig, layout: Callable[[], Layout], scale: float, buffers: Buffers
) -> Problem:
    program, calls = part.program, part.whole or part.listed
    return Problem(
        shape=calls.shape if calls else program.shape,
        tiles=program.tiles,
        reserves=Reserves(program.shape, program.extent, kinds=False),
        scale=scale,
        covers=part.whole.covers if part.whole else False,
        whole=False,
        buffers=buffers,
        calls=part.whole.calls if part.whole else None,
        lists=_lists(part.listed, layout()) if part.listed else None,
        hides=config.token_edges,
    )


def _lists(part: ListedPart, layout: Layout) -> BlockLists:
    """The lists of a part."""
    shared, first = shared_lists(layout, part.calls), part.first
    stop = first + sum(int(group.rows) for group in part.calls.groups)

    def blocks(item: int, lanes: range, rows: range) -> Ints:
        some = shared.blocks(item, lanes, range(first + rows.start, first + rows.stop))
        return part.rows.blocks(some, layout.block_size)

    return BlockLists(part.calls, shared.counts[:, :, first:stop], blocks)


def keys_attention(
    q: Tensor, k: Tensor, v: Tensor, sinks: Tensor | None, problem: KeysProblem, exchange: Exchange
) -> Tensor:
    """out [B, own tokens, H, D] of own q, k and v, with gradients where those or sinks ask for them."""
    if torch.is_grad_enabled() and any(x is not None and x.requires_grad for x in (q, k, v, sinks)):
        out: Tensor = AttendShards.apply(q, k, v, sinks, problem, exchange)  # type: ignore[no-untyped-call]
        return out
    return _forward(q, k, v, sinks, problem, exchange, trains=False)[0]


class AttendShards(torch.autograd.Function):
    """out [B, own tokens, H, D]. Its backward exchanges whatever gradient comes."""

    @staticmethod
    def forward(
        ctx: Any,
        q: Tensor,
        k: Tensor,
        v: Tensor,
        sinks: Tensor | None,
        problem: KeysProblem,
        exchange: Exchange,
    ) -> Tensor:
        out, lse = _forward(q, k, v, sinks, problem, exchange, trains=True)
        ctx.save_for_backward(q, k, v, out, lse, *(() if sinks is None else (sinks,)))
        ctx.problem, ctx.exchange = problem, exchange
        ctx.set_materialize_grads(False)
        return out

    @staticmethod
    def backward(ctx: Any, grad: Tensor | None) -> Gradients:
        saved = ctx.saved_tensors  # read once: a checkpoint gives them once
        out, lse = saved[3:5]
        with torch.no_grad(), ctx.exchange.whole("the backward pass"):
            grad = torch.zeros_like(out) if grad is None else grad.contiguous()
            of_sinks = None
            if ctx.needs_input_grad[3] and out.shape[1]:
                of_sinks = sinks_gradient(grad, out, lse, saved[5], _own_shape(ctx.problem.plan))
            elif ctx.needs_input_grad[3]:
                of_sinks = torch.zeros_like(saved[5])
            parts = _backward(grad, saved[:5], ctx.problem, ctx.exchange)
        return final((*parts, of_sinks, None, None), (*saved, grad))


def _own_shape(plan: KeysPlan) -> Shape:
    return plan.shape._replace(seq=plan.tokens, origin=0)


def _forward(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    sinks: Tensor | None,
    problem: KeysProblem,
    exchange: Exchange,
    *,
    trains: bool,
) -> tuple[Tensor, Tensor]:
    """(out, lse [B, own tokens, H])."""
    plan = problem.plan
    q, k, v = (x.contiguous() for x in (q, k, v))
    total = Output(q, plan.wide_out, plan.slab_tokens)

    def add(part: RankPart, queries: Tensor, keys: Tensor, values: Tensor, to: Output) -> None:
        one = problem.parts[part.number]
        asking = queries[:, part.queries]
        if one.calls is not None:
            join_forward(asking, keys, values, one, part.queries, to)
            return

        def run() -> tuple[Tensor, Tensor | None]:
            return forward_pass(asking, keys, values, one, keeps_lse=True, trains=trains)

        out, lse = with_emergency_release(run, problem.buffers, q.device)
        assert lse is not None
        to.add(part.queries, out, lse)

    guests = _guests(plan, [q])
    ahead = _Ahead(k, v, plan, exchange, "forward")
    ahead.post(_to_hosts(plan, [q]), _of_guests(plan, guests))
    for own in plan.own:
        add(own.part, q, k[:, own.keys], v[:, own.keys], total)
    answers = [_like_rows(q[:, host.queries]) for host in plan.hosts]

    def over_guests() -> Posted:
        """Sends what visiting queries asked for."""
        sends = []
        for guest, (asking,) in zip(plan.guests, guests, strict=True):
            wide = all_if_many(len(guest.parts), asking.shape[1])
            visiting = Output(asking, wide, plan.slab_tokens)
            for own in guest.parts:
                add(own.part, asking, k[:, own.keys], v[:, own.keys], visiting)
            sends += [(guest.peer, x) for one in visiting.ended() for x in one.contiguous()]
        guests.clear()
        receives = [
            (host.peer, x)
            for host, answer in zip(plan.hosts, answers, strict=True)
            for one in answer
            for x in one
        ]
        return exchange.exchange(sends, receives, "forward, answers to visiting queries")

    def over_fetched(stage: FetchStage, fetched: list[KeysAndValues]) -> None:
        for fetch in stage.fetches:
            keys, values = fetched.pop(0)
            for part in fetch.parts:
                add(part, q, keys, values, total)

    returned = None
    for number, stage in enumerate(plan.stages):
        fetched = ahead.arrived()
        if number == 0 and (plan.guests or plan.hosts):
            returned = over_guests()
        # What was fetched is gone before the stage after the next is posted.
        over_fetched(stage, fetched)
    if returned is not None:
        returned.wait()
    for host, answer in zip(plan.hosts, answers, strict=True):
        total.add(host.queries, *answer)
    out, lse = total.ended()
    if sinks is not None and out.shape[1]:
        add_sinks(out, lse, sinks, _own_shape(plan))
    return out, lse


def _backward(
    grad: Tensor, saved: Sequence[Tensor], problem: KeysProblem, exchange: Exchange
) -> tuple[Tensor, Tensor, Tensor]:
    """(dq, dk, dv) of own tokens."""
    plan = problem.plan
    q, k, v = (x.contiguous() for x in saved[:3])
    out, lse = saved[3:5]
    travel = lse_dtype(k.dtype) if plan.travels_wide else k.dtype
    rows = (grad, q, out, lse)
    slab = plan.slab_tokens
    dq, dk, dv = Sum(q, plan.wide_out, slab), Sum(k, plan.wide_keys, slab), Sum(v, plan.wide_keys, slab)

    def add(part: RankPart, asking: Sequence[Tensor], keys: Tensor, values: Tensor, to: Sums) -> None:
        one = problem.parts[part.number]
        some = [x[:, part.queries] for x in asking]
        kept = (some[1], keys, values, some[2], some[3])
        if one.calls is not None:
            join_backward(some[0], kept, one, part.queries, to)
            return

        def run() -> tuple[Tensor, Tensor, Tensor]:
            return backward_pass(some[0], kept, one, wide_keys=plan.travels_wide)

        to.add(part.queries, list(with_emergency_release(run, problem.buffers, q.device)))

    guests = _guests(plan, rows)
    ahead = _Ahead(k, v, plan, exchange, "backward")
    ahead.post(_to_hosts(plan, rows), _of_guests(plan, guests))
    for own in plan.own:
        add(own.part, rows, k[:, own.keys], v[:, own.keys], Sums(dq, dk, dv, own.keys))

    def over_fetched(stage: FetchStage, fetched: list[KeysAndValues]) -> list[tuple[int, Tensor]]:
        """The gradients of what was fetched, for their owners."""
        sends = []
        for fetch in stage.fetches:
            keys, values = fetched.pop(0)
            wide = all_if_many(len(fetch.parts), keys.shape[1])
            if plan.travels_wide:
                wide = ((0, keys.shape[1]),)
            sums = Sums(dq, Sum(keys, wide, slab), Sum(values, wide, slab), slice(0, keys.shape[1]))
            for part in fetch.parts:
                add(part, rows, keys, values, sums)
            del keys, values
            ended = [one.ended(travel) for one in (sums.dk, sums.dv)]
            if fetch.own is not None:
                dk.add(fetch.own[1], ended[0][:, fetch.own[0]])
                dv.add(fetch.own[1], ended[1][:, fetch.own[0]])
            for source in fetch.sources:
                sends += [(source.peer, x) for one in ended for x in one[:, fetch.rows.of(*source[1:3])]]
        return sends

    def over_guests() -> list[tuple[int, Tensor]]:
        """The gradients of visiting queries, for their owners."""
        sends = []
        for guest, asking in zip(plan.guests, guests, strict=True):
            visiting = Sum(asking[1], all_if_many(len(guest.parts), guest.queries.stop), slab)
            for own in guest.parts:
                add(own.part, asking, k[:, own.keys], v[:, own.keys], Sums(visiting, dk, dv, own.keys))
            sends += [(guest.peer, x) for x in visiting.ended()]
        guests.clear()
        return sends

    back = None
    for number, stage in enumerate(plan.stages):
        fetched = ahead.arrived()
        sends = over_fetched(stage, fetched)
        if back is not None:
            back.take(dq, dk, dv)
        hosts = plan.hosts if number == 0 else ()
        if number == 0:
            sends += over_guests()
        back = _Back(stage, hosts, plan, q, k, travel)
        back.post(sends, exchange)
        del sends
    if back is not None:
        back.take(dq, dk, dv)
    return dq.ended(), dk.ended(), dv.ended()


def _guests(plan: KeysPlan, rows: Sequence[Tensor]) -> list[list[Tensor]]:
    """Where visiting queries, and what comes with them, are received."""
    return [[x.new_empty(len(x), guest.queries.stop, *x.shape[2:]) for x in rows] for guest in plan.guests]


def _of_guests(plan: KeysPlan, guests: Sequence[Sequence[Tensor]]) -> Messages:
    return [
        (guest.peer, x)
        for guest, given in zip(plan.guests, guests, strict=True)
        for one in given
        for x in one
    ]


def _to_hosts(plan: KeysPlan, rows: Sequence[Tensor]) -> Messages:
    asked = ((host.peer, one[:, host.queries]) for host in plan.hosts for one in rows)
    return [(peer, x.contiguous()) for peer, one in asked for x in one]


def _like_rows(q: Tensor) -> tuple[Tensor, Tensor]:
    """Room for out and lse of queries."""
    return q.new_empty(q.shape), q.new_empty(q.shape[:3], dtype=lse_dtype(q.dtype))


class _Ahead:
    """Fetches stages, each posted before the one before it is worked on."""

    def __init__(self, k: Tensor, v: Tensor, plan: KeysPlan, exchange: Exchange, step: str) -> None:
        self._k, self._v, self._plan, self._exchange, self._step = k, v, plan, exchange, step
        self._number = 0
        self._pending: Posted | None = None
        self._room: list[tuple[Tensor, Tensor]] = []

    def post(self, sends: Messages = (), receives: Messages = ()) -> None:
        """Posts the next stage, if there is one, with further messages."""
        stages, self._room, self._pending = self._plan.stages, [], None
        if self._number >= len(stages):
            return
        stage = stages[self._number]
        sends = [*self._deliveries(stage), *sends]
        own = (self._k, self._v)
        arriving: list[tuple[int, Tensor]] = []
        for fetch in stage.fetches:
            size = (len(own[0]), fetch.rows.total, fetch.rows.lanes(self._plan.shape), own[0].shape[3])
            room = own[0].new_empty(size), own[0].new_empty(size)
            if fetch.own is not None:
                for into, x in zip(room, own, strict=True):
                    into[:, fetch.own[0]].copy_(x[:, fetch.own[1]])
            self._room.append(room)
            for source in fetch.sources:
                arriving += [(source.peer, x) for one in room for x in one[:, fetch.rows.of(*source[1:3])]]
        step = f"{self._step}, keys of stage {self._number + 1} of {len(stages)}"
        self._number += 1
        self._pending = self._exchange.exchange(sends, [*arriving, *receives], step)

    def arrived(self) -> list[tuple[Tensor, Tensor]]:
        """(k, v) of each fetch of the stage that was posted, when it is there; the next one is posted."""
        if self._pending is not None:
            self._pending.wait()
        room = self._room
        self.post()
        return room

    def _deliveries(self, stage: FetchStage) -> list[tuple[int, Tensor]]:
        sends = []
        for source in stage.deliveries:
            place = self._plan.locate(source)
            for x in (self._k, self._v):
                sent = x[:, place] if source.rate == 1 else packed(x, source, place.start, self._plan.shape)
                sends += [(source.peer, item) for item in sent]
        return sends


class _Back:
    """Gradients of a stage on their way to the owners of its keys, and answers to queries that visit."""

    def __init__(
        self,
        stage: FetchStage,
        hosts: Sequence[Guest],
        plan: KeysPlan,
        q: Tensor,
        k: Tensor,
        travel: torch.dtype,
    ) -> None:
        """`hosts`: what answers."""
        self._plan, self._deliveries, self._hosts = plan, stage.deliveries, hosts
        self._answers = [q.new_empty(q[:, host.queries].shape) for host in hosts]
        self._room = []
        for source in stage.deliveries:
            rows = source_placement(source)
            size = (2, len(k), rows.total, rows.lanes(plan.shape), k.shape[3])
            self._room.append(k.new_empty(size, dtype=travel))

    def post(self, sends: Messages, exchange: Exchange) -> None:
        receives = [
            (source.peer, x)
            for source, room in zip(self._deliveries, self._room, strict=True)
            for x in room.flatten(0, 1)
        ]
        receives += [
            (host.peer, x) for host, one in zip(self._hosts, self._answers, strict=True) for x in one
        ]
        self._pending = exchange.exchange(sends, receives, "backward, gradients to the owners of keys")

    def take(self, dq: Sum, dk: Sum, dv: Sum) -> None:
        """Adds what arrived, which is gone then."""
        self._pending.wait()
        for source in self._deliveries:
            room, place = self._room.pop(0), self._plan.locate(source)
            for total, part in zip((dk, dv), room, strict=True):
                if source.rate == 1:
                    total.add(place, part)
                else:
                    total.add_lanes(source, place.start, self._plan.shape, part)
            del room, part
        for host in self._hosts:
            dq.add(host.queries, self._answers.pop(0))
