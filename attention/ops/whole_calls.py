"""Runs an attention of a few kernel calls over the whole sequence, forward and backward.

What the first call returns is the output, where it has all of it; what others return is merged into it in
place. Nothing else is held: no arena, no masks, no sums in single precision beside those of the kernel.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from functools import lru_cache
from typing import NamedTuple

import torch
from torch import Tensor

from attention.ops import cudnn, kernels
from attention.ops.views import rows, view
from attention.sizes.shape import Shape, Span
from attention.sizes.whole_calls import CallPart, WholeCall, backward_cut, by_cudnn, forward_cut


class _Part(NamedTuple):
    """What a kernel is given at once: places of queries and keys in a batch item, or in all of them."""

    queries: Span
    keys: Span


def forward(
    q: Tensor, k: Tensor, v: Tensor, calls: Sequence[WholeCall], shape: Shape, scale: float, covers: bool
) -> tuple[Tensor, Tensor]:
    """(out [B, S, H, D], lse [B, S, H]); `covers`: whether every token of every head is in some call."""
    calls = [call for call in calls if call.exists]
    if calls[0].covers(shape):
        out, lse = _covering(calls.pop(0), shape, q, k, v, scale)
    else:
        out = (torch.empty if covers else torch.zeros)(q.shape, dtype=q.dtype, device=q.device)
        size = (q.shape[0], q.shape[2], q.shape[1])
        dtype = kernels.lse_dtype(q.dtype)
        lse = torch.empty(size, dtype=dtype, device=q.device).transpose(1, 2)
        if not covers:
            lse.fill_(-torch.inf)
    origin = int(shape.origin)
    for call in calls:
        for b in range(q.shape[0]):
            for queries, keys in _listed_parts(call, shape, forward_cut(call, shape)):
                part, part_lse = _kernel(call, shape)(
                    view(queries, q[b], origin),
                    view(keys, k[b]),
                    view(keys, v[b]),
                    scale=scale,
                    left=call.left,
                    right=call.right,
                )
                target, target_lse = view(queries, out[b], origin), rows(queries, lse[b], origin)
                if call.first:
                    target.copy_(part)
                    target_lse.copy_(part_lse)
                else:
                    merge(target, target_lse, part, part_lse)
                del part, part_lse  # before the next ones are made
    return out, lse


def _kernel(call: WholeCall, shape: Shape) -> Callable[..., tuple[Tensor, Tensor]]:
    """What runs a call forward. Either's log-sum-exp is the other's: backward may choose anew."""
    return cudnn.forward if by_cudnn(call, shape) else kernels.windowed


def _backward_kernel(call: WholeCall, shape: Shape) -> Callable[..., tuple[Tensor, Tensor, Tensor]]:
    return cudnn.backward if by_cudnn(call, shape) else kernels.windowed_backward


def _covering(
    call: WholeCall, shape: Shape, q: Tensor, k: Tensor, v: Tensor, scale: float
) -> tuple[Tensor, Tensor]:
    """The output and its log-sum-exp, as a call over all tokens returns them."""
    k, v = (_seen(x, call) for x in (k, v))
    part, part_lse = _kernel(call, shape)(
        *(_segments(x, call.views) for x in (q, k, v)), scale=scale, left=call.left, right=call.right
    )
    if call.views > 1:  # heads before tokens, as all that reads it has it
        part_lse = part_lse.unflatten(0, (-1, call.views)).transpose(1, 2).reshape(q.shape[0], q.shape[2], -1)
    return part.transpose(1, 2).reshape(q.shape), part_lse.transpose(1, 2)


def _seen(x: Tensor, call: WholeCall) -> Tensor:
    """The tokens of x [B, S, heads, D] that are keys of a call over all queries."""
    tokens = call.views * call.key_length
    return x if tokens == x.shape[1] else x.narrow(1, call.key_start, tokens)


def _segments(x: Tensor, views: int) -> Tensor:
    """x [B, S, heads, D] as [B views, heads, S / views, D]."""
    if views > 1:
        x = x.unflatten(1, (views, -1)).flatten(0, 1)
    return x.transpose(1, 2)


@lru_cache(maxsize=128)
def _listed_parts(call: WholeCall, shape: Shape, cut: CallPart) -> tuple[_Part, ...]:
    return tuple(_parts(call, shape, cut))


def _parts(call: WholeCall, shape: Shape, cut: CallPart) -> Iterator[_Part]:
    """The call's kernel calls: some views, some kv heads and the query heads that read them, some queries."""
    for queries, keys in call.spans(shape):
        repeat = queries.heads // keys.heads
        for begin in range(0, queries.batch, cut.views):
            end = min(begin + cut.views, queries.batch)
            for first in range(0, keys.heads, cut.kv_heads):
                count = min(cut.kv_heads, keys.heads - first)
                some = queries.pick(begin, end)._replace(
                    head=queries.head + first * repeat * queries.head_step, heads=count * repeat
                )
                of_keys = keys.pick(begin, end)._replace(head=keys.head + first * keys.head_step, heads=count)
                if cut.queries >= queries.length:
                    yield _Part(some, of_keys)
                else:
                    yield from (_Part(*both) for both in call.slices(some, of_keys, cut.queries))


def merge(total: Tensor, total_lse: Tensor, part: Tensor, part_lse: Tensor) -> None:
    """total <- the attention over both sets of keys, in place; all [N, H, T(, D)]. Takes no memory: shares
    and products are in single precision within an operator."""
    share = torch.sub(part_lse, total_lse)
    torch.logaddexp(total_lse, part_lse, out=total_lse)
    total.addcmul_(part.sub_(total), share.sigmoid_()[..., None])


def backward(
    grad: Tensor,
    saved: Sequence[Tensor],
    calls: Sequence[WholeCall],
    shape: Shape,
    scale: float,
    covers: bool,
    cut_of: Callable[[WholeCall, Shape], CallPart] = backward_cut,
) -> tuple[Tensor, Tensor, Tensor]:
    """(dq, dk, dv) from the gradient of out and what forward saved: q, k, v, out and lse. `cut_of`: how calls
    are cut."""
    q, k, v, out, lse = saved
    calls = [call for call in calls if call.exists]
    first = calls[0]
    if first.covers_keys(shape) and _is_one(first, cut_of(first, shape), shape):
        by_segments = [_segments(x, first.views) for x in (grad, q, k, v, out)]
        grad_part, q_part, k_part, v_part, out_part = by_segments
        rows_lse = lse.transpose(1, 2).unflatten(2, (first.views, -1)).transpose(1, 2).flatten(0, 1)
        parts = _backward_kernel(first, shape)(
            grad_part,
            q_part,
            k_part,
            v_part,
            out_part,
            rows_lse,
            scale=scale,
            left=first.left,
            right=first.right,
        )
        dq, dk, dv = (part.transpose(1, 2).reshape(x.shape) for part, x in zip(parts, (q, k, v), strict=True))
        calls.pop(0)
    else:
        # Each part of a call over all tokens has gradients of its own tokens and heads, or adds to others'.
        alone = first.covers_keys(shape)
        dq = (torch.empty if covers else torch.zeros)(q.shape, dtype=q.dtype, device=q.device)
        dk, dv = (
            (torch.empty if alone else torch.zeros)(x.shape, dtype=x.dtype, device=x.device) for x in (k, v)
        )
    origin = int(shape.origin)
    for call in calls:
        sets_keys = call.covers_keys(shape)
        for b in range(q.shape[0]):
            for queries, keys in _listed_parts(call, shape, cut_of(call, shape)):
                part_dq, part_dk, part_dv = _backward_kernel(call, shape)(
                    view(queries, grad[b], origin),
                    view(queries, q[b], origin),
                    view(keys, k[b]),
                    view(keys, v[b]),
                    view(queries, out[b], origin),
                    rows(queries, lse[b], origin),
                    scale=scale,
                    left=call.left,
                    right=call.right,
                )
                _hand_over(view(queries, dq[b], origin), part_dq, call.first)
                _hand_over(view(keys, dk[b]), part_dk, sets_keys)
                _hand_over(view(keys, dv[b]), part_dv, sets_keys)
                del part_dq, part_dk, part_dv  # before the next ones are made
    return dq, dk, dv


def _is_one(call: WholeCall, cut: CallPart, shape: Shape) -> bool:
    """Whether the kernel is given a call as it is."""
    return call.views <= cut.views and call.kv_heads(shape) <= cut.kv_heads


def _hand_over(target: Tensor, part: Tensor, sets: bool | int) -> None:
    if sets:
        target.copy_(part)
    else:
        target.add_(part)
