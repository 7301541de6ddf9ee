"""Runs a part of whole calls into a rank's sums: each result of a kernel is merged or added where it belongs,
so that a part takes no more than one of them."""

from __future__ import annotations

from collections.abc import Sequence
from functools import partial
from typing import NamedTuple

from torch import Tensor

from attention.ops import whole_calls
from attention.ops.execute import Problem
from attention.out_of_memory import with_emergency_release
from attention.sharding.sums import Output, Sum
from attention.sharding.whole_parts import joining
from attention.sizes.shape import Span
from attention.sizes.whole_calls import backward_cut, forward_cut


class Sums(NamedTuple):
    """Where a part's gradients go."""

    dq: Sum
    dk: Sum
    dv: Sum
    keys: slice
    """Tokens of those of k and v."""

    def takes(self, queries: slice) -> bool:
        """Whether gradients of these queries, and of the keys, may be the sums from then on."""
        return self.dq.takes(queries) and self.dk.takes(self.keys) and self.dv.takes(self.keys)

    def add(self, queries: slice, gradients: list[Tensor]) -> None:
        """Adds dq, dk and dv of these queries and the keys, each of which is gone then."""
        for total, tokens in ((self.dq, queries), (self.dk, self.keys), (self.dv, self.keys)):
            total.add(tokens, gradients.pop(0))


def join_forward(q: Tensor, k: Tensor, v: Tensor, problem: Problem, queries: slice, to: Output) -> None:
    """Adds the output of a problem's calls; `queries`: the tokens of `to` that q is of."""
    calls, shape, scale = problem.calls, problem.shape, problem.scale
    assert calls is not None

    def run(part: whole_calls.KernelPart) -> tuple[Tensor, Tensor]:
        return whole_calls.part_forward(part, shape, q, k, v, scale)

    if to.takes(queries) and calls[0].covers(shape):
        first = partial(whole_calls.covering, calls[0], shape, q, k, v, scale)
        to.add(queries, *with_emergency_release(first, problem.buffers, q.device))
        calls = calls[1:]
    to.begin()
    for part in whole_calls.parts(joining(calls), shape, len(q), forward_cut):
        out, lse = with_emergency_release(partial(run, part), problem.buffers, q.device)
        to.join(part.item, _moved(part.queries, queries.start - int(shape.origin)), out, lse)
        del out, lse  # before the next ones are made


def join_backward(grad: Tensor, saved: Sequence[Tensor], problem: Problem, queries: slice, to: Sums) -> None:
    """Adds the gradients of a problem's calls; `saved`: q, k, v, out and lse of its queries and keys."""
    calls, shape, scale = problem.calls, problem.shape, problem.scale
    assert calls is not None

    def run(part: whole_calls.KernelPart) -> tuple[Tensor, Tensor, Tensor]:
        return whole_calls.part_backward(part, shape, grad, saved, scale)

    if to.takes(queries) and whole_calls.is_one(calls[0], backward_cut, shape):
        first = partial(whole_calls.covering_backward, calls[0], shape, grad, saved, scale)
        to.add(queries, list(with_emergency_release(first, problem.buffers, grad.device)))
        calls = calls[1:]
    for total in (to.dq, to.dk, to.dv):
        total.begin()
    for part in whole_calls.parts(joining(calls), shape, len(grad), backward_cut):
        dq, dk, dv = with_emergency_release(partial(run, part), problem.buffers, grad.device)
        to.dq.join(part.item, _moved(part.queries, queries.start - int(shape.origin)), dq)
        keys = _moved(part.keys, to.keys.start)
        to.dk.join(part.item, keys, dk)
        to.dv.join(part.item, keys, dv)
        del dq, dk, dv  # before the next ones are made


def _moved(span: Span, tokens: int) -> Span:
    return span._replace(start=span.start + tokens)
