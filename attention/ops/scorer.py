"""The scorer of an adaptive attention: block means, their projections, the choice, and what the projections
learn from a gradient of the chosen scores. One batch item at a time, in the buffers of one scratch."""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from attention.ops.backward import Gradients, once
from attention.ops.kernels import lse_dtype
from attention.ops.scratch import Scratch
from attention.pool import Buffers
from attention.sizes.adaptive import Scorer, choosing_sizes, learning_sizes
from attention.sizes.shape import Shape


def scoring_dtype(weight: Tensor, q: Tensor) -> torch.dtype:
    """The type of all sums: single precision or better."""
    return torch.promote_types(weight.dtype, lse_dtype(q.dtype))


@dataclass(frozen=True, slots=True)
class Scoring:
    """A batch item's scores, in the buffers of a scratch that holds `choosing_sizes` or `learning_sizes`."""

    shape: Shape
    sizes: Scorer
    dtype: torch.dtype
    scratch: Scratch

    @property
    def blocks(self) -> int:
        return self.sizes.blocks(self.shape)

    def get(self, name: str, shape: tuple[int, ...], dtype: torch.dtype | None = None) -> Tensor:
        return self.scratch.get(name, shape, dtype or self.dtype)

    def means(self, x: Tensor, out: Tensor) -> Tensor:
        """Fills out [n, H, D] with the means of blocks of x [S, G, D] as each of H heads sees them; the last
        block's is over the tokens that it has."""
        size, step = self.sizes.size, self.sizes.mean_tokens(self.shape)
        by_group = out.unflatten(1, (x.shape[1], -1))
        for begin in range(0, len(x), step):
            tokens = x[begin : begin + step]
            if x.dtype != out.dtype:
                tokens = self.get("tokens", tuple(tokens.shape)).copy_(tokens)
            first, full = begin // size, len(tokens) // size
            whole, rest = tokens[: full * size], tokens[full * size :]
            if full:
                blocks = whole.unflatten(0, (full, size))
                torch.sum(blocks, 1, out=by_group[first : first + full, :, 0]).div_(size)
            if len(rest):
                torch.sum(rest, 0, out=by_group[first + full, :, 0]).div_(len(rest))
        by_group[:, :, 1:].copy_(by_group[:, :, :1])
        return out

    def project(self, name: str, means: Tensor, weight: Tensor) -> Tensor:
        """[H, n, E], from means [n, H, D] and a weight [H, D, E]."""
        if weight.dtype != self.dtype:
            weight = self.get("weight", tuple(weight.shape)).copy_(weight)
        out = self.get(name, (weight.shape[0], len(means), weight.shape[2]))
        return torch.bmm(means.transpose(0, 1), weight, out=out)

    def projected(
        self, q: Tensor, k: Tensor, query_weight: Tensor, key_weight: Tensor, key_means: str = "means"
    ) -> tuple[Tensor, Tensor]:
        """Queries over sqrt(E), and keys, both [H, n, E]. `key_means`: the buffer in which those are left."""
        means = (self.blocks, *q.shape[1:])
        queries = self.project("queries", self.means(q, self.get("means", means)), query_weight)
        keys = self.project("keys", self.means(k, self.get(key_means, means)), key_weight)
        return queries.div_(math.sqrt(self.sizes.channels)), keys

    def choose(self, queries: Tensor, keys: Tensor, chosen: Tensor) -> None:
        """Fills chosen [H, n, kept]: the blocks of the best scores, ascending, the row's own always among
        them; under `causal` none that comes later, and -1 at the end where there are fewer."""
        heads, blocks, kept = chosen.shape
        place = self.get("place", (blocks,), torch.int64)
        torch.arange(blocks, out=place)
        for rows in _slices(blocks, self.sizes.choosing_rows(self.shape)):
            own = place[rows, None]
            scores = self.get("scores", (heads, len(own), blocks))
            torch.bmm(queries[:, rows], keys.transpose(1, 2), out=scores)
            # NaN is a bad score, and none is as good as the row's own block or as bad as a later one.
            scores.nan_to_num_(torch.finfo(self.dtype).min)
            mask = self.get("mask", (len(own), blocks), torch.bool)
            scores.masked_fill_(torch.eq(own, place, out=mask), torch.inf)
            if self.shape.causal:
                scores.masked_fill_(torch.gt(place, own, out=mask), -torch.inf)
            picks = (heads, len(own), kept)
            best = self.get("best", picks), self.get("picked", picks, torch.int64)
            torch.topk(scores, kept, out=best)
            ascending = self.get("sorted", picks, torch.int64)
            torch.sort(best[1], out=(ascending, self.get("order", picks, torch.int64)))
            if self.shape.causal:  # later blocks are the largest, and so at the end
                none = torch.gt(ascending, own, out=self.get("none", picks, torch.bool))
                ascending.masked_fill_(none, -1)
            chosen[:, rows].copy_(ascending)

    def learn(
        self,
        grad: Tensor,
        blocks: Tensor,
        queries: Tensor,
        keys: Tensor,
        query_gradient: Tensor,
        key_gradient: Tensor,
    ) -> None:
        """Adds to the gradients [H, D, E] of the projections what follows from grad [H, n, kept] of the
        scores of blocks [H, n, kept]; after `projected`, with key means in a buffer of their own."""
        heads, rows_all, kept = blocks.shape
        means = (rows_all, heads, query_gradient.shape[1])
        query_means, key_means = self.get("means", means), self.get("key means", means)
        of_keys = self.get("gradient of keys", tuple(keys.shape)).zero_()
        for rows in _slices(rows_all, self.sizes.learning_rows(self.shape)):
            count = len(query_means[rows])
            index = self.get("index", (heads, count, kept), torch.int64)
            torch.clamp(blocks[:, rows], min=0, out=index)  # where there is none, the gradient is zero
            spread = self.get("gradient of scores", (heads, count, rows_all)).zero_()
            spread.scatter_add_(2, index, grad[:, rows])
            of_queries = self.get("gradient of queries", (heads, count, keys.shape[2]))
            torch.bmm(spread, keys, out=of_queries)
            of_keys.baddbmm_(spread.transpose(1, 2), queries[:, rows])
            query_gradient.baddbmm_(
                query_means[rows].permute(1, 2, 0), of_queries, alpha=1 / math.sqrt(keys.shape[2])
            )
        key_gradient.baddbmm_(key_means.permute(1, 2, 0), of_keys)


class ChosenScores(torch.autograd.Function):
    """A stand-in for the scores of chosen blocks [B, H, n, kept], which nobody reads: it holds a single
    number. Its gradient is theirs, and goes to both weights [H, D, E]."""

    @staticmethod
    def forward(
        ctx: Any,
        query_weight: Tensor,
        key_weight: Tensor,
        q: Tensor,
        k: Tensor,
        blocks: Tensor,
        shape: Shape,
        sizes: Scorer,
        buffers: Buffers,
    ) -> Tensor:
        ctx.save_for_backward(query_weight, key_weight, q, k, blocks)
        ctx.shape, ctx.sizes, ctx.buffers = shape, sizes, buffers
        return q.new_zeros((), dtype=scoring_dtype(query_weight, q)).expand(blocks.shape)

    @staticmethod
    @once
    def backward(ctx: Any, saved: Sequence[Tensor], grad: Tensor) -> Gradients:
        query_weight, key_weight, q, k, blocks = saved
        gradients = [
            torch.zeros(x.shape, dtype=grad.dtype, device=x.device) for x in (query_weight, key_weight)
        ]
        with Scratch(Buffers.OFF, q.device, learning_sizes(ctx.shape, ctx.sizes)) as scratch:
            scoring = Scoring(ctx.shape, ctx.sizes, grad.dtype, scratch)
            for b in range(len(q)):
                # No name for what lies in the scratch: it would outlive it.
                scoring.learn(
                    grad[b],
                    blocks[b],
                    *scoring.projected(q[b], k[b], query_weight, key_weight, "key means"),
                    *gradients,
                )
        of_queries, of_keys = (x.to(query_weight.dtype) for x in gradients)
        return of_queries, of_keys, *[None] * 6


def chosen_blocks(
    q: Tensor, k: Tensor, query_weight: Tensor, key_weight: Tensor, shape: Shape, sizes: Scorer
) -> Tensor:
    """int64 [B, H, n, kept]; see `Scoring.choose`."""
    rows = sizes.blocks(shape)
    chosen = torch.empty(len(q), shape.heads, rows, sizes.kept, dtype=torch.int64, device=q.device)
    with Scratch(Buffers.OFF, q.device, choosing_sizes(shape, sizes)) as scratch:
        scoring = Scoring(shape, sizes, scoring_dtype(query_weight, q), scratch)
        for b in range(len(q)):
            scoring.choose(*scoring.projected(q[b], k[b], query_weight, key_weight), chosen[b])
    return chosen


def _slices(total: int, step: int) -> Iterator[slice]:
    for begin in range(0, total, step):
        yield slice(begin, min(begin + step, total))
