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

import math
from collections.abc import Iterable, Iterator
from functools import partial

import torch
from torch import Tensor, nn

from attention.block_sparse import chosen_tiles
from attention.config import AttentionConfig
from attention.decided import Decided
from attention.documents import Lengths
from attention.inputs import check, shape_of
from attention.layout import row_budget
from attention.module import Attention, eager
from attention.ops.execute import Problem, Reserves, attend
from attention.ops.gate import Gating, ScoreGate
from attention.ops.kernels import lse_dtype
from attention.ops.list_calls import chosen_lists
from attention.ops.program import Tile
from attention.ops.scorer import ChosenScores, Scoring, chosen_blocks, scoring_dtype
from attention.ops.scratch import Scratch
from attention.ops.weights import AttentionWeights, attention_weights, check_room, chosen_pairs
from attention.out_of_memory import with_emergency_release
from attention.pool import Buffers
from attention.sizes.adaptive import Scorer, active_of_choice, choosing_sizes
from attention.sizes.list_calls import calls_of_rows
from attention.sizes.row_bounds import chosen_rows
from attention.sizes.shape import Shape
from attention.sizes.tiles import sparse_extent


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

    def _problem(self, shape: Shape, lengths: Lengths | None = None) -> tuple[None, None]:
        return None, None

    def _attend(
        self,
        q: Tensor,
        k: Tensor,
        v: Tensor,
        decided: Decided,
        return_attention_weights: bool,
        sinks: Tensor | None = None,
    ) -> Tensor | tuple[Tensor, AttentionWeights]:
        q, k, v = (x.contiguous() for x in (q, k, v))
        shape = decided.shape
        if return_attention_weights:
            kept = min(row_budget(self.config, shape.seq), self._blocks(shape))
            active = active_of_choice(self._blocks(shape), kept, shape.causal)
            check_room(self.config, shape, q, kept=active)
        blocks = self._select(q, k, shape)
        learns = torch.is_grad_enabled() and self.query_weight.requires_grad
        needs_lse = learns or return_attention_weights
        out, lse = attend(q, k, v, self._problem_over(shape, blocks), sinks=sinks, keeps_lse=needs_lse)
        if learns:
            scores = self._chosen_scores(q.detach(), k.detach(), blocks)
            gating = Gating(shape, self.block_size, self._scale(shape), self.scratch)
            out = ScoreGate.apply(out, scores, q, k, v, lse, blocks, gating)  # type: ignore[no-untyped-call]
        if not return_attention_weights:
            return out
        assert lse is not None
        pairs = chosen_pairs(blocks)
        return out, attention_weights(
            q.detach(), k.detach(), lse, pairs, self.config, shape, self._scale(shape)
        )

    @eager
    def over(self, q: Tensor, k: Tensor, v: Tensor, blocks: Tensor, is_causal: bool = False) -> Tensor:
        """Attention over blocks chosen before, as `select` gives them."""
        check(q, k, v, self.config, is_causal)
        shape = shape_of(q, k, self.config, is_causal)

        def run() -> Tensor:
            problem = self._problem_over(shape, blocks)
            return attend(q.contiguous(), k.contiguous(), v.contiguous(), problem)[0]

        return with_emergency_release(run, self.scratch, q.device)

    @eager
    def select(self, q: Tensor, k: Tensor, is_causal: bool = False) -> Tensor:
        """Chosen key blocks, int64 [B, H, blocks, kept], ascending, then -1 where there are fewer."""
        check(q, k, k, self.config, is_causal)
        shape = shape_of(q, k, self.config, is_causal)
        return with_emergency_release(lambda: self._select(q, k, shape), self.scratch, q.device)

    @torch.no_grad()
    def _select(self, q: Tensor, k: Tensor, shape: Shape) -> Tensor:
        return chosen_blocks(q, k, self.query_weight, self.key_weight, shape, self._sizes(q, shape))

    @eager
    def scorer_loss(self, q: Tensor, k: Tensor, is_causal: bool = False) -> Tensor:
        """Cross-entropy between the scorer's distribution over key blocks and dense attention's mass.

        The target is computed row chunk by row chunk and carries no gradient; what is kept for the
        scorer's gradient is of size blocks x blocks, so train at lengths where that is little.
        """
        check(q, k, k, self.config, is_causal)
        shape = shape_of(q, k, self.config, is_causal)
        return with_emergency_release(lambda: self._loss(q, k, shape), self.scratch, q.device)

    def _loss(self, q: Tensor, k: Tensor, shape: Shape) -> Tensor:
        queries, keys = self._projected(q.detach(), k.detach(), shape)
        index = torch.arange(self._blocks(shape), device=q.device)
        total = queries.new_zeros(())
        for rows in self._row_chunks(shape, q.shape[0] * self.block_size**2):
            scores = queries[:, :, rows] @ keys.transpose(-1, -2)
            if shape.causal:
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

    def _sizes(self, q: Tensor, shape: Shape) -> Scorer:
        wide = scoring_dtype(self.query_weight, q)
        return Scorer(
            size=self.block_size,
            kept=min(row_budget(self.config, shape.seq), self._blocks(shape)),
            channels=self.query_weight.shape[2],
            wide=wide.itemsize,
            casts=wide != self.query_weight.dtype,
        )

    def _projected(self, q: Tensor, k: Tensor, shape: Shape) -> tuple[Tensor, Tensor]:
        """Block means of q and k in score channels, [B, H, blocks, E], in single precision or better, with
        gradients of the projections."""
        sizes, wide = self._sizes(q, shape), scoring_dtype(self.query_weight, q)
        means = [q.new_empty(len(q), self._blocks(shape), *q.shape[2:], dtype=wide) for _ in range(2)]
        with torch.no_grad(), Scratch(Buffers.OFF, q.device, choosing_sizes(shape, sizes)) as scratch:
            scoring = Scoring(shape, sizes, wide, scratch)
            for b in range(len(q)):
                scoring.means(q[b], means[0][b])
                scoring.means(k[b], means[1][b])
        queries = means[0].transpose(1, 2) @ self.query_weight.to(wide)
        keys = means[1].transpose(1, 2) @ self.key_weight.to(wide)
        return queries / math.sqrt(queries.shape[-1]), keys

    def _chosen_scores(self, q: Tensor, k: Tensor, blocks: Tensor) -> Tensor:
        """What passes the gradient of the chosen blocks' scores [B, H, blocks, kept] to the projections."""
        shape = shape_of(q, k, self.config, is_causal=False)  # which is the blocks' concern
        scores: Tensor = ChosenScores.apply(
            self.query_weight, self.key_weight, q, k, blocks, shape, self._sizes(q, shape), self.scratch
        )  # type: ignore[no-untyped-call]
        return scores

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
            return chosen_tiles(lists[batch], rows, shape)

        by_lists = shape.windows == "any"
        return Problem(
            shape=shape,
            lists=chosen_lists(lists, calls_of_rows(rows, shape)) if by_lists else None,
            tiles=program,
            reserves=Reserves(shape, partial(sparse_extent, rows)),
            scale=self._scale(shape),
            covers=True,
            whole=False,
            buffers=self.scratch,
        )


def _orthogonal(rows: int, columns: int) -> Tensor:
    """A matrix with orthonormal rows or columns, whichever is possible, scaled to keep lengths."""
    return nn.init.orthogonal_(torch.empty(rows, columns)) * math.sqrt(max(rows / columns, 1.0))
