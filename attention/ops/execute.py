"""Runs a program of tiles over tensors, forward and backward, behind one autograd function.

Saved for backward: q, k, v, out and the log-sum-exp. Nothing of size queries x keys is ever held
beyond one chunk. Sums over parts are kept in single precision (double for float64) while a tile
is worked on.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from attention.ops import kernels, product
from attention.ops.program import Call, Gather, Shape, Span, Tile
from attention.ops.scratch import Scratch
from attention.ops.sinks import GatherSink, Part, Sink, SpanSink
from attention.ops.views import Fetched, fetch, mask_bias, rows, view, widened
from attention.pool import Buffers, with_emergency_release

SUM_BYTES = 4 << 20
"""Largest sum of dk or of dv that 16-bit types are given in single precision."""


@dataclass(frozen=True, slots=True)
class Problem:
    """One attention over one set of sizes: its program and what running it needs."""

    shape: Shape
    tiles: Callable[[int], Iterable[Tile]]
    """The tiles of batch item b."""
    scale: float
    covers: bool
    """Whether every (token, head) is in some call; otherwise out is zero and lse -inf there."""
    whole: bool
    """Whether a single kernel call over all tokens does it (dense, as many kv heads as heads)."""
    buffers: Buffers

    def scratch(self, device: torch.device) -> Scratch:
        return Scratch(self.buffers.pool_for(self.shape.seq), device)


class Attend(torch.autograd.Function):
    """(out [B, S, H, D], lse [B, S, H]) of a problem; lse is not differentiable."""

    @staticmethod
    def forward(ctx: Any, q: Tensor, k: Tensor, v: Tensor, problem: Problem) -> tuple[Tensor, Tensor]:
        out, lse = with_emergency_release(lambda: _forward(q, k, v, problem), problem.buffers, q.device)
        ctx.save_for_backward(q, k, v, out, lse)
        ctx.problem = problem
        ctx.mark_non_differentiable(lse)
        return out, lse

    @staticmethod
    def backward(ctx: Any, grad: Tensor, _: Tensor) -> tuple[Tensor, Tensor, Tensor, None]:
        q, k, v, out, lse = ctx.saved_tensors
        problem: Problem = ctx.problem
        grad = grad if grad.stride(-1) == 1 and 0 not in grad.stride() else grad.contiguous()
        dq, dk, dv = with_emergency_release(
            lambda: _backward(grad, q, k, v, out, lse, problem), problem.buffers, q.device
        )
        return dq, dk, dv, None


def attend(q: Tensor, k: Tensor, v: Tensor, problem: Problem) -> tuple[Tensor, Tensor]:
    """(out, lse) of the problem, with gradients where q, k or v ask for them."""
    result: tuple[Tensor, Tensor] = Attend.apply(q, k, v, problem)  # type: ignore[no-untyped-call]
    return result


def _forward(q: Tensor, k: Tensor, v: Tensor, problem: Problem) -> tuple[Tensor, Tensor]:
    if problem.whole:
        heads_first = (x.transpose(1, 2) for x in (q, k, v))
        out, lse = kernels.forward(*heads_first, scale=problem.scale, causal=problem.shape.causal)
        return out.transpose(1, 2), lse.transpose(1, 2)
    out = (torch.empty if problem.covers else torch.zeros)(q.shape, dtype=q.dtype, device=q.device)
    lse = torch.full(q.shape[:3], -torch.inf, dtype=kernels.lse_dtype(q.dtype), device=q.device)
    with problem.scratch(q.device) as scratch:
        for b in range(q.shape[0]):
            item = (q[b], k[b], v[b], out[b], lse[b])
            for tile in problem.tiles(b):
                _forward_tile(tile, *item, problem, scratch)
    return out, lse


def _forward_tile(
    tile: Tile, q: Tensor, k: Tensor, v: Tensor, out: Tensor, lse: Tensor, problem: Problem, scratch: Scratch
) -> None:
    """Fills out [S, H, D] and lse [S, H] for the tile's tokens."""
    total, origin = _accumulator(tile, out, scratch) if tile.merge else (out, 0)
    for call in tile.calls:
        keys = fetch(call.keys, k, v, scratch)
        for span in call.queries:
            part, part_lse = kernels.forward(
                view(span, q), keys.k, keys.v, scale=problem.scale, **_mask(call, span, keys, q, problem)
            )
            target, target_lse = view(span, total, origin), rows(span, lse)
            if tile.merge and not call.first:
                _merge(target, target_lse, part, part_lse)
            else:
                target.copy_(part)
                target_lse.copy_(part_lse)
    if total is not out:
        out[tile.start : tile.stop].copy_(total)


def _accumulator(tile: Tile, like: Tensor, scratch: Scratch) -> tuple[Tensor, int]:
    """Zeros for the tile's tokens in accumulation precision, and the token they begin at."""
    dtype = kernels.lse_dtype(like.dtype)
    if dtype == like.dtype:
        like[tile.start : tile.stop] = 0
        return like, 0
    total = scratch.get("total", (tile.stop - tile.start, *like.shape[1:]), dtype)
    return total.zero_(), tile.start


def _merge(total: Tensor, total_lse: Tensor, part: Tensor, part_lse: Tensor) -> None:
    """total <- the attention over both sets of keys, in place; all [N, H, T(, D)]."""
    lse = torch.logaddexp(total_lse, part_lse)
    total.mul_((total_lse - lse).exp_()[..., None])
    total.addcmul_(part, (part_lse - lse).exp_()[..., None])
    total_lse.copy_(lse)


def _mask(
    call: Call, span: Span, keys: Fetched, q: Tensor, problem: Problem, begin: int = 0
) -> dict[str, Any]:
    """The kernel's `causal` and `bias` for a call from its key `begin` on."""
    if call.mask in ("none", "causal"):
        return {"causal": call.mask == "causal"}
    return {"bias": mask_bias(call, span, keys, q, problem.buffers.masks, begin)}


def _backward(
    grad: Tensor, q: Tensor, k: Tensor, v: Tensor, out: Tensor, lse: Tensor, problem: Problem
) -> tuple[Tensor, Tensor, Tensor]:
    shape = problem.shape
    by_products = shape.packs and shape.head_dim >= product.EXTRA
    # A CPU's fused backward gets single precision instead of 16 bits.
    widens = (shape.packs or shape.widens) and not by_products
    if problem.whole and not (by_products or widens):
        heads_first = (x.transpose(1, 2) for x in (grad, q, k, v, out, lse))
        grads = kernels.backward(*heads_first, scale=problem.scale, causal=shape.causal)
        dq, dk, dv = (x.transpose(1, 2) for x in grads)
        return dq, dk, dv
    dq = (torch.empty if problem.covers else torch.zeros)(q.shape, dtype=q.dtype, device=q.device)
    dk, dv = (torch.zeros(x.shape, dtype=x.dtype, device=x.device) for x in (k, v))
    part_gradients = _by_products if by_products else _by_kernel
    wide = kernels.lse_dtype(q.dtype) if widens else q.dtype
    with problem.scratch(q.device) as scratch:
        for b in range(q.shape[0]):
            dk_sum, dv_sum = _sums("dk sums", dk[b], scratch), _sums("dv sums", dv[b], scratch)
            item = (grad[b], q[b], k[b], v[b], out[b], lse[b], dq[b], dk_sum, dv_sum)
            for tile in problem.tiles(b):
                _backward_tile(tile, *item, problem, scratch, part_gradients, wide)
            if dk_sum.dtype != dk.dtype:
                dk[b].copy_(dk_sum)
                dv[b].copy_(dv_sum)
    return dq, dk, dv


def _sums(name: str, final: Tensor, scratch: Scratch) -> Tensor:
    """Where the tiles' shares of dk or dv [S, G, D] are summed: in single precision where that fits
    SUM_BYTES, else in the final tensor, with one rounding a tile that shares the keys."""
    wide = kernels.lse_dtype(final.dtype)
    if wide == final.dtype or final.numel() * wide.itemsize > SUM_BYTES:
        return final
    return scratch.get(name, final.shape, wide).zero_()


def _backward_tile(
    tile: Tile, grad: Tensor, q: Tensor, k: Tensor, v: Tensor, out: Tensor, lse: Tensor,
    dq: Tensor, dk: Tensor, dv: Tensor, problem: Problem, scratch: Scratch,
    part_gradients: Callable[..., None], wide: torch.dtype,
) -> None:  # fmt: skip
    """Fills dq for the tile's tokens and adds to dk and dv what those queries contribute."""
    total, origin = _accumulator(tile, dq, scratch)
    for call in tile.calls:
        for begin, part in call.columns(problem.shape):
            keys = fetch(part, k, v, scratch)
            sink: Sink
            if isinstance(part, Gather):
                sink = GatherSink(part, dk, dv, scratch)
            else:
                sink = SpanSink(part, dk, dv, scratch)
                if wide != k.dtype and part.overlaps:
                    wide_k = widened(part, k, wide, "wide k", scratch)
                    keys = Fetched(wide_k, widened(part, v, wide, "wide v", scratch), None)
            for span in call.queries:
                target = view(span, total, origin)
                args = (call, begin, part, span, keys, sink, target, grad, q, out, lse, problem, scratch)
                part_gradients(*args)
            sink.finish()
    if total is not dq:
        dq[tile.start : tile.stop].copy_(total)


def _by_kernel(
    call: Call, begin: int, part: Span | Gather, span: Span, keys: Fetched, sink: Sink, target: Tensor,
    grad: Tensor, q: Tensor, out: Tensor, lse: Tensor, problem: Problem, scratch: Scratch,
) -> None:  # fmt: skip
    """Gradients of one part of a call's keys by the fused backward, in pieces: in single precision on a
    CPU, whose 16-bit backward takes 15 to 20 times its forward without a matrix unit (docs/speed.md)."""
    wide = target.dtype if q.device.type == "cpu" else q.dtype

    def in_wide(name: str, x: Tensor) -> Tensor:
        return x if x.dtype == wide else scratch.get(name, x.shape, wide).copy_(x)

    lse_rows = rows(span, lse)
    mask = _mask(call, span, keys, q, problem, begin)
    bias = mask.get("bias")
    if bias is not None:
        bias = bias.to(wide).expand(*lse_rows.shape, part.length)
    views, width = _piece(call, span, part, wide.itemsize, problem.shape)
    for n in _slices(span.batch, views):
        args = [in_wide(name, view(span, x)[n]) for name, x in (("do", grad), ("q", q), ("out", out))]
        for c in _slices(part.length, width):
            dq, dk, dv = kernels.backward(
                args[0], args[1], in_wide("piece k", keys.k[n, :, c]), in_wide("piece v", keys.v[n, :, c]),
                args[2], lse_rows[n], scale=problem.scale, causal=mask.get("causal", False),
                bias=None if bias is None else bias[n, ..., c],
            )  # fmt: skip
            target[n].add_(dq)
            sink.add(Part(n, slice(None), c, dk, dv))


def _piece(call: Call, span: Span, part: Span | Gather, itemsize: int, shape: Shape) -> tuple[int, int]:
    """(views, keys) of a call that the kernel is given at once: dk and dv stay in the cache. A
    kernel's own causal mask ties queries to keys, so those are not cut."""
    limit = 4 * shape.fast // (2 * span.heads * shape.head_dim * itemsize)
    if call.mask == "causal" or part.length <= limit:
        return max(limit // part.length, 1), part.length
    cuts = -(-part.length // max(limit, 1))
    return 1, -(-part.length // (cuts * part.unit)) * part.unit


def _slices(total: int, size: int) -> Iterator[slice]:
    for start in range(0, total, size):
        yield slice(start, min(start + size, total))


def _by_products(
    call: Call, begin: int, part: Span | Gather, span: Span, keys: Fetched, sink: Sink, target: Tensor,
    grad: Tensor, q: Tensor, out: Tensor, lse: Tensor, problem: Problem, scratch: Scratch,
) -> None:  # fmt: skip
    """Gradients of one part of a call's keys by batched matrix products (a CPU with a matrix unit)."""
    grad_rows = view(span, grad)
    delta = (grad_rows.float() * view(span, out)).sum(-1)
    diagonal = call.edge - begin if call.mask in ("causal", "diagonal") else None
    bias = keys.hidden * product.HIDDEN if call.mask == "tail" and keys.hidden is not None else None
    parts = product.backward(
        grad_rows, view(span, q), keys.k, keys.v, rows(span, lse), delta,
        scale=problem.scale, diagonal=diagonal, bias=bias, unit=part.unit, dq=target, scratch=scratch,
    )  # fmt: skip
    for gradients in parts:
        sink.add(gradients)
