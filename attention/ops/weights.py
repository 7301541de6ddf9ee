"""Attention weights on request, as active blocks: memory in proportion to what is attended to.

A second pass over the active blocks computes exp(q k^T scale + log M - lse), M being how often a
query meets a key (several dilated branches may). Rows sum to one over their blocks, or to zero where
a row has no keys. Weights carry no gradient.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from attention.config import AttentionConfig
from attention.errors import OutOfMemoryError
from attention.layout import Layout, count_active
from attention.ops.kernels import lse_dtype
from attention.ops.scratch import Scratch
from attention.pool import Buffers, free_bytes
from attention.sizes.shape import Shape
from attention.sizes.token_tiles import TokenWindow, token_window_of
from attention.sizes.weights import weights_sizes, weights_step


@dataclass(frozen=True, slots=True)
class AttentionWeights:
    """Weights of the active blocks; everything else is zero.

    `block_indices`: int64 [n, 2], (query block, key block) of each active block; [B, H, n, 2] where
    every head has its own. `block_values`: [B, H, n, block_size, block_size], zero past the end of
    the sequence. `shape`: (B, H, S, S), that of the dense matrix.
    """

    block_indices: Tensor
    block_values: Tensor
    shape: tuple[int, int, int, int]
    block_size: int

    def to_dense(self) -> Tensor:
        """The matrix [B, H, S, S]; OutOfMemoryError, naming the size, if it would not fit."""
        batch, heads, seq, _ = self.shape
        size, values = self.block_size, self.block_values
        blocks = -(-seq // size)
        need = batch * heads * (blocks * size) ** 2 * values.element_size()
        _refuse_unless_free(need, f"the dense matrix {list(self.shape)}", values.device)
        dense = values.new_zeros(batch, heads, blocks, blocks, size, size)
        index = self.block_indices.expand(batch, heads, *self.block_indices.shape[-2:])
        b = torch.arange(batch, device=values.device)[:, None, None]
        h = torch.arange(heads, device=values.device)[None, :, None]
        dense[b, h, index[..., 0], index[..., 1]] = values
        return dense.permute(0, 1, 2, 4, 3, 5).reshape(batch, heads, blocks * size, -1)[..., :seq, :seq]


def weights_block(config: AttentionConfig, default: int = 64) -> int:
    """Block size in which a config gives its weights; those without blocks of their own use 64."""
    return config.pattern.block_size if config.pattern else default


def check_room(config: AttentionConfig, shape: Shape, q: Tensor, kept: int | None = None) -> None:
    """Refuses weights that would not fit, before anything is allocated. `kept`: active blocks a head,
    where the layout is not fixed by the config."""
    size = weights_block(config)
    active = count_active(config, shape.seq, shape.causal) if kept is None else kept
    need = q.shape[0] * shape.heads * active * size * size * shape.itemsize
    what = f"weights of {active:,} blocks of {size} x {size} for {q.shape[0]} x {shape.heads} heads"
    _refuse_unless_free(need, what, q.device)


def _refuse_unless_free(need: int, what: str, device: torch.device) -> None:
    free = free_bytes(device)
    if free is not None and need > free:
        raise OutOfMemoryError(
            f"{what} would take {need:,} bytes ({need / 1e9:.1f} GB), {free:,} are free on {device}; "
            "ask for weights of a shorter sequence or a sparser config",
            requested=need,
            available=free,
        )


@torch.no_grad()
def attention_weights(
    q: Tensor,
    k: Tensor,
    lse: Tensor,
    blocks: Layout | Tensor,
    config: AttentionConfig,
    shape: Shape,
    scale: float,
) -> AttentionWeights:
    """Weights over `blocks`: a layout shared by all heads, or int64 [B, H, n, 2] index pairs.

    Besides what is returned, one arena is allocated: attention/sizes/weights.py."""
    size = weights_block(config)
    index = _pairs(blocks, q.device) if isinstance(blocks, Layout) else blocks
    count = index.shape[-2]
    values = q.new_empty(q.shape[0], shape.heads, count, size, size)
    branches = shape.within(config.branches) if config.variant == "dilated" else ()
    step = weights_step(shape, size, count, len(branches))
    sizes = weights_sizes(shape, size, count, len(branches))
    with Scratch(Buffers.OFF, q.device, sizes) as scratch:
        window = token_window_of(config, shape.causal) if config.token_edges else None
        work = _Work(shape, size, scale, branches, window, scratch)
        for b in range(q.shape[0]):
            pairs = index[b] if index.dim() == 4 else index[None]
            for begin in range(0, count, step):
                part = pairs[:, begin : begin + step]
                weights = work.weights(q[b], k[b], lse[b], part)
                values[b, :, begin : begin + step].copy_(weights)
    return AttentionWeights(index, values, (q.shape[0], shape.heads, shape.seq, shape.seq), size)


def chosen_pairs(blocks: Tensor) -> Tensor:
    """Index pairs [B, H, n, 2] of chosen blocks [B, H, rows, kept], without the -1 at the end of the
    first rows, which are as many in every head. Nothing else is allocated."""
    rows, kept = blocks.shape[2:]
    counts = (blocks[0, 0] >= 0).sum(-1).tolist()
    pairs = blocks.new_empty(*blocks.shape[:2], sum(counts), 2)
    begin = 0
    for row, there in enumerate(counts):
        if there == kept:  # and so in all that follow
            rest = pairs[:, :, begin:].unflatten(2, (rows - row, kept))
            rest[..., 0].copy_(torch.arange(row, rows, device=blocks.device)[:, None])
            rest[..., 1].copy_(blocks[:, :, row:])
            break
        pairs[:, :, begin : begin + there, 0].fill_(row)
        pairs[:, :, begin : begin + there, 1].copy_(blocks[:, :, row, :there])
        begin += there
    return pairs


def _pairs(layout: Layout, device: torch.device) -> Tensor:
    """Index pairs [n, 2] of a layout."""
    pairs = torch.empty(layout.active, 2, dtype=torch.int64)
    filled = pairs.numpy()
    filled[:, 0] = np.repeat(np.arange(layout.blocks), layout.counts)
    filled[:, 1] = layout.cols
    return pairs.to(device)


@dataclass(frozen=True, slots=True)
class _Work:
    """Computes weights of some active blocks at a time, in the buffers of a scratch: the CPU's operators
    would make copies where types are mixed, and fresh tensors at every step."""

    shape: Shape
    size: int
    scale: float
    branches: tuple[tuple[int, int], ...]
    """The branches of a dilated config, else none."""
    window: TokenWindow | None
    """One that ends at the token."""
    scratch: Scratch

    def weights(self, q: Tensor, k: Tensor, lse: Tensor, pairs: Tensor) -> Tensor:
        """[H, n, size, size] of block pairs [H or 1, n, 2], from q [S, H, D], k [S, G, D], lse [S, H]."""
        shape, size = self.shape, self.size
        count = pairs.shape[1]
        query, key = self._both_tokens(pairs)
        keys = self._rows("k", k, key)
        queries = self._rows("q", q, query)
        log_sum = self._rows("lse", lse[..., None], query)
        scores = self._get("scores", (shape.heads * count, size, size), keys.dtype)
        torch.bmm(queries, keys.transpose(1, 2), out=scores)
        scores.mul_(self.scale).sub_(log_sum).exp_()
        weights = scores.view(shape.heads, count, size, size)
        if self.window is not None:
            self._hide_before(weights, query, key, self.window)
            query, key = self._both_tokens(pairs)
        self._select(weights, query, key)
        return weights

    def _both_tokens(self, pairs: Tensor) -> tuple[Tensor, Tensor]:
        """The tokens of the query and of the key blocks of pairs; see `_tokens`."""
        return self._tokens("query", pairs[..., 0]), self._tokens("key", pairs[..., 1])

    def _get(self, name: str, shape: Sequence[int], dtype: torch.dtype) -> Tensor:
        return self.scratch.get(name, shape, dtype)

    def _tokens(self, name: str, blocks: Tensor) -> Tensor:
        """The tokens [H or 1, n, size] of blocks [H or 1, n]; those past the end are there too."""
        tokens = self._get(name, (*blocks.shape, self.size), torch.int64)
        place = self._get("place", (self.size,), torch.int64)
        torch.arange(self.size, out=place)
        return tokens.copy_(place).add_(blocks[..., None], alpha=self.size)

    def _rows(self, name: str, x: Tensor, tokens: Tensor) -> Tensor:
        """x [S, heads, D] at the tokens as every query head sees it, [H n, size, D] in single precision or
        better; tokens past the end are the last one."""
        shape, dim, wide = self.shape, x.shape[2], lse_dtype(x.dtype)
        index = self._get("index", tokens.shape, torch.int64)
        index.copy_(tokens).clamp_max_(shape.seq - 1)
        copied = self._get(name, (shape.heads, index[0].numel(), dim), wide)
        narrow = copied if wide == x.dtype else self._get("row", copied.shape, x.dtype)
        for h in range(shape.heads):
            at = index[h % len(index)].view(-1)
            torch.index_select(x[:, h * x.shape[1] // shape.heads], 0, at, out=narrow[h])
        if narrow is not copied:
            copied.copy_(narrow)
        return copied.view(-1, self.size, dim)

    def _select(self, weights: Tensor, query: Tensor, key: Tensor) -> None:
        """Each weight times how often its query and key meet. Not selected must be an exact zero,
        whatever the score was."""
        shape = self.shape
        if self.branches:
            self._multiply(weights, query, key)
        past = self._get("past", query.shape, torch.bool)
        window = None if shape.causal else self.window
        if window is not None:  # global keys are behind no query, and no key is behind a global query
            key.masked_fill_(torch.lt(key, window.shared, out=past), -1)
            query.masked_fill_(torch.lt(query, window.shared, out=past), shape.seq - 1)
        torch.gt(query, shape.seq - 1, out=past)
        if window is not None:
            query.add_(window.side).clamp_max_(shape.seq - 1)
        elif not shape.causal:
            query.fill_(shape.seq - 1)
        query.masked_fill_(past, -1)  # the last key that each query sees
        hidden = self._get("hidden", (*query.shape, self.size), torch.bool)
        torch.gt(key[..., None, :], query[..., :, None], out=hidden)
        weights.masked_fill_(hidden, 0.0)

    def _hide_before(self, weights: Tensor, query: Tensor, key: Tensor, window: TokenWindow) -> None:
        """Makes a zero of what is too far before a query, but for global keys. Writes over the tokens."""
        past = torch.lt(key, window.shared, out=self._get("past", key.shape, torch.bool))
        key.masked_fill_(past, self.shape.seq)
        query.sub_(window.side)
        hidden = self._get("hidden", (*query.shape, self.size), torch.bool)
        torch.lt(key[..., None, :], query[..., :, None], out=hidden)
        weights.masked_fill_(hidden, 0.0)

    def _multiply(self, weights: Tensor, query: Tensor, key: Tensor) -> None:
        """weights times the number of branches in which query and key meet."""
        meets = self._get("meets", weights.shape, torch.bool)
        several = len(self.branches) > 1
        times = self._get("times", weights.shape, torch.uint8).zero_() if several else None
        for length, rate in self.branches:
            queries = self._segments("query segment", query, length, rate, -1)
            keys = self._segments("key segment", key, length, rate, -2)
            torch.eq(queries[..., :, None], keys[..., None, :], out=meets)
            if times is not None:
                times.add_(meets.view(torch.uint8))
        if times is None:
            torch.logical_not(meets, out=meets)
        else:
            weights.mul_(self._get("factor", weights.shape, weights.dtype).copy_(times))
            torch.eq(times, 0, out=meets)
        weights.masked_fill_(meets, 0.0)

    def _segments(self, name: str, tokens: Tensor, length: int, rate: int, none: int) -> Tensor:
        """[H, n, size]: the segment in which each head meets each token, `none` where it does not."""
        shape = (self.shape.heads, *tokens.shape[1:])
        offset = self._get("offset", shape, torch.int64).copy_(tokens).remainder_(length).remainder_(rate)
        for h in range(shape[0]):
            offset[h].sub_(h % rate)
        apart = torch.ne(offset, 0, out=self._get("apart", shape, torch.bool))
        segments = self._get(name, shape, torch.int64).copy_(tokens)
        return segments.div_(length, rounding_mode="floor").masked_fill_(apart, none)
