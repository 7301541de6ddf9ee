"""Attention weights on request, as active blocks: memory in proportion to what is attended to.

A second pass over the active blocks computes exp(q k^T scale + log M - lse), M being how often a
query meets a key (several dilated branches may). Rows sum to one over their blocks, or to zero where
a row has no keys. Weights carry no gradient.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from attention.config import AttentionConfig
from attention.errors import OutOfMemoryError
from attention.layout import Layout, count_active
from attention.ops.kernels import lse_dtype
from attention.ops.program import Shape
from attention.pool import free_bytes


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


def attention_weights(
    q: Tensor,
    k: Tensor,
    lse: Tensor,
    blocks: Layout | Tensor,
    config: AttentionConfig,
    shape: Shape,
    scale: float,
) -> AttentionWeights:
    """Weights over `blocks`: a layout shared by all heads, or int64 [B, H, n, 2] index pairs."""
    size = weights_block(config)
    index = torch.from_numpy(_pairs(blocks)).to(q.device) if isinstance(blocks, Layout) else blocks
    count = index.shape[-2]
    values = q.new_empty(q.shape[0], shape.heads, count, size, size)
    inside = torch.arange(size, device=q.device)
    # One block of scores in single precision, its operands and a temporary.
    step = max(shape.workspace // (4 * shape.heads * size * (size + 2 * shape.head_dim) * 4), 1)
    for b in range(q.shape[0]):
        for begin in range(0, count, step):
            part = (
                index[b, :, begin : begin + step] if index.dim() == 4 else index[None, begin : begin + step]
            )
            tokens = part[..., None] * size + inside  # [H or 1, n, 2, size]
            query, key = tokens[:, :, 0], tokens[:, :, 1]
            values[b, :, begin : begin + step] = _block_weights(
                q[b], k[b], lse[b], query, key, config, shape, scale
            )
    return AttentionWeights(index, values, (q.shape[0], shape.heads, shape.seq, shape.seq), size)


def _pairs(layout: Layout) -> npt.NDArray[np.int64]:
    rows = np.repeat(np.arange(layout.blocks), layout.counts)
    return np.stack([rows, layout.cols.astype(np.int64)], axis=-1)


def _block_weights(
    q: Tensor,
    k: Tensor,
    lse: Tensor,
    query: Tensor,
    key: Tensor,
    config: AttentionConfig,
    shape: Shape,
    scale: float,
) -> Tensor:
    """[H, n, size, size] weights of queries [H or 1, n, size] and keys, from q [S, H, D], lse [S, H]."""
    heads = torch.arange(shape.heads, device=q.device)[:, None, None]
    last = shape.seq - 1
    past_end = (query > last)[..., :, None] | (key > last)[..., None, :]
    q_at, k_at = query.clamp_max(last), key.clamp_max(last)
    wide = lse_dtype(q.dtype)
    q_rows = q[q_at, heads].to(wide)
    k_rows = k[k_at, heads * shape.kv_heads // shape.heads].to(wide)
    scores = (q_rows @ k_rows.transpose(-1, -2)).mul_(scale)
    times = multiplicity(config, q_at, k_at, heads, shape)
    rows = lse[q_at, heads][..., None]
    weights = (scores - rows.masked_fill(rows == -torch.inf, torch.inf)).exp_()
    # Not selected must be an exact zero, whatever the score was.
    return torch.where(past_end | (times == 0), 0.0, weights * times)


def multiplicity(config: AttentionConfig, query: Tensor, key: Tensor, heads: Tensor, shape: Shape) -> Tensor:
    """How often each (query, key) pair of an active block meets, [H or 1, n, size, size]."""
    q, k = query[..., :, None], key[..., None, :]
    times = torch.ones((), dtype=torch.int64, device=query.device)
    if config.variant == "dilated":
        h = heads[..., None]
        times = sum(
            (
                (q // s == k // s) & ((q % s) % r == h % r) & ((k % s) % r == h % r)
                for s, r in shape.within(config.branches)
            ),
            start=torch.zeros((), dtype=torch.int64, device=query.device),
        )
    if shape.causal:
        times = times * (k <= q)
    return times
