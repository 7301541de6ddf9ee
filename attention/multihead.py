"""Multihead attention: projections around any attention of this library.

Stands where `torch.nn.MultiheadAttention(batch_first=True)` stands: the same parameter names, so that
its state dict loads, the same call, and (out, weights) as the result. Two differences: weights come
only when asked for, and as active blocks.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from attention.adaptive import AdaptiveAttention
from attention.config import AttentionConfig
from attention.errors import InputError
from attention.module import Attention
from attention.ops.weights import AttentionWeights


class MultiheadAttention(nn.Module):
    """`module(query, key, value, is_causal=False, need_weights=False) -> (out, AttentionWeights | None)`.

    query, key and value are [batch, seq, embed_dim], or [seq, embed_dim].
    """

    batch_first = True
    dropout = 0.0
    # torch's encoder layer has a fast path that reads the weights and computes dense attention by
    # itself; it stays out where this is false.
    _qkv_same_embed_dim = False

    def __init__(self, config: AttentionConfig) -> None:
        super().__init__()
        assert config.multihead is not None
        sizes = config.multihead
        self.config = config
        self.embed_dim, self.num_heads, self.head_dim = sizes.embed_dim, sizes.num_heads, sizes.head_dim
        self.kv_heads = sizes.kv_heads or sizes.num_heads
        self.attention = AdaptiveAttention(config) if config.adaptive else Attention(config)
        rows = self.embed_dim + 2 * self.kv_heads * self.head_dim
        self.in_proj_weight = nn.Parameter(torch.empty(rows, self.embed_dim))
        self.in_proj_bias = nn.Parameter(torch.zeros(rows)) if sizes.bias else None
        self.out_proj = nn.Linear(self.embed_dim, self.embed_dim, bias=sizes.bias)
        nn.init.xavier_uniform_(self.in_proj_weight)
        if sizes.bias:
            nn.init.zeros_(self.out_proj.bias)

    def forward(
        self,
        query: Tensor,
        key: Tensor,
        value: Tensor,
        key_padding_mask: Tensor | None = None,
        need_weights: bool = False,
        attn_mask: Tensor | None = None,
        average_attn_weights: bool = False,
        is_causal: bool = False,
        return_attention_weights: bool = False,
    ) -> tuple[Tensor, AttentionWeights | None]:
        """`attn_mask` is taken only with `is_causal=True`, as torch's hint that it is the causal one."""
        if key_padding_mask is not None or (attn_mask is not None and not is_causal):
            raise InputError(
                "masks are given by the config's pattern and is_causal; got a "
                f"{'key_padding_mask' if key_padding_mask is not None else 'attn_mask'}: drop it, and "
                "cut padding off instead (any length runs)"
            )
        self._check(query, key, value)
        wanted = need_weights or return_attention_weights
        batched = query.dim() == 3
        if not batched:
            query, key, value = query[None], key[None], value[None]
        if (
            self.config.multihead
            and self.config.multihead.checkpoint
            and torch.is_grad_enabled()
            and not wanted
        ):
            out = checkpoint(self._attend, query, key, value, is_causal, False, use_reentrant=False)[0]
            weights = None
        else:
            out, weights = self._attend(query, key, value, is_causal, wanted)
        if weights is not None and average_attn_weights:
            weights = _averaged(weights)
        return (out if batched else out[0]), weights

    def _check(self, query: Tensor, key: Tensor, value: Tensor) -> None:
        """Raises InputError unless the streams go together and with the parameters."""
        weight = self.in_proj_weight
        for name, x in (("query", query), ("key", key), ("value", value)):
            if not isinstance(x, Tensor):
                raise InputError(f"{name} must be a tensor, got {type(x).__name__}")
            if x.dim() not in (2, 3) or x.shape[-1] != self.embed_dim:
                raise InputError(f"{name} must be [batch, seq, {self.embed_dim}], got shape {tuple(x.shape)}")
            if 0 in x.shape:
                raise InputError(
                    f"{name} must not be empty, got shape {tuple(x.shape)}; pass at least 1 token"
                )
            if x.shape != query.shape:
                raise InputError(
                    f"query, key and value must agree in batch and seq, got {tuple(query.shape)} and "
                    f"{name} {tuple(x.shape)}"
                )
            if x.device != weight.device:
                raise InputError(f"{name} is on {x.device}, the module on {weight.device}; move one of them")
            if x.dtype != weight.dtype and not torch.is_autocast_enabled(x.device.type):
                raise InputError(
                    f"{name} is {x.dtype}, the module {weight.dtype}; convert one of them or use autocast"
                )

    def _attend(
        self, query: Tensor, key: Tensor, value: Tensor, is_causal: bool, wanted: bool
    ) -> tuple[Tensor, AttentionWeights | None]:
        widths = [self.embed_dim, self.kv_heads * self.head_dim, self.kv_heads * self.head_dim]
        weights_in = self.in_proj_weight.split(widths)
        biases = [None] * 3 if self.in_proj_bias is None else self.in_proj_bias.split(widths)
        q, k, v = (
            nn.functional.linear(x, weight, bias).unflatten(-1, (-1, self.head_dim))
            for x, weight, bias in zip((query, key, value), weights_in, biases, strict=True)
        )
        found = self.attention(q, k, v, is_causal, wanted)
        out, weights = found if isinstance(found, tuple) else (found, None)
        return self.out_proj(out.flatten(2)), weights


def _averaged(weights: AttentionWeights) -> AttentionWeights:
    """Mean over heads, as one head."""
    if weights.block_indices.dim() == 4:
        raise InputError(
            "average_attn_weights=True needs heads that share their blocks; an adaptive attention's do not"
        )
    batch, _, seq, _ = weights.shape
    values = weights.block_values.mean(1, keepdim=True)
    return AttentionWeights(weights.block_indices, values, (batch, 1, seq, seq), weights.block_size)
