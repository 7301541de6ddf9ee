"""Parts that the backward passes of this library's autograd functions share."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import wraps
from typing import Any

import torch
from torch import Tensor

from attention.errors import UnavailableError
from attention.out_of_memory import with_emergency_release

Gradients = tuple[Tensor | None, ...]


def once(run: Callable[..., Gradients]) -> Callable[..., Gradients]:
    """The `backward(ctx, *grads)` of `run(ctx, saved, *grads)`, which may be run again where memory runs
    out: `ctx.buffers` are freed then. Gradients that are differentiated in their turn are refused."""

    @wraps(run)
    def backward(ctx: Any, *grads: Tensor | None) -> Gradients:
        saved = ctx.saved_tensors  # read once: a checkpoint gives them once
        with torch.no_grad():
            gradients = with_emergency_release(lambda: run(ctx, saved, *grads), ctx.buffers, saved[0].device)
        return final(gradients, (*saved, *grads))

    return backward


def final(gradients: Gradients, sources: Sequence[Tensor | None]) -> Gradients:
    """The gradients, made from these, which are refused where they are differentiated in their turn."""
    if not torch.is_grad_enabled():
        return gradients
    # create_graph=True; whether the graph is ever used shows later: by what the gradients came from, or
    # by the anchor where that asks for none.
    anchors = (torch.empty(0, requires_grad=True), *(x for x in sources if x is not None))
    return tuple(None if x is None else _Once.apply(x, *anchors) for x in gradients)  # type: ignore[no-untyped-call]


class _Once(torch.autograd.Function):
    """A gradient as it is."""

    @staticmethod
    def forward(ctx: Any, grad: Tensor, *sources: Tensor) -> Tensor:
        return grad.view_as(grad)

    @staticmethod
    def backward(ctx: Any, *_: Tensor) -> Gradients:
        raise UnavailableError(
            "this attention has no second derivative: its gradients were differentiated again (double "
            "backward); build the loss without gradients of its output, or use reference_attention"
        )
