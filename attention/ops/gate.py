"""The straight-through gate of an adaptive attention: `out` as it is, with a gradient for the scores of the
blocks that were chosen."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

import torch
from torch import Tensor

from attention.ops.backward import Gradients, once
from attention.ops.kernels import lse_dtype
from attention.ops.scratch import Scratch
from attention.pool import Buffers
from attention.sizes.adaptive import gate_part, gate_sizes, gate_tokens
from attention.sizes.shape import Shape


class Gating(NamedTuple):
    """Sizes and settings of the attention that a gate needs besides its tensors."""

    shape: Shape
    size: int
    """Tokens a block."""
    scale: float
    buffers: Buffers


class ScoreGate(torch.autograd.Function):
    """`out` [B, S, H, D] as it is; backward gives a chosen block's score the gradient of a bias on its
    logits: the sum over the block of dS = P (do v^T - delta). `scores`, `blocks`: [B, H, rows, kept]."""

    @staticmethod
    def forward(
        ctx: Any,
        out: Tensor,
        scores: Tensor,
        q: Tensor,
        k: Tensor,
        v: Tensor,
        lse: Tensor,
        blocks: Tensor,
        gating: Gating,
    ) -> Tensor:
        ctx.save_for_backward(out, q, k, v, lse, blocks)
        ctx.gating, ctx.buffers, ctx.dtype = gating, gating.buffers, scores.dtype
        return out.view_as(out)

    @staticmethod
    @once
    def backward(ctx: Any, saved: Sequence[Tensor], grad: Tensor) -> Gradients:
        out, q, k, v, lse, blocks = saved
        of_scores = torch.zeros(blocks.shape, dtype=ctx.dtype, device=q.device)
        shape, size, scale, _ = ctx.gating
        with Scratch(Buffers.OFF, q.device, gate_sizes(shape, size)) as scratch:
            work = _Work(shape, size, scale, scratch)
            together = gate_part(shape, size).heads
            for b in range(q.shape[0]):
                for h in range(0, q.shape[2], together):
                    some = slice(h, h + together)
                    heads = _Heads(
                        grad[b, :, some],
                        out[b, :, some],
                        q[b, :, some],
                        k[b],
                        v[b],
                        lse[b, :, some],
                        blocks[b, some],
                        work.kv_heads(h),
                    )
                    work.add(heads, of_scores[b, some])
        return grad, of_scores, *[None] * 6


class _Heads(NamedTuple):
    """Some query heads: lse [S, heads], blocks [heads, rows, kept] and all others [S, heads, D]; `grad` is of
    out; k and v [S, G, D] are of all kv heads."""

    grad: Tensor
    out: Tensor
    q: Tensor
    k: Tensor
    v: Tensor
    lse: Tensor
    blocks: Tensor
    kv_heads: Tensor | int
    """[heads, 1], those that they read; or the one of one head."""


@dataclass(frozen=True, slots=True)
class _Work:
    """Some heads at a time in the buffers of a scratch. The CPU's operators would copy operands of mixed
    types, so those are converted into buffers first. Rows come before heads, so that the first rows can be
    left out of all."""

    shape: Shape
    size: int
    scale: float
    scratch: Scratch

    def add(self, heads: _Heads, of_scores: Tensor) -> None:
        """Fills `of_scores` [heads, rows, kept], the gradient of the scores of the heads' blocks."""
        grad, out, q, k, v, lse, blocks, kv_heads = heads
        for first, last in self._rows(blocks.shape[1]):
            queries = self._load("q", q, first, last).mul_(self.scale)
            do = self._load("grad", grad, first, last)
            log_sum = self._load("lse", lse[..., None], first, last, torch.inf)
            delta = self._get("delta", log_sum.shape, log_sum.dtype)
            product = self._load("keys", out, first, last).mul_(do)
            torch.sum(product, -1, keepdim=True, out=delta)
            visible = self._last_visible(first, last)
            for column in range(blocks.shape[2]):
                # Causal rows before this one have no such column.
                skip = max(column - first, 0) if self.shape.causal else 0
                if skip >= last - first:
                    break
                keys = self._positions(blocks[:, first + skip : last, column].t())
                hidden = self._get("hidden", (*keys.shape, keys.shape[2]), torch.bool)
                torch.gt(keys[:, :, None], visible[skip:, None, :, None], out=hidden)
                keys.clamp_max_(self.shape.seq - 1).mul_(k.shape[1]).add_(kv_heads)
                weights = self._product("weights", queries[skip:], k, keys)
                weights.sub_(log_sum[skip:]).exp_()
                scores = self._product("scores", do[skip:], v, keys).sub_(delta[skip:]).mul_(weights)
                scores.masked_fill_(hidden, 0.0)  # after the product: what is hidden may be NaN
                sums = torch.sum(scores, (2, 3), out=self._get("sums", keys.shape[:2], scores.dtype))
                of_scores[:, first + skip : last, column].copy_(sums.t())

    def kv_heads(self, first: int) -> Tensor | int:
        """The kv heads that heads from `first` on read, as many as are taken together."""
        shape, together = self.shape, gate_part(self.shape, self.size).heads
        repeat = shape.heads // shape.kv_heads
        if together == 1:
            return first // repeat
        stop = min(first + together, shape.heads)
        heads = self._get("kv heads", (stop - first,), torch.int64)
        return torch.arange(first, stop, out=heads).floor_divide_(repeat)[:, None]

    def _rows(self, blocks: int) -> Iterator[tuple[int, int]]:
        step = gate_part(self.shape, self.size).rows
        for first in range(0, blocks, step):
            yield first, min(first + step, blocks)

    def _get(self, name: str, shape: tuple[int, ...], dtype: torch.dtype) -> Tensor:
        return self.scratch.get(name, shape, dtype)

    def _load(self, name: str, x: Tensor, first: int, last: int, fill: float = 0.0) -> Tensor:
        """Rows first..last of x [S, heads, D] as [rows, heads, tokens, D] in single precision or better."""
        tokens, (heads, dim) = gate_tokens(self.shape, self.size), x.shape[1:]
        loaded = self._get(name, (last - first, heads, tokens, dim), lse_dtype(x.dtype))
        there = x[first * self.size : last * self.size]
        whole, rest = len(there) // tokens, len(there) % tokens
        by_rows = there[: whole * tokens].unflatten(0, (whole, tokens)) if whole else there[:0, None]
        loaded[:whole].copy_(by_rows.transpose(1, 2))
        if rest:
            loaded[whole, :, :rest].copy_(there[whole * tokens :].transpose(0, 1))
            loaded[whole, :, rest:].fill_(fill)
        return loaded

    def _last_visible(self, first: int, last: int) -> Tensor:
        """[rows, tokens]: the last key that each query sees."""
        tokens = gate_tokens(self.shape, self.size)
        visible = self._get("last", (last - first, tokens), torch.int64)
        if not self.shape.causal:
            return visible.fill_(self.shape.seq - 1)
        torch.arange(first * self.size, first * self.size + visible.numel(), out=visible.view(-1))
        return visible.clamp_max_(self.shape.seq - 1)

    def _positions(self, blocks: Tensor) -> Tensor:
        """[rows, heads, tokens] of a block for each; some may lie past the end."""
        tokens = gate_tokens(self.shape, self.size)
        place = self._get("place", (tokens,), torch.int64)
        torch.arange(tokens, out=place)
        positions = self._get("position", (*blocks.shape, tokens), torch.int64)
        return positions.copy_(place).add_(blocks[..., None], alpha=self.size)

    def _product(self, name: str, rows: Tensor, x: Tensor, keys: Tensor) -> Tensor:
        """rows [rows, heads, tokens, D] times x [S, G, D] at the keys [rows, heads, tokens], which count kv
        heads and tokens: [rows, heads, tokens, tokens]."""
        gathered = self._get("keys", rows.shape, rows.dtype)
        narrow = gathered if x.dtype == gathered.dtype else self._get("row", gathered.shape, x.dtype)
        dim = x.shape[2]
        torch.index_select(x.view(-1, dim), 0, keys.view(-1), out=narrow.view(-1, dim))
        if narrow is not gathered:
            gathered.copy_(narrow)
        product = self._get(name, (*keys.shape, keys.shape[2]), rows.dtype)
        flat, transposed = rows.flatten(0, 1), gathered.flatten(0, 1).transpose(1, 2)
        torch.bmm(flat, transposed, out=product.flatten(0, 1))
        return product
