"""Ranks as threads of one process, whose messages are copies in mailboxes: many cases in the time that
starting processes takes."""

from __future__ import annotations

import threading
from collections import Counter
from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager, nullcontext
from functools import cache
from queue import Empty, Queue
from typing import Any, TypeVar

import torch
from torch import Tensor

from attention import AttentionConfig
from attention.inputs import shape_of
from attention.layout import Layout, build_layout
from attention.pool import buffers_for
from attention.programs import tiles_of
from attention.sharding.keys import keys_attention, keys_problem
from attention.sharding.plan import KeysPlan, keys_plan
from attention.sharding.shards import Shards, shards_of

T = TypeVar("T")
Mail = dict[tuple[int, int], "Queue[Tensor]"]
PATIENCE = 20
"""Seconds after which a message that does not come is an error."""


class Mailbox:
    """The messages of one rank; `mail` is all ranks'."""

    def __init__(self, rank: int, mail: Mail) -> None:
        self.rank, self.mail = rank, mail
        self.sent: Counter[int] = Counter()

    def exchange(
        self, sends: Sequence[tuple[int, Tensor]], receives: Sequence[tuple[int, Tensor]], step: str
    ) -> Awaited:
        for x in (x for _, x in (*sends, *receives)):
            assert x.is_contiguous(), step
        for peer, x in sends:
            self.sent[peer] += x.nbytes
            self.mail[self.rank, peer].put(x.detach().clone())
        return Awaited(self, receives, step)

    def whole(self, step: str) -> AbstractContextManager[None]:
        return nullcontext()


class Awaited:
    def __init__(self, mailbox: Mailbox, receives: Sequence[tuple[int, Tensor]], step: str) -> None:
        self.mailbox, self.receives, self.step = mailbox, receives, step

    def wait(self) -> None:
        for peer, x in self.receives:
            try:
                message = self.mailbox.mail[peer, self.mailbox.rank].get(timeout=PATIENCE)
            except Empty:
                raise AssertionError(f"{self.step}: {peer} sent nothing to {self.mailbox.rank}") from None
            assert (message.shape, message.dtype) == (x.shape, x.dtype), self.step
            x.copy_(message)


def by_ranks(world: int, run: Callable[[Mailbox], T]) -> list[T]:
    """What `run` gives on each rank; no message is left over."""
    mail: Mail = {(a, b): Queue() for a in range(world) for b in range(world)}
    results: dict[int, T] = {}
    errors: list[BaseException] = []

    def one(rank: int) -> None:
        try:
            results[rank] = run(Mailbox(rank, mail))
        except BaseException as error:  # noqa: BLE001 -- raised below
            errors.append(error)

    threads = [threading.Thread(target=one, args=(rank,)) for rank in range(world)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    if errors:
        raise errors[0]
    assert all(queue.empty() for queue in mail.values())
    return [results[rank] for rank in range(world)]


def plan_for(
    config: AttentionConfig,
    shards: Shards,
    rank: int,
    q: Tensor,
    k: Tensor,
    causal: bool,
    documents: Any = None,
) -> KeysPlan:
    """The plan of a rank for whole q and k."""
    own = max(shards.tokens(rank), 1)
    shape = shape_of(q[:, :own], k[:, :own], config, causal)._replace(seq=q.shape[1], origin=0, causal=causal)
    make = tiles_of(config, shape._replace(windows="none"), layout_for(config, q, causal))
    return keys_plan(config, shape, shards, rank, make, documents)


def layout_for(config: AttentionConfig, q: Tensor, causal: bool) -> Callable[[], Layout]:
    """The layout for whole q, built when it is asked for."""
    return cache(lambda: build_layout(config, q.shape[1], causal))


def attended(
    config: AttentionConfig,
    world: int,
    tensors: Sequence[Tensor],
    causal: bool,
    documents: Any = None,
    sinks: Tensor | None = None,
    zigzag: bool = False,
) -> tuple[list[Tensor], list[Counter[int]]]:
    """([out, dq, dk, dv(, dsinks)] of whole q, k, v and gradient, as ranks compute them; what each sent)."""
    q, k, v, grad = tensors
    shards = shards_of(config, q.shape[1], world)._replace(zigzag=zigzag)

    def run(mailbox: Mailbox) -> tuple[Tensor, list[Tensor], Counter[int]]:
        places = torch.from_numpy(shards.positions(mailbox.rank))
        own = [x[:, places].clone().requires_grad_() for x in (q, k, v)]
        logits = None if sinks is None else sinks.clone().requires_grad_()
        plan = plan_for(config, shards, mailbox.rank, q, k, causal, documents)
        scale = config.scale or q.shape[3] ** -0.5
        layout = layout_for(config, q, causal)
        problem = keys_problem(plan, config, layout, scale, buffers_for(config))
        out = keys_attention(*own, logits, problem, mailbox)
        out.backward(grad[:, places])
        results = [out.detach(), *(x.grad for x in own)]
        return places, results + ([] if logits is None else [logits.grad]), mailbox.sent

    wholes = [torch.zeros_like(x) for x in (q, q, k, v)]
    of_sinks = None if sinks is None else torch.zeros_like(sinks)
    counts = []
    for places, results, sent in by_ranks(world, run):
        counts.append(sent)
        for whole, part in zip(wholes, results, strict=False):
            whole[:, places] = part
        if of_sinks is not None:
            of_sinks += results[4]
    return wholes + ([] if of_sinks is None else [of_sinks]), counts
