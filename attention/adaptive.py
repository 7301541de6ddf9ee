"""Adaptive attention: a learned scorer chooses the blocks of each head and query block.

Blocks of q and k are summarised by their means; head h scores key block j for query block i as
(mean q_i W_q) . (mean k_j W_k) / sqrt(E) and keeps the best, its own block always among them. What
is computed is then exact attention over the chosen blocks.

Choosing has no gradient, so the scorer learns in two ways. Through the task's loss: a chosen block's
score receives the gradient that an additive bias on that block's logits would get (a straight-through
estimate; the forward value is untouched). And through `scorer_loss`, which teaches it where dense
attention puts its mass, chosen or not.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Iterable, Iterator
from typing import Any

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor, nn

from attention.block_sparse import gather_tiles
from attention.config import AttentionConfig
from attention.inputs import check, shape_of
from attention.layout import row_budget
from attention.module import Attention
from attention.ops import flex
from attention.ops.execute import Problem, attend
from attention.ops.kernels import lse_dtype
from attention.ops.program import Shape, Tile
from attention.ops.reserve import sparse_extent
from attention.ops.weights import AttentionWeights, attention_weights, check_room
from attention.rows import Rows, chosen_rows


class AdaptiveAttention(Attention):
    """Attention over blocks chosen from q and k. See `Attention` for the call."""

    def __init__(self, config: AttentionConfig) -> None:
        super().__init__(config)
        assert config.adaptive is not None
        assert config.pattern is not None
        heads, dim = config.adaptive.num_heads, config.adaptive.head_dim
        score_dim = config.adaptive.score_dim or dim
        self.block_size = config.pattern.block_size
        # Equal projections to begin with: an untrained scorer compares the block means themselves.
        start = torch.stack([_orthogonal(dim, score_dim) for _ in range(heads)])
        self.query_weight = nn.Parameter(start)
        self.key_weight = nn.Parameter(start.clone())

    def forward(
        self, q: Tensor, k: Tensor, v: Tensor, is_causal: bool = False, return_attention_weights: bool = False
    ) -> Tensor | tuple[Tensor, AttentionWeights]:
        check(q, k, v, self.config)
        flex.resolve(self.config, q)
        q, k, v = (x.contiguous() for x in (q, k, v))
        shape = shape_of(q, k, self.config, is_causal)
        if return_attention_weights:
            check_room(self.config, shape, q, kept=self._blocks(shape) * row_budget(self.config, shape.seq))
        blocks = self.select(q, k, is_causal)
        learns = torch.is_grad_enabled() and self.query_weight.requires_grad
        needs_lse = learns or return_attention_weights
        out, lse = attend(q, k, v, self._problem_over(shape, blocks), keeps_lse=needs_lse)
        if learns:
            scores = self._chosen_scores(q.detach(), k.detach(), blocks)
            out = _Gate.apply(
                out, scores, q, k, v, lse, blocks, self.block_size, self._scale(shape), is_causal
            )  # type: ignore[no-untyped-call]
        if not return_attention_weights:
            return out
        assert lse is not None
        pairs = _pairs(blocks)
        return out, attention_weights(
            q.detach(), k.detach(), lse, pairs, self.config, shape, self._scale(shape)
        )

    def over(self, q: Tensor, k: Tensor, v: Tensor, blocks: Tensor, is_causal: bool = False) -> Tensor:
        """Attention over blocks chosen before, as `select` gives them."""
        check(q, k, v, self.config)
        q, k, v = (x.contiguous() for x in (q, k, v))
        return attend(q, k, v, self._problem_over(shape_of(q, k, self.config, is_causal), blocks))[0]

    @torch.no_grad()
    def select(self, q: Tensor, k: Tensor, is_causal: bool = False) -> Tensor:
        """Chosen key blocks, int64 [B, H, blocks, kept], ascending, then -1 where there are fewer."""
        check(q, k, k, self.config)
        shape = shape_of(q, k, self.config, is_causal)
        blocks, kept = self._blocks(shape), min(row_budget(self.config, shape.seq), self._blocks(shape))
        queries, keys = self._projected(q, k)
        index = torch.arange(blocks, device=q.device)
        chosen = torch.empty(*queries.shape[:2], blocks, kept, dtype=torch.int64, device=q.device)
        for rows in self._row_chunks(shape, q.shape[0]):
            scores = queries[:, :, rows] @ keys.transpose(-1, -2)
            own = index[rows, None] == index
            scores.masked_fill_(own, torch.inf)
            if is_causal:
                scores.masked_fill_(index > index[rows, None], -torch.inf)
            best, picked = scores.topk(kept, dim=-1)
            picked = picked.masked_fill_(best == -torch.inf, blocks).sort(dim=-1).values
            chosen[:, :, rows] = picked.masked_fill_(picked == blocks, -1)
        return chosen

    def scorer_loss(self, q: Tensor, k: Tensor, is_causal: bool = False) -> Tensor:
        """Cross-entropy between the scorer's distribution over key blocks and dense attention's mass.

        The target is computed row chunk by row chunk and carries no gradient; what is kept for the
        scorer's gradient is of size blocks x blocks, so train at lengths where that is little.
        """
        check(q, k, k, self.config)
        shape = shape_of(q, k, self.config, is_causal)
        queries, keys = self._projected(q.detach(), k.detach())
        index = torch.arange(self._blocks(shape), device=q.device)
        total = queries.new_zeros(())
        for rows in self._row_chunks(shape, q.shape[0] * self.block_size**2):
            scores = queries[:, :, rows] @ keys.transpose(-1, -2)
            if is_causal:
                scores = scores.masked_fill(index > index[rows, None], -torch.inf)
            target = self._block_mass(q.detach(), k.detach(), rows, shape)
            total = total - (target * scores.log_softmax(-1).clamp_min(-1e4)).sum()
        return total / (q.shape[0] * shape.heads * self._blocks(shape))

    def _blocks(self, shape: Shape) -> int:
        return -(-shape.seq // self.block_size)

    def _row_chunks(self, shape: Shape, copies: int) -> Iterator[slice]:
        """Slices of query blocks whose scores against all key blocks fit the workspace."""
        blocks = self._blocks(shape)
        step = max(shape.workspace // (16 * copies * shape.heads * blocks), 1)
        for begin in range(0, blocks, step):
            yield slice(begin, min(begin + step, blocks))

    def _projected(self, q: Tensor, k: Tensor) -> tuple[Tensor, Tensor]:
        """Block means of q and k in score channels, [B, H, blocks, E], in single precision or better."""
        repeat = q.shape[2] // k.shape[2]
        wide = torch.promote_types(self.query_weight.dtype, lse_dtype(q.dtype))
        queries = self._means(q, wide).transpose(1, 2) @ self.query_weight.to(wide)
        key_means = self._means(k, wide).repeat_interleave(repeat, dim=2)
        keys = key_means.transpose(1, 2) @ self.key_weight.to(wide)
        return queries / math.sqrt(queries.shape[-1]), keys

    def _means(self, x: Tensor, dtype: torch.dtype) -> Tensor:
        """[B, blocks, heads, D] means of blocks; the last block's over the tokens it has."""
        size = self.block_size
        full = x.shape[1] // size
        means: Tensor = x[:, : full * size].unflatten(1, (full, size)).mean(dim=2, dtype=dtype)
        if x.shape[1] % size:
            means = torch.cat([means, x[:, full * size :].mean(dim=1, keepdim=True, dtype=dtype)], dim=1)
        return means

    def _chosen_scores(self, q: Tensor, k: Tensor, blocks: Tensor) -> Tensor:
        """Differentiable scores of the chosen blocks, [B, H, blocks, kept]."""
        queries, keys = self._projected(q, k)
        wanted = blocks.clamp_min(0).flatten(2)[..., None].expand(-1, -1, -1, keys.shape[-1])
        found: Tensor = keys.gather(2, wanted).unflatten(2, blocks.shape[2:])
        return (queries[:, :, :, None] * found).sum(-1)

    @torch.no_grad()
    def _block_mass(self, q: Tensor, k: Tensor, rows: slice, shape: Shape) -> Tensor:
        """Mean softmax mass that the queries of each block in `rows` put on each key block, under
        dense attention: [B, H, rows, blocks]."""
        size, wide = self.block_size, lse_dtype(q.dtype)
        first, last = rows.start * size, min(rows.stop * size, shape.seq)
        queries = q[:, first:last].transpose(1, 2).to(wide)
        keys = k.repeat_interleave(shape.heads // shape.kv_heads, dim=2).transpose(1, 2).to(wide)
        scores = (queries @ keys.transpose(-1, -2)).mul_(self._scale(shape))
        if shape.causal:
            positions = torch.arange(shape.seq, device=q.device)
            scores.masked_fill_(positions > positions[first:last, None], -torch.inf)
        weights = scores.softmax(-1)
        # Rows and columns past the end count for nothing; the last block's mean is over its tokens.
        padding = (0, -shape.seq % size, 0, -(last - first) % size)
        tiles = nn.functional.pad(weights, padding).unflatten(-1, (-1, size)).unflatten(-3, (-1, size))
        mass: Tensor = tiles.sum(dim=(-3, -1))
        total: Tensor = mass.sum(-1, keepdim=True)
        return mass / total

    def _problem_over(self, shape: Shape, blocks: Tensor) -> Problem:
        lists = blocks.cpu().numpy()

        rows = chosen_rows(self.block_size, lists.shape[-1])

        def program(batch: int, shape: Shape) -> Iterable[Tile]:
            return _tiles(lists[batch], rows, shape)

        return Problem(
            shape=shape,
            tiles=program,
            extent=lambda shape: sparse_extent(rows, shape),
            scale=self._scale(shape),
            covers=True,
            whole=False,
            buffers=self.scratch,
        )


def _tiles(lists: npt.NDArray[np.int64], widest: Rows, shape: Shape) -> Iterator[Tile]:
    """Tiles of one batch item from [H, blocks, kept] lists: rows of equal count together, and the
    last row, whose queries may be fewer, by itself."""
    rows = lists.transpose(1, 0, 2)
    counts = (rows[:, 0] >= 0).sum(axis=-1)
    alone = np.arange(len(rows)) == len(rows) - 1
    breaks = np.flatnonzero((np.diff(counts) != 0) | alone[1:]) + 1
    for first, last in itertools.pairwise([0, *breaks.tolist(), len(rows)]):
        yield from gather_tiles(rows[first:last, :, : counts[first]], first, widest, shape)


def _orthogonal(rows: int, columns: int) -> Tensor:
    """A matrix with orthonormal rows or columns, whichever is possible, scaled to keep lengths."""
    return nn.init.orthogonal_(torch.empty(rows, columns)) * math.sqrt(max(rows / columns, 1.0))


def _pairs(blocks: Tensor) -> Tensor:
    """Index pairs [B, H, n, 2] of chosen blocks. Rows with fewer than the most repeat nothing: all
    heads have equally many, so the -1 fall away together."""
    query = torch.arange(blocks.shape[2], device=blocks.device)[:, None].expand_as(blocks)
    there = blocks[0, 0] >= 0
    return torch.stack([query[..., there], blocks[..., there]], dim=-1)


class _Gate(torch.autograd.Function):
    """`out` as it is; backward gives a chosen block's score the gradient of a bias on its logits:
    the sum over the block of dS = P (do v^T - delta)."""

    @staticmethod
    def forward(
        ctx: Any, out: Tensor, scores: Tensor, q: Tensor, k: Tensor, v: Tensor, lse: Tensor,
        blocks: Tensor, size: int, scale: float, causal: bool,
    ) -> Tensor:  # fmt: skip
        ctx.save_for_backward(out, q, k, v, lse, blocks)
        ctx.size, ctx.scale, ctx.causal = size, scale, causal
        return out.view_as(out)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        out, q, k, v, lse, blocks = ctx.saved_tensors
        bias = torch.stack(
            [
                torch.stack([
                    _bias_gradient(grad[b, :, h], out[b, :, h], q[b, :, h], k[b, :, g], v[b, :, g],
                                   lse[b, :, h], blocks[b, h], ctx.size, ctx.scale, ctx.causal)
                    for h in range(q.shape[2])
                    for g in [h * k.shape[2] // q.shape[2]]
                ])
                for b in range(q.shape[0])
            ]
        )  # fmt: skip
        return grad, bias, None, None, None, None, None, None, None, None


def _bias_gradient(
    grad: Tensor, out: Tensor, q: Tensor, k: Tensor, v: Tensor, lse: Tensor, blocks: Tensor,
    size: int, scale: float, causal: bool,
) -> Tensor:  # fmt: skip
    """[blocks, kept] of one head: all others [S, D], lse [S]. One column of chosen blocks at a time."""
    seq = q.shape[0]
    room = blocks.shape[0] * size
    wide = lse_dtype(q.dtype)

    def rows(x: Tensor, fill: float = 0.0) -> Tensor:
        return nn.functional.pad(x.to(wide).reshape(seq, -1), (0, 0, 0, room - seq), value=fill).view(
            -1, size, x[0].numel()
        )

    q_, k_, v_, do = (rows(x) for x in (q * scale, k, v, grad))
    delta = rows((grad.to(wide) * out).sum(-1))
    log_sum = rows(lse, torch.inf)
    token = torch.arange(size, device=q.device)
    query = (torch.arange(blocks.shape[0], device=q.device) * size)[:, None, None] + token[:, None]
    columns = []
    for chosen in blocks.unbind(-1):
        key = chosen.clamp_min(0)
        position = (key * size)[:, None, None] + token
        weights = (q_ @ k_[key].transpose(1, 2) - log_sum).exp_()
        hidden = (position >= seq) | (chosen < 0)[:, None, None]
        if causal:
            hidden = hidden | (position > query)
        scores = weights.masked_fill_(hidden, 0.0) * (do @ v_[key].transpose(1, 2) - delta)
        columns.append(scores.sum(dim=(1, 2)))
    return torch.stack(columns, dim=-1)
