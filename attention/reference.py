"""The oracle: dense attention in float64, written to be obviously right rather than fast.

It shares no code with the layouts and kernels that it judges. Everything is of size seq x seq, and
the masks come from Python loops over the rules, so it is for lengths up to a few hundred.
"""

from __future__ import annotations

import math
from functools import lru_cache
from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from attention.config import AttentionConfig, SparsePatternConfig
from attention.errors import ConfigError, InputError


def reference_attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    config: AttentionConfig,
    is_causal: bool = False,
    layout: Tensor | None = None,
    documents: Tensor | None = None,
    sinks: Tensor | None = None,
) -> Tensor:
    """softmax(q k^T * scale + log M) v in float64, M[h, q, k] from `multiplicity`; differentiable.

    q is [batch, queries, heads, head_dim], the last tokens of the sequence of k and v [batch, seq, kv_heads,
    head_dim], and query head h reads head h // (heads // kv_heads) of them. A query whose M is zero for every
    key yields zero. `documents` [batch, seq]: M is zero between tokens of different numbers. `sinks` [heads]:
    a logit each that joins the softmax of every query, without a value.
    An adaptive config needs `layout`, the key blocks chosen: integers [batch, heads, blocks, kept],
    -1 for padding. The projections of `config.multihead` are not applied.
    """
    heads, kv_heads, seq, queries = q.shape[2], k.shape[2], k.shape[1], q.shape[1]
    alike = (q.shape[0], q.shape[3]) == (k.shape[0], k.shape[3])
    if k.shape != v.shape or not alike or queries > seq or heads % kv_heads:
        raise InputError(
            "q must be [batch, queries, heads, head_dim] and k, v [batch, seq, kv_heads, head_dim] with "
            "queries at most seq and kv_heads dividing heads, got "
            f"q {list(q.shape)}, k {list(k.shape)}, v {list(v.shape)}"
        )
    if config.variant == "adaptive":
        m = _chosen(config, seq, is_causal, layout)
    elif layout is None:
        m = multiplicity(config, seq, heads, is_causal)
    else:
        raise ConfigError(f"variant {config.variant!r} follows from its config alone; pass no layout")
    m = m[..., seq - queries :, :].to(q.device)
    if documents is not None:
        if list(documents.shape) != [k.shape[0], seq]:
            raise InputError(
                f"documents must be [batch, seq], {[k.shape[0], seq]}, got {list(documents.shape)}"
            )
        same = documents[:, seq - queries :, None] == documents[:, None, :]
        m = m * same[:, None].to(q.device)
    query, key, value = (x.double().transpose(1, 2) for x in (q, k, v))
    key, value = (x.repeat_interleave(heads // kv_heads, dim=1) for x in (key, value))
    scale = 1 / math.sqrt(q.shape[3]) if config.scale is None else config.scale
    visible = (m > 0).expand(*query.shape[:2], queries, seq)
    scores: Tensor = _Scores.apply(query, key, visible) * scale  # type: ignore[no-untyped-call]
    # A row of nothing but -inf would make NaN of both the maximum's difference and 0 / 0.
    highest = scores.detach().amax(dim=-1, keepdim=True)
    logits = None if sinks is None else sinks.double()[:, None, None]
    if logits is not None:
        highest = torch.maximum(highest, logits.detach())
    highest = highest.masked_fill(highest == -math.inf, 0.0)
    weights = m * torch.exp(scores - highest)
    total = weights.sum(dim=-1, keepdim=True)
    if logits is not None:
        total = total + torch.exp(logits - highest)
    mixed: Tensor = _Mix.apply(weights / total.masked_fill(total == 0, 1.0), value, visible)  # type: ignore[no-untyped-call]
    return mixed.transpose(1, 2)


# Zero times NaN is NaN: pairs that do not see each other are left out of sums, not multiplied by zero.


class _Scores(torch.autograd.Function):
    """query @ key^T where `visible`, minus infinity elsewhere."""

    @staticmethod
    def forward(ctx: Any, query: Tensor, key: Tensor, visible: Tensor) -> Tensor:
        ctx.save_for_backward(query, key, visible)
        return (query @ key.transpose(-1, -2)).masked_fill(~visible, -math.inf)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, Tensor, None]:
        query, key, visible = ctx.saved_tensors
        return _over(grad, key, visible), _over(grad.mT, query, visible.mT), None


class _Mix(torch.autograd.Function):
    """weights @ value over the `visible` pairs."""

    @staticmethod
    def forward(ctx: Any, weights: Tensor, value: Tensor, visible: Tensor) -> Tensor:
        ctx.save_for_backward(weights, value, visible)
        return _over(weights, value, visible)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, Tensor, None]:
        weights, value, visible = ctx.saved_tensors
        of_weights = (grad @ value.transpose(-1, -2)).masked_fill(~visible, 0.0)
        return of_weights, _over(weights.mT, grad, visible.mT), None


def _over(factors: Tensor, x: Tensor, visible: Tensor) -> Tensor:
    """factors [..., T, K] @ x [..., K, D], where token k of x goes into row t only if it is `visible`
    [..., T, K]."""
    wild = ~x.isfinite().all(-1, keepdim=True)
    total = factors.masked_fill(~visible, 0.0) @ x.masked_fill(wild, 0.0)
    for token in wild.flatten(0, -3).any(0)[:, 0].nonzero().flatten().tolist():
        of_token = factors[..., token, None] * x[..., token, None, :]
        there = visible[..., token, None] & wild[..., token, None, :]
        total = total + of_token.masked_fill(~there, 0.0)
    return total


@lru_cache(maxsize=16)
@torch.inference_mode(False)  # what is cached under inference mode could never be used in a backward
def multiplicity(config: AttentionConfig, seq: int, heads: int, is_causal: bool) -> Tensor:
    """M, float64 [heads, seq, seq]: how often head h pairs query q with key k.

    dilated: the number of branches (s, r) in which both positions p lie in one segment p // s and
    have (p % s) % r == h % r. block_sparse: 1 where the key's block is kept for the query's block; with
    edges="token", where the key is in the query's window, or one of the two is global. dense: 1. Causal: 0
    for k > q. The result is cached and shared: do not write to it.
    """
    if config.variant == "adaptive":
        raise ConfigError(_NEEDS_LAYOUT)
    m = torch.zeros(heads, seq, seq, dtype=torch.float64)
    if config.variant == "dense":
        m += 1
    elif config.variant == "dilated":
        for length, rate in config.branches:
            for h in range(heads):
                for begin in range(0, seq, length):
                    end = min(begin + length, seq)
                    positions = torch.tensor([p for p in range(begin, end) if (p - begin) % rate == h % rate])
                    if positions.numel():
                        m[h, positions[:, None], positions] += 1
    elif config.token_edges:
        assert config.pattern is not None
        for q in range(seq):
            m[:, q, [k for k in range(seq) if _sees_token(config.pattern, q, k, is_causal)]] = 1
    else:
        assert config.pattern is not None
        size = config.pattern.block_size
        for i, row in enumerate(_kept_blocks(config, config.pattern, -(-seq // size), is_causal)):
            for c in row:
                m[:, i * size : (i + 1) * size, c * size : (c + 1) * size] = 1
    return m.tril() if is_causal else m


_NEEDS_LAYOUT = (
    "variant 'adaptive' chooses its blocks from q and k, so its config alone says nothing of them; "
    "pass layout=module.select(q, k) to reference_attention"
)


def _chosen(config: AttentionConfig, seq: int, is_causal: bool, layout: Tensor | None) -> Tensor:
    """[batch, heads, seq, seq], 1 where the key's block is in the query block's row of `layout`."""
    if layout is None:
        raise ConfigError(_NEEDS_LAYOUT)
    assert config.pattern is not None
    size = config.pattern.block_size
    batch, heads, blocks, _ = layout.shape
    m = torch.zeros(batch, heads, seq, seq, dtype=torch.float64)
    for n in range(batch):
        for h in range(heads):
            for i in range(blocks):
                for c in layout[n, h, i].tolist():
                    if c >= 0:
                        m[n, h, i * size : (i + 1) * size, c * size : (c + 1) * size] = 1
    return m.tril() if is_causal else m


def _sees_token(pattern: SparsePatternConfig, q: int, k: int, causal: bool) -> bool:
    """Whether query q sees key k of a pattern that ends at the token."""
    shared = pattern.global_tokens if pattern.pattern_type == "global_local" else 0
    if causal:
        return k <= q and (q - k <= pattern.local_window_size or k < shared)
    return abs(q - k) <= pattern.local_window_size // 2 or k < shared or q < shared


def _kept_blocks(
    config: AttentionConfig, pattern: SparsePatternConfig, blocks: int, causal: bool
) -> list[set[int]]:
    """The key blocks of each query block of a block_sparse config."""
    size = pattern.block_size
    if pattern.pattern_type == "dilated_sparse":
        budget = max(1, math.floor(pattern.sparsity_ratio * blocks + 0.5))
        branches = [(length // size, rate) for length, rate in config.branches]
        return [_nearest_in_turn(branches, i, blocks, budget, causal) for i in range(blocks)]
    shared = -(-pattern.global_tokens // size) if pattern.pattern_type == "global_local" else 0
    rows = []
    for i in range(blocks):
        if causal:
            row = {c for c in range(i + 1) if i - c <= pattern.local_window_size // size}
        else:
            row = {c for c in range(blocks) if abs(i - c) <= pattern.local_window_size // (2 * size)}
        row |= set(range(blocks if i < shared else min(shared, blocks)))
        rows.append({c for c in row if c <= i or not causal})
    return rows


def _nearest_in_turn(
    branches: list[tuple[int, int]], i: int, blocks: int, budget: int, causal: bool
) -> set[int]:
    """Block i, then the branches' candidates by turns, nearest first, until there are `budget`.

    The candidates of a branch (blocks a segment n, rate r) share i's segment at a multiple of r.
    """
    queues = []
    for n, r in branches:
        candidates = [
            c for c in range(i if causal else blocks) if c != i and c // n == i // n and (c - i) % r == 0
        ]
        queues.append(sorted(candidates, key=lambda c: (abs(c - i), c)))
    kept = {i}
    for turn in range(blocks):
        for queue in queues:
            if turn < len(queue) and len(kept) < budget:
                kept.add(queue[turn])
    return kept
