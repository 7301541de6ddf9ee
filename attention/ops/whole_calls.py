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


class KernelPart(NamedTuple):
    """What a kernel is given at once of a call: some of the queries and keys of a batch item."""

    call: WholeCall
    item: int
    queries: Span
    keys: Span


def forward(
    q: Tensor, k: Tensor, v: Tensor, calls: Sequence[WholeCall], shape: Shape, scale: float, covers: bool
) -> tuple[Tensor, Tensor]:
    """(out [B, S, H, D], lse [B, S, H]); `covers`: whether every token of every head is in some call."""
    calls = [call for call in calls if call.exists]
    if calls[0].covers(shape):
        out, lse = covering(calls.pop(0), shape, q, k, v, scale)
    else:
        out = (torch.empty if covers else torch.zeros)(q.shape, dtype=q.dtype, device=q.device)
        size = (q.shape[0], q.shape[2], q.shape[1])
        dtype = kernels.lse_dtype(q.dtype)
        lse = torch.empty(size, dtype=dtype, device=q.device).transpose(1, 2)
        if not covers:
            lse.fill_(-torch.inf)
    origin = int(shape.origin)
    for part in parts(calls, shape, q.shape[0], forward_cut):
        result, result_lse = part_forward(part, shape, q, k, v, scale)
        target = view(part.queries, out[part.item], origin)
        target_lse = rows(part.queries, lse[part.item], origin)
        if part.call.first:
            target.copy_(result)
            target_lse.copy_(result_lse)
        else:
            merge(target, target_lse, result, result_lse)
        del result, result_lse  # before the next ones are made
    return out, lse


def part_forward(
    part: KernelPart, shape: Shape, q: Tensor, k: Tensor, v: Tensor, scale: float
) -> tuple[Tensor, Tensor]:
    """(out [N, H, T, D], lse [N, H, T]) of a part's queries, as the kernel returns them."""
    call, b = part.call, part.item
    return _kernel(call, shape)(
        view(part.queries, q[b], int(shape.origin)),
        view(part.keys, k[b]),
        view(part.keys, v[b]),
        scale=scale,
        left=call.left,
        right=call.right,
    )


def _kernel(call: WholeCall, shape: Shape) -> Callable[..., tuple[Tensor, Tensor]]:
    """What runs a call forward. Either's log-sum-exp is the other's: backward may choose anew."""
    return cudnn.forward if by_cudnn(call, shape) else kernels.windowed


def _backward_kernel(call: WholeCall, shape: Shape) -> Callable[..., tuple[Tensor, Tensor, Tensor]]:
    return cudnn.backward if by_cudnn(call, shape) else kernels.windowed_backward


def covering(
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


def parts(
    calls: Sequence[WholeCall], shape: Shape, batch: int, cut_of: Callable[[WholeCall, Shape], CallPart]
) -> Iterator[KernelPart]:
    """What kernels are given, in the order of the calls; `cut_of`: how these are cut."""
    for call in calls:
        spans = _listed_spans(call, shape, cut_of(call, shape))
        yield from (KernelPart(call, b, *both) for b in range(batch) for both in spans)


@lru_cache(maxsize=128)
def _listed_spans(call: WholeCall, shape: Shape, cut: CallPart) -> tuple[tuple[Span, Span], ...]:
    return tuple(_spans(call, shape, cut))


def _spans(call: WholeCall, shape: Shape, cut: CallPart) -> Iterator[tuple[Span, Span]]:
    """(queries, keys) of the call's kernel calls: some views, some kv heads and the query heads that read
    them, some queries."""
    for queries, keys in call.spans(shape):
        repeat = queries.heads // keys.heads
        for begin in range(0, queries.batch, cut.views):
            end = min(begin + cut.views, queries.batch)
            asking, seen = queries.pick(begin, end), keys.pick(begin, end)
            for first in range(0, keys.heads, cut.kv_heads):
                count = min(cut.kv_heads, keys.heads - first)
                some = asking._replace(
                    head=asking.head + first * repeat * queries.head_step, heads=count * repeat
                )
                of_keys = seen._replace(head=seen.head + first * keys.head_step, heads=count)
                if cut.queries >= queries.length:
                    yield some, of_keys
                else:
                    yield from call.slices(some, of_keys, cut.queries)


def merge(total: Tensor, total_lse: Tensor, part: Tensor, part_lse: Tensor) -> None:
    """total <- the attention over both sets of keys, in place; all [N, H, T(, D)]. Takes no memory: shares
    and products are in single precision within an operator. The total may be in single precision, and part
    is anything afterwards."""
    share = torch.sub(part_lse, total_lse)
    torch.logaddexp(total_lse, part_lse, out=total_lse)
    share = share.sigmoid_()[..., None]
    if total.dtype == part.dtype:
        total.addcmul_(part.sub_(total), share)
    else:
        total.addcmul_(total, share, value=-1).addcmul_(part, share)


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
    q, k, v = saved[:3]
    calls = [call for call in calls if call.exists]
    first = calls[0]
    if is_one(first, cut_of, shape):
        dq, dk, dv = covering_backward(calls.pop(0), shape, grad, saved, scale)
    else:
        # Each part of a call over all tokens has gradients of its own tokens and heads, or adds to others'.
        alone = first.covers_keys(shape)
        dq = (torch.empty if covers else torch.zeros)(q.shape, dtype=q.dtype, device=q.device)
        dk, dv = (
            (torch.empty if alone else torch.zeros)(x.shape, dtype=x.dtype, device=x.device) for x in (k, v)
        )
    origin = int(shape.origin)
    for part in parts(calls, shape, q.shape[0], cut_of):
        b, sets_keys = part.item, part.call.covers_keys(shape)
        part_dq, part_dk, part_dv = part_backward(part, shape, grad, saved, scale)
        _hand_over(view(part.queries, dq[b], origin), part_dq, part.call.first)
        _hand_over(view(part.keys, dk[b]), part_dk, sets_keys)
        _hand_over(view(part.keys, dv[b]), part_dv, sets_keys)
        del part_dq, part_dk, part_dv  # before the next ones are made
    return dq, dk, dv


def part_backward(
    part: KernelPart, shape: Shape, grad: Tensor, saved: Sequence[Tensor], scale: float
) -> tuple[Tensor, Tensor, Tensor]:
    """(dq, dk, dv) of a part's queries and keys, as the kernel returns them."""
    q, k, v, out, lse = saved
    call, b, origin = part.call, part.item, int(shape.origin)
    return _backward_kernel(call, shape)(
        view(part.queries, grad[b], origin),
        view(part.queries, q[b], origin),
        view(part.keys, k[b]),
        view(part.keys, v[b]),
        view(part.queries, out[b], origin),
        rows(part.queries, lse[b], origin),
        scale=scale,
        left=call.left,
        right=call.right,
    )


def is_one(call: WholeCall, cut_of: Callable[[WholeCall, Shape], CallPart], shape: Shape) -> bool:
    """Whether backward gives the kernel all tokens at once, which returns dq, dk and dv."""
    cut = cut_of(call, shape)
    fits = call.views <= cut.views and call.kv_heads(shape) <= cut.kv_heads
    return bool(call.covers_keys(shape) and fits)


def covering_backward(
    call: WholeCall, shape: Shape, grad: Tensor, saved: Sequence[Tensor], scale: float
) -> tuple[Tensor, Tensor, Tensor]:
    """(dq, dk, dv), as a call that `is_one` returns them."""
    q, k, v, out, lse = saved
    grad_part, q_part, k_part, v_part, out_part = (_segments(x, call.views) for x in (grad, q, k, v, out))
    rows_lse = lse.transpose(1, 2).unflatten(2, (call.views, -1)).transpose(1, 2).flatten(0, 1)
    results = _backward_kernel(call, shape)(
        grad_part, q_part, k_part, v_part, out_part, rows_lse, scale=scale, left=call.left, right=call.right
    )
    dq, dk, dv = (part.transpose(1, 2).reshape(x.shape) for part, x in zip(results, (q, k, v), strict=True))
    return dq, dk, dv


def _hand_over(target: Tensor, part: Tensor, sets: bool | int) -> None:
    if sets:
        target.copy_(part)
    else:
        target.add_(part)
