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
from attention.sizes.adaptive import gate_rows, gate_sizes, gate_tokens
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
            for b in range(q.shape[0]):
                for h in range(q.shape[2]):
                    g = h * k.shape[2] // q.shape[2]
                    head = _Head(
                        grad[b, :, h],
                        out[b, :, h],
                        q[b, :, h],
                        k[b, :, g],
                        v[b, :, g],
                        lse[b, :, h],
                        blocks[b, h],
                    )
                    work.head(head, of_scores[b, h])
        return grad, of_scores, *[None] * 6


class _Head(NamedTuple):
    """One query head: lse [S], blocks [rows, kept] and all others [S, D]; `grad` is of out."""

    grad: Tensor
    out: Tensor
    q: Tensor
    k: Tensor
    v: Tensor
    lse: Tensor
    blocks: Tensor


@dataclass(frozen=True, slots=True)
class _Work:
    """One head at a time in the buffers of a scratch. The CPU's operators would copy operands of mixed
    types, so those are converted into buffers first."""

    shape: Shape
    size: int
    scale: float
    scratch: Scratch

    def head(self, head: _Head, of_scores: Tensor) -> None:
        """Fills `of_scores` [rows, kept], the gradient of the scores of the head's blocks."""
        grad, out, q, k, v, lse, blocks = head
        for first, last in self._rows(len(blocks)):
            queries = self._load("q", q, first, last).mul_(self.scale)
            do = self._load("grad", grad, first, last)
            log_sum = self._load("lse", lse[:, None], first, last, torch.inf)
            delta = self._get("delta", log_sum.shape, log_sum.dtype)
            product = self._load("keys", out, first, last).mul_(do)
            torch.sum(product, -1, keepdim=True, out=delta)
            visible = self._last_visible(first, last)
            for column in range(blocks.shape[1]):
                # Causal rows before this one have no such column.
                skip = max(column - first, 0) if self.shape.causal else 0
                if skip >= last - first:
                    break
                keys = self._positions(blocks[first + skip : last, column])
                hidden = self._get("hidden", (*keys.shape, keys.shape[1]), torch.bool)
                torch.gt(keys[:, None], visible[skip:, :, None], out=hidden)
                keys.clamp_max_(self.shape.seq - 1)
                weights = self._product("weights", queries[skip:], k, keys)
                weights.sub_(log_sum[skip:]).exp_()
                scores = self._product("scores", do[skip:], v, keys).sub_(delta[skip:]).mul_(weights)
                scores.masked_fill_(hidden, 0.0)  # after the product: what is hidden may be NaN
                sums = torch.sum(scores, (1, 2), out=self._get("sums", (len(keys),), scores.dtype))
                of_scores[first + skip : last, column].copy_(sums)

    def _rows(self, blocks: int) -> Iterator[tuple[int, int]]:
        step = gate_rows(self.shape, self.size)
        for first in range(0, blocks, step):
            yield first, min(first + step, blocks)

    def _get(self, name: str, shape: tuple[int, ...], dtype: torch.dtype) -> Tensor:
        return self.scratch.get(name, shape, dtype)

    def _load(self, name: str, x: Tensor, first: int, last: int, fill: float = 0.0) -> Tensor:
        """Rows first..last of x [S, D] as [rows, tokens, D] in single precision or better."""
        tokens = gate_tokens(self.shape, self.size)
        loaded = self._get(name, (last - first, tokens, x.shape[1]), lse_dtype(x.dtype))
        there = x[first * self.size : last * self.size]
        flat = loaded.view(-1, x.shape[1])
        flat[: len(there)].copy_(there)
        flat[len(there) :].fill_(fill)
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
        """[rows, tokens] of a block a row; some may lie past the end."""
        tokens = gate_tokens(self.shape, self.size)
        place = self._get("place", (tokens,), torch.int64)
        torch.arange(tokens, out=place)
        positions = self._get("position", (len(blocks), tokens), torch.int64)
        return positions.copy_(place).add_(blocks[:, None], alpha=self.size)

    def _product(self, name: str, rows: Tensor, x: Tensor, keys: Tensor) -> Tensor:
        """rows [rows, tokens, D] times x [S, D] at the keys [rows, tokens]: [rows, tokens, tokens]."""
        gathered = self._get("keys", rows.shape, rows.dtype)
        narrow = gathered if x.dtype == gathered.dtype else self._get("row", gathered.shape, x.dtype)
        torch.index_select(x, 0, keys.view(-1), out=narrow.view(-1, x.shape[1]))
        if narrow is not gathered:
            gathered.copy_(narrow)
        product = self._get(name, (*keys.shape, keys.shape[1]), rows.dtype)
        return torch.bmm(rows, gathered.transpose(1, 2), out=product)
